"""Runs tasks of lm-evaluation-harness on a model that is loaded already, and keeps each item's score.

The harness lays out the prompts, cuts the answers and scores them; the model is ours, in its own HFLM, so that the
figures are those that the harness gives elsewhere. Chat templates are not applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import CompressError
from compress.measure.harness_tasks import load_tasks
from compress.measure.likelihood import LOGITS_BUDGET, forward, vocabulary_of

#: Which of a task's metrics says how many items are right: the first that it has. By choice, the one per byte first,
#: as our own items are scored.
PREFERRED = ("acc_norm", "acc", "exact_match", "em", "prompt_level_strict_acc", "pass@1", "f1")
#: Most texts in a batch, the seed that draws examples for the prompt (the harness's own), and characters shown.
BATCH, SEED, CHARACTERS = 16, 1234, 300
#: Context of a model that states none, as in the harness.
CONTEXT = 2048

Scored = dict[str, Any]


def score_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, context: int | None, limit: int | None = None
) -> dict[str, Scored]:
    """By area: `scores` of the items (0 or 1; graded answers in between), `metric` (which of the task's they are),
    `others` (means of its other metrics), `texts` (the end of each prompt) and `answers`.

    `limit`: the first so many items of each task. CompressError, naming the task, for one that fails while it runs.
    """
    from lm_eval import evaluator

    loaded = load_tasks(tasks)
    runner = _runner(model, tokenizer, context or CONTEXT)
    found = {}
    for area, task in loaded.items():
        name = task.task_name if hasattr(task, "task_name") else area
        try:
            if hasattr(task, "set_fewshot_seed"):
                task.set_fewshot_seed(seed=SEED)
            result = evaluator.evaluate(
                runner, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=True
            )
        except Exception as error:  # of the harness, the model, or code of the task's own
            text = " ".join(str(error).split())[:300] or "no message"
            raise CompressError(f"The task {area} failed while it ran: {type(error).__name__}: {text}") from error
        found[area] = of_samples(area, result["samples"][name], _directions(task))
    return found


def _runner(model: Any, tokenizer: Any, context: int) -> Any:
    import logging

    import torch
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class Runner(HFLM):  # type: ignore[misc]
        """The harness's own class, but that a model with a packed cache reads through it."""

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            with torch.inference_mode():
                return forward(self.model, inps)

    size = max(1, min(BATCH, LOGITS_BUDGET // (context * vocabulary_of(model))))
    return Runner(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size, max_length=context, truncation=True
    )


def _directions(task: Any) -> Mapping[str, bool]:
    found = task.higher_is_better()
    return found if isinstance(found, dict) else {}


def of_samples(area: str, samples: Sequence[Mapping[str, Any]], directions: Mapping[str, bool]) -> Scored:
    """What the harness logged of a task's items as one score an item: of the first filter, and its preferred metric."""
    first = samples[0]["filter"]
    rows = sorted((row for row in samples if row["filter"] == first), key=lambda row: row["doc_id"])
    usable = [
        name
        for name in rows[0]["metrics"]
        if directions.get(name, True) and all(_is_score(row.get(name)) for row in rows)
    ]
    if not usable:
        had = ", ".join(rows[0]["metrics"]) or "none"
        raise CompressError(f"The task {area} gives its items no score between 0 and 1 (its metrics: {had}).")
    metric = next((name for name in PREFERRED if name in usable), usable[0])
    others = {name: sum(float(row[name]) for row in rows) / len(rows) for name in usable if name != metric}
    return {
        "metric": metric,
        "others": others,
        "scores": [float(row[metric]) for row in rows],
        "texts": [str(row["arguments"][0][0])[-CHARACTERS:] for row in rows],
        "answers": [_answer(row) for row in rows],
    }


def _is_score(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, int | float) and 0 <= value <= 1


def _answer(row: Mapping[str, Any]) -> str:
    target, requests = row["target"], row["arguments"]
    if isinstance(target, int) and 0 <= target < len(requests):
        target = requests[target][1] if isinstance(requests[target][1], str) else target
    return str(target).strip()[:CHARACTERS]
