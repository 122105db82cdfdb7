"""For tests of limits and of processes: a clock that waits for an event, and processes whose end can be waited for.

So that none depends on how fast the machine is, or on what else it does.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """In the place of a module's ``time``: stands at ``now`` until ``event()``, then every look is ``step`` later."""

    def __init__(self, event: Callable[[], bool] = lambda: False, step: float = 86400) -> None:
        self.now, self.event, self.step = 0.0, event, step

    def monotonic(self) -> float:
        self.now += self.step * self.event()
        return self.now

    perf_counter = monotonic
    sleep = staticmethod(time.sleep)


def only_hangs_reach_limits(verify: Any) -> None:
    """In :mod:`entropy_kernels.verify`, on the fake GPU: time passes only while every process that runs hangs."""
    running: list[Any] = []
    start, ended = verify._Process.start, verify._Process.ended

    def started(process: Any) -> None:
        running.append(process)
        start(process)

    def is_over(process: Any, late: bool) -> bool:
        over = ended(process, late)
        if over:
            running.remove(process)
        return over

    def event() -> bool:
        return bool(running) and all("fake GPU: hangs" in process._words for process in running)

    verify._Process.start, verify._Process.ended = started, is_over
    verify.time = Clock(event, verify.CALL_LIMIT + 1)


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
