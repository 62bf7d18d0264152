"""`report.html`: one page that holds all it needs, opens without a network, and suits light, dark, phone and print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import StartError
from compress.reports import exports, table, units
from compress.reports.again import command, recipe_yaml
from compress.reports.changes import changed_items, worst_texts
from compress.reports.exports import export_rows
from compress.reports.headline import goal_words, headline, points
from compress.reports.heat import heat_maps
from compress.reports.lessons import lesson_tables
from compress.reports.markdown import compared_runs, markdown
from compress.reports.points import quality_plots, side_by_side
from compress.reports.report import Comparison, Figure, Report
from compress.reports.speeds import is_setting, speed_table

TEMPLATES = Path(__file__).with_name("templates")


def page(report: Report, others: Sequence[Report] = ()) -> str:
    """The whole page as text. `others`: further reports, compared with this one's models in plots and table."""
    return str(_template().render(content(report, others)))


@cache
def _template() -> Any:
    """The page's template; reading it takes longer than filling it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["without_interval"] = without_interval
    return environment.get_template("report.html.j2")


def render(folders: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Rebuilds `report.md` and `report.html` from each folder's `report.json`.

    With one folder, the path of its page (`output`: where that is written as well); with several, that of the page
    which sets all runs side by side: `output`, or `comparison.html` beside the first report; with it goes one in
    Markdown.
    """
    from compress.checkpoint import atomic_write_text

    if not folders:
        raise StartError("compress report needs the folder of a run, or several to compare.")
    if output is not None and Path(output).is_dir():
        raise StartError(f"--output {output} is a folder: name the file of the page, as in comparison.html.")
    reports = [Report.read(folder) for folder in folders]
    places = [Path(folder) if Path(folder).is_dir() else Path(folder).parent for folder in folders]
    for place, report in zip(places, reports, strict=True):
        atomic_write_text(place / "report.html", page(report))
        atomic_write_text(place / "report.md", markdown(report))
    if len(reports) == 1 and output is None:
        return places[0] / "report.html"
    target = Path(output) if output is not None else places[0] / "comparison.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    if len(reports) == 1:
        atomic_write_text(target, page(reports[0]))
        return target
    names = [report.name for report in reports]
    reports = [
        report.model_copy(update={"name": f"{report.name} ({place.resolve().name})"})
        if names.count(report.name) > 1 else report
        for place, report in zip(places, reports, strict=True)
    ]  # fmt: skip
    atomic_write_text(target, page(reports[0], reports[1:]))
    atomic_write_text(target.with_suffix(".md"), compared_runs(reports))
    return target


def content(report: Report, others: Sequence[Report] = ()) -> dict[str, Any]:
    """What the template shows, all in words and drawings."""
    speeds = speed_table(report)
    return {
        "report": report,
        "title": f"{len(others) + 1} runs compared" if others else report.name,
        "headline": "" if others else headline(report),
        "comparing": [(each.name, headline(each)) for each in [report, *others]] if others else [],
        "missed": [line for line in points(report) if not others],
        "tiles": tiles(report),
        "rows": [row for row in table.rows(report.original, report.compressed, report.comparison)
                 if not row.metric.startswith("accuracy/") and not (speeds and is_setting(row.metric))],
        "speeds": speeds,
        "exports": export_rows(report),
        "export_columns": exports.COLUMNS,
        "export_note": exports.NOTE,
        "areas": areas(report),
        "goals": [_goal(report, goal) for goal in report.goals],
        "verdicts": table.VERDICTS,
        "plots": quality_plots(report, others),
        "stages": table.stage_rows(report),
        "lessons": lesson_tables(report),
        "heat": heat_maps(report),
        "flips": changed_items(report),
        "worst_texts": worst_texts(report),
        "verified": verified_words(report),
        "runs": side_by_side(report, others),
        "recipe": recipe_yaml(report) if report.recipe else "",
        "command": command(report),
        "environment": table.environment_rows(report.environment),
    }  # fmt: skip


def without_interval(sentence: str) -> str:
    """The sentence of a comparison beside its interval, which it need not repeat."""
    return re.sub(r"\(95 % interval [^;)]*(?:; )?", "(", sentence).replace(" ()", "")


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
                "detail": units.from_to(units.human(before.value, before.unit), units.human(after.value, after.unit)),
                "verdict": compared.verdict,
            }
        )
    return found


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
        })  # fmt: skip
    return found


def _percent(figure: Figure | None) -> float | None:
    return None if figure is None or figure.value is None else 100 * float(figure.value)


def _goal(report: Report, goal: Any) -> dict[str, Any]:
    figure = report.compressed.get(goal.metric)
    unit = figure.unit if figure is not None else ""
    compared = report.comparison.get(goal.metric)
    change = units.change(compared.delta, compared.ratio, unit) if compared is not None else "–"
    return {
        "title": units.title(goal.metric), "goal": str(goal.goal), "met": goal.met, "change": change,
        "value": units.human(goal.value, unit), "reason": goal.reason or "", "words": goal_words(report, goal),
    }  # fmt: skip


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
