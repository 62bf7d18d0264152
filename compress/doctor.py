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
        *_kernels(),
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


def _kernels() -> list[str]:
    """What would compute which layers on this machine's CPU, and what would not, and why."""
    from compress.nn import cpu, prepacked

    found = cpu.library()
    if found is None:
        lines = [
            "Packed layers: torch, whose own product serves 4 bits on symmetric grids in bfloat16 models, and which "
            "dequantizes each other layer as it is called. The CPU kernel does not serve: it was not built (it takes a "
            "C++ compiler when compress is installed), or this processor lacks AVX2."
        ]
    else:
        level = cpu.LEVELS[found.compress_level()]
        lines = [
            f"Packed layers of 2, 3, 4 and 8 bits: the CPU kernel ({level}, float activations), where columns and "
            f"groups are multiples of {cpu.STEP}; blocks built as Llama's take a single token in one call. Other "
            "groups: torch, which dequantizes each layer as it is called."
        ]
    no_int8, no_order = cpu.why_not_int8(), prepacked.why_not()
    if no_int8 is None:
        lines.append(
            "With activations: int8, AVX-512 VNNI serves 4 bits in groups of a multiple of 64, 8 bits of 32, and 2 "
            "bits of 128; smaller groups and 3 bits stay with float activations."
        )
    else:
        lines.append(f"activations: int8 cannot be had: {no_int8}. Float activations serve.")
    lines.append(
        "8 bits with rounded inputs (W8A8): torch's integer products. float8: torch, dequantized at each call."
    )
    order = "with prepack: true, oneDNN's order" if no_order is None else f"prepack cannot be had: {no_order}"
    lines.append(f"Plain layers: torch; in bfloat16, {order}.")
    return lines


def layers_of(folder: str | Path) -> list[str]:
    """What computes the layers of the model in `folder`, as `compress.load` sets it up; one kind of layer a line."""
    from compress.loading import load
    from compress.locating import locate
    from compress.nn.prepacked import PrepackedLinear
    from compress.nn.quant_linear import QuantLinear
    from compress.nn.running import served

    model = load(locate(str(folder)))
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        by = served(module)
        if by is None:
            continue
        if isinstance(module, QuantLinear):
            group = "one a row" if module.spec.group_size == -1 else str(module.spec.group_size)
            what = f"{module.spec.bits} bits, groups: {group}"
        elif isinstance(module, PrepackedLinear):  # its weight is made anew when it is asked for
            what = "bfloat16"
        else:
            what = str(module.weight.dtype).removeprefix("torch.")
        kinds.setdefault(f"{what}: {by}", []).append(name)
    blocks = sum("forward" in module.__dict__ for module in model.modules())
    lines = [f"{kind} ({len(names)} layers, {names[0]} the first)" for kind, names in kinds.items()]
    lines.append(f"Blocks that take a single token in one call of the kernel: {blocks}.")
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
