"""Adapters as peft has them: put into a model, taken out, stored as a folder that plain peft loads, and merged.

A run keeps its model as the base is, and the adapter beside it: `DIR/model` and `DIR/adapter`. Where the model has to
answer as a whole (training, verification, `compress.load`), the adapter is attached.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.checkpoint import TensorSpec, atomic_write_text, disk_errors, write_checkpoint
from compress.errors import CompressError, StartError
from compress.nn.quant_linear import QuantLinear

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is installed

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402

from compress.nn.lora_linear import MaskedLora, PackedLora  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what plain peft puts before the names of a model's parts


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: peft's config as JSON has it, and float32 tensors by their names in the model."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def parameters(self) -> int:
        """Values of all its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def save(self, folder: Path) -> None:
        """Writes the folder that plain peft loads, the config last."""
        tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_checkpoint(folder, specs, tensors.__getitem__, stem=Path(TENSORS).stem)
        atomic_write_text(folder / CONFIG, json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """The adapter in a folder; CompressError where it is none, or damaged."""
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            stored = load_file(folder / TENSORS)
        except Exception as error:  # of several libraries
            raise CompressError(f"{folder} holds no adapter that can be read: {error}") from error
        return cls(config, {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()})

    def attach(self, model: PreTrainedModel) -> None:
        """Puts the adapter into a model. CompressError, with the names, where it does not fit; the model is then as it
        was."""
        attach(model, config_of(self))
        own = state(model)
        missing, unexpected = sorted(set(own) - set(self.tensors)), sorted(set(self.tensors) - set(own))
        wrong = [name for name in own if name in self.tensors and own[name].shape != self.tensors[name].shape]
        if missing or unexpected or wrong:
            detach(model)
            found = {"missing": missing, "not expected": unexpected, "of another shape": wrong}
            said = [f"{word}: {', '.join(names[:3])}" for word, names in found.items() if names]
            raise CompressError(f"The adapter does not fit {type(model).__name__} ({'; '.join(said)}).")
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                own[name].copy_(tensor)

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """The adapter in the model, until the block ends."""
        self.attach(model)
        try:
            yield
        finally:
            detach(model)


def config_of(adapter: Adapter) -> LoraConfig:
    """peft's config of an adapter."""
    return LoraConfig(**adapter.config)


def attach(model: PreTrainedModel, config: LoraConfig, masked: bool = False) -> None:
    """Puts an untrained adapter into the model, in float32. `masked`: it leaves zeros of the base alone."""
    custom: dict[type[nn.Module], type[nn.Module]] = {QuantLinear: PackedLora}
    if masked:
        custom = {QuantLinear: MaskedLora, nn.Linear: MaskedLora, Conv1D: MaskedLora}
    config._register_custom_module(custom)
    try:
        inject_adapter_in_model(config, model, NAME)
    except (ValueError, TypeError) as error:
        raise StartError(f"peft cannot put this adapter into {type(model).__name__}: {error}") from error
    for tensor in state(model).values():
        tensor.data = tensor.data.float()


def detach(model: nn.Module) -> None:
    """Takes every adapter out: the layers of the base are back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that an adapter trains whole (`modules_to_save`), by their names."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {name: wrapper.modules_to_save[NAME] for name, wrapper in wrappers.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's adapter, by the names they are stored by: the very ones, not copies."""
    kept = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=kept, save_embedding_layers=False)
    return found


def taken(model: nn.Module) -> Adapter:
    """The adapter that the model has."""
    tensors = {name: tensor.detach().clone() for name, tensor in state(model).items()}
    return Adapter(as_json(model.peft_config[NAME]), tensors)


def as_json(config: LoraConfig) -> dict[str, Any]:
    """peft's config as JSON holds it, the same for the same adapter."""
    values = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": "../model"}
    for name, value in values.items():
        if isinstance(value, set):
            values[name] = sorted(value)
        elif hasattr(value, "value"):
            values[name] = value.value
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


@torch.no_grad()
def merged_weight(layer: LoraLayer) -> Tensor:
    """The weight [out, in] of a layer together with its adapter, float32."""
    base = layer.get_base_layer()
    turned = layer.fan_in_fan_out
    if isinstance(base, QuantLinear):
        weight = base.dequantize(torch.float32)
        weight = weight.t() if turned else weight
    else:
        weight = base.weight.detach().float()
    if NAME in layer.lora_variant:
        weight = layer.lora_variant[NAME].merge_safe(layer, NAME, weight).float()
    else:
        weight = weight + layer.get_delta_weight(NAME).float()
    return weight.t() if turned else weight
