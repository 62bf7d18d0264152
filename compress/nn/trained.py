"""Packed layers while they are trained: modules that take the place of `QuantLinear` and give one back.

`ScaleTrained` trains scales and zero points; the codes stay packed (EfficientQAT, Chen et al. 2024, arXiv 2407.11062,
section 3.3). `WeightTrained` trains a float weight as well, from which the codes are rounded anew in every forward: the
gradient passes over the rounding (straight-through estimator), and the scale has the gradient of LSQ (Esser et al.
2020, arXiv 1902.08153, equation 3).

On a grid with super-blocks it is their numbers that are trained, and the groups' multiples of these stay: the grid is
at every moment one that the blocks hold, but for the rounding of a number to float16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import CompressError
from compress.maths import packing, trellis
from compress.maths.grid import QuantSpec, storable
from compress.maths.super_blocks import spread
from compress.nn.quant_linear import MULTIPLES, QuantLinear

#: How far, in steps of the grid, a weight may lie from its code to start with: half a step is the border.
_EDGE = 0.45
#: Squared distance, relative to the weight, from which what was rounded must have been another weight.
_OTHER = 0.5


class _FromCodes(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T with W = (codes - zero) * scale; W is made anew for the gradient, so that none is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, layer: ScaleTrained, dtype: torch.dtype
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, scale, zero)
        return functional.linear(x, _weight(layer.offset_codes(zero), scale, zero, layer.spec).to(dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, scale, zero = ctx.saved_tensors
        gradient = upstream[0].to(ctx.dtype)
        offset = ctx.layer.offset_codes(zero)
        to_x = gradient @ _weight(offset, scale, zero, ctx.layer.spec).to(ctx.dtype)
        to_weight = (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).float().unflatten(1, (scale.shape[1], -1))
        to_zero = None if zero is None else to_weight.sum(2) * _slope(scale, ctx.layer.spec)
        return to_x, (to_weight * offset).sum(2), to_zero, None, None


class _TrainedGrid(nn.Module):  # type: ignore[misc]
    """What of a packed layer's grid is trained, float32: `scale` [out, G] and `zero` [out, G] (None without); on a grid
    with super-blocks `scale` and `zero` [out, S], from which `grid` makes those of the groups."""

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.spec, self.in_features, self.out_features = layer.spec, layer.in_features, layer.out_features
        self.dtype, self.transposed, self.bias = layer.dtype, layer.transposed, layer.bias
        if layer.spec.super_block is None:
            scale, zero = layer.weight_scale, layer.zero_point()
            counts: list[Tensor | None] = [None, None]
        else:
            pairs = [layer.in_two(name) for name in list(MULTIPLES)[: 1 + layer.spec.minima]]
            scale, zero = pairs[0][0], pairs[1][0] if layer.spec.minima else None
            counts = [pair[1].float() for pair in pairs] + [None]
        self.register_buffer("multiples", counts[0])
        self.register_buffer("minimum_multiples", counts[1])
        self.scale = nn.Parameter(scale.float())
        self.zero = None if zero is None else nn.Parameter(zero.float())

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (or minimum) of the groups, [out, G], with gradients to what is trained."""
        return self._groups(self.scale, self.zero)

    def stored_grid(self) -> tuple[Tensor, Tensor | None]:
        """The same as it will be stored, without gradients. Numbers of super-blocks do not change their sign."""
        scale, zero = self.scale.detach(), None if self.zero is None else self.zero.detach()
        if self.multiples is not None:
            scale = scale.clamp(min=0)
        if zero is not None and self.spec.minima:
            zero = torch.where(zero > 0, storable(zero.clamp(min=0), self.spec), 0.0)
        elif zero is not None:
            zero = _storable_zero(zero, self.spec)
        return self._groups(storable_scale(scale, self.spec), zero)

    def _groups(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.multiples is None:
            return scale, zero
        return spread(scale, self.multiples), None if zero is None else spread(zero, self.minimum_multiples)

    def units(self) -> tuple[float, float, float]:
        """What learning rates are counted in: the mean scale of the groups, for weights; for `scale` and for `zero`
        the mean of their own (a zero point is counted in steps)."""
        scale, size = self.grid()[0].detach().abs().mean(), self.scale.detach().abs().mean()
        low = float(self.zero.detach().abs().mean()) if self.zero is not None and self.spec.minima else 1.0
        return float(scale), float(size), low

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., in] times a weight [out, in], plus the bias, in the dtype of autocast or else that of x."""
        dtype = _compute_dtype(x)
        return functional.linear(x.to(dtype), weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def repacked(self, codes: Tensor) -> QuantLinear:
        """The packed layer with these codes."""
        scale, zero = self.stored_grid()
        stored = None if zero is None else zero.to(self.spec.zero_dtype)
        return QuantLinear.from_codes(
            codes, scale, stored, replace(self.spec), bias=self.bias, dtype=self.dtype, transposed=self.transposed
        )


class ScaleTrained(_TrainedGrid):
    """A packed layer whose scales and zero points are float32 parameters. The zero point is rounded where it is used,
    and its gradient passes over that; `zero_trained` false: it is to stay."""

    def __init__(self, layer: QuantLinear, zero_trained: bool = True):
        super().__init__(layer)
        self.zero_trained = zero_trained
        self.register_buffer("weight_packed", layer.weight_packed)

    def offset_codes(self, zero: Tensor | None) -> Tensor:
        """codes - zero, or codes from 0 on where there are minima, or the numbers that codes on a trellis stand for;
        float32 [out, G, group]."""
        codes = packing.unpack(self.weight_packed, self.spec.bits, self.in_features)
        codes = trellis.values(codes, self.spec.bits) if self.spec.trellis else codes
        offset = codes.unflatten(1, (self.spec.groups(self.in_features), -1)).float()
        if self.spec.minima:
            return offset.sub_(self.spec.qmin)
        return offset if zero is None else offset.sub_(_storable_zero(zero, self.spec).unsqueeze(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast or else that of x."""
        dtype = _compute_dtype(x)
        y: Tensor = _FromCodes.apply(x, *self.grid(), self, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def packed(self) -> QuantLinear:
        """The layer as trained. Its codes are those it came with."""
        return self.repacked(packing.unpack(self.weight_packed, self.spec.bits, self.in_features))


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """The weight as its grid holds it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(weight, scale, zero)
        _, offset, _ = _on_grid(weight, scale, zero, spec)
        return _weight(offset, scale, zero, spec)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        weight, scale, zero = ctx.saved_tensors
        steps, offset, inside = _on_grid(weight, scale, zero, ctx.spec)
        gradient = upstream[0].float().view_as(offset)
        to_scale = (gradient * torch.where(inside, offset - steps, offset)).sum(2)
        to_zero = None if zero is None else (gradient * ~inside).sum(2) * _slope(scale, ctx.spec)
        return (gradient * inside).view_as(weight), to_scale, to_zero, None


class WeightTrained(_TrainedGrid):
    """A packed layer whose codes follow a float32 weight [out, in] that is trained, with scale and zero point.

    The weight starts as what the codes stand for, or as near to `like` [out, in] as it can be with these codes: from
    there, a weight that was rounded against its will needs less of a push.
    """

    def __init__(self, layer: QuantLinear, like: Tensor | None = None):
        super().__init__(layer)
        weight = layer.dequantize(torch.float32)
        if like is not None:
            scale = layer.scales().float().abs()
            reach = _EDGE * scale.repeat_interleave(layer.in_features // scale.shape[1], 1)
            weight = torch.minimum(torch.maximum(like.float(), weight - reach), weight + reach)
        self.weight = nn.Parameter(weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast or else that of x."""
        return self.product(x, _Rounded.apply(self.weight, *self.grid(), self.spec))

    def packed(self) -> QuantLinear:
        """The layer as trained: the weight rounded to the scale as it is stored."""
        scale, zero = self.stored_grid()
        _, offset, _ = _on_grid(self.weight.detach(), scale, zero, self.spec)
        if self.spec.minima:
            offset += self.spec.qmin
        elif zero is not None:
            offset += zero.unsqueeze(2)
        return self.repacked(offset.flatten(1).to(torch.int8))


class _OnTrellis(torch.autograd.Function):  # type: ignore[misc]
    """The weight of rows on a trellis, `numbers * scale`; the gradient passes over the rounding of `steps`, as far as
    they are within `_row_step` of what they became, four standard deviations of what rounding changes: a grid's end
    stops weights, and a trellis has none."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, scale: Tensor, bits: int, known: Tensor | None) -> Tensor:
        numbers = trellis.round_rows(steps, bits)[1] if known is None else known.float()
        near = (steps - numbers).abs() < _row_step(bits)
        ctx.save_for_backward(scale, _kept(numbers) if known is None else known, near)
        return _weight(numbers.unflatten(1, (scale.shape[1], -1)), scale, None, QuantSpec(bits))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scale, numbers, near = ctx.saved_tensors
        gradient = upstream[0].float().unflatten(1, (scale.shape[1], -1))
        to_scale = torch.linalg.vecdot(gradient, numbers.float().view_as(gradient))
        return (gradient * scale.unsqueeze(2)).flatten(1).mul_(near), to_scale, None, None


class RowTrained(_TrainedGrid):
    """A packed layer on a trellis whose rows are rounded anew, in every forward, from what is trained.

    That is `weight` [out, in] in units of the scale, not the weight itself: on integers a scale that shrinks meets the
    ends of the grid, which say so in its gradient; on a trellis nothing would hold it. It starts from what the codes
    stand for, or half-way to `like` [out, in]: from there most rows round to the same codes. A `like` that is no nearer
    than any other weight would be, a student's or in another basis, is left alone.
    """

    def __init__(self, layer: QuantLinear, like: Tensor | None = None):
        super().__init__(layer)
        numbers = trellis.values(layer.stored_codes(), layer.spec.bits)
        if like is not None:
            scale = layer.scales().float()
            wanted = like.detach().float() / scale.repeat_interleave(layer.in_features // scale.shape[1], 1)
            way = wanted - numbers
            if bool(way.square().sum() < _OTHER * wanted.square().sum()):
                numbers = numbers + torch.where(way.abs() < 2 * _row_step(layer.spec.bits), way / 2, 0.0)
        self.weight = nn.Parameter(numbers)
        self._settled: tuple[int, int, Tensor] | None = None

    @torch.no_grad()
    def settle(self, rows: Tensor, share: float) -> None:
        """Draws `rows`, the weight or some rows of it, to the numbers that they round to, by this share of the way: a
        weight that no gradient holds at the border of two paths leaves it (Nagel et al. 2022, arXiv 2203.08487, section
        4.1, where it is a term of the loss; here it does not go through the optimizer, as a weight decay). They stay
        nearest to these numbers, so that the next forward need not look for them."""
        numbers = trellis.round_rows(rows, self.spec.bits)[1]
        rows.lerp_(numbers, share)
        self._settled = (rows.data_ptr(), rows._version, _kept(numbers))

    def units(self) -> tuple[float, float, float]:
        """As of any grid, but for weights: a step of the trellis."""
        return (_row_step(self.spec.bits), *super().units()[1:])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast or else that of x."""
        return self.product(x, _OnTrellis.apply(self.weight, self.scale, self.spec.bits, self._known()))

    def _known(self) -> Tensor | None:
        """What the weight rounds to, if `settle` was the last to change it."""
        if self._settled is None or self._settled[:2] != (self.weight.data_ptr(), self.weight._version):
            return None
        return self._settled[2]

    def packed(self) -> QuantLinear:
        """The layer as trained. CompressError where training diverged: paths are found for any number."""
        if not bool(self.weight.isfinite().all()):
            raise CompressError("training diverged: a weight is NaN or infinite. Use lower learning rates")
        return self.repacked(trellis.round_rows(self.weight.detach(), self.spec.bits)[0])


Trained = ScaleTrained | WeightTrained | RowTrained


def weight_trained(layer: QuantLinear, like: Tensor | None = None) -> WeightTrained | RowTrained:
    """The layer with a weight that is trained, starting near `like` [out, in] if that is given."""
    return RowTrained(layer, like) if layer.spec.trellis else WeightTrained(layer, like)


def storable_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale, which may be negative, as its dtype will hold it."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return storable(scale.abs(), spec) * sign


def _on_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """weight / scale, the nearest code less the zero point, and whether the grid reaches that far; [out, G, group].
    With minima: (weight + minimum) / scale, and codes from 0 on."""
    if spec.minima and zero is not None:
        steps = (weight.view(*scale.shape, -1) + zero.unsqueeze(2)) / scale.unsqueeze(2)
        nearest, last = steps.round(), 2 * spec.half_range
        return steps, nearest.clamp(0, last), (nearest >= 0) & (nearest <= last)
    steps = weight.view(scale.shape[0], scale.shape[1], -1) / scale.unsqueeze(2)
    shift = torch.zeros_like(scale) if zero is None else _storable_zero(zero, spec)
    low, high = (spec.qmin - shift).unsqueeze(2), (spec.qmax - shift).unsqueeze(2)
    nearest = steps.round()
    inside = (nearest >= low) & (nearest <= high)
    return steps, torch.minimum(torch.maximum(nearest, low), high), inside


def _weight(offset: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """[out, in] from what `_on_grid` says of the codes."""
    weight = offset * scale.unsqueeze(2)
    return (weight if zero is None or not spec.minima else weight - zero.unsqueeze(2)).flatten(1)


def _slope(scale: Tensor, spec: QuantSpec) -> Tensor:
    """How a weight moves with its zero point, or its minimum."""
    return -torch.ones_like(scale) if spec.minima else -scale


def _storable_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    return zero.round().clamp(spec.qmin, spec.qmax)


def _kept(numbers: Tensor) -> Tensor:
    """Numbers of a trellis in half of the memory; exact: they are multiples of 1/32 below 4."""
    return numbers.half()


def _row_step(bits: int) -> float:
    """How far numbers on a trellis lie apart, in units of the scale: four standard deviations hold 2**bits of them."""
    return 4.0 / (1 << bits)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
