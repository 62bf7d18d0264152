"""Documents through the tokenizer, and cut: into windows of one stream, or each alone."""

from __future__ import annotations

import hashlib
import itertools
import os.path
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.errors import CompressError, StartError
from compress.examples import IGNORED, Example, encoded, fitted
from compress.recipe.sections import DataEntry
from compress.text import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # documents given to the tokenizer at once
# Endless or huge sources are not read to their end for random windows: this many times the tokens asked for.
_ENOUGH = {"builtin": 1, "hub": 8}


@dataclass(frozen=True)
class Cut:
    """Tokens int64 [n, length], mask, tokens read, labels: see `Windows`."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    total: int
    labels: torch.Tensor | None


class Reading:
    """Examples on their way through the tokenizer: hashes and counts what passes."""

    def __init__(self, found: Iterable[Example], entry: DataEntry, tokenizer: PreTrainedTokenizerBase, place: str):
        self.entry = entry
        self.tokenizer = tokenizer
        self.seen: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self.characters = 0
        self.known = 0  # tokens that are not special (nor, with that, the unknown one)
        self._special = np.array(tokenizer.all_special_ids, dtype=np.int32)
        self._found = iter(found)
        # An encoder's own frame ([CLS] ... [SEP]) belongs around a document that stands alone.
        self.framed = not entry.pack and entry.separator == "bos" and tokenizer.cls_token_id is not None
        self.separator = [] if self.framed or entry.separator == "none" else [_separator(tokenizer, place)]

    def __iter__(self) -> Iterator[_Row]:
        """Each document, separator included."""
        while batch := list(itertools.islice(self._found, _BATCH)):
            for example, (ids, labels) in zip(batch, encoded(batch, self.tokenizer, self.framed), strict=True):
                self.characters += len(example.text)
                self.seen.add(hashlib.sha256(example.text.encode()).digest()[:16])
                # A chat template may write the token that begins a text itself.
                before = self.separator if not len(ids) or labels is None or [ids[0]] != self.separator else []
                row = np.array([*before, *ids], dtype=np.int32)
                self.known += int(np.isin(row, self._special, invert=True).sum())
                if labels is not None:
                    labels = np.array([IGNORED] * len(before) + [*labels], dtype=np.int32)
                yield _Row(row, labels, example.label)

    def check(self) -> None:
        """Raises when what was read holds no text that the tokenizer knows."""
        source = self.entry.source
        if not self.seen or not self.characters:
            raise CompressError(f"{source}: holds no text.")
        if not self.known:
            raise CompressError(f"{source}: the model's tokenizer knows none of its {self.characters} characters.")


@dataclass(frozen=True)
class _Row:
    """One document: its ids, what of it is to be learnt (None: all), its class where it has one."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    labels: np.ndarray[Any, np.dtype[np.int32]] | None
    label: int | None

    def learnt(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return self.ids if self.labels is None else self.labels


def _separator(tokenizer: PreTrainedTokenizerBase, place: str) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return int(token)
    raise StartError(
        f"{place}.separator: this tokenizer has no token that begins a text (bos, eos or cls); set separator: none."
    )


def packed(reading: Reading, entry: DataEntry, length: int, place: str) -> Cut:
    """Windows cut from all documents in one stream."""
    random, samples = entry.sampling == "random", entry.samples
    if random and samples is None:
        raise StartError(f"{place}.samples: random windows need a number of them.")
    enough = None if samples is None else samples * length
    if random and enough is not None:
        kind = "builtin" if entry.source.startswith(BUILTIN) else "local" if is_local(entry.source) else "hub"
        enough = None if kind == "local" else _ENOUGH[kind] * enough + length + 2
    parts: list[_Row] = []
    total = 0
    for row in reading:
        parts.append(row)
        total += len(row.ids)
        if enough is not None and total >= enough:
            break
    reading.check()
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
    else:
        starts = np.arange(samples or total // length) * length

    def cut(stream: np.ndarray[Any, np.dtype[np.int32]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([stream[start : start + length] for start in starts]).astype(np.int64))

    tokens = cut(np.concatenate([row.ids for row in parts]))
    if all(row.labels is None for row in parts):
        return Cut(tokens, None, total, None)
    return Cut(tokens, None, total, cut(np.concatenate([row.learnt() for row in parts])))


def is_local(source: str) -> bool:
    """Whether a source is text that is here and has an end."""
    return source == "python" or Path(source).suffix.lower() in (".txt", ".jsonl") or os.path.exists(source)


def apart(reading: Reading, entry: DataEntry, length: int, place: str) -> Cut:
    """Each document alone, cut at `length`, padded on the right.

    Random sampling draws documents without replacement. Windows are as wide as the longest of them.
    """
    endless = entry.source.startswith(BUILTIN) or not is_local(entry.source)
    stop = entry.samples if entry.sampling == "sequential" or endless else None
    kept = (_shortened(row, reading, length) for row in reading if len(row.ids) > len(reading.separator))
    rows = list(itertools.islice((row for row in kept if row is not None), stop))
    reading.check()
    if not rows or (entry.samples is not None and len(rows) < entry.samples):
        raise CompressError(
            f"{entry.source}: too short: {len(rows)} documents, {entry.samples or 1} are asked for. "
            f"Give {place} more text, or set {place}.samples to {len(rows)}."
        )
    total = sum(len(row.ids) for row in rows)
    if entry.sampling == "random":
        order = np.random.RandomState(entry.seed).permutation(len(rows))[: entry.samples]
        rows = [rows[index] for index in order]
    padding = reading.tokenizer.pad_token_id
    tokens, mask = _padded([row.ids for row in rows], 0 if padding is None else int(padding))
    labels = None
    if any(row.label is not None for row in rows):
        labels = torch.tensor([row.label for row in rows])
    elif any(row.labels is not None for row in rows):
        labels, _ = _padded([row.learnt() for row in rows], IGNORED)
    return Cut(tokens, mask, total, labels)


def _shortened(row: _Row, reading: Reading, length: int) -> _Row | None:
    """The document at most `length` tokens long; None where nothing is left of it to learn."""
    if len(row.ids) <= length:
        return row
    reading.counts["cut"] += 1
    if reading.framed:  # an encoder's last token closes its frame, so it is kept
        return replace(row, ids=np.concatenate([row.ids[: length - 1], row.ids[-1:]]))
    ids, labels = fitted(row.ids, row.labels, length, len(reading.separator))
    if labels is not None and not (labels != IGNORED).any():
        reading.counts["left out"] += 1
        return None
    return replace(row, ids=ids, labels=labels)


def _padded(rows: list[np.ndarray[Any, np.dtype[np.int32]]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [n, width], mask): rows padded on the right to the longest of them."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), padding, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[index, : len(row)] = True
    return tokens, mask
