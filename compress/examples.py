"""Training examples: what of an item is to be learnt, token by token.

Of plain text all is learnt; of `prompt` + `completion` the completion, and that the text ends there; of chat `messages`
what the assistant says, with the token that closes its turn; of `text` + `label`, where a model classifies, the label.
Where an answer begins is decided by characters, so that prompt and answer are encoded together, as test items are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CompressError, StartError
from compress.registry import yaml_words
from compress.text import Document, chat_text, made_of_each, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a label is where nothing is to be learnt, as torch's cross entropy has it.
IGNORED = -100

Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Example:
    """One item as it is to be encoded. `spans` are the characters to be learnt, [start, end) each (None: all of them);
    `closes`: the token that ends a text follows, and is learnt; `label`: of a model that classifies, else None."""

    text: str
    spans: Sequence[tuple[int, int]] | None = None
    closes: bool = False
    label: int | None = None


def examples_of(
    found: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    trained: bool,
    labels: Mapping[str, int] | None = None,
    skipped: list[str] | None = None,
) -> Iterator[Example]:
    """Documents as examples. Those that cannot be one go into `skipped`, or all together are refused. `trained` false:
    what is to be learnt does not matter, and a document is its text."""

    def made(document: Document) -> Example:
        return example_of(document, tokenizer, labels) if trained else Example(text_of(document, tokenizer))

    return made_of_each(found, made, skipped)


def example_of(
    document: Document, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None = None
) -> Example:
    """The example that a document stands for. `labels`: the classes of a model that classifies, name -> index; None for
    others. CompressError, with the document's file and line, for what cannot be learnt."""
    if labels is not None:
        return Example(text_of(document, tokenizer), label=_label(document, labels))
    if document.kind == "completion":
        prompt, completion = document.fields["prompt"], document.fields["completion"]
        if not completion.strip():
            raise CompressError(f"{document.origin}: completion: it is empty, so there is nothing to learn.")
        # White space at the seam belongs to the first word after it, as where items are scored.
        start = len(prompt.rstrip())
        return Example(prompt + completion, [(start, len(prompt + completion))], closes=True)
    if document.kind == "messages":
        return _chat(document, tokenizer)
    return Example(text_of(document, tokenizer))


def _label(document: Document, labels: Mapping[str, int]) -> int:
    given = document.fields.get("label")
    if document.text is None or given is None:
        raise CompressError(f"{document.origin}: this model classifies: a line needs text and label.")
    if isinstance(given, str) and given in labels:
        return labels[given]
    if isinstance(given, int) and not isinstance(given, bool) and given in labels.values():
        return given
    names = ", ".join(f"{index} ({name})" for name, index in sorted(labels.items(), key=lambda item: item[1])[:20])
    raise CompressError(f"{document.origin}: label: {yaml_words(given)} is no class of this model; allowed: {names}.")


def _chat(document: Document, tokenizer: PreTrainedTokenizerBase) -> Example:
    """What the assistant says, found by laying the chat out with and without it: the template alone knows its marks."""
    messages = list(document.fields["messages"])
    whole = chat_text(document, tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = chat_text(document, tokenizer, messages[:index], answer=True) if index else ""
        said = chat_text(document, tokenizer, messages[: index + 1])
        start, end = (_shared(whole, part) for part in (asked, said))
        if start < end:
            spans.append((start, end))
    if not spans:
        raise CompressError(f"{document.origin}: messages: the assistant says nothing, so there is nothing to learn.")
    return Example(whole, spans)


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, framed: bool
) -> list[tuple[Ids, Ids | None]]:
    """(ids, labels) of each example, labels None where all of it is learnt; `framed`: an encoder's own marks around it.

    A token that lies across the border of prompt and answer counts to the answer.
    """
    texts = [example.text for example in examples]
    parted = any(example.spans is not None for example in examples)
    if parted and not tokenizer.is_fast:
        raise StartError(
            "This model's tokenizer does not say which characters a token stands for, so completions and messages "
            "cannot be told from what comes before them. Give text instead."
        )
    # verbose=False: no warning about texts longer than the model's context, which are cut later
    found = tokenizer(texts, add_special_tokens=framed, verbose=False, return_offsets_mapping=parted)
    rows: list[tuple[Ids, Ids | None]] = []
    for number, example in enumerate(examples):
        ids = np.array(found["input_ids"][number], dtype=np.int32)
        if example.spans is None:
            rows.append((ids, None))
            continue
        offsets = np.array(found["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
        learnt = np.zeros(len(ids), dtype=bool)
        for start, end in example.spans:
            learnt |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 0] < offsets[:, 1])
        labels = np.where(learnt, ids, IGNORED).astype(np.int32)
        if example.closes and tokenizer.eos_token_id is not None:
            last = np.array([tokenizer.eos_token_id], dtype=np.int32)
            ids, labels = np.concatenate([ids, last]), np.concatenate([labels, last])
        rows.append((ids, labels))
    return rows


def fitted(ids: Ids, labels: Ids | None, length: int, first: int) -> tuple[Ids, Ids | None]:
    """An item cut to `length` tokens: a prompt loses its beginning (behind its `first` tokens, which separate it from
    what came before), and where the answer alone is too long, that its end."""
    over = len(ids) - length
    if over <= 0 or labels is None:
        return ids[:length], None if labels is None else labels[:length]
    learnt = np.flatnonzero(labels != IGNORED)
    before = int(learnt[0]) if len(learnt) else 0
    dropped = min(over, max(0, before - first - 1))  # a token stays in front of the answer, to predict its first one
    keep = np.concatenate([np.arange(first), np.arange(first + dropped, len(ids))])[:length]
    return ids[keep], labels[keep]
