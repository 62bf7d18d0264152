"""What all passes that round weights to an integer grid have in common: the grid, and the ends of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from compress.errors import StartError
from compress.maths.grid import QuantSpec, spec_for
from compress.passes.base import BlockPass, Context, LayerShape, PassResult

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compress.model import Layer, ModelHandle


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

    embeddings: Literal[8, 4] | None = Field(
        default=None,
        description="Bits of the input embedding; null leaves it as it is. It is rounded to nearest before the blocks, "
        "with ranges searched, in groups of group_size where that divides the hidden size, else per channel. "
        "A head that is tied to it is the same tensor.",
    )
    head: Literal[8, 4] | None = Field(
        default=None,
        description="Bits of the head (the last projection, to the vocabulary), rounded as `embeddings` is. In a model "
        "that ties the two it stands for both, and cannot differ from `embeddings`.",
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

    def end_specs(self, model: PreTrainedModel) -> dict[str, QuantSpec]:
        """The grids of embedding and head by their names, as far as they are to be rounded; tied: the embedding's.

        StartError where the model has no such head, or two widths are asked for of one tensor.
        """
        from compress.ends import find_ends

        if self.embeddings is None and self.head is None:
            return {}
        ends = find_ends(model)
        if self.head is not None and ends.head is None:
            raise StartError(f"head is {self.head}, and this model has no head: leave the option out")
        asked = {ends.embedding: self.embeddings}
        if ends.tied and self.head is not None:
            if self.embeddings not in (None, self.head):
                raise StartError(
                    f"embeddings is {self.embeddings} and head is {self.head}, but in this model {ends.head} is tied "
                    f"to {ends.embedding}, one tensor: give both the same bits, or one of the two"
                )
            asked = {ends.embedding: self.head}
        elif ends.head is not None:
            asked[ends.head] = self.head
        return {name: self._end(model, name, bits) for name, bits in asked.items() if bits is not None}

    def _end(self, model: PreTrainedModel, name: str, bits: int) -> QuantSpec:
        weight = model.get_submodule(name).get_parameter("weight")
        divides = self.group_size != -1 and weight.shape[1] % self.group_size == 0
        return spec_for(weight.dtype, bits, self.group_size if divides else -1, self.symmetric)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.ends import round_ends
        from compress.walk import check_coverage, walk

        check_coverage(self, model, context.min_coverage)
        measurements = round_ends(model, self.end_specs(model.model), context.stage)
        result = walk(self, model, context)
        return PassResult(model, result.blocks, result.coverage, {**result.measurements, **measurements})

    def _grid(self, dtype: torch.dtype) -> QuantSpec:
        return spec_for(dtype, self.bits, self.group_size, self.symmetric)
