"""What of a recipe decides the compressed model, and what changed between two recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from compress.registry import yaml_words

if TYPE_CHECKING:
    from compress.recipe import Recipe

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


def changes_since(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What changed from a stored canonical recipe, which an older version may have written, to this one. An option that
    came later is at its default in what was stored before it."""
    data = dict(old.get("data") or {})
    for role in data:
        entry = getattr(recipe.data, role, None)
        if entry is not None and data[role] is not None:
            plain = type(entry)(source=entry.source).resolved(role, old.get("seed", 0))
            data[role] = {**plain.model_dump(mode="json"), **data[role]}
    passes = list(old.get("passes") or ())
    for index, (entry, step) in enumerate(zip(passes, recipe.passes, strict=False)):
        if step.name in entry:
            passes[index] = {step.name: _completed(entry[step.name], step)}
    return differences(_completed({**old, "data": data, "passes": passes}, recipe), recipe.canonical())


def _completed(old: Mapping[str, Any], model: BaseModel) -> dict[str, Any]:
    """Stored options with the defaults of those that they lack, where `model` holds the options of today."""
    defaults = type(model).model_construct().model_dump(mode="json", warnings=False)
    found = {**defaults, **old}
    for name, value in found.items():
        part = getattr(model, name, None)
        if isinstance(part, BaseModel) and isinstance(value, Mapping):
            found[name] = _completed(value, part)
    return found


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
