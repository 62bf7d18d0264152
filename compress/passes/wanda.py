"""Wanda: prune by the size of a weight times the size of its input.

Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv 2306.11695.
The score of a weight is `|W_ij| * |X_j|_2`, and scores are compared within a row (one output): what falls out changes
that output least, if inputs were uncorrelated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.maths.masks import keep_mask
from compress.passes.base import LayerShape
from compress.passes.pruning import PruningPass, pruned

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """`|W| * norms`, float32 `[out, in]`; `norms` `[in]` are the l2 norms of the input's columns over all tokens.

    >>> wanda_scores(torch.tensor([[-0.5, 2.0]]), torch.tensor([5.0, 1.0]))     # the larger weight matters less
    tensor([[2.5000, 2.0000]])
    """
    return weight.float().abs() * norms


class ColumnNorms:
    """Sums of squares of a layer's input over tokens, per column, in float64."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in tokens: `[..., columns]`, any float dtype."""
        x = x.reshape(-1, x.shape[-1])
        squares = x.float().square_() if x.dtype != torch.float32 else x.square()
        self._squares += squares.sum(0).double().to(self._squares.device)
        self.count += x.shape[0]

    @property
    def norms(self) -> Tensor:
        """float32 `[columns]`."""
        return self._squares.sqrt().float()


def observed_norms(layers: Mapping[str, Layer], calibration: BlockCalibration) -> dict[str, ColumnNorms]:
    """What one run of the block as it is shows of each layer's input."""
    stages = calibration.stages(list(layers))
    unseen = [name for name in layers if not any(name in stage for stage in stages)]
    inputs: dict[str, ColumnNorms] = {}
    for stage in [*stages, *([name] for name in unseen)]:
        weight = layers[stage[0]].weight
        inputs |= dict.fromkeys(stage, ColumnNorms(weight.shape[1], weight.device))
    calibration.observe({stage[0]: inputs[stage[0]].add for stage in stages})
    for name in unseen:  # the stages are those of one batch; another may reach these layers as well
        calibration.observe({name: inputs[name].add})
    return inputs


class Wanda(PruningPass):
    """Set the weights with the smallest magnitude times input norm to zero, row by row."""

    name: ClassVar[str] = "wanda"
    needs_calibration: ClassVar[bool] = True

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """One batch of the widest layer's input in float32, which is a copy where the model computes in 16 bits."""
        return max((4 * tokens_per_batch * layer.inputs for layer in layers if layer.dtype.itemsize < 4), default=0)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """As magnitude: scores in float32, again without what is zero already, what selecting in them copies (12 bytes
        a weight), and masks."""
        return max((26 * layer.outputs * layer.inputs for layer in layers), default=0)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """One look at the inputs of all layers of the block as it came in, as in the paper; then each is pruned."""
        if calibration is None:
            raise CompressError("wanda needs calibration text")
        layers = block.layers(self.targets, self.skip)
        inputs = observed_norms(layers, calibration)
        return {"layers": {name: self._prune(layer, inputs[name]) for name, layer in layers.items()}}

    def _prune(self, layer: Layer, inputs: ColumnNorms) -> dict[str, Any]:
        """A layer that no token reached is pruned by magnitude alone, and says so."""
        weight = layer.weight
        scores = wanda_scores(weight, inputs.norms) if inputs.count else weight.float().abs()
        keep = keep_mask(weight, scores, self.rate_of(layer), self.pattern, per="row")
        weight, entry = pruned(weight, keep, scores)
        layer.set_weight(weight)
        if inputs.count:
            return entry
        return {**entry, "fallback": "magnitude: no calibration token reached the layer"}
