"""Depth pruning: whole blocks are removed, those that matter least.

Men, Xu, Zhang and others: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv
2403.03853, section 3: the influence of a block is one minus the cosine between what goes into it and what comes out,
averaged over tokens. Of a run of neighbours, from what goes into the first to what comes out of the last: Gromov and
others: "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv 2403.17887, section 3.2 (the angle there,
which orders as the cosine does). By what skipping does to the outputs, one block after the other: Song and others:
"SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks", 2024, arXiv 2402.09025,
section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.budget import LOGITS
from compress.errors import StartError
from compress.maths.block_choice import Fits, removals, strongest, weakest_run
from compress.passes.base import Context, PassResult
from compress.passes.structural import StructuralPass, keep_smaller
from compress.sizes import Count, Share, Size, counted, parse_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.block_importance import SkipLosses
    from compress.costs import Text
    from compress.model import Block, ModelHandle
    from compress.shapes import ModelShape

#: Options of which one says how much goes.
WAYS = ("layers", "amount", "to", "drop")
Kept = list[list[int]]


class Depth(StructuralPass):
    """Remove whole blocks: those whose output is most like their input, those that are missed least, or those named."""

    name: ClassVar[str] = "depth"
    needs_calibration: ClassVar[bool] = True

    layers: Count | None = Field(
        default=None,
        description="Blocks that shall remain, 10 or 70% (rounded up, and one goes at least); of an encoder-decoder in "
        "each of its stacks.",
    )
    amount: Share | None = Field(
        default=None, description="Instead: least share of the blocks' parameters to remove, 0.3 or 30%."
    )
    to: Size | None = Field(default=None, description="Instead: most parameters that the whole model shall have, 90M.")
    drop: list[int] | None = Field(
        default=None,
        description="Instead: indices of the blocks to remove, counted from 0; an encoder's come before its decoder's.",
    )
    importance: Literal["cosine", "loss"] = Field(
        default="cosine",
        description="What a block is worth. cosine: how much it turns the hidden states. loss: how far the model's "
        "outputs move when it is skipped; takes a pass through half of the model for every block.",
    )
    greedy: bool = Field(
        default=True,
        description="With importance: loss, measure anew after each block that is chosen to go; false: once.",
    )
    contiguous: bool = Field(default=False, description="Remove neighbours only: one run of blocks in each stack.")
    bridge: bool = Field(
        default=False,
        description="Fold a linear fit of what removed blocks did into the block before them, by least squares on the "
        "calibration text.",
    )
    sublayers: Literal["block", "attention", "mlp"] = Field(
        default="block", description="What is removed. Only whole blocks leave a model that transformers can load."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options
        given = [key for key in WAYS if options.get(key) is not None]
        if not given:
            raise ValueError("how much is not said: give layers, amount, to or drop, as in layers: 10")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say how much: give one of them")
        return options

    @model_validator(mode="after")
    def _possible(self) -> Depth:
        if self.sublayers != "block":
            raise ValueError(
                f"sublayers: {self.sublayers} cannot be loaded afterwards: no config of transformers says that a block "
                f"lacks its {self.sublayers}, and zeros in its place save neither space nor time; use sublayers: block"
            )
        if isinstance(self.layers, str) and counted(self.layers, 100) >= 100:
            raise ValueError(f"layers: {self.layers} shall remain, so that nothing would be removed")
        if self.drop is not None:
            if not self.drop or min(self.drop) < 0 or len(set(self.drop)) < len(self.drop):
                raise ValueError("drop takes indices from 0, each once, as in [4, 5]")
            if self.contiguous or self.importance != "cosine":
                raise ValueError("drop says which blocks go: leave importance and contiguous out")
        return self

    @property
    def takes_calibration(self) -> bool:
        return self.drop is None or self.bridge

    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        from compress.model import find_stacks
        from compress.reshaping import without_blocks

        counts = [len(stack) for stack in find_stacks(model)]
        scores = [[float(index) for index in range(count)] for count in counts]
        return without_blocks(model.config, *self._kept(model, scores))

    def text_bytes(self, shape: ModelShape, text: Text) -> int:
        """The worse of measuring and bridging. Measuring by cosine: the hidden states before a block, or a run of them,
        and behind it; by loss: those of three models, and the logits of two for a batch."""
        from compress.costs import activations, hidden_states

        running = activations(shape, shape.widest, text.in_flight(), text.length)
        paths = 2
        if self.contiguous and self.importance == "cosine":
            paths = 1 + max([1, *self._gone(shape.handle.model)])
        elif self.importance == "loss":
            logits = min(LOGITS, text.in_flight() * shape.vocabulary)
            paths, running = 4, running + 2 * logits * shape.dtype.itemsize
        measuring = hidden_states(shape, text, paths) + running if self.drop is None else 0
        bridging = hidden_states(shape, text, 2) + self._bridge_bytes(shape) if self.bridge else 0
        return max(measuring, bridging)

    def _bridge_bytes(self, shape: ModelShape) -> int:
        """The tables of both parts of the text, a copy and a factor of one, and a solution, in float64; a second block,
        and a batch."""
        layers = shape.handle.block_list()[0].layers().values()
        wide: int = max(layer.weight.shape[1] for layer in layers)
        batch = 2 * 8 * Context.tokens_per_batch * (wide + shape.hidden)
        return int(8 * (4 * wide * wide + 4 * wide * shape.hidden) + shape.largest_block() + batch)

    def _gone(self, model: PreTrainedModel) -> list[int]:
        """How many blocks of each stack go. StartError where that is none, or all."""
        from compress.model import find_stacks
        from compress.reshaping import parameters_of

        stacks = find_stacks(model)
        counts = [len(stack) for stack in stacks]
        if self.drop is not None:
            starts = [sum(counts[:place]) for place in range(len(counts) + 1)]
            return [sum(a <= index < b for index in self.drop) for a, b in pairwise(starts)]
        if self.layers is not None:
            return [count - self._remaining(count) for count in counts]
        sizes = [[sum(p.numel() for p in block.parameters()) for block in stack.modules] for stack in stacks]
        inside, whole = sum(map(sum, sizes)), parameters_of(model)
        least = self.amount * inside * (1 - 1e-9) if self.amount is not None else whole - parse_parameters(self.to)
        if least <= 0:
            raise StartError(f"depth: to: {self.to}: the model has {whole} parameters, which is no more than that.")
        gone = removals(sizes, least)
        if gone is None:
            left = whole - inside + sum(min(stack) for stack in sizes)
            asked = f"amount: {self.amount:.0%}" if self.amount is not None else f"to: {self.to}"
            raise StartError(
                f"depth: {asked}: with one block of each stack left there are {left} of {whole} parameters; a block "
                "has to remain. Ask for less, or cut width or vocabulary as well."
            )
        return gone

    def _remaining(self, count: int) -> int:
        assert self.layers is not None
        remaining = math.ceil(counted(self.layers, count) - 1e-9)
        if isinstance(self.layers, str):
            remaining = max(1, min(remaining, count - 1))
        if remaining >= count:
            raise StartError(f"depth: layers: {self.layers} shall remain, and the model has {count}.")
        return remaining

    def _kept(
        self, model: PreTrainedModel, scores: Sequence[Sequence[float]], drop: Sequence[int] | None = None
    ) -> Kept:
        """The blocks of each stack that stay; `scores` are what each, or each run, is worth; `drop` (default: the
        option) are those that go. StartError where none of those can be left."""
        from compress.model import find_stacks
        from compress.reshaping import find_fits

        stacks = find_stacks(model)
        counts = [len(stack) for stack in stacks]
        drop = self.drop if drop is None else drop
        unknown = [index for index in drop or () if index >= sum(counts)]
        if unknown:
            raise StartError(f"depth: drop names block {unknown[0]}; there are blocks 0 to {sum(counts) - 1}.")
        gone = self._gone(model)
        left = [count - n for count, n in zip(counts, gone, strict=True)]
        if not all(left):
            raise StartError("depth: drop names all blocks of a stack; one has to remain.")
        fits = find_fits(model, left)
        keep: Kept = []
        for place, count in enumerate(counts):
            first = sum(counts[:place])
            chosen = self._in_stack(scores[place], count, left[place], fits[place], first, drop)
            if chosen is None:
                raise StartError(_why_not(model, place, left[place], first, drop))
            keep.append(chosen)
        if len(counts) > 1 and left[0] < left[1] and counts[0] >= counts[1] and model.can_generate():
            raise StartError(
                f"depth: {left[0]} and {left[1]} blocks would be left in {' and '.join(s.name for s in stacks)}; "
                "transformers cannot generate from a decoder with more blocks than its encoder. Drop as many there."
            )
        return keep

    def _in_stack(
        self, scores: Sequence[float], count: int, left: int, fits: Fits, first: int, drop: Sequence[int] | None
    ) -> list[int] | None:
        if drop is not None:
            keep = [index for index in range(count) if first + index not in drop]
            return keep if all(fits[index][place] for place, index in enumerate(keep)) else None
        if self.contiguous and left < count:
            return weakest_run(scores[: left + 1], count, fits)
        return strongest(scores, left, fits)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.reshaping import parameters_of, without_blocks

        before, counts = parameters_of(model.model), [len(stack) for stack in model.stacks]
        self.smaller_config(model.model)  # refuses before any work
        if self.bridge:
            _try_bridge(model, context)
        measured: dict[str, Any] = {"scores": [[] for _ in counts], "drop": None}
        if self.drop is None:
            once = context.stage.once if context.stage else lambda _, measure: measure()
            measured = once("influence", lambda: self._measure(model, context))
        scores = measured["scores"]
        keep = self._kept(model.model, scores, measured["drop"])
        config = without_blocks(model.config, *keep)
        records = keep_smaller(model, context, config, self._staying(model, context, keep, scores))
        found = {
            "kept": keep[0] if len(keep) == 1 else keep,
            "influence": scores[0] if len(scores) == 1 else scores,
            "parameters_before": before,
            "parameters": parameters_of(model.model),
        }
        return PassResult(model, records, 1 - sum(map(len, keep)) / sum(counts), found)

    def _measure(self, model: ModelHandle, context: Context) -> dict[str, Any]:
        """`scores`: of each stack, what each block is worth, or each run that could go; `drop`: the blocks that go,
        where they were chosen one after the other."""
        from compress.block_importance import SkipLosses, cosine_scores

        assert context.calibration is not None
        gone = self._gone(model.model)
        runs = [n if self.contiguous else 1 for n in gone]
        blocks = [[b for b in model.block_list() if b.stack.name == stack.name] for stack in model.stacks]
        text = (model, context.calibration, context.tokens_per_batch)
        if self.importance == "cosine":
            with context.progress.step("depth: influence", total=sum(map(len, blocks))) as step:
                return {"scores": cosine_scores(*text, runs, step), "drop": None}
        skipping = SkipLosses(*text)
        if self.greedy and not self.contiguous:
            return self._one_by_one(model, context, skipping, blocks)
        spans = [
            [stack[start : start + run] for start in range(len(stack) - run + 1)] if run else []
            for stack, run in zip(blocks, runs, strict=True)
        ]
        flat = [span for stack in spans for span in stack]
        with context.progress.step("depth: loss when skipped", total=len(flat)) as step:
            losses = iter(skipping.measure(set(), flat, step))
        return {"scores": [[next(losses) for _ in stack] for stack in spans], "drop": None}

    def _one_by_one(
        self, model: ModelHandle, context: Context, skipping: SkipLosses, blocks: Sequence[Sequence[Block]]
    ) -> dict[str, Any]:
        """The block that is missed least goes, then of what is left the next one. The scores are those of the first
        round."""
        from compress.reshaping import find_fits

        gone = self._gone(model.model)
        left = [len(stack) - n for stack, n in zip(blocks, gone, strict=True)]
        fits = find_fits(model.model, left)
        taken: list[set[int]] = [set() for _ in blocks]
        scores: list[list[float]] = []

        def can_go(place: int, index: int) -> bool:
            if index in taken[place] or len(taken[place]) == gone[place]:
                return False
            out = taken[place] | {index}
            worth = [-1.0 if other in out else 0.0 for other in range(len(blocks[place]))]
            keep = strongest(worth, left[place], fits[place])
            return keep is not None and not out & set(keep)

        for _ in range(sum(gone)):
            free = [(p, i) for p, stack in enumerate(blocks) for i in range(len(stack)) if can_go(p, i) or not scores]
            out = {blocks[p][i].name for p, indices in enumerate(taken) for i in indices}
            with context.progress.step("depth: loss when skipped", total=len(free)) as step:
                losses = dict(zip(free, skipping.measure(out, [[blocks[p][i]] for p, i in free], step), strict=True))
            scores = scores or [[losses[p, i] for i in range(len(stack))] for p, stack in enumerate(blocks)]
            place, index = min((where for where in free if can_go(*where)), key=lambda where: losses[where])
            taken[place].add(index)
        starts = [sum(map(len, blocks[:place])) for place in range(len(blocks))]
        drop = sorted(start + index for start, indices in zip(starts, taken, strict=True) for index in indices)
        return {"scores": scores, "drop": drop}

    def _staying(
        self, model: ModelHandle, context: Context, keep: Kept, scores: Sequence[Sequence[float]]
    ) -> Iterator[tuple[Block, dict[str, Any]]]:
        """The blocks that stay, loaded one at a time, with their records."""
        from compress.bridging import bridged
        from compress.model import Block
        from compress.stream import CalibrationStream

        of = {stack.name: (stack, found) for stack, found in zip(model.stacks, scores, strict=True)}

        def record(block: Block) -> dict[str, Any]:
            stack, found = of[block.stack.name]
            single = len(found) == len(stack)
            return {"name": block.name, "error": None, "influence": found[block.index] if single else None}

        if self.bridge:
            assert context.calibration is not None
            stream = CalibrationStream(model, context.calibration, context.tokens_per_batch, original=True)
            for block, fold in bridged(model, stream, keep):
                yield block, record(block) | ({} if fold is None else {"bridge": fold})
            return
        for stack, indices in zip(model.stacks, keep, strict=True):
            for index in indices:
                block = model.load(Block(stack, index))
                yield block, record(block)
                model.release(block)


def _try_bridge(model: ModelHandle, context: Context) -> None:
    """StartError, before any work, where no fit can be folded into this kind of block."""
    from compress.bridging import find_summand
    from compress.stream import CalibrationStream

    text = context.calibration
    assert text is not None
    mask = None if text.mask is None else text.mask[:1]
    block = model.load(model.block_list()[0])
    try:
        find_summand(block, CalibrationStream(model, replace(text, tokens=text.tokens[:1], mask=mask)))
    finally:
        model.release(block)


def _why_not(model: PreTrainedModel, place: int, left: int, first: int, drop: Sequence[int] | None) -> str:
    """The sentence where blocks cannot stand where they would come to."""
    from compress.model import find_stacks
    from compress.reshaping import find_fits

    stacks = find_stacks(model)
    kind, stack, count = type(model).__name__, stacks[place].name, len(stacks[place])
    why = f"{kind} makes the blocks of {stack} of more than one kind, by their index"
    if drop is not None:
        counts = [len(other) for other in stacks]
        alone = find_fits(model, [n - (other == place) for other, n in enumerate(counts)])[place]
        can = [i for i in range(count) if all(alone[k][k - (k > i)] for k in range(count) if k != i)]
        allowed = ", ".join(str(first + i) for i in can) or "none"
        return f"depth: drop: {why}, and one would come to the place of another kind. One alone can go of: {allowed}."
    numbers = []
    for n in range(1, count):
        counts = [n if other == place else len(s) for other, s in enumerate(stacks)]
        if strongest([0.0] * count, n, find_fits(model, counts)[place]) is not None:
            numbers.append(str(n))
    allowed = ", ".join(numbers) or "no smaller number"
    return f"depth: {why}, and with {left} left one would come to the place of another kind. Can remain: {allowed}."
