"""Magnitude pruning: the smallest weights become zero. No data.

Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv 1506.02626.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from compress.maths.masks import check_columns, keep_mask, parse_pattern, parse_sparsity
from compress.passes.base import BlockPass, LayerShape

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block

Sparsity = Annotated[float, BeforeValidator(parse_sparsity), Field(ge=0, lt=1)]
Pattern = Annotated[str, BeforeValidator(parse_pattern)]


def one_target(options: Any) -> Any:
    """Options with either a sparsity or a pattern: sparsity 0.5 if neither is given; both: ValueError."""
    if not isinstance(options, dict):
        return options
    if options.get("pattern") is None and options.get("sparsity") is None:
        return {**options, "sparsity": 0.5}
    if options.get("pattern") is not None and options.get("sparsity") is not None:
        raise ValueError("sparsity and pattern exclude each other: the pattern says how many weights stay")
    return options


def pruned(weight: Tensor, keep: Tensor, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The weight with exact zeros where `keep` is False, its share of zeros, and the share of squared scores lost."""
    result = weight.masked_fill(~keep, 0.0)
    squared = scores.square()
    total = float(squared.sum())
    lost = float(squared.masked_fill_(keep, 0.0).sum())
    return result, {"sparsity": float((result == 0).float().mean()), "loss": lost / total if total else 0.0}


class Magnitude(BlockPass):
    """Set the weights with the smallest magnitude to zero, without data."""

    name: ClassVar[str] = "magnitude"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "sparse"
    needs_calibration: ClassVar[bool] = False

    sparsity: Sparsity | None = Field(
        default=None, description='Share of the weights to set to zero, 0.5 or "50%"; 0.5 if no pattern is given.'
    )
    pattern: Pattern | None = Field(
        default=None, description='Instead of a share: "2:4" keeps 2 of every 4 neighbours in a row. Quote it.'
    )
    scope: Literal["layer", "row"] = Field(
        default="layer",
        description="Where a share is counted: over the whole layer, or in each row (output) by itself.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, options: Any) -> Any:
        return one_target(options)

    def spec_of(self, layer: LayerShape) -> None:
        """Stays dense. StartError if the pattern does not divide the columns."""
        check_columns(self.pattern, layer.inputs)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Scores in float32, again without what is zero already, what selecting in them copies (12 bytes a weight),
        and masks."""
        return max((26 * layer.outputs * layer.inputs for layer in layers), default=0)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        report: dict[str, Any] = {}
        for name, layer in block.layers(self.targets, self.skip).items():
            weight = layer.weight
            scores = weight.float().abs()
            keep = keep_mask(weight, scores, self.sparsity, self.pattern, per=self.scope)
            weight, report[name] = pruned(weight, keep, scores)
            layer.set_weight(weight)
        return {"layers": report}
