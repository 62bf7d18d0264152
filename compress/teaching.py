"""The teacher of a run: which model it is, what is wanted of it, and whether it has said it already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.distillation import Distillation, Taught, Teacher, even_pairs
from compress.errors import StartError
from compress.locating import locate
from compress.losses import KL, Attention, Hidden, Loss
from compress.opening import read_config, read_tokenizer
from compress.teacher_cache import (
    Kept,
    TeacherCache,
    cache_folder,
    folder_digest,
    open_cache,
    tokenizer_digest,
    weights_digest,
)
from compress.training import train
from compress.training_schedule import Group, Schedule, Training

if TYPE_CHECKING:
    from compress.data import Windows
    from compress.model import ModelHandle
    from compress.passes.base import Context

#: Losses that compare what the two models make of the same tokens.
TOKEN_WISE = ("kl", "hidden", "attention")


class TeacherSource:
    """A teacher that is opened when it is needed: its config, tokenizer and identity are known without."""

    def __init__(self, name: str | None, model: ModelHandle, context: Context):
        self.folder = context.original_folder if name is None else locate(name)
        self.tokenizer_given = context.tokenizer
        self._open: Callable[[], PreTrainedModel] | None = context.original
        if name is not None:
            from compress.loading import load

            self._open = lambda: load(str(self.folder), model.device, model.dtype)
        if self._open is None:
            raise StartError("distill learns from a teacher: give original=... (a model or its folder), or teacher.")
        self.dtype = str(model.dtype)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The teacher, opened on first use."""
        assert self._open is not None
        return self._open().eval().requires_grad_(False)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config if self.folder is None else read_config(self.folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its own; where it lies in no folder, the one of the texts."""
        return self.tokenizer_given if self.folder is None else read_tokenizer(self.folder)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells it from other teachers, for a cache."""
        weights = weights_digest(self.model) if self.folder is None else folder_digest(self.folder)
        return {"teacher": weights, "dtype": self.dtype, "tokenizer": tokenizer_digest(self.tokenizer)}

    def speaks_like(self, tokenizer: PreTrainedTokenizerBase | None) -> bool:
        """Whether its tokens are those of `tokenizer`; so taken where one of the two is not known."""
        if self.tokenizer is None or tokenizer is None:
            return True
        return tokenizer_digest(self.tokenizer) == tokenizer_digest(tokenizer)


def width_of(config: PretrainedConfig) -> int:
    """Columns of the logits that the model of a config gives; 0 for one that gives none."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith("Classification"):
        return int(config.num_labels)
    return 0 if name.endswith("Model") else int(config.get_text_config().vocab_size)


def blocks_of(config: PretrainedConfig) -> int:
    """Transformer blocks of the model of a config."""
    return int(config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class Lesson:
    """All that a training run needs of the teacher: the texts with what it said of them, the teacher itself where it
    has to be asked in every step, what is compared with what."""

    texts: Taught
    kept: Kept
    pairs: list[list[tuple[int, int]]]
    teacher: Teacher | None
    cache: TeacherCache | None


def pairs_of(losses: Sequence[Loss], mine: int, other: int) -> list[list[tuple[int, int]]]:
    """For each loss the (student block, teacher block) pairs that it compares; StartError for blocks that are not
    there."""
    found = []
    for loss in losses:
        term, pairs = loss.term, []
        if isinstance(term, Hidden | Attention):
            pairs = [(mine - 1, other - 1)] if isinstance(term, Attention) else even_pairs(mine, other)
            pairs = sorted(term.layers.items()) if isinstance(term.layers, dict) else pairs
            for block, aim in pairs:
                if not (0 <= block < mine and 0 <= aim < other):
                    raise StartError(
                        f"losses.{loss.kind}.layers: {block}: {aim} is not there; the student has blocks 0 to "
                        f"{mine - 1}, the teacher 0 to {other - 1}."
                    )
        found.append(pairs)
    return found


def lesson(
    source: TeacherSource, student: PreTrainedModel, losses: Sequence[Loss], windows: Windows, *, top_k: int | None,
    cache: str, on_policy: bool, tasks: Tensor | None, context: Context,
) -> Lesson:  # fmt: skip
    """The texts with what the teacher says of them: taken from its cache, or to be asked for in every step."""
    kinds = {loss.kind for loss in losses}
    if not kinds & set(TOKEN_WISE):
        return Lesson(Taught(windows, None, tasks), Kept(0, width_of(student.config)), [[] for _ in losses], None, None)
    pairs = pairs_of(losses, blocks_of(student.config), blocks_of(source.config))
    shared = min(width_of(student.config), width_of(source.config))
    layers = {other for loss, found in zip(losses, pairs, strict=True) for _, other in found if loss.kind == "hidden"}
    temperatures = sorted({loss.term.temperature for loss in losses if isinstance(loss.term, KL)})
    k = min(top_k or 0, shared) if temperatures else 0
    kept = Kept(k, shared, tuple(temperatures), tuple(sorted(layers)))
    attention = "attention" in kinds

    def asked() -> Teacher:
        return Teacher(source.model, kept.layers, attention)

    if cache == "off" or attention or (temperatures and top_k is None):
        return Lesson(Taught(windows, None, tasks), kept, pairs, asked(), None)
    found = open_cache(cache_folder(cache), source.identity, windows, kept, lambda: asked().said, context.progress)
    return Lesson(Taught(windows, found, tasks), kept, pairs, asked() if on_policy else None, found)


def untaught(windows: Windows, tasks: Tensor | None, student: ModelHandle) -> Lesson:
    """Texts without a teacher: what a control learns from."""
    return Lesson(Taught(windows, None, tasks), Kept(0, width_of(student.config)), [[]], None, None)


def teacher_areas(
    source: TeacherSource, found: Lesson, measure: Callable[[PreTrainedModel, Any], dict[str, Any]], name: str
) -> dict[str, Any]:
    """The teacher's accuracies, measured once for all runs where there is a cache."""
    if found.cache is None:
        return measure(source.model, source.tokenizer)
    return found.cache.once(name, lambda: measure(source.model, source.tokenizer))


def teach(
    model: ModelHandle, losses: Sequence[Loss], found: Lesson, schedule: Schedule, rate: float, *, title: str,
    on_policy: float, folder: Path | None, context: Context,
) -> Training:  # fmt: skip
    """One training run of a student, in place."""
    from compress.trainable import trainable

    student = model.model
    projections = _projections(student, losses, found, schedule.seed)
    padding = getattr(context.tokenizer, "pad_token_id", None) or 0
    eager = any(loss.kind == "attention" for loss in losses)
    beside = found.teacher.model if found.teacher else student
    with _eager(student, eager), _eager(beside, eager), trainable(model, rate, title) as groups:
        more = [Group(list(projections.parameters()), rate)] if len(projections) else []
        share = on_policy if found.teacher is not None else 0.0
        objective = Distillation(
            student, losses, found.kept, found.teacher, found.pairs, projections, share, padding
        )  # fmt: skip
        return train(
            objective, [*groups, *more], found.texts, schedule, title=title, device=model.device, folder=folder,
            progress=context.progress,
        )  # fmt: skip


@contextmanager
def _eager(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Attention maps exist only where the plain kernel computes them."""
    before = model.config._attn_implementation
    if wanted:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if wanted:
            model.set_attn_implementation(before)


def _projections(model: PreTrainedModel, losses: Sequence[Loss], found: Lesson, seed: int) -> nn.ModuleDict:
    """A matrix from the student's width to the teacher's for each pair of blocks that a hidden loss compares; none
    where the widths are the same. It is trained along, and not kept."""
    mine = int(model.config.get_text_config().hidden_size)
    wanted = [pair for loss, pairs in zip(losses, found.pairs, strict=True) if loss.kind == "hidden" for pair in pairs]
    if not wanted:
        return nn.ModuleDict()
    other = _width(found)
    if mine == other:
        return nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {f"{block}-{aim}": nn.Linear(mine, other, bias=False) for block, aim in wanted}
    return nn.ModuleDict(made).to(model.device)


def _width(found: Lesson) -> int:
    """The teacher's hidden size."""
    if found.teacher is not None:
        return int(found.teacher.model.config.get_text_config().hidden_size)
    assert found.cache is not None
    return int(found.cache[0][f"hidden.{found.kept.layers[0]}"].shape[-1])
