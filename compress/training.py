"""The one training path: transformers' Trainer, on accelerate, for every pass that learns by gradients.

What is trained is an *objective*: a module whose forward takes a batch and returns the loss, a mean over what counts in
that batch. Checkpoints hold what is trained and the optimizer's state, nothing else, and are taken by the clock; a run
that was killed goes on from the last whole one and ends with the same weights, since nothing it computes depends on
when they were taken.

A step's gradient is that of the mean over all that counts in its `batch_size` windows, however these are shared out to
micro-batches and to processes (`accelerate launch`): each part is weighed by what counts in it. Processes have all of
what is trained, or a share of it each (FSDP, `sharding.py`); checkpoints hold whole tensors in both cases.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging

from compress.data import Windows
from compress.errors import CompressError, StartError
from compress.examples import IGNORED
from compress.processes import process_count
from compress.progress import Progress, Step
from compress.sharding import (
    WholeAdamW,
    free_gathered,
    local,
    set_aside,
    sharded,
    shared_out,
    unseen_by_accelerate,
    whole,
)
from compress.training_folder import latest_checkpoint, place_for
from compress.training_schedule import Group, Schedule, Training
from compress.training_windows import WholeSteps, WindowsDataset, together

_TRAINED, _BEST, _LOSSES = "trained.safetensors", "best.safetensors", "losses.json"
#: Seconds between checkpoints: what a killed run loses at most.
CHECKPOINT_SECONDS = 60.0


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
    held_out: Windows | None = None,
) -> Training:
    """Trains the parameters of `groups` in place, all others staying as they are.

    An objective of which a step may leave trained parameters out says so by `may_leave_unused`.
    `objective(input_ids=..., attention_mask=...)` gives the mean loss of a batch of windows [batch, length], the mask
    only where the windows have one; one whose forward takes `labels` gets those of the windows. The items of any other
    `Dataset`, mappings of tensors with their `row`, are given to it as they are. Windows are shuffled anew each epoch
    by `schedule.seed`. `folder` is where checkpoints are kept (None: nowhere), and where a killed run finds them; it is
    removed by the caller. `held_out`: windows that are evaluated on, from before the first step; the weights of the
    best evaluation are kept. CompressError with step and batch where the loss is not finite, StartError where the
    windows of a step cannot be shared out evenly.
    """
    objective.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    with place_for(folder) as kept, (progress or Progress()).step(title, total=schedule.steps) as step, _quiet():
        trainer = _Trainer(objective, groups, windows, schedule, kept, title, str(device), folder is not None)
        trainer.held_out = held_out if schedule.evaluate_every else None
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(trainer, step, folder is not None))
        latest = latest_checkpoint(kept)
        with set_aside(objective, torch.device(device)):
            if latest is None or not trainer.ended_at(latest):
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
                trainer.bring_back()
        trainer.take_best()
    objective.requires_grad_(False)
    return Training(trainer.losses, trainer.evaluations, trainer.best_step)


class _Trainer(Trainer):  # type: ignore[misc]
    def __init__(
        self, objective: nn.Module, groups: Sequence[Group], windows: Windows | Dataset, schedule: Schedule,
        folder: Path, title: str, device: str, keeps: bool,
    ):  # fmt: skip
        self.groups, self.schedule, self.title = groups, schedule, title
        self.objective = self.running = objective  # `running`: what is trained, shares of the objective with FSDP
        self.takes_labels = "labels" in inspect.signature(objective.forward).parameters
        self.losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.held_out: Windows | None = None
        self.best: dict[str, Tensor] = {}
        self.parts: list[Tensor] = []  # the losses of this step's micro-batches, each weighed by what counts in it
        self.tokens = 0
        self.processes = process_count()
        size, rest = divmod(schedule.batch_size, schedule.accumulation * self.processes)
        if rest or not size:
            raise StartError(
                f"{title}: batch_size {schedule.batch_size} cannot be shared out evenly to {self.processes} processes "
                f"and {schedule.accumulation} micro-batches each: use a multiple of "
                f"{schedule.accumulation * self.processes}."
            )
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=schedule.steps, per_device_train_batch_size=size,
            gradient_accumulation_steps=schedule.accumulation,
            seed=schedule.seed, data_seed=schedule.seed, bf16=schedule.bf16, use_cpu=device == "cpu",
            max_grad_norm=schedule.max_grad_norm, save_strategy="no", save_total_limit=1 if keeps else None,
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu", label_names=[], ddp_broadcast_buffers=False,
            ddp_find_unused_parameters=getattr(objective, "may_leave_unused", False),
        )  # fmt: skip
        self.whole = not isinstance(windows, Windows)  # whether the objective takes all that an item holds
        texts = windows if self.whole else WindowsDataset(windows)
        super().__init__(model=objective, args=arguments, train_dataset=texts, data_collator=together)
        self.model_accepts_loss_kwargs = True  # what `compute_loss` gives needs no dividing by the micro-batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return WholeSteps(len(self.train_dataset), self.schedule.batch_size, self.schedule.seed)

    def create_accelerator_and_postprocess(self) -> None:
        with unseen_by_accelerate():
            super().create_accelerator_and_postprocess()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The first thing done once a checkpoint has been read: here the parameters become shares, where they do."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        if sharded():
            self.running = shared_out(self.objective, self.args.device, self.title)
        trained = dict(self.running.named_parameters())
        groups = [
            {"params": [trained[names[id(p)]] for p in group.parameters], "lr": group.learning_rate}
            for group in self.groups
        ]
        # Scales and gradients of small models are tiny: Adam's usual epsilon would be the larger part of the divisor.
        self.optimizer = WholeAdamW(
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

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """What is shared out needs no wrapping; the Trainer wraps what is not for several processes."""
        if self.running is self.objective:
            return super()._wrap_model(model, training, dataloader)
        return self.running

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """What counts in all micro-batches of a step, of all processes."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(self._counted(batch) for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum") if self.processes > 1 else count

    def _counted(self, batch: dict[str, Tensor]) -> int:
        """What the mean of a batch's loss is over."""
        labels, mask = batch.get("labels") if self.takes_labels else None, batch.get("attention_mask")
        if labels is not None:
            return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())
        return batch["input_ids"].numel() if mask is None else int(mask.sum())

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        known = ("input_ids", "attention_mask", *(["labels"] if self.takes_labels else []))
        given = {name: t for name, t in batch.items() if name in known or (self.whole and name != "row")}
        loss: Tensor = model(**given)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._loss(model, inputs)
        if not bool(torch.isfinite(loss.detach())):
            step, part = self.state.global_step + 1, len(self.parts) + 1
            of = f" of {self.schedule.accumulation}" if self.schedule.accumulation > 1 else ""
            raise CompressError(
                f"{self.title}: the loss of step {step} is {float(loss.detach())}, in batch {part}{of}: windows "
                f"{', '.join(map(str, inputs['row'].tolist()))} of the training text. Lower learning_rate, or look at "
                "that text."
            )
        self.tokens += inputs["input_ids"].numel() * self.processes
        return loss * (self._counted(inputs) * self.processes / max(int(num_items_in_batch), 1))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.parts.append(loss)
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """What groups want to be done to their parameters after a step."""
        for group, own in zip(self.groups, self.optimizer.param_groups, strict=True):
            if group.settle is not None:
                for parameter in own["params"]:
                    group.settle(local(parameter.detach()), own["lr"])

    def end_step(self, due: bool) -> bool:
        """Notes the loss of the step that is done, of all micro-batches and processes. Whether a checkpoint is `due`
        the first process decides for all: returned."""
        loss = torch.stack(self.parts).sum()
        self.parts = []
        if self.processes > 1:
            first = torch.tensor(float(due and self.is_world_process_zero()), device=loss.device)
            loss, first = self.accelerator.reduce(torch.stack([loss / self.processes, first]), "sum")
            due = bool(first > 0)
        self.losses.append(float(loss))
        return due

    @torch.no_grad()
    def evaluate_held_out(self, step: int) -> float:
        """The loss on the held-out windows; the weights are kept where it is the lowest so far."""
        assert self.held_out is not None
        self.running.eval()
        data, lost, count = WindowsDataset(self.held_out), 0.0, 0
        size = int(self.args.per_device_train_batch_size)
        for start in range(0, len(data), size):
            batch = together([data[index] for index in range(start, min(start + size, len(data)))])
            batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            with self.compute_loss_context_manager():
                counted = self._counted(batch)
                lost, count = lost + float(self._loss(self.running, batch)) * counted, count + counted
        free_gathered(self.running)
        loss = lost / max(count, 1)
        if not self.evaluations or loss < min(entry["loss"] for entry in self.evaluations):
            self.best = {name: value.clone() for name, value in self._values().items()}
        self.evaluations.append({"step": step, "loss": loss})
        return loss

    @property
    def best_step(self) -> int | None:
        """The step of the lowest loss on held-out text."""
        if not self.evaluations:
            return None
        return int(min(self.evaluations, key=lambda entry: entry["loss"])["step"])

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought nothing."""
        patience, best = self.schedule.patience, self.best_step
        later = [entry for entry in self.evaluations if best is not None and entry["step"] > best]
        return bool(patience) and len(later) >= patience

    def ended_at(self, checkpoint: Path) -> bool:
        """Whether training ended early at this checkpoint; then it is as it was there."""
        self._load_from_checkpoint(str(checkpoint))
        return self.exhausted

    @torch.no_grad()
    def bring_back(self) -> None:
        """The values of the shares, where there are any, into the objective's own parameters."""
        if self.running is not self.objective:
            values = self._values()
            for name, parameter in self._trained():
                parameter.copy_(values[name])

    @torch.no_grad()
    def take_best(self) -> None:
        """Back to the weights of the best evaluation."""
        for name, parameter in self._trained():
            if name in self.best:
                parameter.copy_(self.best[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained and the losses so far; the Trainer adds its own state, last of all `trainer_state.json`. All
        processes gather, the first writes."""
        assert output_dir is not None
        trained = {name: value.contiguous() for name, value in self._values().items()}
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        save_file(trained, os.path.join(output_dir, _TRAINED))
        if self.best:
            save_file({n: t.contiguous() for n, t in self.best.items()}, os.path.join(output_dir, _BEST))
        said = {"losses": self.losses, "evaluations": self.evaluations}
        Path(output_dir, _LOSSES).write_text(json.dumps(said), encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            self.optimizer.state_dict()  # the first process asks for it as well, and they gather it together
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(os.path.join(resume_from_checkpoint, _TRAINED))
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(stored[name])
        said = json.loads(Path(resume_from_checkpoint, _LOSSES).read_text(encoding="utf-8"))
        self.losses, self.evaluations = said["losses"], said["evaluations"]
        if os.path.exists(os.path.join(resume_from_checkpoint, _BEST)):
            self.best = load_file(os.path.join(resume_from_checkpoint, _BEST))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.objective.named_parameters() if p.requires_grad)

    def _values(self) -> dict[str, Tensor]:
        """What is trained, as it is now: whole tensors, for which all processes have to ask together."""
        return {name: whole(p.detach()) for name, p in self.running.named_parameters() if p.requires_grad}


class _Watch(TrainerCallback):  # type: ignore[misc]
    """After each step: its loss, progress, evaluation where it is due, and a checkpoint by the clock."""

    def __init__(self, trainer: _Trainer, step: Step, keeps: bool):
        self.trainer, self.step, self.keeps = trainer, step, keeps
        self.saved = self.begun = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.monotonic()
        if state.global_step:
            self.step.advance(parts=state.global_step)
        elif self.trainer.held_out is not None:
            self.trainer.evaluate_held_out(0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.settle()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        trainer, schedule = self.trainer, self.trainer.schedule
        due_by_clock = trainer.end_step(self.keeps and time.monotonic() - self.saved > CHECKPOINT_SECONDS)
        speed = trainer.tokens / max(time.monotonic() - self.begun, 1e-9)
        last = f", held out {trainer.evaluations[-1]['loss']:.4f}" if trainer.evaluations else ""
        self.step.advance(f"loss {trainer.losses[-1]:.4f}{last}, {speed:,.0f} tokens/s")
        due = schedule.evaluate_every and state.global_step % schedule.evaluate_every == 0
        if trainer.held_out is not None and (due or state.global_step == schedule.steps):
            trainer.evaluate_held_out(state.global_step)
            control.should_training_stop = control.should_training_stop or trainer.exhausted
        if due_by_clock:
            control.should_save = True
            self.saved = time.monotonic()
        return control


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's own talk: the progress is ours."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
