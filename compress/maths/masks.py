"""Which weights stay: masks with an exact number of zeros, unstructured or N:M.

Masks are bool, True where a weight is kept. The lowest scores go; between equal scores the one that comes first goes,
so a mask is the same on every run.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from compress.errors import CompressError, StartError


def parse_sparsity(value: object) -> object:
    """A share written as "50%" becomes 0.5; anything else is returned as it is, for its type to be checked."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError(f"{value!r} is no percentage; write a number from 0 to 1, or for instance 50%") from None
    return value


def parse_pattern(value: object) -> str | None:
    """The pattern as text, "2:4" (keep 2 of every 4), checked. ValueError says what is wrong.

    YAML 1.1 reads an unquoted 2:4 as a number to base 60, 124; that is turned back.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = "{}:{}".format(*divmod(value, 60))
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'pattern is {value!r}: write it as "2:4", which keeps 2 of every 4 weights')
    keep, of = int(match[1]), int(match[2])
    if not 1 <= keep <= of or of < 2:
        raise ValueError(f'pattern "{keep}:{of}" cannot be: it keeps the first number of weights out of the second')
    return f"{keep}:{of}"


def check_columns(pattern: str | None, columns: int) -> None:
    """StartError if `pattern` ("n:m") cannot be laid on rows of this many columns."""
    if pattern is not None and columns % int(pattern.split(":")[1]):
        raise StartError(
            f"pattern {pattern} needs a multiple of {pattern.split(':')[1]} columns; the layer has {columns}"
        )


def unstructured_mask(scores: Tensor, sparsity: float, per: str = "row") -> Tensor:
    """Keep mask `[out, in]` with `floor(sparsity * in)` zeros per row, or `floor(sparsity * out * in)` per layer.

    `per` is "row" or "layer". NaN in the scores: CompressError. `sparsity` outside 0..1: StartError.
    """
    _refuse_nan(scores)
    if not 0 <= sparsity <= 1:
        raise StartError(f"sparsity is {sparsity}: a number from 0 to 1 can be used")
    if per not in ("row", "layer"):
        raise StartError(f'scope is {per!r}: "row" or "layer" can be used')
    lists = scores if per == "row" else scores.reshape(1, -1)
    zeros = int(round(sparsity * lists.shape[1], 6))  # 0.29 * 100 is 28.999999999999996, and 29 is meant
    return ~_lowest(lists, zeros).view(scores.shape)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep mask `[out, in]`: the `n` highest scores of every `m` neighbours along a row.

    Columns that `m` does not divide: StartError. NaN in the scores: CompressError.
    """
    _refuse_nan(scores)
    rows, columns = scores.shape
    check_columns(f"{n}:{m}", columns)
    return ~_lowest(scores.reshape(-1, m), m - n).view(rows, columns)


def keep_mask(
    weight: Tensor, scores: Tensor, sparsity: float | None = None, pattern: str | None = None, per: str = "row"
) -> Tensor:
    """The mask by `pattern` ("n:m") if there is one, else by `sparsity`. Weights that are zero already go first.

    So they count toward the target, and the same request on a pruned weight changes nothing.
    """
    scores = torch.where(weight == 0, -torch.inf, scores)
    if pattern is not None:
        n, m = map(int, pattern.split(":"))
        return nm_mask(scores, n, m)
    if sparsity is None:
        raise StartError("either a sparsity or a pattern is needed")
    return unstructured_mask(scores, sparsity, per)


def zeroed(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` (finite) with exact zeros where `keep` is False. Where a mask has no order, a product takes a fifth of
    the time of `where` or `masked_fill`; adding 0 turns -0 into 0."""
    return (weight * keep).add_(0.0)


def _refuse_nan(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise CompressError("pruning scores hold NaN: the weight or the layer's inputs are not finite")


def _lowest(lists: Tensor, count: int) -> Tensor:
    """True at the `count` lowest entries of each row; equal ones in order of their index.

    By selection, not by sorting: linear time, and no index tensor of eight bytes for each weight.
    """
    if count == 0:
        return torch.zeros_like(lists, dtype=torch.bool)
    if count == lists.shape[1]:
        return torch.ones_like(lists, dtype=torch.bool)
    threshold = lists.kthvalue(count, dim=1, keepdim=True).values
    low = lists < threshold
    missing = count - low.sum(1, keepdim=True)
    ties = lists == threshold
    too_many = (ties.sum(1, keepdim=True) > missing).squeeze(1)
    if bool(too_many.any()):
        tied = ties[too_many]
        ties[too_many] = tied & (tied.cumsum(1, dtype=torch.int32) <= missing[too_many])
    return low | ties
