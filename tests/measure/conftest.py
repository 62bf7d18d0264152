"""A tiny model, a damaged copy of it, and one full measurement of both, shared by all tests that look at it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a random Llama and of the same with its weights moved by seeded noise."""
    import torch

    from compress.testing import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("pair")
    model = tiny_model("llama")
    tiny_tokenizer().save_pretrained(folder / "a")
    tiny_tokenizer().save_pretrained(folder / "b")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            # Random initial weights of 0.02 make all tokens about equally likely: sharpen them first.
            parameter.mul_(1 if parameter.dim() == 1 else 12)
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.save_pretrained(folder / "b")
    return folder / "a", folder / "b"


@pytest.fixture(scope="session")
def items() -> dict[str, list[dict]]:
    """Items of all three forms; 12 in each area."""
    words = ["bee", "fig", "hen", "ink", "jam", "kit", "lamp", "moss", "nut", "oak", "pea", "rug"]
    return {
        "choice": [
            {"question": f"a {w} is", "choices": [w, "good", "not so"], "label": i % 3} for i, w in enumerate(words)
        ],
        "pairs": [{"good": f"the {w} runs.", "bad": f"{w} the runs."} for w in words],
        "exact": [{"prompt": f"{w} ", "completion": w[0]} for w in words],
    }


@pytest.fixture(scope="session")
def windows(pair):
    """Token ids [12, 32] drawn from the first model: no other model can be better on them, in expectation."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (12, 1), generator=generator)
    with torch.no_grad():
        for _ in range(31):
            chances = torch.softmax(model(ids).logits[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids


@pytest.fixture(scope="session")
def measured(pair, items, windows, tmp_path_factory) -> SimpleNamespace:
    """Both models measured by the two calls of the pipeline, on few tokens and rounds."""
    from compress.measure.benchmark import BenchmarkJob, measure_compressed, measure_original
    from compress.measure.comparison import compare
    from compress.measure.measurements import SpeedSettings

    settings = SpeedSettings(prompt=16, decode_prompt=4, new_tokens=4, rounds=6, warmup=1)
    job = BenchmarkJob(windows=windows, items=items, prompts=("the bee",), threads=1, speed=settings)
    workdir = tmp_path_factory.mktemp("work")
    original = measure_original(str(pair[0]), job=job, workdir=workdir)
    compressed = measure_compressed(pair[1], str(pair[0]), original, job=job, workdir=workdir)
    return SimpleNamespace(
        job=job, workdir=workdir, original=original, compressed=compressed, comparison=compare(original, compressed)
    )


@pytest.fixture
def same_process(monkeypatch):
    """Measurements are taken in this process: what they do is the same, and the import of torch is spared."""
    import json

    from compress.errors import CompressError
    from compress.measure import worker

    def run_child(command, *, out=None, **_):
        if worker.main(command[-1]) != 0:
            raise CompressError(json.loads((out / "result.json").read_text())["error"])

    monkeypatch.setattr("compress.measure.jobs.run_child", run_child)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
