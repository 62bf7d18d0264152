"""repair: a correction of low rank beside each compressed layer, in closed form, without training.

Liu et al.: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", 2024, arXiv
2410.21271, and Zhang et al.: "LQER: Low-Rank Quantization Error Reconstruction for LLMs", 2024, arXiv 2402.02446: what
a layer's weight lost, seen through the inputs that it is given, is restored as far as rank r can (`maths/low_rank.py`).
The inputs are those that come through the blocks before it, corrected already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import StartError
from compress.maths.hessian import Hessian
from compress.maths.low_rank import best_for_inputs, best_of_rank
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import Context, Pass, PassResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.calibration import BlockCalibration
    from compress.checkpoint import TensorSpec
    from compress.model import Block, ModelHandle
    from compress.shapes import ModelShape

#: What importing peft takes, with what it imports itself.
PEFT_BYTES = 64 << 20

Factors = dict[str, Tensor]


class Repair(Pass):
    """Restore each compressed layer's output as far as a correction of low rank can; kept as an adapter."""

    name: ClassVar[str] = "repair"
    accepts: ClassVar[frozenset[str]] = frozenset({"quantized", "sparse"})
    leaves: ClassVar[str] = "adapter"
    needs_calibration: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    r: int = Field(default=16, ge=1, description="Rank of each layer's correction, its full rank at most.")
    target_modules: list[str] | str | None = Field(
        default=None,
        description="Layers to correct: names or ends of names, or a regular expression of the full name; all linear "
        "layers of the blocks if absent.",
    )

    def reshape(self, model: ModelHandle) -> None:
        """Nothing changes its shape; targets that match nothing are refused by the plan already."""
        from compress.targets import select

        select(model, self.target_modules, self.name)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """One walk over the blocks: their layers' corrections, and on with the text through the corrected block."""
        from compress.adapters import as_json
        from compress.calibration import BlockCalibration
        from compress.lora_start import config_for, refuse_moved
        from compress.stream import CalibrationStream
        from compress.targets import select, sides
        from compress.walk import over_blocks

        if context.calibration is None:
            raise StartError(f"{self.name} needs calibration text.")
        if context.original is None:
            raise StartError(
                f"{self.name} compares with the original model: give original=... (a model or its folder)."
            )
        refuse_moved(model, self.name)
        layers = select(model, self.target_modules, self.name)
        ranks = {name: min(self.r, *sides(layer)) for name, layer in layers.items()}
        covered = sum(out * columns for out, columns in map(sides, layers.values()))
        weights = sum(block.matrix_weights() for block in model.block_list())
        original = context.original()
        stream = CalibrationStream(model, context.calibration, context.tokens_per_batch)
        found: Factors = {}
        kept = None if context.stage is None else context.stage.folder

        def change(block: Block) -> dict[str, Any]:
            calibration = BlockCalibration(block, stream)
            own = {name.removeprefix(f"{block.name}."): r for name, r in ranks.items() if _inside(name, block)}
            factors, record = _corrections(block, calibration, own, original, self.name)
            _keep(kept, block, factors)
            found.update(factors)
            _correct(block, factors)
            return {"name": block.name, "error": calibration.finish(), "layers": record}

        def restored(block: Block) -> None:
            factors = _read(kept, block)
            found.update(factors)
            _correct(block, factors)

        records = over_blocks(self.name, model, context, change, stream, restored)
        config = config_for(ranks, model, None)
        config.lora_alpha = config.r  # the factors are the correction itself: its scaling is 1
        config.alpha_pattern = dict(config.rank_pattern)
        from compress.adapters import Adapter

        model.adapter = Adapter(as_json(config), found)
        if context.stage is not None:
            model.adapter.save(context.stage.folder / "adapter")
        own = model.adapter.parameters
        return PassResult(model, records, covered / weights, {"parameters": own})

    def adapter_specs(self, shape: ModelShape) -> list[TensorSpec]:
        from compress.checkpoint import TensorSpec
        from compress.targets import select, sides

        found = []
        for name, layer in select(shape.handle, self.target_modules, self.name).items():
            out, columns = sides(layer)
            r = min(self.r, out, columns)
            pairs = (("lora_A", (r, columns)), ("lora_B", (out, r)))
            found += [TensorSpec(f"base_model.model.{name}.{part}.weight", torch.float32, size) for part, size in pairs]
        return found

    def extra_bytes(self, shape: ModelShape) -> int:
        """The original model; of a block, the inputs' second moments and the corrected weights; of its largest layer,
        in float64, the moment's eigenvectors and roots, the error, weighed, and its singular vectors; the text."""
        from compress.targets import select, sides

        pairs = [sides(layer) for layer in select(shape.handle, self.target_modules, self.name).values()]
        blocks = len(shape.handle.block_list())
        moments = sum(4 * columns**2 for _, columns in pairs) // blocks
        corrected = sum(4 * out * columns for out, columns in pairs) // blocks
        largest = max(8 * (4 * columns**2 + 4 * out * columns) for out, columns in pairs)
        text = 128 * shape.window * shape.hidden * shape.dtype.itemsize
        values = sum(4 * min(self.r, *pair) * sum(pair) for pair in pairs)
        beside: int = PEFT_BYTES + shape.original_bytes + text + values
        return beside + moments + corrected + largest


def _inside(name: str, block: Block) -> bool:
    return name.startswith(f"{block.name}.")


def _corrections(
    block: Block, calibration: BlockCalibration, ranks: dict[str, int], original: PreTrainedModel, pass_: str
) -> tuple[Factors, dict[str, Any]]:
    """The factors of each layer's correction, by the names that they are stored by, and what to report: the share of
    its output that the layer lost, and what of it is left."""
    from compress.lora_start import damage
    from compress.targets import weight_of

    stages = calibration.stages(list(ranks))
    seen = {stage[0]: Hessian(_columns(block, stage[0]), calibration.stream.model.device) for stage in stages}
    calibration.observe({name: hessian.add for name, hessian in seen.items()})
    first = {name: stage[0] for stage in stages for name in stage}
    factors: Factors = {}
    record: dict[str, Any] = {}
    for name, r in ranks.items():
        full = f"{block.name}.{name}"
        layer = block.module.get_submodule(name)
        error = damage(full, layer, original, pass_)
        hessian = seen[first[name]].matrix.double() if name in first and seen[first[name]].count else None
        left, right = best_of_rank(error, r) if hessian is None else best_for_inputs(error, hessian, r)
        factors |= {f"{full}.lora_A.weight": right, f"{full}.lora_B.weight": left}
        rest = error.double() - left.double() @ right.double()
        size = _form(weight_of(layer).double() + error.double(), hessian)
        record[name] = {"r": r, "loss": _form(error.double(), hessian) / size, "left": _form(rest, hessian) / size}
    return factors, record


def _form(weight: Tensor, hessian: Tensor | None) -> float:
    weighed = weight if hessian is None else weight @ hessian
    return float((weighed * weight).sum().clamp_min(1e-300))


def _columns(block: Block, name: str) -> int:
    from compress.targets import sides

    return sides(block.module.get_submodule(name))[1]


def _correct(block: Block, factors: Factors) -> None:
    """Puts dense layers with the correction into the block, for the text to go on through; what it came with goes back
    to its place when the block is sealed."""
    from compress.merging import dense_copy, dense_like
    from compress.targets import weight_of

    for key, left in factors.items():
        if not key.endswith(".lora_B.weight"):
            continue
        name = key.removeprefix(f"{block.name}.").removesuffix(".lora_B.weight")
        layer = block.module.get_submodule(name)
        weight = weight_of(layer) + left @ factors[key.replace(".lora_B.", ".lora_A.")]
        corrected = dense_like(layer, weight) if isinstance(layer, QuantLinear) else dense_copy(layer, weight)
        block.module.set_submodule(name, corrected)
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
