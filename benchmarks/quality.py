"""Quality, size and time of passes on one language model, each written, reloaded and measured side by side.

    python benchmarks/quality.py MODEL --calibration FILE --evaluation FILE [--length 256] [--samples 400]
        [--group-size 64] [--separator bos|none] [--calibration-seed 1234]
        [--calibration-samples 128] --name NAME

Writes benchmarks/results/quality-NAME.json and .md. The original is measured once; every method is a whole run (recipe
in, folder out, verified by plain transformers) followed by `compress.benchmark`. The text is cut as the recipe says:
perplexity over sequential windows, first position unscored, in the model's stored dtype.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from arguments import arguments, write_result

import compress
from compress.reports.report import Report

METRICS = "[perplexity, kl_divergence, top1_agreement, weights_bytes, bits_per_weight]"


#: A row's pass, or its passes.
Row = dict[str, Any] | list[dict[str, Any]]


def methods(group: int) -> dict[str, Row]:
    """Name of the row -> the pass."""
    trained: dict[str, Any] = {"block_distill": {}}
    return {
        "rtn 4 bits": {"rtn": {"bits": 4, "group_size": group}},
        "rtn 3 bits": {"rtn": {"bits": 3, "group_size": group}},
        "gptq 4 bits": {"gptq": {"bits": 4, "group_size": group}},
        "gptq 3 bits": {"gptq": {"bits": 3, "group_size": group}},
        "magnitude 50 %": {"magnitude": {"sparsity": 0.5}},
        "wanda 50 %": {"wanda": {"sparsity": 0.5}},
        "sparsegpt 50 %": {"sparsegpt": {"sparsity": 0.5}},
        "sparsegpt 50 %, refit": {"sparsegpt": {"sparsity": 0.5, "refit": 10}},
        "sparsegpt 50 %, measured": {"sparsegpt": {"sparsity": 0.5, "allocation": "measured"}},
        "alps 50 %": {"alps": {"sparsity": 0.5}},
        "alps 50 %, measured": {"alps": {"sparsity": 0.5, "allocation": "measured"}},
        "alps 50 %, block_distill": [{"alps": {"sparsity": 0.5}}, trained],
        "alps 50 %, measured, block_distill": [{"alps": {"sparsity": 0.5, "allocation": "measured"}}, trained],
        "magnitude 2:4": {"magnitude": {"pattern": "2:4"}},
        "wanda 2:4": {"wanda": {"pattern": "2:4"}},
        "sparsegpt 2:4": {"sparsegpt": {"pattern": "2:4"}},
        "sparsegpt 2:4, refit": {"sparsegpt": {"pattern": "2:4", "refit": 10}},
        "alps 2:4": {"alps": {"pattern": "2:4"}},
        "alps 2:4, block_distill": [{"alps": {"pattern": "2:4"}}, trained],
    }


def extra_methods() -> dict[str, Row]:
    """The 2-bit rows of published comparisons: groups of 32."""
    return {
        "rtn 2 bits g32": {"rtn": {"bits": 2, "group_size": 32}},
        "gptq 2 bits g32": {"gptq": {"bits": 2, "group_size": 32}},
    }


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs every method, measures all against the original, and returns the rows."""
    text = {"length": options.length, "separator": options.separator, "pack": not options.no_pack}
    data = {
        "calibration": {
            "source": options.calibration,
            "samples": options.calibration_samples,
            "seed": options.calibration_seed,
            **text,
        },
        "evaluation": {"source": options.evaluation, "samples": options.samples, **text},
    }
    rows = methods(options.group_size) | (extra_methods() if options.two_bits else {})
    rows = {name: passes for name, passes in rows.items() if not options.only or name in options.only}
    reports: dict[str, Report] = {}
    for number, (name, passes) in enumerate(rows.items()):
        passes = passes if isinstance(passes, list) else [passes]
        recipe = {
            "model": options.model, "data": data, "passes": passes, "benchmark": False,
            "output": f"{scratch}/{number}",
        }  # fmt: skip
        reports[name] = compress.run(recipe)
        print(name, _seconds(reports[name]), "s", flush=True)
    overrides = [f"data.evaluation={json.dumps(data['evaluation'])}", f"benchmark.metrics={METRICS}"]
    folders = [f"{scratch}/{number}/model" for number in range(len(rows))]
    found = compress.benchmark([options.model, *folders], overrides=overrides)
    figures = [found.compressed, *(other.measurements for other in found.others)]
    comparisons = [found.comparison, *(other.comparison for other in found.others)]
    lines = [_row("original", found.original, None, None)]
    for name, figure, comparison in zip(rows, figures, comparisons, strict=True):
        lines.append(_row(name, figure, comparison, _seconds(reports[name])))
    return {
        "command": "python benchmarks/quality.py ...", "options": _public(options), "environment": found.environment,
        "rows": lines,
    }  # fmt: skip


def _seconds(report: Report) -> float:
    return sum(stage.seconds or 0.0 for stage in report.stages)


def _row(name: str, figures: Any, comparison: Any, seconds: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "seconds": seconds}
    for metric, figure in figures.items():
        row[metric] = figure.value
    if comparison is not None:
        change = comparison["perplexity"]
        row["perplexity_change"] = {"low": change.ci_low, "high": change.ci_high, "verdict": change.verdict}
    return row


def _public(options: argparse.Namespace) -> dict[str, Any]:
    """The options without the folders of this machine."""
    values = vars(options).copy()
    for name in ("model", "calibration", "evaluation"):
        values[name] = Path(values[name]).name
    return values


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        "| method | ppl | 95 % of the change | kl | top-1 | weights kB | bits/weight | seconds |",
        "|---|" + "---|" * 7,
    ]
    for row in result["rows"]:
        change = row.get("perplexity_change")
        span = "" if change is None or change["low"] is None else f"{change['low']:+.3f} to {change['high']:+.3f}"
        cells = [
            row["method"], _number(row.get("perplexity"), 3), span, _number(row.get("kl_divergence"), 4),
            _number(row.get("top1_agreement"), 3), _number(row["weights_bytes"] / 1e3, 0),
            _number(row.get("bits_per_weight"), 2), _number(row["seconds"], 1),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    options = arguments(
        __doc__,
        group_size={"type": int, "default": 64},
        no_pack={"action": "store_true", "help": "each document alone, cut at --length"},
        calibration_samples={"type": int, "default": 128},
        only={"nargs": "*", "help": "rows to run, by name; all if absent"},
        two_bits={"action": "store_true", "help": "also 2 bits in groups of 32"},
    )
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    write_result(f"quality-{options.name}", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
