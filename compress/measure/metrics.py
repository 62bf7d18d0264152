"""The metrics, as `evaluate.Metric` subclasses that need no network, no hub script and no cache folder.

Each is computed from what was recorded per item (window, question, round, file), so that standard errors and paired
differences can be had from the same record. `predictions` and `references` name the records a metric reads; a
metric of someone else, registered under the entry point group `compress.metrics`, declares the same class variables.

Importing this module imports `evaluate` (seconds): the registry does so only when a metric is used.
"""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from compress.measure import statistics, text_scores

Values = list[float]


class RecordedMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric computed in memory from records.

    `needs` says what must be at hand to measure it: `text` (evaluation windows), `items`, `reference` (the original
    model, token by token), `classes` (labelled texts, and a model that classifies), `answers` (written to items of
    prompt + completion, only where such a metric is named), `speed`, `memory`, `files`. `predictions` and `references`
    are the names of the records given as such to `compute`, which returns `{"value", "stderr", "n"}` and perhaps
    `detail`.
    """

    metric: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    needs: ClassVar[frozenset[str]]
    predictions: ClassVar[str]
    references: ClassVar[str | None] = None
    #: Dtypes of one prediction and one reference, as `datasets` names them.
    kinds: ClassVar[tuple[str, str]] = ("float64", "float64")
    #: The value the original has by definition (it is compared with itself), if any.
    of_original: ClassVar[float | None] = None

    def __init__(self, **options: Any):
        super().__init__(**{"keep_in_memory": True, "experiment_id": "compress", "seed": 0, **options})

    def _build_data_dir(self) -> str:
        # The parent class makes this folder; everything stays in memory here, so none is wanted.
        return os.path.join(str(self._data_dir_root), self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value(self.kinds[0])}
        if self.references is not None:
            features["references"] = datasets.Value(self.kinds[1])
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=f"predictions: {self.predictions}; references: {self.references}",
            features=datasets.Features(features),
        )


def _ratio(top: Values, bottom: Values) -> tuple[float, float | None, int]:
    """sum(top) / sum(bottom), its standard error over the items (linearised), and the number of items."""
    a, b = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    n, total = len(a), b.sum()
    if n == 0 or total <= 0:
        return math.nan, None, n
    value = float(a.sum() / total)
    if n < 2:
        return value, None, n
    residual = a - value * b
    return value, float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / total), n


class Perplexity(RecordedMetric):
    """exp of the mean negative log-likelihood in nats over all scored tokens (each window's first is not scored)."""

    metric, unit, higher_is_better = "perplexity", "perplexity", False
    needs = frozenset({"text"})
    predictions, references = "nll", "tokens"

    def _compute(self, predictions: Values, references: Values) -> dict[str, Any]:
        mean, stderr, n = _ratio(predictions, references)
        try:
            value = math.exp(mean)
        except OverflowError:
            value = math.inf
        detail = {"nats_per_token": mean, "tokens": int(np.sum(references))}
        return {"value": value, "stderr": None if stderr is None else value * stderr, "n": n, "detail": detail}


class BitsPerByte(RecordedMetric):
    """Negative log-likelihood of the scored tokens in bits, divided by the UTF-8 bytes of text that they stand for.

    Unlike perplexity it does not depend on how the text is cut into tokens, so that models with different tokenizers
    compare. Special tokens stand for no bytes, but have to be paid for.
    """

    metric, unit, higher_is_better = "bits_per_byte", "bits/byte", False
    needs = frozenset({"text"})
    predictions, references = "text_nll", "text_bytes"

    def _compute(self, predictions: Values, references: Values) -> dict[str, Any]:
        value, stderr, n = _ratio(predictions, references)
        bits = math.log(2)
        detail = {"bytes": int(np.sum(references))}
        return {"value": value / bits, "stderr": None if stderr is None else stderr / bits, "n": n, "detail": detail}


class KLDivergence(RecordedMetric):
    """Mean over tokens of KL(original || compressed) between next-token distributions, in nats."""

    metric, unit, higher_is_better = "kl_divergence", "nats/token", False
    needs = frozenset({"text", "reference"})
    predictions, references = "kl", "tokens"
    of_original = 0.0

    def _compute(self, predictions: Values, references: Values) -> dict[str, Any]:
        value, stderr, n = _ratio(predictions, references)
        return {"value": value, "stderr": stderr, "n": n}


class KLDivergenceP99(RecordedMetric):
    """The KL divergence, in nats, that 1 token of 100 reaches: the least that 99 % of the tokens do not exceed."""

    metric, unit, higher_is_better = "kl_divergence_p99", "nats", False
    needs = frozenset({"text", "reference"})
    predictions = "token_kl"
    of_original = 0.0

    def _compute(self, predictions: Values) -> dict[str, Any]:
        n = len(predictions)
        value = float(np.quantile(predictions, 0.99, method="inverted_cdf")) if n else math.nan
        return {"value": value, "stderr": None, "n": n}


class Top1Agreement(RecordedMetric):
    """Share of tokens at which original and compressed model hold the same next token most likely."""

    metric, unit, higher_is_better = "top1_agreement", "fraction", True
    needs = frozenset({"text", "reference"})
    predictions, references = "top1", "tokens"
    of_original = 1.0

    def _compute(self, predictions: Values, references: Values) -> dict[str, Any]:
        value, stderr, n = _ratio(predictions, references)
        return {"value": value, "stderr": stderr, "n": n}


class Accuracy(RecordedMetric):
    """Unweighted mean over areas and tasks of the share of items answered right. `predictions`: 0 or 1 an item (a task
    of graded answers: its score, 0 to 1); `references`: the item's area, `group/task` where it is one of a group, whose
    tasks count as one together. `detail["areas"]` holds value, stderr and n of each area and group."""

    metric, unit, higher_is_better = "accuracy", "fraction", True
    needs = frozenset({"items"})
    predictions, references = "correct", "area"
    kinds = ("float64", "string")

    def _compute(self, predictions: Values, references: list[str]) -> dict[str, Any]:
        right, area = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        leaves = {str(name): _share(right[area == name]) for name in sorted(set(references))}
        if not leaves:
            return {"value": math.nan, "stderr": None, "n": 0}
        weights = statistics.leaf_weights(list(leaves))
        areas: dict[str, Any] = {}
        for name, entry in leaves.items():
            group = name.partition("/")[0]
            if group != name and group not in areas:
                areas[group] = _mean({leaf: found for leaf, found in leaves.items() if leaf.startswith(f"{group}/")})
            areas[name] = entry
        return {**_mean(leaves, weights), "detail": {"areas": areas}}


def _mean(parts: dict[str, dict[str, Any]], weights: dict[str, float] | None = None) -> dict[str, Any]:
    """Weighted mean of values, with the standard error of independent parts; without weights all count the same."""
    shares = {name: 1 / len(parts) if weights is None else weights[name] for name in parts}
    known = all(entry["stderr"] is not None for entry in parts.values())
    return {
        "value": sum(shares[name] * entry["value"] for name, entry in parts.items()),
        "stderr": math.hypot(*(shares[name] * entry["stderr"] for name, entry in parts.items())) if known else None,
        "n": sum(entry["n"] for entry in parts.values()),
    }


def _share(right: NDArray[np.float64]) -> dict[str, Any]:
    n, value = len(right), float(right.mean())
    return {"value": value, "stderr": float(right.std(ddof=1)) / math.sqrt(n) if n > 1 else None, "n": n}


class _OfClasses(RecordedMetric):
    """What is computed from the confusion matrix of a model that classifies; its standard error by the jackknife."""

    unit, higher_is_better = "fraction", True
    needs = frozenset({"classes"})
    predictions, references = "predicted", "label"
    kinds = ("int64", "int64")

    def of(self, confusion: NDArray[np.float64]) -> NDArray[np.float64]:
        """The value of counts [..., classes, classes]: right class, class said."""
        raise NotImplementedError

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        n = len(predictions)
        if n == 0:
            return {"value": math.nan, "stderr": None, "n": 0}
        cells, counts = np.unique(np.stack([references, predictions]), axis=1, return_counts=True)
        k = int(cells.max()) + 1
        table = np.zeros((k, k))
        table[cells[0], cells[1]] = counts
        without = np.repeat(table[None], len(counts), 0)
        without[np.arange(len(counts)), cells[0], cells[1]] -= 1
        left = self.of(without)
        mean = float(left @ counts) / n
        error = math.sqrt((n - 1) / n * float(((left - mean) ** 2) @ counts)) if n > 1 else None
        return {"value": float(self.of(table)), "stderr": error, "n": n}


class F1(_OfClasses):
    """Unweighted mean of the classes' F1 (macro) of a model that classifies texts."""

    metric = "f1"

    def of(self, confusion: NDArray[np.float64]) -> NDArray[np.float64]:
        return statistics.f1_macro(confusion)


class MatthewsCorrelation(_OfClasses):
    """Matthews correlation of a model that classifies texts: 1 where all is right, 0 where it is as good as chance."""

    metric, unit = "matthews_correlation", ""

    def of(self, confusion: NDArray[np.float64]) -> NDArray[np.float64]:
        return statistics.matthews(confusion)


class _OfAnswers(RecordedMetric):
    """The mean of a score of each written answer against the wanted one."""

    unit, higher_is_better = "fraction", True
    needs = frozenset({"answers"})
    predictions, references = "written", "wanted"
    kinds = ("string", "string")

    def score(self, written: str, wanted: str) -> float:
        raise NotImplementedError

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        if not predictions:
            return {"value": math.nan, "stderr": None, "n": 0}
        return _share(np.array([self.score(*pair) for pair in zip(predictions, references, strict=True)]))


class ExactMatch(_OfAnswers):
    """Share of items of prompt + completion whose written answer is the completion, but for white space."""

    metric = "exact_match"

    def score(self, written: str, wanted: str) -> float:
        return text_scores.exact(written, wanted)


class RougeL(_OfAnswers):
    """ROUGE-L (F1) of the written answers to items of prompt + completion."""

    metric = "rouge_l"

    def score(self, written: str, wanted: str) -> float:
        return text_scores.rouge_l(written, wanted)


class _Total(RecordedMetric):
    """The sum of one record, exact."""

    kinds = ("int64", "int64")

    def _compute(self, predictions: list[int]) -> dict[str, Any]:
        return {"value": int(np.sum(predictions)), "stderr": None, "n": None}


class WeightsBytes(_Total):
    """Bytes of all `*.safetensors` files of the folder that `compress.load` runs from: `model/`, or `exports/packed`
    where `model/` could only be written unpacked."""

    metric, unit, higher_is_better = "weights_bytes", "B", False
    needs = frozenset({"files"})
    predictions = "file_bytes"


class Parameters(_Total):
    """Weights of the model, tied ones once, packed ones as many as they stand for."""

    metric, unit, higher_is_better = "parameters", "weights", False
    needs = frozenset({"files"})
    predictions = "parameters"


class BitsPerWeight(RecordedMetric):
    """8 x weights_bytes / the original's parameters."""

    metric, unit, higher_is_better = "bits_per_weight", "bits", False
    needs = frozenset({"files"})
    predictions, references = "total_bytes", "original_parameters"
    kinds = ("int64", "int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        parameters = int(np.sum(references))
        value = 8 * int(np.sum(predictions)) / parameters if parameters else math.nan
        return {"value": value, "stderr": None, "n": None}


class PeakMemoryBytes(RecordedMetric):
    """Peak memory of a fresh process that loads the model and generates: resident memory, or CUDA's allocator."""

    metric, unit, higher_is_better = "peak_memory_bytes", "B", False
    needs = frozenset({"memory"})
    predictions = "peak_memory_bytes"
    kinds = ("int64", "int64")

    def _compute(self, predictions: list[int]) -> dict[str, Any]:
        return {"value": int(np.max(predictions)), "stderr": None, "n": len(predictions)}


class ResidentWeightsBytes(_Total):
    """Bytes that the weights take in memory once the model is loaded in a fresh process and has written: packed ones as
    they are packed, shared ones once, mapped ones as far as they span."""

    metric, unit, higher_is_better = "resident_weights_bytes", "B", False
    needs = frozenset({"memory"})
    predictions = "resident_weights_bytes"


class KVCacheBytesPerToken(RecordedMetric):
    """Bytes of the cache of keys and values after a prompt, divided by the prompt's tokens. A packed cache holds its
    most recent tokens unpacked, so its figure falls with the prompt's length, which `detail` states."""

    metric, unit, higher_is_better = "kv_cache_bytes_per_token", "B", False
    needs = frozenset({"memory"})
    predictions, references = "cache_bytes", "cache_tokens"
    kinds = ("int64", "int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        tokens = int(np.sum(references))
        value = int(np.sum(predictions)) / tokens if tokens else math.nan
        return {"value": value, "stderr": None, "n": None, "detail": {"prompt_tokens": tokens}}


class _Median(RecordedMetric):
    """The median over rounds, with its standard error (that of a normal sample's median) and the spread."""

    needs = frozenset({"speed"})

    def _compute(self, predictions: Values, references: Values | None = None) -> dict[str, Any]:
        rounds = np.asarray(predictions, dtype=np.float64)
        n = len(rounds)
        error = 1.2533 * float(rounds.std(ddof=1)) / math.sqrt(n) if n > 1 else None
        low, high = (float(edge) for edge in np.percentile(rounds, [25, 75]))
        detail = {"quartiles": [low, high], "least": float(rounds.min()), "most": float(rounds.max())}
        return {"value": float(np.median(rounds)), "stderr": error, "n": n, "detail": detail}


class PrefillTokensPerSecond(_Median):
    """Prompt tokens read per second at batch 1."""

    metric, unit, higher_is_better = "prefill_tokens_per_second", "tokens/s", True
    predictions = "prefill_tokens_per_second"


class DecodeTokensPerSecond(_Median):
    """Tokens generated per second at batch 1, after the first."""

    metric, unit, higher_is_better = "decode_tokens_per_second", "tokens/s", True
    predictions = "decode_tokens_per_second"


class FirstTokenSeconds(_Median):
    """Seconds from the prompt to the first generated token."""

    metric, unit, higher_is_better = "first_token_seconds", "s", False
    predictions = "first_token_seconds"


class EnergyJoulesPerToken(_Median):
    """Joules per generated token after the first, from the counter of the processor package or the GPU; of all that
    runs there. Where `detail` says `estimated`: CPU seconds times the stated watts."""

    metric, unit, higher_is_better = "energy_joules_per_token", "J/token", False
    predictions = "energy_joules_per_token"
