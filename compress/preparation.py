"""Everything a run needs to know before it touches a weight or the output folder, and every refusal that needs none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from compress.data import (
    DEFAULT_LENGTH,
    Windows,
    fingerprint_source,
    items,
    overlap,
    read_texts,
    token_windows,
    windows_from,
)
from compress.errors import CompressError, StartError
from compress.images import image_windows, random_images, read_processor, reads_images
from compress.locating import classes_of, context_length, locate, one_class
from compress.measure.measurements import BenchmarkJob, SpeedSettings
from compress.opening import read_config, read_tokenizer, refuse_quantized
from compress.planning import Plan, plan, refuse
from compress.recipe import ROLES, Data, Recipe, Role
from compress.recipe.check import of_harness
from compress.registry import FORMATS, METRICS
from compress.text import SKIP_HINT
from compress.workspace import Workspace, fingerprint_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: What the exported folder is verified on: so many windows of so many tokens.
PROBE_WINDOWS, PROBE_LENGTH = 2, 64


@dataclass(frozen=True)
class Prepared:
    """A recipe with its model found, its texts cut, its cost predicted. `probe` is what the export is verified on;
    `job` is None where nothing is to be benchmarked; `notes` are sentences for the report."""

    folder: Path
    output: Path
    device: str
    tokenizer: PreTrainedTokenizerBase | None
    calibration: Windows | None
    training: Windows | None
    evaluation: Windows | None
    probe: Windows
    job: BenchmarkJob | None
    plan: Plan
    fingerprints: dict[str, str]
    notes: tuple[str, ...] = ()
    #: For each id of the tokenizer as it now is, the one of the original; None where they are the same.
    kept_tokens: list[int] | None = None


def prepare(recipe: Recipe, *, fresh: bool = False) -> Prepared:
    """Finds the model, reads the texts, plans, and refuses what cannot be. Writes nothing."""
    device = check_device(recipe.device)
    folder = locate(recipe.model)
    config = read_config(folder)
    refuse_quantized(config, folder)
    predicted = plan(recipe)
    refuse(predicted, recipe)
    tokenizer = read_processor(folder, needed=False) if reads_images(config) else read_tokenizer(folder)
    for step in recipe.passes:
        step.check_tokenizer(tokenizer)
    for name in recipe.export:
        if reason := FORMATS.get(name)().refuses_tokenizer(tokenizer, config):
            raise StartError(f"export: {reason}")
    texts = _texts(recipe, tokenizer, config, folder)
    calibration, evaluation, training = (texts.get(role) for role in ROLES)
    fingerprints = {"model": fingerprint_folder(folder)}
    fingerprints |= {f"data.{role}": windows.fingerprint for role, windows in texts.items()}
    fingerprints |= _fingerprints_of_documents(recipe)
    output = Path(recipe.output or f"runs/{recipe.name}")
    Workspace.check(output, recipe, fingerprints, fresh)
    job = None if recipe.benchmark is False else benchmark_job(recipe, device, evaluation)
    notes = []
    if calibration is not None and evaluation is not None and (share := overlap(calibration, evaluation)):
        notes.append(f"{share:.0%} of the evaluation text is calibration text too: the quality figures flatter.")
    if training is not None and evaluation is not None and (share := overlap(training, evaluation)):
        raise StartError(
            f"data.training: {share:.0%} of the evaluation text is training text too. What is measured must not have "
            "been learnt: use other text."
        )
    if training is not None and recipe.data.training is None:
        notes.append("There is no data.training, so the calibration text was trained on: it is little.")
    notes += [note for role, windows in texts.items() if (note := _left_out(role, windows))]
    probe = _probe(evaluation or calibration, config, recipe.seed)
    return Prepared(
        folder, output, device, tokenizer, calibration, training, evaluation, probe, job, predicted, fingerprints,
        tuple(notes),
    )  # fmt: skip


def _left_out(role: str, windows: Windows) -> str | None:
    """A sentence on what of a text did not make it into its windows whole, or None."""
    words = {
        "cut": "longer than a window and cut",
        "left out": "left out, since nothing to learn was left of them",
        "skipped": "malformed and skipped",
    }
    said = [f"{windows.counts[key]} {text}" for key, text in words.items() if windows.counts.get(key)]
    return f"data.{role}: of its items, {'; '.join(said)}." if said else None


def retokenised(
    ready: Prepared, recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kept: list[int]
) -> Prepared:
    """The same after a pass that left the tokens `kept` (for each new id, the one before it): the texts of later passes
    and the probe are cut by the new tokenizer. The evaluation text and the job stay the original's."""
    texts = _texts(recipe.model_copy(update={"benchmark": False}), tokenizer, config, ready.folder)
    probe = texts.get("calibration")
    if probe is None and ready.evaluation is not None:
        texts_of = cut_texts(recipe.data, ["evaluation"], tokenizer, config, recipe.base, recipe.seed, ready.folder)
        probe = texts_of["evaluation"]
    before = ready.kept_tokens
    return replace(
        ready,
        tokenizer=tokenizer,
        calibration=texts.get("calibration"),
        training=texts.get("training"),
        probe=_probe(probe, config, recipe.seed),
        kept_tokens=kept if before is None else [before[index] for index in kept],
    )


def recipe_texts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, context: int | None, source: str | None
) -> Iterator[str]:
    """The documents of a source; None: those of the recipe's calibration text and training text."""
    if source is not None:
        yield from read_texts(source, tokenizer, recipe.base, seed=recipe.seed)
        return
    for role, entry in (("calibration", recipe.data.calibration), ("training", recipe.data.training)):
        if entry is not None:
            length = entry.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
            seed = recipe.seed if entry.seed is None else entry.seed
            tokens = (entry.samples or 128) * length
            yield from read_texts(entry.source, tokenizer, recipe.base, cast(Role, role), seed, tokens)


def _fingerprints_of_documents(recipe: Recipe) -> dict[str, str]:
    """What tells the texts that a pass reads as a whole from others: the content of their files."""
    found: dict[str, str] = {}
    for index, step in enumerate(recipe.passes):
        named = {f"passes.{index}.{step.name}.{option}": getattr(step, option) for option in step.sources}
        if step.needs_documents and step.takes_calibration and recipe.data.training is not None:
            named["the file of data.training"] = recipe.data.training.source
        found |= {place: fingerprint_source(source, recipe.base) for place, source in named.items() if source}
    return found


def check_device(device: str) -> str:
    """`auto` resolved; StartError where CUDA is asked for and there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError("device: cuda is asked for, and torch sees no GPU here. Use device: cpu or auto.")
    return device


def _texts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig, folder: Path
) -> dict[str, Windows]:
    """The windows of each text that this recipe makes use of."""
    wanted: list[Role] = []
    trains = any(pass_.needs_training for pass_ in recipe.passes)
    instead = trains and recipe.data.training is None
    if instead or any(pass_.takes_calibration for pass_ in recipe.passes):
        wanted.append("calibration")
    if trains:
        wanted.append("training")
    if recipe.benchmark is not False:
        wanted.append("evaluation")
    found = cut_texts(recipe.data, wanted, tokenizer, config, recipe.base, recipe.seed, folder)
    return found | {"training": found["calibration"]} if instead else found


def cut_texts(
    data: Data, roles: list[Role], tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig, base: Path,
    seed: int, folder: Path,
) -> dict[str, Windows]:  # fmt: skip
    """The windows of those roles that `data` has an entry for; `folder` is the model's."""
    found: dict[str, Windows] = {}
    for role in roles:
        entry = getattr(data, role)
        if entry is None:
            continue
        if reads_images(config) or (base / entry.source).is_dir():
            found[role] = image_windows(entry, role, folder, config, seed)
            continue
        if tokenizer is None:
            raise StartError(f"data.{role}: the model's folder holds no tokenizer, so text cannot be cut into tokens.")
        labels = classes_of(config) if role == "training" or (role == "evaluation" and one_class(config)) else None
        found[role] = token_windows(entry, role, tokenizer, context_length(config), base, seed, labels)
    return found


def benchmark_job(recipe: Recipe, device: str, evaluation: Windows | None) -> BenchmarkJob:
    """What the recipe's `benchmark` asks to be measured."""
    asked = recipe.benchmark
    assert asked is not False
    for name in asked.metrics or ():
        METRICS.get(name)  # one of the hub is loaded before there is work to lose
    by_area, tasks, state = benchmark_tasks(recipe)
    labels = None if evaluation is None else evaluation.labels
    names = classes_of(read_config(locate(recipe.model))) if labels is not None else None
    return BenchmarkJob(
        windows=None if evaluation is None else evaluation.tokens,
        mask=None if evaluation is None else evaluation.mask,
        items=by_area,
        labels=labels,
        class_names={index: name for name, index in (names or {}).items()},
        tasks=tasks,
        tasks_state=state,
        limit=asked.limit,
        metrics=asked.metrics,
        prompts=asked.prompts,
        device=device,
        threads=torch.get_num_threads(),
        dtype=recipe.dtype,
        seed=recipe.seed,
        speed=SpeedSettings(
            batches=asked.batches, prompts=asked.prompt_tokens, new_tokens=asked.new_tokens, rounds=asked.rounds,
            warmup=asked.warmup, most_seconds=asked.setting_seconds,
        ),
        runtimes=asked.runtimes,
        watts=asked.watts,
    )  # fmt: skip


def benchmark_tasks(recipe: Recipe) -> tuple[dict[str, list[dict[str, Any]]], tuple[str, ...], str]:
    """The recipe's own test items by area; the tasks that lm-eval runs; and what names the content of these.

    StartError, before there is work to lose, for a file that is wrong, a task without items, data that would have to
    come from a hub that cannot be reached, and areas of one name in two places.
    """
    assert recipe.benchmark is not False
    limit = recipe.benchmark.limit
    by_area: dict[str, list[dict[str, Any]]] = {}
    owner: dict[str, str] = {}
    harness = [task for task in recipe.benchmark.tasks if of_harness(task)]
    for task in recipe.benchmark.tasks:
        if task in harness:
            continue
        try:
            found = items(task, recipe.base)
        except CompressError as error:
            raise StartError(f"benchmark.tasks: {str(error).removesuffix(SKIP_HINT)}") from error
        for item in found:
            area = item["area"]
            _claim(owner, area, task)
            if limit is None or len(by_area.get(area, ())) < limit:
                by_area.setdefault(area, []).append(item)
    if not harness:
        return by_area, (), ""
    from compress.measure.harness_tasks import fingerprint_tasks, load_tasks

    loaded = load_tasks(harness)
    for area in loaded:
        _claim(owner, area, "lm-eval's tasks")
    return by_area, tuple(harness), fingerprint_tasks(loaded)


def _claim(owner: dict[str, str], area: str, task: str) -> None:
    if owner.setdefault(area, task) != task:
        raise StartError(
            f"benchmark.tasks: {owner[area]} and {task} both have items of the area {area}: give one of them another "
            "area, or leave one out."
        )


def _probe(text: Windows | None, config: PretrainedConfig, seed: int) -> Windows:
    """A few short windows of the recipe's text, or tokens drawn by the seed where it has none."""
    if reads_images(config):
        return random_images(config, PROBE_WINDOWS, seed)
    if text is not None and text.mask is None:
        tokens = text.tokens[:PROBE_WINDOWS, :PROBE_LENGTH]
    else:
        length = min(PROBE_LENGTH, context_length(config) or PROBE_LENGTH)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = config.get_text_config().vocab_size
        tokens = torch.randint(0, vocabulary, (PROBE_WINDOWS, length), generator=generator)
    return windows_from(tokens, None)
