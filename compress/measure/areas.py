"""How many items of each area a model in memory answers right, before and after a pass, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.measure.items import Item, score_items
from compress.measure.statistics import areas_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[str, list[int]]


def area_scores(
    model: PreTrainedModel, tokenizer: Any, tasks: Mapping[str, Sequence[Item]], context: int | None
) -> Scores:
    """1 for each item answered right, 0 for each other, by area."""
    return {area: score_items(model, tokenizer, items, context=context) for area, items in tasks.items()}


def summarised(scores: Mapping[str, Scores], seed: int = 0) -> dict[str, Any]:
    """For each model its accuracy in each area and their unweighted mean; under `differences`, `after` less each other
    one with its 95 % interval over paired items, or why there is none."""
    found: dict[str, Any] = {}
    for name, areas in scores.items():
        means = {area: float(np.mean(right)) for area, right in areas.items()}
        found[name] = {**means, "mean": float(np.mean(list(means.values())))}
    found["differences"] = {
        name: _difference(scores[name], scores["after"], seed) for name in scores if name != "after"
    }
    return found


def _difference(before: Scores, after: Scores, seed: int) -> dict[str, Any]:
    pairs = {area: (np.array(before[area], float), np.array(after[area], float)) for area in after}
    delta = float(np.mean([b.mean() - a.mean() for a, b in pairs.values()]))
    interval = areas_difference(pairs, seed=seed)
    return {"delta": delta, "ci_low": interval.low, "ci_high": interval.high, "reason": interval.reason}
