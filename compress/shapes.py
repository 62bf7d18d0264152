"""A model's layout from its config alone, and what passes make of it. Nothing here reads or holds a weight.

The model is built on the meta device, where tensors have shapes and no content, and passes are played through on it:
a rounded layer is replaced by an empty packed one. What would be written is then what the same code that writes a real
model says of this one, so sizes are exact by construction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.checkpoint import TensorSpec, checkpoint_bytes
from compress.ends import put_packed
from compress.errors import CompressError
from compress.formats.base import Contents
from compress.loading import skeleton
from compress.locating import context_length
from compress.model import Block, Layer, ModelHandle
from compress.nn.bnb_linear import BnbLinear
from compress.nn.quant_embedding import packed_like
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import BlockPass, LayerShape, Pass, refuse_model
from compress.walk import check_coverage


@dataclass(frozen=True)
class BlockShape:
    """One block as a pass finds it: `layers` are those that the pass changes.

    `dense_bytes`: all its tensors as they come in; `packed_bytes`: the packed layers that the pass puts beside them;
    `widest`: values that one token takes inside the block at its widest, attention scores not counted.
    """

    name: str
    layers: tuple[LayerShape, ...]
    dense_bytes: int
    packed_bytes: int
    widest: int


class ModelShape:
    """A model without weights, as it stands after the passes that `apply` was given so far."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self.handle = ModelHandle(model)
        self.dtype = dtype
        self._look()
        self.original_bytes, self.original_config = self.dense_bytes, copy.deepcopy(model.config)
        #: Tokens of a window of training text.
        self.window = min(256, self.context)
        #: The tensors of the adapter beside the model.
        self.adapter: list[TensorSpec] = []
        self.packed_bytes = 0
        #: Whether plain transformers expands the packed layers to run them; bitsandbytes' it runs as they are.
        self.expands = False
        #: Whether the whole model is in memory while passes work.
        self.resident = True

    def _look(self) -> None:
        """Sees the model as it stands: what follows from its shapes alone."""
        text = self.handle.config.get_text_config()
        head = self.handle.model.get_output_embeddings()
        self.hidden = int(text.hidden_size)
        self.vocabulary = 0 if head is None else int(head.weight.shape[0])
        self.context = context_length(self.handle.config) or 256
        #: Attention heads whose scores [length, length] are held in full; 0 where the kernel never forms them.
        self.scored_heads = int(text.num_attention_heads) if self.handle.config._attn_implementation == "eager" else 0
        self.experts_per_token = int(getattr(text, "num_experts_per_tok", None) or 1)
        self.dense_bytes = sum(spec.nbytes for spec in self.contents().tensors)
        self.outside_bytes = sum(t.nbytes for t in self.handle.outside().values())
        self.largest_tensor = max(spec.nbytes for spec in self.contents().tensors)
        self.widest = max(self._widest(block) for block in self.handle.block_list())

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype, architecture: str | None = None) -> ModelShape:
        """The shape of the model that a config describes, held in `dtype`."""
        return cls(skeleton(config, dtype, architecture), dtype)

    def contents(self) -> Contents:
        """What there would be to write; its tensors cannot be read."""
        return self.handle.contents()

    def blocks(self, pass_: BlockPass) -> list[BlockShape]:
        """The blocks as they stand, with the layers that `pass_` selects. StartError where their shapes forbid it."""
        return [self._block(block, pass_) for block in self.handle.block_list()]

    def _block(self, block: Block, pass_: BlockPass) -> BlockShape:
        layers = block.layers(pass_.targets, pass_.skip)
        packed = sum(_bytes(new) - _bias_bytes(layers[name]) for name, new in _packed(pass_, layers).items())
        shapes = tuple(map(shape_of, layers.values()))
        return BlockShape(block.name, shapes, _bytes(block.module), packed, self._widest(block))

    def _widest(self, block: Block) -> int:
        """The hidden state twice, and what all layers give. Experts in one tensor count once for each that a token
        visits."""
        given = 2 * self.hidden
        for module in block.module.modules():
            weight = getattr(module, "weight", None) if not isinstance(module, QuantLinear) else None
            if isinstance(module, QuantLinear):
                given += module.out_features
            elif weight is not None and weight.dim() == 2:
                given += weight.shape[1 if isinstance(module, Conv1D) else 0]
        fused = [p for p in block.module.parameters() if p.dim() == 3]
        return int(given + self.experts_per_token * sum(max(p.shape[1:]) for p in fused))

    def apply(self, pass_: Pass) -> float:
        """Plays a pass through; returns the share of the blocks' matrix weights that it changes.

        StartError where a group or pattern does not divide a layer, no layer is selected, or the pass refuses the
        model.
        """
        refuse_model(pass_, self.handle.model)
        if not isinstance(pass_, BlockPass):
            pass_.reshape(self.handle)
            if pass_.structural:
                self._look()
            if pass_.changes_weights:
                self.adapter = pass_.adapter_specs(self)
            outside = sum(t.nbytes for t in self.handle.outside().values())
            self.dense_bytes += outside - self.outside_bytes
            self.outside_bytes = outside
            self.handle.states.add(pass_.leaves)
            return 1.0 if pass_.changes_weights else 0.0
        coverage = check_coverage(pass_, self.handle, 0.0)
        for name, packed in self.ends(pass_).items():
            self.packed_bytes += _bytes(packed)
            put_packed(self.handle.model, name, packed)
        self.outside_bytes = sum(t.nbytes for t in self.handle.outside().values())
        for block in self.handle.block_list():
            for name, packed in _packed(pass_, block.layers(pass_.targets, pass_.skip)).items():
                self.packed_bytes += _bytes(packed)
                self.expands |= not isinstance(packed, BnbLinear)
                block.module.set_submodule(name, packed)
        self.handle.states.add(pass_.leaves)
        return coverage

    def planned(self, pass_: BlockPass) -> BlockPass:
        """`pass_.planned` for this model; the error names the pass."""
        try:
            return pass_.planned(self.handle)
        except CompressError as error:
            raise type(error)(f"{pass_.name}: {error}") from None

    def ends(self, pass_: BlockPass) -> dict[str, QuantLinear]:
        """An empty packed layer for the embedding and the head, by their names, as far as the pass rounds them."""
        try:
            specs = pass_.end_specs(self.handle.model)
            return {name: packed_like(self.handle.model.get_submodule(name), spec) for name, spec in specs.items()}
        except CompressError as error:
            raise type(error)(f"{pass_.name}: {error}") from None

    def stage_bytes(self, outside: bool = False) -> int:
        """Bytes of the files in which a pass keeps its finished blocks, one each, and what it changed outside of them:
        all that is there (`outside`), or what is packed."""
        kept, packed = self.handle.outside(), self.handle.outside_quantized()
        if not outside:
            kept = {name: tensor for name, tensor in kept.items() if name.rpartition(".")[0] in packed}
        ends = checkpoint_bytes(_specs(kept)) if kept else 0
        return ends + sum(checkpoint_bytes(_specs(block.state())) for block in self.handle.block_list())

    def largest_block_values(self) -> int:
        """Weights of the block that has most, packed ones counted as unpacked."""
        return max(block.matrix_weights() for block in self.handle.block_list())

    def largest_block(self) -> int:
        """Bytes of the tensors of the block that has most."""
        return max(_bytes(block.module) for block in self.handle.block_list())


def shape_of(layer: Layer) -> LayerShape:
    """The shape of a layer of a block."""
    assert layer.block is not None
    outputs, inputs = layer.weight.shape
    kind = "Conv1D" if layer.transposed else "Linear"
    bias = layer.module.bias is not None
    return LayerShape(layer.block.name, layer.name, outputs, inputs, layer.dtype, bias, kind)


def _packed(pass_: BlockPass, layers: Mapping[str, Layer]) -> dict[str, QuantLinear]:
    """An empty packed layer for each that the pass rounds; where it cannot, the error names pass and layer."""
    found = {}
    for name, layer in layers.items():
        shape = shape_of(layer)
        try:
            spec = pass_.spec_of(shape)
        except CompressError as error:
            raise type(error)(f"{pass_.name}: {shape.block}.{name}: {error}") from None
        if spec is not None:
            found[name] = QuantLinear.like(layer.module, spec)
    return found


def _specs(state: dict[str, torch.Tensor]) -> Sequence[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _bias_bytes(layer: Layer) -> int:
    return 0 if layer.module.bias is None else layer.module.bias.nbytes
