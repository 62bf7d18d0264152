"""How fast models run: prefill, decode and the wait for the first token, at batch 1 and, where asked for, more.

Engines are timed in turn (A B A B), so that a machine that slows down or speeds up meanwhile does so for all of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from compress.measure.energy import Meter
from compress.measure.engine import Engine
from compress.measure.measurements import Cell, SpeedSettings

PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"
FIRST, ENERGY = "first_token_seconds", "energy_joules_per_token"
METRICS = (PREFILL, DECODE, FIRST, ENERGY)

#: Told how far the timing is: rounds done, rounds in all, and the latest figures in words.
Tell = Callable[[int, int, str], None]


@dataclass
class Timings:
    """One engine's figures: `rounds` by metric, in the order of the rounds; `reasons` why settings were left out."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def leave_out(self, cell: Cell, reason: str) -> None:
        for base in METRICS:
            self.rounds.pop(cell.metric(base), None)
            self.reasons[cell.metric(base)] = reason

    def add(self, cell: Cell, measured: dict[str, float]) -> None:
        for base, value in measured.items():
            self.rounds.setdefault(cell.metric(base), []).append(value)


@dataclass(frozen=True)
class Stopwatch:
    """What a round is measured with; tests put others in their place."""

    clock: Callable[[], float] = time.perf_counter
    meter: Meter | None = None
    #: Bytes that a batch's cache may take.
    free: Callable[[], int] = lambda: int(psutil.virtual_memory().available)


def time_engines(
    engines: Sequence[Engine], prompt: Sequence[int], settings: SpeedSettings, watch: Stopwatch | None = None,
    tell: Tell | None = None,
) -> list[Timings]:  # fmt: skip
    """Per engine the figures of each round, setting by setting.

    `prompt`: at least `settings.longest_prompt` ids that every engine knows. Settings are cut to the smallest context
    among them. A setting beyond the plain one that an engine cannot take is left out there, with the reason; one that
    would take longer than `settings.most_seconds` gets fewer rounds, or is left out for all.
    """
    watch = watch or Stopwatch()
    settings = fitted_to(engines, settings)
    found = [Timings() for _ in engines]
    cells = settings.cells()
    turns = settings.warmup + settings.rounds
    for index, cell in enumerate(cells):
        _leave_out(engines, found, cell, prompt, settings, watch)
        start = watch.clock()
        for turn in range(turns):
            for engine, timings in zip(engines, found, strict=True):
                if cell.metric(PREFILL) not in timings.reasons:
                    _take_round(engine, timings, cell, prompt, settings, watch, warm=turn >= settings.warmup)
            if tell is not None:
                tell(index * turns + turn + 1, len(cells) * turns, cell.name)
            spent = watch.clock() - start
            if cell.name and turn >= settings.warmup and _over(settings, spent + spent / (turn + 1)):
                break
    return found


def fitted_to(engines: Sequence[Engine], settings: SpeedSettings) -> SpeedSettings:
    """The settings, cut to the smallest context of these engines."""
    return settings.fitted(min((e.context for e in engines if e.context is not None), default=None))


def _leave_out(
    engines: Sequence[Engine], found: Sequence[Timings], cell: Cell, prompt: Sequence[int], settings: SpeedSettings,
    watch: Stopwatch,
) -> None:  # fmt: skip
    """Notes for each engine why it is not timed in a setting, where it is not."""
    if not cell.name:
        return
    taken = []
    for engine, timings in zip(engines, found, strict=True):
        reason = _why_not(engine, cell, prompt, settings, watch)
        if reason is None:
            taken.append((engine, timings))
        else:
            timings.leave_out(cell, reason)
    seconds = sum(_expected(engine, timings, cell, settings) for engine, timings in taken)
    if _over(settings, (1 + bool(settings.warmup)) * seconds):
        for _, timings in taken:
            timings.leave_out(
                cell,
                f"a round would take about {seconds:.0f} s, and benchmark.setting_seconds allows the setting "
                f"{settings.most_seconds:g} s in all",
            )


def _expected(engine: Engine, timings: Timings, cell: Cell, settings: SpeedSettings) -> float:
    """Seconds of one round, by what the plain setting took: a step of a larger batch takes no less."""
    read = settings.length(cell) + (settings.before_writing(cell) if cell.prompt is None else 0)
    seconds = cell.batch * engine.tokens_read(read) / median(timings.rounds[PREFILL])
    if DECODE in timings.rounds:
        seconds += settings.written(cell) / median(timings.rounds[DECODE])
    return float(seconds)


def _over(settings: SpeedSettings, seconds: float) -> bool:
    return settings.most_seconds is not None and seconds > settings.most_seconds


def _take_round(
    engine: Engine, timings: Timings, cell: Cell, prompt: Sequence[int], settings: SpeedSettings, watch: Stopwatch,
    *, warm: bool,
) -> None:  # fmt: skip
    """One round of one engine, kept if it is `warm`. Beyond the plain setting, memory that does not suffice is a
    reason to leave it out."""
    gc.collect()
    try:
        measured = _round(engine, cell, prompt, settings, settings.written(cell) if warm else 4, watch)
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not (cell.name and short):
            raise
        timings.leave_out(cell, "the memory does not suffice")
        return
    if warm:
        timings.add(cell, measured)


def _round(
    engine: Engine, cell: Cell, prompt: Sequence[int], settings: SpeedSettings, new_tokens: int, watch: Stopwatch
) -> dict[str, float]:
    """The figures of one round. Engines have done their work when they return, so the clock may stand around them."""
    length = settings.length(cell)
    start = watch.clock()
    engine.prefill(rows(prompt, cell.batch, length))
    found = {PREFILL: cell.batch * engine.tokens_read(length) / (watch.clock() - start)}
    if not engine.generates:
        return found
    engine.step()
    found[FIRST] = watch.clock() - start
    if cell.prompt is None:
        engine.prefill(rows(prompt, cell.batch, settings.before_writing(cell)))
        engine.step()
    steps = max(1, min(new_tokens, settings.written(cell)) - 1)
    others = engine.processes()
    before = watch.meter.read(others) if watch.meter else []
    start = watch.clock()
    for _ in range(steps):
        engine.step()
    found[DECODE] = cell.batch * steps / (watch.clock() - start)
    if watch.meter:
        found[ENERGY] = watch.meter.since(before, others) / (cell.batch * steps)
    return found


def rows(prompt: Sequence[int], batch: int, length: int) -> list[list[int]]:
    """`batch` prompts of `length` tokens: the same text from another place each, so that no two rows are alike."""
    text = list(prompt)
    turned = (text[shift:] + text[:shift] for shift in (7 * row % max(1, len(text)) for row in range(batch)))
    return [row[:length] for row in turned]


def _why_not(
    engine: Engine, cell: Cell, prompt: Sequence[int], settings: SpeedSettings, watch: Stopwatch
) -> str | None:
    """Why an engine is not timed in a setting, or None. Half of the free memory is left to all but the cache."""
    length = settings.length(cell)
    written = settings.written(cell) if engine.generates else 1
    tokens = max(length + 1, settings.before_writing(cell) + written)
    if engine.context is not None and tokens > engine.context:
        return f"a prompt of {length} tokens and what follows do not fit in the context of {engine.context}"
    if cell.batch > engine.largest_batch:
        return f"{engine.runtime or 'this runtime'} takes a batch of {engine.largest_batch} at most"
    if not engine.generates:
        return None
    engine.prefill(rows(prompt, 1, settings.decode_prompt))
    held = engine.cache_bytes()
    needed = 0 if held is None else cell.batch * tokens * held // settings.decode_prompt
    free = watch.free()
    if needed > free // 2:
        return f"the cache would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    return None


def generate(model: Any, ids: Tensor, new_tokens: int, *, fixed: bool = True) -> Tensor:
    """Greedy continuation of ids [1, length]; `fixed`: of exactly `new_tokens`, whatever the model writes."""
    generated: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
        min_new_tokens=new_tokens if fixed else None, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    return generated
