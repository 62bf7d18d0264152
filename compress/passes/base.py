"""What a pass is: a frozen set of options, and one verb over a model.

A method's file defines a subclass whose fields are its recipe options and nothing else. Everything it works on
comes in as arguments; it keeps no state between calls.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import StartError
from compress.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.calibration import BlockCalibration
    from compress.data import Windows
    from compress.maths.grid import QuantSpec
    from compress.model import Block, ModelHandle
    from compress.workspace import Stage

STATES = ("dense", "sparse", "quantized", "adapter")


@dataclass(frozen=True)
class Context:
    """What a pass is given besides the model.

    `calibration` holds token ids [samples, length]; `stage` is where finished blocks are kept so that a killed run
    continues there (None: nothing is kept); `min_coverage` is the least share of the blocks' matrix weights the
    pass must change; `tokens_per_batch` bounds the activations in flight.
    """

    calibration: Windows | None = None
    stage: Stage | None = None
    progress: Progress = field(default_factory=Progress)
    min_coverage: float = 0.5
    tokens_per_batch: int = 2048


@dataclass(frozen=True)
class PassResult:
    """The model as the pass left it (the same object, changed in place), and what happened to it.

    `blocks` has one entry a block (name, relative error, what the pass says of each layer); `coverage` is the share
    of all weights of matrices inside the blocks that the pass changed; `measurements` is the pass's own account.
    """

    model: Any
    blocks: list[dict[str, Any]]
    coverage: float
    measurements: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerShape:
    """One matrix inside a block, as the config describes it. `kind` is "Linear" or "Conv1D"."""

    block: str
    name: str
    outputs: int
    inputs: int
    dtype: torch.dtype
    bias: bool = False
    kind: str = "Linear"


class Pass(BaseModel):
    """One compression method. Subclasses set the class variables and declare their options as fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    #: The states of a model that the pass takes.
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    #: The state it adds to the model; "dense" adds none.
    leaves: ClassVar[str] = "dense"
    needs_calibration: ClassVar[bool] = False
    #: False for a pass that only says how the model is to be run. It keeps no blocks, and its coverage is 0.
    changes_weights: ClassVar[bool] = True

    @abstractmethod
    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Changes `model` in place."""

    def refuses(self, model: PreTrainedModel) -> str | None:
        """One sentence on why this pass cannot work on such a model, or None. It may be without weights."""
        return None

    def options(self) -> dict[str, Any]:
        """The options as they stand in a recipe, defaults filled in."""
        return self.model_dump(mode="json")

    def __call__(
        self,
        model: PreTrainedModel,
        calibration: Iterable[str] | torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        samples: int | None = None,
        length: int | None = None,
        seed: int = 0,
        min_coverage: float = 0.5,
        progress: Progress | None = None,
    ) -> PassResult:
        """Applies the pass to a loaded model, in place; the result's `.model` is the same object.

        `calibration`: texts (then `tokenizer` cuts them into windows of `length` tokens, `samples` of them drawn at
        random by `seed`; the defaults are a recipe's), or token ids [samples, length] (int64), used as they are.
        """
        from compress.data import windows_from
        from compress.model import ModelHandle

        handle = ModelHandle.wrap(model)
        refuse_states(self, handle.states)
        refuse_model(self, model)
        windows = None
        if self.needs_calibration:
            if calibration is None:
                raise StartError(f"{self.name} needs calibration text: pass calibration=[...] (texts or token ids).")
            windows = windows_from(
                calibration, tokenizer, samples=samples, length=length, seed=seed, context=handle.context_length
            )
        context = Context(calibration=windows, min_coverage=min_coverage, progress=progress or Progress())
        result = self.run(handle, context)
        handle.record(self)
        return PassResult(model, result.blocks, result.coverage, result.measurements)


def refuse_states(pass_: Pass, states: Iterable[str]) -> None:
    """Raises when the model is in a state that the pass does not take."""
    for state in states:
        if state not in pass_.accepts and state != "dense":
            allowed = " or ".join(s for s in STATES if s in pass_.accepts)
            raise StartError(f"{pass_.name} takes {allowed} weights, and this model's are {state}.")


def refuse_model(pass_: Pass, model: PreTrainedModel) -> None:
    """Raises where the pass cannot work on this kind of model."""
    reason = pass_.refuses(model)
    if reason:
        raise StartError(f"{pass_.name}: {reason}")


def selected(layer: str, targets: Sequence[str] | None, skip: Sequence[str]) -> bool:
    """Whether `targets` (None: all) and not `skip`, patterns as of the shell, name this layer."""
    wanted = targets is None or any(fnmatch(layer, pattern) for pattern in targets)
    return wanted and not any(fnmatch(layer, pattern) for pattern in skip)


class BlockPass(Pass):
    """A pass that changes the model one transformer block at a time, by `walk()`."""

    targets: list[str] | None = Field(
        None,
        description="Names of the layers inside a block to change, as patterns (`mlp.*`, `*.q_proj`); all if absent.",
    )
    skip: list[str] = Field(
        default_factory=list,
        description="Names of layers inside a block to leave alone, as patterns; stronger than `targets`.",
    )

    @abstractmethod
    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """Changes one block in place; returns what is worth reporting (`{"layers": {name: {...}}}`)."""

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.walk import walk

        return walk(self, model, context)

    def spec_of(self, layer: LayerShape) -> QuantSpec | None:
        """The grid a changed layer gets, or None where it stays dense. CompressError where the shape forbids it."""
        return None

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Peak of what the pass holds for a block while the text runs through it, the activations not counted."""
        return 0

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Peak of what the pass itself allocates while it works on a block with these layers (for the plan)."""
        return max((2 * 4 * layer.outputs * layer.inputs for layer in layers), default=0)
