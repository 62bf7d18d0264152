"""The comparison as rows: for the terminal through rich, and for `report.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.reports import units
from compress.reports.fidelity import markdown_fidelity
from compress.reports.lessons import markdown_lessons
from compress.reports.report import Comparison, Figure, Report

if TYPE_CHECKING:
    from rich.table import Table

    from compress.planning import Plan

VERDICTS = {"better": "better", "worse": "worse", "no_difference": "no difference", "not_tested": "not tested"}
_STYLES = {"better": "green", "worse": "red", "no_difference": "dim", "not_tested": "dim"}


@dataclass(frozen=True)
class Row:
    """One metric in words."""

    metric: str
    title: str
    original: str
    compressed: str
    change: str
    verdict: str
    sentence: str
    runtime: str


def rows(original: dict[str, Figure], compressed: dict[str, Figure], comparison: dict[str, Comparison]) -> list[Row]:
    """A row for each metric, in reading order."""
    return [
        _row(name, original.get(name), compressed.get(name), comparison.get(name, Comparison()))
        for name in units.order(list(dict.fromkeys([*original, *compressed])))
    ]


def _row(name: str, before: Figure | None, after: Figure | None, compared: Comparison) -> Row:
    unit = next((f.unit for f in (after, before) if f is not None and f.value is not None), "")
    missing = [f.reason for f in (after, before) if f is not None and f.value is None and f.reason]
    return Row(
        metric=name,
        title=units.title(name),
        original=units.human(before.value, unit) if before else "–",
        compressed=units.human(after.value, unit) if after else "–",
        change=units.change(compared.delta, compared.ratio, unit),
        verdict=compared.verdict,
        sentence=compared.sentence or (missing[0] if missing else ""),
        runtime=(after.runtime if after else None) or "",
    )


def comparison_table(report: Report) -> Table:
    """The table that the command line prints (metric, original, compressed, change, verdict)."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(report.name), title_justify="left", title_style="bold")
    table.add_column("metric")
    table.add_column("original", justify="right")
    if report.compressed:
        for heading in ("compressed", "change"):
            table.add_column(heading, justify="right")
        table.add_column("verdict")
    for row in rows(report.original, report.compressed, report.comparison):
        if row.original == row.compressed == "–":
            continue
        name = f"  {row.title.partition(': ')[2]}" if "/" in row.metric else row.title
        cells = [escape(name), row.original]
        if report.compressed:
            style = _STYLES[row.verdict]
            cells += [row.compressed, row.change, f"[{style}]{VERDICTS[row.verdict]}[/{style}]"]
        table.add_row(*cells)
    return table


def print_report(report: Report) -> None:
    """Headline, table and what must not be overlooked, on stderr (stdout belongs to scripts)."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if report.compressed or report.original:
        console.print(comparison_table(report))
    if report.compressed:
        console.print(headline(report), markup=False)
    for line in points(report):
        style = "red" if line.startswith("Goal missed") else "yellow"
        console.print(line, style=style, markup=False)
    for note in report.notes:
        console.print(note, style="dim", markup=False)


def print_plan(plan: Plan) -> None:
    """What a recipe will need, step by step and in all, on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("step")
    for heading in ("peak memory", "disk", "weights"):
        table.add_column(heading, justify="right")
    rows = plan.rows()
    noted = any(note for *_, note in rows)
    if noted:
        table.add_column("note")
    for name, memory, disk, weights, note in rows:
        cells = [escape(name), *(units.human(count, "B") for count in (memory, disk, weights))]
        table.add_row(*cells, *([escape(note)] if noted else []))
    console = Console(highlight=False)
    console.print(table)
    for label, needed, there in (
        ("memory (above a bare import)", plan.memory_bytes, plan.available_memory_bytes),
        ("disk", plan.disk_bytes, plan.available_disk_bytes),
    ):
        console.print(f"{label}: {units.human(needed, 'B')} of {units.human(there, 'B')} that there is", markup=False)
    console.print(f"weights that come out: {units.human(plan.weights_bytes, 'B')}", markup=False)


def markdown(report: Report) -> str:
    """The content of `report.md`: what `report.html` shows, without the plots."""
    parts = [f"# {_plain(report.name)}", headline(report)]
    parts += [f"- {_plain(line)}" for line in points(report)]
    if report.compressed:
        parts.append(_markdown_comparison(report.original, report.compressed, report.comparison))
    else:
        parts.append(_markdown_figures(report.original))
    for other in report.others:
        parts += [f"## {_plain(other.model)}"]
        parts.append(_markdown_comparison(report.original, other.measurements, other.comparison))
    if report.goals:
        parts += ["## Goals", _markdown_goals(report)]
    if report.stages:
        parts += ["## Passes", _markdown_stages(report)]
    parts += markdown_lessons(report)
    parts += markdown_fidelity(report, _plain)
    for sample in report.generations:
        parts += [f"**{_plain(sample['prompt'])}**"]
        parts += [f"- original: {_plain(sample['original'])}\n- compressed: {_plain(sample['compressed'])}"]
    parts += [f"Note: {_plain(note)}" for note in report.notes]
    if report.environment:
        facts = "\n".join(f"- {_plain(key)}: {_plain(value)}" for key, value in environment_rows(report.environment))
        parts += ["## Measured on", facts]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_comparison(
    original: dict[str, Figure], compressed: dict[str, Figure], comparison: dict[str, Comparison]
) -> str:
    lines = [
        "| metric | original | compressed | change | verdict | in words |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in rows(original, compressed, comparison):
        cells = (row.title, row.original, row.compressed, row.change, VERDICTS[row.verdict], row.sentence)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _markdown_figures(figures: dict[str, Figure]) -> str:
    lines = ["| metric | value | in words |", "|---|---:|---|"]
    for row in rows(figures, {}, {}):
        lines.append(f"| {_cell(row.title)} | {_cell(row.original)} | {_cell(row.sentence)} |")
    return "\n".join(lines)


def _markdown_goals(report: Report) -> str:
    lines = ["| goal | value | |", "|---|---:|---|"]
    for goal in report.goals:
        figure = report.compressed.get(goal.metric)
        value = units.human(goal.value, figure.unit if figure else "")
        met = "met" if goal.met else f"**missed** {_cell(goal.reason or '')}".strip()
        lines.append(f"| {_cell(units.title(goal.metric))}: {_cell(str(goal.goal))} | {value} | {met} |")
    return "\n".join(lines)


def _markdown_stages(report: Report) -> str:
    lines = [
        "| pass | options | time | memory predicted | memory measured | size predicted | coverage |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for stage in stage_rows(report):
        lines.append("| " + " | ".join(map(_cell, stage.values())) + " |")
    return "\n".join(lines)


def stage_rows(report: Report) -> list[dict[str, str]]:
    """The passes in words, predicted beside measured."""
    found = []
    for stage in report.stages:
        predicted = stage.predicted
        found.append(
            {
                "pass": stage.pass_,
                "options": ", ".join(f"{key} {_option(value)}" for key, value in stage.options.items() if _said(value)),
                "seconds": units.duration(stage.seconds),
                "memory_predicted": units.human(_number(predicted.get("peak_memory_bytes")), "B"),
                "memory": units.human(stage.peak_memory_bytes, "B"),
                "size_predicted": units.human(_number(predicted.get("weights_bytes")), "B"),
                "coverage": units.human(stage.coverage, "fraction"),
            }
        )
    return found


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance in reading form; nested facts are named by their path."""
    found = []
    for key, value in environment.items():
        name = key.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, dict):
            found += [(f"{name}: {inner}", text) for inner, text in environment_rows(value)]
        else:
            found.append((name, units.human(value, "B") if key.endswith("_bytes") else str(value)))
    return found


def headline(report: Report) -> str:
    """What came out in one sentence for somebody who reads no table."""
    if not report.compressed:
        return "One model, measured."
    parts = [_smaller(report), _quality(report), speed_words(report)]
    sentence = "; ".join(part for part in parts if part)
    return (sentence[:1].upper() + sentence[1:] + ".") if sentence else "Nothing could be compared."


def points(report: Report) -> list[str]:
    """What must not be overlooked: missed goals, areas that lost, figures that could not be measured."""
    found = []
    missed = [goal for goal in report.goals if not goal.met]
    if missed:
        found.append("Goal missed: " + ", ".join(f"{units.title(g.metric)} {g.goal}" for g in missed) + ".")
    for name, compared in report.comparison.items():
        if name.startswith("accuracy/") and compared.verdict in ("worse", "better"):
            found.append(f"{units.title(name)} is {compared.sentence}.")
    if report.compressed and report.verified is not None and not report.verified.reloaded:
        found.append("The exported folder could not be loaded by transformers.")
    return found


def speed_words(report: Report) -> str:
    """The speed of decoding in words; says plainly when compression brought none."""
    compared = report.comparison.get("decode_tokens_per_second")
    name = "decoding"
    if compared is None or compared.ratio is None:
        compared, name = report.comparison.get("prefill_tokens_per_second"), "reading a prompt"
    if compared is None or compared.ratio is None:
        return ""
    ratio = f"{compared.ratio:.2f} ×"
    if compared.verdict == "better":
        return f"{name} is faster on this machine ({ratio})"
    if compared.verdict == "worse":
        return f"no speed was gained on this machine: {name} is slower ({ratio})"
    if compared.verdict == "no_difference":
        return f"no speed was gained on this machine: {name} is as fast as before within the measurement ({ratio})"
    return f"{name} ran at {ratio} the speed, in too few rounds to be sure"


def _smaller(report: Report) -> str:
    compared = report.comparison.get("weights_bytes")
    if compared is None or not compared.ratio:
        return ""
    if abs(compared.ratio - 1) < 0.005:
        return "the same size on disk"
    return f"{1 / compared.ratio:.1f} × smaller" if compared.ratio < 1 else f"{compared.ratio:.1f} × larger on disk"


def _quality(report: Report) -> str:
    compared = report.comparison.get("perplexity")
    before, after = report.original.get("perplexity"), report.compressed.get("perplexity")
    if compared is None or compared.ratio is None or before is None or after is None:
        compared = report.comparison.get("accuracy")
        return f"accuracy {compared.sentence}" if compared is not None and compared.delta is not None else ""
    values = f"{units.human(before.value, '')} → {units.human(after.value, '')}"
    if compared.verdict == "no_difference":
        return f"no measurable loss in perplexity ({values})"
    return f"perplexity {units.change(compared.delta, compared.ratio, '')} ({values})"


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _said(value: Any) -> bool:
    return value is not None and value not in ([], (), {})


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _plain(text: str) -> str:
    """One line, and no Markdown or HTML from names or generated text."""
    text = " ".join(str(text).split())
    for mark in ("\\", "`", "*", "_", "[", "]", "#"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
