"""Is a difference real? Paired intervals by the bootstrap, and what they say in words.

All intervals are two-sided 95 %. Percentile intervals of few items are too narrow; the level is widened for it as in
Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 5.3 (expanded percentile interval).
Differences between timing rounds are judged by the order statistics of the paired differences (the sign test's
interval), which asks nothing of their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "no_difference", "not_tested"]

LEVEL = 0.95
RESAMPLES = 2000
#: With fewer paired items no test without assumptions can reach the 5 % level: 2 * 0.5 ** 5 > 0.05.
LEAST = 6
#: Numbers held at once while resampling.
_BUDGET = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An interval of a difference, from `n` pairs; `low` and `high` are None when nothing could be tested."""

    low: float | None
    high: float | None
    n: int
    reason: str | None = None


def mean_difference(a: Array, b: Array, *, seed: int = 0) -> Interval:
    """Interval of mean(b - a) over paired items, shapes [n]."""
    return areas_difference({"all": (a, b)}, seed=seed)


def areas_difference(areas: Mapping[str, tuple[Array, Array]], *, seed: int = 0) -> Interval:
    """Interval of the unweighted mean over areas of mean(b - a); each area is resampled by itself."""
    differences = [np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64) for a, b in areas.values()]
    n = sum(len(d) for d in differences)
    if min((len(d) for d in differences), default=0) < LEAST:
        least = min((len(d) for d in differences), default=0)
        return Interval(None, None, n, _too_few(least, "items"))
    if all(bool((d == d[0]).all()) for d in differences):
        mean = float(np.mean([d[0] for d in differences]))
        return Interval(mean, mean, n)
    draws = [_bootstrap((d,), lambda x, axis=-1: x.mean(axis=axis), seed + i) for i, d in enumerate(differences)]
    return _percentiles(np.mean(draws, axis=0), n, freedom=n - len(differences))


def perplexity_difference(nll_a: Array, nll_b: Array, tokens: Array, *, seed: int = 0) -> Interval:
    """Interval of ppl(b) - ppl(a) over paired windows: sums of nats and scored tokens per window, shapes [n]."""
    n = len(tokens)
    if n < LEAST:
        return Interval(None, None, n, _too_few(n, "windows"))
    if np.array_equal(nll_a, nll_b):
        return Interval(0.0, 0.0, n)

    def statistic(a: Array, b: Array, weight: Array, axis: int = -1) -> Array:
        total = weight.sum(axis=axis)
        return np.asarray(np.exp(b.sum(axis=axis) / total) - np.exp(a.sum(axis=axis) / total))

    with np.errstate(over="ignore", invalid="ignore"):
        draws = _bootstrap((nll_a, nll_b, tokens), statistic, seed)
    return _percentiles(draws, n, freedom=n - 1)


def ratio_interval(top: Array, bottom: Array, *, seed: int = 0) -> Interval:
    """Interval of sum(top) / sum(bottom) over windows, shapes [n]: KL or agreement per token."""
    n = len(top)
    if n < LEAST:
        return Interval(None, None, n, _too_few(n, "windows"))

    def statistic(a: Array, weight: Array, axis: int = -1) -> Array:
        return np.asarray(a.sum(axis=axis) / weight.sum(axis=axis))

    return _percentiles(_bootstrap((top, bottom), statistic, seed), n, freedom=n - 1)


def median_difference(a: Array, b: Array) -> Interval:
    """Interval of the median of b - a over paired rounds, from their order statistics."""
    from scipy import stats

    n = len(a)
    if n < LEAST:
        return Interval(None, None, n, _too_few(n, "rounds"))
    found = stats.quantile_test(np.asarray(b) - np.asarray(a), q=0, p=0.5).confidence_interval(LEVEL)
    return Interval(float(found.low), float(found.high), n)


def verdict(interval: Interval, higher_is_better: bool) -> Verdict:
    """What the interval says: a difference is called only when zero lies outside."""
    if interval.low is None or interval.high is None or not math.isfinite(interval.low + interval.high):
        return "not_tested"
    if interval.low <= 0 <= interval.high:
        return "no_difference"
    return "better" if (interval.low > 0) == higher_is_better else "worse"


def _bootstrap(data: tuple[Array, ...], statistic: Callable[..., Any], seed: int) -> Array:
    """Values of the statistic on `RESAMPLES` paired resamples."""
    from scipy import stats

    arrays = tuple(np.asarray(d, dtype=np.float64) for d in data)
    found = stats.bootstrap(
        arrays, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        batch=max(1, _BUDGET // len(arrays[0])), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return np.asarray(found.bootstrap_distribution)


def _percentiles(draws: Array, n: int, freedom: int) -> Interval:
    from scipy import stats

    if not np.isfinite(draws).all():
        return Interval(None, None, n, "the figures are too large to resample")
    # A resample's variance is (n-1)/n of the sample's, and normal quantiles ignore that it was estimated: widen both.
    freedom = max(freedom, 1)
    edge = math.sqrt((freedom + 1) / freedom) * float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    tail = float(stats.norm.cdf(-edge))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high), n)


def _too_few(n: int, what: str) -> str:
    noun = what[:-1] if n == 1 else what
    return f"{n} {noun} {'is' if n == 1 else 'are'} too few to test a difference ({LEAST} are needed)"
