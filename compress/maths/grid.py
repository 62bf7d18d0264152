"""Integer grids: from a float weight to codes, scales and zero points, and back.

A weight is `[out, in]`. Each row is cut into groups of `group_size` neighbouring columns; a group has one scale and,
when asymmetric, one zero point. Codes are signed integers `-2**(bits-1) .. 2**(bits-1)-1`, and

    weight  ~  (code - zero) * scale

This is the convention of the compressed-tensors format, so that what is computed here is what a checkpoint holds. On
the grid "trellis" what a code stands for depends on the codes before it (`maths/trellis.py`). A scale is rounded to the
dtype it is stored in *before* codes are chosen: the codes then fit the scale that a reader will see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError, StartError
from compress.maths import trellis
from compress.maths.named_grids import NAMED_GRIDS, SHORT_BITS, SUPER_BLOCKS, SUPER_COLUMNS, TRELLIS, SuperBlock

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

#: How codes are stored. "packed": integers in 32-bit words; the others one code an element, as those types.
STORED_DTYPES = {"packed": torch.int32, "int8": torch.int8, "float8": torch.float8_e4m3fn}

# A layer is worked on a few rows at a time: temporaries stay in the processor's cache, and small beside the layer.
CHUNK_ELEMENTS = 1 << 18

# Fractions of a group's range that the search tries, and the steps that it then goes from the best of them. Together
# they find as small an error as 72 even steps do, with half the work.
COARSE_FACTORS = tuple(1.0 - 0.06 * step for step in range(15))
FINE_STEPS = (-0.045, -0.03, -0.015, 0.015, 0.03, 0.045)
END_STEPS = (-0.36, -0.24, -0.12, -0.06, 0.06, 0.12, 0.24, 0.36)


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is rounded. `group_size` -1 means one group per row ("per channel").

    stored: a key of `STORED_DTYPES`; "float8" codes are numbers of 4 exponent and 3 fraction bits instead of integers.
    activations: the layer's inputs are rounded as well, to the type of the codes, with a scale for each token that is
    found when the token comes ("dynamic"). See `compress.maths.activations`.
    grid: a key of `NAMED_GRIDS`: bits, group size and symmetry are its own, and its scales what its blocks can hold; or
    "trellis": codes of 2 to 4 bits along a trellis.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    scale_dtype: str = "float16"
    stored: str = "packed"
    activations: bool = False
    grid: str | None = None

    def __post_init__(self) -> None:
        if self.trellis:
            if self.bits not in trellis.BITS or not self.symmetric or self.stored != "packed":
                raise StartError(f"grid {TRELLIS} is for symmetric grids of {', '.join(map(str, trellis.BITS))} bits")
        elif self.grid is not None:
            if self.grid not in NAMED_GRIDS:
                raise StartError(f"grid is {self.grid!r}: one of {', '.join((*NAMED_GRIDS, TRELLIS))} can be used")
            own = NAMED_GRIDS[self.grid]
            if any(getattr(self, name) != value for name, value in own.items()) or self.stored != "packed":
                words = ", ".join(f"{name} {value}" for name, value in own.items())
                raise StartError(f"grid {self.grid} is {words}")
            if self.grid in SUPER_BLOCKS and self.scale_dtype != "float32":
                raise StartError(f"scales on grid {self.grid} are float32, and scale_dtype is {self.scale_dtype}")
        if not 2 <= self.bits <= 8:
            raise StartError(f"bits is {self.bits}: 2 to 8 can be used")
        if self.group_size != -1 and self.group_size < 1:
            raise StartError(
                f"group_size is {self.group_size}: use a size of at least 1, or -1 for one scale per channel"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise StartError(f"scale_dtype is {self.scale_dtype!r}: one of {', '.join(SCALE_DTYPES)} can be used")
        if self.stored not in STORED_DTYPES:
            raise StartError(f"stored is {self.stored!r}: one of {', '.join(STORED_DTYPES)} can be used")
        if self.stored != "packed" and (self.bits, self.group_size, self.symmetric) != (8, -1, True):
            raise StartError(f"{self.stored} codes have 8 bits, one scale per channel and no zero point")
        if self.activations and self.stored == "packed":
            raise StartError("activations are rounded to int8 or float8, and only where weights are stored so")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def half_range(self) -> float:
        """What a symmetric grid divides the largest magnitude by: half the span of the codes."""
        return float(torch.finfo(torch.float8_e4m3fn).max) if self.stored == "float8" else float(2**self.bits - 1) / 2

    @property
    def trellis(self) -> bool:
        """Whether a code's meaning depends on the codes before it in its row."""
        return self.grid == TRELLIS

    @property
    def of_blocks(self) -> bool:
        """Whether it is the grid of another program's blocks."""
        return self.grid in NAMED_GRIDS

    @property
    def super_block(self) -> SuperBlock | None:
        """Of a grid with super-blocks: what they hold."""
        return SUPER_BLOCKS.get(self.grid) if self.grid is not None else None

    @property
    def minima(self) -> bool:
        """Whether groups have a minimum, of the scale's dtype, in the place of an integer zero point:
        `(code - qmin) * scale - minimum`."""
        return self.grid in SUPER_BLOCKS and not self.symmetric

    @property
    def zero_dtype(self) -> torch.dtype:
        """What a tensor of zero points is, or of minima."""
        return torch.float32 if self.minima else torch.int8

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_dtype]

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale, in a layer with this many; StartError if the groups do not come out even."""
        if self.group_size == -1:
            return columns
        if self.super_block is not None and columns % SUPER_COLUMNS:
            raise StartError(
                f"grid {self.grid} has super-blocks of {SUPER_COLUMNS} weights, which do not divide the {columns} "
                "columns of the layer: name the layer in `skip`, and it stays as it is, or use a grid of blocks of "
                f"32 ({', '.join(name for name in NAMED_GRIDS if name not in SUPER_BLOCKS)})"
            )
        if columns % self.group_size:
            if self.of_blocks:
                raise StartError(
                    f"grid {self.grid} has blocks of {self.group_size}, which do not divide the {columns} columns of "
                    "the layer: name the layer in `skip`, and it stays as it is"
                )
            sizes = [size for size in range(2, columns + 1) if columns % size == 0]
            raise StartError(
                f"group_size {self.group_size} does not divide the {columns} columns of the layer; "
                f"sizes that do: {', '.join(map(str, sizes))}, or -1 for one scale per channel"
            )
        return self.group_size

    def groups(self, columns: int) -> int:
        """Groups in each row of a layer with this many columns."""
        return columns // self.columns_per_group(columns)

    def columns_together(self, columns: int) -> int:
        """Columns whose grids are found together."""
        return self.columns_per_group(columns) if self.super_block is None else SUPER_COLUMNS


def eight_bit_spec(layer_dtype: torch.dtype, stored: str, activations: bool) -> QuantSpec:
    """The grid of a layer whose codes are stored one an element ("int8" or "float8"), with scales of its own dtype:
    there is one a row, so their size is nothing."""
    return QuantSpec(8, scale_dtype=str(layer_dtype).removeprefix("torch."), stored=stored, activations=activations)


def spec_for(
    layer_dtype: torch.dtype, bits: int, group_size: int, symmetric: bool, grid: str | None = None
) -> QuantSpec:
    """The grid for a layer of this dtype: scales are bfloat16 in a bfloat16 model, float16 in any other.

    A bfloat16 model may hold weights that float16 cannot; float16 scales are 8 times finer where they fit.
    """
    scale_dtype = "bfloat16" if layer_dtype == torch.bfloat16 else "float16"
    if grid in SUPER_BLOCKS:
        scale_dtype = "float32"
    return QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype, grid=grid)


def named_spec(layer_dtype: torch.dtype, grid: str) -> QuantSpec:
    """The spec of a grid in `NAMED_GRIDS` for a layer of this dtype."""
    return spec_for(layer_dtype, **NAMED_GRIDS[grid], grid=grid)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to calculate in: float32, or float64 for a float64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def find_params(
    weight: Tensor, spec: QuantSpec, search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale `[out, groups]` (in the spec's scale dtype) and zero point `[out, groups]` (int8; None when symmetric).

    Without `search` the grid covers the group: symmetric `scale = max|w| / ((2**bits - 1) / 2)`; asymmetric
    `scale = (max - min) / (2**bits - 1)` with 0 inside the range, `zero = round(qmin - min / scale)`. With it, smaller
    ranges are tried as well and the one with the least `sum(importance * (w - rounded)**2)` per group is kept
    (`importance` is `[in]`, for instance the diagonal of a Hessian; all ones if None). With `importance`
    `[groups, size, size]`, the blocks on a Hessian's diagonal, it is `(w - rounded) H (w - rounded)^T`: what the group
    by itself changes of the layer's output. A symmetric grid has one code more below zero than above; the search may
    turn it round, and the scale of such a group is negative. On a grid with minima, these stand in the zero points'
    place, in float32; on a trellis, the scale is fitted to what rounding makes of the whole row.

    A group of zeros gets scale 1 and zero 0; on a trellis, which has no zero, the smallest normal float16. A scale too
    small for its dtype becomes the smallest number that it holds; one too large, or a weight that is not finite, is a
    CompressError. Groups that do not divide: StartError.
    """
    rows, columns = weight.shape
    size = spec.columns_per_group(columns)
    scale = torch.empty(rows, columns // size, dtype=spec.torch_scale_dtype, device=weight.device)
    zero = None if spec.symmetric else torch.empty_like(scale, dtype=spec.zero_dtype)
    if importance is not None:
        importance = importance.to(compute_dtype(weight))
        importance = importance.view(columns // size, size) if importance.dim() == 1 else importance
    if spec.super_block is not None:
        from compress.maths.super_blocks import find_super
    for part in row_chunks(rows, columns):
        grouped = weight[part].to(compute_dtype(weight)).unflatten(1, (-1, size))
        if spec.super_block is not None:
            scale[part], minimum = find_super(grouped, spec, search, importance)
            if zero is not None and minimum is not None:
                zero[part] = minimum
            continue
        if spec.trellis:
            scale[part] = storable(trellis.find_scales(grouped, spec.bits, search, importance), spec)
            continue
        low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
        found = _search(grouped, low, high, spec, importance) if search else _cover(low, high, spec)
        scale[part] = found[0].to(spec.torch_scale_dtype)
        if zero is not None:
            zero[part] = found[1].to(torch.int8)
    return scale, zero


def quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes `[out, in]`, int8, or float8_e4m3fn for a grid of those: the nearest point of each weight's grid (halves go
    to the even one), or the row's cheapest path on a trellis."""
    rows, columns = weight.shape
    size = spec.columns_per_group(columns)
    code_dtype = torch.float8_e4m3fn if spec.stored == "float8" else torch.int8
    codes = torch.empty(rows, columns, dtype=code_dtype, device=weight.device)
    dtype = compute_dtype(weight)
    for part in row_chunks(rows, columns):
        grouped = weight[part].to(dtype).unflatten(1, (-1, size))
        offset = None if zero is None else zero[part].to(dtype)
        codes[part] = round_groups(grouped, scale[part].to(dtype), offset, spec).flatten(1).to(code_dtype)
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Weight `[out, in]` of `dtype`: `(code - zero) * scale`, every step in `dtype`, as compressed-tensors does it. The
    rows are whole: on a trellis, a code's number is that of its window."""
    numbers = trellis.values(codes, spec.bits) if spec.trellis else codes
    grouped = numbers.unflatten(1, (-1, spec.columns_per_group(codes.shape[1]))).to(dtype)
    if spec.minima and zero is not None:
        grouped = grouped.sub_(spec.qmin).mul_(scale.to(dtype).unsqueeze(2))
        return grouped.sub_(zero.to(dtype).unsqueeze(2)).flatten(1)
    if zero is not None:
        grouped -= zero.to(dtype).unsqueeze(2)
    return grouped.mul_(scale.to(dtype).unsqueeze(2)).flatten(1)


def storable(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale as its dtype will hold it (same dtype as given); see `find_params` for the ends of the range."""
    limits = torch.finfo(torch.float16 if spec.of_blocks else spec.torch_scale_dtype)
    largest = limits.max if not spec.of_blocks or spec.symmetric else limits.max / 2**spec.bits
    if not bool((scale <= largest).all()):
        if not bool(scale.isfinite().all()):
            raise CompressError("the weight holds NaN or infinite values")
        raise CompressError(
            f"a scale of {float(scale.max()):.4g} does not fit {spec.grid if spec.of_blocks else spec.scale_dtype}, "
            f"which ends at {largest:.4g}: the weight holds values too large to be stored so"
            + ("" if spec.of_blocks else "; load the model in bfloat16")
        )
    # float16 is used down to its smallest subnormal: an 8-bit grid for weights below 0.008 lies there already.
    smallest = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    kept = scale.clamp(min=smallest)
    if spec.of_blocks and not spec.symmetric and not spec.minima:
        fraction, exponent = torch.frexp(kept)
        kept = torch.ldexp((fraction * 2**SHORT_BITS).round_().div_(2**SHORT_BITS), exponent)
    kept = kept.to(spec.torch_scale_dtype)
    # What float16 makes of a bfloat16 number is one again: where it holds fewer bits, they are fewer than bfloat16's 8.
    return (kept.to(torch.float16) if spec.of_blocks else kept).to(scale.dtype)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a weight, as many at a time as make `CHUNK_ELEMENTS` weights."""
    step = max(1, CHUNK_ELEMENTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _cover(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero (both float, shaped like `low`) of the grid from `low` <= 0 to `high` >= 0."""
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.half_range
        return storable(scale.masked_fill(scale == 0, 1.0), spec), torch.zeros_like(scale)
    scale = (high - low) / (2 * spec.half_range)
    scale = storable(scale.masked_fill(scale == 0, 1.0), spec)
    return scale, (spec.qmin - low / scale).round_().clamp_(spec.qmin, spec.qmax).masked_fill_(low == high, 0.0)


def round_groups(grouped: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes as floats, `[rows, groups, size]`. The zero point is added after rounding: that is exact."""
    if spec.stored == "float8":
        largest = spec.half_range
        return (grouped / scale.unsqueeze(2)).clamp_(-largest, largest).to(torch.float8_e4m3fn).to(grouped.dtype)
    if spec.trellis:
        codes = trellis.round_rows((grouped / scale.unsqueeze(2)).flatten(1), spec.bits)[0]
        return codes.view(grouped.shape).to(grouped.dtype)
    if spec.minima and zero is not None:
        codes = (grouped + zero.unsqueeze(2)).div_(scale.unsqueeze(2)).round_().add_(spec.qmin)
        return codes.clamp_(spec.qmin, spec.qmax)
    codes = (grouped / scale.unsqueeze(2)).round_()
    if zero is not None:
        codes += zero.unsqueeze(2)
    return codes.clamp_(spec.qmin, spec.qmax)


def _error(grouped: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, importance: Tensor | None) -> Tensor:
    """Weighted squared error of rounding, `[rows, groups]`."""
    rounded = round_groups(grouped, scale, zero, spec)
    if zero is not None:
        rounded -= zero.unsqueeze(2)
    error = rounded.mul_(scale.unsqueeze(2)).sub_(grouped)
    if importance is not None and importance.dim() == 3:
        return torch.einsum("rgi,gij->rgj", error, importance).mul_(error).sum(2)
    error = error.square_()
    if importance is not None:
        error *= importance
    return error.sum(2)


class _Search:
    """The least-error grid of each group so far, and what it was: fractions of both ends, and the sign of the scale."""

    def __init__(self, grouped: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, importance: Tensor | None):
        self.grouped, self.low, self.high, self.spec, self.importance = grouped, low, high, spec, importance
        self.error = torch.full_like(low, torch.inf)
        self.scale, self.zero = torch.ones_like(low), torch.zeros_like(low)
        self.low_factor, self.high_factor, self.sign = (torch.ones_like(low) for _ in range(3))

    def attempt(self, low_factor: float | Tensor, high_factor: float | Tensor, sign: float | Tensor = 1.0) -> None:
        """Takes the grid over this fraction of the range in the groups where it is better."""
        scale, zero = _cover(self.low * low_factor, self.high * high_factor, self.spec)
        scale *= sign
        error = _error(self.grouped, scale, None if self.spec.symmetric else zero, self.spec, self.importance)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        self.low_factor = torch.where(better, low_factor, self.low_factor)
        self.high_factor = torch.where(better, high_factor, self.high_factor)
        self.sign = torch.where(better, sign, self.sign)


def _search(
    grouped: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The least-error grid: coarse steps from the whole range down, then finer ones around the best of them.

    Symmetric grids are tried with both signs of the scale; of asymmetric ones, each end is moved by itself as well.
    """
    best = _Search(grouped, low, high, spec, importance)
    for factor in COARSE_FACTORS:
        best.attempt(factor, factor)
        if spec.symmetric:
            best.attempt(factor, factor, -1.0)
    start_low, start_high, sign = best.low_factor, best.high_factor, best.sign
    if not spec.symmetric:
        for step in END_STEPS:
            best.attempt((start_low + step).clamp(0.1, 1), start_high)
        start_low = best.low_factor
        for step in END_STEPS:
            best.attempt(start_low, (start_high + step).clamp(0.1, 1))
        start_high = best.high_factor
    for step in FINE_STEPS:
        best.attempt((start_low + step).clamp(max=1), (start_high + step).clamp(max=1), sign)
    return best.scale, best.zero
