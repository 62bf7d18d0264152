"""`compress run`: from a recipe to a smaller model and a report of what it cost."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from compress.corrections import put_beside
from compress.errors import StartError
from compress.explaining import explain
from compress.fewer_tokens import keep_tokens, renumber_generation
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.measure.benchmark import generations, measure_compressed, measure_original
from compress.measure.comparison import compare, original_figures
from compress.measure.environment import environment
from compress.measure.export_check import unverified, verify_export
from compress.measure.flips import flips, worst
from compress.measure.goals import check_goals
from compress.measure.jobs import cache_folder
from compress.measure.memory import forget_peak, peak_resident_bytes, resident_bytes
from compress.measure.verification import verify
from compress.model import ModelHandle
from compress.opening import check_weights, open_model
from compress.passes.base import Context, Pass, PassResult
from compress.preparation import Prepared, prepare, recipe_texts, retokenised
from compress.processes import meet, process_count, process_rank, wait_for
from compress.progress import Progress
from compress.recipe import Recipe
from compress.reports.card import model_card, rewrite_cards
from compress.reports.report import Export, Report, Stage, Verified, finite
from compress.reshaping import take_shape
from compress.stream import stream_outputs
from compress.workspace import FOLDER, Guest, Workspace
from compress.workspace import Stage as StageFiles

#: Before the word of a start: the file that tells the other processes that a pass has begun to train.
STARTED = "started."

#: What a report of a pruned model has to say, while no format here leaves zeros out and no kernel passes over them.
ZEROS_NOTE = (
    "The weights that are zero are stored and multiplied like any other: on this machine they bring no speed and save "
    "no space. Runtimes with kernels for sparse weights (2:4 on GPUs) can make use of them."
)


class Written(BaseModel):
    """What is on disk once all passes are done: their records, the checks of what was written, notes for the report."""

    stages: list[Stage]
    verified: Verified
    exports: list[Export] = []
    notes: list[str]


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path, *, fresh: bool = False, progress: Progress | None = None
) -> Report:
    """Applies a recipe (a `Recipe`, its mapping, or the path of its file) and returns the report it wrote.

    Continues where a killed run of the same recipe stopped; `fresh` starts over. Raises a `CompressError`, whose
    message says what to do; a missed goal is no error (`report.goals_met`).
    """
    recipe = as_recipe(recipe)
    progress = progress or Progress()
    ready = prepare(recipe, fresh=fresh)
    if not fresh and (ready.output / "report.json").exists():
        progress.note(f"{ready.output} is finished already; give --fresh to do it again.")
        return Report.read(ready.output)
    if process_rank():
        return take_part(recipe, ready)
    check_weights(ready.folder)
    with Workspace.open(ready.output, recipe, ready.fingerprints, fresh) as work:
        work.start = meet(ready.device) if process_count() > 1 else ""
        scratch = work.hidden / "measure"
        original = None
        if ready.job is not None:
            original = measure_original(
                str(ready.folder), job=ready.job, workdir=scratch, progress=progress, kept_in=cache_folder()
            )
        report = _report(recipe, ready, _compress(recipe, ready, work, progress))
        if original is not None and ready.job is not None:
            found = measure_compressed(
                ready.output, str(ready.folder), original, job=ready.job, workdir=scratch, progress=progress
            )
            report.original = original_figures(original, found)
            report.compressed = found.figures
            report.comparison = compare(original, found, seed=recipe.seed)
            report.generations = generations(ready.job, original, found)
            report.flips, report.worst = flips(original, found), worst(found)
            report.goals = check_goals(_goals(recipe), report.original, report.compressed)
            report.notes += [*original.notes, *found.notes]
            rewrite_cards(ready.output, recipe, report, ready.folder)
        report.write(ready.output)
        work.remove_intermediate()
    return report


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A `Recipe` from whatever describes one."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else Recipe.load(recipe)


def _goals(recipe: Recipe) -> Mapping[str, Any]:
    return {} if recipe.benchmark is False else recipe.benchmark.goals


def _compress(recipe: Recipe, ready: Prepared, work: Workspace, progress: Progress) -> Written:
    """All passes, each continued where it was, then the export and its verification; nothing of the model stays."""
    exported = work.hidden / "exported.json"
    if exported.exists():
        return Written(**work.once("exported", dict))
    gc.collect()
    bare = resident_bytes()  # by now everything is imported that a run imports
    model = open_model(ready.folder, dtype=recipe.dtype, device=ready.device, residency=recipe.residency)
    stages = []
    latest = None  # the stage that holds the blocks as they now are
    for index, pass_ in enumerate(recipe.passes):
        pass_ = pass_.model_copy(update=ready.plan.options_of(index))
        stages.append(_apply(pass_, index, model, ready, recipe, work, bare, progress))
        ready = _after(work.stage(index, pass_.name), model, ready, recipe)
        if pass_.changes_weights:
            if latest is not None and model.resident:
                latest.drop_blocks()
            latest = work.stage(index, pass_.name)
    with progress.step("writing and verifying", total=2) as step:
        notes, exports = _export(model, recipe, ready, stages)
        step.advance("written")
        # A text at a time, as the reloading process runs them: rounded inputs turn the last bit of a sum into a step,
        # and LLM.int8 rounds by all the tokens that come together.
        expected = base = stream_outputs(model, ready.probe, tokens_per_batch=1)  # exports are of the base alone
        if model.adapter is not None and not model.resident:
            expected = stream_outputs(model, ready.probe, 1, partial(put_beside, adapter=model.adapter))
        elif model.adapter is not None:
            with model.adapter.attached(model.model):
                expected = stream_outputs(model, ready.probe, tokens_per_batch=1)
        dtype = model.dtype
        del model
        gc.collect()
        folder = ready.output / "model"
        verified = verify(
            folder, ready.probe.tokens, expected, dtype=dtype, workdir=work.hidden / "measure",
            device=ready.device, threads=torch.get_num_threads(),
        )  # fmt: skip
        exports = [
            verify_export(
                ready.output, export, ready.probe.tokens, base, ready.tokenizer,
                workdir=work.hidden / "measure", threads=torch.get_num_threads(),
            )
            for export in exports
        ]  # fmt: skip
        step.advance("verified")
    written = Written(stages=stages, verified=verified, exports=exports, notes=notes)
    work.once("exported", lambda: written.model_dump(by_alias=True))
    return written


def _apply(
    pass_: Pass, index: int, model: ModelHandle, ready: Prepared, recipe: Recipe, work: Workspace, bare: int,
    progress: Progress,
) -> Stage:  # fmt: skip
    """One pass, or what is left of it."""
    stage = work.stage(index, pass_.name)
    if stage.complete:
        _reshape(pass_, stage, model)
        if model.resident and pass_.changes_weights and stage.holds_blocks():
            for block in model.block_list():
                block.restore(*stage.read(block, model.device))
        outside = stage.read_outside(model.device)
        if outside is not None:
            model.restore_outside(*outside)
        kept = stage.read_kept_tokens()
        if kept is not None:
            renumber_generation(model.model, kept)
        result = stage.result()
        if pass_.changes_weights:
            model.adapter = _kept_adapter(stage) if pass_.leaves == "adapter" else None
    else:
        forget_peak()
        started = time.monotonic()
        if work.start and pass_.needs_training:
            (stage.folder / f"{STARTED}{work.start}").touch()
        context = _context(pass_, model, ready, recipe, stage, progress)
        done = pass_.run(model, context)
        result = _record(pass_, done, time.monotonic() - started, peak_resident_bytes() - bare, ready, index)
        if pass_.changes_weights:
            model.latest = stage
        told = explain(
            pass_, index, model, partial(_as_found, index, ready, recipe, work), ready, recipe, done.blocks,
            stage.read_kept_tokens() is not None, progress,
        )  # fmt: skip
        result["measurements"] |= told.pop("measurements", {})
        result = finite(result | told)
        stage.finish(result)
    if pass_.changes_weights:
        model.latest = stage
    model.record(pass_)
    if model.adapter is None:
        model.states.discard("adapter")
    return Stage(**result)


def _kept_adapter(stage: Any) -> Any:
    from compress.adapters import Adapter

    return Adapter.read(stage.folder / "adapter")


def _as_found(index: int, ready: Prepared, recipe: Recipe, work: Workspace) -> ModelHandle:
    """The model as the pass at `index` found it, opened anew: a block at a time where its family allows that, and no
    adapter stands beside it, which only goes with a whole model."""
    done = [(pass_, work.stage(i, pass_.name)) for i, pass_ in enumerate(recipe.passes[:index])]
    changed = [pass_.leaves for pass_, _ in done if pass_.changes_weights]
    whole = changed[-1:] == ["adapter"] and recipe.residency != "disk"
    try:
        model = open_model(
            ready.folder, dtype=recipe.dtype, device=ready.device, residency="memory" if whole else "disk"
        )
        model.load(model.block_list()[0])
        model.release(model.block_list()[0])
    except StartError:  # its tensors have other names, or are merged, in the files
        if recipe.residency == "disk":
            raise
        model = open_model(ready.folder, dtype=recipe.dtype, device=ready.device)
    _restore(model, done)
    return model


def take_part(recipe: Recipe, ready: Prepared) -> Report:
    """What a process does that is not the first: it trains along, and writes nothing."""
    start = meet(ready.device)
    model = open_model(ready.folder, dtype=recipe.dtype, device=ready.device, residency=recipe.residency)
    stages = [
        Guest(ready.output / FOLDER / "stages" / f"{index:02d}-{pass_.name}")
        for index, pass_ in enumerate(recipe.passes)
    ]
    for index, pass_ in enumerate(recipe.passes):
        pass_ = pass_.model_copy(update=ready.plan.options_of(index))
        begun = stages[index].folder / f"{STARTED}{start}"
        if pass_.needs_training and wait_for(begun, stages[index].folder / "complete.json") == begun:
            _restore(model, list(zip(recipe.passes, stages, strict=True))[:index])
            now = ready
            for stage in stages[:index]:
                now = _after(stage, model, now, recipe)
            pass_.run(model, _context(pass_, model, now, recipe, stages[index], Progress()))
    return Report(name=recipe.name)


def _reshape(pass_: Pass, stage: Any, model: ModelHandle) -> None:
    """Gives the model the shape that the pass left it in."""
    config = stage.read_config(model.config)
    if config is not None:
        take_shape(model, config)
    elif pass_.structural:
        pass_.reshape(model)


def _restore(model: ModelHandle, done: Sequence[tuple[Pass, StageFiles]]) -> None:
    """The model as these passes, all of them complete, have left it; with the blocks on disk, they stay there."""
    model.history, model.states, model.adapter = [], {"dense"}, None
    changing = [stage for pass_, stage in done if pass_.changes_weights]
    for pass_, stage in done:
        _reshape(pass_, stage, model)
        outside = stage.read_outside(model.device)
        if outside is not None:
            model.restore_outside(*outside)
        if pass_.changes_weights:
            model.adapter = _kept_adapter(stage) if pass_.leaves == "adapter" else None
        model.record(pass_)
    if not model.resident:
        model.latest = changing[-1] if changing else None
        return
    for block in model.blocks() if changing else ():
        block.restore(*changing[-1].read(block, model.device))


def _context(
    pass_: Pass, model: ModelHandle, ready: Prepared, recipe: Recipe, stage: Any, progress: Progress
) -> Context:
    return Context(
        # a pass that trains may round anew what it merged: on this text, if there is any
        calibration=ready.calibration if pass_.takes_calibration or pass_.needs_training else None,
        training=ready.training if pass_.needs_training else None,
        original=(lambda: _original(ready, recipe)) if pass_.needs_teacher else None,
        # with fewer tokens, the original is no longer what its folder holds
        original_folder=ready.folder if pass_.needs_teacher and ready.kept_tokens is None else None,
        tokenizer=ready.tokenizer,
        texts=partial(recipe_texts, recipe, ready.tokenizer, model.context_length),
        tasks=ready.job.items if ready.job is not None else {},
        seed=recipe.seed,
        stage=stage,
        progress=progress,
        min_coverage=recipe.min_coverage,
    )


def _after(stage: StageFiles, model: ModelHandle, ready: Prepared, recipe: Recipe) -> Prepared:
    """What the passes after this one work with: other texts, where it left fewer tokens."""
    kept = stage.read_kept_tokens()
    if kept is None or ready.tokenizer is None:
        return ready
    return retokenised(ready, recipe, model.config, stage.read_tokenizer(ready.tokenizer), kept)


def _original(ready: Prepared, recipe: Recipe) -> PreTrainedModel:
    """The original model; of the tokens, those that are left, so that its outputs are for the same ids."""
    handle = open_model(ready.folder, dtype=recipe.dtype, device=ready.device)
    if ready.kept_tokens is not None:
        keep_tokens(handle, ready.kept_tokens)
    return handle.model.requires_grad_(False)


def _record(pass_: Pass, done: PassResult, seconds: float, peak: int, ready: Prepared, index: int) -> dict[str, Any]:
    named: dict[str, Any] = {"pass": pass_.name}
    stage = Stage(
        **named,
        options=pass_.options(),
        seconds=round(seconds, 3),
        predicted=ready.plan.of_pass(index),
        peak_memory_bytes=peak,
        coverage=done.coverage,
        blocks=done.blocks,
        measurements=done.measurements,
    )
    return stage.model_dump(by_alias=True)


def _export(model: ModelHandle, recipe: Recipe, ready: Prepared, stages: list[Stage]) -> tuple[list[str], list[Export]]:
    """Writes `model/`, `adapter/` where there is one, and `exports/<format>/`. Sentences for the report, and those
    exports that an engine of their own is to check."""
    shutil.rmtree(ready.output / "adapter", ignore_errors=True)
    if model.adapter is not None:
        model.adapter.save(ready.output / "adapter")
    card = model_card(recipe, stages, ready.folder, type(model.model).__name__)
    contents = model.contents(ready.tokenizer, card=card)
    contents = replace(contents, runtime=recipe.runtime.model_dump(exclude_defaults=True))
    write_model_folder(ready.output / "model", contents)
    formats = list(recipe.export)
    note = packed_export_note(contents)
    if note and "packed" not in formats:
        formats.append("packed")
    exports = []
    for name in formats:
        if name != default_format(contents):
            folder = write_model_folder(ready.output / "exports" / name, contents, name)
            exports += unverified(name, folder, contents)
    notes = [said for said in (note, ZEROS_NOTE if "sparse" in model.states else None) if said]
    if model.adapter is not None:
        notes.append(
            "adapter/ stands beside model/, which is its base: the figures, and the check of what was written, are of "
            "the two together, as plain peft loads them. exports/ hold the base alone."
        )
    return notes, exports


def _report(recipe: Recipe, ready: Prepared, written: Written) -> Report:
    threads = torch.get_num_threads()
    texts = {"calibration": ready.calibration, "training": ready.training, "evaluation": ready.evaluation}
    data = {
        role: {"source": w.source, "fingerprint": w.fingerprint, "windows": len(w), "length": w.length, **w.counts}
        for role, w in texts.items()
        if w is not None
    }
    return Report(
        name=recipe.name,
        recipe=recipe.canonical(),
        digest=recipe.digest(),
        environment={**environment(threads=threads, device=ready.device), "data": data, "model": ready.fingerprints},
        stages=written.stages,
        verified=written.verified,
        exports=written.exports,
        notes=[*ready.notes, *written.notes],
    )
