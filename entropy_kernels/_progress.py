"""Progress of any program here: bars on a terminal, elsewhere one plain line per report.

On a terminal a line has name, counts and time left, which are always whole; the note gives way first, number by
number, then the middle of a long name. rich draws it; without rich a terminal gets the plain lines, too.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

#: Seconds between plain lines of one piece of work.
PLAIN_INTERVAL = 20.0
#: Seconds until a brief board shows anything.
PATIENCE = 1.0
#: Seconds and reports that the speed is measured over, at least.
_WINDOW, _REPORTS = 60.0, 10
#: Columns of a terminal from which on there is room for a bar, and columns of the bar.
_WIDE, _BAR = 120, 24
_SHORTEST_NAME = 8


@dataclass
class Task:
    """A piece of work: steps done, of how many, and when."""

    name: str
    total: int
    done: int = 0
    note: str = ""
    seconds: float = 0.0  # that it has taken so far
    samples: list[tuple[float, int]] = field(default_factory=list)  # (time, done), the latest ones

    def advance(self, done: int, now: float) -> None:
        """`done` steps are done; the time of the first report is the start."""
        if self.samples:
            self.seconds += now - self.samples[-1][0]
        self.done = done
        self.samples.append((now, done))
        while len(self.samples) > _REPORTS and self.samples[1][0] < now - _WINDOW:
            del self.samples[0]

    def left(self, now: float) -> float | None:
        """Seconds left, by the speed of late; None before there is one."""
        if len(self.samples) < 2:
            return None
        (start, first), (end, last) = self.samples[0], self.samples[-1]
        if last <= first or end <= start:
            return None
        return max(0.0, (self.total - self.done) * (end - start) / (last - first) - (now - end))

    @property
    def state(self) -> str:
        """waiting, running or done."""
        return "done" if self.samples and self.done >= self.total else "running" if self.samples else "waiting"

    def columns(self, now: float) -> tuple[str, str]:
        """Counts, and the time."""
        if self.state == "waiting":
            return f"{self.done}/{self.total}", "waits"
        left = self.left(now)
        shown = f"took {clock(self.seconds)}" if self.state == "done" else f"{clock(left)} left"
        return f"{self.done}/{self.total}", shown


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss; None as -:--:--."""
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


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
        A thread lets the time left run between reports. False where that would disturb what is measured.
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
        self._enabled, self._brief, self._interval = enabled, brief, interval
        self._file = sys.stdout if file is None else file
        self._tasks: dict[str, Task] = {}
        self._last: dict[str, float] = {}  # time of the last plain line
        self._began = self._drawn = time.monotonic()
        self._ticking = ticking
        self._live: Any = _live(self._file, self._lines, brief, ticking) if enabled else None
        self._started = False

    def __enter__(self) -> ProgressBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._live.stop()
            self._started = False

    def say(self, text: str) -> None:
        """A line above the bars; on a terminal folded between words, elsewhere never."""
        if not self._enabled:
            return
        if self._live is not None:
            text = textwrap.fill(text, self._live.console.width, break_long_words=False, break_on_hyphens=False)
        if self._started:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    def add(self, name: str, total: int) -> None:
        """A line that waits for its first update."""
        if self._enabled and name not in self._tasks:
            self._tasks[name] = Task(name, total)
            self._draw()

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps are done. Without a terminal that is a line if `interval` has passed since the last
        one of this name, or all is done.

        ``note`` is shown as far as it fits: numbers and words, separated by two spaces.
        """
        if not self._enabled:
            return
        task, now = self._tasks.setdefault(name, Task(name, total)), time.monotonic()
        known = bool(task.samples) and (task.done, task.total) == (done, total)
        task.total, task.note = total, " ".join(note.splitlines())
        if not known:
            task.advance(done, now)
        if self._live is not None:
            self._draw()
        elif not known and self._due(task, now):
            self._last[name] = now
            left = task.left(now)
            rest = f", about {in_words(left)} left" if left and done < total else ""
            self.say(f"{name}: {done}/{total}{rest}  {task.note}".rstrip())

    def _due(self, task: Task, now: float) -> bool:
        last = self._last.get(task.name)
        if self._brief:  # its end is told by what follows
            last = self._began + PATIENCE - self._interval if last is None else last
            return now - last >= self._interval
        return last is None or task.done >= task.total or now - last >= self._interval

    def _draw(self) -> None:
        if self._live is None:
            return
        now = time.monotonic()
        if not self._started and now - self._began >= (PATIENCE if self._brief else 0.0):
            self._live.start(refresh=True)
            self._started, self._drawn = True, now
        elif self._started and not self._ticking and now - self._drawn >= 0.5:
            self._live.refresh()
            self._drawn = now

    def _lines(self, width: int, height: int, ascii_only: bool) -> list[tuple[str, str]]:
        """Lines of at most `width` columns, with their styles."""
        now, order = time.monotonic(), ("running", "waiting", "done")
        tasks = list(self._tasks.values())
        room = max(1, height - 2)
        kept = tasks if len(tasks) <= room else sorted(tasks, key=lambda task: order.index(task.state))[: room - 1]
        rows = [(task, *task.columns(now)) for task in tasks if any(task is shown for shown in kept)]
        counts = max((len(count) for _, count, _ in rows), default=0)
        times = max((len(shown) for _, _, shown in rows), default=0)
        bar = _BAR if width >= _WIDE else 0
        most = min(width // 3, width - counts - times - (bar + 6 if bar else 4))  # for the name
        name = min(max((len(task.name) for task in tasks), default=0), max(_SHORTEST_NAME, most))
        lines = []
        for task, count, shown in rows:
            head = f"{shortened(task.name, name, ascii_only):<{name}}  "
            if bar:
                full = bar * min(task.done, task.total) // max(1, task.total)
                head += ("#" if ascii_only else "━") * full + ("." if ascii_only else "╌") * (bar - full) + "  "
            head += f"{count:>{counts}}  {shown:>{times}}"
            lines.append((head + fitting(task.note, width - len(head)), "" if task.state == "running" else "dim"))
        hidden = [task.state for task in tasks if all(task is not shown for shown in kept)]
        if hidden:
            said = ", ".join(f"{hidden.count(state)} {state}" for state in order if state in hidden)
            lines.append((f"and {said}"[:width], "dim"))
        return lines


def fitting(note: str, width: int) -> str:
    """As many of a note's parts, which two spaces separate, as fit into `width` behind two spaces: none is cut."""
    shown = ""
    for part in note.split("  "):
        if len(shown) + 2 + len(part) > width:
            break
        shown += f"  {part}" if part else ""
    return shown


def shortened(name: str, width: int, ascii_only: bool = False) -> str:
    """A name without its middle, if it is longer than `width`."""
    if len(name) <= width:
        return name
    dots = ".." if ascii_only else "…"
    kept = width - len(dots)
    return name[: kept - kept // 2] + dots + name[len(name) - kept // 2 :]


def _live(
    file: TextIO, lines: Callable[[int, int, bool], list[tuple[str, str]]], brief: bool, ticking: bool
) -> Any:  # fmt: skip
    """What draws on a terminal, a rich.live.Live; None where there is none, or no rich."""
    if not file.isatty():
        return None
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        return None
    console = Console(file=file)
    if not console.is_terminal or console.is_dumb_terminal:
        return None

    def render() -> Text:
        found = lines(console.width, console.height, console.options.ascii_only)
        return Text("\n", no_wrap=True, overflow="crop").join(Text(line, style) for line, style in found)

    return Live(
        get_renderable=render,
        console=console,
        auto_refresh=ticking,
        refresh_per_second=2,
        transient=brief,
        redirect_stdout=file is sys.stdout,  # what is printed meanwhile goes above the bars, and not elsewhere
        redirect_stderr=sys.stderr.isatty(),
    )
