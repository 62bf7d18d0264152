"""What an exported folder runs in. A Runtime loads a folder and gives a model that generates.

Another runtime is a subclass, registered under the entry point group `compress.runtimes`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compress.errors import CompressError, StartError


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and the name of what loaded it."""

    model: Any
    runtime: str
    note: str | None = None


class Runtime(ABC):
    """Something that loads a model's folder and generates text from it."""

    name: ClassVar[str]

    @abstractmethod
    def can_load(self, folder: Path) -> bool:
        """Whether the folder looks like one of this runtime's, from its files' names alone."""

    @abstractmethod
    def load(self, folder: Path, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
        """A model in evaluation mode with `.generate`, on the device."""


class Transformers(Runtime):
    """transformers itself; packed folders run from their packed weights through `compress.load`."""

    name = "transformers"

    def can_load(self, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    def load(self, folder: Path, *, dtype: str = "auto", device: str = "cpu") -> Loaded:
        if not is_compressed(folder):
            return Loaded(load_plain(folder, dtype=dtype, device=device), self.name)
        from compress.loading import load

        try:
            return Loaded(load(folder, device=device), "compress.load")
        except Exception as error:
            note = f"compress.load could not load {folder}, plain transformers ran it: {first_line(error)}"
            return Loaded(load_plain(folder, dtype=dtype, device=device), self.name, note)


def model_folder(model: str | Path) -> Path:
    """The folder that holds the model's `config.json`: `DIR`, `DIR/model`, an embedded model or a hub snapshot."""
    text = str(model)
    if text.startswith("builtin:"):
        from compress.builtin import model_path

        try:
            return model_path(text.removeprefix("builtin:"))
        except ValueError as error:
            raise StartError(f"{error}.") from error
    path = Path(text).expanduser()
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder.resolve()
    if path.exists():
        raise StartError(f"{path} is no model: neither it nor {path / 'model'} holds a config.json.")
    return _hub_snapshot(text)


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except HFValidationError as error:
        raise StartError(f"{name} does not exist, and is no name of a model on the hub either.") from error
    except RepositoryNotFoundError as error:
        raise StartError(f"There is no folder {name}, and no model of that name on the hub.") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise StartError(
            f"There is no folder {name}, and the Hugging Face hub cannot be reached to look for it there. "
            "Give a local folder, or the same command again with a network."
        ) from error


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


def load_plain(folder: Path, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model by transformers alone, as any user would load it, in evaluation mode.

    Errors: CompressError in one sentence when transformers cannot load it. Nothing remote is trusted, and pickled
    weights are not read.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if is_causal(read_config(folder)) else AutoModel
    with quiet():
        try:
            model = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
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


def context_length(config: Any) -> int | None:
    """Most tokens the model can read, from its config; None when it states no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


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
