"""Parts of blocks that can be taken out: channels of the MLP, groups of attention heads, channels of the stream.

No table says which tensors they are made of. The config's key is changed, and what then has another shape in a model
without weights is what the parts are made of: where a layer has fewer inputs, it reads them; all else makes them. Where
in these tensors each part lies, `places.py` finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import StartError
from compress.images import reads_images
from compress.model import Layer, find_stacks
from compress.reshaping import empty_model, without_blocks

#: Keys that may be absent or None, and then stand for so many times the hidden size.
_UNSAID = {"n_inner": 4, "intermediate_size": 4}


@dataclass(frozen=True)
class Channels:
    """The inner channels of every MLP. `key`: the config's name for their number."""

    key: str
    count: int
    sections: ClassVar[tuple[int, ...]] = ()
    what: ClassVar[str] = "intermediate_size"

    def config(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        """The config with `count` channels."""
        config = deepcopy(config)
        setattr(config.get_text_config(), self.key, count)
        return config

    def size(self, count: int) -> int:
        """The figure that a recipe gives for so many parts."""
        return count

    @property
    def columns(self) -> int:
        """Inputs of the layer that reads them."""
        return self.count


@dataclass(frozen=True)
class Groups:
    """Groups of attention heads: `count` key and value heads, each with the `run` query heads that share it, of `width`
    channels."""

    count: int
    run: int
    width: int
    what: ClassVar[str] = "heads"

    @property
    def sections(self) -> tuple[int, ...]:
        """Rows that each group has of queries, keys and values where one layer makes all three."""
        return (self.run * self.width, self.width, self.width)

    def config(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        """The config with `count` groups, whose heads keep their width."""
        config = deepcopy(config)
        text = config.get_text_config()
        text.head_dim = self.width
        text.num_attention_heads = count * self.run
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = count
        return config

    def size(self, count: int) -> int:
        """Query heads."""
        return count * self.run

    @property
    def columns(self) -> int:
        """Inputs of the layer that reads what they give."""
        return self.count * self.run * self.width


@dataclass(frozen=True)
class Stream:
    """The channels of the residual stream: `count` of them; heads keep their `width`."""

    count: int
    width: int

    def config(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        """The config with `count` channels."""
        config = deepcopy(config)
        text = config.get_text_config()
        text.head_dim, text.hidden_size = self.width, count
        return config


Units = Channels | Groups


def find_channels(model: PreTrainedModel) -> Channels:
    """StartError, with the reason, where no key of the config alone decides the inner width of the MLPs."""
    config = _one_block_each(model)
    before, text = empty_model(model, config), config if config.is_encoder_decoder else config.get_text_config()
    stacks = find_stacks(before)
    experts = None
    for key, value in _integers(text):
        units = Channels(key, value)
        shrunk = shrunk_tensors(before, _built(model, units.config(config, value // 2)))
        if not shrunk or any(not name.startswith(tuple(f"{stack.name}.0." for stack in stacks)) for name in shrunk):
            continue
        experts = next((n for n in shrunk if before.get_parameter(n).dim() > 2), experts)
        found = readers(before, shrunk)
        if [columns for _, columns in found] == [value] * len(stacks) and experts is None:
            return units
    kind = type(model).__name__
    if experts is not None:
        raise StartError(
            f"the MLP of {kind} is a set of experts in one tensor: width cuts heads there, and the pass "
            "experts removes whole experts."
        )
    raise StartError(f"no key of the config of {kind} decides the inner width of its MLPs alone.")


def find_groups(model: PreTrainedModel) -> Groups:
    """StartError, with the reason, where the config cannot say that there are fewer heads of the same width. In an
    encoder with a decoder, all attentions have as many."""
    config = _one_block_each(model)
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    units, kind = Groups(groups, heads // groups, width), type(model).__name__
    if groups == 1:
        raise StartError(f"all heads of {kind} share one key and value head, and only whole groups can go.")
    before = empty_model(model, config)
    for count in reversed(range(1, groups)):
        after = _built(model, units.config(config, count))
        if after is None:
            continue
        found = readers(before, shrunk_tensors(before, after))
        if _in_every_block(before, found) and all(columns == heads * width for _, columns in found):
            return units
    raise StartError(f"the config of {kind} has no head_dim: fewer heads would each be wider, so none can go.")


def find_stream(model: PreTrainedModel) -> Stream:
    """StartError, with the reason, where the config cannot say that the stream has fewer channels and heads are as wide
    as they were."""
    kind = type(model).__name__
    if len(find_stacks(model)) > 1:
        raise StartError(f"{kind} has an encoder and a decoder; hidden_size is cut in models with one stack of blocks.")
    if reads_images(model.config):
        raise StartError(f"{kind} reads no text; the hidden size of such models is not cut.")
    config = _one_block_each(model)
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    units = Stream(int(text.hidden_size), int(getattr(text, "head_dim", None) or text.hidden_size // heads))
    before = empty_model(model, config)
    shrunk = shrunk_tensors(before, _built(model, units.config(config, units.count // heads // 2 * heads)))
    embedding = next(n for n, p in before.named_parameters() if p is model_embedding(before))
    alike = all(before.get_parameter(name).shape[d] == units.count for name, d in shrunk.items())
    if any(before.get_parameter(name).dim() > 2 for name in shrunk):
        raise StartError(f"the MLP of {kind} is a set of experts in one tensor; their hidden size is not cut.")
    if shrunk.get(embedding) == 1 and alike:
        return units
    raise StartError(f"the config of {kind} cannot say that the hidden size is another and its heads are not.")


def model_embedding(model: PreTrainedModel) -> nn.Parameter:
    """The embedding's table."""
    weight: nn.Parameter = model.get_input_embeddings().weight
    return weight


def takes(model: PreTrainedModel, units: Stream, count: int) -> bool:
    """Whether transformers takes the config with so many channels."""
    return _built(model, units.config(_one_block_each(model), count)) is not None


def allowed(model: PreTrainedModel, units: Units) -> list[int]:
    """Numbers of parts, the present one included, with which transformers takes the config."""
    if isinstance(units, Channels):
        return list(range(1, units.count + 1))
    config = _one_block_each(model)
    return [n for n in range(1, units.count + 1) if _built(model, units.config(config, n)) is not None]


def fewer(model: PreTrainedModel, units: Units) -> int:
    """A number of parts with which the config is taken, and which is less than there is."""
    return allowed(model, units)[-2] if isinstance(units, Groups) else max(1, units.count // 2)


def _in_every_block(model: PreTrainedModel, found: list[tuple[str, int]]) -> bool:
    """Whether these layers are one of each stack's first block; with several stacks one at least, as a decoder's block
    has an attention to itself and one to the encoder."""
    stacks = find_stacks(model)
    counts = [sum(name.startswith(f"{stack.name}.0.") for name, _ in found) for stack in stacks]
    return sum(counts) == len(found) and (counts == [1] if len(stacks) == 1 else all(counts))


def _integers(text: PretrainedConfig) -> Iterator[tuple[str, int]]:
    for key, value in vars(text).items():
        if value is None and key in _UNSAID:
            yield key, _UNSAID[key] * int(text.hidden_size)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and not key.startswith("_"):
            yield key, value


def _built(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel | None:
    """The model without weights; None where the config is none that can be written, read again, and built."""
    try:
        return empty_model(model, type(config).from_dict(config.to_dict()))
    except Exception:  # whatever a family raises for a size that it does not take
        return None


def _one_block_each(model: PreTrainedModel) -> PretrainedConfig:
    """The config with one block in each stack."""
    return without_blocks(model.config, *[[0] for _ in find_stacks(model)])


def shrunk_tensors(before: nn.Module, after: nn.Module | None) -> dict[str, int]:
    """Tensors that are smaller afterwards, each with the one dimension in which it is; empty where anything else is
    different."""
    old = dict(before.named_parameters())
    new = dict(after.named_parameters()) if after is not None else {}
    if old.keys() != new.keys():
        return {}
    found = {}
    for name, tensor in old.items():
        other = new[name].shape
        differ = [d for d, size in enumerate(tensor.shape) if size != other[d]]
        if len(differ) > 1 or any(other[d] > tensor.shape[d] for d in differ):
            return {}
        if differ:
            found[name] = differ[0]
    return found


def readers(model: nn.Module, shrunk: Mapping[str, int]) -> list[tuple[str, int]]:
    """Layers that have fewer inputs, by name, and how many they had."""
    found = []
    for name, dimension in shrunk.items():
        path, _, last = name.rpartition(".")
        layer = Layer(None, path, model.get_submodule(path))
        if not isinstance(layer.module, nn.Linear | Conv1D):
            continue  # a table of vectors
        if last == "weight" and layer.module.weight.dim() == 2 and dimension == (0 if layer.transposed else 1):
            found.append((path, layer.weight.shape[1]))
    return found
