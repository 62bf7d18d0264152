"""A model of fewer tokens: its tables, and the ids that its configs name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from compress.passes.base import Context
from compress.passes.structural import keep_smaller
from compress.reshaping import empty_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from compress.model import Block, ModelHandle

#: Lists of ids in a generation config of which a part may leave.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_NESTED = ("force_words_ids", "sequence_bias")
_FORCED = "forced_decoder_ids"  # pairs of a position and an id


def keep_tokens(model: ModelHandle, kept: list[int], context: Context | None = None) -> list[dict[str, Any]]:
    """Cuts the model's tables to the rows `kept` (ids, in their new order); every tensor outside the blocks with a
    dimension of tokens is one. Returns the blocks' records."""
    config = with_tokens(model.config, {old: new for new, old in enumerate(kept)}, len(kept))
    shapes = {name: tensor.shape for name, tensor in empty_model(model.model, config).state_dict().items()}
    outside = {}
    for name, tensor in model.outside().items():
        for place, size in enumerate(shapes.get(name, ())):
            if tensor.shape[place] != size:
                outside[name] = tensor.index_select(place, torch.tensor(kept, device=tensor.device))
    records = keep_smaller(model, context or Context(), config, _drawn(model), outside)
    renumber_generation(model.model, kept)
    return records


def renumber_generation(model: PreTrainedModel, kept: list[int]) -> None:
    """Gives the ids in a model's generation config their new numbers."""
    if model.can_generate():
        _renumber(model.generation_config, {old: new for new, old in enumerate(kept)})


def _drawn(model: ModelHandle) -> Iterator[tuple[Block, dict[str, Any]]]:
    for block in model.blocks():
        yield block, {"name": block.name, "error": None}


def rows_of(model: PreTrainedModel) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def with_tokens(config: PretrainedConfig, new: Mapping[int, int], size: int) -> PretrainedConfig:
    """The config of a model of `size` tokens; `new` gives old ids their new ones."""
    config = deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(part, "vocab_size"):
            part.vocab_size = size
        _renumber(part, new)
    return config


def _renumber(config: PretrainedConfig | GenerationConfig, new: Mapping[int, int]) -> None:
    """Gives ids in a config their new numbers. Ids outside the old vocabulary stay as they are."""
    for key, value in list(vars(config).items()):
        if value is None:
            continue
        if key == _FORCED:
            setattr(config, key, [[place, new.get(index, index)] for place, index in value])
        elif _is_id(key) or key in _NESTED:
            setattr(config, key, _mapped(value, new))
        elif key in _LISTS:
            left = [entry for entry in value if all(index in new for index in _ids(entry))]
            setattr(config, key, _mapped(left, new))


def _is_id(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids"))


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, float | str):
        return value
    if isinstance(value, int):
        return new.get(value, value)
    if isinstance(value, dict):
        return {_mapped(key, new): item for key, item in value.items()}
    return type(value)(_mapped(item, new) for item in value)


def _ids(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _ids(item)
    elif isinstance(value, dict):
        for key in value:
            yield from _ids(key)


def named_ids(config: PretrainedConfig, generation: GenerationConfig | None) -> set[int]:
    """The ids that a model's configs name."""
    found: set[int] = set()
    for part in (config, config.get_text_config(), generation):
        for key, value in vars(part).items() if part is not None else ():
            if value is not None and (_is_id(key) or key in _NESTED):
                found |= set(_ids(value))
            elif value is not None and key == _FORCED:
                found |= {index for _, index in value}
    return {index for index in found if index >= 0}
