"""The methods as their papers define them, written slowly in float64, to hold the fast code against.

Nothing here shares a line with the package or is meant to be quick. One value or one column is treated at a
time, matrices are inverted by elimination, packed words are built from Python's integers, and every function says
which definition it follows. Arrays are numpy float64 (codes are int64); a weight is [out, in], inputs are
[tokens, in].
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

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
