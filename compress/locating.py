"""Where a model is, by its name, and what its config says of its context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CompressError, StartError

_WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def locate(model: str | Path) -> Path:
    """The local folder of a model: `builtin:<name>`, a folder (`DIR` or `DIR/model`), or a hub id (downloaded)."""
    model = str(model)
    if model.startswith("builtin:"):
        from compress import builtin

        try:
            return builtin.model_path(model.removeprefix("builtin:"))
        except ValueError as error:
            raise StartError(f"model: {error}") from None
    folder = Path(model).expanduser()
    if folder.is_dir():
        inner = folder / "model"
        bare = not (folder / "config.json").is_file()
        return inner if bare and (inner / "config.json").is_file() else folder
    if folder.exists():
        raise StartError(f"model: {model} is a file; a model is a folder with config.json and *.safetensors.")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED_FILES))
    except HFValidationError:
        raise StartError(f"model: {model} is neither a folder here nor a name a hub could have (owner/name).") from None
    except RepositoryNotFoundError:
        raise StartError(f"model: the hub has no model {model}, or it needs a login (hf auth login).") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise StartError(
            f"model: {model} is no folder here, so the Hugging Face hub is needed, and it cannot be reached "
            f"({type(error).__name__}). Give a local folder, or builtin:tiny."
        ) from error


def adapter_beside(folder: Path) -> Path | None:
    """The adapter that a run left beside its model (`DIR/adapter` for `DIR/model`), or None. Where the model's history
    says that there is one, it must be there."""
    try:
        history = json.loads((folder / "compress.json").read_text(encoding="utf-8"))["history"]
        last = next((entry for entry in reversed(history) if entry["pass"] != "kv_cache"), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if last is None or last.get("leaves") != "adapter":
        return None
    parent = folder.absolute().parent
    adapter = (parent.parent if parent.name == "exports" else parent) / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise CompressError(
            f"{folder} is the base of an adapter, by its history, and {adapter} does not hold it. Put it there, or "
            "load the base alone: compress.load(..., adapter=False)."
        )
    return adapter


def context_length(config: Any) -> int | None:
    """Most tokens the model can read, from its config; None when it states no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def one_class(config: Any) -> bool:
    """Whether a model that classifies says one class of several for a text, not a number or any number of labels."""
    several = getattr(config, "problem_type", None) not in ("regression", "multi_label_classification")
    return several and len(classes_of(config) or ()) > 1


def classes_of(config: Any) -> dict[str, int] | None:
    """The classes of a model that classifies texts, name -> index; None for any other model."""
    names = getattr(config, "architectures", None) or []
    if not names or not str(names[0]).endswith("ForSequenceClassification"):
        return None
    return {str(name): int(index) for name, index in config.label2id.items()}
