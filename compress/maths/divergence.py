"""The Kullback-Leibler divergence of two models' next-token distributions, and its gradient.

`KL(p || q) = sum p (log p - log q)` with `p` the teacher's and `q` the student's distribution; with respect to the
student's logits its gradient is `q - p`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Values of one slice of logits in float32, of which a few are held at once.
SLICE_VALUES = 1 << 22


class _KL(torch.autograd.Function):  # type: ignore[misc]
    """The gradient is made together with the value, slice by slice, so that only one table of logits is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor | None) -> Tensor:
        rows, width = student.shape
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        count = rows if counted is None else int(counted.sum())
        step = max(1, SLICE_VALUES // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            p = teacher[part].float().log_softmax(-1)
            q = student[part].float().log_softmax(-1)
            weight = p.exp()
            lost = (weight * (p - q)).sum(-1)
            slope = q.exp_().sub_(weight)
            if counted is not None:
                lost, slope = lost * counted[part], slope * counted[part].unsqueeze(-1)
            total += lost.double().sum()
            gradient[part] = slope.div_(max(count, 1))
        ctx.save_for_backward(gradient)
        return (total / max(count, 1)).float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(teacher || student), float32, in nats. Logits [..., vocabulary]; `mask` [...]: false on
    positions that do not count. Gradients flow to the student's logits alone.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[0.0, 100.0]])
    >>> kl_divergence(even, sure).item()    # log 2: the student gives the certain token one half
    0.6931471824645996
    """
    flat = None if mask is None else mask.reshape(-1).to(student.device)
    width = student.shape[-1]
    loss: Tensor = _KL.apply(student.reshape(-1, width), teacher.reshape(-1, width), flat)
    return loss
