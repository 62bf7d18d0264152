"""Plots as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Colours drawn with, and the page's variable that each becomes.
INK, MUTED, RULE = "#010203", "#040506", "#070809"
SERIES = ("#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718", "#191a1b")
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
_VARIABLES |= {color: f"var(--series-{i})" for i, color in enumerate(SERIES)}

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "compress", "font.size": 10, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": RULE, "axes.labelcolor": MUTED,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none",
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.linewidth": 0.8, "axes.titlesize": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One model in the plot of quality against size. `low` and `high`: interval of `quality`, if known."""

    label: str
    size: float
    quality: float
    low: float | None = None
    high: float | None = None
    original: bool = False


def quality_against_size(points: Sequence[Point], quality: str) -> str:
    """SVG: megabytes of weights (down is better, left is smaller) against perplexity."""
    figure, axes = _figure(5.2, 3.2)
    for i, point in enumerate(points):
        color = MUTED if point.original else SERIES[(i - 1) % len(SERIES)]
        x = point.size / 1e6
        if point.low is not None and point.high is not None:
            axes.plot([x, x], [point.low, point.high], color=color, linewidth=1.6, solid_capstyle="round")
        axes.plot([x], [point.quality], "o", color=color, markersize=9, zorder=3)
    largest = max(point.size for point in points) / 1e6
    axes.set_xlim(0, largest * 1.12)
    _room(axes, [value for p in points for value in (p.quality, p.low, p.high) if value is not None])
    for point in points:
        # Labels stay inside: to the left of a point in the right half.
        right = point.size / 1e6 > 0.6 * largest
        axes.annotate(
            point.label, (point.size / 1e6, point.quality), xytext=(-9 if right else 9, 7),
            textcoords="offset points", ha="right" if right else "left", va="bottom", color=INK,
        )  # fmt: skip
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel(quality)
    return _svg(figure, "size", f"{quality} against size on disk")


def block_damage(stages: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """SVG: relative squared error of every block, a line for each pass."""
    figure, axes = _figure(5.2, 2.5)
    longest = 0
    for i, (label, errors) in enumerate(stages):
        where = [j for j, error in enumerate(errors) if error is not None]
        longest = max(longest, len(errors))
        color = SERIES[i % len(SERIES)]
        axes.plot(where, [errors[j] for j in where], "o-", color=color, markersize=5, linewidth=1.6, label=label)
    axes.set_xlim(-0.5, longest - 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("relative error")
    if len(stages) > 1 or stages[0][0].endswith(")"):
        axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, "damage", "relative error block by block")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="tight")
        return figure, figure.add_subplot()


def _room(axes: Any, values: Sequence[float]) -> None:
    """Vertical limits with room for labels above the topmost point; a flat plot gets some height."""
    low, high = min(values), max(values)
    span = max(high - low, 0.05 * abs(high), 1e-9)
    axes.set_ylim(low - 0.2 * span, high + 0.3 * span)


def _svg(figure: Any, salt: str, alternative: str) -> str:
    """The figure as an `<svg>` element for a page: no prolog, no addresses, ids of its own, the page's colours."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"compress-{salt}"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', text)
    text = re.sub(r'href="#', f'href="#{salt}-', text).replace("url(#", f"url(#{salt}-")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{alternative}"', 1)
