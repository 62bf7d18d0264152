"""Magnitude and Wanda: by hand, and over a block."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from stub_block import StubBlock, StubCalibration

from compress.errors import StartError
from compress.maths.masks import keep_mask
from compress.passes.base import LayerShape
from compress.passes.magnitude import Magnitude
from compress.passes.wanda import ColumnNorms, Wanda, wanda_scores

both = pytest.mark.parametrize("method", [Magnitude, Wanda])


def run(method, block=None, **options):
    block = block or StubBlock()
    calibration = StubCalibration(block, block.random_inputs())
    return block, method(**options).compress_block(block, calibration)["layers"]


def test_a_2x2_weight_by_hand():
    # Inputs (3, 0) and (-4, 1): norms 5 and 1. By magnitude the first column goes, by Wanda the second.
    weight = torch.tensor([[0.5, 2.0], [-1.0, 3.0]])
    norms = ColumnNorms(2)
    norms.add(torch.tensor([[3.0, 0.0]]))
    norms.add(torch.tensor([[-4.0, 1.0]]))
    assert norms.norms.tolist() == [5.0, 1.0]
    scores = wanda_scores(weight, norms.norms)
    assert scores.tolist() == [[2.5, 2.0], [5.0, 3.0]]
    assert keep_mask(weight, scores, sparsity=0.5).tolist() == [[True, False], [True, False]]
    assert keep_mask(weight, weight.abs(), sparsity=0.5).tolist() == [[False, True], [False, True]]


@both
def test_kept_weights_are_untouched_and_the_rest_exactly_zero(method):
    block, report = run(method, sparsity=0.25)
    for name, module in block.modules.items():
        zeros = module.weight == 0
        assert int(zeros.sum()) == 64
        assert torch.equal(module.weight[~zeros], block.original[name][~zeros])
        assert report[name]["sparsity"] == 0.25
        assert 0 < report[name]["loss"] < 0.25


@both
def test_the_pattern_keeps_two_of_every_four(method):
    block, report = run(method, pattern="2:4")
    for name, module in block.modules.items():
        assert ((module.weight != 0).view(16, 4, 4).sum(2) == 2).all()
        assert report[name]["sparsity"] == 0.5


@both
def test_pruning_twice_is_pruning_once(method):
    block, _ = run(method)
    before = {name: module.weight.detach().clone() for name, module in block.modules.items()}
    run(method, block)
    for name, module in block.modules.items():
        assert torch.equal(module.weight, before[name])


def test_magnitude_counts_over_the_layer_or_over_each_row():
    by_layer, by_row = StubBlock(), StubBlock()
    for block in (by_layer, by_row):
        block.modules["first"].weight.data[0] *= 100
    run(Magnitude, by_layer, sparsity=0.5)
    run(Magnitude, by_row, sparsity=0.5, scope="row")
    assert (by_layer.modules["first"].weight[0] != 0).sum() > 14
    assert ((by_row.modules["first"].weight != 0).sum(1) == 8).all()


def test_wanda_compares_within_a_row_by_the_inputs_of_the_block_as_it_came_in():
    block = StubBlock()
    inputs = block.random_inputs()
    calibration = StubCalibration(block, inputs)
    Wanda().compress_block(block, calibration)
    hidden = inputs @ block.original["first"].T
    for name, x in (("first", inputs), ("twin", inputs), ("second", hidden)):
        scores = block.original[name].abs() * x.norm(dim=0)
        lowest = scores.argsort(dim=1)[:, :8]
        expected = block.original[name].scatter(1, lowest, 0.0)
        assert torch.equal(block.modules[name].weight, expected)
    assert calibration.observed == ["first", "second", "silent"]  # the twin shares its input with the first


def test_wanda_prunes_a_layer_that_no_token_reached_by_magnitude_and_says_so():
    block, report = run(Wanda)
    assert "no calibration token" in report["silent"]["fallback"]
    by_magnitude, _ = run(Magnitude, scope="row")
    assert torch.equal(block.modules["silent"].weight, by_magnitude.modules["silent"].weight)
    assert [name for name in report if "fallback" in report[name]] == ["silent"]


def test_column_norms_of_half_precision_do_not_overflow():
    norms = ColumnNorms(1)
    for _ in range(10):
        norms.add(torch.full((1000, 1), 1000.0, dtype=torch.float16))
    assert norms.norms.item() == pytest.approx(1000 * 100, rel=1e-6)


@both
def test_a_share_may_be_a_percentage_and_a_pattern_what_yaml_makes_of_it(method):
    assert method(sparsity="30%").sparsity == 0.3
    assert method(pattern=124).pattern == "2:4"
    assert (method().sparsity, method().pattern) == (0.5, None)
    for options in ({}, {"sparsity": 0.3}, {"pattern": "1:4"}):
        assert method(**method(**options).options()) == method(**options)


@both
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": "120%"},
        {"pattern": "4:2"},
        {"pattern": "2:4", "sparsity": 0.5},
    ],
)
def test_targets_that_cannot_be_are_refused(method, options):
    with pytest.raises(ValidationError):
        method(**options)


@both
def test_a_pattern_that_does_not_divide_is_refused_when_planned(method):
    with pytest.raises(StartError, match="multiple of 4 columns; the layer has 6"):
        method(pattern="2:4").spec_of(LayerShape("block.0", "mlp", 4, 6, torch.float32))
