"""Writing an ordinary Hugging Face folder: config, weights, tokenizer, card, history; all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from compress.checkpoint import atomic_write_text, disk_errors, sync_folder
from compress.errors import StartError
from compress.formats.base import Contents, Format, grid_of_its_own, of_kind
from compress.maths.named_grids import TRELLIS
from compress.nn.bnb_linear import BnbSpec

HISTORY = "compress.json"
SCHEMA_VERSION = 1


def write_model_folder(folder: str | os.PathLike[str], contents: Contents, format: str | Format | None = None) -> Path:
    """Write a model as `folder`, in the named format (default: `default_format`), replacing what was there.

    The work happens in `<folder>.partial`, which gets its name at the end. `StartError` if the format cannot hold it.
    """
    folder = Path(folder)
    form = format if isinstance(format, Format) else _named(format or default_format(contents))
    reason = form.refusal(contents)
    if reason:
        raise StartError(f"{folder}: {reason}")
    partial = folder.with_name(folder.name + ".partial")
    try:
        with disk_errors(folder):
            _remove(partial)
            partial.mkdir(parents=True)
            form.write(partial, contents)
            sync_folder(partial)
            replace_folder(partial, folder)
    finally:
        with contextlib.suppress(OSError):  # what failed must not keep the disk full
            _remove(partial)
    return folder


def default_format(contents: Contents) -> str:
    """Dense without quantized layers; bitsandbytes for its own; else compressed-tensors, unless its layers can only be
    held unpacked.

    What compressed-tensors refuses for another reason than its layers' kind is an error of `write_model_folder`.
    """
    if not contents.quantization:
        return "dense"
    if any(isinstance(spec, BnbSpec) for spec in contents.quantization.values()):
        return "bitsandbytes"
    unpackable = grid_of_its_own(contents.quantization) or of_kind("Conv1D", contents.kinds, contents.quantization)
    return "dense" if unpackable else "compressed-tensors"


def packed_export_note(contents: Contents) -> str | None:
    """The sentence for the report where `exports/packed` is needed beside the model folder, or None."""
    from compress.formats.compressed_tensors import unpacked

    if not contents.quantization:
        return None
    if default_format(contents) != "dense":
        left = unpacked(contents.dtype, contents.kinds, contents.quantization)
        if not left:
            return None
        return (
            f"transformers cannot read {left[0]} packed beside these grids: model/ has it rounded, but unpacked; "
            "exports/packed has it packed, and compress.load runs from that."
        )
    if (grid := grid_of_its_own(contents.quantization)) == TRELLIS:
        return (
            "No folder for transformers holds codes along a trellis packed: model/ has the rounded weights unpacked, "
            "exports/packed has them packed, and compress.load runs from those."
        )
    if grid:
        return (
            f"No folder for transformers holds the super-blocks of grid {grid} packed: model/ has the rounded weights "
            "unpacked, exports/packed has them packed, and export gguf is what they are made for."
        )
    return (
        "The quantized layers are Conv1D, which no common format holds packed: model/ has the rounded weights "
        "unpacked, exports/packed has them packed, and compress.load runs from those."
    )


def running_format(contents: Contents) -> str:
    """The format of the folder that `compress.load` runs from, whose bytes are the model's size: that of `model/`, or
    packed where `exports/packed` has to stand beside it."""
    return "packed" if packed_export_note(contents) else default_format(contents)


def write_ordinary_files(
    folder: Path,
    contents: Contents,
    format: str,
    quantization_config: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Everything of a Hugging Face folder but the weights. `about` is added to compress.json."""
    _write_json(folder / "config.json", _config(contents, quantization_config))
    if contents.generation_config is not None:
        atomic_write_text(folder / "generation_config.json", contents.generation_config.to_json_string(use_diff=True))
    write_tokenizer(folder, contents)
    write_record(folder, contents, format, about)


def write_record(folder: Path, contents: Contents, format: str, about: Mapping[str, Any] | None = None) -> None:
    """The model card and compress.json: how the model came to be. `about` is added to the latter."""
    if contents.card:
        atomic_write_text(folder / "README.md", contents.card)
    history = [dict(entry) for entry in contents.history]
    about = {
        "schema_version": SCHEMA_VERSION,
        "format": format,
        "history": history,
        "versions": _versions(),
        **({"runtime": dict(contents.runtime)} if contents.runtime else {}),
        **(about or {}),
    }
    _write_json(folder / HISTORY, about)


def write_tokenizer(folder: Path, contents: Contents) -> None:
    """The tokenizer's files, if there is one."""
    if contents.tokenizer is None:
        return
    try:
        contents.tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises no other class for a full disk
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def replace_folder(new: Path, old: Path) -> None:
    """Give the folder `new` the name of `old`; what has that name is removed."""
    aside = old.with_name(old.name + ".old")
    _remove(aside)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    sync_folder(old.parent)
    _remove(aside)


def _config(contents: Contents, quantization_config: Mapping[str, Any] | None) -> dict[str, Any]:
    config = deepcopy(contents.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = contents.dtype
    config.architectures = [contents.architecture]
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    if quantization_config is not None:
        data["quantization_config"] = dict(quantization_config)
    return data


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}


def _named(name: str) -> Format:
    from compress.registry import FORMATS

    form: Format = FORMATS.get(name)()
    return form


def _write_json(path: Path, value: Any) -> None:
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
