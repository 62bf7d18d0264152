"""What training adapters takes, in bytes by what holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.corrections import PEFT_BYTES
from compress.nn.quant_linear import QuantLinear
from compress.passes.end_to_end import TRAINER_BYTES
from compress.shapes import ModelShape


@dataclass(frozen=True)
class Trained:
    """`values` that are trained, on micro-batches of `windows`. `original`: the original model runs beside; `held_out`:
    the best values so far are kept; `unpacked`: packed weights are kept unpacked; `merged`: the sides of the layers
    that adapters are merged into."""

    values: int
    windows: int
    checkpointing: bool
    original: bool
    held_out: bool
    unpacked: bool
    merged: Sequence[tuple[int, int]] = ()


def training_parts(shape: ModelShape, trained: Trained, calibration_windows: int) -> dict[str, int]:
    """Values, gradients and Adam's two moments are float32."""
    parts = {
        "trainer": TRAINER_BYTES + PEFT_BYTES,
        "original": shape.original_bytes if trained.original else 0,
        "adapters": 4 * trained.values * (2 if trained.held_out else 1),
        "gradients": 4 * trained.values,
        "optimizer": 8 * trained.values,
        "activations": activation_bytes(shape, trained.windows, trained.checkpointing),
    }
    packed = [module for module in shape.handle.model.modules() if isinstance(module, QuantLinear)]
    if packed and trained.unpacked:
        parts["unpacked layers"] = 4 * sum(module.in_features * module.out_features for module in packed)
    elif packed:  # the weight of one layer at a time, made anew on the way back
        parts["a layer unpacked"] = 8 * max(module.in_features * module.out_features for module in packed)
    if trained.merged and "sparse" in shape.handle.states:
        parts["masked products"] = 8 * sum(math.prod(side) for side in trained.merged)
    if trained.merged and packed:
        block = max(block.matrix_weights() for block in shape.handle.block_list())
        hidden = calibration_windows * shape.window * shape.hidden * shape.dtype.itemsize
        parts["rounding anew"] = 12 * block + hidden + shape.packed_bytes
    return parts


def activation_bytes(shape: ModelShape, windows: int, checkpointing: bool) -> int:
    """Of a micro-batch: every layer's input and output in every block (with checkpointing: in one block, and the inputs
    of all), and logits: the model's, their gradient, and the original's."""
    blocks = len(shape.handle.block_list())
    kept = 2 * shape.widest + blocks * shape.hidden if checkpointing else 2 * blocks * shape.widest
    return 4 * windows * shape.window * (kept + 3 * shape.vocabulary)
