"""What all passes that set weights to zero have in common: how many, and where they are counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from torch import Tensor

from compress.errors import CompressError
from compress.maths.hessian import NotPositiveDefinite
from compress.maths.masks import check_columns, keep_mask, parse_pattern, parse_sparsity, zeroed
from compress.passes.base import BlockPass, Context, LayerShape, PassResult
from compress.passes.hessians import Inputs, hessian_bytes, observed_stages, observing_bytes

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer, ModelHandle
    from compress.shapes import ModelShape

Sparsity = Annotated[float, BeforeValidator(parse_sparsity), Field(ge=0, lt=1)]
Pattern = Annotated[str, BeforeValidator(parse_pattern)]


def pruned(weight: Tensor, keep: Tensor, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The weight with exact zeros where `keep` is False, its share of zeros, and the share of squared scores lost."""
    result = zeroed(weight, keep)
    total = float(torch.linalg.vector_norm(scores)) ** 2
    lost = float(torch.linalg.vector_norm(scores * ~keep)) ** 2
    return result, {"sparsity": share_of_zeros(result), "loss": lost / total if total else 0.0}


def share_of_zeros(weight: Tensor) -> float:
    return float(1.0 - int(weight.count_nonzero()) / weight.numel())


class PruningPass(BlockPass):
    """A block pass that leaves weights dense, with zeros among them."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "sparse"

    sparsity: Sparsity | None = Field(
        default=None, description='Share of the weights to set to zero, 0.5 or "50%"; 0.5 if no pattern is given.'
    )
    pattern: Pattern | None = Field(
        default=None, description='Instead of a share: "2:4" keeps 2 of every 4 neighbours in a row. Quote it.'
    )

    allocation: Literal["uniform", "owl", "measured"] = Field(
        default="uniform",
        description="Which blocks get how much of `sparsity`. uniform: all the same; owl: fewer zeros where more "
        "scores are outliers; measured: each block is pruned alone and the output compared. Not with a pattern.",
    )
    max_deviation: float = Field(
        default=0.08,
        gt=0,
        le=1,
        description="How far a block's share of zeros may lie from `sparsity`, where allocation is not uniform.",
    )

    #: Block -> share of zeros, in the copy of a pass with an allocation that does the work.
    _rates: Mapping[str, float] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, options: Any) -> Any:
        """Sparsity 0.5 if neither is given; both: ValueError."""
        if not isinstance(options, dict):
            return options
        if options.get("pattern") is None and options.get("sparsity") is None:
            return {**options, "sparsity": 0.5}
        if options.get("pattern") is not None and options.get("sparsity") is not None:
            raise ValueError("sparsity and pattern exclude each other: the pattern says how many weights stay")
        return options

    @model_validator(mode="after")
    def _something_to_share(self) -> Self:
        if self.pattern is not None and self.allocation != "uniform":
            raise ValueError(
                f"allocation is {self.allocation}, and pattern {self.pattern} leaves the same zeros everywhere: give a "
                "sparsity instead, or leave allocation out"
            )
        return self

    @property
    def takes_calibration(self) -> bool:
        """Of a pass without data, what an allocation is measured on."""
        return self.needs_calibration or self.allocation != "uniform"

    @property
    def counted_per(self) -> str:
        """Where a share is counted when zeros are tried out: "row" or "layer"."""
        return "row"

    def scores(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """What stands in for the pass when zeros are tried out, `[out, in]`: the lowest go first. `norms`: l2 norms of
        the input's columns, None where no token reached the layer."""
        from compress.passes.wanda import wanda_scores

        return weight.float().abs() if norms is None else wanda_scores(weight, norms)

    def spec_of(self, layer: LayerShape) -> None:
        """Stays dense. StartError if the pattern does not divide the columns."""
        check_columns(self.pattern, layer.inputs)

    def rate_of(self, layer: Layer) -> float | None:
        """The share of zeros of this layer; None where a pattern says it."""
        if self._rates is None or layer.block is None:
            return self.sparsity
        return self._rates[layer.block.name]

    def allocated(self, rates: Mapping[str, float]) -> Self:
        """The same pass, with a share of zeros for each block, by name."""
        copy = self.model_copy()
        copy._rates = rates
        return copy

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """The rates of an allocation are measured once: a continued run takes what the stage has."""
        from compress.sparsity import choose_rates
        from compress.walk import check_coverage, walk

        if self.allocation == "uniform" or self.sparsity is None:
            return walk(self, model, context)
        check_coverage(self, model, context.min_coverage)
        measure = partial(choose_rates, self, self.sparsity, model, context)
        account = measure() if context.stage is None else context.stage.once("allocation", measure)
        result = walk(self.allocated(account["rates"]), model, context)
        return PassResult(model, result.blocks, result.coverage, {**result.measurements, "allocation": account})

    def preparing_bytes(self, shape: ModelShape, layers: Sequence[Sequence[LayerShape]], length: int) -> int:
        """With an allocation: hidden states of the text (measured: of every rate side by side, then of candidates), and
        zeros tried out in one block. Of one layer at a time: scores in float32, twice, and selecting in them."""
        if self.allocation == "uniform":
            return 0
        from compress.budget import measuring_bytes
        from compress.sparsity import STEPS

        size: int = shape.dtype.itemsize
        in_block = max(sum(layer.outputs * layer.inputs for layer in block) for block in layers)
        largest = max(layer.outputs * layer.inputs for block in layers for layer in block)
        copies = len(STEPS) + 3 if self.allocation == "measured" else 2
        return measuring_bytes(shape, length, copies, size * in_block + 26 * largest)

    def by_magnitude(self, layer: Layer, trouble: str) -> dict[str, Any]:
        """What is left where a layer's inputs do not help; what to report of it."""
        weight = layer.weight
        scores = weight.float().abs()
        weight, entry = pruned(weight, keep_mask(weight, scores, self.rate_of(layer), self.pattern), scores)
        layer.set_weight(weight)
        return {**entry, "fallback": f"magnitude: {trouble}"}


@dataclass(frozen=True)
class Pruned:
    """A pruned weight, in the dtype of the Hessian, `[out, in]`, with exact zeros where `keep` is False. lost, size:
    squared error of each output, and its square, `[out]`, on the tokens of the Hessian. said: for the report."""

    weight: Tensor
    keep: Tensor
    lost: Tensor
    size: Tensor
    said: dict[str, Any]


class HessianPruning(PruningPass):
    """A pruning pass that solves for the layers of one input together, from the Hessian of that input."""

    needs_calibration: ClassVar[bool] = True

    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of the Hessian's mean diagonal added to it; where that is too little for a factorisation it "
        "rises tenfold, up to 1.",
    )
    true_sequential: bool = Field(
        default=False,
        description="Look at the inputs of o_proj only when q, k and v are pruned, and so on: slower, less memory.",
    )

    @abstractmethod
    def solve(self, weight: Tensor, shares: list[tuple[int, float]], seen: Inputs) -> Pruned:
        """Prunes `weight` `[out, in]`, layers stacked on each other: `shares` has the outputs and the share of zeros of
        each. NotPositiveDefinite where that cannot be."""

    @abstractmethod
    def solving_bytes(self, inputs: int, rows: int) -> int:
        """Peak of what `solve` allocates beside the Hessian, for so many columns and outputs in all."""

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The Hessians, and one batch of the layer's input, which is a copy where the model computes in 16 bits; with
        the original path, the same again, and a batch of its inputs for all layers."""
        return observing_bytes(layers, tokens_per_batch, self.true_sequential, self.needs_original)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Beside what is held of the inputs, solving for the layers of one, taken to be those of one shape, with their
        weights stacked."""
        together: dict[tuple[int, int], int] = {}
        for layer in layers:
            shape = (layer.inputs, layer.outputs)
            together[shape] = together.get(shape, 0) + layer.outputs
        stacked = max((layer.dtype.itemsize for layer in layers), default=0)
        most = max(
            (self.solving_bytes(inputs, rows) + stacked * inputs * rows for (inputs, _), rows in together.items()),
            default=0,
        )
        return (1 + self.needs_original) * hessian_bytes(layers, self.true_sequential) + most

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """All inputs from one run of the block as it came in; with `true_sequential`, a run for each stage of it."""
        if calibration is None:
            raise CompressError(f"{self.name} needs calibration text")
        layers = block.layers(self.targets, self.skip)
        report: dict[str, Any] = {}
        for stage, seen in observed_stages(layers, calibration, self.true_sequential, self.needs_original):
            report |= self._prune_stage(list(stage.values()), seen)
        return {"layers": report}

    def _prune_stage(self, layers: list[Layer], seen: Inputs) -> dict[str, Any]:
        """Prunes the layers of one input; what to report of each."""
        trouble = "no calibration token reached the layer"
        if seen.hessian.count:
            weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
            try:
                result = self.solve(weight, [(len(layer.weight), self.rate_of(layer) or 0.0) for layer in layers], seen)
                return self._set(layers, result)
            except NotPositiveDefinite as error:
                trouble = str(error)
        return {layer.name: self.by_magnitude(layer, trouble) for layer in layers}

    def _set(self, layers: list[Layer], result: Pruned) -> dict[str, Any]:
        report, start = {}, 0
        for layer in layers:
            rows = slice(start, start + len(layer.weight))
            start = rows.stop
            weight = result.weight[rows].to(layer.dtype)
            size, lost = float(result.size[rows].sum()), max(float(result.lost[rows].sum()), 0.0)
            zeros = share_of_zeros(weight)
            report[layer.name] = {"sparsity": zeros, "loss": lost / size if size > 0 else 0.0, **result.said}
            layer.set_weight(weight)
        return report
