"""What a recipe will cost, from the model's config alone: no weight is read.

The model is laid out on the meta device, where it has shapes and no content. Each pass states what it needs itself;
the engine's part (the model, the calibration text on its way, one batch) is stated here. Sizes are exact, memory is
the peak of resident memory above a process that has imported torch and transformers and done nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.checkpoint import TensorSpec, checkpoint_bytes
from compress.errors import CompressError, StartError
from compress.loading import skeleton
from compress.maths.grid import QuantSpec
from compress.model import find_stacks
from compress.nn.quant_linear import packed_tensors
from compress.passes.base import BlockPass, LayerShape, Pass, selected


@dataclass(frozen=True)
class ModelShape:
    """A model's layout: `layers` of all blocks in order, `tensors` as they are stored, dense.

    `hidden`: width of the hidden states; `widest`: values a token takes inside a block at its widest;
    `vocabulary`: width of the logits (0 without a head).
    """

    dtype: torch.dtype
    layers: tuple[LayerShape, ...]
    tensors: tuple[TensorSpec, ...]
    blocks: tuple[str, ...]
    hidden: int
    widest: int
    vocabulary: int
    kinds: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> ModelShape:
        """The shape of the model that a config describes."""
        return cls.of_model(skeleton(config, dtype), dtype)

    @classmethod
    def of_model(cls, model: PreTrainedModel, dtype: torch.dtype) -> ModelShape:
        text = model.config.get_text_config()
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        blocks = [f"{stack.name}.{i}" for stack in find_stacks(model) for i in range(len(stack))]
        layers = [
            LayerShape(block, name, module.weight.shape[0 if not isinstance(module, Conv1D) else 1],
                       module.weight.shape[1 if not isinstance(module, Conv1D) else 0], module.weight.dtype,
                       module.bias is not None)
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]  # fmt: skip
        head = model.get_output_embeddings()
        return cls(
            dtype=dtype,
            layers=tuple(layers),
            tensors=tuple(
                TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in model.state_dict().items() if n not in tied
            ),
            blocks=tuple(blocks),
            hidden=int(text.hidden_size),
            widest=_widest(layers, blocks),
            vocabulary=0 if head is None else int(head.weight.shape[0]),
            kinds={f"{layer.block}.{layer.name}": layer.kind for layer in layers},
        )

    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(
            sum(t.nbytes for t in self.tensors if t.name.startswith(block + ".")) for block in self.blocks
        )

    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def outside_bytes(self) -> int:
        """Bytes of what belongs to no block."""
        prefixes = tuple(block + "." for block in self.blocks)
        return sum(tensor.nbytes for tensor in self.tensors if not tensor.name.startswith(prefixes))


def _widest(layers: Sequence[LayerShape], blocks: Sequence[str]) -> int:
    first = [layer for layer in layers if layer.block == blocks[0]]
    return sum(layer.outputs for layer in first)
