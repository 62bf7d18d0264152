"""How much memory a process has taken, from the kernel and from CUDA's allocator. Linux only, as the toolkit is."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import psutil

from compress.errors import CompressError


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes(process: int | str = "self") -> int:
    """Most resident memory this process (or another, by its id) ever had (VmHWM), or had since `forget_peak`."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise CompressError("The kernel does not say how much memory this process took (no VmHWM in /proc/self/status).")


def forget_peak() -> bool:
    """Starts the peak anew from what is resident now; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def mapped_file_pages() -> list[tuple[int, int]]:
    """Runs of pages of mapped files that this process has in memory, as (address, bytes).

    A forked child does not inherit these pages (the kernel maps them again at the first touch), though it would have
    them had it imported by itself; `map_again` makes up for that. Empty where the kernel does not tell.
    """
    size, found = mmap.PAGESIZE, []
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            for line in maps.splitlines():
                addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
                first, last = (int(text, 16) for text in addresses.split("-"))
                if inode == "0" or permissions[0] != "r":
                    continue
                pages.seek(first // size * 8)
                entries = np.frombuffer(pages.read((last - first) // size * 8), dtype="<u8")
                present = (entries >> np.uint64(63)).astype(np.int8)  # bit 63: the page is in memory
                edges = np.flatnonzero(np.diff(present, prepend=0, append=0))
                starts, ends = edges[::2], edges[1::2]
                found += [(first + int(a) * size, int(b - a) * size) for a, b in zip(starts, ends, strict=True)]
    except (OSError, ValueError):
        return []
    return found


def map_again(runs: list[tuple[int, int]]) -> None:
    """Touches each page of the runs, so that it counts as resident."""
    for address, length in runs:
        for page in range(address, address + length, mmap.PAGESIZE):
            ctypes.c_char.from_address(page).value  # noqa: B018  (reading it is what maps it)
