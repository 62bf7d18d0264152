"""What it takes to get a report again: the recipe as YAML, and the command."""

from __future__ import annotations

import shlex
from typing import Any

import yaml
from pydantic import BaseModel

from compress.reports.report import Report, finite

#: Keys that are shown whatever they are.
_SHOWN = ("model", "data", "passes", "benchmark", "seed")


def recipe_yaml(report: Report) -> str:
    """The recipe with everything that is not a default, as a recipe file: `compress run` takes it."""
    from compress.recipe import Benchmark, Recipe

    recipe = {key: value for key, value in finite(report.recipe).items() if key not in ("models", "output")}
    shown = {key: value for key, value in recipe.items() if key in _SHOWN or not _default(Recipe, key, value)}
    if isinstance(shown.get("benchmark"), dict):
        said = {key: value for key, value in shown["benchmark"].items() if not _default(Benchmark, key, value)}
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


def _default(section: type[BaseModel], key: str, value: Any) -> bool:
    """Whether a recipe says the same without this key."""
    field = section.model_fields.get(key)
    return (
        field is not None and not field.is_required() and finite(field.get_default(call_default_factory=True)) == value
    )


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
