"""Taking parts out of every block and fitting anew what read them, as `width` does it: measure first, then cut.

`measured`: one walk over the model as it is, which says in what order the parts of each block go and what each mix of
them loses. `cut`: a second one, through the one engine, in which every block becomes the smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.calibration import BlockCalibration
from compress.data import Windows, windows_from
from compress.maths.elimination import eliminate, loss_without, refitted
from compress.maths.hessian import CrossMoment, Hessian, NotPositiveDefinite
from compress.model import Block, ModelHandle, find_stacks
from compress.reshaping import empty_model, take_shape
from compress.stream import CalibrationStream
from compress.units import Places, Units, cut, fewer, find_landing, find_places, put
from compress.walk import over_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from compress.passes.base import Context
    from compress.passes.width import Mix, Width

#: Random tokens on which blocks are checked: so many windows of so many.
PROBE_WINDOWS, PROBE_LENGTH = 2, 16


class Narrowing:
    """One run of `width` on one model."""

    def __init__(self, pass_: Width, model: ModelHandle, context: Context, units: Sequence[Units]):
        self.pass_, self.model, self.context, self.units = pass_, model, context, units
        self.probe = CalibrationStream(model, _probe_windows(model))
        trial = [kind.config(model.config, fewer(model.model, kind)) for kind in units]
        #: For each kind of part, the blocks with fewer of it, without weights.
        self.smaller = [find_stacks(empty_model(model.model, config))[0] for config in trial]

    def places(self, block: Block) -> list[Places | None]:
        """Where the parts of each kind lie in a block."""
        pairs = zip(self.units, self.smaller, strict=True)
        return [find_places(block, stack.modules[block.index], kind, self.probe) for kind, stack in pairs]

    def measured(self, mixes: Sequence[Mix]) -> dict[str, Any]:
        """`orders`: for each block (by name) and kind of part, which go, the first to go first. `losses`: what each of
        `mixes` loses, summed over blocks: the squared error of what readers give, relative to the block's output."""
        stage = self.context.stage
        return stage.once("importance", lambda: self._measure(mixes)) if stage else self._measure(mixes)

    @torch.no_grad()
    def _measure(self, mixes: Sequence[Mix]) -> dict[str, Any]:
        assert self.context.calibration is not None
        name = self.pass_.name
        scores = self._slopes() if self.pass_.importance == "taylor" else None
        stream = CalibrationStream(self.model, self.context.calibration, self.context.tokens_per_batch)
        orders: dict[str, list[list[int]]] = {}
        losses = [0.0] * len(mixes)
        with self.context.progress.step(f"{name}: importance", total=len(self.model.block_list())) as step:
            for block in self.model.blocks():
                places = self.places(block)
                hessians = _hessians(block, stream, [place for place in places if place is not None])
                stream.advance(block)
                size = sum(float(h.double().square().sum()) for h in stream.hidden)
                size /= sum(h[..., 0].numel() for h in stream.hidden)
                orders[block.name] = []
                for index, place in enumerate(places):
                    most = self.units[index].count - min(mix[index] for mix in mixes)
                    order: list[int] = []
                    if place is not None and most:
                        hessian = hessians[place.reader]
                        weight = block.layers()[place.reader].weight
                        known = None if scores is None else scores[block.name][index]
                        order = self._order(weight, hessian, place, most, known)
                        lost = self._losses(weight, hessian, place, order, {most, *()} | {
                            self.units[index].count - mix[index] for mix in mixes
                        }) if len(mixes) > 1 else {}
                        for at, mix in enumerate(mixes):
                            losses[at] += lost.get(self.units[index].count - mix[index], 0.0) / max(size, 1e-30)
                    orders[block.name].append(order)
                step.advance(block.name)
        return {"orders": orders, "losses": losses}

    def _slopes(self) -> Mapping[str, Sequence[Sequence[float]]]:
        from compress.importance import taylor_scores

        assert self.context.calibration is not None
        return taylor_scores(self.model, self.context.calibration, self.places)

    def _order(
        self, weight: Tensor, hessian: Tensor, place: Places, most: int, known: Sequence[float] | None
    ) -> list[int]:
        """Parts in the order in which they go, `most` of them."""
        groups = place.columns.to(hessian.device)
        if self.pass_.importance == "reconstruction":
            try:
                return eliminate(weight, hessian, groups, most, self.pass_.damping)
            except NotPositiveDefinite:
                pass
        score = torch.tensor(known) if known is not None else hessian.diagonal()[groups].sum(1)
        return score.argsort(stable=True)[:most].tolist()

    def _losses(
        self, weight: Tensor, hessian: Tensor, place: Places, order: list[int], counts: set[int]
    ) -> dict[int, float]:
        groups = place.columns.to(hessian.device)
        found = {}
        for count in counts - {0}:
            columns = groups[order[:count]].flatten()
            try:
                found[count] = loss_without(weight, hessian, columns, self.pass_.damping, self.pass_.refit)
            except NotPositiveDefinite:
                found[count] = loss_without(weight, hessian, columns, self.pass_.damping, False)
        return found

    @torch.no_grad()
    def cut(
        self, config: PretrainedConfig, mix: Mix, orders: Mapping[str, list[list[int]]]
    ) -> tuple[list[dict[str, Any]], float]:
        """Makes the model that of `config`; the blocks' records, and the share of matrix weights that was changed."""
        model, context = self.model, self.context
        assert context.calibration is not None
        stream = None
        if self.pass_.refit:
            stream = CalibrationStream(model, context.calibration, context.tokens_per_batch, original=True)
        new = find_stacks(empty_model(model.model, config))[0]
        total = sum(block.matrix_weights() for block in model.block_list())

        def reshape(block: Block) -> None:
            block.stack.modules[block.index] = new.modules[block.index]

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
        self, block: Block, reshape: Any, mix: Mix, orders: list[list[int]], stream: CalibrationStream | None
    ) -> dict[str, Any]:
        calibration = BlockCalibration(block, stream) if stream is not None else None
        places = [place for place in self.places(block) if place is not None]
        landings = {p.reader: find_landing(block, p.reader, self.probe) for p in places} if stream is not None else {}
        tensors, touched = block.state(), 0
        for place, count, order in zip(self.places(block), mix, orders, strict=True):
            if place is None:
                continue
            touched += sum(t.numel() for name, t in tensors.items() if name in place.tensors and t.dim() >= 2)
            gone = set(order[: len(place.columns) - count])
            tensors = cut(tensors, place, torch.tensor([n for n in range(len(place.columns)) if n not in gone]))
        reshape(block)
        put(block.module, tensors, block.name)
        layers = {}
        if calibration is not None:
            for reader, landing in landings.items():
                layers[reader] = self._fit(block, calibration, reader, landing)
        error = calibration.finish() if calibration is not None else None
        return {"name": block.name, "error": error, "weights": touched, "layers": layers}

    def _fit(self, block: Block, calibration: BlockCalibration, reader: str, landing: str | None) -> dict[str, Any]:
        """Solves for the reader's weight, and its bias if it has one, as one more column whose input is 1."""
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
        layer.set_weight(weight[:, :columns])
        if bias is not None:
            bias.copy_(weight[:, columns])
        return {"refitted": "block" if landing is None else landing}


def _hessians(block: Block, stream: CalibrationStream, places: Sequence[Places]) -> dict[str, Tensor]:
    """Of the input of each reader."""
    layers = block.layers()
    found = {place.reader: Hessian(layers[place.reader].weight.shape[1], stream.model.device) for place in places}
    if found:
        BlockCalibration(block, stream).observe({name: hessian.add for name, hessian in found.items()})
    return {name: hessian.matrix for name, hessian in found.items()}


def _probe_windows(model: ModelHandle) -> Windows:
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_LENGTH, model.context_length or PROBE_LENGTH)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return windows_from(torch.randint(0, vocabulary, (PROBE_WINDOWS, length), generator=generator), None)
