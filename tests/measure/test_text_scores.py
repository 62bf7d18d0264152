import random
from functools import cache
from pathlib import Path

import pytest

from compress.errors import StartError
from compress.measure import text_scores
from compress.measure.comparison import compare
from compress.measure.measurements import BenchmarkJob, Measurements
from compress.registry import METRICS
from compress.reports.report import Figure


def slow_rouge_l(written: str, wanted: str) -> float:
    """By the recursion of the definition."""
    a, b = written.lower().split(), wanted.lower().split()

    @cache
    def common(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + common(i + 1, j + 1) if a[i] == b[j] else max(common(i + 1, j), common(i, j + 1))

    length = common(0, 0)
    if not length:
        return 0.0
    precision, recall = length / len(a), length / len(b)
    return 2 * precision * recall / (precision + recall)


def sentences(count: int) -> list[tuple[str, str]]:
    draw, words = random.Random(0), ["the", "bee", "Fig", "is", "on", "12", "oaks"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(2 * count)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_rouge_l_is_that_of_the_recursion():
    for written, wanted in sentences(60):
        assert text_scores.rouge_l(written, wanted) == pytest.approx(slow_rouge_l(written, wanted))
    assert text_scores.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)


def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for written, wanted in [*sentences(40), ("Don't, he said: 3.5!", "he said don't (3.5)")]:
        want = scorer.score(wanted, written)["rougeL"].fmeasure
        assert text_scores.rouge_l(written, wanted) == pytest.approx(want)


def test_an_exact_answer_may_differ_in_white_space_alone():
    assert text_scores.exact(" a  b\n", "a b") == 1
    assert text_scores.exact("a b.", "a b") == 0


def test_the_metrics_are_means_over_the_answers():
    found = METRICS.get("exact_match")().compute(predictions=["4", "5 ", ""], references=["4", "5", "6"])
    assert found["value"] == pytest.approx(2 / 3)
    assert found["n"] == 3
    assert METRICS.get("rouge_l")().compute(predictions=["a b"], references=["a c"])["value"] == pytest.approx(0.5)


def test_a_metric_of_the_hub_without_a_network_is_refused_in_a_sentence(monkeypatch):
    def no_network(name):
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr("evaluate.load", no_network)
    assert "hub:sacrebleu" in METRICS
    assert "hub:" not in METRICS
    with pytest.raises(
        StartError, match=r"hub:sacrebleu is a program on the Hugging Face hub.*exact_match and rouge_l"
    ):
        METRICS.get("hub:sacrebleu")


def test_a_metric_of_the_hub_is_given_all_answers_at_once(monkeypatch):
    class Loaded:
        description = "counts"

        def compute(self, predictions, references):
            return {"precisions": [1.0], "counted": sum(a == b for a, b in zip(predictions, references, strict=True))}

    monkeypatch.setattr("evaluate.load", lambda name: Loaded())
    metric = METRICS.get("hub:counted")
    assert metric.metric == "hub:counted"
    assert metric().compute(predictions=["a", "b"], references=["a", "c"]) == {"value": 1.0, "stderr": None, "n": 2}
    job = BenchmarkJob(metrics=("hub:counted", "accuracy/facts"))
    assert job.names() == ["hub:counted", "accuracy"]
    models = [
        Measurements("m", Path(), {"hub:counted": Figure(value=value, unit="", higher_is_better=True)})
        for value in (1, 2)
    ]
    compared = compare(*models)["hub:counted"]
    assert (compared.delta, compared.verdict) == (1, "not_tested")
