"""Text -> token windows: local files first, deterministic by seed, fingerprinted.

The protocol, the same for calibration and evaluation: a text becomes one stream of tokens, for every document the
separator (the token that begins a text) and then the document's ids without special tokens. Random windows start at
`numpy.random.RandomState(seed).randint(0, n - length - 1, samples)`; sequential ones lie end to end from the start.

What is a document: a line of a .jsonl file; the whole of a .txt file, as it stands (books, running text: many short
texts belong into a .jsonl); a row of a Hugging Face dataset (`owner/name`, or `owner/name:configuration:split`).
"""

from __future__ import annotations

import hashlib
import itertools
import os.path
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.errors import CompressError, StartError
from compress.recipe import DataEntry, Role
from compress.text import BUILTIN, Document, documents, records, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "Windows", "documents", "items", "overlap", "token_windows", "windows_from"]

DEFAULT_LENGTH = 256
_BATCH = 64  # documents given to the tokenizer at once
# Endless or huge sources are not read to their end for random windows: this many times the tokens asked for.
_ENOUGH = {"builtin": 1, "hub": 8}


@dataclass(frozen=True)
class Windows:
    """Token ids ready for a model.

    `tokens`: int64 [n, length]; `mask`: bool [n, length], false on padding, None where there is none; `fingerprint`:
    sha256 (hex) of ids, shape and mask; `tokens_total`: tokens of the stream the windows were cut from; `documents`:
    hashes of the documents in that stream (see `overlap`); `labels`: int64 [n, length], the ids that are to be learnt,
    -100 elsewhere (None: all of the text), or, for a model that classifies, the class of each [n].
    """

    tokens: torch.Tensor
    fingerprint: str
    source: str
    tokens_total: int
    role: str
    mask: torch.Tensor | None = None
    documents: frozenset[bytes] = field(default=frozenset(), repr=False)
    labels: torch.Tensor | None = None

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
) -> Windows:
    """The windows that a data entry of a recipe asks for.

    `context` is the most tokens the model takes (None: no limit); `base` is where a relative source starts from.
    Raises StartError for what cannot be (missing file, window longer than the context, no separator token),
    CompressError for what the text turns out to be (empty, too short, not UTF-8, malformed lines).
    """
    entry = entry.resolved(role, seed)
    assert entry.seed is not None
    found = documents(entry.source, base or Path.cwd(), role, entry.seed)
    return _windows(found, entry, role, tokenizer, context)


def windows_from(
    calibration: Iterable[str] | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    context: int | None = None,
    role: Role = "calibration",
) -> Windows:
    """Windows of texts given in Python (each a document), or of token ids [n, length], which stay as they are."""
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
    texts = (Document({"text": text}, f"{source}:{number}") for number, text in enumerate(calibration, 1))
    entry = DataEntry(source=source, samples=samples, length=length, seed=seed).resolved(role, seed)
    return _windows(texts, entry, role, tokenizer, context)


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
) -> Windows:
    length = entry.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    place = f"data.{role}" if entry.source != "python" else role
    if context and length > context:
        raise StartError(f"{place}.length: {length} tokens; the model takes at most {context}.")
    reading = _Reading(found, entry, tokenizer, place)
    if entry.pack:
        tokens, total = _packed(reading, entry, length, place)
        mask = None
    else:
        tokens, mask, total = _apart(reading, entry, length, place)
    return _finished(tokens, mask, entry.source, total, role, frozenset(reading.seen))


def _finished(
    tokens: torch.Tensor, mask: torch.Tensor | None, source: str, total: int, role: str, seen: frozenset[bytes]
) -> Windows:
    digest = hashlib.sha256(str(list(tokens.shape)).encode())
    digest.update(np.ascontiguousarray(tokens.numpy().astype("<i8")).tobytes())
    if mask is not None:
        digest.update(mask.numpy().tobytes())
    return Windows(tokens, digest.hexdigest(), source, total, role, mask, seen)


class _Reading:
    """Documents on their way through the tokenizer: hashes and counts what passes."""

    def __init__(self, found: Iterator[Document], entry: DataEntry, tokenizer: PreTrainedTokenizerBase, place: str):
        self.entry = entry
        self.tokenizer = tokenizer
        self.seen: set[bytes] = set()
        self.characters = 0
        self.known = 0  # tokens that are not special (nor, with that, the unknown one)
        self._special = np.array(tokenizer.all_special_ids, dtype=np.int32)
        self._found = found
        # An encoder's own frame ([CLS] ... [SEP]) belongs around a document that stands alone.
        self.framed = not entry.pack and entry.separator == "bos" and tokenizer.cls_token_id is not None
        self.separator = [] if self.framed or entry.separator == "none" else [_separator(tokenizer, place)]

    def __iter__(self) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
        """The ids of each document, separator included."""
        while batch := list(itertools.islice(self._found, _BATCH)):
            texts = [text_of(document, self.tokenizer) for document in batch]
            for text, ids in zip(texts, self._ids(texts), strict=True):
                self.characters += len(text)
                self.seen.add(hashlib.sha256(text.encode()).digest()[:16])
                row = np.array([*self.separator, *ids], dtype=np.int32)
                self.known += int(np.isin(row, self._special, invert=True).sum())
                yield row

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: no warning about texts longer than the model's context, which are cut into windows later
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=self.framed, verbose=False)["input_ids"]
        return ids

    def check(self) -> None:
        """Raises when what was read holds no text that the tokenizer knows."""
        source = self.entry.source
        if not self.seen or not self.characters:
            raise CompressError(f"{source}: holds no text.")
        if not self.known:
            raise CompressError(f"{source}: the model's tokenizer knows none of its {self.characters} characters.")


def _separator(tokenizer: PreTrainedTokenizerBase, place: str) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return int(token)
    raise StartError(
        f"{place}.separator: this tokenizer has no token that begins a text (bos, eos or cls); set separator: none."
    )


def _packed(reading: _Reading, entry: DataEntry, length: int, place: str) -> tuple[torch.Tensor, int]:
    """(int64 [n, length], tokens in the stream) cut from all documents in one stream."""
    random, samples = entry.sampling == "random", entry.samples
    if random and samples is None:
        raise StartError(f"{place}.samples: random windows need a number of them.")
    enough = None if samples is None else samples * length
    if random and enough is not None:
        kind = "builtin" if entry.source.startswith(BUILTIN) else "local" if _local(entry.source) else "hub"
        enough = None if kind == "local" else _ENOUGH[kind] * enough + length + 2
    parts, total = [], 0
    for ids in reading:
        parts.append(ids)
        total += len(ids)
        if enough is not None and total >= enough:
            break
    reading.check()
    stream = np.concatenate(parts)
    needed = length + 2 if random else length * (samples or 1)
    if total < needed:
        windows = "one random window" if random else f"{samples or 1} x {length}"
        raise CompressError(
            f"{entry.source}: too short: {total} tokens, {needed} are needed ({windows} of length {length}). "
            f"Give {place} more text, or set {place}.length{'' if random else ' or .samples'} lower."
        )
    if random:
        assert samples is not None
        starts = np.random.RandomState(entry.seed).randint(0, total - length - 1, samples)
        cut = np.stack([stream[start : start + length] for start in starts])
    else:
        count = samples or total // length
        cut = stream[: count * length].reshape(count, length)
    return torch.from_numpy(cut.astype(np.int64)), total


def _local(source: str) -> bool:
    return source == "python" or Path(source).suffix.lower() in (".txt", ".jsonl") or os.path.exists(source)


def _apart(reading: _Reading, entry: DataEntry, length: int, place: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(int64 [n, length], mask, tokens read): each document alone, cut at `length`, padded on the right.

    Random sampling draws documents without replacement. Windows are as wide as the longest of them.
    """
    endless = entry.source.startswith(BUILTIN) or not _local(entry.source)
    stop = entry.samples if entry.sampling == "sequential" or endless else None
    rows = list(itertools.islice((ids for ids in reading if len(ids) > len(reading.separator)), stop))
    reading.check()
    if entry.samples is not None and len(rows) < entry.samples:
        raise CompressError(
            f"{entry.source}: too short: {len(rows)} documents, {entry.samples} are asked for. "
            f"Give {place} more text, or set {place}.samples to {len(rows)}."
        )
    total = sum(len(row) for row in rows)
    if entry.sampling == "random":
        order = np.random.RandomState(entry.seed).permutation(len(rows))[: entry.samples]
        rows = [rows[index] for index in order]
    # An encoder's last token closes its frame, so it is kept where a document is cut.
    cut = [np.concatenate([row[: length - 1], row[-1:]]) if reading.framed else row[:length] for row in rows]
    kept = [row if len(row) <= length else short for row, short in zip(rows, cut, strict=True)]
    width = max(len(row) for row in kept)
    padding = reading.tokenizer.pad_token_id
    tokens = torch.full((len(kept), width), 0 if padding is None else int(padding), dtype=torch.int64)
    mask = torch.zeros((len(kept), width), dtype=torch.bool)
    for index, row in enumerate(kept):
        tokens[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[index, : len(row)] = True
    return tokens, mask, total
