"""What a student with half the blocks keeps of its teacher, and what for: the losses side by side, for the same steps.

    python benchmarks/distillation.py builtin:tiny --name tiny --tokens 8000000

Every row is a run of its own, on the same text in the same order: distilled, on the text alone, both again from random
weights. `share` is the student's mean accuracy over that of the teacher; differences have 95 % intervals over paired
items. `--samples` says how much text there is: of little, a student sees all of it many times. `--generated` lets the
teacher write more for the rows that learn from it; rows of "given text" and "text alone" have what was given. Each row
says which of its seconds went into what. `--text-alone-steps` trains on the text alone for other numbers of steps as
well, since of little text more is not always better. `--blocks` adds: block_distill after 3 bits, 2 bits and half the
weights zero, against the same model untrained. `step_ratio`: the time of a step with a warm cache over that of a step
on the text alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import compress
from compress.measure.areas import area_scores
from compress.measure.environment import environment
from compress.measure.statistics import areas_difference
from compress.opening import open_model
from compress.passes.base import Context
from compress.preparation import prepare
from compress.progress import Progress, Step
from compress.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
LABELS: list[Any] = ["labels"]


class Clock(Progress):
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        started = time.monotonic()
        yield Step()
        self.seconds[title.removeprefix("distill: ")] += time.monotonic() - started


def prepared(options: argparse.Namespace, scratch: Path) -> Any:
    """Model, tokenizer, texts and items, as a recipe has them."""
    data = {"training": {"source": options.training or options.model, "samples": options.samples, "length": 256}}
    data["calibration"] = {**data["training"], "samples": 64}
    values = {"model": options.model, "data": data, "passes": ["gptq", {"distill": {}}], "output": str(scratch / "run")}
    values["seed"] = options.seed
    if options.tasks:
        values["benchmark"] = {"tasks": options.tasks}
    return prepare(Recipe.from_dict(values))


def distilled(ready: Any, options: argparse.Namespace, **more: Any) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A student trained so: its account, and its items."""
    model, clock = open_model(ready.folder), Clock()
    context = Context(
        training=ready.training, original=lambda: open_model(ready.folder).model, original_folder=ready.folder,
        tokenizer=ready.tokenizer, seed=options.seed, calibration=ready.calibration, progress=clock,
    )  # fmt: skip
    entries = {
        "student": {"layers": options.layers},
        "tokens": options.tokens,
        "batch_size": options.batch_size,
        "cache": options.cache,
        **more,
    }
    pass_ = compress.Distill.model_validate({"learning_rate": options.learning_rate, **entries})
    started = time.monotonic()
    result = pass_.run(model, context)
    seconds = time.monotonic() - started
    scores = area_scores(model.model, ready.tokenizer, ready.job.items, model.context_length)
    measured = result.measurements
    account = {"options": {**pass_.options(), "cache": "own"}, "seconds": seconds, "parts": dict(clock.seconds)}
    account |= {"loss": measured["losses"][-1]["loss"], "steps": measured["steps"]}
    return account | {"generated": measured.get("generated", {}).get("tokens", 0)}, scores


def mean(scores: dict[str, list[int]]) -> float:
    return float(np.mean([np.mean(right) for right in scores.values()]))


def difference(a: dict[str, list[int]], b: dict[str, list[int]]) -> dict[str, Any]:
    """b - a, with its interval."""
    found = areas_difference({area: (np.array(a[area], float), np.array(b[area], float)) for area in a})
    return {"delta": mean(b) - mean(a), "ci_low": found.low, "ci_high": found.high}


def rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The students, by name."""
    fresh = {"source": "fresh", "layers": options.layers}
    written = {"generated": options.generated} if options.generated else {}
    kl = ["kl", {"hidden": {"weight": 0.1}}]
    found: dict[str, dict[str, Any]] = {
        "kl": {"losses": ["kl"], **written}, "kl + hidden": {"losses": kl, **written}, "text alone": {"losses": LABELS},
    }  # fmt: skip
    if written:
        found["given and written text alone"] = {"losses": LABELS, **written}
        found["kl, given text"] = {"losses": ["kl"]}
    found["kl, random"] = {"losses": ["kl"], "student": fresh, **written}
    found["text alone, random"] = {"losses": LABELS, "student": fresh}
    for steps in options.text_alone_steps:
        found[f"text alone, {steps} steps"] = {"losses": LABELS, "steps": steps}
    return {name: row for name, row in found.items() if not options.only or name in options.only}


def blocks(ready: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """block_distill after what it is to repair: block errors and accuracies before and after."""
    damage = {
        "rtn, 3 bits": compress.RTN(bits=3, group_size=64), "gptq, 3 bits": compress.GPTQ(bits=3, group_size=64),
        "gptq, 2 bits": compress.GPTQ(bits=2, group_size=32), "wanda, 50 %": compress.Wanda(sparsity=0.5),
    }  # fmt: skip
    found = []
    for name, pass_ in damage.items():
        model = open_model(ready.folder)
        context = Context(
            calibration=ready.calibration, original=lambda: open_model(ready.folder).model, tokenizer=ready.tokenizer,
            seed=options.seed,
        )  # fmt: skip
        pass_.run(model, context)
        model.record(pass_)
        before = area_scores(model.model, ready.tokenizer, ready.job.items, model.context_length)
        started = time.monotonic()
        result = compress.BlockDistill(iterations=options.iterations).run(model, context)
        seconds = time.monotonic() - started
        after = area_scores(model.model, ready.tokenizer, ready.job.items, model.context_length)
        errors = [[block["start_error"], block["trained_error"]] for block in result.blocks]
        entry = {"damage": name, "before": mean(before), "after": mean(after), "block_errors": errors}
        found.append({**entry, "difference": difference(before, after), "seconds": seconds})
        print(json.dumps(found[-1]), flush=True)
    return found


def step_ratio(ready: Any, options: argparse.Namespace, steps: int = 12) -> dict[str, float]:
    """Seconds of a step with a warm cache, and on the text alone, taken in turn: medians and their ratio."""
    from compress.distillation import Distillation, Taught
    from compress.losses import Loss
    from compress.teacher_cache import Kept
    from compress.teaching import Lesson, TeacherSource, lesson, width_of

    model = open_model(ready.folder)
    context = Context(
        training=ready.training, original=lambda: open_model(ready.folder).model, original_folder=ready.folder,
        tokenizer=ready.tokenizer,
    )  # fmt: skip
    windows = ready.training.select(torch.arange(steps * options.batch_size))
    losses = {name: [Loss.model_validate(name)] for name in ("kl", "labels")}
    source = TeacherSource(None, model, context)
    taught = lesson(
        source, model.model, losses["kl"], windows, top_k=32, cache="auto", on_policy=False, tasks=None, context=context
    )
    plain = Lesson(Taught(windows), Kept(0, width_of(model.config)), [[]], None, None)
    model.model.requires_grad_(True)
    seconds: dict[str, list[float]] = {"kl": [], "labels": []}
    for step in range(steps):
        for name, found in (("kl", taught), ("labels", plain)):
            objective = Distillation(model.model, losses[name], found.kept, None, found.pairs, torch.nn.ModuleDict())
            optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.0)
            started = time.monotonic()
            items = [found.texts[step * options.batch_size + row] for row in range(options.batch_size)]
            batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "row"}
            objective(**batch).backward()
            optimizer.step()
            seconds[name].append(time.monotonic() - started)
    cached, alone = float(np.median(seconds["kl"][2:])), float(np.median(seconds["labels"][2:]))
    return {"cached": cached, "text_alone": alone, "ratio": cached / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--training", help="text; of builtin:tiny its own")
    parser.add_argument("--tasks", nargs="*", help="files of test items; of builtin:tiny its own")
    parser.add_argument("--layers", default="50%")
    parser.add_argument("--samples", type=int, default=8192, help="windows of text, of 256 tokens: all that is seen")
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--only", nargs="*", help="rows to run, by name; all if absent")
    parser.add_argument("--seed", type=int, default=0, help="of the text that is given, and of all that is drawn")
    parser.add_argument("--generated", type=int, default=0, help="tokens that the teacher writes; see above")
    parser.add_argument("--text-alone-steps", nargs="*", type=int, default=[], metavar="STEPS")
    parser.add_argument("--no-step-ratio", action="store_true")
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ready = prepared(options, Path(scratch))
        options.cache = str(Path(scratch, "teacher"))
        measure(ready, options)


def measure(ready: Any, options: argparse.Namespace) -> None:
    """All rows, each in the file of results as soon as it is there."""
    original = open_model(ready.folder)
    teacher = area_scores(original.model, ready.tokenizer, ready.job.items, original.context_length)
    print("teacher", mean(teacher), flush=True)
    result: dict[str, Any] = {
        "options": {**vars(options), "model": Path(options.model).name, "cache": "own"},
        "environment": environment(threads=torch.get_num_threads(), device="cpu"),
        "teacher": {area: float(np.mean(right)) for area, right in teacher.items()} | {"mean": mean(teacher)},
        "rows": [],
    }  # fmt: skip
    if not options.no_step_ratio:
        result["step_ratio"] = step_ratio(ready, options)
        print(json.dumps(result["step_ratio"]), flush=True)
    first: dict[str, list[int]] | None = None
    for name, row in rows(options).items():
        account, scores = distilled(ready, options, **row)
        first = first or scores
        entry = {"name": name, **account, "areas": {a: float(np.mean(s)) for a, s in scores.items()}}
        entry |= {"mean": mean(scores), "share": mean(scores) / mean(teacher), "less_first": difference(first, scores)}
        result["rows"].append(entry)
        print(json.dumps({k: v for k, v in entry.items() if k != "options"}), flush=True)
        keep(result, options)
    if options.blocks:
        result["blocks"] = blocks(ready, options)
        keep(result, options)


def keep(result: dict[str, Any], options: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"distillation-{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
