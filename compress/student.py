"""Who learns: the model as it stands, made from the teacher's blocks, given, or fresh.

Every function here does the same to a model without weights (for the plan) and to a real one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PretrainedConfig

from compress.errors import StartError
from compress.losses import StudentOptions, amount
from compress.model import ModelHandle
from compress.passes.base import Context, Pass
from compress.passes.depth import Depth
from compress.registry import PASSES
from compress.reshaping import without_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = ("model", "teacher", "fresh")
#: Windows of text on which it is seen which blocks matter.
TEXT_WINDOWS = 64


def make_student(
    model: ModelHandle, options: StudentOptions, teacher: Callable[[], PreTrainedModel], context: Context | None = None
) -> None:
    """Makes the student the model of the handle. `teacher()` is what `source: teacher` takes its weights from; the text
    of `context` says which blocks matter (None: the shape alone is wanted)."""
    weightless = next(model.model.parameters()).is_meta
    seed = context.seed if context is not None else 0
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
    for pass_ in _removing(model, options):
        if context is None or weightless:
            pass_.reshape(model)
            continue
        text = context.calibration or context.training
        if text is None and pass_.takes_calibration:
            raise StartError("distill: student: which blocks matter is seen from data.training; or name them.")
        few = None if text is None else text.select(torch.arange(min(len(text), TEXT_WINDOWS)))
        pass_.run(model, replace(context, calibration=few, stage=None))


def _removing(model: ModelHandle, options: StudentOptions) -> list[Pass]:
    """The structural passes that take from the model what the student is not to have.

    Of a model that writes no text (an encoder, a classifier) the upper blocks go: a task learnt anew needs the lower
    ones most (Sajjad et al. 2023, On the Effect of Dropping Layers, arXiv 2004.03844).
    """
    found: list[Pass] = []
    count = len(model.block_list())
    if isinstance(options.layers, list):
        drop = [index for index in range(count) if index not in options.layers]
        if options.layers[-1] >= count:
            raise StartError(
                f"distill: student.layers: there is no block {options.layers[-1]}, the last is {count - 1}."
            )
        if drop:
            found.append(Depth(drop=drop))
    elif options.layers is not None:
        left = amount(options.layers, count)
        lowest = not model.model.can_generate() and left < count
        found.append(Depth(drop=list(range(left, count))) if lowest else Depth(layers=left))
    narrower = {"intermediate_size": options.intermediate_size, "heads": options.heads}
    narrower = {name: size for name, size in narrower.items() if size is not None}
    if narrower:
        if "width" not in PASSES:
            raise StartError(f"distill: student.{min(narrower)}: there is no pass here that narrows a model's layers.")
        found.append(PASSES.get("width")(**narrower))
    return found


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
    if options.heads is not None:
        raise StartError("distill: student.heads is for the model's own weights: give fresh ones a config.json.")
    if options.layers is not None:
        given, count = options.layers, text.num_hidden_layers
        keep = given if isinstance(given, list) else list(range(amount(given, count)))
        if keep[-1] >= count:
            raise StartError(f"distill: student.layers: there is no block {keep[-1]} in that config.")
        smaller = without_blocks(text, keep)
        text.__dict__.update(smaller.__dict__)
    if options.intermediate_size is not None:
        if not isinstance(getattr(text, "intermediate_size", None), int):
            raise StartError("distill: student.intermediate_size: this model's config has no such size.")
        text.intermediate_size = amount(options.intermediate_size, text.intermediate_size)


def _random(config: PretrainedConfig, model: ModelHandle, weightless: bool, seed: int) -> PreTrainedModel:
    from compress.loading import model_class, skeleton

    if weightless:
        return skeleton(config, model.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = model_class(config)._from_config(config, dtype=model.dtype)
    return made.to(model.device).eval()
