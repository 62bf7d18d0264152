"""How packed layers compute. A kernel is a function of the layer and its input; `choose` picks the first that fits.

The last one dequantizes the layer, multiplies, forgets. It runs everywhere torch does, and its results are those of
plain transformers to the last bit. Faster ones go before it; they are taken where a layer need not be exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.maths.activations import rounded_tokens, token_codes, token_scales
from compress.nn import cpu, torch_int4

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
    if layer.spec.activations:
        x = rounded_tokens(x, layer.spec)
    weight = layer.cached_weight(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, weight, bias)


def _fits_int8(layer: QuantLinear, x: Tensor) -> bool:
    """CUDA's product takes more than 16 rows, and sizes that are multiples of 8."""
    spec = layer.spec
    if layer.exact or not spec.activations or spec.stored != "int8" or x.requires_grad or not x.numel():
        return False
    if x.device.type == "cuda":
        return x.numel() > 16 * layer.in_features and layer.in_features % 8 == 0 and layer.out_features % 8 == 0
    return bool(x.device.type == "cpu")


def _multiply_int8(layer: QuantLinear, x: Tensor) -> Tensor:
    """Codes times codes, summed in int32 without error; then both scales, in float32 (float64 for such an input)."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and cpu.library() is not None:
        return _multiply_int8_on_cpu(layer, x)
    scale = token_scales(x, layer.spec)
    codes = token_codes(x, scale, layer.spec).reshape(-1, layer.in_features)
    sums = torch._int_mm(codes, layer.stored_codes().t())
    dtype = torch.promote_types(x.dtype, torch.float32)
    scales = layer.weight_scale if x.dtype == torch.float64 else layer.weight_scale.to(x.dtype)
    out = sums.to(dtype).mul_(scale.reshape(-1, 1)).mul_(scales.t())
    if layer.bias is not None:
        out += layer.bias
    return out.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def _multiply_int8_on_cpu(layer: QuantLinear, x: Tensor) -> Tensor:
    """The same where rounding and scaling are done in one pass each: in torch they take as long as the product."""
    codes, scale = cpu.round_tokens(x.reshape(-1, layer.in_features).contiguous())
    sums = torch._int_mm(codes, layer.stored_codes().t())
    bias = None if layer.bias is None else layer.bias.float()
    out = cpu.scale_sums(sums, scale, layer.weight_scale.float().contiguous(), bias, x.dtype)
    return out.view(*x.shape[:-1], layer.out_features)


KERNELS: tuple[Kernel, ...] = (
    Kernel("cpu", cpu.fits, cpu.multiply),
    Kernel("int8", _fits_int8, _multiply_int8),
    Kernel("torch int4", torch_int4.fits, torch_int4.multiply),
    Kernel("torch", lambda layer, x: True, _dequantize_and_multiply),
)


def choose(layer: QuantLinear, x: Tensor) -> Kernel:
    """The first kernel that fits the layer's grid and the input's dtype and device."""
    for kernel in KERNELS:
        if kernel.fits(layer, x):
            return kernel
    raise AssertionError("the last kernel fits everything")


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
