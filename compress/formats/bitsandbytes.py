"""bitsandbytes' tensors and config, as transformers' `BitsAndBytesConfig` writes and reads them.

One config for all layers; those that are not rounded are named in `llm_int8_skip_modules`, by their full names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import write_checkpoint
from compress.formats.base import Contents, Format
from compress.formats.folder import write_ordinary_files
from compress.maths.grid import QuantSpec
from compress.nn.bnb_linear import BnbSpec


class BitsAndBytes(Format):
    """NF4, FP4 and LLM.int8 layers, which plain transformers loads where bitsandbytes is installed."""

    name = "bitsandbytes"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        if not specs or not all(isinstance(spec, BnbSpec) for spec in specs.values()):
            return "bitsandbytes holds layers that the pass bnb made: add it to the passes, or name another format."
        if len(set(specs.values())) > 1:
            return "bitsandbytes has one config for all layers: use one format and one double_quantization."
        return None

    def write(self, folder: Path, contents: Contents) -> None:
        write_checkpoint(folder, contents.tensors, contents.read)
        write_ordinary_files(folder, contents, self.name, quantization_config(contents))


def quantization_config(contents: Contents) -> dict[str, Any]:
    """The `quantization_config` entry of config.json, made by transformers' own class."""
    from transformers import BitsAndBytesConfig

    spec = next(iter(contents.quantization.values()))
    assert isinstance(spec, BnbSpec)
    four = spec.code != "int8"
    config = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type=spec.code if four else "nf4",
        bnb_4bit_use_double_quant=spec.double,
        bnb_4bit_compute_dtype=contents.dtype,
        llm_int8_skip_modules=[name for name in contents.kinds if name not in contents.quantization],
    )
    found: dict[str, Any] = config.to_dict()
    return found
