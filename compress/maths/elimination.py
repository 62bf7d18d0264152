"""Which inputs of a layer can go, and what the others make up for: least squares on the layer's inputs.

A layer `y = W x` loses some columns of `W` with their inputs. With `H = 2 E[x x^T]` (`maths/hessian.py`), `M` the
columns that go and `K` those that stay, the best that `K` can do leaves

    sum over rows w of  w_M S w_M^T / 2,   S = H_MM - H_MK H_KK^-1 H_KM = ((H^-1)_MM)^-1,

the error of the surgeon (Hassibi, Stork: "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992),
for groups of columns as in Kurtic, Frantar, Alistarh: "ZipLM", 2023, arXiv 2302.04089, section 3.1. `eliminate` takes
the cheapest group out, again and again; `refitted` is the least-squares layer itself.

A worked example: two inputs that are always equal, `H = [[2, 2], [2, 2]]`, and `W = [[1, 2]]`. Without the second one,
its weight of 2 moves to the first: `[[3]]`, and nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.maths.hessian import triangular_root

#: Groups are taken out in at most so many steps, several at once where there are more.
STEPS = 256


def inverse(hessian: Tensor, damping: float) -> Tensor:
    """`(H + damping * mean diagonal)^-1`, `[in, in]`; more damping where that is not positive definite, as
    `triangular_root` adds it. Columns that were always zero stand alone."""
    root, _ = triangular_root(hessian, damping)
    return torch.cholesky_inverse(root.flip(0, 1)).flip(0, 1)


def eliminate(weight: Tensor, hessian: Tensor, groups: Tensor, count: int, damping: float = 0.01) -> list[int]:
    """The first `count` groups to go, in their order, each the one that costs least given those before it.

    weight: `[out, in]`, any float dtype. hessian: float32 or float64 `[in, in]`. groups: int64 `[groups, size]`, the
    columns of each; no column is in two. What stays is taken to be re-fitted every time. NotPositiveDefinite as
    `triangular_root`.
    """
    return [group for group, _ in _eliminated(weight, hessian, groups, count, damping)]


def marginal_costs(weight: Tensor, hessian: Tensor, groups: Tensor, damping: float = 0.01) -> Tensor:
    """What each group costs when `eliminate` takes it, float64 `[groups]`, until none is left:
    they add up to the loss without any. The arguments are those of `eliminate`."""
    found = torch.zeros(len(groups), dtype=torch.float64)
    for group, cost in _eliminated(weight, hessian, groups, len(groups), damping):
        found[group] = cost / 2  # the Hessian is twice the mean
    return found


def _eliminated(weight: Tensor, hessian: Tensor, groups: Tensor, count: int, damping: float) -> list[tuple[int, float]]:
    """Which groups go, in their order, and what each costs then."""
    dead = hessian.diagonal() == 0
    weight = weight.to(hessian.dtype).masked_fill(dead, 0.0)
    inv = inverse(hessian, damping)
    gone = torch.zeros(len(groups), dtype=torch.bool, device=weight.device)
    order: list[tuple[int, float]] = []
    at_once = max(1, -(-count // STEPS))
    while len(order) < count:
        costs = _costs(weight, inv, groups).masked_fill(gone, torch.inf)
        chosen = costs.argsort(stable=True)[: min(at_once, count - len(order))]
        columns = groups[chosen].flatten()
        square = inv[columns][:, columns]
        step = torch.linalg.solve(square, inv[columns])
        weight = weight - weight[:, columns] @ step
        inv -= inv[:, columns] @ step
        weight[:, columns] = 0.0
        gone[chosen] = True
        order += zip(chosen.tolist(), costs[chosen].tolist(), strict=True)
    return order


def _costs(weight: Tensor, inv: Tensor, groups: Tensor) -> Tensor:
    """What each group costs, `[groups]`; anything for those that are gone."""
    if groups.shape[1] == 1:
        columns = groups[:, 0]
        return weight.square().sum(0)[columns] / inv.diagonal()[columns].clamp_min(torch.finfo(inv.dtype).tiny)
    costs = []
    for columns in groups:
        square, part = inv[columns][:, columns], weight[:, columns]
        lower, failed = torch.linalg.cholesky_ex(square)
        solved = torch.linalg.solve_triangular(lower, part.T, upper=False)
        costs.append(solved.square().sum() if not int(failed) else part.new_tensor(torch.inf))
    return torch.stack(costs)


def without(weight: Tensor, hessian: Tensor, columns: Tensor, damping: float = 0.01) -> Tensor:
    """`W` with `columns` (int64) at zero and the others making up for them, `W_K + W_M H_MK H_KK^-1`, in the dtype of
    `hessian`."""
    stays = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
    stays[columns] = False
    result = weight.to(hessian.dtype).masked_fill(~stays, 0.0)
    if not bool(stays.any()):
        return result
    missing = weight.to(hessian.dtype)[:, columns] @ hessian[columns][:, stays]
    result[:, stays] = refitted(result[:, stays], hessian[stays][:, stays], missing, damping)
    return result


def refitted(weight: Tensor, hessian: Tensor, missing: Tensor, damping: float = 0.01) -> Tensor:
    """`W + D (H + damping * mean diagonal)^-1`, in the dtype of `hessian`: the least-squares weight, which the damping
    holds near the one it was.

    weight: `[out, in]`. hessian: `2 E[x x^T]`, `[in, in]`. missing: `D = 2 E[d x^T]`, `[out, in]`, `d` being what the
    layer's output lacks of what it shall be. Columns whose input was always zero stay as they are.
    """
    lower = triangular_root(hessian, damping)[0].flip(0, 1)
    solved = torch.cholesky_solve(missing.flip(1).T.to(hessian.dtype), lower).T.flip(1)
    return weight.to(hessian.dtype) + solved
