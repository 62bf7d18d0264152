"""How much a structural pass takes or leaves, as recipes say it: "30%", 0.3, 640, "90M"."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

#: Keys of which one says how much; `intermediate_size` and `heads` may stand together.
WAYS = ("amount", "to", "intermediate_size", "heads", "hidden_size")
_TOGETHER = {"intermediate_size", "heads"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_share(value: Any) -> float:
    """0.3 of 0.3 or "30%", more than nothing and less than all; ValueError otherwise.

    >>> parse_share("30%")
    0.3
    """
    share = _percentage(value)
    share = value if share is None else share
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"{value} is no share to remove; allowed: more than 0 and less than 100%, as in 30% or 0.3")
    return float(share)


def parse_count(value: Any) -> int | str:
    """A number, 1 or more, or a percentage above 0 and not above 100, in its plain form; ValueError otherwise.

    >>> parse_count(640), parse_count("70 %")
    (640, '70%')
    """
    share = _percentage(value)
    if share is not None and 0 < share <= 1:
        return f"{100 * share:g}%"
    if share is None and isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"{value} is not what can remain; allowed: a number from 1, or a percentage up to 100%")


def parse_parameters(value: Any) -> int:
    """A number of parameters: 90000000, "90M", "1.2B", "260k"; ValueError otherwise.

    >>> parse_parameters("1.5M")
    1500000
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMbBgG]?)\s*", str(value))
    count = round(float(found[1]) * _UNITS[found[2].lower()]) if found and not isinstance(value, bool) else 0
    if count < 1:
        raise ValueError(f"{value} is no number of parameters; allowed: a number, or one with k, M or B, as in 90M")
    return count


def counted(value: int | str, whole: int) -> float:
    """How many of `whole` a `Count` stands for; not rounded."""
    return whole * float(value.removesuffix("%")) / 100 if isinstance(value, str) else value


def one_way(options: Any) -> Any:
    """The options, if they say how much in one way; else ValueError."""
    if not isinstance(options, dict):
        return options
    given = [key for key in WAYS if options.get(key) is not None]
    if not given:
        raise ValueError(f"how much is not said: give one of {', '.join(WAYS)}, as in amount: 30%")
    if len(given) > 1 and not set(given) <= _TOGETHER:
        raise ValueError(f"{' and '.join(given)} each say how much: give one of them")
    return options


def _percentage(value: Any) -> float | None:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", value) if isinstance(value, str) else None
    return round(float(found[1]) / 100, 12) if found else None


Share = Annotated[float, BeforeValidator(parse_share), Field(gt=0, lt=1)]
Count = Annotated[int | str, BeforeValidator(parse_count)]
Size = Annotated[int | str, BeforeValidator(parse_parameters)]
