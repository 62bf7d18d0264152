"""One measurement in a fresh process: `python -m compress.measure.worker JOB.json`.

JOB.json names the kind of measurement (`quality`, `speed` or `memory`), the model's folder, and `out`, the folder to
write `result.json` and `records.safetensors` to. What goes wrong comes back as one sentence in `result.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compress.errors import CompressError

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


def quality(job: Job) -> Result:
    """What one model answers: see `compress.measure.scoring`."""
    _settle(job)
    from compress.measure.scoring import measure_quality

    return measure_quality(job)


def speed(job: Job) -> Result:
    """Times the models named in `models` in turn, in this one process."""
    _settle(job)
    import torch
    from safetensors.torch import load_file

    from compress.measure.measurements import SpeedSettings
    from compress.measure.runtimes import Transformers
    from compress.measure.speed import time_models, why_no_energy

    settings = SpeedSettings(**job["speed"])
    runtime = Transformers()
    loaded = [
        runtime.load(Path(folder), dtype=dtype, device=job["device"])
        for folder, dtype in zip(job["models"], job["dtypes"], strict=True)
    ]
    prompt = load_file(job["inputs"])["prompt"]
    figures = time_models([each.model for each in loaded], prompt, settings)
    records = {
        f"{i}/{key}": torch.tensor(rounds, dtype=torch.float64)
        for i, by_key in enumerate(figures)
        for key, rounds in by_key.items()
        if rounds
    }
    return {
        "runtimes": [each.runtime for each in loaded],
        "notes": [each.note for each in loaded if each.note],
        "generates": [bool(each.model.can_generate()) for each in loaded],
        "no_energy": why_no_energy(job["device"]),
    }, records


def memory(job: Job) -> Result:
    """Peak memory of loading one model and generating a few tokens."""
    _settle(job)
    import torch
    from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401  (for the baseline)

    import compress.loading  # noqa: F401  (what it imports belongs to the baseline, too)
    from compress.inputs import forward_inputs
    from compress.measure.memory import forget_peak, peak_resident_bytes, resident_bytes
    from compress.measure.runtimes import Transformers, is_causal, read_config
    from compress.measure.speed import generate

    folder = Path(job["model"])
    is_causal(read_config(folder))
    imported, baseline = peak_resident_bytes(), resident_bytes()
    forget_peak()
    loaded = Transformers().load(folder, dtype=job["dtype"], device=job["device"])
    ids = torch.arange(job["prompt_length"])[None] % 32
    ids = ids.to(job["device"])
    with torch.inference_mode():
        if loaded.model.can_generate():
            generate(loaded.model, ids, job["new_tokens"])
        else:
            loaded.model(**forward_inputs(loaded.model, ids))
    peak = peak_resident_bytes()
    values = {
        "runtime": loaded.runtime,
        "notes": [loaded.note] if loaded.note else [],
        "peak_memory_bytes": max(peak, imported),
        "above_import_bytes": max(0, peak - baseline),
    }
    if job["device"] == "cuda":
        values["peak_memory_bytes"] = int(torch.cuda.max_memory_allocated())
    return values, {}


KINDS = {"quality": quality, "speed": speed, "memory": memory}

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
