"""What a pass sees of the calibration text: it pulls, nothing is pushed at it.

`BlockCalibration` is one block's view of a `CalibrationStream`: what enters the block and its layers, what it gives,
and what the original model gives there, where the pass asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.capture import Call, Capture, run_recorded
from compress.data import Windows
from compress.model import Block, Layer, ModelHandle
from compress.stream import CalibrationStream, batches_of, called

Observer = Callable[[torch.Tensor], None]
PairObserver = Callable[[torch.Tensor, torch.Tensor], None]


class _Enough(Exception):
    """All layers of interest have been called; the rest of the block need not run."""


@dataclass(frozen=True)
class Traced:
    """One run of a block over the first batch: what named modules were given and gave at their first call.

    `inputs` and `outputs` are in the order of the calls; `hidden` is the block's input, `result` its output.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    hidden: torch.Tensor
    result: torch.Tensor

    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """Those of `names` that were called, in their order, those that were given the same tensor together."""
        found: list[tuple[torch.Tensor, list[str]]] = []
        for name, x in self.inputs.items():
            members = next((members for tensor, members in found if tensor is x), None)
            if name in names and members is not None:
                members.append(name)
            elif name in names:
                found.append((x, [name]))
        return [members for _, members in found]

    def before(self, name: str) -> list[str]:
        """The modules that were called before this one, in their order."""
        order = list(self.inputs)
        return order[: order.index(name)]


@torch.no_grad()
def trace_outside(model: ModelHandle, windows: Windows, names: Sequence[str]) -> Traced:
    """One run of the model on the first batch, with every block handing its input on, and what the named modules, which
    are in no block, were given and gave. `hidden` is what enters the first block and leaves the last."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:

        def hook(_: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            if isinstance(out, torch.Tensor):
                outputs.setdefault(name, out)
            if args and isinstance(args[0], torch.Tensor):
                inputs.setdefault(name, args[0])

        handles.append(model.model.get_submodule(name).register_forward_hook(hook))
    capture = Capture()
    first = model.load(model.block_list()[0])
    try:
        out = run_recorded(model, model.model, next(batches_of(windows, len(windows) * windows.length)), [capture])
    finally:
        model.release(first)
        for handle in handles:
            handle.remove()
    assert capture.first is not None
    return Traced(inputs, outputs, capture.first, out[0])


class BlockCalibration:
    """One block's view of the calibration text: run it, look at what enters its layers, measure its error.

    Where the pass asked for the original path, the block as it came in is kept beside it, as a copy; or it is
    `original`, where the pass puts another module in its place and leaves that one alone.
    """

    def __init__(self, block: Block, stream: CalibrationStream, original: nn.Module | None = None):
        self.block, self.stream = block, stream
        #: Layers that no calibration token reached, after `stages` was asked.
        self.silent: tuple[str, ...] = ()
        #: Layers that `observe_pairs` could not give the original path's tokens for.
        self.unpaired: set[str] = set()
        self._repeated = False
        self._original = original
        if original is None and stream.original is not None:
            self._original = stream.original_block(block)
        self._passed = False  # whether the original path stands behind the block
        with torch.no_grad():
            self._calls, self._reference = self._trace(list(block.layers()))

    def _first_output(self) -> torch.Tensor:
        hidden, call = next(self.stream.inputs(self.block))
        return called(self.block.module, hidden, call)

    @torch.no_grad()
    def error(self) -> float:
        """||now - before||² / ||before||² of the block's output on the first batch; before: as the block came in."""
        return self._error_of(self._first_output())

    def _error_of(self, output: torch.Tensor) -> float:
        difference = (output - self._reference).double().square().sum()
        return float(difference / self._reference.double().square().sum().clamp_min(1e-300))

    @torch.no_grad()
    def finish(self) -> float:
        """The error of the block as it is now; moves the paths on: the text as it is now through the block as it is
        now, the original through the block as it came in."""
        output = self._first_output()
        self.stream.advance(self.block, output)
        self._pass_original()
        self.stream.release_original(self.block)
        return self._error_of(output)

    def batches(self) -> Iterator[tuple[torch.Tensor, Call, torch.Tensor | None]]:
        """The block's inputs [batch, length, hidden], how it is called, and the mask (False on padding, or None)."""
        for (hidden, call), mask in zip(self.stream.inputs(self.block), self.stream.masks, strict=True):
            yield hidden, call, mask

    def forward(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """What the block as it is now makes of hidden states [batch, length, hidden]; gradients flow."""
        return called(self.block.module, hidden, call)

    def original_forward(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """What the block as it came in makes of hidden states [batch, length, hidden]."""
        return called(self._kept_original(), hidden, call)

    @property
    def original_module(self) -> nn.Module:
        """The block that the original path goes through, until `finish`."""
        return self._kept_original()

    def original_inputs(self) -> Iterator[torch.Tensor]:
        """What the block is given in the original model, [batch, length, hidden], in the order of `batches`.

        Only before `original_outputs` is asked: one set of hidden states is held, not two.
        """
        self._kept_original()
        if self._passed:
            raise RuntimeError("The original path is behind this block: ask for its inputs before its outputs.")
        yield from self._original_hidden()

    def original_outputs(self) -> Iterator[torch.Tensor]:
        """What the block gives in the original model, [batch, length, hidden], in the order of `batches`.

        Computed when first asked for, and held from then on in the place of the inputs.
        """
        self._kept_original()
        self._pass_original()
        yield from self._original_hidden()

    def _original_hidden(self) -> Iterator[torch.Tensor]:
        for hidden in self.stream.original or ():
            yield hidden.to(self.stream.model.device)

    def _kept_original(self) -> nn.Module:
        if self._original is None:
            raise RuntimeError("The original path is not carried along: the pass has to set needs_original.")
        return self._original

    def _pass_original(self) -> None:
        if self._original is not None and not self._passed:
            self.stream.advance_original(self.block, self._original)
            self._passed = True

    @torch.no_grad()
    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """The named layers in the order of their first call, those that are given the same tensor together."""
        calls = self._calls
        if any(name not in calls.counts for name in names):
            calls, _ = self._trace(names)
        self.silent = tuple(name for name in names if not calls.counts[name])
        self._repeated = any(calls.counts[name] > 1 for name in names)
        stages = [[name for name in members if name in names] for members in calls.stages]
        return [stage for stage in stages if stage]

    def _trace(self, names: Sequence[str]) -> tuple[_Calls, torch.Tensor]:
        """Runs the first batch: which layers were called, and the block's output."""
        seen: list[tuple[torch.Tensor, list[str]]] = []
        counts = dict.fromkeys(names, 0)

        def note(name: str, x: torch.Tensor) -> None:
            counts[name] += 1
            if counts[name] > 1:
                return
            for tensor, members in seen:
                if tensor is x:
                    members.append(name)
                    return
            seen.append((x, [name]))

        with hooked(self.block.module, {name: partial(note, name) for name in names}):
            output = self._first_output()
        return _Calls([members for _, members in seen], counts), output

    @torch.no_grad()
    def output(self, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The block's output, as it is now, on the first batch with its input replaced by what `change` makes of it."""
        hidden, call = next(self.stream.inputs(self.block))
        return called(self.block.module, change(hidden), call)

    @torch.no_grad()
    def trace(self, names: Sequence[str]) -> Traced:
        """One run of the block, as it is now, over the first batch, with what the named modules were given and gave."""
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        for name in names:

            def hook(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor, name: str = name) -> None:
                outputs.setdefault(name, out)

            handles.append(self.block.module.get_submodule(name).register_forward_hook(hook))
        try:
            with hooked(self.block.module, {name: partial(inputs.setdefault, name) for name in names}):
                hidden, call = next(self.stream.inputs(self.block))
                result = called(self.block.module, hidden, call)
        finally:
            for handle in handles:
                handle.remove()
        return Traced(inputs, outputs, hidden, result)

    def whole_inputs(self, names: Sequence[str]) -> set[str]:
        """Those of `names` that are given [batch, length, width]; not those given rows of tokens without their batch.

        compressed-tensors finds a scale for each token in the former only; a layer that gets a matrix has one scale
        for all of it in plain transformers, which then depends on what else is in the batch.
        """
        return {name for name, x in self.trace(names).inputs.items() if x.dim() == 3}

    @torch.no_grad()
    def observe(self, observers: Mapping[str, Observer]) -> None:
        """Runs the block, as it is now, over all batches; each layer's observer is given its input [tokens, in]."""
        for hidden, call, mask in self.batches():
            self._look(self.block.module, hidden, call, mask, observers)

    @torch.no_grad()
    def observe_pairs(self, observers: Mapping[str, PairObserver]) -> None:
        """As `observe`, on both paths: each observer is given the layer's input [tokens, in] in the block as it is
        now, and the same tokens' input in the original model, in the block as it came in.

        Where a layer is not given the same tokens on both paths (an expert, when the router decides otherwise), its
        input now stands for both, and `unpaired` names it.
        """
        original = self._kept_original()
        calls = [calls[self.block.index] for calls in self.stream.original_calls]
        batches = zip(self.batches(), self.original_inputs(), calls, strict=True)
        for (hidden, call, mask), before, original_call in batches:
            tokens = hidden.shape[:-1].numel() if mask is None else int(mask.sum())
            earlier: dict[str, list[torch.Tensor]] = {name: [] for name in observers}

            def keep(name: str, x: torch.Tensor, earlier: dict[str, list[torch.Tensor]] = earlier) -> None:
                earlier[name].append(x.clone())  # the block may go on to write into its input

            def give(
                name: str, x: torch.Tensor, earlier: dict[str, list[torch.Tensor]] = earlier, tokens: int = tokens
            ) -> None:
                other = earlier[name].pop(0) if earlier[name] else None
                if other is None or not len(x) == len(other) == tokens:
                    self.unpaired.add(name)
                    other = x
                observers[name](x, other)

            self._look(original, before, original_call, mask, {name: partial(keep, name) for name in observers})
            self._look(self.block.module, hidden, call, mask, {name: partial(give, name) for name in observers})

    @torch.no_grad()
    def observe_missing(
        self, layer: str, place: str | None, observer: PairObserver, channels: torch.Tensor | None = None
    ) -> None:
        """Runs the block, as it is now, over all batches: the observer is given the layer's input [tokens, in], and
        what the input of the module `place` (None: the block's output) lacks of what it is in the original model
        [tokens, width], in those `channels` of the original that there are now (None: all).

        `place` may be the layer itself: then it is the layer's own output that is compared.
        """

        def chosen(original: torch.Tensor) -> torch.Tensor:
            return original if channels is None else original[..., channels]

        if place is None:
            for (hidden, call, mask), goal in zip(self.batches(), self.original_outputs(), strict=True):
                inputs: list[torch.Tensor] = []
                with hooked(self.block.module, {layer: inputs.append}):
                    missing = chosen(goal) - called(self.block.module, hidden, call)
                tokens = inputs[0].reshape(*missing.shape[:-1], -1)  # some models give their layers rows
                observer(_counted(tokens, mask), _counted(missing, mask))
            return
        if place == layer:
            now, before = (m.get_submodule(layer) for m in (self.block.module, self._kept_original()))
            self.observe_pairs({layer: lambda x, y: observer(x, chosen(_given(before, y)) - _given(now, x))})
            return
        given: list[torch.Tensor] = []
        self.observe_pairs(
            {layer: lambda x, _: given.append(x), place: lambda x, y: observer(given.pop(), chosen(y) - x)}
        )

    def _look(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        call: Call,
        mask: torch.Tensor | None,
        observers: Mapping[str, Observer],
    ) -> None:
        """Runs one batch, as far as the last of the layers that are looked at."""
        waiting = {name for name in observers if name not in self.silent}

        def give(name: str, x: torch.Tensor) -> None:
            observers[name](_counted(x, mask))
            waiting.discard(name)
            if not waiting and not self._repeated:
                raise _Enough

        with hooked(module, {name: partial(give, name) for name in observers}), suppress(_Enough):
            called(module, hidden, call)


def _given(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives for its input [tokens, in]; observers of it are not called."""
    return nn.functional.linear(x, Layer(None, "", module).weight, module.bias)


def _counted(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[tokens, width] of [batch, length, width]. Padding is no text: what it makes of an input must not count."""
    return x[mask.to(x.device)] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class _Calls:
    """How one batch went through a block: layers in the order of first call, those of one input together; the number
    of calls of each."""

    stages: list[list[str]]
    counts: dict[str, int]


@contextmanager
def hooked(module: nn.Module, observers: Mapping[str, Observer]) -> Iterator[None]:
    """Each named submodule's observer is given the first argument of its calls."""
    handles = []
    for name, observer in observers.items():

        def hook(_: nn.Module, args: tuple[Any, ...], observer: Observer = observer) -> None:
            observer(args[0])

        handles.append(module.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
