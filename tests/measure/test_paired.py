"""Paired tests against closed forms, and on simulated models through the real comparison."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compress.measure import statistics
from compress.measure.comparison import compare
from compress.measure.measurements import Measurements
from compress.reports.report import Figure


def measured(correct, area, **records) -> Measurements:
    """Measurements of items, their figures worked out here."""
    correct, area = np.asarray(correct, float), list(area)
    names = dict.fromkeys(area)
    means = {name: float(correct[np.array(area) == name].mean()) for name in names}
    weights = statistics.leaf_weights(list(names))
    figures = {"accuracy": sum(weights[name] * mean for name, mean in means.items())}
    figures |= {f"accuracy/{name}": mean for name, mean in means.items()}
    return Measurements(
        "model", Path(),
        {name: Figure(value=value, unit="fraction", higher_is_better=True) for name, value in figures.items()},
        {"correct": correct, "area": area, **records},
    )  # fmt: skip


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 5), (0, 6), (3, 9), (10, 10), (40, 20)])
def test_mcnemar_is_twice_the_binomial_tail(gained, lost):
    n, least = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(least + 1)) / 2**n
    assert statistics.mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


def test_the_p_value_of_several_areas_is_that_of_all_signs_written_out():
    areas = {
        "a": (np.array([1, 1, 1, 0, 1, 0, 1.0]), np.array([0, 0, 1, 0, 0, 1, 1.0])),
        "b": (np.array([1, 0, 1, 1, 1, 1.0]), np.array([0, 0, 0, 1, 1, 1.0])),
    }
    weights = {"a": 0.75, "b": 0.25}
    parts = [weights[area] * (b - a) / len(a) for area, (a, b) in areas.items()]
    moved = np.concatenate([part[part != 0] for part in parts])
    sums = np.array([np.dot(signs, np.abs(moved)) for signs in product((-1, 1), repeat=len(moved))])
    want = float((np.abs(sums) >= abs(moved.sum()) - 1e-12).mean())
    assert statistics.areas_p_value(areas, weights) == pytest.approx(want, abs=0.01)


def test_the_p_value_of_graded_scores_is_that_of_all_signs_written_out():
    draw = np.random.default_rng(2)
    a, b = draw.random(10), draw.random(10) + 0.2
    sums = np.array([np.dot(signs, b - a) for signs in product((-1, 1), repeat=10)])
    want = float((np.abs(sums) >= abs((b - a).sum()) - 1e-12).mean())
    assert statistics.areas_p_value({"all": (a, b)}) == pytest.approx(want, abs=0.012)


def test_holm_is_the_example_of_the_textbook_and_never_decreases():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_items_needed_find_the_difference_four_times_of_five():
    share, difference = 0.1, 0.05
    n = statistics.items_needed(share, difference)
    z = 1.959964 * math.sqrt(share) + 0.841621 * math.sqrt(share - difference**2)
    assert n == math.ceil((z / difference) ** 2)
    draw = np.random.default_rng(0)
    moved = draw.multinomial(n, [(share + difference) / 2, (share - difference) / 2, 1 - share], size=2000)
    z_scores = np.abs(moved[:, 0] - moved[:, 1]) / np.sqrt(np.maximum(moved[:, 0] + moved[:, 1], 1))
    assert (z_scores > 1.96).mean() == pytest.approx(statistics.POWER, abs=0.04)
    assert statistics.items_needed(0.0) == statistics.items_needed(0.01)


def test_of_200_pairs_of_equal_models_one_in_twenty_is_called_different_at_most():
    """Three areas, whose adjusted p-values are one question together, and the accuracy over them is another."""
    draw = np.random.default_rng(1)
    area = [name for name in "abc" for _ in range(80)]
    any_area = overall = 0
    for seed in range(200):
        skill = draw.random(len(area))
        a, b = (measured(draw.random(len(area)) < skill, area) for _ in range(2))
        found = compare(a, b, seed=seed)
        any_area += any(found[f"accuracy/{name}"].verdict != "no_difference" for name in "abc")
        overall += found["accuracy"].verdict != "no_difference"
    assert any_area <= 18, any_area  # 200 x 5 % and what chance adds to it once in a hundred times
    assert overall <= 18, overall


def test_many_areas_without_an_adjustment_would_have_been_called_different():
    draw = np.random.default_rng(3)
    area = [name for name in "abcdefghijklmnopqrst" for _ in range(60)]
    raw = called = 0
    for seed in range(15):
        a, b = (measured(draw.random(len(area)) < 0.6, area) for _ in range(2))
        found = [compared for name, compared in compare(a, b, seed=seed).items() if "/" in name]
        raw += any(compared.p_value < 0.05 for compared in found)
        called += any(compared.verdict != "no_difference" for compared in found)
    assert raw >= 4
    assert called <= 3


def test_a_task_that_fell_is_called_worse_beside_others_that_did_not():
    draw = np.random.default_rng(4)
    before = np.ones(600)
    after = before.copy()
    after[:200][draw.random(200) < 0.2] = 0
    found = compare(measured(before, ["x"] * 200 + ["y"] * 400), measured(after, ["x"] * 200 + ["y"] * 400))
    assert found["accuracy/x"].verdict == "worse"
    assert found["accuracy/x"].p_adjusted == pytest.approx(2 * found["accuracy/x"].p_value)
    assert "adjusted for 2 tasks" in found["accuracy/x"].sentence
    assert found["accuracy/y"].verdict == "no_difference"
    assert found["accuracy"].p_adjusted is None
    assert found["accuracy"].verdict == "worse"


def test_where_no_difference_is_seen_the_sentence_says_how_many_items_would_show_one():
    before, after = np.ones(100), np.ones(100)
    before[:4], after[4:8] = 0, 0
    compared = compare(measured(before, ["x"] * 100), measured(after, ["x"] * 100))["accuracy/x"]
    needed = statistics.items_needed(0.08)
    assert f"to see 1 point takes about {needed:,} items" in compared.sentence
    assert compared.p_value == 1.0
    assert compared.p_adjusted is None


def test_too_few_items_are_not_tested_and_the_reason_is_given():
    compared = compare(measured([1, 1, 1], "xxx"), measured([0, 0, 0], "xxx"))["accuracy"]
    assert compared.verdict == "not_tested"
    assert compared.p_value is None
    assert "3 items are too few" in compared.sentence


def test_the_tasks_of_a_group_count_as_one_together():
    area = ["single"] * 10 + ["group/one"] * 10 + ["group/two"] * 30
    before = np.zeros(50)
    after = np.concatenate([np.zeros(10), np.ones(10), np.zeros(30)])
    a, b = measured(before, area), measured(after, area)
    a.figures["accuracy/group"] = Figure(value=0.0, unit="fraction", higher_is_better=True)
    b.figures["accuracy/group"] = Figure(value=0.5, unit="fraction", higher_is_better=True)
    found = compare(a, b)
    assert found["accuracy"].delta == pytest.approx(0.25)
    assert found["accuracy"].ci_low == found["accuracy"].ci_high == pytest.approx(0.25)
    assert found["accuracy/group"].ci_low == pytest.approx(0.5)
    assert found["accuracy/group/one"].verdict == "better"


def test_the_metric_weighs_groups_as_the_comparison_does():
    from compress.registry import METRICS

    found = METRICS.get("accuracy")().compute(
        predictions=[1.0] * 4 + [0.0] * 2 + [1.0] * 2, references=["s"] * 4 + ["g/a"] * 2 + ["g/b"] * 2
    )
    assert found["value"] == pytest.approx(0.75)
    assert found["detail"]["areas"]["g"] == {"value": 0.5, "stderr": 0.0, "n": 4}
    assert list(found["detail"]["areas"]) == ["g", "g/a", "g/b", "s"]


def test_resampling_a_few_values_by_their_counts_is_the_bootstrap():
    draw = np.random.default_rng(5)
    d = draw.choice([-1.0, 0.0, 1.0], 150, p=[0.1, 0.85, 0.05])
    fast = statistics._means(d, 0)
    slow = np.array([draw.choice(d, 150).mean() for _ in range(4000)])
    assert fast.std() == pytest.approx(slow.std(), rel=0.08)
    assert np.quantile(fast, [0.05, 0.95]) == pytest.approx(np.quantile(slow, [0.05, 0.95]), abs=0.008)


def test_the_interval_of_the_99th_percentile_is_that_of_resampled_windows():
    draw = np.random.default_rng(6)
    tokens = draw.integers(20, 60, 40)
    values = draw.exponential(1, int(tokens.sum())) * np.repeat(draw.uniform(0.5, 2, 40), tokens)
    parts = np.split(values, np.cumsum(tokens)[:-1])
    slow = [
        np.quantile(np.concatenate([parts[i] for i in draw.integers(0, 40, 40)]), 0.99, method="inverted_cdf")
        for _ in range(2000)
    ]
    found = statistics.quantile_interval(values, tokens, 0.99)
    edge = math.sqrt(40 / 39) * stats.t.ppf(0.975, 39)
    want = np.quantile(slow, [stats.norm.cdf(-edge), stats.norm.cdf(edge)])
    assert [found.low, found.high] == pytest.approx(want, rel=0.06)
    assert statistics.quantile_interval(values[: int(tokens[:3].sum())], tokens[:3], 0.99).low is None


def slow_f1(labels, said):
    scores = []
    for name in sorted({*labels, *said}):
        hits = sum(a == b == name for a, b in zip(labels, said, strict=True))
        wrong = sum(b == name != a for a, b in zip(labels, said, strict=True))
        missed = sum(a == name != b for a, b in zip(labels, said, strict=True))
        scores.append(2 * hits / (2 * hits + wrong + missed))
    return sum(scores) / len(scores)


def slow_matthews(labels, said):
    """The correlation of one-hot rows: Gorodkin's equation 8 from its definition."""
    k = max(*labels, *said) + 1
    x, y = np.eye(k)[labels], np.eye(k)[said]
    x, y = x - x.mean(0), y - y.mean(0)
    bottom = math.sqrt((x * x).sum() * (y * y).sum())
    return (x * y).sum() / bottom if bottom else 0.0


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_and_matthews_are_those_of_their_definitions(classes):
    from compress.registry import METRICS

    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, 60)
    said = np.where(draw.random(60) < 0.6, labels, draw.integers(0, classes, 60))
    for name, slow in (("f1", slow_f1), ("matthews_correlation", slow_matthews)):
        found = METRICS.get(name)().compute(predictions=said.tolist(), references=labels.tolist())
        assert found["value"] == pytest.approx(slow(labels.tolist(), said.tolist()))
        rows = [np.arange(60) != i for i in range(60)]
        left = np.array([slow(labels[r].tolist(), said[r].tolist()) for r in rows])
        assert found["stderr"] == pytest.approx(math.sqrt(59 / 60 * ((left - left.mean()) ** 2).sum()))


def test_one_class_said_of_all_texts_has_no_correlation():
    from compress.registry import METRICS

    found = METRICS.get("matthews_correlation")().compute(predictions=[1, 1, 1], references=[0, 1, 1])
    assert found["value"] == 0


def test_the_interval_of_f1_is_that_of_resampled_items():
    draw = np.random.default_rng(8)
    labels = draw.integers(0, 3, 120)
    before = np.where(draw.random(120) < 0.8, labels, draw.integers(0, 3, 120))
    after = np.where(draw.random(120) < 0.7, labels, draw.integers(0, 3, 120))
    found = statistics.confusion_difference(labels, before, after, statistics.f1_macro)
    slow = []
    for _ in range(800):
        rows = draw.integers(0, 120, 120)
        each = [slow_f1(labels[rows].tolist(), said[rows].tolist()) for said in (before, after)]
        slow.append(each[1] - each[0])
    edge = math.sqrt(120 / 119) * stats.t.ppf(0.975, 119)
    want = np.quantile(slow, [stats.norm.cdf(-edge), stats.norm.cdf(edge)])
    assert [found.low, found.high] == pytest.approx(want, abs=0.025)
