import math

import numpy as np
import pytest
from scipy import stats

from compress.measure import statistics


def test_mean_difference_agrees_with_the_normal_interval_on_many_items():
    draw = np.random.default_rng(0)
    a = draw.normal(0, 1, 1500)
    b = a + draw.normal(0.3, 0.5, 1500)
    difference = b - a
    edge = stats.norm.ppf(0.975) * difference.std(ddof=1) / math.sqrt(len(difference))
    found = statistics.mean_difference(a, b)
    assert found.low == pytest.approx(difference.mean() - edge, abs=0.15 * edge)
    assert found.high == pytest.approx(difference.mean() + edge, abs=0.15 * edge)


def test_mean_difference_of_few_items_is_as_wide_as_students_interval():
    draw = np.random.default_rng(1)
    widths = []
    for seed in range(30):
        difference = draw.normal(0, 1, 10)
        found = statistics.mean_difference(np.zeros(10), difference, seed=seed)
        student = 2 * stats.t.ppf(0.975, 9) * difference.std(ddof=1) / math.sqrt(10)
        widths.append((found.high - found.low) / student)
    assert 0.9 < np.mean(widths) < 1.1


def test_perplexity_difference_agrees_with_the_delta_method():
    draw = np.random.default_rng(2)
    tokens = draw.integers(20, 200, 400).astype(float)
    a = tokens * draw.normal(2.0, 0.3, 400)
    b = a + tokens * draw.normal(0.05, 0.02, 400)
    total = tokens.sum()
    ppl_a, ppl_b = math.exp(a.sum() / total), math.exp(b.sum() / total)
    influence = ppl_b * (b - tokens * b.sum() / total) - ppl_a * (a - tokens * a.sum() / total)
    edge = 1.96 * math.sqrt(float((influence**2).sum())) / total
    found = statistics.perplexity_difference(a, b, tokens)
    assert found.low == pytest.approx(ppl_b - ppl_a - edge, abs=0.2 * edge)
    assert found.high == pytest.approx(ppl_b - ppl_a + edge, abs=0.2 * edge)


def test_equal_models_are_called_different_no_more_often_than_one_time_in_twenty():
    """200 pairs; 5 % of them is 10, and 18 is what 200 fair draws at 5 % exceed once in 100 times."""
    draw = np.random.default_rng(3)
    called = {"accuracy": 0, "perplexity": 0, "speed": 0}
    for seed in range(200):
        # Both models are right on an item with its own probability: equally good, but not the same answers.
        easy = draw.beta(2, 1, 60)
        a, b = (draw.random(60) < easy).astype(float), (draw.random(60) < easy).astype(float)
        called["accuracy"] += statistics.verdict(statistics.mean_difference(a, b, seed=seed), True) != "no_difference"
        tokens = np.full(40, 63.0)
        window = draw.normal(2.5, 0.4, 40)
        first, second = (tokens * (window + draw.normal(0, 0.03, 40)) for _ in range(2))
        found = statistics.perplexity_difference(first, second, tokens, seed=seed)
        called["perplexity"] += statistics.verdict(found, False) != "no_difference"
        drift = 100 + np.cumsum(draw.normal(0, 5, 7))
        rounds = statistics.median_difference(drift + draw.normal(0, 3, 7), drift + draw.normal(0, 3, 7))
        called["speed"] += statistics.verdict(rounds, True) != "no_difference"
    assert max(called.values()) <= 18, called


def test_a_real_difference_is_found():
    draw = np.random.default_rng(4)
    a = (draw.random(500) < 0.9).astype(float)
    b = np.where(draw.random(500) < 0.06, 0.0, a)
    found = statistics.mean_difference(a, b)
    assert statistics.verdict(found, higher_is_better=True) == "worse"
    assert statistics.verdict(statistics.mean_difference(b, a), higher_is_better=True) == "better"


def test_areas_weigh_the_same_whatever_their_size():
    draw = np.random.default_rng(5)
    small, large = np.zeros(20), np.zeros(2000)
    gained = small.copy()
    gained[:10] = 1.0
    found = statistics.areas_difference({"small": (small, gained), "large": (large, large)})
    assert (found.low + found.high) / 2 == pytest.approx(0.25, abs=0.02)
    assert draw is not None


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_too_few_pairs_are_not_tested_and_the_reason_is_given(n):
    for found in (
        statistics.mean_difference(np.zeros(n), np.ones(n)),
        statistics.perplexity_difference(np.ones(n), np.ones(n) * 2, np.ones(n)),
        statistics.median_difference(np.zeros(n), np.ones(n)),
    ):
        assert statistics.verdict(found, True) == "not_tested"
        assert str(n) in (found.reason or "")
        assert "too few" in (found.reason or "")


def test_the_same_seed_gives_the_same_interval_and_equal_records_no_difference():
    draw = np.random.default_rng(6)
    a, b = draw.normal(0, 1, 50), draw.normal(0, 1, 50)
    assert statistics.mean_difference(a, b, seed=1) == statistics.mean_difference(a, b, seed=1)
    assert statistics.mean_difference(a, b, seed=1) != statistics.mean_difference(a, b, seed=2)
    same = statistics.mean_difference(a, a)
    assert (same.low, same.high) == (0.0, 0.0)
    assert statistics.verdict(same, True) == "no_difference"


def test_ten_thousand_items_take_less_than_a_few_seconds():
    import time

    draw = np.random.default_rng(7)
    a, b = draw.normal(0, 1, 10_000), draw.normal(0, 1, 10_000)
    start = time.process_time()
    statistics.mean_difference(a, b)
    assert time.process_time() - start < 5
