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
    said = predicted_classes(model, windows.tokens, windows.mask)
    return {"classes": (said == windows.labels).int().tolist()}


@torch.inference_mode()
def predicted_classes(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The class that the model says of each text, int64 [n]. `tokens`: int64 [n, length]; `mask`: bool [n, length],
    False where padded, None where nothing is."""
    said: list[torch.Tensor] = []
    size = max(1, TOKENS // tokens.shape[1])
    if model.config.get_text_config().pad_token_id is None:
        size = 1  # decoders take the class at a text's last token, and find it by the padding
    for start in range(0, len(tokens), size):
        text = {"input_ids": tokens[start : start + size].to(model.device)}
        if mask is not None:
            keep = mask[start : start + size]
            width = int(keep.sum(1).max()) if size == 1 else tokens.shape[1]
            text["input_ids"] = text["input_ids"][:, :width]
            text["attention_mask"] = keep[:, :width].long().to(model.device)
        said.append(model(**text).logits.argmax(-1).cpu())
    return torch.cat(said)


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
