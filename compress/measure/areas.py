"""How many items of each area a model in memory answers right, before and after a pass, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.measure.items import Item, score_items
from compress.measure.statistics import areas_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.data import Windows

Scores = dict[str, list[int]]
#: Tokens in one forward.
TOKENS = 4096


def area_scores(
    model: PreTrainedModel, tokenizer: Any, tasks: Mapping[str, Sequence[Item]], context: int | None
) -> Scores:
    """1 for each item answered right, 0 for each other, by area."""
    return {area: score_items(model, tokenizer, items, context=context) for area, items in tasks.items()}


@torch.no_grad()
def class_scores(model: PreTrainedModel, windows: Windows) -> Scores:
    """1 for each text whose class the model says, 0 for each other; `windows.labels` are the classes."""
    assert windows.labels is not None
    right: list[int] = []
    size = max(1, TOKENS // windows.length)
    for start in range(0, len(windows), size):
        part = windows.select(torch.arange(start, min(start + size, len(windows))))
        assert part.labels is not None
        text = {"input_ids": part.tokens.to(model.device)}
        if part.mask is not None:
            text["attention_mask"] = part.mask.long().to(model.device)
        right += (model(**text).logits.argmax(-1).cpu() == part.labels).int().tolist()
    return {"classes": right}


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
