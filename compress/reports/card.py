"""The model card that a written folder carries as its README.md."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from compress import __version__
from compress.recipe import Recipe
from compress.reports.report import Stage


def model_card(recipe: Recipe, stages: Sequence[Stage]) -> str:
    """What the folder holds and how it was made. Figures are in the run's report, which is made after it."""
    base = recipe.model if not recipe.model.startswith("/") else recipe.model.rstrip("/").rsplit("/", 1)[-1]
    steps = [{stage.pass_: {k: v for k, v in stage.options.items() if v is not None}} for stage in stages]
    shown = yaml.safe_dump({"model": base, "passes": steps, "seed": recipe.seed}, sort_keys=False)
    names = ", ".join(stage.pass_ for stage in stages) or "no pass"
    head = yaml.safe_dump({"library_name": "transformers", "tags": ["compress", *(s.pass_ for s in stages)]})
    return (
        f"---\n{head}---\n\n# {base}, compressed\n\n"
        f"Made from `{base}` by `compress` {__version__} ({names}). Load it with transformers:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```\n\n'
        "or, running straight from packed weights, with `compress.load`. What it cost in quality, and what it saves, "
        "is in the report beside this folder (`report.html`).\n\n"
        f"## How it was made\n\n```yaml\n{shown}```\n"
    )
