"""The one engine: block after block is loaded, changed, measured, kept, and let go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.calibration import BlockCalibration
from compress.errors import CompressError, StartError
from compress.images import probe_for
from compress.model import Block, ModelHandle
from compress.passes.base import Context, PassResult
from compress.stream import CalibrationStream

if TYPE_CHECKING:
    from compress.passes.base import BlockPass
    from compress.passes.block_distill import BlockDistill


def walk(pass_: BlockPass, model: ModelHandle, context: Context) -> PassResult:
    """Runs `pass_.compress_block` on every block in order; each sees the text as the blocks before it now make it, and
    where `pass_.needs_original`, also as the model made it before this pass.

    Memory: one block, what the pass accumulates for it, the stream's hidden states, and one batch; with the original
    path, a copy of the block and of the hidden states.
    """
    coverage = check_coverage(pass_, model, context.min_coverage)
    windows = context.calibration if pass_.needs_calibration else probe_for(model.config, pass_.probe())
    if pass_.needs_calibration and windows is None:
        raise StartError(f"{pass_.name} needs calibration text.")
    stream = None
    if windows is not None:
        stream = CalibrationStream(model, windows, context.tokens_per_batch, pass_.needs_original)
    return PassResult(model, over_blocks(pass_.name, model, context, partial(change, pass_, stream), stream), coverage)


def over_blocks(
    name: str,
    model: ModelHandle,
    context: Context,
    change: Callable[[Block], dict[str, Any]],
    stream: CalibrationStream | None = None,
    reshape: Callable[[Block], None] | None = None,
    restored: Callable[[Block], None] | None = None,
) -> list[dict[str, Any]]:
    """Calls `change` on every block in order and returns what it returned; `name` is what the progress shows.

    A block that `context.stage` already holds is taken from there, so that a killed run continues where it was. Where
    `change` leaves blocks of another shape, `reshape` gives such a block that shape first. `stream` is pushed through
    the blocks taken from there, after `restored` was called on them; `change` itself pushes it through those it
    changes.
    """
    records: list[dict[str, Any]] = []
    with context.progress.step(name, total=len(model.block_list())) as step:
        for block in model.blocks():
            kept = context.stage.kept(block) if context.stage else None
            if kept is not None:
                assert context.stage is not None
                if stream is not None:
                    stream.advance_original(block)  # now: what comes next takes the place of the weights it came with
                if reshape is not None:
                    reshape(block)
                block.restore(*context.stage.read(block, model.device))
                if restored is not None:
                    restored(block)
                if stream is not None:
                    stream.advance(block)
                record = kept
            else:
                record = change(block)
            block.seal()
            if kept is None and context.stage is not None:
                context.stage.keep(block, record)
            records.append(record)
            step.advance(block.name)
    return records


def change(pass_: BlockPass | BlockDistill, stream: CalibrationStream | None, block: Block) -> dict[str, Any]:
    """Compresses the block, and moves the text behind it."""
    calibration = BlockCalibration(block, stream) if stream is not None else None
    metrics = pass_.compress_block(block, calibration)
    error = calibration.finish() if calibration is not None else None
    if not pass_.needs_calibration:
        error = None
    return {"name": block.name, "error": error, **metrics}


def check_coverage(pass_: BlockPass, model: ModelHandle, least: float) -> float:
    """The share of the blocks' matrix weights that the pass will change, known from shapes before any work."""
    total = changed = selected_layers = 0
    left_out: dict[str, int] = {}
    for block in model.block_list():
        layers = block.layers(pass_.targets, pass_.skip)
        selected_layers += len(layers)
        total += block.matrix_weights()
        changed += sum(layer.module.weight.numel() for layer in layers.values())
        for name, parameter in block.module.named_parameters():
            if parameter.dim() >= 2 and name.removesuffix(".weight") not in layers:
                left_out[name] = left_out.get(name, 0) + parameter.numel()
    if not selected_layers:
        names = ", ".join(model.block_list()[0].layers()) or "none that this pass can change"
        raise StartError(f"{pass_.name}: no layer is selected; a block's layers are: {names}.")
    coverage = changed / total
    if coverage < least:
        worst = sorted(left_out, key=lambda name: -left_out[name])[:6]
        raise CompressError(
            f"{pass_.name} reaches only {coverage:.0%} of the weights in the blocks' matrices, and min_coverage is "
            f"{least:.0%}. Left out: {', '.join(worst)}. Set min_coverage lower to go on all the same."
        )
    return coverage
