"""SIGTERM, which stops jobs that are preempted or cancelled: a run finishes its step and saves it first.

Signals reach the main thread; elsewhere nothing is changed. Handlers are put back.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(SystemExit):
    """By a signal, whose number its code has; told apart from a verifier that calls exit()."""


#: Seconds within which signals count as one: a scheduler sends them to a sweep and to its runs, which get another one
#: from the sweep.
TOGETHER = 2.0


class Stop:
    """Whether a run was asked to stop."""

    asked = False


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: it was set in C


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Within: SIGTERM is an exception, so that the runs that a sweep has started are stopped with it."""

    def terminated(number: int, frame: Any) -> None:
        raise Terminated(128 + number)

    with _handling(terminated):
        yield


@contextmanager
def stopped_after_a_step() -> Iterator[Stop]:
    """Within: the first SIGTERM asks to stop, a later one is an exception."""
    stop, first = Stop(), math.inf

    def asked(number: int, frame: Any) -> None:
        nonlocal first
        if time.monotonic() - first >= TOGETHER:
            raise Terminated(128 + number)
        if not stop.asked:
            stop.asked, first = True, time.monotonic()
            # not print(), which the signal may have interrupted
            os.write(2, b"\nSIGTERM: stops after this step, with a checkpoint; another one stops at once\n")

    with _handling(asked):
        yield stop
