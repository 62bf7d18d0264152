"""Zeros chosen and made up for by second order: the mask and the weights that stay, from a layer's Hessian.

`prune_columns` is SparseGPT's sweep (Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", 2023, arXiv 2301.00774, algorithm 1): optimal brain surgery, column by column, with the mask of each block of
columns chosen from the weights as they are by then. `refit` solves for the best weights under a mask that stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.maths.feedback import Factor, Sweep
from compress.maths.masks import nm_mask, unstructured_mask, zeroed


def prune_columns(
    weight: Tensor,
    factor: Factor,
    parts: Sequence[tuple[int, float]],
    pattern: str | None = None,
    block_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`weight` `[out, in]` with zeros, the mask (True: kept), and for each row the sums that `Sweep.run` gives.

    A weight's score is `w^2 / U_kk^2`, with `U` the upper Cholesky factor of `H^-1`, and `w` as the columns before the
    block left it. parts: of layers that are stacked, the outputs of each and the share of zeros in it, counted in
    every block of `block_size` columns over all its rows; with a `pattern` ("n:m") the shares are not looked at.
    Weights that are zero already stay so, and count. In the factor's dtype, its columns being in their own order.
    """
    target = weight.t().to(factor.upper.dtype).contiguous()
    sweep = _Pruning(target, factor, block_size, parts, pattern)
    lost, moved = sweep.run(0 if pattern is None else sweep.group)
    return sweep.pruned.t().contiguous(), sweep.keep.t().contiguous(), lost, moved


class _Pruning(Sweep):
    """pruned: the new weights, keep: False where they are zero, both `[in, out]`, as far as the sweep has come."""

    def __init__(
        self, target: Tensor, factor: Factor, block_size: int, parts: Sequence[tuple[int, float]], pattern: str | None
    ):
        super().__init__(target, factor, block_size)
        self.parts = parts
        self.stay, self.group = map(int, pattern.split(":")) if pattern else (0, 0)
        self.empty = target == 0
        self.keep = torch.ones_like(self.empty)
        self.pruned = torch.empty_like(target)

    def _scores(self, first: int, last: int) -> Tensor:
        """What zeroing each weight would cost, `[last - first, out]`; zeros go first."""
        scores = self.free(first, last).square_().mul_(self.factor.pivots[first:last].unsqueeze(1))
        return torch.where(self.empty[first:last], -torch.inf, scores)

    def begin(self, start: int, end: int) -> None:
        """The mask of a block. Its zeros are those that bring the layer's count to where it has to be by its end."""
        if self.group:
            return
        scores, row = self._scores(start, end), 0
        for rows, sparsity in self.parts:
            part = scores[:, row : row + rows]
            count = round_down(sparsity * rows * end) - round_down(sparsity * rows * start)
            self.keep[start:end, row : row + rows] = unstructured_mask(part, count / part.numel(), per="layer")
            row += rows
        self.keep[start:end] &= ~self.empty[start:end]

    def enter(self, start: int, first: int) -> None:
        """The mask of one group of neighbours."""
        last = first + self.group
        keep = nm_mask(self._scores(first, last).t(), self.stay, self.group).t()
        self.keep[first:last] = keep & ~self.empty[first:last]

    def decide(self, column: int, place: int) -> None:
        target, current, change = self.target[column], self.current[place], self.change[place]
        torch.addcmul(target, current, self.keep[column].to(current.dtype), value=-1, out=change)

    def finish(self, start: int, end: int) -> None:
        self.pruned[start:end] = zeroed(self.current[: end - start], self.keep[start:end])


def round_down(count: float) -> int:
    """The whole number below; 28.999999999999996 is 29."""
    return int(round(count, 6))


def keep_parts(scores: Tensor, parts: Sequence[tuple[int, float]], pattern: str | None, empty: Tensor) -> Tensor:
    """The mask (True: kept) of layers that are stacked on each other, `[out, in]`: of each its share of zeros, counted
    over the layer, or all by the pattern. Where `empty` says so a weight goes first, whatever is asked for."""
    scores = torch.where(empty, -torch.inf, scores)
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        return nm_mask(scores, n, m) & ~empty
    rows = [count for count, _ in parts]
    masks = [
        unstructured_mask(part, share, "layer") for part, (_, share) in zip(scores.split(rows), parts, strict=True)
    ]
    return torch.cat(masks) & ~empty


def refit(aim: Tensor, pruned: Tensor, keep: Tensor, hessian: Tensor, ridge: float, steps: int) -> Tensor:
    """The weights `q` `[out, in]`, zero where `keep` is False, that come nearest to `q (H + ridge) = aim` at the places
    that are left, from `pruned` on by so many steps of conjugate gradients with the diagonal as preconditioner.

    With `aim = w (H + ridge)` that is the least `(w - q) (H + ridge) (w - q)^T` in every row. All in the dtype of
    `hessian`. A column whose diagonal is 0 stays as it is.
    """
    diagonal = hessian.diagonal() + ridge
    inverse = torch.where(hessian.diagonal() == 0, 0.0, 1.0 / diagonal)
    kept = keep.to(hessian.dtype)

    def product(w: Tensor) -> Tensor:
        return torch.addmm(ridge * w, w, hessian)

    result = pruned.to(hessian.dtype, copy=True)
    residual = (aim - product(result)).mul_(kept)
    step = residual * inverse
    size = torch.linalg.vecdot(residual, step)
    for _ in range(steps):
        image = product(step).mul_(kept)
        curvature = torch.linalg.vecdot(step, image)
        length = torch.where(curvature > 0, size / curvature, 0.0).unsqueeze(1)
        result.addcmul_(step, length)
        residual.addcmul_(image, length, value=-1)
        scaled = residual * inverse
        now = torch.linalg.vecdot(residual, scaled)
        step = torch.addcmul(scaled, step, torch.where(size > 0, now / size, 0.0).unsqueeze(1))
        size = now
    return result
