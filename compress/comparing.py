"""`compress benchmark`: any models, made by us or by others, measured against the first of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from compress.data import Windows
from compress.errors import StartError
from compress.locating import locate
from compress.measure import benchmark as stage
from compress.measure.goals import check_goals
from compress.opening import read_config, read_tokenizer
from compress.preparation import benchmark_job, check_device, cut_texts
from compress.progress import Progress
from compress.recipe import Recipe
from compress.reports.report import Report


def benchmark(
    models: Sequence[str | Path],
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Measures models (folders, hub ids, `builtin:tiny`; `DIR` or `DIR/model`) against the first one.

    `overrides` are recipe keys as after `--set` (`data.evaluation=FILE`, `benchmark.tasks=[...]`); goals are checked on
    the second model. With `output` the report is written there as report.json, .md and .html.
    """
    if not models:
        raise StartError("compress benchmark needs models: the original first, then those to compare with it.")
    names = [str(model) for model in models]
    recipe = Recipe.from_dict({"model": names[0]}, name="benchmark", overrides=overrides, device=device)
    if recipe.benchmark is False:
        raise StartError("benchmark: false leaves nothing to measure.")
    folders = [str(locate(name)) for name in names]
    first = Path(folders[0])
    texts = cut_texts(
        recipe.data, ["evaluation"], read_tokenizer(first), read_config(first), recipe.base, recipe.seed, first
    )
    evaluation: Windows | None = texts.get("evaluation")
    job = benchmark_job(recipe, check_device(recipe.device), evaluation)
    with tempfile.TemporaryDirectory(prefix="compress-") as scratch:
        report = stage.benchmark(folders, job, Path(scratch), progress=progress)
    report.recipe = {**recipe.canonical(), "models": names}
    if report.compressed:
        report.goals = check_goals(recipe.benchmark.goals, report.original, report.compressed)
    if output is not None:
        report.write(output)
    return report
