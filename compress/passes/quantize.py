"""Presets: rounding methods and their settings, chosen for given bits by what they cost and reach.

In a recipe the entry stands for the passes it names, so each has its own stage, plan and place in the report. What the
presets cost and reach is measured by `benchmarks/rounding.py`; the README has the table.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.maths.named_grids import TRELLIS
from compress.passes.autoround import AutoRound
from compress.passes.base import Pass, PassResult
from compress.passes.gptq import GPTQ
from compress.passes.llm_qat import LLMQAT
from compress.passes.rounding import check_trellis
from compress.passes.rtn import RTN

if TYPE_CHECKING:
    from compress.model import ModelHandle
    from compress.passes.base import Context


class Quantize(Pass):
    """Round weights by a preset: `fast` needs no data, `balanced` calibration text, `best` training text and memory."""

    name: ClassVar[str] = "quantize"

    accepts: ClassVar[frozenset[str]] = RTN.accepts
    leaves: ClassVar[str] = "quantized"

    preset: Literal["fast", "balanced", "best"] = Field(
        default="balanced",
        description="fast: rtn. balanced: autoround. best: gptq, then llm_qat on data.training and on text that the "
        "model writes itself (a third of `tokens`, or half along a trellis of 2 or 3 bits).",
    )
    grid: Literal["integer", "trellis"] | None = Field(
        default=None,
        description="integer: codes that other programs read. trellis: codes whose meaning depends on their "
        "neighbours, a third less error for the same bytes; compress.load runs them packed, and model/ has them "
        "unpacked; in place of autoround, `balanced` is gptq there. Where nothing is said: trellis with `best` below 8 "
        "bits, else integer.",
    )
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of each weight.")
    group_size: int = Field(
        default=128, description="Neighbouring columns that share a scale; must divide the columns. -1: per channel."
    )
    symmetric: bool = Field(default=True, description="Grid around zero; false adds a zero point to each group.")
    tokens: int = Field(default=4_000_000, ge=1, description="With `best`: tokens of training text to see.")

    @field_validator("group_size")
    @classmethod
    def _size(cls, value: int) -> int:
        return RTN(group_size=value, targets=None).group_size

    @model_validator(mode="after")
    def _grid(self) -> Self:
        if self.grid == "trellis":
            check_trellis([self.bits], self.symmetric)
        return self

    @property
    def on_trellis(self) -> bool:
        """Whether codes lie on a trellis; a grid with zero points, or of 8 bits, is of integers."""
        if self.grid is None:
            return self.preset == "best" and self.bits != 8 and self.symmetric
        return self.grid == "trellis"

    def stands_for(self) -> list[Pass]:
        """The passes that the preset stands for. At 8 bits there is nothing left to train for."""
        form: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        if self.on_trellis:
            form["grid"] = TRELLIS
        if self.preset == "fast":
            return [RTN(**form)]
        if self.bits == 8 or (self.preset == "balanced" and self.on_trellis):
            return [GPTQ(**form)]
        if self.preset == "balanced":
            return [AutoRound(**form)]
        return [GPTQ(**form), LLMQAT(tokens=self.tokens, **self._training())]

    def _training(self) -> dict[str, Any]:
        """Coarse grids of integers take larger steps. On a trellis a weight that moves takes its neighbours along: more
        and smaller steps; at 2 and 3 bits, where there is most to learn, dampened ones, which bear high rates. All as
        whole runs were measured (the log of benchmarks): 4 bits along a trellis without dampening alone."""
        third: dict[str, Any] = {"generated": self.tokens // 3}
        if not self.on_trellis:
            return {**third, "learning_rate": 2e-2 if self.bits != 4 else 1e-2}
        if self.bits == 4:
            rates = {"learning_rate": 3.5e-3, "scale_learning_rate": 2.5e-3, "norm_learning_rate": 2.5e-3}
            return {**third, **rates, "batch_size": 4}
        rates = {"learning_rate": 8e-3, "scale_learning_rate": 1.2e-2, "norm_learning_rate": 4e-3, "dampening": 0.2}
        return {**rates, "generated": self.tokens // 2, "batch_size": 4}

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return any(step.needs_calibration for step in self.stands_for())

    @property
    def needs_training(self) -> bool:  # type: ignore[override]
        return any(step.needs_training for step in self.stands_for())

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """One pass after the other, from Python; the original is the model as it comes in, if no other is given."""
        if self.needs_training and context.original is None:
            original = copy.deepcopy(model.model)
            context = replace(context, original=lambda: original)
        results = []
        for step in self.stands_for():
            results.append(step.run(model, context))
            model.states.add(step.leaves)
        measured = {step.name: r.measurements for step, r in zip(self.stands_for(), results, strict=True)}
        return PassResult(model, results[0].blocks, results[0].coverage, measured)
