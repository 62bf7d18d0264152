"""The Hessian and its factor: what must hold whatever the inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.maths.hessian import (
    CrossMoment,
    Hessian,
    NotPositiveDefinite,
    bfloat16_products,
    quadratic_form,
    triangular_root,
)


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 10**6))
def test_batches_of_any_size_give_the_mean_over_all_tokens(sizes, seed):
    x = inputs(sum(sizes), 5, seed)
    hessian = Hessian(5)
    for batch in x.split(sizes):
        hessian.add(batch)
    assert hessian.count == sum(sizes)
    torch.testing.assert_close(hessian.matrix, 2 * x.T @ x / max(sum(sizes), 1), rtol=1e-5, atol=1e-6)


def test_strips_leave_no_seam_and_reading_does_not_disturb_what_follows(monkeypatch):
    monkeypatch.setattr("compress.maths.hessian.STRIP", 4)
    x, hessian = inputs(30, 10), Hessian(10)
    hessian.add(x[:10])
    hessian.matrix  # noqa: B018
    hessian.add(x[10:].view(4, 5, 10))
    torch.testing.assert_close(hessian.matrix, 2 * x.T @ x / 30, rtol=1e-5, atol=1e-6)
    assert torch.equal(hessian.matrix, hessian.matrix.T)


def test_half_precision_inputs_are_summed_in_float32():
    x, hessian = torch.full((4096, 1), 1.0, dtype=torch.bfloat16), Hessian(1)
    hessian.add(x)
    hessian.add(x * 3)
    assert hessian.matrix.dtype == torch.float32
    assert hessian.matrix.item() == pytest.approx(2 * (1 + 9) / 2, rel=1e-6)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(CompressError, match="3 columns, the layer has 4"):
        Hessian(4).add(torch.ones(2, 3))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_the_root_is_upper_and_its_square_is_the_damped_hessian(columns, seed):
    x = inputs(4 * columns, columns, seed).double()
    matrix = x.T @ x
    upper, used = triangular_root(matrix, 0.01)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(columns)
    assert used == 0.01
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ upper.T, damped, rtol=1e-8, atol=1e-8)


def test_damping_rises_as_far_as_needed_and_is_reported():
    x = inputs(3, 8).double()  # rank 3: any damping will do
    assert triangular_root(x.T @ x, 0.01)[1] == 0.01
    assert triangular_root(x.T @ x, 0.0)[1] in (0.0, 1e-4)
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    assert triangular_root(indefinite, 0.001)[1] == pytest.approx(0.1)
    assert triangular_root(torch.tensor([[1.0, 1.9], [1.9, 1.0]]), 0.01)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("matrix", [[[1.0, 3.0], [3.0, 1.0]], [[float("nan"), 0.0], [0.0, 1.0]]])
def test_a_hessian_beyond_all_damping_is_refused(matrix):
    with pytest.raises(NotPositiveDefinite):
        triangular_root(torch.tensor(matrix), 0.01)


def test_the_input_is_left_as_it_was():
    x = inputs(9, 4)
    matrix = x.T @ x
    matrix[2], matrix[:, 2] = 0.0, 0.0
    before = matrix.clone()
    triangular_root(matrix, 0.01)
    assert torch.equal(matrix, before)


def test_dead_columns_stand_alone_and_do_not_count_in_the_mean():
    x = inputs(20, 5).double() * 1e-3  # small beside the 1 that a dead column gets
    x[:, [1, 4]] = 0
    live = [0, 2, 3]
    upper, _ = triangular_root(x.T @ x, 0.01)
    alone, _ = triangular_root((x.T @ x)[live][:, live], 0.01)
    torch.testing.assert_close(upper[live][:, live], alone, rtol=1e-10, atol=0)
    assert (upper[1, [0, 2, 3, 4]] == 0).all()
    assert (upper[[0, 2, 3], 4] == 0).all()


def test_products_of_bfloat16_inputs_are_as_exact_as_those_of_float32():
    x = (inputs(1024, 300) @ inputs(300, 300, 1)).bfloat16()
    exact = 2 * x.double().T @ x.double() / len(x)
    for seen in (x, x.float()):
        hessian = Hessian(300)
        for batch in seen.split(400):
            hessian.add(batch)
        assert (hessian.matrix - exact).abs().max() < 4e-6 * exact.abs().max()


def test_float32_inputs_are_never_rounded_to_bfloat16():
    x = inputs(1024, 300)
    hessian, cross = Hessian(300), CrossMoment(300)
    hessian.add(x)
    cross.add(x, x.bfloat16())
    assert (hessian.matrix - 2 * x.double().T @ x.double() / len(x)).abs().max() < 1e-5
    assert (cross.matrix - 2 * x.double().T @ x.bfloat16().double() / len(x)).abs().max() < 1e-5


def test_bfloat16_products_are_for_the_inside_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside bf16"), bfloat16_products(True):
        raise RuntimeError("inside " + torch.backends.mkldnn.matmul.fp32_precision)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with bfloat16_products(False):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 10**6))
def test_the_cross_moment_is_the_mean_over_all_tokens(sizes, seed):
    x, y = inputs(sum(sizes), 5, seed), inputs(sum(sizes), 5, seed + 1)
    cross = CrossMoment(5)
    for one, other in zip(y.split(sizes), x.split(sizes), strict=True):
        cross.add(one, other)
    torch.testing.assert_close(cross.matrix, 2 * y.T @ x / max(sum(sizes), 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strip", [3, 4, 10, 100])
def test_the_quadratic_form_of_each_row(strip, monkeypatch):
    monkeypatch.setattr("compress.maths.hessian.STRIP", strip)
    weight, x = inputs(4, 10).double(), inputs(30, 10, 1).double()
    expected = (weight @ x.T).square().sum(1)
    torch.testing.assert_close(quadratic_form(weight, x.T @ x), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        quadratic_form(weight.bfloat16(), (x.T @ x).float()), expected.float(), rtol=1e-2, atol=0
    )
