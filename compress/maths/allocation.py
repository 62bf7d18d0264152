"""Which layer gets which of several choices, under limits on what the choices cost: an exact integer program.

With `x_lc` = 1 where layer `l` takes choice `c`: the least `sum loss_lc x_lc`, one choice a layer, and for each limit
`sum cost_lc x_lc <= limit`. That a sum of the layers' own losses says what they do together is the assumption (HAWQ-V3:
Yao et al., 2020, arXiv 2011.10680, section 3.3, solves the same program for its bits).

A worked example: two layers, choices of cost 2 and 4, losses (9, 1) and (4, 2), and 6 to spend. Both at 4 cost 8: too
much. The first at 4 loses 1 + 4 = 5, the second 9 + 2 = 11: the first is worth its cost.

>>> best([[9.0, 1.0], [4.0, 2.0]], [Limit([[2, 4], [2, 4]], 6)])
[1, 0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What the losses are scaled to: the solver stops at an absolute gap of 1e-6, which is then 1e-9 of them.
_SCALE = 1000.0
_NODES = 1 << 20  # of the search tree: an end that does not depend on the clock


@dataclass(frozen=True)
class Limit:
    """`costs[l][c]`, whole numbers, of layer `l` at choice `c`; their sum over the layers is at most `most`."""

    costs: Sequence[Sequence[int]]
    most: int

    def spent(self, choice: Sequence[int]) -> int:
        """The sum of the costs of these choices, one a layer."""
        return sum(costs[c] for costs, c in zip(self.costs, choice, strict=True))

    def allows(self, choice: Sequence[int]) -> bool:
        return self.spent(choice) <= self.most


def best(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> list[int] | None:
    """The index of each layer's choice in the allocation with the least sum of losses, or None if none is allowed."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    table = np.asarray(losses, dtype=np.float64)
    layers, choices = table.shape
    rows: list[Any] = [LinearConstraint(kron(eye_array(layers), np.ones((1, choices)), format="csr"), 1, 1)]
    for limit in limits:
        costs = np.asarray(limit.costs, dtype=object).reshape(-1)
        unit = math.gcd(*(int(cost) for cost in costs)) or 1  # small numbers are exact for the solver
        rows.append(LinearConstraint((costs // unit).astype(np.float64), -np.inf, limit.most // unit))
    top = float(table.max())
    found = milp(
        c=table.reshape(-1) * (_SCALE / top if top > 0 else 1.0), integrality=np.ones(table.size), bounds=Bounds(0, 1),
        constraints=rows, options={"mip_rel_gap": 0.0, "node_limit": _NODES},
    )  # fmt: skip
    if found.x is None:
        return None
    chosen = [int(index) for index in found.x.reshape(layers, choices).argmax(1)]
    assert all(limit.allows(chosen) for limit in limits)
    return chosen


def uniform(limits: Sequence[Limit]) -> int | None:
    """The largest choice that all layers can have together; None if the limits do not even allow the first."""
    choices = range(len(limits[0].costs[0]))
    allowed = [c for c in choices if all(limit.allows([c] * len(limit.costs)) for limit in limits)]
    return max(allowed, default=None)


def fill(limits: Sequence[Limit]) -> list[int] | None:
    """An allocation that spends nearly all: from `uniform` up, one step at a time, the dearest layers first.

    It looks at no loss, so a plan can make it from shapes alone. None if not even the first choices are allowed.
    """
    start = uniform(limits)
    if start is None:
        return None
    costs = limits[0].costs
    chosen = [start] * len(costs)
    spent = [limit.spent(chosen) for limit in limits]
    order = sorted(range(len(costs)), key=lambda layer: (-costs[layer][0], layer))
    while True:
        before = list(chosen)
        for layer in order:
            at = chosen[layer]
            if at + 1 == len(costs[layer]):
                continue
            steps = [limit.costs[layer][at + 1] - limit.costs[layer][at] for limit in limits]
            if all(s + step <= limit.most for s, step, limit in zip(spent, steps, limits, strict=True)):
                chosen[layer] += 1
                spent = [s + step for s, step in zip(spent, steps, strict=True)]
        if chosen == before:
            return chosen
