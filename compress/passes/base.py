"""What a pass is: a frozen set of options, and one verb over a model.

A method's file defines a subclass whose fields are its recipe options and nothing else. Everything it works on
comes in as arguments; it keeps no state between calls.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import StartError
from compress.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.calibration import BlockCalibration
    from compress.checkpoint import TensorSpec
    from compress.data import Windows
    from compress.maths.grid import QuantSpec
    from compress.model import Block, ModelHandle
    from compress.shapes import ModelShape
    from compress.workspace import Stage

STATES = ("dense", "sparse", "quantized", "adapter")


@dataclass(frozen=True)
class Context:
    """What a pass is given besides the model.

    `calibration` and `training` hold token ids [samples, length]; `original` opens the model as it was before any pass,
    in the dtype and on the device of the one worked on, `original_folder` is where it lies, if it does;
    `tasks` are the benchmark's test items, by area; `stage` is where finished blocks are kept so that a killed run
    continues there (None: nothing is kept); `min_coverage` is the least share of the blocks' matrix weights the pass
    must change; `tokens_per_batch` bounds the activations in flight; `seed` decides what is drawn at random.
    """

    calibration: Windows | None = None
    training: Windows | None = None
    original: Callable[[], PreTrainedModel] | None = None
    original_folder: Path | None = None
    tasks: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    seed: int = 0
    stage: Stage | None = None
    progress: Progress = field(default_factory=Progress)
    #: The model's tokenizer as it stands, and the documents of a source (None: of the calibration and training text),
    #: for passes that need them (`Pass.needs_documents`).
    tokenizer: PreTrainedTokenizerBase | None = None
    texts: Callable[[str | None], Iterator[str]] | None = None
    min_coverage: float = 0.5
    tokens_per_batch: int = 2048


@dataclass(frozen=True)
class PassResult:
    """The model as the pass left it (the same object, changed in place), and what happened to it.

    `blocks` has one entry a block (name, relative error, what the pass says of each layer); `coverage` is the share
    of all weights of matrices inside the blocks that the pass changed; `measurements` is the pass's own account. A pass
    that removes tokens gives the new `tokenizer` (None if it was given none), and in `kept_tokens` the old id of each
    new one.
    """

    model: Any
    blocks: list[dict[str, Any]]
    coverage: float
    measurements: dict[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    kept_tokens: list[int] | None = None


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
    #: Training text, and the model as it was before any pass, to learn from.
    needs_training: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    #: Whether it changes tensors that belong to no block (embeddings, head), which its stage then keeps as well.
    changes_outside: ClassVar[bool] = False

    #: Whether it leaves a model of another shape, with another config, which its stage then keeps as well.
    structural: ClassVar[bool] = False

    #: Options that name a model, a source of text or a folder (dotted path -> which of them), in a recipe
    #: relative to its folder; and words that are no such name.
    paths: ClassVar[Mapping[str, str]] = {}
    words: ClassVar[frozenset[str]] = frozenset()

    #: Whether it reads whole documents with the tokenizer, not only windows of tokens.
    needs_documents: ClassVar[bool] = False
    #: Options that name a text, as `source` of a data entry does.
    sources: ClassVar[tuple[str, ...]] = ()

    #: Whether it moves scales, or turns, from one layer to another, so that what a layer is given and gives is no
    #: longer the same as before, though the block's output is.
    rescales: ClassVar[bool] = False

    #: False for a pass that only says how the model is to be run. It keeps no blocks, and its coverage is 0.
    changes_weights: ClassVar[bool] = True

    @property
    def takes_calibration(self) -> bool:
        """Whether it needs text with these options."""
        return self.needs_calibration

    @abstractmethod
    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """Changes `model` in place."""

    def refuses(self, model: PreTrainedModel) -> str | None:
        """One sentence on why this pass cannot work on such a model, or None. It may be without weights."""
        return None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """StartError where the pass cannot work with this tokenizer (None: the model has none)."""

    def options(self) -> dict[str, Any]:
        """The options as they stand in a recipe, defaults filled in."""
        return self.model_dump(mode="json")

    def stands_for(self) -> list[Pass]:
        """What the entry of a recipe stands for: this pass, or those that a preset chooses."""
        return [self]

    def reshape(self, model: ModelHandle) -> None:
        """Does to the shapes of a model without weights what `run` does (for the plan). StartError where it cannot."""

    def adapter_specs(self, shape: ModelShape) -> list[TensorSpec]:
        """The tensors of the adapter that the pass leaves beside the model."""
        return []

    def fitted(self, shape: ModelShape, room: int) -> Self:
        """The same pass with options for which `run` allocates at most `room` bytes, as far as it has a choice."""
        return self

    def extra_parts(self, shape: ModelShape) -> dict[str, int] | None:
        """`extra_bytes`, in parts by what they hold."""
        extra = self.extra_bytes(shape)
        return None if extra is None else {"pass": extra}

    def extra_bytes(self, shape: ModelShape) -> int | None:
        """Peak of what `run` allocates beside the model and, if blocks stay on disk, the block at hand; None: not
        known. A `BlockPass` states it by layer instead."""
        return None

    def __call__(
        self,
        model: PreTrainedModel,
        calibration: Iterable[str] | torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        training: Iterable[str | Mapping[str, Any]] | torch.Tensor | None = None,
        original: PreTrainedModel | str | Path | None = None,
        samples: int | None = None,
        length: int | None = None,
        seed: int = 0,
        min_coverage: float = 0.5,
        progress: Progress | None = None,
    ) -> PassResult:
        """Applies the pass to a loaded model, in place; the result's `.model` is the same object, unless the pass was
        told to make another one.

        `calibration`: texts (then `tokenizer` cuts them into windows of `length` tokens, `samples` of them drawn at
        random by `seed`; the defaults are a recipe's), or token ids [samples, length] (int64), used as they are.
        `training`: likewise, for passes that train; an item may also be a mapping, as a line of a .jsonl file has it
        (`prompt` and `completion`, `messages`, `text` and `label`). `original`: the model, or the folder of the model,
        that such a pass learns from.
        """
        from compress.model import ModelHandle

        handle = ModelHandle.wrap(model)
        refuse_states(self, handle.states)
        refuse_model(self, model)
        texts = _documents(self, calibration, tokenizer)
        windows = partial(_windows, self, handle, tokenizer, length=length, seed=seed)
        by_window = self.takes_calibration and texts is None
        context = Context(
            calibration=windows("calibration", calibration, samples=samples) if by_window else None,
            tokenizer=tokenizer,
            texts=texts,
            training=windows("training", training) if self.needs_training else None,
            original=_opener(original, handle) if original is not None else None,
            original_folder=Path(original) if isinstance(original, str | Path) else None,
            seed=seed,
            min_coverage=min_coverage,
            progress=progress or Progress(),
        )
        result = self.run(handle, context)
        handle.record(self)
        if handle.adapter is not None:
            handle.adapter.attach(model)
        return replace(result, model=handle.model)


def _documents(
    pass_: Pass, calibration: Iterable[str] | torch.Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> Callable[[str | None], Iterator[str]] | None:
    """What reads the documents of a source, or (None) of the calibration text, for a pass that needs them whole; None
    where it gets windows of tokens."""
    from torch import Tensor as Ids

    from compress.data import read_texts

    if not pass_.needs_documents or isinstance(calibration, Ids):
        return None
    if tokenizer is None:
        raise StartError(f"{pass_.name} counts tokens in texts: pass tokenizer=..., or token ids [samples, length].")
    kept = [calibration] if isinstance(calibration, str) else None if calibration is None else list(calibration)

    def documents(source: str | None) -> Iterator[str]:
        if source is not None:
            return read_texts(source, tokenizer)
        if kept is None:
            raise StartError(f"{pass_.name} needs calibration text: pass calibration=[...] (texts or token ids).")
        return iter(kept)

    return documents


def _windows(
    pass_: Pass,
    handle: ModelHandle,
    tokenizer: PreTrainedTokenizerBase | None,
    role: Literal["calibration", "training"],
    text: Iterable[Any] | torch.Tensor | None,
    **how: Any,
) -> Windows:
    """Windows of the text that was given for a role, or StartError where none was; `how` (samples, length, seed) is as
    of `windows_from`."""
    from compress.images import windows_given
    from compress.locating import classes_of

    if text is None:
        raise StartError(f"{pass_.name} needs {role} text: pass {role}=[...] (texts or token ids).")
    config = handle.model.config
    labels = classes_of(config) if role == "training" else None
    return windows_given(text, config, tokenizer, context=handle.context_length, role=role, labels=labels, **how)


def _opener(original: PreTrainedModel | str | Path, like: ModelHandle) -> Callable[[], PreTrainedModel]:
    def opened() -> PreTrainedModel:
        if not isinstance(original, str | Path):
            return original
        from compress.loading import load

        return load(original, like.device, like.dtype)

    return opened


def refuse_states(pass_: Pass, states: Iterable[str]) -> None:
    """Raises when the model is in a state that the pass does not take."""
    for state in states:
        if state not in pass_.accepts and state != "dense":
            allowed = " or ".join(s for s in STATES if s in pass_.accepts)
            raise StartError(f"{pass_.name} takes {allowed} weights, and this model's are {state}.")


def reason_against(pass_: Pass, model: PreTrainedModel) -> str | None:
    """One sentence on why the pass cannot work on such a model, or None: its own reason, or that of all that learn."""
    if (pass_.needs_training or pass_.needs_teacher) and (
        model.config.is_encoder_decoder or model.main_input_name != "input_ids"
    ):
        return f"{type(model).__name__} is not trained here: training text goes into models that read one text."
    return pass_.refuses(model)


def refuse_model(pass_: Pass, model: PreTrainedModel) -> None:
    """Raises where the pass cannot work on this kind of model."""
    reason = reason_against(pass_, model)
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

    @property
    def needs_original(self) -> bool:
        """Whether the pass also asks what each block is given, or gives, in the model as this pass found it."""
        return False

    @abstractmethod
    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """Changes one block in place; returns what is worth reporting (`{"layers": {name: {...}}}`)."""

    def probe(self) -> Windows | None:
        """Tokens for a pass that needs no text and yet has to see how layers are called; its error is not measured."""
        return None

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.walk import walk

        return walk(self, model, context)

    def spec_of(self, layer: LayerShape) -> QuantSpec | None:
        """The grid a changed layer gets, or None where it stays dense. CompressError where the shape forbids it."""
        return None

    def planned(self, model: ModelHandle) -> Self:
        """The pass as the plan plays it through on a model without weights, where its options alone do not say."""
        return self

    def preparing_bytes(self, shape: ModelShape, layers: Sequence[Sequence[LayerShape]], length: int) -> int:
        """Peak of what the pass holds beside the model before it walks; `layers` are those of each block, `length` the
        tokens of a window of text."""
        return 0

    def end_specs(self, model: PreTrainedModel) -> dict[str, QuantSpec]:
        """The grids that the model's embedding and head get, by their names in it; StartError where that cannot be."""
        return {}

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Peak of what the pass holds for a block while the text runs through it, the activations not counted."""
        return 0

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Peak of what the pass itself allocates while it works on a block with these layers (for the plan)."""
        return max((2 * 4 * layer.outputs * layer.inputs for layer in layers), default=0)
