"""Paths through a trellis (`maths/trellis.py`) by the compiled code, where there is any: a hundred times as fast."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.nn.cpu import LEVELS, library


def fits(x: Tensor) -> bool:
    """Whether there is compiled code for float32 numbers where these are."""
    return x.is_cpu and library() is not None


def round_rows(
    x: Tensor, bits: int, table: Tensor, weights: Tensor | None = None, level: int = max(LEVELS)
) -> tuple[Tensor, Tensor]:
    """As `maths.trellis.round_rows`, of contiguous float32 tensors. `level`: the most of the processor to use."""
    found = library()
    assert found is not None
    codes, values = torch.empty(x.shape, dtype=torch.int8), torch.empty_like(x)
    found.compress_trellis_round(
        x.data_ptr(), None if weights is None else weights.data_ptr(), *x.shape, bits, table.data_ptr(),
        codes.data_ptr(), values.data_ptr(), torch.get_num_threads(), level,
    )  # fmt: skip
    return codes, values


def settle(
    work: Tensor, target: Tensor, scale: Tensor, upper: Tensor, pivots: Tensor, bits: int, table: Tensor, begin: Tensor,
    level: int = max(LEVELS),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `maths.trellis.settle`, of contiguous float32 tensors; the nodes in `begin` are replaced."""
    found = library()
    assert found is not None
    codes, values = torch.empty(work.shape, dtype=torch.int8), torch.empty_like(work)
    nodes = _turned(begin, bits).to(torch.int32).contiguous()
    found.compress_trellis_settle(
        work.data_ptr(), target.data_ptr(), scale.data_ptr(), upper.data_ptr(), pivots.data_ptr(), *work.shape, bits,
        table.data_ptr(), nodes.data_ptr(), codes.data_ptr(), values.data_ptr(), torch.get_num_threads(), level,
    )  # fmt: skip
    begin.copy_(_turned(nodes, bits))
    return codes, values


def _turned(nodes: Tensor, bits: int) -> Tensor:
    """Nodes with their bits in reverse order, as the compiled code has them."""
    found = torch.zeros_like(nodes)
    for bit in range(8 - bits):
        found |= (nodes >> bit & 1) << (7 - bits - bit)
    return found
