"""What a checkpoint format is, and what there is to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compress.checkpoint import TensorSpec, checkpoint_bytes

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from compress.maths.grid import QuantSpec


@dataclass(frozen=True)
class Contents:
    """A model to be written: its tensors one at a time, and what belongs beside them.

    `tensors` announces every tensor by its name in the model's state dict, tied ones once; `read(name)` is called once
    per tensor, in that order, so memory stays at the largest tensor if `read` keeps nothing. Tensors of quantized
    layers are those of `QuantLinear`; `quantization` has the spec of each such layer by its name in the model;
    `adapter`: whether one stands beside the model, which plain peft is to put in; `runtime`: how `compress.load` is to
    run it, where that is not the default.
    """

    config: PretrainedConfig
    architecture: str
    dtype: torch.dtype
    tensors: Sequence[TensorSpec]
    read: Callable[[str], Tensor]
    quantization: Mapping[str, QuantSpec] = field(default_factory=dict)
    generation_config: GenerationConfig | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    history: Sequence[Mapping[str, Any]] = ()
    card: str = ""
    adapter: bool = False
    runtime: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The unquantized architecture, without weights."""
        from compress.loading import skeleton

        return skeleton(self.config, self.dtype, self.architecture)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """`layer_kinds` of the unquantized architecture."""
        return layer_kinds(self.skeleton)

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        card: str = "",
    ) -> Contents:
        """The contents of a model that is in memory."""
        from compress.nn.quant_linear import QuantLinear

        tied = set(model.all_tied_weights_keys)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
        return cls(
            config=model.config,
            architecture=type(model).__name__,
            dtype=model.dtype,
            tensors=[TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()],
            read=state.__getitem__,
            quantization={name: m.spec for name, m in model.named_modules() if isinstance(m, QuantLinear)},
            generation_config=model.generation_config if model.can_generate() else None,
            tokenizer=tokenizer,
            history=history,
            card=card,
        )


class Format(ABC):
    """A way to store a model that others read. Stateless; registered by name in `registry.FORMATS`."""

    name: ClassVar[str]
    #: The name in `registry.RUNTIMES` of what reads this format, where that is not transformers. A run that exports it
    #: loads it so in a fresh process and compares, before it counts as done.
    runtime: ClassVar[str | None] = None

    @abstractmethod
    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        """One sentence on why this model cannot be held, or None. Needs no weights.

        `dtype` is the model's, `kinds` what `layer_kinds` says, `specs` the quantized layers by name.
        """

    def refuses_grid(self, grid: str) -> str | None:
        """One sentence on why no layer rounded on this grid (a key of `NAMED_GRIDS`) can be held, or None. Needs no
        model: a recipe is refused as it is read."""
        return None

    def refuses_model(self, contents: Contents) -> str | None:
        """One sentence on why this architecture or these shapes cannot be held, or on what is not installed; or None.

        Needs no weights, and no tokenizer.
        """
        return None

    def refuses_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> str | None:
        """One sentence on why this tokenizer cannot be held beside a model of this config, or None."""
        return None

    def refusal(self, contents: Contents) -> str | None:
        """Why the contents cannot be held, all but their tokenizer looked at; or None."""
        return self.refuses(contents.dtype, contents.kinds, contents.quantization) or self.refuses_model(contents)

    def stored(self, contents: Contents) -> Sequence[TensorSpec]:
        """The tensors that `write` stores. None is read, so the contents may be a model without weights."""
        return contents.tensors

    def file_bytes(self, contents: Contents) -> int:
        """Bytes of the weights' files that `write` makes. None is read."""
        return checkpoint_bytes(self.stored(contents))

    def allowed_difference(self, contents: Contents) -> float:
        """The most by which log-likelihoods (nats a token, in the mean) may differ when `runtime` runs what was
        written, by the arithmetic of that runtime. The square of it is the most that KL may be: noise of deviation s
        in the logits costs s**2 / 2."""
        return 1e-3

    def allowed_exactly(self, contents: Contents) -> float:
        """As `allowed_difference`, of `Runtime.exact`: what is left is what the model in memory rounds itself,
        everything to 16 bits, or the weights of asymmetric grids, which it multiplies in their scales' dtype."""
        if contents.dtype != torch.float32:
            return 0.2 if contents.dtype == torch.bfloat16 else 0.03
        return 1e-3 if all(spec.symmetric for spec in contents.quantization.values()) else 1e-2

    @abstractmethod
    def write(self, folder: Path, contents: Contents) -> None:
        """Write everything into `folder`, which exists and is empty. `write_model_folder` makes that atomic."""


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each layer that could be quantized, "Linear", "Conv1D" (GPT-2's) or "Embedding", by its name in the
    model.

    Packed layers count as what they replaced. The model may be on the meta device.
    """
    from transformers.pytorch_utils import Conv1D

    from compress.nn.quant_embedding import QuantEmbedding, TiedHead
    from compress.nn.quant_linear import QuantLinear

    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantEmbedding | nn.Embedding):
            kinds[name] = "Embedding"
        elif isinstance(module, TiedHead):
            kinds[name] = "Linear"
        elif isinstance(module, QuantLinear):
            kinds[name] = "Conv1D" if module.transposed else "Linear"
        elif isinstance(module, nn.Linear | Conv1D):
            kinds[name] = "Conv1D" if isinstance(module, Conv1D) else "Linear"
    return kinds


def foreign(name: str, specs: Mapping[str, QuantSpec]) -> str | None:
    """Why the format `name`, of integer grids, cannot hold these layers: some are bitsandbytes'. Or None."""
    from compress.nn.bnb_linear import BnbSpec

    if any(isinstance(spec, BnbSpec) for spec in specs.values()):
        return f"{name} does not hold the layers that the pass bnb makes; they are written as bitsandbytes."
    return None


def grid_of_its_own(specs: Mapping[str, QuantSpec]) -> str | None:
    """The grid of the first layer that has super-blocks or lies on a trellis, or None: formats of plain integers with a
    scale for each group do not hold it."""
    return next((spec.grid for spec in specs.values() if spec.super_block is not None or spec.trellis), None)


def own_grid_in_words(name: str, grid: str) -> str | None:
    """Why the format `name`, of plain integers, cannot hold layers on this grid, if it is one of its own; or None."""
    from compress.maths.named_grids import SUPER_BLOCKS, TRELLIS

    if grid == TRELLIS:
        return (
            f"{name} holds codes that each stand for a number, and on grid trellis they do so with their neighbours: "
            f"model/ has the rounded weights unpacked and exports/packed has them packed. {name} holds what is rounded "
            "with `grid` left out (in quantize: `grid: integer`)."
        )
    if grid not in SUPER_BLOCKS:
        return None
    return (
        f"{name} holds a scale for each group, and no super-blocks, which grid {grid} has: export gguf holds them, and "
        f"model/ has the rounded weights unpacked; {name} holds what is rounded with bits, group_size and symmetric in "
        "the grid's place."
    )


def of_kind(kind: str, kinds: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Those of `names` that are layers of this kind."""
    return [name for name in names if kinds.get(name) == kind]
