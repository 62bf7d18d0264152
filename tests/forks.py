"""Processes that are fresh but for their imports: forked from one that has imported torch and transformers, no more.

An interpreter of its own spends five CPU seconds on these imports, a fork a few hundredths. It shares nothing else with
the tests: what `compress` is has to be imported in it, and what happens to it happens to nobody else.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["torch", "safetensors.torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
     "transformers.models.auto.modeling_auto", "transformers.quantizers.auto", "compressed_tensors"]
)  # fmt: skip

_BEGIN = """
import os, sys
os.environ.clear()
os.environ.update(environment)
os.chdir(cwd)
sys.argv[:] = ["-c", *arguments]
for number, path in enumerate((os.devnull, out, err)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
"""


def python(code: str, *arguments: object, cwd: Path = ROOT) -> CompletedProcess[str]:
    """What `python -c CODE ARGUMENTS` gives: its exit status (negative: the signal that ended it), and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        told = {
            "code": code, "arguments": [str(argument) for argument in arguments], "cwd": str(cwd),
            "environment": dict(os.environ), "out": str(out), "err": str(err),
        }  # fmt: skip
        process = _forks.Process(target=exec, args=(_BEGIN, told))
        process.start()
        process.join()
        assert process.exitcode is not None
        said = [file.read_text(errors="replace") if file.exists() else "" for file in (out, err)]
        return CompletedProcess([sys.executable, "-c", code], process.exitcode, *said)


def use_forks(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has runs reload what they wrote in forks, and all measure in forks of one process: both are theirs alone as
    before. A reload that fails in a fork is done again by an interpreter of its own, whose word counts. Returns what
    ends it."""
    from compress.measure import benchmark, export_check, jobs, verification

    run_child, job_server = jobs.run_child, jobs.job_server
    server = jobs.ForkServer(jobs._environment(1))

    def forked(command: list[str], *, threads: int, **options: Any) -> None:
        run = "run_path" if command[1:2] == ["-P"] else "run_module"
        code = f"import runpy, sys; del sys.argv[0]; runpy.{run}(sys.argv[0], run_name='__main__')"
        if threads != 1 or python(code, *command[2:]).returncode:
            run_child(command, threads=threads, **options)

    patch.setattr(verification, "run_child", forked)
    patch.setattr(export_check, "run_child", forked)
    patch.setattr(
        benchmark,
        "job_server",
        lambda device, threads: nullcontext(server) if (device, threads) == ("cpu", 1) else job_server(device, threads),
    )
    return server.close
