"""Asking a verifier that is somebody else's about answers that a model wrote: whatever happens, there is a reward."""

from __future__ import annotations

import cmath
import inspect
import keyword
import numbers
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any

#: What an answer may call where the scorer evaluates it.
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "asin", "acos", "atan"}
_FUNCTIONS |= {"log", "ln", "exp", "sqrt", "Abs", "abs"}
_CALL = re.compile(r"\b([^\W\d]\w*)\s*\(")
#: Attributes, private names, factorials, shifts, code; towers of powers, and large powers of what may be one.
_CODE = re.compile(
    r"""__|[\w)\]}"']\s*\.\s*[^\W\d]|!(?!=)|<<|:=|;|\b(?:lambda|import|for|if)\b
    |(?:\*\*|\^)\s*[-+(]*\s*[\w.]+\s*(?:\*\*|\^)|\)\s*(?:\*\*|\^)\s*[-+(]*\s*\d{3}|(?:\*\*|\^)\s*[-+(]*\s*\d{5}""",
    re.VERBOSE,
)


class Unscored(float):
    """The reward 0 of an answer that could not be judged, with the reason."""

    reason: str

    def __new__(cls, reason: str) -> Unscored:
        zero = super().__new__(cls, 0.0)
        zero.reason = reason
        return zero


def judge(ask: Callable[[], object], *, seconds: float | None = None) -> float:
    """The score that `ask` returns, in [0, 1]; :class:`Unscored` if it raises, takes longer or gives anything else."""
    late, started = True, time.monotonic()
    try:
        with time_limit(seconds):
            score: Any = ask()
            late = False
        # a scorer that catches everything goes on when its time is up
        if late or (seconds is not None and time.monotonic() - started > seconds):
            return Unscored(f"took longer than {seconds:g} s")
        if isinstance(score, Unscored):
            return score
        value = score.item() if getattr(score, "ndim", None) == 0 else score  # a scalar of numpy or torch
        if isinstance(value, (numbers.Real, Decimal)) and 0 <= float(value) <= 1:  # NaN is not
            return float(value)
        return Unscored(f"expected a score in [0, 1], got {score!r:.80}")
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        if type(error) is not SystemExit:  # the trainer's own, on a signal
            raise
        return Unscored("called exit()")
    except BaseException as error:  # those of extensions in Rust are no Exception
        return Unscored(f"raised {type(error).__name__}: {_text(error)}")


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error)[:200].split())
    except Exception as other:
        return f"(its text raised {type(other).__name__})"


def evaluates(scorer: Any) -> bool:
    """Whether a scorer of reasoning-gym runs the answer as Python or hands it to sympy, which does; True if unknown."""
    parts = getattr(scorer, "datasets", None)
    if isinstance(parts, dict):  # a composite asks the scorers of its parts
        return any(map(evaluates, parts.values()))
    try:
        source = inspect.getsource(type(scorer))
    except (OSError, TypeError):
        return True
    return re.search(r"\b(eval|exec|parse_expr|sympify)\(", source) is not None


def is_plain(answer: str) -> bool:
    """Whether evaluating an answer would do no more than arithmetic on numbers and symbols, or make a list.

    No calls but of mathematical functions, no attributes, no towers of powers, no repeated lists or strings.
    """
    if _CODE.search(answer) or (("*" in answer or "%" in answer) and re.search(r"""[][{},"']""", answer)):
        return False
    return all(name in _FUNCTIONS or keyword.iskeyword(name) for name in _CALL.findall(answer))


def is_nan(answer: str) -> bool:
    """Whether an answer is no number by its own words: "nan", "-NaN", "1 + nani"."""
    text = "".join(answer.split()).casefold().strip("()")
    if "nan" not in text:
        return False
    try:
        return cmath.isnan(complex(text.replace("i", "j")))
    except ValueError:
        return False


def same_answer(answer: str, right: str) -> bool:
    """Whether two answers are one, up to case, or as numbers to 1e-4."""
    if answer.strip().casefold() == right.strip().casefold():
        return True
    try:
        return abs(Fraction(answer.strip()) - Fraction(right.strip())) <= Fraction(1, 10_000)
    except (ValueError, ZeroDivisionError):
        return False


class _OutOfTime(BaseException):
    """Not an Exception: scorers catch those."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """What stands within is left after so many seconds, where the interpreter can be stopped: in its main thread."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
