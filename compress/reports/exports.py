"""What the checks of exports showed, as a table and in a sentence."""

from __future__ import annotations

from compress.reports import units
from compress.reports.report import Export, Report

COLUMNS = (
    "export", "size", "read by", "KL, nats a token", "log-likelihoods, nats a token", "without its own rounding",
    "same tokens",
)  # fmt: skip
NOTE = (
    "Each export was loaded by the engine that it is for, in a fresh process, and compared with the model in memory: "
    "KL divergence of the next-token distributions, and the mean difference of the log-likelihoods of the text's next "
    "tokens (in brackets: the most that was allowed). Without its own rounding: the same where the engine rounds "
    "nothing but the weights."
)


def export_rows(report: Report) -> list[list[str]]:
    """A row of `COLUMNS` for each export that was checked."""
    return [_row(export) for export in report.exports]


def _row(export: Export) -> list[str]:
    exact = export.exact_difference
    return [
        export.path,
        units.human(export.bytes, "B"),
        export.by if export.reloaded else f"{export.by}: not reloaded",
        _of(export.kl_divergence, export.allowed**2),
        _of(export.mean_logprob_difference, export.allowed),
        "–" if exact is None else _of(exact, export.allowed_exactly),
        "–" if export.same_tokens is None else "yes" if export.same_tokens else "no",
    ]


def _of(value: float | None, allowed: float) -> str:
    return "–" if value is None else f"{units.short(value)} ({units.short(allowed)})"


def export_words(export: Export) -> str:
    """What the check showed, in a sentence for the terminal."""
    if export.kl_divergence is None or export.mean_logprob_difference is None:
        return f"{export.path} ({units.human(export.bytes, 'B')}) was not checked."
    cut = "; it cuts text into the same tokens" if export.same_tokens else ""
    if export.exact_difference is not None:
        cut = f"; where nothing but the weights is rounded, {units.short(export.exact_difference)}{cut}"
    return (
        f"{export.path} ({units.human(export.bytes, 'B')}) was reloaded by {export.by} in a fresh process: its "
        f"log-likelihoods are {units.short(export.mean_logprob_difference)} nats a token from those of the model in "
        f"memory (for what {export.by} rounds itself, {export.allowed:g} is allowed), KL "
        f"{units.short(export.kl_divergence)}{cut}."
    )
