"""What changing a layer, or a block, and that alone, does to the model: measured, with one block in memory.

`kl_losses` measures it at the model's output. `fisher_losses` predicts it from gradients, in far less time. Both are in
nats a token, so that their sums over layers can be held against the divergence of a whole rounded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import VARIANTS_AT_ONCE, batch_tokens
from compress.data import Windows
from compress.errors import StartError
from compress.model import Block, Layer, ModelHandle
from compress.progress import Step
from compress.stream import CalibrationStream

#: `weight [out, in]` of a layer as it would be at so many bits, or with such a share of zeros, in the layer's dtype.
Rounded = Callable[[Layer, Any], Tensor]
#: The layers of a block that are to be changed, by their name inside it.
Selected = Callable[[Block], Mapping[str, Layer]]
Losses = dict[str, list[float]]

_POSITIONS = 32  # tokens of which the softmaxes are in memory at once


@contextmanager
def replaced(layer: Layer, weight: Tensor) -> Iterator[None]:
    """The layer computes with `weight` [out, in] inside; the old tensor is back, and was never written to, after."""
    module, old = layer.module, layer.module.weight
    module.weight = nn.Parameter(weight.t() if layer.transposed else weight, requires_grad=False)
    try:
        yield
    finally:
        module.weight = old


def _stream(model: ModelHandle, windows: Windows) -> CalibrationStream:
    if len(model.stacks) > 1:
        kind = type(model.model).__name__
        raise StartError(f"What is measured at the output, a layer at a time, takes one stack of blocks; not {kind}.")
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)  # what reads images has none
    return CalibrationStream(model, windows, batch_tokens(windows.length, vocabulary))


@torch.no_grad()
def kl_losses(
    model: ModelHandle, windows: Windows, layers: Selected, choices: Sequence[float], rounded: Rounded, step: Step,
    whole: bool = False,
) -> Losses:  # fmt: skip
    """KL divergence, the model's tokens from those with one layer changed, for each layer (`block.layer`) and choice;
    `whole`: with all layers of one block changed alike, for each block.

    A variant differs from the model from its own block on, so it is pushed through that block and those that follow.
    Its hidden states are what it takes: `VARIANTS_AT_ONCE` times the text's.
    """
    stream = _stream(model, windows)
    blocks = model.block_list()
    losses: Losses = {}
    for index, block in enumerate(blocks):
        names = list(layers(block))
        units = {block.name: names} if whole and names else {f"{block.name}.{name}": [name] for name in names}
        variants = [(unit, choice) for unit in units for choice in choices]
        for start in range(0, len(variants), VARIANTS_AT_ONCE):
            some = variants[start : start + VARIANTS_AT_ONCE]
            changed = [(units[unit], choice) for unit, choice in some]
            streams = _variants(model, stream, block, layers, changed, rounded)
            for later in blocks[index + 1 :]:
                model.load(later)
                for hidden in streams:
                    stream.push(later, hidden)
                model.release(later)
            for (unit, _), found in zip(some, divergence(stream, streams[0], streams[1:]), strict=True):
                losses.setdefault(unit, []).append(found)
        model.load(block)
        stream.advance(block)
        model.release(block)
        step.advance(block.name)
    return losses


def _variants(
    model: ModelHandle, stream: CalibrationStream, block: Block, layers: Selected,
    variants: list[tuple[list[str], float]], rounded: Rounded,
) -> list[list[Tensor]]:  # fmt: skip
    """What the block makes of the stream: as it is, then with some layers changed, for each of `variants`."""
    model.load(block)
    streams = [list(stream.hidden)]
    stream.push(block, streams[0])
    dense = layers(block)
    for names, choice in variants:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(replaced(dense[name], rounded(dense[name], choice)))
            streams.append(list(stream.hidden))
            stream.push(block, streams[-1])
    model.release(block)
    return streams


@torch.no_grad()
def candidate_losses(
    model: ModelHandle, windows: Windows, layers: Selected, candidates: Sequence[Mapping[str, float]], rounded: Rounded
) -> list[float]:
    """KL divergence of the model with *all* layers changed, once for each candidate (`block.layer` -> choice)."""
    stream = _stream(model, windows)
    streams = [list(stream.hidden) for _ in candidates]
    for block in model.blocks():
        stream.advance(block)
        for candidate, hidden in zip(candidates, streams, strict=True):
            _push_rounded(stream, block, layers(block), candidate, hidden, rounded)
    found: list[float] = divergence(stream, stream.hidden, streams)
    return found


def _push_rounded(
    stream: CalibrationStream, block: Block, layers: Mapping[str, Layer], bits: Mapping[str, float],
    hidden: list[Tensor], rounded: Rounded,
) -> None:  # fmt: skip
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(replaced(layer, rounded(layer, bits[f"{block.name}.{name}"])))
        stream.push(block, hidden)


@torch.no_grad()
def divergence(stream: CalibrationStream, original: list[Tensor], others: Sequence[list[Tensor]]) -> list[float]:
    """Mean KL divergence in nats a token of each of `others` from `original`, what the last block gave; padding does
    not count. An encoder has no tokens to give: the squared change of its output relative to its square."""
    found: list[float] = outputs_divergence(
        stream, stream.outputs(original), [stream.outputs(hidden) for hidden in others]
    )
    return found


@torch.no_grad()
def outputs_divergence(
    stream: CalibrationStream, original: Iterator[Tensor], others: Sequence[Iterator[Tensor]]
) -> list[float]:
    """As `divergence`, from the outputs of models, batch by batch, on the text of `stream`."""
    totals: list[float] = [0.0] * len(others)
    counted = 0.0
    causal = stream.model.model.get_output_embeddings() is not None
    for mask, first in zip(stream.masks, original, strict=True):
        kept = torch.ones(first.shape[:2], dtype=torch.bool)
        if mask is not None and mask.shape == kept.shape:  # a classifier gives a row a text, not a token
            kept = mask
        p = first[kept.to(first.device)]
        counted += len(p) if causal else float(p.double().square().sum())
        for index, outputs in enumerate(others):
            q = next(outputs)[kept.to(first.device)]
            totals[index] += kl_of_logits(p, q) if causal else float((p - q).double().square().sum())
    means: list[float] = [max(total, 0.0) / counted for total in totals]
    return means


def kl_of_logits(p: Tensor, q: Tensor) -> float:
    """Sum over tokens of KL(p || q), for logits [tokens, vocabulary]."""
    total = 0.0
    for start in range(0, len(p), _POSITIONS):
        first = functional.log_softmax(p[start : start + _POSITIONS].double(), -1)
        second = functional.log_softmax(q[start : start + _POSITIONS].double(), -1)
        total += float(functional.kl_div(second, first, reduction="sum", log_target=True))
    return total


def fisher_losses(
    model: ModelHandle, windows: Windows, layers: Selected, choices: Sequence[int], rounded: Rounded, step: Step
) -> Losses:
    """`1/2 sum F (w - q)^2` for each layer and choice, F the diagonal of the Fisher information a token.

    F is the mean over windows of the squared gradient of the window's log-likelihood, divided by its tokens (gradients
    of tokens taken as uncorrelated). One window at a time; blocks are run again, last first, to be differentiated, so
    that memory is that of one block, its gradients and F, and of the text's hidden states before every block.
    StartError for a model that gives no likelihood.
    """
    if model.model.get_output_embeddings() is None:
        raise StartError("sensitivity is fisher, which needs a model that predicts tokens: use sensitivity: kl")
    stream = CalibrationStream(model, windows, windows.length)  # a window a batch: each has a gradient of its own
    before: list[list[Tensor]] = []
    for block in model.blocks():
        before.append(list(stream.hidden))
        stream.advance(block)
    slopes, tokens = likelihood_slopes(stream)
    losses: Losses = {}
    for block in reversed(model.block_list()):
        model.load(block)
        dense = layers(block)
        fisher = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in dense.items()}
        for index, hidden in enumerate(before.pop()):
            slopes[index] = _backward(stream, block, index, hidden, slopes[index], dense, fisher)
        for name, layer in dense.items():
            information = fisher[name] / (2 * tokens)
            changes = ((layer.weight.float() - rounded(layer, bits).float()).square_() for bits in choices)
            losses[f"{block.name}.{name}"] = [float((information * change).sum()) for change in changes]
        model.release(block)
        step.advance(block.name)
    return {name: losses[name] for block in model.block_list() for name in losses if name.startswith(f"{block.name}.")}


def likelihood_slopes(stream: CalibrationStream) -> tuple[list[Tensor], int]:
    """Gradient of each window's log-likelihood by what the last block gave, and the tokens predicted in all."""
    slopes, tokens = [], 0
    with torch.enable_grad():
        last = [hidden.detach().clone().requires_grad_() for hidden in stream.hidden]
        for hidden, batch, logits in zip(last, stream.batches(), stream.outputs(last), strict=True):
            targets = batch["input_ids"][:, 1:].to(logits.device)
            if "attention_mask" in batch:
                targets = targets.masked_fill(~batch["attention_mask"][:, 1:].bool().to(logits.device), -100)
            given = logits[:, :-1].flatten(0, 1).float()
            likelihood = -functional.cross_entropy(given, targets.flatten(), reduction="sum")
            slopes.append(torch.autograd.grad(likelihood, hidden)[0])
            tokens += int((targets != -100).sum())
    return slopes, tokens


def _backward(
    stream: CalibrationStream, block: Block, index: int, hidden: Tensor, slope: Tensor, layers: Mapping[str, Layer],
    fisher: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """The gradient one block further down, and the squares of the weights' gradients added to `fisher`."""
    weights = [layer.module.weight for layer in layers.values()]
    asked = [weight.requires_grad for weight in weights]
    device = stream.model.device
    with torch.enable_grad():
        given = hidden.to(device).detach().requires_grad_()
        for weight in weights:
            weight.requires_grad_()
        out = stream.through(block, index, given)
        found = torch.autograd.grad(out, [given, *weights], slope.to(device), allow_unused=True)
    for weight, before in zip(weights, asked, strict=True):
        weight.requires_grad_(before)
    for name, layer, gradient in zip(layers, layers.values(), found[1:], strict=True):
        if gradient is not None:  # an expert that no token of the window reached has none
            fisher[name].add_((gradient.t() if layer.transposed else gradient).float().square())
    return found[0].cpu()
