"""Where the parts of a block lie: which rows of which tensors make each of them, which columns of which layer read it.

Which of a tensor's rows belong to which part has few possible answers (`_arrangements`). They are tried on a block:
with parts cut out, it must compute what the whole block computes when the reader's columns of these parts are zero.

A block of a decoder has an attention to itself and one to the encoder: two places, of one kind of parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from compress.calibration import BlockCalibration
from compress.capture import Call
from compress.data import Windows, windows_from
from compress.errors import StartError
from compress.images import random_images, reads_images
from compress.model import Block, Layer, ModelHandle, place_tensors
from compress.residual import is_norm
from compress.sensitivity import replaced
from compress.stream import CalibrationStream, called
from compress.units import Units, readers, shrunk_tensors

#: Random tokens on which blocks are checked: so many windows of so many.
PROBE_WINDOWS, PROBE_LENGTH = 2, 16


@dataclass(frozen=True)
class Places:
    """Where parts of one block lie. `tensors`: name in the block -> the dimension, and int64 `[parts, n]`, which of
    its entries belong to each part. `reader`: the layer that is given what the parts make; `columns` `[parts, n]` are
    those of its inputs. `units`: what kind of parts they are."""

    units: Units
    tensors: Mapping[str, tuple[int, Tensor]]
    reader: str
    columns: Tensor


def _arrangements(size: int, units: Units) -> list[Tensor]:
    """Ways in which `size` rows may belong to parts, int64 `[parts, n]`: one section after another (gate and up, or
    queries, keys and values), each in the order of the parts; or each part's rows side by side."""
    rows, count = torch.arange(size), units.count
    if size % count:
        return []
    found = [rows.view(count, -1)]
    sections = units.sections or (1,) * (size // count)
    if len(sections) > 1 and count * sum(sections) == size:
        parts = rows.split([count * section for section in sections])
        found.insert(0, torch.cat([part.view(count, -1) for part in parts], 1))
    return found


class Probe(CalibrationStream):
    """Random text, or images, on which blocks are checked. It is not pushed through them."""

    def __init__(self, model: ModelHandle):
        super().__init__(model, probe_windows(model))
        #: How the blocks of a stack are called where the first of them has fewer parts of a kind.
        self.calls_behind_fewer: dict[tuple[str, str], list[list[Call]]] = {}

    def fewer_call(self, block: Block, units: Units, call: Call) -> Call:
        """How a block with fewer parts is called, where the whole one is called by `call`."""
        behind = self.calls_behind_fewer.get((block.stack.name, units.what))
        return call if behind is None or block.index == 0 else behind[0][block.index]


def reader_tensors(module: nn.Module, smaller: nn.Module) -> dict[str, dict[str, int]]:
    """Layers of a block that read parts of which `smaller` has fewer, each with the tensors of the parts that it reads,
    and the dimension in which these are smaller."""
    shrunk = shrunk_tensors(module, smaller)
    names = [name for name, _ in readers(module, shrunk)]
    if len(names) == 1:
        return {names[0]: shrunk}
    homes = {name: name.rpartition(".")[0] + "." for name in names}  # each in a module of its own
    found = {r: {n: d for n, d in shrunk.items() if n.startswith(home)} for r, home in homes.items()}
    if sorted(n for tensors in found.values() for n in tensors) != sorted(shrunk):
        raise StartError(
            f"Which of the tensors {', '.join(shrunk)} are read by which of {', '.join(names)} is not said."
        )
    return found


def find_places(block: Block, smaller: nn.Module, units: Units, probe: Probe) -> list[Places]:
    """Where the parts of a block lie, one `Places` for each layer that reads some. `smaller`: the block with fewer of
    them, on the meta device. StartError where no arrangement is proved by running the block.

    The block is as it was when this returns. Blocks that follow one that hands on more than hidden states are to be
    asked after it.
    """
    tensors = reader_tensors(block.module, smaller)
    ways: dict[tuple[str, str], list[Tensor]] = {}  # a layer's bias is arranged as its weight is
    for reader, shrunk in tensors.items():
        for name, dimension in shrunk.items():
            size = block.module.get_parameter(name).shape[dimension]
            ways.setdefault((reader, name.rpartition(".")[0]), _arrangements(size, units))
    for choice in product(*ways.values()) if tensors else ():
        arranged = dict(zip(ways, choice, strict=True))
        found = [
            Places(
                units,
                {name: (d, arranged[reader, name.rpartition(".")[0]]) for name, d in shrunk.items()},
                reader,
                arranged[reader, reader],
            )
            for reader, shrunk in tensors.items()
        ]
        trial = deepcopy(smaller)
        if _holds(block, trial, found, probe):
            if block.index == 0 and probe.hands_on:
                probe.calls_behind_fewer[block.stack.name, units.what] = probe.calls_behind(block, trial)
            return found
    if not tensors:
        return []
    raise StartError(
        f"{block.name}: which rows belong to which of its {units.count} {units.what} could not be found: with some cut "
        "out, it computes something else than without them."
    )


def _trial_parts(place: Places, smaller: nn.Module) -> Tensor:
    """Parts that stay in a trial, as many as `smaller` has."""
    assert smaller.get_parameter(f"{place.reader}.weight").is_meta
    left = Layer(None, place.reader, smaller.get_submodule(place.reader)).weight.shape[1]
    count = place.units.count
    stays = left * count // place.columns.numel()
    return torch.linspace(0, count - 1, stays).round().long() if stays > 1 else torch.tensor([count - 1])


def _holds(block: Block, smaller: nn.Module, places: list[Places], probe: Probe) -> bool:
    """Whether `smaller`, filled with what stays of the block in a trial, computes what the block does without the
    rest."""
    hidden, call = next(probe.inputs(block))
    layers, tensors, gone = block.layers(), block.state(), {}
    for place in places:
        keep = _trial_parts(place, smaller)
        absent = torch.ones(len(place.columns), dtype=torch.bool)
        absent[keep] = False
        gone[place.reader] = place.columns[absent].flatten().to(layers[place.reader].weight.device)
        tensors = cut(tensors, place, keep)
    try:
        put(smaller, tensors, block.name)
    except RuntimeError:  # shapes that do not fit
        return False
    with torch.no_grad(), ExitStack() as stack:
        for reader, columns in gone.items():
            stack.enter_context(replaced(layers[reader], layers[reader].weight.index_fill(1, columns, 0.0)))
        expected = called(block.module, hidden, call)
    with torch.no_grad():
        found = called(smaller, hidden, probe.fewer_call(block, places[0].units, call))
    size = (expected - hidden).double().norm()
    return bool((found - expected).double().norm() <= torch.finfo(found.dtype).eps ** 0.5 * size)


def cut(state: Mapping[str, Tensor], places: Places, keep: Tensor) -> dict[str, Tensor]:
    """A block's tensors with only the parts `keep` (int64, ascending)."""
    found = dict(state)
    for name, (dimension, positions) in places.tensors.items():
        stays = positions[keep.to(positions.device)].flatten().sort().values
        found[name] = state[name].index_select(dimension, stays.to(state[name].device)).contiguous()
    return found


def put(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Gives a module without weights its tensors; buffers that no file holds go to their device."""
    place_tensors(module, tensors, where)
    device = next(iter(tensors.values())).device
    for child in module.modules():
        for name in child._non_persistent_buffers_set:
            buffer = child._buffers[name]
            child._buffers[name] = buffer.to(device) if buffer is not None else None
    module.eval()


@torch.no_grad()
def find_landing(block: Block, reader: str, probe: CalibrationStream) -> str | None:
    """Where what a layer gives has been added to the block's residual stream: the norm whose input is the sum, None for
    the block's own output, or the layer itself where neither shows it (a norm of its own comes first).

    Found by running the block with the layer's weight at zero: at its landing, exactly what it gave is missing.
    """
    norms = [name for name, module in block.module.named_modules() if is_norm(module)]
    calibration = BlockCalibration(block, probe)
    before = calibration.trace([reader, *norms])
    layer = block.layers()[reader]
    saved = layer.weight.clone()
    try:
        layer.weight.zero_()
        after = calibration.trace([reader, *norms])
    finally:
        layer.weight.copy_(saved)
    given = before.outputs[reader] - after.outputs[reader]
    later = list(before.inputs)
    places: list[tuple[str | None, Tensor, Tensor]] = [
        (name, before.inputs[name], after.inputs[name]) for name in later[later.index(reader) + 1 :] if name in norms
    ]
    for name, now, then in [*places, (None, before.result, after.result)]:
        own = now.shape == given.shape and torch.equal(now, before.outputs[reader])
        if now.numel() == given.numel() and not own and _same(now - then, given.view_as(now), now):
            return name
    return reader


def _same(found: Tensor, expected: Tensor, whole: Tensor) -> bool:
    epsilon = torch.finfo(found.dtype).eps
    error, size = (found - expected).double().norm(), expected.double().norm()
    return bool(error <= epsilon**0.5 * size + 4 * epsilon * whole.double().norm()) and bool(size > 0)


def probe_windows(model: ModelHandle) -> Windows:
    """Random tokens, or images, on which blocks are checked."""
    if reads_images(model.config):
        return random_images(model.config, PROBE_WINDOWS, 0)
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_LENGTH, model.context_length or PROBE_LENGTH)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return windows_from(torch.randint(0, vocabulary, (PROBE_WINDOWS, length), generator=generator), None)
