"""What to measure, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.registry import HUB, METRICS
from compress.reports.report import Figure

if TYPE_CHECKING:
    from torch import Tensor


#: Tokens that each row of a large batch writes at least, where they are not fewer for all.
LEAST_WRITTEN = 16


@dataclass(frozen=True)
class Cell:
    """One setting that is timed: `batch` rows, and a prompt of `prompt` tokens (None: the lengths of the settings, one
    for reading and a shorter one before writing)."""

    batch: int = 1
    prompt: int | None = None

    @classmethod
    def named(cls, name: str) -> Cell:
        """The setting of a `name`."""
        said = dict(part.split(" ") for part in name.split(", ") if part)
        return cls(int(said.get("batch", 1)), int(said["prompt"]) if "prompt" in said else None)

    @property
    def name(self) -> str:
        """What stands behind the metric's name: "", "batch 4", "prompt 2048", "batch 4, prompt 2048"."""
        parts = [f"batch {self.batch}"] if self.batch > 1 else []
        return ", ".join(parts + ([] if self.prompt is None else [f"prompt {self.prompt}"]))

    def metric(self, base: str) -> str:
        """The full name of a metric in this setting, as in `decode_tokens_per_second/batch 4`."""
        return f"{base}/{self.name}" if self.name else base


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed: prompt lengths and new tokens (cut to what the context holds), warm-up and rounds.

    `batches` and `prompts` add settings to the first one, which is batch 1 with the lengths below; each batch is timed
    with each prompt. A larger batch reads about as many tokens in all, in shorter rows, and writes about as many, so
    that no setting costs many times the first. `most_seconds`: what one of the added settings may take in all.
    """

    prompt: int = 512
    decode_prompt: int = 32
    new_tokens: int = 64
    rounds: int = 7
    warmup: int = 1
    batches: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    most_seconds: float | None = None

    def fitted(self, context: int | None) -> SpeedSettings:
        """The same within a context of so many tokens: at most half of it is generated. `prompts` stay as they are."""
        if context is None:
            return self
        new = max(2, min(self.new_tokens, context // 2))
        return replace(
            self,
            prompt=max(1, min(self.prompt, context - 1)),
            decode_prompt=max(1, min(self.decode_prompt, context - new)),
            new_tokens=new,
        )

    def cells(self) -> list[Cell]:
        """Every setting to time, the plain one first."""
        prompts = (None, *dict.fromkeys(self.prompts))
        return [Cell(batch, prompt) for prompt in prompts for batch in sorted({1, *self.batches})]

    def length(self, cell: Cell) -> int:
        """Tokens of each row that is read."""
        return cell.prompt or max(min(self.decode_prompt, self.prompt), self.prompt // cell.batch)

    def before_writing(self, cell: Cell) -> int:
        """Tokens of each row that stand before what is written."""
        return cell.prompt or self.decode_prompt

    def written(self, cell: Cell) -> int:
        """New tokens of each row."""
        return min(self.new_tokens, max(LEAST_WRITTEN, self.new_tokens // cell.batch))

    @property
    def longest_prompt(self) -> int:
        return max(self.prompt, self.decode_prompt, *self.prompts)


@dataclass(frozen=True)
class BenchmarkJob:
    """What to measure, and on what.

    `windows`: int64 [n, length] evaluation tokens (None: `windows_reason` says why there are none); `mask`: bool
    [n, length], False where padded. `items`: area -> items. `metrics`: names, or None for all that can be measured.
    `dtype` is the one the original is loaded in; a compressed folder states its own. `runtimes` are timed besides
    transformers, which always is. `watts` of one busy core allow an estimate of energy where there is no counter.
    `labels`: int64 [n], the class of each window for a model that classifies, whose names are `class_names`. `tasks`:
    names and files of the harness's tasks, whose content `tasks_state` names; `limit`: the first so many items of each.
    """

    windows: Tensor | None = None
    windows_reason: str = "no evaluation text was given (data.evaluation)"
    mask: Tensor | None = None
    items: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    metrics: tuple[str, ...] | None = None
    prompts: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    dtype: str = "auto"
    seed: int = 0
    speed: SpeedSettings = SpeedSettings()
    labels: Tensor | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    tasks_state: str = ""
    limit: int | None = None
    runtimes: tuple[str, ...] = ("transformers",)
    watts: float | None = None

    def wants(self, need: str) -> bool:
        """Whether a wanted metric needs this (`text`, `items`, `reference`, `speed`, `memory`, `files`)."""
        return any(need in METRICS.get(name).needs for name in self.names())

    def shown(self, area: str) -> list[tuple[str, str]]:
        """What the items of an area ask, and their right answers."""
        from compress.measure.items import shown

        return [shown(item) for item in self.items[area]]

    def names(self) -> list[str]:
        """The wanted metrics as the registry names them (`accuracy/facts` is measured as `accuracy`). Unless they are
        named, not those that a model has to write answers for, and those of classes where there are no labels."""
        if self.metrics is None:
            left_out = {"answers"} if self.labels is not None else {"answers", "classes"}
            return [name for name in METRICS.names() if not left_out & set(METRICS.get(name).needs)]
        return list(dict.fromkeys(name if name.startswith(HUB) else name.split("/")[0] for name in self.metrics))


@dataclass
class Measurements:
    """One model's figures, and the records per item that they rest on (for paired differences).

    `beside` holds records of the original taken in turn with this model's: speeds are compared with those. `costs`: by
    runtime ("" for transformers, "beside" for the original) what its speeds rest on.
    `item_texts`: of each item in `records["correct"]`, what is asked and the right answer; `task_metrics`: all that the
    harness measures of a task; `worst`: the windows that differ most from the original's, the fields of `WorstText`.
    """

    model: str
    folder: Path
    figures: dict[str, Figure] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    beside_figures: dict[str, Figure] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    runtimes: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    generations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    item_texts: list[tuple[str, str]] = field(default_factory=list)
    task_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)
