"""Who learns: the model as it stands, made from the teacher's blocks, given, or fresh.

Every function here does the same to a model without weights (for the plan) and to a real one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PretrainedConfig

from compress.errors import StartError
from compress.losses import StudentOptions, amount
from compress.model import ModelHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = ("model", "teacher", "fresh")


def make_student(
    model: ModelHandle, options: StudentOptions, teacher: Callable[[], PreTrainedModel], seed: int = 0
) -> None:
    """Makes the student the model of the handle. `teacher()` is what `source: teacher` takes its weights from."""
    weightless = next(model.model.parameters()).is_meta
    source = options.source
    if source == "teacher":
        _replace(model, copy.deepcopy(teacher()))
    elif source not in OWN and not source.endswith(".json"):
        _replace(model, _given(Path(source), model, weightless))
    elif source != "model":
        config = copy.deepcopy(model.config) if source == "fresh" else _config(Path(source))
        _resize(config, options)
        _replace(model, _random(config, model, weightless, seed))
        return
    if options.layers is not None:
        keep_blocks(model, chosen_blocks(options.layers, len(model.block_list())))
    if options.intermediate_size is not None:
        _narrow(model, options)


def chosen_blocks(layers: int | str | Sequence[int], count: int) -> list[int]:
    """Indices of the blocks that remain of `count`: evenly spread, first and last among them.

    >>> chosen_blocks("50%", 8)
    [0, 2, 5, 7]
    """
    if not isinstance(layers, int | str):
        chosen = list(layers)
    else:
        wanted = amount(layers, count)
        last = count - 1
        chosen = [round(i * last / (wanted - 1)) for i in range(wanted)] if 1 < wanted <= count else list(range(wanted))
    if chosen[-1] >= count:
        raise StartError(f"student.layers: {layers} asks for more blocks than the {count} that there are.")
    return chosen


def keep_blocks(model: ModelHandle, kept: Sequence[int]) -> None:
    """Takes all other blocks out of the model, in place; config and indices of those that stay follow."""
    if len(model.stacks) > 1:
        names = ", ".join(stack.name for stack in model.stacks)
        raise StartError(f"student.layers: this model has more than one stack of blocks ({names}).")
    modules = model.stacks[0].modules
    count, blocks = len(modules), [modules[index] for index in kept]
    del modules[len(kept) :]
    for index, block in enumerate(blocks):
        modules[index] = block
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:  # what is said of each block
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _narrow(model: ModelHandle, options: StudentOptions) -> None:
    raise StartError(
        "student.intermediate_size: there is no pass yet that narrows a model's own layers. Leave it out, or use "
        "source: fresh."
    )


def _replace(model: ModelHandle, other: PreTrainedModel) -> None:
    """Makes `other` the model of the handle; what was done to the one before is no history of it."""
    fresh = ModelHandle(other.requires_grad_(False), device=model.device)
    model.model, model.stacks, model.source = fresh.model, fresh.stacks, None
    model.history, model.states, model.latest = [], {"dense"}, None


def _given(folder: Path, model: ModelHandle, weightless: bool) -> PreTrainedModel:
    from compress.loading import load, skeleton
    from compress.locating import locate
    from compress.opening import read_config

    folder = locate(str(folder))
    if weightless:
        return skeleton(read_config(folder), model.dtype)
    return load(folder, model.device, model.dtype)


def _config(path: Path) -> PretrainedConfig:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StartError(f"student.source: {path} is no config of a model: {str(error).splitlines()[0]}.") from None


def _resize(config: PretrainedConfig, options: StudentOptions) -> None:
    """The sizes that the options name, in a config of a model that has no weights yet."""
    text = config.get_text_config()
    if options.layers is not None:
        count = text.num_hidden_layers
        kept = chosen_blocks(options.layers, count)
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(text, name, [value[index] for index in kept])
        text.num_hidden_layers = len(kept)
    if options.intermediate_size is not None:
        if not isinstance(getattr(text, "intermediate_size", None), int):
            raise StartError("student.intermediate_size: this model's config has no such size.")
        text.intermediate_size = amount(options.intermediate_size, text.intermediate_size)


def _random(config: PretrainedConfig, model: ModelHandle, weightless: bool, seed: int) -> PreTrainedModel:
    from compress.loading import model_class, skeleton

    if weightless:
        return skeleton(config, model.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = model_class(config)._from_config(config, dtype=model.dtype)
    return made.to(model.device).eval()
