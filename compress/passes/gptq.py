"""GPTQ: round one column at a time, and let the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, arXiv 2210.17323, algorithm 1. Let `H` be the Hessian of the layer's output error, and
`H^-1 = U^T U` with `U` upper triangular. When column `j` is rounded from `w_j` to `q_j`, each column `k` after it
moves by `-(w_j - q_j) / U_jj * U_jk`, the least-squares answer.

A worked example: one row of two columns, the grid of whole numbers, `H = [[2, 1], [1, 2]]`, no damping.
`U_01 / U_00` is `-1/2`: when `w_0 = 0.4` is rounded to 0, its error moves `w_1` by `0.4 / 2`, from 0.4 to 0.6, which is
rounded to 1. The codes are `[0, 1]`, and the output error `e H e^T` is 0.56; rounding to nearest: `[0, 0]` and 0.96.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import CompressError
from compress.maths.grid import QuantSpec, compute_dtype, dequantize, find_params
from compress.maths.hessian import Hessian, NotPositiveDefinite, inverse_cholesky, mean_diagonal
from compress.passes.base import LayerShape
from compress.passes.rounding import RoundingPass, hessian_sizes
from compress.passes.rtn import relative_weight_error, round_to_nearest

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Block, Layer


@dataclass(frozen=True)
class GPTQResult:
    """A rounded weight.

    codes: int8 `[out, in]`, in the weight's own order of columns. scale: `[out, groups]`.
    zero: int8 `[out, groups]`, or None. damping: the fraction of the mean diagonal that was added.
    loss: squared error of the layer's output relative to its squared output, on the tokens of the Hessian.
    fallback: why the weight was rounded to nearest instead, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    damping: float
    loss: float
    fallback: str | None = None


@dataclass(frozen=True)
class Factor:
    """`upper`: `U` of the Hessian with its columns in `order` `[in]`, that of rounding; `damping`: as used."""

    upper: Tensor
    order: Tensor
    damping: float


def factorise(hessian: Tensor, act_order: bool, damping: float) -> Factor:
    """What `gptq` needs of a Hessian, whatever the weight. NotPositiveDefinite if no damping helps."""
    if not act_order:
        upper, damping = inverse_cholesky(hessian, damping)
        return Factor(upper, torch.arange(len(hessian), device=hessian.device), damping)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper, damping = inverse_cholesky(hessian[order.unsqueeze(1), order], damping)
    return Factor(upper, order, damping)


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
    search: as in `find_params`, weighed by the Hessian's diagonal. keep_zeros: weights that are exactly 0 stay so.
    block_size: columns corrected together by one matrix product; it changes the speed, not the result.
    factor: what `factorise` made of the same Hessian, act_order and damping, if it is at hand.

    A column whose input was always zero has its weights set to 0 first: they had no effect. If no damping up to 1
    makes the Hessian positive definite, the weight is rounded to nearest and `fallback` says so.
    """
    dtype = compute_dtype(weight)
    hessian = hessian.to(dtype)
    try:
        factor = factor or factorise(hessian, act_order, damping)
    except NotPositiveDefinite as error:
        return rounded(weight, spec, search, str(error))
    original = weight.to(dtype).masked_fill(hessian.diagonal() == 0, 0.0)
    importance = hessian.diagonal() if search else None
    grid = find_params(original, spec, search, importance) if act_order or spec.group_size == -1 else None
    codes, scale, zero, lost = _walk(original, factor, spec, grid, importance, block_size, keep_zeros)
    # What was lost is tr(D (H + damping) D^T) with D the change of the weight; take the damping's part off.
    change = dequantize(codes, scale, zero, spec, dtype).sub_(original).square_().sum()
    lost = float(lost - factor.damping * mean_diagonal(hessian) * change)
    size = float((original @ hessian).mul_(original).sum())
    return GPTQResult(codes, scale, zero, factor.damping, max(lost, 0.0) / size if size > 0 else 0.0)


def rounded(weight: Tensor, spec: QuantSpec, search: bool, reason: str) -> GPTQResult:
    """Rounded to nearest, which is GPTQ for a diagonal Hessian; `loss` is the relative error of the weight itself."""
    codes, scale, zero = round_to_nearest(weight, spec, search)
    loss = relative_weight_error(weight, codes, scale, zero, spec)
    return GPTQResult(codes, scale, zero, 0.0, loss, f"rounded to nearest: {reason}")


def _walk(
    weight: Tensor,
    factor: Factor,
    spec: QuantSpec,
    grid: tuple[Tensor, Tensor | None] | None,
    importance: Tensor | None,
    block_size: int,
    keep_zeros: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The loop over columns: codes, scale, zero, and the sum of the squared errors `((w_j - q_j) / U_jj)**2`.

    That sum is the squared output error, damping included. The tensors worked on are transposed, `[in, out]`, so that a
    column is one stretch of memory.

    `work` holds the weights with the corrections of all *finished blocks*. Inside a block a column's corrections are
    summed when its turn comes (one matrix-vector product with the errors so far), and the columns beyond the block
    get theirs once, by one matrix product at the block's end: each error reaches each later column exactly once.
    """
    rows, columns = weight.shape
    size = spec.columns_per_group(columns)
    upper, order = factor.upper, factor.order
    work = weight.t()[order].contiguous()
    zeros = work == 0 if keep_zeros else None
    codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    errors = torch.empty(min(block_size, columns), rows, dtype=work.dtype, device=weight.device)
    scales, offsets = _transposed(grid, spec, work, columns // size)
    group_of = (order // size).tolist()
    lost = torch.zeros((), dtype=work.dtype, device=weight.device)
    inverse_diagonal = upper.diagonal().reciprocal().tolist()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        for column in range(start, end):
            done = column - start
            group = group_of[column]
            if grid is None and column % size == 0:
                span = work[column : column + size] - upper[start:column, column : column + size].t() @ errors[:done]
                weights = importance[column : column + size] if importance is not None else None
                found = _one_group(span, spec, weights)
                scales[group], offsets[group] = found
            current = torch.addmv(work[column], errors[:done].t(), upper[start:column, column], alpha=-1)
            code = (current / scales[group]).round_().add_(offsets[group]).clamp_(spec.qmin, spec.qmax)
            if zeros is not None:
                code = torch.where(zeros[column], offsets[group], code)
            codes[column] = code
            torch.sub(current, code.sub_(offsets[group]).mul_(scales[group]), out=errors[done])
            errors[done] *= inverse_diagonal[column]
        lost += errors[: end - start].square().sum()
        if end < columns:
            work[end:].addmm_(upper[start:end, end:].t(), errors[: end - start], alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    scale = scales.t().to(spec.torch_scale_dtype).contiguous()
    zero = None if spec.symmetric else offsets.t().to(torch.int8).contiguous()
    return unordered.t().contiguous(), scale, zero, lost


def _transposed(
    grid: tuple[Tensor, Tensor | None] | None, spec: QuantSpec, work: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Scales and zero points as floats `[groups, out]`; empty ones to fill if the grid is still to be found."""
    scales = torch.ones(groups, work.shape[1], dtype=work.dtype, device=work.device)
    offsets = torch.zeros_like(scales)
    if grid is not None:
        scales.copy_(grid[0].t())
        if grid[1] is not None:
            offsets.copy_(grid[1].t())
    return scales, offsets


def _one_group(span: Tensor, spec: QuantSpec, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[out]`, as floats, of one group of corrected weights `[size, out]`."""
    whole = QuantSpec(spec.bits, -1, spec.symmetric, spec.scale_dtype)
    scale, zero = find_params(span.t(), whole, importance is not None, importance)
    scale = scale[:, 0].to(span.dtype)
    return scale, torch.zeros_like(scale) if zero is None else zero[:, 0].to(span.dtype)


class GPTQ(RoundingPass):
    """Round weights one column at a time, correcting the columns that follow by the inputs seen in calibration text."""

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    act_order: bool = Field(
        default=True,
        description="Round the columns with the largest inputs first. The file's layout stays the plain one.",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of the Hessian's mean diagonal added to it; rises tenfold, up to 1, if that is too little.",
    )
    block_size: int = Field(
        default=128, ge=1, description="Columns corrected at once: speed and memory, not the result."
    )
    search: bool = Field(
        default=True,
        description="Try smaller ranges for each group and keep the one with the least error, weighed by the inputs.",
    )
    true_sequential: bool = Field(
        default=False,
        description="Look at the inputs of o_proj only when q, k and v are rounded, and so on: slower, less memory.",
    )

    def observing_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """The Hessians, and one batch of the layer's input, which is a copy where the model computes in 16 bits."""
        copies = (4 * tokens_per_batch * layer.inputs for layer in layers if layer.dtype.itemsize < 4)
        return self._hessian_bytes(layers) + max(copies, default=0)

    def _hessian_bytes(self, layers: Sequence[LayerShape]) -> int:
        """Of those held at once."""
        sizes = hessian_sizes(layers)
        return max(sizes, default=0) if self.true_sequential else sum(sizes)

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Tables in float32, the larger of two moments. Factorising: the Hessian, its reordered copy, the
        Cholesky factor of that, and the inverse of the factor. Measuring a rounded weight's loss: Hessian, factor,
        and the weight, its rounded form, their difference and the product with the Hessian, beside the codes."""

        def of(layer: LayerShape) -> int:
            square, weights = 4 * layer.inputs**2, layer.inputs * layer.outputs
            return max(3 * square, square + 17 * weights)

        return self._hessian_bytes(layers) + max(map(of, layers), default=0)

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        """All Hessians from one run of the block as it came in; with `true_sequential`, a run for each stage of it."""
        if calibration is None:
            raise CompressError("gptq needs calibration text")
        layers = block.layers(self.targets, self.skip)
        stages = calibration.stages(list(layers))
        # The stages are those of one batch; another may reach the layers that are missing there.
        unseen = [[name] for name in layers if not any(name in stage for stage in stages)]
        runs = [[stage] for stage in stages] if self.true_sequential else [stages]
        report: dict[str, Any] = {}
        for run in [*runs, *([stage] for stage in unseen)]:
            weights = {stage[0]: layers[stage[0]].weight for stage in run}
            hessians = {name: Hessian(weight.shape[1], weight.device) for name, weight in weights.items()}
            calibration.observe({name: hessian.add for name, hessian in hessians.items()})
            for stage in run:
                hessian = hessians.pop(stage[0])
                report |= self._compress_stage({name: layers[name] for name in stage}, hessian, block.sparse)
        return {"layers": report}

    def _compress_stage(self, stage: dict[str, Layer], hessian: Hessian, sparse: bool) -> dict[str, Any]:
        """Rounds the layers of one input; what to report of each."""
        factor, trouble = None, "no calibration token reached the layer"
        if hessian.count:
            try:
                factor = factorise(hessian.matrix, self.act_order, self.damping)
            except NotPositiveDefinite as error:
                trouble = str(error)
        report: dict[str, Any] = {}
        for name, layer in stage.items():
            spec = self.grid_of(layer)
            if factor is None:
                result = rounded(layer.weight, spec, self.search, trouble)
            else:
                result = gptq(
                    layer.weight, hessian.matrix, spec, self.act_order, self.damping, self.block_size, self.search,
                    keep_zeros=sparse, factor=factor,
                )  # fmt: skip
            layer.quantize(result.codes, result.scale, result.zero, spec)
            report[name] = {"bits": spec.bits, "loss": result.loss, "damping": result.damping}
            if result.fallback:
                report[name]["fallback"] = result.fallback
        return report
