"""What all passes that round weights to an integer grid have in common: the grid, and the ends of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from compress.budget import VARIANTS_AT_ONCE, BitBudget, choose_bits, costs_of, limits_of, measuring_bytes
from compress.errors import StartError
from compress.maths import trellis
from compress.maths.grid import QuantSpec, named_spec, spec_for
from compress.maths.named_grids import NAMED_GRIDS, SUPER_BLOCKS, TRELLIS
from compress.passes.base import BlockPass, Context, LayerShape, PassResult

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compress.model import Layer, ModelHandle
    from compress.shapes import ModelShape


def _form(value: Any) -> str:
    return "budget" if isinstance(value, Mapping | BitBudget) else "number"


#: The tags only tell pydantic which of the two to complain about.
Bits = Annotated[
    Annotated[Literal[2, 3, 4, 5, 6, 8], Tag("number")] | Annotated[BitBudget, Tag("budget")], Discriminator(_form)
]


Grid = Literal[
    "gguf-q2_k", "gguf-q3_k", "gguf-q4_0", "gguf-q4_1", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k", "gguf-q8_0", "trellis"
]  # fmt: skip


def check_trellis(choices: Sequence[int], symmetric: bool) -> None:
    """ValueError where the options of a pass ask for what a trellis cannot hold."""
    wide = [bits for bits in choices if bits not in trellis.BITS]
    if wide:
        raise ValueError(f"bits is {wide[0]}, and grid trellis is for {', '.join(map(str, trellis.BITS))} bits")
    if not symmetric:
        raise ValueError("symmetric is false, and grid trellis has no zero points: leave it out")


class RoundingPass(BlockPass):
    """A block pass that leaves integer codes, and scales of 16 bits, in groups of neighbouring columns."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "quantized"
    #: Whether the method can round a row as a whole, as the grid "trellis" needs it.
    rounds_rows: ClassVar[bool] = False

    bits: Bits = Field(
        default=4,
        description="Bits of each weight; 5 and 6 on the grids gguf-q5_k and gguf-q6_k alone. Or a budget, with "
        "choices: [2, 3, 4, 8]: {average: 3.5} is bits of the codes over the weights that are rounded, {size: 40MB} "
        "all safetensors files that compress.load runs from. How many bits each layer gets is then found by measuring, "
        "so that the whole loses least.",
    )
    group_size: int = Field(
        default=128,
        description="Neighbouring columns that share a scale; must divide the layer's columns. -1: per channel.",
    )
    symmetric: bool = Field(
        default=True, description="Grid around zero (scale only); false adds a zero point to each group."
    )

    grid: Grid | None = Field(
        default=None,
        description="A grid of another program's blocks, so that `export: [gguf]` holds what is rounded here as it is. "
        "It stands for bits, group_size and symmetric: leave those out. Those of k-quants (`_k`) need rows of a "
        "multiple of 256 weights, run packed in llama.cpp alone, and leave model/ unpacked. Or trellis: codes of 2, 3 "
        "or 4 bits whose meaning depends on their neighbours, a third less error for the same bytes (passes rtn and "
        "gptq); it runs packed with compress.load alone, and leaves model/ unpacked.",
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

    sensitivity: Literal["kl", "fisher"] = Field(
        default="kl",
        description="How a budget's loss is measured. kl: each layer is rounded alone and the model's output compared; "
        "fisher: squared gradients of the text's likelihood, which takes one run forth and back.",
    )

    #: `block.layer` -> bits, in the copy of a pass with a budget that does the work.
    _allocation: dict[str, int] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _named_grid(self) -> Self:
        if self.grid == TRELLIS:
            return self._on_trellis()
        for option, value in NAMED_GRIDS[self.grid].items() if self.grid is not None else ():
            given = getattr(self, option)
            if option in self.model_fields_set and given != value:
                raise ValueError(f"grid {self.grid} is {option} {value}, and {option} is {given}: leave it out")
            self.__dict__[option] = value  # the object is frozen once it is made; this is its making
        if self.grid is None and self.bits in (5, 6):
            raise ValueError(f"bits is {self.bits}: use 2, 3, 4 or 8, or grid gguf-q{self.bits}_k")
        return self

    def _on_trellis(self) -> Self:
        """Refuses what a trellis cannot hold."""
        if not self.rounds_rows:
            raise ValueError(f"grid is trellis, on which {self.name} cannot round: use gptq or rtn")
        choices = [bits for bits in self.bits.choices if bits != 8] if isinstance(self.bits, BitBudget) else [self.bits]
        check_trellis(choices, self.symmetric)
        return self

    @field_validator("group_size")
    @classmethod
    def _size(cls, value: int) -> int:
        if value == -1 or value >= 1:
            return value
        raise ValueError(f"group_size is {value}: use a size of at least 1, or -1 for one scale per channel")

    def taken(self) -> frozenset[str]:
        """Where groups have a minimum, or on a trellis, there need not be a code for 0: zeros would not stay."""
        minima = self.grid in SUPER_BLOCKS and not self.symmetric
        return self.accepts - {"sparse"} if minima or self.grid == TRELLIS else self.accepts

    @property
    def takes_calibration(self) -> bool:
        """Of a pass without data, what a budget is measured on."""
        return self.needs_calibration or isinstance(self.bits, BitBudget)

    def spec_of(self, layer: LayerShape) -> QuantSpec:
        """The layer's grid. StartError if the group size does not divide its columns."""
        spec = self.spec_at(layer.dtype, self._bits_of(f"{layer.block}.{layer.name}"))
        spec.columns_per_group(layer.inputs)
        return spec

    def grid_of(self, layer: Layer) -> QuantSpec:
        """The grid to round this layer to, in `compress_block`."""
        assert layer.block is not None
        return self.spec_at(layer.dtype, self._bits_of(f"{layer.block.name}.{layer.name}"))

    def spec_at(self, dtype: torch.dtype, bits: int) -> QuantSpec:
        """The grid of so many bits for layers of this dtype. 8 bits, in a budget, are integers on a trellis too."""
        grid = None if self.grid == TRELLIS and bits not in trellis.BITS else self.grid
        return spec_for(dtype, bits, self.group_size, self.symmetric, grid)

    def _bits_of(self, layer: str) -> int:
        if not isinstance(self.bits, BitBudget):
            return self.bits
        assert self._allocation is not None, "a budget is allocated before a layer's grid is asked for"
        return self._allocation[layer]

    def allocated(self, bits: dict[str, int]) -> Self:
        """The same pass, with so many bits for each layer (`block.layer`)."""
        copy = self.model_copy()
        copy._allocation = bits
        return copy

    def planned(self, model: ModelHandle) -> Self:
        """With a budget: as many bits for each layer as shapes tell; what is measured takes no more bytes than that.

        StartError where the budget is too small, or `model/` could not hold layers of different bits.
        """
        if not isinstance(self.bits, BitBudget):
            return self
        from compress.formats.base import grid_of_its_own, layer_kinds, of_kind
        from compress.formats.compressed_tensors import CompressedTensors

        for block in model.block_list():  # a group that does not divide is refused before anything is counted
            for layer in block.layers(self.targets, self.skip).values():
                self.spec_at(layer.dtype, self.bits.choices[0]).columns_per_group(layer.weight.shape[1])
        costs = costs_of(self, self.bits, model)
        kinds = layer_kinds(model.model)
        mixed = {
            name: grids[0 if i else -1] for i, (name, grids) in enumerate(zip(costs.names, costs.grids, strict=True))
        }
        reason = CompressedTensors().refuses(model.dtype, kinds, mixed)
        if reason and not grid_of_its_own(mixed) and not of_kind("Conv1D", kinds, mixed):
            raise StartError(reason)
        _, filled = limits_of(self.bits, costs)
        return self.allocated({name: self.bits.choices[c] for name, c in zip(costs.names, filled, strict=True)})

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
        if self.grid in NAMED_GRIDS:
            fits = NAMED_GRIDS[self.grid]["bits"] == bits and self.grid not in SUPER_BLOCKS
            spec = named_spec(weight.dtype, self.grid if fits else f"gguf-q{bits}_0")
            spec.columns_per_group(weight.shape[1])
            return spec
        divides = self.group_size != -1 and weight.shape[1] % self.group_size == 0
        return spec_for(weight.dtype, bits, self.group_size if divides else -1, self.symmetric)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.ends import round_ends
        from compress.walk import check_coverage, walk

        check_coverage(self, model, context.min_coverage)
        measurements = round_ends(model, self.end_specs(model.model), context.stage)
        worker = self
        if isinstance(self.bits, BitBudget):
            measurements["allocation"] = self._allocate(self.bits, model, context)
            worker = self.allocated(measurements["allocation"]["bits"])
        result = walk(worker, model, context)
        return PassResult(model, result.blocks, result.coverage, {**result.measurements, **measurements})

    def path_bytes(self, layers: Sequence[LayerShape]) -> int:
        """On a trellis: what the search for the best path through the longest row takes."""
        bits = self.bits.choices[0] if isinstance(self.bits, BitBudget) else self.bits
        longest = max((layer.inputs for layer in layers), default=0)
        return trellis.search_bytes(longest, bits) if self.grid == TRELLIS and longest else 0

    def preparing_bytes(self, shape: ModelShape, layers: Sequence[Sequence[LayerShape]], length: int) -> int:
        """With a budget, while sensitivity is measured: hidden states of the text, as many times as there are variants
        side by side (fisher: blocks), one rounded weight, for fisher gradients and their squares, and logits."""
        if not isinstance(self.bits, BitBudget):
            return 0
        size: int = shape.dtype.itemsize
        weights = [layer.outputs * layer.inputs for block in layers for layer in block]
        in_block = max(sum(layer.outputs * layer.inputs for layer in block) for block in layers)
        variants = min(VARIANTS_AT_ONCE, max(map(len, layers)) * len(self.bits.choices))
        copies, differentiated, backward = variants + 3, 0, self.sensitivity == "fisher"
        if backward:
            copies, differentiated = len(layers) + 3, (4 + size) * in_block
        # rounded: in float32, as codes, dequantized, and packed in the model's dtype; all of a block for the check
        rounding = max(13 * max(weights), differentiated + 12 * max(weights), (4 + size) * in_block)
        paths = max(map(self.path_bytes, layers))
        return measuring_bytes(shape, length, copies, rounding + paths, backward)

    def _allocate(self, budget: BitBudget, model: ModelHandle, context: Context) -> dict[str, Any]:
        """Measured once: a continued run takes what the stage has, whatever was rounded since."""
        if context.calibration is None:
            raise StartError(f"{self.name} needs calibration text to share out its bits.")

        def measure() -> dict[str, Any]:
            self.planned(model)  # for what it refuses, where no plan was made
            return choose_bits(self, budget, model, context)

        return measure() if context.stage is None else context.stage.once("allocation", measure)
