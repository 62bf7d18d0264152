"""Bits under a budget: how many each layer gets, measured once, solved exactly, and checked against the same for all.

`BitBudget` is what a recipe says. What an allocation may cost follows from shapes alone (`limits_of`), so that the plan
can fill the budget without looking at a weight; `choose_bits` then finds the allocation that loses least, within the
bytes that the plan stated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator
from torch import Tensor

from compress.checkpoint import TensorSpec, checkpoint_bytes
from compress.errors import RecipeError, StartError
from compress.maths.allocation import Limit, best, fill, uniform
from compress.maths.grid import QuantSpec, dequantize, find_params, quantize
from compress.nn.quant_linear import packed_tensors

if TYPE_CHECKING:
    from compress.data import Windows
    from compress.model import Layer, ModelHandle
    from compress.passes.base import Context
    from compress.passes.rounding import RoundingPass
    from compress.shapes import ModelShape

#: Windows of the calibration text that sensitivity is measured on, and as many others that the outcome is checked on.
WINDOWS = 8
#: Tokens in one batch of what is measured, and of a large vocabulary so few that logits stay below so many values.
TOKENS, LOGITS = 2048, 1 << 25
#: Hidden states that are pushed through the later blocks side by side; more take another round through the model.
VARIANTS_AT_ONCE = 32


def batch_tokens(length: int, vocabulary: int) -> int:
    """Tokens measured at once, at least one window."""
    return max(length, min(TOKENS, LOGITS // max(1, vocabulary)))


def measuring_bytes(shape: ModelShape, length: int, copies: int, changing: int, backward: bool = False) -> int:
    """Peak of measuring at a model's output: the hidden states of the text so many times over, what `changing` the
    weights of a block takes while text runs through it (`backward`: and back), or the logits."""
    size: int = shape.dtype.itemsize
    tokens = batch_tokens(length, shape.vocabulary)
    running = tokens * (shape.widest * size + length * size) * (4 if backward else 1)
    softmax = tokens * shape.vocabulary * 3 * size + 32 * shape.vocabulary * 8 * 4
    return copies * WINDOWS * length * shape.hidden * size + max(changing + running, softmax)


class BitBudget(BaseModel):
    """`bits: {average: 3.5}` or `bits: {size: 40MB}`: which layer gets how many is found by measuring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    average: float | None = Field(
        default=None, description="Bits of the codes, averaged over the weights that are rounded; scales not counted."
    )
    size: int | str | None = Field(
        default=None,
        description="Instead: bytes of all safetensors files that compress.load runs from, at most, as in 40MB.",
    )
    choices: tuple[Literal[2, 3, 4, 8], ...] = Field(default=(2, 3, 4, 8), description="The bits that a layer can get.")

    @field_validator("choices")
    @classmethod
    def _some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("choices is empty: name some of 2, 3, 4, 8")
        return tuple(sorted(set(value)))

    @field_validator("size")
    @classmethod
    def _parsed(cls, value: int | str | None) -> int | str | None:
        from compress.recipe.goals import parse_size

        try:
            parse_size(value or 0)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _possible(self) -> BitBudget:
        if (self.average is None) == (self.size is None):
            raise ValueError("bits needs either average, as in {average: 3.5}, or size, as in {size: 40MB}")
        low, high = self.choices[0], self.choices[-1]
        if self.average is not None and not low <= self.average <= high:
            raise ValueError(f"average is {self.average:g}, and choices go from {low} to {high}: nothing comes to that")
        return self

    @model_serializer
    def _said(self) -> dict[str, Any]:
        """As it would stand in a recipe: what is not given is left out."""
        asked = {"average": self.average} if self.size is None else {"size": self.size}
        return {**asked, "choices": list(self.choices)}

    @property
    def bytes(self) -> int | None:
        from compress.recipe.goals import parse_size

        return None if self.size is None else parse_size(self.size)


@dataclass(frozen=True)
class Costs:
    """What each choice of bits costs in each layer (`block.layer`), and what else is in the files.

    `weights`: of each layer; `grids[l][c]`: its grid at each choice. `tensors`: all tensors of the model as they are
    stored; those of layers that an allocation rounds are replaced by packed ones.
    """

    names: tuple[str, ...]
    weights: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    grids: tuple[tuple[QuantSpec, ...], ...]
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def bytes(self) -> list[list[int]]:
        """Of codes, scales, zero points and shape, for each layer and choice."""
        sizes = []
        for name, shape, grids in zip(self.names, self.shapes, self.grids, strict=True):
            sizes.append([sum(spec.nbytes for spec in _packed(name, shape, grid)) for grid in grids])
        return sizes

    def file_bytes(self, chosen: list[int]) -> int:
        """Of all safetensors files of the packed model, headers included."""
        packed = {
            f"{name}.weight": _packed(name, shape, grids[c])
            for name, shape, grids, c in zip(self.names, self.shapes, self.grids, chosen, strict=True)
        }
        return checkpoint_bytes([part for spec in self.tensors for part in packed.get(spec.name, [spec])])


def _packed(name: str, shape: tuple[int, int], grid: QuantSpec) -> list[TensorSpec]:
    outputs, inputs = shape
    parts = packed_tensors(inputs, outputs, grid)
    return [TensorSpec(f"{name}.{part}", dtype, size) for part, (dtype, size) in parts.items()]


def costs_of(pass_: RoundingPass, budget: BitBudget, model: ModelHandle) -> Costs:
    """From the shapes of a model, with weights or without, its ends packed already or not yet."""
    names, weights, shapes, grids = [], [], [], []
    for block in model.block_list():
        for name, layer in block.layers(pass_.targets, pass_.skip).items():
            outputs, inputs = layer.weight.shape
            names.append(f"{block.name}.{name}")
            weights.append(outputs * inputs)
            shapes.append((outputs, inputs))
            grids.append(tuple(pass_.spec_at(layer.dtype, bits) for bits in budget.choices))
    tensors = []
    ends = pass_.end_specs(model.model) if not model.outside_quantized() else {}
    for spec in model.contents().tensors:
        end = spec.name.removesuffix(".weight")
        tensors += _packed(end, (spec.shape[0], spec.shape[1]), ends[end]) if end in ends else [spec]
    return Costs(tuple(names), tuple(weights), tuple(shapes), tuple(grids), tuple(tensors))


def limits_of(budget: BitBudget, costs: Costs) -> tuple[list[Limit], list[int]]:
    """What an allocation must keep to, and one that fills the budget as far as shapes tell.

    No allocation may take more bytes than that one, so its size is what the plan states: an upper bound. StartError if
    the budget is below what the fewest bits take.
    """
    if budget.average is not None:
        bits = [[bits * weights for bits in budget.choices] for weights in costs.weights]
        limits = [Limit(bits, int(budget.average * sum(costs.weights)))]
        filled = fill(limits)
        assert filled is not None  # the average lies among the choices
    else:
        least = costs.file_bytes([0] * len(costs.names))
        wanted = budget.bytes or 0
        beside = least - Limit(costs.bytes, 0).spent([0] * len(costs.names))
        filled = fill([Limit(costs.bytes, wanted - beside)])
        while filled is not None and (over := costs.file_bytes(filled) - wanted) > 0:  # headers grow with the numbers
            beside += over
            filled = fill([Limit(costs.bytes, wanted - beside)])
        if filled is None:
            raise StartError(
                f"bits.size is {budget.size}, and with {budget.choices[0]} bits in every layer the weights take "
                f"{least} bytes: allow at least that, or more of the model to be rounded"
            )
        limits = []
    whole = Limit(costs.bytes, Limit(costs.bytes, 0).spent(filled))
    return [*limits, whole], filled


def fitted(losses: list[list[float]], costs: Costs, limits: list[Limit], filled: list[int]) -> list[int]:
    """The allowed allocation that loses least and whose files are no larger than those of `filled`."""
    most = costs.file_bytes(filled)
    *others, whole = limits
    while (chosen := best(losses, [*others, whole])) is not None:
        over = costs.file_bytes(chosen) - most
        if over <= 0:
            return chosen
        whole = replace(whole, most=whole.most - over)
    return filled


def nearest(weight: Tensor, spec: QuantSpec) -> Tensor:
    """`weight` [out, in] rounded to nearest with searched ranges: the stand-in for whatever will round it."""
    scale, zero = find_params(weight, spec, search=True)
    return dequantize(quantize(weight, scale, zero, spec), scale, zero, spec, torch.float32).to(weight.dtype)


def guarded(losses: list[list[float]], same: int) -> list[list[float]]:
    """The same losses, but where a layer has none at all (no token reached it), choices below `same` cost more than
    everything else together: of such a layer nothing is known, and it gets no fewer bits than in a uniform model."""
    dear = 1e-9 + sum(max(row) for row in losses)
    return [row if any(row) else [dear] * same + [0.0] * (len(row) - same) for row in losses]


def choose_bits(pass_: RoundingPass, budget: BitBudget, model: ModelHandle, context: Context) -> dict[str, Any]:
    """Measures, solves, checks: `bits` (`block.layer` -> bits) and the account of how they came about, for JSON."""
    from compress.sensitivity import candidate_losses, fisher_losses, kl_losses

    assert context.calibration is not None
    costs = costs_of(pass_, budget, model)
    limits, filled = limits_of(budget, costs)
    measured_on, held_out = measured_windows(context.calibration)

    def rounded(layer: Layer, bits: int) -> Tensor:
        return nearest(layer.weight, pass_.spec_at(layer.dtype, bits))

    def layers(block: Any) -> Mapping[str, Layer]:
        found: Mapping[str, Layer] = block.layers(pass_.targets, pass_.skip)
        return found

    measure = kl_losses if pass_.sensitivity == "kl" else fisher_losses
    with context.progress.step(f"{pass_.name}: sensitivity", total=len(model.block_list())) as step:
        losses = measure(model, measured_on, layers, budget.choices, rounded, step)
    same = uniform(limits)
    assert same is not None
    table = guarded([losses[name] for name in costs.names], same)
    chosen = fitted(table, costs, limits, filled)
    candidates = [chosen, [same] * len(chosen)]
    named = [dict(zip(costs.names, (budget.choices[c] for c in each), strict=True)) for each in candidates]
    predicted = [sum(row[c] for row, c in zip(table, each, strict=True)) for each in candidates]
    found = candidate_losses(model, held_out, layers, named, rounded)
    worse = found[0] > found[1]
    account = {
        "bits": named[worse],
        "average_bits": _average(costs, named[worse]),
        "sensitivity": pass_.sensitivity,
        "windows": [len(measured_on), len(held_out)],
        "predicted_loss": predicted[0],
        "measured_loss": found[0],
        "uniform": {"bits": budget.choices[same], "predicted_loss": predicted[1], "measured_loss": found[1]},
        "fallback": None,
    }
    if worse:
        account["fallback"] = (
            f"{budget.choices[same]} bits everywhere: rounded to nearest, the allocation that was found diverges more "
            f"on text it was not measured on ({found[0]:.4g} against {found[1]:.4g})"
        )
    return account


def _average(costs: Costs, bits: Mapping[str, int]) -> float:
    spent = sum(bits[name] * weights for name, weights in zip(costs.names, costs.weights, strict=True))
    return spent / sum(costs.weights)


def measured_windows(text: Windows) -> tuple[Windows, Windows]:
    """Windows to measure on, and others to check on; of a text of one window, that one twice."""
    half = max(1, min(WINDOWS, len(text) // 2))
    parts = [slice(0, half), slice(half, 2 * half)] if len(text) > 1 else [slice(0, 1)] * 2
    masks = [None if text.mask is None else text.mask[part] for part in parts]
    first, second = (replace(text, tokens=text.tokens[p], mask=m) for p, m in zip(parts, masks, strict=True))
    return first, second
