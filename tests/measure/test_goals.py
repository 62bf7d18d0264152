import pytest

from compress.measure.goals import check_goals
from compress.reports.report import Figure


def figure(value, higher=False):
    return Figure(value=value, unit="", higher_is_better=higher)


ORIGINAL = {
    "perplexity": figure(10.0), "accuracy": figure(0.90, True), "weights_bytes": figure(1000),
    "decode_tokens_per_second": figure(100.0, True),
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "goal", "value", "met"),
    [
        ("perplexity", "+2%", 10.2, True),
        ("perplexity", "+2%", 10.21, False),
        ("perplexity", 10.5, 10.5, True),
        ("perplexity", 10.5, 10.51, False),
        ("accuracy", "-1pt", 0.891, True),
        ("accuracy", "-1pt", 0.889, False),
        ("weights_bytes", "-70%", 300, True),
        ("weights_bytes", "-70%", 301, False),
        ("weights_bytes", "1kB", 999, True),
        ("decode_tokens_per_second", "+50%", 150.0, True),
        ("decode_tokens_per_second", "+50%", 149.0, False),
    ],
)
def test_goals_are_met_by_the_point_estimate_in_the_metrics_own_direction(metric, goal, value, met):
    compressed = {metric: ORIGINAL[metric].model_copy(update={"value": value})}
    (found,) = check_goals({metric: goal}, ORIGINAL, compressed)
    assert found.met is met
    assert found.value == value
    assert found.goal == goal


def test_what_was_not_measured_meets_no_goal_and_says_why():
    null = {"energy_joules_per_token": Figure(value=None, reason="no counter")}
    (found,) = check_goals({"energy_joules_per_token": "-10%"}, null, null)
    assert not found.met
    assert "no counter" in found.reason
