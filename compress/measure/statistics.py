"""Is a difference real? Paired intervals by the bootstrap, and what they say in words.

Right and wrong answers to the same items are tested by McNemar's exact test, and those of several areas by the same
test with each area's weight. Where many areas are looked at, their p-values are adjusted by Holm's procedure.

All intervals are two-sided 95 %. Percentile intervals of few items are too narrow; the level is widened for it as in
Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 5.3 (expanded percentile interval).
Differences between timing rounds are judged by the order statistics of the paired differences (the sign test's
interval), which asks nothing of their distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
#: Draws of random signs from which a p-value of several areas, or of graded scores, is counted.
DRAWS = 20_000
#: Chance of seeing a difference of the size asked for, in `items_needed`.
POWER = 0.8
#: Numbers held at once while resampling.
_BUDGET = 4_000_000
#: Differences of at most so many values are resampled by their counts.
_FEW_VALUES = 32

Areas = Mapping[str, tuple[Array, Array]]


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


def areas_difference(areas: Areas, weights: Mapping[str, float] | None = None, *, seed: int = 0) -> Interval:
    """Interval of the weighted mean over areas of mean(b - a); each area is resampled by itself.

    `weights`: area -> share, adding up to 1; None: the same for all.
    """
    differences = _differences(areas)
    n = sum(len(d) for d in differences)
    least = min((len(d) for d in differences), default=0)
    if least < LEAST:
        return Interval(None, None, n, _too_few(least, "items"))
    shares = _shares(areas, weights)
    if all(bool((d == d[0]).all()) for d in differences):
        mean = float(shares @ [d[0] for d in differences])
        return Interval(mean, mean, n)
    draws = [_means(d, seed + i) for i, d in enumerate(differences)]
    return _percentiles(shares @ np.stack(draws), n, freedom=n - len(differences))


def areas_p_value(areas: Areas, weights: Mapping[str, float] | None = None, *, seed: int = 0) -> float | None:
    """Two-sided p-value of the weighted mean over areas of mean(b - a), or None for too few items.

    If the models are equal, each item's difference has either sign with the same chance. For right and wrong in one
    area that is McNemar's exact test; otherwise the signs are drawn, `DRAWS` times (a permutation test, and exact too:
    Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010).
    """
    differences = _differences(areas)
    if min((len(d) for d in differences), default=0) < LEAST:
        return None
    moved = [d[d != 0] for d in differences]
    if not any(len(d) for d in moved):
        return 1.0
    binary = all(bool((np.abs(d) == 1).all()) for d in moved)
    if binary and len(moved) == 1:
        return mcnemar(int((moved[0] > 0).sum()), int((moved[0] < 0).sum()))
    rng = np.random.default_rng(seed)
    total, observed = np.zeros(DRAWS), 0.0
    for d, whole, share in zip(moved, differences, _shares(areas, weights), strict=True):
        observed += share * d.sum() / len(whole)
        if len(d):
            total += share * (_balance(len(d), rng) if binary else _signed_sums(d, rng)) / len(whole)
    extreme = int((np.abs(total) >= abs(observed) - 1e-12).sum())
    return (extreme + 1) / (DRAWS + 1)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: items right only after (`gained`) and only before (`lost`) are tosses of a fair
    coin if nothing changed. McNemar (1947), in the exact form of Mosteller (1952)."""
    from scipy import stats

    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: the chance that any of the true null hypotheses is rejected stays below the
    level. Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def items_needed(discordant: float, difference: float = 0.01) -> int:
    """Items it takes to see a `difference` of accuracies (0.01: a point) at the 5 % level with 80 % power.

    `discordant` (psi): share of items that one model has right and the other wrong. Paired right and wrong answers need

        n = (z(1 - level / 2) * sqrt(psi) + z(power) * sqrt(psi - difference ** 2)) ** 2 / difference ** 2

    (Connor, "Sample Size for Testing Differences in Proportions for the Paired-Sample Design", Biometrics 43, 1987,
    after Miettinen, 1968). psi is at least `difference`: fewer items could not make it up.
    """
    from scipy import stats

    share = max(discordant, difference)
    edge, power = float(stats.norm.ppf((1 + LEVEL) / 2)), float(stats.norm.ppf(POWER))
    root = edge * math.sqrt(share) + power * math.sqrt(share - difference**2)
    return math.ceil((root / difference) ** 2)


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


def quantile_interval(values: Array, tokens: Array, q: float, *, seed: int = 0) -> Interval:
    """Interval of the `q` quantile of values per token, resampled by windows.

    `values`: those of all windows' tokens, one window after the other; `tokens` [n]: how many each window has.
    """
    n = len(tokens)
    if n < LEAST:
        return Interval(None, None, n, _too_few(n, "windows"))
    counts = np.asarray(tokens, dtype=np.int64)
    window = np.repeat(np.arange(n), counts)
    # Only the values around the quantile and above can become one; five times its tail holds all but freak resamples.
    tail = np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")[: math.ceil(5 * (1 - q) * len(values))]
    above, sorted_values = window[tail], np.asarray(values, dtype=np.float64)[tail]
    rng, draws = np.random.default_rng(seed), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        weight = np.bincount(rng.integers(0, n, n), minlength=n)
        total = int(weight @ counts)
        place = np.searchsorted(np.cumsum(weight[above]), total - math.ceil(q * total) + 1)
        draws[i] = sorted_values[min(int(place), len(tail) - 1)]
    return _percentiles(draws, n, freedom=n - 1)


def confusion_difference(
    labels: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    statistic: Callable[[Array], Array],
    *,
    seed: int = 0,
) -> Interval:
    """Interval of statistic(after) - statistic(before) over items [n], for what is computed from confusion matrices.

    `statistic`: counts [..., classes, classes] (right class, class said) -> [...]. Items that agree in all three are
    drawn together, by their number: the bootstrap over items, as their counts are all that matters.
    """
    n = len(labels)
    if n < LEAST:
        return Interval(None, None, n, _too_few(n, "items"))
    if np.array_equal(before, after):
        return Interval(0.0, 0.0, n)
    cells, counts = np.unique(np.stack([labels, before, after]), axis=1, return_counts=True)
    k = int(cells.max()) + 1
    rng, draws = np.random.default_rng(seed), []
    step = max(1, _BUDGET // max(k * k, cells.shape[1]))
    for start in range(0, RESAMPLES, step):
        sizes = rng.multinomial(n, counts / n, size=min(step, RESAMPLES - start)).astype(np.float64)
        tables = []
        for said in (cells[1], cells[2]):
            place = np.zeros((cells.shape[1], k * k))
            place[np.arange(cells.shape[1]), cells[0] * k + said] = 1.0
            tables.append((sizes @ place).reshape(-1, k, k))
        draws.append(statistic(tables[1]) - statistic(tables[0]))
    return _percentiles(np.concatenate(draws), n, freedom=n - 1)


def f1_macro(confusion: Array) -> Array:
    """Unweighted mean of the classes' F1 from counts [..., classes, classes] (right class, class said), over classes
    that occur or were said."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    either = confusion.sum(-1) + confusion.sum(-2)
    scores = 2 * hits / np.maximum(either, 1)
    return np.asarray(scores.sum(-1) / np.maximum((either > 0).sum(-1), 1))


def matthews(confusion: Array) -> Array:
    """Matthews correlation of counts [..., classes, classes] (right class, class said); of several classes as in
    Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004). 0 where one class
    was all there was, or all that was said."""
    right, said = confusion.sum(-1), confusion.sum(-2)
    total, hits = right.sum(-1), np.trace(confusion, axis1=-2, axis2=-1)
    top = hits * total - (right * said).sum(-1)
    square = (total**2 - (said**2).sum(-1)) * (total**2 - (right**2).sum(-1))
    return np.asarray(np.where(square > 0, top / np.sqrt(np.maximum(square, 1.0)), 0.0))


def median_difference(a: Array, b: Array) -> Interval:
    """Interval of the median of b - a over paired rounds, from their order statistics."""
    from scipy import stats

    n = len(a)
    if n < LEAST:
        return Interval(None, None, n, _too_few(n, "rounds"))
    found = stats.quantile_test(np.asarray(b) - np.asarray(a), q=0, p=0.5).confidence_interval(LEVEL)
    return Interval(float(found.low), float(found.high), n)


def leaf_weights(areas: Sequence[str]) -> dict[str, float]:
    """The share of each area in the accuracy over all: areas and tasks count the same, and so do those of a group
    (`mmlu/anatomy` is one of `mmlu`) in it.

    >>> leaf_weights(["facts", "mmlu/law", "mmlu/physics"])
    {'facts': 0.5, 'mmlu/law': 0.25, 'mmlu/physics': 0.25}
    """
    leaves = list(dict.fromkeys(areas))
    groups = Counter(leaf.partition("/")[0] for leaf in leaves)
    return {leaf: 1 / len(groups) / groups[leaf.partition("/")[0]] for leaf in leaves}


def verdict(interval: Interval, higher_is_better: bool) -> Verdict:
    """What the interval says: a difference is called only when zero lies outside."""
    if interval.low is None or interval.high is None or not math.isfinite(interval.low + interval.high):
        return "not_tested"
    if interval.low <= 0 <= interval.high:
        return "no_difference"
    return "better" if (interval.low > 0) == higher_is_better else "worse"


def _differences(areas: Areas) -> list[Array]:
    return [np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64) for a, b in areas.values()]


def _shares(areas: Areas, weights: Mapping[str, float] | None) -> Array:
    shares = [1 / len(areas) if weights is None else weights[area] for area in areas]
    return np.array(shares, dtype=np.float64)


def _balance(n: int, rng: np.random.Generator) -> Array:
    """Heads less tails of n tosses, `DRAWS` times."""
    return np.asarray(2.0 * rng.binomial(n, 0.5, size=DRAWS) - n, dtype=np.float64)


def _signed_sums(differences: Array, rng: np.random.Generator) -> Array:
    """Sums of the differences under random signs, `DRAWS` times."""
    step = max(1, _BUDGET // len(differences))
    parts = []
    for start in range(0, DRAWS, step):
        signs = rng.integers(0, 2, size=(min(step, DRAWS - start), len(differences)), dtype=np.int8)
        parts.append((2.0 * signs - 1) @ differences)
    return np.concatenate(parts)


def _means(differences: Array, seed: int) -> Array:
    """Means of `RESAMPLES` resamples; of few values by how often each is drawn, which is the same and fast."""
    values, counts = np.unique(differences, return_counts=True)
    if len(values) > _FEW_VALUES:
        return _bootstrap((differences,), lambda x, axis=-1: x.mean(axis=axis), seed)
    n = len(differences)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    return np.asarray(drawn @ values / n, dtype=np.float64)


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
