"""Grids with super-blocks: what they are made of is found again, the search beats its parts, GPTQ is the textbook's."""

import math

import numpy as np
import pytest
import reference
import torch

from compress.errors import CompressError, StartError
from compress.maths.feedback import factorise
from compress.maths.grid import QuantSpec, dequantize, find_params, named_spec, quantize
from compress.maths.named_grids import SUPER_BLOCKS
from compress.maths.super_blocks import factored, find_super, spread
from compress.passes.gptq import gptq

GRIDS = list(SUPER_BLOCKS)
MINIMA = [name for name, block in SUPER_BLOCKS.items() if block.minima]


def weights(rows=3, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def on_grid(weight, spec, search=True, importance=None):
    scale, zero = find_params(weight, spec, search, importance)
    return dequantize(quantize(weight, scale, zero, spec), scale, zero, spec, torch.float32), scale, zero


def lost(weight, found, importance=None):
    change = (found - weight).double().square()
    return float((change if importance is None else change * importance).sum())


def parts_of(scale, zero, block):
    """Numbers and multiples of scales and minima, float64 arrays [rows, supers(, groups)]."""
    found = []
    for values in (scale, torch.zeros_like(scale) if zero is None else zero):
        number, multiples = factored(values, block)
        found += [number.double().numpy(), multiples.double().unflatten(1, (-1, block.groups)).numpy()]
    return found


def test_scales_are_made_of_numbers_and_multiples_by_hand():
    made = spread(torch.tensor([[0.5, 2.0]], dtype=torch.float16), torch.tensor([[1, 3] * 8 + [-1, 0] * 8]))
    assert made.tolist() == [[0.5, 1.5] * 8 + [-2.0, 0.0] * 8]


@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_and_multiples_are_found_again_or_others_with_the_same_products(grid):
    block, draw = SUPER_BLOCKS[grid], torch.Generator().manual_seed(4)
    low, high = block.multiples
    numbers = torch.cat([torch.rand(40, 3, generator=draw), torch.rand(40, 3, generator=draw) * 1e-6]).half()
    multiples = torch.randint(low, high + 1, (80, 3 * block.groups), generator=draw)
    multiples[0] = 0
    values = spread(numbers, multiples)
    again, counts = factored(values, block)
    assert torch.equal(spread(again, counts), values)
    assert low <= int(counts.min())
    assert int(counts.max()) <= high
    assert bool((again >= 0).all())


def test_scales_that_are_no_multiples_are_never_rounded():
    values = torch.full((1, 16), 0.25)
    values[0, 3] = 0.1
    with pytest.raises(CompressError, match="Q2_K blocks hold multiples of one float16 number"):
        factored(values, SUPER_BLOCKS["gguf-q2_k"])
    with pytest.raises(CompressError, match="multiples"):
        factored(-torch.full((1, 16), 0.25), SUPER_BLOCKS["gguf-q2_k"])  # minima and their scales have no sign


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_search_loses_less_than_covering_and_no_neighbouring_multiple_is_better(grid, weighed):
    spec, weight = named_spec(torch.float32, grid), weights()
    block = spec.super_block
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)).pow(3) if weighed else None
    found, scale, zero = on_grid(weight, spec, True, importance)
    assert lost(weight, found, importance) < 0.93 * lost(weight, on_grid(weight, spec, False)[0], importance)
    d, k, dmin, low = parts_of(scale, zero, block)
    values = weight.double().numpy().reshape(3, 2, block.groups, -1)
    shares = np.ones(512) if importance is None else importance.double().numpy()
    shares = shares.reshape(2, block.groups, -1)
    for row, sup, group in [(0, 0, 0), (1, 1, 3), (2, 0, block.groups - 1)]:
        place = (row, sup, group)

        def error(up, aside, place=place):
            return reference.super_block_error(
                values[place], shares[place[1:]], d[place[:2]], k[place] + up, dmin[place[:2]], low[place] + aside,
                spec.bits, block.minima,
            )  # fmt: skip

        own = error(0, 0)
        for up in (-1, 0, 1):
            for aside in (-1, 0, 1) if block.minima else (0,):
                inside = all(block.multiples[0] <= n <= block.multiples[1] for n in (k[place] + up, low[place] + aside))
                if inside and k[place] + up != 0:
                    assert own <= error(up, aside) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_and_weights_are_those_of_the_formula_in_float64(grid):
    spec, weight = named_spec(torch.float32, grid), weights(2, 256, 7)
    found, scale, zero = on_grid(weight, spec)
    block = spec.super_block
    d, k, dmin, low = parts_of(scale, zero, block)
    wanted = reference.super_block_values(
        weight.double().numpy(), d, k, dmin, low, spec.bits, block.minima, block.group_size
    )
    assert np.array_equal(found.numpy(), wanted.astype(np.float32))


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_that_lie_on_a_grid_stay_where_they_are(grid):
    spec, block = named_spec(torch.float32, grid), SUPER_BLOCKS[grid]
    draw = torch.Generator().manual_seed(2)
    high = block.multiples[1]
    codes = torch.randint(spec.qmin, spec.qmax + 1, (2, 256), generator=draw, dtype=torch.int8)
    codes.view(2, -1, block.group_size)[:, :, :2] = torch.tensor([spec.qmin, spec.qmax], dtype=torch.int8)
    multiples = torch.randint(high // 2, high + 1, (2, block.groups), generator=draw)
    multiples[:, 0] = high
    scale = spread(torch.tensor([[0.5], [0.01]]).half(), multiples)
    weight = dequantize(codes, scale, scale if block.minima else None, spec, torch.float32)
    found, _, _ = on_grid(weight, spec)
    assert lost(weight, found) <= 1e-9 * float(weight.square().sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_stay_zeros_and_tiny_or_one_sided_groups_are_finite(grid):
    spec, weight = named_spec(torch.float32, grid), weights(4, 256)
    weight[0] = 0
    weight[1, :32] = 0
    weight[2] = weight[2].abs()
    weight[3] *= 1e-7
    found, scale, _ = on_grid(weight, spec)
    assert bool(found[0].eq(0).all())
    assert bool(found[1, :32].eq(0).all())
    assert bool(found.isfinite().all())
    assert bool(scale.ne(0).all())
    assert lost(weight[2], found[2]) < 0.1 * float(weight[2].square().sum())


def test_what_float16_does_not_hold_is_refused():
    spec = named_spec(torch.float32, "gguf-q2_k")
    with pytest.raises(CompressError, match="does not fit gguf-q2_k"):
        find_params(torch.full((1, 256), 1e8), spec)
    with pytest.raises(CompressError, match="NaN or infinite"):
        find_params(torch.full((1, 256), math.nan), spec)


def test_a_spec_with_super_blocks_takes_rows_of_whole_ones():
    spec = named_spec(torch.bfloat16, "gguf-q3_k")
    assert (spec.bits, spec.group_size, spec.symmetric, spec.scale_dtype) == (3, 16, True, "float32")
    with pytest.raises(StartError, match=r"super-blocks of 256.*288 columns.*`skip`.*gguf-q4_0, gguf-q4_1, gguf-q8_0"):
        spec.columns_per_group(288)
    with pytest.raises(StartError, match="scales on grid gguf-q3_k are float32"):
        QuantSpec(3, 16, grid="gguf-q3_k")


def test_a_whole_hessian_block_may_weigh_a_group():
    """With a diagonal block the error is that of the diagonal."""
    spec, weight = named_spec(torch.float32, "gguf-q2_k"), weights(2, 256)
    shares = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) + 0.1
    by_diagonal = find_super(weight.unflatten(1, (-1, 16)), spec, True, shares)
    by_block = find_super(weight.unflatten(1, (-1, 16)), spec, True, torch.diag_embed(shares))
    for one, other in zip(by_diagonal, by_block, strict=True):
        assert float((one - other).abs().mean()) < 1e-3 * float(one.abs().mean())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", ["gguf-q2_k", "gguf-q3_k"])
def test_gptq_on_the_grid_is_the_textbooks_to_the_points_of_that_grid(grid, act_order):
    spec, weight = named_spec(torch.float64, grid), weights(3, 256, 5).double()
    inputs = torch.from_numpy(reference.random_inputs(600, 256, 3))
    hessian = 2 * inputs.T @ inputs / 600
    found = gptq(weight, hessian, spec, act_order=act_order, search=True)
    ours = dequantize(found.codes, found.scale, found.zero, spec, torch.float64)
    block = spec.super_block
    points = reference.super_block_points(*parts_of(found.scale, found.zero, block), spec.bits, block.minima)
    # left to right, one super-block's grid is found from its weights as they are given: nothing came before it
    order = sorted(range(256), key=lambda c: -float(hessian[c, c])) if act_order else range(256)
    wanted = reference.gptq_to_points(weight.numpy(), hessian.numpy(), points, block.group_size, order)
    assert np.abs(ours.numpy() - wanted).max() < 1e-9
    nearest = dequantize(quantize(weight, found.scale, found.zero, spec), found.scale, found.zero, spec, torch.float64)
    change, plain = ours - weight, nearest - weight
    assert float((change @ hessian * change).sum()) < 0.8 * float((plain @ hessian * plain).sum())


def test_left_to_right_a_super_blocks_grid_is_found_from_corrected_weights():
    spec, weight = named_spec(torch.float64, "gguf-q2_k"), weights(2, 512, 6).double()
    hessian = torch.from_numpy(reference.random_hessian(512, 3))
    found = gptq(weight, hessian, spec, act_order=False, search=True)
    before = find_params(weight, spec, True, factorise(hessian, False, 0.01).pivots)
    assert torch.equal(found.scale[:, :16], before[0][:, :16])
    assert not torch.equal(found.scale[:, 16:], before[0][:, 16:])
    factored(found.scale, spec.super_block)
    factored(found.zero, spec.super_block)
