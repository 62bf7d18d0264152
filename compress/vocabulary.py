"""A tokenizer with fewer tokens: its `tokenizer.json` is cut so that text made of the tokens that stay is encoded to
the same pieces.

BPE merges the pair of the lowest rank again and again. Where every merge that a text needed is still there, and no
other was added, each step finds the same pair, so the pieces are the same: a token stays together with those that lead
to it (`Pieces.needs`). WordPiece takes the longest piece that fits and Unigram the likeliest way through the text: with
fewer pieces to choose from, of which the old choice is one, both choose it again. All other text falls back on the
tokens that always stay: the bytes, the characters of the pieces, the unknown token.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.errors import CompressError, StartError

#: What is kept of a saved tokenizer; other files (vocab.json, merges.txt, vocab.txt, *.model) hold the old tokens.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MESSAGES = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}],
)


class Pieces:
    """The tokens of a tokenizer's model, by the content of its `tokenizer.json`."""

    def __init__(self, spec: Mapping[str, Any]):
        self.spec, self.model = spec, spec["model"]
        self.kind = str(self.model.get("type") or ("BPE" if "merges" in self.model else "WordPiece"))
        if self.kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
            raise StartError(f"vocab: the tokenizer is of kind {self.kind}; it has to be BPE, WordPiece or Unigram.")
        vocab = self.model["vocab"]
        self.ids: dict[str, int] = (
            {piece: index for index, (piece, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)
        )
        self.added: dict[str, int] = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        self._prefix = self.model.get("continuing_subword_prefix") or ""
        self._suffix = self.model.get("end_of_word_suffix") or ""
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges())}

    def merges(self) -> list[tuple[str, str]]:
        """The merges of BPE in the order of their rank."""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self.model.get("merges") or ())
        return [(first, second) for first, second in pairs]

    def merged(self, first: str, second: str) -> str:
        """The token that two become."""
        return first + second[len(self._prefix) :]

    def all(self) -> dict[str, int]:
        """Every token by its text, the added ones included."""
        return {**self.ids, **self.added}

    def always(self) -> set[int]:
        """Ids of tokens that any cut keeps: added ones, the unknown one, those that stand for bytes, those that the
        tokenizer puts around text."""
        kept = set(self.added.values()) | set(_framing(self.spec.get("post_processor")))
        unknown = self.model.get("unk_token")
        if unknown in self.ids:
            kept.add(self.ids[unknown])
        if self.kind == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            kept.add(scores.index(min(scores)))  # what an unknown character costs follows from the least likely piece
            if self.model.get("unk_id") is not None:
                kept.add(int(self.model["unk_id"]))
        if self.model.get("byte_fallback"):
            kept |= {self.ids[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in self.ids}
        if any("ByteLevel" in str(self.spec.get(part)) for part in ("pre_tokenizer", "normalizer", "decoder")):
            from tokenizers.pre_tokenizers import ByteLevel

            kept |= {self.ids[character] for character in ByteLevel.alphabet() if character in self.ids}
        padding = self.spec.get("padding") or {}
        return kept | ({int(padding["pad_id"])} if padding.get("pad_id") is not None else set())

    def needs(self, token: str) -> set[str]:
        """The token, and those that text goes through on its way to it; or, where pieces are not merged, its
        characters, so that other words of the same letters can still be written."""
        if token in self.added or token not in self.ids:
            return {token}
        symbols = self._characters(token)
        found = {token, *symbols}
        while self.kind == "BPE" and len(symbols) > 1:
            pairs = enumerate(pairwise(symbols))
            best = min(((self._ranks[pair], place) for place, pair in pairs if pair in self._ranks), default=None)
            if best is None:
                break
            place = best[1]
            symbols[place : place + 2] = [self.merged(symbols[place], symbols[place + 1])]
            found.add(symbols[place])
        return {piece for piece in found if piece in self.ids}

    def _characters(self, token: str) -> list[str]:
        """The characters that a token begins as, marked as the tokenizer marks them. Those of a word's end or middle
        are known by their mark."""
        if self.kind == "WordLevel":
            return [token]
        inside = bool(self._prefix) and token.startswith(self._prefix)
        ends = bool(self._suffix) and token.endswith(self._suffix) and token != self._suffix
        body = token.removeprefix(self._prefix) if inside else token
        body = body.removesuffix(self._suffix) if ends else body
        marked = [
            character if index == 0 and not inside else self._prefix + character for index, character in enumerate(body)
        ]
        return [*marked[:-1], marked[-1] + self._suffix] if ends and marked else marked

    def order(self, kept: Iterable[int], rows: int) -> list[int]:
        """`kept` in the order of their new ids: the model's own tokens, then added ones, then rows without a token.
        Inside these, as they were: the tokenizers library counts added tokens on from the model's last."""
        own, added = set(self.ids.values()), set(self.added.values())
        if kept and max(kept) >= rows:
            raise StartError(f"vocab: the tokenizer has token {max(kept)}, and the model's embedding {rows} rows.")
        return sorted(kept, key=lambda index: (0 if index in own else 1 if index in added else 2, index))

    def cut(self, order: Sequence[int]) -> dict[str, Any]:
        """The content of a `tokenizer.json` with only the tokens of these ids, numbered in this order."""
        new = {old: index for index, old in enumerate(order)}
        spec: dict[str, Any] = json.loads(json.dumps(self.spec))
        model = spec["model"]
        if self.kind == "Unigram":
            model["vocab"] = [model["vocab"][old] for old in order if old < len(model["vocab"])]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[int(model["unk_id"])]
        else:
            model["vocab"] = {piece: new[old] for piece, old in sorted(self.ids.items(), key=_second) if old in new}
        if self.kind == "BPE":
            left = model["vocab"]
            model["merges"] = [
                [first, second]
                for first, second in self.merges()
                if first in left and second in left and self.merged(first, second) in left
            ]
        for token in spec.get("added_tokens") or ():
            token["id"] = new[token["id"]]
        _renumber(spec.get("post_processor"), new)
        if (spec.get("padding") or {}).get("pad_id") is not None:
            spec["padding"]["pad_id"] = new[spec["padding"]["pad_id"]]
        return spec


def _second(entry: tuple[str, int]) -> int:
    return entry[1]


def _framing(processor: Any) -> Iterator[int]:
    """The ids that a post-processor of `tokenizer.json` names."""
    for entry in _places(processor):
        yield from (index for index in entry if isinstance(index, int))


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    for entry in _places(processor):
        entry[:] = [new[index] if isinstance(index, int) else index for index in entry]


def _places(processor: Any) -> Iterator[list[Any]]:
    """The lists of a post-processor that hold ids of tokens."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or ():
        yield from _places(inner)
    for special in (processor.get("special_tokens") or {}).values():
        yield special["ids"]
    for name in ("sep", "cls"):  # BertProcessing and RobertaProcessing: [text, id]
        if isinstance(processor.get(name), list):
            yield processor[name]


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """What there is to cut. StartError for a tokenizer that the tokenizers library does not run."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise StartError(
            f"vocab: {type(tokenizer).__name__} has no tokenizer.json. It takes the tokens out of that file, so the "
            "model's tokenizer must be one of the tokenizers library."
        )
    return Pieces(json.loads(backend.to_str()))


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of the chat template's own words."""
    found: set[int] = set()
    if not getattr(tokenizer, "chat_template", None):
        return found
    for messages in _MESSAGES:
        for prompt in (False, True):
            with suppress(Exception):  # a template may refuse a role, and is a program of the model's author
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                found |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def write_cut(tokenizer: PreTrainedTokenizerBase, order: Sequence[int], folder: Path) -> None:
    """Writes the tokenizer with only the tokens of these ids, numbered in this order, to a folder, which is there whole
    or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    pieces = pieces_of(tokenizer)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="tokenizer-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).iterdir():
            if path.is_dir() and path.name == "additional_chat_templates":
                continue
            if path.name not in _FILES:
                path.unlink()
        content = json.dumps(pieces.cut(order), ensure_ascii=False)
        (Path(scratch) / "tokenizer.json").write_text(content, encoding="utf-8")
        _renumber_config(Path(scratch) / "tokenizer_config.json", {old: index for index, old in enumerate(order)})
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(scratch, folder.with_name(folder.name + ".new"), dirs_exist_ok=True)
        folder.with_name(folder.name + ".new").rename(folder)


def _renumber_config(path: Path, new: Mapping[int, int]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config.get("added_tokens_decoder")
    if decoder:
        config["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in decoder.items()}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_cut(folder: Path, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that `write_cut` wrote of `like`, under its name."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no class of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompressError(f"{folder}: the cut tokenizer cannot be read ({reason}).") from error
    found.name_or_path = like.name_or_path
    found.init_kwargs["name_or_path"] = like.name_or_path
    return found


def expansion(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """For each id of `old`, the ids that stand for it in `new`: one where the token is there still, else the pieces
    that `new` makes of it. None where `new` is no cut of `old`: it has tokens of its own, or the same ones."""
    before, after = old.get_vocab(), new.get_vocab()
    if before == after or any(token not in before for token in after):
        return None
    if getattr(new, "backend_tokenizer", None) is None:
        return None
    model, unknown = new.backend_tokenizer.model, new.unk_token_id
    prefix = getattr(model, "continuing_subword_prefix", None) or ""
    found: list[list[int]] = [[] for _ in range(max(before.values()) + 1)]
    for token, index in before.items():
        if token in after:
            found[index] = [after[token]]
        elif prefix and token.startswith(prefix):  # the middle of a word: the model splits whole words only
            found[index] = [] if unknown is None else [unknown]
        else:
            found[index] = [piece.id for piece in model.tokenize(token)]
    return found
