"""What came out, in a sentence for somebody who reads no table, and the lines that must not be overlooked."""

from __future__ import annotations

from compress.reports import units
from compress.reports.report import Comparison, GoalResult, Report

#: How many areas that lost are named.
NAMED = 3


def headline(report: Report) -> str:
    """`4.1 × smaller, 1.9 × faster, no measurable loss on 7 of 8 areas; arithmetic lost 6.0 points.`"""
    if not report.compressed:
        return "One model, measured." if report.original else "Nothing was measured."
    parts = [size_words(report), speed_words(report), *quality_words(report)]
    said = [part for part in parts if part]
    if not said:
        return "Nothing could be compared."
    sentence = ", ".join(said[:3]) + "".join(f"; {part}" for part in said[3:])
    return sentence[:1].upper() + sentence[1:] + "."


def points(report: Report) -> list[str]:
    """A line for each missed goal, and one where the folder could not be loaded."""
    found = [f"Goal missed: {goal_words(report, goal)}." for goal in report.goals if not goal.met]
    if report.compressed and report.verified is not None and not report.verified.reloaded:
        found.append("The exported folder could not be loaded by transformers.")
    return found


def goal_words(report: Report, goal: GoalResult) -> str:
    """`perplexity +2%, reached 3.600 (+5.9 %)`."""
    words = f"{units.title(goal.metric).lower()} {goal.goal}"
    figure, compared = report.compressed.get(goal.metric), report.comparison.get(goal.metric)
    if goal.value is None:
        return f"{words}, {goal.reason or 'not measured'}"
    words += f", reached {units.human(goal.value, figure.unit if figure else '')}"
    if compared is not None and compared.delta is not None and figure is not None:
        words += f" ({units.change(compared.delta, compared.ratio, figure.unit)})"
    return words


def speed_words(report: Report) -> str:
    """The speed of writing (else of reading) in words; says plainly when compression brought none."""
    compared, what = report.comparison.get("decode_tokens_per_second"), ""
    if compared is None or not compared.ratio:
        compared, what = report.comparison.get("prefill_tokens_per_second"), " at reading a prompt"
    if compared is None or not compared.ratio:
        return ""
    if compared.verdict == "better":
        return f"{_times(compared.ratio)} faster{what}"
    if compared.verdict == "worse":
        return f"{_times(1 / compared.ratio)} slower{what} on this machine"
    if compared.verdict == "no_difference":
        return f"no faster{what} on this machine"
    return f"{_times(compared.ratio)} the speed{what}, in too few rounds to be sure"


def _times(ratio: float) -> str:
    """`1.9 ×`, and two digits where one would say nothing."""
    return f"{ratio:.2f} ×" if ratio < 1.1 else f"{ratio:.1f} ×"


def size_words(report: Report) -> str:
    """`4.1 × smaller`, and which folder is, where `model/` could not be packed."""
    compared = report.comparison.get("weights_bytes")
    if compared is None or not compared.ratio:
        return ""
    if abs(compared.ratio - 1) < 0.005:
        return "the same size on disk"
    if compared.ratio > 1:
        return f"{_times(compared.ratio)} larger on disk"
    return f"{_times(1 / compared.ratio)} smaller{_where(report)}"


def _where(report: Report) -> str:
    """Where the bytes are that the size counts, if they are not those of `model/`."""
    figure = report.compressed.get("weights_bytes")
    if figure is None or "unpacked_bytes" not in figure.detail:
        return ""
    return f" ({figure.detail['folder']}, for compress.load; model/ has the weights unpacked)"


def quality_words(report: Report) -> list[str]:
    """What became of quality: by areas where there are any, and by perplexity where that says something else."""
    areas = tested_areas(report)
    lost = sorted((c.delta or 0.0, name) for name, c in areas.items() if c.verdict == "worse")
    compared = report.comparison.get("perplexity")
    if not areas:
        return [_perplexity(report) or _accuracy(report)]
    fine = len(areas) - len(lost)
    if not lost:
        found = [f"no measurable loss on {'any of ' if len(areas) > 1 else ''}{_count(len(areas), 'area')}"]
    elif fine:
        found = [f"no measurable loss on {fine} of {_count(len(areas), 'area')}"]
    else:
        found = [f"losses on {'all ' if len(areas) > 1 else ''}{_count(len(areas), 'area')}"]
    if lost:
        named = [f"{name.replace('_', ' ')} lost {100 * abs(delta):.1f} points" for delta, name in lost[:NAMED]]
        more = len(lost) - NAMED
        found.append(", ".join(named) + (f" and {_count(more, 'area')} more" if more > 0 else ""))
    if compared is not None and compared.verdict == "worse" and compared.ratio:
        found.append(f"perplexity rose by {units.percent(compared.ratio - 1)}")
    return found


def tested_areas(report: Report) -> dict[str, Comparison]:
    """The areas that were tested, by their names; of an area and its parts, the parts."""
    names = [name for name, c in report.comparison.items() if name.startswith("accuracy/") and c.delta is not None]
    leaves = [name for name in names if not any(other.startswith(f"{name}/") for other in names)]
    found = {name.partition("/")[2]: report.comparison[name] for name in leaves}
    return {name: compared for name, compared in found.items() if compared.verdict != "not_tested"}


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _accuracy(report: Report) -> str:
    compared = report.comparison.get("accuracy")
    return f"accuracy {compared.sentence}" if compared is not None and compared.delta is not None else ""


def _perplexity(report: Report) -> str:
    compared = report.comparison.get("perplexity")
    before, after = report.original.get("perplexity"), report.compressed.get("perplexity")
    if compared is None or compared.ratio is None or before is None or after is None:
        return ""
    values = f"{units.human(before.value, '')} → {units.human(after.value, '')}"
    if compared.verdict == "no_difference":
        return f"no measurable loss in perplexity ({values})"
    return f"perplexity {units.change(compared.delta, compared.ratio, '')} ({values})"
