"""Every rounding method at 8, 4, 3 and 2 bits on one language model: quality, time and memory, row by row.

    python benchmarks/rounding.py MODEL --calibration FILE --evaluation FILE --name NAME
        [--methods rtn gptq gptq@trellis ...] [--grids 8:64 4:64 3:64 2:32] [--seeds 1234] [--training FILE]
        [--samples 400] [--length 256] [--tokens 4000000] [--again]

Each row is a whole run (recipe in, folder out, verified by plain transformers), measured by `compress.benchmark` beside
the original: perplexity over sequential windows, first position unscored. Only the linear layers of the blocks are
rounded, symmetric grids, 16-bit scales. The seed draws the calibration windows. Rows are written to
benchmarks/results/rounding-NAME.json as they come, and a row that is there already is not run again without --again;
rounding-NAME.md has the means over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

from arguments import add_row, arguments, kept_rows

import compress

METRICS = "[perplexity, kl_divergence, top1_agreement, weights_bytes]"


def passes(method: str, grid: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """The recipe's passes for a row. `a+b`: one after the other, the grid being that of the first; `a@trellis`: on the
    grid of that name."""
    first, *rest = method.split("+")
    first, _, named = first.partition("@")
    grid = {**grid, "grid": named} if named else grid
    if first in ("fast", "balanced", "best"):
        more = {"tokens": tokens} if first == "best" else {}
        return [{"quantize": {"preset": first, **grid, **more}}]
    if first == "smoothquant":
        return [{"smoothquant": {}}]
    return [{first: grid}, *({name: {"tokens": tokens}} for name in rest)]


def row(options: argparse.Namespace, method: str, bits: int, group: int, seed: int) -> dict[str, Any]:
    """One method on one grid from one draw of calibration windows."""
    text = {"length": options.length}
    evaluation = {"source": options.evaluation, "samples": options.samples or 400, **text}
    data = {
        "calibration": {"source": options.calibration, "samples": 128, "seed": seed, **text},
        "training": {"source": options.training or options.calibration, **text},
        "evaluation": evaluation,
    }
    with tempfile.TemporaryDirectory() as scratch:
        recipe = {
            "model": options.model, "data": data, "passes": passes(method, {"bits": bits, "group_size": group},
            options.tokens), "benchmark": False, "output": f"{scratch}/run", "seed": seed,
        }  # fmt: skip
        started = time.monotonic()
        made = compress.run(recipe)
        seconds = time.monotonic() - started
        overrides = [f"data.evaluation={json.dumps(evaluation)}", f"benchmark.metrics={METRICS}"]
        found = compress.benchmark([options.model, f"{scratch}/run"], overrides=overrides)
    figures = {name: figure.value for name, figure in found.compressed.items()}
    return {
        "method": method, "bits": bits, "group_size": group, "seed": seed,
        "log_perplexity_gap": math.log(figures["perplexity"] / found.original["perplexity"].value), **figures,
        "original_perplexity": found.original["perplexity"].value,
        "seconds": sum(stage.seconds for stage in made.stages), "run_seconds": seconds,
        "peak_memory_bytes": max(stage.peak_memory_bytes for stage in made.stages),
        "environment": found.environment,
    }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, a line for each method and grid."""
    lines = [
        "| method | bits | group | ppl | log-ppl gap | kl | top-1 | weights kB | seconds | peak MB | seeds |",
        "|---|" + "---|" * 10,
    ]
    keys = list(dict.fromkeys((r["bits"], r["group_size"], r["method"]) for r in rows))
    for bits, group, method in sorted(keys, key=lambda key: (-key[0], key[2])):
        same = [r for r in rows if (r["bits"], r["group_size"], r["method"]) == (bits, group, method)]

        def average(name: str, same: Sequence[dict[str, Any]] = same) -> float:
            return mean(r[name] for r in same)

        cells = [
            method, bits, group, f"{average('perplexity'):.3f}", f"{average('log_perplexity_gap'):.4f}",
            f"{average('kl_divergence'):.4f}", f"{average('top1_agreement'):.3f}",
            f"{average('weights_bytes') / 1e3:.0f}", f"{average('seconds'):.0f}",
            f"{average('peak_memory_bytes') / 1e6:.0f}", len(same),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments(
        __doc__,
        "training",
        training={},
        methods={"nargs": "+", "default": ["rtn", "gptq", "autoround", "awq", "hqq"]},
        grids={"nargs": "+", "default": ["8:64", "4:64", "3:64", "2:32"], "help": "bits:group_size"},
        seeds={"nargs": "+", "type": int, "default": [1234]},
        tokens={"type": int, "default": 4_000_000},
        again={"action": "store_true"},
    )
    stem = f"rounding-{options.name}"
    rows = kept_rows(stem)
    for grid in options.grids:
        bits, group = map(int, grid.split(":"))
        for method in options.methods:
            for seed in options.seeds:
                key = (method, bits, group, seed)
                same = [r for r in rows if (r["method"], r["bits"], r["group_size"], r["seed"]) == key]
                if same and not options.again:
                    continue
                rows = [r for r in rows if r not in same] + [row(options, *key)]
                add_row(stem, rows, "python benchmarks/rounding.py ...", markdown)


if __name__ == "__main__":
    main()
