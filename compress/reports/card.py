"""The model card that a written folder carries as its README.md.

It is written with the folder, and once more when everything is measured, with the figures in it. Those are the figures
that the same recipe gives again, so that the folder's bytes stay the same: what depends on the machine (speed, memory,
energy) is in the report beside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compress import __version__
from compress.recipe import Recipe
from compress.recipe.changes import HOW_IT_IS_DONE
from compress.reports.again import recipe_yaml
from compress.reports.headline import quality_words, size_words
from compress.reports.markdown import comparison_rows, export_table
from compress.reports.report import Report, Stage

#: What begins like this, or ends so, is another figure on another machine, or another day.
_OF_THE_MACHINE = ("peak_memory", "energy", "first_token")


def model_card(
    recipe: Recipe, stages: Sequence[Stage], folder: Path, architecture: str, report: Report | None = None
) -> str:
    """What the folder holds, how to load it, how it was made, whose licence applies; with `report`, what it cost.
    `folder` is that of the original, `architecture` the class of the model."""
    base = base_name(recipe.model)
    names = ", ".join(stage.pass_ for stage in stages) or "no pass"
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["compress", *(s.pass_ for s in stages)]}
    if recipe.model == base and "/" in base and not Path(recipe.model).exists():
        head["base_model"] = base
    stated = licence(folder)
    head |= {key: value for key, value in stated.items() if key.startswith("license")}
    said = {key: value for key, value in recipe.canonical().items() if key not in HOW_IT_IS_DONE}
    shown = recipe_yaml(Report(name=recipe.name, recipe=_without_folders(said)))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {base}, compressed",
        f"Made from `{base}` by `compress` {__version__} ({names}).",
        *_cost(report),
        "## How to load it",
        f"```python\nfrom transformers import {auto_class(architecture)}\n\n"
        f'model = {auto_class(architecture)}.from_pretrained("path/to/this/folder")\n```',
        "or, running straight from packed weights:",
        '```python\nimport compress\n\nmodel = compress.load("path/to/this/folder")\n```',
        "## How it was made",
        f"`compress run {recipe.name}.yaml` with this recipe:",
        f"```yaml\n{shown}```",
        "## Licence",
        _licence_words(base, stated),
    ]
    return "\n\n".join(parts) + "\n"


def rewrite_cards(output: Path, recipe: Recipe, report: Report, folder: Path) -> None:
    """Writes the cards of a run's folders (`model/`, `exports/<format>/`) once more, now that all is measured."""
    from compress.checkpoint import atomic_write_text

    exports = output / "exports"
    places = [output / "model", *(sorted(exports.iterdir()) if exports.is_dir() else [])]
    for place in places:
        if (place / "README.md").is_file() and (place / "config.json").is_file():
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            architecture = (config.get("architectures") or [""])[0]
            card = model_card(recipe, report.stages, folder, architecture, report)
            atomic_write_text(place / "README.md", card)


def _cost(report: Report | None) -> list[str]:
    """What came of it in a sentence and the table; where nothing was measured, that."""
    if report is None or not report.compressed:
        return ["What it cost in quality, and what it saves, is in the report beside this folder (`report.html`)."]
    kept = [name for name in report.compressed if not _of_the_machine(name)]
    told = [part for part in (size_words(report), *quality_words(report)) if part]
    sentence = "; ".join(told)
    original, compressed = (
        {n: f for n, f in all_.items() if n in kept} for all_ in (report.original, report.compressed)
    )
    said = {name: compared for name, compared in report.comparison.items() if name in kept}
    return [
        *([sentence[:1].upper() + sentence[1:] + "."] if sentence else []),
        "## What it cost",
        comparison_rows(original, compressed, said),
        *export_table(report),
        "Speed and peak memory depend on the machine: they are in the report beside this folder (`report.html`), with "
        "how everything was measured.",
    ]


def _of_the_machine(metric: str) -> bool:
    base = metric.partition("/")[0]
    return base.startswith(_OF_THE_MACHINE) or base.endswith("_per_second")


def base_name(model: str) -> str:
    """A hub id as it is; of a local path the last part."""
    return model if not model.startswith("/") else model.rstrip("/").rsplit("/", 1)[-1]


def _without_folders(value: Any) -> Any:
    """A recipe's values with local paths cut to their last part: where things lay is nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return base_name(value) if isinstance(value, str) else value


def auto_class(architecture: str) -> str:
    """The auto class of transformers that loads a model of this class."""
    for ending, name in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForImageClassification", "AutoModelForImageClassification"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
    ):
        if architecture.endswith(ending):
            return name
    return "AutoModel"


def licence(folder: Path) -> dict[str, Any]:
    """What the original's own card states of its licence: `license`, `license_name`, `license_link`, as far as it
    does."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        head = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    if not isinstance(head, dict):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: head[key] for key in keys if isinstance(head.get(key), str)}


def _licence_words(base: str, stated: dict[str, Any]) -> str:
    name = stated.get("license_name") or stated.get("license")
    start = f"The weights are derived from `{base}`, and its licence applies to them as well"
    if not name:
        return f"{start}. The folder they came from does not state it: see where `{base}` was published."
    link = f" ({stated['license_link']})" if stated.get("license_link") else ""
    return f"{start}: {name}{link}."
