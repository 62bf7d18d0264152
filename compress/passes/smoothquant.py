"""SmoothQuant: inputs and weights rounded to int8, after their outliers were evened out between the two.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2022, arXiv 2211.10438, section 4. The inputs of a layer have outliers in a few channels, and these ruin the
scale of every token; weights have none. `x W^T = (x / s) (W s)^T` moves a part of them over: with
`s_j = max|x_j|**alpha / max|W_j|**(1 - alpha)` (equation 4) and `alpha` 0.5, both have the same maximum in channel `j`.
The division is folded into what produces the input, so it costs nothing at run time.

Here it is folded wherever that can be proved (`compress.folding`), which is more than the norms of the paper: values
and up projections take it as well, and lose nothing, since every row of them has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration import BlockCalibration
from compress.errors import CompressError
from compress.folding import Fold, find_folds, folding_bytes
from compress.maths.grid import QuantSpec, eight_bit_spec
from compress.passes.base import BlockPass, LayerShape
from compress.passes.rtn import rounded_layer, rounding_bytes

if TYPE_CHECKING:
    from compress.model import Block


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """`s` `[in]`, float32, of `max|x|` `[in]` and `max|W|` `[in]` (over the rows of all layers with this input).

    1 for a channel in which either is 0: there is nothing to even out.

    >>> smoothing_scale(torch.tensor([16.0, 2.0]), torch.tensor([1.0, 2.0]), 0.5)
    tensor([4., 1.])
    """
    inputs, weights = inputs.float(), weights.float()
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return scale.masked_fill_((inputs == 0) | (weights == 0), 1.0)


class ColumnMaxima:
    """The largest magnitude in each column of a layer's input, over tokens."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.values = torch.zeros(columns, device=device)

    def add(self, x: Tensor) -> None:
        """Take in tokens: `[tokens, columns]`, any float dtype."""
        if len(x):
            torch.maximum(self.values, x.abs().amax(0).to(self.values), out=self.values)


class SmoothQuant(BlockPass):
    """Round weights and inputs to int8, after moving the outliers of the inputs into the weights."""

    name: ClassVar[str] = "smoothquant"
    rescales: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "quantized"
    needs_calibration: ClassVar[bool] = True

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Migration strength: how much of the outliers moves from inputs to weights, from 0 to 1 (all).",
    )
    bits: Literal[8] = Field(default=8, description="Bits of each weight (one scale per channel) and of each input.")

    def spec_of(self, layer: LayerShape) -> QuantSpec:
        return self._grid(layer.dtype, True)

    def _grid(self, dtype: torch.dtype, activations: bool) -> QuantSpec:
        return eight_bit_spec(dtype, "int8", activations)

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The larger of looking for folds, and one batch of the widest layer's input as magnitudes."""
        widest = max((tokens_per_batch * layer.inputs * layer.dtype.itemsize for layer in layers), default=0)
        return max(widest, folding_bytes(layers, tokens_per_batch))

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        return rounding_bytes(layers)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """Scales of all stages from the inputs as the block came in; then all are folded; then all is rounded."""
        if calibration is None:
            raise CompressError("smoothquant needs calibration text")
        layers = block.layers(self.targets, self.skip)
        folds, refused = find_folds(block, calibration)
        folds = {name: fold for name, fold in folds.items() if name in layers}
        whole = calibration.whole_inputs(list(layers))
        for fold, inputs in self._observed(folds, calibration):
            self._fold(fold, inputs, block)
        report: dict[str, Any] = {}
        for name, layer in layers.items():
            spec = self._grid(layer.dtype, name in whole)
            report[name] = rounded_layer(layer, spec)
            if name in folds:
                report[name]["folded_into"] = folds[name].producer
            else:
                report[name]["not_folded"] = refused[name]
        return {"layers": report}

    def _observed(self, folds: dict[str, Fold], calibration: BlockCalibration) -> list[tuple[Fold, ColumnMaxima]]:
        """Each fold once, with the maxima of its stage's input."""
        stages = {fold.stage[0]: fold for fold in folds.values()}
        found = {name: ColumnMaxima(len(fold.rows)) for name, fold in stages.items()}
        if found:
            calibration.observe({name: maxima.add for name, maxima in found.items()})
        return [(stages[name], maxima) for name, maxima in found.items()]

    def _fold(self, fold: Fold, inputs: ColumnMaxima, block: Block) -> None:
        layers = block.layers()
        weights = torch.stack([layers[name].weight.abs().amax(0).float() for name in fold.stage]).amax(0)
        scale = smoothing_scale(
            fold.shared(inputs.values.to(weights), "amax"), fold.shared(weights, "amax"), self.alpha
        )
        fold.apply(block, scale)
