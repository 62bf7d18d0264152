"""The benchmark stage: measures the original and the shrunk model, in fresh processes, and sets them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import StartError
from compress.locating import adapter_beside
from compress.measure.jobs import JobResult, fingerprint, key_of, run_job
from compress.measure.measurements import BenchmarkJob, Measurements
from compress.measure.quality import quality
from compress.progress import Progress
from compress.registry import METRICS
from compress.reports.report import Figure, Other, Report

if TYPE_CHECKING:
    from torch import Tensor

#: Prompt and new tokens of the memory measurement.
MEMORY_PROMPT, MEMORY_TOKENS = 16, 8
#: Models up to this size have their memory measured while their quality is.
BESIDE_LIMIT = 500_000_000


def measure_original(
    model: str, *, job: BenchmarkJob, workdir: Path, speed: bool = False, progress: Progress | None = None
) -> Measurements:
    """Measures the original by itself: quality, size, memory; `speed` too when nothing will be compared with it.

    Kept in `workdir` under the fingerprint of the model's files, the job and the versions; asked for again, the same
    figures come back without measuring. `model`: a folder, `builtin:<name>` or a hub id.
    """
    from compress.locating import locate
    from compress.measure.runtimes import is_causal, read_config

    found = Measurements(model, locate(model))
    causal = is_causal(read_config(found.folder))
    state = fingerprint(found.folder)
    with (progress or Progress()).step("measuring the original", total=2 + speed) as step:
        key = key_of(state, job.device, job.threads, job.dtype)
        with _meanwhile(partial(_memory, found, job, workdir, dtype=job.dtype, key=key), job, found):
            quality(found, job, workdir, state, causal=causal, original=None)
            step.advance("quality")
        step.advance("memory")
        if speed:
            _speed(found, None, job, workdir)
            step.advance("speed")
    _files(found, int(found.records["parameters"][0]))
    _figures(found, job, is_original=True)
    return found


def measure_compressed(
    folder: Path | str,
    original: str,
    original_measurements: Measurements,
    *,
    job: BenchmarkJob,
    workdir: Path,
    progress: Progress | None = None,
) -> Measurements:
    """Measures an exported folder (`DIR` or `DIR/model`) beside the original, each in fresh processes.

    Quality through plain transformers wherever it loads the folder (in lock step with the original where KL or
    agreement is wanted), memory and speed through `compress.load`; speeds of both are taken in turn.
    """
    from compress.locating import locate
    from compress.measure.runtimes import is_causal, read_config

    found = Measurements(str(folder), locate(folder))
    first = original_measurements
    causal = is_causal(read_config(found.folder)) and is_causal(read_config(first.folder))
    state = key_of(fingerprint(first.folder), fingerprint(found.folder))
    with (progress or Progress()).step("measuring the compressed model", total=3) as step:
        with _meanwhile(partial(_memory, found, job, workdir, dtype="auto", key=None), job, first):
            quality(found, job, workdir, state, causal=causal, original=first)
            step.advance("quality")
        step.advance("memory")
        _speed(found, first, job, workdir)
        step.advance("speed")
    _files(found, int(first.records["parameters"][0]))
    _figures(found, job, is_original=False)
    return found


def benchmark(
    models: Sequence[str],
    job: BenchmarkJob,
    workdir: Path,
    *,
    name: str = "benchmark",
    progress: Progress | None = None,
) -> Report:
    """Measures models against the first of them. The second's figures are the report's `compressed`; `others` has
    the rest."""
    from compress.measure.comparison import compare, original_figures
    from compress.measure.environment import environment
    from compress.measure.flips import flips, worst

    if not models:
        raise StartError("compress benchmark needs a model: the original, then those to compare with it.")
    first = measure_original(models[0], job=job, workdir=workdir, speed=len(models) == 1, progress=progress)
    report = Report(name=name, recipe={"model": models[0], "models": list(models)})
    report.environment = environment(threads=job.threads, device=job.device)
    report.original, report.notes = first.figures, list(first.notes)
    for i, model in enumerate(models[1:]):
        found = measure_compressed(model, models[0], first, job=job, workdir=workdir, progress=progress)
        report.notes += found.notes
        if i == 0:
            report.original = original_figures(first, found)
            report.compressed, report.comparison = found.figures, compare(first, found, seed=job.seed)
            report.generations = generations(job, first, found)
            report.flips, report.worst = flips(first, found), worst(found)
        else:
            compared = compare(first, found, seed=job.seed)
            other = Other(model=model, measurements=found.figures, comparison=compared)
            other.flips, other.worst = flips(first, found), worst(found)
            report.others.append(other)
    return report


def generations(job: BenchmarkJob, original: Measurements, compressed: Measurements) -> list[dict[str, str]]:
    """What both models write after each prompt, side by side."""
    rows = zip(job.prompts, original.generations, compressed.generations, strict=False)
    return [{"prompt": prompt, "original": a, "compressed": b} for prompt, a, b in rows]


@contextmanager
def _meanwhile(work: Callable[[], None], job: BenchmarkJob, largest: Measurements) -> Iterator[None]:
    """Does `work` beside the block where that disturbs nothing (memory is not time) and fits; else after it."""
    size = sum(file.stat().st_size for file in largest.folder.glob("*.safetensors"))
    if job.device != "cpu" or size > BESIDE_LIMIT:
        yield
        work()
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(work)
        yield
        running.result()


def _memory(found: Measurements, job: BenchmarkJob, workdir: Path, *, dtype: str, key: str | None) -> None:
    if not job.wants("memory"):
        return
    from transformers import AutoConfig

    from compress.locating import context_length

    context = context_length(AutoConfig.from_pretrained(found.folder)) or MEMORY_PROMPT + MEMORY_TOKENS
    tokens = max(2, min(MEMORY_TOKENS, context // 2))
    request = {
        "kind": "memory", "model": str(found.folder), "dtype": dtype, "device": job.device, "threads": job.threads,
        "seed": job.seed, "prompt_length": max(1, min(MEMORY_PROMPT, context - tokens)), "new_tokens": tokens,
    }  # fmt: skip
    result = run_job(request, workdir, key=key)
    _take(found, result, ("memory",))
    found.records["peak_memory_bytes"] = [result.values["peak_memory_bytes"]]
    found.records["above_import_bytes"] = [result.values["above_import_bytes"]]


def _speed(found: Measurements, original: Measurements | None, job: BenchmarkJob, workdir: Path) -> None:
    if not job.wants("speed"):
        return
    import torch

    pair = [found] if original is None else [original, found]
    request = {
        "kind": "speed", "model": str(found.folder), "models": [str(each.folder) for each in pair],
        "dtypes": [job.dtype, "auto"][: len(pair)], "speed": asdict(job.speed), "device": job.device,
        "threads": job.threads, "seed": job.seed,
    }  # fmt: skip
    result = run_job(request, workdir, inputs={"prompt": _prompt(found.folder, job).to(torch.int64)})
    found.notes += result.values["notes"]
    names = result.values["runtimes"]
    found.runtimes["speed"] = names[-1]
    records = {key: value.numpy() for key, value in result.records.items()}
    found.records |= _prefixed(records, f"{len(pair) - 1}/")
    if original is not None:
        found.beside = _prefixed(records, "0/")
        found.runtimes["beside"] = names[0]
    for key in ("decode_tokens_per_second", "first_token_seconds", "energy_joules_per_token"):
        if not result.values["generates"][-1]:
            found.reasons[key] = "the model does not generate text"
    found.reasons.setdefault("energy_joules_per_token", result.values["no_energy"])


def _prompt(folder: Path, job: BenchmarkJob) -> Tensor:
    """Real text when there is some, else tokens drawn by the seed; int64 [length]."""
    import torch
    from transformers import AutoConfig

    # images have none
    vocabulary = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", 1)
    if job.windows is not None and job.mask is None:
        flat = job.windows.flatten()
        # Of a smaller vocabulary, both models are given ids that both have: speed does not ask what they mean.
        return flat.repeat(-(-job.speed.prompt // len(flat)))[: job.speed.prompt].remainder(vocabulary)
    return torch.randint(0, vocabulary, (job.speed.prompt,), generator=torch.Generator().manual_seed(job.seed))


def _prefixed(records: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in records.items() if key.startswith(prefix)}


def _files(found: Measurements, original_parameters: int) -> None:
    adapter = adapter_beside(found.folder)
    folders = [found.folder] if adapter is None else [found.folder, adapter]
    sizes = [file.stat().st_size for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    found.records |= {"file_bytes": sizes, "total_bytes": [sum(sizes)], "original_parameters": [original_parameters]}


def _take(found: Measurements, result: JobResult, needs: tuple[str, ...]) -> None:
    for need in needs:
        found.runtimes[need] = result.values["runtime"]
    found.notes += [note for note in result.values["notes"] if note not in found.notes]


def _figures(found: Measurements, job: BenchmarkJob, *, is_original: bool) -> None:
    """Every wanted metric from the records; null with the reason where its records are missing."""
    for name in job.names():
        metric = METRICS.get(name)
        if is_original and metric.of_original is not None:
            found.figures[name] = _by_definition(metric, found)
            continue
        if "reference_text_nll" in found.records and name == "bits_per_byte":
            before = {key: found.records[f"reference_{key}"] for key in ("text_nll", "text_bytes")}
            beside = figure_of(metric, name, before, found)
            assert beside is not None
            found.beside_figures[name] = beside
        figure = figure_of(metric, name, found.records, found)
        if figure is not None:
            found.figures[name] = figure
            for area, entry in figure.detail.get("areas", {}).items():
                detail = {"metrics": found.task_metrics[area]} if area in found.task_metrics else {}
                found.figures[f"{name}/{area}"] = _like(figure, {**entry, "detail": detail})
            if "areas" in figure.detail:
                found.figures[name] = figure.model_copy(update={"detail": {}})
        if "speed" in metric.needs and found.beside:
            beside = figure_of(metric, name, found.beside, found, runtime=found.runtimes.get("beside"))
            if beside is not None:
                found.beside_figures[name] = beside


def figure_of(
    metric: Any, name: str, records: Mapping[str, Any], found: Measurements, *, runtime: str | None = None
) -> Figure | None:
    """One metric computed from records. None for a speed that was not to be measured by now."""
    needs = sorted(metric.needs)
    missing = [key for key in (metric.predictions, metric.references) if key is not None and key not in records]
    if missing:
        reason = next((found.reasons[key] for key in (name, *needs) if key in found.reasons), None)
        if "speed" in metric.needs and "speed" not in found.runtimes:
            return None
        return Figure(value=None, reason=reason or f"nothing was recorded for it ({', '.join(missing)})")
    arguments = {"predictions": list(records[metric.predictions])}
    if metric.references is not None:
        arguments["references"] = list(records[metric.references])
    computed = metric().compute(**arguments)
    if name == "peak_memory_bytes":
        computed["detail"] = {"above_import_bytes": found.records["above_import_bytes"][0]}
    runtime = runtime or next((found.runtimes[need] for need in needs if need in found.runtimes), None)
    return Figure(unit=metric.unit, higher_is_better=metric.higher_is_better, runtime=runtime, **computed)


def _by_definition(metric: Any, found: Measurements) -> Figure:
    if "text" in metric.needs and "nll" not in found.records:
        return Figure(value=None, reason=found.reasons["text"])
    return Figure(
        value=metric.of_original, unit=metric.unit, higher_is_better=metric.higher_is_better,
        runtime=found.runtimes["text"],
    )  # fmt: skip


def _like(figure: Figure, entry: Mapping[str, Any]) -> Figure:
    return figure.model_copy(update={"detail": {}, **entry})
