"""torch's own product with 4-bit codes on the CPU, for where our kernel was not built: `_weight_int4pack_mm_for_cpu`.

It wants the codes in an order of its own, which is made when a layer is first called and kept beside ours: half a byte
more a weight. It is fast with bfloat16 inputs only (55 times slower with others), and holds scales in that dtype, so
symmetric grids with bfloat16 scales lose nothing in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.nn.prepared_layer import PreparedLayer

if TYPE_CHECKING:
    from compress.nn.quant_linear import QuantLinear

_GROUPS = (32, 64, 128, 256)
#: Rows of a layer come in multiples of this.
_ROWS = 16


class Reordered(PreparedLayer):
    """A layer's codes and scales as torch's operator takes them."""

    def __init__(self, layer: QuantLinear):
        super().__init__(layer)
        codes = layer.stored_codes().to(torch.int32) + 8
        self.codes: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = self.scale.t()
        self.scales = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()


def why_not(layer: QuantLinear) -> str | None:
    """Why torch's operator cannot serve a layer, as the end of a sentence; None where it can."""
    spec = layer.spec
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return "this torch has no product with 4-bit codes"
    if spec.stored != "packed" or spec.bits != 4 or not spec.symmetric or spec.activations or spec.trellis:
        return "torch's product is for 4 bits on symmetric grids, and inputs that are not rounded"
    if layer.weight_scale.dtype != torch.bfloat16:
        return f"torch's product has scales in bfloat16, and these are {spec.scale_dtype}"
    groups = layer.weight_scale.shape[1]
    if layer.in_features % groups or layer.in_features // groups not in _GROUPS or layer.out_features % _ROWS:
        return f"torch's product takes groups of {', '.join(map(str, _GROUPS))} and rows in multiples of {_ROWS}"
    return None


def fits(layer: QuantLinear, x: Tensor) -> bool:
    """Whether it can compute this product; not where gradients are asked for."""
    if layer.exact or not x.is_cpu or x.dtype != torch.bfloat16 or not x.numel():
        return False
    if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    return layer.weight_scale.device.type == "cpu" and why_not(layer) is None


def multiply(layer: QuantLinear, x: Tensor) -> Tensor:
    """x bfloat16 [..., in] times the packed weight, sums in float32: bfloat16 [..., out]."""
    kept = Reordered.of(layer)
    group = layer.in_features // layer.weight_scale.shape[1]
    flat = x.reshape(-1, layer.in_features).contiguous()
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, kept.codes, group, kept.scales)
    if layer.bias is not None:
        out = out + layer.bias.to(x.dtype)
    return out.view(*x.shape[:-1], layer.out_features)
