"""The recipe: which model, which passes, which text, which benchmark. Building one validates everything.

`Recipe.load(path, overrides)` and `Recipe.from_dict(values)` are the ways in; both raise RecipeError (all problems in
one message, a line each) before a weight is read. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr

from compress.errors import RecipeError
from compress.recipe.changes import decisive
from compress.recipe.check import Checker, check_order, plain, step_name
from compress.recipe.document import Document, Place
from compress.recipe.goals import (
    ANSWER_METRICS,
    CLASS_METRICS,
    TEXT_METRICS,
    VARIED,
    known_metric,
    parse_goal,
    parse_size,
)
from compress.recipe.sections import ROLES, Benchmark, Data, DataEntry, Runtime, Section
from compress.registry import FORMATS, HUB, METRICS, PASSES, yaml_words

if TYPE_CHECKING:
    from compress.passes.base import Pass
else:
    Pass = Any


class Recipe(Section):
    """What to do to a model. Frozen; paths are absolute, the defaults of `data` and `output` filled in."""

    model: str = Field(min_length=1)
    """Hub id, local folder or `builtin:tiny`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the weights are loaded in; auto: as they are stored."""
    data: Data = Field(default_factory=Data)
    """Texts for calibration, evaluation and training."""
    passes: tuple[Pass, ...] = ()
    """What is done to the model, in this order: `- name: {options}`."""
    benchmark: Benchmark | Literal[False] = Field(default_factory=Benchmark)
    """What is measured; false: nothing (the result is still verified)."""
    export: tuple[str, ...] = ()
    """Formats written besides the folder `model/`."""
    runtime: Runtime = Field(default_factory=Runtime)
    """How the compressed model is to be run."""
    memory: str | int | None = None
    """Most memory the run may take, as in 8GB; a plan above it is refused."""
    output: str | None = None
    """Folder of the results. Default: `runs/<recipe name>` beside the recipe."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Decides everything that is drawn at random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the work is done; auto: a GPU where there is one."""
    residency: Literal["memory", "disk"] = "memory"
    """Keep the whole model in memory, or read each block when its turn comes."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Least share of the blocks' weights that a pass must reach."""

    _name: str = PrivateAttr("recipe")
    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), **replaced: Any) -> Recipe:
        """The recipe in a YAML file. `overrides` are `KEY=VALUE` as after `--set`; `replaced` are top-level keys given
        as options of their own (`model="..."`, `output=...`, `device=...`; None: not given)."""
        return _build(Document.read(Path(path)), Path(path).stem, overrides, replaced)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        name: str = "recipe",
        base: str | Path | None = None,
        overrides: Sequence[str] = (),
        **replaced: Any,
    ) -> Recipe:
        """The recipe of a mapping with the keys of a recipe file; `passes` may hold Pass objects. Relative paths start
        from `base` (default: the working folder)."""
        if not isinstance(values, Mapping):
            raise RecipeError(f"a recipe is a mapping of keys to values, not {yaml_words(values)}.")
        copied: dict[str, Any] = {}
        for key, value in values.items():
            try:
                many = key == "passes" and isinstance(value, list | tuple)
                copied[str(key)] = [_entry(item) for item in value] if many else plain(value)
            except TypeError as error:
                raise RecipeError(f"{key}: {error}.") from None
        return _build(Document(copied, Path(base or ".").absolute()), name, overrides, replaced)

    @property
    def name(self) -> str:
        """The recipe file's name without its ending."""
        return self._name

    @property
    def base(self) -> Path:
        """The folder that relative paths of the recipe start from."""
        return self._base

    @property
    def memory_bytes(self) -> int | None:
        """The budget `memory` in bytes."""
        return None if self.memory is None else parse_size(self.memory)

    def canonical(self) -> dict[str, Any]:
        """The recipe as JSON-able values, all defaults filled in, paths absolute. `from_dict` reads it back."""
        values = self.model_dump(mode="json", exclude={"passes"})
        values["passes"] = [{step.name: step.model_dump(mode="json")} for step in self.passes]
        return {key: values[key] for key in Recipe.model_fields}

    def digest(self) -> str:
        """sha256 (hex) of what decides the compressed model: see `decisive`."""
        text = json.dumps(decisive(self.canonical()), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of a recipe file, the options of all passes included. Imports every pass."""
        from pydantic.json_schema import models_json_schema

        classes = {name: PASSES.get(name) for name in PASSES.names()}
        refs, shared = models_json_schema([(model, "validation") for model in (cls, *classes.values())])
        definitions = shared["$defs"]
        schema = definitions.pop(refs[cls, "validation"]["$ref"].rpartition("/")[2])
        entries: list[dict[str, Any]] = [{"enum": list(classes)}]
        for name, model in classes.items():
            options = {"anyOf": [refs[model, "validation"], {"type": "null"}]}
            entry = {"type": "object", "properties": {name: options}, "required": [name]}
            entries.append({**entry, "additionalProperties": False})
        schema["properties"]["passes"] |= {"type": "array", "items": {"anyOf": entries}}
        for entry in definitions["Data"]["properties"].values():
            entry["anyOf"].append({"type": "string"})
        for name in ("data", "benchmark"):
            field = schema["properties"][name]
            kinds = field.pop("anyOf", None) or [{"$ref": field.pop("$ref")}]
            schema["properties"][name] = {"anyOf": [*kinds, {"type": "null"}], **field}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _entry(item: Any) -> Any:
    return item if isinstance(item, BaseModel) else plain(item)


def _build(document: Document, name: str, overrides: Sequence[str], replaced: Mapping[str, Any]) -> Recipe:
    if isinstance(overrides, str):
        raise RecipeError(f"overrides is a list of KEY=VALUE, not the text {yaml_words(overrides)}.")
    for text in overrides:
        document.set(text)
    for key, value in replaced.items():
        if value is not None:
            document.replace(key, plain(value))
    from compress.builtin import MODELS

    check, values = Checker(document), document.value
    apart = ("passes", "data", "benchmark")
    shell = check.build(Recipe, {key: value for key, value in values.items() if key not in apart}, ())
    passes = check.passes(values.get("passes"))
    model = check.model(("model",), shell.model, tuple(MODELS)) if shell else ""
    home = model if model in [f"builtin:{known}" for known in MODELS] else None
    seed = shell.seed if shell else 0
    data = _data(check, values.get("data"), home, seed, tuple(MODELS))
    benchmark = _benchmark(check, values.get("benchmark"), home, tuple(MODELS))
    check.raise_problems()
    assert shell is not None
    assert passes is not None
    assert benchmark is not None
    output = shell.output or f"runs/{name}"
    update = {
        "model": model,
        "data": data,
        "passes": tuple(passes),
        "benchmark": benchmark,
        "output": str(check.path(("output",) if shell.output else (), output)),
    }
    check.names(("export",), shell.export, FORMATS)
    _exports(check, shell.export, passes)
    if shell.memory is not None:
        _sized(check, shell.memory)
    for index, sentence in check_order(passes):
        place = document.where(("passes", index, passes[index].name)).removesuffix(": ")
        check.problems.append(f"{place or step_name(passes, index)} {sentence}")
    _requirements(check, passes, data, benchmark)
    if benchmark:
        check.runtimes(("benchmark", "runtimes"), benchmark.runtimes, shell.export if passes else None)
    for index, step in enumerate(passes):
        if step.needs_training and shell.residency == "disk":
            sentence = f"{step.name} trains the whole model at once: use residency: memory, or leave it out."
            check.problem(("passes", index, step.name), sentence)
    check.raise_problems()
    recipe = shell.model_copy(update=update)
    recipe._name, recipe._base = name, document.base
    return recipe


def _exports(check: Checker, exports: Sequence[str], passes: Sequence[Pass]) -> None:
    """Notes formats that cannot hold the grid of a pass, whatever the model."""
    grids = [grid for step in passes if (grid := getattr(step, "grid", None)) is not None]
    for index, name in enumerate(exports if grids else ()):
        for grid in grids if name in FORMATS else ():
            reason = FORMATS.get(name)().refuses_grid(grid)
            if reason is not None:
                check.problem(("export", index), reason)


def _sized(check: Checker, memory: str | int) -> None:
    try:
        if parse_size(memory) == 0:
            check.problem(("memory",), f"{yaml_words(memory)} is no room at all.")
    except RecipeError as error:
        check.problem(("memory",), str(error))


def _data(check: Checker, value: Any, home: str | None, seed: int, builtin: Sequence[str]) -> Data:
    """The texts, with the defaults of their roles; a builtin model's own text (`home`) stands in for what is absent."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        check.problem(("data",), f"{yaml_words(value)} is not allowed; allowed: a mapping of {', '.join(ROLES)}.")
        return Data()
    entries: dict[str, Any] = {}
    for role in ROLES:
        given = value.get(role)
        given = {"source": given} if isinstance(given, str) else given
        if home and (given is None or (isinstance(given, dict) and "source" not in given)):
            given = {"source": home, **(given or {})}
        place: Place = ("data", role)
        if given is not None and not isinstance(given, dict):
            check.problem(place, f"{yaml_words(given)} is not allowed; allowed: a source, or a mapping with one.")
        elif given is not None and (entry := check.build(DataEntry, given, place)):
            source = check.source((*place, "source"), entry.source, builtin, images=role == "calibration")
            entries[role] = entry.model_copy(update={"source": source}).resolved(role, seed)
    unknown = {key: item for key, item in value.items() if key not in ROLES}
    check.build(Data, unknown, ("data",))
    return Data().model_copy(update=entries)


def _benchmark(
    check: Checker, value: Any, home: str | None, builtin: Sequence[str]
) -> Benchmark | Literal[False] | None:
    if value is False:
        return False
    benchmark = check.build(Benchmark, {} if value is None else value, ("benchmark",))
    if benchmark is None:
        return None
    check.names(("benchmark", "metrics"), benchmark.metrics or (), METRICS)
    measured = benchmark.variants()
    for metric, goal in benchmark.goals.items():
        place = ("benchmark", "goals", metric)
        try:
            parse_goal(metric, goal)
        except RecipeError as error:
            check.problem(place, str(error))
            continue
        family, _, variant = metric.partition("/")
        if family in VARIED and variant and set(variant.split(", ")) - measured:
            check.problem(place, f"{variant} is not measured; name it in benchmark.batches, prompt_tokens or runtimes.")
        if known_metric(metric) and benchmark.metrics is not None and family not in benchmark.metrics:
            check.problem(place, f"{family} is not measured; add it to benchmark.metrics.")
    given = benchmark.tasks or ((home,) if home else ())
    tasks: list[str] = []
    for index, task in enumerate(given):
        found = check.task(("benchmark", "tasks", index), task, builtin)
        if found in tasks:
            check.problem(("benchmark", "tasks", index), f"{task} is there twice; leave one out.")
        tasks.append(found)
    return benchmark.model_copy(update={"tasks": tuple(tasks)})


def _requirements(check: Checker, passes: Sequence[Pass], data: Data, benchmark: Benchmark | Literal[False]) -> None:
    """Text and items that something in the recipe asks for by name must be there."""
    for index, step in enumerate(passes):
        if step.takes_calibration and data.calibration is None:
            sentence = f"{step.name} needs text: give data.calibration a .txt or .jsonl file."
            check.problem(("passes", index, step.name), sentence)
        if step.needs_training and data.training is None and data.calibration is None:
            sentence = f"{step.name} trains on text: give data.training a .txt or .jsonl file."
            check.problem(("passes", index, step.name), sentence)
        if getattr(step, "generated", 0) and data.training is not None and data.training.pack is False:
            sentence = "text that is generated comes in whole windows: leave data.training.pack out."
            check.problem(("passes", index, step.name, "generated"), sentence)
    if not benchmark:
        return
    asked: list[tuple[Place, str]] = [
        (("benchmark", "metrics", index), metric) for index, metric in enumerate(benchmark.metrics or ())
    ]
    asked += [(("benchmark", "goals", metric), metric) for metric in benchmark.goals]
    for place, metric in asked:
        if metric in TEXT_METRICS and data.evaluation is None:
            check.problem(place, f"{metric} needs text: give data.evaluation a .txt or .jsonl file.")
        if metric in CLASS_METRICS and data.evaluation is None:
            words = "needs texts with labels: give data.evaluation a .jsonl file of text + label."
            check.problem(place, f"{metric} {words}")
        answers = metric in ANSWER_METRICS or metric.startswith(HUB)
        labelled = metric == "accuracy" and data.evaluation is not None  # of a model that classifies
        if (answers or metric.partition("/")[0] == "accuracy") and not benchmark.tasks and not labelled:
            check.problem(place, f"{metric} needs test items: give benchmark.tasks a .jsonl file of them.")
