"""Width pruning with and without the fit, at several amounts: is at most half of the rise in log-perplexity left?

    python benchmarks/width.py MODEL --calibration FILE --evaluation FILE --name NAME [--amounts 20% 30%]
        [--samples 400] [--length 256] [--separator bos|none] [--calibration-seed 1234] [--importance reconstruction]

The protocol is that of `benchmarks/quality.py`: every row is a whole run, and perplexity is measured on the reloaded
folders. For each amount the mix of channels and heads is chosen by the run with the fit; the row without it is the same
cut. Writes benchmarks/results/width-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from arguments import arguments, write_result

import compress

METRICS = "[perplexity, kl_divergence, parameters, weights_bytes]"


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs both rows of every amount, measures all, and returns the rows."""
    text = {"length": options.length, "separator": options.separator}
    data = {
        "calibration": {"source": options.calibration, "samples": 128, "seed": options.calibration_seed, **text},
        "evaluation": {"source": options.evaluation, "samples": options.samples, **text},
    }
    rows: list[dict[str, Any]] = []

    def run(amount: str, width: dict[str, Any], refit: bool) -> dict[str, Any]:
        passes = [{"width": {**width, "importance": options.importance, "refit": refit}}]
        output = f"{scratch}/{len(rows)}"
        recipe = {"model": options.model, "data": data, "passes": passes, "benchmark": False, "output": output}
        stage = compress.run(recipe).stages[0]
        found = {key: stage.measurements[key] for key in ("intermediate_size", "heads") if key in stage.measurements}
        rows.append({"amount": amount, "refit": refit, "seconds": stage.seconds, **found})
        print(rows[-1], flush=True)
        return found

    for amount in options.amounts:
        sizes = run(amount, {"amount": amount}, True)
        run(amount, sizes, False)
    overrides = [f"data.evaluation={json.dumps(data['evaluation'])}", f"benchmark.metrics={METRICS}"]
    found = compress.benchmark(
        [options.model, *(f"{scratch}/{n}/model" for n in range(len(rows)))], overrides=overrides
    )
    base = found.original["perplexity"].value
    assert base is not None
    for row, figures in zip(rows, [found.compressed, *(o.measurements for o in found.others)], strict=True):
        row |= {metric: figure.value for metric, figure in figures.items()}
        row["rise"] = math.log(row["perplexity"] / base)
    for with_fit, without in zip(rows[::2], rows[1::2], strict=True):
        with_fit["of the rise without"] = with_fit["rise"] / without["rise"]
    public = {**vars(options), **{key: Path(vars(options)[key]).name for key in ("model", "calibration", "evaluation")}}
    return {"options": public, "environment": found.environment, "original perplexity": base, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        f"Original: perplexity {result['original perplexity']:.3f}.", "",
        "| removed | fitted | channels | heads | parameters | ppl | rise in log ppl | of the rise without |",
        "|---|" + "---|" * 7,
    ]  # fmt: skip
    for row in result["rows"]:
        share = row.get("of the rise without")
        lines.append(
            f"| {row['amount']} | {'yes' if row['refit'] else 'no'} | {row.get('intermediate_size', '')} | "
            f"{row.get('heads', '')} | {row['parameters']:,} | {row['perplexity']:.3f} | {row['rise']:.4f} | "
            f"{'' if share is None else f'{share:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments(
        __doc__,
        amounts={"nargs": "+", "default": ["20%", "30%"]},
        importance={"default": "reconstruction"},
    )
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    write_result(f"width-{options.name}", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
