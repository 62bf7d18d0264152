"""The Hessian of a linear layer's squared output error, and the factor of its inverse that GPTQ walks along.

For `sum over tokens of |W x - Q x|**2 / n`, the second derivative along any row of `W` is `H = 2/n * sum of x x^T`,
`[in, in]`: it depends on the layer's input alone, so layers that share an input share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CompressError

# Columns of one strip of the product. Only the upper triangle is computed, strip by strip: almost half of the work.
STRIP = 512

# Where rising starts when no damping was asked for, and where it ends.
FIRST_DAMPING, LAST_DAMPING = 1e-4, 1.0


class NotPositiveDefinite(CompressError):
    """No damping up to `LAST_DAMPING` made the Hessian positive definite."""


class Hessian:
    """Running mean of `2 x x^T` over tokens, in float32, `[columns, columns]`."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.columns = columns
        self.count = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Take in tokens: `[..., columns]`, any float dtype. CompressError if the last dimension is another."""
        if x.shape[-1] != self.columns:
            raise CompressError(f"input has {x.shape[-1]} columns, the layer has {self.columns}")
        x = x.reshape(-1, self.columns).to(self._sum.device, torch.float32)
        tokens = x.shape[0]
        if tokens == 0:
            return
        total = self.count + tokens
        for start in range(0, self.columns, STRIP):
            strip = self._sum[start : start + STRIP, start:]
            strip.addmm_(x[:, start : start + STRIP].t(), x[:, start:], beta=self.count / total, alpha=2.0 / total)
        self.count = total

    @property
    def matrix(self) -> Tensor:
        """The whole symmetric matrix (zeros before the first token). The accumulator itself, not a copy."""
        for start in range(0, self.columns, STRIP):
            end = start + STRIP
            block = self._sum[start:end, start:end]
            block.copy_(block.triu() + block.triu(1).t())
            self._sum[end:, start:end] = self._sum[start:end, end:].t()
        return self._sum


def mean_diagonal(hessian: Tensor) -> float:
    """Mean of the diagonal over the columns that were not always zero; what damping is a fraction of."""
    diagonal = hessian.diagonal()
    return float(diagonal.sum()) / max(int((diagonal != 0).sum()), 1)


def inverse_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """`U`, upper triangular, with `H^-1 = U^T U`, and the damping that it took.

    `damping` times the mean of the diagonal is added to the diagonal; if the Cholesky factorisation fails or is not
    finite, ten times as much, and so on up to 1.0; beyond: NotPositiveDefinite. A column that was always zero
    (diagonal 0) gets 1 on the diagonal: it stands alone, and does not count in the mean.

    With `P` the reversal of the order, `P H P = L L^T` gives `U = P L^-1 P`: one factorisation and one triangular
    inverse, where inverting `H` between two factorisations takes twice the work and loses digits.
    """
    diagonal = hessian.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise NotPositiveDefinite("the Hessian holds NaN or infinite values: the layer's inputs overflowed")
    dead = diagonal == 0
    mean = mean_diagonal(hessian)
    bare = diagonal.masked_fill(dead, 1.0).flip(0)
    backwards = hessian.flip(0, 1)
    del hessian, diagonal  # a caller that keeps no reference of its own gets the memory back here
    while damping <= LAST_DAMPING * 1.000001:  # 0.01 * 10 * 10 is not exactly 1
        backwards.diagonal().copy_(bare + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed):
            inverse = torch.eye(len(backwards), dtype=backwards.dtype, device=backwards.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            if all(end.isfinite() for end in inverse.aminmax()):  # `isfinite` on all of it would copy it
                del lower, backwards  # as large as what is returned, and the peak of a layer with many columns
                return inverse.flip(0, 1), damping
        damping = damping * 10 if damping else FIRST_DAMPING
    raise NotPositiveDefinite(f"the Hessian is not positive definite, not even with damping {LAST_DAMPING:g}")
