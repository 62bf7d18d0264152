"""The integer program against every allocation there is, and the filling of a budget."""

from __future__ import annotations

import doctest
import random

import pytest
from reference import best_of_all

from compress.maths import allocation
from compress.maths.allocation import Limit, best, fill, uniform


def test_the_worked_example() -> None:
    assert doctest.testmod(allocation).failed == 0
    assert doctest.testmod(allocation).attempted == 1


@pytest.mark.parametrize("seed", range(25))
def test_no_allocation_that_the_limits_allow_loses_less(seed: int) -> None:
    draw = random.Random(seed)
    layers, bits = draw.randint(2, 6), (2, 3, 4, 8)
    sizes = [draw.choice([64, 128, 96, 1000]) for _ in range(layers)]
    losses = [[draw.random() * size / 4**b for b in bits] for size in sizes]
    weights = Limit([[b * size for b in bits] for size in sizes], int(draw.uniform(2, 8) * sum(sizes)))
    costs = [[b * size + draw.randint(0, 40) for b in bits] for size in sizes]
    limits = [weights] if seed % 2 else [weights, Limit(costs, int(draw.uniform(2.5, 8) * sum(sizes)))]
    found, expected = best(losses, limits), best_of_all(losses, [(limit.costs, limit.most) for limit in limits])
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert all(limit.allows(found) for limit in limits)
        assert sum(loss[c] for loss, c in zip(losses, found, strict=True)) == pytest.approx(expected, rel=1e-9)


def test_a_limit_is_met_to_the_last_unit() -> None:
    costs = [[2 * 10**9, 3 * 10**9]] * 3
    assert best([[1.0, 0.0]] * 3, [Limit(costs, 9 * 10**9)]) == [1, 1, 1]
    chosen = best([[1.0, 0.0]] * 3, [Limit(costs, 9 * 10**9 - 1)])
    assert chosen is not None
    assert sorted(chosen) == [0, 1, 1]


def test_losses_of_very_different_size_are_told_apart() -> None:
    losses = [[1e-3, 0.0], [1e-9, 0.0], [2e-9, 0.0]]
    assert best(losses, [Limit([[1, 2]] * 3, 5)]) == [1, 0, 1]


def test_where_nothing_is_allowed_there_is_none() -> None:
    limits = [Limit([[2, 4], [2, 4]], 3)]
    assert best([[1.0, 0.0]] * 2, limits) is None
    assert uniform(limits) is None
    assert fill(limits) is None


def test_filling_leaves_less_than_any_step_would_take() -> None:
    draw = random.Random(0)
    sizes = [draw.randint(50, 200) for _ in range(20)]
    for average in (2.0, 2.5, 3.5, 5.0, 8.0):
        limit = Limit([[b * size for b in (2, 3, 4, 8)] for size in sizes], int(average * sum(sizes)))
        chosen = fill([limit])
        assert chosen is not None
        left = limit.most - limit.spent(chosen)
        steps = [row[c + 1] - row[c] for row, c in zip(limit.costs, chosen, strict=True) if c < 3]
        assert 0 <= left < min(steps, default=left + 1)
        least = uniform([limit])
        assert least is not None
        assert all(c >= least for c in chosen)


def test_many_layers_are_solved_in_moments() -> None:
    draw = random.Random(1)
    sizes = [draw.choice([1, 2, 8, 3]) * 1024**2 for _ in range(280)]
    losses = [[draw.lognormvariate(0, 1) * size / 4**b for b in (2, 3, 4, 8)] for size in sizes]
    limit = Limit([[b * size for b in (2, 3, 4, 8)] for size in sizes], int(3.5 * sum(sizes)))
    chosen = best(losses, [limit])
    assert chosen is not None
    assert limit.spent(chosen) <= limit.most
    assert sum(row[c] for row, c in zip(losses, chosen, strict=True)) < sum(row[1] for row in losses)  # 3 bits for all
