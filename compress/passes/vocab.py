"""Vocabulary pruning: tokens that a text never uses leave the embedding, the head and the tokenizer together.

Abdaoui, Pradel, Sigel: "Load What You Need: Smaller Versions of Multilingual BERT", 2020, arXiv 2010.05609, section 3:
the tokens that the corpora of the wanted languages use stay. Here merges and their parts stay with them
(`compress/vocabulary.py`), so that the text is encoded to the same pieces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import CompressError, StartError
from compress.fewer_tokens import keep_tokens, named_ids, rows_of, with_tokens
from compress.passes.base import Context, PassResult
from compress.passes.structural import StructuralPass

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from compress.model import ModelHandle

#: Documents encoded at once.
_BATCH = 64
#: Python's objects for one token and its merge, while `tokenizer.json` is read and cut: measured, bytes.
_TOKEN_BYTES = 1500


def rounded_up(count: int, multiple: int) -> int:
    """The next multiple, or `count` itself.

    >>> rounded_up(13, 8), rounded_up(16, 8)
    (16, 16)
    """
    return -(-count // multiple) * multiple


def choose(
    counts: Tensor, always: Iterable[int], needs: Callable[[int], set[int]], most: int | None, min_count: int,
    multiple: int,
) -> set[int]:  # fmt: skip
    """Ids of the tokens that stay. `counts`: how often each id is used, int `[vocabulary]`; `needs`: a token's id and
    those of the tokens that it is made of; `most`: how many shall stay (None: all that are used).

    Used are those found `min_count` times; the most frequent come first, each with what it needs. What is missing to a
    multiple, or to `most`, is filled up with unused tokens in the order of their ids. StartError where `always` and
    what it needs are more than `most`.

    >>> choose(torch.tensor([0, 5, 0, 9]), [0], lambda index: {index}, None, 1, 1)
    {0, 1, 3}
    """
    kept: set[int] = set()
    for index in always:
        kept |= needs(index)
    order = sorted(
        (i for i in torch.nonzero(counts >= min_count).flatten().tolist()), key=lambda i: (-int(counts[i]), i)
    )
    if most is None:
        for index in order:
            kept |= needs(index)
    size = min(len(counts), rounded_up(len(kept) if most is None else most, multiple))
    if len(kept) > size:
        raise StartError(f"vocab: keep: {most}: special tokens, bytes and the chat template alone are {len(kept)}.")
    while len(kept) < size:
        before = len(kept)
        for index in chain(order, range(len(counts))):
            if len(kept) == size:
                break
            missing = needs(index) - kept if index not in kept else set()
            if len(kept) + len(missing) <= size:
                kept |= missing
        if len(kept) == before:
            break
    return kept


class Vocab(StructuralPass):
    """Remove the tokens that a text never uses from embedding, head and tokenizer together."""

    name: ClassVar[str] = "vocab"
    needs_calibration: ClassVar[bool] = True
    needs_documents: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("text",)

    keep: Literal["used"] | Annotated[int, Field(ge=1)] = Field(
        default="used",
        description="`used`: the tokens that the text uses and what they are made of; a number: so many, the most "
        "frequent first. Special tokens, bytes and the chat template's words always stay.",
    )
    text: str | None = Field(
        default=None,
        description="The text whose tokens stay: a .txt or .jsonl file, read to its end. Default: that of "
        "data.calibration and data.training.",
    )
    min_count: int = Field(default=1, ge=1, description="How often a token must stand in the text to count as used.")
    multiple: int = Field(
        default=8, ge=1, description="The vocabulary's size is rounded up to a multiple of this, by tokens left unused."
    )

    @property
    def takes_calibration(self) -> bool:
        return self.text is None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        from compress.vocabulary import pieces_of

        if tokenizer is None:
            raise StartError("vocab: the model's folder holds no tokenizer, so there are no tokens to count.")
        pieces_of(tokenizer)

    def refuses(self, model: PreTrainedModel) -> str | None:
        if not isinstance(model.get_input_embeddings(), torch.nn.Embedding):
            return "it removes tokens, and this model's input is no table with a row for each."
        if getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
            return "the blocks of this model have tables of tokens of their own."
        return None

    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        rows = rows_of(model)
        if self.keep == "used":
            return model.config
        size = rounded_up(self.keep, self.multiple)
        if size >= rows:
            asked = f"vocab: keep: {self.keep}, in multiples of {self.multiple}"
            raise StartError(f"{asked}, leaves nothing to remove: the model has {rows} tokens.")
        return with_tokens(model.config, {old: min(old, size - 1) for old in range(rows)}, size)

    def plan_note(self) -> str:
        return "the size is an upper bound: which tokens the text uses is counted" if self.keep == "used" else ""

    def extra_bytes(self, shape: Any) -> int | None:
        """The tables cut, beside the old ones, and the tokenizer's content."""
        return int(shape.outside_bytes) + _TOKEN_BYTES * rows_of(shape.handle.model)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.reshaping import parameters_of

        self.smaller_config(model.model)
        rows, before = rows_of(model.model), parameters_of(model.model)
        kept = context.stage.read_kept_tokens() if context.stage else None
        if kept is None:
            kept = self._kept(model, context, rows)
        tokenizer = self._tokenizer(context, kept)
        found: dict[str, Any] = {"tokens_before": rows, "tokens": len(kept)}
        if tokenizer is not None and context.texts is not None and context.tokenizer is not None:
            with context.progress.step("vocab: text encoded again", total=1):
                found |= _compared(context.texts(self.text), context.tokenizer, tokenizer, kept)
        records = keep_tokens(model, kept, context)
        found |= {"parameters_before": before, "parameters": parameters_of(model.model)}
        return PassResult(model, records, 1 - len(kept) / rows, found, tokenizer, kept)

    def _kept(self, model: ModelHandle, context: Context, rows: int) -> list[int]:
        """The old ids of the tokens that stay, in the order of their new ones."""
        from compress.vocabulary import pieces_of, template_tokens

        named = named_ids(model.config, model.model.generation_config if model.model.can_generate() else None)
        always = {index for index in named if index < rows}
        counts = self._counts(context, rows)
        most = None if self.keep == "used" else self.keep
        if context.tokenizer is None:
            kept = choose(counts, sorted(always), lambda index: {index}, most, self.min_count, self.multiple)
            order = sorted(kept)
        else:
            pieces = pieces_of(context.tokenizer)
            ids = pieces.all()
            words = {index: piece for piece, index in ids.items()}
            always |= pieces.always() | template_tokens(context.tokenizer)

            def needs(index: int) -> set[int]:
                return {ids[piece] for piece in pieces.needs(words[index])} if index in words else {index}

            kept = choose(counts, sorted(always), needs, most, self.min_count, self.multiple)
            order = pieces.order(kept, rows)
        if len(order) == rows:
            used = int((counts >= self.min_count).sum())
            raise CompressError(
                f"vocab: the text uses {used} of {rows} tokens, and with those that always stay and what they are made "
                "of that is all: there is nothing to remove. Leave the pass out, or set min_count or keep."
            )
        _refuse_moved_padding(model.model, order)
        return order

    def _counts(self, context: Context, rows: int) -> Tensor:
        """How often each token stands in the text: int64 `[rows]`."""
        if context.texts is None or context.tokenizer is None:
            assert context.calibration is not None
            return torch.bincount(context.calibration.tokens.flatten(), minlength=rows)[:rows]
        counts = torch.zeros(rows, dtype=torch.int64)
        with context.progress.step("vocab: tokens counted", total=1):
            for _, encoded in _encoded(context.texts(self.text), context.tokenizer):
                ids = torch.tensor([index for document in encoded for index in document], dtype=torch.int64)
                if len(ids) and int(ids.max()) >= rows:
                    raise CompressError(f"vocab: the text has token {int(ids.max())}, and the embedding {rows} rows.")
                counts += torch.bincount(ids, minlength=rows)
        if not counts.any():
            raise CompressError(f"vocab: {self.text or 'the text'} holds no text, so no token is used.")
        return counts

    def _tokenizer(self, context: Context, kept: list[int]) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the tokens that stay, as it is read from its folder: kept in the stage, if there is one."""
        from compress.vocabulary import read_cut, write_cut

        if context.tokenizer is None:
            return None
        if context.stage is not None:
            context.stage.keep_tokens(kept, context.tokenizer)
            return context.stage.read_tokenizer(context.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            write_cut(context.tokenizer, kept, Path(folder) / "tokenizer")
            return read_cut(Path(folder) / "tokenizer", context.tokenizer)


def _refuse_moved_padding(model: PreTrainedModel, order: list[int]) -> None:
    """Where positions are counted on from the padding token's id (RoBERTa), that id has to stay."""
    pad, rows = model.config.get_text_config().pad_token_id, rows_of(model)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings != rows]
    if any(m.padding_idx is not None for m in tables) and pad is not None and pad < rows and order.index(pad) != pad:
        raise CompressError(
            f"vocab: this model counts positions from the id of its padding token, {pad}, which would become "
            f"{order.index(pad)}. Set keep to a number of tokens that spares those before it."
        )


def _encoded(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Documents, some at a time, and their ids without special tokens."""
    while batch := list(islice(texts, _BATCH)):
        yield batch, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def _compared(
    texts: Iterator[str], old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, kept: list[int]
) -> dict[str, Any]:
    """How the text is encoded before and after: tokens, and documents whose pieces are not the same."""
    numbers = {before: after for after, before in enumerate(kept)}
    documents = changed = tokens_before = tokens_after = 0
    for batch, encoded in _encoded(texts, old):
        again = new(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for before, after in zip(encoded, again, strict=True):
            documents += 1
            tokens_before += len(before)
            tokens_after += len(after)
            changed += [numbers.get(index, -1) for index in before] != list(after)
    return {
        "documents": documents, "documents_changed": changed,
        "text_tokens_before": tokens_before, "text_tokens": tokens_after,
    }  # fmt: skip
