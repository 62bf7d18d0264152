"""Items that changed sides, and the text on which the models differ most, as rows of `report.md`."""

from __future__ import annotations

from collections.abc import Callable

from compress.reports import units
from compress.reports.report import Flips, Report, WorstText

#: Items of each kind, and windows, that are shown.
SHOWN = 5


def markdown_fidelity(report: Report, plain: Callable[[str], str]) -> list[str]:
    """The parts of `report.md`; `plain` makes any text harmless in it."""
    return [*_flips(report.flips, plain), *_worst(report.worst, plain)]


def _flips(flips: Flips | None, plain: Callable[[str], str]) -> list[str]:
    if flips is None or not flips.right_to_wrong + flips.wrong_to_right:
        return []
    lines = ["| area | items | right, now wrong | wrong, now right |", "|---|---:|---:|---:|"]
    for area, counts in flips.areas.items():
        name = plain(area).replace("|", "\\|")
        lines.append(f"| {name} | {counts['items']} | {counts['right_to_wrong']} | {counts['wrong_to_right']} |")
    if len(flips.areas) > 1:
        lines.append(f"| all | {flips.items} | {flips.right_to_wrong} | {flips.wrong_to_right} |")
    parts = ["## Items that changed sides", "\n".join(lines)]
    for change, title in (("right_to_wrong", "Right before, wrong now"), ("wrong_to_right", "Wrong before, right now")):
        shown = [flip for flip in flips.examples if flip.change == change][:SHOWN]
        if shown:
            rows = [f"- {plain(f'{flip.area}: {flip.text}')} → {plain(flip.answer)}" for flip in shown]
            parts += [f"{title} (the right answer behind the arrow):", "\n".join(rows)]
    return parts


def _worst(worst: list[WorstText], plain: Callable[[str], str]) -> list[str]:
    if not worst:
        return []
    rows = []
    for entry in worst[:SHOWN]:
        said = f"- {units.number(entry.kl)} nats per token in window {entry.window}: {plain(entry.text)}"
        if entry.token_kl is not None:
            at = f"most at “{plain(entry.token)}” after “{plain(entry.before)}”"
            said += f" ({at}, {units.number(entry.token_kl)} nats)"
        rows.append(said)
    return ["## Where the models differ most", "\n".join(rows)]
