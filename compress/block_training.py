"""Training one block to give what another gives: the loop, the error, and parameters made ready for it.

The inputs are those that the blocks before now give, the aim is the output of the original path, so that what went
wrong before is mended as well. One block is in memory, with its gradients and two moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.capture import Call

Batches = Sequence[tuple[Tensor, "Call", Tensor | None]]


@dataclass(frozen=True)
class Aims:
    """The text of a block and what it is to give: inputs [batch, length, hidden], how the block is called, masks; and
    for each batch the output that is aimed at."""

    batches: Batches
    outputs: Sequence[Tensor]

    @classmethod
    def of(cls, calibration: BlockCalibration) -> Aims:
        """The inputs as they are now, the outputs of the original path."""
        return cls(list(calibration.batches()), list(calibration.original_outputs()))


def train_block(
    calibration: BlockCalibration, aims: Aims, optimizer: torch.optim.Optimizer, iterations: int, *, seed: int,
    seconds: float | None = None, forward: Callable[[Tensor, Call], Tensor] | None = None,
) -> int:  # fmt: skip
    """Trains in place, at most `iterations` steps of a batch each, or `seconds`; returns the number of steps done.

    Each of the optimizer's groups has its learning rate at the start as `peak`; it falls to 0 in a straight line.
    """
    forward = forward or calibration.forward
    order = torch.Generator().manual_seed(seed)
    started, steps = time.monotonic(), 0
    while steps < iterations:
        for index in torch.randperm(len(aims.batches), generator=order).tolist():
            spent = steps / iterations
            if seconds is not None:
                spent = max(spent, (time.monotonic() - started) / seconds)
            if spent >= 1:
                return steps
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - spent)
            hidden, call, mask = aims.batches[index]
            loss = squared(forward(hidden, call), aims.outputs[index], mask).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    return steps


def squared(given: Tensor, aim: Tensor, mask: Tensor | None) -> Tensor:
    """Squared differences of hidden states [batch, length, hidden], padding left out."""
    if mask is not None:
        given, aim = given[mask.to(given.device)], aim[mask.to(given.device)]
    return (given.float() - aim.float()).square()


@torch.no_grad()
def block_error(calibration: BlockCalibration, aims: Aims) -> float:
    """|block(inputs) - aims|**2 / |aims|**2 over all batches."""
    lost = size = 0.0
    for (hidden, call, mask), aim in zip(aims.batches, aims.outputs, strict=True):
        lost += float(squared(calibration.forward(hidden, call), aim, mask).double().sum())
        size += float(squared(aim, torch.zeros_like(aim), mask).double().sum())
    return lost / size if size else 0.0


class FloatAdam(torch.optim.Adam):  # type: ignore[misc]
    """Adam on float32 copies of parameters in 16 bits; `held` keeps zeros of a parameter where it is true there."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], held: Mapping[nn.Parameter, Tensor] | None = None):
        self.held = dict(held or {})
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        own = []
        for group in groups:
            masters = []
            for parameter in group["params"]:
                wide = parameter.dtype == torch.float32
                master = parameter if wide else nn.Parameter(parameter.detach().float())
                masters.append(master)
                self.pairs.append((parameter, master))
            own.append({**group, "params": masters})
        super().__init__(own, betas=(0.9, 0.95), eps=1e-15)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self.pairs:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter, master in self.pairs:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient * ~self.held[parameter] if parameter in self.held else gradient
        super().step()
        for parameter, master in self.pairs:
            if parameter is not master:
                parameter.copy_(master)


@contextmanager
def exchanged_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other layers in the place of the module's own, which are back afterwards."""
    before = {name: module.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in before.items():
            module.set_submodule(name, layer)
