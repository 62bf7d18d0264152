"""What it takes to get a report again: the recipe as YAML, and the command."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from compress.reports.report import Report, finite

#: Keys of a canonical recipe whose defaults say nothing to a reader.
_SILENT: dict[str, Any] = {
    "dtype": "auto", "export": [], "runtime": {}, "memory": None, "device": "auto", "residency": "memory",
    "min_coverage": 0.5, "benchmark.metrics": None, "benchmark.runtimes": ["transformers"], "benchmark.prompts": [],
    "benchmark.goals": {}, "benchmark.tasks": [], "benchmark.damage": None, "benchmark.stages": None,
}  # fmt: skip


def recipe_yaml(report: Report) -> str:
    """The recipe with everything that is not a default, as a recipe file: `compress run` takes it."""
    recipe = {key: value for key, value in finite(report.recipe).items() if key not in ("models", "output")}
    shown = {key: value for key, value in recipe.items() if not _silent(key, value)}
    if isinstance(shown.get("benchmark"), dict):
        said = {key: value for key, value in shown["benchmark"].items() if not _silent(f"benchmark.{key}", value)}
        shown["benchmark"] = said
        if not said:
            del shown["benchmark"]
    if isinstance(shown.get("data"), dict):
        entries = {role: entry for role, entry in shown["data"].items() if entry}
        shown["data"] = {role: _without_nulls(entry) for role, entry in entries.items()}
    if isinstance(shown.get("passes"), list):
        shown["passes"] = [_step(step) for step in shown["passes"]]
    text: str = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
    return text


def _silent(key: str, value: Any) -> bool:
    return key in _SILENT and value == _SILENT[key]


def _step(step: Any) -> Any:
    if not isinstance(step, dict):
        return step
    return {name: _without_nulls(options) for name, options in step.items()}


def _without_nulls(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if value is not None and value != []}


def command(report: Report) -> str:
    """The command line that makes the report."""
    models = report.recipe.get("models")
    if models:
        return shlex.join(["compress", "benchmark", *map(str, models)])
    return f"compress run {shlex.quote(report.name + '.yaml')}"
