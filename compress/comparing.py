"""`compress benchmark`: any models, made by us or by others, measured against the first of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from compress.checkpoint import disk_errors
from compress.data import Windows
from compress.errors import CompressError, StartError
from compress.locating import locate
from compress.measure import benchmark as stage
from compress.measure.goals import check_goals
from compress.measure.jobs import cache_folder, key_of
from compress.opening import read_config, read_tokenizer
from compress.preparation import benchmark_job, check_device, cut_texts
from compress.progress import Progress
from compress.recipe import Recipe
from compress.reports.report import Report
from compress.workspace import FOLDER

#: What is timed where nothing else is said: unlike a run, the command has nothing else to do.
SPEEDS = {"batches": [1, 4, 16], "prompt_tokens": [128, 1024], "setting_seconds": 120}


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
    the second model. Speeds are taken in all of `SPEEDS` that fits. With `output` the report is written there as
    report.json, .md and .html.
    """
    if not models:
        raise StartError("compress benchmark needs models: the original first, then those to compare with it.")
    names = [str(model) for model in models]
    values = {"model": names[0], "benchmark": dict(SPEEDS)}
    recipe = Recipe.from_dict(values, name="benchmark", overrides=overrides, device=device)
    if recipe.benchmark is False:
        raise StartError("benchmark: false leaves nothing to measure.")
    folders = [str(locate(name)) for name in names]
    for folder in folders:
        read_config(Path(folder))  # refuses what is no model, before anything is measured
    first = Path(folders[0])
    texts = cut_texts(
        recipe.data, ["evaluation"], read_tokenizer(first), read_config(first), recipe.base, recipe.seed, first
    )
    evaluation: Windows | None = texts.get("evaluation")
    job = benchmark_job(recipe, check_device(recipe.device), evaluation)
    with _workdir(output, recipe, folders) as scratch:
        report = stage.benchmark(folders, job, scratch, progress=progress, kept_in=cache_folder())
    report.recipe = {**recipe.canonical(), "models": names}
    if report.compressed:
        report.goals = check_goals(recipe.benchmark.goals, report.original, report.compressed)
    if output is not None:
        report.write(output)
    return report


@contextmanager
def _workdir(output: str | Path | None, recipe: Recipe, folders: Sequence[str]) -> Iterator[Path]:
    """Where finished measurements wait for the rest: what is interrupted finds them there when it is run again.

    In the output folder, or else in the cache, by what is measured; gone when all is done.
    """
    if output is not None:
        folder = Path(output) / FOLDER / "measure"
    else:
        folder = cache_folder().with_name("benchmarks") / key_of(recipe.canonical(), list(folders))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        where = f"in {output}" if output is not None else "on this machine"
        raise CompressError(f"The same benchmark is running {where} already. Wait for it.") from None
    with lock:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        if output is not None:
            with suppress(OSError):  # it may be that of a run, which holds more
                folder.parent.rmdir()
