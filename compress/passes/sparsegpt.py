"""SparseGPT: set weights to zero column by column, and let the columns still to come make up for them.

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv 2301.00774.
With the Hessian `H` of the layer's output error and `H^-1 = U^T U`, a weight's score is `w^2 / U_kk^2`: what zeroing it
costs when all columns after it may move (optimal brain surgeon). The mask of a block of columns is chosen when its turn
comes, from the weights as they are by then; a pattern's, group by group.

A worked example: one row of two columns, `H = [[2, 1], [1, 2]]`, no damping, one zero wanted. For the first column
`1 / U_00^2` is 3/2, for the last it is 2. Weights 1.0 and 0.9: scores 1.5 and 1.62, so the first goes, and the second
moves to `0.9 + 1.0 * 1/2 = 1.4`. The output error is `(1, -0.5) H (1, -0.5)^T = 1.5`. By magnitude the second would go,
and nothing be left to make up for it: 1.62.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import CompressError
from compress.maths.feedback import Factor, factorise
from compress.maths.hessian import NotPositiveDefinite, mean_diagonal, quadratic_form
from compress.maths.masks import keep_mask
from compress.maths.pruning import prune_columns, refit
from compress.passes.base import LayerShape
from compress.passes.hessians import Inputs, hessian_bytes, input_copy, observed_stages
from compress.passes.pruning import PruningPass, pruned

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer


@dataclass(frozen=True)
class SparseGPTResult:
    """A pruned weight, float32 `[out, in]`, with exact zeros where `keep` is False. lost, size: squared error of each
    output, and its square, `[out]`, on the tokens of the Hessian. damping: as used."""

    weight: Tensor
    keep: Tensor
    lost: Tensor
    size: Tensor
    damping: float


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | Sequence[tuple[int, float]] = 0.5,
    pattern: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    refit_steps: int = 0,
    factor: Factor | None = None,
) -> SparseGPTResult:
    """Prune `weight` `[out, in]` (any float dtype) for inputs with this `hessian` `[in, in]`.

    sparsity: share of zeros, exact over every block of `block_size` columns together with those before it; for layers
    stacked on each other, the outputs and the share of each. pattern: "n:m" instead. refit_steps: conjugate gradients
    for the weights that are left, mask as found. factor: what `factorise` made of the same Hessian and damping, if it
    is at hand. NotPositiveDefinite if no damping up to 1 helps.
    """
    factor = factor or factorise(hessian, False, damping)
    dead = hessian.diagonal() == 0
    given = weight.to(hessian.dtype)
    parts = [(len(weight), sparsity)] if isinstance(sparsity, float) else sparsity
    # A column whose input was always zero is of no use: it goes first, and counts.
    result, keep, lost, moved = prune_columns(given.masked_fill(dead, 0.0), factor, parts, pattern, block_size)
    if refit_steps:
        result = refit(given, result, keep, hessian, factor.damping, refit_steps)
        lost = quadratic_form(result - given, hessian)
    else:
        # What was lost is d (H + damping) d^T with d the change of a row; take the damping's part off.
        lost -= factor.damping * mean_diagonal(hessian) * moved
    return SparseGPTResult(result, keep, lost, quadratic_form(given, hessian), factor.damping)


class SparseGPT(PruningPass):
    """Set weights to zero one column at a time, correcting the columns that follow by the inputs seen in text."""

    name: ClassVar[str] = "sparsegpt"
    needs_calibration: ClassVar[bool] = True

    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of the Hessian's mean diagonal added to it; rises tenfold, up to 1, if that is too little.",
    )
    block_size: int = Field(
        default=128,
        ge=1,
        description="Columns whose mask is chosen at once, and that are corrected together. A share of zeros is "
        "counted in them, over all outputs.",
    )
    refit: int = Field(
        default=0,
        ge=0,
        description="Steps of conjugate gradients that then fit the weights left, under the mask that was found.",
    )
    true_sequential: bool = Field(
        default=False,
        description="Look at the inputs of o_proj only when q, k and v are pruned, and so on: slower, less memory.",
    )

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The Hessians, and one batch of the layer's input, which is a copy where the model computes in 16 bits."""
        return hessian_bytes(layers, self.true_sequential) + input_copy(layers, tokens_per_batch)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Beside the Hessians, tables in float32, the larger of two moments. Factorising: the Hessian in reverse and
        its Cholesky factor. Pruning the layers of one input together, taken to be those of one shape: the factor;
        weights as they were, transposed, as corrected and as pruned; three masks; and a block of columns. With
        `refit`: five tables of the weights' size beside two of these."""
        together: dict[tuple[int, int], int] = {}
        for layer in layers:
            shape = (layer.inputs, layer.outputs)
            together[shape] = together.get(shape, 0) + layer.outputs

        def of(inputs: int, rows: int) -> int:
            square = 4 * inputs**2
            tables = (7 if self.refit else 5) * 4 + 3
            return max(2 * square, square + tables * inputs * rows + 6 * 4 * min(self.block_size, inputs) * rows)

        most = max((of(inputs, rows) for (inputs, _), rows in together.items()), default=0)
        return hessian_bytes(layers, self.true_sequential) + most

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """All Hessians from one run of the block as it came in; with `true_sequential`, a run for each stage of it."""
        if calibration is None:
            raise CompressError("sparsegpt needs calibration text")
        layers = block.layers(self.targets, self.skip)
        report: dict[str, Any] = {}
        for stage, seen in observed_stages(layers, calibration, self.true_sequential):
            report |= self._prune_stage(stage, seen)
        return {"layers": report}

    def _prune_stage(self, stage: dict[str, Layer], seen: Inputs) -> dict[str, Any]:
        """Prunes the layers of one input together; what to report of each."""
        factor, trouble, hessian = None, "no calibration token reached the layer", seen.hessian.matrix
        if seen.hessian.count:
            try:
                factor = factorise(hessian, False, self.damping)
            except NotPositiveDefinite as error:
                trouble = str(error)
        if factor is None:
            return {name: self._by_magnitude(layer, trouble) for name, layer in stage.items()}
        layers = list(stage.values())
        weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
        shares = [(len(layer.weight), self.rate_of(layer) or 0.0) for layer in layers]
        result = sparsegpt(
            weight, hessian, shares, self.pattern, self.damping, self.block_size, self.refit, factor
        )  # fmt: skip
        report, start = {}, 0
        for layer in layers:
            rows = slice(start, start + len(layer.weight))
            start = rows.stop
            now = result.weight[rows].to(layer.dtype)
            size, lost = float(result.size[rows].sum()), max(float(result.lost[rows].sum()), 0.0)
            report[layer.name] = {
                "sparsity": float((now == 0).float().mean()), "loss": lost / size if size > 0 else 0.0,
                "damping": result.damping,
            }  # fmt: skip
            layer.set_weight(now)
        return report

    def _by_magnitude(self, layer: Layer, trouble: str) -> dict[str, Any]:
        weight = layer.weight
        scores = weight.float().abs()
        weight, entry = pruned(weight, keep_mask(weight, scores, self.rate_of(layer), self.pattern), scores)
        layer.set_weight(weight)
        return {**entry, "fallback": f"magnitude: {trouble}"}
