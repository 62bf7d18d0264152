"""What of a recipe decides the compressed model, and what changed between two recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.registry import yaml_words

#: Where and how the work is done: this decides neither the model nor what a card says of it.
HOW_IT_IS_DONE = ("output", "device", "residency", "memory", "min_coverage")


def decisive(canonical: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a canonical recipe that decides the compressed model.

    Left out: what is measured (`benchmark`, `data.evaluation`), and `HOW_IT_IS_DONE`.
    """
    kept = {key: canonical.get(key) for key in ("model", "dtype", "passes", "export", "runtime", "seed")}
    data = canonical.get("data") or {}
    return {**kept, "data": {role: data.get(role) for role in ("calibration", "training")}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one canonical recipe to another, of what decides the result: `passes.0.gptq.bits: 4 -> 3`."""
    return _differences(decisive(old), decisive(new), "")


_ABSENT = object()


def _differences(old: Any, new: Any, place: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if place.startswith("passes.") and place.count(".") == 1 and old.keys() != new.keys():
            return [f"{place}: {', '.join(old)} -> {', '.join(new)}"]
        keys = list(dict.fromkeys([*old, *new]))
        pairs = [(str(key), old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        length = max(len(old), len(new))
        padded = [[*items, *[_ABSENT] * (length - len(items))] for items in (old, new)]
        pairs = [(str(index), *both) for index, both in enumerate(zip(*padded, strict=True))]
    elif old == new and isinstance(old, bool) == isinstance(new, bool):
        return []
    else:
        before, after = ("(absent)" if value is _ABSENT else yaml_words(value) for value in (old, new))
        return [f"{place}: {before} -> {after}"]
    prefix = f"{place}." if place else ""
    return [line for key, before, after in pairs for line in _differences(before, after, prefix + key)]
