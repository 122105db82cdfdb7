"""Tasks: what the trainer asks of one, the embedded walk, an adapter for reasoning-gym, and tasks by their names.

A task hands out prompts from a seed and says how good a completion is. Both are text, so that any tokenizer and any
model can be put between them. A file of data with a reward function is a task, too: data.py. Scores are asked for
through workers.py, since whatever a scorer does there has to be a reward.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import random
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args
from urllib.parse import parse_qsl

from entropy_kernels._console import did_you_mean
from entropy_kernels._require import require
from entropy_kernels.trainer import rewards
from entropy_kernels.trainer.rewards import ReasoningGymScorer
from entropy_kernels.trainer.scoring import Source, described, never_a_value

if TYPE_CHECKING:
    from entropy_kernels.trainer.workers import Question, Scorers

Split = Literal["train", "validation"]
#: What a model is shown: text, or chat messages with ``role`` and ``content``.
Text: TypeAlias = str | list[dict[str, str]]

#: Step k of a run has the seed ``config.seed * SEED_STRIDE + k``: under it prompts are asked for.
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Prompt:
    """What the model is shown, and whatever the verifier needs to know about it."""

    text: Text
    data: Any = None


class Task:
    """What the trainer asks of a task: derive from it, or have its two methods without a default, ``prompts`` and
    ``verify``.

    A task that is named (``--task module:Class``) is made once in each of the processes that ask ``verify``, so what it
    keeps for itself is not shared between these, nor with the one that ``prompts`` is asked of.
    """

    #: That of the class, if empty.
    name: str = ""
    #: Longest completion in tokens, unless the configuration has one.
    max_new_tokens: int = 256
    #: True: completions end at `max_new_tokens` only, there is no end-of-sequence token to learn.
    fixed_length: bool = False
    #: A limit of its own on the time of a score; the smaller of it and the configuration's counts.
    scoring_seconds: float | None = None
    #: What a user should know, said once.
    remark: str = ""

    #: How another process makes what it asks for scores; None: this object is asked, in the trainer's process.
    _source: Source | None = None
    #: By what the configuration names it; None: an object of the user's.
    _called: str | None = None
    #: Who asks, while a run lasts (:func:`asked`).
    _scorers: Scorers | None = None

    def prompts(self, count: int, *, seed: int, split: Split) -> list[Prompt]:
        """`count` prompts; the same seed and split give the same ones, and the two splits share none.

        Of ``validation`` it may be fewer, if there are no more.
        """
        raise NotImplementedError

    def verify(self, prompt: Prompt, completion: str) -> float:
        """Score of a completion, a finite number; 1 or more is right."""
        raise NotImplementedError

    def demonstrations(self, count: int, *, seed: int, wrong_fraction: float) -> list[tuple[str, str]]:
        """`count` pairs of prompt and completion for the supervised start, from the training split; none without."""
        return []

    def words(self) -> list[str] | None:
        """The words of a word-level tokenizer that covers the task, or None if the task needs a general one."""
        return None

    def known(self) -> Sequence[Prompt]:
        """All prompts, where they are not made as they are asked for: their lengths are looked at before training."""
        return ()

    def _scorer(self) -> Callable[..., Any]:
        """What is asked in this process."""
        return self.verify

    def _question(self, prompt: Prompt, completion: str) -> Question:
        """What the scorer is called with."""
        return (prompt, completion), {}

    def _kinds(self) -> list[Text]:
        """A prompt of each kind, which a model has to take; none where they are not known beforehand."""
        return []

    def _begin(self, scorers: Scorers) -> None:
        """Before anything is trained: ValueError, with the reason, if these cannot be asked."""


class _Completed(Task):
    """An object with some of the methods of a task; what it lacks is as in :class:`Task`."""

    def __init__(self, task: Any) -> None:
        self.name = type(task).__name__
        for name in (name for name in vars(Task) if name[0] != "_"):
            if hasattr(task, name):
                setattr(self, name, getattr(task, name))


#: How the methods of a task are called: as documented, and a call.
_CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "prompts": ("count, *, seed, split", (1,), {"seed": 0, "split": "train"}),
    "verify": ("prompt, completion", (Prompt(""), ""), {}),
    "demonstrations": ("count, *, seed, wrong_fraction", (1,), {"seed": 0, "wrong_fraction": 0.0}),
    "words": ("", (), {}),
}


def as_task(made: Any) -> Task:
    """The task that an object is, which has at least ``prompts`` and ``verify``; ValueError naming what is missing."""
    expected = "task: expected an object with the methods prompts and verify, got "
    if isinstance(made, type):
        raise ValueError(f"{expected}the class {made.__name__} and no object of it: {made.__name__}()")
    for name in ("prompts", "verify"):
        found = getattr(made, name, None)
        if not callable(found) or getattr(found, "__func__", None) is getattr(Task, name):
            raise ValueError(f"{expected}a {type(made).__name__} without {name}")
    task = made if isinstance(made, Task) else _Completed(made)
    task.name = str(task.name or type(task).__name__)
    longest, limit = task.max_new_tokens, task.scoring_seconds
    if type(longest) is not int or longest < 1:
        raise ValueError(f"task: expected max_new_tokens of {task.name} to be an integer >= 1, got {longest!r}")
    if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise ValueError(f"task: expected scoring_seconds of {task.name} to be a number > 0 or None, got {limit!r}")
    for name, (form, args, named) in _CALLS.items():
        if problem := never_a_value(getattr(task, name)) or _refuses(getattr(task, name), args, named):
            raise ValueError(f"task: expected a method {name}({form}) of {task.name}, got {problem}")
    return task


def _refuses(method: Any, args: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """Why something cannot be called like this; None if it can, or if that cannot be seen."""
    try:
        signature = inspect.signature(method)
    except (ValueError, TypeError):
        return None
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        return f"one with {signature} ({error})"
    return None


class WalkTask(Task):
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
        if not all(any(there == split for there, _ in self._pairs()) for split in get_args(Split)):
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


class ReasoningGymTask(Task):
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
    """

    scoring_seconds = 1.0
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
            self._asks = ReasoningGymScorer(dataset, self._options)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"task: expected reasoning_gym:NAME with a dataset of reasoning-gym, got {dataset!r}"
                + did_you_mean(dataset, _datasets())
            ) from error
        except (TypeError, AssertionError) as error:
            raise ValueError(f"task: expected options that {dataset} has, got {self._options} ({error})") from error
        self._source = Source(rewards.__file__, "ReasoningGymScorer", {"dataset": dataset, "options": self._options})

    def prompts(self, count: int, *, seed: int, split: Split) -> list[Prompt]:
        """Generated problems. Item i of a dataset is made from seed + i, so the seeds of two calls keep a distance."""
        if count > self.stride:
            raise ValueError(f"count: expected at most {self.stride} problems at once, got {count}")
        first = (2 * seed + (split == "validation")) * self.stride
        entries = self._create(self._dataset, size=count, seed=first, **self._options)
        return [Prompt(f"{entry['question']}\n{self.instruction}", entry) for entry in entries]

    def verify(self, prompt: Prompt, completion: str) -> Any:
        """Its scorer's score; see :class:`ReasoningGymScorer` for what that is not asked."""
        return self._asks.verify(prompt.data, completion)

    def _scorer(self) -> Callable[..., Any]:
        return self._asks.verify

    def _question(self, prompt: Prompt, completion: str) -> Question:
        return (prompt.data, completion), {}

    def demonstrations(self, count: int, *, seed: int, wrong_fraction: float) -> list[tuple[str, str]]:
        """The generator's own answers in the format of the instruction; some of them exchanged between problems."""
        rng = random.Random(f"{self.name} demonstrations {seed}")
        prompts = self.prompts(count, seed=seed, split="train")
        answers = [str(prompt.data["answer"]) for prompt in prompts]
        wrong = [i for i in range(count) if rng.random() < wrong_fraction]
        shown = list(answers)
        for i, j in zip(wrong, wrong[1:] + wrong[:1], strict=True):
            shown[i] = answers[j]
        return [(str(prompt.text), f"<answer>{answer}</answer>") for prompt, answer in zip(prompts, shown, strict=True)]


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
    place, colon, attribute = name.partition("?")[0].rpartition(":")
    if colon and place and attribute and kind != "reasoning_gym":
        return _users_task(Source(place, attribute, task_options(name.partition("?")[2])))
    raise ValueError(
        f"task: expected walk, reasoning_gym:NAME, module:CLASS or file.py:CLASS, got {name!r}{_near(name)}"
    )


def _users_task(source: Source) -> Task:
    """The task that a class or function of the user's makes."""
    if source.place.endswith(".py") and not Path(source.place).expanduser().is_file():
        raise FileNotFoundError(f"task: expected file.py:NAME, got {source}, where there is no such file")
    try:
        made = source.make()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module of the user's does
        raise ValueError(f"{source.refused(error)}{_near(str(source))}") from error
    task = as_task(made)
    task._source = source
    return task


def _near(name: str) -> str:
    """What was probably meant by the name of a task."""
    head, _, dataset = name.partition("?")[0].rpartition(":")
    known = {one: f"reasoning_gym:{one}" for one in _datasets()}
    known |= {"reasoning_gym": f"reasoning_gym:{dataset}"} if head else {"walk": "walk"}
    near = difflib.get_close_matches(head or name, known, 1)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _datasets() -> Iterable[str]:
    """Of reasoning-gym, where it is installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except (ImportError, AttributeError):
        return ()
    return DATASETS


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


def prompts_of(task: Task, count: int, *, seed: int, split: Split) -> list[Prompt]:
    """A task's prompts; ValueError for others than were asked for."""
    found = made_by(task, "prompts", count, seed=seed, split=split)
    strange = [prompt for prompt in found if not isinstance(prompt, Prompt)] if isinstance(found, list) else [found]
    if strange:
        within = " in it" * isinstance(found, list)
        raise ValueError(
            f"task: expected a list of Prompt from prompts of {task.name}, got a {type(strange[0]).__name__}{within}"
        )
    if len(found) != count and not (split == "validation" and 0 < len(found) < count):
        raise ValueError(f"task: expected {count} prompts for {split} from {task.name}, got {len(found)}")
    for prompt in found:
        if problem := problem_of(prompt.text):
            raise ValueError(f"task: expected prompts that are text or chat messages from {task.name}, got {problem}")
    return found


def demonstrations_of(task: Task, count: int, *, seed: int, wrong_fraction: float) -> list[tuple[Text, str]]:
    """A task's demonstrations; ValueError for others than were asked for."""
    found: list[tuple[Text, str]] = made_by(task, "demonstrations", count, seed=seed, wrong_fraction=wrong_fraction)
    expected = f"task: expected {count} demonstrations from {task.name}, pairs of prompt and completion, got "
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(expected + (f"{len(found)}" if isinstance(found, list) else f"a {type(found).__name__}"))
    for pair in found:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], str)) or problem_of(pair[0]):
            raise ValueError(f"{expected}{pair!r:.80}")
    return found


def made_by(task: Task, method: str, count: int, **named: Any) -> Any:
    """What a method of a task makes; ValueError, with the place in the user's file, if it raises."""
    try:
        return getattr(task, method)(count, **named)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ValueError(
            f"task: expected {count} {method} from {task.name}, got {described(error)} ({place})"
        ) from error


def problem_of(text: Any) -> str | None:
    """Why a model cannot be shown this; None if it can."""
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    if not messages:
        return "no messages"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"a message that is no object with a role: {message!r:.80}"
        content = message.get("content")
        if not isinstance(content, str):
            return f"a {type(content).__name__}: {content!r:.80}"
        for part in (content, message["role"]):
            if max(part, default="") >= "\ud800" and not _is_unicode(part):
                return f"text that is no Unicode (half a surrogate pair): {part!r:.80}"
    if not any(message["content"].strip() for message in messages):
        return "an empty one"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
