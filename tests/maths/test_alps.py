"""ALPS: by hand, what must hold for any layer, and the pass over a block and a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import torch
from stub_block import StubBlock, StubCalibration

from compress.maths.hessian import NotPositiveDefinite
from compress.passes.alps import ALPS, alps
from compress.passes.sparsegpt import sparsegpt
from compress.testing import outputs, tiny_model, tiny_tokens


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, matrix = reference.random_weight(rows, columns, seed), reference.random_hessian(columns, seed)
    return torch.from_numpy(weight), torch.from_numpy(matrix)


def error(weight: torch.Tensor, result: torch.Tensor, hessian: np.ndarray) -> float:
    return reference.output_error(weight.double().numpy(), result.double().numpy(), hessian)


def test_the_example_of_the_docstring():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    result = alps(torch.tensor([[1.0, 0.9]], dtype=torch.float64), hessian, 0.5, damping=1e-12)
    assert result.weight.tolist() == [[pytest.approx(1.45), 0.0]]
    assert float(result.lost) == pytest.approx(1.215)


@pytest.mark.parametrize("iterations", [0, 1, 3, 4, 12])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_without_refit_it_equals_the_reference(pattern, iterations):
    weight, hessian = problem(5, 24, 1)
    expected = reference.alps(weight.numpy(), hessian.numpy(), 0.6, pattern, iterations, 0.01)
    given = None if pattern is None else "{}:{}".format(*pattern)
    result = alps(weight, hessian, 0.6, given, iterations=iterations, refit_steps=0)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"pattern": "2:4"}])
def test_the_weights_are_the_best_under_the_mask_and_the_count_is_exact(options):
    weight, hessian = problem(6, 32, 2)
    result = alps(weight, hessian, refit_steps=80, **options)
    whole = reference.damped(hessian.numpy(), 0.01)
    expected = reference.best_under_mask(weight.numpy(), result.keep.numpy(), whole)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert int((result.weight == 0).sum()) == int(options.get("sparsity", 0.5) * 192)
    assert float(result.lost.sum()) == pytest.approx(error(weight, result.weight, hessian.numpy()))
    if "pattern" in options:
        assert ((result.weight != 0).view(6, -1, 4).sum(2) == 2).all()


def test_it_comes_near_the_best_of_all_masks():
    lost = best = 0.0
    for seed in range(6):
        weight, hessian = problem(1, 8, seed)
        whole = reference.damped(hessian.numpy(), 0.01)
        errors = []
        for kept in itertools.combinations(range(8), 4):
            mask = np.isin(np.arange(8), kept)[None]
            under = torch.from_numpy(reference.best_under_mask(weight.numpy(), mask, whole))
            errors.append(error(weight, under, whole))
        best += min(errors)
        lost += error(weight, alps(weight, hessian, 0.5, refit_steps=8).weight, whole)
    assert best <= lost < 1.3 * best


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_its_masks_are_better_than_sparsegpts(options):
    lost = greedy = 0.0
    for seed in range(3):
        weight, hessian = problem(16, 64, seed)
        lost += error(weight, alps(weight, hessian, refit_steps=20, **options).weight, hessian.numpy())
        greedy += error(weight, sparsegpt(weight, hessian, refit_steps=20, **options).weight, hessian.numpy())
    assert lost < 0.95 * greedy


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zeros_stay_zero_and_count(options):
    weight, hessian = problem(8, 32, 7)
    weight[:, ::4] = 0.0
    result = alps(weight, hessian, **options).weight
    assert not result[weight == 0].any()
    assert int((result == 0).sum()) == 8 * 16


def test_stacked_layers_have_shares_of_their_own():
    weight, hessian = problem(9, 20, 3)
    result = alps(weight, hessian, [(4, 0.25), (5, 0.7)]).weight
    assert int((result[:4] == 0).sum()) == 20
    assert int((result[4:] == 0).sum()) == 70


def test_inputs_that_were_always_zero_and_hessians_that_are_not_finite():
    weight, hessian = problem(4, 12, 9)
    hessian[5] = hessian[:, 5] = 0.0
    result = alps(weight, hessian, 0.5).weight
    assert result.isfinite().all()
    assert not result[:, 5].any()
    assert alps(weight, torch.zeros_like(hessian), 0.5).weight.isfinite().all()
    hessian[2, 2] = torch.inf
    with pytest.raises(NotPositiveDefinite):
        alps(weight, hessian, 0.5)


def test_asymmetric_comes_nearer_to_the_original_outputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 16, generator=generator, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    now = x + 0.3 * torch.randn(200, 16, generator=generator, dtype=torch.float64) @ torch.randn(16, 16).double()
    hessian, deviation = 2 * now.T @ now / 200, 2 * (x - now).T @ now / 200

    def off(result):
        return float((x @ weight.T - now @ result.T).square().sum())

    plain = alps(weight, hessian, 0.5, damping=1e-6, refit_steps=60)
    aware = alps(weight, hessian, 0.5, damping=1e-6, refit_steps=60, deviation=deviation)
    assert off(aware.weight) < 0.9 * off(plain.weight)
    for row in range(6):  # under its mask nothing is nearer: least squares by the inputs as they are now
        stay = aware.keep[row]
        best = torch.linalg.lstsq(now[:, stay], x @ weight[row]).solution
        torch.testing.assert_close(aware.weight[row, stay], best, rtol=1e-3, atol=1e-3)


def test_over_a_block_it_loses_less_than_sparsegpt():
    from compress.passes.sparsegpt import SparseGPT

    losses = []
    for pass_ in (ALPS(propagation="none"), SparseGPT()):
        block = StubBlock()
        report = pass_.compress_block(block, StubCalibration(block, block.random_inputs()))["layers"]
        losses.append(sum(report[name]["loss"] for name in ("first", "twin", "second")))
    assert losses[0] < losses[1]


def test_over_a_model_asymmetric_comes_nearer_to_its_outputs():
    tokens = tiny_tokens(32, 48)
    whole = outputs(tiny_model(), tokens)
    off = {}
    for propagation in ("none", "asymmetric"):
        model = tiny_model()
        ALPS(sparsity=0.5, propagation=propagation, true_sequential=True)(model, calibration=tokens)
        off[propagation] = float((outputs(model, tokens) - whole).square().mean())
    assert off["asymmetric"] < off["none"]
