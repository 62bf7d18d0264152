"""Fresh processes without their imports: one process that has imported what measurements need, and forks one for each.

The server itself computes nothing and starts no thread, so that each child begins as a bare import ends. Run as
`python -m compress.measure.fork_server SOCKET`; each connection asks for one job, and is told how it ended. The server
ends, and its children with it, when the process that started it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from compress.errors import CompressError

#: Seconds until the imports must be done.
PATIENCE = 300.0


class ForkServer(AbstractContextManager["ForkServer"]):
    """Asks a fork server, started with the first job; a context manager, after which it is gone."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """Begins the imports; what is asked meanwhile waits for them."""
        with self._starting:  # two jobs may be the first
            if self._process is not None:
                return
            self._folder = Path(tempfile.mkdtemp(prefix="compress-"))  # for its owner alone
            command = [sys.executable, "-P", "-m", "compress.measure.fork_server", str(self._folder / "jobs")]
            with (self._folder / "stderr").open("wb") as stderr:
                self._process = subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr
                )

    def submit(self, job_file: Path, stderr: Path) -> socket.socket:
        """Starts one job of `compress.measure.worker`. The socket says how it ends (`ended`), and ends it when closed.

        CompressError if the server does not come up.
        """
        self.start()
        assert self._folder is not None
        assert self._process is not None
        until = time.monotonic() + PATIENCE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._folder / "jobs"))
                connection.sendall(json.dumps({"job": str(job_file), "stderr": str(stderr)}).encode() + b"\n")
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if self._process.poll() is not None or time.monotonic() > until:
                    said = (self._folder / "stderr").read_text(errors="replace").strip().splitlines()
                    reason = said[-1] if said else "it said nothing"
                    raise CompressError(f"The process that measures could not start: {reason}") from None
                time.sleep(0.02)

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # the sign to end
            self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = None

    def __exit__(self, *exception: object) -> None:
        self.close()


def ended(connection: socket.socket, timeout: float) -> int | None:
    """How a submitted job ended (negative: by which signal), as `subprocess` has it; None while it runs."""
    connection.settimeout(timeout)
    try:
        told = connection.recv(64)
    except TimeoutError:
        return None
    if not told:
        raise CompressError("The process that measures was ended. The machine may have run out of memory.")
    return int(told)


def serve(path: str) -> None:
    """Imports, then forks until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who asked for the work decides
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    import_all()
    listening.listen()
    watched = selectors.DefaultSelector()
    watched.register(listening, selectors.EVENT_READ, ("listen", 0, None))
    watched.register(sys.stdin.fileno(), selectors.EVENT_READ, ("end", 0, None))
    running: dict[int, Any] = {}
    while True:
        for key, _ in watched.select():
            kind, pid, connection = key.data
            if kind == "end":
                for child in running:
                    os.kill(child, signal.SIGKILL)
                shutil.rmtree(Path(path).parent, ignore_errors=True)
                os._exit(0)  # taking down what was imported would take a second
            if kind == "listen":
                accepted = listening.accept()[0]
                asked = json.loads(accepted.makefile("rb").readline() or "null")
                if asked is None:
                    accepted.close()
                    continue
                pid, handle = _fork(asked, watched)
                running[pid] = handle
                watched.register(handle, selectors.EVENT_READ, ("child", pid, accepted))
                watched.register(accepted, selectors.EVENT_READ, ("gone", pid, accepted))
            elif pid in running and kind == "gone":  # nobody waits for this one any more
                os.kill(pid, signal.SIGKILL)
                watched.unregister(connection)
            elif pid in running:
                _, status = os.waitpid(pid, 0)
                watched.unregister(handle := running.pop(pid))
                os.close(handle)
                with contextlib.suppress(KeyError):
                    watched.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()


def _fork(asked: Mapping[str, str], watched: selectors.BaseSelector) -> tuple[int, int]:
    """A child that does the job and ends; its id, and a handle that becomes readable when it has."""
    from compress.measure.memory import map_again, mapped_file_pages

    pages = mapped_file_pages()
    pid = os.fork()
    if pid:
        return pid, os.pidfd_open(pid)
    status = 1
    try:
        watched.close()
        stderr = os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(stderr, 2)
        map_again(pages)
        from compress.measure.worker import main

        status = main(asked["job"])
        sys.stderr.flush()
    finally:
        os._exit(status)


def import_all() -> None:
    """What any measurement imports, so that memory above it is a model's own."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401

    import compress.loading
    import compress.measure.worker  # noqa: F401


if __name__ == "__main__":
    serve(sys.argv[1])
