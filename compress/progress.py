"""Telling a person how far the work is. Silent unless the command line asks for a live display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """A display of steps, each with a known number of parts. This one shows nothing."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """A piece of work with `total` parts (None: unknown)."""
        yield Step()

    def note(self, text: str) -> None:
        """One line a person should read, kept on the screen."""


class Step:
    """The running piece of work of a `Progress`."""

    def advance(self, detail: str = "", parts: int = 1) -> None:
        """`parts` more are done; `detail` is shown beside the bar."""

    def at(self, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` parts are done, as another process tells."""


class LiveProgress(Progress):
    """Bars with elapsed and remaining time on stderr, through rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[detail]}"),
            console=self.console,
        )

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        task = self._bars.add_task(title, total=total, detail="")
        yield _Bar(self, task)
        self._bars.update(task, total=total or 1, completed=total or 1, detail="", refresh=True)

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


class _Bar(Step):
    def __init__(self, display: LiveProgress, task: object):
        self._display, self._task = display, task

    def advance(self, detail: str = "", parts: int = 1) -> None:
        self._display._bars.update(self._task, advance=parts, detail=detail)  # type: ignore[arg-type]

    def at(self, done: int, total: int, detail: str = "") -> None:
        self._display._bars.update(self._task, completed=done, total=total, detail=detail)  # type: ignore[arg-type]
