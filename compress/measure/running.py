"""What a model costs to run: the jobs that measure memory, speed and energy, in transformers and in other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.measure.fork_server import ForkServer
from compress.measure.jobs import JobResult, fingerprint, key_of, run_job
from compress.measure.measurements import BenchmarkJob, Cell, Measurements, SpeedSettings
from compress.progress import Progress
from compress.registry import RUNTIMES

if TYPE_CHECKING:
    from torch import Tensor

    from compress.measure.runtimes import Runtime

#: Prompt and new tokens of the memory measurement.
MEMORY_PROMPT, MEMORY_TOKENS = 16, 8
#: Windows, and tokens of each, on which another runtime is compared with transformers.
AGREEMENT_WINDOWS, AGREEMENT_TOKENS = 8, 128
#: Metrics that other runtimes have as well, as `<metric>/<runtime>`.
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds", "energy_joules_per_token")
MEMORY = ("peak_memory_bytes", "resident_weights_bytes", "kv_cache_bytes_per_token")


@dataclass(frozen=True)
class Place:
    """Where jobs are done and their results kept. `kept_in`: results that any later run may use."""

    workdir: Path
    progress: Progress
    server: ForkServer | None = None
    kept_in: Path | None = None

    def run(
        self, job: Mapping[str, Any], title: str, *, inputs: Mapping[str, Tensor] | None = None, key: str,
        reusable: bool = False,
    ) -> JobResult:  # fmt: skip
        """One job, shown as a step of its own. `reusable`: its figures repeat, so that later runs may have them."""
        with self.progress.step(title) as step:
            return run_job(
                job, self.workdir, inputs=inputs, key=key, kept_in=self.kept_in if reusable else None,
                server=self.server, step=step,
            )  # fmt: skip


def artifact(folder: Path, runtime: str) -> Path | None:
    """What `runtime` opens of the model in `folder` (`DIR/model`, or any folder): one of its exports, which stand in
    `DIR/exports`, or the folder itself where the runtime can load that. None where there is none."""
    opener: Runtime = RUNTIMES.get(runtime)()
    beside = folder.absolute().parent if folder.absolute().name == "model" else folder.absolute()
    for name in opener.exports:
        if (beside / "exports" / name).exists():
            return beside / "exports" / name
    return folder if opener.can_load(folder) else None


def no_artifact(folder: Path, runtime: str) -> str:
    """The reason why a runtime has no figures of a model."""
    exports = RUNTIMES.get(runtime).exports
    if not exports:
        return f"{runtime} cannot load {folder}"
    return f"{runtime} opens exports/{exports[0]}, and there is none: add {exports[0]} to export"


def others(job: BenchmarkJob) -> list[str]:
    """The runtimes beside transformers."""
    return [name for name in dict.fromkeys(job.runtimes) if name != "transformers"]


def measure_memory(found: Measurements, job: BenchmarkJob, place: Place, *, title: str, dtype: str) -> None:
    """Peak memory, what the weights take of it, and the cache's bytes per token, in transformers and in each other
    runtime that has an artifact."""
    if not job.wants("memory"):
        return
    for runtime in ["transformers", *others(job)]:
        folder = found.folder if runtime == "transformers" else artifact(found.folder, runtime)
        suffix = "" if runtime == "transformers" else f"/{runtime}"
        if folder is None:
            found.reasons |= {f"{name}{suffix}": no_artifact(found.folder, runtime) for name in MEMORY}
            continue
        try:
            words = f"{title}: memory" if not suffix else f"{title}: memory in {runtime}"
            result = _memory(found, folder, runtime, job, place, title=words, dtype=dtype)
        except CompressError as error:
            if not suffix:
                raise
            found.reasons |= {f"{name}{suffix}": str(error) for name in MEMORY}
            continue
        _take_memory(found, result, suffix)


def _memory(
    found: Measurements, folder: Path, runtime: str, job: BenchmarkJob, place: Place, *, title: str, dtype: str
) -> JobResult:
    from transformers import AutoConfig

    from compress.locating import context_length

    context = context_length(AutoConfig.from_pretrained(found.folder)) or job.speed.prompt
    tokens = max(2, min(MEMORY_TOKENS, context // 2))
    request: dict[str, Any] = {
        "kind": "memory", "model": str(found.folder), "device": job.device, "threads": job.threads, "seed": job.seed,
        "engine": _asked(folder, runtime, dtype),
        "prompt_length": max(1, min(MEMORY_PROMPT, context - tokens)), "new_tokens": tokens,
        "cache_length": max(1, min(job.speed.prompt, context - 1)),
    }  # fmt: skip
    state = key_of(_state(folder), {**request, "model": "", "engine": {**request["engine"], "folder": ""}})
    return place.run(request, title, key=state, reusable=True)


def _take_memory(found: Measurements, result: JobResult, suffix: str) -> None:
    values = result.values
    found.runtimes[f"memory{suffix}"] = values["runtime"]
    found.notes += [note for note in values["notes"] if note not in found.notes]
    found.records[f"peak_memory_bytes{suffix}"] = [values["peak_memory_bytes"]]
    found.records[f"above_import_bytes{suffix}"] = [values["above_import_bytes"]]
    if values["resident_weights_bytes"] is None:
        found.reasons[f"resident_weights_bytes{suffix}"] = "it does not tell what its weights take in memory"
    else:
        found.records[f"resident_weights_bytes{suffix}"] = [values["resident_weights_bytes"]]
    if values.get("cache_bytes") is None:
        said = "it does not tell what its cache takes" if suffix else "the model keeps no cache of keys and values"
        found.reasons[f"kv_cache_bytes_per_token{suffix}"] = said
    else:
        found.records[f"cache_bytes{suffix}"] = [values["cache_bytes"]]
        found.records[f"cache_tokens{suffix}"] = [values["cache_tokens"]]


def measure_speed(found: Measurements, original: Measurements | None, job: BenchmarkJob, place: Place) -> None:
    """Speed and energy of the model, in turn with the original's and in each runtime, all in one process."""
    if not job.wants("speed"):
        return
    import torch

    asked = [] if original is None else [_asked(original.folder, "transformers", job.dtype)]
    asked.append(_asked(found.folder, "transformers", "auto" if original else job.dtype))
    runtimes = []
    for runtime in others(job):
        folder = artifact(found.folder, runtime)
        if folder is None:
            found.reasons |= {f"{name}/{runtime}": no_artifact(found.folder, runtime) for name in SPEEDS}
        else:
            asked.append(_asked(folder, runtime, "auto"))
            runtimes.append(runtime)
    request = {
        "kind": "speed", "model": str(found.folder), "engines": asked, "speed": asdict(job.speed), "watts": job.watts,
        "device": job.device, "threads": job.threads, "seed": job.seed,
    }  # fmt: skip
    prompt = prompt_tokens(found.folder, job).to(torch.int64)
    key = key_of([_state(Path(each["folder"])) for each in asked], request, prompt)
    read = _bandwidth(job, place)
    result = place.run(request, "speed, in turn", inputs={"prompt": prompt}, key=key)
    own = 0 if original is None else 1
    more = {"bandwidth": read, "settings": result.values["settings"]}
    for index, value in enumerate(result.values["engines"]):
        records = {name.partition("/")[2]: rounds.numpy() for name, rounds in result.records.items()
                   if name.partition("/")[0] == str(index)}  # fmt: skip
        if original is not None and index == 0:
            found.beside = records
            found.runtimes["beside"] = value["runtime"]
            found.costs["beside"] = {**value, **more}
        else:
            _take_speed(found, None if index == own else runtimes[index - own - 1], {**value, **more}, records)
    found.costs["energy"] = result.values["energy"]
    if result.values["no_energy"]:
        found.reasons.setdefault("energy_joules_per_token", result.values["no_energy"])


def _take_speed(found: Measurements, runtime: str | None, value: dict[str, Any], records: dict[str, Any]) -> None:
    """Files one engine's rounds, those of another runtime as `<metric>/<runtime>`."""
    if runtime is None:
        found.runtimes["speed"] = value["runtime"]
    if "failed" in value:
        found.reasons |= {f"{name}/{runtime}": value["failed"] for name in SPEEDS}
        return
    found.costs[runtime or ""] = value
    found.notes += [value["note"]] if value["note"] and value["note"] not in found.notes else []
    for name, rounds in records.items():
        found.records[_of(name, runtime)] = rounds
        if runtime and name in found.beside:  # what the user would otherwise run: the original, in transformers
            found.beside[_of(name, runtime)] = found.beside[name]
    found.reasons |= {_of(name, runtime): reason for name, reason in value["reasons"].items()}
    if not value["generates"]:
        silent = "the model does not generate text"
        found.reasons |= {_of(name, runtime): silent for name in SPEEDS[1:]}


def _of(name: str, runtime: str | None) -> str:
    """`decode.../batch 4` in llama.cpp is `decode.../llama.cpp, batch 4`."""
    if runtime is None:
        return name
    base, _, cell = name.partition("/")
    return f"{base}/{runtime}, {cell}" if cell else f"{base}/{runtime}"


def measure_agreement(found: Measurements, job: BenchmarkJob, place: Place) -> None:
    """How far each other runtime's next-token probabilities are from the same model's in transformers."""
    if job.windows is None or job.mask is not None or not (job.wants("reference") and others(job)):
        return
    windows = job.windows[:AGREEMENT_WINDOWS, :AGREEMENT_TOKENS].contiguous()
    for runtime in others(job):
        folder = artifact(found.folder, runtime)
        if folder is None:
            continue
        request = {
            "kind": "agreement", "model": str(found.folder), "engine": _asked(folder, runtime, "auto"),
            "device": job.device, "threads": job.threads, "seed": job.seed,
        }  # fmt: skip
        key = key_of(_state(found.folder), _state(folder), request, windows)
        name = f"kl_divergence/{runtime}"
        try:
            result = place.run(request, f"{runtime} against transformers", inputs={"windows": windows}, key=key)
        except CompressError as error:
            found.reasons[name] = str(error)
            continue
        if result.values["reason"]:
            found.reasons[name] = result.values["reason"]
            continue
        found.records |= {f"{key}/{runtime}": result.records[key].numpy() for key in ("kl", "top1", "tokens")}


def _bandwidth(job: BenchmarkJob, place: Place) -> float:
    """Bytes per second that this machine reads; measured once a run."""
    import numpy as np

    request = {"kind": "bandwidth", "model": "this machine", "device": job.device, "threads": job.threads, "seed": 0}
    result = place.run(request, "memory bandwidth", key=key_of(request))
    return float(np.median(result.records["bandwidth"].numpy()))


def _asked(folder: Path, runtime: str, dtype: str) -> dict[str, Any]:
    return {"runtime": runtime, "folder": str(folder), "dtype": dtype}


def _state(folder: Path) -> str:
    """Identifies an artifact's present content."""
    if (folder / "config.json").is_file():
        return fingerprint(folder)
    files = [folder] if folder.is_file() else sorted(file for file in folder.rglob("*") if file.is_file())
    return key_of([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def prompt_tokens(folder: Path, job: BenchmarkJob) -> Tensor:
    """Real text when there is some, else tokens drawn by the seed; int64 [length]."""
    import torch
    from transformers import AutoConfig

    # images have none
    vocabulary = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", 1)
    length = job.speed.longest_prompt
    if job.windows is not None and job.mask is None:
        flat = job.windows.flatten()
        # Of a smaller vocabulary, both models are given ids that both have: speed does not ask what they mean.
        return flat.repeat(-(-length // len(flat)))[:length].remainder(vocabulary)
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(job.seed))


def speed_detail(costs: Mapping[str, Any], name: str, value: float) -> dict[str, Any]:
    """What stands beside a figure of speed or energy: `batch`, `prompt_tokens` of each row and, where it is written,
    `new_tokens`.

    Of decoding also `bandwidth_share`: bytes of weights that a step reads (`read_bytes`: all of them as they are
    packed, an embedding's table only where it is the head as well, of experts the share in use; of other runtimes'
    artifacts all of the file), times steps a second, by the bytes a second that this machine reads. The cache is not
    counted; nor, at a batch of more than 1, the further experts that its rows use.
    """
    base, _, variant = name.partition("/")
    cell = Cell.named(variant)
    found: dict[str, Any] = {}
    if costs.get("settings"):
        settings = SpeedSettings(**costs["settings"])
        writing = base in ("decode_tokens_per_second", "energy_joules_per_token")
        length = settings.before_writing(cell) if writing else settings.length(cell)
        found = {"batch": cell.batch, "prompt_tokens": length}
        found |= {"new_tokens": settings.written(cell)} if writing else {}
    if base == "decode_tokens_per_second" and costs.get("bandwidth"):
        found |= {
            "read_bytes": costs["read_bytes"],
            "bandwidth_bytes_per_second": costs["bandwidth"],
            "bandwidth_share": costs["read_bytes"] * value / cell.batch / costs["bandwidth"],
        }
    return found
