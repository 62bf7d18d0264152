"""SparseGPT: set weights to zero column by column, and let the columns still to come make up for them.

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv 2301.00774.
With the Hessian `H` of the layer's output error and `H^-1 = U^T U`, a weight's score is `w^2 / U_kk^2`: what zeroing it
costs when all columns after it may move (optimal brain surgeon). The mask of a block of columns is chosen when its turn
comes, from the weights as they are by then; a pattern's, group by group.

A worked example: one row of two columns, `H = [[2, 1], [1, 2]]`, no damping, one zero wanted. For the first column
`1 / U_00^2` is 3/2, for the last it is 2. Weights 1.0 and 0.9: scores 1.5 and 1.62, so the first goes, and the second
moves to `0.9 + 1.0 * 1/2 = 1.4`. The output error is `(1, -0.5) H (1, -0.5)^T = 1.5`. By magnitude the second would go,
and nothing be left to make up for it: 1.62.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.maths.feedback import factorise
from compress.maths.hessian import mean_diagonal, quadratic_form
from compress.maths.pruning import prune_columns, refit
from compress.passes.hessians import Inputs
from compress.passes.pruning import HessianPruning, Pruned


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | Sequence[tuple[int, float]] = 0.5,
    pattern: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    refit_steps: int = 0,
) -> Pruned:
    """Prune `weight` `[out, in]` (any float dtype) for inputs with this `hessian` `[in, in]`.

    sparsity: share of zeros, exact over every block of `block_size` columns together with those before it; for layers
    stacked on each other, the outputs and the share of each. pattern: "n:m" instead. refit_steps: conjugate gradients
    for the weights that are left, mask as found. NotPositiveDefinite if no damping up to 1 helps.
    """
    factor = factorise(hessian, False, damping)
    dead = hessian.diagonal() == 0
    given = weight.to(hessian.dtype)
    parts = [(len(weight), sparsity)] if isinstance(sparsity, float) else sparsity
    # A column whose input was always zero is of no use: it goes first, and counts.
    alive = given.masked_fill(dead, 0.0) if bool(dead.any()) else given
    result, keep, lost, moved = prune_columns(alive, factor, parts, pattern, block_size)
    ridge = factor.damping * mean_diagonal(hessian)
    if refit_steps:
        aim = torch.addmm(ridge * given, given, hessian)
        result = refit(aim, result, keep, hessian, ridge, refit_steps)
        lost = quadratic_form(result - given, hessian)
    else:
        # What was lost is d (H + damping) d^T with d the change of a row; take the damping's part off.
        lost -= ridge * moved
    return Pruned(result, keep, lost, quadratic_form(weight, hessian), {"damping": factor.damping})


class SparseGPT(HessianPruning):
    """Set weights to zero one column at a time, correcting the columns that follow by the inputs seen in text."""

    name: ClassVar[str] = "sparsegpt"
    needs_calibration: ClassVar[bool] = True

    block_size: int = Field(
        default=128,
        ge=1,
        description="Columns whose mask is chosen at once, and that are corrected together. A share of zeros is "
        "counted in them, over all outputs.",
    )
    refit: int = Field(
        default=0,
        ge=0,
        description="Steps of conjugate gradients that then fit the weights left, under the mask that was found.",
    )

    def solving_bytes(self, inputs: int, rows: int) -> int:
        """Factorising: the Hessian in reverse and its Cholesky factor. Pruning: the factor; weights as given,
        transposed, as corrected and as pruned, and masks; and of a block of columns six tables and what selecting
        copies (16 bytes a weight). With `refit`: ten tables of the weights."""
        square = 4 * inputs**2
        pruning = 23 * inputs * rows + 40 * min(self.block_size, inputs) * rows
        return max(2 * square, square + max(pruning, 41 * inputs * rows * bool(self.refit)))

    def solve(self, weight: Tensor, shares: list[tuple[int, float]], seen: Inputs) -> Pruned:
        return sparsegpt(weight, seen.hessian.matrix, shares, self.pattern, self.damping, self.block_size, self.refit)
