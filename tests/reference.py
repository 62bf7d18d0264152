"""The methods as their papers define them, written slowly in float64, to hold the fast code against.

Nothing here shares a line with the package or is meant to be quick. One value or one column is treated at a
time, matrices are inverted by elimination, packed words are built from Python's integers, and every function says
which definition it follows. Arrays are numpy float64 (codes are int64); a weight is [out, in], inputs are
[tokens, in].
"""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import torch

# --------------------------------------------------------------------------------------------- rounding grids

# name: (bits of the significand, exponent of the smallest normal number), IEEE 754 and bfloat16.
_FLOATS = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}


def round_to_float(value: float, dtype: str) -> float:
    """The number of type `dtype` nearest to `value`, ties to even, from the definition of the type."""
    if value == 0.0 or dtype == "float64":
        return value
    digits, smallest = _FLOATS[dtype]
    exponent = math.frexp(value)[1] - 1  # 2^exponent <= |value| < 2^(exponent+1)
    step = 2.0 ** (max(exponent, smallest) - digits + 1)
    return round(value / step) * step  # a division by a power of two is exact; round() takes ties to even


def smallest_float(dtype: str) -> float:
    """The smallest number above 0 of type `dtype` (subnormal)."""
    digits, smallest = _FLOATS[dtype]
    return 2.0 ** (smallest - digits + 1)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid_of(values: list[float], bits: int, symmetric: bool, scale_dtype: str) -> tuple[float, int]:
    """Scale and zero point for the values of one group.

    symmetric: the whole code range spans [-absmax, absmax], so scale = 2 absmax / (2^bits - 1), zero point 0.
    asymmetric: the code range spans [min, max], widened to hold 0, so that 0 is stored exactly.
    The scale is rounded to the type it is stored in, and what is derived from it uses the stored value. It is never 0:
    1 for a group of zeros, and the smallest number of the type where the scale would be rounded to 0.
    """
    least, most = min(0.0, *values), max(0.0, *values)
    if least == most:
        return 1.0, 0
    low, high = code_range(bits)
    span = 2 * max(-least, most) if symmetric else most - least
    scale = round_to_float(span / (2**bits - 1), scale_dtype) or smallest_float(scale_dtype)
    zero = 0 if symmetric else min(max(round(low - least / scale), low), high)
    return scale, zero


def code_of(value: float, scale: float, zero: int, bits: int) -> int:
    """The code whose (code - zero) * scale is nearest to `value`; ties to even, before the zero is added."""
    low, high = code_range(bits)
    return min(max(round(value / scale) + zero, low), high)


def width_of(columns: int, group_size: int) -> int:
    """Columns per group; -1 is one group per row."""
    return columns if group_size == -1 else group_size


def scales_within(
    values: list[float], bits: int, symmetric: bool, scale_dtype: str, slack: float
) -> tuple[float, float]:
    """Smallest and largest scale `grid_of` may give if it is off by `slack` (relative) before it is rounded."""
    span = 2 * max(abs(value) for value in values) if symmetric else max(0.0, *values) - min(0.0, *values)
    exact = span / (2**bits - 1)
    return round_to_float(exact * (1 - slack), scale_dtype), round_to_float(exact * (1 + slack), scale_dtype)


def zeros_within(values: list[float], scale: float, bits: int, slack: float) -> set[int]:
    """The zero points `grid_of` may give if the quotient and the difference are off by `slack` (relative)."""
    low, high = code_range(bits)
    ideal = low - min(0.0, *values) / scale
    room = slack * (abs(ideal) + 2**bits)
    return {min(max(round(ideal + sign * room), low), high) for sign in (-1, 0, 1)}


def codes_within(value: float, scale: float, zero: int, bits: int, slack: float) -> set[int]:
    """The codes `code_of` may give if the quotient, and the sum with the zero point, are off by `slack`."""
    room = slack * (abs(value / scale) + abs(zero)) * scale
    return {code_of(value + sign * room, scale, zero, bits) for sign in (-1, 0, 1)}


def find_params(
    weight: np.ndarray, bits: int, group_size: int, symmetric: bool, scale_dtype: str = "float16"
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [out, groups] of every group of `width_of` consecutive columns."""
    rows, columns = weight.shape
    width = width_of(columns, group_size)
    assert columns % width == 0
    scale = np.zeros((rows, columns // width))
    zero = np.zeros((rows, columns // width), dtype=np.int64)
    for row in range(rows):
        for group in range(columns // width):
            values = [float(value) for value in weight[row, group * width : (group + 1) * width]]
            scale[row, group], zero[row, group] = grid_of(values, bits, symmetric, scale_dtype)
    return scale, zero


def quantize(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] of the nearest grid values."""
    rows, columns = weight.shape
    width = columns // scale.shape[1]
    codes = np.zeros((rows, columns), dtype=np.int64)
    for row in range(rows):
        for column in range(columns):
            group = column // width
            codes[row, column] = code_of(float(weight[row, column]), scale[row, group], int(zero[row, group]), bits)
    return codes


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Grid values (code - zero) * scale, [out, in]."""
    rows, columns = codes.shape
    width = columns // scale.shape[1]
    values = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = column // width
            values[row, column] = (int(codes[row, column]) - int(zero[row, group])) * scale[row, group]
    return values


def round_to_nearest(
    weight: np.ndarray, bits: int, group_size: int, symmetric: bool, scale_dtype: str = "float16"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale, zero) of plain rounding."""
    scale, zero = find_params(weight, bits, group_size, symmetric, scale_dtype)
    return quantize(weight, scale, zero, bits), scale, zero


# ---------------------------------------------------------------------------------------------- 8-bit inputs


def e4m3_numbers() -> list[float]:
    """Every finite number of 4 exponent and 3 fraction bits from 0 up (Micikevicius et al. 2022, table 1).

    Exponent bias 7; exponent 0 is subnormal; the code with all ones is NaN, and there is no infinity.
    """
    numbers = []
    for exponent in range(16):
        for fraction in range(8):
            if (exponent, fraction) != (15, 7):
                numbers.append((fraction / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7))
    return numbers


def round_to_e4m3(value: float) -> float:
    """The nearest of those numbers, and the one whose last fraction bit is 0 of two that are as near."""
    size = min(abs(value), 448.0)
    numbers = e4m3_numbers()
    index = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - size), i % 2))
    return math.copysign(numbers[index], value)


def round_to_type(value: float, kind: str) -> float:
    """The nearest code of 8 bits: "int8" (-128 .. 127, ties to even) or "float8"."""
    return round_to_e4m3(value) if kind == "float8" else float(min(max(round(value), -128), 127))


def rounded_rows(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Each row (a token of an input, or a channel of a weight) rounded with a scale of its own: its largest magnitude
    over half the span of the codes, 255 / 2 or 448."""
    half = 448.0 if kind == "float8" else 255 / 2
    result = np.zeros_like(matrix, dtype=np.float64)
    for index, row in enumerate(matrix):
        scale = max(abs(float(value)) for value in row) / half
        result[index] = [round_to_type(float(value) / scale, kind) * scale if scale else 0.0 for value in row]
    return result


def smoothing_scale(inputs: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """`s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (Xiao et al. 2022, equation 4).

    inputs [tokens, in]; weights [out, in], all the layers that are given these inputs.
    """
    scale = np.zeros(inputs.shape[1])
    for column in range(inputs.shape[1]):
        largest = max(abs(float(value)) for value in inputs[:, column])
        weight = max(abs(float(value)) for matrix in weights for value in matrix[:, column])
        scale[column] = largest**alpha / weight ** (1 - alpha)
    return scale


# ----------------------------------------------------------------------------------------------- second order


def hessian(inputs: np.ndarray) -> np.ndarray:
    """H = (2/n) X X^T over the n tokens of `inputs` [n, in]: the Hessian of the mean squared output error."""
    tokens, columns = inputs.shape
    total = np.zeros((columns, columns))
    for token in range(tokens):
        total += 2.0 / tokens * np.outer(inputs[token], inputs[token])
    return total


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse by Gauss-Jordan elimination with row exchange."""
    size = len(matrix)
    work = np.hstack([matrix.astype(np.float64), np.eye(size)])
    for column in range(size):
        pivot = column + int(np.argmax(np.abs(work[column:, column])))
        work[[column, pivot]] = work[[pivot, column]]
        work[column] /= work[column, column]
        for row in range(size):
            if row != column:
                work[row] -= work[row, column] * work[column]
    return work[:, size:]


def damped(matrix: np.ndarray, damping: float) -> np.ndarray:
    """H + damping * mean(diag H) * I (Frantar et al. 2022, section 3.3, step 3)."""
    mean = sum(matrix[column, column] for column in range(len(matrix))) / len(matrix)
    return matrix + damping * mean * np.eye(len(matrix))


def gptq(
    weight: np.ndarray,
    matrix: np.ndarray,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool = False,
    damping: float = 0.01,
    scale_dtype: str = "float16",
    deviation: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale, zero) by GPTQ without blocks and Cholesky (Frantar et al. 2022, equations 2 and 3).

    F is the set of columns not yet rounded, B the inverse of the Hessian over F. For the next column q of the
    order, in every row: round w_q, then move the rest by  w_F -= (w_q - round(w_q)) / B_qq * B_q,F  and take q out
    of B by one step of elimination,  B -= B_:,q B_q,: / B_qq.
    act_order: columns by falling diagonal of the Hessian (the earlier of equals first), all grids from the weights
    as given. Otherwise columns from left to right, and the grid of a group from its weights as they are, with all
    the corrections so far, when its first column comes.
    deviation: D = (2/n) (X - X~) X~^T, [in, in], for GPTAQ (Li et al. 2025): when column q is done, the columns F that
    are left also take on  w_q D_q,F (H_FF)^-1,  the least-squares answer to what the change of input q costs.
    """
    rows, columns = weight.shape
    width = width_of(columns, group_size)
    hessian_damped = damped(matrix, damping)
    work = weight.astype(np.float64).copy()
    remaining = inverse(damped(matrix, damping))
    scale, zero = find_params(work, bits, group_size, symmetric, scale_dtype)
    order = sorted(range(columns), key=lambda column: -matrix[column, column]) if act_order else list(range(columns))
    codes = np.zeros((rows, columns), dtype=np.int64)
    left = set(range(columns))
    for column in order:
        group = column // width
        if not act_order and column % width == 0:
            span = work[:, column : column + width]
            found = find_params(span, bits, -1, symmetric, scale_dtype)
            scale[:, group], zero[:, group] = found[0][:, 0], found[1][:, 0]
        error = np.zeros(rows)
        for row in range(rows):
            code = code_of(float(work[row, column]), scale[row, group], int(zero[row, group]), bits)
            codes[row, column] = code
            error[row] = work[row, column] - (code - zero[row, group]) * scale[row, group]
        left.remove(column)
        if deviation is not None and left:
            after = sorted(left)
            carried = deviation[column, after] @ inverse(hessian_damped[np.ix_(after, after)])
            work[:, after] += np.outer(work[:, column], carried)
        for other in left:
            work[:, other] -= error / remaining[column, column] * remaining[column, other]
        remaining = remaining - np.outer(remaining[:, column], remaining[column, :]) / remaining[column, column]
    return codes, scale, zero


def output_error(weight: np.ndarray, quantized: np.ndarray, matrix: np.ndarray) -> float:
    """Sum over rows of (w - q) H (w - q)^T: twice the mean squared change of the layer's outputs."""
    total = 0.0
    for row in range(len(weight)):
        change = weight[row].astype(np.float64) - quantized[row]
        total += float(change @ matrix @ change)
    return total


def best_codes(row: np.ndarray, matrix: np.ndarray, scale: float, zero: int, bits: int) -> tuple[list[int], float]:
    """The codes of the least (w - q) H (w - q)^T for a row on one grid, by trying all of them, and that error."""
    low, high = code_range(bits)
    best: tuple[list[int], float] = ([], math.inf)
    for codes in itertools.product(range(low, high + 1), repeat=len(row)):
        quantized = np.array([[(code - zero) * scale for code in codes]])
        error = output_error(row[None, :], quantized, matrix)
        if error < best[1]:
            best = (list(codes), error)
    return best


def awq_scale(inputs: np.ndarray, exponent: float) -> np.ndarray:
    """s_j = mean|x_j|^a (Lin et al. 2023, equation 5), over sqrt(max s * min s), as the authors' code divides it."""
    tokens, columns = inputs.shape
    scale = [math.fsum(abs(float(x)) for x in inputs[:, column]) / tokens for column in range(columns)]
    scale = [value**exponent for value in scale]
    return np.array([value / math.sqrt(max(scale) * min(scale)) for value in scale])


def awq_error(
    weight: np.ndarray, inputs: np.ndarray, scale: np.ndarray, bits: int, group_size: int, symmetric: bool
) -> float:
    """Sum over tokens and outputs of (Q(W diag(s)) (x / s) - W x)^2 (equation 4)."""
    codes, steps, zero = round_to_nearest(weight * scale, bits, group_size, symmetric)
    rounded = dequantize(codes, steps, zero)
    total = 0.0
    for token in inputs:
        total += float(((rounded @ (token / scale) - weight @ token) ** 2).sum())
    return total


def group_output_error(weight: np.ndarray, quantized: np.ndarray, inputs: np.ndarray) -> float:
    """Sum over tokens of the squared change of what one group of one row adds to the output."""
    return math.fsum(float(((weight - quantized) * token).sum()) ** 2 for token in inputs)


# ------------------------------------------------------------------------------------------------------ low rank


def trained_correction(weight, aim, inputs, left, right, scaling, rate, order):
    """Hu et al. 2021, LoRA, section 4.1, trained by Adam (Kingma and Ba 2015, algorithm 1) to give a layer's outputs.

    y = (W + s B A) x, the loss is the mean of (y - W* x)^2 over a batch of `inputs` [tokens, in], the batches taken in
    `order`, the rate falling from `rate` to 0 in a straight line. Returns (B, A).
    """
    first, second, tiny = 0.9, 0.95, 1e-15
    values = [left.astype(np.float64).copy(), right.astype(np.float64).copy()]
    means = [np.zeros_like(value) for value in values]
    squares = [np.zeros_like(value) for value in values]
    for step, batch in enumerate(order):
        x = inputs[batch].astype(np.float64)
        b, a = values
        lost = x @ (weight + scaling * b @ a - aim).T
        to_product = 2 * lost.T @ x / lost.size  # [out, in]: d loss / d (W + s B A)
        gradients = [scaling * to_product @ a.T, scaling * b.T @ to_product]
        for place, gradient in enumerate(gradients):
            means[place] = first * means[place] + (1 - first) * gradient
            squares[place] = second * squares[place] + (1 - second) * gradient**2
            mean = means[place] / (1 - first ** (step + 1))
            square = squares[place] / (1 - second ** (step + 1))
            values[place] = values[place] - rate * (1 - step / len(order)) * mean / (np.sqrt(square) + tiny)
    return tuple(values)


# --------------------------------------------------------------------------------------------- half-quadratic


def shrunk(error: float, beta: float, p: float) -> float:
    """Badri and Shaji 2023, the generalised soft threshold: sign(x) max(0, |x| - |x|^(p-1) / beta)."""
    if error == 0.0:
        return 0.0
    return math.copysign(max(0.0, abs(error) - abs(error) ** (p - 1) / beta), error)


def half_quadratic_group(
    values: list[float],
    scale: float,
    zero: int,
    bits: int,
    symmetric: bool,
    p: float,
    beta: float,
    kappa: float,
    turns: int,
    scale_dtype: str,
) -> tuple[float, int]:
    """Scale and zero point of one group after half-quadratic splitting from those given.

    Each turn: (1) codes of the nearest grid values r; (2) e = shrunk(w - r); (3) grid of least squares for w - e, the
    codes fixed; (4) beta <- kappa beta. The paper fits a real zero point to a fixed scale in (3). Here slope and
    intercept of the line through (code, w - e) are fitted, the zero point is the nearest code to where the line is 0,
    and the slope is fitted again through that point; e counts in units of the first scale. Of all grids passed the one
    of least sum |w - r|^p is returned, among those whose sum of squares is not above the first.
    """  # fmt: skip
    low, high = code_range(bits)
    unit = abs(scale)
    best, best_norm, limit = (scale, zero), math.inf, math.inf
    for turn in range(turns + 1):
        codes = [code_of(value, scale, zero, bits) for value in values]
        errors = [value - (code - zero) * scale for value, code in zip(values, codes, strict=True)]
        norm = math.fsum(abs(error) ** p for error in errors)
        squares = math.fsum(error**2 for error in errors)
        if turn == 0:
            limit = squares
        if norm < best_norm and squares <= limit:
            best, best_norm = (scale, zero), norm
        wanted = [value - unit * shrunk(error / unit, beta, p) for value, error in zip(values, errors, strict=True)]
        if not symmetric:
            middle, centre = sum(codes) / len(codes), sum(wanted) / len(wanted)
            spread = math.fsum((code - middle) ** 2 for code in codes)
            slope = math.fsum((c - middle) * (w - centre) for c, w in zip(codes, wanted, strict=True)) / (spread or 1)
            slope = slope if abs(slope) > 0.05 * unit else scale
            zero = min(max(round(middle - centre / slope), low), high)
        length = math.fsum((code - zero) ** 2 for code in codes)
        slope = math.fsum((c - zero) * w for c, w in zip(codes, wanted, strict=True)) / (length or 1)
        slope = slope if abs(slope) > 0.05 * unit else scale
        stored = round_to_float(abs(slope), scale_dtype) or smallest_float(scale_dtype)
        scale = math.copysign(stored, slope)
        beta *= kappa
    return best


# --------------------------------------------------------------------------------------------- NF4


def nf4_codes() -> list[float]:
    """The sixteen values of NF4 (Dettmers et al. 2023, section 3 and appendix E): 0, and quantiles of the normal
    distribution at even steps, eight up to the offset 1 - (1/32 + 1/30) / 2 above 0 and seven below, scaled to 1."""
    from statistics import NormalDist

    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(0.5 + (offset - 0.5) * step / 8) for step in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (offset - 0.5) * step / 7) for step in range(1, 8)]
    largest = max(above)
    return sorted([0.0, *(value / largest for value in above), *(value / largest for value in below)])


def nf4(weight: np.ndarray, block: int) -> np.ndarray:
    """Each weight as the nearest NF4 value times the largest of its block of neighbours along a row."""
    codes = nf4_codes()
    result = np.zeros(weight.shape)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], block):
            values = [float(value) for value in weight[row, start : start + block]]
            largest = max(abs(value) for value in values)
            for index, value in enumerate(values):
                result[row, start + index] = min(codes, key=lambda code: abs(code - value / largest)) * largest
    return result


# --------------------------------------------------------------------------------------------- cache of keys, values


def packed_cache(states: np.ndarray, bits: int, group: int, along: int, dtype: str) -> np.ndarray:
    """What states [batch, heads, tokens, width] are once rounded (Liu et al. 2024, KIVI, section 2: with the least
    state z of a group as zero point and s = (max - min) / (2^bits - 1), x becomes round((x - z) / s) s + z).

    A group is `group` neighbours along dimension `along`. Both z and s are stored in 16 bits: bfloat16 for bfloat16
    states, float16 for others.
    """
    stored = "bfloat16" if dtype == "bfloat16" else "float16"
    result = np.zeros(states.shape)
    lines = np.moveaxis(states, along, -1)
    rounded = np.moveaxis(result, along, -1)
    for line in np.ndindex(*lines.shape[:-1]):
        for start in range(0, lines.shape[-1], group):
            values = [float(value) for value in lines[line][start : start + group]]
            least = round_to_float(min(values), stored)
            scale = round_to_float((max(values) - min(values)) / (2**bits - 1), stored) or 1.0
            for index, value in enumerate(values):
                code = min(max(round((value - least) / scale), 0), 2**bits - 1)
                rounded[line][start + index] = code * scale + least
    return result


# ---------------------------------------------------------------------------------------------------- pruning


def magnitude_scores(weight: np.ndarray) -> np.ndarray:
    """|w|."""
    return np.array([[abs(float(value)) for value in row] for row in weight])


def wanda_scores(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """|w_ij| times the l2 norm of input feature j over all tokens (Sun et al. 2023, equation 1)."""
    norms = [
        math.sqrt(math.fsum(float(value) ** 2 for value in inputs[:, column])) for column in range(inputs.shape[1])
    ]
    return np.array([[abs(float(value)) * norm for value, norm in zip(row, norms, strict=True)] for row in weight])


def _drop_lowest(scores: list[float], count: int) -> list[bool]:
    """Keep mask without the `count` lowest; of equals the earlier goes first (Python's sort is stable)."""
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    dropped = set(order[:count])
    return [index not in dropped for index in range(len(scores))]


def zeros_of(sparsity: float, size: int) -> int:
    """The largest whole number that is no more than `sparsity` of `size`, with the sparsity as it is written:
    0.29 of 100 is 29, though the product of the two floats is below 29."""
    return math.floor(Fraction(repr(sparsity)) * size)


def unstructured_keep(scores: np.ndarray, sparsity: float, per: str) -> np.ndarray:
    """Keep mask [out, in] with `zeros_of` lowest scores taken from each row, or from the layer as a whole."""
    rows, columns = scores.shape
    if per == "layer":
        flat = _drop_lowest([float(score) for score in scores.flatten()], zeros_of(sparsity, rows * columns))
        return np.array(flat).reshape(rows, columns)
    return np.array([_drop_lowest([float(score) for score in row], zeros_of(sparsity, columns)) for row in scores])


def nm_keep(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Keep mask with the n highest scores of every m consecutive columns."""
    rows, columns = scores.shape
    keep = np.zeros((rows, columns), dtype=bool)
    for row in range(rows):
        for start in range(0, columns, m):
            keep[row, start : start + m] = _drop_lowest([float(s) for s in scores[row, start : start + m]], m - n)
    return keep


def sparsegpt(
    weight: np.ndarray,
    matrix: np.ndarray,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> np.ndarray:
    """The pruned weight by SparseGPT without Cholesky (Frantar, Alistarh 2023, algorithm 1 and equation 3).

    As `gptq` above: B is the inverse of the Hessian over the columns F not yet done, and when column q is done in a
    row, that row moves by  w_F -= (w_q - new w_q) / B_qq * B_q,F.  The mask of a block of columns (pattern (n, m): of m
    neighbours) is chosen when the first of them comes, from the weights as they are then: the lowest of  w_k^2 / B_kk,
    where B_kk is that of the moment when column k will come. Zeros go first and stay.
    The share of zeros is counted in the block over all rows, so that layer and block come out even.
    """
    rows, columns = weight.shape
    work = weight.astype(np.float64).copy()
    empty = weight == 0
    remaining = inverse(damped(matrix, damping))
    costs, eliminated = np.zeros(columns), remaining.copy()
    for column in range(columns):
        costs[column] = eliminated[column, column]
        eliminated = eliminated - np.outer(eliminated[:, column], eliminated[column, :]) / eliminated[column, column]
    keep = np.ones((rows, columns), dtype=bool)
    width = pattern[1] if pattern else block
    for column in range(columns):
        if column % width == 0:
            end = min(column + width, columns)
            scores = np.where(empty[:, column:end], -np.inf, work[:, column:end] ** 2 / costs[column:end])
            if pattern:
                keep[:, column:end] = nm_keep(scores, *pattern)
            else:
                count = zeros_of(sparsity, rows * end) - zeros_of(sparsity, rows * column)
                by_column = _drop_lowest([float(score) for score in scores.T.flatten()], count)
                keep[:, column:end] = np.array(by_column).reshape(end - column, rows).T
            keep[:, column:end] &= ~empty[:, column:end]
        error = np.where(keep[:, column], 0.0, work[:, column])
        work[:, column] -= error
        for other in range(column + 1, columns):
            work[:, other] -= error / remaining[column, column] * remaining[column, other]
        remaining = remaining - np.outer(remaining[:, column], remaining[column, :]) / remaining[column, column]
    return np.where(keep, work, 0.0)


def alps(
    weight: np.ndarray,
    matrix: np.ndarray,
    sparsity: float,
    pattern: tuple[int, int] | None,
    iterations: int,
    damping: float,
) -> np.ndarray:
    """The sparse weight after so many steps of ADMM (Meng et al. 2024, algorithm 1 with the scaling of section 3.1 and
    the growth of rho of section 3.2), every step by a plain inverse.

    In columns scaled by e = sqrt(diag H):  W = (H W0 - V + rho D) (H + rho)^-1,  D = the largest of W + V / rho,
    V += rho (W - D).  Every third step rho grows by 1.3, 1.2 or 1.1, when at least a tenth, half a percent or fewer of
    the places that are kept were not three steps before; no such place: it ends.
    """
    whole = damped(matrix, damping)
    e = np.sqrt(np.diag(whole))
    scaled, given = whole / np.outer(e, e), weight * e

    def largest(values: np.ndarray) -> np.ndarray:
        return nm_keep(np.abs(values), *pattern) if pattern else unstructured_keep(np.abs(values), sparsity, "layer")

    keep = before = largest(given)
    sparse, price, rho = np.where(keep, given, 0.0), np.zeros_like(given), 0.1
    for step in range(1, iterations + 1):
        dense = (given @ scaled - price + rho * sparse) @ inverse(scaled + rho * np.eye(len(e)))
        keep = largest(dense + price / rho)
        sparse = np.where(keep, dense + price / rho, 0.0)
        price = price + rho * (dense - sparse)
        if step % 3 == 0:
            changed = np.sum(keep & ~before) / np.sum(keep)
            if changed == 0:
                break
            rho *= 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            before = keep
    return sparse / e


def best_under_mask(weight: np.ndarray, keep: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """For each row the least (w - q) H (w - q)^T with q zero where `keep` is False, by the normal equations of the
    columns that stay."""
    result = np.zeros(weight.shape)
    for row in range(len(weight)):
        stay = np.flatnonzero(keep[row])
        if len(stay):
            result[row, stay] = weight[row] @ matrix[:, stay] @ inverse(matrix[np.ix_(stay, stay)])
    return result


# ---------------------------------------------------------------------------------------------------- packing


def pack_row(codes: list[int], bits: int) -> list[int]:
    """Signed 32-bit words with the codes of one row, `bits` bits each, offset to be unsigned, lowest first."""
    number = 0
    for index, code in enumerate(codes):
        number += (code + 2 ** (bits - 1)) << (index * bits)
    words = []
    for index in range(-(-len(codes) * bits // 32)):
        word = (number >> (32 * index)) % 2**32
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def unpack_row(words: list[int], bits: int, columns: int) -> list[int]:
    """The codes that `pack_row` packed."""
    number = 0
    for index, word in enumerate(words):
        number += (word % 2**32) << (32 * index)
    return [(number >> (index * bits)) % 2**bits - 2 ** (bits - 1) for index in range(columns)]


# ---------------------------------------------------------------------------------------------------- quality


def log_softmax(logits: np.ndarray) -> list[float]:
    """Natural logarithms of the probabilities of one row of logits."""
    values = [float(value) for value in logits]
    top = max(values)
    total = math.log(math.fsum(math.exp(value - top) for value in values)) + top
    return [value - total for value in values]


def token_losses(logits: np.ndarray, tokens: np.ndarray) -> list[float]:
    """-log p(token | those before) in nats, for all positions of all windows but the first of each.

    logits [windows, length, vocabulary], tokens [windows, length]; logits at position t speak of token t + 1.
    """
    losses = []
    for window in range(len(tokens)):
        for position in range(1, tokens.shape[1]):
            losses.append(-log_softmax(logits[window, position - 1])[int(tokens[window, position])])
    return losses


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean loss over all scored tokens."""
    losses = token_losses(logits, tokens)
    return math.exp(math.fsum(losses) / len(losses))


def kl_divergence(original: np.ndarray, compressed: np.ndarray) -> list[float]:
    """KL(original || compressed) in nats for each row of logits [positions, vocabulary]."""
    divergences = []
    for first, second in zip(original, compressed, strict=True):
        p, q = log_softmax(first), log_softmax(second)
        divergences.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return divergences


def top1_agreement(original: np.ndarray, compressed: np.ndarray) -> float:
    """Share of positions at which both have the same most probable token (the first of equals)."""
    same = 0
    for first, second in zip(original, compressed, strict=True):
        p, q = log_softmax(first), log_softmax(second)
        same += p.index(max(p)) == q.index(max(q))
    return same / len(original)


# -------------------------------------------------------------------------------------------------- rotations


def rotated_reader(weight: np.ndarray, gain: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """W diag(g) Q: what reads g * n(x) as W did, given n(x) Q (Ashkboos et al. 2024, section 4, stage 1a)."""
    rows, columns = weight.shape
    result = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            result[row, column] = math.fsum(
                float(weight[row, k]) * float(gain[k]) * float(rotation[k, column]) for k in range(columns)
            )
    return result


def rotated_writer(weight: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Q^T W: gives (W x)^T Q where W gave W x."""
    rows, columns = weight.shape
    result = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            result[row, column] = math.fsum(float(rotation[k, row]) * float(weight[k, column]) for k in range(rows))
    return result


def legendre(value: int, prime: int) -> int:
    """1 for a square modulo the prime, -1 for any other number, 0 for a multiple of it (Euler's criterion)."""
    power = pow(value % prime, (prime - 1) // 2, prime)
    return -1 if power == prime - 1 else power


def paley(prime: int) -> np.ndarray:
    """The Hadamard matrix of Paley 1933: order q + 1 for q = 3 mod 4, 2 (q + 1) for q = 1 mod 4; entry by entry."""
    size = prime + 1

    def core(row: int, column: int) -> int:
        if row == 0 or column == 0:
            return 0 if row == column else 1 if row == 0 or prime % 4 == 1 else -1
        return legendre(row - column, prime)

    if prime % 4 == 3:
        return np.array([[core(i, j) + (i == j) for j in range(size)] for i in range(size)], dtype=np.float64)
    blocks = {1: [[1, 1], [1, -1]], -1: [[-1, -1], [-1, 1]], 0: [[1, -1], [-1, -1]]}
    matrix = np.zeros((2 * size, 2 * size))
    for i in range(size):
        for j in range(size):
            matrix[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = blocks[core(i, j)]
    return matrix


# ---------------------------------------------------------------------------------------------------- samples


def random_weight(rows: int, columns: int, seed: int) -> np.ndarray:
    """Weights that float32 holds exactly, with rows of different size and one column of outliers."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)) * (generator.random((rows, 1)) + 0.05)
    weight[:, seed % columns] *= 4
    return weight.astype(np.float32).astype(np.float64)


def random_inputs(tokens: int, columns: int, seed: int) -> np.ndarray:
    """Inputs that float32 holds exactly, whose features are strongly correlated and of different size."""
    generator = np.random.default_rng(1000 + seed)
    shared = generator.standard_normal((tokens, 3)) @ generator.standard_normal((3, columns))
    inputs = (shared + generator.standard_normal((tokens, columns))) * (generator.random(columns) + 0.2)
    return inputs.astype(np.float32).astype(np.float64)


def random_hessian(columns: int, seed: int) -> np.ndarray:
    """The Hessian of four times as many random inputs as there are columns."""
    return hessian(random_inputs(4 * columns, columns, seed))


def mean_kl_divergence(student, teacher, counted=None):
    """KL(teacher || student) = sum p log(p / q), p and q softmax of the logits, mean over the rows that count."""
    total, rows = 0.0, 0
    for row in range(len(student)):
        if counted is not None and not counted[row]:
            continue
        p = [math.exp(value) for value in teacher[row]]
        q = [math.exp(value) for value in student[row]]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        rows += 1
    return total / rows


def best_of_all(losses, limits):
    """The least sum of losses over every allocation that keeps to all limits `(costs, most)`; None if none does."""
    from itertools import product

    sums = [
        sum(row[c] for row, c in zip(losses, chosen, strict=True))
        for chosen in product(range(len(losses[0])), repeat=len(losses))
        if all(sum(row[c] for row, c in zip(costs, chosen, strict=True)) <= most for costs, most in limits)
    ]
    return min(sums, default=None)


def token_divergence(p, q, mask=None):
    """Mean over tokens of sum_v P(v) log(P(v) / Q(v)), in float64, for logits `[samples, length, vocabulary]`."""
    first, second = (logits.double().softmax(-1) for logits in (p, q))
    each = (first * (first / second).log()).sum(-1)
    return float((each if mask is None else each[mask]).mean())


def fisher_diagonal(model, weight, tokens):
    """The diagonal of the empirical Fisher information of a token: mean over windows of (d log p(window) / d w)**2,
    divided by the tokens that a window predicts."""
    weight.requires_grad_()
    total = torch.zeros_like(weight, dtype=torch.float64)
    for window in tokens:
        logits = model(input_ids=window[None]).logits[0, :-1]
        likelihood = logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum()
        total += torch.autograd.grad(likelihood, weight)[0].double() ** 2
    weight.requires_grad_(False)
    return total / len(tokens) / (tokens.shape[1] - 1)


def row_divergence(student, teacher, direction, beta=0.5, temperature=1.0, kept=None):
    """Divergence of one row's softmaxes, times temperature squared, by its definition: events of probability 0 add
    nothing. `kept`: the tokens told apart; all others are one event."""

    def events(logits):
        exponents = [math.exp(value / temperature) for value in logits]
        probabilities = [value / sum(exponents) for value in exponents]
        if kept is None or len(kept) == len(probabilities):
            return probabilities
        return [probabilities[i] for i in kept] + [sum(p for i, p in enumerate(probabilities) if i not in kept)]

    def kl(first, second):
        return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True) if a > 0)

    p, q = events(teacher), events(student)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[direction] * temperature**2


def eora(error: np.ndarray, inputs: np.ndarray, r: int) -> np.ndarray:
    """The correction of EoRA (arXiv 2410.21271, section 3.2), float64: `error` [out, in] is projected into the
    eigenspace of the inputs' [tokens, in] second moment, approximated there by its first `r` singular values, and
    projected back."""
    values, vectors = np.linalg.eigh(inputs.T @ inputs)
    values = np.clip(values, 0, None)
    keep = values > 1e-12 * values.max()
    projection = vectors[:, keep] * np.sqrt(values[keep])  # [in, kept]: Q sqrt(Lambda)
    left, singular, right = np.linalg.svd(error @ projection, full_matrices=False)
    nearest = (left[:, :r] * singular[:r]) @ right[:r]
    back = (vectors[:, keep] / np.sqrt(values[keep])).T  # its inverse on what was kept
    return nearest @ back


def ridge(x, target, near, damping):
    """The `W` `[out, in]` with the least `sum |t - W x|^2 / n + l |W - near|^2`; `l` is `damping` times the mean over
    columns that are not always zero of their mean square: one least-squares problem with a row more for each column
    (Tikhonov). `x` `[n, in]`, `target` `[n, out]`."""
    x, target, near = x.double(), target.double(), near.double()
    squares = x.square().mean(0)
    held = (damping * squares[squares > 0].mean()).sqrt()
    rows = torch.cat([x / len(x) ** 0.5, held * torch.eye(x.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([target / len(x) ** 0.5, held * near.T])).solution.T


def removal_loss(weight, x, gone, damping):
    """The least of `|W x - V x|^2 / n + l |V - W|^2` over layers `V` whose columns `gone` are zero, `l` as in `ridge`:
    what it costs to take those inputs away from a layer `[out, in]`."""
    weight, x = weight.double(), x.double()
    stays = [column for column in range(x.shape[1]) if column not in gone]
    squares = x.square().mean(0)
    held = damping * squares[squares > 0].mean()
    rows = torch.cat([x / len(x) ** 0.5, held.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    target = rows @ weight.T
    fitted = torch.linalg.lstsq(rows[:, stays], target).solution
    return float((target - rows[:, stays] @ fitted).square().sum())


def greedy_removal(weight, x, groups, count, damping):
    """Groups of inputs to take away, one after the other: that which, with those before it, costs least."""
    order = []
    for _ in range(count):
        left = [group for group in range(len(groups)) if group not in order]
        cost = {}
        for group in left:
            gone = [column for one in (*order, group) for column in groups[one]]
            cost[group] = removal_loss(weight, x, gone, damping)
        order.append(min(left, key=cost.get))
    return order


def shared_head_scores(weights, inputs, heads, damping):
    """What each head matters that several layers (`[out, in]`, inputs `[tokens, in]`) lose together: for each layer the
    loss that the head adds when heads go one after the other, the cheapest first, as a share of the loss without any
    head; summed over the layers. float64 `[heads]`."""
    total = torch.zeros(heads, dtype=torch.float64)
    for weight, x in zip(weights, inputs, strict=True):
        columns = torch.arange(weight.shape[1]).view(heads, -1).tolist()
        order, left = [], list(range(heads))
        while left:
            gone = [column for head in order for column in columns[head]]
            before = removal_loss(weight, x, gone, damping)
            cost = {head: removal_loss(weight, x, gone + columns[head], damping) - before for head in left}
            order.append(min(left, key=cost.get))
            total[order[-1]] += cost[order[-1]] / removal_loss(weight, x, range(weight.shape[1]), damping)
            left.remove(order[-1])
    return total


def router_use(logits, k):
    """Soft counts of experts: float64 [experts]. `logits`: the router's [tokens, experts].

    Each token goes to the k experts of the highest probability, and these probabilities are made to add up to one.
    """
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    for row in logits.detach().double():
        probability = row.exp() / row.exp().sum()
        best = sorted(range(len(row)), key=lambda e: -float(probability[e]))[:k]
        mass = sum(float(probability[e]) for e in best)
        for e in best:
            total[e] += float(probability[e]) / mass
    return total


def router_weighted_outputs(logits, k, given):
    """For each expert, the mean over its tokens of its gate times the norm of what it gives: float64 [experts].
    `given`: what every expert gives for every token [experts, tokens, hidden]."""
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    count = torch.zeros(logits.shape[1], dtype=torch.float64)
    for token, row in enumerate(logits.detach().double()):
        probability = row.exp() / row.exp().sum()
        best = sorted(range(len(row)), key=lambda e: -float(probability[e]))[:k]
        mass = sum(float(probability[e]) for e in best)
        for e in best:
            total[e] += float(probability[e]) / mass * float(given[e, token].detach().double().square().sum().sqrt())
            count[e] += 1
    return total / count.clamp_min(1)


def bpe_steps(token, merges):
    """Every symbol there is while byte-pair encoding writes a token: its characters, and each merge's result.

    Sennrich, Haddow and Birch, 2016: of the pairs that stand side by side, the one that was learnt first is merged.
    """
    symbols = list(token)
    seen = set(symbols)
    while True:
        pairs = [(symbols[i], symbols[i + 1]) for i in range(len(symbols) - 1)]
        known = [merges.index(pair) for pair in pairs if pair in merges]
        if not known:
            return seen
        first, second = merges[min(known)]
        i = pairs.index((first, second))
        symbols = [*symbols[:i], first + second, *symbols[i + 2 :]]
        seen.add(first + second)


def two_vocabularies(model, small, window, table, shared):
    """(nll of the new pieces, KL, agreements, original's mass on shared tokens), summed over the window's places but
    the first, from whole distributions, a place at a time. The text of a place: all pieces of the tokens up to it. A
    token without pieces is no place."""

    def chances(asked, text):
        logits = asked(input_ids=torch.tensor([text])).logits[0, -1].detach().double()
        return [float(p) for p in logits.exp() / logits.exp().sum()]

    nll = kl = agreements = mass = 0.0
    for place in range(1, len(window)):
        text = [piece for token in window[:place] for piece in table[token]]
        if not table[window[place]] or not text:
            continue
        p, q = chances(model, window[:place]), chances(small, text)
        left, right = sum(p[old] for old, _ in shared), sum(q[new] for _, new in shared)
        kl += sum(p[old] / left * math.log((p[old] / left) / (q[new] / right)) for old, new in shared)
        likeliest = max(shared, key=lambda pair: q[pair[1]])[0]
        agreements += likeliest == max(range(len(p)), key=lambda index: p[index])
        mass += left
        for piece in table[window[place]]:
            nll -= math.log(chances(small, text)[piece])
            text = [*text, piece]
    return nll, kl, agreements, mass


# ------------------------------------------------------------------------------------------------------- depth


def ridge_regression(given, missing, strength):
    """W [out, in] of least `||D - U W^T||^2 + s m ||W||^2`, as ordinary least squares of a longer problem: sqrt(s m) I
    under U, zeros under D; m the mean of the squared column norms of U."""
    u, d = given.double(), missing.double()
    weight = strength * float(u.square().sum(0).mean())
    longer = torch.cat([u, weight**0.5 * torch.eye(u.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(
        longer, torch.cat([d, torch.zeros(u.shape[1], d.shape[1], dtype=torch.float64)])
    ).solution.T


def _stacks(model):
    if hasattr(model, "decoder") and hasattr(model, "encoder"):
        return [model.encoder.block, model.decoder.block]
    inner = model.base_model
    return [inner.layers if hasattr(inner, "layers") else inner.encoder.layer]


def block_influences(model, inputs):
    """ShortGPT, section 3: for each block of each stack, 1 - mean over tokens of the cosine of its input and output."""
    from compress.testing import outputs

    found, hooks = [[0.0] * len(stack) for stack in _stacks(model)], []
    for stack, values in zip(_stacks(model), found, strict=True):
        for index, block in enumerate(stack):

            def note(_, args, out, values=values, index=index):
                x, y = args[0].double(), (out[0] if isinstance(out, tuple) else out).double()
                values[index] = float(1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())

            hooks.append(block.register_forward_hook(note))
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def outputs_without(model, inputs, *gone):
    """What a model gives whose first stack's blocks `gone` hand their input on."""
    from compress.testing import outputs

    hooks = []
    for index in gone:

        def skip(_, args, out):
            return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

        hooks.append(_stacks(model)[0][index].register_forward_hook(skip))
    found = outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def bridged_llama(model, tokens, gone, strengths):
    """The down projections of a Llama's blocks that stay, those before a hole refitted in turn: each adds the ridge
    fit, from its own input, of what the whole model has behind the hole and the model so far has not."""
    with torch.no_grad():
        aims = model(tokens, output_hidden_states=True).hidden_states  # [i]: what enters block i
        now = copy.deepcopy(model)
        keep = [index for index in range(len(model.model.layers)) if index not in gone]
        for before, strength in zip([index - 1 for index in gone], strengths, strict=True):
            short = copy.deepcopy(now)
            short.model.layers = torch.nn.ModuleList(now.model.layers[i] for i in keep if i <= before)
            short.model.norm = torch.nn.Identity()
            short.config.num_hidden_layers = len(short.model.layers)
            seen = []
            layer = short.model.layers[-1].mlp.down_proj
            hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            out = short.model(tokens, use_cache=False).last_hidden_state
            hook.remove()
            missing = aims[before + 2].double() - out.double()
            fitted = ridge_regression(seen[0].flatten(0, 1), missing.flatten(0, 1), strength)
            now.model.layers[before].mlp.down_proj.weight += fitted.float()
        return [now.model.layers[index].mlp.down_proj.weight for index in keep]


# --------------------------------------------------------------------------------------------- damage


def next_token_loss(logits, tokens):
    """Mean of -log p(next token) over every token of every window but the first, one token at a time."""
    total, count = 0.0, 0
    for row, ids in zip(logits.double().tolist(), tokens.tolist(), strict=True):
        for scores, target in itertools.pairwise(zip(row, ids, strict=True)):
            values, wanted = scores[0], target[1]
            total += math.log(sum(math.exp(value - max(values)) for value in values)) + max(values) - values[wanted]
            count += 1
    return total / count


def mean_kl(first, second):
    """Mean over tokens of sum p (log p - log q), p and q the softmaxes of logits [windows, length, vocabulary]."""
    total, count = 0.0, 0
    for a, b in zip(first.double().flatten(0, 1).tolist(), second.double().flatten(0, 1).tolist(), strict=True):
        p, q = ([math.exp(value - max(scores)) for value in scores] for scores in (a, b))
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        count += 1
    return total / count


def block_damage(model, changed, tokens, index, became):
    """What one block alone does to a Llama: the whole model is run, and run again with the block `index` being that of
    `changed` at `became` (None: left out). Error of the block's output, KL, rise of the loss, error of each layer."""
    was, other = copy.deepcopy(model).double(), copy.deepcopy(changed).double()
    seen = {}

    def keep(name):
        def hook(_, args, out):
            seen[name] = (args[0], out[0] if isinstance(out, tuple) else out)

        return hook

    block = was.model.layers[index]
    names = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    hooks = [block.register_forward_hook(keep("block"))]
    hooks += [block.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        logits = was(tokens).logits
        for hook in hooks:
            hook.remove()
        layers = {}
        for name in names if became is not None else []:
            x, out = seen[name]
            weight = other.model.layers[became].get_submodule(name).weight
            layers[name] = float((x @ weight.T - out).square().sum() / out.square().sum())
        if became is None:
            was.model.layers[index].register_forward_hook(lambda _, args, out: args[0])
        else:
            was.model.layers[index] = other.model.layers[became]
        was.model.layers[index].register_forward_hook(keep("replaced"))
        now = was(tokens).logits
    before, after = seen["block"][1], seen["replaced"][1]
    return {
        "error": float((after - before).square().sum() / before.square().sum()),
        "kl": mean_kl(logits, now), "rise": next_token_loss(now, tokens) - next_token_loss(logits, tokens),
        "layers": layers,
    }  # fmt: skip


# Super-blocks (k-quants): ggml's formulas, weight by weight.


def super_block_points(d, k, dmin, low, bits, minima):
    """All weights that each group's codes stand for, increasing: array [rows, supers * groups, 2**bits].

    d, dmin: [rows, supers]; k, low: [rows, supers, groups]. With minima q * d * k - dmin * l with q from 0; without,
    (q - 2**(bits - 1)) * d * k.
    """
    rows, supers, groups = k.shape
    points = np.zeros((rows, supers * groups, 2**bits))
    for row, sup, group in itertools.product(range(rows), range(supers), range(groups)):
        for q in range(2**bits):
            if minima:
                value = q * d[row, sup] * k[row, sup, group] - dmin[row, sup] * low[row, sup, group]
            else:
                value = (q - 2 ** (bits - 1)) * d[row, sup] * k[row, sup, group]
            points[row, sup * groups + group, q] = value
    return np.sort(points, axis=2)


def super_block_values(weight, d, k, dmin, low, bits, minima, group_size):
    """Each weight [rows, columns] at the nearest point of its group."""
    points = super_block_points(d, k, dmin, low, bits, minima)
    found = np.zeros_like(weight, dtype=np.float64)
    for row, column in itertools.product(*map(range, weight.shape)):
        own = points[row, column // group_size]
        found[row, column] = own[np.abs(own - weight[row, column]).argmin()]
    return found


def super_block_error(values, shares, d, k, dmin, low, bits, minima):
    """Weighed squared error of one group [size] on the grid of these four numbers."""
    shape = (1, 1, 1)
    points = super_block_points(
        np.full((1, 1), d), np.full(shape, k), np.full((1, 1), dmin), np.full(shape, low), bits, minima
    )[0, 0]
    return sum(
        share * min((value - point) ** 2 for point in points) for value, share in zip(values, shares, strict=True)
    )


def gptq_to_points(weight, matrix, points, group_size, order, damping=0.01):
    """`gptq` of this file, columns in `order`, to the nearest of each group's points [rows, groups, n]; the values."""
    work, found = weight.astype(np.float64).copy(), np.zeros_like(weight, dtype=np.float64)
    remaining = inverse(damped(matrix, damping))
    left = set(range(weight.shape[1]))
    for column in order:
        own = points[:, column // group_size]
        nearest = np.abs(own - work[:, column, None]).argmin(1)
        found[:, column] = own[np.arange(len(own)), nearest]
        error = work[:, column] - found[:, column]
        left.remove(column)
        after = sorted(left)
        work[:, after] -= np.outer(error / remaining[column, column], remaining[column, after])
        remaining = remaining - np.outer(remaining[:, column], remaining[column, :]) / remaining[column, column]
    return found


# ---------------------------------------------------------------------------------------------------- trellis


def trellis_values(codes: list[int], bits: int, table: list[float]) -> list[float]:
    """What the codes of one row stand for: after each, the last 8 bits of the stream, its newest bit counting most."""
    stream, found = [0] * 8, []
    for code in codes:
        stream += [(code + 2 ** (bits - 1)) >> place & 1 for place in range(bits)]
        found.append(table[sum(bit << place for place, bit in enumerate(stream[-8:]))])
    return found


def trellis_least_error(row, weights, bits: int, table: list[float]) -> float:
    """The least sum of weights * (x - value)**2 over all sequences of codes there are."""
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return min(
        sum(w * (x - v) ** 2 for w, x, v in zip(weights, row, trellis_values(list(each), bits, table), strict=True))
        for each in itertools.product(codes, repeat=len(row))
    )


def per_survivor(row, scales, matrix, bits: int, table: list[float], stretch: int, damping: float) -> list[int]:
    """Codes of one row for which (row - values) H (row - values)^T is small: Viterbi's algorithm with a survivor for
    each state (the 8 - bits newest bits), and the errors that the survivor itself has made in each branch's cost.

    H = U diag(p) U^T with U upper triangular and ones on its diagonal, so that an error d costs
    sum_k p_k (d_k + sum_{i<k} d_i U_ik)**2. After each `stretch` of columns only the cheapest survivor goes on.
    """
    root = np.linalg.cholesky(damped(matrix, damping)[::-1, ::-1])[::-1, ::-1]
    pivots, upper = np.diag(root) ** 2, root / np.diag(root)
    survivors = {0: (0.0, [], [])}  # state -> cost, codes, errors
    for k in range(len(row)):
        reached = {}
        for state, (cost, codes, errors) in survivors.items():
            wanted = row[k] + sum(error * upper[i, k] for i, error in enumerate(errors))
            for code in range(2**bits):
                window = code << (8 - bits) | state
                value = scales[k] * table[window]
                total = cost + pivots[k] * (wanted - value) ** 2
                if window >> bits not in reached or total < reached[window >> bits][0]:
                    path = ([*codes, code - 2 ** (bits - 1)], [*errors, row[k] - value])
                    reached[window >> bits] = (total, *path)
        survivors = reached
        if (k + 1) % stretch == 0:
            least = min(survivors, key=lambda state: survivors[state][0])
            survivors = {least: survivors[least]}
    return min(survivors.values(), key=lambda survivor: survivor[0])[1]
