"""What passes that train a rounded model as a whole have in common: the original model's distribution is the aim.

The model is rounded before (by `gptq`, say). Its packed layers are exchanged for trainable ones, the whole model is
trained on text by the one training path, and the layers are packed again. No weight outside the packed layers changes
but the norms.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import StartError
from compress.maths.divergence import kl_divergence
from compress.nn.quant_linear import QuantLinear
from compress.passes.base import Context, Pass, PassResult
from compress.precision import Precision, trains_in_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.data import Windows
    from compress.model import ModelHandle
    from compress.nn.trained import Trained
    from compress.shapes import ModelShape
    from compress.training_schedule import Group


#: Passes after which a packed layer stands for the weight that it had before, as near as its grid allows.
ROUNDING = frozenset({"rtn", "gptq", "hqq", "autoround"})

#: What importing transformers' Trainer and accelerate takes.
TRAINER_BYTES = 90 << 20


class EndToEndPass(Pass):
    """A pass that trains packed layers against the original model's logits."""

    accepts: ClassVar[frozenset[str]] = frozenset({"quantized"})
    leaves: ClassVar[str] = "quantized"
    needs_training: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    changes_outside: ClassVar[bool] = True

    tokens: int = Field(
        default=1_000_000, ge=1, description="Tokens of training text to see, text seen again counted again."
    )
    generated: int = Field(
        default=0,
        ge=0,
        description="Tokens that the original model writes itself, added to the training text: what is little is else "
        "learnt by heart.",
    )
    batch_size: int = Field(default=8, ge=1, description="Windows of text in a step.")
    scale_learning_rate: float = Field(
        default=3e-3, gt=0, le=1, description="Peak learning rate of scales, in units of a layer's mean scale."
    )
    norm_learning_rate: float = Field(
        default=1e-3, ge=0, le=1, description="Peak learning rate of norms; 0: left alone."
    )
    warmup: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps over which learning rates rise.")
    precision: Precision = "auto"

    @abstractmethod
    def trained(self, layer: QuantLinear, sparse: bool, original: Tensor | None) -> Trained:
        """The trainable layer that takes the place of this one; where the model is `sparse`, zeros must stay.
        `original`: the weight that was rounded, [out, in], if it is the original model's."""

    @abstractmethod
    def groups(self, layer: Trained) -> list[Group]:
        """The parameters of a trainable layer, with their learning rates."""

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Trains, packs, and keeps every block and the norms outside them."""
        from compress.self_text import with_written
        from compress.training import train
        from compress.training_schedule import Group, Schedule

        windows, teacher, layers = self._needed(model, context)
        place = context.stage.folder if context.stage else None
        windows = with_written(windows, lambda: teacher, self.generated, context, self.name, folder=place)
        sparse, rounded = "sparse" in model.states, only_rounded(model)
        trained = {
            name: self.trained(layer, sparse, original_weight(teacher, name, layer) if rounded else None)
            for name, layer in layers.items()
        }
        norms = norms_of(model) if self.norm_learning_rate else {}
        groups = [group for layer in trained.values() for group in self.groups(layer)]
        if norms:
            groups.append(Group(list(norms.values()), self.norm_learning_rate))
        steps = max(1, self.tokens // (self.batch_size * windows.length))
        bf16 = trains_in_bf16(self.precision, model)
        schedule = Schedule(steps, self.batch_size, int(self.warmup * steps), context.seed, bf16)
        folder = place / "training" if place else None
        with exchanged(model.model, trained, norms):
            result = train(
                _Imitation(model.model, teacher), groups, windows, schedule, title=self.name, device=model.device,
                folder=folder, progress=context.progress,
            )  # fmt: skip
        records = self._records(model, layers)
        if context.stage is not None:
            for block, record in zip(model.block_list(), records, strict=True):
                context.stage.keep(block, record)
            outside = model.outside()
            context.stage.keep_outside({name: outside[name] for name in norms if name in outside})
        covered = sum(layer.in_features * layer.out_features for layer in layers.values())
        measured = {"losses": result.summary(), "steps": steps, "tokens": steps * self.batch_size * windows.length}
        weights = sum(block.matrix_weights() for block in model.block_list())
        return PassResult(model, records, covered / weights, measured)

    def _needed(self, model: ModelHandle, context: Context) -> tuple[Windows, PreTrainedModel, dict[str, QuantLinear]]:
        """The text, the original model and the packed layers in the blocks; StartError for what is not there."""
        if context.training is None:
            raise StartError(f"{self.name} needs training text: give training=[...] (texts or token ids).")
        if context.original is None:
            raise StartError(f"{self.name} learns from the original model: give original=... (a model or its folder).")
        if not model.resident:
            raise StartError(f"{self.name} trains the whole model at once: use residency: memory.")
        layers = packed_layers(model, self.name)
        return context.training, context.original(), layers

    def reshape(self, model: ModelHandle) -> None:
        """Nothing changes its shape; a model that cannot be trained is refused by the plan already."""
        from compress.self_text import check_writes

        packed_layers(model, self.name)
        if self.generated:
            check_writes(model.model, self.name)

    def _records(self, model: ModelHandle, before: dict[str, QuantLinear]) -> list[dict[str, Any]]:
        """For each block and layer: how far the weight moved, relative to itself."""
        records = []
        for block in model.block_list():
            layers: dict[str, Any] = {}
            for name, spec in block.quantized().items():
                old = before[f"{block.name}.{name}"].dequantize(torch.float32)
                now = block.module.get_submodule(name).dequantize(torch.float32)
                size = float(old.square().sum())
                layers[name] = {"bits": spec.bits, "change": float((now - old).square().sum()) / size if size else 0.0}
            records.append({"name": block.name, "error": None, "layers": layers})
        return records

    def extra_bytes(self, shape: ModelShape) -> int:
        """The Trainer, the original model, what is trained with its gradient and two moments of Adam, and a batch's
        activations; before that, where text is written, what that takes, if it is more."""
        from compress.self_text import writing_bytes

        training = self.trained_bytes(shape) + self._activation_bytes(shape)
        writing = writing_bytes(shape, self.generated, shape.window)
        return TRAINER_BYTES + shape.original_bytes + max(training, writing)

    @abstractmethod
    def trained_bytes(self, shape: ModelShape) -> int:
        """Trained values in float32, four times: themselves, gradients, and Adam's two moments."""

    def _activation_bytes(self, shape: ModelShape) -> int:
        """Of a step: every layer's input and output in every block, and logits: the student's, their gradient and the
        teacher's."""
        tokens = self.batch_size * min(256, shape.context)
        blocks = len(shape.handle.block_list())
        return 4 * tokens * (2 * blocks * shape.widest + 3 * shape.vocabulary)


class _Imitation(nn.Module):  # type: ignore[misc]
    """Its forward gives the divergence of the student's distribution from the teacher's, on a batch of windows; of an
    encoder, the error of its last hidden state."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher  # not registered: it is neither trained nor stored

    def train(self, mode: bool = True) -> _Imitation:
        """Stays as it is: dropout would be noise in what is to be imitated."""
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        text = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        with torch.no_grad():
            aim = self.__dict__["teacher"](**text)
        given = self.student(**text)
        if hasattr(given, "logits"):
            return kl_divergence(given.logits, aim.logits, attention_mask)
        return _relative_error(given.last_hidden_state, aim.last_hidden_state, attention_mask)


def _relative_error(given: Tensor, aim: Tensor, mask: Tensor | None) -> Tensor:
    """|given - aim|**2 / |aim|**2, of an encoder's hidden states [batch, length, hidden]."""
    if mask is not None:
        given, aim = given[mask.bool()], aim[mask.bool()]
    return (given.float() - aim.float()).square().sum() / aim.float().square().sum()


def packed_layers(model: ModelHandle, title: str) -> dict[str, QuantLinear]:
    """The packed layers in the blocks, by their names; StartError, naming the pass `title`, where there are none, or
    others as well."""
    layers = {
        f"{block.name}.{name}": block.module.get_submodule(name)
        for block in model.block_list()
        for name in block.quantized()
    }
    if not layers:
        raise StartError(f"{title} trains packed layers, and this model has none: round it first.")
    for name, layer in layers.items():
        if type(layer) is not QuantLinear or layer.spec.stored != "packed":
            raise StartError(
                f"{title} trains packed integers of 2 to 8 bits with scales, as gptq and other rounding passes "
                f"leave them, and {name} is stored in another way (smoothquant, fp8, bnb): leave one out."
            )
    return layers


def only_rounded(model: ModelHandle) -> bool:
    """Whether nothing has changed the original's weights but rounding: not pruning, rotation, scales or training."""
    return all(entry["pass"] in ROUNDING for entry in model.history)


def original_weight(original: nn.Module, name: str, layer: QuantLinear) -> Tensor | None:
    """The weight [out, in], float32, of the layer `name` in the original model, or one block of it; None where there is
    none of that shape."""
    from compress.targets import sides, weight_of

    try:
        weight = weight_of(original.get_submodule(name))
    except AttributeError:
        return None
    return weight if weight.shape == sides(layer) else None


def norms_of(model: ModelHandle) -> dict[str, nn.Parameter]:
    """Float32 copies of the norms' weights, to be trained: all vectors but the biases of matrices."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantLinear) or any(p.dim() > 1 for p in parameters.values()):
            continue
        for name, p in parameters.items():
            if p.dim() == 1 and "norm" in f"{path}.{name}":
                found[f"{path}.{name}"] = nn.Parameter(p.detach().float())
    return found


@contextmanager
def exchanged(model: nn.Module, trained: dict[str, Trained], norms: dict[str, nn.Parameter]) -> Iterator[None]:
    """Trainable layers, and norms in float32, in the place of the model's; afterwards packed layers again, and norms in
    the dtype that they had."""
    dtypes = {name: model.get_parameter(name).dtype for name in norms}
    for name, layer in trained.items():
        model.set_submodule(name, layer)
    for name, parameter in norms.items():
        _set(model, name, parameter)
    try:
        yield
    finally:
        for name, layer in trained.items():
            model.set_submodule(name, layer.packed())
        for name, dtype in dtypes.items():
            _set(model, name, nn.Parameter(norms[name].detach().to(dtype), requires_grad=False))


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = parameter
