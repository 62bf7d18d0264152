"""Our own packed folder, for layers that no common format can hold packed (GPT-2's `Conv1D`).

It is an ordinary folder, but the weights are in `packed.safetensors`, so that no other program takes codes for weights
(it finds no weights at all), and `compress.json` has the grid of each layer. `compress.load` runs from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import write_checkpoint
from compress.errors import CompressError
from compress.formats.base import Contents, Format, foreign
from compress.formats.folder import HISTORY, write_ordinary_files
from compress.maths.grid import QuantSpec

STEM = "packed"


class Packed(Format):
    """Codes, scales and zero points of any layer, for `compress.load` alone."""

    name = "packed"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        return foreign(self.name, specs)

    def write(self, folder: Path, contents: Contents) -> None:
        write_checkpoint(folder, contents.tensors, contents.read, stem=STEM)
        grids = {name: asdict(spec) for name, spec in sorted(contents.quantization.items())}
        write_ordinary_files(folder, contents, self.name, about={"quantization": grids})


def is_packed(folder: Path) -> bool:
    """Whether a folder was written by this format."""
    return any(folder.glob(f"{STEM}*.safetensors"))


def read_specs(folder: Path) -> dict[str, QuantSpec]:
    """Layer name -> spec of a folder written by this format."""
    path = folder / HISTORY
    try:
        stored: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        return {name: QuantSpec(**entry) for name, entry in stored.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{path} is missing or damaged, and without it packed weights cannot be read.") from error
