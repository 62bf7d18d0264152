"""Layers of the blocks that can be corrected from beside, packed ones too: which a recipe means, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import StartError
from compress.model import ModelHandle
from compress.nn.quant_linear import QuantLinear


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight [out, in], float32, packed or not."""
    layer = getattr(layer, "base_layer", layer)
    if isinstance(layer, QuantLinear):
        return layer.dequantize(torch.float32)
    weight: Tensor = layer.get_parameter("weight").detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


def sides(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer, packed or not."""
    layer = getattr(layer, "base_layer", layer)
    if isinstance(layer, nn.Linear | QuantLinear):
        return layer.out_features, layer.in_features
    columns, rows = layer.get_parameter("weight").shape
    return rows, columns


def adaptable(model: ModelHandle) -> dict[str, nn.Module]:
    """The layers of the blocks that can have an adapter, packed ones too, by their names in the model."""
    return {
        f"{block.name}.{name}": module
        for block in model.block_list()
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear | Conv1D | QuantLinear)
    }


def select(model: ModelHandle, wanted: Sequence[str] | str | None, pass_: str) -> dict[str, nn.Module]:
    """The layers that `target_modules` means, as peft has it: None or `all-linear`: all of them; a text: a regular
    expression of the full name; a list: full names, or their ends. StartError for one that matches nothing."""
    layers = adaptable(model)
    if wanted is None or wanted == "all-linear":
        return layers
    if isinstance(wanted, str):
        try:
            found = {name: layer for name, layer in layers.items() if re.fullmatch(wanted, name)}
        except re.error as error:
            raise StartError(f"{pass_}: target_modules: {wanted} is no regular expression ({error}).") from error
        unmatched = [] if found else [wanted]
    else:
        ends = {end: [name for name in layers if name == end or name.endswith(f".{end}")] for end in wanted}
        unmatched = [end for end, names in ends.items() if not names]
        chosen = {name for names in ends.values() for name in names}
        found = {name: layer for name, layer in layers.items() if name in chosen}
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise StartError(
            f"{pass_}: target_modules: {', '.join(unmatched)} matches no layer of the blocks, whose layers end in "
            f"{', '.join(known)}."
        )
    return found


def pattern(names: Sequence[str]) -> str:
    """A regular expression that means just these layers, short where blocks are alike."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(.*\.\d+)\.(.*)", name)
        stem, rest = (found[1], found[2]) if found else ("", name)
        blocks.setdefault(stem, []).append(rest)
    alike: dict[tuple[str, ...], list[str]] = {}
    for stem, rest in blocks.items():
        alike.setdefault(tuple(rest), []).append(stem)
    parts = [
        f"({'|'.join(map(re.escape, stems))})\\.({'|'.join(map(re.escape, rest))})" for rest, stems in alike.items()
    ]
    return "|".join(parts)
