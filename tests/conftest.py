"""Offline, and with one thread a process: the suite runs two processes side by side."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """A run collects garbage three times, and looked at the million objects of the imports each time: half of its
    time, where the model is tiny. What a file of tests finds is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory):
    """What teachers say is kept for the tests of one process alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _forks(_own_caches):
    """What runs and benchmarks do in processes of their own they do in forks, which spares the imports."""
    from forks import use_forks

    with pytest.MonkeyPatch.context() as patch:
        close = use_forks(patch)
        yield
    close()


@pytest.fixture
def fresh_processes(monkeypatch):
    """Interpreters of their own, as users have them, not forks."""
    from compress.measure import benchmark, export_check, jobs, verification

    for module in (export_check, verification):
        monkeypatch.setattr(module, "run_child", jobs.run_child)
    monkeypatch.setattr(benchmark, "job_server", jobs.job_server)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random Llama with a byte-level tokenizer, as a Hugging Face folder."""
    from compress.testing import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A .jsonl file of 200 short documents that `tiny_tokenizer` can encode."""
    import json
    import random

    draw = random.Random(0)
    words = ["a", "bee", "can", "dig", "every", "fig;", "good", "hens", "ink.", "jam", "kit", "lamp", "moss"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=40))}) for _ in range(200)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def unverified(monkeypatch):
    """Runs that are not reloaded in a process of their own, for tests that compare the bytes they leave."""
    from compress.reports.report import Verified

    passed = Verified(reloaded=True, max_logit_difference=0.0)
    monkeypatch.setattr("compress.pipeline.verify", lambda *args, **options: passed)
