"""GPTQ: round one column at a time, and let the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, arXiv 2210.17323, algorithm 1. Let `H` be the Hessian of the layer's output error, and `H = R R^T`
with `R` upper triangular. With `d_j = w_j - q_j` what rounding has changed so far, column `k` is rounded as if it were
`w_k + sum over j < k of d_j R_jk / R_kk`, the least-squares answer to all the errors before it (`maths/feedback.py`).

A worked example: one row of two columns, the grid of whole numbers, `H = [[2, 1], [1, 2]]`, no damping.
`R_01 / R_11` is 1/2: when `w_0 = 0.4` is rounded to 0, its error moves `w_1` by `0.4 / 2`, from 0.4 to 0.6, which is
rounded to 1. The codes are `[0, 1]`, and the output error `e H e^T` is 0.56; rounding to nearest: `[0, 0]` and 0.96.

`propagation: gptaq`: Li et al.: "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, arXiv
2504.02692. The blocks before are rounded already, so a layer's inputs `X~` are not what they were, `X`. Its output
shall be near `W X`: when column `q` is rounded, the columns after it also make up for `w_q (X_q - X~_q)`, what the
change of that column's input costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.errors import CompressError
from compress.maths.feedback import STRETCH, Factor, factorise, round_columns
from compress.maths.grid import QuantSpec, compute_dtype, dequantize, find_params
from compress.maths.hessian import NotPositiveDefinite, mean_diagonal, quadratic_form
from compress.maths.named_grids import SUPER_BLOCKS, SUPER_COLUMNS, TRELLIS
from compress.passes.base import LayerShape
from compress.passes.hessians import Inputs, hessian_bytes, observed_stages, observing_bytes
from compress.passes.rounding import RoundingPass
from compress.passes.rtn import relative_weight_error, round_to_nearest

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer


@dataclass(frozen=True)
class GPTQResult:
    """A rounded weight.

    codes: int8 `[out, in]`, in the weight's own order of columns. scale: `[out, groups]`.
    zero: int8 `[out, groups]`, or None. damping: the fraction of the mean diagonal that was added.
    lost, size: squared error of each output, and its square, `[out]`, on the tokens of the Hessian.
    fallback: why the weight was rounded to nearest instead (then both speak of the weight itself), or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    damping: float
    lost: Tensor
    size: Tensor
    fallback: str | None = None

    @property
    def loss(self) -> float:
        """Squared error of the layer's output relative to its squared output."""
        size = float(self.size.sum())
        return max(float(self.lost.sum()), 0.0) / size if size > 0 else 0.0

    def of_rows(self, rows: slice) -> GPTQResult:
        """A part of the outputs."""
        zero = None if self.zero is None else self.zero[rows]
        return replace(
            self, codes=self.codes[rows], scale=self.scale[rows], zero=zero, lost=self.lost[rows], size=self.size[rows]
        )


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    search: bool = False,
    keep_zeros: bool = False,
    factor: Factor | None = None,
) -> GPTQResult:
    """Round `weight` `[out, in]` (any float dtype) for inputs with this `hessian` `[in, in]`.

    act_order: columns with the largest diagonal first, with every group's grid fixed beforehand from the weights as
    given ("static groups"), so that neighbouring columns still share a scale and nothing about the order has to be
    stored. Otherwise left to right, a group's grid found from its corrected weights when its first column is reached.
    search: as in `find_params`, weighed by the Hessian's diagonal, or on a grid with super-blocks by the pivots of its
    factor, which are what an error costs when the columns after it have made up for it. keep_zeros: weights that are
    exactly 0 stay so. On a trellis the order is from left to right, and grids are fixed beforehand.
    block_size: columns corrected together by one matrix product; it changes the speed, not the result.
    factor: what `factorise` made of the same Hessian, act_order and damping, if it is at hand.

    A column whose input was always zero has its weights set to 0 first: they had no effect. If no damping up to 1
    makes the Hessian positive definite, the weight is rounded to nearest and `fallback` says so.
    """
    hessian = hessian.to(compute_dtype(weight))
    act_order = act_order and not spec.trellis
    if keep_zeros and spec.trellis:
        raise ValueError("a trellis has no code for 0, so zeros cannot be kept")
    try:
        factor = factor or factorise(hessian, act_order, damping)
    except NotPositiveDefinite as error:
        return rounded(weight, spec, search, str(error))
    dead = hessian.diagonal() == 0
    if bool(dead.any()):
        weight = weight.masked_fill(dead, 0.0)
    importance = _importance(hessian, factor, spec) if search else None
    fixed = act_order or spec.trellis or spec.group_size == -1
    grid = find_params(weight, spec, search, importance) if fixed else None
    size = quadratic_form(weight, hessian)
    codes, scale, zero, lost, moved = round_columns(weight, factor, spec, grid, importance, block_size, keep_zeros)
    if factor.carry is None:
        # What was lost is d (H + damping) d^T with d the change of a row; take the damping's part off.
        lost -= factor.damping * mean_diagonal(hessian) * moved
    else:  # that is measured from where GPTAQ moved the weights
        lost = quadratic_form(dequantize(codes, scale, zero, spec, hessian.dtype).sub_(weight), hessian)
    return GPTQResult(codes, scale, zero, factor.damping, lost, size)


def _importance(hessian: Tensor, factor: Factor, spec: QuantSpec) -> Tensor:
    """What an error in each column weighs, `[in]`, while grids are searched."""
    if spec.super_block is None:
        return hessian.diagonal()
    importance = torch.empty_like(factor.pivots)
    importance[factor.order] = factor.pivots
    return importance


def rounded(weight: Tensor, spec: QuantSpec, search: bool, reason: str) -> GPTQResult:
    """Rounded to nearest, which is GPTQ for a diagonal Hessian; `loss` is the relative error of the weight itself."""
    codes, scale, zero = round_to_nearest(weight, spec, search)
    size = weight.float().square().sum(1)
    lost = size * relative_weight_error(weight, codes, scale, zero, spec)
    return GPTQResult(codes, scale, zero, 0.0, lost, size, f"rounded to nearest: {reason}")


class GPTQ(RoundingPass):
    """Round weights one column at a time, correcting the columns that follow by the inputs seen in calibration text."""

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True
    rounds_rows: ClassVar[bool] = True

    act_order: bool = Field(
        default=True,
        description="Round the columns with the largest inputs first. The file's layout stays the plain one. On "
        "grid gguf-q2_k it is false where nothing is said: scales found on the way are worth more there; on a trellis "
        "rows are rounded from left to right.",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of the Hessian's mean diagonal added to it; rises tenfold, up to 1, if that is too little.",
    )
    block_size: int = Field(
        default=128,
        ge=1,
        description="Columns corrected at once: speed and memory, not the result (on a trellis: in multiples of 64).",
    )
    search: bool = Field(
        default=True,
        description="Try smaller ranges for each group and keep the one with the least error, weighed by the inputs.",
    )
    true_sequential: bool = Field(
        default=False,
        description="Look at the inputs of o_proj only when q, k and v are rounded, and so on: slower, less memory.",
    )

    propagation: Literal["none", "gptaq"] = Field(
        default="none",
        description="`gptaq`: also make up for what the blocks before, rounded already, did to a layer's inputs.",
    )

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.grid in ("gguf-q2_k", TRELLIS) and "act_order" not in self.model_fields_set:
            self.__dict__["act_order"] = False  # the object is frozen once it is made; this is its making
        if self.grid == TRELLIS and self.act_order:
            raise ValueError("act_order is true, and on grid trellis rows are rounded from left to right: leave it out")
        if self.grid == TRELLIS and self.propagation != "none":
            raise ValueError(f"propagation is {self.propagation}, which gptq cannot do on grid trellis: leave it out")
        return self

    @property
    def needs_original(self) -> bool:
        """GPTAQ compares a layer's inputs with those in the original model."""
        return self.propagation == "gptaq"

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """What is gathered of the inputs; for GPTAQ, on both paths."""
        return observing_bytes(layers, tokens_per_batch, self.true_sequential, self.needs_original)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Tables in float32, the larger of two moments. Factorising: the reordered Hessian and its Cholesky factor (for
        GPTAQ four more: deviation, reordered, and two solves). Rounding the layers of one input together, taken to be
        those of one shape: factor, weights in their own dtype and transposed, as they were and as corrected, codes, and
        what goes on in a block of columns; and, left to right, a super-block's weights while its grid is found, or a
        stretch's while its path is (weights, as they were and as corrected, scales, codes and numbers)."""
        propagates = self.needs_original
        found = 3 * 4 * SUPER_COLUMNS if self.grid in SUPER_BLOCKS and not self.act_order else 0
        found += 8 * 4 * STRETCH if self.grid == TRELLIS else 0
        together: dict[tuple[int, int], int] = {}
        for layer in layers:
            shape = (layer.inputs, layer.outputs)
            together[shape] = together.get(shape, 0) + layer.outputs

        def of(inputs: int, rows: int) -> int:
            square: int = 4 * inputs**2
            rounding = (1 + propagates) * square + 14 * inputs * rows + 4 * 4 * self.block_size * rows + found * rows
            return max((6 if propagates else 2) * square, rounding)

        most = max((of(inputs, rows) for (inputs, _), rows in together.items()), default=0)
        return (1 + propagates) * hessian_bytes(layers, self.true_sequential) + most + self.path_bytes(layers)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """All Hessians from one run of the block as it came in; with `true_sequential`, a run for each stage of it."""
        if calibration is None:
            raise CompressError("gptq needs calibration text")
        layers = block.layers(self.targets, self.skip)
        report: dict[str, Any] = {}
        for stage, seen in observed_stages(layers, calibration, self.true_sequential, self.needs_original):
            report |= self._compress_stage(stage, seen, block.sparse)
        return {"layers": report}

    def _compress_stage(self, stage: dict[str, Layer], seen: Inputs, sparse: bool) -> dict[str, Any]:
        """Rounds the layers of one input, those with the same grid together; what to report of each."""
        factor, trouble, hessian = None, "no calibration token reached the layer", seen.hessian.matrix
        if seen.hessian.count:
            try:
                factor = factorise(hessian, self.act_order, self.damping, seen.deviation())
            except NotPositiveDefinite as error:
                trouble = str(error)
        alike: dict[QuantSpec, list[Layer]] = {}
        for layer in stage.values():
            alike.setdefault(self.grid_of(layer), []).append(layer)
        report: dict[str, Any] = {}
        for spec, layers in alike.items():
            weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
            if factor is None:
                result = rounded(weight, spec, self.search, trouble)
            else:
                result = gptq(
                    weight, hessian, spec, self.act_order, self.damping, self.block_size, self.search,
                    keep_zeros=sparse, factor=factor,
                )  # fmt: skip
            start = 0
            for layer in layers:
                own = result.of_rows(slice(start, start + layer.weight.shape[0]))
                start += layer.weight.shape[0]
                layer.quantize(own.codes, own.scale, own.zero, spec)
                report[layer.name] = {"bits": spec.bits, "loss": own.loss, "damping": own.damping}
                if own.fallback:
                    report[layer.name]["fallback"] = own.fallback
        return {name: report[name] for name in stage}
