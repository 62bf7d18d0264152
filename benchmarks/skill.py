"""A skill that the embedded model never saw, learnt by adapters: what it gains, and what its other areas lose.

python benchmarks/skill.py [--r N] [--epochs N] [--lessons N] [--rehearsal N]

Beside the lessons, the adapters see documents of the model's own text, so that it forgets nothing. Writes the accuracy
of every area, before and after, and the adapters' share of the parameters, to `results/skill.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

from arguments import write_result

import compress
from compress.builtin import documents
from compress.builtin.comparison import items, lessons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lessons", type=int, default=2000)
    parser.add_argument("--rehearsal", type=int, default=8000)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        training, tasks = Path(scratch, "lessons.jsonl"), Path(scratch, "comparison.jsonl")
        lines: list[dict[str, str]] = lessons("training", asked.lessons)
        lines += [{"text": text} for text in islice(documents("tiny", "training"), asked.rehearsal)]
        training.write_text("\n".join(map(json.dumps, lines)) + "\n")
        tasks.write_text("\n".join(map(json.dumps, items("evaluation", 200))) + "\n")
        report = compress.run({
            "model": "builtin:tiny",
            "data": {"training": {"source": str(training)}},
            "passes": [{"lora": {
                "purpose": "task", "r": asked.r, "epochs": asked.epochs, "learning_rate": asked.learning_rate,
                "batch_size": 16, "target_modules": ["q_proj", "v_proj"],
            }}],
            "benchmark": {"metrics": ["accuracy"], "tasks": ["builtin:tiny", str(tasks)]},
            "output": str(Path(scratch, "run")),
        })  # fmt: skip
    stage = report.stages[0]
    rows = {name: (report.original[name].value, figure.value) for name, figure in report.compressed.items()}
    share = stage.measurements["parameters_share"]
    table = [
        f"Adapters of {share:.2%} of the parameters, {stage.seconds:.0f} s; {asked.lessons} lessons, {asked.rehearsal} "
        "documents.",
        "",
        "| area | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before:.1%} | {after:.1%} |" for name, (before, after) in rows.items()),
    ]
    result = {"options": vars(asked), "parameters_share": share, "seconds": stage.seconds, "accuracy": rows}
    write_result("skill", result, "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
