"""The CPU kernel for packed weights: `cpu.cpp`, built when the package is installed if there was a compiler.

Without it nothing is lost but speed. It is loaded when it is first asked for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.maths.trellis_tables import TABLES, UNIT
from compress.nn.prepared_layer import PreparedLayer

if TYPE_CHECKING:
    from compress.nn.quant_linear import QuantLinear

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Levels of instructions that the kernel is written for; the number is what it calls them.
LEVELS = {1: "AVX2", 2: "AVX-512"}
#: Columns of a layer and of its groups come in multiples of this.
STEP = 32
#: Tokens from which it is faster to expand rows of the weight and leave the product to torch.
MANY = 24
#: Bytes of expanded weight at a time: most layers at once, the head of a large vocabulary in parts.
_EXPANDED_BYTES = 1 << 25
_kept = threading.local()
_ADDRESS, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
#: What is called in the library, and with what.
_FUNCTIONS = {
    "compress_product": (_ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _INT, _INT, _INT, _INT),
    "compress_expand": (_ADDRESS, _COUNT, _COUNT, _ADDRESS, _INT, _INT, _INT),
    "compress_step": (_ADDRESS, _ADDRESS),
    "compress_round_tokens": (_ADDRESS, _COUNT, _COUNT, _ADDRESS, _ADDRESS, _INT, _INT),
    "compress_scale_sums": (_ADDRESS, _COUNT, _COUNT, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT),
    "compress_trellis_round": (
        _ADDRESS, _ADDRESS, _COUNT, _COUNT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT,
    ),
    "compress_trellis_settle": (
        _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _COUNT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS,
        _INT, _INT,
    ),
}  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("groups", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64), ("bits", ctypes.c_int32), ("scale_kind", ctypes.c_int32),
        ("table", ctypes.c_void_p), ("unit", ctypes.c_float),
    )  # fmt: skip


class Prepared(PreparedLayer):
    """What the kernel is told of a layer, and the tensors that the addresses in it belong to."""

    def __init__(self, layer: QuantLinear):
        super().__init__(layer)
        zero = layer.zero_point()
        self.zero = None if zero is None else zero.contiguous()
        self.layer = _Layer(
            self.packed.data_ptr(), self.scale.data_ptr(), None if self.zero is None else self.zero.data_ptr(),
            layer.out_features, layer.in_features, self.scale.shape[1], 4 * self.packed.shape[1], layer.spec.bits,
            _KINDS[self.scale.dtype], _table(layer.spec.bits).data_ptr() if layer.spec.trellis else None, UNIT,
        )  # fmt: skip
        self.address = ctypes.addressof(self.layer)


@cache
def _table(bits: int) -> Tensor:
    """What windows along a trellis stand for, as the kernel's `Table` has it: bytes uint8 `[5 * 256]`."""
    numbers = torch.tensor(TABLES[bits], dtype=torch.int8, device="cpu")
    return torch.cat([numbers.view(torch.uint8), numbers.float().view(torch.uint8)])


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it was not built, or where this processor lacks AVX2."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(os.fspath(path))
            except OSError:  # built for another system
                return None
            names = (*_FUNCTIONS, "compress_vbmi")
            if not all(hasattr(found, name) for name in names):  # built from sources before these
                return None
            for name, types in _FUNCTIONS.items():
                function = getattr(found, name)
                function.argtypes, function.restype = types, None
            found.compress_int8_serves.argtypes = (ctypes.c_void_p,)
            return found if found.compress_level() else None
    return None


def why_not(layer: QuantLinear) -> str | None:
    """Why the kernel cannot serve a layer, as the end of a sentence; None where it can."""
    if library() is None:
        return "it was not built (no compiler when the package was installed) or this processor lacks AVX2"
    if layer.spec.stored != "packed" or layer.spec.activations or layer.spec.bits not in (2, 3, 4, 8):
        return "it is for weights in packed codes of 2, 3, 4 or 8 bits, and inputs that are not rounded"
    if layer.spec.super_block is not None:
        return f"grid {layer.spec.grid} is for llama.cpp"
    if layer.in_features % STEP or layer.in_features // layer.weight_scale.shape[1] % STEP:
        return f"columns and groups must be multiples of {STEP}"
    return None


def fits(layer: QuantLinear, x: Tensor) -> bool:
    """Whether the kernel can compute this product; not where gradients are asked for."""
    if layer.exact or not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not x.numel() or (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False
    found = layer.prepared
    if isinstance(found, Prepared) and found.holds(layer):
        return True
    if why_not(layer) is not None or layer.weight_packed.device.type != "cpu":
        return False
    if not (layer.weight_packed.is_contiguous() and layer.weight_scale.is_contiguous()):
        return False
    Prepared.of(layer)
    return True


def why_not_int8(layer: QuantLinear | None = None) -> str | None:
    """Why inputs cannot be rounded to int8 here, or for a layer, as the end of a sentence; None where they can."""
    found = library()
    if found is None:
        return "the kernel was not built (no compiler when the package was installed) or this processor lacks AVX2"
    if not found.compress_int8():
        return "this processor lacks AVX-512 VNNI"
    if layer is None:
        return None
    if layer.spec.trellis:
        lacking = None if found.compress_vbmi() else "this processor lacks AVX-512 VBMI, which a trellis needs for it"
        return lacking or why_not(layer)
    least = STEP * 8 // layer.spec.bits
    if layer.spec.bits == 3 or layer.in_features // layer.weight_scale.shape[1] % least:
        return f"it takes 2, 4 or 8 bits and groups in multiples of {STEP * 4}, {STEP * 2} or {STEP}"
    return None


def multiply(layer: QuantLinear, x: Tensor, level: int = max(LEVELS)) -> Tensor:
    """x [..., in] times the packed weight, sums in float32: [..., out] in the dtype of x. `level`: the most to use.

    With `layer.int8_inputs`, fewer than `MANY` tokens are rounded to int8, a step for each group, where it `rounds`.
    Along a trellis, few tokens become whole numbers of 23 bits, or of 15 if they are bfloat16, see `cpu.cpp`.
    """
    told, found = layer.prepared, library()
    assert isinstance(told, Prepared)
    assert found is not None
    x = x if x.is_contiguous() else x.contiguous()
    many = x.numel() // layer.in_features
    if many >= MANY:
        out = _expand_and_multiply(found, layer, x.view(many, -1), level).view(*x.shape[:-1], layer.out_features)
    else:
        out = x.new_empty((*x.shape[:-1], layer.out_features))
        found.compress_product(
            told.address, x.data_ptr(), many, out.data_ptr(), _KINDS[x.dtype], torch.get_num_threads(), level,
            layer.int8_inputs,
        )  # fmt: skip
    if layer.bias is not None:
        out += layer.bias.to(out.dtype)
    return out


def _expand_and_multiply(found: ctypes.CDLL, layer: QuantLinear, x: Tensor, level: int) -> Tensor:
    """So many rows of the weight at a time in the dtype of x, and torch's product."""
    told = layer.prepared
    assert isinstance(told, Prepared)
    step = max(64, _EXPANDED_BYTES // (layer.in_features * x.element_size()))
    out = x.new_empty((len(x), layer.out_features))
    weight = _scratch(min(step, layer.out_features) * layer.in_features, x.dtype).view(-1, layer.in_features)
    for first in range(0, layer.out_features, step):
        last = min(first + step, layer.out_features)
        found.compress_expand(
            told.address, first, last, weight.data_ptr(), _KINDS[x.dtype], torch.get_num_threads(), level
        )
        torch.mm(x, weight[: last - first].t(), out=out[:, first:last])
    return out


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Room for so many numbers, kept by the thread: fresh pages take longer to come by than the product itself."""
    kept: Tensor | None = getattr(_kept, "bytes", None)
    size = count * dtype.itemsize
    if kept is None or kept.numel() < size:
        kept = _kept.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [tokens, in] and scales float32 [tokens, 1] of x [tokens, in], float32 or bfloat16 and contiguous.

    They are what `maths/activations.py` makes of it, to the last bit.
    """
    found = library()
    assert found is not None
    codes, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((len(x), 1), dtype=torch.float32)
    found.compress_round_tokens(
        x.data_ptr(), *x.shape, codes.data_ptr(), scales.data_ptr(), _KINDS[x.dtype], torch.get_num_threads()
    )
    return codes, scales


def scale_sums(sums: Tensor, by_token: Tensor, by_row: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sums` int32 [tokens, out] times float32 scales of tokens [tokens, 1] and of rows [out, 1], plus a bias.

    Computed in float32, returned in `dtype`.
    """
    found = library()
    assert found is not None
    out = sums.new_empty(sums.shape, dtype=dtype)
    found.compress_scale_sums(
        sums.data_ptr(), *sums.shape, by_token.data_ptr(), by_row.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), _KINDS[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
