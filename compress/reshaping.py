"""A smaller model in the place of the one being compressed: fewer blocks, narrower layers, fewer tokens.

What a structural pass leaves is what plain transformers builds from the new config, by construction: a model without
weights is made from it, its modules take the place of the old ones in the same model object, and the tensors that are
left are put in. No attribute of a module (its number of heads, its index) is ever patched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from compress.errors import StartError
from compress.loading import skeleton
from compress.model import ModelHandle, find_stacks

#: What belongs to a model object and not to its shape.
_STAYS = ("generation_config", "compress_history", "training", "name_or_path")


def empty_model(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class and dtype with another config, on the meta device."""
    config = deepcopy(config)
    config._attn_implementation = model.config._attn_implementation
    return skeleton(config, model.dtype, type(model).__name__)


def take_shape(model: ModelHandle, config: PretrainedConfig, outside: Mapping[str, Tensor] | None = None) -> None:
    """Makes the model one of `config`, in the same object.

    Outside the blocks, `outside` (tensors by their name in the model) is put in, and what has the shape it had stays;
    the rest, and every block, has no content afterwards (the meta device) until it is restored.
    """
    new = empty_model(model.model, config)
    held = {**model.outside(), **(outside or {})}
    old = model.model
    kept = {name: old.__dict__[name] for name in _STAYS if name in old.__dict__}
    old.__dict__.update({**new.__dict__, **kept})
    model.stacks = find_stacks(old)
    model.place_outside({n: held[n] for n, t in model.outside().items() if n in held and held[n].shape == t.shape})


def without_blocks(config: PretrainedConfig, keep: Sequence[int]) -> PretrainedConfig:
    """The config of a model that has only the blocks `keep` (indices, in their order), of those of this one."""
    config = deepcopy(config)
    text = config.get_text_config()
    before = int(text.num_hidden_layers)
    for key, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == before and not key.startswith("_"):
            setattr(text, key, type(value)(value[index] for index in keep))  # what each layer is (`layer_types`)
    text.num_hidden_layers = len(keep)
    return config


def same_kind(old: torch.nn.Module, new: torch.nn.Module) -> bool:
    """Whether two blocks compute the same from the same tensors: their modules' own settings agree, the index of the
    layer aside."""
    mine, other = dict(old.named_modules()), dict(new.named_modules())
    return mine.keys() == other.keys() and all(_settings(mine[name]) == _settings(other[name]) for name in mine)


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | None.__class__)}
    return {k: v for k, v in plain.items() if not k.startswith("_") and k not in ("layer_idx", "layer_id", "training")}


def parameters_of(model: PreTrainedModel) -> int:
    """The number of parameters, tied ones once; the model may be without weights."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def refuse_encoder_decoder(model: ModelHandle, what: str) -> None:
    """StartError where the model has more than one stack of blocks."""
    if len(model.stacks) > 1:
        names = ", ".join(stack.name for stack in model.stacks)
        raise StartError(f"{what} takes models with one stack of blocks; this one has {names}.")
