"""What is to be trained, for how long and in what portions, and what came of it: the words of the one training path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at one learning rate (the peak of the schedule). `settle`, if there is one, is called
    after every step with each of them, or with this process's rows of it, and with the learning rate of that step."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    settle: Callable[[Tensor, float], None] | None = None


@dataclass(frozen=True)
class Schedule:
    """How long and in what portions. `batch_size` windows a step; the learning rate rises over `warmup` steps and falls
    to 0 by a cosine. `bf16`: matrix products in bfloat16, weights and optimizer in float32. `betas`: AdamW's.
    `accumulation`: micro-batches that a step's windows are computed in, one after the other. `evaluate_every`: steps
    between evaluations on held-out text (0: none); after `patience` of them without a better one training ends (0: it
    never does)."""

    steps: int
    batch_size: int
    warmup: int = 0
    seed: int = 0
    bf16: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    accumulation: int = 1
    evaluate_every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class Training:
    """What came of it: the loss of each step; the loss on held-out text, `{"step", "loss"}`, from step 0 on, and the
    step whose weights were kept (None: those of the last)."""

    losses: list[float] = field(repr=False)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None

    def summary(self, points: int = 20) -> list[dict[str, float]]:
        """Mean losses of `points` stretches of equal length: `step` is the last of each."""
        size = max(1, len(self.losses) // points)
        parts = [self.losses[start : start + size] for start in range(0, len(self.losses), size)]
        steps = [min((number + 1) * size, len(self.losses)) for number in range(len(parts))]
        return [{"step": step, "loss": sum(part) / len(part)} for step, part in zip(steps, parts, strict=True)]
