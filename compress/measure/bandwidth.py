"""How fast this machine reads memory: the bound on decoding, since each new token reads every weight once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

#: Bytes read at once, or eight times the last cache where that is more.
BUFFER_BYTES = 256 << 20
ROUNDS = 7
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def read_bandwidth(device: str = "cpu", *, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Bytes per second of plain reading, one figure a round: the sum of a float32 buffer much larger than any cache,
    with all of the threads that torch now has.

    A sum reads each byte once and writes none, as a decode step does with weights. Smaller where the memory is short of
    eight times the buffer.
    """
    cuda = device == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    size = min(max(BUFFER_BYTES, 8 * last_cache_bytes()), int(free) // 8)
    buffer = torch.ones(max(1, size // 4), device=device)
    found = []
    for turn in range(1 + ROUNDS):
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        buffer.sum().item()  # waits for the device
        spent = clock() - start
        if turn:
            found.append(buffer.numel() * 4 / spent)
    return found


def last_cache_bytes(root: Path = CACHES) -> int:
    """Bytes of the largest cache of the first core, as the kernel tells; 0 where it does not."""
    sizes = [0]
    for file in root.glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if factor and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * factor)
    return max(sizes)
