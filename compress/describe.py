"""Passes in words, for `compress passes` and the recipe reference."""

from __future__ import annotations

import inspect

from compress.passes.base import STATES
from compress.recipe import Benchmark, DataEntry, Recipe, Runtime
from compress.registry import PASSES, allowed_words, pass_options


def list_passes() -> str:
    """A line for each pass: its name and what it does."""
    names = PASSES.names()
    width = max(len(name) for name in names)
    return "\n".join(f"{name:<{width}}  {_summary(name)}" for name in names)


def describe_pass(name: str) -> str:
    """What a pass does, what it takes and leaves, and every option."""
    cls = PASSES.get(name)
    takes = " or ".join(state for state in STATES if state in cls.accepts)
    text = "needs calibration text" if cls.needs_calibration else "needs no text"
    left = cls.leaves if isinstance(cls.leaves, str) else cls().leaves  # of some it depends on the options
    leaves = "an adapter beside them" if left == "adapter" else f"{left} ones"
    lines = [f"{name}: {_summary(name)}", f"Takes {takes} weights, leaves {leaves}; {text}.", ""]
    for option in pass_options(name):
        lines += [f"  {option.name} (default {option.default}): {option.allowed}", f"      {option.description}"]
    return "\n".join(lines)


def reference() -> str:
    """docs/recipe-reference.md: every key of a recipe, and every option of every pass, from their own descriptions."""
    lines = ["# Recipe reference", "", "Made from the code by `python -m compress.describe`; a test keeps it true.", ""]
    sections = (("Recipe", Recipe), ("data.<role>", DataEntry), ("benchmark", Benchmark), ("runtime", Runtime))
    for title, section in sections:
        lines += [f"## {title}", "", "| key | allowed | what it is |", "|---|---|---|"]
        for name, field in section.model_fields.items():
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{name}` | {_cell(allowed_words(field))} | {_cell(meaning)} |")
        lines.append("")
    for name in PASSES.table:
        lines += [f"## passes: {name}", "", _summary(name), "", "| option | default | allowed | what it does |"]
        lines.append("|---|---|---|---|")
        for option in pass_options(name):
            cells = (option.default, _cell(option.allowed), _cell(option.description))
            lines.append(f"| `{option.name}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _summary(name: str) -> str:
    return (inspect.getdoc(PASSES.get(name)) or "").partition("\n")[0]


if __name__ == "__main__":
    print(reference(), end="")
