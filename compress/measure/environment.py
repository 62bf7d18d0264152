"""Where figures were measured: versions, machine, threads."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.measure.jobs import versions


def environment(*, threads: int, device: str) -> dict[str, Any]:
    """Versions, processor, memory, threads and device, for `report.json`."""
    import psutil

    found: dict[str, Any] = {
        **{name.replace("-", "_"): text for name, text in versions().items()},
        "platform": platform.platform(terse=True),
        "cpu": processor(),
        "cpu_cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": threads,
        "device": device,
        "ram_bytes": int(psutil.virtual_memory().total),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_bytes"] = int(torch.cuda.get_device_properties(0).total_memory)
    return found


def processor() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
