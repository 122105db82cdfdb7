"""Asking a scorer, which is somebody else's, about answers that a model wrote: whatever happens, there is a score.

:func:`judge` does it in this process; ``python scoring.py FD`` is a process of its own that does (workers.py starts
it). It imports the standard library and the scorer alone, not the package that it lies in: torch takes seconds.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import numbers
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

#: Seconds after which a scorer that has caught its interruption is interrupted again.
AGAIN = 0.05
#: Sizes of scores end here: means and squares of them have to be finite in float32.
LARGEST = 1e15


class Unscored(float):
    """The score 0 of an answer that could not be judged, with the reason, and whether that was the time."""

    reason: str
    late: bool

    def __new__(cls, reason: str, late: bool = False) -> Unscored:
        zero = super().__new__(cls, 0.0)
        zero.reason, zero.late = reason, late
        return zero

    def __reduce__(self) -> Any:
        return Unscored, (self.reason, self.late)


def too_late(seconds: float) -> Unscored:
    """What an answer gets whose score takes longer."""
    return Unscored(f"took longer than {seconds:g} s", late=True)


def judge(ask: Callable[[], object], *, seconds: float | None = None) -> float:
    """The finite number that `ask` returns; :class:`Unscored` if it raises, takes longer or returns anything else.

    The time is limited in the main thread only. The folder that the process works in stays the same, and a scorer that
    draws finds the same draws for every answer, in whatever process (:func:`draws_apart` keeps those of others).
    """
    late, started, folder = True, time.monotonic(), _folder()
    try:
        _seed()
        with time_limit(seconds):
            score = number_of(ask())
            late = False
        # a scorer that catches everything goes on when its time is up
        if seconds is not None and (late or time.monotonic() - started > seconds):
            return too_late(seconds)
        return score
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        if type(error) is not SystemExit:  # the trainer's own, on a signal
            raise
        return Unscored("called exit()")
    except _OutOfTime:
        return too_late(seconds or 0.0)
    except BaseException as error:  # those of extensions in Rust are no Exception
        return Unscored(f"raised {described(error)}")
    finally:
        if folder is not None and _folder() != folder:
            with suppress(OSError):
                os.chdir(folder)


def _seed() -> None:
    """The global generators of Python, and of numpy and torch where they are imported."""
    random.seed(0)
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed(0)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)


@contextmanager
def draws_apart() -> Iterator[None]:
    """Within: a scorer's draws; afterwards the generators of :func:`_seed` go on as if nothing had been drawn."""
    numpy, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    kept = random.getstate(), numpy and numpy.get_state(), torch and torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        if numpy:
            numpy.set_state(kept[1])
        if torch:
            torch.default_generator.set_state(kept[2])


def number_of(score: Any) -> float:
    """A score as a finite number; :class:`Unscored` for what is none."""
    if isinstance(score, Unscored):
        return score
    value = score.item() if getattr(score, "ndim", None) == 0 else score  # a scalar of numpy or torch
    if isinstance(value, (numbers.Real, Decimal)) and abs(float(value)) <= LARGEST:  # NaN is not
        return float(value)
    return Unscored(f"expected a finite number (at most {LARGEST:g}) as score, got {score!r:.80}")


def described(error: BaseException) -> str:
    """An exception in one line."""
    try:
        text = " ".join(str(error)[:200].split())
    except Exception as other:
        text = f"(its text raised {type(other).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


class _OutOfTime(BaseException):
    """Not an Exception: scorers catch those."""


#: Files of the frames that an interruption passes on its way out.
_OURS = (__file__, contextmanager.__code__.co_filename)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """What stands within is left after so many seconds, where the interpreter can be stopped: in its main thread.

    It is interrupted again and again if it catches that. What catches everything for ever, or runs in C and never
    returns, is not left: that takes a process of its own.
    """
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    within, first = True, True

    def late(number: int, frame: Any) -> None:
        nonlocal first
        again, first = not first, False
        # not while what has been interrupted is being left
        if within and not (again and frame.f_code.co_filename in _OURS):
            raise _OutOfTime

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, late)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    except _OutOfTime:
        pass
    finally:
        within = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


# --- a scorer by its name ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a scorer comes from: `name` in `place`, a module or a file that ends in .py.

    With `options` it is what `name` makes of them, and its ``verify`` if it has one. `argument`: what named it.
    """

    place: str
    name: str
    options: dict[str, Any] | None = None
    argument: str = "task"

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"

    def module(self) -> Any:
        """The module; a file is run once, under a name of its own, and may import what lies beside it."""
        if not self.place.endswith(".py"):
            _look_in(os.getcwd())
            return importlib.import_module(self.place)
        path = Path(self.place).expanduser().resolve()
        name = f"_{path.stem}_{zlib.crc32(os.fsencode(path)):08x}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            if path.parent != Path(__file__).resolve().parent:
                _look_in(str(path.parent))
            sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[name])
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]

    def refused(self, error: BaseException | str) -> ValueError:
        """The error for one that cannot be made."""
        reason = error if isinstance(error, str) else described(error)
        return ValueError(
            f"{self.argument}: expected module:NAME or file.py:NAME that can be imported, got {self} ({reason})"
        )

    def make(self) -> Any:
        """What `name` is, or makes of `options`."""
        found = self.module()
        for part in self.name.split("."):
            if not hasattr(found, part):
                near = difflib.get_close_matches(part, (name for name in vars(found) if name[0] != "_"), 1)
                raise AttributeError(f"it has no {part}" + (f"; did you mean {near[0]}?" if near else ""))
            found = getattr(found, part)
        return found(**self.options) if self.options is not None and callable(found) else found


def _look_in(folder: str) -> None:
    """Behind all others, so that a name of the user's hides no package."""
    if folder not in sys.path:
        sys.path.append(folder)


def scorer_of(made: Any) -> Any:
    """What is asked about answers: a task's ``verify``, or a function."""
    return getattr(made, "verify", made)


@dataclass(frozen=True)
class Parameters:
    """What a function asks for by name."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    others: bool  # takes **fields
    one_of: tuple[str, ...]  # fields of which it needs one
    problem: str | None  # why it cannot be called by names


def never_a_value(function: Any) -> str | None:
    """What a function is that returns before it has run, and then no value of use; None for others."""
    called = function if inspect.isroutine(function) else getattr(function, "func", type(function).__call__)
    if inspect.iscoroutinefunction(called):
        return "an async function"
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        return "a generator function (it has a yield)"
    return None


def parameters_of(function: Any) -> Parameters:
    """Of a reward function."""
    kinds = inspect.Parameter
    if not callable(function) or inspect.isclass(function):
        return Parameters((), (), False, (), f"a {type(function).__name__}, which is no function")
    try:
        found = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return Parameters((), (), False, (), "a function whose parameters cannot be seen")
    named = [p for p in found if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    problem = never_a_value(function)
    if {"prompts", "completions"} & {p.name for p in named}:
        problem = "a function of lists (prompts, completions), as TRL's are"
    elif any(p.kind is kinds.POSITIONAL_ONLY for p in found):
        problem = "a function with parameters that have no name"
    return Parameters(
        tuple(p.name for p in named if p.default is kinds.empty),
        tuple(p.name for p in named if p.default is not kinds.empty),
        any(p.kind is kinds.VAR_KEYWORD for p in found),
        tuple(getattr(function, "one_of", ())),
        problem,
    )


# --- a process of its own ---------------------------------------------------------------------------------------------


def serve(connection: Any) -> None:
    """Answer questions until the trainer is gone. The first message says what is asked; its answer tells whether that
    can be, and what it takes. It has one of the questions, so that what these import costs no answer its time."""
    import pickle

    source, path, memory, trainer, sample = pickle.loads(connection.recv_bytes())
    sys.path[:] = path
    _confine(memory, trainer)
    try:
        asked = Source(*source)
        made = asked.make()
        with suppress(Exception):
            if "numpy" in sys.modules or "numpy" in inspect.getsource(asked.module()):
                importlib.import_module("numpy.random")  # to be seeded where a scorer imports it when it is asked
        hello: tuple[str, Any] = ("ready", vars(parameters_of(made)))
    except BaseException as error:
        hello = ("failed", described(error))
    with suppress(Exception):
        pickle.loads(sample)
    connection.send(hello)
    scorer, here = scorer_of(made) if hello[0] == "ready" else None, os.getpid()
    while scorer is not None:
        question = connection.recv_bytes()

        def ask(question: bytes = question) -> object:
            args, named = pickle.loads(question)
            return scorer(*args, **named)

        try:
            score = judge(ask)
        except BaseException as error:
            score = Unscored(f"raised {described(error)}")
        if os.getpid() != here:  # a fork of the scorer's that came back: its parent answers
            return
        signal.alarm(0)  # one that is left would end the next answer
        connection.send((score.reason, score.late) if isinstance(score, Unscored) else float(score))


def _confine(memory: int, trainer: int) -> None:
    """End with the trainer and not before, take no more than `memory` bytes, and be the first to go if the machine has
    none left."""
    with suppress(Exception):  # Linux
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != trainer:
        os._exit(1)
    _outlast_sigterm()
    # a shell's background jobs ignore it, and so would what they start: answers are judged alike everywhere
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(Exception):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(Exception):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _outlast_sigterm() -> None:
    """Schedulers send it to all processes of a job: the trainer then finishes a step, for which it needs scores."""
    own = os.getpid()

    def terminated(number: int, frame: Any) -> None:
        if os.getpid() != own:  # one that the scorer has forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, terminated)  # no SIG_IGN, which programs that the scorer starts would inherit


if __name__ == "__main__":
    from multiprocessing.connection import Connection

    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):  # the trainer is gone
        pass
    finally:
        os._exit(0)  # whatever threads the scorer has left
