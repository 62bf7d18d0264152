"""Opening a model folder, packed ones included, without ever holding the expanded model.

`load` builds the architecture without weights, puts `QuantLinear` where the folder holds packed weights, and assigns
the stored tensors one at a time. transformers' own quantizer, which expands the model at the first forward, takes no
part.
"""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from compress.checkpoint import TensorSource
from compress.ends import put_packed
from compress.errors import CompressError, StartError, nearest
from compress.formats import packed
from compress.formats.compressed_tensors import read_specs
from compress.formats.folder import HISTORY
from compress.locating import adapter_beside
from compress.maths.grid import SCALE_DTYPES, QuantSpec
from compress.nn.bnb_linear import MISSING, load_bitsandbytes
from compress.nn.cpu_step import use_block_steps
from compress.nn.prompt import use_quick_prompts
from compress.nn.quant_cache import CacheSpec, use_packed_cache
from compress.nn.quant_embedding import packed_like
from compress.nn.quant_linear import QuantLinear
from compress.nn.running import run_as
from compress.recipe.sections import Runtime


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    packed_cache: bool = True,
    adapter: bool = True,
    activations: Literal["float", "int8"] | None = None,
    prepack: bool | None = None,
) -> PreTrainedModel:
    """The model in `folder` (what a run left, `DIR` or `DIR/model`, or any Hugging Face folder), ready to run.

    Packed weights stay packed while it runs. `dtype` (default: the one stored) is that of everything that is not
    packed, and of the arithmetic. Where a run could only store its model unpacked, its `exports/packed` is read.
    Where the model's history has a `kv_cache`, its cache is packed while it writes, unless `packed_cache` is false.
    Where an adapter stands beside the model (`DIR/adapter`), it is put in, unless `adapter` is false.
    `activations="int8"`: the CPU kernel rounds inputs of few tokens, which is faster on processors with AVX-512 VNNI
    where inputs are float32, or there is no AVX512-BF16. `prepack=True`: plain bfloat16 layers are put into oneDNN's
    order, for models that only run. Default of both: what the run that made the folder had under `runtime`, as far as
    this machine can.
    `StartError` for a folder that is no model, or for what this machine lacks; `CompressError`, with the names, where
    the tensors do not fit.
    """
    folder = find_model(Path(folder))
    beside = adapter_beside(folder) if adapter else None
    config = _config(folder)
    cls = model_class(config)
    dtype = dtype or stored_dtype(config)
    quantized = getattr(config, "quantization_config", None)
    own = packed.is_packed(folder)
    if method_of(quantized) == "bitsandbytes":
        model = _load_bitsandbytes(folder, cls, dtype, device)
        return _running(_finished(model, folder, packed_cache, beside), folder, activations, prepack)
    if quantized is not None:
        del config.quantization_config
    if own or quantized is not None:
        source = TensorSource(folder, packed.STEM if own else "model")
        model = skeleton(config, dtype)
        _place(model, source, packed.read_specs(folder) if own else read_specs(quantized, model), torch.device(device))
    else:
        model = _load_dense(folder, cls, config, dtype)
    model.to(torch.device(device))
    if quantized is not None:  # so that save_pretrained writes a folder that can be read again
        model.config.quantization_config = quantized
    return _running(_finished(model, folder, packed_cache, beside), folder, activations, prepack)


def _running(
    model: PreTrainedModel, folder: Path, activations: Literal["float", "int8"] | None, prepack: bool | None
) -> PreTrainedModel:
    """The loaded model, set to compute as its folder says, and as the caller does."""
    asked: dict[str, Any] = {"activations": activations, "prepack": prepack}
    asked = {key: value for key, value in asked.items() if value is not None}
    recorded = _read_json(folder / HISTORY).get("runtime", {})
    try:
        run_as(model, Runtime(**{key: value for key, value in recorded.items() if key not in asked}), asked=False)
        run_as(model, Runtime(**asked), asked=True)
        use_block_steps(model)
        use_quick_prompts(model)
    except ValidationError as error:
        words = f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}"
        raise StartError(f"{folder} is to run with {words}.") from None
    return model


def _finished(model: PreTrainedModel, folder: Path, packed_cache: bool, adapter: Path | None = None) -> PreTrainedModel:
    """The loaded model with what the folder says beside its weights."""
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.compress_history = _read_json(folder / HISTORY).get("history", [])
    if packed_cache:
        use_packed_cache(model, recorded_cache(folder))
    if adapter is not None:
        from compress.adapters import Adapter

        Adapter.read(adapter).attach(model)
    return model.requires_grad_(False).eval()


def method_of(quantized: Any) -> str | None:
    """The method that a `quantization_config` names."""
    data = quantized if isinstance(quantized, dict) or quantized is None else quantized.to_dict()
    method: str | None = None if data is None else data.get("quant_method")
    return method


def _load_bitsandbytes(
    folder: Path, cls: type[PreTrainedModel], dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """A folder of bitsandbytes' layers: transformers runs them packed, and is left to load them."""
    try:
        load_bitsandbytes()
    except StartError:
        raise StartError(f"{folder}: {MISSING}") from None
    TensorSource(folder)  # refuses pickled and damaged files, with our words
    model: PreTrainedModel = cls.from_pretrained(
        folder, dtype=dtype, device_map={"": str(device)}, local_files_only=True, use_safetensors=True
    )
    return model


def recorded_cache(folder: Path) -> CacheSpec | None:
    """How the cache of the model in `folder` is to be packed, by its history; None where it is not."""
    history = _read_json(folder / HISTORY).get("history", [])
    options = [entry["options"] for entry in history if entry.get("pass") == "kv_cache"]
    return CacheSpec(**options[-1]) if options else None


def find_model(folder: Path) -> Path:
    """Where the model is that `load` reads: `folder` itself, its `model`, or the run's `exports/packed`."""
    if not folder.is_dir():
        raise StartError(f"{folder}: there is no such folder.")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not (folder / "config.json").is_file():
        raise StartError(f"{folder} has no config.json (nor has its subfolder model), so it is not a model folder.")
    beside = folder.absolute().parent / "exports" / "packed"
    if folder.absolute().name == "model" and packed.is_packed(beside):
        here, there = _read_json(folder / HISTORY), _read_json(beside / HISTORY)
        unpacked = here.get("unpacked") or "quantization_config" not in _read_json(folder / "config.json")
        if unpacked and here.get("history") == there.get("history"):
            return beside
    return folder


def skeleton(config: PretrainedConfig, dtype: torch.dtype, architecture: str | None = None) -> PreTrainedModel:
    """The model of `config` with no weights (all on the meta device); `architecture` overrides the config's.

    Buffers that no checkpoint stores, as rotary tables are, hold their values: those `from_pretrained` would give them.
    """
    cls = model_class(config, architecture)
    config = deepcopy(config)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    # What from_pretrained does: only the modules that own such buffers are initialised, once these are off meta
    for module in model.modules():
        module._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._buffers[last] = torch.empty_like(buffer, device="cpu")
        owner._is_hf_initialized = False
    model.initialize_weights()
    return model.requires_grad_(False).eval()


def model_class(config: PretrainedConfig, architecture: str | None = None) -> type[PreTrainedModel]:
    """The transformers class `architecture`, or else the one that `config.architectures` names, or else the language
    model or base model of the config. `StartError` if transformers does not have it."""
    names = [architecture] if architecture else getattr(config, "architectures", None) or []
    if not names:
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
            if type(config) in auto._model_mapping:
                found: type[PreTrainedModel] = auto._model_mapping[type(config)]
                return found
        raise StartError(
            f"config.json names no architecture, and transformers has no model for {type(config).__name__}."
        )
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        known = [name for name in dir(transformers) if "For" in name or name.endswith("Model")]
        raise StartError(
            f"config.json names the architecture {names[0]}, which transformers {transformers.__version__} does not "
            f"have.{nearest(names[0], known)} Code that a folder brings along is never run."
        )
    return cls


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype a config states; float32 where it states none."""
    stated = getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = getattr(torch, stated, None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def _place(model: PreTrainedModel, source: TensorSource, specs: dict[str, QuantSpec], device: torch.device) -> None:
    """Swap in packed layers, then move every tensor from the files to its place, one at a time."""
    for name, spec in specs.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise CompressError(
                f"{source.folder}: {type(model).__name__} has no layer {name}, which is said to be packed."
            ) from None
        put_packed(model, name, packed_like(old, _with_scale_dtype(spec, source, name)))
    tied = set(model.all_tied_weights_keys)
    wanted = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    missing = sorted(set(wanted) - set(source.names()))
    unexpected = sorted(set(source.names()) - set(wanted) - tied)
    if missing or unexpected:
        said = [f"missing: {', '.join(missing[:5])}"] if missing else []
        said += [f"not expected: {', '.join(unexpected[:5])}"] if unexpected else []
        raise CompressError(f"{source.folder}: the tensors do not fit {type(model).__name__} ({'; '.join(said)}).")
    for name, old in wanted.items():
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        stored = isinstance(parent, QuantLinear) and last != "bias"  # kept as it is in the file
        info = source.info(name)
        if info.shape != tuple(old.shape) or (stored and info.dtype != old.dtype):
            raise CompressError(
                f"{source.folder}: {name} is {_word(info.dtype)} {list(info.shape)}; "
                f"{type(model).__name__} needs {_word(old.dtype)} {list(old.shape)}."
            )
        tensor = source.map(name).to(device, old.dtype)
        if isinstance(old, nn.Parameter):
            parent._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            parent._buffers[last] = tensor
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.exact = False
    model.tie_weights(recompute_mapping=False)  # a head tied to a packed embedding has no tensor to tie


def _load_dense(
    folder: Path, cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    TensorSource(folder)  # refuses pickled and damaged files, with our words
    model, info = cls.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise CompressError(f"{folder}: the tensors do not fit {cls.__name__} (missing: {names}).")
    loaded: PreTrainedModel = model
    return loaded


def _with_scale_dtype(spec: QuantSpec, source: TensorSource, layer: str) -> QuantSpec:
    """The spec with the dtype in which the file holds the layer's scales."""
    name = f"{layer}.weight_scale"
    if name not in source:
        raise CompressError(f"{source.folder}: {name} is missing, though {layer} is said to be packed.")
    dtype = _word(source.info(name).dtype)
    if dtype not in SCALE_DTYPES:
        raise CompressError(f"{source.folder}: {name} is {dtype}; scales are one of {', '.join(SCALE_DTYPES)}.")
    return replace(spec, scale_dtype=dtype)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StartError(f"{folder / 'config.json'} cannot be used: {str(error).splitlines()[0]}") from error
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file or it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
