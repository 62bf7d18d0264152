"""Where a model's residual stream begins and ends outside the blocks, found by running it.

The stream begins as a sum of embeddings and ends in a norm whose output is the head's input. Both are looked for by
what the modules give, not by name, and what is found is checked against the stream itself, so that a model that does
something else there (a projection after the embedding, a norm before the first block, no head) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibration import trace_outside
from compress.data import Windows
from compress.errors import StartError
from compress.model import ModelHandle

#: A norm's gain is told from what it gives for inputs of this many random tokens.
_TRIAL_TOKENS = 4


@dataclass(frozen=True)
class Ends:
    """Names of the modules at both ends of the stream: `embeddings` whose sum (times a constant) it begins with, and
    the `norm` between its end and the `head`, a layer whose rows are tokens."""

    embeddings: tuple[str, ...]
    norm: str
    head: str


@torch.no_grad()
def find_ends(model: ModelHandle, windows: Windows) -> Ends:
    """The ends of the model's residual stream, on these tokens. StartError, with the reason, where it has others."""
    kind = type(model.model).__name__
    if len(model.stacks) > 1:
        raise StartError(f"{kind} has {len(model.stacks)} stacks of blocks, and so several residual streams.")
    head = model.model.get_output_embeddings()
    if head is None:
        raise StartError(f"{kind} has no head: what it gives is its residual stream, which would be another.")
    inside = tuple(f"{stack.name}." for stack in model.stacks)
    names = {
        module: name
        for name, module in model.model.named_modules()
        if not name.startswith(inside) and any(True for _ in module.parameters(recurse=False))
    }
    traced = trace_outside(model, windows, list(names.values()))
    embeddings = tuple(name for module, name in names.items() if isinstance(module, nn.Embedding))
    embeddings = tuple(name for name in embeddings if name in traced.outputs)
    if not _begins(traced.hidden, [traced.outputs[name] for name in embeddings]):
        raise StartError(f"The first block of {kind} is not given a sum of embeddings: something lies between.")
    before = traced.inputs.get(names[head])
    norms = [name for module, name in names.items() if is_norm(module) and name in traced.inputs]
    norms = [name for name in norms if before is not None and _equal(traced.outputs[name], before)]
    if not norms or not _equal(traced.inputs[norms[0]], traced.hidden):
        raise StartError(f"Between the last block of {kind} and its head lies something else than a norm.")
    return Ends(embeddings, norms[0], names[head])


def is_norm(module: nn.Module) -> bool:
    """Whether the module's one weight is a vector."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies by it: 1 for Gemma's, else 0. Seen from what it gives."""
    weight, x = _trial(norm)
    with torch.no_grad(), _values(norm, torch.zeros_like(weight)):
        return 0.0 if not bool(norm(x).any()) else 1.0


def takes_mean(norm: nn.Module) -> bool:
    """Whether a norm takes the mean of a vector off before all else, as LayerNorm does and RMSNorm does not."""
    _, x = _trial(norm)
    with torch.no_grad():
        before, after = norm(x).double(), norm(x + 1).double()
    return bool((before - after).norm() < 0.1 * before.norm())


def _trial(norm: nn.Module) -> tuple[Tensor, Tensor]:
    weight = norm.get_parameter("weight").detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_TOKENS, len(weight), generator=generator)
    return weight, x.to(weight.device, weight.dtype)


class _values:
    """The norm with another weight, and no bias, for as long as the `with` lasts."""

    def __init__(self, norm: nn.Module, weight: Tensor):
        self.norm, self.weight = norm, weight

    def __enter__(self) -> None:
        self.old = {name: parameter for name, parameter in self.norm._parameters.items() if parameter is not None}
        self.norm._parameters["weight"] = nn.Parameter(self.weight, requires_grad=False)
        if "bias" in self.old:
            self.norm._parameters["bias"] = nn.Parameter(torch.zeros_like(self.old["bias"]), requires_grad=False)

    def __exit__(self, *_: object) -> None:
        self.norm._parameters.update(self.old)


def _begins(hidden: Tensor, parts: list[Tensor]) -> bool:
    """Whether `hidden` is a multiple of the parts' sum, to rounding."""
    if not parts or any(part.shape[-1] != hidden.shape[-1] for part in parts):
        return False
    total = sum(part.double() for part in parts).expand_as(hidden)
    factor = (hidden.double() * total).sum() / total.square().sum()
    rest = (hidden.double() - factor * total).norm()
    return bool(rest <= 8 * torch.finfo(hidden.dtype).eps * hidden.double().norm())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))
