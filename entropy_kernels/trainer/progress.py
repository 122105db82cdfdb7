"""Progress on the terminal: rich bars with the time left where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from entropy_kernels.trainer.config import HEADS

#: Seconds between plain lines of one run, where no terminal is there to redraw.
PLAIN_INTERVAL = 20.0


class ProgressBoard:
    """One bar per piece of work. Use as a context manager; call :meth:`update` as often as you like."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._tasks: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        if not enabled:
            return
        try:
            from rich import console, progress
        except ImportError as error:
            raise ImportError(
                "the progress bar needs rich: pip install 'entropy_kernels[train]', or --no-progress"
            ) from error
        screen = console.Console()
        self._live = screen.is_terminal
        self._bars = progress.Progress(
            "{task.description:<18}",
            progress.BarColumn(bar_width=28),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            "left",
            progress.TimeRemainingColumn(),
            "{task.fields[note]}",
            console=screen,
            disable=not self._live,
        )

    def __enter__(self) -> ProgressBoard:
        if self._enabled:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bars.stop()

    def report(self, phase: str, done: int, total: int, row: Mapping[str, Any]) -> None:
        """A step of a run, as :func:`entropy_kernels.trainer.ppo.train` reports it."""
        self.update(phase, done, total, describe_row(row))
        memory = describe_memory(row)
        if memory is not None:
            self.say(memory)

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self._enabled:
            self._bars.console.print(text, highlight=False)

    def add(self, name: str, total: int) -> None:
        """A bar that waits for its first update."""
        if self._enabled and name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, start=False, note="")

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Set a bar; without a terminal, print a line when `PLAIN_INTERVAL` has passed or the work is done."""
        if not self._enabled:
            return
        self.add(name, total)
        task = self._tasks[name]
        if self._bars.tasks[task].start_time is None:
            self._bars.start_task(task)
        before = self._bars.tasks[task].completed
        self._bars.update(task, completed=done, total=total, note=note)
        if self._live or done == before:
            return
        now = time.monotonic()
        if done >= total or now - self._last.get(name, 0.0) >= PLAIN_INTERVAL:
            self._last[name] = now
            remaining = self._bars.tasks[task].time_remaining
            left = f", about {remaining:.0f} s left" if remaining and done < total else ""
            self.say(f"{name}: {done}/{total}{left}  {note}")


def describe_row(row: Mapping[str, Any]) -> str:
    """The few numbers of a row that fit beside a bar."""
    shown = (("loss", "loss"), ("entropy", "H"), ("reward", "reward"), ("val_pass1", "pass@1"), ("val_pass8", "pass@8"))
    keep = shown[1:] if "entropy" in row else shown[:1]
    return "  ".join(f"{label} {row[name]:.3f}" for name, label in keep if isinstance(row.get(name), float))


def describe_memory(row: Mapping[str, Any]) -> str | None:
    """The measured peak memory with either head, as a sentence; None for a row without it."""
    shown = [
        f"{head} {f'{peak / 1e6:.1f} MB' if math.isfinite(peak) else 'does not fit'}"
        for head in HEADS
        if (peak := row.get(f"memory/{head}")) is not None
    ]
    start = "Peak memory of a micro-batch's forward, loss and backward, by head: "
    return f"{start}{', '.join(shown)}." if shown else None
