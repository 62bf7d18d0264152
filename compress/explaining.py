"""What each pass of a run did: its damage block by block, and quality and size of the model it left."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.allocator import return_freed_memory
from compress.checkpoint import checkpoint_bytes
from compress.data import Windows
from compress.errors import CompressError
from compress.formats.folder import running_format
from compress.measure.damage import SIZE_LIMIT, Pairs, chosen, measure_damage, nothing, standard_error, text_loss
from compress.measure.runtimes import is_causal
from compress.measure.stage_speed import DECODE, stage_speed
from compress.passes.structural import StructuralPass
from compress.progress import Progress
from compress.registry import FORMATS
from compress.reports.report import Figure
from compress.workspace import FOLDER

if TYPE_CHECKING:
    from compress.model import ModelHandle
    from compress.passes.base import Pass
    from compress.preparation import Prepared
    from compress.recipe import Recipe

#: What the figures of a stage were measured in: the model under compression, before anything is written.
RUNTIME = "compress, before export"


@dataclass(frozen=True)
class Wanted:
    """Which of the two are to be measured, by the recipe or, where it leaves that open, by the model's size."""

    damage: bool
    stages: bool

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> Wanted:
        """`folder`: the original's. Nothing with `benchmark: false`."""
        if recipe.benchmark is False:
            return cls(False, False)
        small = sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= SIZE_LIMIT
        damage, stages = recipe.benchmark.damage, recipe.benchmark.stages
        return cls(small if damage is None else damage, small if stages is None else stages)

    def of_stage(self, recipe: Recipe, index: int) -> bool:
        """Whether figures of what the pass at `index` leaves are wanted: the last one's are the benchmark's."""
        changes = [step.changes_weights for step in recipe.passes[index:]]
        return self.stages and changes[0] and any(changes[1:])


def explain(
    pass_: Pass, index: int, model: ModelHandle, before: Callable[[], ModelHandle], ready: Prepared, recipe: Recipe,
    blocks: Sequence[dict[str, Any]], other_tokens: bool, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What is added to the record of the pass at `index`, which has just been run: `damage`, and `measurements` of the
    model it left, as far as they are wanted.

    `before` opens the model as the pass found it; `blocks` are the pass's own records; `other_tokens`: whether it left
    a model that reads other tokens.
    """
    wanted = Wanted.of(recipe, ready.folder)
    found: dict[str, Any] = {}
    if wanted.damage:
        found["damage"] = _damage(pass_, model, before, ready, blocks, other_tokens, progress)
    if wanted.of_stage(recipe, index):
        text = None if other_tokens or ready.kept_tokens is not None else ready.evaluation
        found["measurements"] = stage_figures(model, text, other_tokens or ready.kept_tokens is not None)
        if ready.job is not None and ready.job.wants("speed"):
            scratch = ready.output / FOLDER / "measure"
            speed = stage_speed(model, ready.folder, ready.job, recipe.runtime, scratch, progress)
            found["measurements"][DECODE] = speed.model_dump()
    gc.collect()  # the next pass's memory is measured from here on
    return_freed_memory()
    return found


def _damage(
    pass_: Pass, model: ModelHandle, before: Callable[[], ModelHandle], ready: Prepared,
    blocks: Sequence[dict[str, Any]], other_tokens: bool, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    if not pass_.changes_weights:
        return nothing("the pass changes no weight")
    if other_tokens:
        return nothing("the pass leaves a model that reads other tokens; its blocks are what they were")
    text = ready.calibration if ready.kept_tokens is not None else ready.evaluation or ready.calibration
    if text is None:
        return nothing("there is no text to measure it on (data.evaluation)")
    started = time.monotonic()
    try:
        was = before()
        if any(each.adapter is not None and not each.resident for each in (was, model)):
            return nothing("not measured: an adapter stands beside a model that is not kept in memory")
        with (
            progress.step(f"{pass_.name}: damage", total=len(was.block_list())) as step,
            attached(was),
            attached(model),
        ):
            found: dict[str, Any] = measure_damage(
                was, model, chosen(text), pairs_of(pass_, was, model, blocks), by_layer=not pass_.rescales, step=step
            )
    except CompressError as error:  # what this family does not allow is no reason to lose the run
        return nothing(f"not measured: {error}")
    if pass_.rescales:
        _take_layers(found, blocks)
    return found | {"seconds": round(time.monotonic() - started, 3)}


def attached(model: ModelHandle) -> Any:
    """A context in which the adapter beside the model, if there is one, is in it."""
    from contextlib import nullcontext

    return nullcontext() if model.adapter is None else model.adapter.attached(model.model)


def pairs_of(pass_: Pass, before: ModelHandle, after: ModelHandle, blocks: Sequence[dict[str, Any]]) -> Pairs:
    """What each block became: by the names in the records where a pass removes blocks, else by their place."""
    names = [block.name for block in before.block_list()]
    count = len(after.block_list())
    if len(names) == count:
        return list(range(count))
    kept = [str(record.get("name")) for record in blocks]
    if isinstance(pass_, StructuralPass) and len(kept) == count and set(kept) <= set(names):
        return [kept.index(name) if name in kept else None for name in names]
    return f"there are {count} blocks and were {len(names)}, and none of them is one of those"


def _take_layers(found: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> None:
    """Layers that were rescaled cannot be held against what they were: the errors that the pass states take the place
    of measured ones."""
    from compress.measure.damage import worst

    stated = {str(record.get("name")): record.get("layers") or {} for record in blocks}
    for block in found["blocks"]:
        layers = {name: entry.get("loss") for name, entry in stated.get(block["name"], {}).items()}
        block["layers"] = {name: loss for name, loss in layers.items() if isinstance(loss, int | float)}
    found["worst"] = worst(found["blocks"])
    found["layers_by"] = "the pass: it moves scales between layers, so that only it can say what it lost in each"


def stage_figures(model: ModelHandle, text: Windows | None, other_tokens: bool = False) -> dict[str, Any]:
    """Perplexity on the evaluation text, and the bytes of the model if it were written now."""
    contents = model.contents()
    form = FORMATS.get(running_format(contents))()
    size = checkpoint_bytes(form.stored(contents))
    if model.adapter is not None:
        size += sum(tensor.numel() * tensor.element_size() for tensor in model.adapter.tensors.values())
    weights = Figure(value=size, unit="B", higher_is_better=False, runtime=RUNTIME)
    return {"perplexity": _perplexity(model, text, other_tokens).model_dump(), "weights_bytes": weights.model_dump()}


def _perplexity(model: ModelHandle, text: Windows | None, other_tokens: bool) -> Figure:
    if not is_causal({"architectures": [type(model.model).__name__]}):
        return Figure(value=None, reason="the model has no head that gives next-token probabilities")
    if other_tokens:
        return Figure(value=None, reason="the model reads other tokens than the original")
    if text is None:
        return Figure(value=None, reason="no evaluation text was given (data.evaluation)")
    try:
        with attached(model):
            nll, tokens = text_loss(model, text)
    except CompressError as error:
        return Figure(value=None, reason=f"not measured: {error}")
    # As the metric has it, which is not asked here: what it imports would count as memory of the passes that follow.
    mean = sum(nll) / sum(tokens)
    value = math.exp(mean) if mean < 700 else math.inf
    stderr = standard_error(torch.tensor(nll).double(), torch.tensor(tokens).double())
    return Figure(
        value=value, unit="perplexity", higher_is_better=False, stderr=None if stderr is None else value * stderr,
        n=len(nll), runtime=RUNTIME, detail={"nats_per_token": mean, "tokens": int(sum(tokens))},
    )  # fmt: skip
