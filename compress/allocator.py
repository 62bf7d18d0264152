"""Giving freed memory back to the system, so that the peak is what is in use and not what was.

glibc keeps what is freed: it raises the size from which memory is mapped on its own to that of the largest tensor
freed so far, and cuts smaller ones from a heap whose holes stay resident. `rtn` over a model of 111 M parameters, one
block in memory at a time, peaked at 155 MiB after three blocks and 247 after eight; with this module, at 128 and 131.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_M_MMAP_THRESHOLD = -3  # from malloc.h
#: Tensors from this size on have pages of their own, which go back to the system the moment they are freed.
MAPPED_BYTES = 4 << 20


def settle_allocator() -> None:
    """Fixes, for the rest of this process, the size from which memory is mapped on its own. Nothing but on glibc."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def return_freed_memory() -> None:
    """Gives the free pages of the heap back to the system. Nothing but on glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
