"""Progress of any program here: bars on a terminal, elsewhere one plain line per report.

rich draws the bars and estimates the time left; without it there are the plain lines alone, and no estimates.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

#: Seconds between plain lines of one piece of work.
PLAIN_INTERVAL = 20.0
#: Seconds until a brief board shows anything.
PATIENCE = 1.0
#: Seconds that the speed is measured over: a step may take minutes.
_PERIOD = 3600.0
#: Columns of a terminal from which on there is room for a bar.
_WIDE = 120


def in_words(seconds: float) -> str:
    """A rough time, for a sentence: "40 seconds", "6 minutes", "2.5 hours"."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:.0f} {unit}s" if value >= 10 or unit == "minute" else f"{value:.1f} {unit}s"
    return f"{max(1, round(seconds))} seconds"


class ProgressBoard:
    """One line per piece of work. Use as a context manager; call :meth:`update` as often as you like.

    Parameters
    ----------
    enabled : bool
        False: nothing is shown at all.
    file : text stream, optional
        Where; default ``sys.stdout``. A program whose output is read by others takes ``sys.stderr``.
    brief : bool
        For work that is usually short, or whose result is what counts: nothing is shown before a second has passed, and
        the bars vanish at the end.
    ticking : bool
        A thread draws, twice a second. False where that would disturb what is measured: then every report draws.
    interval : float
        Seconds between plain lines of one name; 0 where every report is one.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        file: TextIO | None = None,
        brief: bool = False,
        ticking: bool = True,
        interval: float = PLAIN_INTERVAL,
    ) -> None:
        self._enabled, self._brief, self._ticking, self._interval = enabled, brief, ticking, interval
        self._file = sys.stdout if file is None else file
        self._done: dict[str, tuple[int, int]] = {}  # as last reported, and of how many
        self._told: dict[str, float] = {}  # time of the last plain line
        self._began = time.monotonic()
        self._ids: dict[str, Any] = {}
        self._bars: Any = _bars(self._file, brief, ticking) if enabled else None
        self._drawn = self._bars is not None and not self._bars.disable

    def __enter__(self) -> ProgressBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn and self._bars.live.is_started:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars; on a terminal folded between words, elsewhere never."""
        if self._drawn:
            self._bars.console.print(text, highlight=False, markup=False, emoji=False)
        elif self._enabled:
            print(text, file=self._file, flush=True)

    def add(self, name: str, total: int) -> None:
        """A line that waits for its first update."""
        if self._bars is not None and name not in self._ids:
            self._ids[name] = self._bars.add_task(name, start=False, total=total, note="", state="waits")
            self._draw()

    def starting(self, name: str) -> None:
        """What waited has begun, and has nothing to report yet."""
        if self._bars is not None:
            self._bars.update(self._ids[name], state="starting")
            self._draw()

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps are done. Without a terminal that is a line if `interval` has passed since the last
        one of this name, or all is done.

        ``note`` is shown as far as it fits: of parts with two spaces between them, those that are whole.
        """
        if not self._enabled:
            return
        known = self._done.get(name) == (done, total)
        self._done[name] = (done, total)
        note = " ".join(note.splitlines())
        left = self._advance(name, done, total, note) if self._bars is not None else None
        if self._drawn:
            self._draw()
        elif not known and self._due(name, time.monotonic()):
            rest = f", about {in_words(left)} left" if left else ""
            self.say(f"{name}: {done}/{total}{rest}  {note}".rstrip())

    def _advance(self, name: str, done: int, total: int, note: str) -> float | None:
        """The same to rich; seconds left, None before there is a speed."""
        self.add(name, total)
        task = self._bars.tasks[self._ids[name]]  # none is ever removed
        if not task.started:
            self._bars.start_task(task.id)
        over = done >= total
        # a terminal that is too low for all shows those that run
        visible = not over or len(self._ids) < self._bars.console.height
        state = "done" if over else "left"
        self._bars.update(task.id, completed=done, total=total, note=note, state=state, visible=visible)
        return task.time_remaining

    def _due(self, name: str, now: float) -> bool:
        last = self._told.get(name)
        if self._brief:  # its end is told by what follows
            due = now - (self._began + PATIENCE - self._interval if last is None else last) >= self._interval
        else:
            done, total = self._done[name]
            due = last is None or done >= total or now - last >= self._interval
        if due:
            self._told[name] = now
        return due

    def _draw(self) -> None:
        if self._drawn and not self._bars.live.is_started:
            if time.monotonic() - self._began >= (PATIENCE if self._brief else 0.0):
                self._bars.start()
        elif self._drawn and not self._ticking:
            self._bars.refresh()


class _Note:
    """A note for rich, as many of its parts as fit, so that no figure is cut; of one part what fits."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        from rich.measure import Measurement

        return Measurement(0, min(len(self._text), options.max_width))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        more, parts = "" if options.ascii_only else " …", self._text.split("  ")
        shorter = ("  ".join(parts[:n]) + more for n in range(len(parts) - 1, 0, -1))
        fits = (text for text in (self._text, *shorter) if len(text) <= options.max_width)
        yield Text(next(fits, parts[0]), no_wrap=True)


def _bars(file: TextIO, brief: bool, ticking: bool) -> Any:
    """A rich.progress.Progress, which is disabled where there is no terminal; None without rich.

    Counts and time left are always whole: the note gives way first, then a long name.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
    except ImportError:
        return None

    class Notes(ProgressColumn):
        def render(self, task: Any) -> Any:
            return _Note(task.fields["note"])

    console = Console(file=file)
    cut: Any = "crop" if console.options.ascii_only else "ellipsis"
    name = Column(no_wrap=True, overflow=cut, max_width=max(8, console.width // 2 - 12))
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        *([BarColumn(bar_width=24)] if console.width >= _WIDE else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right")),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True)),
        Notes(table_column=Column(no_wrap=True, overflow=cut, ratio=1)),
        console=console,
        auto_refresh=ticking,
        refresh_per_second=2,
        speed_estimate_period=_PERIOD,
        transient=brief,
        redirect_stdout=file is sys.stdout,  # what is printed meanwhile goes above the bars, and not elsewhere
        redirect_stderr=sys.stderr.isatty(),
        get_time=time.monotonic,
        disable=not (file.isatty() and console.is_terminal and not console.is_dumb_terminal),
        expand=True,
    )
