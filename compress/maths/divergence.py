"""How far a student's next-token distribution lies from its teacher's: Kullback-Leibler both ways, Jensen-Shannon.

`KL(p || q) = sum p (log p - log q)`, with `p` the teacher's distribution and `q` the student's. *Forward* is
`KL(p || q)`, *reverse* `KL(q || p)`, and the generalised Jensen-Shannon divergence is (Agarwal et al. 2024, GKD, arXiv
2306.13649, equation 1) `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`.

A teacher may be known by its `k` likeliest tokens and the mass of all others (`TopK`). Both distributions are then
compared over k + 1 events, the last one being "any other token". By the data processing inequality that is never more
than the divergence of the whole distributions, grows with k, and is equal to it at k = vocabulary.

`sliced` takes any of them from hidden states through the head, a few rows at a time, so that no table of all tokens by
the whole vocabulary is held at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

#: Values of one slice of logits in float32, of which a few are held at once.
SLICE_VALUES = 1 << 22
Direction = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens of each of n rows: `log_probs` float32 [n, k] at the temperature they are compared at,
    `indices` int64 [n, k], `log_tail` float32 [n]: the logarithm of the mass of all other tokens."""

    log_probs: Tensor
    indices: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        return TopK(self.log_probs[rows], self.indices[rows], self.log_tail[rows])


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens (all, where there are fewer) of logits [n, vocabulary], likeliest first.

    >>> likeliest = top_k(torch.tensor([[0.0, math.log(2), math.log(5)]]), 2)
    >>> [round(p, 4) for p in likeliest.log_probs.exp()[0].tolist()], round(likeliest.log_tail.exp().item(), 4)
    ([0.625, 0.25], 0.125)
    """
    logs = (logits.float() / temperature).log_softmax(-1)
    values, indices = logs.topk(min(k, logits.shape[-1]), -1)
    if values.shape[-1] == logits.shape[-1]:
        return TopK(values, indices, values.new_full(values.shape[:-1], -torch.inf))
    # Summed, not 1 less the others: where the tail is small, that difference has no digits left.
    return TopK(values, indices, logs.scatter(-1, indices, -torch.inf).logsumexp(-1))


def divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    direction: Direction = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence of each row, float32 [n], in nats, times the square of the temperature, as Hinton et al. 2015
    (arXiv 1503.02531, section 2.1) have it, so that gradients keep their size.

    `student`: logits [n, vocabulary]; `teacher`: logits of that shape, or a `TopK` at this temperature. `beta` is that
    of `jsd`. Gradients flow to the student alone.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[0.0, 100.0]])
    >>> divergence(even, sure).item()    # log 2: the student gives the certain token one half
    0.6931471824645996
    """
    q = (student.float() / temperature).log_softmax(-1)
    if isinstance(teacher, TopK):
        p, q = _events(teacher, q)
    else:
        p = (teacher.detach().float() / temperature).log_softmax(-1)
    if direction == "forward":
        lost = _kl(p, q)
    elif direction == "reverse":
        lost = _kl(q, p)
    else:
        m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
        lost = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    return lost * temperature**2


def _events(teacher: TopK, q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, k + 1] of both over the teacher's tokens and the rest; [n, k] where there is no rest."""
    chosen = q.gather(-1, teacher.indices)
    if teacher.indices.shape[-1] == q.shape[-1]:
        return teacher.log_probs, chosen
    rest = q.scatter(-1, teacher.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([teacher.log_probs, teacher.log_tail.unsqueeze(-1)], -1), torch.cat([chosen, rest], -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities [n, events]: an event that p never gives adds nothing, whatever q says of it."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


Loss = Callable[[Tensor, slice], Tensor]


class _Sliced(torch.autograd.Function):  # type: ignore[misc]
    """The gradient is made together with the value, slice by slice, so that no slice's logits outlive it."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Callable[[Tensor], Tensor], loss: Loss, step: int, *parameters: Tensor
    ) -> Tensor:
        to_states = torch.zeros_like(states)
        to_parameters = [torch.zeros_like(p) for p in parameters]
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            with torch.enable_grad():
                given = states[part].detach().requires_grad_()
                lost = loss(head(given), part)
                gradients = torch.autograd.grad(lost, (given, *parameters), allow_unused=True)
            total += lost.detach().double()
            for kept, gradient in zip([to_states[part], *to_parameters], gradients, strict=True):
                if gradient is not None:
                    kept += gradient
        ctx.save_for_backward(to_states, *to_parameters)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        to_states, *to_parameters = (kept * upstream[0].to(kept.dtype) for kept in ctx.saved_tensors)
        return to_states, None, None, None, *to_parameters


def sliced(states: Tensor, loss: Loss, head: nn.Module | None = None, width: int | None = None) -> Tensor:
    """The sum over slices of `loss(logits, rows)`, float32, where logits [rows, vocabulary] are what `head` makes of
    `states` [n, hidden] (None: the states are logits), `rows` the slice of the n that they belong to.

    Memory: a few tables of SLICE_VALUES values, and the gradient of states and of the head. `width` is the vocabulary,
    where the head does not say it by its weight.
    """
    columns = width or (states.shape[-1] if head is None else int(head.weight.shape[0]))
    step = max(1, SLICE_VALUES // columns)
    parameters = [] if head is None else [p for p in head.parameters() if p.requires_grad]
    result: Tensor = _Sliced.apply(states, head or _same, loss, step, *parameters)
    return result


def _same(logits: Tensor) -> Tensor:
    return logits


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(teacher || student), float32, in nats. Logits [..., vocabulary]; `mask` [...]: false on
    positions that do not count. Gradients flow to the student's logits alone.
    """
    width = student.shape[-1]
    flat = None if mask is None else mask.reshape(-1).to(student.device)
    count = max(1, student.shape[:-1].numel() if flat is None else int(flat.sum()))
    aim = teacher.reshape(-1, width)

    def lost(logits: Tensor, rows: slice) -> Tensor:
        each = divergence(logits, aim[rows])
        return (each if flat is None else each * flat[rows]).sum() / count

    return sliced(student.reshape(-1, width), lost)
