"""Corrections of low rank beside the layers of the blocks: found block after block, kept as an adapter.

What `repair` finds in closed form, and `block_distill` by training. The base stays as it is, so that zeros stay zero
and codes stay codes; `lora` goes on from such an adapter, and merges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.nn.corrected import Corrected

if TYPE_CHECKING:
    from peft import LoraConfig

    from compress.adapters import Adapter
    from compress.calibration import BlockCalibration
    from compress.checkpoint import TensorSpec
    from compress.model import Block, ModelHandle
    from compress.passes.base import Context
    from compress.shapes import ModelShape
    from compress.stream import CalibrationStream

#: What importing peft takes, with what it imports itself.
PEFT_BYTES = 64 << 20

#: `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r], float32, by the layer's name in the model.
Factors = dict[str, Tensor]
#: Of a block: its layers' factors, by names in the model, and what to report of it. `ranks`: by names in the block.
Find = Callable[["Block", "BlockCalibration", dict[str, int]], tuple[Factors, dict[str, Any]]]


def over_corrected(
    title: str, model: ModelHandle, context: Context, stream: CalibrationStream, config: LoraConfig,
    ranks: Mapping[str, int], find: Find,
) -> list[dict[str, Any]]:  # fmt: skip
    """One walk over the blocks: `find` is asked for each one's factors, and the text goes on through the corrected
    block. The adapter stands beside the model afterwards. Returns a record for each block.

    `ranks`: of each layer, by its name in the model; `config` says how the product is scaled.
    """
    from compress.adapters import Adapter, as_json
    from compress.calibration import BlockCalibration
    from compress.walk import over_blocks

    found: Factors = {}
    kept = None if context.stage is None else context.stage.folder

    def change(block: Block) -> dict[str, Any]:
        calibration = BlockCalibration(block, stream)
        start = f"{block.name}."
        own = {name.removeprefix(start): r for name, r in ranks.items() if name.startswith(start)}
        factors, said = find(block, calibration, own)
        _keep(kept, block, factors)
        found.update(factors)
        _correct(block, factors, config)
        return {"name": block.name, "error": calibration.finish(), **said}

    def restored(block: Block) -> None:
        factors = _read(kept, block)
        found.update(factors)
        _correct(block, factors, config)

    records = over_blocks(title, model, context, change, stream, restored=restored)
    model.adapter = Adapter(as_json(config), found)
    if context.stage is not None:
        model.adapter.save(context.stage.folder / "adapter")
    return records


def scaling_of(config: LoraConfig, name: str) -> float:
    """What the product of a layer's factors is multiplied by: its alpha over its rank."""
    alpha = config.alpha_pattern.get(name, config.lora_alpha)
    return float(alpha / config.rank_pattern.get(name, config.r))


def correction_specs(ranks: Mapping[str, int], shape: ModelShape) -> list[TensorSpec]:
    """The adapter's tensors as they will be stored, for layers of these ranks, by their names in the model."""
    from compress.checkpoint import TensorSpec
    from compress.targets import sides

    found = []
    for name, r in ranks.items():
        out, columns = sides(shape.handle.model.get_submodule(name))
        pairs = (("lora_A", (r, columns)), ("lora_B", (out, r)))
        found += [TensorSpec(f"base_model.model.{name}.{part}.weight", torch.float32, size) for part, size in pairs]
    return found


def values_of(specs: list[TensorSpec]) -> int:
    """Values of all tensors."""
    return sum(math.prod(spec.shape) for spec in specs)


def pairs(factors: Factors, block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """(left [out, r], right [r, in]) of each layer, by its name in the block."""
    end = ".lora_B.weight"
    return {
        key.removeprefix(f"{block.name}.").removesuffix(end): (left, factors[key.replace(".lora_B.", ".lora_A.")])
        for key, left in factors.items()
        if key.endswith(end)
    }


def put_beside(block: Block, adapter: Adapter) -> None:
    """Puts the adapter's corrections of this block's layers beside them, until the block is sealed. An adapter attached
    to the whole model would go with the block's own tensors, where these do not stay in memory."""
    from compress.adapters import config_of

    own = {name: tensor for name, tensor in adapter.tensors.items() if name.startswith(f"{block.name}.")}
    _correct(block, {name: tensor.to(_device(block)) for name, tensor in own.items()}, config_of(adapter))


def _device(block: Block) -> torch.device:
    return next(block.module.parameters()).device


def _correct(block: Block, factors: Factors, config: LoraConfig) -> None:
    """Puts corrected layers into the block, for the text to go on through; what it came with goes back to its place
    when the block is sealed."""
    for name, (left, right) in pairs(factors, block).items():
        layer = block.module.get_submodule(name)
        scaling = scaling_of(config, f"{block.name}.{name}")
        block.module.set_submodule(name, Corrected(layer, left, right, scaling))
        block.pending[name] = layer


def _keep(folder: Path | None, block: Block, factors: Factors) -> None:
    if folder is not None:
        from compress.checkpoint import TensorSpec, write_checkpoint

        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in factors.items()]
        write_checkpoint(folder, specs, factors.__getitem__, stem=f"{block.name}.correction")


def _read(folder: Path | None, block: Block) -> Factors:
    from safetensors.torch import load_file

    assert folder is not None
    found: Factors = load_file(folder / f"{block.name}.correction.safetensors")
    return found
