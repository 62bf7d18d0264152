"""The calibration text on its way through the model, one block at a time.

`CalibrationStream` captures what enters the first block, with every block replaced by a recorder that hands its input
on (so that one forward gives each block's own keyword arguments and needs no block's weights), and is then advanced
through the blocks one by one.

A pass may ask for a second path as well (`BlockPass.needs_original`): the same text on its way through the model as
the pass found it. Both paths start as the same tensors; the second one goes through each block as it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.capture import UNKNOWN, Call, Capture, run_recorded, share
from compress.data import Windows
from compress.errors import StartError
from compress.model import Block, ModelHandle
from compress.nn.kernels import cached

Watcher = Callable[[nn.Module, tuple[Any, ...], torch.Tensor | None], None]


def _shown(observer: Watcher, mask: torch.Tensor | None, module: nn.Module, args: tuple[Any, ...]) -> None:
    observer(module, args, mask)


def called(module: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """What a block makes of hidden states [batch, length, hidden] when it is called so."""
    out = module(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


class CalibrationStream:
    """The calibration batches as they stand before the block whose turn it is.

    Holds one hidden state [batch, length, hidden] a batch, in the model's dtype, on the CPU between its uses; with
    `original`, a second one: that of the model as it is now, which `advance` does not touch, or of `originals`, another
    model with as many blocks.

    Where a model has several stacks of blocks (an encoder and a decoder), they are gone through one after the other:
    what enters a later one follows from what the ones before it gave, and is captured when its first block is asked
    for. What those gave is kept, as the model's end may ask for it.
    """

    def __init__(
        self, model: ModelHandle, windows: Windows, tokens_per_batch: int = 2048, original: bool = False,
        originals: ModelHandle | None = None,
    ):  # fmt: skip
        if originals is not None and len(model.stacks) > 1:
            names = ", ".join(stack.name for stack in model.stacks)
            raise StartError(f"Learning from another model's blocks takes one stack of blocks; this one has {names}.")
        self.model, self.windows, self.tokens_per_batch = model, windows, tokens_per_batch
        #: bool [batch, length] a batch, False on padding; None where there is none.
        self.masks: list[torch.Tensor | None] = []
        for batch in self.batches():
            self.masks.append(batch["attention_mask"].bool() if "attention_mask" in batch else None)
        self._blank: list[Any] = []  # what a block of each stack gives beside hidden states, without tensors
        self._given: list[list[torch.Tensor]] = []  # what the last block of each stack before this one gave, per batch
        self.hidden, self.calls = self._enter(self._given)
        #: The second path, None if there is none. Before the first block: the same tensors.
        self.original: list[torch.Tensor] | None = list(self.hidden) if original else None
        self.original_calls = self.calls
        self._original_given: list[list[torch.Tensor]] = []
        self.originals = originals
        if originals is not None:
            second = CalibrationStream(originals, windows, tokens_per_batch)
            self.original, self.original_calls = second.hidden, second.calls

    def fork(self) -> CalibrationStream:
        """A stream that stands where this one does, and goes its own way from here; no second path."""
        other = copy(self)
        other.hidden, other.original = list(self.hidden), None
        other._blank, other._given = list(self._blank), list(self._given)
        return other

    @torch.no_grad()
    def _enter(self, given: list[list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[list[Call]]]:
        """What enters the stack that follows those that gave `given`, and how its blocks are called, per batch."""
        place = len(given)
        stack = self.model.stacks[place]
        first = Block(stack, 0)
        absent = any(parameter.is_meta for parameter in first.module.parameters())
        if absent:
            self.model.load(first)
        hidden: list[torch.Tensor] = []
        all_calls: list[list[Call]] = []
        known: Any = UNKNOWN
        try:
            for index, batch in enumerate(self.batches()):
                capture = Capture(known, last=len(stack))
                run_recorded(self.model, self.model.model.base_model, batch, [*self._before(given, index), capture])
                known = capture.known()
                assert capture.first is not None
                hidden.append(capture.first.cpu())
                calls = capture.calls
                if all_calls:
                    calls = [
                        Call(share(call.args, old.args), share(call.kwargs, old.kwargs))
                        for call, old in zip(calls, all_calls[0], strict=True)
                    ]
                all_calls.append(calls)
                if len(self._blank) == place:
                    self._blank.append(capture.blank())
        finally:
            if absent:
                self.model.release(first)
        return hidden, all_calls

    def _before(self, given: list[list[torch.Tensor]], index: int) -> list[Capture]:
        """Recorders that stand for whole stacks, which gave `given` for the batch at `index`."""
        return [
            Capture(beside, substitute=states[index].to(self.model.device))
            for beside, states in zip(self._blank, given, strict=False)
        ]

    def reach(self, block: Block) -> None:
        """Goes on to the block's stack, if the text stands at the end of the one before it."""
        while self.model.stacks[len(self._given)].name != block.stack.name:
            self._given.append(self.hidden)
            if self.original is not None:
                self._original_given.append(self.original)
            self.hidden, self.calls = self._enter(self._given)
            self.original_calls = self.calls
            if self.original is not None:
                self.original, self.original_calls = self._enter(self._original_given)

    def inputs(self, block: Block) -> Iterator[tuple[torch.Tensor, Call]]:
        """The block's input [batch, length, hidden] and call, batch by batch."""
        self.reach(block)
        for hidden, calls in zip(self.hidden, self.calls, strict=True):
            yield hidden.to(self.model.device), calls[block.index]

    @torch.no_grad()
    def advance(self, block: Block, first: torch.Tensor | None = None) -> None:
        """Pushes every batch through the block as it is now; packed layers are expanded once for all of them. `first`:
        what it makes of the first batch, if known."""
        with cached(block.module):
            for index, (hidden, call) in enumerate(self.inputs(block)):
                known = first if index == 0 else None
                self.hidden[index] = (called(block.module, hidden, call) if known is None else known).cpu()

    @torch.no_grad()
    def watch(self, block: Block, observers: Mapping[str, Watcher]) -> None:
        """As `advance`, and shows each named module's observer how it is called: the module, the arguments, and the
        batch's mask [batch, length] (False on padding, or None)."""
        for index, (hidden, call) in enumerate(self.inputs(block)):
            handles = []
            for name, observer in observers.items():
                shown = partial(_shown, observer, self.masks[index])
                handles.append(block.module.get_submodule(name).register_forward_pre_hook(shown))
            try:
                self.hidden[index] = called(block.module, hidden, call).cpu()
            finally:
                for handle in handles:
                    handle.remove()

    @torch.no_grad()
    def advance_original(self, block: Block, module: nn.Module | None = None) -> None:
        """Pushes the second path, if there is one, through `module`, or the block that it has in the place of this."""
        if self.original is None:
            return
        if module is None and self.originals is not None:
            self.advance_original(block, self.original_block(block))
            self.release_original(block)
            return
        self.reach(block)
        for index, hidden in enumerate(self.original):
            out = called(module or block.module, hidden.to(self.model.device), self.original_calls[index][block.index])
            self.original[index] = out.cpu()

    def original_block(self, block: Block) -> nn.Module:
        """The block that the second path goes through: of `originals`, or a copy of this as it is now."""
        if self.originals is None:
            return deepcopy(block.module)
        return self.originals.load(self.originals.block_list()[block.index]).module

    def release_original(self, block: Block) -> None:
        """Lets go of what `original_block` loaded."""
        if self.originals is not None:
            self.originals.release(self.originals.block_list()[block.index])

    @torch.no_grad()
    def push(self, block: Block, hidden: list[torch.Tensor]) -> None:
        """Pushes hidden states [batch, length, hidden], one a batch of this text, through the block as it is now, and
        puts what comes out in their place in the list."""
        for index, state in enumerate(hidden):
            hidden[index] = self.through(block, index, state.to(self.model.device)).cpu()

    def through(self, block: Block, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the block makes of `hidden` [batch, length, hidden], called as it is for the batch at `index`."""
        return called(block.module, hidden, self.calls[index][block.index])

    def outputs(self, hidden: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The model's logits (an encoder's last hidden state) [batch, length, width], batch by batch, where `hidden`
        is what the last block gave."""
        paths = [*self._given, hidden]
        for index, batch in enumerate(self.batches()):
            yield self._output(batch, self._before(paths, index))  # not held here: many may go side by side

    def _output(self, batch: dict[str, torch.Tensor], before: list[Capture]) -> torch.Tensor:
        out = run_recorded(self.model, self.model.model, batch, before)
        found: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return found

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """What `batches_of` gives of the windows."""
        return batches_of(self.windows, self.tokens_per_batch)


def batches_of(windows: Windows, tokens_per_batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """`input_ids` (of images `pixel_values`), and `attention_mask` where there is padding, of so many windows at a
    time."""
    size = max(1, tokens_per_batch // windows.length)
    for start in range(0, len(windows.tokens), size):
        batch = {windows.input_name: windows.tokens[start : start + size]}
        if windows.mask is not None:
            batch["attention_mask"] = windows.mask[start : start + size].long()
        yield batch


@torch.no_grad()
def stream_outputs(
    model: ModelHandle, windows: Windows, tokens_per_batch: int = 2048, prepare: Callable[[Block], None] | None = None
) -> torch.Tensor:
    """The model's logits (an encoder's last hidden state) [samples, length, width], with one block in memory.

    Float32, on the CPU. This is the model as it stands under compression, whatever its residency. `prepare` may put
    other layers in the place of a block's, with those in `Block.pending`, which are put back.
    """
    stream = CalibrationStream(model, windows, tokens_per_batch)
    for block in model.blocks():
        if prepare is not None:
            prepare(block)
        stream.advance(block)
        block.seal()
    return torch.cat([out.float().cpu() for out in stream.outputs(stream.hidden)])
