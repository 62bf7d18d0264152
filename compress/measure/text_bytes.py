"""How many bytes of text tokens stand for, and scoring the same text by models with different tokenizers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.measure.items import Request, score

#: How tokenizers that fall back to bytes write one: <0x0A>.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: What stands for a space in tokens of SentencePiece, and for the middle of a word in those of WordPiece.
_SPACE, _MIDDLE = "▁", "##"


def byte_table(tokenizer: Any, vocabulary: int = 0) -> Tensor:
    """UTF-8 bytes that each token stands for, int64 [at least `vocabulary`]; 0 for special tokens.

    Byte-level tokens have a letter for each byte; those of SentencePiece are the text itself, with a mark for a space
    and words for bytes that it has no letter for. WordPiece leaves out the spaces before words: they are counted.
    """
    tokens: dict[str, int] = tokenizer.get_vocab()
    table = torch.zeros(max([vocabulary, *(index + 1 for index in tokens.values())]), dtype=torch.int64)
    count = _counter(tokenizer)
    special = set(tokenizer.all_special_ids)
    added = set(tokenizer.get_added_vocab().values())
    for token, index in tokens.items():
        if index not in special:
            # added tokens stand for their own letters, whatever the others are written in
            table[index] = len(token.encode()) if index in added else count(token)
    return table


def _counter(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = repr(getattr(backend, "decoder", None)) + repr(getattr(backend, "pre_tokenizer", None))
    if "ByteLevel" in kinds:
        return len
    if "WordPiece" in kinds:
        return lambda token: len(token.removeprefix(_MIDDLE).encode()) + (not token.startswith(_MIDDLE))
    return lambda token: 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())


def scored_bytes(windows: Tensor, scored: Tensor, table: Tensor) -> Tensor:
    """Bytes per window, float64 [n]; `windows`: int64 [n, length]; `scored`: bool [n, length - 1], of all but the
    first token."""
    return (table[windows[:, 1:]] * scored).sum(1).double()


def why_foreign(original: Path, folder: Path) -> str | None:
    """Why token probabilities of the two models cannot be set side by side: their tokenizers differ. None where the
    same ids mean the same tokens in both, or one is a cut of the other, or a folder has no tokenizer."""
    from compress.opening import read_tokenizer
    from compress.vocabulary import expansion

    old, new = read_tokenizer(original), read_tokenizer(folder)
    if old is None or new is None:
        return None
    before, after = old.get_vocab(), new.get_vocab()
    if all(after.get(token) == index for token, index in before.items()) or expansion(old, new) is not None:
        return None
    shared = sum(token in after for token in before)
    return (
        f"the models' tokenizers differ ({len(before):,} and {len(after):,} tokens, {shared:,} of them the same text), "
        "so what they pay for a token does not compare; bits_per_byte does"
    )


def window_texts(windows: Tensor, mask: Tensor | None, tokenizer: Any) -> list[str]:
    """The text of each window, without special tokens and without letters that its borders cut in two."""
    found = []
    for index, window in enumerate(windows):
        ids = window if mask is None else window[mask[index]]
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(text.strip("\ufffd"))
    return found


def score_texts(
    model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], context: int | None
) -> tuple[Tensor, Tensor, int]:
    """What the model pays for each text as its own tokenizer cuts it: (nats, UTF-8 bytes), both float64 [n], and how
    many tokens it did not know.

    Each text comes after the token that begins one (or else ends one), so that all of it is scored. A text that does
    not fit the context is read in parts.
    """
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id)
    first = next((token for token in known if token is not None), None)
    if first is None:
        raise CompressError("The tokenizer has no token that begins or ends a text, so a text's first one has no odds.")
    room = (context or 1 << 20) - 1
    requests, owner, unknown = [], [], 0
    for index, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        unknown += 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        for start in range(0, len(ids), room):
            requests.append(Request((first, *ids[start : start + room]), 1))
            owner.append(index)
    nats = torch.zeros(len(texts), dtype=torch.float64)
    for index, answer in zip(owner, score(model, requests), strict=True):
        nats[index] -= answer.log_likelihood
    return nats, torch.tensor([float(len(text.encode())) for text in texts], dtype=torch.float64), unknown
