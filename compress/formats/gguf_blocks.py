"""ggml's blocks of quantized weights: which of them hold a grid of ours exactly, and a layer's codes as their bytes.

A block is 32 neighbouring weights of a row with a float16 scale `d` of its own, little-endian, row after row:

    Q4_0   d, 16 bytes: code j in the low half of byte j, code 16 + j in the high half     weight = (q - 8) * d
    Q4_1   d, float16 m, 16 bytes laid out alike                                           weight = q * d + m
    Q8_0   d, 32 signed bytes                                                              weight = q * d

with q from 0 to 15 in four bits. Groups of a multiple of 32 weights are held as blocks that repeat their scale.

k-quants have super-blocks of 256 weights, whose groups have a scale of `d` times an integer k, and in some a minimum of
`dmin` times l (`maths/super_blocks.py`):

    Q2_K   16 bytes k | l << 4, 64 bytes of q, d, dmin                     weight = q * d * k - dmin * l
    Q3_K   32 bytes of q's third bits, 64 of the low two, 12 of k + 32, d  weight = (q - 4) * d * k
    Q4_K   d, dmin, 12 bytes of k and l, 128 bytes of q                    weight = q * d * k - dmin * l
    Q5_K   d, dmin, 12 bytes of k and l, 32 of q's fifth bits, 128 of q    likewise
    Q6_K   128 bytes of q's low four bits, 64 of the high two, 16 of k, d  weight = (q - 32) * d * k

Codes of two bits: byte j of 32 holds weights j, 32 + j, 64 + j and 96 + j of half a super-block, the first in its
lowest bits. Codes of four: byte j of 32 holds weights j and 32 + j of a quarter; in Q6_K byte j of 64 holds weights j
and 64 + j of a half. Single bits: byte j of 32 holds bit i of weight 32 i + j.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.maths.grid import QuantSpec
from compress.maths.named_grids import NAMED_GRIDS, SUPER_COLUMNS
from compress.nn.bnb_linear import BnbSpec

BLOCK = 32
#: Bytes of a block.
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
BLOCK_BYTES |= {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
#: (bits, symmetric) -> the blocks that hold such a grid.
_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}


def block_kind(spec: QuantSpec, columns: int) -> str | None:
    """The blocks that hold every weight of this grid, in rows of so many columns, exactly; None: there are none.

    A scale that float16 may not hold, or a minimum, is held for sure only on a grid made for the blocks.
    """
    if spec.super_block is not None:
        return spec.super_block.kind if columns % SUPER_COLUMNS == 0 else None
    if isinstance(spec, BnbSpec) or spec.trellis or spec.stored != "packed" or columns % BLOCK:
        return None
    if spec.columns_per_group(columns) % BLOCK:
        return None
    made_for_it = spec.of_blocks or (spec.symmetric and spec.scale_dtype == "float16")
    return _KINDS.get((spec.bits, spec.symmetric)) if made_for_it else None


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of so many weights."""
    size = SUPER_COLUMNS if kind.endswith("_K") else BLOCK
    return columns // size * BLOCK_BYTES[kind]


def grids_in_words() -> str:
    """What can be held, for a message."""
    return f"grid: {', '.join(NAMED_GRIDS)}, or symmetric 4 and 8 bits with a group_size that is a multiple of {BLOCK}"


def pack_blocks(codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str) -> np.ndarray:
    """uint8 `[out, bytes of a row]`: codes int8 `[out, in]`, scale `[out, groups]`, zero int8 `[out, groups]` or None.

    CompressError where float16 does not hold a scale or a minimum: nothing is rounded here.
    """
    rows, columns = codes.shape
    repeat = columns // BLOCK // scale.shape[1]
    wide = scale.to(torch.float32).repeat_interleave(repeat, 1)
    fields = [_half_bytes(wide, kind)]
    blocks = codes.unflatten(1, (-1, BLOCK))
    if kind == "Q8_0":
        fields.append(blocks.contiguous().view(torch.uint8))
    else:
        if kind == "Q4_1":
            assert zero is not None
            minimum = -(zero.to(torch.float32) + 8).repeat_interleave(repeat, 1) * wide
            fields.append(_half_bytes(minimum, kind))
        values = (blocks + 8).to(torch.uint8)
        fields.append(values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4)
    packed: np.ndarray = torch.cat(fields, 2).view(rows, -1).numpy()
    return packed


def _half_bytes(values: Tensor, kind: str) -> Tensor:
    """float32 `[rows, blocks]` as the two bytes of each number in float16, uint8 `[rows, blocks, 2]`."""
    half = values.to(torch.float16)
    if not torch.equal(half.to(torch.float32), values):
        raise CompressError(
            f"{kind} blocks keep their numbers in float16, which does not hold all of these: "
            f"round with {grids_in_words()}"
        )
    return torch.from_numpy(half.numpy().astype("<f2").view(np.uint8)).unflatten(1, (-1, 2))


Numbers = tuple[Tensor, Tensor]


def pack_super_blocks(codes: Tensor, scale: Numbers, minimum: Numbers | None, kind: str) -> np.ndarray:
    """uint8 `[out, bytes of a row]`: codes int8 `[out, in]`; scale and minimum as float16 `[out, supers]` and int8
    multiples `[out, groups]`, which is what `QuantLinear.in_two` gives."""
    rows, columns = codes.shape
    supers = columns // SUPER_COLUMNS
    bits = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}[kind]
    values = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).view(rows, supers, SUPER_COLUMNS)
    d, k = _number_bytes(scale[0]), scale[1].view(rows, supers, -1)
    dmin, low = (d, k) if minimum is None else (_number_bytes(minimum[0]), minimum[1].view(rows, supers, -1))
    k, low = k.view(torch.uint8), low.view(torch.uint8)
    if kind == "Q2_K":
        fields = [k | low << 4, _interleaved(values, 2, 32), d, dmin]
    elif kind == "Q3_K":
        fields = [_interleaved(values >> 2, 1, 32), _interleaved(values & 3, 2, 32), _shifted_six_bits(k + 32), d]
    elif kind == "Q6_K":
        fields = [_interleaved(values & 15, 4, 64), _interleaved(values >> 4, 2, 32), k, d]
    else:
        high = [_interleaved(values >> 4, 1, 32)] if kind == "Q5_K" else []
        fields = [d, dmin, _paired_six_bits(k, low), *high, _interleaved(values & 15, 4, 32)]
    packed: np.ndarray = torch.cat(fields, 2).view(rows, -1).contiguous().numpy()
    return packed


def _number_bytes(number: Tensor) -> Tensor:
    """float16 `[rows, supers]` as uint8 `[rows, supers, 2]`."""
    return torch.from_numpy(number.contiguous().numpy().astype("<f2").view(np.uint8)).unflatten(1, (-1, 2))


def _interleaved(values: Tensor, bits: int, stride: int) -> Tensor:
    """uint8 `[rows, supers, 256]` of so many bits -> `[rows, supers, 32 * bits]`: a byte holds weights that lie
    `stride` apart, the first in its lowest bits."""
    parts = values.unflatten(2, (-1, 8 // bits, stride))
    packed = parts[:, :, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, :, :, place] << (place * bits)
    return packed.flatten(2)


def _shifted_six_bits(k: Tensor) -> Tensor:
    """uint8 `[rows, supers, 16]` below 64 -> 12 bytes: byte j has the low four bits of k_j and k_(8 + j); byte 8 + j
    the high two of k_j, k_(4 + j), k_(8 + j) and k_(12 + j)."""
    low, high = k & 15, (k >> 4).unflatten(2, (4, 4))
    quarters = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat([low[..., :8] | low[..., 8:] << 4, quarters], 2)


def _paired_six_bits(k: Tensor, low: Tensor) -> Tensor:
    """uint8 `[rows, supers, 8]` below 64, twice -> 12 bytes: k_j and l_j of the first four in six bits each, and in
    their highest two those of the last four, whose low four bits lie together in the last four bytes."""
    first, second = slice(0, 4), slice(4, 8)
    return torch.cat(
        [
            k[..., first] | k[..., second] >> 4 << 6, low[..., first] | low[..., second] >> 4 << 6,
            k[..., second] & 15 | (low[..., second] & 15) << 4,
        ],
        2,
    )  # fmt: skip
