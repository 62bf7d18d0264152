"""AutoRound: rounding and scales of a block learn to give what the original block gives.

Cheng et al.: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023, arXiv
2309.05516: each weight's rounding and each group's range are trained by the sign of the gradient, block after block,
the learning rate falling to 0 (section 3). As in EfficientQAT's block-wise stage (arXiv 2407.11062, section 3.2), the
scale has a gradient of its own. The inputs are those that the blocks before it now give, the aim is the original
model's output, so that what went wrong before is mended here.

It starts from the codes of `gptq` instead of the nearest ones, and a block that training did not improve on its text
keeps those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.block_training import Aims, block_error, exchanged_layers, train_block
from compress.errors import CompressError
from compress.passes.base import LayerShape
from compress.passes.gptq import GPTQ
from compress.passes.rounding import RoundingPass
from compress.passes.rtn import RTN

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block
    from compress.nn.trained import WeightTrained


class SignSGD(torch.optim.Optimizer):  # type: ignore[misc]
    """Each parameter moves by the learning rate against the sign of its gradient."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


class AutoRound(RoundingPass):
    """Train rounding and scales of one block at a time to give what the original block gives."""

    name: ClassVar[str] = "autoround"
    needs_calibration: ClassVar[bool] = True

    iterations: int = Field(default=200, ge=0, description="Steps of training for each block; 0: only the start.")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Most minutes for all blocks together; training then ends early, and two runs may differ.",
    )
    learning_rate: float = Field(
        default=5e-3, gt=0, le=1, description="Learning rate at the start, of weights in units of a layer's mean scale."
    )
    scale_learning_rate: float = Field(
        default=5e-3, ge=0, le=1, description="Learning rate at the start, of scales in units of a layer's mean scale."
    )
    start: Literal["gptq", "rtn"] = Field(default="gptq", description="The pass whose codes are the starting point.")
    optimizer: Literal["adam", "sign"] = Field(
        default="adam", description="Adam, or steps by the sign of the gradient alone, as in the paper."
    )

    @property
    def needs_original(self) -> bool:
        return True

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        return self._starting().observing_bytes(layers, tokens_per_batch)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The start's need, or: of every layer the weight in float32, as rounded, its gradient and two moments, and of
        a batch each layer's input and output with gradients."""
        weights = sum(layer.inputs * layer.outputs for layer in layers)
        activations = sum(layer.inputs + layer.outputs for layer in layers) * tokens_per_batch
        training = 4 * (6 * weights + 3 * activations)
        return max(self._starting().working_bytes(layers, tokens_per_batch), training)

    def _starting(self) -> GPTQ | RTN:
        options: dict[str, Any] = {
            "bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric, "grid": self.grid,
            "targets": self.targets, "skip": self.skip,
        }  # fmt: skip
        start = GPTQ(**options) if self.start == "gptq" else RTN(**options)
        return start if self._allocation is None else start.allocated(self._allocation)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        if calibration is None:
            raise CompressError("autoround needs calibration text")
        originals = {name: layer.weight.clone() for name, layer in block.layers(self.targets, self.skip).items()}
        report = self._starting().compress_block(block, calibration)["layers"]
        aims = Aims.of(calibration)
        before = block_error(calibration, aims)
        with _trainable(block, originals) as layers:
            steps = self._train(block, calibration, layers, aims)
            after = block_error(calibration, aims)
        if after < before:
            for name, layer in block.layers(self.targets, self.skip).items():
                packed = layers[name].packed()
                layer.quantize(*packed.codes(), packed.spec)
                report[name] = {"bits": packed.spec.bits}
        said = {} if after < before else {"note": "training did not improve the block; it keeps its start"}
        return {"layers": report, "start_error": before, "trained_error": after, "steps": steps, **said}

    def _train(
        self, block: Block, calibration: BlockCalibration, layers: dict[str, WeightTrained], aims: Aims
    ) -> int:  # fmt: skip
        """Trains in place; returns the number of steps done."""
        groups = []
        for layer in layers.values():
            step, size, low = layer.units()
            trained = [(layer.weight, self.learning_rate * step), (layer.scale, self.scale_learning_rate * size)]
            if layer.zero is not None:
                trained.append((layer.zero, self.scale_learning_rate * low))
            groups += [{"params": [p.requires_grad_(True)], "lr": rate, "peak": rate} for p, rate in trained]
        sign = self.optimizer == "sign"
        optimizer = SignSGD(groups) if sign else torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-15)
        seconds = None if self.minutes is None else 60 * self.minutes / len(block.stack)
        return train_block(calibration, aims, optimizer, self.iterations, seed=block.index, seconds=seconds)


@contextmanager
def _trainable(block: Block, originals: Mapping[str, Tensor]) -> Iterator[dict[str, WeightTrained]]:
    """Trainable layers in the place of those that were just rounded; afterwards the dense ones again."""
    from compress.nn.trained import WeightTrained

    layers = {name: WeightTrained(packed, originals[name]) for name, packed in block.pending.items()}
    with exchanged_layers(block.module, layers):
        yield layers
