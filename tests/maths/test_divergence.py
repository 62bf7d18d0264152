"""The divergence that training passes follow, and its gradient, against float64 sums and their differences."""

import pytest
import torch

from compress.maths import divergence
from compress.maths.divergence import kl_divergence
from tests.reference import mean_kl_divergence


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


def test_the_divergence_of_equal_models_is_zero_with_no_gradient():
    student = _logits()[0].requires_grad_(True)
    loss = kl_divergence(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert float(student.grad.abs().max()) == 0
