"""What a student has learnt, for the report: accuracies of teacher, student before and after, and the control."""

from __future__ import annotations

from dataclasses import dataclass

from compress.reports import units
from compress.reports.report import Report

#: Who was measured, in the order of the columns, and the words for it.
WHO = {"teacher": "teacher", "before": "student before", "after": "student after", "control": "text alone"}


@dataclass(frozen=True)
class LessonTable:
    """Accuracies of one pass: `rows` are an area and a figure for each column, the last row the mean; `sentences` say
    what the difference to each other one is, and what of the text the teacher wrote."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    sentences: list[str]


def lesson_tables(report: Report) -> list[LessonTable]:
    """One table for each pass that measured accuracies by area."""
    found = []
    for stage in report.stages:
        areas = stage.measurements.get("areas")
        if not isinstance(areas, dict) or "after" not in areas:
            continue
        who = [name for name in WHO if name in areas]
        rows = [[area, *(units.human(areas[name][area], "fraction") for name in who)] for area in areas["after"]]
        sentences = [_sentence(name, areas["differences"][name]) for name in who if name != "after"]
        written = stage.measurements.get("generated", {}).get("tokens")
        if written:
            alone = " The text alone is that without them." if "control" in who else ""
            sentences.append(f"The teacher wrote {written:,} tokens of the text itself.{alone}")
        found.append(LessonTable(stage.pass_, ["area", *(WHO[name] for name in who)], rows, sentences))
    return found


def _sentence(name: str, found: dict[str, float | str | None]) -> str:
    points = 100 * float(found["delta"] or 0)
    words = f"Student after training, less {WHO[name]}: {points:+.1f} points"
    if found["ci_low"] is None or found["ci_high"] is None:
        return f"{words} (not tested: {found['reason']})."
    low, high = 100 * float(found["ci_low"]), 100 * float(found["ci_high"])
    return f"{words} (95 % interval {low:+.1f} to {high:+.1f})."


def markdown_lessons(report: Report) -> list[str]:
    """The tables as Markdown, each with its heading."""
    parts = []
    for table in lesson_tables(report):
        lines = [f"## Accuracy by area: {table.title}", ""]
        lines += [f"| {' | '.join(table.columns)} |", "|---|" + "---:|" * (len(table.columns) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        parts += ["\n".join(lines), "\n".join(f"- {sentence}" for sentence in table.sentences)]
    return parts
