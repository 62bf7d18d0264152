"""The package's maths against tests/reference.py: on numbers worked out by hand, and on random ones.

Tolerances are those of the arithmetic, not of taste. An operation in float32 has a relative error of at most 2^-24
(`ULP`), so a scale may differ from the float64 one only if the exact value is that near to a rounding boundary of
the type it is stored in, and a code only if the exact quotient is that near to a tie. Given float64 weights, nothing
may differ at all.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
import torch

from compress.errors import CompressError
from compress.maths.grid import QuantSpec, dequantize
from compress.maths.hessian import Hessian, triangular_root
from compress.maths.masks import nm_mask, unstructured_mask
from compress.maths.packing import pack, pack_rows, unpack, unpack_rows
from compress.passes.gptq import gptq
from compress.passes.rtn import round_to_nearest
from compress.passes.wanda import ColumnNorms, wanda_scores

ULP = 2.0**-24
BITS = (2, 3, 4, 8)
GROUPS_OF_30 = (-1, 30, 15, 6, 5, 1)
all_grids = pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product(BITS, (True, False))))
either_order = pytest.mark.parametrize("act_order", [False, True])


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(reference.random_weight(rows, columns, seed))


def random_hessian(columns: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(reference.random_hessian(columns, seed))


def as_zero(zero: torch.Tensor | None, scale: torch.Tensor) -> np.ndarray:
    """The zero points as the reference has them: int64, and 0 where the grid has none."""
    return np.zeros(tuple(scale.shape), dtype=np.int64) if zero is None else zero.long().numpy()


def float64_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_references_float_types_are_those_of_torch(dtype):
    values = [(-1) ** k * math.ldexp(1 + k / 4096, exponent) for exponent in range(-24, 15) for k in range(0, 4096, 61)]
    values += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65504.0, 2.0**-24, 2.0**-25]
    cast = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)).double().tolist()
    assert [reference.round_to_float(value, dtype) for value in values] == cast
    smallest = torch.tensor([reference.smallest_float(dtype)], dtype=torch.float64)
    assert torch.cat([smallest, smallest / 2]).to(getattr(torch, dtype)).double().tolist() == [smallest.item(), 0.0]


def test_the_references_elimination_equals_inverting_the_hessian_of_the_columns_that_are_left():
    matrix = reference.damped(reference.random_hessian(7, 0), 0.01)
    remaining = reference.inverse(matrix)
    np.testing.assert_allclose(remaining @ matrix, np.eye(7), atol=1e-12)
    for column in range(6):
        remaining = remaining - np.outer(remaining[:, column], remaining[column]) / remaining[column, column]
        left = slice(column + 1, 7)
        np.testing.assert_allclose(remaining[left, left], reference.inverse(matrix[left, left]), rtol=1e-10)


def test_the_references_quality_measures_by_hand():
    # Two tokens, logits (0, ln 3): probabilities 1/4 and 3/4.
    logits = np.array([[[0.0, math.log(3)], [0.0, math.log(3)], [5.0, 5.0]]])
    assert reference.perplexity(logits, np.array([[0, 1, 0]])) == pytest.approx(math.sqrt(4 / 3 * 4), rel=1e-14)
    other = np.array([[0.0, 0.0], [math.log(3), 0.0], [5.0, 5.0]])
    expected = [0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.25 * math.log(1 / 3) + 0.75 * math.log(3), 0.0]
    np.testing.assert_allclose(reference.kl_divergence(logits[0], other), expected, atol=1e-15)
    assert reference.top1_agreement(logits[0], other) == pytest.approx(1 / 3)


def test_symmetric_rounding_by_hand():
    # Group 1: absmax 7.5, scale 7.5 * 2/15 = 1. Ties go to even, 7.5 rounds to 8 and is clamped to 7.
    # Group 2: absmax 3, scale 0.4 -> 0.39990234375 in float16.
    weight = torch.tensor([[7.5, -7.5, 0.5, 1.5, -2.5, 0.49, 3.0, -1.0, 0.19, 0.21, 0.0, -3.0]], dtype=torch.float64)
    codes, scale, zero = round_to_nearest(weight, QuantSpec(bits=4, group_size=6, symmetric=True))
    assert float64_of(scale).tolist() == [[1.0, 0.39990234375]]
    # 3 / 0.3999 = 7.502 -> 8 -> 7; -3 -> -8; 1 -> 2.5006 -> 3
    assert codes.tolist() == [[7, -8, 0, 2, -2, 0, 7, -3, 0, 1, 0, -8]]
    assert zero is None or not zero.any()


def test_asymmetric_rounding_by_hand():
    # Group 1: min -1, max 2, scale 3/3 = 1, zero = -2 + 1 = -1: the grid is -1, 0, 1, 2. 0.5 is a tie, 0 is even.
    # Group 2: all positive, so the range starts at 0: scale 2, zero -2, the grid is 0, 2, 4, 6.
    # Group 3: all negative: min -3, max 0, scale 1, zero 1, the grid is -3, -2, -1, 0.
    weight = torch.tensor([[-1.0, 2.0, 0.5, 6.0, 2.9, 3.1, -3.0, -1.4, -1.6]], dtype=torch.float64)
    spec = QuantSpec(bits=2, group_size=3, symmetric=False)
    codes, scale, zero = round_to_nearest(weight, spec)
    assert float64_of(scale).tolist() == [[1.0, 2.0, 1.0]]
    assert zero.tolist() == [[-1, -2, 1]]
    assert codes.tolist() == [[-2, 1, -1, 1, -1, 0, -2, 0, -1]]
    values = dequantize(codes, scale, zero, spec, torch.float32)
    assert values.tolist() == [[-1.0, 2.0, 0.0, 6.0, 2.0, 4.0, -3.0, -1.0, -2.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric):
    spec = QuantSpec(bits=3, group_size=2, symmetric=symmetric)
    codes, scale, zero = round_to_nearest(torch.tensor([[0.0, 0.0, 1.0, -2.0]]), spec)
    assert dequantize(codes, scale, zero, spec, torch.float32)[0, :2].tolist() == [0.0, 0.0]
    assert codes[0, :2].tolist() == [0, 0]
    assert float(scale[0, 0]) == 1.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_too_small_for_a_float16_scale_do_not_grow_and_weights_too_large_are_refused(symmetric):
    spec = QuantSpec(bits=4, group_size=-1, symmetric=symmetric)
    weight = torch.tensor([[1.0, -0.5, 0.33]])
    for size in (1e-6, 1e-9, 1e-30):
        assert float(round_to_nearest(weight * size, spec)[1].min()) > 0
        values = dequantize(*round_to_nearest(weight * size, spec), spec, torch.float64)
        assert (values.abs() <= size).all()
    for size in (2e6, 1e30):
        with pytest.raises(CompressError, match="float16"):
            round_to_nearest(weight * size, spec)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@all_grids
def test_rounding_float32_differs_from_float64_only_where_float32_cannot_tell(bits, symmetric, scale_dtype):
    for seed, group_size in enumerate(GROUPS_OF_30):
        weight = random_weight(5, 30, seed).float()
        spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        codes, scale, zero = round_to_nearest(weight, spec)
        assert scale.dtype == getattr(torch, scale_dtype)
        width = reference.width_of(30, group_size)
        stored, offset = float64_of(scale), as_zero(zero, scale)
        for row, group in itertools.product(range(5), range(30 // width)):
            values = weight[row, group * width : (group + 1) * width].double().tolist()
            # Two roundings, of the difference or product and of the quotient, before that to the stored type.
            least, most = reference.scales_within(values, bits, symmetric, scale_dtype, 2 * ULP)
            step, shift = stored[row, group], int(offset[row, group])
            assert least <= step <= most
            assert shift in ({0} if symmetric else reference.zeros_within(values, step, bits, 2 * ULP))
            for column, value in enumerate(values, start=group * width):
                assert int(codes[row, column]) in reference.codes_within(value, step, shift, bits, 2 * ULP)


@all_grids
def test_rounding_float64_equals_the_reference(bits, symmetric):
    for seed, (group_size, dtype) in enumerate(itertools.product(GROUPS_OF_30, ("float16", "bfloat16", "float32"))):
        weight = random_weight(5, 30, seed)
        spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
        codes, scale, zero = round_to_nearest(weight, spec)
        expected = reference.round_to_nearest(weight.numpy(), bits, group_size, symmetric, dtype)
        np.testing.assert_array_equal(float64_of(scale), expected[1])
        np.testing.assert_array_equal(as_zero(zero, scale), expected[2])
        np.testing.assert_array_equal(codes.long().numpy(), expected[0])
        values = dequantize(codes, scale, zero, spec, torch.float64)
        np.testing.assert_array_equal(values.numpy(), reference.dequantize(*expected))


def test_hessian_by_hand():
    # Tokens (1, 2), (3, -1), (0, 1): X X^T = [[10, -1], [-1, 6]], times 2/3.
    hessian = Hessian(2)
    hessian.add(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    hessian.add(torch.tensor([[0.0, 1.0]]))
    expected = [[20 / 3, -2 / 3], [-2 / 3, 4.0]]
    np.testing.assert_allclose(float64_of(hessian.matrix), expected, rtol=4 * ULP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[64], [1, 40, 3, 20], [16] * 4])
def test_hessian_of_any_batches_equals_the_reference(sizes, dtype):
    inputs = torch.from_numpy(reference.random_inputs(64, 11, 5)).to(dtype)
    hessian = Hessian(11)
    for batch in inputs.split(sizes):
        hessian.add(batch)
    expected = reference.hessian(float64_of(inputs))
    # A float32 sum of n products is off by at most (n + 1) ULP of the sum of their absolute values; each batch
    # adds a few roundings more for the running mean.
    bound = (64 + 1 + 4 * len(sizes)) * ULP * reference.hessian(np.abs(float64_of(inputs)))
    assert (np.abs(float64_of(hessian.matrix) - expected) <= bound).all()


def test_triangular_root_is_the_inverse_of_an_upper_factor_of_the_inverse_of_the_damped_hessian():
    matrix = random_hessian(13, 3)
    root, used = triangular_root(matrix, 0.01)
    assert used == 0.01
    assert torch.equal(root, root.triu())
    factor = reference.inverse(root.numpy())
    expected = reference.inverse(reference.damped(matrix.numpy(), 0.01))
    np.testing.assert_allclose(factor.T @ factor, expected, rtol=1e-9, atol=1e-12)


def test_damping_rises_tenfold_when_the_hessian_is_not_positive_definite():
    # Eigenvalues 2.05 and -0.05, mean diagonal 1: 0.01 is too little, 0.1 is enough.
    matrix = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    root, used = triangular_root(matrix, 0.01)
    assert used == pytest.approx(0.1)
    np.testing.assert_allclose((root @ root.T).numpy(), np.array([[1.1, 1.05], [1.05, 1.1]]), rtol=1e-9)


def gptq_codes(weight, matrix, spec, **options):
    """(codes, scale, zero) of the package's GPTQ as the reference has them."""
    result = gptq(weight, matrix, spec, **options)
    return result.codes.long().numpy(), float64_of(result.scale), as_zero(result.zero, result.scale)


def test_gptq_by_hand():
    # Scale 1. The first weight is rounded from 0.4 to 0; H^-1 of the first two columns is [[2, -1], [-1, 2]] / 3,
    # so the second becomes 0.4 + 0.4 / (2/3) / 3 = 0.6 and is rounded to 1. Plain rounding gives 0. Output errors:
    # GPTQ 2*0.16 - 2*0.4*0.6 + 2*0.36 = 0.56, rounding 3 * 2*0.16 = 0.96, and both 0.25 for the third.
    weight = torch.tensor([[0.4, 0.4, -1.5]], dtype=torch.float64)
    matrix = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    spec = QuantSpec(bits=2, group_size=-1, symmetric=True)
    codes, scale, zero = gptq_codes(weight, matrix, spec, act_order=False, damping=0.0)
    assert (codes.tolist(), scale.tolist()) == ([[0, 1, -2]], [[1.0]])
    assert round_to_nearest(weight, spec)[0].tolist() == [[0, 0, -2]]
    error = reference.output_error(weight.numpy(), reference.dequantize(codes, scale, zero), matrix.numpy())
    assert error == pytest.approx(0.56 + 0.25)
    # With activation order, and a Hessian whose second column has the largest diagonal: that goes first, 0.3 -> 0,
    # and the first becomes 0.4 + 0.3 * 0.5/1 = 0.55 -> 1. From left to right 0.4 -> 0, then 0.3 + 0.4 * 0.5/4 -> 0.
    weight[0, 1] = 0.3
    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.5, 4.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    assert gptq_codes(weight, matrix, spec, act_order=True, damping=0.0)[0].tolist() == [[1, 0, -2]]
    assert gptq_codes(weight, matrix, spec, act_order=False, damping=0.0)[0].tolist() == [[0, 0, -2]]


def test_gptq_finds_a_groups_grid_from_the_corrected_weights_and_with_act_order_from_the_given_ones():
    # Columns 0 and 2 are coupled: rounding 0.4 to 0 moves 1.3 to 1.5, which makes the second group's scale 1.
    # From the weights as given it is 1.3 * 2/3 = 0.8667, in float16 0.86669921875.
    weight = torch.tensor([[0.4, -1.5, 1.3, 0.1]], dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64) * 2
    matrix[0, 2] = matrix[2, 0] = 1.0
    spec = QuantSpec(bits=2, group_size=2, symmetric=True)
    for block_size in (1, 2, 3, 128):
        options = {"damping": 0.0, "block_size": block_size}
        assert gptq_codes(weight, matrix, spec, act_order=False, **options)[1].tolist() == [[1.0, 1.0]]
        assert gptq_codes(weight, matrix, spec, act_order=True, **options)[1].tolist() == [[1.0, 0.86669921875]]


@either_order
@all_grids
def test_gptq_in_float64_equals_the_unblocked_reference(bits, symmetric, act_order):
    # Group sizes that fit into the block, are larger than it, and begin in the middle of it.
    for seed, group_size in enumerate(GROUPS_OF_30):
        weight, matrix = random_weight(8, 30, seed), random_hessian(30, seed)
        spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
        expected = reference.gptq(weight.numpy(), matrix.numpy(), bits, group_size, symmetric, act_order, 0.01)
        for block_size in (1, 7, 10, 128):
            found = gptq_codes(weight, matrix, spec, act_order=act_order, damping=0.01, block_size=block_size)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=f"group {group_size}, block {block_size}")


@either_order
@all_grids
def test_gptq_in_float32_loses_nothing_against_the_reference(bits, symmetric, act_order):
    # In float32 a weight may land on the other side of a tie, or a corrected group's scale on the next float16
    # number, and what follows in that row differs as well. Of these 1536 codes one may; the error hardly moves.
    weight, matrix = random_weight(24, 64, bits), random_hessian(64, bits)
    spec = QuantSpec(bits=bits, group_size=16, symmetric=symmetric)
    options = {"act_order": act_order, "damping": 0.01, "block_size": 24}
    codes, scale, zero = gptq_codes(weight.float(), matrix.float(), spec, **options)
    expected = reference.gptq(weight.numpy(), matrix.numpy(), bits, 16, symmetric, act_order, 0.01)
    assert (codes == expected[0]).mean() >= 0.999
    error = reference.output_error(weight.numpy(), reference.dequantize(codes, scale, zero), matrix.numpy())
    best = reference.output_error(weight.numpy(), reference.dequantize(*expected), matrix.numpy())
    assert error == pytest.approx(best, rel=1e-3)


@either_order
@pytest.mark.parametrize("group_size", [-1, 5])
def test_gptq_on_a_diagonal_hessian_is_plain_rounding_even_where_weights_lie_between_two_codes(group_size, act_order):
    # The lower six rows are multiples of 0.5 from -3.5 to 4: 83 ties in 2 and 3 bits, 29 of them on a grid with an
    # odd zero point, where it matters whether the zero is added before or after rounding.
    weight = torch.cat([random_weight(6, 30, 2), (random_weight(6, 30, 3) * 4).round().clamp(-7, 8) / 2])
    matrix = torch.diag(torch.linspace(0.1, 3.0, 30, dtype=torch.float64))
    for bits, symmetric in itertools.product(BITS, (True, False)):
        spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
        found = gptq_codes(weight, matrix, spec, act_order=act_order, damping=0.01, block_size=8)
        plain = round_to_nearest(weight, spec)
        expected = reference.round_to_nearest(weight.numpy(), bits, group_size, symmetric)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(plain[0].long().numpy(), expected[0])


@either_order
def test_gptq_takes_an_input_that_is_always_zero_for_what_it_is(act_order):
    # Features 1 and 4 never fire. What becomes of their weights has no effect; the others must come out as if the
    # dead columns were not there.
    weight, matrix = random_weight(4, 6, 0), random_hessian(6, 0)
    live = [0, 2, 3, 5]
    for dead in (1, 4):
        matrix[dead], matrix[:, dead] = 0.0, 0.0
        weight[:, dead] *= 0.01  # so that they do not set the scale
    spec = QuantSpec(bits=3, group_size=-1, symmetric=True)
    alive = matrix[live][:, live].numpy()
    for damping in (0.0, 0.01):
        result = gptq(weight, matrix, spec, act_order=act_order, damping=damping)
        expected = reference.gptq(weight[:, live].numpy(), alive, 3, -1, True, act_order, damping)
        np.testing.assert_array_equal(result.codes[:, live].numpy(), expected[0])
        assert result.damping == damping


def test_the_optimum_is_no_worse_than_gptq_and_gptq_on_average_better_than_rounding():
    spec = QuantSpec(bits=2, group_size=-1, symmetric=True)
    optimum, second_order, plain = [], [], []
    for seed in range(60):
        weight, inputs = random_weight(1, 3, seed), reference.random_inputs(12, 3, seed)
        matrix = reference.hessian(inputs)
        codes, scale, zero = gptq_codes(weight, torch.from_numpy(matrix), spec, act_order=True, damping=0.0)
        optimum.append(reference.best_codes(weight[0].numpy(), matrix, scale[0, 0], 0, 2)[1])
        second_order.append(reference.output_error(weight.numpy(), reference.dequantize(codes, scale, zero), matrix))
        rounded = reference.round_to_nearest(weight.numpy(), 2, -1, True)
        assert rounded[1] == scale  # the same grid for all three
        plain.append(reference.output_error(weight.numpy(), reference.dequantize(*rounded), matrix))
        assert optimum[-1] <= second_order[-1] * (1 + 1e-12)
    assert np.mean(optimum) < np.mean(second_order) < 0.9 * np.mean(plain)


def test_masks_by_hand():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert unstructured_mask(scores, 0.5, per="row").int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert unstructured_mask(scores, 0.5, per="layer").int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert nm_mask(scores, 1, 2).int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert nm_mask(scores, 3, 4).int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.58, 0.95])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_unstructured_masks_equal_the_sorted_reference(per, sparsity):
    for seed in range(4):
        weight = random_weight(4, (20, 50, 100, 7)[seed], seed).float()
        expected = reference.unstructured_keep(reference.magnitude_scores(weight.numpy()), sparsity, per)
        np.testing.assert_array_equal(unstructured_mask(weight.abs(), sparsity, per=per).numpy(), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (2, 5)])
def test_nm_masks_equal_the_sorted_reference(n, m):
    scores = random_weight(6, 40, m).float().abs()
    np.testing.assert_array_equal(nm_mask(scores, n, m).numpy(), reference.nm_keep(float64_of(scores), n, m))


def test_equal_scores_leave_the_count_exact_and_the_order_by_index():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.0], [0.0] * 8])
    for per, sparsity in itertools.product(("row", "layer"), (0.25, 0.5, 0.75)):
        expected = reference.unstructured_keep(float64_of(scores), sparsity, per)
        np.testing.assert_array_equal(unstructured_mask(scores, sparsity, per=per).numpy(), expected)
    for n in (1, 2, 3):
        np.testing.assert_array_equal(nm_mask(scores, n, 4).numpy(), reference.nm_keep(float64_of(scores), n, 4))


def test_wanda_scores_by_hand_and_at_random():
    # Feature norms 5 and 1: the weight 2 on the second counts for less than the weight -0.5 on the first.
    inputs = np.array([[3.0, 0.0], [-4.0, 1.0]])
    assert reference.wanda_scores(np.array([[-0.5, 2.0]]), inputs).tolist() == [[2.5, 2.0]]
    assert wanda_scores(torch.tensor([[-0.5, 2.0]]), torch.tensor([5.0, 1.0])).tolist() == [[2.5, 2.0]]
    for seed in range(4):
        weight, features = random_weight(6, 16, seed).float(), reference.random_inputs(40, 16, seed)
        expected = reference.wanda_scores(float64_of(weight), features)
        inputs = ColumnNorms(16)
        for batch in torch.from_numpy(features).float().split([13, 1, 26]):
            inputs.add(batch)
        scores = wanda_scores(weight, inputs.norms)
        # A float32 sum of n squares is off by at most n ULP, its root by half of that, and a few roundings follow.
        np.testing.assert_allclose(float64_of(scores), expected, rtol=(26 / 2 + 4) * ULP)
        for per in ("row", "layer"):
            keep = unstructured_mask(scores, 0.5, per=per).numpy()
            np.testing.assert_array_equal(keep, reference.unstructured_keep(expected, 0.5, per))
        np.testing.assert_array_equal(nm_mask(scores, 2, 4).numpy(), reference.nm_keep(expected, 2, 4))


def test_packing_by_hand():
    # Offset to unsigned: 0, 1, 15, 8, 9, 7, 10, 11, the first in the lowest four bits: 0xBA798F10.
    codes = torch.tensor([[-8, -7, 7, 0, 1, -1, 2, 3]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xBA798F10 - 2**32]]
    # Eleven 3-bit codes are 33 bits: the last (unsigned 7) has two bits in the first word and one in the second.
    codes = torch.tensor([[-4] * 10 + [3]], dtype=torch.int8)
    assert pack(codes, 3).tolist() == [[0xC0000000 - 2**32, 1]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_equals_the_reference_for_any_number_of_columns(bits):
    generator = torch.Generator().manual_seed(bits)
    low, high = reference.code_range(bits)
    for columns in (1, 5, 10, 11, 31, 32, 33, 64, 75):
        codes = torch.randint(low, high + 1, (4, columns), generator=generator).to(torch.int8)
        codes[0], codes[1] = low, high
        packed = pack(codes, bits)
        assert packed.dtype == torch.int32
        expected = [reference.pack_row(row, bits) for row in codes.tolist()]
        assert packed.tolist() == expected
        assert [reference.unpack_row(words, bits, columns) for words in expected] == codes.tolist()
        assert torch.equal(unpack(packed, bits, columns), codes)
        assert pack_rows(codes.T, bits).T.tolist() == expected
        assert torch.equal(unpack_rows(packed.T, bits, columns), codes.T)
