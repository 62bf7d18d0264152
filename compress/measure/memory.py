"""How much memory a process has taken, from the kernel and from CUDA's allocator. Linux only, as the toolkit is."""

from __future__ import annotations

from pathlib import Path

import psutil

from compress.errors import CompressError


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Most resident memory this process ever had (VmHWM), or had since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
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
