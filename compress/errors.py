"""Errors that a user can act on. Each says what is wrong, where, what is allowed and what to do.

The command line prints the message alone and leaves with `exit_code`; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """The work failed: corrupt weights, text too short, coverage too low, disk full, export not verified."""

    exit_code = 1


class StartError(CompressError):
    """The work could not start: usage, missing path, an order or option that cannot be, no room by plan."""

    exit_code = 2


class RecipeError(StartError):
    """A recipe, or an override of it, is not valid."""


class MissingExtra(StartError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "compress[{extra}]"')


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean "x"?` for the allowed name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
