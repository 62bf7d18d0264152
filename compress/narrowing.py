"""Taking parts out of every block and fitting anew what stays, as `width` does it: measure first, then cut.

`measured`: one walk over the model as it is, which says in what order the parts of each block go and what each mix of
them costs. `cut`: a second one, through the one engine, in which every block becomes the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.budget import batch_tokens
from compress.calibration import BlockCalibration
from compress.data import Windows
from compress.importance import Scores, taylor_scores
from compress.maths.elimination import eliminate, refitted, without
from compress.maths.hessian import CrossMoment, Hessian, NotPositiveDefinite
from compress.model import Block, Layer, ModelHandle, find_stacks
from compress.places import Places, cut, find_landing, find_places, probe_windows, put
from compress.reshaping import empty_model, take_shape
from compress.sensitivity import divergence, replaced
from compress.stacks import Stack
from compress.stream import CalibrationStream
from compress.units import Units, fewer
from compress.walk import over_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from compress.passes.base import Context
    from compress.passes.width import Mix, Width

#: Tokens of the calibration text on which mixes are compared.
TRIAL_TOKENS = 8192


class Narrowing:
    """One run of `width` on one model."""

    def __init__(self, pass_: Width, model: ModelHandle, context: Context, units: Sequence[Units]):
        assert context.calibration is not None
        self.pass_, self.model, self.context, self.units = pass_, model, context, units
        self.windows = context.calibration
        trial = [kind.config(model.config, fewer(model.model, kind)) for kind in units]
        #: For each kind of part, the stacks of blocks with fewer of it, without weights, by name.
        self.smaller = [_stacks(model, config) for config in trial]
        self.probe = self._probe()
        #: Layers whose inputs could not be ranked by what is lost after the fit.
        self.by_what_they_give: list[str] = []

    def _probe(self) -> CalibrationStream:
        """What blocks are checked on; a new one for every walk, as it goes from stack to stack and never back."""
        return CalibrationStream(self.model, probe_windows(self.model))

    def places(self, block: Block) -> list[Places | None]:
        """Where the parts of each kind lie in a block."""
        return [
            find_places(block, stacks[block.stack.name].modules[block.index], kind, self.probe)
            for kind, stacks in zip(self.units, self.smaller, strict=True)
        ]

    def measured(self, mixes: Sequence[Mix]) -> dict[str, Any]:
        """`orders`: for each block (by name) and kind of part, which go, the first to go first. `costs`: of each of
        `mixes`, the divergence of the model that it leaves from the one that there is; zeros where there is no choice.
        `by_what_they_give`: layers whose inputs could be ranked in no other way.
        """
        stage = self.context.stage
        return stage.once("importance", lambda: self._measure(mixes)) if stage else self._measure(mixes)

    @torch.no_grad()
    def _measure(self, mixes: Sequence[Mix]) -> dict[str, Any]:
        scores: Scores | None = None
        if self.pass_.importance == "taylor":
            scores = taylor_scores(self.model, self.windows, self.places)
        stream = CalibrationStream(self.model, self.windows, self.context.tokens_per_batch)
        trial, streams = None, []
        if len(mixes) > 1:
            few = _first(self.windows, TRIAL_TOKENS)
            vocabulary = int(getattr(self.model.config.get_text_config(), "vocab_size", 1))  # images: a few classes
            trial = CalibrationStream(self.model, few, batch_tokens(few.length, vocabulary))
            streams = [list(trial.hidden) for _ in mixes]
        most = [kind.count - min(mix[index] for mix in mixes) for index, kind in enumerate(self.units)]
        orders: dict[str, list[list[int]]] = {}
        with self.context.progress.step("width: importance", total=len(self.model.block_list())) as step:
            for block in self.model.blocks():
                places = self.places(block)
                known: Sequence[Sequence[float] | None] = scores[block.name] if scores else [None] * len(places)
                hessians = _hessians(block, stream, places)
                found = zip(places, hessians, most, known, strict=True)
                orders[block.name] = [self._order(block, *one) for one in found]
                if trial is not None:
                    for mix, hidden in zip(mixes, streams, strict=True):
                        self._push_without(block, trial, hidden, places, hessians, mix, orders[block.name])
                    trial.advance(block)
                stream.advance(block)
                step.advance(block.name)
        costs = divergence(trial, trial.hidden, streams) if trial is not None else [0.0]
        return {"orders": orders, "costs": costs, "by_what_they_give": self.by_what_they_give}

    def _order(
        self, block: Block, place: Places | None, hessian: Tensor, most: int, known: Sequence[float] | None
    ) -> list[int]:
        """Parts in the order in which they go, `most` of them."""
        order: list[int] = []
        if place is None or not most:
            return order
        groups = place.columns.to(hessian.device)
        score = torch.tensor(known) if known is not None else hessian.diagonal()[groups].sum(1)
        if self.pass_.importance == "reconstruction":
            try:
                return eliminate(block.layers()[place.reader].weight, hessian, groups, most, self.pass_.damping)
            except NotPositiveDefinite:  # then by what they give
                self.by_what_they_give.append(f"{block.name}.{place.reader}")
        order += score.argsort(stable=True)[:most].tolist()
        return order

    def _push_without(
        self, block: Block, trial: CalibrationStream, hidden: list[Tensor], places: Sequence[Places | None],
        hessians: Sequence[Tensor], mix: Mix, orders: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        """Pushes hidden states through the block as a mix leaves it: what a reader is not given is not there."""
        layers = block.layers()
        with ExitStack() as stack:
            for place, hessian, count, order in zip(places, hessians, mix, orders, strict=True):
                if place is None or count == len(place.columns):
                    continue
                layer = layers[place.reader]
                columns = place.columns[order[: len(place.columns) - count]].flatten().to(hessian.device)
                weight = layer.weight.index_fill(1, columns, 0.0)
                if self.pass_.refit:
                    with suppress(NotPositiveDefinite):
                        weight = without(layer.weight, hessian, columns, self.pass_.damping).to(layer.dtype)
                stack.enter_context(replaced(layer, weight))
            trial.push(block, hidden)

    @torch.no_grad()
    def cut(
        self, config: PretrainedConfig, mix: Mix, orders: Mapping[str, list[list[int]]]
    ) -> tuple[list[dict[str, Any]], float]:
        """Makes the model that of `config`; the blocks' records, and the share of matrix weights that was changed."""
        model, context = self.model, self.context
        stream = None
        if self.pass_.refit:
            stream = CalibrationStream(model, self.windows, context.tokens_per_batch, original=True)
        new, self.probe = _stacks(model, config), self._probe()
        total = sum(block.matrix_weights() for block in model.block_list())

        def reshape(block: Block) -> None:
            block.stack.modules[block.index] = new[block.stack.name].modules[block.index]

        def change(block: Block) -> dict[str, Any]:
            return self._cut_block(block, reshape, mix, orders[block.name], stream)

        records = over_blocks(self.pass_.name, model, context, change, stream, reshape)
        if context.stage is not None:
            context.stage.keep_config(config)
        states = [block.state() for block in model.block_list()] if model.resident else []
        take_shape(model, config)
        for block, tensors in zip(model.block_list(), states, strict=False):
            block.restore(tensors, {})
        return records, sum(record["weights"] for record in records) / total

    def _cut_block(
        self, block: Block, reshape: Callable[[Block], None], mix: Mix, orders: Sequence[Sequence[int]],
        stream: CalibrationStream | None,
    ) -> dict[str, Any]:  # fmt: skip
        calibration = BlockCalibration(block, stream, block.module) if stream is not None else None
        places, tensors, changed = self.places(block), block.state(), set()
        sizes = {name: tensor.numel() for name, tensor in tensors.items() if tensor.dim() >= 2}
        readers = [place.reader for place in places if place is not None]
        landings = {reader: find_landing(block, reader, self.probe) for reader in readers} if calibration else {}
        for place, count, order in zip(places, mix, orders, strict=True):
            if place is not None:
                gone = set(order[: len(place.columns) - count])
                tensors = cut(tensors, place, torch.tensor([n for n in range(len(place.columns)) if n not in gone]))
                changed |= set(place.tensors)
        layers = {}
        if calibration is not None:  # what is fitted is written into, and the block that came in is still looked at
            changed |= {f"{name}.weight" for name in block.layers()}
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        reshape(block)
        put(block.module, tensors, block.name)
        if calibration is not None:
            for stage in calibration.stages(list(block.layers())):
                if stage[0] in landings:
                    layers[stage[0]] = self._fit_reader(block, calibration, stage[0], landings[stage[0]])
                else:
                    layers |= self._fit_stage(block, calibration, stage)
        error = calibration.finish() if calibration is not None else None
        weights = sum(size for name, size in sizes.items() if name in changed)
        return {"name": block.name, "error": error, "weights": weights, "layers": layers}

    def _fit_stage(self, block: Block, calibration: BlockCalibration, stage: Sequence[str]) -> dict[str, Any]:
        """Fits layers of one input, which is no longer what it was, to give what they gave of it in the original."""
        layers = block.layers()
        weight = layers[stage[0]].weight
        columns = weight.shape[1]
        hessian, cross = Hessian(columns, weight.device), CrossMoment(columns, weight.device)

        def add(x: Tensor, original: Tensor) -> None:
            hessian.add(x)
            cross.add(original - x, x)

        calibration.observe_pairs({stage[0]: add})
        report: dict[str, Any] = {}
        for name in stage:
            weight = layers[name].weight
            missing = weight.to(cross.matrix.dtype) @ cross.matrix
            try:
                fill(block, layers[name], refitted(weight, hessian.matrix, missing, self.pass_.damping))
                report[name] = {"refitted": "its own output"}
            except NotPositiveDefinite as error:
                report[name] = {"fallback": f"not fitted anew: {error}"}
        return report

    def _fit_reader(
        self, block: Block, calibration: BlockCalibration, reader: str, landing: str | None
    ) -> dict[str, Any]:
        """Solves for the weight of a layer that lost inputs, and for its bias if it has one, as one more column whose
        input is 1."""
        layer = block.layers()[reader]
        rows, columns = layer.weight.shape
        bias = layer.module.bias
        wide = columns + (bias is not None)
        hessian, cross = Hessian(wide, layer.weight.device), CrossMoment(wide, layer.weight.device, rows)

        def add(x: Tensor, missing: Tensor) -> None:
            if bias is not None:
                x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            hessian.add(x)
            cross.add(missing, x)

        calibration.observe_missing(reader, landing, add)
        weight = torch.cat([layer.weight, bias[:, None]], 1) if bias is not None else layer.weight
        try:
            weight = refitted(weight, hessian.matrix, cross.matrix, self.pass_.damping)
        except NotPositiveDefinite as error:
            return {"fallback": f"not fitted anew: {error}"}
        fill(block, layer, weight[:, :columns])
        if bias is not None:
            bias.copy_(weight[:, columns])
        return {"refitted": "the block's output" if landing is None else f"the input of {landing}"}


def fill(block: Block, layer: Layer, weight: Tensor) -> None:
    """Writes a fitted weight; in a pruned model, what is zero stays so."""
    layer.set_weight(weight.masked_fill(layer.weight == 0, 0.0) if block.sparse else weight)


def _stacks(model: ModelHandle, config: PretrainedConfig) -> dict[str, Stack]:
    """The stacks of a model of `config` without weights, by name."""
    return {stack.name: stack for stack in find_stacks(empty_model(model.model, config))}


def _hessians(block: Block, stream: CalibrationStream, places: Sequence[Places | None]) -> list[Tensor]:
    """Of the input of each reader; an empty one for no reader."""
    layers, device = block.layers(), stream.model.device
    found = {p.reader: Hessian(layers[p.reader].weight.shape[1], device) for p in places if p is not None}
    if found:
        BlockCalibration(block, stream).observe({name: hessian.add for name, hessian in found.items()})
    return [torch.zeros(0, 0) if place is None else found[place.reader].matrix for place in places]


def _first(windows: Windows, tokens: int) -> Windows:
    """So many of the first windows as have that many tokens, one at least."""
    count = max(1, tokens // windows.length)
    mask = None if windows.mask is None else windows.mask[:count]
    return replace(windows, tokens=windows.tokens[:count], mask=mask)
