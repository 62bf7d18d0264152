"""Trellis-coded weights: what a code stands for depends on the codes before it in its row.

A row's codes of 2, 3 or 4 bits are one stream of bits, as they are packed anyway. The last 8 bits of the stream up to a
code, its window, stand for a number of a table of 256: `weight ~ table[window] * scale`, with a scale for each group of
neighbouring columns. Each weight can thus be any of 256 numbers and takes no more bits than on a grid of 4, 8 or 16;
what it becomes decides in part what its neighbours can be, so that a row is rounded as a whole: the codes with the
least squared error, in units of the scales, are the cheapest path through a trellis of `2**(8 - bits)` nodes, which
Viterbi's algorithm finds. On normally distributed weights the squared error is about two thirds of the integer
grid's.

Marcellin and Fischer: "Trellis Coded Quantization of Memoryless and Gauss-Markov Sources", 1990; Tseng et al.: "QTIP:
Quantization with Trellises and Incoherence Processing", 2024, arXiv 2406.11235, section 3 (the "bitshift" trellis).
Windows of 8 bits, where QTIP has 16, so that a processor looks a table up in its registers and a row is rounded with
256 comparisons a weight.

Before a row the stream is taken to be zeros. Codes are signed, as `maths/packing.py` has them: stored plus
`2**(bits-1)`. `settle` adds GPTQ's feedback: every path through the trellis keeps its own corrections of the columns
still to come (in the word of communications, per-survivor processing), so that the path chosen is the best with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from compress.maths.trellis_tables import TABLES, UNIT

#: Bits that codes on a trellis can have, and of the window.
BITS, WINDOW = tuple(TABLES), 8
#: How often scales are fitted to the numbers that rounding chose, and rounding done anew.
FITS = 5
#: Weights whose windows are in memory at once, or paths where there is no compiled code for it; those with corrections.
_AT_ONCE, _CORRECTED_AT_ONCE = 1 << 18, 1 << 16


@cache
def table_of(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 `[256]`: what each window stands for, multiples of 1/32; a standard deviation near 1 with its use."""
    return torch.tensor(TABLES[bits], dtype=torch.float32, device=device).mul_(UNIT)


def windows(codes: Tensor, bits: int) -> Tensor:
    """int8 codes `[rows, columns]` -> int32 `[rows, columns]`: the 8 bits that end with each, the newest on top."""
    stream = codes.to(torch.int16).add_(1 << (bits - 1))
    found = stream << (WINDOW - bits)
    for back in range(1, min(-(-WINDOW // bits), stream.shape[1])):
        shift, past = WINDOW - bits * (back + 1), stream[:, :-back]
        found[:, back:] |= past << shift if shift >= 0 else past >> -shift
    return found.to(torch.int32)


def values(codes: Tensor, bits: int) -> Tensor:
    """float32 `[rows, columns]`: what the codes of whole rows stand for, before the scale."""
    table, found = table_of(bits, codes.device), torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in _few(codes, _AT_ONCE):
        torch.index_select(table, 0, windows(codes[rows], bits).flatten(), out=found[rows].view(-1))
    return found


def round_rows(x: Tensor, bits: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 and values float32 of `x` `[rows, columns]`, in units of the scale: for every row those with the least
    sum of `weights` `[columns]` (all ones if None) times squared error."""
    from compress.nn import cpu_trellis

    x = x.to(torch.float32).contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    if cpu_trellis.fits(x):
        return cpu_trellis.round_rows(x, bits, table_of(bits), weights)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    for rows in _few(x, _AT_ONCE):
        codes[rows] = _cheapest(x[rows], bits, weights)
    return codes, values(codes, bits)


def settle(
    work: Tensor, target: Tensor, scale: Tensor, upper: Tensor, pivots: Tensor, bits: int, begin: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes int8 and values float32 of a stretch of rows, `[rows, columns]`, with feedback inside it.

    work: the weights, corrected for the columns before the stretch; target: what errors are counted from; scale: each
    weight's. upper `[columns, columns]` and pivots `[columns]`: of `maths/feedback.py`. begin: int32 `[rows]`, the node
    that the paths start from, and after the call that in which the best one ended.
    """
    from compress.nn import cpu_trellis

    work, target, scale, upper, pivots = (
        part.to(torch.float32).contiguous() for part in (work, target, scale, upper, pivots)
    )
    if cpu_trellis.fits(work):
        return cpu_trellis.settle(work, target, scale, upper, pivots, bits, table_of(bits), begin)
    codes, found = torch.empty(work.shape, dtype=torch.int8, device=work.device), torch.empty_like(work)
    for rows in _few(work, _CORRECTED_AT_ONCE):
        codes[rows], found[rows], begin[rows] = _settled(
            work[rows], target[rows], scale[rows], upper, pivots, bits, begin[rows]
        )
    return codes, found


def find_scales(grouped: Tensor, bits: int, search: bool, importance: Tensor | None) -> Tensor:
    """Scale `[rows, groups]` for weights `[rows, groups, size]`: each group's root mean square, with `search` fitted to
    what rounding makes of the row, by least squares (`importance` `[groups, size]` weighs the columns)."""
    scale = grouped.square().mean(2).sqrt()
    scale = scale.masked_fill(scale == 0, torch.finfo(torch.float16).smallest_normal)
    weights = None if importance is None else importance / importance.mean().clamp(min=1e-30)
    for _ in range(FITS if search else 0):
        steps = (grouped / scale.unsqueeze(2)).flatten(1)
        _, found = round_rows(steps, bits, None if weights is None else weights.flatten())
        found = found.view_as(grouped).to(grouped.dtype)
        weighed = found if weights is None else found * weights
        better = (weighed * grouped).sum(2) / (weighed * found).sum(2)
        scale = torch.where(better.isfinite() & (better > 0), better, scale)
    return scale


def search_bytes(columns: int, bits: int) -> int:
    """What finding the best paths of rows takes beside what is rounded: tables of the weights that `find_scales` has at
    once, and where each path came from: compiled, of 16 rows for each thread, a byte a node."""
    from compress.maths.grid import CHUNK_ELEMENTS
    from compress.nn.cpu import library

    nodes, tables = 1 << (WINDOW - bits), 6 * 4 * max(CHUNK_ELEMENTS, columns)
    if library() is not None:
        threads: int = torch.get_num_threads()
        return tables + threads * columns * nodes * 16
    plain = max(_AT_ONCE, columns) * nodes + 6 * 4 * (1 << WINDOW) * max(1, _AT_ONCE // columns)
    return tables + max(plain, (4 * 4 + 1) * nodes * _CORRECTED_AT_ONCE)


def _few(x: Tensor, at_once: int) -> Iterator[slice]:
    step = max(1, at_once // max(1, x.shape[1]))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _cheapest(x: Tensor, bits: int, weights: Tensor | None) -> Tensor:
    """`round_rows` in torch, a column at a time."""
    table, nodes = table_of(bits, x.device), 1 << (WINDOW - bits)
    before = torch.arange(1 << WINDOW, device=x.device) & (nodes - 1)
    costs = x.new_full((len(x), nodes), torch.inf)
    costs[:, 0] = 0
    origins = []
    for column in range(x.shape[1]):
        error = (x[:, column, None] - table).square_()
        if weights is not None:
            error *= weights[column]
        costs, origin = (error + costs[:, before]).unflatten(1, (nodes, -1)).min(2)
        origins.append(origin.to(torch.uint8))
    return _traced(costs, origins, bits)[0]


def _traced(costs: Tensor, origins: list[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 `[rows, columns]` of the cheapest path, and the node that it ends in.

    costs: the last, `[rows, nodes]`. origins: for each column uint8 `[rows, nodes]`, the oldest bits of the window
    that leads to each node.
    """
    last = node = costs.argmin(1)
    codes = []
    for origin in reversed(origins):
        window = node << bits | origin.gather(1, node.unsqueeze(1)).squeeze(1)
        codes.append((window >> (WINDOW - bits)) - (1 << (bits - 1)))
        node = window & ((1 << (WINDOW - bits)) - 1)
    return torch.stack(codes[::-1], 1).to(torch.int8), last


def _settled(
    work: Tensor, target: Tensor, scale: Tensor, upper: Tensor, pivots: Tensor, bits: int, begin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`settle` in torch, a column at a time; codes, values, and the nodes at the end, int32."""
    table, nodes = table_of(bits, work.device), 1 << (WINDOW - bits)
    rows, columns = work.shape
    before = torch.arange(1 << WINDOW, device=work.device) & (nodes - 1)
    costs = work.new_full((rows, nodes), torch.inf).scatter_(1, begin.long().unsqueeze(1), 0.0)
    paths = work.unsqueeze(1).repeat(1, nodes, 1)  # the columns as each path has corrected them
    came = torch.arange(nodes, device=work.device).expand(rows, nodes)
    origins, started = [], came
    for column in range(columns):
        error = paths[:, before, column] - scale[:, column, None] * table
        costs, origin = (error.square_() * pivots[column] + costs[:, before]).unflatten(1, (nodes, -1)).min(2)
        window = came << bits | origin
        change = target[:, column, None] - scale[:, column, None] * table[window]
        from_node = window & (nodes - 1)
        paths = paths.gather(1, from_node.unsqueeze(2).expand_as(paths)) + change.unsqueeze(2) * upper[column]
        started = started.gather(1, from_node)
        origins.append(origin.to(torch.uint8))
    codes, last = _traced(costs, origins, bits)
    stream = _after(started.gather(1, last.unsqueeze(1)), codes, bits)
    return codes, table[stream], last.to(torch.int32)


def _after(node: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Windows int64 `[rows, columns]` of codes that follow a node `[rows, 1]`."""
    found, left = [], node
    for column in codes.unbind(1):
        window = (column.long() + (1 << (bits - 1))).unsqueeze(1) << (WINDOW - bits) | left
        found.append(window)
        left = window >> bits
    return torch.cat(found, 1)
