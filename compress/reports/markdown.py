"""`report.md`: what `report.html` says, as Markdown, without the drawings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compress.reports import exports, table, units
from compress.reports.again import command, recipe_yaml
from compress.reports.changes import changed_items, worst_texts
from compress.reports.exports import export_rows
from compress.reports.headline import goal_words, headline, points
from compress.reports.heat import COLOUR, HeatMap, heat_maps
from compress.reports.lessons import markdown_lessons
from compress.reports.points import side_by_side
from compress.reports.report import Comparison, Figure, Report
from compress.reports.speeds import SpeedTable, is_setting, speed_table


def markdown(report: Report) -> str:
    """The content of `report.md`."""
    parts = [f"# {plain(report.name)}", plain(headline(report))]
    parts += [f"- {plain(line)}" for line in points(report)]
    if report.goals:
        parts += ["## Goals", _goals(report)]
    speeds = speed_table(report)
    original, compressed = (
        {name: figure for name, figure in figures.items() if not (speeds and is_setting(name))}
        for figures in (report.original, report.compressed)
    )
    if compressed:
        parts += ["## Original and compressed", comparison_rows(original, compressed, report.comparison)]
    else:
        parts += ["## Figures", _figures(original)]
    if speeds is not None:
        parts += _speeds(speeds)
    parts += export_table(report)
    parts += _side_by_side(report)
    for other in report.others:
        parts += [f"## {plain(other.model)}", comparison_rows(report.original, other.measurements, other.comparison)]
    if report.stages:
        parts += ["## Passes", _rows(_STAGE_COLUMNS, [list(row.values()) for row in table.stage_rows(report)], left=2)]
    parts += markdown_lessons(report)
    maps = heat_maps(report)
    if maps:
        parts.append("## What each pass did, block by block")
        for each in maps:
            parts += _heat(each)
    parts += _changes(report)
    if report.generations:
        parts.append("## What both write")
    for sample in report.generations:
        parts += [f"**{plain(sample['prompt'])}**"]
        parts += [f"- original: {plain(sample['original'])}\n- compressed: {plain(sample['compressed'])}"]
    parts += [f"Note: {plain(note)}" for note in report.notes]
    parts += ["## How to get this again", _code(command(report))]
    if report.digest:
        parts.append(f"Recipe digest: `{report.digest}`")
    if report.recipe:
        parts.append(_code(recipe_yaml(report), "yaml"))
    if report.environment:
        rows = table.environment_rows(report.environment)
        parts += ["## Measured on", "\n".join(f"- {plain(key)}: {plain(value)}" for key, value in rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def compared_runs(reports: Sequence[Report]) -> str:
    """Several runs as one page: their headlines, and a table of runs by metrics."""
    parts = [f"# {len(reports)} runs compared"]
    parts.append("\n".join(f"- **{plain(report.name)}**: {plain(headline(report))}" for report in reports))
    parts += _side_by_side(reports[0], reports[1:])
    return "\n\n".join(parts) + "\n"


_STAGE_COLUMNS = (
    "pass", "options", "rise in loss", "perplexity after", "size after", "writing after", "time", "memory predicted",
    "memory measured", "size predicted", "coverage",
)  # fmt: skip


def comparison_rows(
    original: dict[str, Figure], compressed: dict[str, Figure], comparison: dict[str, Comparison]
) -> str:
    """The table of metrics with their intervals."""
    lines = [
        "| metric | original | compressed | change | 95 % interval | verdict | in words |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in table.rows(original, compressed, comparison):
        said = (row.change, row.interval, table.VERDICTS[row.verdict], row.sentence)
        lines.append("| " + " | ".join(map(cell, (row.title, row.original, row.compressed, *said))) + " |")
    return "\n".join(lines)


def _figures(figures: dict[str, Figure]) -> str:
    lines = ["| metric | value | in words |", "|---|---:|---|"]
    for row in table.rows(figures, {}, {}):
        lines.append(f"| {cell(row.title)} | {cell(row.original)} | {cell(row.sentence)} |")
    return "\n".join(lines)


def _goals(report: Report) -> str:
    lines = ["| goal | | |", "|---|---|---|"]
    for goal in report.goals:
        name = f"{cell(units.title(goal.metric))}: {cell(str(goal.goal))}"
        met = "met" if goal.met else "**missed**"
        lines.append(f"| {name} | {met} | {cell(goal_words(report, goal))} |")
    return "\n".join(lines)


def _side_by_side(report: Report, others: Sequence[Report] = ()) -> list[str]:
    found = side_by_side(report, others)
    if not found:
        return []
    columns = ["model", *(each["title"] for each in found[0]["cells"])]
    rows = [[run["name"], *(f"{c['value']} {c['change']}".strip() for c in run["cells"])] for run in found]
    return ["## Side by side", _rows(columns, rows)]


def _speeds(table: SpeedTable) -> list[str]:
    rows = [
        [name, read, *(f"{cell.text} ({cell.change})" if cell.change else cell.text for cell in cells)]
        for name, read, cells in table.rows
    ]
    parts = ["## Speed by batch and prompt", _rows(["setting", "tokens", *table.columns], rows, left=2)]
    parts += [f"Left out: {plain(words)}." for words in table.left_out]
    return [*parts, plain(table.note)]


def export_table(report: Report) -> list[str]:
    """The checks of exports with their heading; nothing where there were none."""
    rows = export_rows(report)
    return ["## Exports", _rows(exports.COLUMNS, rows), plain(exports.NOTE)] if rows else []


def _heat(each: HeatMap) -> list[str]:
    parts = [f"### {plain(each.title)}"]
    if each.loss:
        parts.append(plain(each.loss[:1].upper() + each.loss[1:]) + ".")
    if each.reason:
        parts.append(plain(each.reason[:1].upper() + each.reason[1:]) + ".")
    if each.rows:
        rows = [
            [f"{row.name} (removed)" if row.removed else row.name, *(c.text for c in row.cells)] for row in each.rows
        ]
        parts.append(_rows(["block", *each.columns], rows))
        parts.append(plain(each.note.removeprefix(COLOUR)))
    if each.worst:
        parts.append("Worst layers: " + ", ".join(f"{plain(layer)} ({error})" for layer, error in each.worst) + ".")
    return parts


def _changes(report: Report) -> list[str]:
    parts = []
    flips = changed_items(report)
    if flips is not None:
        parts += ["## Items that changed sides", plain(flips.sentence)]
        parts.append(_rows(["area", "items", "right to wrong", "wrong to right"], flips.areas))
        lines = [
            f"- {plain(e['area'])}, {e['change']}: {plain(e['text'])} → {plain(e['answer'])}" for e in flips.examples
        ]
        parts.append("\n".join(lines))
    texts = worst_texts(report)
    if texts:
        parts.append("## Text on which the models differ most")
        parts.append(
            "\n".join(f"- {each['kl']} nats a token: {plain(each['text'])} {plain(each['said'])}" for each in texts)
        )
    return parts


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    lines = [f"| {' | '.join(map(cell, columns))} |"]
    lines.append("|" + "|".join("---" if i < left else "---:" for i in range(len(columns))) + "|")
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join(lines)


def _code(text: str, language: str = "") -> str:
    """A block of code, fenced by more backticks than stand in it; what looks like HTML is no code of ours."""
    if not language and re.search("[<>`]", text):
        return plain(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def plain(text: str) -> str:
    """One line, and no Markdown or HTML from names or generated text."""
    text = " ".join(str(text).split())
    for mark in ("\\", "`", "*", "_", "[", "]", "#"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def cell(text: str) -> str:
    """`plain`, inside a table."""
    return plain(text).replace("|", "\\|")
