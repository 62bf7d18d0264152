"""Magnitude pruning: the smallest weights become zero. No data.

Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv 1506.02626.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.maths.masks import keep_mask
from compress.passes.base import LayerShape
from compress.passes.pruning import PruningPass, pruned

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block


class Magnitude(PruningPass):
    """Set the weights with the smallest magnitude to zero, without data."""

    name: ClassVar[str] = "magnitude"
    needs_calibration: ClassVar[bool] = False

    scope: Literal["layer", "row"] = Field(
        default="layer",
        description="Where a share is counted: over the whole layer, or in each row (output) by itself.",
    )

    @property
    def counted_per(self) -> str:
        return self.scope

    def scores(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        return weight.float().abs()

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Scores in float32, again without what is zero already, what selecting in them copies (12 bytes a weight),
        and masks."""
        return max((26 * layer.outputs * layer.inputs for layer in layers), default=0)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        report: dict[str, Any] = {}
        for name, layer in block.layers(self.targets, self.skip).items():
            weight = layer.weight
            scores = weight.float().abs()
            keep = keep_mask(weight, scores, self.rate_of(layer), self.pattern, per=self.scope)
            weight, report[name] = pruned(weight, keep, scores)
            layer.set_weight(weight)
        return {"layers": report}
