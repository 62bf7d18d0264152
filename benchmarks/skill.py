"""A skill that the embedded model never saw, learnt by adapters: what it gains, and what its other areas lose.

python benchmarks/skill.py [--r N] [--epochs N] [--lessons N]

Prints the accuracy of every area, before and after, and the adapters' share of the parameters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import compress
from compress.builtin.comparison import items, lessons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lessons", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        training, tasks = Path(scratch, "lessons.jsonl"), Path(scratch, "comparison.jsonl")
        training.write_text("\n".join(map(json.dumps, lessons("training", asked.lessons))) + "\n")
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
    print(f"adapters: {stage.measurements['parameters_share']:.2%} of the parameters, {stage.seconds:.0f} s")
    print("| area | before | after |\n|---|---|---|")
    for name, figure in report.compressed.items():
        before = report.original[name].value
        print(f"| {name} | {before:.1%} | {figure.value:.1%} |")


if __name__ == "__main__":
    main()
