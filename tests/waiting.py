"""For tests of limits and of processes: a clock that waits for an event, and processes whose end can be waited for.

So that none depends on how fast the machine is, or on what else it does.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path


class Clock:
    """In the place of a module's ``time``: stands at ``now`` until ``event()``, then every look is ``step`` later."""

    def __init__(self, event: Callable[[], bool] = lambda: False, step: float = 86400) -> None:
        self.now, self.event, self.step = 0.0, event, step

    def monotonic(self) -> float:
        self.now += self.step * self.event()
        return self.now

    perf_counter = monotonic
    sleep = staticmethod(time.sleep)


def lives(path: Path) -> str:
    """A Python program that says in ``path`` that it has begun, and keeps that file locked for a minute."""
    return (
        f"import fcntl, time; file = open({str(path)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('begun', file=file, flush=True); time.sleep(60); print('not ended by anybody', file=file, flush=True)"
    )


def has_begun(path: Path) -> bool:
    """Whether the program has said so."""
    return path.exists() and path.read_text() != ""


def was_ended(path: Path) -> bool:
    """Waits until the program is no more; whether that was before its time."""
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return file.read() == "begun\n"
