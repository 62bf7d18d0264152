"""A cache of keys and values that is held in 4 or 8 bits while a model writes.

Liu et al.: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024, arXiv 2402.02750, section 3. A few
channels of the keys are always large, so keys are rounded channel by channel, in groups of neighbouring tokens; values
have no such channels, and are rounded token by token, in groups of neighbouring channels. The most recent tokens stay
as they are. What differs from the paper: keys and values keep the same recent tokens, at least `residual_length` of
them and fewer than `residual_length + group_size`, where the paper empties the window of the keys whenever it is full.

States are `[batch, heads, tokens, width]`. A group of states becomes `code * scale + least`, with codes from 0 to
`2**bits - 1`, `least` its smallest state and `scale` the step from there to the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from compress.errors import CompressError

TOKENS, CHANNELS = 2, 3  # the dimension of states along which neighbours form a group: of keys, of values


@dataclass(frozen=True)
class CacheSpec:
    """How a cache is rounded: see the options of the pass `kv_cache`."""

    bits: int = 8
    group_size: int = 32
    residual_length: int = 32

    def value_group(self, width: int) -> int:
        """Channels of a value that share a scale: all of a head where the group size does not divide it."""
        return self.group_size if width % self.group_size == 0 else width

    def bytes_per_token(self, heads: int, width: int) -> float:
        """What a packed token takes in one layer, keys and values together: codes, and 16-bit scales and ends."""
        codes = 2 * -(-width * self.bits // 8)
        return heads * (codes + 4 * width / self.group_size + 4 * width / self.value_group(width))


class PackedStates(NamedTuple):
    """`codes`: uint8 `[batch, heads, tokens, ceil(width * bits / 8)]`. `scale`, `least`, 16 bits: of keys
    `[batch, heads, tokens / group, width]`, of values `[batch, heads, tokens, width / group]`."""

    codes: Tensor
    scale: Tensor
    least: Tensor


def pack_states(states: Tensor, bits: int, group: int, along: int) -> PackedStates:
    """Round states `[batch, heads, tokens, width]` in groups of `group` neighbours `along` `TOKENS` or `CHANNELS`.

    Scale and `least` are stored in bfloat16 for bfloat16 states, in float16 for any other, and the codes are chosen for
    what is stored. CompressError if a state is not finite, or too large for that.
    """
    grouped = states.unflatten(along, (-1, group)).float()
    stored = torch.bfloat16 if states.dtype == torch.bfloat16 else torch.float16
    low, high = grouped.amin(along + 1), grouped.amax(along + 1)
    least = low.to(stored)
    scale = ((high - low) / (2**bits - 1)).to(stored)
    if not bool(least.isfinite().all() & scale.isfinite().all()):
        raise CompressError(
            f"a key or a value is not finite, or too large for the {str(stored).removeprefix('torch.')} ends of a "
            "packed cache: run this model without kv_cache"
        )
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = (grouped - least.float().unsqueeze(along + 1)) / scale.float().unsqueeze(along + 1)
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(along, along + 1)
    return PackedStates(_two_to_a_byte(codes) if bits == 4 else codes, scale, least)


def unpack_states(packed: PackedStates, bits: int, group: int, along: int, width: int, dtype: torch.dtype) -> Tensor:
    """The rounded states `[batch, heads, tokens, width]` in `dtype`, computed in float32."""
    codes = _from_bytes(packed.codes, width) if bits == 4 else packed.codes
    grouped = codes.unflatten(along, (-1, group)).float()
    grouped.mul_(packed.scale.float().unsqueeze(along + 1)).add_(packed.least.float().unsqueeze(along + 1))
    return grouped.flatten(along, along + 1).to(dtype)


def _two_to_a_byte(codes: Tensor) -> Tensor:
    """uint8 `[..., width]` of 0 to 15 -> `[..., ceil(width / 2)]`; the first of two in the low half."""
    codes = functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _from_bytes(packed: Tensor, width: int) -> Tensor:
    """Undoes `_two_to_a_byte`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :width]


class QuantCacheLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache. `keys` and `values` are the recent tokens as they came, after those that are packed.

    The first call's states are used as they are, and packed afterwards: reading a prompt is exact, and what is read
    from the cache later is rounded.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, spec: CacheSpec):
        super().__init__()
        self.spec = spec
        self.packed: tuple[PackedStates, PackedStates] | None = None

    @property
    def packed_length(self) -> int:
        """Tokens that are held packed."""
        return 0 if self.packed is None else int(self.packed[0].codes.shape[TOKENS])

    @property
    def recent_length(self) -> int:
        """Tokens that are held as they came."""
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[TOKENS])

    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = [self.keys, self.values, *(tensor for states in self.packed or () for tensor in states)]
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in new states `[batch, heads, tokens, width]`; returns all there are, packed ones rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=TOKENS) if self.recent_length else key_states
        self.values = torch.cat([self.values, value_states], dim=TOKENS) if self.recent_length else value_states
        keys, values = self._unpacked()
        surplus = (self.recent_length - self.spec.residual_length) // self.spec.group_size * self.spec.group_size
        if surplus > 0:
            self._pack(surplus)
        return keys, values

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """All keys and all values, as they came or rounded."""
        if self.packed is None:
            return self.keys, self.values
        both = []
        for states, recent, along in zip(self.packed, (self.keys, self.values), (TOKENS, CHANNELS), strict=True):
            width = recent.shape[CHANNELS]
            group = self._group(along, width)
            old = unpack_states(states, self.spec.bits, group, along, width, recent.dtype)
            both.append(torch.cat([old, recent], dim=TOKENS))
        return both[0], both[1]

    def _group(self, along: int, width: int) -> int:
        return self.spec.group_size if along == TOKENS else self.spec.value_group(width)

    def _pack(self, count: int) -> None:
        """Packs the oldest `count` of the recent tokens. What is left is copied: a view would keep them all."""
        new = []
        for recent, along in ((self.keys, TOKENS), (self.values, CHANNELS)):
            group = self._group(along, recent.shape[CHANNELS])
            new.append(pack_states(recent[:, :, :count], self.spec.bits, group, along))
        old = self.packed or (None, None)
        self.packed = (_joined(old[0], new[0]), _joined(old[1], new[1]))
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    def get_seq_length(self) -> int:
        return self.packed_length + self.recent_length

    def reset(self) -> None:
        super().reset()
        self.packed = None

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens off. What is left of a cut group of keys is held unpacked."""
        if self.packed is None or -tokens_to_remove <= self.recent_length:
            super().crop(tokens_to_remove)
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        keys, values = self._unpacked()
        whole = length // self.spec.group_size
        kept = whole * self.spec.group_size
        self.keys, self.values = keys[:, :, kept:length].clone(), values[:, :, kept:length].clone()
        self.packed = (_cut(self.packed[0], kept, whole), _cut(self.packed[1], kept, kept)) if whole else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.get_seq_length() > 0:
            self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length() > 0:
            self._each(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        if self.is_initialized:
            self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor held; the batch is the first dimension of each."""
        self.keys, self.values = change(self.keys), change(self.values)
        if self.packed is not None:
            keys, values = (PackedStates(*map(change, states)) for states in self.packed)
            self.packed = (keys, values)


def _joined(old: PackedStates | None, new: PackedStates) -> PackedStates:
    if old is None:
        return new
    return PackedStates(*(torch.cat(pair, dim=TOKENS) for pair in zip(old, new, strict=True)))


def _cut(states: PackedStates, tokens: int, groups: int) -> PackedStates:
    return PackedStates(
        states.codes[:, :, :tokens].clone(), states.scale[:, :, :groups].clone(), states.least[:, :, :groups].clone()
    )


def packed_cache(config: PretrainedConfig, spec: CacheSpec) -> DynamicCache:
    """An empty cache for a model of this config. Layers that look back through a window keep no more than that, and
    stay as they are; so do states that are no keys and values."""
    cache = DynamicCache(config=config)
    cache.layers = [QuantCacheLayer(spec) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def packed_layers(config: PretrainedConfig) -> tuple[int, int]:
    """How many layers of a model of this config have a cache that is packed, and how many there are."""
    layers = DynamicCache(config=config).layers
    return sum(type(layer) is DynamicLayer for layer in layers), len(layers)


def use_packed_cache(model: PreTrainedModel, spec: CacheSpec | None) -> None:
    """From now on `forward` (where it keeps a cache) and `generate` of this model start with a packed cache.

    Not where they are given a cache (`past_key_values`) or a kind of cache (`cache_implementation="dynamic"`). `None`:
    as transformers has it, again.
    """
    handle = model.__dict__.pop("_packed_cache_hook", None)
    if handle is not None:
        handle.remove()
        del model.generate
    model.packed_cache = spec
    if spec is not None:
        model._packed_cache_hook = model.register_forward_pre_hook(_with_cache, with_kwargs=True)
        model.generate = partial(_generate, model)


def cache_spec(model: nn.Module) -> CacheSpec | None:
    """How the cache of this model is packed; None where it is not."""
    return getattr(model, "packed_cache", None)


def _with_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a forward: a packed cache where there would be a plain new one."""
    wanted = kwargs.get("use_cache")
    wanted = getattr(model.config, "use_cache", True) if wanted is None else wanted
    spec = cache_spec(model)
    if spec is None or not wanted or len(args) > 1 or kwargs.get("past_key_values") is not None:
        return None
    return args, {**kwargs, "past_key_values": packed_cache(model.config, spec)}


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's class, starting with a packed cache."""
    spec = cache_spec(model)
    config = kwargs.get("generation_config") or model.generation_config

    def asked(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    given = kwargs.get("past_key_values") is not None or asked("cache_implementation") is not None
    if spec is not None and not given and asked("use_cache") is not False:
        kwargs["past_key_values"] = packed_cache(model.config, spec)
    return type(model).generate(model, *args, **kwargs)
