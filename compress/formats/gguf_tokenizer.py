"""A tokenizer as llama.cpp is told of it: pieces, their kinds, merges or scores, ids at the ends, the chat template.

llama.cpp has tokenizers of its own. Two kinds of transformers' are theirs as well: byte-level BPE (GPT-2's way, "gpt2")
and BPE on characters with bytes to fall back on (SentencePiece's way, "llama").

Byte-level BPE first cuts text by regular expressions that llama.cpp knows by a name. The name is found by trying: each
candidate must cut `PROBE_TEXT` as the tokenizer does. SentencePiece's way merges the pair with the highest score; the
earlier a merge stands in the tokenizer's list, the higher.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from compress.errors import StartError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Words, digits, blanks, quotes and signs in many settings: what one expression cuts otherwise than another.
PROBE_TEXT = (
    "The 3 boys' 1,024 (or 65536?) stones weren't ALL there... I'LL see: \"x = y_2 + 3.14;\"\n\n  two blanks,\ttab \n"
    "    return naïve_Café(ß){};\n\n\n// Привет, мир!! 你好 12345678 ok 😀 e-mail@example.org/a-b?c=d\n \n'tis we'd\n"
    "camelCase XMLHttpRequest ½ ² 3rd 1st x1y22z333 --==++ #!$%^&*~`|<>\n"
)

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_WORD = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}", rf"{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: llama.cpp's name -> its expressions, applied one after the other, and whether a word that is a token is left whole
#: even where no merge makes it (`ignore_merges`).
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "qwen2": ((_QWEN2,), False),
    "llama-bpe": ((_LLAMA3,), True),
    "dbrx": ((_LLAMA3,), False),
    "tekken": ((_TEKKEN,), True),
}
#: Kinds of tokens, by their numbers in the file.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def refuses_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Why llama.cpp has no tokenizer like this one, or None."""
    if tokenizer is None:
        return "a GGUF file holds a tokenizer, and there is none beside the model."
    try:
        parts = _parts(tokenizer)
        (_spm_prefix if _is_spm(parts) else _pre_tokenizer)(tokenizer)
        _ends(tokenizer)
    except StartError as error:
        return str(error)
    return None


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Tells a `gguf.GGUFWriter` of the tokenizer; ids that it lacks, up to the model's `vocabulary`, are unused."""
    parts = _parts(tokenizer)
    spm = _is_spm(parts)
    tokens, kinds = _tokens(tokenizer, vocabulary, spm)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in parts["model"]["merges"]]
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    writer.add_tokenizer_pre("default" if spm else _pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    if spm:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_spm_prefix(tokenizer))
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    first, last = _ends(tokenizer)
    ids = {
        "bos": first if first is not None else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id if last is None else last,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for word, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{word}_token_id")(index)
    writer.add_add_bos_token(first is not None)
    writer.add_add_eos_token(last is not None)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json. StartError for a tokenizer that is no BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    kind = parts["model"]["type"]
    if kind != "BPE":
        raise StartError(f"llama.cpp has no tokenizer of this kind ({kind}): gguf holds BPE, byte-level or with bytes.")
    if not parts["model"].get("byte_fallback") and "ByteLevel" not in json.dumps(parts["pre_tokenizer"]):
        raise StartError("llama.cpp has no BPE on characters without bytes to fall back on, as this tokenizer is.")
    return parts


def _is_spm(parts: dict[str, Any]) -> bool:
    return bool(parts["model"].get("byte_fallback"))


def _spm_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a blank is put before a text. StartError where blanks are not written as SentencePiece writes them."""
    pieces = tokenizer.tokenize("a b")
    if "".join(pieces).removeprefix("▁") != "a▁b":
        raise StartError("llama.cpp writes a blank as ▁ in a tokenizer with bytes to fall back on; this one does not.")
    return "".join(pieces).startswith("▁")


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how this byte-level BPE cuts text before it merges. StartError where there is none."""
    backend: Any = tokenizer.backend_tokenizer
    whole = bool(json.loads(backend.to_str())["model"].get("ignore_merges"))
    text = PROBE_TEXT if backend.normalizer is None else backend.normalizer.normalize_str(PROBE_TEXT)
    wanted = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    for name, (_, leaves_whole) in PRE_TOKENIZERS.items():
        if leaves_whole == whole and wanted == [piece for piece, _ in _cutter(name).pre_tokenize_str(PROBE_TEXT)]:
            return name
    raise StartError(
        "no pre-tokenizer of llama.cpp cuts text as this tokenizer does; gguf was tried with "
        f"{', '.join(PRE_TOKENIZERS)}."
    )


@cache
def _cutter(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[name][0]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The tokens that are put before and after a text. StartError for more than one of either."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for before in range(2):
        if full[before : before + len(bare)] == bare and len(full) - len(bare) - before in (0, 1):
            after = full[before + len(bare) :]
            return (full[0] if before else None), (after[0] if after else None)
    raise StartError("llama.cpp puts one token before a text and one after it at most; this tokenizer puts others.")


def _tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, spm: bool) -> tuple[list[str], list[int]]:
    """Pieces and kinds of all ids."""
    added = tokenizer.added_tokens_decoder
    names = {index: piece for piece, index in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for index in range(vocabulary):
        piece, kind = names.get(index), NORMAL
        if piece is None:
            piece, kind = f"[PAD{index}]", UNUSED
        elif spm and index == tokenizer.unk_token_id:
            kind = UNKNOWN
        elif index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
            piece = piece.replace("▁", " ") if spm and kind == USER_DEFINED else piece
        elif spm and len(piece) == 6 and piece.startswith("<0x"):
            kind = BYTE
        tokens.append(piece)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Minus the place of the first merge that makes a piece. What no merge makes is a character, a byte or never met:
    its score is not asked for."""
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        first.setdefault(left + right, place)
    return [-float(first.get(piece, len(merges))) for piece in tokens]
