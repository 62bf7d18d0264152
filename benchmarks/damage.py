"""What rounding to nearest does to the embedded model's abilities, at 8, 4, 3 and 2 bits.

    python benchmarks/damage.py [--group-size 64] [--model builtin:tiny]

Each row is a whole run (asymmetric grids), measured by `compress.benchmark` on the model's own items and text. Writes
benchmarks/results/damage-tiny.json and .md; the model card's figures come from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import compress

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--model", default="builtin:tiny")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bits = (8, 4, 3, 2)
        for each in bits:
            rounding = {"bits": each, "group_size": options.group_size, "symmetric": False}
            recipe = {
                "model": options.model, "passes": [{"rtn": rounding}], "benchmark": False,
                "output": f"{scratch}/{each}",
            }  # fmt: skip
            compress.run(recipe)
        folders = [f"{scratch}/{each}/model" for each in bits]
        metrics = "benchmark.metrics=[perplexity, accuracy, kl_divergence]"
        report = compress.benchmark([options.model, *folders], overrides=[metrics])
    columns = [report.original, report.compressed, *(other.measurements for other in report.others)]
    names = ["original", *(f"{each} bits" for each in bits)]
    metrics_shown = [name for name in report.original if report.original[name].value is not None]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for metric in metrics_shown:
        cells = [f"{column[metric].value:.4g}" for column in columns]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    rows = {name: {m: column[m].value for m in metrics_shown} for name, column in zip(names, columns, strict=True)}
    counts = {metric: report.original[metric].n for metric in metrics_shown}
    result = {"group_size": options.group_size, "n": counts, "environment": report.environment, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "damage-tiny.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "damage-tiny.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
