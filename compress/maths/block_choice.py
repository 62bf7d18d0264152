"""Which blocks of a stack stay, by what each is worth, where not every block can stand at every index."""

from __future__ import annotations

from collections.abc import Sequence

#: `fits[i][j]`: whether block i can stand at index j of what is left.
Fits = Sequence[Sequence[bool]]


def strongest(worth: Sequence[float], count: int, fits: Fits | None = None) -> list[int] | None:
    """The `count` blocks, in their order, whose worth adds up to most, each at an index where it fits (None: all fit).
    Of equal ones the earlier stay. None where there is no such choice.

    >>> strongest([3.0, 1.0, 2.0], 2)
    [0, 2]
    >>> strongest([1.0, 2.0, 3.0], 2, fits=[[True, False], [False, True], [False, True]])    # only block 0 can be first
    [0, 2]
    """
    blocks = len(worth)
    nothing = float("-inf")
    best = [[nothing] * (count + 1) for _ in range(blocks + 1)]  # [i][j]: of the first i blocks, j stay
    for i in range(blocks + 1):
        best[i][0] = 0.0
        for j in range(1, min(i, count) + 1):
            kept = best[i - 1][j - 1] + worth[i - 1] if fits is None or fits[i - 1][j - 1] else nothing
            best[i][j] = max(best[i - 1][j], kept)
    if best[blocks][count] == nothing:
        return None
    found, j = [], count
    for i in range(blocks, 0, -1):
        if j and best[i - 1][j] != best[i][j]:
            found.append(i - 1)
            j -= 1
    return found[::-1]


def weakest_run(scores: Sequence[float], blocks: int, fits: Fits | None = None) -> list[int] | None:
    """What stays of so many blocks when the run of neighbours whose score is lowest goes: `scores[start]` is that of
    the run that starts there. None where what follows no run fits.

    >>> weakest_run([0.3, 0.1, 0.2], 4)    # runs of 2: blocks 1 and 2 go
    [0, 3]
    """
    length = blocks - len(scores) + 1
    for start in sorted(range(len(scores)), key=lambda start: scores[start]):
        keep = [index for index in range(blocks) if not start <= index < start + length]
        if fits is None or all(fits[index][place] for place, index in enumerate(keep)):
            return keep
    return None


def removals(sizes: Sequence[Sequence[int]], least: float) -> list[int] | None:
    """How many blocks of each stack go so that at least `least` parameters do, whichever they are; `sizes` are those of
    the blocks. Stacks shrink alike, and each keeps a block. None where that is too few.

    >>> removals([[10, 10, 10], [10, 10]], 25)
    [2, 1]
    """
    ordered = [sorted(stack) for stack in sizes]
    gone = [0] * len(sizes)
    removed = 0
    while removed < least:
        left = [1 - gone[s] / len(stack) if len(stack) - gone[s] > 1 else 0.0 for s, stack in enumerate(ordered)]
        if not any(left):
            return None
        place = left.index(max(left))
        removed += ordered[place][gone[place]]
        gone[place] += 1
    return gone
