"""GPTQ: an example by hand, what must hold for any weight, and the pass over a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_block import StubBlock, StubCalibration

from compress.maths.grid import QuantSpec, dequantize
from compress.passes.gptq import GPTQ, factorise, gptq
from compress.passes.rtn import RTN, round_to_nearest

orders = pytest.mark.parametrize("act_order", [True, False])


def weight_and_hessian(seed: int, rows: int = 4, columns: int = 24, tokens: int = 96) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    x = shared + 0.5 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), 2 * x.T @ x / tokens


def values(result, spec: QuantSpec) -> torch.Tensor:
    return dequantize(result.codes, result.scale, result.zero, spec, torch.float32)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    change = (weight - rounded).double()
    return float((change @ hessian.double() * change).sum())


def test_the_example_of_the_docstring():
    # 4 bits over 7.5 to -7.5: a step of 1. Third column: sets the range, and is not correlated with the others.
    weight = torch.tensor([[0.4, 0.4, 7.5]])
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    spec = QuantSpec(4)
    result = gptq(weight, hessian, spec, damping=1e-6)
    assert result.scale.item() == 1.0
    assert result.codes.tolist() == [[0, 1, 7]]
    assert round_to_nearest(weight, spec)[0].tolist() == [[0, 0, 7]]
    # errors (0.4, -0.6, 0.5): 2 * 0.16 + 2 * 0.36 - 2 * 0.24 + 0.25, of 6 * 0.16 + 56.25
    assert result.loss == pytest.approx((0.56 + 0.25) / (0.96 + 56.25), rel=1e-4)


@orders
def test_an_error_in_a_later_column_is_made_up_for_by_that_columns_own_measure(act_order):
    # As above, behind a column that is far larger, on the grid, and correlated with nothing.
    weight = torch.tensor([[1.0, 0.4, 0.4, 7.5]])
    hessian = torch.diag(torch.tensor([100.0, 2.0, 2.0, 1.0]))
    hessian[1, 2] = hessian[2, 1] = 1.0
    for size in (1, 2, 128):
        result = gptq(weight, hessian, QuantSpec(4), act_order=act_order, damping=1e-6, block_size=size)
        assert result.codes.tolist() == [[1, 0, 1, 7]]
    # The other way: 0.1 goes to 0 and moves the next by 0.05, from 0.44 to 0.49, which is not enough.
    weight = torch.tensor([[1.0, 0.1, 0.44, 7.5]])
    result = gptq(weight, hessian, QuantSpec(4), act_order=act_order, damping=1e-6)
    assert result.codes.tolist() == [[1, 0, 0, 7]]


def test_act_order_rounds_the_largest_input_first():
    # Only the second column's error can be made up for by the first when the second goes first, and it has the say.
    weight = torch.tensor([[0.4, 0.4, 7.5]])
    hessian = torch.tensor([[2.0, 2.4, 0.0], [2.4, 4.0, 0.0], [0.0, 0.0, 1.0]])
    first = gptq(weight, hessian, QuantSpec(4), act_order=True, damping=1e-6)
    last = gptq(weight, hessian, QuantSpec(4), act_order=False, damping=1e-6)
    assert first.codes.tolist() == [[1, 0, 7]]  # w_0 moves by 0.4 * 2.4 / 2, to 0.88
    assert last.codes.tolist() == [[0, 1, 7]]  # w_1 moves by 0.4 * 2.4 / 4, to 0.64


@orders
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans(), group=st.sampled_from([-1, 6, 8]))
def test_a_diagonal_hessian_gives_rounding_to_nearest(act_order, seed, bits, symmetric, group):
    weight, _ = weight_and_hessian(seed)
    hessian = torch.diag(torch.rand(24, generator=torch.Generator().manual_seed(seed)) + 0.1)
    spec = QuantSpec(bits, group, symmetric)
    result = gptq(weight, hessian, spec, act_order=act_order, block_size=7)
    codes, scale, zero = round_to_nearest(weight, spec)
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.scale, scale)
    assert result.zero is zero is None or torch.equal(result.zero, zero)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_with_one_group_and_act_order_the_order_of_columns_given_does_not_matter(seed, bits):
    weight, hessian = (t.double() for t in weight_and_hessian(seed))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    plain = gptq(weight, hessian, QuantSpec(bits)).codes
    permuted = gptq(weight[:, order], hessian[order][:, order], QuantSpec(bits)).codes
    assert torch.equal(permuted, plain[:, order])


@orders
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), symmetric=st.booleans(), search=st.booleans())
def test_rows_do_not_depend_on_each_other(act_order, seed, symmetric, search):
    weight, hessian = (t.double() for t in weight_and_hessian(seed))
    options = {"act_order": act_order, "search": search, "block_size": 10}
    together = gptq(weight, hessian, QuantSpec(3, 8, symmetric), **options).codes
    for row in range(len(weight)):
        alone = gptq(weight[row : row + 1], hessian, QuantSpec(3, 8, symmetric), **options).codes
        assert torch.equal(alone[0], together[row])


@orders
@pytest.mark.parametrize("group_size", [-1, 8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_block_size_changes_nothing(act_order, group_size, symmetric):
    weight, hessian = (t.double() for t in weight_and_hessian(5))
    results = [
        gptq(weight, hessian, QuantSpec(3, group_size, symmetric), act_order, block_size=size, search=True)
        for size in (1, 3, 8, 10, 24, 128)
    ]
    for result in results[1:]:
        assert torch.equal(result.codes, results[0].codes)
        assert torch.equal(result.scale, results[0].scale)
        assert result.loss == pytest.approx(results[0].loss, rel=1e-9)


@orders
def test_it_is_much_better_than_rounding_to_nearest_where_inputs_are_correlated(act_order):
    for seed, bits in ((0, 2), (1, 3), (2, 4)):
        weight, hessian = weight_and_hessian(seed, rows=32, columns=64, tokens=512)
        spec = QuantSpec(bits, 16)
        codes, scale, zero = round_to_nearest(weight, spec)
        plain = output_error(weight, dequantize(codes, scale, zero, spec, torch.float32), hessian)
        result = gptq(weight, hessian, spec, act_order=act_order)
        assert output_error(weight, values(result, spec), hessian) < 0.5 * plain


def test_the_loss_is_the_relative_output_error():
    weight, hessian = weight_and_hessian(3)
    spec = QuantSpec(3, 8)
    result = gptq(weight, hessian, spec)
    expected = output_error(weight, values(result, spec), hessian) / output_error(weight, 0 * weight, hessian)
    assert result.loss == pytest.approx(expected, rel=1e-4)


@orders
@pytest.mark.parametrize("symmetric", [True, False])
def test_keep_zeros_keeps_them_and_still_makes_up_for_what_is_lost(act_order, symmetric):
    weight, hessian = weight_and_hessian(7, rows=16)
    pruned = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5)
    spec = QuantSpec(3, 8, symmetric)
    kept = gptq(pruned, hessian, spec, act_order=act_order, keep_zeros=True)
    assert (values(kept, spec)[pruned == 0] == 0).all()
    free = gptq(pruned, hessian, spec, act_order=act_order)
    assert (values(free, spec)[pruned == 0] != 0).any()
    codes, scale, zero = round_to_nearest(pruned, spec)
    plain = output_error(pruned, dequantize(codes, scale, zero, spec, torch.float32), hessian)
    assert output_error(pruned, values(kept, spec), hessian) < plain


@orders
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dead_input_zeroes_its_column_and_leaves_the_rest_alone(act_order, symmetric):
    weight, hessian = (t.double() for t in weight_and_hessian(9))
    weight[:, [2, 11]] *= 0.01
    hessian[[2, 11]], hessian[:, [2, 11]] = 0, 0
    live = [c for c in range(24) if c not in (2, 11)]
    spec = QuantSpec(4, -1, symmetric)
    result = gptq(weight, hessian, spec, act_order=act_order)
    alone = gptq(weight[:, live], hessian[live][:, live], spec, act_order=act_order)
    assert (values(result, spec)[:, [2, 11]] == 0).all()
    assert torch.equal(result.codes[:, live], alone.codes)


def test_damping_that_had_to_rise_is_reported():
    weight, hessian = weight_and_hessian(4, tokens=6)  # rank 6 of 24
    assert gptq(weight, hessian, QuantSpec(4), damping=0.01).damping == 0.01
    hessian = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(24)
    result = gptq(weight, hessian, QuantSpec(4), damping=0.01)
    assert result.damping == pytest.approx(0.1)
    assert result.fallback is None


@pytest.mark.parametrize("value", [float("nan"), -1e4])
def test_a_hessian_that_cannot_be_solved_gives_rounding_to_nearest_and_says_so(value):
    weight, hessian = weight_and_hessian(4)
    hessian[3, 3] = value
    result = gptq(weight, hessian, QuantSpec(4))
    assert torch.equal(result.codes, round_to_nearest(weight, QuantSpec(4))[0])
    assert result.fallback.startswith("rounded to nearest: the Hessian")
    assert 0 < result.loss < 1


def test_a_factor_at_hand_saves_making_it_and_changes_nothing():
    weight, hessian = weight_and_hessian(6)
    given_factor = gptq(weight, hessian, QuantSpec(3, 8), factor=factorise(hessian, True, 0.01))
    assert torch.equal(given_factor.codes, gptq(weight, hessian, QuantSpec(3, 8)).codes)


def test_bfloat16_weights_are_solved_in_float32():
    weight, hessian = weight_and_hessian(8)
    spec = QuantSpec(4, 8, True, "bfloat16")
    result = gptq(weight.bfloat16(), hessian, spec)
    assert torch.equal(result.codes, gptq(weight.bfloat16().float(), hessian, spec).codes)
    assert result.scale.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize("true_sequential", [True, False])
def test_a_layer_is_solved_for_its_inputs_before_or_after_those_in_front_are_rounded(true_sequential):
    block = StubBlock()
    inputs = block.random_inputs()
    method = GPTQ(bits=3, group_size=8, true_sequential=true_sequential)
    report = method.compress_block(block, StubCalibration(block, inputs))["layers"]
    assert set(report) == {"first", "twin", "second", "silent"}
    in_front = block.quantized_weight("first") if true_sequential else block.original["first"]
    hidden = inputs @ in_front.T
    expected = gptq(block.original["second"], 2 * hidden.T @ hidden / len(hidden), QuantSpec(3, 8), search=True)
    assert torch.equal(block.quantized["second"][0], expected.codes)
    assert report["second"] == {"bits": 3, "loss": pytest.approx(expected.loss, rel=1e-4), "damping": 0.01}


def test_layers_of_one_input_are_solved_with_one_hessian():
    block = StubBlock()
    calibration = StubCalibration(block, block.random_inputs())
    GPTQ(bits=4, group_size=8).compress_block(block, calibration)
    assert calibration.observed == ["first", "second", "silent"]


def test_a_layer_that_no_token_reached_is_rounded_to_nearest_and_named():
    block = StubBlock()
    options = {"bits": 4, "group_size": 8}
    calibration = StubCalibration(block, block.random_inputs())
    report = GPTQ(**options, search=False).compress_block(block, calibration)["layers"]
    assert "no calibration token" in report["silent"]["fallback"]
    rounded = StubBlock()
    RTN(**options, search=False).compress_block(rounded, None)
    assert torch.equal(block.quantized["silent"][0], rounded.quantized["silent"][0])
    assert [name for name in report if "fallback" in report[name]] == ["silent"]


@pytest.mark.parametrize("sparse", [True, False])
def test_zeros_stay_in_a_model_that_was_pruned_before(sparse):
    block = StubBlock(sparse=sparse)
    for module in block.modules.values():
        module.weight.data[:, ::2] = 0
    GPTQ(bits=3, group_size=8).compress_block(block, StubCalibration(block, block.random_inputs()))
    assert bool((block.quantized_weight("first")[:, ::2] == 0).all()) is sparse


@pytest.mark.parametrize("options", [{"bits": 5}, {"group_size": 0}, {"damping": 0.0}, {"damping": 2}, {"bit": 4}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GPTQ(**options)
