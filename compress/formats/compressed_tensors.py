"""compressed-tensors: what transformers and vLLM read. `pack-quantized` for packed integers, `int-quantized` and
`float-quantized` for codes of 8 bits, one an element, with or without rounding of the layers' inputs.

transformers has two ways to open it. Without more it loads codes and scales into its own modules, one scheme per layer,
and expands the model at the first forward. That way cannot load packed zero points: transformers 5.23 expects them
unpacked and stops at a size mismatch. With `"dequantize": true` in the config it expands each layer while loading, and
that works for asymmetric grids, but with one scheme for the whole model. So the flag is written for asymmetric grids,
and asymmetric grids of several kinds in one model are refused.

Packed embeddings load by that second way alone (by the first, transformers 5.23 initialises a weight that is not there
and stops). It multiplies in the scales' dtype, which for a symmetric grid is what we compute only if the model's is the
same. So an embedding is packed where the whole model has one grid that can be read so; else its rounded rows are
written unpacked, and `unpacked` in compress.json names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import nn

from compress.checkpoint import TensorSpec, write_checkpoint
from compress.errors import StartError
from compress.formats.base import Contents, Format, foreign, grid_of_its_own, of_kind, own_grid_in_words
from compress.formats.dense import expanded
from compress.formats.folder import write_ordinary_files
from compress.maths.grid import QuantSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

#: compressed-tensors' name for what `QuantSpec.stored` says.
FORMATS = {"packed": "pack-quantized", "int8": "int-quantized", "float8": "float-quantized"}
SEVERAL = "mixed-precision"


class CompressedTensors(Format):
    """Packed integers of 2 to 8 bits, per group or channel, symmetric or not; int8 and float8 per channel, with inputs
    rounded token by token or not. vLLM's kernels take 4 and 8 bits."""

    name = "compressed-tensors"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        if reason := foreign(self.name, specs):
            return reason
        if own := grid_of_its_own(specs):
            return self.refuses_grid(own)
        conv1d = of_kind("Conv1D", kinds, specs)
        if conv1d:
            return (
                f"compressed-tensors packs Linear layers only, and {conv1d[0]} is a Conv1D: others get the rounded "
                "weights unpacked, and the packed ones run with compress.load."
            )
        left = unpacked(dtype, kinds, specs)
        specs = {name: spec for name, spec in specs.items() if name not in left}
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

    def refuses_grid(self, grid: str) -> str | None:
        return own_grid_in_words(self.name, grid)

    def stored(self, contents: Contents) -> Sequence[TensorSpec]:
        return expanded(contents, _left(contents))[0]

    def write(self, folder: Path, contents: Contents) -> None:
        left = _left(contents)
        write_checkpoint(folder, *expanded(contents, left))
        packed = {name: spec for name, spec in contents.quantization.items() if name not in left}
        config = quantization_config(packed, contents.kinds)
        if contents.adapter and _expandable(contents.dtype, packed):
            config["dequantize"] = True  # peft looks for a layer's weight, which else is there after the first forward
        write_ordinary_files(folder, contents, self.name, config, {"unpacked": left} if left else None)


def unpacked(dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> list[str]:
    """The quantized embeddings that transformers could not read packed beside the other layers."""
    return [] if _expandable(dtype, specs) else of_kind("Embedding", kinds, specs)


def _expandable(dtype: torch.dtype, specs: Mapping[str, QuantSpec]) -> bool:
    """Whether transformers, expanding all layers while it loads them, makes the same of them as we do."""
    return len({_scheme(spec) for spec in specs.values()}) == 1 and all(
        not spec.symmetric or spec.torch_scale_dtype == dtype for spec in specs.values()
    )


def _left(contents: Contents) -> list[str]:
    return unpacked(contents.dtype, contents.kinds, contents.quantization)


def quantization_config(specs: Mapping[str, QuantSpec], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` entry of config.json, made and validated by compressed-tensors' own classes.

    One grid: all Linears are the target, with the embeddings that are quantized, and Linears that are not are ignored
    by name. Several: each group names its layers.
    """
    from compressed_tensors.quantization import QuantizationConfig

    groups: dict[_Scheme, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(_scheme(spec), []).append(name)
    schemes = {
        f"group_{index}": scheme.entry(["Linear", *of_kind("Embedding", kinds, names)] if len(groups) == 1 else names)
        for index, (scheme, names) in enumerate(groups.items())
    }
    formats = {FORMATS[scheme.stored] for scheme in groups}
    form = formats.pop() if len(formats) == 1 else SEVERAL
    ignored = [name for name in of_kind("Linear", kinds, kinds) if name not in specs]
    config: dict[str, Any] = QuantizationConfig(
        config_groups=schemes, format=form, quantization_status="compressed", ignore=ignored
    ).model_dump(mode="json")
    if not all(spec.symmetric for spec in specs.values()) or of_kind("Embedding", kinds, specs):
        config["dequantize"] = True
    return config


def read_specs(stored: Any, model: nn.Module) -> dict[str, QuantSpec]:
    """Layer name -> spec, from a config's `quantization_config` and the unquantized architecture.

    The scale dtype is not part of the config: the spec gets the default, and the stored tensors decide.
    `StartError` for any other quantization than those that `CompressedTensors` writes.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules

    data = stored if isinstance(stored, dict) else stored.to_dict()
    method, form = data.get("quant_method"), data.get("format")
    readable = [*FORMATS.values(), SEVERAL]
    if method != "compressed-tensors" or form not in readable:
        said = f"{method}, {form}" if form else f"{method}"
        known = ", ".join(readable)
        raise StartError(f"The model is quantized as {said}; compress.load reads compressed-tensors, {known}.")
    try:
        config = QuantizationConfig.model_validate({key: value for key, value in data.items() if key != "dequantize"})
    except ValidationError as error:
        raise StartError(
            f"The quantization_config is not one that compressed-tensors takes: {error.errors()[0]['msg']}."
        ) from error
    specs: dict[str, QuantSpec] = {}
    for scheme in config.config_groups.values():
        spec = _spec(scheme, scheme.format or form)
        for name, module in match_named_modules(model, scheme.targets, config.ignore):
            if isinstance(module, nn.Linear | nn.Embedding):
                specs.setdefault(name, spec)
    return specs


class _Scheme(NamedTuple):
    """What a group of layers has in common in the config: a spec without the dtype of its scales."""

    bits: int
    group_size: int
    symmetric: bool
    stored: str
    activations: bool

    def entry(self, targets: list[str]) -> QuantizationScheme:
        """The group's entry, as compressed-tensors' own classes make it."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        size: dict[str, Any] = {"strategy": "channel"}
        if self.group_size != -1:
            size = {"strategy": "group", "group_size": self.group_size}
        kind = "float" if self.stored == "float8" else "int"
        weights = QuantizationArgs(num_bits=self.bits, type=kind, symmetric=self.symmetric, dynamic=False, **size)
        inputs = QuantizationArgs(num_bits=8, type=kind, symmetric=True, dynamic=True, strategy="token")
        return QuantizationScheme(
            targets=targets,
            weights=weights,
            input_activations=inputs if self.activations else None,
            format=FORMATS[self.stored],
        )


def _scheme(spec: QuantSpec) -> _Scheme:
    return _Scheme(spec.bits, spec.group_size, spec.symmetric, spec.stored, spec.activations)


def _spec(scheme: QuantizationScheme, form: str) -> QuantSpec:
    """The spec of a group's entry, in the default scale dtype. StartError for what `QuantLinear` does not compute."""
    args, inputs = scheme.weights, scheme.input_activations
    stored = {name: key for key, name in FORMATS.items()}.get(form)
    kind = "float" if stored == "float8" else "int"
    per_token = inputs is None or (
        inputs.num_bits == 8 and inputs.type == kind and inputs.symmetric and inputs.dynamic is True
        and inputs.strategy == "token" and stored != "packed"
    )  # fmt: skip
    per_channel = args is not None and args.type == kind and args.strategy in ("group", "channel")
    if stored is None or args is None or not per_channel or not per_token:
        raise StartError(
            "compress.load reads weights of integers per group or channel, int8 and float8 per channel, and of those "
            f"with inputs rounded alike for each token; and not {scheme}."
        )
    return QuantSpec(
        args.num_bits, args.group_size or -1, args.symmetric, stored=stored, activations=inputs is not None
    )


def _holds(model: torch.dtype, scale: torch.dtype) -> bool:
    """Whether every value of the scale's dtype is one of the model's."""
    return bool(torch.promote_types(model, scale) == model)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
