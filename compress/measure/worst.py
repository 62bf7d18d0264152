"""The windows of the evaluation text on which two models differ most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: How many are kept, and the characters of a text that is shown.
WORST, CHARACTERS = 5, 400


def worst_windows(
    windows: Tensor, kl: Tensor, tokens: Tensor, token_kl: Tensor, scored: Tensor, tokenizer: Any
) -> list[dict[str, Any]]:
    """The windows of the largest mean KL divergence per token, the fields of `WorstText` each.

    `windows`: int64 [n, length]; `kl`, `tokens`: float64 [n], summed and counted; `token_kl`: of all scored tokens, one
    window after the other; `scored`: bool [n, length - 1], which of the tokens after the first they are.
    """
    means = kl / tokens.clamp_min(1)
    order = torch.argsort(-means, stable=True)[:WORST].tolist()
    ends = tokens.long().cumsum(0)
    found = []
    for index in order:
        if tokens[index] == 0:
            continue
        own = token_kl[int(ends[index] - tokens[index]) : int(ends[index])]
        place = int(scored[index].nonzero()[int(own.argmax())]) + 1
        ids = windows[index].tolist()
        found.append(
            {
                "window": index,
                "kl": float(means[index]),
                "text": _shown(tokenizer, [ids[0], *windows[index, 1:][scored[index]].tolist()])[:CHARACTERS],
                "token": _shown(tokenizer, [ids[place]]),
                "token_kl": float(own.max()),
                "before": _shown(tokenizer, ids[:place])[-CHARACTERS // 4 :],
            }
        )
    return found


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
