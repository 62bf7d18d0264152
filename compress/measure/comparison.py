"""Compressed against original, metric by metric: the difference, its interval, and a sentence.

Accuracies are judged by the p-value of their items (McNemar's exact test), adjusted by Holm's procedure where there are
several areas or tasks; the accuracy over all of them is one question, and is not. All else is judged by its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.measure import statistics
from compress.measure.measurements import Measurements
from compress.measure.statistics import Interval, Verdict
from compress.registry import HUB
from compress.reports.report import Comparison, Figure
from compress.reports.units import human, number

#: Peak memory is read once a model; five readings of one model lay within 0.2 %. Less than this share is not called.
MEMORY_NOISE = 0.01
#: Differences per token below this are float32 rounding of the log-softmax.
KL_NOISE = 1e-6
#: A difference is called when its p-value lies below.
SIGNIFICANT = 1 - statistics.LEVEL


def original_figures(original: Measurements, compressed: Measurements) -> dict[str, Figure]:
    """The original's figures, its speeds as they were taken in turn with the compressed model's."""
    return {**original.figures, **compressed.beside_figures}


def compare(original: Measurements, compressed: Measurements, *, seed: int = 0) -> dict[str, Comparison]:
    """A Comparison for every metric of either model. Deterministic for a seed."""
    base = original_figures(original, compressed)
    found = {}
    for name in dict.fromkeys([*base, *compressed.figures]):
        a, b = base.get(name), compressed.figures.get(name)
        if a is None or b is None or a.value is None or b.value is None:
            found[name] = Comparison(sentence=_why_null(a, b))
            continue
        found[name] = _compared(name, a, b, original, compressed, seed)
    return found | _accuracies(found, original.records, compressed.records, seed)


def _accuracies(
    found: Mapping[str, Comparison], a: Mapping[str, Any], b: Mapping[str, Any], seed: int
) -> dict[str, Comparison]:
    """The comparisons of accuracies with their p-values, those of areas adjusted for how many they are."""
    names = [name for name in found if name.partition("/")[0] == "accuracy" and found[name].ci_low is not None]
    if not names:
        return {}
    pairs = _areas(a, b)
    weights = statistics.leaf_weights(list(pairs))
    chosen = {name: _part(name.partition("/")[2], pairs, weights) for name in names}
    p_values = {name: statistics.areas_p_value(*chosen[name], seed=seed) for name in names}
    tasks = [name for name in names if "/" in name]
    adjusted: dict[str, float] = {}
    if len(tasks) > 1:
        raw = [p_values[name] for name in tasks]
        adjusted = dict(zip(tasks, statistics.holm([1.0 if p is None else p for p in raw]), strict=True))
    return {name: _judged(found[name], p_values[name], adjusted.get(name), chosen[name], len(tasks)) for name in names}


Part = tuple[dict[str, tuple[Any, Any]], dict[str, float]]


def _part(area: str, pairs: Mapping[str, tuple[Any, Any]], weights: Mapping[str, float]) -> Part:
    """The areas that one figure rests on (all of them, one, or a group's), with their shares in it."""
    inside = [leaf for leaf in pairs if not area or leaf == area or leaf.startswith(f"{area}/")]
    total = sum(weights[leaf] for leaf in inside)
    return {leaf: pairs[leaf] for leaf in inside}, {leaf: weights[leaf] / total for leaf in inside}


def _judged(compared: Comparison, p: float | None, adjusted: float | None, part: Part, tasks: int) -> Comparison:
    """The comparison with the verdict of its test."""
    decisive = p if adjusted is None else adjusted
    assert compared.delta is not None
    if p is None or decisive is None or compared.ci_low is None or compared.ci_high is None:
        return compared
    verdict: Verdict = "no_difference"
    if decisive < SIGNIFICANT and compared.delta:
        verdict = "better" if compared.delta > 0 else "worse"
    pairs, weights = part
    n = sum(len(before) for before, _ in pairs.values())
    limits = f"{100 * compared.ci_low:.1f} to {100 * compared.ci_high:.1f} points"
    tested = f"p {_p(p)}" if adjusted is None else f"p {_p(adjusted)}, adjusted for {tasks} tasks"
    if verdict == "no_difference":
        discordant = sum(weights[area] * float(np.mean(a != b)) for area, (a, b) in pairs.items())
        needed = statistics.items_needed(discordant)
        enough = f"to see 1 point takes about {needed:,} items" if needed > n else "enough to see 1 point"
        sentence = f"no measurable difference at {n} items (95 % interval {limits}; {tested}; {enough})"
    else:
        sentence = f"{verdict} by {100 * abs(compared.delta):.1f} points (95 % interval {limits}; {tested})"
    update = {"verdict": verdict, "sentence": sentence, "p_value": p, "p_adjusted": adjusted}
    return compared.model_copy(update=update)


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _why_null(a: Figure | None, b: Figure | None) -> str:
    reason = next((f.reason for f in (b, a) if f is not None and f.reason), None)
    return f"not measured: {reason}" if reason else "not measured"


def _compared(
    name: str, a: Figure, b: Figure, original: Measurements, compressed: Measurements, seed: int
) -> Comparison:
    assert a.value is not None
    assert b.value is not None
    delta = b.value - a.value
    ratio = b.value / a.value if a.value else None
    higher = bool(a.higher_is_better)
    if name.startswith(HUB):
        return Comparison(delta=delta, ratio=ratio, sentence="not tested: the metric gives no score to single items")
    interval, words = _interval(name, original, compressed, seed)
    if interval is None:
        return _single(name, a, delta, ratio)
    verdict = statistics.verdict(interval, higher)
    if name in ("kl_divergence", "kl_divergence_p99") and abs(delta) < KL_NOISE:
        verdict = "no_difference"
    sentence = _sentence(verdict, delta, interval, a.unit, words)
    if name in ("kl_divergence", "kl_divergence_p99", "top1_agreement") and verdict in ("better", "worse"):
        sentence = _fidelity(name, b, interval, delta)
    return Comparison(
        delta=delta, ratio=ratio, ci_low=interval.low, ci_high=interval.high, verdict=verdict, sentence=sentence
    )


def _interval(name: str, original: Measurements, compressed: Measurements, seed: int) -> tuple[Interval | None, str]:
    """The interval of the difference and what it rests on; None for what is measured once or exact."""
    base, _, area = name.partition("/")
    a, b = original.records, compressed.records
    if base == "perplexity":
        before = b["reference_nll"] if "mass" in b else a["nll"]  # of two vocabularies: over the tokens that b has
        found = statistics.perplexity_difference(before, b["nll"], b["tokens"], seed=seed)
        return found, f"{found.n} windows"
    if base == "bits_per_byte":
        before = b["reference_text_nll"] if "reference_text_nll" in b else a["text_nll"]
        before = b["reference_nll"] if "mass" in b else before  # over the tokens that b has
        bits = [np.asarray(nll) / np.log(2) for nll in (before, b["text_nll"])]
        found = statistics.ratio_interval(bits[1] - bits[0], b["text_bytes"], seed=seed)
        return found, f"{found.n} windows"
    if base in ("kl_divergence", "top1_agreement"):
        key, shift = ("kl", 0.0) if base == "kl_divergence" else ("top1", 1.0)
        found = statistics.ratio_interval(b[key], b["tokens"], seed=seed)
        if found.low is None or found.high is None:
            return found, ""
        return Interval(found.low - shift, found.high - shift, found.n), f"{found.n} windows"
    if base == "kl_divergence_p99":
        found = statistics.quantile_interval(b["token_kl"], b["tokens"], 0.99, seed=seed)
        return found, f"{found.n} windows"
    if base == "accuracy":
        pairs = _areas(a, b)
        found = statistics.areas_difference(*_part(area, pairs, statistics.leaf_weights(list(pairs))), seed=seed)
        return found, f"{found.n} items"
    if name in ("f1", "matthews_correlation"):
        statistic = statistics.f1_macro if name == "f1" else statistics.matthews
        labels, before, after = (np.asarray(r, np.int64) for r in (a["label"], a["predicted"], b["predicted"]))
        found = statistics.confusion_difference(labels, before, after, statistic, seed=seed)
        return found, f"{found.n} items"
    if name in ("exact_match", "rouge_l"):
        from compress.measure import text_scores

        score = text_scores.exact if name == "exact_match" else text_scores.rouge_l
        scores = [np.array([score(*pair) for pair in zip(r["written"], r["wanted"], strict=True)]) for r in (a, b)]
        found = statistics.mean_difference(*scores, seed=seed)
        return found, f"{found.n} items"
    if name in compressed.beside and name in b:
        found = statistics.median_difference(compressed.beside[name], b[name])
        return found, f"{found.n} rounds"
    return None, ""


def _areas(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    areas, before, after = np.asarray(a["area"]), np.asarray(a["correct"], float), np.asarray(b["correct"], float)
    if list(a["area"]) != list(b["area"]):
        raise CompressError("The models were given different items, so their accuracies cannot be compared.")
    return {str(area): (before[areas == area], after[areas == area]) for area in dict.fromkeys(a["area"])}


def _sentence(verdict: Verdict, delta: float, interval: Interval, unit: str, words: str) -> str:
    if interval.low is None or interval.high is None:
        return f"not tested: {interval.reason}"
    show, name = _shower(unit, max(abs(interval.low), abs(interval.high)))
    if verdict == "no_difference":
        limits = f"{show(interval.low)} to {show(interval.high)}{name}"
        return f"no measurable difference at {words} (95 % interval {limits})"
    low, high = sorted((abs(interval.low), abs(interval.high)))
    return f"{verdict} by {show(abs(delta))}{name} (95 % interval {show(low)} to {show(high)})"


def _shower(unit: str, largest: float) -> tuple[Callable[[float], str], str]:
    """How differences of this unit are written, and the unit's name after them."""
    match unit:
        case "fraction":
            return (lambda value: f"{100 * value:.1f}"), " points"
        case "s" if largest < 1:
            return (lambda value: number(1000 * value)), " ms"
        case "" | "perplexity" | "bits/byte":
            return number, ""
        case "tokens/s":
            return number, " tok/s"
        case _:
            return number, f" {unit}"


def _fidelity(name: str, b: Figure, interval: Interval, delta: float) -> str:
    assert b.value is not None
    assert interval.low is not None
    assert interval.high is not None
    low, high = interval.low - delta + b.value, interval.high - delta + b.value
    if name == "kl_divergence_p99":
        return f"1 token of 100 is {number(b.value)} nats away or more (95 % interval {number(low)} to {number(high)})"
    if name == "kl_divergence":
        return f"{number(b.value)} nats per token away (95 % interval {number(low)} to {number(high)})"
    return f"same choice at {100 * b.value:.1f} % of tokens (95 % interval {100 * low:.1f} to {100 * high:.1f})"


def _single(name: str, a: Figure, delta: float, ratio: float | None) -> Comparison:
    """What has no interval: exact figures, and peak memory, read once for each model."""
    higher, known = bool(a.higher_is_better), a.higher_is_better is not None
    read_once = name == "peak_memory_bytes"
    same = delta == 0 or (read_once and ratio is not None and abs(ratio - 1) <= MEMORY_NOISE)
    verdict: Verdict = "no_difference" if same else "better" if (delta > 0) == higher else "worse"
    if read_once:
        sentence = f"{_size(delta, ratio, a.unit)} (one reading each; under 1 % is not called a difference)"
    else:
        sentence = "the same" if same else _size(delta, ratio, a.unit)
    return Comparison(delta=delta, ratio=ratio, verdict=verdict if known else "not_tested", sentence=sentence)


def _size(delta: float, ratio: float | None, unit: str) -> str:
    if delta == 0:
        return "the same"
    word = "less" if delta < 0 else "more"
    if ratio is None or ratio <= 0:
        return f"{human(abs(delta), unit)} {word}"
    if ratio <= 0.67:
        return f"{1 / ratio:.2f} times smaller"
    return f"{100 * abs(ratio - 1):.1f} % {word} ({human(abs(delta), unit)})"
