"""Do the teacher's reasons help a student that has half the blocks and few prompts?

    python benchmarks/reasoning.py builtin:tiny --name tiny --prompt-samples 1000 --steps 1000

The teacher answers prompts with its reasons written out; those that end in the right answer are kept. Students of the
same blocks learn from these alone, with the same number of steps and of rows in a step:

- answers: the answers, without the reasons.
- answers + reasons: each as a task of its own (Hsieh et al. 2023, Distilling step-by-step, arXiv 2305.02301): asked, it
  answers at once, as the first one does.
- reasons, then answer: the whole of what the teacher wrote, and the student writes it too.

Right is a greedy text that ends in the right answer. Differences to the first row have 95 % intervals over paired
items. Prompts, and what else is drawn, follow the seed; with several seeds, a seed's items stand beside the next's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import write_result
from distillation import difference

import compress
from compress.answers import Answers, answer_windows, answers_of, generate_texts, last_word
from compress.builtin.text import item
from compress.locating import locate
from compress.measure.environment import environment
from compress.opening import open_model, read_tokenizer
from compress.passes.base import Context
from compress.teacher_cache import default_folder
from compress.teaching import TeacherSource
from compress.text import BUILTIN, documents

#: Prompts that are answered side by side.
BATCH = 50

Lines = list[dict[str, str]]


def test_items(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts with their right answers; of the embedded model those of the evaluation split."""
    if not options.model.startswith(BUILTIN):
        return [dict(line.fields) for line in documents(options.tasks, Path.cwd(), "evaluation", 0)][: options.items]
    found: dict[str, dict[str, Any]] = {}
    for index in range(50 * options.items):
        one = item(options.area, "evaluation", 0, index)
        if "prompt" in one and len(found) < options.items:
            found.setdefault(one["prompt"], one)
    return list(found.values())


def right(model: Any, tokenizer: Any, asked: list[dict[str, Any]], how: Answers) -> list[int]:
    """1 for each prompt to which the model's greedy text ends in the right answer, 0 for each other."""
    found = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        texts = generate_texts(model, tokenizer, [one["prompt"] for one in part], how)
        found += [
            int(text is not None and last_word(text) == last_word(one["completion"]))
            for text, one in zip(texts, part, strict=True)
        ]
    return found


def student(
    folder: Path, name: str, lines: Lines, how: Answers, options: argparse.Namespace, seed: int
) -> tuple[Any, dict[str, Any]]:
    """A student trained as its row's name says, and the account of it."""
    model, tokenizer = open_model(folder), read_tokenizer(folder)
    entries: dict[str, Any] = {
        "student": {"source": "fresh" if options.fresh else "model", "layers": options.kept}, "losses": ["labels"],
        "steps": options.steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate,
    }  # fmt: skip
    windows = None
    if name == "answers + reasons":
        entries |= {"answers": how, "losses": ["labels", {"rationale": {"weight": options.weight}}]}
    else:
        whole = name == "reasons, then answer"
        told = [{**one, "completion": (one["rationale"] if whole else "") + one["completion"]} for one in lines]
        windows, _ = answer_windows(told, tokenizer, None, model.context_length, name)
    context = Context(
        training=windows, original=lambda: open_model(folder).model, original_folder=folder, tokenizer=tokenizer,
        seed=seed,
    )  # fmt: skip
    pass_ = compress.Distill.model_validate(entries)
    started = time.monotonic()
    measured = pass_.run(model, context).measurements
    account = {"losses": measured["losses"], "steps": measured["steps"], "seconds": time.monotonic() - started}
    return model, account


def markdown(rows: list[dict[str, Any]], teacher: float, items: int, seeds: int) -> str:
    head = f"{items} items, {seeds} seed{'s' * (seeds > 1)}; the teacher, with its reasons, {teacher:.1%}.\n\n"
    lines = ["| learnt | right | less the first | 95 % interval |", "|---|---:|---:|---|"]
    for row in rows:
        less = row["less_first"]
        lines.append(
            f"| {row['name']} | {row['mean']:.1%} | {100 * less['delta']:+.1f} | {100 * less['ci_low']:+.1f} to "
            f"{100 * less['ci_high']:+.1f} |"
        )
    return head + "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--prompts", help="of builtin:tiny its own")
    parser.add_argument("--tasks", help="file of test items; of builtin:tiny its own")
    parser.add_argument("--area", default="arithmetic")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--prompt-samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--weight", type=float, default=0.5, help="of the reasons, as a task of its own")
    parser.add_argument("--kept", type=int, nargs="*", default=[0, 1], help="blocks of the students")
    parser.add_argument("--fresh", action="store_true", help="students of random weights")
    parser.add_argument("--ask", default="")
    parser.add_argument("--mark", default="So")
    parser.add_argument("--only", nargs="*", default=["answers", "answers + reasons", "reasons, then answer"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    return parser.parse_args()


def main() -> None:
    options = parsed()
    folder = locate(options.model)
    how = Answers(
        prompts=options.prompts or options.model, samples=options.prompt_samples, stop=["\n"], filter="answer",
        areas=[options.area], ask=options.ask, mark=options.mark,
    )  # fmt: skip
    tokenizer, asked = read_tokenizer(folder), test_items(options)
    whole = open_model(folder)
    context = Context(original=lambda: whole.model, original_folder=folder, tokenizer=tokenizer)
    source = TeacherSource(None, whole, context)
    teacher = float(np.mean(right(whole.model, tokenizer, asked, how)))
    print("teacher", teacher, flush=True)
    scores: dict[str, list[int]] = {name: [] for name in options.only}
    accounts: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    kept = []
    for seed in options.seeds:
        _, lines = answers_of(source, how, True, default_folder(), seed)
        kept.append(len(lines))
        print(f"seed {seed}: {len(lines)} answers, such as {lines[0]}", flush=True)
        for name in options.only:
            model, account = student(folder, name, lines, how, options, seed)
            each = right(model.model, tokenizer, asked, how)
            scores[name] += each
            accounts[name].append({"seed": seed, "right": float(np.mean(each)), **account})
            said = {key: value for key, value in accounts[name][-1].items() if key != "losses"}
            print(name, json.dumps({**said, "loss": account["losses"][-1]}), flush=True)
    first = {options.area: scores[options.only[0]]}
    rows = [
        {
            "name": name, "mean": float(np.mean(found)), "less_first": difference(first, {options.area: found}),
            "runs": accounts[name],
        }
        for name, found in scores.items()
    ]  # fmt: skip
    result = {
        "options": {**vars(options), "model": Path(options.model).name}, "items": len(asked), "answers": kept,
        "environment": environment(threads=torch.get_num_threads(), device="cpu"), "teacher": teacher, "rows": rows,
    }  # fmt: skip
    write_result(f"reasoning-{options.name}", result, markdown(rows, teacher, len(asked), len(options.seeds)))


if __name__ == "__main__":
    main()
