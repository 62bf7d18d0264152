"""What a prompt costs beside its products, made cheaper for models that are loaded to run: attention, and the head.

Attention: torch's fused operator takes 2 to 4 times as long, on processors with bfloat16 instructions, as the two
products and the softmax that it stands for, if these are taken some hundred queries at a time, so that scores stay near
the processor. Scores are then rounded to bfloat16 before the softmax, as in transformers' `eager`.

Head: transformers asks it for the last token alone, by a slice whose strides make torch copy the whole weight.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.nn import prepacked

#: What a model's `config._attn_implementation` is then.
NAME = "compress"
#: Queries at a time, prompts from which that is faster than torch's operator, and most scores at a time.
_QUERIES, _LEAST, _MOST = 128, 96, 1 << 23
_kept = threading.local()


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [batch, heads, length, size], key and value [batch, kept heads, length,
    size] -> [batch, length, heads, size]. What is no whole text in bfloat16, each token seeing those before it, is left
    to torch's operator."""
    if not _serves(module, query, key, value, attention_mask, given):
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return found
    scaling = given.get("scaling")
    return causal(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling).transpose(1, 2), None


def _serves(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> bool:
    if mask is not None or given.get("dropout") or given.get("is_causal") is False:
        return False
    if not getattr(module, "is_causal", False) or any(
        given.get(k) is not None for k in ("position_bias", "softcap", "cache")
    ):
        return False
    if not query.is_cpu or query.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    length, heads = query.shape[2], key.shape[1]
    if length < _LEAST or key.shape[2] != length or value.shape[:3] != key.shape[:3] or query.shape[1] % heads:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling Q K^T) V, query i seeing keys 0 to i; bfloat16, shapes and groups of heads as in `attend`:
    [batch, heads, length, size]."""
    batch, heads, length, size = query.shape
    many = batch * key.shape[1]
    group = batch * heads // many
    query = (query * scaling).reshape(many, group, length, size)
    keys, values = key.reshape(many, length, size).transpose(1, 2), value.reshape(many, length, -1)
    out = query.new_empty(many, group, length, values.shape[-1])
    at_once = max(16, min(_QUERIES, _MOST // (many * group * length)))
    later = torch.full((at_once, at_once), float("-inf"), dtype=query.dtype).triu_(1)
    for first in range(0, length, at_once):
        last = min(first + at_once, length)
        now = last - first
        scores = _room("scores", query, (many, group * now, last))
        torch.bmm(query[:, :, first:last].reshape(many, group * now, size), keys[:, :, :last], out=scores)
        scores.view(many, group, now, last)[..., first:].add_(later[:now, :now])
        shares = torch.softmax(scores, -1, out=_room("shares", query, scores.shape))
        found = torch.bmm(shares, values[:, :last], out=_room("found", query, (many, group * now, values.shape[-1])))
        out[:, :, first:last] = found.view(many, group, now, -1)
    return out.view(batch, heads, length, -1)


def _room(name: str, like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A tensor of `shape` in memory kept from call to call: fresh pages take longer than what is done in them."""
    count = torch.Size(shape).numel()
    kept: Tensor | None = getattr(_kept, name, None)
    if kept is None or kept.numel() < count:
        with torch.inference_mode(False):
            kept = like.new_empty(count)
        setattr(_kept, name, kept)
    return kept[:count].view(shape)


def _one_row(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The head's input with the strides of a tensor of its own, if it is one token of a longer text."""
    x = inputs[0]
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != (1, 1):
        return None
    return x.reshape(x.shape[-1]).view(x.shape), *inputs[1:]


def use_quick_prompts(model: PreTrainedModel) -> bool:
    """Let a decoder that was loaded to run read prompts so; whether it does. Results are equal to rounding."""
    config = model.config
    if not model.can_generate() or config.is_encoder_decoder or config._attn_implementation != "sdpa":
        return False
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or prepacked.why_not() is not None:
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.register_forward_pre_hook(_one_row)
    return True
