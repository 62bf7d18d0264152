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
from compress.maths.elimination import eliminate, marginal_costs, refitted, without
from compress.maths.hessian import CrossMoment, Hessian, NotPositiveDefinite
from compress.model import Block, Layer, ModelHandle, find_stacks
from compress.places import Places, Probe, cut, find_landing, find_places, put, reader_tensors
from compress.reshaping import empty_model, take_shape
from compress.sensitivity import outputs_divergence, replaced
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
        self.probe = Probe(model)  # a new one for every walk, as it goes from stack to stack and never back
        self.joint = self._joint()
        #: Layers whose inputs could not be ranked by what is lost after the fit.
        self.by_what_they_give: list[str] = []

    def _joint(self) -> set[tuple[str, str]]:
        """Stack and reader of parts that are one in all blocks of the stack: where the first block holds a tensor of
        them that others have not, as these use it too (T5's table of position biases, a column a head)."""
        found = set()
        for stacks in self.smaller:
            for stack in self.model.stacks:
                pairs = zip(stack.modules, stacks[stack.name].modules, strict=True)
                first, *others = [reader_tensors(module, smaller) for module, smaller in pairs]
                for reader, tensors in first.items():
                    if any(reader in other and tensors.keys() - other[reader].keys() for other in others):
                        found.add((stack.name, reader))
        return found

    def places(self, block: Block) -> list[Places]:
        """Where the parts lie in a block, kind by kind."""
        found: list[Places] = []
        for kind, stacks in zip(self.units, self.smaller, strict=True):
            found += find_places(block, stacks[block.stack.name].modules[block.index], kind, self.probe)
        return found

    def _left(self, place: Places, mix: Mix) -> int:
        """How many of its parts a mix leaves."""
        return mix[self.units.index(place.units)]

    def measured(self, mixes: Sequence[Mix]) -> dict[str, Any]:
        """`orders`: for each block (by name) and its places, which go, the first to go first. `costs`: of each of
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
        together = self._joint_scores() if self.joint and scores is None else {}
        stream = CalibrationStream(self.model, self.windows, self.context.tokens_per_batch)
        trial, forks = None, []
        if len(mixes) > 1:
            few = _first(self.windows, TRIAL_TOKENS)
            vocabulary = int(getattr(self.model.config.get_text_config(), "vocab_size", 1))  # images: a few classes
            trial = CalibrationStream(self.model, few, batch_tokens(few.length, vocabulary))
            forks = [trial.fork() for _ in mixes]
        orders: dict[str, list[list[int]]] = {}
        with self.context.progress.step("width: importance", total=len(self.model.block_list())) as step:
            for block in self.model.blocks():
                places = self.places(block)
                known = [together.get((block.stack.name, place.reader)) for place in places]
                if scores is not None:
                    known = [torch.tensor(score) for score in scores[block.name]]
                hessians = _hessians(block, stream, places)
                orders[block.name] = [
                    self._order(
                        block, place, hessian, place.units.count - min(self._left(place, m) for m in mixes), score
                    )
                    for place, hessian, score in zip(places, hessians, known, strict=True)
                ]
                if trial is not None:
                    for mix, fork in zip(mixes, forks, strict=True):
                        self._push_without(block, fork, places, hessians, mix, orders[block.name])
                    trial.advance(block)
                stream.advance(block)
                step.advance(block.name)
        costs = [0.0]
        if trial is not None:
            outputs = [fork.outputs(fork.hidden) for fork in forks]
            costs = outputs_divergence(trial, trial.outputs(trial.hidden), outputs)
        return {"orders": orders, "costs": costs, "by_what_they_give": self.by_what_they_give}

    def _joint_scores(self) -> dict[tuple[str, str], Tensor]:
        """What parts matter that are one in all blocks of a stack: their shares of what each block's reader loses, or
        is given, summed over the blocks."""
        stream = CalibrationStream(self.model, self.windows, self.context.tokens_per_batch)
        found: dict[tuple[str, str], Tensor] = {}
        with self.context.progress.step("width: importance of heads", total=len(self.model.block_list())) as step:
            for block in self.model.blocks():
                places = [place for place in self.places(block) if (block.stack.name, place.reader) in self.joint]
                for place, hessian in zip(places, _hessians(block, stream, places), strict=True):
                    key, groups = (block.stack.name, place.reader), place.columns.to(hessian.device)
                    score = hessian.diagonal()[groups].sum(1).double()
                    if self.pass_.importance == "reconstruction":
                        weight = block.layers()[place.reader].weight
                        try:
                            score = marginal_costs(weight, hessian, groups, self.pass_.damping)
                        except NotPositiveDefinite:
                            self.by_what_they_give.append(f"{block.name}.{place.reader}")
                    share = (score / score.sum().clamp_min(torch.finfo(torch.float64).tiny)).cpu()
                    found[key] = found[key] + share if key in found else share
                stream.advance(block)
                step.advance(block.name)
        self.probe = Probe(self.model)
        return found

    def _order(self, block: Block, place: Places, hessian: Tensor, most: int, known: Tensor | None) -> list[int]:
        """Parts in the order in which they go, `most` of them."""
        groups = place.columns.to(hessian.device)
        order: list[int] = []
        if not most:
            return order
        if known is None and self.pass_.importance == "reconstruction":
            try:
                return eliminate(block.layers()[place.reader].weight, hessian, groups, most, self.pass_.damping)
            except NotPositiveDefinite:  # then by what they give
                self.by_what_they_give.append(f"{block.name}.{place.reader}")
        score = hessian.diagonal()[groups].sum(1) if known is None else known
        order += score.argsort(stable=True)[:most].tolist()
        return order

    def _push_without(
        self, block: Block, trial: CalibrationStream, places: Sequence[Places], hessians: Sequence[Tensor], mix: Mix,
        orders: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        """Pushes the text through the block as a mix leaves it: what a reader is not given is not there."""
        layers = block.layers()
        with ExitStack() as stack:
            for place, hessian, order in zip(places, hessians, orders, strict=True):
                gone = place.units.count - self._left(place, mix)
                if not gone:
                    continue
                layer = layers[place.reader]
                columns = place.columns[order[:gone]].flatten().to(hessian.device)
                weight = layer.weight.index_fill(1, columns, 0.0)
                if self.pass_.refit:
                    with suppress(NotPositiveDefinite):
                        weight = without(layer.weight, hessian, columns, self.pass_.damping).to(layer.dtype)
                stack.enter_context(replaced(layer, weight))
            trial.advance(block)

    @torch.no_grad()
    def cut(
        self, config: PretrainedConfig, mix: Mix, orders: Mapping[str, list[list[int]]]
    ) -> tuple[list[dict[str, Any]], float]:
        """Makes the model that of `config`; the blocks' records, and the share of matrix weights that was changed."""
        model, context = self.model, self.context
        stream = None
        if self.pass_.refit:
            stream = CalibrationStream(model, self.windows, context.tokens_per_batch, original=True)
        new, self.probe = _stacks(model, config), Probe(model)
        total = sum(block.matrix_weights() for block in model.block_list())

        def reshape(block: Block) -> None:
            self.probe.reach(block)
            if block.index == 0 and self.probe.hands_on:
                self.places(block)  # now: those of the blocks behind are found with it, and it is about to go
            block.stack.modules[block.index] = new[block.stack.name].modules[block.index]

        def change(block: Block) -> dict[str, Any]:
            return self._cut_block(block, reshape, mix, orders[block.name], stream)

        renew = stream.renew_calls if stream is not None else None
        records = over_blocks(self.pass_.name, model, context, change, stream, reshape, renew)
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
        readers = [place.reader for place in places]
        landings = {reader: find_landing(block, reader, self.probe) for reader in readers} if calibration else {}
        for place, order in zip(places, orders, strict=True):
            count = place.units.count
            gone = set(order[: count - self._left(place, mix)])
            tensors = cut(tensors, place, torch.tensor([n for n in range(count) if n not in gone]))
            changed |= set(place.tensors)
        layers = {}
        if calibration is not None:  # what is fitted is written into, and the block that came in is still looked at
            changed |= {f"{name}.weight" for name in block.layers()}
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        reshape(block)
        put(block.module, tensors, block.name)
        if stream is not None:
            stream.renew_calls(block)
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


def _hessians(block: Block, stream: CalibrationStream, places: Sequence[Places]) -> list[Tensor]:
    """Of the input of each reader."""
    layers, device = block.layers(), stream.model.device
    found = {p.reader: Hessian(layers[p.reader].weight.shape[1], device) for p in places}
    if found:
        BlockCalibration(block, stream).observe({name: hessian.add for name, hessian in found.items()})
    return [found[place.reader].matrix for place in places]


def _first(windows: Windows, tokens: int) -> Windows:
    """So many of the first windows as have that many tokens, one at least."""
    count = max(1, tokens // windows.length)
    mask = None if windows.mask is None else windows.mask[:count]
    return replace(windows, tokens=windows.tokens[:count], mask=mask)
