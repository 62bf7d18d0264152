"""Finding a model by its name, and opening it for compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.allocator import settle_allocator
from compress.checkpoint import TensorSource, check_finite
from compress.errors import CompressError, StartError
from compress.loading import model_class, skeleton
from compress.model import ModelHandle


def read_config(folder: Path) -> PretrainedConfig:
    """The folder's config; code that a folder brings along is never run."""
    path = folder / "config.json"
    if not path.exists():
        raise StartError(f"model: {folder} has no config.json, so it is not a Hugging Face model folder.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartError(f"model: {path} is not valid JSON ({error}).") from None
    if "auto_map" in raw and not _known(raw):
        raise StartError(f"model: {folder} needs code of its own (auto_map), and trust_remote_code is off here.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise StartError(f"model: {path} cannot be used: {str(error).splitlines()[0]}") from None
    return config


def _known(raw: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return raw.get("model_type") in CONFIG_MAPPING


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise StartError(f"model: the tokenizer in {folder} cannot be used: {str(error).splitlines()[0]}") from None
    return tokenizer


def resolve_dtype(dtype: str, config: PretrainedConfig) -> torch.dtype:
    """The dtype to compress in: the one named, or with `auto` the one the config states (float32 without)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    stated = getattr(config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def check_weights(folder: Path) -> None:
    """Reads every tensor of a checkpoint once: damaged files, NaN and Inf are found before any work."""
    source = TensorSource(folder)
    for name in source.names():
        try:
            check_finite(name, source.read(name))
        except CompressError as error:
            raise CompressError(f"{folder}: {error}") from None


def open_model(folder: Path, *, dtype: str = "auto", device: str = "cpu", residency: str = "memory") -> ModelHandle:
    """Opens a model folder for compression; see `ModelHandle` for the two residencies."""
    settle_allocator()
    config = read_config(folder)
    refuse_quantized(config, folder)
    kind = resolve_dtype(dtype, config)
    handle = _open_on_disk(folder, config, kind, device) if residency == "disk" else None
    if handle is None:
        model = _load_whole(folder, config, kind).to(device)
        handle = ModelHandle(model, device=device)
    history = folder / "compress.json"
    if history.exists():
        for entry in json.loads(history.read_text(encoding="utf-8")).get("history", []):
            handle.history.append(entry)
            handle.states.add(entry.get("leaves", "dense"))
    return handle


def refuse_quantized(config: PretrainedConfig, folder: Path) -> None:
    """A model that is rounded already cannot be the base of a run."""
    if getattr(config, "quantization_config", None) is not None:
        raise StartError(f"model: {folder} is quantized already; give the model it was made from.")


def _load_whole(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    TensorSource(folder)  # refuses pickles and damaged files in our words
    cls = model_class(config)
    model, info = cls.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise CompressError(f"model: {folder} lacks tensors that {cls.__name__} needs: {names}.")
    result: PreTrainedModel = model.requires_grad_(False)
    return result


def _open_on_disk(folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: str) -> ModelHandle:
    source = TensorSource(folder)
    model = skeleton(config, dtype)
    handle = ModelHandle(model, source=source, device=device)
    handle.read_outside()
    return handle
