"""Paths through a trellis (`maths/trellis.py`) by the compiled code, where there is any: a hundred times as fast."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.nn.cpu import LEVELS, library


def fits(x: Tensor) -> bool:
    """Whether there is compiled code for these float32 numbers. Those on a GPU come here and go back: that is nothing
    beside what the paths would take there, a column at a time."""
    return x.device.type != "meta" and library() is not None


def round_rows(
    x: Tensor, bits: int, table: Tensor, weights: Tensor | None = None, level: int = max(LEVELS)
) -> tuple[Tensor, Tensor]:
    """As `maths.trellis.round_rows`, of contiguous float32 tensors. `level`: the most of the processor to use."""
    found, device = library(), x.device
    assert found is not None
    x, table, weights = x.cpu(), table.cpu(), None if weights is None else weights.cpu()
    codes, values = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x)
    found.compress_trellis_round(
        x.data_ptr(), None if weights is None else weights.data_ptr(), *x.shape, bits, table.data_ptr(),
        codes.data_ptr(), values.data_ptr(), torch.get_num_threads(), level,
    )  # fmt: skip
    return codes.to(device), values.to(device)


def settle(
    work: Tensor, target: Tensor, scale: Tensor, upper: Tensor, pivots: Tensor, bits: int, table: Tensor, begin: Tensor,
    level: int = max(LEVELS),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `maths.trellis.settle`, of contiguous float32 tensors; the nodes in `begin` are replaced."""
    found, device = library(), work.device
    assert found is not None
    work, target, scale, upper, pivots = (part.cpu() for part in (work, target, scale, upper, pivots))
    codes, values = torch.empty_like(work, dtype=torch.int8), torch.empty_like(work)
    nodes, table = _turned(begin.cpu(), bits).to(torch.int32).contiguous(), table.cpu()
    found.compress_trellis_settle(
        work.data_ptr(), target.data_ptr(), scale.data_ptr(), upper.data_ptr(), pivots.data_ptr(), *work.shape, bits,
        table.data_ptr(), nodes.data_ptr(), codes.data_ptr(), values.data_ptr(), torch.get_num_threads(), level,
    )  # fmt: skip
    begin.copy_(_turned(nodes, bits))
    return codes.to(device), values.to(device)


def _turned(nodes: Tensor, bits: int) -> Tensor:
    """Nodes with their bits in reverse order, as the compiled code has them."""
    found = torch.zeros_like(nodes)
    for bit in range(8 - bits):
        found |= (nodes >> bit & 1) << (7 - bits - bit)
    return found
