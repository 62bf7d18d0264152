"""Starting measurements in fresh processes, and keeping the results of those that repeat to the same figures."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.locating import adapter_beside
from compress.measure.fork_server import ForkServer, ended

if TYPE_CHECKING:
    from torch import Tensor

    from compress.progress import Step

PACKAGE = Path(__file__).resolve().parents[1]
#: Results that a folder keeps; more are forgotten, the ones used longest ago first.
MOST_KEPT = 256
#: Seconds between two looks at a running job.
WAIT = 0.2
#: Bytes at both ends of a weights file that tell it from another of the same size and time.
SAMPLED_BYTES = 1 << 20


@dataclass
class JobResult:
    """What a measurement gave: plain values and arrays per item."""

    values: dict[str, Any]
    records: dict[str, Tensor] = field(default_factory=dict)


def run_job(
    job: Mapping[str, Any],
    workdir: Path,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    key: str | None = None,
    kept_in: Path | None = None,
    server: ForkServer | None = None,
    step: Step | None = None,
) -> JobResult:
    """Does one job of `compress.measure.worker` in a fresh process: forked by the server, where there is one.

    With a `key`, the result is kept under it in `kept_in` (default: `workdir`), and a later call with the same key
    returns what was kept. `step` is told how far the job is.
    """
    from safetensors.torch import save_file

    workdir.mkdir(parents=True, exist_ok=True)
    kept = None if key is None else (kept_in or workdir) / f"{job['kind']}-{key}"
    if kept is not None and (kept / "result.json").is_file():
        os.utime(kept)  # the ones used longest ago are forgotten first
        return _read(kept)
    folder = Path(tempfile.mkdtemp(prefix="job-", dir=workdir))
    try:
        out = folder / "out"
        out.mkdir()
        job = {**job, "out": str(out), "progress": str(folder / "progress")}
        if inputs:
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
            job["inputs"] = str(folder / "inputs.safetensors")
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "compress.measure.worker", str(folder / "job.json")]
        told = None if step is None else partial(_tell, folder / "progress", step)
        what = f"measuring {job['model']} ({job['kind']})"
        run_child(command, what=what, threads=job["threads"], out=out, server=server, told=told)
        if kept is not None:
            _keep(out, kept)
        return _read(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(out: Path, kept: Path) -> None:
    """Copies a result to its place, where it is whole or not at all; the oldest of very many are forgotten."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(prefix="job-", dir=kept.parent))
    try:
        shutil.copytree(out, copy, dirs_exist_ok=True)
        with contextlib.suppress(OSError):  # another process may have kept the same
            copy.rename(kept)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    others = [entry for entry in kept.parent.iterdir() if (entry / "result.json").is_file()]
    for old in sorted(others, key=lambda entry: entry.stat().st_mtime)[:-MOST_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def cache_folder() -> Path:
    """Where figures of originals are kept from run to run: `$XDG_CACHE_HOME/compress/measurements`, or `~/.cache/...`.
    It may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compress" / "measurements"


def _tell(file: Path, step: Step) -> None:
    """Hands on how far a job is, by the last line that it wrote."""
    with contextlib.suppress(OSError, ValueError):
        lines = file.read_text(encoding="utf-8").splitlines()
        if lines:
            step.at(*json.loads(lines[-1]))


def job_server(device: str, threads: int) -> ForkServer | AbstractContextManager[None]:
    """What spares measurements their imports. On a GPU each has a process of its own: a fork cannot take CUDA along."""
    return ForkServer(_environment(threads)) if device == "cpu" else nullcontext()


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }


def run_child(
    command: list[str],
    *,
    what: str,
    threads: int,
    out: Path | None = None,
    server: ForkServer | None = None,
    told: Callable[[], None] | None = None,
) -> None:
    """Runs a child to its end; CompressError with its own sentence, or how it ended, when it fails.

    With a `server`, the last word of the command is the job that it forks a child for. `told` is called now and then.
    """
    aside = nullcontext(out.parent) if out is not None else tempfile.TemporaryDirectory(prefix="compress-")
    with aside as folder:
        stderr = Path(folder) / "stderr"
        if server is None:
            status = _run(command, threads, stderr, told)
        else:
            with server.submit(Path(command[-1]), stderr) as connection:
                while (ending := ended(connection, WAIT)) is None:
                    if told is not None:
                        told()
                status = ending
        said = stderr.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        return
    if out is not None and (out / "result.json").is_file():
        message = json.loads((out / "result.json").read_text(encoding="utf-8")).get("error")
        if message:
            raise CompressError(message)
    if status < 0:
        name = signal.Signals(-status).name
        hint = " The machine may have run out of memory." if name == "SIGKILL" else ""
        raise CompressError(f"The process that was {what} was ended by {name}.{hint}")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    raise CompressError(f"The process that was {what} failed: {lines[-1] if lines else 'it said nothing'}")


def _run(command: list[str], threads: int, stderr: Path, told: Callable[[], None] | None) -> int:
    """A process of its own; its exit status, negative for a signal."""
    with stderr.open("wb") as stream:
        process = subprocess.Popen(
            command, env=_environment(threads), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream
        )
    try:
        while True:
            try:
                return process.wait(timeout=WAIT)
            except subprocess.TimeoutExpired:
                if told is not None:
                    told()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def fingerprint(folder: Path) -> str:
    """Identifies a model folder's present content: sizes, times and both ends of the weights, the small files whole."""
    found = hashlib.sha256()
    adapter = adapter_beside(folder)
    for file in sorted([*folder.iterdir(), *(adapter.iterdir() if adapter is not None else ())]):
        if file.suffix == ".safetensors":
            state = file.stat()
            found.update(f"{file.name}:{state.st_size}:{state.st_mtime_ns};".encode())
            with file.open("rb") as stream:
                found.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(0, state.st_size - SAMPLED_BYTES))
                found.update(stream.read())
        elif file.suffix in (".json", ".model", ".txt") and file.is_file():
            found.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()};".encode())
    return found.hexdigest()


def key_of(*parts: Any) -> str:
    """A short digest of JSON-able parts and tensors, and of what else decides a figure: versions, machine, code."""
    found = hashlib.sha256(json.dumps([versions(), platform.machine(), _own_code()], sort_keys=True).encode())
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


@cache
def _own_code() -> str:
    """Digest of the code that measures: what was kept before it changed is not used again."""
    found = hashlib.sha256()
    for file in sorted((PACKAGE / "measure").glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _own_version() -> str:
    import compress

    return str(getattr(compress, "__version__", "unknown"))


def _read(folder: Path) -> JobResult:
    from safetensors.torch import load_file

    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    file = folder / "records.safetensors"
    return JobResult(values, load_file(file) if file.is_file() else {})
