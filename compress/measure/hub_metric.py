"""Metrics of the Hugging Face hub (`hub:google_bleu`), on the written answers to items of prompt + completion."""

from __future__ import annotations

import functools
from typing import Any

from compress.errors import StartError
from compress.measure.metrics import RecordedMetric
from compress.registry import HUB


@functools.cache
def hub_metric(name: str) -> type[RecordedMetric]:
    """The metric that `evaluate.load` finds under the name after `hub:`, as a class like our own.

    It is given all written answers at once and gives one figure, of which no item has its own: a difference has no
    interval. StartError in a sentence where the hub cannot be reached, or the metric needs a package that is not here.
    """
    import evaluate

    short = name.removeprefix(HUB)
    try:
        loaded = evaluate.load(short)
    except Exception as error:  # of evaluate, huggingface_hub, the network library, and the metric's own imports
        reason = " ".join(str(error).split())[:200]
        raise StartError(
            f"benchmark.metrics: {name} is a program on the Hugging Face hub, and it could not be loaded "
            f"({type(error).__name__}: {reason}). Run once where there is a network, or use exact_match and rouge_l, "
            "which need none."
        ) from error

    class HubMetric(RecordedMetric):
        __doc__ = loaded.description
        metric, unit, higher_is_better = name, "", True
        needs = frozenset({"answers"})
        predictions, references = "written", "wanted"
        kinds = ("string", "string")

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
            found = loaded.compute(predictions=predictions, references=references) or {}
            value = found.get(short, next((v for v in found.values() if isinstance(v, int | float)), None))
            return {"value": None if value is None else float(value), "stderr": None, "n": len(predictions)}

    return HubMetric
