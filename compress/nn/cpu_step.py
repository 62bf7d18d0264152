"""One new token through a whole decoder block in one call of the CPU kernel: `cpu_step.h`.

Between the products of a step, transformers runs some thirty small operators a block, which take as long as the
products of a small model. A block is served if it is built as Llama's is, from packed layers that the kernel takes, and
only after it has been seen to give what the block itself gives: at the first token that passes through it, both are
computed and compared. Whatever is not one token of one text on a plain cache goes through the block itself.
"""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from compress.nn import cpu, prompt
from compress.nn.quant_linear import QuantLinear

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
#: How far a block's step may be from what the block gives, of the largest value: the rounding of bfloat16 a few times
#: over, where the block rounds after every operator and the step does not; float32's order of summing.
_FAR = {torch.bfloat16: 0.03, torch.float32: 1e-4}
#: Tokens by which the room for keys and values grows.
_ROOM = 256


class _Block(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p * 7), ("biases", ctypes.c_void_p * 7),
        ("norm_in", ctypes.c_void_p), ("norm_after", ctypes.c_void_p),
        ("norm_q", ctypes.c_void_p), ("norm_k", ctypes.c_void_p),
        ("eps_in", ctypes.c_float), ("eps_after", ctypes.c_float), ("eps_q", ctypes.c_float),
        ("eps_k", ctypes.c_float), ("scaling", ctypes.c_float),
        ("heads", ctypes.c_int32), ("kept_heads", ctypes.c_int32), ("head_size", ctypes.c_int32),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("room", ctypes.c_int64), ("length", ctypes.c_int64),
        ("kind", ctypes.c_int32), ("threads", ctypes.c_int32), ("at_most", ctypes.c_int32), ("int8", ctypes.c_int32),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a block that a step computes, in the order of the kernel."""

    layers: tuple[QuantLinear, ...]
    norms: tuple[nn.Module, nn.Module]
    head_norms: tuple[nn.Module | None, nn.Module | None]
    attention: nn.Module

    @classmethod
    def of(cls, block: nn.Module) -> Parts | None:
        """The parts of a block built as Llama's is; None for another."""
        attention, mlp = block._modules.get("self_attn"), block._modules.get("mlp")
        if attention is None or mlp is None:
            return None
        if set(block._modules) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return None
        inside = {name for name, module in attention._modules.items() if next(module.parameters(), None) is not None}
        inside |= {name for name in attention._modules if name in _ATTENTION}
        if not set(_ATTENTION) <= inside <= {*_ATTENTION, "q_norm", "k_norm"} or not set(_MLP) <= set(mlp._modules):
            return None
        if set(mlp._modules) - {*_MLP, "act_fn"} or not _is_silu(getattr(mlp, "act_fn", None)):
            return None
        layers = [*(attention._modules[name] for name in _ATTENTION), *(mlp._modules[name] for name in _MLP)]
        if any(type(layer) is not QuantLinear or layer.exact or cpu.why_not(layer) for layer in layers):
            return None
        norms = block._modules["input_layernorm"], block._modules["post_attention_layernorm"]
        head_norms = attention._modules.get("q_norm"), attention._modules.get("k_norm")
        found = cls(tuple(layers), norms, head_norms, attention)
        return found if found.fits_together() else None

    def fits_together(self) -> bool:
        """Whether shapes are those that the step takes."""
        q, k, v, o, gate, up, down = self.layers
        size, hidden = getattr(self.attention, "head_dim", 0), q.in_features
        if not isinstance(size, int) or size <= 0 or size % 8 or not isinstance(self.scaling, float):
            return False
        if q.out_features % size or k.out_features % size or q.out_features % k.out_features:
            return False
        shapes = [(layer.in_features, layer.out_features) for layer in (k, v, o, gate, up, down)]
        inner, kept = gate.out_features, k.out_features
        wanted = [(hidden, kept), (hidden, kept), (q.out_features, hidden)]
        wanted += [(hidden, inner), (hidden, inner), (inner, hidden)]
        norms = all(_is_norm(norm, hidden) for norm in self.norms)
        return shapes == wanted and norms and all(norm is None or _is_norm(norm, size) for norm in self.head_norms)

    @property
    def scaling(self) -> Any:
        return getattr(self.attention, "scaling", None)


def _is_silu(function: Any) -> bool:
    if not callable(function):
        return False
    x = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        return bool(torch.allclose(function(x), functional.silu(x), atol=1e-6))


def _is_norm(module: nn.Module | None, size: int) -> bool:
    """Whether a module is RMSNorm as the step computes it: one weight, and these values on numbers tried."""
    if module is None or set(module._parameters) != {"weight"} or module._parameters["weight"].shape != (size,):
        return False
    weight, eps = module._parameters["weight"].float(), _eps(module)
    if eps is None or weight.is_meta or weight.device.type != "cpu":
        return False
    x = torch.linspace(-2, 3, size).to(module._parameters["weight"].dtype)
    with torch.no_grad():
        found = module(x.view(1, 1, -1)).float().flatten()
    wide = x.float()
    wanted = wide * torch.rsqrt(wide.square().mean() + eps) * weight
    far: float = (found - wanted).abs().max().item() - 0.02 * wanted.abs().max().item()
    return far <= 1e-6


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        found = getattr(module, name, None)
        if isinstance(found, float):
            return found
    return None


class Prepared:
    """What the kernel is told of a block, and the tensors that the addresses in it belong to."""

    def __init__(self, block: nn.Module, parts: Parts, dtype: torch.dtype):
        self.dtype, self.attention = dtype, parts.attention
        self.layers = [cpu.Prepared.of(layer) for layer in parts.layers]
        self.biases = [None if layer.bias is None else layer.bias.detach().float() for layer in parts.layers]
        norms = (*parts.norms, *parts.head_norms)
        self.norms = [None if norm is None else norm._parameters["weight"].detach().float() for norm in norms]
        eps = [0.0 if norm is None else _eps(norm) or 0.0 for norm in norms]
        self.size = parts.attention.head_dim
        self.heads, self.kept_heads = (parts.layers[i].out_features // self.size for i in (0, 1))
        self.block = _Block(
            (ctypes.c_void_p * 7)(*(layer.address for layer in self.layers)),
            (ctypes.c_void_p * 7)(*(_address(bias) for bias in self.biases)),
            *(_address(norm) for norm in self.norms), *eps, parts.scaling, self.heads, self.kept_heads, self.size,
        )  # fmt: skip
        self.step = _Step(
            kind=cpu._KINDS[dtype], at_most=max(cpu.LEVELS), int8=all(layer.int8_inputs for layer in parts.layers)
        )
        self.addresses = ctypes.addressof(self.block), ctypes.addressof(self.step)
        # Asked at every token, so as plain dictionaries: what must be as it was, and where others would listen
        owners = [module for module in (block._modules["self_attn"], block._modules["mlp"]) if module is not None]
        names = [(owner, name) for owner, part in zip(owners, (_ATTENTION, _MLP), strict=True) for name in part]
        self.watched: list[tuple[dict[str, Any], str, Any]] = [
            *((owner._modules, name, layer) for (owner, name), layer in zip(names, parts.layers, strict=True)),
            *((layer.__dict__, "prepared", layer.prepared) for layer in parts.layers),
            (parts.layers[0].__dict__, "int8_inputs", parts.layers[0].int8_inputs),
            *((norm._parameters, "weight", norm._parameters["weight"]) for norm in norms if norm is not None),
        ]
        modules = (*owners, *parts.layers)
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def holds(self) -> bool:
        """Whether the block still has the parts that this was made from."""
        return not any(place.get(name) is not value for place, name, value in self.watched)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(eq=False)
class Room:
    """Keys and values of a cache's layer, [1, heads, room, size], and what the cache was last given of them."""

    keys: Tensor
    values: Tensor
    seen: Tensor | None = None
    seen_values: Tensor | None = None

    @classmethod
    def beside(cls, layer: DynamicLayer) -> Room:
        """The room of a cache's layer, with space for one token more; made, or made larger, where there is none."""
        found: Room | None = getattr(layer, "room", None)
        length = layer.keys.shape[2]
        ours = found is not None and found.seen is layer.keys and found.seen_values is layer.values
        if found is not None and ours and length < found.keys.shape[2]:
            return found
        _, heads, _, size = layer.keys.shape
        room = length + max(_ROOM, length // 2)
        new = cls(*(tensor.new_empty((1, heads, room, size)) for tensor in (layer.keys, layer.values)))
        new.keys[:, :, :length], new.values[:, :, :length] = layer.keys, layer.values
        layer.room = new
        return new

    def give(self, layer: DynamicLayer, length: int) -> None:
        """The first `length` tokens as the keys and values of the cache's layer."""
        layer.keys = self.seen = self.keys.narrow(2, 0, length)
        layer.values = self.seen_values = self.values.narrow(2, 0, length)


class BlockStep:
    """The forward of a decoder block: its own, or, for one token of one text, the kernel's.

    `proved`: None until a token has passed through both, then whether they agreed. See the module.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.proved: bool | None = None
        self.prepared: Prepared | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockStep, (self.block,)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    @property
    def own(self) -> Any:
        """The block's forward by its class."""
        return type(self.block).forward.__get__(self.block)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.numel() != hidden_states.shape[-1] or self.proved is False or args:
            return self.own(hidden_states, *args, **kwargs)
        cached = self._cache_of(hidden_states, kwargs)
        if cached is None:
            return self.own(hidden_states, **kwargs)
        if self.proved is None:
            return self._prove(hidden_states, cached, kwargs)
        return self._run(hidden_states, cached, kwargs["position_embeddings"])

    def _cache_of(self, x: Tensor, kwargs: dict[str, Any]) -> DynamicLayer | None:
        """The cache's layer to continue, if this is a call that the kernel can take."""
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        if kwargs.get("attention_mask") is not None or kwargs.get("output_attentions"):
            return None
        if not isinstance(cache, DynamicCache) or not isinstance(positions, tuple) or x.dtype not in _FAR:
            return None
        if not x.is_cpu or (torch.is_grad_enabled() and x.requires_grad) or self.block.training:
            return None
        if torch.compiler.is_compiling() or not self._ready(x.dtype):
            return None
        assert self.prepared is not None
        attention = self.prepared.attention
        index = attention.layer_idx
        if attention.config._attn_implementation not in ("sdpa", prompt.NAME) or not 0 <= index < len(cache.layers):
            return None
        layer = cache.layers[index]
        if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys.dtype != x.dtype:
            return None
        heads, size = self.prepared.kept_heads, self.prepared.size
        plain = layer.keys.shape[:2] == (1, heads) and layer.keys.shape[3] == size and layer.keys.shape[2] > 0
        plain = plain and positions[0].dtype == x.dtype and positions[0].numel() == size == positions[1].numel()
        return layer if plain and layer.values.shape == layer.keys.shape else None

    def _ready(self, dtype: torch.dtype) -> bool:
        """Whether what was prepared is still true, after preparing it anew where it is not; and nobody listens to what
        passes between the parts."""
        prepared = self.prepared
        if prepared is None or prepared.dtype != dtype or not prepared.holds():
            parts = Parts.of(self.block)
            if parts is None or parts.norms[0]._parameters["weight"].dtype not in _FAR:
                self.proved = False
                return False
            prepared = self.prepared = Prepared(self.block, parts, dtype)
            self.proved = None
        return not any(prepared.hooks)

    def _prove(self, x: Tensor, layer: DynamicLayer, kwargs: dict[str, Any]) -> Any:
        """The block's own result, and whether the kernel gives the same from the same cache."""
        keys, values = layer.keys, layer.values
        expected = self.own(x, **kwargs)
        after = layer.keys, layer.values
        if not isinstance(expected, Tensor) or after[0].shape[2] != keys.shape[2] + 1:
            self.proved = False
            return expected
        layer.keys, layer.values = keys, values
        found = self._run(x, layer, kwargs["position_embeddings"])
        new, wanted = ([pair[0][:, :, -1], pair[1][:, :, -1]] for pair in ((layer.keys, layer.values), after))
        pairs = ((found, expected), *zip(new, wanted, strict=True))
        far = _INT8_FAR if self.prepared is not None and self.prepared.step.int8 else _FAR[x.dtype]
        self.proved = all(float((a - b).abs().max()) <= far * float(b.abs().max()) for a, b in pairs)
        layer.keys, layer.values = after
        return expected

    def _run(self, x: Tensor, layer: DynamicLayer, positions: tuple[Tensor, Tensor]) -> Tensor:
        prepared, found = self.prepared, cpu.library()
        assert prepared is not None
        assert found is not None
        room, length = Room.beside(layer), layer.keys.shape[2] + 1
        x, cosine, sine = x.contiguous(), positions[0].contiguous(), positions[1].contiguous()
        out = torch.empty_like(x)
        step = prepared.step
        step.x, step.out, step.cosine, step.sine = x.data_ptr(), out.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        step.keys, step.values, step.room = room.keys.data_ptr(), room.values.data_ptr(), room.keys.shape[2]
        step.length, step.threads = length, torch.get_num_threads()
        found.compress_step(*prepared.addresses)
        room.give(layer, length)
        return out


#: The same for inputs in int8: proves the structure, not the last digits.
_INT8_FAR = 0.1


def use_block_steps(model: PreTrainedModel) -> int:
    """Let blocks of `model` that are built for it take single tokens in one call; how many. Results are those of the
    kernel, layer by layer, to rounding."""
    count = 0
    if cpu.library() is None:
        return 0
    for module in model.modules():
        if "forward" not in module.__dict__ and Parts.of(module) is not None:
            module.forward = BlockStep(module)
            count += 1
    return count
