"""What blocks are worth to a model, measured on the calibration text: how much they change the hidden states, or what
skipping them does to the outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.budget import batch_tokens
from compress.data import Windows
from compress.model import Block, ModelHandle
from compress.progress import Step
from compress.sensitivity import outputs_divergence
from compress.stream import CalibrationStream


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """One minus the cosine between rows of `before` and `after` `[..., hidden]`: float32 `[...]`."""
    return 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


@torch.no_grad()
def cosine_scores(
    model: ModelHandle, windows: Windows, tokens_per_batch: int, runs: Sequence[int], step: Step
) -> list[list[float]]:
    """For each stack, of each run of `runs[stack]` neighbouring blocks, by its start: one minus the cosine between what
    goes into the first and what comes out of the last, averaged over tokens (padding does not count).

    Holds the text's hidden states once more than the longest run has blocks.
    """
    stream = CalibrationStream(model, windows, tokens_per_batch)
    scores: list[list[float]] = [[] for _ in model.stacks]
    names = [stack.name for stack in model.stacks]
    earlier: deque[list[Tensor]] = deque()
    for block in model.blocks():
        place = names.index(block.stack.name)
        if block.index == 0:
            earlier = deque(maxlen=max(1, runs[place]))
        stream.reach(block)
        earlier.append(list(stream.hidden))
        stream.advance(block)
        if len(earlier) == earlier.maxlen:
            found = []
            for before, after, mask in zip(earlier[0], stream.hidden, stream.masks, strict=True):
                influence = block_influence(before, after)
                found.append(influence.flatten() if mask is None else influence[mask])
            scores[place].append(float(torch.cat(found).mean()))
        step.advance(block.name)
    return scores


class SkipLosses:
    """How far the outputs move from those of the whole model when blocks are skipped: Kullback-Leibler divergence in
    nats a token where the model gives tokens, else the squared change of its output relative to its square.

    Holds the hidden states of three models: the whole one's, those before the block at hand, and those of the model
    that skips it.
    """

    @torch.no_grad()
    def __init__(self, model: ModelHandle, windows: Windows, tokens_per_batch: int):
        self.model, self.windows = model, windows
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
        self.tokens_per_batch = min(tokens_per_batch, batch_tokens(windows.length, vocabulary))
        self._whole = CalibrationStream(model, windows, self.tokens_per_batch)
        for block in model.blocks():
            self._whole.advance(block)

    @torch.no_grad()
    def measure(self, gone: set[str], runs: Sequence[Sequence[Block]], step: Step) -> list[float]:
        """The loss of the model without the blocks named in `gone` and without one of `runs`, for each of those."""
        base = CalibrationStream(self.model, self.windows, self.tokens_per_batch)
        losses: dict[int, float] = {}
        blocks = self.model.block_list()
        for index, block in enumerate(blocks):
            for number, run in enumerate(runs):
                if run[0].name == block.name:
                    out = gone | {skipped.name for skipped in run}
                    losses[number] = self._without(base, blocks[index:], out)
                    step.advance(block.name)
            if block.name not in gone:
                base.reach(self.model.load(block))
                base.advance(block)
                self.model.release(block)
        return [losses[number] for number in range(len(runs))]

    def _without(self, base: CalibrationStream, blocks: Sequence[Block], out: set[str]) -> float:
        stream = base.fork()
        for block in blocks:
            if block.name not in out:
                stream.advance(self.model.load(block))
                self.model.release(block)
        whole = self._whole.outputs(self._whole.hidden)
        found: list[float] = outputs_divergence(self._whole, whole, [stream.outputs(stream.hidden)])
        return found[0]
