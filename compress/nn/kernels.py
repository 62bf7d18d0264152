"""How packed layers compute. A kernel is a function of the layer and its input; `choose` picks the first that fits.

One kernel exists so far: dequantize the layer, multiply, forget. It runs everywhere torch does, and its results are
those of plain transformers to the last bit. Faster ones (packed integers straight into the product) go before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from compress.nn.quant_linear import QuantLinear


@dataclass(frozen=True)
class Kernel:
    """`fits(layer, x)` says whether it can compute this; `run(layer, x)` maps x [..., in] to [..., out]."""

    name: str
    fits: Callable[[QuantLinear, Tensor], bool]
    run: Callable[[QuantLinear, Tensor], Tensor]

    def __call__(self, layer: QuantLinear, x: Tensor) -> Tensor:
        return self.run(layer, x)


def _dequantize_and_multiply(layer: QuantLinear, x: Tensor) -> Tensor:
    weight = layer.cached_weight(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, weight, bias)


KERNELS: tuple[Kernel, ...] = (Kernel("torch", lambda layer, x: True, _dequantize_and_multiply),)


def choose(layer: QuantLinear, x: Tensor) -> Kernel:
    """The first kernel that fits the layer's grid and the input's dtype and device."""
    return next(kernel for kernel in KERNELS if kernel.fits(layer, x))


@contextlib.contextmanager
def cached(module: nn.Module) -> Iterator[None]:
    """Keep the dequantized weights of all packed layers inside `module` between forwards, until the block ends.

    For repeated forwards through one block (calibration): costs the block's float weights while it lasts.
    """
    from compress.nn.quant_linear import QuantLinear

    layers = [layer for layer in module.modules() if isinstance(layer, QuantLinear)]
    for layer in layers:
        layer.cache_weight(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.cache_weight(False)
