"""Passes in words, for `compress passes` and the recipe reference."""

from __future__ import annotations

import inspect

from compress.passes.base import STATES
from compress.registry import PASSES, pass_options


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
    lines = [f"{name}: {_summary(name)}", f"Takes {takes} weights, leaves {cls.leaves} ones; {text}.", ""]
    for option in pass_options(name):
        lines += [f"  {option.name} (default {option.default}): {option.allowed}", f"      {option.description}"]
    return "\n".join(lines)


def _summary(name: str) -> str:
    return (inspect.getdoc(PASSES.get(name)) or "").partition("\n")[0]
