"""Adapters merged into their base: dense weights take the sum, packed ones are rounded anew, with calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy as shallow
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress import adapters
from compress.calibration import BlockCalibration
from compress.lora_start import without_start
from compress.maths.grid import QuantSpec
from compress.model import Block, Layer, ModelHandle
from compress.nn.bnb_linear import BnbLinear, BnbSpec
from compress.nn.quant_linear import QuantLinear
from compress.passes.gptq import GPTQ
from compress.passes.rtn import rounded_layer
from compress.processes import process_rank
from compress.stream import CalibrationStream
from compress.targets import weight_of
from compress.walk import over_blocks

if TYPE_CHECKING:
    from compress.data import Windows
    from compress.passes.base import Context


@torch.no_grad()
def merge_dense(base: nn.Module, merged: Tensor) -> None:
    """Puts `merged` [out, in] into a Linear or Conv1D. What was 0 in the base is 0 in it, if its adapter was masked."""
    Layer(None, "", base).set_weight(merged)


def dense_like(packed: QuantLinear, weight: Tensor) -> nn.Module:
    """A dense layer with `weight` [out, in] and the bias of the packed one, of the kind that it once replaced."""
    weight = weight.to(packed.dtype)
    with torch.device("meta"):
        if packed.transposed:
            layer: nn.Module = Conv1D(packed.out_features, packed.in_features)
        else:
            layer = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    layer.weight = nn.Parameter((weight.t() if packed.transposed else weight).contiguous(), requires_grad=False)
    if packed.transposed and packed.bias is None:
        layer.bias = nn.Parameter(weight.new_zeros(packed.out_features), requires_grad=False)
    elif packed.bias is not None:
        layer.bias = nn.Parameter(packed.bias.detach(), requires_grad=False)
    return layer


def dense_copy(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A Linear or Conv1D as `layer`, with its bias and another weight [out, in]."""
    copy = shallow(layer)
    copy._parameters = dict(layer._parameters)
    kept = weight.t() if isinstance(layer, Conv1D) else weight
    copy._parameters["weight"] = nn.Parameter(kept.to(layer.weight.dtype).contiguous(), requires_grad=False)
    return copy


class Requantize(GPTQ):
    """Rounds merged weights to the grids that their layers had: by GPTQ, on the text as it comes through the blocks
    that are merged already; bitsandbytes' grids, and those whose inputs are rounded too, by the nearest code."""

    name: ClassVar[str] = "requantize"

    #: Layer name in the model -> its weight together with the adapter, made when its block's turn comes.
    _weights: Mapping[str, Callable[[], Tensor]] = PrivateAttr(default_factory=dict)
    _specs: dict[str, QuantSpec] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, packed: Mapping[str, QuantLinear], weights: Mapping[str, Callable[[], Tensor]]) -> Requantize:
        """`packed`: the layers as they are, by their names in the model; `weights`: what they shall hold [out, in]."""
        pass_ = cls(targets=None)
        pass_._weights, pass_._specs = weights, {name: layer.spec for name, layer in packed.items()}
        return pass_

    def grid_of(self, layer: Layer) -> QuantSpec:
        assert layer.block is not None
        return self._specs[f"{layer.block.name}.{layer.name}"]

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        own = {name.removeprefix(f"{block.name}."): name for name in self._specs if name.startswith(f"{block.name}.")}
        for short, name in own.items():
            old = block.module.get_submodule(short)
            assert isinstance(old, QuantLinear)
            block.module.set_submodule(short, dense_like(old, self._weights[name]()))
        plain = [short for short, name in own.items() if calibration is None or not _calibrated(self._specs[name])]
        report = {short: round_plainly(block.layers([short])[short], self._specs[own[short]]) for short in plain}
        rest = [short for short in own if short not in plain]
        if rest and calibration is not None:
            worker = self.model_copy(update={"targets": rest})
            report |= GPTQ.compress_block(worker, block, calibration)["layers"]
        return {"layers": report}


def _calibrated(spec: QuantSpec) -> bool:
    return not isinstance(spec, BnbSpec) and spec.stored == "packed"


def round_plainly(layer: Layer, spec: QuantSpec) -> dict[str, Any]:
    """Rounds a dense layer of a block to the nearest codes of this grid, without data."""
    if isinstance(spec, BnbSpec):
        layer.pack(BnbLinear.from_weight(layer.weight, spec, layer.module.bias, layer.transposed))
        return {"bits": spec.bits}
    return rounded_layer(layer, spec, search=True)


def requantize(
    model: ModelHandle,
    weights: Mapping[str, Callable[[], Tensor]],
    windows: Windows | None,
    context: Context,
    title: str,
) -> list[dict[str, Any]]:
    """Replaces packed layers by packed layers, on the same grids, that hold `weights`: block after block, by GPTQ on
    `windows`; None: by the nearest code. Returns a record for each block."""
    packed = {name: model.model.get_submodule(name) for name in weights}
    pass_ = Requantize.of(packed, weights)
    stream = None if windows is None else CalibrationStream(model, windows, context.tokens_per_batch)

    def change(block: Block) -> dict[str, Any]:
        calibration = None if stream is None else BlockCalibration(block, stream)
        found = pass_.compress_block(block, calibration)
        error = None if calibration is None else calibration.finish()
        return {"name": block.name, "error": error, **found}

    return over_blocks(title, model, replace(context, stage=None), change, stream)


def merge_all(
    model: ModelHandle,
    windows: Windows,
    context: Context,
    score: Callable[..., Mapping[str, float]] | None,
    measured: dict[str, Any],
    title: str,
) -> list[dict[str, Any]]:
    """Puts the adapters that the model has into its weights; packed layers are rounded anew, on `windows`.

    `score` measures a model on held-out text: its figures come into `measured`, of the merged model and, where layers
    are packed, of what rounding plainly would have left. Returns a record for each block, or nothing where no layer is
    packed. What is trained whole, and lies in no block, is kept in `context.stage`.
    """
    layers = adapters.layers_of(model.model)
    copies = adapters.trained_copies(model.model)
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    packed = {name: base for name, base in bases.items() if isinstance(base, QuantLinear)}
    weights = {name: partial(adapters.merged_weight, layers[name]) for name in packed}
    for name, base in bases.items():
        if name not in packed:
            merge_dense(base, adapters.merged_weight(layers[name]))
    adapters.detach(model.model)
    with torch.no_grad():
        for name, copy in copies.items():
            for key, parameter in model.model.get_submodule(name).named_parameters():
                parameter.copy_(copy.get_parameter(key))
    records: list[dict[str, Any]] = []
    if packed:
        if score is not None:
            requantize(model, weights, None, context, f"{title}: rounding plainly")
            measured["rounded plainly"] = score(model.model)
            for name, base in packed.items():
                model.model.set_submodule(name, base)
        records = requantize(model, weights, windows, context, f"{title}: rounding")
    if score is not None:
        measured["merged"] = score(model.model)
    model.adapter = None
    model.states.discard("adapter")
    if context.stage is not None and copies:
        outside = model.outside().items()
        context.stage.keep_outside({name: t for name, t in outside if name.rpartition(".")[0] in copies})
    return records


def set_beside(model: ModelHandle, start: Mapping[str, Tensor], context: Context) -> None:
    """Takes the adapters out of the model and keeps them beside it, and in `context.stage`; `start` as of
    `give_back`."""
    adapter = adapters.taken(model.model)
    give_back(model, start)
    model.adapter = without_start(adapter, start) if start else adapter
    if context.stage is not None and not process_rank():
        model.adapter.save(context.stage.folder / "adapter")


def give_back(model: ModelHandle, start: Mapping[str, Tensor]) -> None:
    """Takes the adapters out of the model, whose weights are then what they were. `start`: the first values of adapters
    that begin as a part of the weight (`pissa`), by their names."""
    for name, layer in adapters.layers_of(model.model).items():
        if start:
            part = start[f"{name}.lora_B.weight"] @ start[f"{name}.lora_A.weight"] * layer.scaling[adapters.NAME]
            base = layer.get_base_layer()
            merge_dense(base, weight_of(base) + part)
    adapters.detach(model.model)
