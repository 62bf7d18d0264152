"""From values to checked objects: pydantic's findings in sentences that say where, what and what is allowed."""

from __future__ import annotations

import json
import math
import os.path
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from compress.errors import CompressError, RecipeError, nearest
from compress.recipe.document import Document, Place, nearest_file, pass_entry
from compress.registry import PASSES, RUNTIMES, allowed_words, models_in, yaml_words

if TYPE_CHECKING:
    from compress.passes.base import Pass

MAX_PROBLEMS = 10
#: Files that are taken for images.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

Model = TypeVar("Model", bound=BaseModel)


def plain(value: Any) -> Any:
    """`value` as JSON has it: paths and keys become text, tuples lists. Raises TypeError for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{value} is not a value that a recipe can hold")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is not a value that a recipe can hold")


class Checker:
    """Collects every problem of a recipe, so that one message lists them all."""

    def __init__(self, document: Document):
        self.document = document
        self.problems: list[str] = []

    def problem(self, place: Place, sentence: str, inside: bool = False) -> None:
        self.problems.append(self.document.where(place, inside) + sentence)

    def raise_problems(self) -> None:
        if self.problems:
            listed = list(dict.fromkeys(self.problems))
            more = len(listed) - MAX_PROBLEMS
            raise RecipeError("\n".join(listed[:MAX_PROBLEMS] + ([f"and {more} more."] if more > 0 else [])))

    def build(self, cls: type[Model], value: Any, place: Place) -> Model | None:
        """A `cls` from the mapping at `place`, or None with the problems noted.

        Types are strict ("4" is no number, true is no 1), as JSON has them: a list serves for a tuple.
        """
        try:
            return cls.model_validate_json(json.dumps(plain(value)), strict=True)
        except ValidationError as error:
            for found, sentence in _sentences(error, cls, value):
                self.problem((*place, *found), sentence, inside=bool(place or found))
        except (CompressError, TypeError) as error:
            self.problem(place, str(error))
        return None

    def passes(self, value: Any) -> list[Any] | None:
        """The Pass objects of the list under `passes`; None (and problems noted) when one of them is not valid."""
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            self.problem(("passes",), f"{yaml_words(value)} is not allowed; allowed: a list of `- name: {{options}}`.")
            return None
        built = [self._pass(("passes", index), entry) for index, entry in enumerate(value)]
        return None if None in built else [step for entry in built for step in entry.stands_for()]

    def _pass(self, place: Place, entry: Any) -> Any:
        if isinstance(entry, BaseModel) and hasattr(entry, "accepts"):
            return entry
        found = pass_entry(entry)
        if found is None:
            advice = "allowed: `name: {options}`."
            if isinstance(entry, dict) and any(name in PASSES for name in entry):
                advice = "one pass an entry, its options indented below its name."
            self.problem(place, f"{yaml_words(entry)} is not allowed; {advice}")
            return None
        name, options = found
        if name not in PASSES:
            self.problem(place, PASSES.unknown(name))
            return None
        if options is not None and not isinstance(options, dict):
            self.problem((*place, name), f"{yaml_words(options)} is not allowed; allowed: a mapping of options.")
            return None
        cls = PASSES.get(name)
        built = self.build(cls, self._placed(cls, options or {}, (*place, name)), (*place, name))
        return built if built is None else self._located(built, (*place, name))

    def _placed(self, cls: type[Pass], options: dict[str, Any], place: Place) -> dict[str, Any]:
        """The options with the paths among them made absolute."""
        from compress.builtin import MODELS

        if not getattr(cls, "paths", None):
            return options
        try:
            found: dict[str, Any] = json.loads(json.dumps(plain(options)))
        except TypeError:  # which `build` says in its own words
            return options
        for dotted, kind in cls.paths.items():
            *outer, last = dotted.split(".")
            inner: Any = found
            for part in outer:
                inner = inner.get(part) if isinstance(inner, dict) else None
            value = inner.get(last) if isinstance(inner, dict) else None
            if not isinstance(value, str) or not value or value in cls.words:
                continue
            where = (*place, *dotted.split("."))
            if kind == "folder" or value.endswith(".json"):
                inner[last] = str(self.path(where, value))
            else:
                inner[last] = (self.model if kind == "model" else self.source)(where, value, tuple(MODELS))
        return found

    def _located(self, step: Pass, place: Place) -> Pass:
        """The pass with the texts that its options name made absolute."""
        from compress.builtin import MODELS

        given = {option: getattr(step, option) for option in step.sources}
        found = {option: self.source((*place, option), text, tuple(MODELS)) for option, text in given.items() if text}
        return step.model_copy(update=found) if found else step

    def names(self, place: Place, given: Iterable[str], registry: Any) -> None:
        """Notes the names that a registry lacks, and those that stand there twice."""
        seen = set()
        for index, name in enumerate(given):
            if name not in registry:
                self.problem((*place, index), registry.unknown(name))
            if name in seen:
                self.problem((*place, index), f'"{name}" stands there twice.')
            seen.add(name)

    def runtimes(self, place: Place, given: Sequence[str], exports: Sequence[str] | None) -> None:
        """Notes runtimes that do not exist, cannot run here, or open what is not among the `exports` (None: of models
        that are there already)."""
        self.names(place, given, RUNTIMES)
        for index, name in enumerate(given):
            if name not in RUNTIMES:
                continue
            runtime = RUNTIMES.get(name)()
            missing, opens = runtime.missing(), runtime.exports
            if missing:
                self.problem((*place, index), f"{name} cannot run here: {missing}")
            if opens and exports is not None and not set(opens) & set(exports):
                sentence = f"{name} opens what export writes as {' or '.join(opens)}: add {opens[0]} to export."
                self.problem((*place, index), sentence)

    def model(self, place: Place, model: str, builtin: Sequence[str]) -> str:
        """The model with a local folder made absolute. Hub ids and `builtin:` names stay."""
        if model.startswith("builtin:"):
            self._builtin(place, model, builtin)
            return model
        path = self.path(place, model)
        if os.path.exists(path):
            if not os.path.isdir(path):
                self.problem(place, f"{path} is a file; a model is a folder, a hub id or builtin:{builtin[0]}.")
            return str(path)
        if looks_like_path(model):
            self.problem(place, f"no such folder: {path}.{nearest_file(path)}")
        return model

    def source(self, place: Place, source: str, builtin: Sequence[str], hub: bool = True, images: bool = False) -> str:
        """A text's source with a local file, or (where `images`) folder made absolute. Hub ids (where `hub`) and
        `builtin:` names stay."""
        if source.startswith("builtin:"):
            self._builtin(place, source, builtin)
            return source
        path = self.path(place, source)
        if os.path.isdir(path):
            if images and any(entry.suffix.lower() in IMAGE_ENDINGS for entry in path.rglob("*")):
                return str(path)
            self.problem(place, f"{path} is a folder; allowed: a .txt or .jsonl file, builtin:{builtin[0]}.")
        elif path.suffix.lower() in (".txt", ".jsonl"):
            if not os.path.exists(path):
                self.problem(place, f"no such file: {path}.{nearest_file(path)}")
            return str(path)
        elif os.path.exists(path):
            self.problem(place, f"{path} is neither a .txt nor a .jsonl file.")
        elif looks_like_path(source) or not hub:
            near = nearest_file(path) or nearest(source, [f"builtin:{name}" for name in builtin])
            self.problem(place, f"no such file: {path}; allowed: a .txt or .jsonl file, builtin:{builtin[0]}.{near}")
        return source

    def task(self, place: Place, task: str, builtin: Sequence[str]) -> str:
        """A benchmark task: a file of items or of a task as an absolute path, `builtin:<name>`, a name of lm-eval."""
        if not of_harness(task):
            return self.source(place, task, builtin, hub=False)
        from compress.measure.harness_tasks import is_task_file, missing_package, name_problem

        if is_task_file(task):
            path = self.path(place, task)
            if not path.is_file():
                self.problem(place, f"no such file: {path}.{nearest_file(path)}")
            elif (missing := missing_package()) is not None:
                self.problem(place, f"{missing}")
            return str(path)
        if os.path.exists(self.path(place, task)):
            return self.source(place, task, builtin, hub=False)
        if (problem := name_problem(task)) is not None:
            self.problem(place, problem)
        return task

    def path(self, place: Place, text: str) -> Path:
        """`text` as an absolute path: from the recipe's folder, in overrides from the working folder."""
        return Path(os.path.abspath(self.document.base_of(place) / os.path.expanduser(text)))

    def _builtin(self, place: Place, source: str, builtin: Sequence[str]) -> None:
        allowed = [f"builtin:{name}" for name in builtin]
        if source not in allowed:
            near = nearest(source, allowed)
            self.problem(place, f"{yaml_words(source)} does not exist; allowed: {', '.join(allowed)}.{near}")


def of_harness(task: str) -> bool:
    """Whether a task is one of lm-evaluation-harness, by name or in a file of its format: not items of our own."""
    if task.lower().endswith((".yaml", ".yml")):
        return True
    return not (task.startswith("builtin:") or looks_like_path(task) or task.lower().endswith((".jsonl", ".txt")))


def looks_like_path(text: str) -> bool:
    """Whether `text` can only be meant as a path: a hub id has at most one slash, and does not begin with a dot."""
    return text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1 or "\\" in text


_EXPECTED = {
    "int": "a whole number", "float": "a number", "finite": "a number", "string": "text", "bool": "true, false",
    "list": "a list", "tuple": "a list", "dict": "a mapping", "model": "a mapping", "none": "null",
}  # fmt: skip


def _sentences(error: ValidationError, cls: type[BaseModel], value: Any) -> list[tuple[Place, str]]:
    """Each place that pydantic complains of, once, with a sentence. Members of a union become one sentence."""
    grouped: dict[Place, list[Any]] = {}
    for finding in error.errors(include_url=False):
        missing = finding["type"] == "missing"
        place = _real(finding["loc"][:-1] if missing else finding["loc"], value)
        grouped.setdefault((*place, finding["loc"][-1]) if missing else place, []).append(finding)
    return [(place, _sentence(place, findings, cls)) for place, findings in grouped.items()]


def _real(location: tuple[str | int, ...], value: Any) -> Place:
    """`location` without pydantic's own words for the members of a union."""
    place: list[str | int] = []
    for part in location:
        if isinstance(value, dict) and part in value:
            value = value[str(part)]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        place.append(part)
    return tuple(place)


def _sentence(place: Place, findings: list[Any], cls: type[BaseModel]) -> str:
    first = findings[0]
    kind = first["type"]
    owner, field = _field(cls, place)
    if kind == "missing":
        return f"is missing. {field.description or ''}".strip() if field else "is missing."
    if kind == "extra_forbidden":
        known = list(owner.model_fields)
        return f"unknown key; allowed: {', '.join(known)}.{nearest(str(place[-1]), known)}"
    if kind in ("value_error", "assertion_error"):
        reason = str(first.get("ctx", {}).get("error", first["msg"])).rstrip(".")
        return f"{reason}."
    shown = yaml_words(first["input"])
    if field is not None:
        allowed = allowed_words(field)
    else:
        words = [_EXPECTED.get(item["type"].split("_")[0], item["msg"].lower()) for item in findings]
        both = {"a whole number"} if "a number" in words else set()
        allowed = " or ".join(word for word in dict.fromkeys(words) if word not in both)
    names = allowed.split(", ")
    near = nearest(first["input"], names) if isinstance(first["input"], str) and first["input"] not in names else ""
    return f"{shown} is not allowed; allowed: {allowed}.{near}"


def _field(cls: type[BaseModel], place: Place) -> tuple[type[BaseModel], Any]:
    """The model that owns the last part of `place`, and that part's field (None where it is no field itself)."""
    owner, field = cls, None
    for depth, part in enumerate(place):
        last = depth == len(place) - 1
        if isinstance(part, int):  # an entry of a list, whose model is known already
            if last:
                return owner, None
            continue
        field = owner.model_fields.get(part)
        if field is None or last:
            break
        inner = list(models_in(field.annotation))
        if not inner:
            return owner, None
        owner = inner[0]
    return owner, field


def step_name(passes: Sequence[Pass], index: int) -> str:
    return f"passes.{index}.{passes[index].name}"


def check_order(passes: Iterable[Pass], states: Iterable[str] = ()) -> list[tuple[int, str]]:
    """(index, sentence) for each pass that does not take the model as the passes before it leave it.

    A pass states what it `accepts` and what it `leaves`; what is left adds up (a sparse model that is quantized is
    both), and every state but "dense" must be accepted. `states` are those the model has to begin with.
    """
    steps, refused = list(passes), []
    present: dict[str, int | None] = dict.fromkeys(states)
    present.pop("dense", None)
    for index, step in enumerate(steps):
        bad = next((state for state in present if state not in step.accepts), None)
        if bad is not None:
            refused.append((index, _order_sentence(steps, index, bad, present[bad], present)))
        elif not present and "dense" not in step.accepts:
            refused.append((index, f"cannot come here: it takes {_weights(step.accepts)}, and the model's are dense."))
        elif step.leaves not in ("dense", "same"):
            present.setdefault(step.leaves, index)
        elif step.changes_weights:
            present.pop("adapter", None)  # a pass that takes an adapter and leaves none has merged it
    return refused


def _order_sentence(
    steps: Sequence[Pass], index: int, state: str, cause: int | None, present: Mapping[str, int | None]
) -> str:
    step = steps[index]
    takes = f"it takes {_weights(step.accepts)}"
    if cause is None:
        return f"cannot work on this model: {takes}, and the model's are {state}."
    before = steps[cause]
    sentence = f"cannot follow {step_name(steps, cause)}: {takes}, and {before.name} leaves {state} ones."
    if before.name == step.name:
        return f"{sentence} Leave one of the two out."
    earlier = {other for other, at in present.items() if at is None or at < cause}
    swapped = earlier | ({step.leaves} - {"dense", "same"})
    if earlier <= step.accepts and swapped <= before.accepts:
        return f"{sentence} Put {step.name} first."
    return f"{sentence} Leave one of the two out."


def _weights(states: Iterable[str]) -> str:
    order = ("dense", "sparse", "quantized", "adapter")
    known = sorted(states, key=lambda state: order.index(state) if state in order else len(order))
    return f"{' or '.join(known)} weights"
