"""What a recipe will cost, from the model's config alone: no weight is read.

The recipe is played through on the model's shape (`compress.shapes`). Each step gets the memory that it takes, as a sum
of stated parts (`compress.costs`), the disk in use, and the size of the model if it were written then, which is exact.
Memory is the peak of resident memory above that of a process that has imported torch and transformers, nothing more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from compress import costs
from compress.checkpoint import checkpoint_bytes
from compress.errors import StartError
from compress.explaining import Wanted
from compress.formats.base import Format
from compress.formats.folder import default_format, packed_export_note, running_format
from compress.images import patches_of, pixel_bytes, reads_images
from compress.loading import stored_dtype
from compress.locating import locate
from compress.measure.running import SPEEDS
from compress.opening import read_config, refuse_quantized, resolve_dtype
from compress.passes.base import BlockPass, Pass
from compress.passes.structural import StructuralPass
from compress.registry import FORMATS, RUNTIMES
from compress.shapes import ModelShape
from compress.workspace import free_bytes

if TYPE_CHECKING:
    from compress.recipe import DataEntry, Recipe

#: Config, card, records of blocks and of measurements: what is written beside weights and tokenizers.
SMALL_FILES_BYTES = 1 << 20
LOAD, BEFORE, EXPORT, AFTER = "load", "benchmark original", "export", "benchmark compressed"
#: After the name of a pass: what it did, and how fast the model is that it leaves.
DAMAGE, SPEED = "damage", "speed"


@dataclass(frozen=True)
class PlanStep:
    """One step of a run. Bytes: `memory` at its peak, `disk` in use by the run at its peak, `weights` of all
    `*.safetensors` if the model were written as it stands after the step. `parts` are what memory is the sum of;
    `options` of a pass are those that were chosen so that it fits, `place` its place in the recipe (None: no pass)."""

    name: str
    memory_bytes: int
    disk_bytes: int
    weights_bytes: int
    note: str = ""
    parts: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    place: int | None = None


@dataclass(frozen=True)
class Plan:
    """All steps, the peaks over them, the size of what comes out, and what this machine has to spare."""

    steps: tuple[PlanStep, ...]
    memory_bytes: int
    disk_bytes: int
    weights_bytes: int
    available_memory_bytes: int
    available_disk_bytes: int

    def of_pass(self, index: int) -> dict[str, int]:
        """What the report sets beside the measured figures of the pass at `index` in the recipe."""
        step = self._step_of(index)
        return {
            "peak_memory_bytes": step.memory_bytes,
            "disk_bytes": step.disk_bytes,
            "weights_bytes": step.weights_bytes,
        }

    def options_of(self, index: int) -> dict[str, Any]:
        """The options of the pass at `index` in the recipe that were chosen so that it fits the recipe's `memory`."""
        return self._step_of(index).options

    def _step_of(self, index: int) -> PlanStep:
        return next(step for step in self.steps if step.place == index)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def rows(self) -> list[tuple[str, int, int, int, str]]:
        """Step; memory, disk and weights in bytes; note: for a table."""
        return [(s.name, s.memory_bytes, s.disk_bytes, s.weights_bytes, s.note) for s in self.steps]


def plan(recipe: Recipe) -> Plan:
    """Plays a recipe through on its model's shape. Writes nothing.

    StartError for what shapes alone forbid: a group or pattern that does not divide a layer's columns, targets that
    select no layer, a format that cannot hold the model.
    """
    folder = locate(recipe.model)
    config = read_config(folder)
    refuse_quantized(config, folder)
    dtype = resolve_dtype(recipe.dtype, config)
    shape = ModelShape.of(config, dtype)
    beside = sum(f.stat().st_size for f in folder.iterdir() if f.suffix != ".safetensors" and f.is_file())
    steps = _Walkthrough(recipe, shape, stored_dtype(config), beside, Wanted.of(recipe, folder)).steps()
    return Plan(
        steps=tuple(steps),
        memory_bytes=max(step.memory_bytes for step in steps),
        disk_bytes=max(step.disk_bytes for step in steps),
        weights_bytes=steps[-1].weights_bytes,
        available_memory_bytes=available_memory(),
        available_disk_bytes=free_bytes(_output(recipe)),
    )


class _Walkthrough:
    """A recipe's steps in their order. `shape` and `stages` (bytes of the files of each pass that are kept) change as
    the model and the disk would; `beside` are the bytes of what a model's folder holds besides weights, `wanted` is
    what is measured of each pass."""

    def __init__(self, recipe: Recipe, shape: ModelShape, stored: torch.dtype, beside: int, wanted: Wanted):
        self.recipe, self.shape, self.beside, self.wanted = recipe, shape, beside, wanted
        self.holding = costs.Holding(resident=recipe.residency == "memory", stored=stored)
        self.shape.resident = self.holding.resident
        self.stages: list[int] = []

    def steps(self) -> list[PlanStep]:
        benchmark = self.recipe.benchmark is not False
        gpu = self.recipe.device == "cuda" or (self.recipe.device == "auto" and torch.cuda.is_available())
        note = "on a GPU, most of what these figures count is in its memory" if gpu else ""
        steps = [self._step(LOAD, costs.loading(self.shape, self.holding), note=note)]
        if benchmark:
            steps.append(self._step(BEFORE, self._measuring(None)))
        for place, pass_ in enumerate(self.recipe.passes):
            found = self.shape.largest_block(), self._vocabulary()
            steps.append(replace(self._pass(pass_), place=place))
            steps += self._explaining(pass_, place, *found)
        steps.append(self._export())
        if benchmark:
            last = steps[-1]
            steps.append(self._step(AFTER, self._measuring(self._folder_bytes()), last.disk_bytes))
        return steps

    def _step(self, name: str, parts: costs.Parts, disk: int | None = None, note: str = "") -> PlanStep:
        parts = {"runtime": costs.RUNTIME_BYTES} | {part: size for part, size in parts.items() if size}
        disk = sum(self.stages) + SMALL_FILES_BYTES if disk is None else disk
        size = self._folder_bytes(running_format(self.shape.contents()))
        return PlanStep(name, costs.total(parts), disk, size, note, parts)

    def _folder_bytes(self, format: str | None = None) -> int:
        """Bytes of the weights' files of a folder in this format (None: that of `model/`), an adapter beside it where
        that is loaded with it."""
        contents = self.shape.contents()
        loaded = format in (None, running_format(contents))
        adapter = checkpoint_bytes(self.shape.adapter) if self.shape.adapter and loaded else 0
        return _named(format or default_format(contents)).file_bytes(contents) + adapter

    def _fitted(self, pass_: Pass) -> Pass:
        """The pass with options for which it fits the recipe's `memory`, where it has a choice."""
        if self.recipe.memory_bytes is None:
            return pass_
        rest = costs.total(costs.whole_pass(self.shape, self.holding, {})) + costs.RUNTIME_BYTES
        return pass_.fitted(self.shape, self.recipe.memory_bytes - rest)

    def _pass(self, pass_: Pass) -> PlanStep:
        options: dict[str, Any] = {}
        if isinstance(pass_, BlockPass):
            text = _text(self.recipe.data.calibration, self.shape) if pass_.takes_calibration else None
            planned = self.shape.planned(pass_)
            parts = costs.one_pass(planned, self.shape, self.holding, text)
            coverage = self.shape.apply(planned)
            note = f"changes {coverage:.0%} of the blocks' weights"
            if planned is not pass_:
                note += "; the size is an upper bound: how many bits each layer gets is measured"
            if coverage < self.recipe.min_coverage:
                note += f"; the run will stop, because min_coverage is {self.recipe.min_coverage:.0%}"
        elif isinstance(pass_, StructuralPass):
            text = _text(self.recipe.data.calibration, self.shape) if pass_.takes_calibration else None
            note = pass_.plan_note(self.shape.handle.model)
            parts = costs.structural_pass(pass_, self.shape, self.holding, text)
        else:
            self.shape.apply(pass_)
            if not pass_.changes_weights:
                parts = costs.model(self.shape, self.holding, used_outside=True)
                return self._step(pass_.name, parts, note="changes no weight")
            if pass_.needs_training:
                entry = self.recipe.data.training or self.recipe.data.calibration
                self.shape.window = min((entry.length if entry else None) or 256, self.shape.context)
            fitted = self._fitted(pass_)
            options = {name: v for name, v in fitted.options().items() if v != pass_.options()[name]}
            extra = fitted.extra_parts(self.shape)
            seen = _text(self.recipe.data.calibration, self.shape) if pass_.takes_calibration else None
            parts = costs.whole_pass(self.shape, self.holding, extra or {}, seen)
            note = "what it takes beside the model is not known" if extra is None else ""
            note = "; ".join(
                filter(None, [note, *(f"{name}: {value}, to fit memory" for name, value in options.items())])
            )
        # With the whole model in memory, a stage is kept until the next one is complete; else blocks are read from it.
        kept = self.shape.stage_bytes(pass_.changes_outside)
        self.stages = [*(self.stages[-1:] if self.holding.resident else self.stages), kept]
        return replace(self._step(pass_.name, parts, note=note), options=options)

    def _explaining(self, pass_: Pass, place: int, found_block: int, vocabulary: int) -> list[PlanStep]:
        """What is measured of a pass, once it is done: see `compress.explaining`. `found_block`: bytes of the largest
        block that the pass found, `vocabulary` the tokens."""
        steps = []
        entry = self.recipe.data.evaluation or (
            self.recipe.data.calibration if any(each.takes_calibration for each in self.recipe.passes) else None
        )
        compares = self._vocabulary() == vocabulary and len(self.shape.handle.stacks) == 1
        if self.wanted.damage and pass_.changes_weights and entry and compares:
            parts = costs.damaging(self.shape, self.holding, _text(entry, self.shape), found_block)
            steps.append(self._step(f"{pass_.name}: {DAMAGE}", parts))
        if self.wanted.of_stage(self.recipe, place) and self._times():
            size = self._folder_bytes()
            packed = self._folder_bytes("packed") if packed_export_note(self.shape.contents()) else 0
            disk = sum(self.stages) + size + packed + SMALL_FILES_BYTES
            steps.append(self._step(f"{pass_.name}: {SPEED}", costs.stage(self.shape, self.holding, size), disk))
        return steps

    def _vocabulary(self) -> int:
        return int(getattr(self.shape.handle.config.get_text_config(), "vocab_size", 0))

    def _times(self) -> bool:
        """Whether the benchmark measures speed."""
        asked = self.recipe.benchmark
        if asked is False:
            return False
        return asked.metrics is None or any(name.partition("/")[0] in SPEEDS for name in asked.metrics)

    def _export(self) -> PlanStep:
        contents = self.shape.contents()
        if self.holding.resident:
            self.stages = self.stages[-1:]
        own = default_format(contents)
        note = packed_export_note(contents) or ""
        formats = [own, *(name for name in self.recipe.export if name != own)]
        if note and "packed" not in formats:
            formats.append("packed")
        for name in formats:
            form = _named(name)
            reason = form.refusal(contents)
            if not reason and form.runtime is not None and (missing := RUNTIMES.get(form.runtime)().missing()):
                reason = f"{missing} An export counts as done when what it is for has read it."
            if reason:
                raise StartError(f"{'model/' if name == own else 'export'}: {reason}")
        written = sum(self._folder_bytes(name) for name in formats)
        disk = sum(self.stages) + written + len(formats) * self.beside + SMALL_FILES_BYTES
        opened = max((self._folder_bytes(name) for name in formats if _named(name).runtime), default=0)
        parts = costs.exporting(self.shape, self.holding, self._folder_bytes(), opened)
        return self._step(EXPORT, parts, disk, note)

    def _measuring(self, weights_bytes: int | None) -> costs.Parts:
        text = _text(self.recipe.data.evaluation, self.shape) if self.recipe.data.evaluation is not None else None
        return costs.measuring(self.shape, text, weights_bytes)


def _text(entry: DataEntry | None, shape: ModelShape) -> costs.Text:
    """The windows that a data entry will be cut into. How many all of a text makes is not known: more than a batch."""
    config = shape.handle.config
    if reads_images(config):
        patches = patches_of(config)
        return costs.Text((entry.samples if entry else None) or 128, patches, pixel_bytes(config) // patches)
    length = min((entry.length if entry is not None else None) or 256, shape.context)
    return costs.Text((entry.samples if entry is not None else None) or 1 << 20, length)


def refuse(plan: Plan, recipe: Recipe) -> None:
    """StartError where the plan needs more memory than the recipe's `memory` allows or this machine has, or more disk
    than there is."""
    worst = max(plan.steps, key=lambda step: step.memory_bytes)
    budget = recipe.memory_bytes
    if budget is not None and worst.memory_bytes > budget:
        raise StartError(
            f"memory: {worst.name} will take {_size(worst.memory_bytes)}, and the recipe allows {_size(budget)}. "
            f"{_help(worst, recipe)}"
        )
    if worst.memory_bytes > plan.available_memory_bytes:
        raise StartError(
            f"{worst.name} will take {_size(worst.memory_bytes)} of memory, and "
            f"{_size(plan.available_memory_bytes)} are free here. {_help(worst, recipe)}"
        )
    fullest = max(plan.steps, key=lambda step: step.disk_bytes)
    if fullest.disk_bytes > plan.available_disk_bytes + _written(_output(recipe)):
        raise StartError(
            f"output: {fullest.name} will take {_size(fullest.disk_bytes)} of disk, and "
            f"{_size(plan.available_disk_bytes)} are free in {_output(recipe)}. Make room, or name a folder on another "
            "disk with --output."
        )


def _help(step: PlanStep, recipe: Recipe) -> str:
    """What would make the step smaller."""
    if step.name in (BEFORE, AFTER):
        return "Set benchmark: false, or measure on a machine with more memory."
    if step.name.endswith(f": {DAMAGE}"):
        return "Set benchmark.damage=false, which leaves this out."
    if step.name.endswith(f": {SPEED}"):
        return "Set benchmark.stages=false, which leaves this out."
    if step.parts.get("its weights expanded"):
        return "Plain transformers, which checks the written folder, expands it: that needs a machine with more memory."
    ways = [] if recipe.residency == "disk" else ["residency: disk"]
    if step.parts.get("hidden states", 0) > step.memory_bytes // 8:
        ways.append("fewer data.calibration.samples")
    return f"What would help: {', or '.join([*ways, 'a machine with more memory'])}."


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _output(recipe: Recipe) -> Path:
    return Path(recipe.output or f"runs/{recipe.name}").absolute()


def _written(folder: Path) -> int:
    """Bytes that an earlier start of this run has written already."""
    if not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.is_file())


def _named(name: str) -> Format:
    found: Format = FORMATS.get(name)()
    return found


def available_memory() -> int:
    """Bytes that a process can take here: what the system has to spare, or less where a control group limits it."""
    free: int = psutil.virtual_memory().available
    for limit, used in _CONTROL_GROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, free)


#: Limit and use of this process's control group as a container sees them, in version 2 and 1.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
