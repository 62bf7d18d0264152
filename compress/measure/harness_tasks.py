"""Tasks of lm-evaluation-harness: found by name or in a file of its format, checked, and read with their items.

The package `lm-eval` is imported when a task is asked for, never before. A group of tasks, or a tag, is named like one:
its tasks are areas `group/task`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from compress.errors import MissingExtra, StartError, nearest
from compress.recipe.document import nearest_file
from compress.registry import yaml_words

ENDINGS = (".yaml", ".yml")
#: `task: name`, `group: name`, `tag: name` at the margin of a file, and lists of tags.
_NAME = re.compile(
    r"""(?mx) ^["']?(task|group|tag)["']? [ \t]*:[ \t]*
    (?: ["']?([^\s"'\[\#][^"'\[\#\n]*?)["']? [ \t]*(?:\#.*)?$ | ((?:\s*-.+)+ | \[.*\]) )"""
)
_LISTED = re.compile(r"""(?:-\s*|[\[,]\s*)["']?([\w.:/-]+)""")
#: Errors that say that something is on the hub and not here, by the names of their classes in several packages.
_UNREACHED = (
    "ConnectionError", "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "DatasetNotFoundError",
    "LocalEntryNotFoundError", "HfHubHTTPError", "RepositoryNotFoundError", "NetworkError", "MaxRetryError",
)  # fmt: skip


def is_task_file(task: str) -> bool:
    return task.lower().endswith(ENDINGS)


def missing_package() -> MissingExtra | None:
    """The error for a machine without lm-eval, or None."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return MissingExtra("lm-eval", "harness", "a task of lm-evaluation-harness")


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a task, in a sentence without its place, or None."""
    if (missing := missing_package()) is not None:
        return f"{yaml_words(name)} is no file here, and {missing}."
    names = known_tasks()
    if name in names or name in _manager(True).all_tasks:  # tags that files take over from others are in the second
        return None
    return (
        f"{yaml_words(name)} is neither a file (.jsonl or .yaml), nor builtin:tiny, nor one of the {len(names):,} "
        f"tasks that lm-eval has here.{nearest(name, names)}"
    )


@functools.cache
def known_tasks() -> dict[str, tuple[Path, ...]]:
    """The tasks, groups and tags of the package, by name, and for tasks the files that define them: found in the text
    of its 14,000 files, as reading these as YAML takes many seconds."""
    spec = importlib.util.find_spec("lm_eval")
    root = next(iter(spec.submodule_search_locations or ()), "") if spec is not None else ""
    found: dict[str, tuple[Path, ...]] = {}
    for folder, _, files in os.walk(Path(root) / "tasks"):
        for file in files:
            if not file.endswith(".yaml"):
                continue
            path = Path(folder, file)
            for kind, name, several in _NAME.findall(path.read_text(encoding="utf-8", errors="replace")):
                for each in [name] if name else _LISTED.findall(several):
                    found[each] = (*found.get(each, ()), *((path,) if kind == "task" else ()))
    return found


@functools.cache
def _manager(defaults: bool, folder: Path | None = None) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=defaults, include_path=None if folder is None else str(folder))


def load_tasks(tasks: Sequence[str]) -> dict[str, Any]:
    """The tasks with their items, by area, in order. `tasks`: names, and paths of task files.

    StartError, in a sentence that names the task, for what does not exist, cannot be read or is there twice; for data
    that lies on the hub where there is no network; for a task without items, and one that this benchmark cannot score.
    """
    if (missing := missing_package()) is not None:
        raise missing
    import datasets

    found: dict[str, Any] = {}
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for task in tasks:
            for area, loaded in _loaded(task):
                leaf = area.rpartition("/")[2]
                twice = next((other for other in found if other.rpartition("/")[2] == leaf), None)
                if twice is not None:
                    raise StartError(
                        f"benchmark.tasks: {leaf} is there twice, as {twice} and in {task}: leave one out."
                    )
                _check(area, task, loaded)
                found[area] = loaded
    finally:
        if bars:
            datasets.enable_progress_bars()
    return found


def _loaded(task: str) -> Iterator[tuple[str, Any]]:
    """(area, task object) of a name or a file."""
    config: Mapping[str, Any] | None = None
    try:
        if is_task_file(task):
            config = read_task_file(Path(task))
            manager = _manager(False)
            if "group" in config:
                manager, config = _with_members(Path(task).parent, config)
            result, name = manager.load([config]), str(config.get("group") or config["task"])
        else:
            files = known_tasks().get(task, ())
            config = read_task_file(files[0]) if len(files) == 1 else {}
            if config.get("task") == task and "class" not in config:
                result = _manager(False).load([str(files[0])])
            else:
                result = _manager(True).load([task])
            name = task
    except StartError:
        raise
    except Exception as error:  # of lm-eval, datasets, the hub's client, or code of the task's own
        raise StartError(_why(task, config or {}, error)) from error
    alone = not result.get("groups") and list(result["tasks"]) == [name]
    for leaf, loaded in result["tasks"].items():
        plain = leaf.replace("/", "_")
        yield (plain if alone else f"{name.replace('/', '_')}/{plain}"), loaded


def _with_members(folder: Path, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The tasks that a group in a file can name, which lie beside it or in the package, and the group with those beside
    it read like any other file."""
    listed = config.get("task")
    members = listed if isinstance(listed, list) else [listed]
    manager = _manager(False, folder)
    if any(isinstance(member, str) and member not in manager.task_index for member in members):
        manager = _manager(True, folder)
    found: list[Any] = []
    for member in members:
        entry = manager.task_index.get(member) if isinstance(member, str) else None
        beside = entry is not None and entry.yaml_path is not None and folder.resolve() in entry.yaml_path.parents
        own = read_task_file(entry.yaml_path) if entry is not None and beside else {}
        found.append(own if "task" in own and "group" not in own else member)
    return manager, {**config, "task": found}


def _why(task: str, config: Mapping[str, Any], error: BaseException) -> str:
    """Why a task cannot be loaded: its data are on the hub, or something else."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    names = [base.__name__ for link in chain for base in type(link).__mro__]
    place = f"benchmark.tasks: {task}"
    text = " ".join(str(error).split())[:200]
    if any(name in _UNREACHED for name in names):
        data = config.get("dataset_path")
        return (
            f"{place}: {f'its data set {data}' if data else 'its data'} is not on this machine, and the Hugging Face "
            "hub cannot be reached or does not have it. Run once where there is a network (the data stay in the cache, "
            f"HF_HOME), or give a task file whose data are local ({type(error).__name__}: {text})."
        )
    return f"{place}: lm-eval cannot load it ({type(error).__name__}: {text})."


def _check(area: str, task: str, loaded: Any) -> None:
    place = f"benchmark.tasks: {task}"
    kind = getattr(loaded, "OUTPUT_TYPE", None)
    if kind == "loglikelihood_rolling":
        raise StartError(
            f"{place}: {area} scores running text, not items: give the text as data.evaluation, for perplexity and "
            "bits_per_byte."
        )
    if getattr(loaded, "UNSAFE_CODE", False):
        raise StartError(f"{place}: {area} runs code that the model writes, which this benchmark does not do.")
    if getattr(loaded, "MULTIMODAL", False):
        raise StartError(f"{place}: {area} needs images or sound, and the benchmark gives models text.")
    if not len(loaded.eval_docs):
        raise StartError(f"{place}: {area} has no items.")


def fingerprint_tasks(tasks: Mapping[str, Any]) -> str:
    """sha256 (hex) of the items and the settings of tasks, and of the harness's version: the same for the same
    questions."""
    found = hashlib.sha256(version("lm-eval").encode())
    for area, task in tasks.items():
        found.update(f"{area}\0{json.dumps(task.dump_config(), sort_keys=True, default=str)}\0".encode())
        for item in task.eval_docs:
            found.update(json.dumps(item, sort_keys=True, default=str).encode())
    return found.hexdigest()


def read_task_file(path: Path) -> dict[str, Any]:
    """A task or group in lm-eval's YAML format, `include:` followed, with the paths of data files that lie beside it
    made absolute. StartError with file and line for what is wrong in it."""
    if not path.is_file():
        raise StartError(f"benchmark.tasks: no such file: {path}.{nearest_file(path)}")
    lines = _lines(path)
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(path)
    except Exception as error:  # of an included file, or of a function that is not there
        raise StartError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}.") from error
    if "task" not in config and "group" not in config:
        raise StartError(f"{path}: has neither task: nor group:, so it has no name.")
    if "group" not in config and "class" not in config:
        _check_keys(path, config, lines)
        _find_data(path, config, lines)
    return config


def _lines(path: Path) -> dict[str, int]:
    """Where each key of the file stands."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise StartError(f"{path}{line}: not YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StartError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}.") from None
    if not isinstance(node, yaml.MappingNode):
        raise StartError(f"{path}:1: a task is a mapping of keys to values (task, dataset_path, output_type, ...).")
    found: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in found:
            raise StartError(f"{path}:{key.start_mark.line + 1}: {key.value} is there twice.")
        found[key.value] = key.start_mark.line + 1
    return found


def _check_keys(path: Path, config: Mapping[str, Any], lines: Mapping[str, int]) -> None:
    from dataclasses import fields

    from lm_eval.api.task import ALL_OUTPUT_TYPES, TaskConfig

    known = [field.name for field in fields(TaskConfig)] + ["include", "tag", "task_list"]
    for key in config:
        if key not in known:
            raise StartError(f"{path}:{lines.get(key, 1)}: unknown key {key}.{nearest(str(key), known)}")
    kind = config.get("output_type", "generate_until")
    if kind not in ALL_OUTPUT_TYPES:
        place = f"{path}:{lines.get('output_type', 1)}"
        allowed = ", ".join(ALL_OUTPUT_TYPES)
        raise StartError(f"{place}: output_type: {yaml_words(kind)} is not allowed; allowed: {allowed}.")
    if not any(config.get(key) for key in ("test_split", "validation_split")):
        raise StartError(f"{path}: names no test_split or validation_split, so there is nothing to measure on.")


def _find_data(path: Path, config: dict[str, Any], lines: Mapping[str, int]) -> None:
    """Makes `data_files` absolute, and reads the lines of those that hold JSON once."""
    options = config.get("dataset_kwargs")
    if not isinstance(options, dict) or "data_files" not in options:
        return
    place = f"{path}:{lines.get('dataset_kwargs', 1)}"

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [resolved(inner) for inner in value]
        text = str(value)
        if "://" in text or "*" in text or config.get("dataset_path") not in ("json", "csv", "parquet", "text"):
            return value
        file = path.parent / os.path.expanduser(text)
        file = file if file.is_file() else Path(os.path.abspath(text))
        if not file.is_file():
            raise StartError(f"{place}: data_files: no such file: {path.parent / text}.{nearest_file(file)}")
        if file.suffix.lower() == ".jsonl":
            _check_lines(file)
        return str(file.absolute())

    config["dataset_kwargs"] = {**options, "data_files": resolved(options["data_files"])}


def _check_lines(file: Path) -> None:
    some = False
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            some = True
            try:
                content = json.loads(line)
            except ValueError as error:
                raise StartError(f"{file}:{number}: not a line of JSON: {error}.") from None
            if not isinstance(content, dict):
                raise StartError(f"{file}:{number}: {yaml_words(content)} is not a mapping of fields.")
    if not some:
        raise StartError(f"{file}: holds no items.")
