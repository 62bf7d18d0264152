"""What removed blocks did, as far as a linear map of what the layer before them is given can: added to its weight.

In most models the last layer of a block is added to the residual stream as it is, so that a change of its weight is a
change of the stream that the next block reads. What the removed blocks added there is fitted to that layer's input by
ridge least squares (`compress/maths/bridge.py`) over the calibration text. The fit is sequential: a layer is given the
text as the blocks before it, bridged ones included, now make it, and aims at what the whole model has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration import hooked
from compress.errors import StartError
from compress.maths.bridge import Moments, fit
from compress.model import Block, Layer, ModelHandle
from compress.stream import CalibrationStream, called

#: Of so many batches one is held out, to find how strong the ridge must be.
HELD_OUT = 4


@torch.no_grad()
def find_summand(block: Block, stream: CalibrationStream) -> str:
    """The layer of a block whose output is added, as it is, to what the block gives: of several the one called last.

    Found by adding to what each gives, on the first batch. StartError where there is none (a norm follows the sum, or
    the layer). The block must be loaded.
    """
    hidden, call = next(stream.inputs(block))
    before = called(block.module, hidden, call).double()
    order: list[str] = []
    layers = block.layers()
    with hooked(block.module, {name: partial(_note, order, name) for name in layers}):
        called(block.module, hidden, call)
    for name in reversed(order):
        layer = layers[name]
        shift = torch.randn(layer.weight.shape[0], generator=torch.Generator().manual_seed(0)) * float(before.std())
        shift = shift.to(before.device, layer.dtype)
        if len(shift) != before.shape[-1]:
            continue
        handle = layer.module.register_forward_hook(lambda _, __, out, shift=shift: out + shift)
        try:
            moved = called(block.module, hidden, call).double() - before
        finally:
            handle.remove()
        epsilon = torch.finfo(layer.dtype).eps
        error = (moved - shift.double()).norm()
        if error <= epsilon**0.5 * moved.norm() + 4 * epsilon * before.norm():
            return name
    raise StartError(
        f"bridge: what no layer of {block.name} gives is added to the residual stream as it is (a norm or a choice of "
        "experts comes between), so no fit can be folded into one. Leave bridge out."
    )


def _note(order: list[str], name: str, _: Tensor) -> None:
    if name not in order:
        order.append(name)


@torch.no_grad()
def bridged(
    model: ModelHandle, stream: CalibrationStream, keep: Sequence[Sequence[int]]
) -> Iterator[tuple[Block, dict[str, Any] | None]]:
    """The blocks that stay (`keep`: of each stack), in order and loaded, those before a hole changed, with what the fit
    says; None where nothing follows. `stream` stands before the first block, and has the path of the whole model.

    A block may be released when the next one is asked for. While the blocks of a hole are gone through, two are loaded.
    """
    for stack, stays in zip(model.stacks, keep, strict=True):
        for index in range(stays[0]):
            _pass(model, stream, Block(stack, index))
        for index, following in zip(stays, [*stays[1:], len(stack)], strict=True):
            block = model.load(Block(stack, index))
            stream.advance_original(block)
            record = None
            if following > index + 1:
                for hole in range(index + 1, following):
                    _pass(model, stream, Block(stack, hole))
                record = _bridge(block, stream)
            stream.advance(block)
            yield block, record
            model.release(block)


def _pass(model: ModelHandle, stream: CalibrationStream, block: Block) -> None:
    """Moves the path of the whole model through a block that goes."""
    stream.advance_original(model.load(block))
    model.release(block)


def _bridge(block: Block, stream: CalibrationStream) -> dict[str, Any]:
    """Adds the fit to the layer's weight (and bias, if it has one)."""
    name = find_summand(block, stream)
    layer = block.layers()[name]
    bias: nn.Parameter | None = layer.module.bias
    inputs, outputs = layer.weight.shape[1] + (bias is not None), layer.weight.shape[0]
    parts = [Moments(inputs, outputs, layer.weight.device) for _ in range(2)]
    batches = len(stream.hidden)
    assert stream.original is not None
    for index, (hidden, call) in enumerate(stream.inputs(block)):
        seen: list[Tensor] = []
        with hooked(block.module, {name: seen.append}):
            out = called(block.module, hidden, call)
        missing = stream.original[index].to(out.device, torch.float64) - out.double()
        given = seen[0].reshape(*out.shape[:-1], -1)
        if bias is not None:
            given = torch.cat([given, torch.ones_like(given[..., :1])], -1)
        mask = stream.masks[index]
        kept = torch.ones(out.shape[:-1], dtype=torch.bool) if mask is None else mask
        halves = kept.clone(), kept.clone()
        if batches < HELD_OUT:  # too few batches to hold one out: some tokens of each
            halves[0][:, ::HELD_OUT] = False
            halves[1][:] = kept & ~halves[0]
        else:
            halves[int(index % HELD_OUT != HELD_OUT - 1)][:] = False
        for part, chosen in zip(parts, halves, strict=True):
            part.add(given[chosen.to(out.device)], missing[chosen.to(out.device)])
    found = fit(*parts)
    if found is None:
        return {"layer": name, "explained": 0.0}
    weight, strength, explained = found
    _add(layer, weight)
    return {"layer": name, "ridge": strength, "explained": explained}


def _add(layer: Layer, weight: Tensor) -> None:
    columns = layer.weight.shape[1]
    layer.set_weight((layer.weight.double() + weight[:, :columns]).to(layer.dtype))
    if layer.module.bias is not None:
        layer.module.bias.copy_((layer.module.bias.double() + weight[:, columns]).to(layer.dtype))
