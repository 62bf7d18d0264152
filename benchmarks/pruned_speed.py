"""Speed of a model before and after width and depth pruning: does it rise with the parameters that are gone?

    python benchmarks/pruned_speed.py [--layers 14] [--threads 2] [--rounds 3] [--dtype bfloat16] [--note TEXT]

A Llama with random weights of 200 M parameters or more (speed does not depend on training; its shape is that of
`benchmarks/gptq_speed.py`), and the folders that `width` (30 % of the blocks' parameters) and `depth` (30 % of the
blocks) leave of it, loaded by plain transformers. The models take turns, round after round, so that what else the
machine does meets all of them; each figure is the median. Prefill: 512 tokens at once. Decode: 32 tokens, greedy,
after a prompt of 32. Memory: the most that a fresh process holds that loads the folder and writes 8 tokens after 16,
and the same above what it held after its imports. Writes benchmarks/results/pruned_speed.json and .md.

The goal: speed rises by at least 0.8 of the share of the parameters that is gone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gptq_speed import VOCABULARY, model_of, tokens_of
from transformers import AutoModelForCausalLM

import compress
from compress.measure.jobs import run_job

RESULTS = Path(__file__).parent / "results"
PREFILL, PROMPT, NEW = 512, 32, 32
CALIBRATION = (2, 64)  # windows, tokens: weights are random, so what is chosen does not matter


def folders(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Name of the row -> a folder with the model."""
    passes = {
        "original": None,
        "width 30 %": compress.Width(amount=0.3, importance="activation", refit=False),
        "depth 30 %": compress.Depth(drop=list(range(2, 2 + round(0.3 * options.layers)))),
    }
    found = {}
    for number, (name, pass_) in enumerate(passes.items()):
        model = model_of(options.layers, options.dtype)
        if pass_ is not None:
            pass_(model, calibration=tokens_of(*CALIBRATION) if pass_.takes_calibration else None)
        found[name] = scratch / str(number)
        model.save_pretrained(found[name])
    return found


def memory(folder: Path, options: argparse.Namespace, scratch: Path) -> dict[str, int]:
    """Bytes, in a fresh process."""
    engine = {"runtime": "transformers", "folder": str(folder), "dtype": options.dtype}
    job = {
        "kind": "memory", "model": str(folder), "device": "cpu", "threads": options.threads, "seed": 0,
        "engine": engine, "prompt_length": 16, "new_tokens": 8, "cache_length": 16,
    }  # fmt: skip
    values = run_job(job, scratch).values
    return {name: values[name] for name in ("peak_memory_bytes", "above_import_bytes")}


@torch.inference_mode()
def speeds(model: Any) -> dict[str, float]:
    """Tokens a second."""
    long, short = tokens_of(1, PREFILL), tokens_of(1, PROMPT)
    started = time.perf_counter()
    model(input_ids=long, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - started
    given = model(input_ids=short, use_cache=True, logits_to_keep=1)
    cache, token = given.past_key_values, given.logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(NEW):
        given = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = given.past_key_values, given.logits[:, -1:].argmax(-1)
    return {"prefill": PREFILL / prefill, "decode": NEW / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--note", default="", help="of the machine, for the result")
    options = parser.parse_args()
    from compress.measure.environment import environment

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = folders(options, Path(scratch))
        held = {name: memory(folder, options, Path(scratch)) for name, folder in found.items()}
        models = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype).eval()
            for name, folder in found.items()
        }
        for model in models.values():
            speeds(model)
        rounds = [{name: speeds(model) for name, model in models.items()} for _ in range(options.rounds)]
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    rows = []
    for name, size in sizes.items():
        row: dict[str, Any] = {"model": name, "parameters": size, "removed": 1 - size / sizes["original"]}
        for what in ("prefill", "decode"):
            ratios = [turn[name][what] / turn["original"][what] for turn in rounds]
            row[what] = statistics.median(turn[name][what] for turn in rounds)
            row[f"{what} ratio"] = statistics.median(ratios)
        row |= held[name]
        row["memory ratio"] = row["above_import_bytes"] / held["original"]["above_import_bytes"]
        row["goal"] = 1 + 0.8 * row["removed"]
        rows.append(row)
    lines = [
        f"{VOCABULARY} tokens, {options.layers} blocks, {options.dtype}, {options.threads} threads, {options.rounds} "
        f"interleaved rounds. {options.note}".rstrip(), "",
        "| model | parameters | removed | prefill tok/s | x | decode tok/s | x | goal x | peak MB | above imports | "
        "x |",
        "|---|" + "---|" * 10,
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['removed']:.1%} | {row['prefill']:.0f} | "
            f"{row['prefill ratio']:.2f} | {row['decode']:.1f} | {row['decode ratio']:.2f} | {row['goal']:.2f} | "
            f"{row['peak_memory_bytes'] / 1e6:.0f} | {row['above_import_bytes'] / 1e6:.0f} | "
            f"{row['memory ratio']:.2f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    result = {"environment": environment(threads=options.threads, device="cpu"), "options": vars(options), "rows": rows}
    (RESULTS / "pruned_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "pruned_speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
