"""The calibration text on its way through the model, one block at a time.

`CalibrationStream` captures what enters the first block, with every block replaced by a recorder that hands its input
on (so that one forward gives each block's own keyword arguments and needs no block's weights), and is then advanced
through the blocks one by one.

A pass may ask for a second path as well (`BlockPass.needs_original`): the same text on its way through the model as
the pass found it. Both paths start as the same tensors; the second one goes through each block as it came in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.capture import Call, Capture, run_recorded, share
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
    """

    def __init__(
        self, model: ModelHandle, windows: Windows, tokens_per_batch: int = 2048, original: bool = False,
        originals: ModelHandle | None = None,
    ):  # fmt: skip
        if len(model.stacks) > 1:
            names = ", ".join(stack.name for stack in model.stacks)
            raise StartError(f"Calibrated passes take models with one stack of blocks; this one has {names}.")
        self.model, self.windows, self.tokens_per_batch = model, windows, tokens_per_batch
        self._returns_tuple: bool | None = None
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[Call]] = []
        #: bool [batch, length] a batch, False on padding; None where there is none.
        self.masks: list[torch.Tensor | None] = []
        first = model.load(model.block_list()[0])
        try:
            for batch in self.batches():
                self._capture(batch)
        finally:
            model.release(first)
        #: The hidden states of the second path, None if there is none. Before the first block: the same tensors.
        self.original: list[torch.Tensor] | None = list(self.hidden) if original else None
        self.originals = originals
        if originals is not None:
            self.original = CalibrationStream(originals, windows, tokens_per_batch).hidden

    @torch.no_grad()
    def _capture(self, batch: dict[str, torch.Tensor]) -> None:
        capture = Capture(self._returns_tuple)
        run_recorded(self.model, self.model.model.base_model, batch, capture)
        self._returns_tuple = capture.returns_tuple
        assert capture.first is not None
        self.hidden.append(capture.first.cpu())
        self.masks.append(batch["attention_mask"].bool() if "attention_mask" in batch else None)
        calls = capture.calls
        if self.calls:
            calls = [
                Call(share(call.args, old.args), share(call.kwargs, old.kwargs))
                for call, old in zip(calls, self.calls[0], strict=True)
            ]
        self.calls.append(calls)

    def inputs(self, block: Block) -> Iterator[tuple[torch.Tensor, Call]]:
        """The block's input [batch, length, hidden] and call, batch by batch."""
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
        if module is None and self.originals is not None:
            self.advance_original(block, self.original_block(block))
            self.release_original(block)
            return
        for index, hidden in enumerate(self.original or ()):
            assert self.original is not None
            out = called(module or block.module, hidden.to(self.model.device), self.calls[index][block.index])
            self.original[index] = out.cpu()

    def original_block(self, block: Block) -> nn.Module:
        """The block that the second path goes through: of `originals`, or a copy of this as it is now."""
        if self.originals is None:
            return copy.deepcopy(block.module)
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
        for state, batch in zip(hidden, self.batches(), strict=True):
            capture = Capture(self._returns_tuple, substitute=state.to(self.model.device))
            out = run_recorded(self.model, self.model.model, batch, capture)
            yield out.logits if hasattr(out, "logits") else out.last_hidden_state

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """`input_ids`, and `attention_mask` where there is padding, batch by batch."""
        return batches_of(self.windows, self.tokens_per_batch)


def batches_of(windows: Windows, tokens_per_batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """`input_ids`, and `attention_mask` where there is padding, of so many windows at a time."""
    size = max(1, tokens_per_batch // windows.tokens.shape[1])
    for start in range(0, len(windows.tokens), size):
        batch = {"input_ids": windows.tokens[start : start + size]}
        if windows.mask is not None:
            batch["attention_mask"] = windows.mask[start : start + size].long()
        yield batch


@torch.no_grad()
def stream_outputs(model: ModelHandle, windows: Windows, tokens_per_batch: int = 2048) -> torch.Tensor:
    """The model's logits (an encoder's last hidden state) [samples, length, width], with one block in memory.

    Float32, on the CPU. This is the model as it stands under compression, whatever its residency.
    """
    stream = CalibrationStream(model, windows, tokens_per_batch)
    for block in model.blocks():
        stream.advance(block)
    return torch.cat([out.float().cpu() for out in stream.outputs(stream.hidden)])
