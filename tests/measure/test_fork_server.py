"""The fork server: a job's process is as fresh as an interpreter of its own, and ends when nobody waits for it."""

import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from compress.errors import CompressError
from compress.measure import fork_server
from compress.measure.fork_server import ForkServer, ended
from compress.measure.jobs import PACKAGE, _environment, job_server, run_child, run_job

# Stands in for the server's module: it imports nothing, and its jobs are Python files that are run.
STAND_IN = """
import os, sys, time, types
sys.modules["compress.measure.worker"] = worker = types.ModuleType("compress.measure.worker")
def main(job):
    return eval(open(job).read(), {"sys": sys, "os": os, "time": time})
worker.main = main
from compress.measure import fork_server
fork_server.import_all = lambda: None
fork_server.serve(sys.argv[-1])
"""


@pytest.fixture
def server(monkeypatch):
    start = subprocess.Popen

    def stand_in(command, **options):
        if "compress.measure.fork_server" in command:
            command = [sys.executable, "-P", "-c", STAND_IN, command[-1]]
        return start(command, **options)

    monkeypatch.setattr(fork_server.subprocess, "Popen", stand_in)
    with ForkServer(_environment(1)) as server:
        yield server


def submit(server, tmp_path, job, name="job"):
    (tmp_path / name).write_text(job)
    return server.submit(tmp_path / name, tmp_path / "stderr")


def finished(connection):
    with connection:
        while (status := ended(connection, 0.1)) is None:
            pass
    return status


def test_a_job_ends_with_its_status_and_others_run_meanwhile(server, tmp_path):
    slow = submit(server, tmp_path, "time.sleep(0.3) or 3", "slow")
    assert finished(submit(server, tmp_path, "0", "quick")) == 0
    assert finished(slow) == 3


def test_two_first_jobs_share_one_server(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(submit, server, tmp_path, "os.getppid() % 100 + 1", str(index)) for index in range(4)]
        assert len({finished(job.result()) for job in jobs}) == 1


def test_a_job_that_is_killed_says_by_which_signal(server, tmp_path):
    assert finished(submit(server, tmp_path, "os.kill(os.getpid(), 9)")) == -9


def test_what_a_job_writes_to_stderr_is_kept(server, tmp_path):
    (tmp_path / "job").write_text("sys.stderr.write('it broke\\n') and 1")
    with pytest.raises(CompressError, match="that was measuring failed: it broke"):
        run_child(["worker", str(tmp_path / "job")], what="measuring", threads=1, server=server)


def gone(pid):
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def process_of(tmp_path):
    until = time.monotonic() + 10
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    return int((tmp_path / "pid").read_text())


def test_a_job_nobody_waits_for_is_ended(server, tmp_path):
    connection = submit(
        server, tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())) and time.sleep(60)"
    )
    pid = process_of(tmp_path)
    connection.close()
    assert gone(pid)
    assert finished(submit(server, tmp_path, "0", "next")) == 0


def test_the_server_and_its_jobs_end_with_whoever_started_it(server, tmp_path):
    job = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())) and time.sleep(60)"
    with submit(server, tmp_path, job):
        pid, process = process_of(tmp_path), server._process
        server.close()
        assert gone(pid)
        assert process.returncode == 0


def test_a_server_that_cannot_start_says_why(monkeypatch, tmp_path):
    server = ForkServer({**_environment(1), "PYTHONPATH": "", "PYTHONHOME": str(tmp_path)})
    with pytest.raises(CompressError, match="could not start"):
        server.submit(tmp_path / "job", tmp_path / "stderr")
    server.close()


def test_a_fork_counts_the_pages_that_an_import_would_have_left():
    code = """
        import os, compress.measure.memory as memory
        from compress.measure.memory import map_again, mapped_file_pages, resident_bytes
        pages, before = mapped_file_pages(), resident_bytes()
        pid = os.fork()
        if not pid:
            bare = resident_bytes()
            map_again(pages)
            print(before, bare, resident_bytes(), len(os.listdir("/proc/self/task")), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    before, bare, again, threads = map(int, said.split())
    assert bare < 0.95 * before
    assert again == pytest.approx(before, rel=0.02)
    assert threads == 1


@pytest.mark.slow
def test_peak_memory_after_a_fork_is_that_of_an_interpreter_of_its_own(tmp_path):
    from compress.locating import locate

    folder = str(locate("builtin:tiny"))
    engine = {"runtime": "transformers", "folder": folder, "dtype": "auto"}
    job = {
        "kind": "memory", "model": folder, "device": "cpu", "threads": 1, "seed": 0, "engine": engine,
        "prompt_length": 16, "new_tokens": 8, "cache_length": 64,
    }  # fmt: skip
    alone = run_job(job, tmp_path).values
    with job_server("cpu", 1) as server:
        forked = run_job(job, tmp_path, server=server).values
    assert forked["peak_memory_bytes"] == pytest.approx(alone["peak_memory_bytes"], rel=0.02)
    assert forked["above_import_bytes"] == pytest.approx(alone["above_import_bytes"], rel=0.1)
