"""A linear layer whose weight stays packed integers, or numbers of 8 bits, while it runs.

Its buffers carry the names and layouts of compressed-tensors' formats (`pack-quantized`, or `int-quantized` and
`float-quantized`), so the state dict of a model with `QuantLinear` layers *is* the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from compress.maths import grid, packing, super_blocks
from compress.maths.grid import STORED_DTYPES, QuantSpec
from compress.maths.named_grids import SuperBlock
from compress.nn import kernels

if TYPE_CHECKING:
    from compress.nn.prepared_layer import PreparedLayer

#: Of super-blocks: the tensor with their numbers -> that with the groups' multiples of these.
MULTIPLES = {"weight_scale": "weight_multiples", "weight_minimum": "weight_minimum_multiples"}
_CHUNK_VALUES = 1 << 18  # values unpacked at once: the temporaries stay in the cache, whatever the layer


class QuantLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b with W = (codes - zero) * scale, W of shape [out, in] in codes of `spec.bits` bits.

    Buffers, G groups per row: `weight_packed` int32 [out, ceil(in * bits / 32)], `weight_scale` [out, G],
    `weight_zero_point` int32 [ceil(out * bits / 32), G] (asymmetric grids only), `weight_shape` int64 [2]. Where codes
    are stored one an element (`spec.stored`): `weight` int8 or float8_e4m3fn [out, in], `weight_scale` [out, 1]; the
    attribute `weight` gives the dequantized weight all the same. On a grid with super-blocks, S of them in a row,
    scales are stored as they are made up: `weight_scale` float16 [out, S], `weight_multiples` int32 [out, ceil(G * b /
    32)], multiples of b bits; and with minima `weight_minimum` and `weight_minimum_multiples` likewise.
    With `spec.activations`, x is rounded as well, token by token.
    `transposed` records that the layer replaces transformers' `Conv1D`, which keeps its weight as [in, out].
    `dtype` is the dtype of the layer replaced, which `weight` and the bias have.
    `exact` (the default) is the arithmetic of plain transformers, to the last bit. Without it, kernels may be used that
    sum in another order, as `compress.load` lets them.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.dtype, self.transposed = spec, dtype, transposed
        self.exact = True
        #: Whether the CPU kernel may round inputs of few tokens to int8. See `cpu.multiply`.
        self.int8_inputs = False
        for name, (kind, shape) in packed_tensors(in_features, out_features, spec).items():
            # Not by register_buffer, which would take the property `weight` for an attribute in the way.
            self._buffers[name] = torch.empty(shape, dtype=kind, device=device)
        if spec.symmetric or spec.minima:
            self.register_buffer("weight_zero_point", None)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        self._cache: Tensor | None = None
        self._caching = False
        #: What the kernel that serves this layer keeps beside it, once it has been called.
        self.prepared: PreparedLayer | None = None

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
        transposed: bool = False,
    ) -> QuantLinear:
        """A layer without content, by default on the meta device, for a checkpoint to fill."""
        return cls(in_features, out_features, spec, bias, dtype, device, transposed)

    @classmethod
    def like(cls, module: nn.Module, spec: QuantSpec, device: torch.device | str = "meta") -> QuantLinear:
        """An empty layer with the shape, bias and dtype of a `Linear`, a `Conv1D` or another `QuantLinear`.

        Of the class that the spec asks for: bitsandbytes' grids have one of their own.
        """
        from compress.nn.bnb_linear import BnbLinear, BnbSpec

        kind: Any = BnbLinear if isinstance(spec, BnbSpec) else QuantLinear
        if isinstance(module, QuantLinear):
            shape, dtype, transposed = (module.in_features, module.out_features), module.dtype, module.transposed
        else:
            transposed = not isinstance(module, nn.Linear)  # transformers' Conv1D: weight [in, out]
            weight = module.get_parameter("weight")
            rows, columns = weight.shape
            shape, dtype = ((rows, columns) if transposed else (columns, rows)), weight.dtype
        bias = getattr(module, "bias", None) is not None
        found: QuantLinear = kind(*shape, spec, bias, dtype, device, transposed)
        return found

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        spec: QuantSpec,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> QuantLinear:
        """Pack codes [out, in] (int8 in the range of `spec`, or float8) with scale [out, G] and zero [out, G], int8, or
        float32 minima where the grid has those.

        The bias is kept by reference in `dtype`. `ValueError` where shapes and spec disagree, CompressError where
        super-blocks do not hold a scale.
        """
        out_features, in_features = codes.shape
        shape = (out_features, spec.groups(in_features))
        if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
            raise ValueError(
                f"codes {tuple(codes.shape)} need scale and zero of shape {shape}, not {tuple(scale.shape)}"
            )
        if (zero is None) != spec.symmetric:
            raise ValueError("an asymmetric spec needs a zero, a symmetric one has none")
        layer = cls(in_features, out_features, spec, False, dtype, "meta", transposed)
        if spec.super_block is None:
            layer.weight_scale = scale.detach().to(spec.torch_scale_dtype).contiguous()
        else:
            for name, values in (("weight_scale", scale), ("weight_minimum", zero)):
                if values is not None:
                    number, multiples = super_blocks.factored(values.detach(), spec.super_block)
                    layer._buffers[name] = number
                    layer._buffers[MULTIPLES[name]] = _pack_multiples(multiples, spec.super_block)
        if spec.stored == "packed":
            layer.weight_packed = packing.pack(codes, spec.bits)
            layer.weight_shape = torch.tensor([out_features, in_features], device=codes.device)
        else:
            layer._buffers["weight"] = codes.contiguous()
        if zero is not None and not spec.minima:
            layer.weight_zero_point = packing.pack_rows(zero, spec.bits)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return layer

    def codes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes [out, in], scale [out, G], zero [out, G] or None): what `from_codes` was given."""
        return self.stored_codes(), self.scales(), self.zero_point()

    def stored_codes(self, rows: slice = slice(None)) -> Tensor:
        """Codes [rows, in]: int8, or float8_e4m3fn. The stored ones themselves where they are stored one an element."""
        stored = self._buffers.get("weight")
        if stored is not None:
            return stored[rows]
        return packing.unpack(self.weight_packed[rows], self.spec.bits, self.in_features)

    def scales(self) -> Tensor:
        """[out, G] in the spec's scale dtype."""
        return self.weight_scale if self.spec.super_block is None else super_blocks.spread(*self.in_two("weight_scale"))

    def in_two(self, name: str) -> tuple[Tensor, Tensor]:
        """The float16 numbers [out, S] of super-blocks, and their int8 multiples [out, G]: of `weight_scale` or
        `weight_minimum`."""
        block, number, packed = self.spec.super_block, self._buffers[name], self._buffers[MULTIPLES[name]]
        assert block is not None
        assert number is not None
        assert packed is not None
        multiples = packing.unpack(packed, block.multiple_bits, self.spec.groups(self.in_features))
        return number, multiples.add_(_middle(block))

    def zero_point(self) -> Tensor | None:
        """int8 [out, G], float32 minima on a grid with those, or None for a symmetric grid."""
        if self.spec.minima:
            return super_blocks.spread(*self.in_two("weight_minimum"))
        if self.weight_zero_point is None:
            return None
        return packing.unpack_rows(self.weight_zero_point, self.spec.bits, self.out_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype` (default: the layer's), to the last bit what transformers makes of the file.

        transformers loads scales of symmetric grids in the model's dtype and multiplies there; with asymmetric grids
        it multiplies in the dtype of the stored scales, and casts the product. On a grid with super-blocks everything
        is float32, as in llama.cpp.
        """
        dtype = dtype or self.dtype
        scale, zero = self.scales(), self.zero_point()
        compute = dtype if self.spec.symmetric and self.spec.super_block is None else scale.dtype

        def part(rows: slice) -> Tensor:
            zero_rows = None if zero is None else zero[rows]
            return grid.dequantize(self.stored_codes(rows), scale[rows], zero_rows, self.spec, compute)

        step = max(1, _CHUNK_VALUES // max(1, self.in_features))
        if step >= self.out_features:
            return part(slice(None)).to(dtype)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight_scale.device)
        for start in range(0, self.out_features, step):
            weight[start : start + step] = part(slice(start, start + step))
        return weight

    def cache_weight(self, keep: bool) -> None:
        """Whether the dequantized weight is kept between forwards; what was kept is dropped. See `kernels.cached`."""
        self._caching, self._cache = keep, None

    def cached_weight(self, dtype: torch.dtype) -> Tensor:
        """`dequantize(dtype)`, or the kept result of it."""
        if self._cache is not None and self._cache.dtype == dtype:
            return self._cache
        weight = self.dequantize(dtype)
        if self._caching:
            self._cache = weight
        return weight

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at each access. [in, out] if the layer replaces a `Conv1D`."""
        weight = self.dequantize()
        return weight.t() if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], computed in the dtype of x. Gradients reach x, not the weight."""
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Frozen.apply(x, self))
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`forward`, without a gradient."""
        return kernels.choose(self, x)(self, x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = self.prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self._cache = self.prepared = None
        device = self.weight_scale.device
        codes = self._buffers.get("weight")
        if codes is not None:  # Numbers of 8 bits are codes: moved like integers, never cast
            self._buffers["weight"] = codes.view(torch.int8)
        super()._apply(fn, recurse)
        if codes is not None:
            self._buffers["weight"] = self._buffers["weight"].view(codes.dtype)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, spec={self.spec}"


class _Frozen(torch.autograd.Function):  # type: ignore[misc]
    """y = x W^T + b as the layer computes it. The dequantized weight is not kept for the gradient but made anew there,
    one layer at a time; where inputs are rounded, the gradient passes over that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = upstream
        weight = ctx.layer.cached_weight(ctx.dtype).to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None


def _middle(block: SuperBlock) -> int:
    """The multiple that `packing`, whose codes lie around zero, stores as 0."""
    return block.multiples[0] + (1 << (block.multiple_bits - 1))


def _pack_multiples(multiples: Tensor, block: SuperBlock) -> Tensor:
    return packing.pack(multiples - _middle(block), block.multiple_bits)


def packed_tensors(
    in_features: int, out_features: int, spec: QuantSpec
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the tensors that hold a weight [out, in]; a packed layer's size follows from them."""
    if spec.stored != "packed":
        codes = (STORED_DTYPES[spec.stored], (out_features, in_features))
        return {"weight": codes, "weight_scale": (spec.torch_scale_dtype, (out_features, 1))}
    groups, block = spec.groups(in_features), spec.super_block
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (out_features, -(-in_features * spec.bits // 32))),
    }
    if block is not None:
        for name in list(MULTIPLES)[: 1 + spec.minima]:
            tensors[name] = (torch.float16, (out_features, groups // block.groups))
            words = packing.packed_columns(groups, block.multiple_bits)
            tensors[MULTIPLES[name]] = (torch.int32, (out_features, words))
        return {**tensors, "weight_shape": (torch.int64, (2,))}
    tensors["weight_scale"] = (spec.torch_scale_dtype, (out_features, groups))
    if not spec.symmetric:
        tensors["weight_zero_point"] = (torch.int32, (-(-out_features * spec.bits // 32), groups))
    tensors["weight_shape"] = (torch.int64, (2,))
    return tensors
