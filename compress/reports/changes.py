"""Items that changed sides and texts on which the models differ most, in words, where a report has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from compress.reports import units
from compress.reports.report import Report

#: Items that are shown.
SHOWN = 10
CHANGES = {"right_to_wrong": "right to wrong", "wrong_to_right": "wrong to right"}


@dataclass(frozen=True)
class ChangedItems:
    """`areas`: name, items, right to wrong, wrong to right, as text; `examples`: area, change, text and answer."""

    sentence: str
    areas: list[list[str]]
    examples: list[dict[str, str]]


def changed_items(report: Report) -> ChangedItems | None:
    """None where no items were compared."""
    flips = _plain(getattr(report, "flips", None))
    if not flips:
        return None
    lost, won, items = flips["right_to_wrong"], flips["wrong_to_right"], flips["items"]
    sentence = (
        f"Of {items:,} items, {lost:,} that were right are wrong now, and {won:,} that were wrong are right."
        if lost or won
        else f"None of {items:,} items changed sides."
    )
    areas = [
        [name.replace("_", " "), *(f"{entry.get(key, 0):,}" for key in ("items", *CHANGES))]
        for name, entry in flips.get("areas", {}).items()
    ]
    examples = [
        {
            "area": str(each.get("area", "")).replace("_", " "),
            "change": CHANGES.get(str(each.get("change")), str(each.get("change"))),
            "text": str(each.get("text", "")), "answer": str(each.get("answer", "")),
        }
        for each in flips.get("examples", [])[:SHOWN]
    ]  # fmt: skip
    return ChangedItems(sentence, areas, examples)


def worst_texts(report: Report) -> list[dict[str, str]]:
    """`kl` (nats a token), `text`, and `said`: the token on which they differ most."""
    found = []
    for each in _plain(getattr(report, "worst", None)) or []:
        said = ""
        if each.get("token") and each.get("token_kl") is not None:
            said = f"Most at “{each['token']}” ({units.short(each['token_kl'])} nats)"
            said += f", after “…{each['before']}”." if each.get("before") else "."
        found.append({"kl": units.short(each["kl"]), "text": str(each.get("text", "")), "said": said})
    return found


def _plain(value: Any) -> Any:
    """Typed entries as plain dictionaries."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    return [_plain(each) for each in value] if isinstance(value, list) else value
