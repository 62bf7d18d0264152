"""compressed-tensors' `pack-quantized`: what transformers and vLLM read.

transformers has two ways to open it. Without more it loads codes and scales into its own modules, one scheme per layer,
and expands the model at the first forward. That way cannot load packed zero points: transformers 5.23 expects them
unpacked and stops at a size mismatch. With `"dequantize": true` in the config it expands each layer while loading, and
that works for asymmetric grids, but with one scheme for the whole model. So the flag is written for asymmetric grids
only, and asymmetric grids of several kinds in one model are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from compress.checkpoint import write_checkpoint
from compress.errors import StartError
from compress.formats.base import Contents, Format, foreign, of_kind
from compress.formats.folder import write_ordinary_files
from compress.maths.grid import QuantSpec

FORMAT = "pack-quantized"


class CompressedTensors(Format):
    """Packed integers of 2 to 8 bits, per group or channel, symmetric or not. vLLM's kernels take 4 and 8 bits."""

    name = "compressed-tensors"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        if reason := foreign(self.name, specs):
            return reason
        conv1d = of_kind("Conv1D", kinds, specs)
        if conv1d:
            return (
                f"compressed-tensors packs Linear layers only, and {conv1d[0]} is a Conv1D: others get the rounded "
                "weights unpacked, and the packed ones run with compress.load."
            )
        schemes = {_scheme(spec) for spec in specs.values()}
        if len(schemes) > 1 and not all(spec.symmetric for spec in specs.values()):
            return (
                "transformers reads asymmetric grids from a compressed-tensors folder only if all quantized layers "
                f"share one grid, and here there are {len(schemes)}: use symmetric grids, or one grid for all layers."
            )
        for spec in specs.values():
            if spec.symmetric and not _holds(dtype, spec.torch_scale_dtype):
                return (
                    f"transformers casts the scales to the dtype of the model, and {_word(dtype)} cannot hold all "
                    f"{spec.scale_dtype} scales: use {_word(dtype)} scales."
                )
        return None

    def write(self, folder: Path, contents: Contents) -> None:
        write_checkpoint(folder, contents.tensors, contents.read)
        write_ordinary_files(folder, contents, self.name, quantization_config(contents.quantization, contents.kinds))


def quantization_config(specs: Mapping[str, QuantSpec], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` entry of config.json, made and validated by compressed-tensors' own classes.

    One grid: all Linears are the target, and those that are not quantized are ignored by name. Several: each group
    names its layers.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups: dict[tuple[int, int, bool], list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(_scheme(spec), []).append(name)
    schemes = {}
    for index, ((bits, group_size, symmetric), names) in enumerate(groups.items()):
        size = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
        schemes[f"group_{index}"] = QuantizationScheme(
            targets=["Linear"] if len(groups) == 1 else names,
            weights=QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, dynamic=False, **size),
            format=FORMAT,
        )
    ignored = [name for name in of_kind("Linear", kinds, kinds) if name not in specs]
    config: dict[str, Any] = QuantizationConfig(
        config_groups=schemes, format=FORMAT, quantization_status="compressed", ignore=ignored
    ).model_dump(mode="json")
    if not all(spec.symmetric for spec in specs.values()):
        config["dequantize"] = True
    return config


def read_specs(stored: Any, model: nn.Module) -> dict[str, QuantSpec]:
    """Layer name -> spec, from a config's `quantization_config` and the unquantized architecture.

    The scale dtype is not part of the config: the spec gets the default, and the stored tensors decide.
    `StartError` for any other quantization than weight-only `pack-quantized`.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules

    data = stored if isinstance(stored, dict) else stored.to_dict()
    method, form = data.get("quant_method"), data.get("format")
    if method != "compressed-tensors" or form != FORMAT:
        said = f"{method}, {form}" if form else f"{method}"
        raise StartError(f"The model is quantized as {said}; compress.load reads compressed-tensors, {FORMAT}.")
    try:
        config = QuantizationConfig.model_validate({key: value for key, value in data.items() if key != "dequantize"})
    except ValidationError as error:
        raise StartError(
            f"The quantization_config is not one that compressed-tensors takes: {error.errors()[0]['msg']}."
        ) from error
    specs: dict[str, QuantSpec] = {}
    for scheme in config.config_groups.values():
        args = scheme.weights
        if args is None or scheme.input_activations or args.type != "int" or args.strategy not in ("group", "channel"):
            raise StartError(f"compress.load reads weights of integers, per group or channel, and not {scheme}.")
        spec = QuantSpec(args.num_bits, args.group_size or -1, args.symmetric)
        for name, module in match_named_modules(model, scheme.targets, config.ignore):
            if isinstance(module, nn.Linear):
                specs.setdefault(name, spec)
    return specs


def _scheme(spec: QuantSpec) -> tuple[int, int, bool]:
    return spec.bits, spec.group_size, spec.symmetric


def _holds(model: torch.dtype, scale: torch.dtype) -> bool:
    """Whether every value of the scale's dtype is one of the model's."""
    return bool(torch.promote_types(model, scale) == model)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
