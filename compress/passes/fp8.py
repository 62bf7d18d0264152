"""FP8: every weight becomes a number of 8 bits with 4 of exponent and 3 of fraction (e4m3), without data.

The format is that of Micikevicius, Stosic, Burgess, et al.: "FP8 Formats for Deep Learning", 2022, arXiv 2209.05433,
section 3, in the variant without infinities (largest number 448). A row's scale maps its largest magnitude to 448. The
error of a number is relative to itself, at most 1/16, where that of an integer grid is relative to the row's largest:
outliers cost their neighbours nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.data import Windows, windows_from
from compress.maths.grid import QuantSpec, eight_bit_spec
from compress.passes.base import BlockPass, LayerShape
from compress.passes.rtn import rounded_layer, rounding_bytes

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block


class FP8(BlockPass):
    """Round weights to 8-bit floating point (e4m3), and inputs too if asked for, without data."""

    name: ClassVar[str] = "fp8"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "quantized"

    activations: Literal["none", "dynamic"] = Field(
        default="none",
        description="`dynamic` rounds the inputs of layers too, each token by a scale of its own: what GPUs with FP8 "
        "arithmetic need to be fast. It costs accuracy, and on a CPU, which computes in floats either way, gains none.",
    )

    def spec_of(self, layer: LayerShape) -> QuantSpec:
        return self._grid(layer.dtype, self.activations == "dynamic")

    def _grid(self, dtype: torch.dtype, activations: bool) -> QuantSpec:
        return eight_bit_spec(dtype, "float8", activations)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        return rounding_bytes(layers)

    def probe(self) -> Windows | None:
        """Two tokens, to see which layers are given their inputs in a shape whose tokens can be rounded one by one."""
        if self.activations == "none":
            return None
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        return windows_from(tokens, None)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        layers = block.layers(self.targets, self.skip)
        whole = calibration.whole_inputs(list(layers)) if calibration is not None else set()
        return {
            "layers": {
                name: rounded_layer(layer, self._grid(layer.dtype, name in whole)) for name, layer in layers.items()
            }
        }
