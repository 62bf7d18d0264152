"""block_distill: each block learns to give what the original model's block gives, one block in memory.

What a pass before took (zeros, bits, channels) is made up for by what is left: the reconstruction error of a block is
the loss, as in Hubara et al. 2021 (arXiv 2006.10518, section 3) and EfficientQAT's block-wise stage (arXiv 2407.11062,
section 3.2). The block is given what the blocks before it now give; the aim is what the original model's block gives in
the original model. A block that training did not improve on its text stays as it was.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import StartError
from compress.passes.base import Context, Pass, PassResult, selected

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, ModelHandle
    from compress.nn.quant_linear import QuantLinear
    from compress.nn.trained import Trained
    from compress.shapes import ModelShape

Groups = list[dict[str, Any]]


class BlockDistill(Pass):
    """Train each block, one at a time, to give what the original model's block gives."""

    name: ClassVar[str] = "block_distill"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse", "quantized"})
    needs_calibration: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    train: Literal["all", "weights", "scales", "norms"] = Field(
        default="all",
        description="weights: of matrices, of packed ones through their rounding, with scales; scales: of packed "
        "layers, the codes staying; norms: vectors of norms; all: weights, norms and biases.",
    )
    iterations: int = Field(default=200, ge=1, description="Steps of training for each block.")
    learning_rate: float = Field(
        default=5e-3,
        gt=0,
        le=1,
        description="Learning rate at the start, in units of a packed layer's mean scale, or of the mean size of a "
        "parameter's values.",
    )
    skip: list[str] = Field(
        default_factory=list, description="Names of layers inside a block to leave alone, as patterns."
    )

    def reshape(self, model: ModelHandle) -> None:
        """Nothing changes its shape; what cannot be trained is refused by the plan already."""
        for block in model.block_list():
            self._packed(block)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Trains every block in order, each beside that of the original."""
        from compress.stream import CalibrationStream
        from compress.walk import change, over_blocks

        if context.calibration is None:
            raise StartError("block_distill needs calibration text: give calibration=[...] (texts or token ids).")
        originals = self._originals(model, context)
        stream = CalibrationStream(model, context.calibration, context.tokens_per_batch, True, originals)
        records = over_blocks(self.name, model, context, partial(change, self, stream), stream)
        trained = sum(record["trained"] for record in records)
        total = sum(block.matrix_weights() for block in model.block_list())
        return PassResult(model, records, trained / total)

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
        from compress.nn.trained import ScaleTrained, WeightTrained

        found: dict[str, Trained] = {}
        for name, layer in self._packed(block).items():
            if self.train == "scales" or block.sparse:  # a code that is zero stands for a zero that is to stay
                found[name] = ScaleTrained(layer, zero_trained=not block.sparse)
            else:
                found[name] = WeightTrained(layer, _weight_of(calibration.original_module, name, layer))
        return found

    def _groups(self, block: Block, layers: dict[str, Trained]) -> tuple[Groups, dict[nn.Parameter, Tensor]]:
        """The parameters with their learning rates, and where zeros are held."""
        from compress.nn.trained import WeightTrained

        groups: Groups = []
        for layer in layers.values():
            size = self.learning_rate * float(layer.scale.detach().abs().mean())
            trained = [layer.weight, layer.scale] if isinstance(layer, WeightTrained) else [layer.scale]
            groups.append({"params": trained, "lr": size, "peak": size})
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

    def extra_bytes(self, shape: ModelShape) -> int:
        """The original (one block of it where blocks stay on disk), and of a block float32 weights with what is kept
        for their gradients and two moments, and a batch's inputs and outputs of every layer."""
        block = shape.largest_block_values()
        tokens = Context.tokens_per_batch
        original = shape.original_bytes if shape.resident else shape.largest_block()
        return int(original + 4 * 6 * block + 4 * 3 * tokens * shape.widest)


def _weight_of(original: nn.Module, name: str, layer: QuantLinear) -> Tensor | None:
    """The original's weight [out, in] behind a packed layer, if it has one of that shape."""
    try:
        weight = original.get_submodule(name).weight.detach()
    except AttributeError:
        return None
    weight = weight.T if layer.transposed else weight
    return weight if weight.shape == torch.Size((layer.out_features, layer.in_features)) else None
