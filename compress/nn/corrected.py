"""A layer with a correction of low rank beside it, as an adapter computes it, while its block is worked on.

Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685, section 4.1: y = W x + s B A x.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Corrected(nn.Module):  # type: ignore[misc]
    """`base` (dense or packed, as it is) and beside it `left` [out, r], `right` [r, in], float32, times `scaling`."""

    def __init__(self, base: nn.Module, left: Tensor, right: Tensor, scaling: float = 1.0):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.left, self.right = (nn.Parameter(part, requires_grad=False) for part in (left, right))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of what the base gives."""
        given: Tensor = self.base(x)
        part = functional.linear(functional.linear(x.to(self.right.dtype), self.right), self.left)
        return (given + self.scaling * part).to(given.dtype)
