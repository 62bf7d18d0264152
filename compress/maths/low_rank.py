"""Matrices of low rank that stand for what compression took away.

Eckart, Young: "The approximation of one matrix by another of lower rank", 1936: the first r singular values and vectors
are the best of rank r. Liu et al.: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
Approximation", 2024, arXiv 2410.21271; Zhang et al.: "LQER: Low-Rank Quantization Error Reconstruction for LLMs", 2024,
arXiv 2402.02446: with `H` the second moment of a layer's inputs, `|(E - B A) X|**2 = |(E - B A) H**(1/2)|**2` up to a
factor, so that the best `B A` for the layer's output is the best of rank r of `E H**(1/2)`, times `H**(-1/2)`.

A worked example: `E = diag(1, 2)`, one input four times as strong as the other, `H = diag(16, 1)`. By the weight alone
the second entry is the larger loss; by the output it is the first, `1 * 4 > 2 * 1`: rank 1 restores that.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor

#: Directions with less than this share of the largest eigenvalue carry no input worth restoring.
_NONE = 1e-10


def best_of_rank(error: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]), float32, B A being the nearest to `error` [out, in] of rank r; both of like size."""
    left, values, right = torch.linalg.svd(error.double(), full_matrices=False)
    root = values[:r].sqrt()
    return (left[:, :r] * root).float(), (root[:, None] * right[:r]).float()


def best_for_inputs(error: Tensor, hessian: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]), float32: the `B A` of rank r for which `(error - B A) x` is least, summed over the
    inputs of this Hessian [in, in]. `error` [out, in]."""
    root, inverse = _roots(hessian)
    left, right = best_of_rank(error.double() @ root, r)
    return left, (right.double() @ inverse).float()


def spectrum(error: Tensor, hessian: Tensor | None = None) -> Tensor:
    """The squared singular values of `error` [out, in], largest first, float64; with a Hessian, those of the output's
    error: what each further rank restores."""
    weighed = error.double() if hessian is None else error.double() @ _roots(hessian)[0]
    values: Tensor = torch.linalg.svdvals(weighed)
    return values.square()


def _roots(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive semidefinite matrix, and its inverse on the directions that are there; float64."""
    values, vectors = torch.linalg.eigh(hessian.double())
    there = values > _NONE * values.max().clamp_min(0)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(there, 1 / root.where(there, torch.ones_like(root)), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def share_ranks(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The rank of each layer, those with 0 left out, with which all together restore most within a budget of values.

    `spectra`: what each further rank of a layer restores, falling; `costs`: values of one rank. The next rank always
    goes where a value restores most, which is the best there is, since no layer's later ranks are worth more.

    >>> share_ranks({"a": torch.tensor([9.0, 1.0]), "b": torch.tensor([4.0, 4.0])}, {"a": 10, "b": 10}, 30)
    {'a': 1, 'b': 2}
    """
    worth = {name: values.tolist() for name, values in spectra.items()}
    waiting = [(-values[0] / costs[name], name) for name, values in worth.items() if values]
    heapq.heapify(waiting)
    ranks = dict.fromkeys(spectra, 0)
    while waiting:
        value, name = heapq.heappop(waiting)
        if value == 0:
            break
        if costs[name] > budget:
            continue
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(worth[name]):
            heapq.heappush(waiting, (-worth[name][ranks[name]] / costs[name], name))
    return {name: rank for name, rank in ranks.items() if rank}
