import pytest
import torch
from reference import greedy_removal, removal_loss, ridge

from compress.maths.elimination import eliminate, inverse, marginal_costs, refitted, without
from compress.maths.hessian import CrossMoment, Hessian


def _inputs(tokens, columns, seed=0):
    """Correlated inputs [tokens, columns], float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scale = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    return (
        torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
        @ (mix * 0.3 + torch.eye(columns))
        * scale
    )


def _hessian(x):
    return 2 * x.T @ x / len(x)


def _weight(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_weight_of_an_input_moves_to_its_twin():
    weight, hessian = torch.tensor([[1.0, 2.0]]), torch.full((2, 2), 2.0)
    assert torch.allclose(without(weight, hessian, torch.tensor([1]), 1e-6), torch.tensor([[3.0, 0.0]]), atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_elimination_takes_the_textbooks_order(size):
    x, weight = _inputs(64, 12), _weight(5, 12)
    groups = torch.randperm(12, generator=torch.Generator().manual_seed(2)).view(-1, size)
    count = len(groups) - 1
    expected = greedy_removal(weight, x, groups.tolist(), count, 0.02)
    assert eliminate(weight, _hessian(x), groups, count, 0.02) == expected


def test_of_two_inputs_that_are_the_same_one_stays():
    x = _inputs(64, 6)
    x[:, 4] = x[:, 1]
    weight = _weight(3, 6)
    order = eliminate(weight, _hessian(x), torch.arange(6)[:, None], 5, 1e-6)
    assert order[0] in (1, 4)
    assert {1, 4} - set(order[:2])


def test_a_column_that_is_always_zero_goes_first():
    x = _inputs(64, 6)
    x[:, 3] = 0
    assert eliminate(100 * _weight(3, 6), _hessian(x), torch.arange(6)[:, None], 1)[0] == 3


def test_many_at_once_lose_little_more_than_one_at_a_time(monkeypatch):
    x, weight, groups = _inputs(256, 40), _weight(8, 40), torch.arange(40)[:, None]
    loss = {}
    for steps in (100, 5):
        monkeypatch.setattr("compress.maths.elimination.STEPS", steps)
        order = eliminate(weight, _hessian(x), groups, 20)
        assert len(set(order)) == 20
        loss[steps] = removal_loss(weight, x, order, 0.01)
    assert (1 - 1e-9) * loss[100] <= loss[5] < 1.2 * loss[100]


def test_without_is_the_textbooks_least_squares():
    x, weight, gone = _inputs(80, 10), _weight(4, 10), [2, 5, 9]
    stays = [column for column in range(10) if column not in gone]
    found = without(weight, _hessian(x), torch.tensor(gone), 0.01)
    assert torch.equal(found[:, gone], torch.zeros(4, 3, dtype=torch.float64))
    expected = ridge(x[:, stays], x @ weight.T, weight[:, stays], 0.01)
    assert torch.allclose(found[:, stays], expected, rtol=1e-9, atol=1e-9)


def test_refitting_is_the_textbooks_ridge_regression():
    x, weight = _inputs(80, 10), _weight(4, 10)
    target = torch.randn(80, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    missing = 2 * (target - x @ weight.T).T @ x / len(x)
    expected = ridge(x, target, weight, 0.05)
    assert torch.allclose(refitted(weight, _hessian(x), missing, 0.05), expected, rtol=1e-9, atol=1e-9)


def test_refitting_from_sums_in_float32_is_near_it():
    x, weight = _inputs(80, 10), _weight(4, 10)
    target = torch.randn(80, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hessian, cross = Hessian(10), CrossMoment(10, rows=4)
    for rows in (slice(0, 30), slice(30, 80)):
        hessian.add(x[rows].float())
        cross.add((target - x @ weight.T)[rows].float(), x[rows].float())
    found = refitted(weight.float(), hessian.matrix, cross.matrix, 0.05)
    assert torch.allclose(found.double(), ridge(x, target, weight, 0.05), atol=1e-4)


def test_a_column_that_is_always_zero_keeps_its_weight():
    x, weight = _inputs(80, 6), _weight(4, 6)
    x[:, 2] = 0
    missing = torch.randn(4, 80, generator=torch.Generator().manual_seed(3), dtype=torch.float64) @ x
    assert torch.equal(refitted(weight, _hessian(x), missing, 0.01)[:, 2], weight[:, 2])


def test_the_inverse_is_that_of_the_damped_hessian():
    hessian = _hessian(_inputs(80, 6))
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(inverse(hessian, 0.1) @ damped, torch.eye(6, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("size", [1, 3])
def test_marginal_costs_are_what_the_textbooks_loss_rises_by_with_each_group(size):
    x, weight = _inputs(64, 12), _weight(5, 12)
    groups = torch.randperm(12, generator=torch.Generator().manual_seed(2)).view(-1, size)
    costs = marginal_costs(weight, _hessian(x), groups, 0.02)
    order = greedy_removal(weight, x, groups.tolist(), len(groups) - 1, 0.02)
    order += set(range(len(groups))) - set(order)
    losses = [removal_loss(weight, x, groups[order[:n]].flatten().tolist(), 0.02) for n in range(len(groups) + 1)]
    assert torch.allclose(costs[order].float(), torch.tensor(losses).diff(), rtol=1e-3)
