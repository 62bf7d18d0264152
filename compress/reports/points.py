"""The models of one or several reports as points of the plots, and as rows side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compress.reports import plots, units
from compress.reports.report import Comparison, Figure, Report

Figures = dict[str, Figure]
#: Metrics of the table that sets several models side by side.
SIDE_BY_SIDE = (
    "weights_bytes", "bits_per_weight", "perplexity", "kl_divergence", "accuracy", "decode_tokens_per_second",
    "prefill_tokens_per_second", "resident_weights_bytes", "peak_memory_bytes",
)  # fmt: skip


#: What quality is drawn against: the words, the metric, the axis, and what makes the axis' value of the metric's: `top`
#: by it, or (None) `factor` times it.
_AXES: dict[str, tuple[str, str, str, float | None, float]] = {
    "size": ("size", "weights_bytes", "weights on disk, MB", None, 1e-6),
    "latency": ("writing speed", "decode_tokens_per_second", "time to write a token, ms", 1000.0, 1.0),
    "reading": ("reading speed", "prefill_tokens_per_second", "time to read a token, ms", 1000.0, 1.0),
}


@dataclass(frozen=True)
class Plot:
    """A drawing and what is said below it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class _Model:
    """One model: the report it stands in (by number), its figures, and its comparison with that report's original."""

    label: str
    figures: Figures
    comparison: dict[str, Comparison]
    run: int
    original: bool = False
    step: bool = False


def quality_plots(report: Report, others: Sequence[Report] = ()) -> list[Plot]:
    """Quality against size, and against the time that a token takes; those of which at least one model has both."""
    models = list(_models([report, *others]))
    quality = next((m for m in ("perplexity", "accuracy") if any(_value(each, m) is not None for each in models)), None)
    if quality is None:
        return []
    better = "Lower" if quality == "perplexity" else "Higher"
    bars = " Bars: 95 % interval of the change." if any(m.comparison.get(quality) for m in models) else ""
    found: list[Plot] = []
    for name, (words, cost, across, top, factor) in _AXES.items():
        if name == "reading" and len(found) > 1:
            continue
        drawn = []
        for model in models:
            paid = _paid(model, cost, report)
            point = (
                None
                if not paid
                else _point(model, quality, factor * paid if top is None else top / paid, _paid_words(model, cost))
            )
            if point is not None:
                drawn.append((model, point))
        if not drawn:
            continue
        path = [i for i, (model, _) in enumerate(drawn) if model.run == 0 and not others and not report.others]
        svg = plots.scatter(
            [point for _, point in drawn], name, across, "accuracy, %" if quality == "accuracy" else quality, path,
            quality == "perplexity",
        )  # fmt: skip
        found.append(Plot(f"Quality against {words}", svg, f"{better} is better, further left is better.{bars}"))
    return found


def _models(reports: Sequence[Report]) -> Iterator[_Model]:
    """Originals once each, then stages and the model that came out, report by report."""
    seen = set()
    several = len(reports) > 1
    for run, report in enumerate(reports):
        model = str(report.recipe.get("model", "original"))
        key = (model, _plain(report.original, "weights_bytes"), _plain(report.original, "perplexity"))
        if report.original and key not in seen:
            seen.add(key)
            yield _Model(short(model) if several else "original", report.original, {}, run, original=True)
        if not several:
            for number, stage in enumerate(report.stages[:-1], 1):
                figures = stage_figures(stage.measurements)
                if figures:
                    yield _Model(f"{number} {stage.pass_}", figures, {}, run, step=True)
        if report.compressed:
            yield _Model(_name(report, several), report.compressed, report.comparison, run)
        for other in report.others:
            yield _Model(short(other.model), other.measurements, other.comparison, run)


def stage_figures(measurements: dict[str, Any]) -> Figures:
    """The figures among what a stage states: those that say their unit."""
    found = {}
    for name, entry in measurements.items():
        if isinstance(entry, dict) and isinstance(entry.get("value"), int | float) and "unit" in entry:
            found[name] = Figure(**entry)
    return found


def _name(report: Report, several: bool) -> str:
    models = report.recipe.get("models", [])
    if several:
        return report.name
    return short(str(models[1])) if report.others and len(models) > 1 else "compressed"


def _plain(figures: Figures, metric: str) -> float | None:
    figure = figures.get(metric)
    return None if figure is None or figure.value is None else float(figure.value)


def _value(model: _Model, metric: str) -> float | None:
    return _plain(model.figures, metric)


def _point(model: _Model, quality: str, cost: float, paid: str) -> plots.Point | None:
    value = _value(model, quality)
    if value is None:
        return None
    scale = 100.0 if quality == "accuracy" else 1.0
    low = high = None
    compared = model.comparison.get(quality)
    if compared is not None and compared.ci_low is not None and compared.ci_high is not None:
        start = value - (compared.delta or 0.0)
        low, high = scale * (start + compared.ci_low), scale * (start + compared.ci_high)
    unit = model.figures[quality].unit
    tip = f"{model.label}: {units.title(quality).lower()} {units.human(value, unit)}"
    if low is not None and high is not None:
        tip += f" ({units.number(low)} to {units.number(high)})"
    return plots.Point(
        model.label, cost, scale * value, f"{tip}, {paid}", low, high, original=model.original, step=model.step
    )


def _paid(model: _Model, metric: str, report: Report) -> float | None:
    """A metric's value. The speed of a stage was taken at another time than the speeds beside it: it is placed by its
    ratio to the original, with which it was taken in turn."""
    value = _value(model, metric)
    before = _plain(report.original, metric)
    ratio = model.figures[metric].detail.get("ratio") if value is not None else None
    return before * float(ratio) if model.step and before and isinstance(ratio, int | float) else value


def _paid_words(model: _Model, metric: str) -> str:
    figure = model.figures[metric]
    words = units.human(figure.value, figure.unit)
    ratio = figure.detail.get("ratio")
    return f"{words}, {units.number(ratio)} times the original's" if model.step and ratio else words


def short(model: str) -> str:
    """The last part of a path that says something."""
    parts = [part for part in model.replace("\\", "/").split("/") if part and part != "model"]
    return parts[-1] if parts else model


def side_by_side(report: Report, others: Sequence[Report] = ()) -> list[dict[str, Any]]:
    """A row of cells for each model where several are compared: of runs, or the further models of one benchmark."""
    if not others and not report.others:
        return []
    models = [model for model in _models([report, *others]) if not model.step]
    shown = [m for m in SIDE_BY_SIDE if any(_value(model, m) is not None for model in models)]
    areas = list(dict.fromkeys(m for model in models for m in model.figures if m.startswith("accuracy/")))
    found = []
    for model in models:
        cells = []
        for metric in [*shown, *areas]:
            figure, compared = model.figures.get(metric), model.comparison.get(metric)
            cells.append(
                {
                    "title": units.title(metric),
                    "value": units.human(figure.value, figure.unit) if figure else "–",
                    "change": units.change(compared.delta, compared.ratio, figure.unit) if figure and compared else "",
                    "verdict": compared.verdict if compared else "not_tested",
                }
            )
        found.append({"name": model.label, "cells": cells})
    return found
