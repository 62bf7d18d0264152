"""AWQ: make the channels that matter larger before rounding, and smaller again in what produces them.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Gan, Dang, Han: "AWQ: Activation-aware Weight Quantization for LLM Compression
and Acceleration", 2023, arXiv 2306.00978, sections 3.2 and A. For layers that share an input `x`, the columns of their
weights are multiplied by `s` and `x` is divided by it, which changes nothing until the weights are rounded: then a
column with a large `s` loses less. `s_j = mean|x_j| ** a`, and the exponent `a` is the one of an even grid from 0 to 1
with which the rounded layers' outputs differ least from the original ones. Then each group's range is made smaller
where that brings its outputs nearer still ("clipping").

Outputs are not computed: over all tokens, `sum |D x|**2 = tr(D C D^T)` with `C` the sum of `x x^T`, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import CompressError
from compress.folding import Fold, find_folds, folding_bytes
from compress.maths.grid import QuantSpec, compute_dtype, dequantize, find_params, quantize
from compress.maths.hessian import Hessian
from compress.passes.base import LayerShape
from compress.passes.hessians import hessian_sizes
from compress.passes.rounding import RoundingPass
from compress.passes.rtn import round_to_nearest

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer

#: The smallest mean magnitude that counts: a channel that is always zero has no direction to scale in.
SMALLEST = 1e-4


@dataclass(frozen=True)
class Scale:
    """What the search found: `values` `[in]`, the exponent, and the squared error of the rounded layers' outputs,
    relative to plain rounding's."""

    values: Tensor
    exponent: float
    gain: float


def scale_of(magnitude: Tensor, exponent: float) -> Tensor:
    """`magnitude ** exponent`, `[in]`, divided so that the largest and the smallest multiply to 1.

    >>> scale_of(torch.tensor([4.0, 1.0, 0.25]), 0.5)
    tensor([2.0000, 1.0000, 0.5000])
    """
    scale = magnitude.clamp(min=SMALLEST) ** exponent
    return scale / (scale.max() * scale.min()).sqrt()


def output_error(change: Tensor, moments: Tensor) -> float:
    """`tr(D C D^T)`: squared change of a layer's outputs for a change `D` `[out, in]` of its weight, over the tokens of
    the second moments `C` `[in, in]`."""
    return float((change @ moments).mul_(change).sum(dtype=torch.float64))


def search_scale(
    weights: Sequence[Tensor], specs: Sequence[QuantSpec], magnitude: Tensor, moments: Tensor, steps: int,
    search: bool = False,
) -> Scale:  # fmt: skip
    """The best scale for layers with these `weights` `[out, in]` and this input: `magnitude` `[in]` is the mean of its
    absolute values, `moments` `[in, in]` the mean (or sum) of `x x^T`. Exponents 0, 1/steps, ... are tried; of equals
    the smallest."""
    errors = []
    for step in range(steps):
        scale = scale_of(magnitude, step / steps)
        errors.append(sum(_error(w, spec, scale, moments, search) for w, spec in zip(weights, specs, strict=True)))
    best = min(range(steps), key=lambda step: errors[step])
    gain = errors[best] / errors[0] if errors[0] > 0 else 1.0
    return Scale(scale_of(magnitude, best / steps), best / steps, gain)


def _error(weight: Tensor, spec: QuantSpec, scale: Tensor, moments: Tensor, search: bool) -> float:
    dtype = compute_dtype(weight)
    codes, steps, zero = round_to_nearest(weight.to(dtype) * scale, spec, search)
    change = dequantize(codes, steps, zero, spec, dtype).div_(scale).sub_(weight)
    return output_error(change, moments)


def diagonal_blocks(moments: Tensor, size: int) -> Tensor:
    """The blocks `[in / size, size, size]` on the diagonal of `[in, in]`."""
    groups = len(moments) // size
    return torch.stack([moments[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])


def clipped_rounding(weight: Tensor, spec: QuantSpec, moments: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounding to nearest, with the range of each group that changes least of the output by itself; as
    `round_to_nearest`."""
    blocks = diagonal_blocks(moments, spec.columns_per_group(weight.shape[1]))
    scale, zero = find_params(weight, spec, search=True, importance=blocks)
    return quantize(weight, scale, zero, spec), scale, zero


class Inputs:
    """What AWQ has to know of a stage's input: the mean of its absolute values, and its second moments."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.hessian = Hessian(columns, device)
        self._sum = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in tokens: `[tokens, columns]`, any float dtype."""
        self.hessian.add(x)
        self._sum += x.abs().sum(0, dtype=torch.float32).double().to(self._sum.device)

    @property
    def count(self) -> int:
        return self.hessian.count

    @property
    def magnitude(self) -> Tensor:
        """float32 `[columns]`."""
        return (self._sum / max(self.count, 1)).float()


class AWQ(RoundingPass):
    """Scale the channels with large inputs up before rounding to nearest, as far as the layers' outputs ask for it."""

    name: ClassVar[str] = "awq"
    rescales: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    steps: int = Field(
        default=20, ge=1, description="Exponents that are tried for the scale, evenly from 0 on; 1: no scale at all."
    )
    clip: bool = Field(
        default=True, description="Make each group's range smaller where its outputs come nearer by that."
    )

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The Hessians, and one batch of the layer's input in float32, and its absolute values; or, before that, what
        finding the folds takes."""
        copies = (8 * tokens_per_batch * layer.inputs for layer in layers)
        finding = folding_bytes(layers, tokens_per_batch)
        return max(sum(hessian_sizes(layers)) + max(copies, default=0), finding)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The Hessians; of one layer, its second moments as divided by the scale, and again in between; the scaled
        weight, its codes, its rounded form and the product with the moments."""

        def of(layer: LayerShape) -> int:
            return 2 * 4 * layer.inputs**2 + 17 * layer.inputs * layer.outputs

        return sum(hessian_sizes(layers)) + max(map(of, layers), default=0)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """One look at all inputs, as they are; then the scales of all stages, each folded as it is found; then the
        rounding. A stage whose input nothing can divide keeps its columns as they are."""
        if calibration is None:
            raise CompressError("awq needs calibration text")
        layers = block.layers(self.targets, self.skip)
        stages = calibration.stages(list(layers))
        stages += [[name] for name in layers if not any(name in stage for stage in stages)]
        folds, refused = find_folds(block, calibration) if self.steps > 1 else ({}, {})
        inputs = [Inputs(layers[stage[0]].weight.shape[1], layers[stage[0]].weight.device) for stage in stages]
        calibration.observe({stage[0]: seen.add for stage, seen in zip(stages, inputs, strict=True)})
        report: dict[str, dict[str, Any]] = {}
        scales: list[Tensor | None] = []
        for stage, seen in zip(stages, inputs, strict=True):
            found = self._scale(block, [layers[name] for name in stage], seen, folds.get(stage[0]))
            entry: dict[str, Any] = {}
            if found is not None:
                entry |= {"exponent": found.exponent, "gain": found.gain}
            elif stage[0] in refused:
                entry["not_scaled"] = refused[stage[0]]
            report |= {name: {"bits": self.grid_of(layers[name]).bits, **entry} for name in stage}
            scales.append(None if found is None else found.values)
        for stage, seen, scale in zip(stages, inputs, scales, strict=True):
            self._round({name: layers[name] for name in stage}, seen, scale, report)
        return {"layers": report}

    def _scale(self, block: Block, stage: list[Layer], seen: Inputs, fold: Fold | None) -> Scale | None:
        """The stage's scale, folded into what produces its input; None where there is nothing to fold it into."""
        if fold is None or not seen.count:
            return None
        magnitude = fold.shared(seen.magnitude, "mean")
        weights, specs = [layer.weight for layer in stage], [self.grid_of(layer) for layer in stage]
        found = search_scale(weights, specs, magnitude, seen.hessian.matrix, self.steps)
        if found.exponent:
            fold.apply(block, found.values)
        return found

    def _round(self, stage: dict[str, Layer], seen: Inputs, scale: Tensor | None, report: dict[str, Any]) -> None:
        """Rounds a stage's layers as they are now; `seen` is its input as it was before it was divided by `scale`."""
        moments = seen.hessian.matrix
        if scale is not None:
            moments = moments / scale / scale.unsqueeze(1)
        for name, layer in stage.items():
            spec, weight = self.grid_of(layer), layer.weight.float()
            if not seen.count:
                codes, steps, zero = round_to_nearest(weight, spec, self.clip)
                report[name]["fallback"] = "rounded to nearest: no calibration token reached the layer"
            elif self.clip:
                codes, steps, zero = clipped_rounding(weight, spec, moments)
            else:
                codes, steps, zero = round_to_nearest(weight, spec)
            change = dequantize(codes, steps, zero, spec, torch.float32).sub_(weight)
            size = output_error(weight, moments)
            report[name]["loss"] = output_error(change, moments) / size if size > 0 else 0.0
            layer.quantize(codes, steps, zero, spec)
