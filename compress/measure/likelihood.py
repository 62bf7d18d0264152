"""Log-likelihoods of token windows, and how far two models' next-token distributions lie apart.

Models go through a batch of windows in lock step, and softmaxes are taken over a few positions at a time: no table of
all tokens by the whole vocabulary is ever held, only one batch's logits of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import CompressError
from compress.nn.quant_cache import CacheSpec, cache_spec, packed_cache

#: Logits held at once for one model (elements), and tokens in one forward.
LOGITS_BUDGET = 2**25
TOKENS_BUDGET = 4096
#: Elements of one float32 log-softmax.
CHUNK_BUDGET = 2**23


@dataclass
class WindowScores:
    """Per window, float64 [n]: summed nll in nats, scored tokens; with a reference: summed KL and agreements, and
    `token_kl`, float32: the KL divergence of each scored token, one window after the other."""

    nll: Tensor
    tokens: Tensor
    kl: Tensor | None = None
    top1: Tensor | None = None
    reference_nll: Tensor | None = None
    token_kl: Tensor | None = None


def batches(n: int, length: int, vocabulary: int) -> Iterator[slice]:
    """Slices of windows of which one forward's tokens and logits stay within the budgets."""
    size = max(1, min(TOKENS_BUDGET // length, LOGITS_BUDGET // (length * vocabulary)))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def window_scores(
    model: torch.nn.Module, windows: Tensor, *, reference: torch.nn.Module | None = None, mask: Tensor | None = None,
    told: Callable[[int], None] | None = None,
) -> WindowScores:  # fmt: skip
    """Scores every token of each window but the first, given those before it.

    `windows`: int64 [n, length]; `mask`: bool [n, length], False where a window is padded on its right. With
    `reference`, KL(reference || model) in nats and top-1 agreement are taken at the same positions.
    `told` is given how many windows are done.
    """
    n, length = windows.shape
    if length < 2:
        raise CompressError(f"Windows of {length} token have nothing to score: at least 2 are needed.")
    vocabulary = vocabulary_of(model)
    if int(windows.max()) >= vocabulary:
        raise CompressError(f"Token {int(windows.max())} lies outside the model's vocabulary of {vocabulary}.")
    keep = torch.ones(n, length, dtype=torch.bool) if mask is None else mask.bool()
    sums = {key: torch.zeros(n, dtype=torch.float64) for key in ("nll", "kl", "top1", "reference_nll")}
    device = next(model.parameters()).device
    token_kl: list[Tensor] = []
    for part in batches(n, length, vocabulary):
        ids, scored = windows[part].to(device), keep[part, 1:].to(device)
        attention = None if mask is None else keep[part].to(device)
        with torch.inference_mode():
            found = _lock_step(model, reference, ids, attention)
        for key, values in found.items():
            sums[key][part] = torch.where(scored, values, 0.0).sum(1, dtype=torch.float64).cpu()
        if "kl" in found:
            token_kl.append(found["kl"][scored].cpu())
        if told is not None:
            told(part.stop)
    tokens = keep[:, 1:].sum(1).double()
    if reference is None:
        return WindowScores(sums["nll"], tokens)
    return WindowScores(tokens=tokens, token_kl=torch.cat(token_kl), **sums)


def _lock_step(
    model: torch.nn.Module, reference: torch.nn.Module | None, ids: Tensor, attention: Tensor | None
) -> dict[str, Tensor]:
    """Scores per position of one batch, both models' logits alive together."""
    logits = forward(model, ids, attention)[:, :-1]
    other = None if reference is None else forward(reference, ids, attention)[:, :-1]
    if other is not None and other.shape != logits.shape:
        raise CompressError(f"The models' vocabularies differ ({other.shape[-1]} and {logits.shape[-1]} tokens).")
    return _scores(logits, ids[:, 1:], other)


def _scores(logits: Tensor, targets: Tensor, other: Tensor | None) -> dict[str, Tensor]:
    """Per position [batch, length - 1], float32; softmaxes over a chunk of positions at a time."""
    step = max(1, CHUNK_BUDGET // (logits.shape[0] * logits.shape[-1]))
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, logits.shape[1], step):
        here = slice(start, start + step)
        q, target = F.log_softmax(logits[:, here].float(), -1), targets[:, here, None]
        found = {"nll": -q.gather(-1, target).squeeze(-1)}
        if other is not None:
            p = F.log_softmax(other[:, here].float(), -1)
            found["reference_nll"] = -p.gather(-1, target).squeeze(-1)
            # A token the original never gives (log p = -inf) adds nothing, whatever the other model says of it.
            found["kl"] = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
            found["top1"] = (p.argmax(-1) == q.argmax(-1)).float()
        for key, values in found.items():
            parts.setdefault(key, []).append(values)
    return {key: torch.cat(values, 1) for key, values in parts.items()}


def forward(model: torch.nn.Module, ids: Tensor, attention: Tensor | None = None) -> Tensor:
    """Logits [batch, length, vocabulary] of ids [batch, length]; `attention` is left out when nothing is padded.

    A model whose cache is packed reads the text a group of tokens at a time, each from the cache of those before it.
    That is what it does when it writes, but that then a group is one token.
    """
    spec = cache_spec(model)
    if spec is not None:
        return _through_cache(model, ids, attention, spec)
    extra = {} if attention is None else {"attention_mask": attention.long()}
    logits: Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    return logits


def _through_cache(model: torch.nn.Module, ids: Tensor, attention: Tensor | None, spec: CacheSpec) -> Tensor:
    cache = packed_cache(model.config, spec)
    logits: Tensor | None = None
    for start in range(0, ids.shape[1], spec.group_size):
        end = min(start + spec.group_size, ids.shape[1])
        extra = {} if attention is None else {"attention_mask": attention[:, :end].long()}
        part = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **extra).logits
        if logits is None:
            logits = part.new_empty(*ids.shape, part.shape[-1])
        logits[:, start:end] = part
    assert logits is not None
    return logits


def vocabulary_of(model: torch.nn.Module) -> int:
    """Rows of the output embedding."""
    head = model.get_output_embeddings()
    rows = getattr(head, "out_features", None)  # asked first: a packed head would be unpacked for its weight
    if rows is not None:
        return int(rows)
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)
