"""Small integers packed into 32-bit words, in the layout of compressed-tensors' `pack-quantized` format.

A row of codes is one stream of bits, lowest first, without gaps: element `i` of `bits` bits starts at bit `i * bits`,
and may run over into the next word. Codes are stored as unsigned numbers, `code + 2**(bits-1)`. 32 elements fill
exactly `bits` words.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CompressError

# Rows are packed a few at a time, so that the int32 temporaries stay small beside a large layer.
CHUNK_ELEMENTS = 1 << 20


def packed_columns(columns: int, bits: int) -> int:
    """Words that hold one row."""
    return (columns * bits + 31) // 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 `[rows, columns]` in the signed range of `bits` (1 to 8) -> int32 `[rows, ceil(columns * bits / 32)]`."""
    if codes.dtype != torch.int8 or codes.dim() != 2 or not 1 <= bits <= 8:
        raise CompressError(
            f"cannot pack {codes.dtype} of shape {tuple(codes.shape)} in {bits} bits: int8 [rows, columns], 1 to 8 bits"
        )
    rows, columns = codes.shape
    words = packed_columns(columns, bits)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = codes[start : start + step]
        # Padding is the code that becomes 0 once the offset is added: unused bits of the last word are 0.
        part = functional.pad(part, (0, -columns % 32), value=-(1 << (bits - 1)))
        packed[start : start + step] = _pack_words(part.unflatten(1, (-1, 32)), bits).flatten(1)[:, :words]
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 `[rows, ceil(columns * bits / 32)]` -> int8 codes `[rows, columns]`: undoes `pack`."""
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != packed_columns(columns, bits):
        raise CompressError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}; {columns} columns of {bits} bits take "
            f"int32 [rows, {packed_columns(columns, bits)}]"
        )
    rows, words = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = functional.pad(packed[start : start + step], (0, -words % bits))
        codes[start : start + step] = _unpack_words(part.unflatten(1, (-1, bits)), bits).flatten(1)[:, :columns]
    return codes


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """As `pack`, down the columns (zero points): int8 `[rows, columns]` -> int32 `[ceil(rows * bits / 32), columns]`"""
    return pack(codes.t().contiguous(), bits).t().contiguous()


def unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    """int32 `[ceil(rows * bits / 32), columns]` -> int8 `[rows, columns]`: undoes `pack_rows`."""
    return unpack(packed.t().contiguous(), bits, rows).t().contiguous()


def unpack_some_rows(packed: Tensor, bits: int, rows: Tensor) -> Tensor:
    """int32 `[words, columns]` as of `pack_rows`, and int64 `[n]` -> int8 `[n, columns]`: those rows and no others."""
    word = rows * bits // 32
    shift = (rows * bits % 32).unsqueeze(1)
    low = packed[word].to(torch.int64) & 0xFFFFFFFF
    high = packed[(word + 1).clamp(max=len(packed) - 1)].to(torch.int64)  # a row may run over into the next word
    values = (low | high << 32) >> shift & ((1 << bits) - 1)
    return (values - (1 << (bits - 1))).to(torch.int8)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """int8 `[rows, blocks, 32]` -> int32 `[rows, blocks, bits]`. Shifts that push bits out of a word are meant to."""
    if _whole_in_bytes(bits):
        values = codes.add(1 << (bits - 1)).view(torch.uint8).unflatten(2, (-1, 8 // bits))
        packed = values[..., 0].clone()
        for element in range(1, 8 // bits):
            packed |= values[..., element] << (element * bits)
        return packed.view(torch.int32)
    values = codes.to(torch.int32).add_(1 << (bits - 1))
    packed = torch.zeros(*codes.shape[:2], bits, dtype=torch.int32, device=codes.device)
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        packed[..., word] |= values[..., element] << shift
        if shift + bits > 32:
            packed[..., word + 1] |= values[..., element] >> (32 - shift)
    return packed


def _unpack_words(packed: Tensor, bits: int) -> Tensor:
    """int32 `[rows, blocks, bits]` -> int8 `[rows, blocks, 32]`."""
    codes = torch.empty(*packed.shape[:2], 32, dtype=torch.int8, device=packed.device)
    mask = (1 << bits) - 1
    if _whole_in_bytes(bits):
        values = codes.view(torch.uint8).unflatten(2, (-1, 8 // bits))
        for element in range(8 // bits):
            values[..., element] = (packed.view(torch.uint8) >> (element * bits)) & mask
        return codes.sub_(1 << (bits - 1))
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        value = packed[..., word] >> shift  # fills with the sign bit from above; the mask takes it off again
        if shift + bits > 32:
            low = 32 - shift
            value = (value & ((1 << low) - 1)) | (packed[..., word + 1] << low)
        codes[..., element] = (value & mask) - (1 << (bits - 1))
    return codes


def _whole_in_bytes(bits: int) -> bool:
    """Whether no element runs over the end of a byte: then bytes are worked on, four times as fast as words."""
    return 8 % bits == 0 and sys.byteorder == "little"
