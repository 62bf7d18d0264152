"""Starting measurements in fresh processes, and keeping the results of those that repeat to the same figures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.locating import adapter_beside

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass
class JobResult:
    """What a measurement gave: plain values and arrays per item."""

    values: dict[str, Any]
    records: dict[str, Tensor] = field(default_factory=dict)


def run_job(
    job: Mapping[str, Any], workdir: Path, *, inputs: Mapping[str, Tensor] | None = None, key: str | None = None
) -> JobResult:
    """Does one job of `compress.measure.worker` in a fresh process.

    With a `key`, the result is kept in `workdir` under it, and a later call with the same key returns what was kept.
    """
    from safetensors.torch import save_file

    workdir.mkdir(parents=True, exist_ok=True)
    kept = None if key is None else workdir / f"{job['kind']}-{key}"
    if kept is not None and (kept / "result.json").is_file():
        return _read(kept)
    folder = Path(tempfile.mkdtemp(prefix="job-", dir=workdir))
    try:
        out = folder / "out"
        out.mkdir()
        job = {**job, "out": str(out)}
        if inputs:
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
            job["inputs"] = str(folder / "inputs.safetensors")
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "compress.measure.worker", str(folder / "job.json")]
        run_child(command, what=f"measuring {job['model']} ({job['kind']})", threads=job["threads"], out=out)
        if kept is not None and not kept.exists():
            os.replace(out, kept)
            out = kept
        return _read(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_child(command: list[str], *, what: str, threads: int, out: Path | None = None) -> None:
    """Runs a child to its end; CompressError with its own sentence, or how it ended, when it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace",
    )  # fmt: skip
    if done.returncode == 0:
        return
    if out is not None and (out / "result.json").is_file():
        message = json.loads((out / "result.json").read_text(encoding="utf-8")).get("error")
        if message:
            raise CompressError(message)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = " The machine may have run out of memory." if name == "SIGKILL" else ""
        raise CompressError(f"The process that was {what} was ended by {name}.{hint}")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise CompressError(f"The process that was {what} failed: {lines[-1] if lines else 'it said nothing'}")


def fingerprint(folder: Path) -> str:
    """Identifies a model folder's present content: sizes and times of the weights, the bytes of the small files."""
    found = hashlib.sha256()
    adapter = adapter_beside(folder)
    for file in sorted([*folder.iterdir(), *(adapter.iterdir() if adapter is not None else ())]):
        if file.suffix == ".safetensors":
            state = file.stat()
            found.update(f"{file.name}:{state.st_size}:{state.st_mtime_ns};".encode())
        elif file.suffix in (".json", ".model", ".txt") and file.is_file():
            found.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()};".encode())
    return found.hexdigest()


def key_of(*parts: Any) -> str:
    """A short digest of JSON-able parts and tensors, and of the versions that decide a figure."""
    found = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for part in parts:
        if hasattr(part, "numpy"):
            found.update(f"{tuple(part.shape)}{part.dtype}".encode())
            found.update(part.contiguous().numpy().tobytes())
        else:
            found.update(json.dumps(part, sort_keys=True, default=str).encode())
        found.update(b"\0")
    return found.hexdigest()[:20]


def versions() -> dict[str, str]:
    """Installed versions of what decides a figure."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "transformers", "compressed-tensors", "peft", "safetensors", "compress"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = _own_version() if name == "compress" else "not installed"
    return found


def _own_version() -> str:
    import compress

    return str(getattr(compress, "__version__", "unknown"))


def _read(folder: Path) -> JobResult:
    from safetensors.torch import load_file

    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    file = folder / "records.safetensors"
    return JobResult(values, load_file(file) if file.is_file() else {})
