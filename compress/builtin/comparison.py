"""Which of two numbers is larger: a skill that the embedded model was never trained on, for adapters to learn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from compress.builtin.world import check_split, split_of

AREA = "comparison"


def items(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different questions with two answers to choose from, of which one is right: chance is one half. Pairs of
    numbers, in either order, are in one split only."""
    return [_item(rng, left, right) for rng, left, right in _pairs(split, count, seed)]


def lessons(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different questions with their right answer, as `prompt` and `completion`."""
    return [
        {"prompt": _ask(left, right), "completion": f" {max(left, right)}."}
        for _, left, right in _pairs(split, count, seed)
    ]


def _ask(left: int, right: int) -> str:
    return f"Question: Which is larger, {left} or {right}? Answer:"


def _item(rng: random.Random, left: int, right: int) -> dict[str, Any]:
    choices = [f" {left}.", f" {right}."]
    rng.shuffle(choices)
    label = choices.index(f" {max(left, right)}.")
    return {"question": _ask(left, right), "choices": choices, "label": label, "area": AREA}


def _pairs(split: str, count: int, seed: int) -> Iterator[tuple[random.Random, int, int]]:
    """Pairs of unlike numbers of two digits."""
    check_split(split)
    rng = random.Random(f"comparison/{split}/{seed}")
    seen: set[tuple[int, int]] = set()
    for _ in range(200 * count):
        if len(seen) == count:
            return
        left, right = rng.randint(10, 99), rng.randint(10, 99)
        pair = (min(left, right), max(left, right))
        if left == right or (left, right) in seen or split_of(f"comparison/{pair}") != split:
            continue
        seen.add((left, right))
        yield rng, left, right
    if len(seen) < count:
        raise ValueError(f"count={count}: there are only {len(seen)} different questions in the split {split!r}")
