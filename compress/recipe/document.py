"""Recipes as text: YAML with the line of every value, and `--set` on top of it.

YAML is read as version 1.2's core schema has it, which differs from what PyYAML does by itself: `2:4` is text (not
the number 124), `1e-4` is a number, `on` and `yes` are text, and a figure with a plus sign (`+2`) stays text, since
goals tell a change from a figure by its sign. Keys are text. Tags, duplicate keys, several documents in one file,
deep nesting and aliases that multiply are refused.
"""

from __future__ import annotations

import copy
import os.path
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError, StartError, nearest
from compress.registry import yaml_words

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 20_000

#: Keys and list indices from the root to a value.
Place = tuple[str | int, ...]

_INTEGER = re.compile(r"-?[0-9]{1,30}|0x[0-9a-fA-F]{1,16}|0o[0-7]{1,20}")
_FLOAT = re.compile(r"-?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)


def scalar(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.fullmatch(text):
        value = float(text)
        return value if abs(value) != float("inf") else text
    return text


class _Reader:
    """Builds plain Python values from PyYAML's events, and notes the line (from 1) of each place.

    Working on events, not on PyYAML's own tree, lets the limits bite before memory or the stack is used up.
    """

    def __init__(self, text: str, label: str, numbered: bool):
        self.text = text
        self.label = label
        self.numbered = numbered
        self.lines: dict[Place, int] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}  # value, and how many values it is made of
        self.open_anchors: set[str] = set()
        self.values = 0
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))

    def read(self) -> Any:
        self._next()  # the start of the stream
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(self._next(), (), 0)
        self._next()  # the end of the document
        end = self._next()
        if not isinstance(end, yaml.StreamEndEvent):
            raise self.error(end.start_mark.line, "a second document starts here; a recipe is one document.")
        return value

    def error(self, line: int, sentence: str) -> RecipeError:
        where = f"{self.label}:{line + 1}" if self.numbered else self.label
        return RecipeError(f"{where}: {sentence}")

    def _next(self) -> Any:
        try:
            return next(self.events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = " ".join(str(error.problem or error.context).split())
            problem = problem if len(problem) <= 120 else problem[:117] + "..."
            raise self.error(mark.line if mark else 0, f"not valid YAML: {problem}.") from None
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position)
            raise self.error(line, f"not a text: it contains the character U+{error.character:04X}.") from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            problem = " ".join(str(error).split())[:120]
            raise RecipeError(f"{self.label}: not valid YAML: {problem}.") from None

    def _count(self, event: Any, values: int = 1) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise self.error(event.start_mark.line, f"more than {MAX_VALUES:,} values; a recipe is a page of text.")

    def _value(self, event: Any, place: Place, depth: int) -> Any:
        line = event.start_mark.line
        self.lines[place] = line + 1
        if depth > MAX_DEPTH:
            raise self._too_deep(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise self.error(line, f"the tag {event.tag} is not allowed; write the plain value.")
        before = self.values
        self._count(event)
        if event.anchor:
            self.open_anchors.add(event.anchor)
        if isinstance(event, yaml.SequenceStartEvent):
            value: Any = self._sequence(place, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(place, depth)
        else:
            value = scalar(event.value) if event.implicit[0] else self._text(event)
        if event.anchor:
            self.open_anchors.discard(event.anchor)
            self.anchors[event.anchor] = (value, self.values - before)
        return value

    def _text(self, event: Any) -> str:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(event.start_mark.line, "text with half a surrogate pair, which is no character.")
        return text

    def _alias(self, event: Any, depth: int) -> Any:
        if event.anchor in self.open_anchors:
            raise self.error(event.start_mark.line, f"the alias *{event.anchor} stands inside what it refers to.")
        if event.anchor not in self.anchors:
            raise self.error(event.start_mark.line, f"the alias *{event.anchor} refers to no anchor before it.")
        value, values = self.anchors[event.anchor]
        self._count(event, values)
        if depth + _height(value) > MAX_DEPTH:
            raise self._too_deep(event)
        return copy.deepcopy(value)

    def _too_deep(self, event: Any) -> RecipeError:
        return self.error(
            event.start_mark.line, f"nested more than {MAX_DEPTH} levels deep; a recipe needs about five."
        )

    def _sequence(self, place: Place, depth: int) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            found.append(self._value(event, (*place, len(found)), depth + 1))
        return found

    def _mapping(self, place: Place, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            line = event.start_mark.line
            if not isinstance(event, yaml.ScalarEvent):
                raise self.error(line, "a key must be plain text, not a list, a mapping or an alias.")
            key = self._text(event)
            if key in found:
                first = self.lines[(*place, key)]
                again = f" (first on line {first})" if self.numbered else ""
                raise self.error(line, f"the key {dotted((*place, key))} stands here a second time{again}.")
            found[key] = self._value(self._next(), (*place, key), depth + 1)
            self.lines[(*place, key)] = line + 1
        return found


def _height(value: Any) -> int:
    """Levels of nesting below `value`."""
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_height(item) for item in inner), default=0)


def parse_yaml(text: str, label: str, numbered: bool = True) -> tuple[Any, dict[Place, int]]:
    """The value of a YAML text and the line of each place in it.

    `label` begins every message (a file's name, or a `--set`). Raises RecipeError.
    """
    reader = _Reader(text, label, numbered)
    return reader.read(), reader.lines


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises StartError where there is none, RecipeError where it is no text."""
    if os.path.isdir(path):
        raise RecipeError(f"{path}: is a folder; a recipe is a YAML file.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise StartError(f"{path}: no such file.{nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        raise StartError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES / 1e6:g} MB; a recipe is a page of text.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise RecipeError(f"{path}: not UTF-8 text: byte 0x{byte:02x} at offset {error.start}.") from None


def nearest_file(path: Path) -> str:
    """` Did you mean "x"?` for the file beside `path` with the closest name, or an empty string."""
    try:
        names = [entry.name for entry, _ in zip(path.parent.iterdir(), range(10_000), strict=False)]
    except (OSError, ValueError):
        return ""
    return nearest(path.name, names)


class Document:
    """A recipe as plain values, with where each came from: a line of `file`, or an override.

    `value` is the root mapping. `base` is the folder that relative paths of the file start from; those of overrides
    start from the working folder.
    """

    def __init__(self, value: Any, base: Path, file: str | None = None, lines: Mapping[Place, int] | None = None):
        self.base = base
        self.file = file
        self.lines = dict(lines or {})
        self.overrides: dict[Place, str] = {}
        if not isinstance(value, dict):
            found = {list: "a list", str: "text", type(None): "empty"}.get(type(value), yaml_words(value))
            raise RecipeError(
                f"{self.where(())}the recipe is {found}; it must be a mapping of keys (model, passes, ...) to values."
            )
        self.value: dict[str, Any] = value

    @classmethod
    def read(cls, path: Path) -> Document:
        value, lines = parse_yaml(read_text(path), str(path))
        return cls(value, Path(path).absolute().parent, str(path), lines)

    def _override(self, place: Place) -> Place | None:
        """The place of the override that `place` came from: the longest one that leads to it."""
        return next((place[:n] for n in range(len(place), -1, -1) if place[:n] in self.overrides), None)

    def where(self, place: Place, inside: bool = False) -> str:
        """How a message about `place` begins: `recipe.yaml:12: passes.0.gptq.bits: `, `--set passes.gptq.bits=5: `.

        With `inside`, an override of something inside `place` is named too.
        """
        source = self._override(place)
        if source is None and inside:
            source = next((below for below in self.overrides if below[: len(place)] == place), None)
        if source is not None:
            label = self.overrides[source]
            return f"{label}: " if source == place else f"{label}: {dotted(place)}: "
        name = f"{dotted(place)}: " if place else ""
        if self.file is None:
            return name
        known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in self.lines), None)
        return f"{self.file}:{self.lines[known]}: {name}" if known is not None else f"{self.file}: {name}"

    def base_of(self, place: Place) -> Path:
        return self.base if self._override(place) is None else Path.cwd()

    def replace(self, key: str, value: Any) -> None:
        """Sets a top-level key, as an option of the command line of the same name does (`--model`)."""
        self._assign(self.value, (), key, value, f"--{key} {value}")

    def set(self, text: str) -> None:
        """Applies `KEY=VALUE`: KEY a dotted path (a list index or a pass's name works), VALUE as YAML."""
        key, equals, written = text.partition("=")
        label = f"--set {text if len(text) <= 80 else text[:77] + '...'}"
        parts = key.strip().split(".")
        if not equals or "" in parts:
            raise RecipeError(f"{label}: expected KEY=VALUE with a dotted key, for instance passes.gptq.bits=3.")
        if len(written) > MAX_BYTES:
            raise RecipeError(f"{label}: larger than {MAX_BYTES / 1e6:g} MB.")
        value, _ = parse_yaml(written, label, numbered=False)
        holder: Any = self.value
        place: Place = ()
        while True:
            part, *parts = parts
            found, parts = _step(holder, place, part, parts, label)
            if not parts:
                return self._assign(holder, place, found, value, label)
            child, place = holder.get(found) if isinstance(holder, dict) else holder[found], (*place, found)
            is_pass = len(place) == 2 and place[0] == "passes"
            if not is_pass and not isinstance(child, dict | list):
                child = holder[found] = self._open(child, place, label)
            holder = child
            if is_pass:
                holder, place, parts = self._enter_pass(place, parts, value, label)
                if not parts:
                    return None

    def _assign(self, holder: Any, place: Place, key: str | int, value: Any, label: str) -> None:
        holder[key] = value
        place = (*place, key)
        self.overrides = {old: text for old, text in self.overrides.items() if old[: len(place)] != place}
        self.overrides[place] = label

    def _open(self, value: Any, place: Place, label: str) -> Any:
        """The mapping or list to go on in, where `place` holds none yet."""
        if value is None or (place == ("benchmark",) and value is False):
            return [] if place == ("passes",) else {}
        if len(place) == 2 and place[0] == "data" and isinstance(value, str):
            return {"source": value}
        raise RecipeError(f"{label}: {dotted(place)} is {yaml_words(value)}, which has no keys inside.")

    def _enter_pass(self, place: Place, parts: list[str], value: Any, label: str) -> tuple[Any, Place, list[str]]:
        """From an entry of `passes` into its options: the entry's own name may stand in the path or not."""
        index = place[1]
        entry = pass_entry(self.value["passes"][index])
        if entry is None:
            raise RecipeError(f"{label}: {dotted(place)} is not `name: {{options}}`.")
        name, options = entry
        holder = self.value["passes"][index] = {name: {} if options is None else options}
        if parts[0] == name:
            parts = parts[1:]
        if not parts:
            self._assign(holder, place, name, value, label)
        elif not isinstance(holder[name], dict):
            raise RecipeError(f"{label}: {dotted((*place, name))} is {yaml_words(options)}, not a mapping of options.")
        return holder[name], (*place, name), parts


def pass_entry(entry: Any) -> tuple[str, Any] | None:
    """(name, options) of an entry of `passes`: `gptq` or `gptq: {...}`; None where it is neither."""
    if isinstance(entry, str):
        return entry, None
    if isinstance(entry, dict) and len(entry) == 1:
        return next(iter(entry.items()))
    return None


def _step(holder: Any, place: Place, part: str, rest: list[str], label: str) -> tuple[str | int, list[str]]:
    """The key or index that `part` of an override's path means in `holder`, and what is left of the path."""
    if isinstance(holder, dict):
        return part, rest
    if part.isdigit() and part.isascii() and int(part[:9]) < len(holder):
        return int(part), rest
    if place == ("passes",) and not part.isdigit():
        names = [entry[0] if (entry := pass_entry(item)) else "" for item in holder]
        if names.count(part) == 1:
            return names.index(part), [part, *rest]
        if part in names:
            which = ", ".join(f"passes.{index}.{part}" for index, name in enumerate(names) if name == part)
            raise RecipeError(f"{label}: {part} stands there {names.count(part)} times; say which: {which}.")
        have = ", ".join(f"{index} ({name})" for index, name in enumerate(names)) or "none"
        raise RecipeError(f"{label}: no pass {part} in this recipe; it has: {have}.{nearest(part, names)}")
    have = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
    raise RecipeError(f"{label}: {dotted(place)} is a list without an entry {part}; it has: {have}.")
