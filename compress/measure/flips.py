"""What changed, with its texts: items that changed sides, and the text on which the models differ most."""

from __future__ import annotations

from typing import Literal

import numpy as np

from compress.measure.measurements import Measurements
from compress.reports.report import Flip, Flips, WorstText

#: Items shown of those that got worse and of those that got better, and the characters of each.
SHOWN, CHARACTERS = 20, 300
#: A graded answer counts as right from here on.
RIGHT = 0.5


def flips(original: Measurements, compressed: Measurements) -> Flips | None:
    """Items that were right before and are wrong now, and the reverse; None where no items were measured of both."""
    if "correct" not in original.records or "correct" not in compressed.records:
        return None
    before, after = (np.asarray(each.records["correct"], float) >= RIGHT for each in (original, compressed))
    area = np.asarray(original.records["area"])
    if len(before) != len(after):
        return None
    lost, gained = before & ~after, ~before & after
    areas = {
        str(name): {
            "right_to_wrong": int(lost[area == name].sum()),
            "wrong_to_right": int(gained[area == name].sum()),
            "items": int((area == name).sum()),
        }
        for name in dict.fromkeys(original.records["area"])
    }
    examples = [
        *_examples(original, np.flatnonzero(lost), "right_to_wrong"),
        *_examples(original, np.flatnonzero(gained), "wrong_to_right"),
    ]
    return Flips(
        right_to_wrong=int(lost.sum()), wrong_to_right=int(gained.sum()), items=len(before), areas=areas,
        examples=examples,
    )  # fmt: skip


def _examples(
    original: Measurements, places: np.ndarray, change: Literal["right_to_wrong", "wrong_to_right"]
) -> list[Flip]:
    """The first items of each area in turn, so that none is left out for being late in the list."""
    area = original.records["area"]
    nth: dict[str, int] = {}
    ranked = []
    for place in places.tolist():
        nth[area[place]] = nth.get(area[place], 0) + 1
        ranked.append((nth[area[place]], place))
    found = []
    for _, place in sorted(ranked)[:SHOWN]:
        text, answer = original.item_texts[place] if place < len(original.item_texts) else ("", "")
        found.append(Flip(area=area[place], change=change, text=text[-CHARACTERS:], answer=answer[:CHARACTERS]))
    return found


def worst(compressed: Measurements) -> list[WorstText]:
    """The windows on which the model lies furthest from the original."""
    return [WorstText(**entry) for entry in compressed.worst]
