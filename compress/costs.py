"""How much memory the steps of a run take: sums of stated parts, in bytes, above a process that has only imported.

The engine's parts are stated here; a pass states its own (`BlockPass.observing_bytes`, `working_bytes`).
`benchmarks/plan_memory.py` holds the sums against what processes really take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.budget import batch_tokens
from compress.measure.damage import TOKENS as DAMAGE_TOKENS
from compress.measure.likelihood import CHUNK_BUDGET, LOGITS_BUDGET, TOKENS_BUDGET
from compress.passes.base import BlockPass, Context
from compress.passes.structural import StructuralPass
from compress.shapes import BlockShape, ModelShape

#: What torch and transformers load and set up at first use: the model's classes, threads, buffers of kernels.
RUNTIME_BYTES = 24 << 20

Parts = dict[str, int]


@dataclass(frozen=True)
class Text:
    """Windows of token ids (or images): so many, each of `length` tokens, each of which was read from so many bytes."""

    samples: int
    length: int
    read_bytes: int = 8

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def in_flight(self, budget: int = Context.tokens_per_batch) -> int:
        """Tokens that go through a block at once."""
        return min(self.samples, max(1, budget // self.length)) * self.length


@dataclass(frozen=True)
class Holding:
    """How the original is held while passes work: all of it (`resident`), or one block at a time, from files in the
    dtype `stored`. In that dtype a whole model's weights are pages of the files, in another one they are copies."""

    resident: bool
    stored: torch.dtype

    def mapped(self, shape: ModelShape) -> bool:
        return self.resident and shape.dtype == self.stored


def loading(shape: ModelShape, holding: Holding) -> Parts:
    """Opening the model. Files are mapped and cost nothing until they are used; before that every tensor is read once
    to see that it is sound."""
    if holding.mapped(shape):
        return {"largest tensor": shape.largest_tensor}
    parts = model(shape, holding, used_outside=True)
    if holding.resident:
        return {
            **parts,
            "files while they are cast": shape.dense_bytes * holding.stored.itemsize // shape.dtype.itemsize,
        }
    return {**parts, "largest tensor": shape.largest_tensor}


def model(shape: ModelShape, holding: Holding, used_outside: bool) -> Parts:
    """The model but for the block being worked on. Of a mapped file, what was used counts: without text
    (`used_outside` false) embeddings and head are not."""
    if not holding.resident:
        return {"outside the blocks": shape.outside_bytes}
    unused = shape.outside_bytes if holding.mapped(shape) and not used_outside else 0
    return {"model": shape.dense_bytes - unused}


def whole_pass(shape: ModelShape, holding: Holding, extra: Parts, text: Text | None = None) -> Parts:
    """A pass that is no `BlockPass`, `shape` being as it leaves the model; `extra` is what it says it takes besides,
    `text` what it runs through the blocks, beside the original's way through them."""
    parts = model(shape, holding, used_outside=True)
    if not holding.resident:
        parts["block"] = shape.largest_block()
    if text is not None:
        parts["hidden states"] = hidden_states(shape, text, 2)
        parts["activations"] = activations(shape, shape.widest, text.in_flight(), text.length)
    return parts | extra


def structural_pass(pass_: StructuralPass, shape: ModelShape, holding: Holding, text: Text | None) -> Parts:
    """A pass that leaves another shape; afterwards `shape` is that. The model as it comes in is there to the end; the
    blocks that are left take the place of the old ones, but for those of a mapped file, which stays whole."""
    parts = model(shape, holding, used_outside=True)
    if not holding.resident:
        parts["block"] = shape.largest_block()
    needed = max(pass_.text_bytes(shape, text) if text is not None else 0, pass_.extra_bytes(shape) or 0)
    shape.apply(pass_)
    if not holding.resident:
        parts["smaller block"] = shape.largest_block()
    elif pass_.copies_blocks and holding.mapped(shape):
        parts["smaller blocks"] = shape.dense_bytes - shape.outside_bytes
    elif pass_.copies_blocks:
        parts["smaller block"] = shape.largest_block()
    return parts | {"pass": needed}


def hidden_states(shape: ModelShape, text: Text, paths: int = 1) -> int:
    """All of the text, read and as hidden states, so often. A decoder is given those that the encoder gave, and they
    are kept for the model's end as well."""
    stacks = len(shape.handle.stacks)
    return int(text.tokens * (shape.hidden * shape.dtype.itemsize * (paths + 2 * (stacks - 1)) + text.read_bytes))


def one_pass(pass_: BlockPass, shape: ModelShape, holding: Holding, text: Text | None) -> Parts:
    """A pass over all blocks, `shape` being as it finds the model; `text` is None where it needs none. The worse of
    what it does before the walk, and the walk."""
    if text is None:
        return _walking(pass_, shape, holding, None)
    walking = _walking(pass_, shape, holding, text if pass_.needs_calibration else None)
    blocks = shape.blocks(pass_)
    first = pass_.preparing_bytes(shape, [block.layers for block in blocks], text.length)
    if not first:
        return walking
    preparing = model(shape, holding, used_outside=True) | _ends(pass_, shape) | {"measuring layers": first}
    if not holding.resident:
        preparing["block"] = max(block.dense_bytes for block in blocks)
    return max(walking, preparing, key=total)


def _ends(pass_: BlockPass, shape: ModelShape) -> Parts:
    ends = shape.ends(pass_).values()
    size = sum(tensor.nbytes for end in ends for tensor in end.state_dict().values())
    return {"packed embedding and head": size} if ends else {}


def _walking(pass_: BlockPass, shape: ModelShape, holding: Holding, text: Text | None) -> Parts:
    blocks = shape.blocks(pass_)
    ends = _ends(pass_, shape)
    parts = model(shape, holding, used_outside=text is not None or bool(ends)) | ends
    if holding.mapped(shape):
        # What packed layers replace is part of a mapped file, which stays whole, so they add up.
        parts["packed layers"] = sum(block.packed_bytes for block in blocks)
    if text is not None:
        parts["hidden states"] = hidden_states(shape, text)
        if pass_.needs_original:
            parts["original hidden states"] = text.tokens * shape.hidden * shape.dtype.itemsize
        parts["output before"] = text.in_flight() * shape.hidden * shape.dtype.itemsize
    return parts | max((_block(pass_, shape, holding, block, text) for block in blocks), key=total)


def _block(pass_: BlockPass, shape: ModelShape, holding: Holding, block: BlockShape, text: Text | None) -> Parts:
    """What is there for one block alone, at its worst moment: when text runs through it, or when it is changed."""
    parts = {} if holding.resident else {"block": block.dense_bytes}
    if not holding.mapped(shape):
        parts["packed layers"] = block.packed_bytes
    if text is None:
        return {**parts, "pass": pass_.working_bytes(block.layers, 0)}
    if pass_.needs_original:
        parts["original block"] = block.dense_bytes
    tokens = text.in_flight()
    running = {
        "activations": activations(shape, block.widest, tokens, text.length),
        "pass": pass_.observing_bytes(block.layers, tokens),
    }
    return parts | max(running, {"pass": pass_.working_bytes(block.layers, tokens)}, key=total)


def activations(shape: ModelShape, widest: int, tokens: int, length: int) -> int:
    """One batch at the widest place of a block, its attention mask, and the scores where a kernel keeps them (with
    their softmax in float32)."""
    size: int = shape.dtype.itemsize
    return tokens * (widest * size + length * size + shape.scored_heads * length * (size + 4))


def exporting(shape: ModelShape, holding: Holding, weights_bytes: int, export_bytes: int = 0) -> Parts:
    """Writing the model, or the check of what was written by a process of its own, which expands packed weights.

    `export_bytes`: of the largest export that its own engine checks. Engines keep a second copy of weights, laid out
    for their kernels, and the exact check of a layer expands it to float32, twice.
    """
    writing = model(shape, holding, used_outside=True) | {"packed layers": shape.packed_bytes * holding.resident}
    writing["largest tensor"] = shape.largest_tensor
    checking = {"the written model": weights_bytes, "its weights expanded": 0}
    if shape.expands:
        checking["its weights expanded"] = shape.dense_bytes
    largest = shape.largest_tensor // shape.dtype.itemsize * 4
    engine = {"the export, laid out for its engine": 3 * export_bytes, "its largest layer expanded": 2 * largest}
    return max(writing, checking, engine if export_bytes else {}, key=total)


def damaging(shape: ModelShape, holding: Holding, text: Text, found_block: int) -> Parts:
    """Measuring what a pass did, block by block, `shape` being as it leaves the model: the model as it was found is
    read anew, a block at a time (the largest of `found_block` bytes), and the text goes through it once as it is and
    once for each block."""
    tokens = max(1, DAMAGE_TOKENS // text.length) * text.length
    parts = model(shape, holding, used_outside=True)
    parts |= {"packed layers": shape.packed_bytes} if holding.resident else {"block": shape.largest_block()}
    parts |= {"outside the blocks, as found": shape.outside_bytes, "block, as found": found_block}
    blocks = len(shape.handle.block_list())
    seen = Text(max(1, tokens // text.length), text.length, text.read_bytes)
    parts["hidden states"] = hidden_states(shape, seen, blocks + 3)
    together = min(tokens, batch_tokens(text.length, shape.vocabulary))
    running = {"activations": activations(shape, shape.widest, together, text.length)}
    # Of both models; and softmaxes in float64, of a few tokens at a time
    logits = {"logits": 2 * together * shape.vocabulary * shape.dtype.itemsize, "softmax": 160 * 8 * shape.vocabulary}
    return parts | max(running, logits, key=total)


def stage(shape: ModelShape, holding: Holding, weights_bytes: int) -> Parts:
    """Timing the model that a pass leaves: it waits in memory while another process runs what was written of it, and
    the original beside that."""
    parts = model(shape, holding, used_outside=True) | {"packed layers": shape.packed_bytes * holding.resident}
    return parts | measuring(shape, None, weights_bytes)


def measuring(shape: ModelShape, text: Text | None, weights_bytes: int | None) -> Parts:
    """The most that a process of the benchmark takes: quality (the original running beside where there is `text`) or
    speed (the original beside). `weights_bytes` is that of the written model, None where the original is measured."""
    parts = {"the original": shape.original_bytes}
    if weights_bytes is not None:
        parts["the compressed model"] = weights_bytes
    if text is None:
        return parts | {"largest tensor": shape.largest_tensor}
    if weights_bytes is not None and shape.expands:
        parts["its weights expanded"] = shape.dense_bytes
    batch = max(1, min(TOKENS_BUDGET // text.length, LOGITS_BUDGET // (text.length * max(1, shape.vocabulary))))
    tokens = min(batch, text.samples) * text.length
    models = 1 if weights_bytes is None else 2
    logits = tokens * shape.vocabulary * shape.dtype.itemsize
    # One model runs while the other's logits wait; then log-softmaxes of both, and what their divergence is made of
    running = {"activations": activations(shape, shape.widest, tokens, text.length), "logits": (models - 1) * logits}
    softmax = 4 * min(CHUNK_BUDGET, tokens * shape.vocabulary) * (2 if models == 1 else 5)
    worst = max(running, {"logits": models * logits, "softmax": softmax}, key=total)
    return parts | worst


def total(parts: Parts) -> int:
    return sum(parts.values())
