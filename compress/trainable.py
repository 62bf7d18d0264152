"""A whole model made ready to be trained, whatever its weights are: dense, with zeros that stay, or packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.passes.efficientqat import EfficientQAT
from compress.passes.end_to_end import exchanged, norms_of, packed_layers
from compress.passes.llm_qat import LLMQAT
from compress.training_schedule import Group

if TYPE_CHECKING:
    from compress.model import ModelHandle

#: Values held for each one that is trained, in float32: itself, its gradient, and Adam's two moments.
COPIES = 4


@contextmanager
def trainable(model: ModelHandle, rate: float, title: str) -> Iterator[list[Group]]:
    """The parameters to train, at the peak learning rate `rate`; when the `with` ends, the model is as it was, but
    trained.

    Dense weights are trained in float32, all of them. Of a sparse model's matrices, what is 0 stays 0. Packed layers
    are exchanged for those that `llm_qat` trains (of a sparse model: `efficientqat`), with its rates, and beside them
    norms alone are trained. StartError for layers stored in another way.
    """
    if "quantized" in model.states:
        with _packed(model, rate, title) as groups:
            yield groups
        return
    parameters = dict(model.model.named_parameters())
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    held = []
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    if "sparse" in model.states:
        held = [_hold_zeros(parameter) for parameter in _matrices(model)]
    try:
        yield [Group(list(parameters.values()), rate)]
    finally:
        for handle in held:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])


def _matrices(model: ModelHandle) -> list[nn.Parameter]:
    return [p for block in model.block_list() for p in block.module.parameters() if p.dim() >= 2]


def _hold_zeros(parameter: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
    """What has no gradient from the first step on does not move: Adam's moments of it are 0."""
    parameter.requires_grad_(True)
    kept = parameter.detach() != 0

    def hook(gradient: Tensor) -> Tensor:
        return gradient * kept

    return parameter.register_hook(hook)


@contextmanager
def _packed(model: ModelHandle, rate: float, title: str) -> Iterator[list[Group]]:
    sparse = "sparse" in model.states
    how = EfficientQAT() if sparse else LLMQAT(learning_rate=rate)
    trained = {name: how.trained(layer, sparse, None) for name, layer in packed_layers(model, title).items()}
    norms = norms_of(model)
    groups = [group for layer in trained.values() for group in how.groups(layer)]
    if norms:
        groups.append(Group(list(norms.values()), how.norm_learning_rate))
    with exchanged(model.model, trained, norms):
        yield groups


def covered(model: ModelHandle) -> float:
    """The share of the blocks' matrix weights that `trainable` trains."""
    if "quantized" not in model.states:
        return 1.0
    layers = [
        block.module.get_submodule(name) for block in model.block_list() for name in block.quantized()
    ]  # fmt: skip
    weights = sum(block.matrix_weights() for block in model.block_list())
    return float(sum(layer.in_features * layer.out_features for layer in layers) / weights)
