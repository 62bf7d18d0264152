"""Packed layers while they are trained: modules that take the place of `QuantLinear` and give one back.

`ScaleTrained` trains scales and zero points; the codes stay packed (EfficientQAT, Chen et al. 2024, arXiv 2407.11062,
section 3.3). `WeightTrained` trains a float weight as well, from which the codes are rounded anew in every forward: the
gradient passes over the rounding (straight-through estimator), and the scale has the gradient of LSQ (Esser et al.
2020, arXiv 1902.08153, equation 3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.maths import packing
from compress.maths.grid import QuantSpec, storable
from compress.nn.quant_linear import QuantLinear

#: How far, in steps of the grid, a weight may lie from its code to start with: half a step is the border.
_EDGE = 0.45


class _FromCodes(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T with W = (codes - zero) * scale; W is made anew for the gradient, so that none is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, layer: ScaleTrained, dtype: torch.dtype
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, scale, zero)
        return functional.linear(x, _weight(layer.offset_codes(zero), scale).to(dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, scale, zero = ctx.saved_tensors
        gradient = upstream[0].to(ctx.dtype)
        offset = ctx.layer.offset_codes(zero)
        to_x = gradient @ _weight(offset, scale).to(ctx.dtype)
        to_weight = (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).float().unflatten(1, (scale.shape[1], -1))
        to_zero = None if zero is None else to_weight.sum(2) * -scale
        return to_x, (to_weight * offset).sum(2), to_zero, None, None


class ScaleTrained(nn.Module):  # type: ignore[misc]
    """A packed layer whose scale [out, G] and zero point [out, G] are float32 parameters. The zero point is rounded
    where it is used, and its gradient passes over that; `zero_trained` false: it is to stay."""

    def __init__(self, layer: QuantLinear, zero_trained: bool = True):
        super().__init__()
        self.zero_trained = zero_trained
        self.spec, self.in_features, self.out_features = layer.spec, layer.in_features, layer.out_features
        self.dtype, self.transposed, self.bias = layer.dtype, layer.transposed, layer.bias
        self.register_buffer("weight_packed", layer.weight_packed)
        self.scale = nn.Parameter(layer.weight_scale.float())
        zero = layer.zero_point()
        self.zero = None if zero is None else nn.Parameter(zero.float())

    def offset_codes(self, zero: Tensor | None) -> Tensor:
        """codes - zero, float32 [out, G, group]."""
        codes = packing.unpack(self.weight_packed, self.spec.bits, self.in_features)
        offset = codes.unflatten(1, (self.scale.shape[1], -1)).float()
        return offset if zero is None else offset.sub_(_storable_zero(zero, self.spec).unsqueeze(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast or else that of x."""
        dtype = _compute_dtype(x)
        y: Tensor = _FromCodes.apply(x, self.scale, self.zero, self, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def packed(self) -> QuantLinear:
        """The layer as trained. Its codes are those it came with."""
        codes = packing.unpack(self.weight_packed, self.spec.bits, self.in_features)
        return _packed(self, codes, self.scale.detach(), self.zero)


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """The weight as its grid holds it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(weight, scale, zero)
        _, offset, _ = _on_grid(weight, scale, zero, spec)
        return _weight(offset, scale)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        weight, scale, zero = ctx.saved_tensors
        steps, offset, inside = _on_grid(weight, scale, zero, ctx.spec)
        gradient = upstream[0].float().view_as(offset)
        to_scale = (gradient * torch.where(inside, offset - steps, offset)).sum(2)
        to_zero = None if zero is None else (gradient * ~inside).sum(2) * -scale
        return (gradient * inside).view_as(weight), to_scale, to_zero, None


class WeightTrained(nn.Module):  # type: ignore[misc]
    """A packed layer whose codes follow a float32 weight [out, in] that is trained, with scale and zero point.

    The weight starts as what the codes stand for, or as near to `like` [out, in] as it can be with these codes: from
    there, a weight that was rounded against its will needs less of a push.
    """

    def __init__(self, layer: QuantLinear, like: Tensor | None = None):
        super().__init__()
        self.spec, self.dtype, self.transposed, self.bias = layer.spec, layer.dtype, layer.transposed, layer.bias
        self.scale = nn.Parameter(layer.weight_scale.float())
        zero = layer.zero_point()
        self.zero = None if zero is None else nn.Parameter(zero.float())
        weight = layer.dequantize(torch.float32)
        if like is not None:
            reach = _EDGE * self.scale.detach().abs().repeat_interleave(layer.in_features // self.scale.shape[1], 1)
            weight = torch.minimum(torch.maximum(like.float(), weight - reach), weight + reach)
        self.weight = nn.Parameter(weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast or else that of x."""
        dtype = _compute_dtype(x)
        weight: Tensor = _Rounded.apply(self.weight, self.scale, self.zero, self.spec)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), weight.to(dtype), bias)

    def packed(self) -> QuantLinear:
        """The layer as trained: the weight rounded to the scale as it is stored."""
        scale = storable_scale(self.scale.detach(), self.spec)
        _, offset, _ = _on_grid(self.weight.detach(), scale, self.zero, self.spec)
        zero = 0.0 if self.zero is None else _storable_zero(self.zero.detach(), self.spec).unsqueeze(2)
        return _packed(self, (offset + zero).flatten(1).to(torch.int8), scale, self.zero)


Trained = ScaleTrained | WeightTrained


def storable_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale, which may be negative, as its dtype will hold it."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return storable(scale.abs(), spec) * sign


def _on_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """weight / scale, the nearest code less the zero point, and whether the grid reaches that far; [out, G, group]."""
    steps = weight.view(scale.shape[0], scale.shape[1], -1) / scale.unsqueeze(2)
    shift = torch.zeros_like(scale) if zero is None else _storable_zero(zero, spec)
    low, high = (spec.qmin - shift).unsqueeze(2), (spec.qmax - shift).unsqueeze(2)
    nearest = steps.round()
    inside = (nearest >= low) & (nearest <= high)
    return steps, torch.minimum(torch.maximum(nearest, low), high), inside


def _weight(offset: Tensor, scale: Tensor) -> Tensor:
    return (offset * scale.unsqueeze(2)).flatten(1)


def _storable_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    return zero.round().clamp(spec.qmin, spec.qmax)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _packed(layer: Trained, codes: Tensor, scale: Tensor, zero: Tensor | None) -> QuantLinear:
    stored = None if zero is None else _storable_zero(zero.detach(), layer.spec).to(torch.int8)
    return QuantLinear.from_codes(
        codes, storable_scale(scale, layer.spec), stored, replace(layer.spec), bias=layer.bias, dtype=layer.dtype,
        transposed=layer.transposed,
    )  # fmt: skip
