"""One measurement in a fresh process: `python -m compress.measure.worker JOB.json`, or forked by the fork server.

JOB.json names the kind of measurement (see `KINDS`), the model's folder, and `out`, the folder to write `result.json`
and `records.safetensors` to. What goes wrong comes back as one sentence in `result.json`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.measure.engine import Engine

Job = dict[str, Any]
Result = tuple[dict[str, Any], dict[str, Any]]


def main(job_file: str) -> int:
    """Does the job; returns the exit status."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    die_with_parent()
    out = Path(job["out"])
    try:
        values, records = KINDS[job["kind"]](job)
    except CompressError as error:
        return _fail(out, str(error))
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split()) or "no message"
        return _fail(out, f"Measuring {job['model']} ({job['kind']}) failed: {type(error).__name__}: {text[:300]}")
    if records:
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in records.items()}, out / "records.safetensors")
    (out / "result.json").write_text(json.dumps(values), encoding="utf-8")
    return 0


def _fail(out: Path, message: str) -> int:
    (out / "result.json").write_text(json.dumps({"error": message}), encoding="utf-8")
    return 1


def tell(job: Job, done: int, total: int, detail: str = "") -> None:
    """Writes down how far the job is, for whoever waits for it."""
    if job.get("progress"):
        with Path(job["progress"]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([done, total, detail]) + "\n")


def quality(job: Job) -> Result:
    """What one model answers: see `compress.measure.scoring`."""
    _settle(job)
    from compress.measure.scoring import measure_quality

    return measure_quality(job)


def speed(job: Job) -> Result:
    """Times the engines named in `engines` in turn, in this one process."""
    _settle(job)
    import torch
    from safetensors.torch import load_file

    from compress.measure.energy import find_meter, why_no_energy
    from compress.measure.measurements import SpeedSettings
    from compress.measure.speed import Stopwatch, fitted_to, time_engines

    opened, values = [], []
    for asked in job["engines"]:
        try:
            opened.append(_open(asked, job))
            values.append(_told(opened[-1], asked))
        except CompressError as error:
            if asked["runtime"] == "transformers":
                raise
            values.append({"failed": str(error)})
    meter = find_meter(job["device"], job.get("watts"))
    prompt = load_file(job["inputs"])["prompt"].tolist()
    fitted = fitted_to(opened, SpeedSettings(**job["speed"]))
    timings = time_engines(
        opened, prompt, fitted, Stopwatch(meter=meter, free=partial(_free, job["device"])), partial(tell, job)
    )
    records: dict[str, Any] = {}
    each = iter(zip(opened, timings, strict=True))
    for index, value in enumerate(values):
        if "failed" not in value:
            engine, timed = next(each)
            value["reasons"] = timed.reasons
            records |= {f"{index}/{key}": torch.tensor(r, dtype=torch.float64) for key, r in timed.rounds.items()}
            engine.close()
    energy = why_no_energy(job["device"]) if meter is None else None
    told = {"no_energy": energy, "energy": meter.detail if meter else {}, "settings": asdict(fitted)}
    return {"engines": values, **told}, records


def _open(asked: dict[str, Any], job: Job) -> Engine:
    """An engine; `asked` names its runtime, the folder, and for transformers the dtype."""
    from compress.registry import RUNTIMES

    runtime = RUNTIMES.get(asked["runtime"])()
    dtype = {"dtype": asked["dtype"]} if asked["runtime"] == "transformers" else {}
    engine: Engine = runtime.open(Path(asked["folder"]), threads=job["threads"], device=job["device"], **dtype)
    return engine


def _told(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    read = engine.read_bytes
    if read is None:  # all that is in the artifact: an upper bound
        folder = Path(asked["folder"])
        files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
        read = sum(file.stat().st_size for file in files)
    return {
        "runtime": engine.runtime or asked["runtime"], "note": engine.note, "generates": engine.generates,
        "read_bytes": read,
    }  # fmt: skip


def _free(device: str) -> int:
    """Bytes of memory that may still be taken."""
    import psutil
    import torch

    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def memory(job: Job) -> Result:
    """Peak memory of opening one artifact and generating a few tokens; then what its cache takes for each token."""
    _settle(job)
    import torch

    from compress.measure import transformers_engine  # noqa: F401  (what it imports belongs to the baseline, too)
    from compress.measure.fork_server import import_all
    from compress.measure.memory import forget_peak, peak_resident_bytes, resident_bytes
    from compress.measure.runtimes import is_causal, read_config

    import_all()
    config = Path(job["model"])
    if (config / "config.json").is_file():
        is_causal(read_config(config))
    imported, baseline = peak_resident_bytes(), resident_bytes()
    forget_peak()
    engine = _open(job["engine"], job)
    engine.prefill([[i % 32 for i in range(job["prompt_length"])]])
    for _ in range(job["new_tokens"] if engine.generates else 0):
        engine.step()
    others = sum(peak_resident_bytes(pid) for pid in engine.processes())
    peak = peak_resident_bytes()
    values = {
        "runtime": engine.runtime or job["engine"]["runtime"],
        "notes": [engine.note] if engine.note else [],
        "peak_memory_bytes": max(peak, imported) + others,
        "above_import_bytes": max(0, peak - baseline) + others,
        "read_bytes": engine.read_bytes,
        "resident_weights_bytes": engine.resident_bytes(),
    }
    if job["device"] == "cuda":
        values["peak_memory_bytes"] = int(torch.cuda.max_memory_allocated())
    if engine.generates:
        engine.prefill([[i % 32 for i in range(job["cache_length"])]])
        values |= {"cache_bytes": engine.cache_bytes(), "cache_tokens": job["cache_length"]}
    engine.close()
    return values, {}


def agreement(job: Job) -> Result:
    """KL(transformers || another runtime) of one model on a few windows, in nats a window, and where both find the same
    token the likeliest. float64 log-softmax over the tokens that both have; no records where the runtime tells no
    logits."""
    _settle(job)
    import torch
    from safetensors.torch import load_file

    windows = load_file(job["inputs"])["windows"].tolist()
    ours = _open({"runtime": "transformers", "folder": job["model"], "dtype": "auto"}, job)
    expected = [ours.logits(window) for window in windows]
    ours.close()
    theirs = _open(job["engine"], job)
    kl, same, counts = [], [], []
    for done, (window, want) in enumerate(zip(windows, expected, strict=True)):
        found = theirs.logits(window)
        if found is None or want is None:
            return {"reason": f"{job['engine']['runtime']} does not tell its logits"}, {}
        size = min(found.shape[1], want.shape[1])
        p, q = (torch.log_softmax(torch.from_numpy(x[:, :size]).double(), -1) for x in (want, found))
        kl.append(float((p.exp() * (p - q)).sum()))
        same.append(int((p.argmax(-1) == q.argmax(-1)).sum()))
        counts.append(len(window))
        tell(job, done + 1, len(windows))
    theirs.close()
    records = {"kl": torch.tensor(kl, dtype=torch.float64), "top1": torch.tensor(same), "tokens": torch.tensor(counts)}
    return {"reason": None}, records


def bandwidth(job: Job) -> Result:
    """Bytes per second that this machine reads, a figure a round."""
    _settle(job)
    import torch

    from compress.measure.bandwidth import read_bandwidth

    return {}, {"bandwidth": torch.tensor(read_bandwidth(job["device"]), dtype=torch.float64)}


KINDS = {
    "quality": quality, "speed": speed, "memory": memory, "agreement": agreement, "bandwidth": bandwidth,
}  # fmt: skip

#: What packed layers hold beside the weights that they stand for.
PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


def count_parameters(model: Any) -> int:
    """Weights of a model, tied ones once; a packed layer counts the weights it stands for."""
    total, seen = 0, set()
    for module in model.modules():
        shape = getattr(module, "weight_shape", None)
        if shape is not None and getattr(module, "weight_packed", None) is not None:
            total += int(shape.prod())
        if module._buffers.get("weight") is not None:  # our own layers with a code an element
            total += module._buffers["weight"].numel()
        for name, parameter in module.named_parameters(recurse=False):
            if name not in PACKED_PARTS and id(parameter) not in seen:
                seen.add(id(parameter))
                halves = type(parameter).__name__ == "Params4bit"  # bitsandbytes': two weights to a byte
                total += parameter.numel() * (2 if halves else 1)
    return total


def _settle(job: Job) -> None:
    """Threads, seed, and quiet libraries."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise CompressError("There is no CUDA device on this machine.")


def die_with_parent() -> None:
    """Ends this process when the one that asked for it is killed, so that no orphan goes on computing."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
