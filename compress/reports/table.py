"""The comparison as rows, in words; and what the terminal shows of it, through rich."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.reports import units
from compress.reports.exports import export_words
from compress.reports.headline import headline, points
from compress.reports.heat import loss_words
from compress.reports.points import stage_figures
from compress.reports.report import Comparison, Figure, Report
from compress.reports.speeds import DECODE, share_words

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
    interval: str
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
    sentence = "; ".join(filter(None, [compared.sentence, share_words(before, after)]))
    unit = next((f.unit for f in (after, before) if f is not None and f.value is not None), "")
    missing = [f.reason for f in (after, before) if f is not None and f.value is None and f.reason]
    return Row(
        metric=name,
        title=units.title(name),
        original=units.human(before.value, unit) if before else "–",
        compressed=units.human(after.value, unit) if after else "–",
        change=units.change(compared.delta, compared.ratio, unit),
        interval=units.interval(compared.ci_low, compared.ci_high, before.value if before else None, unit),
        verdict=compared.verdict,
        sentence=sentence or (missing[0] if missing else ""),
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
        console.print(line, style="red", markup=False)
    for note in [*map(export_words, report.exports), *report.notes]:
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


def stage_rows(report: Report) -> list[dict[str, str]]:
    """The passes in words, predicted beside measured."""
    found = []
    for number, stage in enumerate(report.stages):
        predicted = stage.predicted
        figures = stage_figures(stage.measurements)
        if number == len(report.stages) - 1:
            figures = {**report.compressed, **figures}
        left = {name: figures[name] for name in ("perplexity", "weights_bytes", DECODE) if name in figures}
        found.append(
            {
                "pass": stage.pass_,
                "options": ", ".join(f"{key} {_option(value)}" for key, value in stage.options.items() if _said(value)),
                "loss": loss_words(stage),
                "perplexity": units.human(left["perplexity"].value, "") if "perplexity" in left else "–",
                "size": units.human(left["weights_bytes"].value, "B") if "weights_bytes" in left else "–",
                "speed": _speed_words(left.get(DECODE), report.original.get(DECODE)),
                "seconds": units.duration(stage.seconds),
                "memory_predicted": units.human(_number(predicted.get("peak_memory_bytes")), "B"),
                "memory": units.human(stage.peak_memory_bytes, "B"),
                "size_predicted": units.human(_number(predicted.get("weights_bytes")), "B"),
                "coverage": units.human(stage.coverage, "fraction"),
            }
        )
    return found


def _speed_words(figure: Figure | None, original: Figure | None) -> str:
    """A speed as a multiple of the original's that was timed in turn with it: one stage was not timed beside another,
    on a machine that may have been busier then."""
    if figure is None:
        return "–"
    words = units.human(figure.value, figure.unit)
    ratio = figure.detail.get("ratio")
    if ratio is None and figure.value and original is not None and original.value:
        ratio = figure.value / original.value
    return words if ratio is None else f"{ratio:.2f} × ({words})"


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
