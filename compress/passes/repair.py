"""repair: a correction of low rank beside each compressed layer, in closed form, without training.

Liu et al.: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", 2024, arXiv
2410.21271, and Zhang et al.: "LQER: Low-Rank Quantization Error Reconstruction for LLMs", 2024, arXiv 2402.02446: what
a layer's weight lost, seen through the inputs that it is given, is restored as far as rank r can (`maths/low_rank.py`).
The inputs are those that come through the blocks before it, corrected already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from compress.corrections import PEFT_BYTES, Factors, correction_specs, over_corrected, values_of
from compress.errors import StartError
from compress.maths.hessian import Hessian
from compress.maths.low_rank import best_for_inputs, best_of_rank
from compress.passes.base import Context, Pass, PassResult

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.checkpoint import TensorSpec
    from compress.model import Block, ModelHandle
    from compress.shapes import ModelShape


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
        from compress.lora_start import config_for, damage, refuse_moved
        from compress.stream import CalibrationStream
        from compress.targets import select, sides

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
        config = config_for(ranks, model, None)
        config.lora_alpha = config.r  # the factors are the correction itself: its scaling is 1
        config.alpha_pattern = dict(config.rank_pattern)

        def find(block: Block, calibration: BlockCalibration, own: dict[str, int]) -> tuple[Factors, dict[str, Any]]:
            def error(name: str) -> Tensor:
                full = f"{block.name}.{name}"
                return damage(full, block.module.get_submodule(name), original, self.name)

            factors, record = corrections(block, calibration, own, error)
            return factors, {"layers": record}

        records = over_corrected(self.name, model, context, stream, config, ranks, find)
        return PassResult(model, records, covered / weights, {"parameters": model.adapter.parameters})

    def adapter_specs(self, shape: ModelShape) -> list[TensorSpec]:
        from compress.targets import select, sides

        layers = select(shape.handle, self.target_modules, self.name)
        return correction_specs({name: min(self.r, *sides(layer)) for name, layer in layers.items()}, shape)

    def extra_bytes(self, shape: ModelShape) -> int:
        """The original model and the corrections; what finding those of a block takes; the text."""
        from compress.targets import select, sides

        pairs = [sides(layer) for layer in select(shape.handle, self.target_modules, self.name).values()]
        text = 128 * shape.window * shape.hidden * shape.dtype.itemsize
        beside = PEFT_BYTES + shape.original_bytes + text + 4 * values_of(self.adapter_specs(shape))
        return int(beside + closed_form_bytes(pairs, len(shape.handle.block_list())))


def closed_form_bytes(pairs: Sequence[tuple[int, int]], blocks: int) -> int:
    """Of a block, the inputs' second moments and weights unpacked; of its largest layer, in float64, the moment's
    eigenvectors and roots, the error, weighed, and its singular vectors. `pairs`: (out, in) of all layers of `blocks`
    blocks."""
    moments = sum(4 * columns**2 for _, columns in pairs) // blocks
    unpacked = sum(4 * out * columns for out, columns in pairs) // blocks
    largest = max(8 * (4 * columns**2 + 4 * out * columns) for out, columns in pairs)
    return moments + unpacked + largest


def corrections(
    block: Block, calibration: BlockCalibration, ranks: Mapping[str, int], damage: Callable[[str], Tensor]
) -> tuple[Factors, dict[str, Any]]:
    """The factors of each layer's correction, by the names that they are stored by, and what to report: the share of
    its output that the layer lost, and what of it is left. `damage`: what a layer's weight lost [out, in], by its name
    in the block."""
    from compress.targets import weight_of

    stages = calibration.stages(list(ranks))
    seen = {stage[0]: Hessian(_columns(block, stage[0]), calibration.stream.model.device) for stage in stages}
    calibration.observe({name: hessian.add for name, hessian in seen.items()})
    first = {name: stage[0] for stage in stages for name in stage}
    factors: Factors = {}
    record: dict[str, Any] = {}
    for name, r in ranks.items():
        full = f"{block.name}.{name}"
        layer, error = block.module.get_submodule(name), damage(name)
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
