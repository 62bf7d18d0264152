"""`report.html`: one page that holds all it needs, opens without a network, and suits light, dark, phone and print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import StartError
from compress.reports import plots, table, units
from compress.reports.lessons import lesson_tables
from compress.reports.report import Comparison, Figure, Report, finite

TEMPLATES = Path(__file__).with_name("templates")


def page(report: Report, others: Sequence[Report] = ()) -> str:
    """The whole page as text. `others`: further reports, compared with this one's models in plot and table."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(content(report, others))


def render(folders: Sequence[Path | str]) -> Path:
    """Rebuilds `report.md` and `report.html` from each folder's `report.json`.

    With one folder, the path of its page; with several, that of `comparison.html`, written beside the first report,
    which sets all runs side by side.
    """
    from compress.checkpoint import atomic_write_text

    if not folders:
        raise StartError("compress report needs the folder of a run, or several to compare.")
    reports = [Report.read(folder) for folder in folders]
    places = [Path(folder) if Path(folder).is_dir() else Path(folder).parent for folder in folders]
    for place, report in zip(places, reports, strict=True):
        atomic_write_text(place / "report.html", page(report))
        atomic_write_text(place / "report.md", table.markdown(report))
    if len(reports) == 1:
        return places[0] / "report.html"
    target = places[0] / "comparison.html"
    atomic_write_text(target, page(reports[0], reports[1:]))
    return target


def content(report: Report, others: Sequence[Report] = ()) -> dict[str, Any]:
    """What the template shows, all in words and drawings."""
    return {
        "report": report,
        "title": f"{len(others) + 1} runs compared" if others else report.name,
        "headline": "" if others else table.headline(report),
        "comparing": [(each.name, table.headline(each)) for each in [report, *others]] if others else [],
        "tiles": tiles(report),
        "points": table.points(report),
        "rows": [row for row in table.rows(report.original, report.compressed, report.comparison)
                 if "/" not in row.metric],
        "areas": areas(report),
        "goals": [_goal(report, goal) for goal in report.goals],
        "verdicts": table.VERDICTS,
        "size_plot": size_plot(report, others),
        "stages": table.stage_rows(report),
        "lessons": lesson_tables(report),
        "damage_plot": damage_plot(report),
        "worst": worst_layers(report),
        "verified": verified_words(report),
        "runs": runs(report, others),
        "recipe": json.dumps(finite(report.recipe), indent=2, ensure_ascii=False),
        "environment": table.environment_rows(report.environment),
        "human": units.human,
    }  # fmt: skip


def tiles(report: Report) -> list[dict[str, str]]:
    """The figures that a reader sees first: size, quality, speed, memory."""
    found = []
    for name, label, good_words in (
        ("weights_bytes", "Size on disk", "smaller"),
        ("perplexity", "Perplexity", ""),
        ("accuracy", "Accuracy", ""),
        ("decode_tokens_per_second", "Decode speed", ""),
        ("peak_memory_bytes", "Peak memory", ""),
    ):
        compared = report.comparison.get(name)
        before, after = report.original.get(name), report.compressed.get(name)
        if compared is None or compared.delta is None or before is None or after is None:
            continue
        found.append(
            {
                "label": label,
                "value": _tile_value(name, compared, after.unit, good_words),
                "detail": _from_to(units.human(before.value, before.unit), units.human(after.value, after.unit)),
                "verdict": compared.verdict,
            }
        )
    return found


def _from_to(before: str, after: str) -> str:
    """`143 tok/s`, `146 tok/s` -> `143 → 146 tok/s`: a unit that both share is said once."""
    number, _, unit = before.partition(" ")
    return f"{number} → {after}" if unit and after.partition(" ")[2] == unit else f"{before} → {after}"


def _tile_value(name: str, compared: Comparison, unit: str, word: str) -> str:
    if name == "decode_tokens_per_second" and compared.ratio is not None:
        return f"{compared.ratio:.2f} ×"
    if word and compared.ratio and compared.ratio < 0.95:
        return f"{1 / compared.ratio:.1f} × {word}"
    return units.change(compared.delta, compared.ratio, unit)


def areas(report: Report) -> list[dict[str, Any]]:
    """Accuracy by area, with both values as percentages for the bars."""
    found = []
    for row in table.rows(report.original, report.compressed, report.comparison):
        if not row.metric.startswith("accuracy/"):
            continue
        before, after = report.original.get(row.metric), report.compressed.get(row.metric)
        found.append({
            "name": row.title.partition(": ")[2], "row": row,
            "before": _percent(before), "after": _percent(after),
            "n": after.n if after and after.n else (before.n if before else None),
        })  # fmt: skip
    return found


def _percent(figure: Figure | None) -> float | None:
    return None if figure is None or figure.value is None else 100 * float(figure.value)


def _goal(report: Report, goal: Any) -> dict[str, Any]:
    figure = report.compressed.get(goal.metric)
    unit = figure.unit if figure is not None else ""
    return {
        "title": units.title(goal.metric), "goal": str(goal.goal), "met": goal.met,
        "value": units.human(goal.value, unit), "reason": goal.reason or "",
    }  # fmt: skip


def size_plot(report: Report, others: Sequence[Report]) -> str | None:
    """Perplexity against bytes; the originals once each, every compressed model with the interval of its change."""
    found: list[plots.Point] = []
    seen = set()
    for each in [report, *others]:
        model = str(each.recipe.get("model", "original"))
        start = _point("original" if not others else _short(model), each.original, None, original=True)
        if start is not None and (start.size, start.quality) not in seen:
            seen.add((start.size, start.quality))
            found.append(start)
        label = each.name if others or each.others else "compressed"
        if each.others:
            label = _short(str(each.recipe.get("models", ["", label])[1]))
        entries = [(label, each.compressed, each.comparison)]
        entries += [(_short(other.model), other.measurements, other.comparison) for other in each.others]
        for name, figures, comparison in entries:
            point = _point(name, figures, comparison.get("perplexity"))
            if point is not None:
                found.append(point)
    found.sort(key=lambda point: not point.original)
    return plots.quality_against_size(found, "perplexity") if found else None


def _point(
    label: str, figures: dict[str, Figure], compared: Comparison | None, *, original: bool = False
) -> plots.Point | None:
    size, quality = figures.get("weights_bytes"), figures.get("perplexity")
    if size is None or quality is None or size.value is None or quality.value is None:
        return None
    low = high = None
    if compared is not None and compared.ci_low is not None and compared.ci_high is not None:
        start = float(quality.value) - (compared.delta or 0.0)
        low, high = start + compared.ci_low, start + compared.ci_high
    return plots.Point(label, float(size.value), float(quality.value), low, high, original)


def _short(model: str) -> str:
    """The last part of a path that says something."""
    parts = [part for part in model.replace("\\", "/").split("/") if part and part != "model"]
    return parts[-1] if parts else model


def damage_plot(report: Report) -> str | None:
    """Relative error block by block: of the blocks' outputs, or of the weights for passes that saw no text."""
    lines = []
    for stage in report.stages:
        label, errors = stage.pass_, [_error(block) for block in stage.blocks]
        if all(error is None for error in errors):
            label, errors = f"{stage.pass_} (weights)", [_mean_layer_error(block) for block in stage.blocks]
        if any(error is not None for error in errors):
            lines.append((label, errors))
    return plots.block_damage(lines) if lines else None


def _error(entry: Any) -> float | None:
    """The relative error that a pass states of a block (`error`) or a layer (`loss`)."""
    value = entry.get("error", entry.get("loss")) if isinstance(entry, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _layers(block: dict[str, Any]) -> dict[str, Any]:
    found = block.get("layers")
    return found if isinstance(found, dict) else {}


def _mean_layer_error(block: dict[str, Any]) -> float | None:
    errors = [error for entry in _layers(block).values() if (error := _error(entry)) is not None]
    return sum(errors) / len(errors) if errors else None


def worst_layers(report: Report, most: int = 5) -> list[dict[str, str]]:
    """The layers with the largest relative error in any pass, if the passes say so of layers."""
    found = []
    for stage in report.stages:
        for i, block in enumerate(stage.blocks):
            for name, entry in _layers(block).items():
                error = _error(entry)
                if error is not None:
                    found.append((error, stage.pass_, f"{block.get('name', f'block {i}')}.{name}"))
    found.sort(key=lambda each: -each[0])
    return [{"pass": p, "layer": layer, "error": units.number(error)} for error, p, layer in found[:most]]


def verified_words(report: Report) -> str:
    """What the reload showed."""
    found = report.verified
    if found is None:
        return ""
    if not found.reloaded:
        return "The exported folder was not reloaded."
    difference = found.max_logit_difference
    if difference is None:
        return f"The exported folder was reloaded by {found.by} in a fresh process."
    equal = "equal to the last bit to" if difference == 0 else f"within {units.number(difference)} of"
    start = f"The exported folder was reloaded by {found.by} in a fresh process"
    return f"{start}; its outputs are {equal} those of the model in memory."


def runs(report: Report, others: Sequence[Report]) -> list[dict[str, Any]]:
    """A row for each model when several are compared: runs, or the further models of one benchmark."""
    entries: list[tuple[str, dict[str, Figure], dict[str, Comparison]]]
    entries = []
    if others:
        entries = [(each.name, each.compressed, each.comparison) for each in [report, *others]]
    elif report.others:
        models = report.recipe.get("models", [])
        name = _short(str(models[1])) if len(models) > 1 else "compressed"
        entries = [(name, report.compressed, report.comparison)]
        entries += [(_short(other.model), other.measurements, other.comparison) for other in report.others]
    found = []
    for name, figures, comparison in entries:
        cells = []
        for metric in ("weights_bytes", "bits_per_weight", "perplexity", "kl_divergence", "accuracy",
                       "decode_tokens_per_second", "peak_memory_bytes"):  # fmt: skip
            figure, compared = figures.get(metric), comparison.get(metric)
            cells.append(
                {
                    "title": units.title(metric),
                    "value": units.human(figure.value, figure.unit) if figure else "–",
                    "change": units.change(compared.delta, compared.ratio, figure.unit) if figure and compared else "",
                    "verdict": compared.verdict if compared else "not_tested",
                }
            )
        found.append({"name": name, "cells": cells})
    return found
