"""Rounding a matrix column by column with feedback: each column is corrected for the errors of those before it.

What GPTQ does with a layer's Hessian `H = R R^T`, `R` upper triangular. With `d_j = w_j - q_j` what rounding has
changed so far, column `k` is rounded as if it were `c_k = w_k + sum over j < k of d_j R_jk / R_kk`: `d H d^T` is the
sum over `k` of `((c_k - q_k) R_kk)^2`, and no later choice can change an earlier term (Chen et al.: "The Geometry of
LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025, arXiv 2507.18553).

GPTQ's paper corrects all later columns with each error, along the Cholesky factor `U` of `H^-1`. `U = R^-1`: both ways
give the same numbers, and this one needs no inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.maths.grid import QuantSpec, find_params
from compress.maths.hessian import triangular_root

# Columns whose corrections are summed one by one. More: longer sums at each column; fewer: more products between them.
SHORT = 16


@dataclass(frozen=True)
class Factor:
    """The Hessian as GPTQ needs it, its columns in `order` `[in]`, that of rounding: `upper diag(pivots) upper^T`.

    `upper` `[in, in]`: `R_jk / R_kk`, ones on the diagonal; `pivots` `[in]`: `R_kk^2`; `damping`: as used. `carry`
    `[in, in]`, strictly upper: what GPTAQ adds to each later column for one unit of a column; None without.
    """

    upper: Tensor
    pivots: Tensor
    order: Tensor
    damping: float
    carry: Tensor | None = None


def factorise(hessian: Tensor, act_order: bool, damping: float, deviation: Tensor | None = None) -> Factor:
    """What `gptq` needs of a Hessian, whatever the weight. NotPositiveDefinite if no damping helps.

    deviation: `[in, in]`, mean over tokens of `2 (x - x~) x~^T`, for GPTAQ.
    """
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        root, damping = triangular_root(hessian[order.unsqueeze(1), order], damping)
    else:
        order = torch.arange(len(hessian), device=hessian.device)
        root, damping = triangular_root(hessian, damping)
    carry = (
        None if deviation is None else _carry(root, deviation[order.unsqueeze(1), order] if act_order else deviation)
    )
    diagonal = root.diagonal().clone()
    return Factor(root.div_(diagonal), diagonal.square_(), order, damping, carry)


def _carry(root: Tensor, deviation: Tensor) -> Tensor:
    """`P = ((D U^T) * M) U`, with `M` the strictly upper triangle (Li et al. 2025, equation 17) and `U = R^-1`."""
    seen = torch.linalg.solve_triangular(root, deviation.t(), upper=True).t().triu(1)
    return torch.linalg.solve_triangular(root, seen, upper=True, left=False)


def round_columns(
    weight: Tensor,
    factor: Factor,
    spec: QuantSpec,
    grid: tuple[Tensor, Tensor | None] | None,
    importance: Tensor | None,
    block_size: int,
    keep_zeros: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The loop over columns: codes, scale, zero, and for each row `[out]` the sums of `((c_k - q_k) R_kk)**2`, which is
    the squared output error, damping included, and of `d_k**2`.

    The tensors worked on are transposed, `[in, out]`, so that a column is one stretch of memory. `work` holds the
    weights with the corrections of the columns before. These reach a column on three ways: as one product for all
    columns of a finished block, as one for a few columns (`SHORT`) of its own block, and inside those few as a sum when
    its turn comes. Each error reaches each later column exactly once.
    """
    rows, columns = weight.shape
    size = spec.columns_per_group(columns)
    dtype = factor.upper.dtype
    target = weight.t().contiguous().index_select(0, factor.order).to(dtype)
    walk = _Walk(target, factor, spec, size, block_size, target == 0 if keep_zeros else None)
    if grid is not None:
        walk.set_grid(*grid)
    codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    lost, moved = (torch.zeros(rows, dtype=dtype, device=weight.device) for _ in range(2))
    whole = size if grid is None else 0
    for start, end in _cuts(0, columns, block_size, whole):
        for first, last in _cuts(start, end, SHORT, whole, at_groups=True):
            if whole and first % size == 0:
                walk.find_grid(first, importance)
            walk.round(start, first, last)
            walk.correct(start, first, last, last, end)
        walk.correct(start, start, end, end, columns)
        walk.account(start, end, lost, moved)
        codes[factor.order[start:end]] = walk.codes[: end - start].to(torch.int8)
    scale = walk.scales.t().to(spec.torch_scale_dtype).contiguous()
    zero = None if spec.symmetric else walk.zeros.t().to(torch.int8).contiguous()
    return codes.t().contiguous(), scale, zero, lost, moved


def _cuts(start: int, end: int, length: int, group: int, at_groups: bool = False) -> Iterator[tuple[int, int]]:
    """Stretches of `length` from `start` to `end`. With a `group` (columns that share a grid to be found), none that
    goes over the start of a group it does not hold whole; `at_groups`: none that goes over any."""
    while start < end:
        stop = min(start + length, end)
        if group and at_groups:
            stop = min(stop, (start // group + 1) * group)
        elif group and stop // group * group > start:
            stop = stop // group * group
        yield start, stop
        start = stop


class _Walk:
    """The tables of `round_columns`, columns in the order of rounding, and what is done to a few columns at a time.

    target: the weights, work: the same with corrections, `[in, out]`. scales, zeros: `[groups, out]`. For the columns
    of the block at hand, `[block, out]`: current, as they were rounded; codes; and change, `target` minus rounded.
    """

    def __init__(
        self, target: Tensor, factor: Factor, spec: QuantSpec, size: int, block_size: int, kept: Tensor | None
    ):
        self.target, self.work, self.factor, self.spec, self.size, self.kept = (
            target, target.clone(), factor, spec, size, kept,
        )  # fmt: skip
        columns, rows = target.shape
        self.scales = target.new_ones(columns // size, rows)
        self.zeros = torch.zeros_like(self.scales)
        self.group_of: list[int] = (factor.order // size).tolist()
        self.current, self.codes, self.change = (target.new_empty(min(block_size, columns), rows) for _ in range(3))

    def set_grid(self, scale: Tensor, zero: Tensor | None) -> None:
        self.scales.copy_(scale.t())
        if zero is not None:
            self.zeros.copy_(zero.t())

    def find_grid(self, first: int, importance: Tensor | None) -> None:
        """The grid of the group that starts at column `first`, from its weights as GPTQ has moved them by now: to where
        the errors so far would be made up for as well as can be, if nothing more were rounded."""
        last = first + self.size
        square = self.factor.upper[first:last, first:last].t()
        target = self.target[first:last]
        moved = torch.linalg.solve_triangular(square, self.work[first:last] - target, upper=False, unitriangular=True)
        one = replace(self.spec, group_size=-1)
        weights = None if importance is None else importance[first:last]
        scale, zero = find_params(moved.add_(target).t().contiguous(), one, weights is not None, weights)
        self.scales[first // self.size] = scale[:, 0]
        if zero is not None:
            self.zeros[first // self.size] = zero[:, 0]

    def round(self, start: int, first: int, last: int) -> None:
        """Rounds columns `first` to `last` of the block that begins at `start`, those before being done."""
        upper = self.factor.upper[first:last, first:last].t().contiguous()
        carry = None if self.factor.carry is None else self.factor.carry[first:last, first:last].t().contiguous()
        part = slice(first - start, last - start)
        currents, codes, changes = self.current[part], self.codes[part], self.change[part]
        low, high, symmetric = self.spec.qmin, self.spec.qmax, self.spec.symmetric
        for index, column in enumerate(range(first, last)):
            target, current, code, change = self.target[column], currents[index], codes[index], changes[index]
            scale, zero = self.scales[self.group_of[column]], self.zeros[self.group_of[column]]
            if carry is not None:
                shift = currents[:index].t() @ carry[index, :index]
                target += shift
                self.work[column] += shift
            torch.addmv(self.work[column], changes[:index].t(), upper[index, :index], out=current)
            torch.div(current, scale, out=code).round_()
            if not symmetric:
                code += zero
            code.clamp_(low, high)
            if self.kept is not None:
                torch.where(self.kept[column], zero, code, out=code)
            torch.addcmul(target, code if symmetric else code - zero, scale, value=-1, out=change)

    def correct(self, start: int, first: int, last: int, begin: int, end: int) -> None:
        """Columns `begin` to `end` get what columns `first` to `last` of the block that begins at `start` left them."""
        if begin == end:
            return
        part = slice(first - start, last - start)
        if self.factor.carry is not None:
            shift = self.factor.carry[first:last, begin:end].t() @ self.current[part]
            self.target[begin:end] += shift
            self.work[begin:end] += shift
        self.work[begin:end].addmm_(self.factor.upper[first:last, begin:end].t(), self.change[part])

    def account(self, start: int, end: int, lost: Tensor, moved: Tensor) -> None:
        """Adds the block's squared errors to `lost` and `moved` `[out]`."""
        change = self.change[: end - start]
        errors = (self.current[: end - start] - self.target[start:end]).add_(change).square_()
        lost.addmv_(errors.t(), self.factor.pivots[start:end])
        moved += torch.linalg.vecdot(change, change, dim=0)
