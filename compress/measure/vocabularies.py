"""Scoring a model whose tokenizer was cut, beside the original, on the same text.

A window of the original's tokens is written in the tokens that are left: most are there still, and a token that is gone
becomes the pieces that the new tokenizer makes of it. So both models read the same text, and every token of the
original has a place after its last piece where both say what comes next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.measure.likelihood import CHUNK_BUDGET, WindowScores, batches, forward, vocabulary_of


@dataclass(frozen=True)
class Pairing:
    """Windows in both tokenizers' ids.

    `windows`: int64 [n, new length], filled up with 0; `token_of`: int64 [n, new length], the place in the original's
    window of the token that a piece belongs to, -1 where filled up; `shared`: int64 [2, tokens], the ids of the tokens
    that both have, the original's first; `left_out`: tokens of the original that are not scored, as their pieces do not
    fit the new model's context, or there are none.
    """

    windows: Tensor
    token_of: Tensor
    shared: Tensor
    left_out: int


def pair(original: Path, folder: Path, windows: Tensor, mask: Tensor | None, context: int | None) -> Pairing | None:
    """The windows for the model in `folder`; None where its tokenizer is the original's, or no cut of it."""
    from compress.opening import read_tokenizer
    from compress.vocabulary import expansion

    old, new = read_tokenizer(original), read_tokenizer(folder)
    table = None if old is None or new is None else expansion(old, new)
    if table is None or old is None or new is None:
        return None
    after = new.get_vocab()
    shared = sorted((index, after[token]) for token, index in old.get_vocab().items() if token in after)
    return paired_windows(windows, mask, table, shared, context)


def paired_windows(
    windows: Tensor, mask: Tensor | None, table: list[list[int]], shared: list[tuple[int, int]], context: int | None
) -> Pairing:
    """`table`: for each of the original's ids, the new ones; `shared`: pairs of ids of the same token."""
    rows: list[list[int]] = []
    places: list[list[int]] = []
    left_out = 0
    for index, window in enumerate(windows.tolist()):
        row: list[int] = []
        place: list[int] = []
        for at, token in enumerate(window):
            if mask is not None and not mask[index, at]:
                break
            pieces = table[token] if token < len(table) else []
            if context is not None and len(row) + len(pieces) > context:
                left_out += len(window) - at if mask is None else int(mask[index, at:].sum())
                break
            left_out += not pieces
            row += pieces
            place += [at] * len(pieces)
        rows.append(row)
        places.append(place)
    width = max(map(len, rows))
    filled = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    token_of = torch.tensor([place + [-1] * (width - len(place)) for place in places])
    return Pairing(filled, token_of, torch.tensor(shared).reshape(-1, 2).mT.contiguous(), left_out)


def paired_scores(
    model: torch.nn.Module, windows: Tensor, pairing: Pairing, *, reference: torch.nn.Module | None = None,
    mask: Tensor | None = None,
) -> tuple[WindowScores, Tensor]:  # fmt: skip
    """Scores, and the original's probability of the tokens that both have, summed over places: float64 [n].

    `nll` is that of all pieces of the tokens scored, `tokens` counts the original's tokens: so both models' figures are
    for the same text and the same unit. KL is between the two distributions over the tokens that both have, each made
    to add up to one; top-1 asks whether the original's most likely of *all* its tokens is the new model's.
    """
    n, length = windows.shape
    sums = {
        key: torch.zeros(n, dtype=torch.float64) for key in ("nll", "tokens", "kl", "top1", "reference_nll", "mass")
    }
    device = next(model.parameters()).device
    width = max(pairing.windows.shape[1], length)
    vocabulary = vocabulary_of(model) if reference is None else vocabulary_of(reference)
    token_kl: list[Tensor] = []
    for part in batches(n, width, vocabulary):
        ids, token_of = pairing.windows[part].to(device), pairing.token_of[part].to(device)
        whole = None if mask is None else mask[part].to(device)
        with torch.inference_mode():
            attention = None if bool((token_of >= 0).all()) else token_of >= 0
            logits = forward(model, ids, attention)
            other = None if reference is None else forward(reference, windows[part].to(device), whole)
            found = _scored(logits, ids, token_of, length)
            if other is not None:
                found |= _compared(logits, other, windows[part].to(device), token_of, pairing.shared.to(device))
        for key, values in found.items():
            sums[key][part] = values.sum(1, dtype=torch.float64).cpu()
        if "kl" in found:
            token_kl.append(found["kl"][scored_tokens(token_of, length)[:, 1:]].cpu())
    if reference is None:
        return WindowScores(sums["nll"], sums["tokens"]), sums["mass"]
    mass = sums.pop("mass")
    return WindowScores(**sums, token_kl=torch.cat(token_kl)), mass


def scored_tokens(token_of: Tensor, length: int) -> Tensor:
    """Which of the original's tokens are scored, bool [batch, length]: those that have pieces, and some text before."""
    found = torch.zeros(len(token_of), length + 1, dtype=torch.bool, device=token_of.device)
    present = found.scatter(1, token_of.where(token_of >= 0, length), True)[:, :length]
    before = present.long().cumsum(1) - present.long()
    return present & (before > 0)


def _scored(logits: Tensor, ids: Tensor, token_of: Tensor, length: int) -> dict[str, Tensor]:
    """What the new model pays for each piece [batch, pieces - 1] but those of a window's first token, and which of the
    original's tokens that covers [batch, length - 1]."""
    step = max(1, CHUNK_BUDGET // (logits.shape[0] * logits.shape[-1]))
    parts = []
    for start in range(0, logits.shape[1] - 1, step):
        here = slice(start, min(start + step, logits.shape[1] - 1))
        target = ids[:, 1:][:, here, None]
        parts.append(-F.log_softmax(logits[:, here].float(), -1).gather(-1, target).squeeze(-1))
    counted = scored_tokens(token_of, length)
    scored = (token_of >= 0) & counted.gather(1, token_of.clamp_min(0))
    return {"nll": torch.where(scored[:, 1:], torch.cat(parts, 1), 0.0), "tokens": counted[:, 1:]}


def _compared(logits: Tensor, other: Tensor, windows: Tensor, token_of: Tensor, shared: Tensor) -> dict[str, Tensor]:
    """Per place [batch, length - 1] of the original's window: both distributions of what comes next."""
    length = windows.shape[1]
    place = torch.arange(token_of.shape[1], device=token_of.device).expand_as(token_of)
    last = torch.zeros(len(token_of), length + 1, dtype=torch.int64, device=token_of.device)
    last = last.scatter_reduce(1, token_of.where(token_of >= 0, length), place, "amax")[:, :length].cummax(1).values
    counted = scored_tokens(token_of, length)[:, 1:]
    step = max(1, CHUNK_BUDGET // (other.shape[0] * other.shape[-1]))
    parts: dict[str, list[Tensor]] = {"kl": [], "top1": [], "reference_nll": [], "mass": []}
    for start in range(0, length - 1, step):
        here = slice(start, min(start + step, length - 1))
        p = F.log_softmax(other[:, here].float(), -1)
        index = last[:, here, None].expand(-1, -1, logits.shape[-1])
        q = F.log_softmax(logits.gather(1, index)[..., shared[1]].float(), -1)
        both = p[..., shared[0]]
        mass = both.logsumexp(-1, keepdim=True)
        both = both - mass
        parts["kl"].append(torch.where(both == -torch.inf, 0.0, both.exp() * (both - q)).sum(-1))
        parts["top1"].append((shared[0][q.argmax(-1)] == p.argmax(-1)).float())
        parts["reference_nll"].append(-p.gather(-1, windows[:, 1:][:, here, None]).squeeze(-1))
        parts["mass"].append(mass.squeeze(-1).exp())
    return {key: torch.where(counted, torch.cat(values, 1), 0.0) for key, values in parts.items()}


def note(pairing: Pairing, mass: float | None) -> str:
    """A sentence for the report. `mass`: the mean probability of the tokens that both have."""
    words = "The models' vocabularies differ: perplexity counts the original's tokens, for the same text."
    if mass is not None:
        words += (
            f" KL and top-1 compare the {pairing.shared.shape[1]} tokens that both have, on which the original puts "
            f"{100 * mass:.2f} % of its probability. What it gave to other tokens goes to these, which by itself "
            "lowers perplexity."
        )
    if pairing.left_out:
        words += f" {pairing.left_out} tokens cannot be written by the new tokenizer, or do not fit, and are left out."
    return words
