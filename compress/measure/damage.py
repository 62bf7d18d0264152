"""What a pass did to the model, block by block: measured against the model as the pass found it.

One sweep through the blocks as they were carries, beside the text itself, a variant of it for each block that is
done with: the text with that block alone as the pass left it. So each block of both models is read once, and what is
run is (blocks / 2 + 2) forwards of a few windows. At the end stand, for every variant, how far the next-token
distribution has moved (KL, nats a token), and by how much the loss on the text itself has risen.

Where blocks of the two models do not answer to each other (another basis, other tokens), that is what is said, in the
place of a figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import batch_tokens
from compress.data import Windows
from compress.measure.runtimes import is_causal
from compress.model import Block, ModelHandle
from compress.nn.kernels import cached
from compress.progress import Step
from compress.sensitivity import kl_of_logits
from compress.stream import CalibrationStream

#: Tokens that the damage is measured on, in whole windows (at least one).
TOKENS = 1024
#: Weights (bytes on disk) up to which damage and stages are measured without being asked for.
SIZE_LIMIT = 500_000_000
#: How many layers are named as the worst.
WORST = 5
#: Squared relative difference of what enters the blocks, from which on the two models do not speak of the same thing.
_OTHER_BASIS = 0.5

#: For each block as it was, the index of what it became (None: it was removed); or why that cannot be said.
Pairs = Sequence[int | None] | str


def chosen(windows: Windows) -> Windows:
    """The first windows of a text, `TOKENS` tokens of them."""
    return windows.select(torch.arange(min(len(windows), max(1, TOKENS // windows.length))))


@torch.no_grad()
def measure_damage(
    before: ModelHandle, after: ModelHandle, windows: Windows, pairs: Pairs, *, by_layer: bool = True,
    step: Step | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The damage of the pass that made `after` of `before`, which read the same tokens.

    `loss`: nats a token of the text before and after, and the rise with its standard error over windows; `kl` of the
    whole model. `blocks`, as they were: `error`, the squared change of the block's output relative to its square, on
    the input it has in the model as it was; `kl` and `rise` with this block alone replaced (removed: skipped);
    `layers`, with `by_layer`: the same error of each layer's output on the input it had. `worst`: the layers that
    changed most. A figure that cannot be had is `{"value": null, "reason": ...}`.
    """
    step = step or Step()
    single = max(len(before.stacks), len(after.stacks)) == 1
    if not single:
        return nothing("the model has several stacks of blocks, which are not measured one by one")
    vocabulary = getattr(before.config.get_text_config(), "vocab_size", 1)
    size = batch_tokens(windows.length, vocabulary)
    was, now = CalibrationStream(before, windows, size), CalibrationStream(after, windows, size)
    pairs = _checked(was, now, pairs)
    sweep = _Sweep(was, now, pairs, by_layer, step)
    records = sweep.run()
    ends = _at_the_end(was, now, sweep.variants)
    found: dict[str, Any] = {
        "text": {"source": windows.source, "role": windows.role, "windows": len(windows), "length": windows.length},
        "loss": ends.loss, "kl": ends.kl,
    }  # fmt: skip
    if isinstance(pairs, str):
        return found | {"blocks": [{"name": r["name"]} for r in records], "reason": pairs, "worst": []}
    for record, kl, rise in zip(records, ends.kls, ends.rises, strict=True):
        record |= {"kl": kl, "rise": rise}
        record["layers"] = record.pop("layers")  # last: it is the longest
    return found | {"blocks": records, "worst": worst(records)}


def nothing(reason: str) -> dict[str, Any]:
    """The damage of a pass of which nothing can be said."""
    return {"loss": null(reason), "kl": null(reason), "blocks": [], "worst": [], "reason": reason}


def null(reason: str) -> dict[str, Any]:
    """A figure that could not be measured."""
    return {"value": None, "reason": reason}


def worst(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `WORST` layers by relative error, the worst first; layers that did not change are not among them."""
    found = [(error, f"{b['name']}.{name}") for b in blocks for name, error in (b.get("layers") or {}).items()]
    found = sorted((each for each in found if each[0] > 0), key=lambda each: (-each[0], each[1]))
    return [{"layer": name, "error": error} for error, name in found[:WORST]]


def _checked(was: CalibrationStream, now: CalibrationStream, pairs: Pairs) -> Pairs:
    """`pairs`, or why the blocks of these two models cannot stand in for each other."""
    if isinstance(pairs, str):
        return pairs
    first, other = was.hidden[0], now.hidden[0]
    if first.shape[-1] != other.shape[-1]:
        return (
            f"the hidden states are {other.shape[-1]} wide and were {first.shape[-1]}: no block can take the place of "
            "the one that it was made from"
        )
    if _relative(other, first) > _OTHER_BASIS:
        return "the hidden states have another basis than before: no block can take the place of what it was"
    return pairs


def _relative(now: Tensor, before: Tensor) -> float:
    difference = (now.double() - before.double()).square().sum()
    return float(difference / before.double().square().sum().clamp_min(1e-300))


class _Sweep:
    """The text, and a variant of it for each block, on their way through the model as it was; and the text on its way
    through the model as it is now."""

    def __init__(self, was: CalibrationStream, now: CalibrationStream, pairs: Pairs, by_layer: bool, step: Step):
        self.was, self.now, self.pairs, self.by_layer, self.step = was, now, pairs, by_layer, step
        #: Of each block that is done: the hidden states, a batch each, with that block alone as it is now.
        self.variants: list[list[Tensor]] = []
        self._reached = 0  # blocks of the model as it is now that its own text has passed

    def run(self) -> list[dict[str, Any]]:
        """A record for each block as it was; at the end all paths stand behind the last block."""
        records = []
        for index, block in enumerate(self.was.model.block_list()):
            self.was.model.load(block)
            with cached(block.module):
                for hidden in self.variants:
                    self.was.push(block, hidden)
                place = None if isinstance(self.pairs, str) else self.pairs[index]
                replaced = None if place is None else self._now(place)
                records.append(self._record(block, replaced))
            if replaced is not None:
                self._pass_now(replaced)
            self.was.model.release(block)
            self.step.advance(block.name)
        for block in self.now.model.block_list()[self._reached :]:
            self._pass_now(self.now.model.load(block))
        return records

    def _now(self, place: int) -> Block:
        """The block at `place` of the model as it is now, loaded; the text has passed all before it."""
        blocks = self.now.model.block_list()
        while self._reached < place:
            self._pass_now(self.now.model.load(blocks[self._reached]))
        return self.now.model.load(blocks[place])

    def _pass_now(self, block: Block) -> None:
        """Moves the text of the model as it is now through its next block, and lets go of that."""
        self.now.advance(block)
        self.now.model.release(block)
        self._reached += 1

    def _record(self, block: Block, replaced: Block | None) -> dict[str, Any]:
        """Moves the text through the block as it was; the variant of this block begins."""
        if isinstance(self.pairs, str):
            self.was.advance(block)
            return {"name": block.name}
        entered = list(self.was.hidden)
        tally: dict[str, _Tally] = {}
        with _compared(block, replaced if self.by_layer else None, tally):
            self.was.advance(block)
        variant = entered
        if replaced is not None:
            variant = list(entered)
            with cached(replaced.module):
                self.now.push(replaced, variant)
        self.variants.append(variant)
        total = _Tally()
        for now, before, mask in zip(variant, self.was.hidden, self.was.masks, strict=True):
            kept = slice(None) if mask is None or mask.shape != now.shape[:-1] else mask
            total.add(now[kept], before[kept])
        record: dict[str, Any] = {"name": block.name, "error": total.value}
        if replaced is None:
            record["removed"] = True
        return record | {"layers": {name: each.value for name, each in tally.items()}}


@dataclass
class _Tally:
    """Squares of a change and of what was changed, summed over batches."""

    change: float = 0.0
    size: float = 0.0

    def add(self, now: Tensor, before: Tensor) -> None:
        self.change += float((now.double() - before.double()).square().sum())
        self.size += float(before.double().square().sum())

    @property
    def value(self) -> float:
        return self.change / self.size if self.size else 0.0


@contextmanager
def _compared(block: Block, replaced: Block | None, tally: dict[str, _Tally]) -> Iterator[None]:
    """Inside, each layer of the block, when it is called, is held against the one of that name in `replaced`.

    Layers of another shape are left out: their outputs are not the same channels.
    """
    handles = []
    there = dict(replaced.module.named_modules()) if replaced is not None else {}
    for name, layer in matrices(block.module).items():
        other = there.get(name)
        if other is None or _sizes(other) != _sizes(layer):
            continue
        tally[name] = _Tally()

        def hook(
            _: nn.Module, args: tuple[Any, ...], out: Tensor, other: nn.Module = other, own: _Tally = tally[name]
        ) -> None:
            own.add(other(args[0]), out)

        handles.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrices(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a block that multiply by a matrix, packed ones and those with an adapter included, the outermost
    of each."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and _sizes(child) is not None:
            found[name] = child
    return found


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer, None for what is no layer."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None:
        return int(module.weight.shape[0]), int(module.nf)
    return None


@dataclass(frozen=True)
class _Ends:
    """What came out of the last block: of the whole pass, and with each block alone replaced."""

    loss: Any
    kl: Any
    kls: list[Any]
    rises: list[Any]


def _at_the_end(was: CalibrationStream, now: CalibrationStream, variants: list[list[Tensor]]) -> _Ends:
    model = was.model.model
    if model.get_output_embeddings() is None:
        reason = null("the model gives no next-token distribution")
        return _Ends(reason, reason, [reason] * len(variants), [reason] * len(variants))
    outputs = [was.outputs(hidden) for hidden in variants]
    others = [now.outputs(now.hidden), *outputs]
    causal = is_causal({"architectures": [type(model).__name__]})
    kls: list[float] = [0.0] * len(others)
    losses: list[list[Tensor]] = [[] for _ in range(len(others) + 1)]
    scored: list[Tensor] = []
    tokens = 0
    for batch, mask, first in zip(was.batches(), was.masks, was.outputs(was.hidden), strict=True):
        kept = torch.ones(first.shape[:2], dtype=torch.bool) if mask is None else mask
        tokens += int(kept.sum())
        ids = batch[was.windows.input_name] if causal else None
        if ids is not None:
            losses[0].append(_nll(first, ids, kept))
            scored.append(kept[:, 1:].sum(1))
        for index, each in enumerate(others):
            logits = next(each)
            kls[index] += kl_of_logits(first[kept.to(first.device)], logits[kept.to(logits.device)])
            if ids is not None:
                losses[index + 1].append(_nll(logits, ids, kept))
    means = [max(total, 0.0) / tokens for total in kls]
    if not causal:
        reason = null("the model does not predict the next token, so that text has no loss")
        return _Ends(reason, means[0], list(means[1:]), [reason] * len(variants))
    counts = torch.cat(scored).double()
    sums = [torch.cat(parts) for parts in losses]
    base = float(sums[0].sum() / counts.sum())
    rises = [float(each.sum() / counts.sum()) - base for each in sums[1:]]
    loss = {
        "before": base,
        "after": base + rises[0],
        "rise": rises[0],
        "stderr": standard_error(sums[1] - sums[0], counts),
    }
    return _Ends(loss, means[0], list(means[1:]), list(rises[1:]))


def standard_error(change: Tensor, tokens: Tensor) -> float | None:
    """Of the sum of `change` by the sum of `tokens`, over windows (float64 [n] both; linearised). None for one."""
    n = len(change)
    if n < 2:
        return None
    residual = change - change.sum() / tokens.sum() * tokens
    return float((n / (n - 1) * residual.square().sum()).sqrt() / tokens.sum())


def _nll(logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """Negative log-likelihood of each window's tokens but the first, summed, in nats: float64 [batch]."""
    targets = ids[:, 1:].masked_fill(~kept[:, 1:].bool(), -100).to(logits.device)
    sums = [
        functional.cross_entropy(row[:-1].float(), target, reduction="sum", ignore_index=-100).double().cpu()
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums)


@torch.no_grad()
def text_loss(model: ModelHandle, windows: Windows) -> tuple[list[float], list[float]]:
    """Negative log-likelihood (nats) and scored tokens of each window, as perplexity is measured: each window by
    itself, its first token unscored.

    A model in memory takes the text a batch at a time; one on disk takes all of it through each block at once.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
    size = batch_tokens(windows.length, vocabulary)
    share = max(1, size // windows.length) if model.resident else len(windows)
    nll: list[float] = []
    tokens: list[float] = []
    for start in range(0, len(windows), share):
        rows = torch.arange(start, min(start + share, len(windows)))
        part = windows.select(rows)
        stream = CalibrationStream(model, part, size)
        for block in model.blocks():
            stream.advance(block)
        for batch, mask, logits in zip(stream.batches(), stream.masks, stream.outputs(stream.hidden), strict=True):
            kept = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
            nll += _nll(logits, batch["input_ids"], kept).tolist()
            tokens += kept[:, 1:].sum(1).double().tolist()
    return nll, tokens
