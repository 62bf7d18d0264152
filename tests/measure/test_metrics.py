import math
from pathlib import Path

import numpy as np
import pytest

from compress.registry import METRICS

ALL = [
    "perplexity", "accuracy", "kl_divergence", "top1_agreement", "weights_bytes", "bits_per_weight", "parameters",
    "peak_memory_bytes", "prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds",
    "energy_joules_per_token",
]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_metric_of_the_contract_is_an_evaluate_metric_with_unit_and_direction(name):
    import evaluate

    metric = METRICS.get(name)
    assert issubclass(metric, evaluate.Metric)
    assert metric.metric == name
    assert isinstance(metric.unit, str)
    assert isinstance(metric.higher_is_better, bool)
    assert metric.needs


def test_perplexity_is_token_weighted_over_windows():
    found = METRICS.get("perplexity")().compute(predictions=[20.0, 3.0], references=[10.0, 2.0])
    assert found["value"] == pytest.approx(math.exp(23 / 12))
    assert found["n"] == 2


def test_perplexity_stderr_is_that_of_many_repeated_samples():
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 200, 4000).astype(float)
    nll = tokens * draw.normal(2, 0.2, 4000)
    found = METRICS.get("perplexity")().compute(predictions=list(nll), references=list(tokens))
    values = []
    for _ in range(400):
        chosen = draw.integers(0, 4000, 4000)
        values.append(math.exp(nll[chosen].sum() / tokens[chosen].sum()))
    assert found["stderr"] == pytest.approx(np.std(values), rel=0.15)


def test_accuracy_is_the_unweighted_mean_of_its_areas():
    found = METRICS.get("accuracy")().compute(predictions=[1, 1, 1, 1, 0, 1], references=["a"] * 4 + ["b"] * 2)
    assert found["value"] == pytest.approx(0.75)
    assert found["detail"]["areas"]["b"] == {"value": 0.5, "stderr": pytest.approx(0.5), "n": 2}


def test_bits_per_weight_counts_bits_of_the_originals_parameters():
    found = METRICS.get("bits_per_weight")().compute(predictions=[1000], references=[2000])
    assert found["value"] == 4.0


def test_speed_is_the_median_of_its_rounds_and_keeps_the_spread():
    found = METRICS.get("decode_tokens_per_second")().compute(predictions=[10.0, 30.0, 11.0])
    assert found["value"] == 11.0
    assert found["detail"]["least"] == 10.0
    assert found["detail"]["most"] == 30.0


def test_computing_leaves_no_cache_folder(tmp_path):
    cache = tmp_path / "cache"
    metric = METRICS.get("top1_agreement")(cache_dir=str(cache))
    assert metric.compute(predictions=[3.0], references=[4.0])["value"] == 0.75
    assert not Path(cache).exists()


def test_no_windows_give_no_number():
    assert math.isnan(METRICS.get("kl_divergence")().compute(predictions=[], references=[])["value"])
