"""Rounding to nearest, as a function and as a pass."""

from __future__ import annotations

import pytest
import torch
from stub_block import StubBlock

from compress.maths.grid import QuantSpec
from compress.passes.base import LayerShape
from compress.passes.rtn import RTN, round_to_nearest


def test_a_2x3_weight_by_hand():
    # Row 1: 3 / 1.5 = a step of 2; 1.2 / 2 -> 1, -2.9 / 2 -> -1, 3 / 2 = 1.5 -> 2, cut to 1.
    # Row 2: 0.75 / 1.5 = 0.5; -0.75 / 0.5 = -1.5 -> -2 (to even), 0.2 / 0.5 -> 0, 0.3 / 0.5 -> 1.
    weight = torch.tensor([[1.2, -2.9, 3.0], [-0.75, 0.2, 0.3]])
    codes, scale, zero = round_to_nearest(weight, QuantSpec(bits=2))
    assert scale.tolist() == [[2.0], [0.5]]
    assert codes.tolist() == [[1, -1, 1], [-2, 0, 1]]
    assert zero is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_pass_rounds_every_layer_and_reports_what_it_cost(symmetric):
    block = StubBlock()
    report = RTN(bits=3, group_size=4, symmetric=symmetric).compress_block(block, None)["layers"]
    assert set(report) == set(block.modules)
    for name, entry in report.items():
        lost = (block.quantized_weight(name) - block.original[name]).square().sum()
        assert entry == {"bits": 3, "loss": pytest.approx(float(lost / block.original[name].square().sum()))}
        assert block.quantized[name][0].abs().max() <= 4


def test_search_makes_the_loss_smaller():
    losses = {}
    for search in (False, True):
        report = RTN(bits=2, group_size=-1, search=search).compress_block(StubBlock(), None)["layers"]
        losses[search] = sum(entry["loss"] for entry in report.values())
    assert losses[True] < 0.9 * losses[False]


def test_the_plan_is_told_the_grid_of_a_layer():
    shape = LayerShape("block.0", "mlp", 64, 96, torch.bfloat16)
    assert RTN(bits=8, group_size=32).spec_of(shape) == QuantSpec(8, 32, True, "bfloat16")
    with pytest.raises(Exception, match="does not divide the 96 columns"):
        RTN(group_size=128).spec_of(shape)
