"""Grids in two layers, as ggml's k-quants have them: the scales of a row's groups are small multiples of one number.

256 neighbouring weights of a row are a super-block. It holds a float16 number `d`; each of its groups has a small
integer `k`, and the group's scale is `d * k`. Where groups have a minimum, that is `dmin * l`, made alike:

    weight  ~  code * scale                          (without minima; code from -2**(bits-1), k has a sign)
    weight  ~  (code - lowest code) * scale - minimum      (with minima; k and l from 0)

Everything outside works with the scale and the minimum of each group: the products have at most 19 significant bits,
float32 holds them exactly, and `factored` finds the two layers again. The blocks' bytes: `formats/gguf_blocks.py`.

The search: for each group by itself, ranges are tried, and scale and minimum fitted by least squares to the codes that
they give. Then both are put on multiples, for several `d`, and what that cost is taken back as far as it goes: `d` and
`dmin` are fitted to the codes, and each group tries its neighbouring multiples, turn by turn. No step is taken that
does not lower the error, and the error is always that of the grid as it will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.maths.grid import QuantSpec, storable
from compress.maths.named_grids import SuperBlock

# Fractions of a group's range that are tried; of asymmetric grids, of both its ends.
FACTORS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54, 0.46)
ENDS = (0.85, 0.7, 0.55, 0.4)
# Fractions of the `d` that just reaches a super-block's largest scale.
REACH = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75)
FITS, TURNS = 3, 3


def spread(super_scale: Tensor, multiples: Tensor) -> Tensor:
    """Scales (or minima) `[out, groups]` float32 from those of super-blocks `[out, supers]` and multiples
    `[out, groups]`."""
    parts = multiples.to(torch.float32).unflatten(1, (super_scale.shape[1], -1))
    return (parts * super_scale.to(torch.float32).unsqueeze(2)).flatten(1)


def factored(values: Tensor, block: SuperBlock) -> tuple[Tensor, Tensor]:
    """The float16 number of each super-block, `[out, supers]`, not negative, and int8 multiples `[out, groups]`, whose
    products are `values` `[out, groups]` exactly. CompressError where there are none: nothing is rounded here.

    >>> from compress.maths.grid import SUPER_BLOCKS
    >>> found = factored(torch.tensor([[1.5, 3.0] * 8]), SUPER_BLOCKS["gguf-q2_k"])
    >>> [part[0, :2].tolist() for part in found]     # 3 / 14 is no number of float16's, nor is 3 / 13; 3 / 12 is
    [[0.25], [6, 12]]
    """
    lowest, highest = block.multiples
    parts = values.to(torch.float32).unflatten(1, (-1, block.groups))
    largest = parts.abs().amax(2)
    found = largest == 0
    numbers, multiples = torch.zeros_like(largest), torch.zeros_like(parts)
    for whole in range(max(highest, -lowest), 0, -1):
        if bool(found.all()):
            break
        tried = (largest / whole).to(torch.float16).to(torch.float32)
        counts = (parts / tried.unsqueeze(2)).round_()
        inside = (counts >= lowest) & (counts <= highest) & (counts * tried.unsqueeze(2) == parts)
        fits = inside.all(2) & ~found
        numbers = torch.where(fits, tried, numbers)
        multiples = torch.where(fits.unsqueeze(2), counts, multiples)
        found |= fits
    if not bool(found.all()):
        raise CompressError(
            f"{block.kind} blocks hold multiples of one float16 number, and not all of these scales and minima are"
        )
    return numbers.to(torch.float16), multiples.flatten(1).to(torch.int8)


def find_super(
    grouped: Tensor, spec: QuantSpec, search: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and minimum `[rows, groups]` (None without minima) for groups `[rows, groups, size]`, as `find_params`
    gives them, in the dtype of `grouped`. No scale is 0."""
    found = _Search(grouped, spec, importance)
    found.cover()
    if search:
        found.try_ranges()
    found.snap(REACH if search else REACH[:1])
    if search:
        for _ in range(TURNS):
            found.fit_numbers()
            found.try_neighbours()
    return found.scale, found.minimum if spec.minima else None


class _Search:
    """The grid of each group so far: `scale`, `minimum` (zeros where the grid has none) and `error`, `[rows, groups]`.
    From `snap` on they are the products of `number`, `low` `[rows, supers, 1]` (floats that float16 holds) and
    `counts`, `low_counts` `[rows, supers, groups]`."""

    number: Tensor
    low: Tensor
    counts: Tensor
    low_counts: Tensor

    def __init__(self, grouped: Tensor, spec: QuantSpec, importance: Tensor | None):
        assert spec.super_block is not None
        self.grouped, self.spec, self.block = grouped, spec, spec.super_block
        self.first, self.last = (0, spec.qmax - spec.qmin) if spec.minima else (spec.qmin, spec.qmax)
        self.whole = importance if importance is not None and importance.dim() == 3 else None
        self.weights = importance if self.whole is None else self.whole.diagonal(dim1=1, dim2=2)
        self.scale, self.minimum, self.error = (grouped.new_zeros(grouped.shape[:2]) for _ in range(3))

    def codes(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest code of each weight, as floats; scales of 0 stand for groups of zeros."""
        step = scale.masked_fill(scale == 0, 1.0).unsqueeze(2)
        return (self.grouped + minimum.unsqueeze(2)).div_(step).round_().clamp_(self.first, self.last)

    def lost(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Squared error of each group, weighed."""
        change = self.codes(scale, minimum).mul_(scale.unsqueeze(2)).sub_(minimum.unsqueeze(2)).sub_(self.grouped)
        if self.whole is not None:
            return torch.einsum("rgi,gij->rgj", change, self.whole).mul_(change).sum(2)
        change.square_()
        return change.sum(2) if self.weights is None else change.mul_(self.weights).sum(2)

    def weighed(self, values: Tensor) -> Tensor:
        return values if self.weights is None else values * self.weights

    def take(self, scale: Tensor, minimum: Tensor) -> None:
        """Takes this grid in the groups where it is better."""
        error = self.lost(scale, minimum)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale, self.minimum = torch.where(better, scale, self.scale), torch.where(better, minimum, self.minimum)

    def cover(self) -> None:
        """Grids that reach every weight."""
        bottom, top = self.grouped.amin(2).clamp_(max=0), self.grouped.amax(2).clamp_(min=0)
        if self.spec.minima:
            self.scale, self.minimum = (top - bottom) / self.last, -bottom
        else:
            self.scale = torch.maximum(-bottom, top) / self.spec.half_range
        if not bool(self.scale.isfinite().all()):
            raise CompressError("the weight holds NaN or infinite values")
        self.error = self.lost(self.scale, self.minimum)

    def try_ranges(self) -> None:
        """Smaller ranges, each fitted to the codes that it gives."""
        scale, minimum = self.scale, self.minimum
        for factor in FACTORS:
            self.take(*self.fitted(scale * factor, minimum * factor))
            if not self.spec.minima:
                self.take(*self.fitted(scale * -factor, minimum))
        if self.spec.minima:
            top = scale * self.last - minimum
            for factor in ENDS:
                self.take(*self.fitted((top + minimum * factor) / self.last, minimum * factor))
                self.take(*self.fitted((top * factor + minimum) / self.last, minimum))
        for _ in range(FITS):
            self.take(*self.fitted(self.scale, self.minimum))

    def fitted(self, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum of least squares for the codes of these two. Where codes do not decide, they stay."""
        codes = self.codes(scale, minimum)
        shared = self.weighed(codes)
        xx, xy = (shared * codes).sum(2), (shared * self.grouped).sum(2)
        alone = xy / xx
        if not self.spec.minima:
            return torch.where(alone.isfinite() & (alone != 0), alone, scale), minimum
        x, y = shared.sum(2), self.weighed(self.grouped).sum(2)
        total = self.grouped.shape[2] if self.weights is None else self.weights.sum(1)
        spread = total * xx - x * x
        slope, offset = (total * xy - x * y) / spread, (x * xy - xx * y) / spread
        slope, offset = torch.where(offset > 0, slope, alone), offset.clamp(min=0)
        decided = slope.isfinite() & offset.isfinite() & (slope > 0)
        return torch.where(decided, slope, scale), torch.where(decided, offset, minimum)

    def supers(self, values: Tensor) -> Tensor:
        """`[rows, groups]` as `[rows, supers, groups of each]`."""
        return values.unflatten(1, (-1, self.block.groups))

    def half(self, values: Tensor, minima: bool = False) -> Tensor:
        """Numbers, not negative, as float16 will hold them; that of scales is never 0."""
        kept = storable(values, self.spec)
        return torch.where(values > 0, kept, 0.0) if minima else kept

    def snap(self, reach: Sequence[float]) -> None:
        """Puts scales on multiples of the best of several numbers, then the minima."""
        minimum = self.minimum
        self.number, self.counts = self.best_number(self.scale, reach, lambda scale: self.lost(scale, minimum))
        scale = (self.number * self.counts).flatten(1)
        self.low, self.low_counts = torch.zeros_like(self.number), torch.zeros_like(self.counts)
        if self.spec.minima:
            self.low, self.low_counts = self.best_number(minimum, reach, lambda low: self.lost(scale, low), True)
        self.settle(self.number, self.low, self.counts, self.low_counts)

    def best_number(
        self, values: Tensor, reach: Sequence[float], lost: Callable[[Tensor], Tensor], minima: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Of each super-block the number, and the multiples, that stand for `values` [rows, groups] with least loss."""
        parts = self.supers(values)
        largest = parts.abs().amax(2, keepdim=True) / self.block.multiples[1]
        best = number = counts = None
        for factor in reach:
            tried = self.half(largest * factor, minima)
            multiples = self.multiples(parts / tried.masked_fill(tried == 0, 1.0), minima)
            error = self.supers(lost((tried * multiples).flatten(1))).sum(2, keepdim=True)
            if best is None:
                best, number, counts = error, tried, multiples
            better = error < best
            best, number = torch.where(better, error, best), torch.where(better, tried, number)
            counts = torch.where(better, multiples, counts)
        assert number is not None
        assert counts is not None
        return number, counts

    def multiples(self, ratio: Tensor, minima: bool) -> Tensor:
        """Nearest allowed multiples; of scales none is 0, which no code could tell apart."""
        counts = ratio.round().clamp_(*self.block.multiples)
        if minima:
            return counts
        smallest = torch.where(ratio < 0, -1.0, 1.0).to(counts.dtype)
        return torch.where(counts == 0, smallest, counts)

    def settle(self, number: Tensor, low: Tensor, counts: Tensor, low_counts: Tensor) -> None:
        self.number, self.low, self.counts, self.low_counts = number, low, counts, low_counts
        self.scale, self.minimum = (number * counts).flatten(1), (low * low_counts).flatten(1)
        self.error = self.lost(self.scale, self.minimum)

    def fit_numbers(self) -> None:
        """Fits the two numbers of each super-block to the codes, by least squares, and takes what is better."""
        codes = self.codes(self.scale, self.minimum)
        x = codes.mul_(self.counts.flatten(1).unsqueeze(2))  # weight = number * x - low * low_counts
        shared = self.weighed(x)

        def total(values: Tensor) -> Tensor:
            return self.supers(values.sum(2)).sum(2, keepdim=True)

        xx, xy = total(shared * x), total(shared * self.grouped)
        number, low = xy / xx, self.low
        if self.spec.minima:
            ones = torch.ones_like(x) if self.weights is None else self.weights.expand_as(x)
            z = self.low_counts.flatten(1).unsqueeze(2)
            xz, zz, zy = total(shared * z), total(ones * z * z), total(self.weighed(self.grouped) * z)
            spread = xx * zz - xz * xz
            joint = spread > 0
            number = torch.where(joint, (xy * zz - zy * xz) / spread, number)
            low = torch.where(joint, ((xy * xz - xx * zy) / spread).clamp(min=0), low)
            low = self.half(low, True)
        number = self.half(torch.where(number > 0, number, self.number))  # false for NaN as well
        self.take_supers(number, low, self.counts, self.low_counts)

    def take_supers(self, number: Tensor, low: Tensor, counts: Tensor, low_counts: Tensor) -> None:
        """Takes these in the super-blocks where they are better."""
        error = self.lost((number * counts).flatten(1), (low * low_counts).flatten(1))
        better = self.supers(error).sum(2, keepdim=True) < self.supers(self.error).sum(2, keepdim=True)
        self.settle(
            torch.where(better, number, self.number), torch.where(better, low, self.low),
            torch.where(better, counts, self.counts), torch.where(better, low_counts, self.low_counts),
        )  # fmt: skip

    def try_neighbours(self) -> None:
        """One multiple more or less, of scale, of minimum and of both, in each group by itself."""
        counts, low_counts = self.counts, self.low_counts
        steps = (-1, 0, 1) if self.spec.minima else (0,)
        for up in (-1, 0, 1):
            tried = self.multiples(counts + up, False)
            for aside in steps:
                below = self.multiples(low_counts + aside, True) if self.spec.minima else low_counts
                scale, minimum = (self.number * tried).flatten(1), (self.low * below).flatten(1)
                error = self.lost(scale, minimum)
                better = error < self.error
                self.error = torch.where(better, error, self.error)
                wide = self.supers(better)
                self.counts = torch.where(wide, tried, self.counts)
                self.low_counts = torch.where(wide, below, self.low_counts)
        self.settle(self.number, self.low, self.counts, self.low_counts)
