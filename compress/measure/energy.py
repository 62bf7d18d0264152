"""How much energy work takes: from the machine's own counters, or, where asked for, an estimate that says it is one."""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

POWERCAP = Path("/sys/class/powercap")


class Meter(ABC):
    """Counts joules. `detail` says in the report what the figure rests on."""

    detail: dict[str, Any]

    @abstractmethod
    def read(self, processes: Sequence[int] = ()) -> list[float]:
        """Joules since some moment in the past, a figure a counter. `processes`: who else works on this."""

    def since(self, before: Sequence[float], processes: Sequence[int] = ()) -> float:
        """Joules of all counters since an earlier `read()`."""
        return sum(now - then for now, then in zip(self.read(processes), before, strict=True))


class EnergyCounter(Meter):
    """The processor packages' own energy counters (RAPL), of all that runs on them; they wrap around at `ranges`."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.ranges = [int((f.parent / "max_energy_range_uj").read_text()) / 1e6 for f in self.files]
        self.detail = {"counter": "RAPL", "packages": len(self.files)}

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyCounter | None:
        """The counters of this machine, or None when there are none that this user may read."""
        files = [f for f in sorted(root.glob("intel-rapl:[0-9]*/energy_uj")) if f.parent.name.count(":") == 1]
        try:
            counter = cls(files)
            counter.read()
        except (OSError, ValueError):
            return None
        return counter if files else None

    def read(self, processes: Sequence[int] = ()) -> list[float]:
        return [int(f.read_text()) / 1e6 for f in self.files]

    def since(self, before: Sequence[float], processes: Sequence[int] = ()) -> float:
        spent = (now - then for now, then in zip(self.read(), before, strict=True))
        return sum(j if j >= 0 else j + wrap for j, wrap in zip(spent, self.ranges, strict=True))


class GraphicsCounter(Meter):
    """The energy counter of an NVIDIA GPU (NVML, Volta and newer), of all that runs on it."""

    def __init__(self, library: Any, device: ctypes.c_void_p):
        self.library, self.device = library, device
        self.detail = {"counter": "NVML"}

    @classmethod
    def find(cls, uuid: str) -> GraphicsCounter | None:
        """The counter of the GPU with this UUID ("GPU-..."), or None where NVML or the GPU has none."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        device = ctypes.c_void_p()
        found = library.nvmlInit_v2() == 0
        if not found or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)) != 0:
            return None
        counter = cls(library, device)
        try:
            counter.read()
        except OSError:
            return None
        return counter

    def read(self, processes: Sequence[int] = ()) -> list[float]:
        millijoules = ctypes.c_ulonglong()
        status = self.library.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(millijoules))
        if status != 0:
            raise OSError(f"NVML gives no energy (status {status}).")
        return [millijoules.value / 1000]


class CpuEstimate(Meter):
    """CPU seconds, of this process and of an engine's own, times the stated watts of one busy core."""

    def __init__(self, watts: float):
        self.watts = watts
        self.detail = {"estimated": True, "watts": watts, "by": "CPU seconds x watts"}

    def read(self, processes: Sequence[int] = ()) -> list[float]:
        times = [psutil.Process(pid).cpu_times() for pid in processes]
        seconds = [time.process_time(), *(each.user + each.system for each in times)]
        return [self.watts * spent for spent in seconds]


def find_meter(device: str, watts: float | None = None) -> Meter | None:
    """The best that there is: the counter of the device; an estimate where there is none and `watts` is given."""
    if device == "cuda":
        import torch

        return GraphicsCounter.find(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    return EnergyCounter.find() or (None if watts is None else CpuEstimate(watts))


def why_no_energy(device: str) -> str:
    """The reason given where no energy figure is."""
    if device != "cpu":
        return "this graphics processor has no energy counter that may be read (NVML)"
    return (
        f"this machine has no energy counter that may be read (under {POWERCAP}); benchmark: {{watts: 15}} gives an "
        "estimate from the CPU seconds"
    )
