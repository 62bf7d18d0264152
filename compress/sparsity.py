"""How many zeros each block gets: the same on average, fewer where they do more harm. Measured once, before the walk.

`owl`: Yin et al.: "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
2024, arXiv 2310.05175, section 3: a block with more outliers among its scores `|W_ij| |X_j|` keeps more of its weights.
`measured`: each block is pruned alone, at a few rates, and the model's output compared; the rates with the least sum of
divergences are found exactly (`maths/allocation.py`), and kept only if they do less harm than the same rate for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.budget import batch_tokens, measured_windows
from compress.calibration import BlockCalibration
from compress.errors import StartError
from compress.maths.allocation import Limit, best
from compress.maths.masks import keep_mask, zeroed
from compress.sensitivity import candidate_losses, kl_losses
from compress.stream import CalibrationStream

if TYPE_CHECKING:
    from compress.data import Windows
    from compress.model import Block, Layer, ModelHandle
    from compress.passes.base import Context
    from compress.passes.pruning import PruningPass

#: A score counts as an outlier from so many times its block's mean on (the paper's M).
OUTLIER = 5.0
#: The rates that are measured, as shares of `max_deviation` away from the sparsity asked for.
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)

Norms = dict[str, Tensor]


def choose_rates(pass_: PruningPass, sparsity: float, model: ModelHandle, context: Context) -> dict[str, Any]:
    """`rates` (block -> share of zeros) and the account of how they came about, for JSON. The mean of the rates,
    weighted by the weights that are pruned, is `sparsity`."""
    if context.calibration is None:
        raise StartError(f"{pass_.name} needs calibration text to share out its zeros.")
    text, held_out = measured_windows(context.calibration)
    weights = {block.name: _size(pass_, block) for block in model.block_list()}
    weights = {name: size for name, size in weights.items() if size}
    low, high = max(0.0, sparsity - pass_.max_deviation), min(1.0, sparsity + pass_.max_deviation)
    norms = input_norms(pass_, model, text)
    account: dict[str, Any] = {"sparsity": sparsity, "windows": [len(text), len(held_out)], "fallback": None}
    if pass_.allocation == "owl":
        ratios = outlier_ratios(pass_, model, norms)
        wanted = owl_rates({name: ratios[name] for name in weights}, pass_.max_deviation)
        return account | {"rates": levelled(wanted, weights, sparsity, low, high), "outlier_ratios": ratios}
    choices = [min(high, max(low, sparsity + step * pass_.max_deviation)) for step in STEPS]

    def stand_in(layer: Layer, rate: float) -> Tensor:
        assert layer.block is not None
        scores = pass_.scores(layer.weight, norms.get(f"{layer.block.name}.{layer.name}"))
        keep = keep_mask(layer.weight, scores, rate, per=pass_.counted_per)
        return zeroed(layer.weight, keep)

    def layers(block: Block) -> Mapping[str, Layer]:
        found: Mapping[str, Layer] = block.layers(pass_.targets, pass_.skip)
        return found

    with context.progress.step(f"{pass_.name}: sensitivity", total=len(model.block_list())) as step:
        losses = kl_losses(model, text, layers, choices, stand_in, step, whole=True)
    found = best_rates({name: losses[name] for name in weights}, choices, weights, sparsity)
    rates = levelled(found, weights, sparsity, low, high)
    candidates = [rates, dict.fromkeys(weights, sparsity)]
    by_layer = [_by_layer(pass_, model, each) for each in candidates]
    measured = candidate_losses(model, held_out, layers, by_layer, stand_in)
    account |= {"choices": choices, "losses": losses, "measured_loss": measured[0], "uniform_loss": measured[1]}
    if measured[0] > measured[1]:
        account["fallback"] = (
            f"the same for all: the rates that were found diverge more on text they were not measured on "
            f"({measured[0]:.4g} against {measured[1]:.4g})"
        )
    return account | {"rates": candidates[measured[0] > measured[1]]}


def owl_rates(ratios: Mapping[str, float], deviation: float) -> dict[str, float]:
    """Rates up to a constant: the block with the most outliers gets `2 deviation` less than the one with the fewest."""
    low, high = min(ratios.values()), max(ratios.values())
    spread = high - low
    return {name: -2 * deviation * (ratio - low) / spread if spread else 0.0 for name, ratio in ratios.items()}


def best_rates(
    losses: Mapping[str, list[float]], choices: list[float], weights: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """The rates with the least sum of losses that leave no more weights than `sparsity` does."""
    names = list(losses)
    limit = Limit(
        [[round((1 - rate) * weights[name]) for rate in choices] for name in names],
        sum(round((1 - sparsity) * weights[name]) for name in names),
    )
    chosen = best([losses[name] for name in names], [limit])
    assert chosen is not None  # the same rate for all is among them
    return {name: choices[c] for name, c in zip(names, chosen, strict=True)}


def levelled(
    rates: Mapping[str, float], weights: Mapping[str, int], mean: float, low: float, high: float
) -> dict[str, float]:
    """The rates, all shifted by one constant and cut off at `low` and `high`, whose mean by `weights` is `mean`."""
    total = sum(weights.values())

    def shifted(shift: float) -> dict[str, float]:
        return {name: min(high, max(low, rate + shift)) for name, rate in rates.items()}

    below, above = low - max(rates.values()), high - min(rates.values())
    for _ in range(200):  # the mean rises with the shift
        middle = (below + above) / 2
        found = sum(rate * weights[name] for name, rate in shifted(middle).items()) / total
        below, above = (middle, above) if found < mean else (below, middle)
    return shifted(above)


@torch.no_grad()
def input_norms(pass_: PruningPass, model: ModelHandle, text: Windows) -> Norms:
    """The l2 norms of the columns of each layer's input (`block.layer`, float32 [in]), in the model as it is. Layers
    that no token reached have none."""
    from compress.passes.wanda import observed_norms

    vocabulary = model.config.get_text_config().vocab_size
    stream = CalibrationStream(model, text, batch_tokens(text.length, vocabulary))
    norms: Norms = {}
    for block in model.blocks():
        found = observed_norms(block.layers(pass_.targets, pass_.skip), BlockCalibration(block, stream))
        norms |= {f"{block.name}.{name}": seen.norms for name, seen in found.items() if seen.count}
        stream.advance(block)
    return norms


def outlier_ratios(pass_: PruningPass, model: ModelHandle, norms: Norms) -> dict[str, float]:
    """Of each block, the share of scores above `OUTLIER` times their mean."""
    from compress.passes.wanda import wanda_scores

    ratios = {}
    for block in model.blocks():
        layers = block.layers(pass_.targets, pass_.skip)
        known = [
            (layer, norms[f"{block.name}.{name}"]) for name, layer in layers.items() if f"{block.name}.{name}" in norms
        ]
        count = sum(layer.weight.numel() for layer, _ in known)
        total = sum(float(wanda_scores(layer.weight, n).sum(dtype=torch.float64)) for layer, n in known)
        above = sum(int((wanda_scores(layer.weight, n) * count > OUTLIER * total).sum()) for layer, n in known)
        ratios[block.name] = above / count if count else 0.0
    return ratios


def _size(pass_: PruningPass, block: Block) -> int:
    return sum(layer.module.weight.numel() for layer in block.layers(pass_.targets, pass_.skip).values())


def _by_layer(pass_: PruningPass, model: ModelHandle, rates: Mapping[str, float]) -> dict[str, float]:
    return {
        f"{block.name}.{name}": rates[block.name]
        for block in model.block_list()
        for name in block.layers(pass_.targets, pass_.skip)
    }
