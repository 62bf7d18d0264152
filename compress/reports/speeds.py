"""Speeds in every setting and runtime as one table, and how near decoding comes to what the bandwidth allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.reports import units
from compress.reports.report import Comparison, Figure, Report

#: The columns: metric and heading.
COLUMNS = {
    "prefill_tokens_per_second": "reading", "first_token_seconds": "first token",
    "decode_tokens_per_second": "writing",
}  # fmt: skip
DECODE, ENERGY = "decode_tokens_per_second", "energy_joules_per_token"
SHARE = "of the bandwidth"
#: Metrics whose settings have their place in this table.
TIMED = (*COLUMNS, ENERGY)


@dataclass(frozen=True)
class Cell:
    """`text`: original and compressed; `change` between them and its verdict, empty where there is none."""

    text: str
    change: str = ""
    verdict: str = "not_tested"


@dataclass(frozen=True)
class SpeedTable:
    """`rows`: the setting's name and what it reads, then a cell for each of `columns`. `left_out`: settings and why."""

    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    left_out: list[str]
    note: str


def is_setting(metric: str) -> bool:
    """Whether a metric is a speed of another setting or runtime than the plain one."""
    base, _, variant = metric.partition("/")
    return bool(variant) and base in TIMED


def speed_table(report: Report) -> SpeedTable | None:
    """None where one setting is all that was timed: the table of metrics has it."""
    every = list(dict.fromkeys(m for m in (*report.original, *report.compressed) if m.partition("/")[0] in COLUMNS))
    names = sorted(dict.fromkeys(name.partition("/")[2] for name in every), key=_place)
    if names in ([], [""]):
        return None
    shares = any(_share(figures.get(DECODE)) for figures in (report.original, report.compressed))
    rows, reasons = [], {}
    for name in names:
        metrics = [f"{base}/{name}" if name else base for base in COLUMNS]
        cells = [_cell(report, metric) for metric in metrics]
        if all(cell.text == "–" for cell in cells):
            found = (figures.get(metric) for metric in metrics for figures in (report.compressed, report.original))
            reasons[_title(name)] = next(
                (each.reason for each in found if each is not None and each.reason), "not measured"
            )
            continue
        if shares:
            cells.append(_shares(report, metrics[-1]))
        rows.append((_title(name), _read(report, metrics), cells))
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason or "", []).append(name)
    left_out = [f"{'; '.join(each)}: {reason}" for reason, each in grouped.items()]
    columns = [*COLUMNS.values(), *([SHARE] if shares else [])]
    return SpeedTable(columns, rows, left_out, _note(report, shares))


def _place(variant: str) -> tuple[str, int, int]:
    """Runtime, prompt and batch of what stands behind a metric's name, in the order of the rows."""
    said = {"batch": 1, "prompt": 0}
    runtime = ""
    for part in filter(None, variant.split(", ")):
        word, _, number = part.partition(" ")
        if word in said and number.isdigit():
            said[word] = int(number)
        else:
            runtime = part
    return runtime, said["prompt"], said["batch"]


def _title(variant: str) -> str:
    runtime, prompt, batch = _place(variant)
    return ", ".join(filter(None, [runtime, f"batch {batch}", f"prompt {prompt}" if prompt else ""]))


def share_words(before: Figure | None, after: Figure | None) -> str:
    """`at 31 % of what the memory's bandwidth allows (original 48 %)`, or nothing where it was not measured."""
    last = after if after is not None else before
    share = _share(last)
    if share is None:
        return ""
    words = f"at {_percent(share)} of what the memory's bandwidth allows"
    first = _share(before)
    return f"{words} (original {_percent(first)})" if after is not None and first is not None else words


def _cell(report: Report, metric: str) -> Cell:
    before, after = report.original.get(metric), report.compressed.get(metric)
    compared = report.comparison.get(metric, Comparison())
    figures = [each for each in (before, after) if each is not None]
    if all(each.value is None for each in figures):
        return Cell("–")
    words = [units.human(each.value, each.unit) for each in figures]
    unit = next(each.unit for each in figures if each.value is not None)
    change = units.change(compared.delta, compared.ratio, unit) if compared.delta is not None else ""
    return Cell(units.from_to(*words) if len(words) == 2 else words[0], change, compared.verdict)


def _shares(report: Report, metric: str) -> Cell:
    said = [_share(figures[metric]) for figures in (report.original, report.compressed) if metric in figures]
    words = ["–" if share is None else _percent(share) for share in said]
    return Cell(units.from_to(*words) if len(words) == 2 else words[0] if words else "–")


def _read(report: Report, metrics: list[str]) -> str:
    """What was read and written in a setting: `4 × 128 tokens, 4 × 16 written`."""
    reading, writing = _detail(report, metrics[:2]), _detail(report, metrics[2:])
    if "batch" not in reading:
        return ""
    rows = f"{reading['batch']} × " if reading["batch"] > 1 else ""
    words = f"{rows}{reading['prompt_tokens']} tokens read"
    if "new_tokens" in writing:
        words += f", {rows}{writing['new_tokens']} written"
        words += f" after {writing['prompt_tokens']}" if writing["prompt_tokens"] != reading["prompt_tokens"] else ""
    return words


def _detail(report: Report, metrics: list[str]) -> dict[str, Any]:
    """What stands beside the first of these figures that says anything."""
    figures = (found.get(metric) for metric in metrics for found in (report.compressed, report.original))
    return next((figure.detail for figure in figures if figure is not None and figure.detail), {})


def _note(report: Report, shares: bool) -> str:
    words = "Tokens a second are those of all rows of a batch together."
    read = _detail(report, [DECODE]).get("bandwidth_bytes_per_second")
    if shares and read:
        words += (
            f" Of the bandwidth: each step of writing reads the weights once, and this machine reads "
            f"{units.human(read, 'B')} a second at most (measured); the share of that which the weights took."
        )
    return words


def _share(figure: Figure | None) -> float | None:
    value = figure.detail.get("bandwidth_share") if figure is not None and figure.value is not None else None
    return float(value) if isinstance(value, int | float) else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"
