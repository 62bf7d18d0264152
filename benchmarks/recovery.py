"""What `lora` and `repair` win back of what compression cost.

    python benchmarks/recovery.py MODEL --calibration TEXT --evaluation TEXT --name NAME [--tokens N] [--only NAME ...]

MODEL: a folder or builtin:tiny; the texts: .jsonl files or builtin:tiny. For gptq at 3 bits and wanda at 50 %, it takes
the perplexity on the evaluation text of the original, the compressed model, and the compressed model with adapters, and
says which share of the lost log-perplexity is back, and how long that took. Writes `results/recovery-NAME.json` and
`.md`, row by row; what stands there is not measured again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments import add_row, arguments, kept_rows

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


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| base | way | original | perplexity | KL | won back | seconds |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        back = "" if row["back"] is None else f"{row['back']:.0%}"
        figures = f"{row['original']:.4f} | {row['perplexity']:.4f} | {row['kl']:.4f}"
        lines.append(f"| {row['base']} | {row['way']} | {figures} | {back} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    asked = arguments(
        __doc__,
        tokens={"type": int, "default": 500_000},
        r={"type": int, "default": 16},
        learning_rate={"type": float, "default": 2e-3},
        training_samples={"type": int, "default": 2048},
        only={"nargs": "*", "default": list(COMPRESSED)},
        ways={"nargs": "*"},
    )
    training: dict[str, Any] = {"source": asked.calibration, "length": asked.length}
    if asked.calibration.startswith("builtin:"):
        training["samples"] = asked.training_samples
    text = {
        "calibration": {"source": asked.calibration, "samples": 128, "length": asked.length},
        "training": training,
        "evaluation": {"source": asked.evaluation, "samples": asked.samples, "length": asked.length},
    }
    lora = {"r": asked.r, "tokens": asked.tokens, "learning_rate": asked.learning_rate, "keep_unpacked": True}
    ways: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "repair": [{"repair": {"r": asked.r}}],
        "lora": [{"lora": lora}],
        "lora, begun at repair": [{"repair": {"r": asked.r}}, {"lora": {**lora, "init_lora_weights": "repair"}}],
    }
    stem = f"recovery-{asked.name}"
    rows = kept_rows(stem)
    for base in asked.only:
        for way, passes in ways.items():
            if (asked.ways and way not in (*asked.ways, "none")) or any(
                (row["base"], row["way"]) == (base, way) for row in rows
            ):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                report = perplexity(asked.model, text, [COMPRESSED[base], *passes], Path(scratch, "run"))
            original, found = report.original["perplexity"].value, report.compressed["perplexity"].value
            bare = next((row["perplexity"] for row in rows if (row["base"], row["way"]) == (base, "none")), found)
            back = None if way == "none" else 1 - math.log(found / original) / math.log(bare / original)
            rows.append({
                "base": base, "way": way, "original": original, "perplexity": found,
                "kl": report.compressed["kl_divergence"].value, "back": back,
                "seconds": sum(stage.seconds or 0.0 for stage in report.stages[1:]),
            })  # fmt: skip
            add_row(stem, rows, f"python benchmarks/recovery.py {Path(asked.model).name} ...", markdown)


if __name__ == "__main__":
    main()
