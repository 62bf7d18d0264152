"""Codes, scales and zero points as ONNX Runtime's `MatMulNBits` has them, and the grids that it holds.

A weight [out, in] is cut into blocks of `block_size` neighbouring columns, a power of two from 16 on, with one scale.
Codes are unsigned, the zero point of a symmetric grid in their middle (8, or 128), lowest bits first: the bits that our
packed words have, too. So codes are not computed again, and a group that is several blocks gives its scale to each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.checkpoint import TensorSpec
from compress.formats.base import Contents
from compress.maths import packing
from compress.maths.grid import QuantSpec

SMALLEST, LARGEST = 16, 128
HELD = "4 or 8 bits, with groups of a multiple of 16 columns or one scale a row (group_size: -1)"
#: `accuracy_level` of `MatMulNBits`: 4 rounds what goes into a layer to 8 bits, block by block, and multiplies whole
#: numbers; 1 multiplies float32. docs/decisions.md has what that costs, and what it brings.
ACCURACY_LEVEL, EXACT_LEVEL = 4, 1


def refuses_grid(spec: QuantSpec, name: str) -> str | None:
    """One sentence on why a layer with this grid cannot be held, or None."""
    if spec.activations:
        return f"onnx holds layers of rounded weights, and the inputs of {name} are rounded as well: use rtn or gptq."
    said = "float8" if spec.stored == "float8" else f"{spec.bits} bits" if spec.bits not in (4, 8) else ""
    if not said and spec.group_size != -1 and spec.group_size % SMALLEST:
        said = f"groups of {spec.group_size}"
    return f"onnx holds layers of {HELD}, and {name} has {said}." if said else None


def block_size(spec: QuantSpec) -> int:
    """Columns in a block: the largest power of two that a group can be cut into."""
    return LARGEST if spec.group_size == -1 else min(LARGEST, spec.group_size & -spec.group_size)


def block_count(spec: QuantSpec, columns: int) -> int:
    """Blocks in a row; the last one may be longer than the row."""
    return -(-columns // block_size(spec))


def codes_name(layer: str, spec: QuantSpec) -> str:
    """The tensor of a layer that holds its codes."""
    return f"{layer}.weight_packed" if spec.stored == "packed" else f"{layer}.weight"


def blocks(stored: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """Codes as a layer stores them -> uint8 [out, blocks, bytes of a block]."""
    count, size = block_count(spec, columns), block_size(spec) * spec.bits // 8
    if spec.stored == "packed":
        found = stored.contiguous().view(torch.uint8)
    else:
        found = (stored.to(torch.int16) + 128).to(torch.uint8)
    found = pad(found, (0, max(0, count * size - found.shape[1])))[:, : count * size]
    return found.reshape(len(found), count, size).contiguous()


def repeated(groups: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """What each group has, [out, groups] -> what each block has, [out, blocks]."""
    each = block_count(spec, columns) if spec.group_size == -1 else spec.group_size // block_size(spec)
    return groups.repeat_interleave(each, dim=1).contiguous()


def packed_zeros(stored: Tensor, spec: QuantSpec, rows: int, columns: int) -> Tensor:
    """Zero points as a layer stores them -> uint8 [out, ceil(blocks * bits / 8)], packed along a row."""
    zeros = repeated(packing.unpack_rows(stored, spec.bits, rows), spec, columns)
    width = -(-zeros.shape[1] * spec.bits // 8)
    return packing.pack(zeros, spec.bits).view(torch.uint8)[:, :width].contiguous()


def held_shape(tensor: TensorSpec, contents: Contents) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """The dtype and the shape of a tensor of the model as the graph takes it; None where it takes none of it."""
    layer, _, last = tensor.name.rpartition(".")
    spec = contents.quantization.get(layer)
    if spec is None or last == "bias":
        return torch.float32, tensor.shape
    if last == "weight_shape":
        return None
    rows, columns = contents.skeleton.get_submodule(layer).weight.shape
    count = block_count(spec, columns)
    if last == "weight_scale":
        return torch.float32, (rows, count)
    if last == "weight_zero_point":
        return torch.uint8, (rows, -(-count * spec.bits // 8))
    return torch.uint8, (rows, count, block_size(spec) * spec.bits // 8)
