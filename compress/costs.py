"""How much memory the steps of a run take: sums of stated parts, in bytes, above a process that has only imported.

The engine's parts are stated here; a pass states its own (`BlockPass.observing_bytes`, `working_bytes`).
`benchmarks/plan_memory.py` holds the sums against what processes really take.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.measure.likelihood import CHUNK_BUDGET, LOGITS_BUDGET, TOKENS_BUDGET
from compress.passes.base import BlockPass, Context
from compress.shapes import BlockShape, ModelShape

#: What torch and transformers load and set up at first use: the model's classes, threads, buffers of kernels.
RUNTIME_BYTES = 24 << 20

Parts = dict[str, int]


@dataclass(frozen=True)
class Text:
    """Windows of token ids: so many, each of `length` tokens."""

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def in_flight(self, budget: int = Context.tokens_per_batch) -> int:
        """Tokens that go through a block at once."""
        return min(self.samples, max(1, budget // self.length)) * self.length


@dataclass(frozen=True)
class Holding:
    """How the original is held while passes work. `resident`: all of it, else one block at a time; `cast`: its dtype
    is not the stored one, so its weights are copies, and not pages of the files."""

    resident: bool
    cast: bool


def loading(shape: ModelShape, holding: Holding) -> Parts:
    """Opening the model. Files are mapped and cost nothing until they are used; before that every tensor is read once
    to see that it is sound."""
    parts = {} if holding.resident and not holding.cast else model(shape, holding, used_outside=True)
    return {**parts, "largest tensor": shape.largest_tensor}


def model(shape: ModelShape, holding: Holding, used_outside: bool) -> Parts:
    """The model but for the block being worked on. Of a mapped file, what was used counts: without text
    (`used_outside` false) embeddings and head are not."""
    if not holding.resident:
        return {"outside the blocks": shape.outside_bytes}
    unused = 0 if used_outside or holding.cast else shape.outside_bytes
    return {"model": shape.dense_bytes - unused}


def one_pass(pass_: BlockPass, shape: ModelShape, holding: Holding, text: Text | None) -> Parts:
    """A pass over all blocks, `shape` being as it finds the model; `text` is None where it needs none."""
    blocks = shape.blocks(pass_)
    parts = model(shape, holding, used_outside=text is not None)
    if holding.resident and not holding.cast:
        # What packed layers replace is part of a mapped file, which stays whole, so they add up.
        parts["packed layers"] = sum(block.packed_bytes for block in blocks)
    if text is not None:
        parts["hidden states"] = text.tokens * (shape.hidden * shape.dtype.itemsize + 8)
        parts["output before"] = text.in_flight() * shape.hidden * shape.dtype.itemsize
    return parts | max((_block(pass_, shape, holding, block, text) for block in blocks), key=total)


def _block(pass_: BlockPass, shape: ModelShape, holding: Holding, block: BlockShape, text: Text | None) -> Parts:
    """What is there for one block alone, at its worst moment: when text runs through it, or when it is changed."""
    parts = {} if holding.resident else {"block": block.dense_bytes}
    if not holding.resident or holding.cast:
        parts["packed layers"] = block.packed_bytes
    if text is None:
        return {**parts, "pass": pass_.working_bytes(block.layers, 0)}
    tokens = text.in_flight()
    running = {
        "activations": activations(shape, block.widest, tokens, text.length),
        "pass": pass_.observing_bytes(block.layers, tokens),
    }
    return parts | max(running, {"pass": pass_.working_bytes(block.layers, tokens)}, key=total)


def activations(shape: ModelShape, widest: int, tokens: int, length: int) -> int:
    """One batch at the widest place of a block, its attention mask, and the scores where a kernel keeps them (with
    their softmax in float32)."""
    size = shape.dtype.itemsize
    return tokens * (widest * size + length * size + shape.scored_heads * length * (size + 4))


def exporting(shape: ModelShape, holding: Holding, weights_bytes: int) -> Parts:
    """Writing the model, or the check of what was written by a process of its own, which expands packed weights."""
    writing = model(shape, holding, used_outside=True) | {"packed layers": shape.packed_bytes * holding.resident}
    writing["largest tensor"] = shape.largest_tensor
    checking = {"the written model": weights_bytes, "its weights expanded": shape.dense_bytes * bool(shape.packed_bytes)}
    return max(writing, checking, key=total)


def measuring(shape: ModelShape, text: Text | None, weights_bytes: int | None, beside: bool) -> Parts:
    """The most that a process of the benchmark takes. `weights_bytes` is None for the original, else what was written;
    `beside`: quality is measured with the original running in lock step."""
    parts = {"the original": shape.dense_bytes}
    if weights_bytes is not None:
        expanded = shape.dense_bytes if shape.packed_bytes else 0
        parts = {"the compressed model": weights_bytes + expanded, "the original": shape.dense_bytes * beside}
    length = text.length if text is not None else min(shape.context, 256)
    batch = max(1, min(TOKENS_BUDGET // length, LOGITS_BUDGET // (length * max(1, shape.vocabulary))))
    tokens = batch * length if text is None else min(batch, text.samples) * length
    size, models = shape.dtype.itemsize, 1 + (weights_bytes is not None and beside)
    chunk = min(CHUNK_BUDGET, tokens * shape.vocabulary)
    parts["activations"] = activations(shape, shape.widest, tokens, length)
    parts["logits"] = models * tokens * shape.vocabulary * size
    parts["softmax"] = 4 * chunk * (2 if models == 1 else 5)
    return parts


def total(parts: Parts) -> int:
    return sum(parts.values())
