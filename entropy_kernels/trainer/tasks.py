"""Tasks with exact verifiers: the protocol, the embedded walk, and an adapter for reasoning-gym.

A task hands out prompts from a seed and says whether a completion is right. Both are text, so that any tokenizer and
any model can be put between them. Asking a verifier that is somebody else's about answers that a model wrote stands at
the end: whatever happens, there is a reward (:func:`judge`).
"""

from __future__ import annotations

import ast
import cmath
import inspect
import keyword
import numbers
import random
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl

from entropy_kernels._require import require

Split = Literal["train", "validation"]

#: Longest time that an answer's score may take.
SCORING_SECONDS = 1.0


@dataclass(frozen=True)
class Prompt:
    """What the model is shown, and whatever the verifier needs to know about it."""

    text: str
    data: Any = None


class Task(Protocol):
    """What the trainer asks of a task."""

    name: str
    max_new_tokens: int
    #: True: completions end at `max_new_tokens` only, there is no end-of-sequence token to learn.
    fixed_length: bool
    #: False: a reward is 0 or 1. The trainer sets it from its configuration.
    partial_credit: bool

    def prompts(self, count: int, *, seed: int, split: Split) -> list[Prompt]:
        """`count` prompts; the same seed and split give the same prompts, and the two splits share none."""
        ...

    def verify(self, prompt: Prompt, completion: str) -> float:
        """Reward of a completion, in [0, 1]; 1 is right."""
        ...

    def demonstrations(self, count: int, *, seed: int, wrong_fraction: float) -> list[tuple[str, str]]:
        """`count` pairs of prompt and completion for the supervised start, from the training split."""
        ...

    def words(self) -> list[str] | None:
        """The words of a word-level tokenizer that covers the task, or None if the task needs a general one."""
        ...


class WalkTask:
    """Walk from S to T in four moves, writing down the value after each of the first three.

    Prompt ``"12 57"``; ``"x3 36 +8 44 -2 42 +15"`` is one right completion. All values stay in 0..99. The reward is 1
    if each move is legal, each written value is right and the last move lands on T. A prompt has many right answers
    (dozens, typically), so a policy that keeps one of them keeps its pass@1 and loses its pass@k.

    Pairs (S, T) are split by a hash of the pair; 1/8 of them are held out for validation.

    Parameters
    ----------
    goals : str
        ``LOW-HIGH``: the values that T may have.
    without : str
        Moves that are not allowed, ``x2,x3``. Words, and with them model and tokenizer, are those of all moves.
    """

    name = "walk"
    max_new_tokens = 7
    fixed_length = True
    partial_credit = False
    moves = ("+1", "+3", "+8", "+15", "-2", "-6", "x2", "x3")
    limit = 100
    held_out = 8

    def __init__(self, *, goals: str = "0-99", without: str = "") -> None:
        banned = [move for move in without.split(",") if move]
        self.allowed = tuple(move for move in self.moves if move not in banned)
        # successors[v]: the legal moves from v, with the values they lead to
        self.successors: list[list[tuple[str, int]]] = [
            [(move, after) for move in self.allowed if 0 <= (after := self.apply(value, move)) < self.limit]
            for value in range(self.limit)
        ]
        if not {*banned} <= {*self.moves} or not all(self.successors):
            raise ValueError(
                f"task: expected without=MOVES, some of {','.join(self.moves)} but so that every value keeps one, got "
                f"without={without}"
            )
        low, _, high = goals.partition("-")
        self.goals = range(int(low), int(high) + 1) if low.isdecimal() and high.isdecimal() else range(0)
        if len({split for split, pair in self._pairs()}) < 2:
            raise ValueError(
                f"task: expected goals=LOW-HIGH within 0-{self.limit - 1} that walks lead to, in training and in "
                f"validation, got goals={goals}"
            )

    def _pairs(self) -> Iterator[tuple[Split, tuple[int, int]]]:
        """All pairs of a start and a goal that four moves lead to, with their splits."""
        for start in range(self.limit):
            ends = {start}
            for _ in range(4):
                ends = {after for value in ends for _, after in self.successors[value]}
            yield from ((self.split_of(start, goal), (start, goal)) for goal in sorted(ends) if goal in self.goals)

    @staticmethod
    def apply(value: int, move: str) -> int:
        """The value after a move."""
        amount = int(move[1:])
        return value * amount if move[0] == "x" else value + (amount if move[0] == "+" else -amount)

    def split_of(self, start: int, goal: int) -> Split:
        """Where a pair belongs; crc32, because Python's hash may change between versions."""
        return "validation" if zlib.crc32(f"{start} {goal}".encode()) % self.held_out == 0 else "train"

    def prompts(self, count: int, *, seed: int, split: Split) -> list[Prompt]:
        """Pairs whose goal is the end of a random walk from the start, so that each has an answer."""
        rng = random.Random(f"walk prompts {split} {seed}")
        found: list[Prompt] = []
        while len(found) < count:
            start = rng.randrange(self.limit)
            _, goal = self._walk(rng, start)
            if goal in self.goals and self.split_of(start, goal) == split:
                found.append(Prompt(f"{start} {goal}", (start, goal)))
        return found

    def verify(self, prompt: Prompt, completion: str) -> float:
        """1.0 if the completion is four legal moves with the right values between them and ends on the goal."""
        value, goal = prompt.data
        words = completion.split()
        if len(words) != self.max_new_tokens:
            return 0.0
        for position in range(0, 7, 2):
            move = words[position]
            if move not in self.allowed:
                return 0.0
            value = self.apply(value, move)
            if not 0 <= value < self.limit:
                return 0.0
            if position < 6 and words[position + 1] != str(value):
                return 0.0
        return float(value == goal)

    def demonstrations(self, count: int, *, seed: int, wrong_fraction: float) -> list[tuple[str, str]]:
        """Random walks; a share of them, `wrong_fraction`, shows the goal of another walk in its prompt."""
        rng = random.Random(f"walk demonstrations {seed}")
        rows: list[tuple[int, int, str]] = []
        while len(rows) < count:
            start = rng.randrange(self.limit)
            words, goal = self._walk(rng, start)
            if goal in self.goals and self.split_of(start, goal) == "train":
                rows.append((start, goal, words))
        wrong = [i for i in range(count) if rng.random() < wrong_fraction]
        goals = [goal for _, goal, _ in rows]
        for i, j in zip(wrong, wrong[1:] + wrong[:1], strict=True):
            # the exchanged pair may fall into the held-out split; it then keeps its own goal
            if self.split_of(rows[i][0], rows[j][1]) == "train":
                goals[i] = rows[j][1]
        return [(f"{start} {goal}", words) for (start, _, words), goal in zip(rows, goals, strict=True)]

    def words(self) -> list[str]:
        """Values, then moves."""
        return [str(value) for value in range(self.limit)] + list(self.moves)

    def _walk(self, rng: random.Random, value: int) -> tuple[str, int]:
        words = []
        for step in range(4):
            choices = self.successors[value]
            move, value = choices[int(rng.random() * len(choices))]
            words.append(move)
            if step < 3:
                words.append(str(value))
        return " ".join(words), value


class ReasoningGymTask:
    """One of reasoning-gym's generators, with its own scorer.

    The answer is what stands between ``<answer>`` and ``</answer>``, or, if the model never opens the tag, its last
    line.

    Parameters
    ----------
    dataset : str
        Name of a reasoning-gym dataset, such as ``simple_equations``.
    max_new_tokens : int
        Longest completion.
    options : dict, optional
        Passed to the generator (its difficulty).

    Attributes
    ----------
    partial_credit : bool
        False: the reward is 1 for a full score, else 0. True: the score itself, with what the scorers give wrong
        answers for their form (0.01, 0.05, 0.1): a group of wrong answers then has a best one, and a normalised
        advantage is as large for it as for a right answer.
    """

    partial_credit = False
    fixed_length = False
    #: Distance between the seeds of two calls.
    stride = 1_000_000
    instruction = "Reply with only the answer, between <answer> and </answer>."

    def __init__(self, dataset: str, *, max_new_tokens: int = 24, options: dict[str, Any] | None = None) -> None:
        reasoning_gym: Any = require("reasoning_gym", "the reasoning_gym task", "smollm2")
        self.name = f"reasoning_gym:{dataset}"
        self.max_new_tokens = max_new_tokens
        self._dataset = dataset
        self._options = options or {}
        self._create = reasoning_gym.create_dataset
        try:
            self._scorer = self._create(dataset, size=1, seed=0, **self._options)
            self._evaluates = evaluates(self._scorer)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"task: expected reasoning_gym:NAME with a dataset of reasoning-gym, got {dataset!r}"
            ) from error
        except (TypeError, AssertionError) as error:
            raise ValueError(f"task: expected options that {dataset} has, got {self._options} ({error})") from error

    def prompts(self, count: int, *, seed: int, split: Split) -> list[Prompt]:
        """Generated problems. Item i of a dataset is made from seed + i, so the seeds of two calls keep a distance."""
        if count > self.stride:
            raise ValueError(f"count: expected at most {self.stride} problems at once, got {count}")
        first = (2 * seed + (split == "validation")) * self.stride
        entries = self._create(self._dataset, size=count, seed=first, **self._options)
        return [Prompt(f"{entry['question']}\n{self.instruction}", entry) for entry in entries]

    def verify(self, prompt: Prompt, completion: str) -> float:
        """1 for an answer to which reasoning-gym's scorer gives 1, else 0, or its score under `partial_credit`.

        An answer that the scorer cannot be asked about, raises at, or takes longer than a second for is
        :class:`Unscored`, which is 0. The time is limited in the main thread only. What a scorer would evaluate has to
        be plain arithmetic: some run what the model wrote as Python.
        """
        answer = extract_answer(completion)
        reward = judge(lambda: self._score(answer, prompt.data), seconds=SCORING_SECONDS)
        return reward if self.partial_credit or reward >= 1 or isinstance(reward, Unscored) else 0.0

    def _score(self, answer: str, entry: Any) -> Any:
        """What the scorer gives, but for answers that it must not see and for full scores that it gives to anything."""
        right = entry.get("answer") if isinstance(entry, dict) else None
        if answer == right:
            return self._scorer.score_answer(answer=answer, entry=entry)
        if self._evaluates and not is_plain(answer):
            return Unscored("is no plain arithmetic, and the scorer would evaluate it")
        if is_nan(answer):
            return Unscored("is no number")
        score = self._scorer.score_answer(answer=answer, entry=entry)
        if isinstance(right, str) and isinstance(score, (int, float)) and score >= 1 and not same_answer(answer, right):
            # some take all that is not "yes" for a no, or the first digit of a number for the whole
            for nonsense in {"~", "0"} - {answer}:
                if not same_answer(nonsense, right) and self._scorer.score_answer(answer=nonsense, entry=entry) >= 1:
                    return 0.0
            if answer in ("~", "0"):
                return 0.0
        return score

    def demonstrations(self, count: int, *, seed: int, wrong_fraction: float) -> list[tuple[str, str]]:
        """The generator's own answers in the format of the instruction; some of them exchanged between problems."""
        rng = random.Random(f"{self.name} demonstrations {seed}")
        prompts = self.prompts(count, seed=seed, split="train")
        answers = [str(prompt.data["answer"]) for prompt in prompts]
        wrong = [i for i in range(count) if rng.random() < wrong_fraction]
        shown = list(answers)
        for i, j in zip(wrong, wrong[1:] + wrong[:1], strict=True):
            shown[i] = answers[j]
        return [(prompt.text, f"<answer>{answer}</answer>") for prompt, answer in zip(prompts, shown, strict=True)]

    def words(self) -> None:
        """No small vocabulary covers these problems."""
        return


def extract_answer(completion: str) -> str:
    """The text of the first ``<answer>`` element, or the last non-empty line where there is none."""
    if "<answer>" in completion:
        return completion.split("<answer>", 1)[1].split("</answer>", 1)[0].strip()
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def make_task(name: str, *, max_new_tokens: int | None = None) -> Task:
    """The task of a name from the configuration.

    Raises ValueError for a name that is none, ImportError (naming the extra) where reasoning-gym is missing.
    """
    walk, _, query = name.partition("?")
    if walk == "walk":
        if max_new_tokens not in (None, WalkTask.max_new_tokens):
            raise ValueError(f"max_new_tokens: expected 7 (or none) for the task walk, got {max_new_tokens}")
        options = {key: str(value) for key, value in _pairs_of(query.replace("+", "%2B"))}
        if not options.keys() <= {"goals", "without"}:
            raise ValueError(f"task: expected walk?goals=LOW-HIGH&without=MOVES, or one of the two, got {name!r}")
        return WalkTask(**options)
    kind, _, dataset = name.partition(":")
    dataset, _, query = dataset.partition("?")
    if kind == "reasoning_gym" and dataset:
        return ReasoningGymTask(dataset, max_new_tokens=max_new_tokens or 24, options=task_options(query))
    raise ValueError(f"task: expected walk or reasoning_gym:NAME, got {name!r}")


def task_options(query: str) -> dict[str, Any]:
    """``key=value&key=value``; a value that is no Python literal is a string."""
    options = {}
    for key, value in _pairs_of(query):
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _pairs_of(query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"task: expected options as key=value&key=value after the ?, got {query!r}") from error


def verify_all(task: Task, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Rewards of completions; completion i belongs to prompt i // (completions per prompt).

    A verifier that raises, or returns no number in [0, 1], does not end the run: the reward is :class:`Unscored` then.
    """
    if not prompts or len(completions) % len(prompts):
        raise ValueError(f"completions: expected a multiple of {len(prompts)} prompts, got {len(completions)}")
    per_prompt = len(completions) // len(prompts)
    return [judge(partial(task.verify, prompts[i // per_prompt], text)) for i, text in enumerate(completions)]


# --- asking a verifier ------------------------------------------------------------------------------------------------

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
