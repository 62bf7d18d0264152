"""`compress doctor`: what this machine has, and what that means here."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from compress import __version__

_PACKAGES = (
    "torch", "transformers", "compressed-tensors", "accelerate", "evaluate", "peft", "bitsandbytes", "gguf",
    "llama-cpp-python", "onnxruntime-genai",
)  # fmt: skip


def findings() -> list[str]:
    """One sentence a line."""
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    lines = [
        f"compress {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"CPU: {_cpu()}, {psutil.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        f"Memory: {memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f} GB",
        f"Disk: {disk.free / 1e9:.1f} GB free here",
        _gpu(),
        _kernel(),
    ]
    lines += [f"{package}: {_version(package)}" for package in _PACKAGES]
    return lines


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown"
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    name, flags = fields.get("model name", "unknown"), fields.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    return f"{name} ({', '.join(known) or 'no vector extensions known here'})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "GPU: none that torch sees; everything runs on the CPU"
    properties = torch.cuda.get_device_properties(0)
    return f"GPU: {properties.name}, {properties.total_memory / 1e9:.1f} GB"


def _kernel() -> str:
    from compress.nn import cpu

    found = cpu.library()
    if found is None:
        return (
            "Packed layers run through the torch kernel, which dequantizes each layer as it is called: the CPU kernel "
            "was not built (it takes a C++ compiler when compress is installed), or this processor lacks AVX2."
        )
    return (
        f"Packed layers of 2, 3, 4 and 8 bits run through the CPU kernel ({cpu.LEVELS[found.compress_level()]}) where "
        f"columns and groups are multiples of {cpu.STEP}; others are dequantized as they are called."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
