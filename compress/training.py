"""The one training path: transformers' Trainer, on accelerate, for every pass that learns by gradients.

What is trained is an *objective*: a module whose forward takes a batch and returns the loss. Checkpoints hold what is
trained and the optimizer's state, nothing else, and are taken by the clock; a run that was killed goes on from the last
whole one and ends with the same weights, since nothing it computes depends on when they were taken.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging

from compress.data import Windows
from compress.errors import CompressError
from compress.progress import Progress, Step

_TRAINED, _LOSSES, _STATE = "trained.safetensors", "losses.json", "trainer_state.json"
#: Seconds between checkpoints: what a killed run loses at most.
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at one learning rate (the peak of the schedule)."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float


@dataclass(frozen=True)
class Schedule:
    """How long and in what portions. `batch_size` windows a step; the learning rate rises over `warmup` steps and falls
    to 0 by a cosine. `bf16`: matrix products in bfloat16, weights and optimizer in float32. `betas`: AdamW's."""

    steps: int
    batch_size: int
    warmup: int = 0
    seed: int = 0
    bf16: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


@dataclass(frozen=True)
class Training:
    """What came of it: the loss of each step."""

    losses: list[float] = field(repr=False)

    def summary(self, points: int = 20) -> list[dict[str, float]]:
        """Mean losses of `points` stretches of equal length: `step` is the last of each."""
        size = max(1, len(self.losses) // points)
        parts = [self.losses[start : start + size] for start in range(0, len(self.losses), size)]
        steps = [min((number + 1) * size, len(self.losses)) for number in range(len(parts))]
        return [{"step": step, "loss": sum(part) / len(part)} for step, part in zip(steps, parts, strict=True)]


def train(
    objective: nn.Module,
    groups: Sequence[Group],
    windows: Windows | Dataset,
    schedule: Schedule,
    *,
    title: str,
    device: str | torch.device = "cpu",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Training:
    """Trains the parameters of `groups` in place, all others staying as they are.

    `objective(input_ids=..., attention_mask=...)` gives the mean loss of a batch of windows [batch, length], the mask
    only where the windows have one; the items of any other `Dataset`, mappings of tensors, are given to it as they are.
    Windows are shuffled anew each epoch by `schedule.seed`. `folder` is where checkpoints are kept (None: nowhere), and
    where a killed run finds them; it is removed by the caller. CompressError with the step where the loss is not
    finite.
    """
    objective.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    with _folder(folder) as kept, (progress or Progress()).step(title, total=schedule.steps) as step, _quiet():
        trainer = _Trainer(objective, groups, windows, schedule, kept, title, str(device), folder is not None)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(trainer, step, folder is not None))
        latest = _latest(kept)
        trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    objective.requires_grad_(False)
    return Training(trainer.losses)


def bf16_is_fast(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _WindowsDataset(Dataset):  # type: ignore[misc]
    def __init__(self, windows: Windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.windows.tokens[index]}
        if self.windows.mask is not None:
            item["attention_mask"] = self.windows.mask[index].long()
        return item


class _Trainer(Trainer):  # type: ignore[misc]
    def __init__(
        self, objective: nn.Module, groups: Sequence[Group], windows: Windows | Dataset, schedule: Schedule,
        folder: Path, title: str, device: str, keeps: bool,
    ):  # fmt: skip
        self.groups, self.schedule, self.title = groups, schedule, title
        self.losses: list[float] = []
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=schedule.steps, per_device_train_batch_size=schedule.batch_size,
            seed=schedule.seed, data_seed=schedule.seed, bf16=schedule.bf16, use_cpu=device == "cpu",
            max_grad_norm=schedule.max_grad_norm, save_strategy="no", save_total_limit=1 if keeps else None,
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu", label_names=[],
        )  # fmt: skip
        texts = _WindowsDataset(windows) if isinstance(windows, Windows) else windows
        super().__init__(model=objective, args=arguments, train_dataset=texts)
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        groups = [{"params": list(group.parameters), "lr": group.learning_rate} for group in self.groups]
        # Scales and gradients of small models are tiny: Adam's usual epsilon would be the larger part of the divisor.
        self.optimizer = torch.optim.AdamW(
            groups, betas=self.schedule.betas, eps=1e-12, weight_decay=self.schedule.weight_decay
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = get_cosine_schedule_with_warmup(
                optimizer or self.optimizer, self.schedule.warmup, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss)
        if value != value or value in (float("inf"), float("-inf")):
            step = self.state.global_step + 1
            raise CompressError(
                f"{self.title}: the loss of step {step} is {value}. Lower learning_rate, or look at the text of the "
                f"batch (windows of seed {self.schedule.seed})."
            )
        self.losses.append(value)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained and the losses so far; the Trainer adds its own state, last of all `trainer_state.json`."""
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self._trained()}
        save_file(trained, os.path.join(output_dir, _TRAINED))
        Path(output_dir, _LOSSES).write_text(json.dumps(self.losses), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(os.path.join(resume_from_checkpoint, _TRAINED))
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(stored[name])
        self.losses = json.loads(Path(resume_from_checkpoint, _LOSSES).read_text(encoding="utf-8"))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (
            (name, p) for name, p in self.accelerator.unwrap_model(self.model).named_parameters() if p.requires_grad
        )


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows the progress, and asks for a checkpoint by the clock."""

    def __init__(self, trainer: _Trainer, step: Step, keeps: bool):
        self.trainer, self.step, self.keeps = trainer, step, keeps
        self.saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.step.advance(parts=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.step.advance(f"loss {self.trainer.losses[-1]:.4f}")
        if self.keeps and time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            control.should_save = True
            self.saved = time.monotonic()
        return control


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["global_step"], checkpoint))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(whole)[1] if whole else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's own talk: the progress is ours."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
