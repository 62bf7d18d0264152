"""SparseGPT: by hand, against the textbook, and the pass over a block."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from stub_block import StubBlock, StubCalibration

from compress.maths.hessian import NotPositiveDefinite
from compress.passes.magnitude import Magnitude
from compress.passes.sparsegpt import SparseGPT, sparsegpt
from compress.passes.wanda import Wanda

TWO = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, matrix = reference.random_weight(rows, columns, seed), reference.random_hessian(columns, seed)
    return torch.from_numpy(weight), torch.from_numpy(matrix)


def error(weight: torch.Tensor, result: torch.Tensor, hessian: torch.Tensor) -> float:
    return reference.output_error(weight.double().numpy(), result.double().numpy(), hessian.double().numpy())


def run(method=SparseGPT, block=None, **options):
    block = block or StubBlock()
    report = method(**options).compress_block(block, StubCalibration(block, block.random_inputs()))["layers"]
    return block, report


def test_the_example_of_the_docstring():
    weight = torch.tensor([[1.0, 0.9]], dtype=torch.float64)
    result = sparsegpt(weight, TWO, 0.5, damping=1e-12)
    assert result.weight.tolist() == [[0.0, pytest.approx(1.4)]]
    assert result.keep.tolist() == [[False, True]]
    assert float(result.lost) == pytest.approx(1.5)
    assert float(result.size) == pytest.approx(2 * 1.0 + 2 * 0.81 + 2 * 0.9)


@pytest.mark.parametrize("block_size", [1, 4, 7, 12, 40, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_a_share_in_float64_equals_the_reference(sparsity, block_size):
    weight, hessian = problem(6, 40, 3)
    expected = reference.sparsegpt(weight.numpy(), hessian.numpy(), sparsity, block=block_size)
    result = sparsegpt(weight, hessian, sparsity, block_size=block_size)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert np.array_equal(result.keep.numpy(), expected != 0)
    assert int((~result.keep).sum()) == reference.zeros_of(sparsity, 240)
    assert float(result.lost.sum()) == pytest.approx(error(weight, result.weight, hessian), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("block_size", [1, 6, 20, 128])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_a_pattern_in_float64_equals_the_reference(pattern, block_size):
    weight, hessian = problem(5, 48, 4)
    expected = reference.sparsegpt(weight.numpy(), hessian.numpy(), pattern=pattern)
    result = sparsegpt(weight, hessian, pattern="{}:{}".format(*pattern), block_size=block_size)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-9, atol=1e-12)
    n, m = pattern
    assert ((result.weight != 0).view(5, -1, m).sum(2) == n).all()


def test_in_float32_it_is_the_reference_to_a_few_digits():
    weight, hessian = problem(16, 64, 5)
    expected = torch.from_numpy(reference.sparsegpt(weight.numpy(), hessian.numpy(), 0.5, block=32))
    result = sparsegpt(weight.float(), hessian.float(), 0.5, block_size=32)
    assert error(weight, result.weight, hessian) == pytest.approx(error(weight, expected, hessian), rel=1e-3)


def test_layers_that_are_stacked_are_pruned_each_by_its_own_share():
    weight, hessian = problem(12, 24, 6)
    parts = [(4, 0.25), (6, 0.5), (2, 0.75)]
    together = sparsegpt(weight, hessian, parts, block_size=8).weight
    row = 0
    for rows, share in parts:
        alone = sparsegpt(weight[row : row + rows], hessian, share, block_size=8).weight
        torch.testing.assert_close(together[row : row + rows], alone, rtol=1e-9, atol=1e-12)
        row += rows


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "refit_steps": 4}])
def test_zeros_stay_zero_and_count(options):
    weight, hessian = problem(8, 32, 7)
    weight[:, ::4] = 0.0
    weight[0] = 0.0
    result = sparsegpt(weight, hessian, **options).weight
    assert not result[weight == 0].any()
    assert int((result == 0).sum()) == (8 * 16 if "sparsity" in options else 7 * 16 + 32)


def test_a_diagonal_hessian_gives_wanda_s_scores_and_moves_nothing():
    weight, _ = problem(6, 16, 8)
    diagonal = torch.linspace(0.1, 3.0, 16, dtype=torch.float64)
    result = sparsegpt(weight, torch.diag(diagonal), pattern="2:4", damping=1e-12)
    expected = reference.nm_keep(reference.wanda_scores(weight.numpy(), diagonal.sqrt()[None].numpy()), 2, 4)
    assert np.array_equal(result.keep.numpy(), expected)
    torch.testing.assert_close(result.weight[result.keep], weight[result.keep], rtol=1e-9, atol=0)


def test_a_column_that_was_always_zero_goes_first():
    weight, hessian = problem(4, 12, 9)
    hessian[5] = hessian[:, 5] = 0.0
    result = sparsegpt(weight, hessian, 0.5)
    assert not result.weight[:, 5].any()
    assert int((result.weight == 0).sum()) == 24


def test_refit_finds_the_best_weights_under_the_mask():
    weight, hessian = problem(6, 24, 10)
    for damping in (0.01, 0.3):
        result = sparsegpt(weight, hessian, 0.5, damping=damping, refit_steps=60)
        whole = reference.damped(hessian.numpy(), damping)
        expected = reference.best_under_mask(weight.numpy(), result.keep.numpy(), whole)
        np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_every_step_of_refit_loses_less():
    weight, hessian = problem(8, 64, 11)
    losses = [error(weight, sparsegpt(weight, hessian, 0.6, refit_steps=n).weight, hessian) for n in (0, 1, 3, 10)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_refit_has_one_column_left_by_hand():
    # Of 1.0 and 0.9 under TWO the second stays: its best is 0.9 + 1.0 / 2, where the sweep put it already.
    result = sparsegpt(torch.tensor([[1.0, 0.9]], dtype=torch.float64), TWO, 0.5, damping=1e-12, refit_steps=3)
    assert result.weight.tolist() == [[0.0, pytest.approx(1.4)]]


def test_a_hessian_that_is_not_finite_is_refused():
    weight, hessian = problem(4, 8, 12)
    hessian[2, 2] = torch.nan
    with pytest.raises(NotPositiveDefinite):
        sparsegpt(weight, hessian, 0.5)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "refit": 5}])
def test_over_a_block_it_loses_less_of_the_outputs_than_wanda_and_wanda_less_than_magnitude(options):
    lost = []
    for method in (SparseGPT, Wanda, Magnitude):
        given = {key: value for key, value in options.items() if method is SparseGPT or key != "refit"}
        block, _ = run(method, **given)
        x = StubBlock().random_inputs()
        hidden = x @ block.original["first"].T
        changes = {name: block.original[name] - block.modules[name].weight.detach() for name in block.modules}
        lost.append(sum(float((y @ changes[n].T).square().sum()) for n, y in (("first", x), ("second", hidden))))
    assert lost[0] < lost[1] < lost[2]


def test_the_report_states_the_loss_on_the_calibration_text():
    for refit in (0, 5):
        block, report = run(sparsity=0.5, refit=refit)
        x = StubBlock().random_inputs()
        change = block.original["twin"] - block.modules["twin"].weight.detach()
        expected = (x @ change.T).square().sum() / (x @ block.original["twin"].T).square().sum()
        assert report["twin"]["loss"] == pytest.approx(float(expected), rel=1e-3)
        assert report["twin"]["sparsity"] == 0.5


def test_true_sequential_looks_at_the_inputs_of_each_stage_in_its_turn():
    block = StubBlock()
    calibration = StubCalibration(block, block.random_inputs())
    SparseGPT(true_sequential=True).compress_block(block, calibration)
    assert calibration.observed == ["first", "second", "silent"]
    twice, _ = run()
    assert torch.equal(block.modules["twin"].weight, twice.modules["twin"].weight)
    assert not torch.equal(block.modules["second"].weight, twice.modules["second"].weight)


def test_a_layer_that_no_token_reached_is_pruned_by_magnitude_and_says_so():
    block, report = run(pattern="2:4")
    assert report["silent"]["fallback"].startswith("magnitude: no calibration token")
    by_magnitude, _ = run(Magnitude, pattern="2:4")
    assert torch.equal(block.modules["silent"].weight, by_magnitude.modules["silent"].weight)
