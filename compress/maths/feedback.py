"""Changing a matrix column by column with feedback: each column is corrected for the errors of those before it.

What GPTQ does with a layer's Hessian `H = R R^T`, `R` upper triangular. With `d_j = w_j - q_j` what rounding has
changed so far, column `k` is rounded as if it were `c_k = w_k + sum over j < k of d_j R_jk / R_kk`: `d H d^T` is the
sum over `k` of `((c_k - q_k) R_kk)^2`, and no later choice can change an earlier term (Chen et al.: "The Geometry of
LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025, arXiv 2507.18553).

GPTQ's paper corrects all later columns with each error, along the Cholesky factor `U` of `H^-1`. `U = R^-1`: both ways
give the same numbers, and this one needs no inverse.

`Sweep` is that loop whatever a column becomes: `round_columns` puts it on a grid, `maths/pruning.py` sets some of it to
zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.maths import trellis
from compress.maths.grid import QuantSpec, find_params
from compress.maths.hessian import triangular_root

# Columns whose corrections are summed one by one. More: longer sums at each column; fewer: more products between them.
SHORT = 16
# Columns whose paths through a trellis are found together.
STRETCH = 64


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
    """Every column on its grid: codes, scale, zero, and for each row `[out]` the two sums that `Sweep.run` gives."""
    columns = weight.shape[1]
    size, together = spec.columns_per_group(columns), spec.columns_together(columns)
    target = weight.t().contiguous().index_select(0, factor.order).to(factor.upper.dtype)
    kind = _OnTrellis if spec.trellis else _Rounding
    sweep = kind(target, factor, spec, size, block_size, target == 0 if keep_zeros else None, importance)
    if grid is not None:
        sweep.set_grid(*grid)
    lost, moved = sweep.run(together if grid is None else 0)
    scale = sweep.scales.t().to(spec.torch_scale_dtype).contiguous()
    zero = None if spec.symmetric else sweep.zeros.t().to(spec.zero_dtype).contiguous()
    return sweep.all_codes.t().contiguous(), scale, zero, lost, moved


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


class Sweep:
    """The tables of one pass over the columns, which are in the factor's order, and what is done to a few at a time.

    target: the weights, work: the same with corrections of the columns before. Both are transposed, `[in, out]`, so
    that a column is one stretch of memory. For the columns of the block at hand, `[block, out]`: current, as they were
    when their turn came, and change, `target` minus what they became.

    A correction reaches a column on one of three ways: in one product for all columns of a finished block, in one for a
    few columns (`short`) of its own block, and inside those few in a sum when its turn comes. Each error reaches each
    later column exactly once.
    """

    #: Columns of a block that are settled together.
    short: ClassVar[int] = SHORT

    def __init__(self, target: Tensor, factor: Factor, block_size: int):
        self.target, self.work, self.factor, self.block_size = target, target.clone(), factor, block_size
        columns, rows = target.shape
        self.current, self.change = (target.new_empty(min(block_size, columns), rows) for _ in range(2))

    def run(self, whole: int = 0) -> tuple[Tensor, Tensor]:
        """Goes through all columns. `whole`: columns that `enter` wants to see together, 0: it does not ask.

        For each row, `[out]`, the sums of `((c_k - q_k) R_kk)**2`, which is the squared output error, damping included,
        and of `d_k**2`.
        """
        columns, rows = self.target.shape
        lost, moved = self.target.new_zeros(rows), self.target.new_zeros(rows)
        for start, end in _cuts(0, columns, self.block_size, whole):
            self.begin(start, end)
            for first, last in _cuts(start, end, self.short, whole, at_groups=True):
                if whole and first % whole == 0:
                    self.enter(start, first)
                self._settle(start, first, last)
                self._correct(start, first, last, last, end)
            self._correct(start, start, end, end, columns)
            self._account(start, end, lost, moved)
            self.finish(start, end)
        return lost, moved

    def begin(self, start: int, end: int) -> None:
        """Before the columns of a block, when all corrections of the blocks before it are in `work`."""

    def enter(self, start: int, first: int) -> None:
        """Before the first of `whole` columns, in the block that begins at `start`; those before it are in `work`."""

    def decide(self, column: int, place: int) -> None:
        """What becomes of a column: `change[place]` from `target[column]` and `current[place]`."""
        raise NotImplementedError

    def finish(self, start: int, end: int) -> None:
        """When the columns of a block are done."""

    def free(self, first: int, last: int) -> Tensor:
        """The columns, `[last - first, out]`, where the errors so far would put them if nothing more were changed."""
        square = self.factor.upper[first:last, first:last].t().contiguous()
        target = self.target[first:last]
        moved = torch.linalg.solve_triangular(square, self.work[first:last] - target, upper=False, unitriangular=True)
        return moved.add_(target)

    def _settle(self, start: int, first: int, last: int) -> None:
        """Decides columns `first` to `last` of the block that begins at `start`, those before being done."""
        upper = self.factor.upper[first:last, first:last].t().contiguous()
        carry = None if self.factor.carry is None else self.factor.carry[first:last, first:last].t().contiguous()
        part = slice(first - start, last - start)
        currents, changes = self.current[part], self.change[part]
        for index, column in enumerate(range(first, last)):
            if carry is not None:
                shift = currents[:index].t() @ carry[index, :index]
                self.target[column] += shift
                self.work[column] += shift
            torch.addmv(self.work[column], changes[:index].t(), upper[index, :index], out=currents[index])
            self.decide(column, column - start)

    def _correct(self, start: int, first: int, last: int, begin: int, end: int) -> None:
        """Columns `begin` to `end` get what columns `first` to `last` of the block that begins at `start` left them."""
        if begin == end:
            return
        part = slice(first - start, last - start)
        if self.factor.carry is not None:
            shift = self.factor.carry[first:last, begin:end].t() @ self.current[part]
            self.target[begin:end] += shift
            self.work[begin:end] += shift
        self.work[begin:end].addmm_(self.factor.upper[first:last, begin:end].t(), self.change[part])

    def _account(self, start: int, end: int, lost: Tensor, moved: Tensor) -> None:
        """Adds the block's squared errors to `lost` and `moved` `[out]`."""
        change = self.change[: end - start]
        errors = (self.current[: end - start] - self.target[start:end]).add_(change).square_()
        lost.addmv_(errors.t(), self.factor.pivots[start:end])
        moved += torch.linalg.vecdot(change, change, dim=0)


class _Rounding(Sweep):
    """Columns are put on a grid. scales, zeros: `[groups, out]`; codes: as floats, of the block at hand; kept: True
    where a zero has to stay, `[in, out]`; importance: `[in]` or None, for grids that are found on the way."""

    def __init__(
        self, target: Tensor, factor: Factor, spec: QuantSpec, size: int, block_size: int, kept: Tensor | None,
        importance: Tensor | None,
    ):  # fmt: skip
        super().__init__(target, factor, block_size)
        self.spec, self.size, self.kept, self.importance = spec, size, kept, importance
        columns, rows = target.shape
        self.scales = target.new_ones(columns // size, rows)
        self.zeros = torch.zeros_like(self.scales)
        self.group_of: list[int] = (factor.order // size).tolist()
        self.codes = torch.empty_like(self.current)
        self.all_codes = torch.empty(columns, rows, dtype=torch.int8, device=target.device)

    def set_grid(self, scale: Tensor, zero: Tensor | None) -> None:
        self.scales.copy_(scale.t())
        if zero is not None:
            self.zeros.copy_(zero.t())

    def enter(self, start: int, first: int) -> None:
        """The grids of the groups that start at column `first`, one or a super-block's, from their weights as GPTQ has
        moved them by now."""
        last = first + self.spec.columns_together(len(self.target))
        weights = None if self.importance is None else self.importance[first:last]
        scale, zero = find_params(self.free(first, last).t().contiguous(), self.spec, weights is not None, weights)
        groups = slice(first // self.size, last // self.size)
        self.scales[groups] = scale.t().to(self.scales.dtype)
        if zero is not None:
            self.zeros[groups] = zero.t().to(self.zeros.dtype)

    def decide(self, column: int, place: int) -> None:
        code, group = self.codes[place], self.group_of[column]
        scale, zero, symmetric = self.scales[group], self.zeros[group], self.spec.symmetric
        if self.spec.minima:
            torch.add(self.current[place], zero, out=code).div_(scale).round_().clamp_(0, 2 * self.spec.half_range)
            weight = torch.addcmul(-zero, code, scale)
            code += self.spec.qmin
            torch.sub(self.target[column], weight, out=self.change[place])
            return
        torch.div(self.current[place], scale, out=code).round_()
        if not symmetric:
            code += zero
        code.clamp_(self.spec.qmin, self.spec.qmax)
        if self.kept is not None:
            torch.where(self.kept[column], zero, code, out=code)
        offset = code if symmetric else code - zero
        torch.addcmul(self.target[column], offset, scale, value=-1, out=self.change[place])

    def finish(self, start: int, end: int) -> None:
        self.all_codes[self.factor.order[start:end]] = self.codes[: end - start].to(torch.int8)


class _OnTrellis(_Rounding):
    """Columns are put on a trellis, `STRETCH` at a time: within a stretch each path carries its own corrections."""

    short = STRETCH

    def __init__(self, target: Tensor, factor: Factor, *rest: Any):
        super().__init__(target, factor, *rest)
        if bool((factor.order.diff() != 1).any()):
            raise ValueError("rows on a trellis are rounded from left to right: factorise without act_order")
        self.nodes = torch.zeros(target.shape[1], dtype=torch.int32, device=target.device)

    def _settle(self, start: int, first: int, last: int) -> None:
        place = slice(first - start, last - start)
        scale = self.scales[[self.group_of[column] for column in range(first, last)]]
        upper, pivots = self.factor.upper[first:last, first:last], self.factor.pivots[first:last]
        target = self.target[first:last]
        work = self.work[first:last]
        codes, values = trellis.settle(work.t(), target.t(), scale.t(), upper, pivots, self.spec.bits, self.nodes)
        self.codes[place] = codes.t()
        change = torch.addcmul(target, values.t().to(target.dtype), scale, value=-1, out=self.change[place])
        # as it was when its turn came: with the corrections of the columns before it in the stretch
        self.current[place] = work + upper.triu(1).t() @ change
