"""What a run found: its typed form, and its JSON, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def render(folders: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Makes the pages of finished runs again from their `report.json`; with several, one page that compares them, in
    the file `output`."""
    from compress.reports.html import render as render_pages

    return render_pages(folders, output)
