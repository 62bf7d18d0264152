"""Text kept back from training, and what a model makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from compress.data import Windows
from compress.examples import IGNORED
from compress.maths.divergence import kl_divergence
from compress.objectives import learnt

#: Windows held out at most: enough to tell one step from another, few enough to ask often.
MOST = 64
_TOKENS = 2048  # in one forward


def split(windows: Windows, share: float, seed: int) -> tuple[Windows, Windows | None]:
    """(training, held out): `share` of the windows, drawn by the seed, at least one and `MOST` at most; None where
    nothing is to be held out or there are fewer than two."""
    count = min(MOST, max(1, int(share * len(windows)))) if share and len(windows) > 1 else 0
    if not count:
        return windows, None
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows.select(order[count:].sort().values), windows.select(order[:count].sort().values)


@torch.no_grad()
def quality(model: nn.Module, windows: Windows, original: nn.Module | None = None) -> Mapping[str, float]:
    """What the model makes of the windows: of text `perplexity` of what is to be learnt, and with `original` the
    `kl_divergence` from it, in nats a token; of labelled text `accuracy` and `f1`; of an encoder without a head
    nothing."""
    device = next(model.parameters()).device
    size = max(1, _TOKENS // windows.length)
    sums = {"nll": 0.0, "aims": 0.0, "kl": 0.0, "tokens": 0.0}
    said: list[int] = []
    for start in range(0, len(windows), size):
        part = windows.select(torch.arange(start, min(start + size, len(windows))))
        text = {"input_ids": part.tokens.to(device)}
        mask = None if part.mask is None else part.mask.long().to(device)
        if mask is not None:
            text["attention_mask"] = mask
        out = model(**text)
        if not hasattr(out, "logits"):
            return {}
        if part.labels is not None and part.labels.dim() == 1:
            said += out.logits.argmax(-1).tolist()
            continue
        if out.logits.dim() == 2:  # a classifier, and texts without a class: all there is to say is how far it moved
            if original is not None:
                moved = kl_divergence(out.logits.unsqueeze(1), original(**text).logits.unsqueeze(1), None)
                sums["kl"], sums["tokens"] = sums["kl"] + float(moved) * len(part), sums["tokens"] + len(part)
            continue
        labels = None if part.labels is None else part.labels.to(device)
        aims = learnt(text["input_ids"], mask, labels)[:, 1:]
        logits = out.logits[:, :-1].float()
        nll = functional.cross_entropy(logits.flatten(0, 1), aims.flatten(), ignore_index=IGNORED, reduction="sum")
        sums["nll"], sums["aims"] = sums["nll"] + float(nll), sums["aims"] + int((aims != IGNORED).sum())
        if original is not None:
            tokens = text["input_ids"].numel() if mask is None else int(mask.sum())
            sums["kl"] += float(kl_divergence(out.logits, original(**text).logits, mask)) * tokens
            sums["tokens"] += tokens
    if said:
        assert windows.labels is not None
        return classified(said, windows.labels.tolist())
    if not sums["aims"]:
        return {"kl_divergence": sums["kl"] / sums["tokens"]} if sums["tokens"] else {}
    found = {"perplexity": float(torch.tensor(sums["nll"] / max(sums["aims"], 1), dtype=torch.float64).exp())}
    return found | ({"kl_divergence": sums["kl"] / sums["tokens"]} if original is not None else {})


def classified(said: list[int], true: list[int]) -> dict[str, float]:
    """`accuracy`, and `f1`, the unweighted mean over the classes that occur in either list.

    >>> classified([0, 1, 1, 1], [0, 0, 1, 1])      # f1: 2/3 of class 0, 4/5 of class 1
    {'accuracy': 0.75, 'f1': 0.7333333333333334}
    """
    pairs = list(zip(said, true, strict=True))
    scores = []
    for name in sorted({*said, *true}):
        right = sum(a == b == name for a, b in pairs)
        scores.append(2 * right / (said.count(name) + true.count(name)))
    return {"accuracy": sum(a == b for a, b in pairs) / len(pairs), "f1": sum(scores) / len(scores)}
