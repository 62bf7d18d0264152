"""The two ends of a model, its input embedding and its head: finding them, rounding them, putting packed ones in place.

Where they are tied, one tensor is both: it is rounded once, as the embedding, and the head runs from the packed table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import StartError
from compress.maths import packing
from compress.maths.grid import CHUNK_ELEMENTS, QuantSpec, dequantize, find_params, quantize
from compress.nn.quant_embedding import QuantEmbedding, TiedHead, packed_like
from compress.nn.quant_linear import QuantLinear

if TYPE_CHECKING:
    from compress.model import ModelHandle
    from compress.workspace import Stage


@dataclass(frozen=True)
class Ends:
    """Names in the model; `head` is None for a model without one, `tied` says that it shares the embedding's tensor."""

    embedding: str
    head: str | None
    tied: bool


def find_ends(model: PreTrainedModel) -> Ends:
    """The ends of a model, dense or packed, with weights or without. StartError if the embedding's tensor has other
    users than the head, as in encoder-decoders."""
    names = {id(module): name for name, module in model.named_modules()}
    first = model.get_input_embeddings()
    if getattr(first, "weight", None) is None and not isinstance(first, QuantLinear):
        raise StartError(f"{type(model).__name__} has no table of tokens: what it reads goes through other layers")
    embedding = names[id(first)]
    last = model.get_output_embeddings()
    head = None if last is None else names[id(last)]
    if isinstance(last, TiedHead):
        return Ends(embedding, head, True)
    users = [target for target, source in _tied(model).items() if source == f"{embedding}.weight"]
    others = [user for user in users if user != f"{head}.weight"]
    if others:
        raise StartError(f"the embedding {embedding} is {others[0]} as well, and cannot be rounded on its own")
    return Ends(embedding, head, bool(users))


def _tied(model: PreTrainedModel) -> dict[str, str]:
    found: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    return found or {}


def put_packed(model: PreTrainedModel, name: str, packed: QuantLinear) -> None:
    """Puts a packed layer in the place of the one called `name`; a head tied to it runs from it from then on."""
    ends = find_ends(model) if isinstance(packed, QuantEmbedding) else None
    model.set_submodule(name, packed)
    if isinstance(packed, QuantEmbedding) and ends and ends.tied and ends.head and ends.embedding == name:
        old = model.get_submodule(ends.head)
        model.set_submodule(ends.head, TiedHead(packed, getattr(old, "bias", None)))
        _tied(model).pop(f"{ends.head}.weight", None)  # no such tensor any more


@torch.no_grad()
def round_into(packed: QuantLinear, weight: Tensor) -> float:
    """Fills `packed`, made by `packed_like`, with `weight` [out, in] rounded to nearest, ranges searched.

    Returns `|W - Q|**2 / |W|**2`. Works a few rows at a time: beside the packed tensors it needs next to nothing.
    """
    spec, (rows, columns) = packed.spec, weight.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    words, scales, zeros = [], [], []
    lost = size = 0.0
    for start in range(0, rows, step):
        part = weight[start : start + step]
        scale, zero = find_params(part, spec, search=True)
        codes = quantize(part, scale, zero, spec)
        words.append(packing.pack(codes, spec.bits))
        scales.append(scale)
        if zero is not None:
            zeros.append(zero)
        part = part.to(torch.float32)
        size += float(part.square().sum())
        lost += float(dequantize(codes, scale, zero, spec, torch.float32).sub_(part).square_().sum())
    packed.weight_packed, packed.weight_scale = torch.cat(words), torch.cat(scales)
    packed.weight_shape = torch.tensor([rows, columns], device=weight.device)
    if zeros:
        packed.weight_zero_point = packing.pack_rows(torch.cat(zeros), spec.bits)
    return lost / size if size else 0.0


def round_ends(model: ModelHandle, specs: dict[str, QuantSpec], stage: Stage | None) -> dict[str, Any]:
    """Rounds the ends that `specs` names, or takes them from the stage; what to report, empty if there are none."""
    if not specs:
        return {}
    kept = stage.read_outside(model.device) if stage is not None else None
    if stage is not None and kept is not None:
        model.restore_outside(*kept)
        found: dict[str, Any] = stage.kept_outside()
        return found
    report: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        packed, loss = _round(model.model.get_submodule(name), spec)
        put_packed(model.model, name, packed)
        report[name] = {"bits": spec.bits, "group_size": spec.group_size, "loss": loss}
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.state_dict().items()}
    record = {"ends": report}
    if stage is not None:
        stage.keep_outside(tensors, specs, record)
    return record


def _round(old: nn.Module, spec: QuantSpec) -> tuple[QuantLinear, float]:
    packed = packed_like(old, spec)
    loss = round_into(packed, old.get_parameter("weight").detach())
    if packed.bias is not None:
        packed.bias = nn.Parameter(old.get_parameter("bias").detach(), requires_grad=False)
    return packed, loss
