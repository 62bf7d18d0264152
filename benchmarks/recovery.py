"""What `lora` and `repair` win back of what compression cost.

python benchmarks/recovery.py MODEL CALIBRATION EVALUATION [--tokens N] [--only NAME ...]

MODEL: a folder or builtin:tiny; the texts: .jsonl files or builtin:tiny. For gptq at 3 bits and wanda at 50 %, it takes
the perplexity on the evaluation text of the original, the compressed model, and the compressed model with adapters, and
says which share of the lost log-perplexity is back, and how long that took. Prints Markdown, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import compress

COMPRESSED: dict[str, dict[str, Any]] = {
    "gptq 3 bits": {"gptq": {"bits": 3, "group_size": 64}},
    "wanda 50 %": {"wanda": {"sparsity": 0.5}},
}


def perplexity(model: str, text: dict[str, dict[str, Any]], passes: list[dict[str, Any]], folder: Path) -> Any:
    """The report of a run with these passes."""
    return compress.run({
        "model": model, "data": text, "passes": passes, "output": str(folder),
        "benchmark": {"metrics": ["perplexity", "kl_divergence"]},
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--training-samples", type=int, default=2048)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=list(COMPRESSED))
    asked = parser.parse_args()
    training: dict[str, Any] = {"source": asked.calibration, "length": 256}
    if asked.calibration.startswith("builtin:"):
        training["samples"] = asked.training_samples
    text = {
        "calibration": {"source": asked.calibration, "samples": 128, "length": 256},
        "training": training,
        "evaluation": {"source": asked.evaluation, "samples": asked.evaluation_samples, "length": 256},
    }
    lora = {"r": asked.r, "tokens": asked.tokens, "learning_rate": asked.learning_rate, "keep_unpacked": True}
    ways = {
        "repair": [{"repair": {"r": asked.r}}],
        "lora": [{"lora": lora}],
        "lora, begun at repair": [{"repair": {"r": asked.r}}, {"lora": {**lora, "init_lora_weights": "repair"}}],
    }
    rows = []
    print(f"| {asked.model} | perplexity | KL | won back | seconds |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.only:
            first = perplexity(asked.model, text, [COMPRESSED[name]], Path(scratch, name))
            original = first.original["perplexity"].value
            lost = math.log(first.compressed["perplexity"].value / original)
            print(f"| original | {original:.4f} | 0 | | |", flush=True)
            print(f"| {name} | {first.compressed['perplexity'].value:.4f} | "
                  f"{first.compressed['kl_divergence'].value:.4f} | | |", flush=True)  # fmt: skip
            for way, passes in ways.items():
                report = perplexity(asked.model, text, [COMPRESSED[name], *passes], Path(scratch, name + way))
                found = report.compressed["perplexity"].value
                back = 1 - math.log(found / original) / lost
                seconds = sum(stage.seconds or 0.0 for stage in report.stages[1:])
                rows.append({"base": name, "way": way, "original": original, "perplexity": found, "back": back,
                             "compressed": first.compressed["perplexity"].value, "seconds": seconds})  # fmt: skip
                print(f"| {name}, {way} | {found:.4f} | {report.compressed['kl_divergence'].value:.4f} | {back:.0%} | "
                      f"{seconds:.0f} |", flush=True)  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
