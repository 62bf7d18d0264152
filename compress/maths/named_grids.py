"""Grids that have a name: those of other programs' blocks, in the words of a `QuantSpec`, and our own trellis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Grids of other programs' blocks, in the words of a `QuantSpec`. Scales on them are numbers that float16 holds. Blocks
#: of gguf-q4_1 store `-zero * scale` in float16 as well, with zero counted from the lowest code, 0 to 15: a scale of
#: `SHORT_BITS` significant bits makes that exact.
NAMED_GRIDS: dict[str, dict[str, Any]] = {
    "gguf-q4_0": {"bits": 4, "group_size": 32, "symmetric": True},
    "gguf-q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "gguf-q8_0": {"bits": 8, "group_size": 32, "symmetric": True},
}
SHORT_BITS = 7

#: Codes that stand for numbers along a trellis (`maths/trellis.py`): symmetric, with groups of any size.
TRELLIS = "trellis"

#: Weights of a super-block.
SUPER_COLUMNS = 256


@dataclass(frozen=True)
class SuperBlock:
    """A grid whose groups have small multiples of one float16 number as scales (`maths/super_blocks.py`).

    kind: ggml's name. group_size: weights that share a multiple, of `multiple_bits` bits. minima: each group has a
    minimum as well, made alike; then no multiple is negative.
    """

    kind: str
    bits: int
    group_size: int
    multiple_bits: int
    minima: bool

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return SUPER_COLUMNS // self.group_size

    @property
    def multiples(self) -> tuple[int, int]:
        """The smallest and the largest multiple, of scales and of minima alike."""
        half = 1 << (self.multiple_bits - 1)
        return (0, 2 * half - 1) if self.minima else (-half, half - 1)


SUPER_BLOCKS = {
    "gguf-q2_k": SuperBlock("Q2_K", 2, 16, 4, True),
    "gguf-q3_k": SuperBlock("Q3_K", 3, 16, 6, False),
    "gguf-q4_k": SuperBlock("Q4_K", 4, 32, 6, True),
    "gguf-q5_k": SuperBlock("Q5_K", 5, 32, 6, True),
    "gguf-q6_k": SuperBlock("Q6_K", 6, 16, 8, False),
}
NAMED_GRIDS |= {
    name: {"bits": block.bits, "group_size": block.group_size, "symmetric": not block.minima}
    for name, block in SUPER_BLOCKS.items()
}
