"""What all passes that round weights to an integer grid have in common: the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from compress.maths.grid import QuantSpec, spec_for
from compress.passes.base import BlockPass, LayerShape

if TYPE_CHECKING:
    import torch

    from compress.model import Layer


def hessian_sizes(layers: Sequence[LayerShape]) -> list[int]:
    """Bytes of a block's Hessians, float32. Which layers share an input, shapes do not say: those of one shape are
    taken to, as q, k and v do; where o has it too, that is one too few, and the layers with the most columns outweigh
    it."""
    return list({(layer.inputs, layer.outputs): 4 * layer.inputs**2 for layer in layers}.values())


class RoundingPass(BlockPass):
    """A block pass that leaves integer codes, and scales of 16 bits, in groups of neighbouring columns."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "quantized"

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of each weight.")
    group_size: int = Field(
        default=128,
        description="Neighbouring columns that share a scale; must divide the layer's columns. -1: per channel.",
    )
    symmetric: bool = Field(
        default=True, description="Grid around zero (scale only); false adds a zero point to each group."
    )

    @field_validator("group_size")
    @classmethod
    def _size(cls, value: int) -> int:
        if value == -1 or value >= 1:
            return value
        raise ValueError(f"group_size is {value}: use a size of at least 1, or -1 for one scale per channel")

    def spec_of(self, layer: LayerShape) -> QuantSpec:
        """The layer's grid. StartError if the group size does not divide its columns."""
        spec = self._grid(layer.dtype)
        spec.columns_per_group(layer.inputs)
        return spec

    def grid_of(self, layer: Layer) -> QuantSpec:
        """The grid to round this layer to, in `compress_block`."""
        return self._grid(layer.dtype)

    def _grid(self, dtype: torch.dtype) -> QuantSpec:
        return spec_for(dtype, self.bits, self.group_size, self.symmetric)
