"""Goals of a benchmark (`perplexity: "+2%"`) and sizes ("2GB") as figures."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from compress.errors import RecipeError
from compress.registry import METRICS, yaml_words

_UNITS = {"B": 1}
_UNITS |= {f"{letter}B": 1000 ** (power + 1) for power, letter in enumerate("kMGT")}
_UNITS |= {f"{letter}iB": 1024 ** (power + 1) for power, letter in enumerate("KMGT")}
_BY_NAME = {name.lower(): factor for name, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMgGtT]?i?[bB])")
_FIGURE = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_GOAL = re.compile(rf"([-+]?)\s*({_FIGURE})\s*(%|pt)?")

#: Metrics that are shares of 1, so that percentage points and plain percentages of them mean something.
SHARES = ("accuracy", "top1_agreement", "f1", "exact_match", "rouge_l")
#: Metrics that read `data.evaluation`.
TEXT_METRICS = ("perplexity", "bits_per_byte", "kl_divergence", "kl_divergence_p99", "top1_agreement")
#: Metrics of a model that classifies the texts of `data.evaluation`, and of answers that it writes to test items.
CLASS_METRICS = ("f1", "matthews_correlation")
ANSWER_METRICS = ("exact_match", "rouge_l")

#: Metrics that are measured in several settings and runtimes, as `decode_tokens_per_second/batch 4`.
VARIED = (
    "decode_tokens_per_second", "energy_joules_per_token", "first_token_seconds", "kl_divergence",
    "kv_cache_bytes_per_token", "peak_memory_bytes", "prefill_tokens_per_second",
    "resident_weights_bytes", "top1_agreement",
)  # fmt: skip


def parse_size(size: str | int | float) -> int:
    """Bytes of "500 MB" (kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB of 1024) or of a number of bytes.

    >>> parse_size("2GB"), parse_size("1.5 KiB"), parse_size(4096)
    (2000000000, 1536, 4096)
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match:
            return round(float(match[1]) * _BY_NAME[match[2].lower()])
    elif not isinstance(size, bool) and math.isfinite(size) and size >= 0:
        return round(size)
    raise RecipeError(f"{yaml_words(size)} is not a size; allowed: a number and a unit, as in 2GB or 1500 MiB.")


def known_metric(metric: str) -> bool:
    """Whether a goal can name `metric`: any metric of the registry, `accuracy/<area or task>`, or, of what is measured
    in several settings and runtimes, `<metric>/<setting or runtime>`."""
    base, _, variant = metric.partition("/")
    return metric in METRICS or (bool(variant) and base in ("accuracy", *VARIED))


@dataclass(frozen=True)
class Goal:
    """What a metric of the compressed model has to reach.

    `kind` says what `bound` is: relative: a share of the original's value (0.02 for "+2%"); points: a difference to
    it (-0.01 for "-1pt", -0.5 for -0.5); absolute: the value itself. `text` is the goal as it was written.
    """

    metric: str
    kind: Literal["relative", "points", "absolute"]
    bound: float
    text: str

    def threshold(self, original: float) -> float:
        """The value that must be reached, given the original's."""
        if self.kind == "relative":
            return original * (1 + self.bound)
        return original + self.bound if self.kind == "points" else self.bound

    def met(self, value: float, original: float, higher_is_better: bool) -> bool:
        """Whether `value`, a point estimate, is on the good side of the threshold (on it counts)."""
        threshold = self.threshold(original)
        return value >= threshold if higher_is_better else value <= threshold


def parse_goal(metric: str, value: str | int | float) -> Goal:
    """The goal written as `metric: value`.

    With a sign it is a change relative to the original: "+2%" in percent of it, "-1pt" in percentage points, "+0.5" in
    the metric's own unit. Without one it is absolute: 12.5, "90%" (of a share), "2GB" (of a size). Raises RecipeError,
    whose message does not name the metric.
    """
    if not known_metric(metric):
        raise RecipeError(METRICS.unknown(metric))
    text = str(value).strip()
    base = metric.partition("/")[0]
    share = base in SHARES
    foreign = base not in METRICS.table and not share
    match = _GOAL.fullmatch(text)
    if isinstance(value, bool) or (not match and not _SIZE.fullmatch(text)):
        raise RecipeError(
            f"{yaml_words(value)} is not a goal; allowed: a change as in +2%, -1pt or -0.5, a figure as in 12.5 or 2GB."
        )
    if not match:
        if "_bytes" not in base and not foreign:
            raise RecipeError(f"{yaml_words(value)} is a size, and {metric} is not counted in bytes.")
        return Goal(metric, "absolute", float(parse_size(text)), text)
    sign, figure, unit = match[1], float(match[2]), match[3]
    if not math.isfinite(figure):
        raise RecipeError(f"{yaml_words(value)} is too large a number.")
    if (unit == "pt" or (unit == "%" and not sign)) and not share and not foreign:
        raise RecipeError(f"{yaml_words(value)} is a share, and {metric} is not one; write a change as in +2%.")
    if unit == "pt" and not sign:
        raise RecipeError(f"{yaml_words(value)} needs a sign: percentage points are a change, as in -1pt.")
    if sign and base in ("kl_divergence", "kl_divergence_p99"):
        raise RecipeError(f"{yaml_words(value)} is a change, and the original's {metric} is 0; write a figure.")
    bound = (-figure if sign == "-" else figure) / (100 if unit else 1)
    if not sign:
        return Goal(metric, "absolute", bound, text)
    return Goal(metric, "relative" if unit == "%" else "points", bound, text)
