"""Round to nearest: every weight goes to the closest point of its group's grid. No data, no compensation.

The baseline that each method with data has to beat, and at 8 bits usually all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.maths.grid import QuantSpec, dequantize, find_params, quantize
from compress.maths.packing import CHUNK_ELEMENTS
from compress.passes.base import LayerShape
from compress.passes.rounding import RoundingPass

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer


def round_to_nearest(weight: Tensor, spec: QuantSpec, search: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 `[out, in]`, scale `[out, groups]`, zero point int8 `[out, groups]` (None when symmetric).

    >>> weight = torch.tensor([[1.5, -0.6, 0.2, 0.0]])
    >>> codes, scale, zero = round_to_nearest(weight, QuantSpec(bits=2))
    >>> scale.item()        # 1.5 / (3 / 2): the four codes -2..1 are spread over -1.5..1.5
    1.0
    >>> codes.tolist()      # 1.5 is nearest to 2, which is no code: 1 is the last
    [[1, -1, 0, 0]]
    """
    scale, zero = find_params(weight, spec, search=search)
    return quantize(weight, scale, zero, spec), scale, zero


def relative_weight_error(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> float:
    """`|W - Q|**2 / |W|**2`, 0 for a weight of zeros."""
    weight = weight.to(torch.float32)
    size = float(weight.square().sum())
    lost = float(dequantize(codes, scale, zero, spec, torch.float32).sub_(weight).square_().sum())
    return lost / size if size else 0.0


def rounding_bytes(layers: Sequence[LayerShape]) -> int:
    """Peak of rounding one layer: codes (1 byte a weight), and the weight in float32 while the error is measured:
    dequantized, and as a copy where it is stored in 16 bits. Packing works on 2**20 codes at a time: three tables of 4
    bytes each."""

    def of(layer: LayerShape) -> int:
        return (5 if layer.dtype.itemsize >= 4 else 9) * layer.outputs * layer.inputs

    return max(map(of, layers), default=0) + 12 * CHUNK_ELEMENTS


def rounded_layer(layer: Layer, spec: QuantSpec, search: bool = False) -> dict[str, Any]:
    """Rounds a layer's weight to nearest and makes it a quantized layer; what to report of it."""
    weight = layer.weight
    codes, scale, zero = round_to_nearest(weight, spec, search)
    entry: dict[str, Any] = {"bits": spec.bits, "loss": relative_weight_error(weight, codes, scale, zero, spec)}
    layer.quantize(codes, scale, zero, spec)
    if spec.activations:
        entry["activations"] = spec.stored
    return entry


class RTN(RoundingPass):
    """Round weights to the nearest point of an integer grid, without data."""

    name: ClassVar[str] = "rtn"
    needs_calibration: ClassVar[bool] = False
    rounds_rows: ClassVar[bool] = True

    search: bool = Field(
        default=True,
        description="Try smaller ranges for each group and keep the one with the least squared error; false: cover it.",
    )

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        return rounding_bytes(layers) + self.path_bytes(layers)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        layers = block.layers(self.targets, self.skip)
        return {
            "layers": {name: rounded_layer(layer, self.grid_of(layer), self.search) for name, layer in layers.items()}
        }
