"""The calibration text on its way through the model, one block at a time.

`CalibrationStream` captures what enters the first block, with every block replaced by a recorder that hands its input
on (so that one forward gives each block's own keyword arguments and needs no block's weights), and is then advanced
through the blocks one by one. `BlockCalibration` is what a pass sees of it: it pulls, nothing is pushed at it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.data import Windows
from compress.errors import StartError
from compress.model import Block, ModelHandle, Stack

Observer = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Call:
    """How a block was called: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Capture:
    """What one forward through recorders saw: block 0's input, and every block's `Call`.

    `substitute` takes the place of block 0's input, so that the model's end can be run on given hidden states.
    """

    def __init__(self, returns_tuple: bool | None, substitute: torch.Tensor | None = None):
        self.returns_tuple = returns_tuple
        self.substitute = substitute
        self.first: torch.Tensor | None = None
        self.calls: list[Call] = []
        self._current: torch.Tensor | None = None

    def called(self, recorder: _Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = _split(args, kwargs)
        if recorder.index != len(self.calls) or (recorder.index and hidden is not self._current):
            raise StartError(
                "This model works between its blocks (a block's input is not the output of the block before it), "
                "so they cannot be calibrated one at a time. Passes that need no calibration still run."
            )
        if recorder.index == 0:
            self.first = hidden
            if self.returns_tuple is None:
                self.returns_tuple = isinstance(recorder.block(*args, **kwargs), tuple)
            if self.substitute is not None:
                hidden = self.substitute
        self.calls.append(call)
        self._current = hidden
        return (hidden, None) if self.returns_tuple else hidden


class _Recorder(nn.Module):  # type: ignore[misc]
    """Stands in for a block during capture: notes how it is called and returns its input as the block would."""

    def __init__(self, block: nn.Module, index: int, capture: _Capture):
        super().__init__()
        # In __dict__, not registered: it must not become a submodule of its own stand-in.
        self.__dict__["block"] = block
        self.index, self.capture = index, capture

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (`block.attention_type`).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.capture.called(self, args, kwargs)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    if "hidden_states" not in kwargs:
        raise StartError("This model's blocks are not called with hidden states as their first argument.")
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest)


@contextmanager
def _recording(stack: Stack, capture: _Capture) -> Iterator[None]:
    blocks = list(stack.modules)
    for index, block in enumerate(blocks):
        stack.modules[index] = _Recorder(block, index, capture)
    try:
        yield
    finally:
        for index, block in enumerate(blocks):
            stack.modules[index] = block


def _run_recorded(model: ModelHandle, runner: nn.Module, batch: dict[str, torch.Tensor], capture: _Capture) -> Any:
    """Runs `runner` (the model, or its part without a head) on one batch with recorders for blocks. Where the caller
    lets gradients be recorded, they reach what the recorders substitute."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "use_cache" in inspect.signature(runner.forward).parameters:
        batch["use_cache"] = False
    with _recording(model.stacks[0], capture):
        return runner(**batch)


def _call(block: Block, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    out = block.module(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


def _share(value: Any, earlier: Any) -> Any:
    """`earlier` where it equals `value`, so that batches that are called alike hold one copy of masks and tables."""
    if isinstance(value, torch.Tensor) and isinstance(earlier, torch.Tensor):
        same = value.shape == earlier.shape and value.dtype == earlier.dtype and torch.equal(value, earlier)
        return earlier if same else value
    if isinstance(value, tuple) and isinstance(earlier, tuple) and len(value) == len(earlier):
        return tuple(_share(v, e) for v, e in zip(value, earlier, strict=True))
    if isinstance(value, dict) and isinstance(earlier, dict):
        return {key: _share(item, earlier.get(key)) for key, item in value.items()}
    return value


class CalibrationStream:
    """The calibration batches as they stand before the block whose turn it is.

    Holds one hidden state [batch, length, hidden] a batch, in the model's dtype, on the CPU between its uses.
    """

    def __init__(self, model: ModelHandle, windows: Windows, tokens_per_batch: int = 2048):
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

    @torch.no_grad()
    def _capture(self, batch: dict[str, torch.Tensor]) -> None:
        capture = _Capture(self._returns_tuple)
        _run_recorded(self.model, self.model.model.base_model, batch, capture)
        self._returns_tuple = capture.returns_tuple
        assert capture.first is not None
        self.hidden.append(capture.first.cpu())
        self.masks.append(batch["attention_mask"].bool() if "attention_mask" in batch else None)
        calls = capture.calls
        if self.calls:
            calls = [
                Call(_share(call.args, old.args), _share(call.kwargs, old.kwargs))
                for call, old in zip(calls, self.calls[0], strict=True)
            ]
        self.calls.append(calls)

    def inputs(self, block: Block) -> Iterator[tuple[torch.Tensor, Call]]:
        """The block's input [batch, length, hidden] and call, batch by batch."""
        for hidden, calls in zip(self.hidden, self.calls, strict=True):
            yield hidden.to(self.model.device), calls[block.index]

    def advance(self, block: Block) -> None:
        """Pushes every batch through the block as it is now."""
        self.push(block, self.hidden)

    @torch.no_grad()
    def push(self, block: Block, hidden: list[torch.Tensor]) -> None:
        """Pushes hidden states [batch, length, hidden], one a batch of this text, through the block as it is now, and
        puts what comes out in their place in the list."""
        for index, state in enumerate(hidden):
            hidden[index] = self.through(block, index, state.to(self.model.device)).cpu()

    def through(self, block: Block, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the block makes of `hidden` [batch, length, hidden], called as it is for the batch at `index`."""
        return _call(block, hidden, self.calls[index][block.index])

    def outputs(self, hidden: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The model's logits (an encoder's last hidden state) [batch, length, width], batch by batch, where `hidden`
        is what the last block gave."""
        for state, batch in zip(hidden, self.batches(), strict=True):
            capture = _Capture(self._returns_tuple, substitute=state.to(self.model.device))
            out = _run_recorded(self.model, self.model.model, batch, capture)
            yield out.logits if hasattr(out, "logits") else out.last_hidden_state

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """`input_ids`, and `attention_mask` where there is padding, batch by batch."""
        return _batches(self.windows, self.tokens_per_batch)


def _batches(windows: Windows, tokens_per_batch: int) -> Iterator[dict[str, torch.Tensor]]:
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


class _Enough(Exception):
    """All layers of interest have been called; the rest of the block need not run."""


class BlockCalibration:
    """One block's view of the calibration text: run it, look at what enters its layers, measure its error."""

    def __init__(self, block: Block, stream: CalibrationStream):
        self.block, self.stream = block, stream
        #: Layers that no calibration token reached, after `stages` was asked.
        self.silent: tuple[str, ...] = ()
        self._repeated = False
        with torch.no_grad():
            self._reference = self._first_output()

    def _first_output(self) -> torch.Tensor:
        hidden, call = next(self.stream.inputs(self.block))
        return _call(self.block, hidden, call)

    @torch.no_grad()
    def error(self) -> float:
        """||now - before||² / ||before||² of the block's output on the first batch; before: as the block came in."""
        difference = (self._first_output() - self._reference).double().square().sum()
        return float(difference / self._reference.double().square().sum().clamp_min(1e-300))

    @torch.no_grad()
    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """The named layers in the order of their first call, those that are given the same tensor together."""
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

        with self._hooked({name: partial(note, name) for name in names}):
            self._first_output()
        self.silent = tuple(name for name, count in counts.items() if not count)
        self._repeated = any(count > 1 for count in counts.values())
        return [members for _, members in seen]

    @torch.no_grad()
    def observe(self, observers: Mapping[str, Observer]) -> None:
        """Runs the block, as it is now, over all batches; each layer's observer is given its input [tokens, in]."""
        waiting: set[str] = set()
        mask: torch.Tensor | None = None

        def give(name: str, x: torch.Tensor) -> None:
            # Padding is no text: what it makes of the layer's input must not count.
            counted = mask is not None and x.shape[:-1] == mask.shape
            observers[name](x[mask.to(x.device)] if counted and mask is not None else x.reshape(-1, x.shape[-1]))
            waiting.discard(name)
            if not waiting and not self._repeated:
                raise _Enough

        with self._hooked({name: partial(give, name) for name in observers}):
            for (hidden, call), padded in zip(self.stream.inputs(self.block), self.stream.masks, strict=True):
                mask = padded
                waiting.update(name for name in observers if name not in self.silent)
                try:
                    _call(self.block, hidden, call)
                except _Enough:
                    continue

    @contextmanager
    def _hooked(self, observers: Mapping[str, Observer]) -> Iterator[None]:
        handles = []
        for name, observer in observers.items():
            module = self.block.module.get_submodule(name)

            def hook(_: nn.Module, args: tuple[Any, ...], observer: Observer = observer) -> None:
                observer(args[0])

            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
