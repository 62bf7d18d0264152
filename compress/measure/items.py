"""Scoring test items: multiple choice, minimal pairs and exact answers, the same way for every model.

- `question`, `choices`, `label`: each choice's summed log-likelihood after the question, divided by the choice's
  bytes (so that long choices are not punished); right when the labelled one is alone on top. A space parts question
  and choice where neither brings white space.
- `good`, `bad`: log-likelihood of the whole sentence; right when the good one is likelier.
- `prompt`, `completion`, joined as written: right when every token of the completion is the model's most likely next
  one, given the prompt and the completion's earlier tokens. That is the same as asking whether greedy decoding writes
  the completion: as long as it agrees, greedy decoding has exactly that text before it, and the first disagreement
  ends both. One forward does it.

The tokenizer's beginning-of-text token, if it has one, comes first. Prompt and continuation are encoded together and
parted after the tokens they share with the prompt alone, as the harness of EleutherAI does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import CompressError
from compress.measure.likelihood import LOGITS_BUDGET, TOKENS_BUDGET, forward, vocabulary_of

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One text to score: `ids`, of which those from `start` on count."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Answer:
    """Summed log-likelihood in nats of the counted tokens, and whether each was the most likely one."""

    log_likelihood: float
    greedy: bool


def score_items(
    model: torch.nn.Module, tokenizer: Any, items: Sequence[Item], *, context: int | None = None
) -> list[int]:
    """1 for each item answered right, 0 for each other, in order. Texts over `context` tokens lose their beginning."""
    requests: list[Request] = []
    spans: list[slice] = []
    for item in items:
        first = len(requests)
        requests += [encode(tokenizer, before, after, context) for before, after in texts(item)]
        spans.append(slice(first, len(requests)))
    answers = score(model, requests)
    return [int(is_right(item, answers[span])) for item, span in zip(items, spans, strict=True)]


def shown(item: Item) -> tuple[str, str]:
    """What is asked and what the right answer is, for people."""
    if "choices" in item:
        return str(item["question"]), str(item["choices"][int(item["label"])])
    if "good" in item:
        return f"{item['good']} / {item['bad']}", str(item["good"])
    return str(item["prompt"]), str(item["completion"])


def texts(item: Item) -> list[tuple[str, str]]:
    """The (context, continuation) pairs whose likelihoods decide the item."""
    if "choices" in item:
        question = str(item["question"])
        return [(question, _after(question, str(choice))) for choice in item["choices"]]
    if "good" in item:
        return [("", str(item["good"])), ("", str(item["bad"]))]
    if "completion" in item:
        return [(str(item["prompt"]), str(item["completion"]))]
    raise CompressError(
        "An item needs question, choices and label; or good and bad; or prompt and completion. "
        f"This one has: {', '.join(sorted(item)) or 'nothing'}."
    )


def is_right(item: Item, answers: Sequence[Answer]) -> bool:
    """Whether the model's answers to `texts(item)` are right. A tie, or NaN, is not."""
    if "choices" in item:
        label = int(item["label"])
        scores = [
            answer.log_likelihood / max(1, len(str(choice).encode()))
            for answer, choice in zip(answers, item["choices"], strict=True)
        ]
        return all(scores[label] > other for i, other in enumerate(scores) if i != label)
    if "good" in item:
        return answers[0].log_likelihood > answers[1].log_likelihood
    return answers[0].greedy


def encode(tokenizer: Any, before: str, after: str, context: int | None = None) -> Request:
    """Ids of both texts together, and where the second begins."""
    stripped = before.rstrip()
    # White space at the seam belongs to the first word after it, as in the text the model was trained on.
    after, before = before[len(stripped) :] + after, stripped
    whole = tokenizer(before + after, add_special_tokens=False)["input_ids"]
    start = 0
    if before:
        alone = tokenizer(before, add_special_tokens=False)["input_ids"]
        while start < min(len(alone), len(whole) - 1) and alone[start] == whole[start]:
            start += 1
    if not whole:
        raise CompressError(f"An item's text has no tokens: {before + after!r}.")
    bos = tokenizer.bos_token_id
    if bos is not None:
        whole, start = [bos, *whole], start + 1
    if context is not None and len(whole) > context:
        start = max(0, start - (len(whole) - context))
        whole = whole[-context:]
    # Nothing stands before the first token of a text without beginning-of-text token: it cannot be scored.
    return Request(tuple(whole), max(start, 1))


def score(model: torch.nn.Module, requests: Sequence[Request]) -> list[Answer]:
    """Answers in the order of the requests; batches of similar length, padded on the right under a mask."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].ids), i))
    answers: list[Answer | None] = [None] * len(requests)
    vocabulary, device = vocabulary_of(model), next(model.parameters()).device
    first = 0
    while first < len(order):
        length = len(requests[order[first]].ids)
        size = max(1, min(TOKENS_BUDGET // length, LOGITS_BUDGET // (length * vocabulary)))
        chosen = order[first : first + size]
        with torch.inference_mode():
            found = _batch(model, [requests[i] for i in chosen], device)
        for i, answer in zip(chosen, found, strict=True):
            answers[i] = answer
        first += size
    return [answer for answer in answers if answer is not None]


def _batch(model: torch.nn.Module, requests: Sequence[Request], device: torch.device) -> list[Answer]:
    length = max(len(request.ids) for request in requests)
    ids = torch.zeros(len(requests), length, dtype=torch.long)
    counted = torch.zeros(len(requests), length, dtype=torch.bool)
    attention = torch.zeros(len(requests), length, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids[row, : len(request.ids)] = torch.tensor(request.ids)
        counted[row, request.start : len(request.ids)] = True
        attention[row, : len(request.ids)] = True
    ids, counted = ids.to(device), counted.to(device)
    logits = forward(model, ids, attention.to(device))[:, :-1][counted[:, 1:]]
    picked, best = _picked(logits, ids[:, 1:][counted[:, 1:]])
    sizes = counted[:, 1:].sum(1).tolist()
    return [_answer(*parts) for parts in zip(picked.split(sizes), best.split(sizes), strict=True)]


def _answer(likelihood: Tensor, greedy: Tensor) -> Answer:
    if len(greedy) == 0:
        return Answer(math.nan, False)
    return Answer(float(likelihood.sum(dtype=torch.float64)), bool(greedy.all()))


def _picked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each target and whether it is the most likely; logits [tokens, vocabulary]."""
    likelihood = -F.cross_entropy(logits.float(), targets, reduction="none")
    return likelihood.cpu(), (logits.argmax(-1) == targets).cpu()


def _after(question: str, choice: str) -> str:
    parted = not question or question[-1].isspace() or choice[:1].isspace()
    return choice if parted else f" {choice}"
