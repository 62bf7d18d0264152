"""A narrower residual stream: some of its channels are taken out of every layer that reads or writes it.

The same channels everywhere, chosen by what the layers that read the stream get from them on average (Minitron,
section 2.2). What reads is then fitted to give what it gave, and what writes to bring the channels that stay to where
they were, block after block, by least squares on the calibration text. Norms divide by the size of fewer channels from
now on; the fit takes that up, and before the head the last norm's gain does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.calibration import BlockCalibration
from compress.errors import StartError
from compress.maths.elimination import refitted
from compress.maths.hessian import CrossMoment, Hessian, NotPositiveDefinite
from compress.model import Block, ModelHandle, find_stacks
from compress.narrowing import fill
from compress.passes.wanda import ColumnNorms
from compress.places import find_landing, probe_windows, put
from compress.reshaping import empty_model, take_shape
from compress.residual import find_ends
from compress.stream import CalibrationStream
from compress.units import model_embedding, shrunk_tensors
from compress.walk import over_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from compress.passes.base import Context
    from compress.passes.width import Width


class NarrowStream:
    """One run of `width` with `hidden_size` on one model; `config` is that of the model it leaves."""

    def __init__(self, pass_: Width, model: ModelHandle, context: Context, config: PretrainedConfig):
        assert context.calibration is not None
        self.pass_, self.model, self.context, self.config = pass_, model, context, config
        self.windows = context.calibration
        self.new = empty_model(model.model, config)
        self.blocks = find_stacks(self.new)[0]
        #: Tensors with fewer channels, by their name in the model, each with the dimension.
        self.shrunk = shrunk_tensors(empty_model(model.model, model.config), self.new)
        self.count = int(config.get_text_config().hidden_size)
        probe = probe_windows(model)
        self.ends = find_ends(model, probe)
        self.probe = CalibrationStream(model, probe)
        rows = model_embedding(model.model).detach()[probe.tokens.to(model.device)]
        first = torch.cat(self.probe.hidden).to(rows)
        if not torch.allclose(first, rows, rtol=1e-2, atol=1e-6):
            raise StartError(
                f"width: hidden_size: what enters the first block of {type(model.model).__name__} is not the rows of "
                "its embedding as they are (they are scaled, perhaps by the hidden size itself)."
            )

    def run(self) -> tuple[list[dict[str, Any]], float]:
        """Makes the model the narrower one; the blocks' records, and the share of matrix weights that was changed."""
        model, context = self.model, self.context
        keep = torch.tensor(self.kept())
        stream = None
        if self.pass_.refit:
            stream = CalibrationStream(model, self.windows, context.tokens_per_batch, original=True)
            stream.hidden = [hidden[..., keep].contiguous() for hidden in stream.hidden]

        def reshape(block: Block) -> None:
            block.stack.modules[block.index] = self.blocks.modules[block.index]

        def change(block: Block) -> dict[str, Any]:
            old = block.module
            landings = {name: find_landing(block, name, self.probe) for name in self._writers(block)}
            tensors = {name: self._cut(f"{block.name}.{name}", t, keep).clone() for name, t in block.state().items()}
            reshape(block)
            put(block.module, tensors, block.name)
            layers: dict[str, Any] = {}
            error = None
            if stream is not None:
                calibration = BlockCalibration(block, stream, old)
                for stage in calibration.stages(list(block.layers())):
                    if stage[0] in landings:
                        self._fit_writer(block, calibration, stage[0], landings[stage[0]], keep)
                    else:
                        self._fit_readers(block, calibration, old, stage)
                error = calibration.finish()
            return {"name": block.name, "error": error, "layers": layers}

        records = over_blocks(self.pass_.name, model, context, change, stream, reshape)
        outside = {n: self._cut(n, t, keep).clone() for n, t in model.outside().items() if n in self.shrunk}
        if stream is not None:
            self._fit_ends(stream, outside, keep)
        if context.stage is not None:
            context.stage.keep_config(self.config)
            context.stage.keep_outside(outside)
        states = [block.state() for block in model.block_list()] if model.resident else []
        take_shape(model, self.config, outside)
        for block, tensors in zip(model.block_list(), states, strict=False):
            block.restore(tensors, {})
        return records, 1.0

    def _cut(self, name: str, tensor: Tensor, keep: Tensor) -> Tensor:
        return tensor.index_select(self.shrunk[name], keep.to(tensor.device)) if name in self.shrunk else tensor

    def _writers(self, block: Block) -> list[str]:
        """Layers that have fewer outputs."""
        found = []
        for name, layer in block.layers().items():
            dimension = self.shrunk.get(f"{block.name}.{name}.weight")
            if dimension is not None and dimension == (1 if layer.transposed else 0):
                found.append(name)
        return found

    @torch.no_grad()
    def kept(self) -> list[int]:
        """The channels that stay, ascending."""
        stage = self.context.stage
        found = stage.once("importance", self._measure) if stage else self._measure()
        score = torch.tensor(found["score"], dtype=torch.float64)
        return sorted(score.argsort(descending=True, stable=True)[: self.count].tolist())

    def _measure(self) -> dict[str, Any]:
        """`score`: of each channel, its share of what the layers that read the stream are given (`activation`: of the
        norms; else of what they make of it), averaged over them."""
        stream = CalibrationStream(self.model, self.windows, self.context.tokens_per_batch)
        total: Tensor | None = None
        with self.context.progress.step("width: importance", total=len(self.model.block_list())) as step:
            for block in self.model.blocks():
                calibration, writers = BlockCalibration(block, stream), self._writers(block)
                layers = block.layers()
                stages = [s for s in calibration.stages(list(layers)) if s[0] not in writers]
                norms = {s[0]: ColumnNorms(layers[s[0]].weight.shape[1], self.model.device) for s in stages}
                calibration.observe({name: norm.add for name, norm in norms.items()})
                for stage in stages:
                    given = norms[stage[0]].norms.double()
                    if self.pass_.importance != "activation":
                        weights = sum(layers[name].weight.double().square().sum(0) for name in stage)
                        given = given.square() * weights
                    share = (given / given.sum()).cpu()
                    total = share if total is None else total + share
                stream.advance(block)
                step.advance(block.name)
        assert total is not None
        return {"score": total.tolist()}

    def _fit_readers(self, block: Block, calibration: BlockCalibration, old: nn.Module, stage: Sequence[str]) -> None:
        """Layers of one input shall give what they gave of it in the original."""
        layers, was = block.layers(), {name: _weight(old, name, block) for name in stage}
        columns, device = layers[stage[0]].weight.shape[1], layers[stage[0]].weight.device
        hessian, cross = Hessian(columns, device), CrossMoment(columns, device, was[stage[0]].shape[1])

        def add(x: Tensor, original: Tensor) -> None:
            hessian.add(x)
            cross.add(original, x)

        calibration.observe_pairs({stage[0]: add})
        for name in stage:
            fill(block, layers[name], _fitted(layers[name].weight, was[name], hessian, cross, self.pass_.damping))

    def _fit_writer(
        self, block: Block, calibration: BlockCalibration, name: str, landing: str | None, keep: Tensor
    ) -> None:
        """What a layer writes shall bring the stream to where it was, in the channels that stay."""
        layer = block.layers()[name]
        rows, columns = layer.weight.shape
        hessian, cross = Hessian(columns, layer.weight.device), CrossMoment(columns, layer.weight.device, rows)

        def add(x: Tensor, missing: Tensor) -> None:
            hessian.add(x)
            cross.add(missing, x)

        calibration.observe_missing(name, landing, add, keep.to(layer.weight.device))
        try:
            fill(block, layer, refitted(layer.weight, hessian.matrix, cross.matrix, self.pass_.damping))
        except NotPositiveDefinite:  # it stays as it was cut
            return

    def _fit_ends(self, stream: CalibrationStream, outside: dict[str, Tensor], keep: Tensor) -> None:
        """The last norm's gain, one factor a channel, so that it gives what it gave; then a head of its own."""
        assert stream.original is not None
        norm, gain = self.model.model.get_submodule(self.ends.norm), f"{self.ends.norm}.weight"
        new = self.new.get_submodule(self.ends.norm)
        put(new, {n.removeprefix(f"{self.ends.norm}."): t.clone() for n, t in outside.items() if n.startswith(
            f"{self.ends.norm}.")}, self.ends.norm)  # fmt: skip
        both = own = torch.zeros(self.count, dtype=torch.float64, device=self.model.device)
        for hidden, before in zip(stream.hidden, stream.original, strict=True):
            now, then = new(hidden.to(self.model.device)), norm(before.to(self.model.device))[..., keep]
            both = both + (now.double() * then.double()).flatten(0, -2).sum(0)
            own = own + now.double().square().flatten(0, -2).sum(0)
        factor = torch.where(own > 0, both / own.clamp_min(1e-300), 1.0)
        outside[gain] = (outside[gain].double() * factor.to(outside[gain].device)).to(outside[gain].dtype)
        head = f"{self.ends.head}.weight"
        if head not in outside:  # tied to the embedding
            return
        put(new, {"weight": outside[gain]}, self.ends.norm)
        was = self.model.model.get_submodule(self.ends.head).weight.detach()
        hessian, cross = Hessian(self.count, was.device), CrossMoment(self.count, was.device, was.shape[1])
        for hidden, before in zip(stream.hidden, stream.original, strict=True):
            now, then = new(hidden.to(self.model.device)).flatten(0, -2), norm(before.to(self.model.device))
            hessian.add(now)
            cross.add(then.flatten(0, -2), now)
        outside[head] = _fitted(outside[head], was, hessian, cross, self.pass_.damping).to(was.dtype)


def _weight(module: nn.Module, name: str, block: Block) -> Tensor:
    from compress.model import Layer

    return Layer(block, name, module.get_submodule(name)).weight


def _fitted(weight: Tensor, was: Tensor, hessian: Hessian, cross: CrossMoment, damping: float) -> Tensor:
    """The least-squares weight of a layer that gave `was x'` of the original's input and is given `x`."""
    products = hessian.matrix
    missing = was.to(products.dtype) @ cross.matrix - weight.to(products.dtype) @ products
    try:
        found: Tensor = refitted(weight, products, missing, damping)
    except NotPositiveDefinite:  # it stays as it was cut
        return weight
    return found
