"""LoRA: matrices of low rank beside the weights learn what compression cost, or a job.

Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685: y = W x + (alpha / r) B A x, W
staying as it is. Dettmers et al.: "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv 2305.14314: W may be
packed. The adapters are peft's, the options have its names.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from compress.errors import StartError
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import Context, Pass, PassResult
from compress.passes.end_to_end import _Imitation
from compress.precision import Precision, trains_in_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.checkpoint import TensorSpec
    from compress.data import Windows
    from compress.model import ModelHandle
    from compress.shapes import ModelShape
    from compress.training_schedule import Training

#: Windows of training text that merged weights are rounded on, where there is no calibration text.
CALIBRATION_WINDOWS = 128


class LoRA(Pass):
    """Train low-rank adapters: to win back what compression cost, or for a task; kept beside the model, or merged."""

    name: ClassVar[str] = "lora"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse", "quantized", "adapter"})
    needs_training: ClassVar[bool] = True

    purpose: Literal["recover", "task"] = Field(
        default="recover",
        description="recover: be again as the original model was. task: learn what the training text shows.",
    )
    learn_from: Literal["original", "text"] | None = Field(
        default=None,
        description="original: the original model's own distribution on the training text; text: the text itself. "
        "Default: original to recover, text for a task.",
    )
    r: int | Literal["auto"] = Field(
        default=16, description="Rank. auto: each layer's own, by the spectrum of its damage, within `parameters`."
    )
    parameters: int | str = Field(
        default="2%", description="With r: auto, most parameters of all adapters, or their share of the model's."
    )
    lora_alpha: float | None = Field(
        default=None,
        gt=0,
        description="Numerator of the scaling alpha / r (alpha / sqrt(r) with use_rslora); null: 2 r.",
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of an adapter's input in training.")
    target_modules: list[str] | str | None = Field(
        default=None,
        description="Layers with an adapter: names or ends of names, or a regular expression of the full name; all "
        "linear layers of the blocks if absent.",
    )
    use_dora: bool = Field(default=False, description="DoRA: a trained magnitude for each output besides.")
    use_rslora: bool = Field(default=False, description="Scaling by alpha / sqrt(r) instead of alpha / r.")
    init_lora_weights: Literal["default", "gaussian", "pissa", "eva", "loftq", "repair"] = Field(
        default="default",
        description="Where adapters begin. pissa: at the weights' principal directions (dense bases); eva: at those of "
        "the inputs; loftq: at the best for what rounding or pruning took; repair: at what the pass repair "
        "left, or block_distill.",
    )
    modules_to_save: list[str] | None = Field(
        default=None,
        description="Modules outside the blocks trained whole beside the adapters, as a classifier's head.",
    )
    merge: bool = Field(
        default=False,
        description="true: put the adapters into the weights; packed ones are rounded anew on calibration text. false: "
        "they stay beside the model, in DIR/adapter.",
    )
    tokens: int = Field(
        default=1_000_000, ge=1, description="Tokens of training text to see, text seen again counted again."
    )
    epochs: float | None = Field(
        default=None, gt=0, description="How often the training text is gone through, instead of `tokens`."
    )
    batch_size: int = Field(default=8, ge=1, description="Windows or items of text in a step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Of these, how many are computed at once; must divide batch_size. null: all, or as many as the "
        "recipe's `memory` has room for.",
    )
    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="Peak learning rate.")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of the adapters.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Longest gradient; longer ones are shortened. 0: any.")
    held_out: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the training text that is kept back and evaluated on (64 windows at most); the best "
        "weights on it are kept. 0: none, and the last weights are.",
    )
    evaluations: int = Field(default=20, ge=1, description="How often the held-out text is evaluated on.")
    patience: int = Field(
        default=5, ge=0, description="Evaluations without a better one after which it ends; 0: never."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Keep only the inputs of blocks for the gradient and run them again: less memory."
    )
    keep_unpacked: bool = Field(
        default=False,
        description="Keep packed weights unpacked while training: faster, and takes the dense model's memory.",
    )
    precision: Precision = "auto"

    @field_validator("r")
    @classmethod
    def _rank(cls, value: int | str) -> int | str:
        if value == "auto" or (isinstance(value, int) and value >= 1):
            return value
        raise ValueError(f"r is {value}: use a rank of at least 1, or auto")

    @field_validator("parameters")
    @classmethod
    def _budget(cls, value: int | str) -> int | str:
        try:
            fits = value >= 1 if isinstance(value, int) else value.endswith("%") and 0 < float(value[:-1]) <= 100
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"parameters is {value}: use a number of at least 1, or a share as in 2%")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.init_lora_weights == "repair" and self.r == "auto":
            raise ValueError("r is auto, but with init_lora_weights: repair the ranks are those of repair: leave r out")
        if self.init_lora_weights == "pissa" and self.use_dora:
            raise ValueError("init_lora_weights is pissa, which has no form with use_dora: leave one out")
        return self

    @property
    def leaves(self) -> str:  # type: ignore[override]
        """Merged adapters leave the base in the state that it had."""
        return "dense" if self.merge else "adapter"

    @property
    def imitates(self) -> bool:
        """Whether the original model's own distribution is the aim."""
        return (self.learn_from or ("original" if self.purpose == "recover" else "text")) == "original"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return self.imitates or self.purpose == "recover" or self.r == "auto" or self.init_lora_weights == "loftq"

    @property
    def changes_outside(self) -> bool:  # type: ignore[override]
        return self.merge and bool(self.modules_to_save)

    def refuses(self, model: PreTrainedModel) -> str | None:
        if self.imitates or hasattr(model, "score") or hasattr(model, "classifier") or model.get_output_embeddings():
            return None
        return f"{type(model).__name__} has no head that says a next token or a class, so it cannot learn from text."

    def reshape(self, model: ModelHandle) -> None:
        """Nothing changes its shape; what cannot be is refused by the plan already."""
        self._layers(model)
        if self.merge:
            model.states.discard("adapter")

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Trains adapters, then merges them or sets them beside the model; keeps every block."""
        from compress.adapters import layers_of
        from compress.held_out import quality, split
        from compress.lora_start import begin
        from compress.merging import give_back, merge_all, set_beside
        from compress.targets import sides

        layers = self._layers(model)
        if context.training is None:
            raise StartError(f"{self.name} needs training text: give training=[...] (texts or token ids).")
        if not model.resident:
            raise StartError(f"{self.name} trains the whole model at once: use residency: memory.")
        original = self._original(context)
        weights = sum(block.matrix_weights() for block in model.block_list())
        training, held_out = split(context.training, self.held_out, context.seed)
        measured: dict[str, Any] = {}
        scored = partial(quality, original=original) if original is not None else quality
        if held_out is not None:
            measured["before"] = scored(model.model, held_out)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            start = begin(self, model, layers, original, training)
        reached = sum(math.prod(sides(layer)) for layer in layers_of(model.model).values())
        own = sum(p.numel() for p in self._trainable(model.model))
        try:
            result = self._train(model, training, held_out, original, context)
        except BaseException:
            give_back(model, start)
            raise
        if held_out is not None:
            measured["after"] = scored(model.model, held_out)
        records = [{"name": block.name, "error": None} for block in model.block_list()]
        if self.merge:
            text = context.calibration or training.select(torch.arange(min(CALIBRATION_WINDOWS, len(training))))
            score = None if held_out is None else partial(scored, windows=held_out)
            records = merge_all(model, text, context, score, measured, self.name) or records
        else:
            set_beside(model, start, context)
        if context.stage is not None:
            for block, record in zip(model.block_list(), records, strict=True):
                context.stage.keep(block, record)
        said: dict[str, Any] = {"losses": result.summary(), "steps": len(result.losses), "parameters": own}
        said["parameters_share"] = own / (weights + sum(t.numel() for t in model.outside().values()))
        if result.evaluations:
            said |= {"held_out_losses": result.evaluations, "best_step": result.best_step}
        if measured:
            said["held_out"] = {name: dict(values) for name, values in measured.items()}
        return PassResult(model, records, reached / weights, said)

    def _layers(self, model: ModelHandle) -> dict[str, nn.Module]:
        """The layers that get an adapter; StartError for what this model or its state does not allow."""
        from compress.targets import select, sides

        layers = select(model, self.target_modules, self.name)
        if not layers:
            raise StartError(f"{self.name}: the blocks of this model have no linear layer.")
        if "adapter" in model.states and self.init_lora_weights != "repair":
            raise StartError(
                f"{self.name}: the model has an adapter already. Train that one on with init_lora_weights: repair, or "
                "leave out the pass that made it."
            )
        if self.init_lora_weights == "repair" and "adapter" not in model.states:
            raise StartError(
                f"{self.name}: init_lora_weights: repair needs the pass repair before it, or block_distill with train: "
                "low_rank."
            )
        compressed = {"quantized", "sparse"} & model.states
        if self.init_lora_weights == "pissa" and compressed:
            raise StartError(f"{self.name}: pissa takes its start out of dense weights, and these are not: use loftq.")
        if self.init_lora_weights == "loftq" and not compressed:
            raise StartError(f"{self.name}: loftq begins at what rounding or pruning took: put such a pass before it.")
        if self.use_dora and self.merge and "sparse" in model.states:
            raise StartError(f"{self.name}: use_dora has no form that keeps zeros when it is merged: leave one out.")
        for name, layer in layers.items():
            if isinstance(self.r, int) and self.r > min(sides(layer)):
                out, columns = sides(layer)
                raise StartError(
                    f"{self.name}: r is {self.r}, and {name} is [{out}, {columns}]: its rank is {min(out, columns)} at "
                    "most."
                )
        for wanted in self.modules_to_save or ():
            self._saved(model, wanted)
        return layers

    def _saved(self, model: ModelHandle, wanted: str) -> None:
        found = [(n, m) for n, m in model.model.named_modules() if n == wanted or n.endswith(f".{wanted}")]
        tied = {name.rpartition(".")[0] for name in getattr(model.model, "all_tied_weights_keys", None) or {}}
        if not found:
            top = ", ".join(name for name, _ in model.model.named_children())
            raise StartError(f"{self.name}: modules_to_save: {wanted} matches no module; the model has {top}.")
        if any(name in tied or isinstance(module, QuantLinear) for name, module in found):
            raise StartError(
                f"{self.name}: modules_to_save: {wanted} is tied to another module, or packed, and cannot be trained."
            )

    def _original(self, context: Context) -> PreTrainedModel | None:
        if not self.needs_teacher:
            return None
        if context.original is None:
            raise StartError(f"{self.name} learns from the original model: give original=... (a model or its folder).")
        return context.original()

    def _trainable(self, model: nn.Module) -> list[nn.Parameter]:
        from compress import adapters

        return [tensor for tensor in adapters.state(model).values() if isinstance(tensor, nn.Parameter)]

    def _train(
        self, model: ModelHandle, training: Windows, held_out: Windows | None, original: PreTrainedModel | None,
        context: Context,
    ) -> Training:  # fmt: skip
        from compress.nn.kernels import cached
        from compress.objectives import TextLoss, checkpointed
        from compress.training import train
        from compress.training_schedule import Group, Schedule

        per_window = training.tokens.numel() if training.mask is None else int(training.mask.sum())
        per_step = self.batch_size * per_window / len(training)
        tokens = self.tokens if self.epochs is None else self.epochs * per_window
        steps = max(1, round(tokens / per_step))
        bf16 = trains_in_bf16(self.precision, model)
        schedule = Schedule(
            steps, self.batch_size, int(self.warmup * steps), context.seed, bf16, (0.9, 0.999), self.weight_decay,
            self.max_grad_norm, self._accumulation(), max(1, steps // self.evaluations), self.patience,
        )  # fmt: skip
        objective = (
            _Recovery(model.model, original) if self.imitates and original is not None else TextLoss(model.model)
        )
        kept = cached(model.model) if self.keep_unpacked else nullcontext()
        with checkpointed(model.model, self.gradient_checkpointing), kept:
            return train(
                objective, [Group(self._trainable(model.model), self.learning_rate)], training, schedule,
                title=self.name, device=model.device, progress=context.progress, held_out=held_out,
                folder=context.stage.folder / "training" if context.stage else None,
            )  # fmt: skip

    def _accumulation(self) -> int:
        """Micro-batches of a step, on each process."""
        from compress.processes import process_count

        size = self.micro_batch_size or self.batch_size
        return max(1, self.batch_size // (size * process_count()))

    def extra_bytes(self, shape: ModelShape) -> int:
        return sum(self.extra_parts(shape).values())

    def extra_parts(self, shape: ModelShape) -> dict[str, int]:
        """Of the trained values, float32, and of a micro-batch."""
        from compress.adapter_costs import Trained, training_parts

        windows = self.micro_batch_size or self.batch_size
        merged = list(self._sides(shape).values()) if self.merge else []
        trained = Trained(
            self._values(shape), windows, self.gradient_checkpointing, self.needs_teacher, bool(self.held_out),
            self.keep_unpacked, merged,
        )  # fmt: skip
        return training_parts(shape, trained, CALIBRATION_WINDOWS)

    def fitted(self, shape: ModelShape, room: int) -> Self:
        """Fewer windows at once, where the whole batch has no room."""
        if self.micro_batch_size is not None:
            return self
        sizes = [size for size in range(self.batch_size, 0, -1) if self.batch_size % size == 0]
        tried = [self.model_copy(update={"micro_batch_size": size}) for size in sizes]
        found = next((pass_ for pass_ in tried if pass_.extra_bytes(shape) <= room), tried[-1])
        return self if found.micro_batch_size == self.batch_size else found

    def adapter_specs(self, shape: ModelShape) -> list[TensorSpec]:
        """The tensors of the adapter that is left beside the model; with r: auto, one of as many values."""
        from compress.checkpoint import TensorSpec

        if self.merge or self.init_lora_weights == "repair":
            return [] if self.merge else shape.adapter
        whole = {
            n: m for n, m in shape.handle.model.named_modules() if n.split(".")[-1] in (self.modules_to_save or ())
        }
        found = {f"{n}.{key}": tuple(p.shape) for n, m in whole.items() for key, p in m.named_parameters()}
        if self.r == "auto":
            return [TensorSpec("auto", torch.float32, (self._values(shape),))]
        r = self.r * (2 if self.init_lora_weights == "pissa" else 1)
        for name, (out, columns) in self._sides(shape).items():
            found |= {f"{name}.lora_A.weight": (r, columns), f"{name}.lora_B.weight": (out, r)}
            found |= {f"{name}.lora_magnitude_vector": (out,)} if self.use_dora else {}
        return [TensorSpec(f"base_model.model.{name}", torch.float32, sides) for name, sides in found.items()]

    def _sides(self, shape: ModelShape) -> dict[str, tuple[int, int]]:
        from compress.targets import select, sides

        layers = select(shape.handle, self.target_modules, self.name)
        return {name: sides(layer) for name, layer in layers.items()}

    def _values(self, shape: ModelShape) -> int:
        """Trained values; with r: auto, its budget."""
        from compress.lora_start import budget_of

        saved = [m for n, m in shape.handle.model.named_modules() if n.split(".")[-1] in (self.modules_to_save or ())]
        whole: int = sum(parameter.numel() for module in saved for parameter in module.parameters())
        if self.init_lora_weights == "repair":
            return sum(math.prod(spec.shape) for spec in shape.adapter)
        if self.r == "auto":
            return budget_of(self.parameters, shape.handle) + whole
        r = self.r
        return whole + sum(r * (out + columns) + out * self.use_dora for out, columns in self._sides(shape).values())


class _Recovery(_Imitation):
    """As of passes that train a rounded model, but with the adapters' dropout."""

    def train(self, mode: bool = True) -> _Recovery:
        from compress.objectives import switch_adapter_dropout

        switch_adapter_dropout(self, mode)
        return self
