"""Where texts come from: local .txt and .jsonl files, the embedded model's own world, Hugging Face datasets.

Everything is streamed: a file is never held as a whole, except a .txt, which is one document.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import CompressError, StartError, nearest
from compress.recipe.document import nearest_file
from compress.registry import yaml_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin:"

# kind of document: the fields that make it one, most telling first
KINDS = {
    "messages": ("messages",),
    "choice": ("question", "choices", "label"),
    "pair": ("good", "bad"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
#: What a text's refusal ends with; test items have no such option.
SKIP_HINT = "\nskip_bad: true leaves such lines out."
#: Malformed lines that are named in full.
MOST_NAMED = 5

T = TypeVar("T")
U = TypeVar("U")
_ALLOWED = "text; prompt + completion; messages; text + label; question + choices + label; good + bad"


@dataclass(frozen=True)
class Document:
    """One text with its fields as they were read; `origin` is where: "file:line". `fields` were checked."""

    fields: Mapping[str, Any]
    origin: str

    @property
    def kind(self) -> str:
        """messages, choice, pair, completion or text."""
        return next(kind for kind, needed in KINDS.items() if all(name in self.fields for name in needed))

    def core(self) -> dict[str, Any]:
        """The fields that make it what it is, without what else the line held."""
        return {name: self.fields[name] for name in KINDS[self.kind]}

    @property
    def text(self) -> str | None:
        """The text as a model reads it: a question with its right choice, the good one of a pair, prompt and completion
        joined as they are. None for messages, which a tokenizer has to lay out (`text_of`)."""
        fields = self.fields
        if self.kind == "choice":
            answer = fields["choices"][fields["label"]]
            return f"{fields['question']}{'' if answer[:1].isspace() else ' '}{answer}"
        if self.kind == "completion":
            return f"{fields['prompt']}{fields['completion']}"
        found: str | None = {"pair": fields.get("good"), "text": fields.get("text")}.get(self.kind)
        return found


def text_of(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The document's text; messages are laid out by the tokenizer's chat template."""
    text = document.text
    return chat_text(document, tokenizer, list(document.fields["messages"])) if text is None else text


def chat_text(
    document: Document, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], answer: bool = False
) -> str:
    """Messages (of a document, or some of them) laid out by the chat template; `answer`: up to where the assistant's
    answer would begin."""
    if not getattr(tokenizer, "chat_template", None):
        raise CompressError(
            f"{document.origin}: messages need a chat template, and this model's tokenizer has none. Give text instead."
        )
    try:
        laid_out = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise CompressError(f"{document.origin}: the tokenizer's chat template refuses them ({reason}).") from error
    return str(laid_out)


def documents(
    source: str, base: Path, role: str = "calibration", seed: int = 0, skipped: list[str] | None = None
) -> Iterator[Document]:
    """The documents of a data source, one by one; those of `builtin:` sources never end.

    `skipped`: a list that malformed lines are left out into, a sentence each; None: they are refused.
    Raises StartError for a source that is not there, CompressError for content that is no text.
    """
    if source.startswith(BUILTIN):
        from compress.builtin import MODELS
        from compress.builtin import documents as generated

        name = source.removeprefix(BUILTIN)
        if name not in MODELS:
            raise StartError(f"{source} does not exist; allowed: {', '.join(BUILTIN + known for known in MODELS)}.")
        texts = enumerate(generated(name, role, seed), 1)
        return (Document({"text": text}, f"{source}:{number}") for number, text in texts)
    path = base / os.path.expanduser(source)
    if os.path.isdir(path):
        raise StartError(f"{path} is a folder; allowed: a .txt or .jsonl file.")
    if path.suffix.lower() == ".txt":
        return _whole(_existing(path))
    if path.suffix.lower() == ".jsonl":
        return _lines(_existing(path), skipped)
    if os.path.exists(path):
        raise StartError(f"{path} is neither a .txt nor a .jsonl file.")
    return _hub(source, role)


def records(source: str, base: Path) -> Iterator[Document]:
    """The lines of a task's file, or a builtin model's own test items."""
    if source.startswith(BUILTIN):
        from compress.builtin import items as generated

        for number, fields in enumerate(generated(), 1):
            yield checked(fields, f"{source}:{number}")
    else:
        path = base / os.path.expanduser(source)
        if path.suffix.lower() != ".jsonl":
            raise StartError(f"{path}: test items are lines of a .jsonl file.")
        yield from _lines(_existing(path))


def _existing(path: Path) -> Path:
    if not os.path.exists(path):
        raise StartError(f"{path}: no such file.{nearest_file(path)}")
    return path


def _decoded(content: bytes, path: Path, offset: int) -> str:
    """`content`, which begins at byte `offset` of the file, as text."""
    try:
        return content.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        byte, at = content[error.start], offset + error.start
        raise CompressError(f"{path}: not UTF-8 text: byte 0x{byte:02x} at offset {at}.") from None


def _whole(path: Path) -> Iterator[Document]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror}).") from error
    yield Document({"text": _decoded(content, path, 0)}, f"{path}:1")


def _lines(path: Path, skipped: list[str] | None = None) -> Iterator[Document]:
    """The lines of a .jsonl file. Malformed ones go into `skipped`, or all together are refused."""
    try:
        with path.open("rb") as file:
            yield from made_of_each(_numbered(file, path), _document, skipped)
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror}).") from error


def _numbered(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, str]]:
    """The lines that hold something, and where each stands."""
    offset = 0
    for number, line in enumerate(file, 1):
        text = _decoded(line, path, offset).strip()
        offset += len(line)
        if text:
            yield text, f"{path}:{number}"


def _document(line: tuple[str, str]) -> Document:
    text, origin = line
    return checked(_json(text, origin), origin)


def made_of_each(given: Iterable[T], make: Callable[[T], U], skipped: list[str] | None = None) -> Iterator[U]:
    """What `make` makes of each. Where it raises CompressError, the message goes into `skipped`, or all of them
    together are refused at the end; a StartError is of more than the one, and goes through."""
    bad: list[str] = [] if skipped is None else skipped
    for one in given:
        try:
            made = make(one)
        except StartError:
            raise
        except CompressError as error:
            bad.append(str(error))
            continue
        if skipped is not None or not bad:  # once there is one to refuse, only others like it matter
            yield made
    if bad and skipped is None:
        raise CompressError(refusal(bad))


def refusal(bad: Sequence[str]) -> str:
    """One message for malformed lines: the first few in full."""
    more = f"\nand {len(bad) - MOST_NAMED} more." if len(bad) > MOST_NAMED else ""
    return "\n".join(bad[:MOST_NAMED]) + more + SKIP_HINT


def _json(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CompressError(f"{origin}: nested too deeply.") from None
    except ValueError as error:
        reason = getattr(error, "msg", None) or str(error)
        at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise CompressError(f"{origin}: not a line of JSON: {reason}{at}: {yaml_words(text)}.") from None


def checked(fields: Any, origin: str) -> Document:
    """The document of one line's fields, of which a known set must be complete and of the right types."""
    if not isinstance(fields, dict):
        raise CompressError(f"{origin}: {yaml_words(fields)} is not a mapping of fields; allowed: {_ALLOWED}.")
    kind = next((kind for kind, needed in KINDS.items() if all(name in fields for name in needed)), None)
    if kind is None:
        known = sorted({name for needed in KINDS.values() for name in needed})
        hints = [hint for name in fields if name not in known and (hint := nearest(name, known))]
        have = ", ".join(str(name) for name in list(fields)[:10]) or "none"
        raise CompressError(f"{origin}: the fields are {have}; allowed: {_ALLOWED}.{''.join(hints[:1])}")
    for name in KINDS[kind]:
        if not _FIELD_TYPES.get(name, _is_text)(fields[name]):
            allowed = _FIELD_WORDS.get(name, "text")
            raise CompressError(f"{origin}: {name}: {yaml_words(fields[name])} is not allowed; allowed: {allowed}.")
    if kind == "choice" and not 0 <= fields["label"] < len(fields["choices"]):
        last = len(fields["choices"]) - 1
        raise CompressError(
            f"{origin}: label: {fields['label']} is not allowed; allowed: 0 to {last}, the index of the right choice."
        )
    return Document(fields, origin)


def _is_text(value: Any) -> bool:
    # Half a surrogate pair ("\ud800" is valid JSON) is no character, and tokenizers fail on it.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and _is_text(part.get("role")) and "content" in part for part in value)
    )


def _are_choices(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(_is_text(choice) for choice in value)


_FIELD_TYPES: dict[str, Callable[[Any], bool]] = {
    "messages": _are_messages,
    "choices": _are_choices,
    "label": lambda value: isinstance(value, int) and not isinstance(value, bool),
}
_FIELD_WORDS = {
    "messages": "a list of {role, content}",
    "choices": "a list of two texts or more",
    "label": "the index of the right choice",
}

_SPLITS = {"calibration": ("train",), "training": ("train",), "evaluation": ("test", "validation")}


def _hub(source: str, role: str) -> Iterator[Document]:
    """Rows of a Hugging Face dataset: `id`, `id:configuration` or `id:configuration:split`, streamed.

    Without a split: train; for evaluation test, else validation.
    """
    name, _, rest = source.partition(":")
    configuration, _, split = rest.partition(":")
    rows, chosen = _open_dataset(source, name, configuration or None, (split,) if split else _SPLITS[role])

    def read() -> Iterator[Document]:
        try:
            for number, row in enumerate(rows, 1):
                yield checked(dict(row), f"{source}:{chosen}:{number}")
        except CompressError:
            raise
        except Exception as error:  # network and parser errors of many kinds
            raise CompressError(f"{source}: reading the dataset failed ({_reason(error)}).") from error

    return read()


def _open_dataset(
    source: str, name: str, configuration: str | None, splits: Iterable[str]
) -> tuple[Iterable[Mapping[str, Any]], str]:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name, configuration)
        chosen = next((split for split in splits if split in available), None)
        if chosen is None:
            have = ", ".join(available)
            raise StartError(
                f"{source}: has no split {' or '.join(splits)}; it has {have}. "
                f"Name one: {name}:{configuration or ''}:SPLIT."
            )
        return datasets.load_dataset(name, configuration, split=chosen, streaming=True), chosen
    except CompressError:
        raise
    except Exception as error:  # of datasets, huggingface_hub and the network library below them
        raise StartError(
            f"{source}: no such file here, and as a Hugging Face dataset it needs the hub, which cannot be reached "
            f"or does not have it ({_reason(error)}). Local .txt and .jsonl files need no network."
        ) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"
