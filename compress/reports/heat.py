"""The damage of each pass as a table of blocks by kinds of layer, each cell coloured by how much it changed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.reports import units
from compress.reports.report import Report, Stage

#: From the largest value down, so many powers of ten are told apart by colour.
DECADES = 3
#: Share of the colour that the least and the largest damage get.
FAINT, FULL = 0.06, 0.85

#: The start of a note that is of colours alone; Markdown has none.
COLOUR = "Colour: more is worse, on a logarithmic scale. "


@dataclass(frozen=True)
class Cell:
    """`text` as it is shown, `shade` from 0 (no colour) to 1, `tip` what it says in full."""

    text: str
    shade: float = 0.0
    tip: str = ""


@dataclass(frozen=True)
class HeatRow:
    """One block: its number or name, and a cell for each column; `removed` blocks have no layers."""

    name: str
    cells: list[Cell]
    removed: bool = False


@dataclass(frozen=True)
class HeatMap:
    """The damage of one pass. `columns` are headings; `loss` says what the whole pass did; `note` what the figures are;
    `reason` why some are missing; `worst` the layers that changed most, with their errors."""

    title: str
    loss: str
    columns: list[str]
    rows: list[HeatRow]
    worst: list[tuple[str, str]]
    note: str
    reason: str = ""


def heat_maps(report: Report) -> list[HeatMap]:
    """One for each pass of which anything is known, in their order."""
    found = []
    for stage in report.stages:
        if stage.damage is not None:
            found.append(_measured(stage, stage.damage))
        elif any(_layers(block) or _figure(block.get("error")) is not None for block in stage.blocks):
            found.append(_stated(stage))
    return found


def loss_words(stage: Stage) -> str:
    """What the pass did to the loss: `+0.035 nats (± 0.015)`, ± being 1.96 standard errors over windows."""
    loss = (stage.damage or {}).get("loss")
    rise = _figure(loss.get("rise")) if isinstance(loss, dict) else None
    if rise is None:
        return "–"
    stderr = _figure(loss.get("stderr")) if isinstance(loss, dict) else None
    sign = "+" if rise >= 0 else "-"
    return f"{sign}{units.short(abs(rise))} nats" + (f" (± {units.short(1.96 * stderr)})" if stderr else "")


def _measured(stage: Stage, damage: dict[str, Any]) -> HeatMap:
    """From what was measured after the pass."""
    blocks = [block for block in damage.get("blocks", []) if "error" in block]
    text = damage.get("text") or {}
    note = (
        f"{COLOUR}KL: how far the model's predictions move, in nats a token, "
        "when this block alone is as the pass left it. Error: squared change of the block's or layer's output relative "
        "to its square, in percent."
    )
    if text:
        note += f" On {text['windows']} windows of {text['length']} tokens of the {text['role']} text."
    if damage.get("layers_by"):
        note += f" Layers by {damage['layers_by']}."
    loss = loss_words(stage)
    kl = _figure(damage.get("kl"))
    said = "" if loss == "–" else f"loss {loss} a token"
    if kl is not None:
        said += f"{'; ' if said else ''}KL of the whole pass {units.short(kl)} nats"
    return HeatMap(
        stage.pass_, said, *_grid(blocks, with_kl=True), worst=_worst(damage.get("worst", [])), note=note,
        reason=str(damage.get("reason") or ""),
    )  # fmt: skip


def _stated(stage: Stage) -> HeatMap:
    """From what the pass says of its blocks and layers."""
    blocks = [
        {"name": block.get("name", f"block {index}"), "error": block.get("error"), "layers": _layers(block)}
        for index, block in enumerate(stage.blocks)
    ]
    layers = [(error, f"{b['name']}.{name}") for b in blocks for name, error in b["layers"].items() if error > 0]
    worst = [{"layer": name, "error": error} for error, name in sorted(layers, key=lambda each: (-each[0], each[1]))]
    note = (
        f"{COLOUR}Error, in percent, as the pass states it: of a block's output "
        "on calibration text; of a layer's output where the pass saw text, else of its weights."
    )
    return HeatMap(stage.pass_, "", *_grid(blocks, with_kl=False), worst=_worst(worst[:5]), note=note)


def _worst(layers: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(str(each["layer"]), f"{units.short(100 * each['error'])} %") for each in layers]


def _grid(blocks: Sequence[dict[str, Any]], *, with_kl: bool) -> tuple[list[str], list[HeatRow]]:
    kinds = list(dict.fromkeys(kind(name) for block in blocks for name in block.get("layers") or {}))
    if not any(error > 0 for block in blocks for error in (block.get("layers") or {}).values()):
        kinds = []  # no layer was touched: blocks were removed
    with_error = any(_figure(block.get("error")) is not None for block in blocks)
    with_kl = with_kl and any(_figure(block.get("kl")) is not None for block in blocks)
    by_kind = [_by_kind(block.get("layers") or {}) for block in blocks]
    errors = [_figure(block.get("error")) for block in blocks]
    scale = _Scale([*errors, *(error for row in by_kind for error, _ in row.values())])
    kl_scale = _Scale([_figure(block.get("kl")) for block in blocks])
    rows = []
    names = short_names([str(block["name"]) for block in blocks])
    for block, name, error, layers in zip(blocks, names, errors, by_kind, strict=True):
        cells = []
        if with_kl:
            cells.append(_kl_cell(block, kl_scale))
        if with_error:
            cells.append(_cell(f"{block['name']}: error of its output", error, scale))
        for each in kinds:
            found, layer = layers.get(each, (None, each))
            cells.append(_cell(f"{block['name']}.{layer}", found, scale))
        rows.append(HeatRow(name, cells, bool(block.get("removed"))))
    columns = [*(["KL"] if with_kl else []), *(["output"] if with_error else []), *kinds]
    return columns, rows


def _kl_cell(block: dict[str, Any], scale: _Scale) -> Cell:
    kl, rise = _figure(block.get("kl")), _figure(block.get("rise"))
    if kl is None:
        return Cell("–")
    tip = f"{block['name']} alone: KL {units.short(kl)} nats a token"
    if rise is not None:
        tip += f", loss {'+' if rise >= 0 else '-'}{units.short(abs(rise))}"
    return Cell(units.short(kl), scale.shade(kl), tip)


def _cell(what: str, error: float | None, scale: _Scale) -> Cell:
    if error is None:
        return Cell("–")
    text = units.short(100 * error) if error >= 1e-5 or error == 0 else "<.001"
    return Cell(text, scale.shade(error), f"{what}: {units.short(100 * error)} %")


class _Scale:
    """Values to shades, on a logarithmic scale from the largest one down."""

    def __init__(self, values: Iterable[float | None]):
        known = [value for value in values if value is not None and value > 0]
        self.high = max(known, default=1.0)
        self.low = max(min(known, default=1.0), self.high / 10**DECADES)

    def shade(self, value: float) -> float:
        if value <= 0:
            return 0.0
        span = math.log(self.high / self.low)
        place = math.log(max(value, self.low) / self.low) / span if span else 1.0
        return round(FAINT + (FULL - FAINT) * place, 3)


def kind(layer: str) -> str:
    """`mlp.experts.3.up_proj` -> `mlp.experts.*.up_proj`: layers that differ by a number are of one kind."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)


def _by_kind(layers: dict[str, float]) -> dict[str, tuple[float, str]]:
    """The largest error of each kind of layer, and the layer that has it."""
    found: dict[str, tuple[float, str]] = {}
    for name, error in layers.items():
        if kind(name) not in found or error > found[kind(name)][0]:
            found[kind(name)] = (error, name)
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """`model.layers.3` -> `3`, where all names differ by their last part alone."""
    if len({name.rpartition(".")[0] for name in names}) <= 1:
        return [name.rpartition(".")[2] for name in names]
    return list(names)


def _layers(block: dict[str, Any]) -> dict[str, float]:
    """The error of each layer that a pass states, by its name in the block."""
    entries = block.get("layers")
    if not isinstance(entries, dict):
        return {}
    found = {}
    for name, entry in entries.items():
        error = _figure(entry.get("loss", entry.get("error"))) if isinstance(entry, dict) else None
        if error is not None:
            found[str(name)] = error
    return found


def _figure(value: Any) -> float | None:
    """A number of the report; None where it is missing, or null with a reason."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
