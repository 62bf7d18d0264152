"""A closed-form linear fit of what is missing to what a layer is given: ridge least squares, its strength by held-out
rows.

What is missing `D [tokens, out]` is fitted by `U W^T`, `U [tokens, in]` the layer's input, so `W [out, in]` is added to
the layer's weight: `W = ((U^T U + s m I)^-1 U^T D)^T`, with `m` the mean of the diagonal of `U^T U` and `s` the
strength.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Strengths that are tried, in units of the mean diagonal.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Moments:
    """Sums over tokens that a fit needs, in float64: `U^T U`, `U^T D`, and the sum of squares of `D`."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.square = 0.0

    def add(self, given: Tensor, missing: Tensor) -> None:
        """Takes in tokens: `given [tokens, in]`, `missing [tokens, out]`, any float dtype."""
        u, d = given.double(), missing.double()
        self.gram += u.T @ u
        self.cross += u.T @ d
        self.square += float(d.square().sum())

    def plus(self, other: Moments) -> Moments:
        """Those of both texts; this one's tables are used for it."""
        self.gram += other.gram
        self.cross += other.cross
        self.square += other.square
        return self

    def lost(self, weight: Tensor) -> float:
        """Sum over tokens of `|D - U W^T|^2`."""
        explained = 2 * (weight.T * self.cross).sum() - ((weight @ self.gram) * weight).sum()
        return self.square - float(explained)


def ridge(moments: Moments, strength: float) -> Tensor:
    """The weight [out, in] (float64) that fits best, where its squares cost `strength` times the mean diagonal."""
    gram = moments.gram.clone()
    diagonal = gram.diagonal()
    diagonal += strength * float(diagonal.mean()) + torch.finfo(torch.float64).tiny
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(moments.cross, factor).T


def fit(train: Moments, held_out: Moments) -> tuple[Tensor, float, float] | None:
    """The fit to all tokens with the strength that does best on the held-out ones, that strength, and the share of the
    squares of what was missing there that it explained. None where no strength explains anything. `train` is used up.
    """
    if not (held_out.square > 0 and float(train.gram.diagonal().mean()) > 0):
        return None
    losses = {strength: held_out.lost(ridge(train, strength)) for strength in STRENGTHS}
    best = min(losses, key=lambda strength: losses[strength])
    explained = 1 - losses[best] / held_out.square
    if explained <= 0:
        return None
    return ridge(train.plus(held_out), best), best, explained
