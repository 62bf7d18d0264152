"""Whether the goals of a recipe are met, by the point estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.recipe.goals import Goal, parse_goal
from compress.reports.report import Figure, GoalResult


def check_goals(
    goals: Mapping[str, Any], original: Mapping[str, Figure], compressed: Mapping[str, Figure]
) -> list[GoalResult]:
    """One result for each goal, in the order of the recipe.

    `+2%` and `-1pt` are changes relative to the original, anything else is absolute. The metric's own direction says
    which side is good: perplexity `+2%` asks for at most 1.02 times the original's, decode speed `+50%` for at least
    1.5 times. A metric that could not be measured meets no goal.
    """
    return [_check(parse_goal(metric, value), value, original, compressed) for metric, value in goals.items()]


def _check(goal: Goal, written: Any, original: Mapping[str, Figure], compressed: Mapping[str, Figure]) -> GoalResult:
    missed = GoalResult(metric=goal.metric, goal=written, met=False)
    before, after = original.get(goal.metric), compressed.get(goal.metric)
    if after is None or after.value is None:
        missed.reason = f"not measured: {after.reason}" if after else "not measured"
        return missed
    missed.value = after.value
    if goal.kind == "absolute":
        start = 0.0
    elif before is None or before.value is None:
        missed.reason = "the original's figure is missing, so the change is not known"
        return missed
    else:
        start = before.value
    met = goal.met(after.value, start, bool(after.higher_is_better))
    return GoalResult(metric=goal.metric, goal=written, met=met, value=after.value)
