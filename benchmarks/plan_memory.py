"""Predicted and measured memory, side by side: what `compress plan` says against what processes take.

    python benchmarks/plan_memory.py [--only gptq] [--samples 16]

Builds models with random weights, runs each pass in a fresh process as `compress run` does (opened from its
folder, finished blocks kept on disk), and compares the peak of resident memory, above that of the same process right
after its imports, with the plan. Further rows show that with `residency: disk` the peak does not grow with the
number of layers. Writes `benchmarks/results/plan_memory.json`; exits with 1 if a row is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_memory.json"
ALLOWED = 0.25
LENGTH = 256
_LLAMA = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 8000, "tie_word_embeddings": True, "max_position_embeddings": 2048, "dtype": "float32",
}  # fmt: skip
#: name -> configuration class, its arguments. A layer of the Llamas has 12.85 M weights.
MODELS = {
    "111M Llama": ("LlamaConfig", {**_LLAMA, "num_hidden_layers": 8}),
    "187M Llama bf16": (
        "LlamaConfig",
        {**_LLAMA, "num_hidden_layers": 12, "vocab_size": 32000, "dtype": "bfloat16"},
    ),
    "124M GPT-2": ("GPT2Config", {"dtype": "float32"}),
    "151M Qwen3 bf16": (
        "Qwen3Config",
        {**_LLAMA, "num_hidden_layers": 6, "num_key_value_heads": 4, "vocab_size": 80000, "dtype": "bfloat16"},
    ),
    "4 layers": ("LlamaConfig", {**_LLAMA, "num_hidden_layers": 4}),
    "16 layers": ("LlamaConfig", {**_LLAMA, "num_hidden_layers": 16}),
}
PASSES = ("rtn", "magnitude", "wanda", "gptq")
ROWS = [
    *(("111M Llama", name, residency) for name in PASSES for residency in ("memory", "disk")),
    *(("187M Llama bf16", name, residency) for name, residency in zip(PASSES, ("disk", "memory") * 2, strict=True)),
    *(("124M GPT-2", name, "disk") for name in ("rtn", "wanda")),
    *(("151M Qwen3 bf16", name, residency) for name, residency in (("rtn", "memory"), ("wanda", "disk"))),
    *((model, name, "disk") for name in ("rtn", "wanda") for model in ("4 layers", "16 layers")),
    ("111M Llama", "rtn", "quality of the original"),
    ("111M Llama", "rtn", "quality of both"),
]


def build(folder: Path, config_name: str, arguments: dict[str, Any]) -> None:
    """A model with random weights, as a Hugging Face folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, arguments["dtype"])).save_pretrained(folder)


def recipe_of(model: Path, name: str, residency: str, samples: int) -> Any:
    from compress.recipe import Recipe

    text = model.parent / "text.txt"
    text.touch()
    entry = {"source": str(text), "samples": samples, "length": LENGTH}
    return Recipe.from_dict(
        {
            "model": str(model), "passes": [name], "residency": residency if residency == "disk" else "memory",
            "data": {"calibration": entry, "evaluation": entry}, "output": str(model.parent / "never written"),
        }
    )  # fmt: skip


def compressed(folder: Path, pass_: Any, tokens: Any, residency: str, work: Path, note: Callable[[str], None]) -> None:
    """As `compress run` does it: opens the folder, runs the pass on `tokens` [samples, length], and writes the result
    below `work`; `note` is told of each part that is done."""
    from compress.data import windows_from
    from compress.formats.folder import write_model_folder
    from compress.opening import check_weights, open_model
    from compress.passes.base import Context
    from compress.workspace import Stage

    check_weights(folder)
    handle, stage = open_model(folder, residency=residency), Stage(work / "stage")
    note("load")
    pass_.run(handle, Context(calibration=windows_from(tokens, None), stage=stage))
    note("pass")
    handle.latest = stage
    handle.record(pass_)
    write_model_folder(work / "model", handle.contents())
    note("export")


def measure_pass(job: dict[str, Any]) -> dict[str, float]:
    """In the process of its own: opens the model, runs the pass, writes the result; peaks in bytes."""
    import torch
    import transformers  # noqa: F401

    import compress.walk  # noqa: F401
    from compress.measure.memory import forget_peak, peak_resident_bytes, resident_bytes

    torch.set_num_threads(job["threads"])
    bare = resident_bytes()
    from compress.opening import read_config
    from compress.registry import PASSES as REGISTERED

    peaks, started = {}, time.monotonic()

    def note(step: str) -> None:
        peaks[step] = peak_resident_bytes() - bare
        forget_peak()

    forget_peak()
    folder, generator = Path(job["model"]), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, read_config(folder).vocab_size, (job["samples"], LENGTH), generator=generator)
    compressed(folder, REGISTERED.get(job["pass"])(), tokens, job["residency"], Path(job["work"]), note)
    return {**peaks, "seconds": round(time.monotonic() - started, 1)}


def measure_quality(job: dict[str, Any]) -> dict[str, float]:
    """In a process of its own: the benchmark's most hungry measurement."""
    import torch
    import transformers  # noqa: F401
    from safetensors.torch import save_file

    import compress.walk  # noqa: F401
    from compress.measure.memory import forget_peak, peak_resident_bytes, resident_bytes
    from compress.measure.worker import quality

    bare, started = resident_bytes(), time.monotonic()
    forget_peak()
    inputs = Path(job["work"]) / "inputs.safetensors"
    save_file({"windows": torch.randint(0, 8000, (job["samples"], LENGTH))}, inputs)
    quality(
        {
            "model": job["measured"], "reference": job["reference"], "reference_dtype": "auto", "dtype": "auto",
            "inputs": str(inputs), "device": "cpu", "threads": job["threads"], "seed": 0,
        }
    )  # fmt: skip
    return {"pass": peak_resident_bytes() - bare, "seconds": round(time.monotonic() - started, 1)}


def in_fresh_process(kind: str, job: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", json.dumps({**job, "kind": kind})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **_QUIET})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "2"}


def row(models: Path, model: str, name: str, residency: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: predicted, measured, ratio."""
    from compress.planning import plan

    folder = models / model
    if not folder.exists():
        build(folder, *MODELS[model])
    predicted = plan(recipe_of(folder, name, residency, options.samples))
    with tempfile.TemporaryDirectory(dir=models) as work:
        job = {
            "model": str(folder), "pass": name, "residency": residency, "samples": options.samples, "work": work,
            "threads": options.threads,
        }  # fmt: skip
        steps = {step.name: step for step in predicted.steps}
        if residency in ("memory", "disk"):
            found = in_fresh_process("pass", job)
            step = steps[name]
        else:
            both = residency == "quality of both"
            if both:
                in_fresh_process("pass", {**job, "residency": "disk", "samples": 1})
            job |= {"measured": f"{work}/model" if both else str(folder), "reference": str(folder) if both else None}
            found = in_fresh_process("quality", job)
            step = steps["benchmark compressed" if both else "benchmark original"]
    measured = int(found["pass"])
    others = {f"{key}_bytes": found[key] for key in ("load", "export") if key in found}
    return {
        "model": model, "pass": name, "what": residency, "predicted_bytes": step.memory_bytes,
        "measured_bytes": measured, "ratio": round(step.memory_bytes / measured, 3), "seconds": found["seconds"],
        "parts": step.parts, **others,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose pass or model or residency holds this text")
    parser.add_argument("--samples", type=int, default=16, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="folder to keep the built models in (default: a temporary one)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        print(json.dumps({"pass": measure_pass, "quality": measure_quality}[job["kind"]](job)))
        return 0
    from compress.measure.environment import environment

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for chosen in ROWS:
            if options.only not in " ".join(chosen):
                continue
            rows.append(row(options.models or Path(temporary), *chosen, options))
            print(_line(rows[-1]), flush=True)
    if not options.only:
        machine = environment(threads=options.threads, device="cpu")
        result = {"environment": machine, "samples": options.samples, "length": LENGTH, "rows": rows}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(abs(entry["ratio"] - 1) > ALLOWED for entry in rows))


def _line(entry: dict[str, Any]) -> str:
    megabytes = [f"{entry[key] / 2**20:7.1f}" for key in ("predicted_bytes", "measured_bytes")]
    what = f"{entry['model']:14} {entry['pass']:10} {entry['what']:24}"
    return f"{what} {' '.join(megabytes)} MiB  {entry['ratio']:.2f}  {entry['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
