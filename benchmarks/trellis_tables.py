"""Fits tables as those of `compress/maths/trellis_tables.py` and prints such a file.

    python benchmarks/trellis_tables.py > tables.py

A table of 256 numbers for the windows of a trellis is fitted as Lloyd fits a quantizer: normally distributed rows are
rounded with the table as it stands, each number becomes the mean of what was rounded to it, and so on. Where that ends
depends on where it begins, so it begins several times, with the quantiles of the normal distribution scattered over
the windows by multiplication modulo 256, and the table with the least error on rows of its own is kept. Numbers are
multiples of 1/32 that fit int8. Errors go to stderr. Takes half a minute.

Folders hold codes and no tables, so those in the package are for good: better ones would be another grid. They were
made so when paths that are as good to the last bit were still told apart otherwise (`cpu_trellis.h`); from there on a
run ends at other tables, with errors of 0.07586, 0.02016 and 0.00535 where the package's have 0.07582, 0.02016 and
0.00536.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from compress.maths import trellis
from compress.maths.trellis_tables import UNIT

ROWS, COLUMNS, STARTS, STEPS, LAST = 1024, 256, 40, 20, 60
HEAD = '''"""What the windows of a trellis stand for, in multiples of `UNIT`; made by `benchmarks/trellis_tables.py`.

For codes of 2, 3 and 4 bits, each table with 256 numbers in the order of the windows.
"""

UNIT = 1 / 32


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


TABLES: dict[int, tuple[int, ...]] = {'''


def error(table: Tensor, rows: Tensor, bits: int) -> float:
    """Mean squared error of rounding the rows."""
    return float((rounded(table, rows, bits)[1] - rows).square().mean())


def rounded(table: Tensor, rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and numbers of the rows with this table in the place of the package's."""
    trellis.table_of = lambda bits, device="cpu": table  # type: ignore[assignment]
    return trellis.round_rows(rows, bits)


def improved(table: Tensor, rows: Tensor, bits: int, steps: int) -> Tensor:
    """The table after so many steps of Lloyd's."""
    for _ in range(steps):
        codes, _ = rounded(table, rows, bits)
        windows = trellis.windows(codes, bits).flatten()
        count = torch.bincount(windows, minlength=256)
        total = torch.zeros(256).index_add_(0, windows, rows.flatten())
        table = torch.where(count > 0, total / count.clamp(min=1), table)
    return table


def start(bits: int, generator: torch.Generator) -> Tensor:
    """Quantiles, scattered: the window, read with its newest code lowest, times an odd number, and the older codes
    times another."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(256) + 0.5) / 256)
    turned = torch.tensor([int(f"{window:08b}"[::-1], 2) for window in range(256)])
    one, two = (torch.randint(0, 128, (2,), generator=generator) * 2 + 1).tolist()
    return quantiles[(turned * one + (turned >> bits) * two) % 256]


def fitted(bits: int) -> Tensor:
    """The best table found, as whole numbers."""
    generator = torch.Generator().manual_seed(bits)
    rows, held_out = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    found = [improved(start(bits, generator), rows, bits, STEPS) for _ in range(STARTS)]
    best = sorted(found, key=lambda table: error(table, held_out, bits))[:4]
    final = [(improved(table, rows, bits, LAST) / UNIT).round().clamp(-127, 127) for table in best]
    least = min(final, key=lambda table: error(table * UNIT, held_out, bits))
    print(f"{bits} bits: squared error {error(least * UNIT, held_out, bits):.5f}", file=sys.stderr)
    return least


def main() -> None:
    torch.manual_seed(0)
    print(HEAD)
    for bits in (2, 3, 4):
        numbers = [str(int(number)) for number in fitted(bits)]
        print(f'    {bits}: _numbers("""')
        for first in range(0, 256, 16):
            print("        " + " ".join(f"{number:>4}" for number in numbers[first : first + 16]))
        print('        """),')
    print("}")


if __name__ == "__main__":
    main()
