"""Moving a per-channel scale from the layers of a stage into what produces their input.

Layers that share an input `x` compute the same from `x / s` if their weights' columns are multiplied by `s`. What makes
`x` can do the division: a norm, by its weight, or a linear layer, by its rows, where nothing but per-channel linear
steps lies between (`up_proj -> product with the gate -> down_proj`, `v_proj -> attention -> o_proj`, or a ReLU, since
`s` is positive). Outlier channels can so be made smaller for free: SmoothQuant and AWQ are ways to choose `s`.

No table says which layer that is. Candidates are the norm whose output is the stage's input, or the linear layers
called before it, in the few layouts in which rows can stand; each is tried with a random scale on a batch of the
calibration text, and stays only if the stage's input is divided by exactly that and the block's output stands still.
So what also feeds something else (a router, the residual of a post-norm block) is refused by what it does. Trial scales
are powers of two, which change no rounding: the right candidate reproduces the output almost to the last bit, in any
dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.calibration import BlockCalibration, Traced
from compress.model import Block, Layer
from compress.passes.base import LayerShape

#: Trial scales are 2**-2 .. 2**2.
_TRIAL_EXPONENT = 2


@dataclass(frozen=True)
class Fold:
    """A stage, and the module that can take a scale from it.

    stage: names in the block of *all* layers with this input, those that a pass leaves alone included. producer: name
    of the module. rows: int64 `[in]`, which of its output channels each channel of the stage's input comes from; query
    heads that share a value head share its rows. offset: what the producer adds to its weight before it multiplies (1
    for Gemma's norms, else 0).
    """

    stage: tuple[str, ...]
    producer: str
    rows: Tensor
    offset: float = 0.0

    def shared(self, values: Tensor, how: Literal["amax", "mean"]) -> Tensor:
        """`values` `[in]`, a positive figure of each channel, made equal (by maximum or mean) where channels come from
        one row of the producer and so must have one scale. Dtype and device of `values`."""
        rows = self.rows.to(values.device)
        found = torch.ones(int(rows.max()) + 1, dtype=values.dtype, device=values.device)
        return found.scatter_reduce_(0, rows, values, how, include_self=False)[rows]

    def apply(self, block: Block, scale: Tensor) -> None:
        """Divides what the producer gives by `scale` `[in]` (positive, equal where rows are), and multiplies the
        columns of all layers of the stage by it, in place, each rounded once to the dtype it is stored in.

        ValueError where a layer is rounded already: its codes would not follow.
        """
        rounded = block.quantized()
        late = [name for name in (self.producer, *self.stage) if name in rounded]
        if late:
            raise ValueError(f"{late[0]} of {block.name} is rounded already; fold before rounding")
        for parameter, rows, offset in self._divided(block):
            by = torch.ones(parameter.shape[0], dtype=torch.float32, device=parameter.device)
            by[rows] = scale.to(by)
            by = by.view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_((parameter.float() + offset) / by - offset)
        layers = block.layers()
        for name in self.stage:
            weight = layers[name].weight
            weight.copy_(weight.float() * scale.to(weight.device, torch.float32))

    def _divided(self, block: Block) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The producer's tensors with its output channels first, the channels to divide, and what is added to them."""
        module = block.module.get_submodule(self.producer)
        weight = Layer(block, self.producer, module).weight if _is_matrix(module) else module.weight.detach()
        rows = self.rows.to(weight.device)
        yield weight, rows, self.offset
        if getattr(module, "bias", None) is not None:
            yield module.bias.detach(), rows, 0.0

    def saved(self, block: Block) -> list[tuple[Tensor, Tensor]]:
        """The tensors that `apply` changes, each with a copy: to undo it to the last bit."""
        layers = block.layers()
        tensors = [tensor for tensor, _, _ in self._divided(block)] + [layers[name].weight for name in self.stage]
        return [(tensor, tensor.clone()) for tensor in tensors]


def restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    """Undoes `Fold.apply`, given what `Fold.saved` gave before it."""
    for tensor, old in saved:
        tensor.copy_(old)


@torch.no_grad()
def find_folds(block: Block, calibration: BlockCalibration, seed: int = 0) -> tuple[dict[str, Fold], dict[str, str]]:
    """Of each dense layer of the block: the fold of its stage, or else, in the second table, why it has none.

    The block is as it was when this returns. Costs a run of the block over one batch, and one for each candidate.
    Layers that this batch does not reach (silent experts) cannot be proved and have no fold.
    """
    names = list(block.layers())
    before = calibration.trace([*names, *_norms(block)])
    heads = getattr(calibration.stream.model.config.get_text_config(), "num_attention_heads", None)
    folds: dict[str, Fold] = {}
    refused = dict.fromkeys(names, "no calibration token reached it")
    for stage in before.stages(names):
        fold = None
        candidates = list(_candidates(block, before, tuple(stage), heads))
        for index, candidate in enumerate(candidates):
            if _holds(candidate, block, calibration, before, seed + index):
                fold = candidate
                break
        for name in stage:
            if fold is not None:
                folds[name] = fold
                del refused[name]
            else:
                refused[name] = _reason(candidates)
    return folds, refused


def folding_bytes(layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
    """Peak of `find_folds`, the activations of one run not counted: what all layers are given and give in one run is
    kept while another is under way, beside copies of a producer and the layers of its stage, and one scaled."""
    values = sum(layer.inputs + layer.outputs for layer in layers)
    itemsize = max((layer.dtype.itemsize for layer in layers), default=0)
    weights = sorted((layer.inputs * layer.outputs for layer in layers), reverse=True)
    return tokens_per_batch * values * itemsize + sum(weights[:3]) * itemsize + 8 * max(weights, default=0)


def _reason(candidates: list[Fold]) -> str:
    if not candidates:
        return "nothing in the block with a weight for each channel produces its input"
    tried = ", ".join(dict.fromkeys(candidate.producer for candidate in candidates))
    return f"a scale in {tried} changes the output of the block"


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _norms(block: Block) -> list[str]:
    """Modules whose one weight is a vector."""
    return [
        name
        for name, module in block.module.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1
    ]


def _candidates(block: Block, traced: Traced, stage: tuple[str, ...], heads: int | None) -> Iterator[Fold]:
    """Ways in which the stage's input may have been produced, the likeliest first."""
    x = traced.inputs[stage[0]]
    columns = x.shape[-1]
    whole = torch.arange(columns)
    earlier = [name for name in traced.before(stage[0]) if name not in stage]
    for name in earlier:
        if not _is_matrix(block.module.get_submodule(name)) and _same_memory(traced.outputs[name], x):
            yield from (Fold(stage, name, whole, offset) for offset in (0.0, 1.0))
            return
    for name in reversed(earlier):
        if name in block.layers():
            outputs = traced.outputs[name].shape[-1]
            yield from (Fold(stage, name, rows) for rows in _layouts(outputs, columns, heads))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, or the other seen in another shape. Both are alive, so addresses tell them apart."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1])


def _layouts(outputs: int, columns: int, heads: int | None) -> Iterator[Tensor]:
    """Which rows of a layer with `outputs` rows may make the `columns` channels of a stage's input, as `Fold.rows`.

    Slices of a fused layer (one slice: all of it), the last first, as gate and up, or q, k and v, stand one after
    another. Then what attention makes of values: heads of `columns / heads` channels, one value head for each run of
    query heads, alone, after all queries and keys, or after those of its own run.
    """
    if outputs % columns == 0:
        for start in reversed(range(0, outputs, columns)):
            yield torch.arange(start, start + columns)
    if not heads or columns % heads:
        return
    width = columns // heads
    channel = torch.arange(columns)
    head, within = channel // width, channel % width
    if outputs % width == 0 and outputs < columns and heads % (outputs // width) == 0:
        yield head // (heads // (outputs // width)) * width + within
    fused = outputs // width - heads  # key and value heads of a layer that makes all three
    if outputs % width or fused < 2 or fused % 2 or heads % (fused // 2):
        return
    values, run = fused // 2, heads // (fused // 2)
    if values < heads:
        yield (heads + values + head // run) * width + within
    yield (head // run * (run + 2) + run + 1) * width + within


def _holds(fold: Fold, block: Block, calibration: BlockCalibration, before: Traced, seed: int) -> bool:
    """Whether the block computes the same with a random scale folded in. Leaves it as it was."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-_TRIAL_EXPONENT, _TRIAL_EXPONENT + 1, (int(fold.rows.max()) + 1,), generator=generator)
    scale = torch.exp2(exponents[fold.rows].float())
    saved = fold.saved(block)
    try:
        fold.apply(block, scale)
        after = calibration.trace([fold.stage[0]])
    finally:
        restore(saved)
    x, divided = before.inputs[fold.stage[0]], after.inputs[fold.stage[0]]
    if x.shape != divided.shape or not _equal(divided * scale.to(divided), x, x):
        return False
    return _equal(after.result, before.result, before.result - before.hidden)


def _equal(found: Tensor, expected: Tensor, change: Tensor) -> bool:
    """Whether the two differ in no channel by more than rounding, beside what the block adds there (`change`).

    Half of the dtype's digits: what is wrong is off by a factor of 2 or 4. A block's output is held against the part
    that the block added, or a large residual would hide what is wrong.
    """
    epsilon = torch.finfo(found.dtype).eps

    def size(tensor: Tensor) -> Tensor:
        return tensor.float().flatten(0, -2).square().mean(0).sqrt()

    return bool((size(found - expected) <= epsilon**0.5 * size(change) + 8 * epsilon * size(expected)).all())
