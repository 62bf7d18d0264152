"""HQQ: fit each group's grid so that a few large errors count little, without data.

Badri, Shaji: "Half-Quadratic Quantization of Large Machine Learning Models", 2023, mobiusml.github.io/hqq_blog. The
error of rounding is measured by `sum |w - r|**p` with `p < 1`, which a few outliers do not decide. Half-quadratic
splitting gives the error a variable of its own, `e`, and takes turns: `e` is the error, shrunk (`shrink`); then the
grid is fitted by least squares to `w - e`, the weights without what `e` explains away; `beta`, which ties `e` to the
error, grows by `kappa`.

What differs from the paper:

- Its zero points are real numbers and its scales stay. Zero points of the formats written here are integers, so scale
  and zero point are fitted together, the zero point is rounded to the nearest code, and the scale is fitted once more.
  Of a symmetric grid the scale alone is fitted.
- Errors are measured in steps of the first grid. In the weights' own unit, where those of a layer are small, no error
  reaches the threshold of `shrink`, and `beta` would say nothing.
- Each turn's grid is judged as it would be stored. A group takes it where `sum |w - r|**p` falls and the squared error
  is not above that of the first grid: it is squares that the layer's output adds up, and models whose weights were
  fitted by the norm alone came out worse (benchmarks/LOG.md).

A worked example: one group, weights `[-2.2, -1, 0, 1]`, 2 bits (codes -2 .. 1), symmetric, scale 1: the errors are
`[-0.2, 0, 0, 0]`. With `p = 0.7` and `beta = 10`, `0.2 - 0.2**-0.3 / 10 = 0.038`: of the error, `e` takes 0.038, and
the scale fitted to `[-2.162, -1, 0, 1]` with codes `[-2, -1, 0, 1]` is `(2 * 2.162 + 1 + 1) / 6 = 1.054`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compress.maths.grid import (
    CHUNK_ELEMENTS,
    QuantSpec,
    compute_dtype,
    find_params,
    quantize,
    round_groups,
    row_chunks,
    storable,
)
from compress.maths.named_grids import SUPER_BLOCKS
from compress.passes.base import LayerShape
from compress.passes.rounding import RoundingPass
from compress.passes.rtn import relative_weight_error, rounding_bytes

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block

# A fitted scale below this part of the first one is that of a group whose weights all went to one or two codes.
LEAST_SCALE = 0.05


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """`sign(x) * max(0, |x| - |x|**(p - 1) / beta)`, any shape: near the `e` of least `|e|**p + beta/2 (e - x)**2`."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)


def half_quadratic(
    weight: Tensor,
    spec: QuantSpec,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    search: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 `[out, in]`, scale `[out, groups]`, zero point int8 `[out, groups]` (None when symmetric).

    The first grid is that of `find_params(weight, spec, search)`. No group ends with more `sum |w - r|**p` than it has
    there, nor with more squared error.
    """
    scale, zero = find_params(weight, spec, search)
    rows, columns = weight.shape
    size = spec.columns_per_group(columns)
    for part in row_chunks(rows, columns):
        grouped = weight[part].to(compute_dtype(weight)).unflatten(1, (-1, size))
        start = scale[part].to(grouped.dtype), None if zero is None else zero[part].to(grouped.dtype)
        found = _split(grouped, *start, spec, p, beta, kappa, iterations)
        scale[part] = found[0].to(scale.dtype)
        if zero is not None and found[1] is not None:
            zero[part] = found[1].to(torch.int8)
    return quantize(weight, scale, zero, spec), scale, zero


Grid = tuple[Tensor, Tensor | None]


def _split(
    grouped: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    spec: QuantSpec,
    p: float,
    beta: float,
    kappa: float,
    turns: int,
) -> Grid:
    """The splitting for groups `[rows, groups, size]`, from scale and zero (floats, `[rows, groups]`) on."""
    unit = scale.abs().unsqueeze(2)
    best, kept = (scale, zero), None
    for _ in range(turns + 1):
        codes = round_groups(grouped, scale, zero, spec)
        steps = codes if zero is None else codes - zero.unsqueeze(2)
        error = grouped - steps * scale.unsqueeze(2)
        norm, square = error.abs().pow(p).sum(2), error.square().sum(2)
        if kept is None:
            kept, limit = norm, square
        better = (norm < kept) & (square <= limit)
        kept = torch.where(better, norm, kept)
        best = torch.where(better, scale, best[0]), None if zero is None else torch.where(better, zero, best[1])
        wanted = grouped - shrink(error / unit, beta, p) * unit
        scale, zero = _fitted(wanted, codes, scale, zero, unit.squeeze(2), spec)
        beta *= kappa
    return best


def _fitted(wanted: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, unit: Tensor, spec: QuantSpec) -> Grid:
    """The grid of least squares for `wanted ~ (codes - zero) * scale`, the scale as it is stored.

    Where the codes do not decide a scale (they are all the same), or all but vanishes, it stays.
    """

    def decided(new: Tensor) -> Tensor:
        return torch.where(new.abs() > LEAST_SCALE * unit, new, scale)  # false for NaN, of no spread at all

    if zero is not None:
        spread = codes - codes.mean(2, keepdim=True)
        slope = decided((spread * wanted).sum(2) / spread.square().sum(2))
        zero = (codes.mean(2) - wanted.mean(2) / slope).round_().clamp_(spec.qmin, spec.qmax)
    steps = codes if zero is None else codes - zero.unsqueeze(2)
    scale = decided((steps * wanted).sum(2) / steps.square().sum(2))
    return storable(scale.abs(), spec) * scale.sign(), zero


class HQQ(RoundingPass):
    """Round weights to a grid fitted without data, by half-quadratic splitting: few large errors count little."""

    name: ClassVar[str] = "hqq"
    needs_calibration: ClassVar[bool] = False

    p: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="Power of the error that is made small; the lower, the less outliers count.",
    )
    beta: float = Field(default=10.0, gt=0, description="How closely the split-off error follows the error, at first.")
    kappa: float = Field(default=1.01, ge=1, description="What beta is multiplied by after each turn.")
    iterations: int = Field(default=20, ge=0, description="Turns of the splitting; 0: as `rtn`.")
    search: bool = Field(
        default=True,
        description="Start from the range with the least squared error, as `rtn` does; false: from the whole range.",
    )

    @field_validator("grid")
    @classmethod
    def _own_scales(cls, grid: str | None) -> str | None:
        if grid in SUPER_BLOCKS:
            raise ValueError(
                f"hqq fits the scale of each group by itself, and those of {grid} are multiples of one number: use "
                "rtn, which needs no data either, or gptq"
            )
        return grid

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """As for `rtn`, and what the splitting holds for the rows it is at: ten tables of 4 bytes a weight."""
        return rounding_bytes(layers) + 40 * CHUNK_ELEMENTS

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for name, layer in block.layers(self.targets, self.skip).items():
            spec = self.grid_of(layer)
            weight = layer.weight
            codes, scale, zero = half_quadratic(
                weight, spec, self.p, self.beta, self.kappa, self.iterations, self.search
            )
            layers[name] = {"bits": spec.bits, "loss": relative_weight_error(weight, codes, scale, zero, spec)}
            layer.quantize(codes, scale, zero, spec)
        return {"layers": layers}
