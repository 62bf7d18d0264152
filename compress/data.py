"""Text -> token windows: local files first, deterministic by seed, fingerprinted.

The protocol, the same for calibration and evaluation: a text becomes one stream of tokens, for every document the
separator (the token that begins a text) and then the document's ids without special tokens. Random windows start at
`numpy.random.RandomState(seed).randint(0, n - length - 1, samples)`; sequential ones lie end to end from the start.
Items with an answer (completions, chats, labels) that a model is trained on stand alone, unless they are to be packed.

What is a document: a line of a .jsonl file; the whole of a .txt file, as it stands (books, running text: many short
texts belong into a .jsonl); a row of a Hugging Face dataset (`owner/name`, or `owner/name:configuration:split`).
"""

from __future__ import annotations

import hashlib
import itertools
import os.path
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from compress.cutting import Reading, apart, is_local, packed
from compress.errors import CompressError, StartError
from compress.examples import examples_of
from compress.recipe import DataEntry, Role
from compress.text import BUILTIN, Document, checked, documents, records, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "Windows", "documents", "items", "overlap", "read_texts", "token_windows", "windows_from"]

DEFAULT_LENGTH = 256
_CHARACTERS_A_TOKEN = 16  # more than tokens have on average: as much text as windows could be cut from


@dataclass(frozen=True)
class Windows:
    """Token ids ready for a model.

    `tokens`: int64 [n, length]; `mask`: bool [n, length], false on padding, None where there is none; `fingerprint`:
    sha256 (hex) of ids, shape, mask and labels; `tokens_total`: tokens of the stream the windows were cut from;
    `documents`: hashes of the documents in that stream (see `overlap`). `labels`, of text to train on: int64
    [n, length], what is to be learnt, -100 elsewhere (None: all of it), or [n], the class of each. `counts`: items that
    were `cut`, `left out` because nothing to learn was left of them, and lines `skipped` as malformed.
    """

    tokens: torch.Tensor
    fingerprint: str
    source: str
    tokens_total: int
    role: str
    mask: torch.Tensor | None = None
    documents: frozenset[bytes] = field(default=frozenset(), repr=False)
    labels: torch.Tensor | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    #: What the model calls them.
    input_name: ClassVar[str] = "input_ids"

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: torch.Tensor) -> Windows:
        """Some of the windows: `rows` int64, their places in this one."""
        return replace(
            self,
            tokens=self.tokens[rows],
            mask=None if self.mask is None else self.mask[rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    def followed_by(self, tokens: torch.Tensor) -> Windows:
        """These windows and `tokens`, int64 [m, length], all of which is to be learnt; padded ones are not for this."""
        assert self.mask is None
        labels = None if self.labels is None else torch.cat([self.labels, tokens])
        joined, total = torch.cat([self.tokens, tokens]), self.tokens_total + tokens.numel()
        found = _finished(joined, None, self.source, total, self.role, self.documents, labels)
        return replace(found, counts=self.counts)

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])


def token_windows(
    entry: DataEntry,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    base: Path | None = None,
    seed: int = 0,
    labels: Mapping[str, int] | None = None,
) -> Windows:
    """The windows that a data entry of a recipe asks for.

    `context` is the most tokens the model takes (None: no limit); `base` is where a relative source starts from;
    `labels`: the classes of a model that classifies, name -> index, where it is to be trained, or measured on text that
    has labels.
    Raises StartError for what cannot be (missing file, window longer than the context, no separator token),
    CompressError for what the text turns out to be (empty, too short, not UTF-8, malformed lines).
    """
    entry = entry.resolved(role, seed)
    assert entry.seed is not None
    skipped: list[str] = []
    found = documents(entry.source, base or Path.cwd(), role, entry.seed, skipped if entry.skip_bad else None)
    return _windows(found, entry, role, tokenizer, context, labels, skipped)


def windows_from(
    calibration: Iterable[str | Mapping[str, Any]] | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    context: int | None = None,
    role: Role = "calibration",
    labels: Mapping[str, int] | None = None,
) -> Windows:
    """Windows of texts given in Python (each a document, or the fields of one as a line of a .jsonl file has them), or
    of token ids [n, length], which stay as they are. `labels`: as of `token_windows`."""
    source = "python"
    if isinstance(calibration, torch.Tensor):
        ids = calibration
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or not ids.numel():
            shape = list(ids.shape)
            raise StartError(f"{role}: token ids must be integers of shape [samples, length], not {ids.dtype} {shape}.")
        if context and ids.shape[1] > context:
            raise StartError(f"{role}: windows of {ids.shape[1]} tokens; the model takes at most {context}.")
        return _finished(ids.to(torch.int64).cpu(), None, source, ids.numel(), role, frozenset())
    if tokenizer is None:
        raise StartError(f"{role}: texts need a tokenizer: pass tokenizer=..., or token ids [samples, length].")
    if isinstance(calibration, str):
        calibration = [calibration]
    texts = (
        Document({"text": item}, f"{source}:{number}") if isinstance(item, str) else checked(item, f"{source}:{number}")
        for number, item in enumerate(calibration, 1)
    )
    entry = DataEntry(source=source, samples=samples, length=length, seed=seed).resolved(role, seed)
    return _windows(texts, entry, role, tokenizer, context, labels, [])


def items(source: str, base: Path | None = None) -> list[dict[str, Any]]:
    """Test items of a benchmark task: a .jsonl file of choice (`question`, `choices`, `label`), minimal-pair (`good`,
    `bad`) or exact-answer (`prompt`, `completion`) lines, or `builtin:<name>`.

    Each item has exactly those fields and its `area`, which is the file's stem where the line names none.
    """
    area = source.removeprefix(BUILTIN) if source.startswith(BUILTIN) else Path(source).stem
    found = []
    for document in records(source, base or Path.cwd()):
        if document.kind not in ("choice", "pair", "completion"):
            raise CompressError(
                f"{document.origin}: no test item; allowed: question + choices + label, good + bad, "
                "prompt + completion."
            )
        named = document.fields.get("area")
        found.append({**document.core(), "area": area if named is None else str(named)})
    if not found:
        raise CompressError(f"{source}: holds no test items.")
    return found


def read_texts(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    base: Path | None = None,
    role: Role = "calibration",
    seed: int = 0,
    tokens: int = 1 << 20,
) -> Iterator[str]:
    """The documents of a source as text; of one that has no end, or lies on the hub, as much as holds `tokens`."""
    enough = None if is_local(source) else _CHARACTERS_A_TOKEN * tokens
    for document in documents(source, base or Path.cwd(), role, seed):
        text = document.text if tokenizer is None else text_of(document, tokenizer)
        if text is None:
            continue
        yield text
        if enough is not None:
            enough -= len(text)
            if enough < 0:
                break


def fingerprint_source(source: str, base: Path) -> str:
    """sha256 (hex) of a local file's content, or of the name of any other source."""
    path = base / os.path.expanduser(source)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(source.encode()).hexdigest()


def overlap(training: Windows, evaluation: Windows) -> float:
    """Share of the evaluation that the training text contains too, by documents or by windows, whichever is larger."""
    seen = set(_rows(training.tokens))
    rows = list(_rows(evaluation.tokens))
    by_window = sum(row in seen for row in rows) / max(len(rows), 1)
    shared = len(training.documents & evaluation.documents)
    return max(by_window, shared / max(len(evaluation.documents), 1))


def _rows(tokens: torch.Tensor) -> Iterator[bytes]:
    return (row.tobytes() for row in tokens.numpy())


def _windows(
    found: Iterator[Document],
    entry: DataEntry,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    labels: Mapping[str, int] | None,
    skipped: list[str],
) -> Windows:
    length = entry.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    place = f"data.{role}" if entry.source != "python" else role
    if context and length > context:
        raise StartError(f"{place}.length: {length} tokens; the model takes at most {context}.")
    if role == "evaluation" and labels is not None:
        first = list(itertools.islice(found, 1))
        found = itertools.chain(first, found)
        if first and first[0].kind == "text" and "label" in first[0].fields:
            entry = entry.model_copy(update={"pack": False})  # each text has a class of its own
        else:
            labels = None
    if entry.pack is None:
        first = list(itertools.islice(found, 1))
        alone = labels is not None or (role == "training" and any(d.kind in ("completion", "messages") for d in first))
        entry, found = entry.model_copy(update={"pack": not alone}), itertools.chain(first, found)
    elif entry.pack and labels is not None:
        raise StartError(f"{place}.pack: a model that classifies is trained on each text alone; leave pack out.")
    learnt = role == "training" or labels is not None
    examples = examples_of(found, tokenizer, learnt, labels, skipped if entry.skip_bad else None)
    reading = Reading(examples, entry, tokenizer, place)
    cut = packed(reading, entry, length, place) if entry.pack else apart(reading, entry, length, place)
    if skipped:
        reading.counts["skipped"] = len(skipped)
    windows = _finished(cut.tokens, cut.mask, entry.source, cut.total, role, frozenset(reading.seen), cut.labels)
    return replace(windows, counts=dict(reading.counts))


def _finished(
    tokens: torch.Tensor, mask: torch.Tensor | None, source: str, total: int, role: str, seen: frozenset[bytes],
    labels: torch.Tensor | None = None,
) -> Windows:  # fmt: skip
    digest = hashlib.sha256(str(list(tokens.shape)).encode())
    digest.update(np.ascontiguousarray(tokens.numpy().astype("<i8")).tobytes())
    for more in (mask, labels):
        if more is not None:
            digest.update(more.numpy().tobytes())
    return Windows(tokens, digest.hexdigest(), source, total, role, mask, seen, labels)
