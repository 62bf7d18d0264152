"""Rotate: the same function in another basis, in which weights have no outliers left to round badly.

Ashkboos, Mohtashami, Croci, Li, Jaggi, Alistarh, Hoefler, Hensman: "QuaRot: Outlier-Free 4-Bit Inference in Rotated
LLMs", 2024, arXiv 2404.00456, the parts that are folded into weights and cost nothing at run time (section 4, stage 1a
for the residual stream, and the values between v_proj and o_proj of stage 1c).

Vectors are rows. With an orthogonal `Q` the residual stream `x` becomes `x Q`. What writes to it (embeddings, o_proj,
down_proj) gives `y Q`: its weight becomes `Q^T W`. What reads it does so behind a norm, `g * n(x)` with a gain `g` per
channel: since `n(x Q) = n(x) Q`, the gain moves into the readers and their weight becomes `W diag(g) Q`. LayerNorm,
which also takes the mean off, does so alike in both bases if `1 Q = 1`. The head reads what the last norm gives; tied
to the embedding it would have to be `E diag(g) Q` and `E Q` at once, so it gets a tensor of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.calibration import BlockCalibration
from compress.capture import Call
from compress.data import Windows, windows_from
from compress.errors import CompressError, StartError
from compress.folding import Fold, find_folds, restore
from compress.maths.hadamard import Rotation
from compress.model import Block, Layer
from compress.passes.base import Context, Pass, PassResult
from compress.residual import Ends, find_ends, is_norm, norm_offset, takes_mean
from compress.stream import CalibrationStream
from compress.walk import over_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.model import ModelHandle
    from compress.shapes import ModelShape

#: Tokens that every block is checked on: so many windows of so many.
PROBE_WINDOWS, PROBE_LENGTH = 2, 16
#: Largest difference of a block's output, relative to what the block adds, in float32.
TOLERANCE = 1e-4
#: Rows of embedding and head that are rotated at once.
_ROWS = 4096

_WAY_OUT = "With residual: false only the values of attention are rotated; or leave the pass out."


def rotated_reader(weight: Tensor, gain: Tensor, rotation: Rotation) -> Tensor:
    """`W diag(g) Q`, float64 `[out, in]`, of a weight `[out, in]` and the gain `[in]` of the norm before it."""
    return rotation.apply(weight.double() * gain)


def rotated_writer(weight: Tensor, rotation: Rotation) -> Tensor:
    """`Q^T W`, float64 `[out, in]`."""
    return rotation.apply(weight.T).T


def head_starts(rows: Tensor, heads: int) -> list[int]:
    """The first row of each value head, if column `c` of what attention gives comes from row `rows[c]` of the values.

    Query heads that share a value head name the same rows. ValueError where a head's rows do not stand side by side.
    """
    by_head = rows.view(heads, -1)
    if not torch.equal(by_head, by_head[:, :1] + torch.arange(by_head.shape[1], device=rows.device)):
        raise ValueError("the channels of a head do not stand side by side")
    return sorted(set(by_head[:, 0].tolist()))


def rotate_rows(values: Tensor, starts: list[int], rotation: Rotation) -> None:
    """`R^T V` in place, for each head's rows of `[out, in]` (a weight, or a bias as one column)."""
    for start in starts:
        head = values[start : start + rotation.size]
        head.copy_(rotated_writer(head, rotation))


def rotated_columns(weight: Tensor, heads: int, rotation: Rotation) -> Tensor:
    """`W R` for the columns of each query head, float64 `[out, heads * width]`."""
    return rotation.apply(weight.unflatten(1, (heads, -1))).flatten(1)


class Rotate(Pass):
    """Rotate the residual stream and the values of attention by Hadamard matrices folded into the weights: the same
    function, with fewer outliers for the rounding that follows."""

    name: ClassVar[str] = "rotate"
    rescales: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    leaves: ClassVar[str] = "dense"
    changes_outside: ClassVar[bool] = True

    residual: bool = Field(
        default=True,
        description="Rotate the residual stream: embeddings, head and all layers. Unties a tied head, which then takes "
        "the embedding's size once more.",
    )
    values: bool = Field(
        default=True, description="Rotate the values within each attention head, where layers allow it."
    )
    seed: int = Field(default=0, ge=0, description="Draws the signs of the rotations.")

    @model_validator(mode="after")
    def _something(self) -> Rotate:
        if not (self.residual or self.values):
            raise ValueError("residual and values are both false, so that nothing is rotated: leave the pass out")
        return self

    def refuses(self, model: PreTrainedModel) -> str | None:
        if model.main_input_name != "input_ids":
            return f"{type(model).__name__} reads no tokens, and what is rotated is tried on tokens."
        return None

    def reshape(self, model: ModelHandle) -> None:
        """Unties the head. StartError for what shapes alone forbid."""
        if not self.residual:
            return
        if model.model.get_output_embeddings() is None:
            raise StartError(f"rotate: {type(model.model).__name__} has no head. {_WAY_OUT}")
        for block in model.block_list():
            _check_matrices(block)
        model.untie()

    def extra_bytes(self, shape: ModelShape) -> int:
        """A block in float32, copies of two of its layers to undo a trial, and what rotating one takes (tables in
        float64: the weight, with its signs, before and after a factor); or as much for some rows of the head."""
        most = 0
        for block in shape.handle.block_list():
            sizes = sorted((parameter.numel() for parameter in block.module.parameters()), reverse=True)
            most = max(most, 4 * sum(sizes) + 8 * sum(sizes[:2]) + 4 * 8 * sizes[0])
        return max(most, 4 * 8 * _ROWS * shape.hidden)

    @torch.no_grad()
    def run(self, model: ModelHandle, context: Context) -> PassResult:
        """The first block is tried before anything is changed. The ends are kept as soon as they are rotated, then
        come the blocks, each checked before it is written."""
        stream, rotation, tied = _probe(model, self.seed), None, False
        if self.residual:
            try:
                ends = find_ends(model, _windows(model, self.seed))
            except StartError as error:
                raise StartError(f"rotate: {error} {_WAY_OUT}") from None
            norm = model.model.get_submodule(ends.norm)
            rotation = Rotation(len(norm.weight), self.seed, takes_mean(norm))
            self._try_first(model, stream, rotation)
            tied = rotate_ends(model, ends, rotation)
            if context.stage is not None:
                owners = {*ends.embeddings, ends.norm, ends.head}
                outside = model.outside().items()
                context.stage.keep_outside({n: t for n, t in outside if n.rpartition(".")[0] in owners})
        else:
            self._try_first(model, stream, None)

        def change(block: Block) -> dict[str, Any]:
            return self._change(block, stream, rotation)

        records = over_blocks(self.name, model, context, change)
        changed = sum(record.get("weights", 0) for record in records)
        total = sum(block.matrix_weights() for block in model.block_list())
        return PassResult(model, records, changed / total, {"head_untied": tied})

    def _try_first(self, model: ModelHandle, stream: CalibrationStream, rotation: Rotation | None) -> None:
        """StartError where the first block cannot be rotated; nothing is changed."""
        first = model.load(model.block_list()[0])
        try:
            self._change(first, stream, rotation, write=False)
        except CompressError as error:
            raise StartError(f"rotate cannot be used on {type(model.model).__name__}: {error}") from None
        finally:
            model.release(first)

    def _change(
        self, block: Block, stream: CalibrationStream, rotation: Rotation | None, write: bool = True
    ) -> dict[str, Any]:
        """Rotates a copy of the block in float32, checks what it computes, and then writes it into the block."""
        original = block.module
        with _in_float32(block):
            calibration = BlockCalibration(block, stream)
            folds = _unique(find_folds(block, calibration)[0].values())
            before = calibration.output(lambda hidden: hidden)
            rotated: dict[str, list[str]] = {}
            if self.values:
                _note(rotated, "values", _rotate_attention(block, calibration, folds, before, self.seed))
            if rotation is not None:
                _rotate_residual(block, folds, rotation, rotated)
            elif not rotated:
                raise CompressError(f"{block.name}: no layer was found that makes the values of attention. {_WAY_OUT}")
            error = _difference(calibration, before, rotation)
            if not error <= TOLERANCE:
                raise CompressError(
                    f"{block.name} computes something else when it is rotated (relative difference {error:.1e}): a "
                    f"norm or layer in it acts on the residual stream in a way that is not known here. {_WAY_OUT}"
                )
            changed = dict(block.module.named_parameters())
        if write:
            for name, parameter in original.named_parameters():
                parameter.copy_(changed[name])
        weights = sum(layer.weight.numel() for name, layer in block.layers().items() if name in rotated)
        layers = {name: {"rotated": what} for name, what in rotated.items()}
        return {"name": block.name, "error": error, "weights": weights, "layers": layers}


@torch.no_grad()
def rotate_ends(model: ModelHandle, ends: Ends, rotation: Rotation) -> bool:
    """Rotates embeddings, last norm and head in place; whether the head was tied, and is a tensor of its own now."""
    norm, head = model.model.get_submodule(ends.norm), model.model.get_submodule(ends.head)
    if not isinstance(head, nn.Linear):
        raise StartError(f"rotate: the head, {ends.head}, is no linear layer. {_WAY_OUT}")
    tied = any(head.weight is model.model.get_submodule(name).weight for name in ends.embeddings)
    model.untie()
    gain, shift = _absorb(norm, head.bias is not None, rotation)
    for name in ends.embeddings:
        for rows in model.model.get_submodule(name).weight.split(_ROWS):
            rows.copy_(rotation.apply(rows))
    for start in range(0, len(head.weight), _ROWS):
        rows = head.weight[start : start + _ROWS]
        if shift is not None:
            head.bias[start : start + _ROWS] += (rows.double() @ shift).to(head.bias.dtype)
        rows.copy_(rotated_reader(rows, gain, rotation))
    return tied


def _absorb(norm: nn.Module, biased: bool, rotation: Rotation) -> tuple[Tensor, Tensor | None]:
    """Makes a norm's gain 1, and returns what its readers must take over: the gain, and the norm's bias if all of them
    have a bias (`biased`) that can take it; else it stays with the norm, in the new basis. Float64 `[in]`."""
    offset = norm_offset(norm)
    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    gain = weight.double() + offset
    shift = None
    if bias is not None and biased:
        shift = bias.double()
        bias.zero_()
    elif bias is not None:
        # W (g n(x) + b) = W diag(g) (n(x) + b / g)
        share = torch.where(bias == 0, 0.0, bias.double() / gain)
        if not bool(share.isfinite().all()):
            raise CompressError("a norm has a gain of 0 beside a bias, which cannot be moved into the next layers")
        bias.copy_(rotation.apply(share))
    weight.fill_(1.0 - offset)
    return gain, shift


def _rotate_residual(block: Block, folds: list[Fold], rotation: Rotation, rotated: dict[str, list[str]]) -> None:
    """Layers behind a norm read the stream, all others write to it."""
    _check_matrices(block)
    layers = block.layers()
    readers: list[str] = []
    for fold in folds:
        norm = block.module.get_submodule(fold.producer)
        if not is_norm(norm) or len(norm.weight) != rotation.size:
            continue
        stage = [layers[name] for name in fold.stage]
        gain, shift = _absorb(norm, all(layer.module.bias is not None for layer in stage), rotation)
        for layer in stage:
            if shift is not None:
                layer.module.bias += (layer.weight.double() @ shift).to(layer.dtype)
            layer.set_weight(rotated_reader(layer.weight, gain, rotation))
        readers += fold.stage
    _note(rotated, "inputs", readers)
    for name, layer in layers.items():
        if name in readers:
            continue
        if len(layer.weight) != rotation.size:
            raise CompressError(
                f"{block.name}: {name} neither reads the residual stream behind a norm nor writes to it. {_WAY_OUT}"
            )
        layer.set_weight(rotated_writer(layer.weight, rotation))
        if layer.module.bias is not None:
            layer.module.bias.copy_(rotation.apply(layer.module.bias))
        _note(rotated, "outputs", [name])


def _rotate_attention(
    block: Block, calibration: BlockCalibration, folds: list[Fold], before: Tensor, seed: int
) -> list[str]:
    """Rotates values where a trial shows that the block still computes the same; names of the layers changed."""
    heads = getattr(calibration.stream.model.config.get_text_config(), "num_attention_heads", None)
    layers = block.layers()
    changed: list[str] = []
    for fold in folds:
        if fold.producer not in layers or not heads or len(fold.rows) % heads:
            continue
        saved = fold.saved(block)
        producer = layers[fold.producer]
        rotation = Rotation(len(fold.rows) // heads, seed)
        try:
            _rotate_heads(producer, [layers[name] for name in fold.stage], fold.rows, heads, rotation)
        except ValueError:
            continue
        if _difference(calibration, before, None) <= TOLERANCE:
            changed += [fold.producer, *fold.stage]
        else:
            restore(saved)
    return changed


def _rotate_heads(producer: Layer, stage: list[Layer], rows: Tensor, heads: int, rotation: Rotation) -> None:
    starts = head_starts(rows, heads)
    rotate_rows(producer.weight, starts, rotation)
    if producer.module.bias is not None:
        rotate_rows(producer.module.bias.unsqueeze(1), starts, rotation)
    for layer in stage:
        layer.set_weight(rotated_columns(layer.weight, heads, rotation))


def _difference(calibration: BlockCalibration, before: Tensor, rotation: Rotation | None) -> float:
    """|now - before| of the block's output in float32, relative to what the block added to its input then. With
    `rotation` the block is one that is given and gives rotated vectors."""

    def turned(x: Tensor) -> Tensor:
        return x if rotation is None else rotation.apply(x).to(x.dtype)

    hidden, _ = next(calibration.stream.inputs(calibration.block))
    difference = (calibration.output(turned) - turned(before)).double().norm()
    return float(difference / (before - hidden).double().norm().clamp_min(1e-30))


def _check_matrices(block: Block) -> None:
    """StartError where a matrix of the block is in no layer that can be rotated (fused experts)."""
    known = {f"{name}.weight" for name in block.layers()}
    for name, parameter in block.module.named_parameters():
        if parameter.dim() >= 2 and name not in known:
            raise StartError(f"rotate: {block.name} holds {name}, a tensor that is no linear layer. {_WAY_OUT}")


def _unique(folds: Iterable[Fold]) -> list[Fold]:
    """Each fold once: a stage's layers share theirs."""
    return list({fold.stage: fold for fold in folds}.values())


def _note(rotated: dict[str, list[str]], what: str, names: Iterable[str]) -> None:
    for name in names:
        rotated.setdefault(name, []).append(what)


@contextmanager
def _in_float32(block: Block) -> Iterator[None]:
    """The block as a copy of itself in float32, for as long as the `with` lasts."""
    original = block.module
    block.stack.modules[block.index] = copy.deepcopy(original).float()
    try:
        yield
    finally:
        block.stack.modules[block.index] = original


def _windows(model: ModelHandle, seed: int) -> Windows:
    """Random tokens: what blocks are checked on."""
    generator = torch.Generator().manual_seed(seed)
    length = min(PROBE_LENGTH, model.context_length or PROBE_LENGTH)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return windows_from(torch.randint(0, vocabulary, (PROBE_WINDOWS, length), generator=generator), None)


def _probe(model: ModelHandle, seed: int) -> CalibrationStream:
    """What enters the first block, in float32, and how each block is called. Every block is checked on that input."""
    stream = CalibrationStream(model, _windows(model, seed))
    stream.hidden = [hidden.float() for hidden in stream.hidden]
    stream.calls = [[Call(_float32(call.args), _float32(call.kwargs)) for call in calls] for calls in stream.calls]
    return stream


def _float32(value: Any) -> Any:
    """The value with every floating-point tensor in it as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_float32, value))
    if isinstance(value, dict):
        return {key: _float32(item) for key, item in value.items()}
    return value
