"""The divergences that training passes follow, and their gradients, against float64 sums and their differences."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.maths import divergence
from compress.maths.divergence import kl_divergence, sliced, top_k
from tests.reference import mean_kl_divergence, row_divergence


def _logits(rows=12, width=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * 3, torch.randn(rows, width, generator=generator) * 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slice_values", [1, 40, 1 << 22])
def test_value_and_gradient_are_those_of_the_reference(masked, slice_values, monkeypatch):
    monkeypatch.setattr(divergence, "SLICE_VALUES", slice_values)
    student, teacher = _logits()
    mask = torch.arange(12) % 3 != 0 if masked else None
    student.requires_grad_(True)
    loss = kl_divergence(student, teacher, mask)
    (2 * loss).backward()
    logits = student.detach().double().numpy()
    counted = None if mask is None else mask.tolist()
    expected = mean_kl_divergence(logits, teacher.double().numpy(), counted)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for row, column in ((0, 0), (1, 3), (5, 16), (11, 8)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = logits.copy()
            moved[row, column] += step
            ends.append(mean_kl_divergence(moved, teacher.double().numpy(), counted))
        slope = (ends[0] - ends[1]) / 2e-5
        assert student.grad[row, column].item() == pytest.approx(2 * slope, rel=1e-3, abs=1e-6)


def test_the_divergence_of_equal_models_is_zero_with_no_gradient_to_speak_of():
    student = _logits()[0].requires_grad_(True)
    loss = kl_divergence(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert float(student.grad.abs().max()) < 1e-7


KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def _expected(student, teacher, direction, beta, temperature, likeliest=None):
    rows = []
    for row in range(len(student)):
        kept = None if likeliest is None else likeliest.indices[row].tolist()
        rows.append(row_divergence(student[row], teacher[row], direction, beta, temperature, kept))
    return np.array(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 5, 17])
@pytest.mark.parametrize(("direction", "beta"), KINDS)
def test_each_divergence_and_its_gradient_are_those_of_the_reference(direction, beta, k, temperature):
    student, teacher = _logits()
    likeliest = None if k is None else top_k(teacher, k, temperature)
    student.requires_grad_(True)
    found = divergence.divergence(student, likeliest or teacher, direction, beta, temperature)
    found.sum().backward()
    logits, aim = student.detach().double().numpy(), teacher.double().numpy()
    expected = _expected(logits, aim, direction, beta, temperature, likeliest)
    np.testing.assert_allclose(found.detach(), expected, rtol=2e-5, atol=1e-6)
    for row, column in ((0, 0), (1, 3), (5, 16), (11, 8)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = logits.copy()
            moved[row, column] += step
            ends.append(_expected(moved, aim, direction, beta, temperature, likeliest).sum())
        assert student.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("direction", "beta"), KINDS)
def test_a_top_k_teacher_is_a_bound_that_grows_to_the_whole_divergence(direction, beta):
    student, teacher = _logits(rows=40)
    whole = divergence.divergence(student, teacher, direction, beta)
    before = torch.zeros(40)
    for k in range(1, 18):
        now = divergence.divergence(student, top_k(teacher, k), direction, beta)
        assert bool((now >= before - 1e-5).all()), k
        assert bool((now <= whole + 1e-5).all()), k
        before = now
    torch.testing.assert_close(before, whole, rtol=1e-5, atol=1e-6)


def test_a_tail_too_small_for_a_float_keeps_its_logarithm():
    teacher = torch.tensor([[40.0, 0.0, 0.0, -3.0]])
    tail = top_k(teacher, 1).log_tail.item()
    assert tail == pytest.approx(np.log(2 + np.exp(-3)) - 40, rel=1e-5)
    student = torch.zeros(1, 4, requires_grad=True)
    for direction, beta in KINDS:
        divergence.divergence(student, top_k(teacher, 1), direction, beta).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_sliced_loss_through_a_head_is_that_of_all_rows_at_once_with_all_gradients(bias, monkeypatch):
    states, teacher = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)), _logits(20, 17)[1]
    torch.manual_seed(0)
    head = nn.Linear(6, 17, bias=bias)
    inputs = [states.requires_grad_(True), *head.parameters()]
    expected = divergence.divergence(head(states), teacher, "jsd").mean()
    gradients = torch.autograd.grad(3 * expected, inputs)
    monkeypatch.setattr(divergence, "SLICE_VALUES", 3 * 17)
    rows = []

    def loss(logits, part):
        rows.append(len(logits))
        return divergence.divergence(logits, teacher[part], "jsd").sum() / 20

    found = sliced(states, loss, head)
    (3 * found).backward()
    assert max(rows) == 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient():
    head = nn.Linear(6, 17).requires_grad_(False)
    states = torch.randn(5, 6, requires_grad=True)
    sliced(states, lambda logits, part: logits.square().sum(), head).backward()
    assert states.grad is not None
    assert head.weight.grad is None


def test_slices_in_bfloat16_have_the_gradients_of_all_rows_at_once(monkeypatch):
    torch.manual_seed(0)
    states, teacher, head = torch.randn(20, 6, requires_grad=True), _logits(20, 17)[1], nn.Linear(6, 17)
    inputs = [states, head.weight]
    expected = torch.autograd.grad(divergence.divergence(head(states), teacher).mean(), inputs)
    monkeypatch.setattr(divergence, "SLICE_VALUES", 3 * 17)
    with torch.autocast("cpu", torch.bfloat16):
        found = sliced(states, lambda x, part: divergence.divergence(x, teacher[part]).sum() / 20, head)
    for given, aim in zip(torch.autograd.grad(found, inputs), expected, strict=True):
        torch.testing.assert_close(given, aim, rtol=0.05, atol=0.01)
