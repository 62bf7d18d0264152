"""The Hessian of a linear layer's squared output error, and the factor of it that GPTQ walks along.

For `sum over tokens of |W x - Q x|**2 / n`, the second derivative along any row of `W` is `H = 2/n * sum of x x^T`,
`[in, in]`: it depends on the layer's input alone, so layers that share an input share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.errors import CompressError

# Columns of one strip of the product. Only the upper triangle is computed, strip by strip: almost half of the work.
STRIP = 256

# Where rising starts when no damping was asked for, and where it ends.
FIRST_DAMPING, LAST_DAMPING = 1e-4, 1.0


class NotPositiveDefinite(CompressError):
    """No damping up to `LAST_DAMPING` made the Hessian positive definite."""


@contextmanager
def bfloat16_products(exact: bool) -> Iterator[None]:
    """Inside, if `exact`, products of float32 matrices on the CPU round their inputs to bfloat16 and add up in float32.

    Where the inputs are bfloat16 numbers to begin with, that loses nothing and takes half the time on processors with
    instructions for it; others take no notice.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if exact:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
        exact = x.dtype == torch.bfloat16
        x = x.reshape(-1, self.columns).to(self._sum.device, torch.float32)
        tokens = x.shape[0]
        if tokens == 0:
            return
        total = self.count + tokens
        with bfloat16_products(exact):
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


class CrossMoment:
    """Running mean of `2 y x^T` over tokens, in float32, `[rows, columns]` (as many rows as columns, if not said)."""

    def __init__(self, columns: int, device: torch.device | str = "cpu", rows: int | None = None):
        self.count = 0
        #: Zeros before the first token.
        self.matrix = torch.zeros(rows or columns, columns, dtype=torch.float32, device=device)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Take in what belongs to the same tokens: `[tokens, rows]` and `[tokens, columns]`, any float dtype."""
        total = self.count + len(x)
        if total == self.count:
            return
        exact = x.dtype == y.dtype == torch.bfloat16
        y, x = (z.to(self.matrix.device, torch.float32) for z in (y, x))
        with bfloat16_products(exact):
            self.matrix.addmm_(y.t(), x, beta=self.count / total, alpha=2.0 / total)
        self.count = total


def mean_diagonal(hessian: Tensor) -> float:
    """Mean of the diagonal over the columns that were not always zero; what damping is a fraction of."""
    diagonal = hessian.diagonal()
    return float(diagonal.sum()) / max(int((diagonal != 0).sum()), 1)


def quadratic_form(weight: Tensor, hessian: Tensor) -> Tensor:
    """`w H w^T` of each row `w` of `weight` `[out, in]`; `hessian` `[in, in]` symmetric. To three digits where the
    weight is bfloat16: it is there to compare errors with."""
    total = torch.zeros(weight.shape[0], dtype=hessian.dtype, device=hessian.device)
    exact = weight.dtype == torch.bfloat16
    weight = weight.to(hessian.dtype)
    with bfloat16_products(exact):
        for start in range(0, weight.shape[1], STRIP):
            end = start + STRIP
            part = weight[:, start:end]
            # What lies right of the strip's own square stands for itself and for its mirror image.
            product = part @ hessian[start:end, start:]
            product[:, STRIP:] *= 2
            total += torch.linalg.vecdot(product, weight[:, start:])
    return total


def triangular_root(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """`R`, upper triangular with a positive diagonal and `H = R R^T`, and the damping that it took.

    `damping` times the mean of the diagonal is added to the diagonal; if the Cholesky factorisation fails or is not
    finite, ten times as much, and so on up to 1.0; beyond: NotPositiveDefinite. A column that was always zero
    (diagonal 0) gets 1 on the diagonal: it stands alone, and does not count in the mean.

    It is a Cholesky factorisation from the last column to the first: with `P` the reversal of the order and
    `P H P = L L^T`, `R = P L P`.
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
        if not int(failed) and all(end.isfinite() for end in lower.aminmax()):  # `isfinite` on all of it would copy it
            del backwards  # as large as what is returned
            return lower.flip(0, 1), damping
        damping = damping * 10 if damping else FIRST_DAMPING
    raise NotPositiveDefinite(f"the Hessian is not positive definite, not even with damping {LAST_DAMPING:g}")
