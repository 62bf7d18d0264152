"""How a model calls its blocks: one forward with a recorder in the place of every block.

Each recorder notes what its block would have been called with and hands its input on, so that no block's weights are
needed, and every block has its own keyword arguments (masks differ by layer in some families). What a block gives
beside the hidden states may go into the blocks after it (T5's position biases, which its first block makes): that is
what the first block of the stack gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import StartError
from compress.inputs import with_decoder
from compress.model import ModelHandle, Stack


@dataclass(frozen=True)
class Call:
    """How a block was called: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Seen(Exception):
    """The last block that a forward was run for has been called."""


#: What a block gives beside hidden states is found by running the first one.
UNKNOWN = object()


class Capture:
    """What one forward through recorders of a stack saw: block 0's input, and every block's `Call`.

    `beside` is what a block gives beside hidden states: a tuple, None where it gives them alone, UNKNOWN. `substitute`
    takes the place of block 0's input, so that what follows the stack can be run on given hidden states. `last`: the
    forward ends with `Seen` when so many blocks were called.
    """

    def __init__(self, beside: Any = UNKNOWN, substitute: torch.Tensor | None = None, last: int | None = None):
        self.beside = beside
        self.substitute = substitute
        self.last = last
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
            if self.beside is UNKNOWN:
                out = recorder.block(*args, **kwargs)
                self.beside = out[1:] if isinstance(out, tuple) else None
            if self.substitute is not None:
                hidden = self.substitute
        self.calls.append(call)
        self._current = hidden
        if len(self.calls) == self.last:
            raise Seen
        return hidden if self.beside is None else (hidden, *self.beside)

    def known(self) -> Any:
        """`beside` for another batch: UNKNOWN where it holds tensors, which are of this batch."""
        return UNKNOWN if any(isinstance(part, torch.Tensor) for part in self.beside or ()) else self.beside

    def blank(self) -> Any:
        """`beside` without its tensors: as good where the blocks are not run."""
        if self.beside is None:
            return None
        return tuple(None if isinstance(part, torch.Tensor) else part for part in self.beside)


class _Recorder(nn.Module):  # type: ignore[misc]
    """Stands in for a block during capture: notes how it is called and returns its input as the block would."""

    def __init__(self, block: nn.Module, index: int, capture: Capture):
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
def _recording(stack: Stack, capture: Capture) -> Iterator[None]:
    blocks = list(stack.modules)
    for index, block in enumerate(blocks):
        stack.modules[index] = _Recorder(block, index, capture)
    try:
        yield
    finally:
        for index, block in enumerate(blocks):
            stack.modules[index] = block


def run_recorded(
    model: ModelHandle, runner: nn.Module, batch: dict[str, torch.Tensor], captures: Sequence[Capture]
) -> Any:
    """Runs `runner` (the model, or its part without a head) on one batch with recorders for the blocks of each stack
    that there is a capture for. None if a capture ended it. Where the caller lets gradients be recorded, they reach
    what the recorders substitute."""
    batch = {name: tensor.to(model.device) for name, tensor in with_decoder(batch, model.config).items()}
    if "use_cache" in inspect.signature(runner.forward).parameters:
        batch["use_cache"] = False
    with ExitStack() as recorders:
        for stack, capture in zip(model.stacks, captures, strict=False):
            recorders.enter_context(_recording(stack, capture))
        try:
            return runner(**batch)
        except Seen:
            return None


def share(value: Any, earlier: Any) -> Any:
    """`earlier` where it equals `value`, so that batches that are called alike hold one copy of masks and tables."""
    if isinstance(value, torch.Tensor) and isinstance(earlier, torch.Tensor):
        same = value.shape == earlier.shape and value.dtype == earlier.dtype and torch.equal(value, earlier)
        return earlier if same else value
    if isinstance(value, tuple) and isinstance(earlier, tuple) and len(value) == len(earlier):
        return tuple(share(v, e) for v, e in zip(value, earlier, strict=True))
    if isinstance(value, dict) and isinstance(earlier, dict):
        return {key: share(item, earlier.get(key)) for key, item in value.items()}
    return value
