"""The benchmark stage: measures the original and the shrunk model, in fresh processes, and sets them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.errors import StartError
from compress.locating import adapter_beside
from compress.measure.fork_server import ForkServer
from compress.measure.jobs import fingerprint, job_server, key_of
from compress.measure.measurements import BenchmarkJob, Measurements
from compress.measure.quality import quality
from compress.measure.running import Place, measure_agreement, measure_memory, measure_speed, speed_detail
from compress.progress import Progress
from compress.registry import METRICS
from compress.reports import units
from compress.reports.report import Figure, Other, Report

#: Models up to this size have their memory measured while their quality is.
BESIDE_LIMIT = 500_000_000
#: Why the original has no figure of how near another runtime is.
FROM_ITSELF = "it is a distance from the same model in transformers, not from the original"


def measure_original(
    model: str,
    *,
    job: BenchmarkJob,
    workdir: Path,
    speed: bool = False,
    progress: Progress | None = None,
    server: ForkServer | None = None,
    kept_in: Path | None = None,
) -> Measurements:
    """Measures the original by itself: quality, size, memory; `speed` too when nothing will be compared with it.

    Kept in `kept_in` (default: `workdir`) under the fingerprint of the model's files, the job and the versions; asked
    for again, the same figures come back without measuring, but for speeds, which `workdir` keeps. `model`: a folder,
    `builtin:<name>` or a hub id. `server`: see `measure_compressed`.
    """
    from compress.locating import locate
    from compress.measure.runtimes import is_causal, read_config

    found = Measurements(model, locate(model))
    causal = is_causal(read_config(found.folder))
    state = fingerprint(found.folder)
    plain = replace(job, runtimes=("transformers",)) if not speed else job  # of the original, nothing else is measured
    with _place(job, workdir, progress, server, kept_in) as place:
        remember = partial(measure_memory, found, plain, place, title="original", dtype=job.dtype)
        told: set[str] = set()
        with _meanwhile(remember, job, found):
            quality(found, job, place, state, causal=causal, original=None)
        _files(found, int(found.records["parameters"][0]))
        _tell(found, job, place, "original", told)
        if speed:
            measure_agreement(found, job, place)
            measure_speed(found, None, job, place)
            _tell(found, job, place, "original", told)
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
    server: ForkServer | None = None,
) -> Measurements:
    """Measures an exported folder (`DIR` or `DIR/model`) beside the original, each in fresh processes.

    Quality through plain transformers wherever it loads the folder (in lock step with the original where KL or
    agreement is wanted), memory and speed through `compress.load` and the job's other runtimes; speeds of all are taken
    in turn. Finished jobs are kept in `workdir`: called again after an interruption, it does what is missing. `server`:
    what forks the processes (default: one of its own).
    """
    from compress.locating import locate
    from compress.measure.runtimes import is_causal, read_config

    found = Measurements(str(folder), locate(folder))
    first = original_measurements
    causal = is_causal(read_config(found.folder)) and is_causal(read_config(first.folder))
    state = key_of(fingerprint(first.folder), fingerprint(found.folder))
    with _place(job, workdir, progress, server, None) as place:
        remember = partial(measure_memory, found, job, place, title="compressed", dtype="auto")
        told: set[str] = set()
        with _meanwhile(remember, job, first):
            quality(found, job, place, state, causal=causal, original=first)
        _files(found, int(first.records["parameters"][0]))
        _tell(found, job, place, "compressed", told)
        measure_agreement(found, job, place)
        measure_speed(found, first, job, place)
        _tell(found, job, place, "compressed", told)
    _figures(found, job, is_original=False)
    return found


@contextmanager
def _place(
    job: BenchmarkJob, workdir: Path, progress: Progress | None, server: ForkServer | None, kept_in: Path | None
) -> Iterator[Place]:
    """Where jobs are done; with a server for as long, where none is given."""
    with nullcontext(server) if server is not None else job_server(job.device, job.threads) as forks:
        yield Place(workdir, progress or Progress(), forks, kept_in)


def _tell(found: Measurements, job: BenchmarkJob, place: Place, title: str, told: set[str]) -> None:
    """Shows the figures that there are by now, and that were not `told` yet."""
    now = replace(found, figures={}, beside_figures={})
    _figures(now, job, is_original=title == "original")
    new = [
        name for name, figure in now.figures.items() if figure.value is not None and name not in told | {"parameters"}
    ]
    if new:
        words = [f"{units.title(name)} {_human(now.figures[name])}" for name in units.order(new)]
        place.progress.note(f"{title}: {'; '.join(words)}")
        told |= set(new)


def _human(figure: Figure) -> str:
    return units.human(figure.value, figure.unit)


def benchmark(
    models: Sequence[str],
    job: BenchmarkJob,
    workdir: Path,
    *,
    name: str = "benchmark",
    progress: Progress | None = None,
    kept_in: Path | None = None,
) -> Report:
    """Measures models against the first of them. The second's figures are the report's `compressed`; `others` has
    the rest. `kept_in`: where figures of the first are kept for other runs."""
    from compress.measure.comparison import compare, original_figures
    from compress.measure.environment import environment
    from compress.measure.flips import flips, worst

    if not models:
        raise StartError("compress benchmark needs a model: the original, then those to compare with it.")
    report = Report(name=name, recipe={"model": models[0], "models": list(models)})
    report.environment = environment(threads=job.threads, device=job.device)
    with job_server(job.device, job.threads) as server:
        options: dict[str, Any] = {"job": job, "workdir": workdir, "progress": progress, "server": server}
        first = measure_original(models[0], speed=len(models) == 1, kept_in=kept_in, **options)
        report.original, report.notes = first.figures, list(first.notes)
        for i, model in enumerate(models[1:]):
            found = measure_compressed(model, models[0], first, **options)
            report.notes += [note for note in found.notes if note not in report.notes]
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


def _files(found: Measurements, original_parameters: int) -> None:
    """Sizes of the files that `compress.load` runs from, and of those in the folder where these are others."""
    from compress.loading import find_model

    adapter, runs_from = adapter_beside(found.folder), find_model(found.folder)

    def sizes(folder: Path) -> list[int]:
        folders = [folder] if adapter is None else [folder, adapter]
        return [file.stat().st_size for each in folders for file in sorted(each.glob("*.safetensors"))]

    packed = sizes(runs_from)
    found.records |= {"file_bytes": packed, "total_bytes": [sum(packed)], "original_parameters": [original_parameters]}
    if runs_from != found.folder:
        found.records["unpacked_bytes"] = [sum(sizes(found.folder))]


def _figures(found: Measurements, job: BenchmarkJob, *, is_original: bool) -> None:
    """Every wanted metric from the records; null with the reason where its records are missing."""
    for name in job.names():
        metric = METRICS.get(name)
        if is_original and metric.of_original is not None:
            found.figures[name] = _by_definition(metric, found)
        elif (figure := figure_of(metric, name, found.records, found)) is not None:
            found.figures[name] = figure
            for area, entry in figure.detail.get("areas", {}).items():
                detail = {"metrics": found.task_metrics[area]} if area in found.task_metrics else {}
                found.figures[f"{name}/{area}"] = _like(figure, {**entry, "detail": detail})
            if "areas" in figure.detail:
                found.figures[name] = figure.model_copy(update={"detail": {}})
        for variant in _variants(name, found) if {"speed", "memory", "reference"} & metric.needs else ():
            more = figure_of(metric, variant, found.records, found)
            if more is not None:
                found.figures[variant] = more
            if "reference" in metric.needs:  # the original has no such figure
                found.beside_figures[variant] = Figure(value=None, reason=FROM_ITSELF)
        if "reference_text_nll" in found.records and name == "bits_per_byte":
            before = {key: found.records[f"reference_{key}"] for key in ("text_nll", "text_bytes")}
            beside = figure_of(metric, name, before, found)
            assert beside is not None
            found.beside_figures[name] = beside
        recorded = [key for key in found.beside if key.partition("/")[0] == name]
        for variant in dict.fromkeys([name, *recorded]) if "speed" in metric.needs and found.beside else ():
            beside = figure_of(metric, variant, found.beside, found, of="beside")
            if beside is not None:
                found.beside_figures[variant] = beside


def _variants(name: str, found: Measurements) -> list[str]:
    """The same metric in other settings and runtimes, as `decode_tokens_per_second/batch 4`, by what was recorded."""
    keys = {"kl_divergence": "kl", "top1_agreement": "top1", "kv_cache_bytes_per_token": "cache_bytes"}
    key = keys.get(name, name)
    recorded = [f"{name}/{at}" for each in found.records for base, _, at in [each.partition("/")] if at and base == key]
    return list(dict.fromkeys([*recorded, *(each for each in found.reasons if each.startswith(f"{name}/"))]))


def figure_of(
    metric: Any, name: str, records: Mapping[str, Any], found: Measurements, *, of: str = ""
) -> Figure | None:
    """One metric computed from records: `name` is the metric's, or `<metric>/<setting or runtime>`. None for a speed
    that was not to be measured by now. `of`: whose records they are ("beside": the original's)."""
    base, _, variant = name.partition("/")
    suffix = f"/{variant}" if variant else ""
    needs = sorted(metric.needs)
    wanted = [f"{key}{suffix}" for key in (metric.predictions, metric.references) if key is not None]
    missing = [key for key in wanted if key not in records]
    if missing:
        reason = next((found.reasons[key] for key in (name, base, *needs) if key in found.reasons), None)
        if "speed" in metric.needs and "speed" not in found.runtimes:
            return None
        return Figure(value=None, reason=reason or f"nothing was recorded for it ({', '.join(missing)})")
    given = dict(zip(("predictions", "references"), (list(records[key]) for key in wanted), strict=False))
    computed = metric().compute(**given)
    runtime = variant.partition(", ")[0] if variant.partition(", ")[0] in found.costs else ""
    unit, detail = metric.unit, dict(computed.pop("detail", {}))
    if base == "peak_memory_bytes":
        detail["above_import_bytes"] = found.records[f"above_import_bytes{suffix}"][0]
    if metric.predictions in ("file_bytes", "total_bytes") and "unpacked_bytes" in records:
        detail |= {"folder": "exports/packed", "unpacked_bytes": records["unpacked_bytes"][0]}
    if "speed" in metric.needs:
        cell = variant.removeprefix(runtime).removeprefix(", ")
        detail |= speed_detail(found.costs[of or runtime], f"{base}/{cell}", computed["value"])
        if base == "energy_joules_per_token":
            detail |= found.costs["energy"]
            unit = f"{unit}, estimated" if detail.get("estimated") else unit
    named = found.runtimes.get(of) or (found.costs[runtime]["runtime"] if runtime else None)
    places = [f"memory{suffix}"] if suffix or "memory" in needs else []
    named = named or next((found.runtimes[key] for key in (*places, *needs) if key in found.runtimes), None)
    return Figure(
        unit=unit, higher_is_better=metric.higher_is_better, runtime=named, detail=detail, **computed
    )  # fmt: skip


def _by_definition(metric: Any, found: Measurements) -> Figure:
    if "text" in metric.needs and "nll" not in found.records:
        return Figure(value=None, reason=found.reasons["text"])
    return Figure(
        value=metric.of_original, unit=metric.unit, higher_is_better=metric.higher_is_better,
        runtime=found.runtimes["text"],
    )  # fmt: skip


def _like(figure: Figure, entry: Mapping[str, Any]) -> Figure:
    return figure.model_copy(update={"detail": {}, **entry})
