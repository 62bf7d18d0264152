"""What the parts of blocks matter to the loss, by its gradient: the first-order estimate, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.budget import batch_tokens
from compress.calibration import hooked
from compress.data import Windows
from compress.model import Block, ModelHandle
from compress.places import Places
from compress.sensitivity import likelihood_slopes
from compress.stream import CalibrationStream

#: For each block, by name: for each of its `Places`, a figure for each part.
Scores = Mapping[str, Sequence[Sequence[float]]]


def taylor(x: Tensor, gradient: Tensor, groups: Tensor) -> Tensor:
    """Sum over tokens of `(sum over the part's columns of x * gradient)^2`, float64 `[parts]`: how much the loss
    would change, to first order, if the part gave nothing. `x`, `gradient`: `[..., columns]`; `groups` `[parts, n]`."""
    product = (x * gradient).flatten(0, -2).double()
    return product[:, groups].sum(-1).square().sum(0)


def taylor_scores(
    model: ModelHandle,
    windows: Windows,
    places: Callable[[Block], Sequence[Places]],
) -> Scores:
    """`taylor` of every part. Blocks are run again, last first, to be differentiated: memory is that of one block, its
    graph for a batch, and the text's hidden states before every block."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    stream = CalibrationStream(model, windows, batch_tokens(windows.length, vocabulary))
    before: list[list[Tensor]] = []
    for block in model.blocks():
        before.append(list(stream.hidden))
        stream.advance(block)
    slopes, _ = likelihood_slopes(stream)
    scores: dict[str, list[list[float]]] = {}
    for block in reversed(model.block_list()):
        model.load(block)
        found = places(block)
        sums = [torch.zeros(len(place.columns), dtype=torch.float64) for place in found]
        for index, hidden in enumerate(before.pop()):
            slopes[index] = _backward(stream, block, index, hidden, slopes[index], found, sums)
        scores[block.name] = [total.tolist() for total in sums]
        model.release(block)
    return scores


def _backward(
    stream: CalibrationStream, block: Block, index: int, hidden: Tensor, slope: Tensor, places: Sequence[Places],
    sums: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The gradient one block further down; adds this batch's share to `sums`."""
    device = stream.model.device
    inputs: dict[str, Tensor] = {}
    with torch.enable_grad():
        given = hidden.to(device).detach().requires_grad_()

        def noting(name: str) -> Callable[[Tensor], None]:
            return lambda x: inputs.__setitem__(name, x)

        with hooked(block.module, {place.reader: noting(place.reader) for place in places}):
            out = stream.through(block, index, given)
        wanted = [given, *(inputs[place.reader] for place in places)]
        first, *rest = torch.autograd.grad(out, wanted, slope.to(device))
    gradients = dict(zip((place.reader for place in places), rest, strict=True))
    for place, total in zip(places, sums, strict=True):
        total += taylor(inputs[place.reader].detach(), gradients[place.reader], place.columns.to(device)).cpu()
    return first.cpu()
