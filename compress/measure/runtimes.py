"""What an exported folder runs in. A Runtime opens a folder and gives an Engine, which the benchmark times.

Another runtime is a subclass, registered under the entry point group `compress.runtimes`: docs/adding-a-runtime.md.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import CompressError
from compress.measure.engine import Engine

if TYPE_CHECKING:
    import numpy as np

#: Token ids -> float32 `[ids, vocabulary]`.
Logits = Callable[[Sequence[int]], "np.ndarray"]


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and the name of what loaded it."""

    model: Any
    runtime: str
    note: str | None = None


class Runtime(ABC):
    """Something that opens a model's folder and generates tokens from it. Made without arguments; its module may be
    imported where what it needs is not installed."""

    name: ClassVar[str]
    #: Names of the export formats it opens (`DIR/exports/<format>`), the preferred one first; empty: the model itself.
    exports: ClassVar[tuple[str, ...]] = ()

    def missing(self) -> str | None:
        """Why this runtime cannot run here, in one sentence that names the extra to install; None where it can."""
        return None

    @abstractmethod
    def can_load(self, folder: Path) -> bool:
        """Whether the folder looks like one of this runtime's, from its files' names alone."""

    @abstractmethod
    def open(self, folder: Path, *, threads: int, device: str) -> Engine:
        """The folder, ready to run on `device` ("cpu" or "cuda") with so many threads. CompressError, in one sentence,
        where it cannot be opened."""

    def exact(self, folder: Path, *, threads: int) -> Logits | None:
        """As `Engine.logits` of the folder, in arithmetic that rounds nothing but the weights; None where there is no
        other arithmetic than the engine's own. It shows that a difference is the arithmetic's, not the file's."""
        return None


class Transformers(Runtime):
    """transformers itself; packed folders run from their packed weights through `compress.load`."""

    name = "transformers"

    def can_load(self, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    def open(self, folder: Path, *, threads: int, device: str, dtype: str = "auto") -> Engine:
        import torch

        from compress.measure.transformers_engine import TransformersEngine

        torch.set_num_threads(threads)
        loaded = self.load(folder, dtype=dtype, device=device)
        return TransformersEngine(loaded.model, loaded.runtime, loaded.note)

    def load(self, folder: Path, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
        """A model in evaluation mode with `.generate`, on the device."""
        if not is_compressed(folder):
            return Loaded(load_plain(folder, dtype=dtype, device=device), self.name)
        from compress.loading import load

        try:
            return Loaded(load(folder, device=device), "compress.load")
        except Exception as error:
            note = f"compress.load could not load {folder}, plain transformers ran it: {first_line(error)}"
            return Loaded(load_plain(folder, dtype=dtype, device=device), self.name, note)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise CompressError(f"{folder / 'config.json'} is not a JSON object.")
    return found


def is_compressed(folder: Path) -> bool:
    """Whether the folder was written by this package, or holds packed weights."""
    from compress.formats.folder import HISTORY

    return (folder / HISTORY).is_file() or "quantization_config" in read_config(folder)


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a model of this config has a head that gives next-token logits."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    architectures = config.get("architectures") or []
    if architectures:
        return architectures[0] in set(NAMES.values())
    return config.get("model_type") in NAMES


def plain_class(config: dict[str, Any]) -> str:
    """The name of the class of transformers that loads a model of this config: the one its config names, as far as
    transformers has it, or else an auto class."""
    import transformers

    architectures = config.get("architectures") or []
    if architectures and hasattr(transformers, architectures[0]):
        return str(architectures[0])
    return "AutoModelForCausalLM" if is_causal(config) else "AutoModel"


def load_plain(folder: Path, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model by transformers alone (with peft, where an adapter stands beside it), as any user would load it, in
    evaluation mode.

    Errors: CompressError in one sentence when transformers cannot load it. Nothing remote is trusted, and pickled
    weights are not read.
    """
    import transformers

    from compress.locating import adapter_beside

    auto = getattr(transformers, plain_class(read_config(folder)))
    adapter = adapter_beside(folder)
    with quiet():
        try:
            model = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
            if adapter is not None:
                import torch
                from peft import PeftModel

                model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # packed layers may have a weight only after that
                model = PeftModel.from_pretrained(model, adapter).get_base_model()
        except Exception as error:
            raise CompressError(f"transformers cannot load {folder}: {first_line(error)}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; CompressError in one sentence when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CompressError(f"{folder} has no tokenizer that transformers can load: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The error's first line with text, for a message of one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notices of transformers inside the block; as it was, after it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
