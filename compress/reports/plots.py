"""Plots as SVG that takes its colours from the page, so that one drawing serves light and dark.

Each point carries its values in words (`data-tip`, and a `<title>` that any browser shows without a script).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

#: Colours drawn with, and the page's variable that each becomes.
INK, MUTED, RULE = "#010203", "#040506", "#070809"
SERIES = ("#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718", "#191a1b")
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
_VARIABLES |= {color: f"var(--series-{i})" for i, color in enumerate(SERIES)}

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "compress", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": RULE, "axes.labelcolor": MUTED,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none",
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.linewidth": 0.8, "axes.titlesize": 9,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One model in a plot. `cost`: what is paid, on the horizontal axis; `low` and `high`: interval of `quality`, if
    known; `tip`: all of it in words; `step`: a stage on the way, drawn smaller."""

    label: str
    cost: float
    quality: float
    tip: str
    low: float | None = None
    high: float | None = None
    original: bool = False
    step: bool = False


def scatter(
    points: Sequence[Point], name: str, across: str, up: str, path: Sequence[int] = (), lower_is_better: bool = True
) -> str:
    """SVG: quality against cost. `name` keeps its ids apart from another drawing's; `path`: points to be joined, in
    their order."""
    figure, axes = _figure(4.3, 3.0)
    if len(path) > 1:
        axes.plot(
            [points[i].cost for i in path], [points[i].quality for i in path], color=MUTED, linewidth=0.9,
            linestyle=(0, (3, 3)), zorder=1,
        )  # fmt: skip
    colors = _colors(points)
    for i, (point, color) in enumerate(zip(points, colors, strict=True)):
        if point.low is not None and point.high is not None:
            axes.plot([point.cost] * 2, [point.low, point.high], color=color, linewidth=1.6, solid_capstyle="round")
        size = 6 if point.step else 9
        (mark,) = axes.plot([point.cost], [point.quality], "o", color=color, markersize=size, zorder=3)
        mark.set_gid(f"tip{i}")
    axes.set_xlim(0, max(point.cost for point in points) * 1.12)
    _room(axes, [value for p in points for value in (p.quality, p.low, p.high) if value is not None])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    _label(figure, axes, points)
    worse = "lower" if lower_is_better else "higher"
    text = _svg(figure, name, f"{up} against {across}; {worse} is better, further left is better")
    for i, point in enumerate(points):
        tip = escape(point.tip, {'"': "&quot;"})
        start = f'<g id="{name}-tip{i}"'
        more = f' class="mark" tabindex="0" data-tip="{tip}"><title>{tip}</title>'
        text = text.replace(f"{start}>", start + more)
    return text


def _colors(points: Sequence[Point]) -> list[str]:
    """Muted for originals and for stages on the way, a colour of its own for each other model."""
    found, used = [], 0
    for point in points:
        if point.original or point.step:
            found.append(MUTED)
            continue
        found.append(SERIES[used % len(SERIES)])
        used += 1
    return found


#: Where a label may stand: offset in points, and how it is aligned; the first place that is free is taken.
_PLACES = ((8, 6, "left", "bottom"), (-8, 6, "right", "bottom"), (8, -6, "left", "top"), (-8, -6, "right", "top"),
           (0, 11, "center", "bottom"), (0, -11, "center", "top"))  # fmt: skip
_LETTER, _LINE = 5.4, 11.0  # about as wide and high as a letter is drawn, in points


def _label(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Writes each point's label beside it, inside the axes and clear of the other labels and points where it can."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    inside = axes.get_window_extent()
    frame = (inside.x0 * scale, inside.y0 * scale, inside.x1 * scale, inside.y1 * scale)
    places = [axes.transData.transform((point.cost, point.quality)) * scale for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        boxes = [_box(x, y, place, len(point.label)) for place in _PLACES]
        clashes = [_outside(box, frame) + sum(_overlap(box, other) for other in taken) for box in boxes]
        best = clashes.index(min(clashes))
        taken.append(boxes[best])
        dx, dy, ha, va = _PLACES[best]
        axes.annotate(
            point.label, (point.cost, point.quality), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va,
            color=MUTED if point.step else INK, fontsize=8 if point.step else 9, parse_math=False,
        )  # fmt: skip


_Box = tuple[float, float, float, float]


def _box(x: float, y: float, place: tuple[int, int, str, str], letters: int) -> _Box:
    dx, dy, ha, va = place
    width = letters * _LETTER
    left = x + dx - {"left": 0.0, "right": width, "center": width / 2}[ha]
    bottom = y + dy - (0.0 if va == "bottom" else _LINE)
    return left, bottom, left + width, bottom + _LINE


def _overlap(a: _Box, b: _Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: _Box, frame: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)


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
