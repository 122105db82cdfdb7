"""Scorers that come with the trainer. A process that imports nothing else of this package may run this file.

``--reward exact``, ``--reward math_verify``, and reasoning-gym's with what they must not be asked.
"""

from __future__ import annotations

import cmath
import inspect
import keyword
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any


def extract_answer(completion: str) -> str:
    """The text of the first ``<answer>`` element, or the last non-empty line where there is none."""
    if "<answer>" in completion:
        return completion.split("<answer>", 1)[1].split("</answer>", 1)[0].strip()
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def exact_reward() -> Callable[..., float]:
    """1 if the completion's answer (:func:`extract_answer`) is the field ``answer``, else 0."""

    def exact(completion: str, answer: Any) -> float:
        return float(extract_answer(completion) == str(answer).strip())

    return exact


def math_verify_reward() -> Callable[..., float]:
    """1 if the completion's answer is mathematically the field ``answer``, or else ``solution``, by math-verify.

    A right answer in which math-verify finds none is a ValueError.
    """
    from math_verify import parse, verify

    def math_verify(completion: str, answer: Any = None, solution: Any = None) -> float:
        right = str(solution if answer is None else answer)
        # without its own limits, which are signals: time is kept by who asks
        found = parse(right, parsing_timeout=None) or parse(f"${right}$", parsing_timeout=None)
        if not found:
            raise ValueError(f"math-verify finds no answer in {right!r:.80}")
        return float(verify(found, parse(completion, parsing_timeout=None), timeout_seconds=None))

    math_verify.one_of = ("answer", "solution")  # type: ignore[attr-defined]
    math_verify("$1$", answer="$1$")  # what it reads at first costs no answer its time
    return math_verify


#: The rewards that --reward knows by name, and what has to be installed for them.
REWARDS = {"exact": None, "math_verify": "math_verify"}


class ReasoningGymScorer:
    """The scorer of a dataset of reasoning-gym, asked only what it can be asked."""

    def __init__(self, dataset: str, options: dict[str, Any]) -> None:
        import reasoning_gym

        self._scorer: Any = reasoning_gym.create_dataset(dataset, size=1, seed=0, **options)
        self._evaluates = evaluates(self._scorer)

    def verify(self, entry: Any, completion: str) -> Any:
        """The score that reasoning-gym's scorer gives the answer in a completion.

        ValueError for an answer that it must not see: what it would evaluate has to be plain arithmetic, as some run
        what the model wrote as Python. A full score that it gives to nonsense as well is 0.
        """
        answer = extract_answer(completion)
        right = entry.get("answer") if isinstance(entry, dict) else None
        if answer == right:
            return self._scorer.score_answer(answer=answer, entry=entry)
        if self._evaluates and not is_plain(answer):
            raise ValueError("no plain arithmetic, and the scorer would evaluate it")
        if is_nan(answer):
            raise ValueError("no number")
        score = self._scorer.score_answer(answer=answer, entry=entry)
        if isinstance(right, str) and isinstance(score, (int, float)) and score >= 1 and not same_answer(answer, right):
            # some take all that is not "yes" for a no, or the first digit of a number for the whole
            for nonsense in {"~", "0"} - {answer}:
                if not same_answer(nonsense, right) and self._scorer.score_answer(answer=nonsense, entry=entry) >= 1:
                    return 0.0
            if answer in ("~", "0"):
                return 0.0
        return score


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
