"""How fast models run: prefill, decode and the wait for the first token, at batch 1.

Models are timed in turn (A B A B), so that a machine that slows down or speeds up meanwhile does so for all of them.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from compress.images import patches_of, reads_images
from compress.inputs import forward_inputs
from compress.locating import context_length
from compress.measure.measurements import SpeedSettings

POWERCAP = Path("/sys/class/powercap")

PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"
FIRST, ENERGY = "first_token_seconds", "energy_joules_per_token"


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands over each token (it moves them to the CPU first, which waits for the device)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to write out."""


def time_models(models: Sequence[Any], prompt: Tensor, settings: SpeedSettings) -> list[dict[str, list[float]]]:
    """Per model the figures of each round, in the order of the rounds.

    `prompt`: int64 [length], at least `settings.prompt` tokens. Settings are cut to the smallest context among them.
    """
    contexts = [c for c in (context_length(model.config) for model in models) if c is not None]
    settings = settings.fitted(min(contexts, default=None))
    found: list[dict[str, list[float]]] = [{PREFILL: [], DECODE: [], FIRST: [], ENERGY: []} for _ in models]
    short = replace(settings, new_tokens=min(4, settings.new_tokens))
    for turn in range(settings.warmup + settings.rounds):
        warm = turn >= settings.warmup
        for model, figures in zip(models, found, strict=True):
            gc.collect()
            with torch.inference_mode():
                measured = _round(model, prompt, settings if warm else short)
            for key, value in measured.items():
                if warm:
                    figures[key].append(value)
    return found


def _round(model: Any, prompt: Tensor, settings: SpeedSettings) -> dict[str, float]:
    device = next(model.parameters()).device
    long = prompt[None, : settings.prompt].to(device)
    short = prompt[None, : settings.decode_prompt].to(device)
    given = forward_inputs(model, long)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if not model.can_generate():
        return {PREFILL: _tokens(model, long) / _seconds(lambda: model(**given), device)}
    seconds = _seconds(lambda: model(**given, use_cache=True, **keep), device)
    first = _seconds(lambda: generate(model, long, 1), device)
    clock, joules = TokenClock(), EnergyCounter.find()
    before = joules.read() if joules else []
    generate(model, short, settings.new_tokens, clock)
    # The clock's first tick is the prompt itself, the second the first new token.
    spent = clock.times[-1] - clock.times[1]
    found = {PREFILL: long.shape[1] / seconds, FIRST: first, DECODE: (len(clock.times) - 2) / spent}
    if joules:
        found[ENERGY] = joules.since(before) / settings.new_tokens
    return found


def _tokens(model: Any, prompt: Tensor) -> int:
    """What a forward reads: the prompt, or the patches of one image."""
    return patches_of(model.config) if reads_images(model.config) else prompt.shape[1]


def generate(
    model: Any, ids: Tensor, new_tokens: int, clock: TokenClock | None = None, *, fixed: bool = True
) -> Tensor:
    """Greedy continuation of ids [1, length]; `fixed`: of exactly `new_tokens`, whatever the model writes."""
    generated: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
        min_new_tokens=new_tokens if fixed else None, do_sample=False, num_beams=1, use_cache=True, streamer=clock,
        pad_token_id=0,
    )  # fmt: skip
    return generated


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of the work, the device's queue empty before and after."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class EnergyCounter:
    """The processor packages' own energy counters (RAPL), in joules; they wrap around at `ranges`."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.ranges = [int((f.parent / "max_energy_range_uj").read_text()) / 1e6 for f in self.files]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyCounter | None:
        """The counters of this machine, or None when there are none that this user may read."""
        files = [f for f in sorted(root.glob("intel-rapl:[0-9]*/energy_uj")) if f.parent.name.count(":") == 1]
        try:
            counter = cls(files)
            counter.read()
        except (OSError, ValueError):
            return None
        return counter if files else None

    def read(self) -> list[float]:
        """Joules of each package since some moment in the past."""
        return [int(f.read_text()) / 1e6 for f in self.files]

    def since(self, before: Sequence[float]) -> float:
        """Joules of all packages since an earlier `read()`."""
        spent = (now - then for now, then in zip(self.read(), before, strict=True))
        return sum(j if j >= 0 else j + wrap for j, wrap in zip(spent, self.ranges, strict=True))


def why_no_energy(device: str) -> str:
    """The reason given where no energy figure is."""
    if device != "cpu":
        return "the energy of a graphics processor is not measured yet"
    return f"this machine has no energy counter that may be read (under {POWERCAP})"
