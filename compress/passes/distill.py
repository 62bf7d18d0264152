"""distill: a student learns from a teacher, by a weighted list of losses.

Probabilities (Hinton et al. 2015, arXiv 1503.02531), both ways and between (Agarwal et al. 2024, GKD, arXiv
2306.13649, section 3, with text that the student writes itself), hidden states (Romero et al. 2015, FitNets, arXiv
1412.6550), attention (Wang et al. 2020, MiniLM, arXiv 2002.10957, section 3.1), the text itself, and reasons (Hsieh et
al. 2023, arXiv 2305.02301).

The student is by default the model as it stands in the recipe, pruned or rounded or whole, and the teacher the model
as it was before any pass. Zeros stay zeros, and packed layers stay packed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from compress.answers import Answers
from compress.errors import StartError
from compress.losses import Labels, Loss, StudentOptions
from compress.passes.base import Context, Pass, PassResult
from compress.passes.end_to_end import TRAINER_BYTES
from compress.precision import Precision, trains_in_bf16

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.data import Windows
    from compress.model import ModelHandle
    from compress.shapes import ModelShape
    from compress.teaching import Lesson, TeacherSource
    from compress.training_schedule import Training

#: The default learning rate of dense weights times the hidden size: 1e-3 at a width of 256, 6e-5 at 4096.
RATE_TIMES_WIDTH = 0.256
#: Texts with classes that are kept back at most, to measure on.
MOST_HELD_BACK = 1024
#: That of packed layers, in units of a layer's mean scale.
PACKED_RATE = 2e-2


class Distill(Pass):
    """Train a student, by default the model as it stands, to say what the original says."""

    name: ClassVar[str] = "distill"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse", "quantized"})
    needs_teacher: ClassVar[bool] = True
    changes_outside: ClassVar[bool] = True
    paths: ClassVar[Mapping[str, str]] = {
        "teacher": "model", "student.source": "model", "answers.prompts": "source", "cache": "folder",
    }  # fmt: skip
    words: ClassVar[frozenset[str]] = frozenset({"model", "teacher", "fresh", "auto", "off"})

    teacher: str | None = Field(
        default=None, min_length=1, description="Folder or hub id of the teacher; the model before any pass if absent."
    )
    student: StudentOptions = Field(default_factory=StudentOptions, description="Who learns.")
    losses: list[Loss] | None = Field(
        default=None,
        min_length=1,
        description="What is learnt, a list of losses with their weights: `[{kl: {temperature: 2}}, {hidden: {weight: "
        "0.1}}, labels]`. If absent: `kl`, of a model without logits `hidden`.",
    )
    top_k: int | None = Field(
        default=32, ge=1, description="Tokens of which the teacher's probability is kept, the others as one; null: all."
    )
    cache: str = Field(
        default="auto",
        min_length=1,
        description="Where what the teacher says is kept, for all epochs and recipes: a folder; auto: "
        "`$XDG_CACHE_HOME/compress/teacher` or `~/.cache/compress/teacher`; off: it is asked in every step.",
    )
    answers: Answers | None = Field(
        default=None,
        description="Learn from what the teacher writes to prompts, in the place of the training text. Then `losses` "
        "are `labels` if absent.",
    )
    generated: int = Field(
        default=0,
        ge=0,
        description="Tokens that the teacher writes itself, added to the training text: what is little is else learnt "
        "by heart. They are kept where `cache` is; of more than is to be seen, given text makes room.",
    )
    steps: int | None = Field(default=None, ge=1, description="Steps of training, in the place of `tokens`.")
    tokens: int = Field(
        default=1_000_000, ge=1, description="Tokens of training text to see, text seen again counted again."
    )
    batch_size: int = Field(default=8, ge=1, description="Windows of text in a step.")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate. Default: 0.256 / hidden size; of packed layers 0.02, in units of a layer's "
        "mean scale.",
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    on_policy: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the batches that the student writes and the teacher judges.",
    )
    control: bool = Field(
        default=False,
        description="Also train the same student for the same steps on the text alone, measure it, and let it go. What "
        "is `generated` is no part of that text: without a teacher nobody writes it.",
    )
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _text_to_add_to(self) -> Self:
        if self.generated and self.answers is not None:
            raise ValueError(
                "generated adds to the training text, and answers take its place: leave one of the two out"
            )
        if self.steps is None and self.generated > self.tokens:
            raise ValueError(
                f"{self.generated} tokens generated are more than the {self.tokens} that are to be seen: raise tokens"
            )
        return self

    @property
    def needs_training(self) -> bool:  # type: ignore[override]
        return self.answers is None or isinstance(self.student.layers, int | str)

    @property
    def structural(self) -> bool:  # type: ignore[override]
        student = self.student
        return student.source != "model" or any((student.layers, student.intermediate_size, student.heads))

    def reshape(self, model: ModelHandle) -> None:
        """Makes the student; a model that cannot be trained is refused by the plan already."""
        from compress.loading import skeleton
        from compress.self_text import check_writes
        from compress.student import make_student

        self._check_student(model)
        if self.generated:
            check_writes(skeleton(self._teacher_config(model), model.dtype), self.name)
        make_student(model, self.student, lambda: skeleton(self._teacher_config(model), model.dtype))

    def _teacher_config(self, model: ModelHandle) -> Any:
        from compress.locating import locate
        from compress.opening import read_config

        return model.config if self.teacher is None else read_config(locate(self.teacher))

    def _check_student(self, model: ModelHandle) -> None:
        from compress.passes.end_to_end import packed_layers

        if "quantized" in model.states:
            if self.structural:
                raise StartError("distill: student: blocks are taken from dense weights; distill before rounding.")
            packed_layers(model, self.name)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Makes the student, trains it, and keeps every block and what is outside them."""
        from compress.sharding import sharded
        from compress.student import make_student
        from compress.teaching import TeacherSource
        from compress.trainable import covered

        if context.training is None and self.answers is None:
            raise StartError("distill needs training text: give training=[...] (texts or token ids).")
        if not model.resident:
            raise StartError("distill trains the whole model at once: use residency: memory.")
        if self.on_policy and sharded():
            raise StartError(
                "distill: on_policy has no form where the weights are shared out (FSDP), since each process would "
                "write texts of another length: leave it out, or train with distributed_type: MULTI_GPU."
            )
        source = TeacherSource(self.teacher, model, context)
        self._check_student(model)
        self._check_tokenizers(source, context)
        make_student(model, self.student, lambda: source.model, context)
        losses = self._losses(model)
        if any(loss.kind == "rationale" for loss in losses) and self.answers is None:
            raise StartError("distill: the loss rationale needs answers: name the prompts that the teacher reasons on.")
        measured = self._trained(model, source, losses, context)
        records: list[dict[str, Any]] = []
        for block in model.block_list():
            records.append({"name": block.name, "error": None, "layers": {}})
            if context.stage is not None:
                context.stage.keep(block, records[-1])
        if context.stage is not None:
            context.stage.keep_outside(model.outside(), model.outside_quantized())
        return PassResult(model, records, covered(model), measured)

    def _check_tokenizers(self, source: TeacherSource, context: Context) -> None:
        """StartError where losses would compare tokens that are not the same ones."""
        from compress.locating import locate
        from compress.opening import read_tokenizer
        from compress.student import OWN
        from compress.teacher_cache import tokenizer_digest
        from compress.teaching import TOKEN_WISE

        given = self.student.source
        if given not in OWN and not given.endswith(".json"):
            own = read_tokenizer(locate(given))
            if own is not None and context.tokenizer and tokenizer_digest(own) != tokenizer_digest(context.tokenizer):
                raise StartError(
                    "distill: student.source: its tokenizer is another than the recipe's model has, by which the text "
                    "is cut. Make the student the recipe's model, and name the other one in distill.teacher."
                )
        wanted = [loss.kind for loss in self._losses(None)]
        compared = [kind for kind in wanted if kind in TOKEN_WISE]
        if compared and not source.speaks_like(context.tokenizer):
            raise StartError(
                f"distill: the teacher's tokenizer is another than the student's, so {compared[0]} has nothing to "
                "compare. Learn from what the teacher writes: use answers with losses: [labels]."
            )
        if self.generated and not source.speaks_like(context.tokenizer):
            raise StartError(
                "distill: the teacher's tokenizer is another than the student's, which cannot read the tokens that it "
                "writes: use answers in the place of generated."
            )

    def _losses(self, model: ModelHandle | None) -> list[Loss]:
        """The losses, or their default for this model (None: for one with logits)."""
        from compress.teaching import width_of

        if self.losses is not None:
            return list(self.losses)
        if self.answers is not None:
            return [Loss(labels=Labels())]
        if model is None:
            return [Loss.model_validate("kl")]
        return [Loss.model_validate("kl" if width_of(model.config) else "hidden")]

    def _trained(
        self, model: ModelHandle, source: TeacherSource, losses: Sequence[Loss], context: Context
    ) -> dict[str, Any]:
        """Trains the student (and the control before it); returns the account of it."""
        from compress.measure.areas import area_scores, class_scores, summarised
        from compress.teaching import lesson, teacher_areas, untaught

        given, tasks = self._texts(model, source, context)
        given, held = _held_back(given, context.seed)
        windows = self._with_written(given, model, source, context)
        found = lesson(
            source, model.model, losses, windows, top_k=self.top_k, cache=self.cache, on_policy=self.on_policy > 0,
            tasks=tasks, context=context,
        )  # fmt: skip

        def areas(of: PreTrainedModel, tokenizer: Any = context.tokenizer) -> dict[str, Any]:
            if held is not None:
                return dict(class_scores(of, held))
            return dict(area_scores(of, tokenizer, context.tasks, model.context_length))

        scores: dict[str, dict[str, Any]] = {}
        if held is not None or (context.tasks and context.tokenizer is not None and model.model.can_generate()):
            asked = held.tokens.tolist() if held is not None else context.tasks
            digest = sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
            scores["teacher"] = teacher_areas(source, found, areas, f"areas-{digest}")
            scores["before"] = _kept(context, "before", lambda: areas(model.model))
        measured: dict[str, Any] = {}
        if self.control:
            scored = areas if scores else None
            alone = untaught(given, tasks, model)
            control = _kept(context, "control", lambda: self._control(model, alone, context, scored))
            measured["control"] = control["losses"]
            if scores:
                scores["control"] = control["areas"]
        result = self._train(model, losses, found, context, self.name, "training")
        if scores:
            scores["after"] = areas(model.model)
            measured["areas"] = summarised(scores, context.seed)
        if found.cache is not None:
            measured["cache"] = {"folder": str(found.cache.folder), "bytes_per_token": found.cache.bytes_per_token}
        if self.generated:
            measured["generated"] = {"tokens": windows.tokens_total - given.tokens_total}
        if self.answers is not None:
            measured["answers"] = {"file": windows.source, "windows": len(windows), "fingerprint": windows.fingerprint}
        steps = self._steps(windows)
        return {
            "losses": result.summary(), "steps": steps, "tokens": steps * self.batch_size * windows.length, **measured,
        }  # fmt: skip

    def _control(self, model: ModelHandle, alone: Lesson, context: Context, areas: Any) -> dict[str, Any]:
        """The same student, trained on the given text alone, and its accuracies where `areas` measures them."""
        from compress.model import ModelHandle

        twin = ModelHandle(copy.deepcopy(model.model), device=model.device)
        twin.states = set(model.states)
        result = self._train(twin, [Loss(labels=Labels())], alone, context, f"{self.name}: control", "control")
        return {"losses": result.summary(), "areas": areas(twin.model) if areas else {}}

    def _train(
        self, model: ModelHandle, losses: Sequence[Loss], found: Lesson, context: Context, title: str, place: str
    ) -> Training:
        """One training run of a student, in place."""
        from compress.teaching import teach
        from compress.training_schedule import Schedule

        rate = self.learning_rate
        if rate is None:
            packed = "quantized" in model.states
            rate = PACKED_RATE if packed else RATE_TIMES_WIDTH / model.config.get_text_config().hidden_size
        steps = self._steps(found.texts.windows)
        bf16 = trains_in_bf16(self.precision, model)
        warmup = int(self.warmup * steps)
        schedule = Schedule(steps, self.batch_size, warmup, context.seed, bf16, max_grad_norm=1.0)
        folder = context.stage.folder / place if context.stage else None
        return teach(
            model, losses, found, schedule, rate, title=title, on_policy=self.on_policy, folder=folder, context=context
        )

    def _texts(self, model: ModelHandle, source: TeacherSource, context: Context) -> tuple[Windows, Tensor | None]:
        """The windows to train on, no more than are needed, and the task of each (None: there is one)."""
        from compress.answers import answer_windows, answers_of, refuse_measured
        from compress.teacher_cache import cache_folder

        if self.answers is None:
            assert context.training is not None
            wanted = self._steps(context.training) * self.batch_size
            return context.training.select(torch.arange(min(wanted, len(context.training)))), None
        if context.tokenizer is None:
            raise StartError("distill: answers are texts, and need a tokenizer: give tokenizer=...")
        rationale = next((loss.rationale for loss in self.losses or [] if loss.rationale is not None), None)
        kept = cache_folder(self.cache)
        path, lines = answers_of(source, self.answers, rationale is not None, kept, context.seed, context.progress)
        refuse_measured(lines, context.tasks)
        return answer_windows(lines, context.tokenizer, rationale, model.context_length, str(path))

    def _with_written(self, given: Windows, model: ModelHandle, source: TeacherSource, context: Context) -> Windows:
        """The windows, and those that the teacher writes, kept beside what it says of them; no more than are seen."""
        from compress.self_text import with_written
        from compress.teacher_cache import cache_folder
        from compress.teaching import width_of

        if not self.generated:
            return given
        stage = None if context.stage is None else context.stage.folder
        folder = stage if self.cache == "off" else cache_folder(self.cache)
        return with_written(
            given, lambda: source.model, self.generated, context, self.name, folder=folder,
            identity={} if folder is None else source.identity, most=self._steps(given) * self.batch_size,
            vocabulary=min(width_of(model.config), width_of(source.config)),
        )  # fmt: skip

    def _steps(self, windows: Windows) -> int:
        return self.steps or max(1, self.tokens // (self.batch_size * windows.length))

    def extra_bytes(self, shape: ModelShape) -> int:
        """The Trainer, the teacher, the student in float32 with gradients and two moments, and a batch's activations;
        with `control`, the student once more. Before that, where the teacher writes, what that takes, if it is more."""
        from compress.maths.divergence import SLICE_VALUES
        from compress.self_text import writing_bytes
        from compress.shapes import ModelShape
        from compress.trainable import COPIES

        values = shape.dense_bytes // shape.dtype.itemsize
        trained = 4 * values * COPIES - (shape.dense_bytes if shape.dtype.itemsize == 4 else 0)
        teacher = shape
        if self.teacher is not None:
            teacher = ModelShape.of(self._teacher_config(shape.handle), shape.dtype)
        writing = writing_bytes(teacher, self.generated, shape.window)
        tokens = self.batch_size * shape.window
        blocks = len(shape.handle.block_list())
        logits = 5 * SLICE_VALUES + 2 * tokens * shape.hidden
        if self.cache == "off" or self.top_k is None or self.on_policy:
            logits += tokens * shape.vocabulary
        activations = 4 * (tokens * 2 * blocks * shape.widest + logits)
        control = shape.dense_bytes if self.control else 0
        return int(TRAINER_BYTES + teacher.original_bytes + max(trained + activations + control, writing))


def _held_back(windows: Windows, seed: int) -> tuple[Windows, Windows | None]:
    """(what is trained on, what the accuracy is measured on): of texts with classes a tenth is kept back, drawn by the
    seed; of others nothing, since the benchmark has items of its own."""
    if windows.labels is None or windows.labels.dim() > 1 or len(windows) < 2:
        return windows, None
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    count = min(MOST_HELD_BACK, max(1, len(windows) // 10))
    return windows.select(order[count:].sort().values), windows.select(order[:count].sort().values)


def _kept(context: Context, name: str, make: Any) -> dict[str, Any]:
    """A result that a continued run takes from its stage."""
    if context.stage is None:
        return dict(make())
    return context.stage.once(name, make)
