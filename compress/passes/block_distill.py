"""block_distill: each block learns to give what the original model's block gives, one block in memory.

What a pass before took (zeros, bits, channels) is made up for by what is left: the reconstruction error of a block is
the loss, as in Hubara et al. 2021 (arXiv 2006.10518, section 3) and EfficientQAT's block-wise stage (arXiv 2407.11062,
section 3.2). The block is given what the blocks before it now give; the aim is what the original model's block gives in
the original model. A block that training did not improve on its text stays as it was.

`train: low_rank` leaves the block alone and trains a correction beside each of its layers (Hu et al. 2021, LoRA, arXiv
2106.09685, section 4.1), which is kept as an adapter: what zeros and codes cannot say has a place there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.corrections import (
    PEFT_BYTES,
    Factors,
    correction_specs,
    over_corrected,
    pairs,
    scaling_of,
    values_of,
)
from compress.errors import StartError
from compress.nn.corrected import Corrected
from compress.passes.base import Context, Pass, PassResult, selected
from compress.passes.end_to_end import original_weight

if TYPE_CHECKING:
    from peft import LoraConfig

    from compress.calibration import BlockCalibration
    from compress.checkpoint import TensorSpec
    from compress.model import Block, ModelHandle
    from compress.nn.quant_linear import QuantLinear
    from compress.nn.trained import Trained
    from compress.shapes import ModelShape
    from compress.stream import CalibrationStream

Groups = list[dict[str, Any]]
#: A correction begins at nothing, and a product of two small matrices moves by less than a weight would.
LOW_RANK_RATE = 10.0


class BlockDistill(Pass):
    """Train each block, one at a time, to give what the original model's block gives."""

    name: ClassVar[str] = "block_distill"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse", "quantized"})
    needs_calibration: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    train: Literal["all", "weights", "scales", "norms", "low_rank"] = Field(
        default="all",
        description="weights: of matrices, of packed ones through their rounding, with scales; scales: of packed "
        "layers, the codes staying; norms: vectors of norms; all: weights, norms and biases; low_rank: a correction of "
        "rank `r` beside each layer, kept as an adapter, and nothing else.",
    )
    iterations: int = Field(default=200, ge=1, description="Steps of training for each block.")
    learning_rate: float = Field(
        default=5e-3,
        gt=0,
        le=1,
        description="Learning rate at the start, in units of a packed layer's mean scale, or of the mean size of a "
        "parameter's values; of low_rank ten times that.",
    )
    r: int = Field(default=16, ge=1, description="Of low_rank: rank of each correction, a layer's full rank at most.")
    lora_alpha: float | None = Field(
        default=None, gt=0, description="Of low_rank: corrections are scaled by lora_alpha / r; null: by 2."
    )
    init_lora_weights: Literal["default", "repair"] = Field(
        default="default",
        description="Where corrections of low_rank begin. default: at nothing; repair: where the pass `repair` would "
        "leave them, which has no form after awq, rotate and smoothquant.",
    )
    skip: list[str] = Field(
        default_factory=list, description="Names of layers inside a block to leave alone, as patterns."
    )

    @property
    def leaves(self) -> str:  # type: ignore[override]
        return "adapter" if self.train == "low_rank" else "dense"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("r", "lora_alpha", "init_lora_weights"):
            if self.train != "low_rank" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of train: low_rank, and train is {self.train}: leave one of the two out")
        return self

    def reshape(self, model: ModelHandle) -> None:
        """Nothing changes its shape; what cannot be trained is refused by the plan already."""
        self._refuse_turned(model)
        if self.train == "low_rank":
            self._ranks(model)
            return
        for block in model.block_list():
            self._packed(block)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Trains every block in order, each beside that of the original."""
        from compress.stream import CalibrationStream
        from compress.walk import change, over_blocks

        if context.calibration is None:
            raise StartError("block_distill needs calibration text: give calibration=[...] (texts or token ids).")
        self._refuse_turned(model)
        originals = self._originals(model, context)
        stream = CalibrationStream(model, context.calibration, context.tokens_per_batch, True, originals)
        if self.train == "low_rank":
            return self._corrected(model, context, stream)
        records = over_blocks(self.name, model, context, partial(change, self, stream), stream)
        trained = sum(record["trained"] for record in records)
        total = sum(block.matrix_weights() for block in model.block_list())
        return PassResult(model, records, trained / total)

    def _refuse_turned(self, model: ModelHandle) -> None:
        """StartError where what blocks give each other is not in the original's basis any more."""
        if any(entry["pass"] == "rotate" and entry["options"].get("residual", True) for entry in model.history):
            raise StartError(
                "block_distill compares what each block gives with the original's, and rotate turned that: leave one "
                "out, or set residual: false in rotate."
            )

    def _ranks(self, model: ModelHandle) -> dict[str, int]:
        """The rank of each layer that is to have a correction, by its name in the model; StartError for none."""
        from compress.lora_start import refuse_moved
        from compress.targets import adaptable, sides

        if self.init_lora_weights == "repair":
            refuse_moved(model, self.name)
        blocks = tuple(f"{block.name}." for block in model.block_list())
        found = {}
        for name, layer in adaptable(model).items():
            inside = next(name.removeprefix(start) for start in blocks if name.startswith(start))
            if selected(inside, None, self.skip):
                found[name] = min(self.r, *sides(layer))
        if not found:
            raise StartError("block_distill: no layer of the blocks is left for train: low_rank: shorten skip.")
        return found

    def _corrected(self, model: ModelHandle, context: Context, stream: CalibrationStream) -> PassResult:
        """The walk of `train: low_rank`."""
        from compress.lora_start import config_for
        from compress.targets import sides

        ranks = self._ranks(model)
        covered = sum(math.prod(sides(model.model.get_submodule(name))) for name in ranks)
        total = sum(block.matrix_weights() for block in model.block_list())
        config = config_for(ranks, model, self.lora_alpha)
        find = partial(self._correction, config)
        records = over_corrected(self.name, model, context, stream, config, ranks, find)
        return PassResult(model, records, covered / total, {"parameters": model.adapter.parameters})

    def _correction(
        self, config: LoraConfig, block: Block, calibration: BlockCalibration, ranks: dict[str, int]
    ) -> tuple[Factors, dict[str, Any]]:
        """Trains the corrections of a block's layers; those it began at, where that did not help."""
        from compress.block_training import Aims, FloatAdam, block_error, exchanged_layers, train_block
        from compress.nn.kernels import cached

        start = self._start(config, block, calibration, ranks)
        aims = Aims.of(calibration)
        layers: dict[str, Corrected] = {}
        groups: Groups = []
        for name, (left, right) in pairs(start, block).items():
            base, scaling = block.module.get_submodule(name), scaling_of(config, f"{block.name}.{name}")
            layer = Corrected(base, left.clone(), right.clone(), scaling)
            layers[name] = layer
            size = LOW_RANK_RATE * self.learning_rate * float(right.abs().mean())
            groups.append({"params": [layer.left, layer.right], "lr": size, "peak": size})
        with cached(block.module):
            bare = block_error(calibration, aims)
            with exchanged_layers(block.module, layers):
                before = block_error(calibration, aims)
                for group in groups:
                    for parameter in group["params"]:
                        parameter.requires_grad_(True)
                steps = train_block(calibration, aims, FloatAdam(groups), self.iterations, seed=block.index)
                after = block_error(calibration, aims)
        report = {name: {"r": ranks[name]} for name in layers}
        said = {"start_error": bare, "trained_error": min(before, after), "steps": steps, "layers": report}
        if after >= before:
            return start, {**said, "note": "training did not improve the block; its corrections are those it began at"}
        found: Factors = {}
        for name, layer in layers.items():
            full = f"{block.name}.{name}"
            found |= {f"{full}.lora_A.weight": layer.right.detach(), f"{full}.lora_B.weight": layer.left.detach()}
        return found, said

    def _start(self, config: LoraConfig, block: Block, calibration: BlockCalibration, ranks: dict[str, int]) -> Factors:
        """The factors that training begins at: A uniform as peft draws it, B zero; or those of `repair`."""
        from compress.lora_start import damage
        from compress.passes.repair import corrections
        from compress.targets import sides

        device = calibration.stream.model.device
        if self.init_lora_weights == "repair":
            original = calibration.original_module
            found, _ = corrections(
                block, calibration, ranks,
                lambda name: damage(name, block.module.get_submodule(name), original, self.name),
            )  # fmt: skip
            for name in ranks:
                scaling = scaling_of(config, f"{block.name}.{name}")
                found[f"{block.name}.{name}.lora_B.weight"] /= scaling
            return found
        draw = torch.Generator().manual_seed(block.index)
        found = {}
        for name, r in ranks.items():
            out, columns = sides(block.module.get_submodule(name))
            drawn = (2 * torch.rand(r, columns, generator=draw) - 1) / columns**0.5
            found[f"{block.name}.{name}.lora_A.weight"] = drawn.to(device)
            found[f"{block.name}.{name}.lora_B.weight"] = torch.zeros(out, r, device=device)
        return found

    def _originals(self, model: ModelHandle, context: Context) -> ModelHandle:
        """The original model, a block at a time where it lies in a folder and this one is on disk as well."""
        from compress.model import ModelHandle
        from compress.opening import open_model

        if context.original_folder is not None and not model.resident:
            dtype = str(model.dtype).removeprefix("torch.")
            found = open_model(context.original_folder, dtype=dtype, device=str(model.device), residency="disk")
        elif context.original is not None:
            found = ModelHandle(context.original(), device=model.device)
        else:
            raise StartError("block_distill learns from the original model: give original=... (a model or its folder).")
        mine, other = len(model.block_list()), len(found.block_list())
        wide = [handle.config.get_text_config().hidden_size for handle in (model, found)]
        if mine != other or wide[0] != wide[1]:
            raise StartError(
                f"block_distill sets block beside block, and this model has {mine} of width {wide[0]}, the original "
                f"{other} of width {wide[1]}: use distill."
            )
        return found

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """Trains one block in place."""
        from compress.block_training import Aims, FloatAdam, block_error, exchanged_layers, train_block

        assert calibration is not None
        aims = Aims.of(calibration)
        before = block_error(calibration, aims)
        layers = self._trained_layers(block, calibration)
        kept = {name: tensor.clone() for name, tensor in block.state().items()}
        groups, held = self._groups(block, layers)
        weights = sum(p.numel() for p in self._plain(block, layers).values() if p.dim() >= 2)
        weights += sum(layer.in_features * layer.out_features for layer in self._packed(block).values())
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        with exchanged_layers(block.module, layers):
            steps = train_block(calibration, aims, FloatAdam(groups, held), self.iterations, seed=block.index)
            packed = {name: layer.packed() for name, layer in layers.items()}
        for parameter in block.module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        with exchanged_layers(block.module, packed):
            after = block_error(calibration, aims)
        said = {}
        if after < before:
            for name, layer in packed.items():
                block.module.set_submodule(name, layer)
        else:
            said = {"note": "training did not improve the block; it stays as it was"}
            block.restore(kept, block.quantized())
        report = {name: {"bits": layer.spec.bits} for name, layer in packed.items()}
        found = {"start_error": before, "trained_error": min(after, before), "steps": steps, "trained": weights}
        return {"layers": report, **found, **said}

    def _packed(self, block: Block) -> dict[str, QuantLinear]:
        """The packed layers that are trained, by their names in the block; StartError for those that cannot be."""
        from compress.nn.quant_linear import QuantLinear

        if self.train == "norms":
            return {}
        names = [name for name in block.quantized() if selected(name, None, self.skip)]
        found = {name: block.module.get_submodule(name) for name in names}
        for name, layer in found.items():
            if type(layer) is not QuantLinear or layer.spec.stored != "packed":
                raise StartError(
                    f"block_distill trains dense layers and packed integers, and {block.name}.{name} is stored in "
                    "another way (smoothquant, fp8, bnb): name it in skip, or set train: norms."
                )
        if self.train == "scales" and not found:
            raise StartError("block_distill: train: scales needs packed layers, and there are none: round first.")
        return found

    def _trained_layers(self, block: Block, calibration: BlockCalibration) -> dict[str, Trained]:
        from compress.nn.trained import ScaleTrained, weight_trained

        found: dict[str, Trained] = {}
        for name, layer in self._packed(block).items():
            if self.train == "scales" or block.sparse:  # a code that is zero stands for a zero that is to stay
                found[name] = ScaleTrained(layer, zero_trained=not block.sparse)
            else:
                found[name] = weight_trained(layer, original_weight(calibration.original_module, name, layer))
        return found

    def _groups(self, block: Block, layers: dict[str, Trained]) -> tuple[Groups, dict[nn.Parameter, Tensor]]:
        """The parameters with their learning rates, and where zeros are held."""
        from compress.nn.trained import ScaleTrained

        groups: Groups = []
        for layer in layers.values():
            step, size, _ = (self.learning_rate * unit for unit in layer.units())
            groups.append({"params": [layer.scale], "lr": size, "peak": size})
            if not isinstance(layer, ScaleTrained):
                groups.append({"params": [layer.weight], "lr": step, "peak": step})
            if layer.zero is not None and getattr(layer, "zero_trained", True):
                groups.append({"params": [layer.zero], "lr": 0.0, "peak": self.learning_rate})
        held = {}
        for parameter in self._plain(block, layers).values():
            values = parameter.detach().float().abs()
            filled = values[values > 0]
            size = self.learning_rate * float(filled.mean() if filled.numel() else 1.0)
            groups.append({"params": [parameter], "lr": size, "peak": size})
            if block.sparse and parameter.dim() >= 2:
                held[parameter] = parameter.detach() == 0
        if not groups:
            raise StartError(f"block_distill: nothing of {block.name} is selected for training.")
        return groups, held

    def _plain(self, block: Block, layers: dict[str, Trained]) -> dict[str, nn.Parameter]:
        """The block's own parameters that are trained, by their names."""
        found = {}
        packed = tuple(f"{name}." for name in block.quantized())
        for name, parameter in block.module.named_parameters():
            if name.startswith(packed) or not selected(name.rpartition(".")[0], None, self.skip):
                continue
            matrix, norm = parameter.dim() >= 2, "norm" in name or "ln_" in name
            wanted = {"all": True, "weights": matrix, "norms": norm and not matrix, "scales": False}[self.train]
            if wanted and parameter.is_floating_point():
                found[name] = parameter
        return found

    def adapter_specs(self, shape: ModelShape) -> list[TensorSpec]:
        return correction_specs(self._ranks(shape.handle), shape) if self.train == "low_rank" else []

    def extra_bytes(self, shape: ModelShape) -> int:
        """The original (one block of it where blocks stay on disk), and of a block float32 weights with what is kept
        for their gradients and two moments, and a batch's inputs and outputs of every layer.

        Of low_rank, all corrections; of a block's, where they began, their gradients and two moments; its weights
        unpacked, one more of a layer for the gradient, and what finding a start as `repair` does takes.
        """
        block = shape.largest_block_values()
        original = shape.original_bytes if shape.resident else shape.largest_block()
        beside = original + 4 * 3 * Context.tokens_per_batch * shape.widest
        if self.train != "low_rank":
            return int(beside + 4 * 6 * block)
        from compress.passes.repair import closed_form_bytes
        from compress.targets import sides

        blocks = len(shape.handle.block_list())
        layers = [sides(shape.handle.model.get_submodule(name)) for name in self._ranks(shape.handle)]
        values = values_of(self.adapter_specs(shape))
        trained = 4 * (values + 4 * values // blocks) + 4 * 2 * block
        found = closed_form_bytes(layers, blocks) if self.init_lora_weights == "repair" else 0
        return int(beside + PEFT_BYTES + max(trained, found))
