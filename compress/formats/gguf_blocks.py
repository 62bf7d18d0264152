"""ggml's blocks of quantized weights: which of them hold a grid of ours exactly, and a layer's codes as their bytes.

A block is 32 neighbouring weights of a row with a float16 scale `d` of its own, little-endian, row after row:

    Q4_0   d, 16 bytes: code j in the low half of byte j, code 16 + j in the high half     weight = (q - 8) * d
    Q4_1   d, float16 m, 16 bytes laid out alike                                           weight = q * d + m
    Q8_0   d, 32 signed bytes                                                              weight = q * d

with q from 0 to 15 in four bits. Groups of a multiple of 32 weights are held as blocks that repeat their scale.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.maths.grid import NAMED_GRIDS, QuantSpec
from compress.nn.bnb_linear import BnbSpec

BLOCK = 32
#: Bytes of a block.
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
#: (bits, symmetric) -> the blocks that hold such a grid.
_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}


def block_kind(spec: QuantSpec, columns: int) -> str | None:
    """The blocks that hold every weight of this grid, in rows of so many columns, exactly; None: there are none.

    A scale that float16 may not hold, or a minimum, is held for sure only on a grid made for the blocks.
    """
    if isinstance(spec, BnbSpec) or spec.stored != "packed" or columns % BLOCK:
        return None
    if spec.columns_per_group(columns) % BLOCK:
        return None
    made_for_it = spec.grid is not None or (spec.symmetric and spec.scale_dtype == "float16")
    return _KINDS.get((spec.bits, spec.symmetric)) if made_for_it else None


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
