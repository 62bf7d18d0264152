"""ALPS: which weights are zero, and what the others are, found together for a whole layer.

Meng, Behdin, Wang, Mazumder: "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", 2024, arXiv 2406.07831. The least `|W X - Q X|^2` with `Q` sparse is split (ADMM, algorithm 1): one copy of `Q`
answers to the Hessian, the other to the mask, and a price `V` draws them together while its weight `rho` grows; the
mask is chosen anew in each step. Under the last mask the weights are solved for by conjugate gradients (section 3.3).
Columns are scaled beforehand so that the Hessian's diagonal is 1.

A worked example: one row `w = (1.0, 0.9)`, `H = [[2, 1], [1, 2]]`, half of it to be zero. Scaled, the row is `(1.41,
1.27)`, so the mask begins with the first weight kept, and stays so: its best value is `(2 * 1.0 + 1 * 0.9) / 2 = 1.45`,
which loses 1.215. (SparseGPT, which can only move what comes later, zeroes the first and loses 1.5.)

`propagation: asymmetric`: as in GPTAQ (Li et al. 2025, arXiv 2504.02692), the blocks before are pruned already and a
layer's inputs `X~` are not what they were, `X`; the aim is the least `|W X - Q X~|^2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.maths.hessian import NotPositiveDefinite, mean_diagonal, quadratic_form
from compress.maths.masks import zeroed
from compress.maths.pruning import keep_parts, refit
from compress.passes.hessians import Inputs
from compress.passes.pruning import HessianPruning, Pruned

#: `rho` at the start and, every so many steps, what it is multiplied by: more while the mask still changes much.
FIRST_RHO = 0.1
EVERY = 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | Sequence[tuple[int, float]] = 0.5,
    pattern: str | None = None,
    damping: float = 0.01,
    iterations: int = 300,
    refit_steps: int = 10,
    deviation: Tensor | None = None,
) -> Pruned:
    """Prune `weight` `[out, in]` (any float dtype) for inputs with this `hessian` `[in, in]`.

    sparsity: share of zeros, exact over the layer; for layers stacked on each other, the outputs and the share of each.
    pattern: "n:m" instead. damping: as in GPTQ, and never more than asked for. iterations: the most; they end when the
    mask stays. deviation: `[in, in]`, mean over tokens of `2 (x - x~) x~^T`, for inputs that are not what they were.
    Weights that are zero stay so. NotPositiveDefinite where the Hessian is not finite.
    """
    if not bool(hessian.isfinite().all()):
        raise NotPositiveDefinite("the Hessian holds NaN or infinite values: the layer's inputs overflowed")
    given = weight.to(hessian.dtype)
    parts = [(len(weight), sparsity)] if isinstance(sparsity, float) else sparsity
    ridge = damping * mean_diagonal(hessian)
    aim = torch.addmm(ridge * given, given, hessian if deviation is None else hessian + deviation)
    scale = (hessian.diagonal() + ridge).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    square = (hessian / scale).div_(scale.unsqueeze(1))
    square.diagonal().add_(ridge / scale.square())
    values, vectors = torch.linalg.eigh(square)
    del square
    values.clamp_(min=torch.finfo(values.dtype).eps)
    empty = (given == 0) | (hessian.diagonal() == 0)  # a column whose input was always zero is of no use
    split = _Split(aim / scale, values, vectors, parts, pattern, empty)
    start = given * scale if deviation is None else split.solve(split.aim, 0.0)
    result, keep, steps = split.run(start, iterations)
    result = refit(aim, result.div_(scale), keep, hessian, ridge, refit_steps)
    lost = quadratic_form(result - given, hessian)
    return Pruned(result, keep, lost, quadratic_form(given, hessian), {"steps": steps})


@dataclass(frozen=True)
class _Split:
    """The problem in scaled columns. aim: what `Q H` shall be, `[out, in]`; `values` `[in]` and `vectors` `[in, in]` of
    the damped Hessian."""

    aim: Tensor
    values: Tensor
    vectors: Tensor
    parts: Sequence[tuple[int, float]]
    pattern: str | None
    empty: Tensor

    def solve(self, right: Tensor, rho: float) -> Tensor:
        """`right (H + rho)^-1`."""
        return (right @ self.vectors).div_(self.values + rho) @ self.vectors.t()

    def mask(self, weight: Tensor) -> Tensor:
        return keep_parts(weight.abs(), self.parts, self.pattern, self.empty)

    def run(self, start: Tensor, iterations: int) -> tuple[Tensor, Tensor, int]:
        """The sparse copy, its mask, and the steps it took."""
        keep = before = self.mask(start)
        sparse, price, rho, step = zeroed(start, keep), torch.zeros_like(start), FIRST_RHO, 0
        kept = max(int(keep.sum()), 1)
        for step in range(1, iterations + 1):
            dense = self.solve(torch.add(self.aim, sparse, alpha=rho).sub_(price), rho)
            drawn = torch.add(dense, price, alpha=1 / rho)
            keep = self.mask(drawn)
            sparse = zeroed(drawn, keep)
            price.add_(dense.sub_(sparse), alpha=rho)
            if step % EVERY == 0:
                changed = int((keep & ~before).sum()) / kept
                if not changed:
                    break
                before = keep
                rho *= next(factor for least, factor in GROWTH if changed >= least)
        return sparse, keep, step


class ALPS(HessianPruning):
    """Set weights to zero and solve for the rest together, over whole layers, on the inputs seen in text."""

    name: ClassVar[str] = "alps"
    needs_calibration: ClassVar[bool] = True

    iterations: int = Field(
        default=300, ge=0, description="Most steps in which the mask is chosen anew; they end when it stays as it is."
    )
    refit: int = Field(
        default=10, ge=0, description="Steps of conjugate gradients for the weights that are left, under the last mask."
    )
    true_sequential: bool = Field(
        default=True,
        description="Look at the inputs of o_proj only when q, k and v are pruned, and so on, so that what these lost "
        "is made up for as well: slower, less memory.",
    )
    propagation: Literal["none", "asymmetric"] = Field(
        default="asymmetric",
        description="`asymmetric`: also make up for what the blocks before, pruned already, did to a layer's inputs.",
    )

    @property
    def needs_original(self) -> bool:
        """Asymmetric: a layer's inputs are compared with those in the original model."""
        return self.propagation == "asymmetric"

    def solving_bytes(self, inputs: int, rows: int) -> int:
        """The scaled Hessian, its vectors, and twice that while they are found. Then the vectors, and of the weights:
        as given, the aim and the start scaled and not, both copies, the price, two in between, scores and what
        selecting in them copies (16 bytes a weight), and masks."""
        square = 4 * inputs**2
        return max(4 * square, square + 60 * inputs * rows)

    def solve(self, weight: Tensor, shares: list[tuple[int, float]], seen: Inputs) -> Pruned:
        return alps(
            weight, seen.hessian.matrix, shares, self.pattern, self.damping, self.iterations, self.refit,
            seen.deviation(),
        )  # fmt: skip
