"""A task made of data and a reward function: a file with a JSON object a line, and ``reward(prompt, completion, ...)``.

Each object has a ``prompt``, text or a list of chat messages; its other fields are the reward's. Everything is looked
at before anything is trained.
"""

from __future__ import annotations

import json
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_kernels._console import did_you_mean
from entropy_kernels._require import require_installed
from entropy_kernels.trainer import rewards
from entropy_kernels.trainer.scoring import Parameters, Source
from entropy_kernels.trainer.tasks import SEED_STRIDE, Prompt, Split, Task, Text, problem_of
from entropy_kernels.trainer.workers import Question, Scorers

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig

#: What a reward may be.
KINDS = f"file.py:FUNCTION, module:FUNCTION or one of {', '.join(rewards.REWARDS)}"
#: One prompt in so many is held out, where no file has those of the validation.
HELD_OUT = 8


def check_names(config: TrainerConfig) -> None:
    """Raise ValueError where data, reward and task do not go together."""
    if config.data is None:
        for name in ("reward", "eval_data"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name}: expected none without data (--data FILE), got {getattr(config, name)}")
    elif not isinstance(config.reward, str):
        raise ValueError(f"reward: expected {KINDS} beside data = {config.data}, got {config.reward or 'none'}")
    elif config.task != "walk":
        raise ValueError(f"task: expected none beside data, whose reward is {config.reward}, got {config.task!r}")


def data_task(config: TrainerConfig) -> DataTask:
    """The task of a configuration's data and reward; errors as of :func:`read_data` and :func:`reward_source`."""
    assert config.data is not None and config.reward is not None
    source, path = reward_source(config.reward), Path(config.data)
    rows = read_data(path, "data")
    if config.eval_data is not None:
        return DataTask(path.name, source, rows, read_data(Path(config.eval_data), "eval_data"))
    train, held = hold_out(rows)
    if not (train and held):
        raise ValueError(
            f"data: expected at least two different prompts, one of them to be held out, got one in {config.data}; "
            "--eval-data FILE has those of the validation"
        )
    task = DataTask(path.name, source, train, held)
    task.remark = (
        f"{len(held)} of the {len(rows)} prompts of {config.data} are held out for the validation (--eval-data FILE "
        "takes others)."
    )
    return task


def reward_source(name: str) -> Source:
    """Where a reward comes from. ValueError for a name that is none, ImportError where a package is missing."""
    if name in rewards.REWARDS:
        module = rewards.REWARDS[name]
        require_installed([module] if module else [], f"reward = {name}", "math")
        return Source(rewards.__file__, f"{name}_reward", {}, "reward")
    place, _, function = name.rpartition(":")
    if not (place and function):
        near = f"; did you mean {name}:FUNCTION?" if name.endswith(".py") else did_you_mean(name, rewards.REWARDS)
        raise ValueError(f"reward: expected {KINDS}, got {name!r}{near}")
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise FileNotFoundError(f"reward: expected a file, got {place}, which does not exist")
    return Source(place, function, argument="reward")


def inputs_of(config: TrainerConfig, task: Task, before: Any) -> dict[str, str]:
    """Checksums of the user's files that prompts and scores come from; a warning for each that was another `before`."""
    place = task._source.place if task._source is not None else ""
    own = place if place.endswith(".py") and place != rewards.__file__ else None
    names = [str(name) for name in (config.data, config.eval_data, own) if name is not None]
    found = {name: f"{zlib.crc32(Path(name).expanduser().read_bytes()):08x}" for name in names}
    for name, value in found.items():
        if isinstance(before, dict) and before.get(name, value) != value:
            told = f"{name} has changed since the run was last started: it goes on with what is there now"
            warnings.warn(told, stacklevel=2)
    return found


@dataclass(frozen=True)
class Row(Prompt):
    """A prompt with its fields, and where it stands."""

    place: str = ""


def read_data(path: Path, argument: str) -> list[Row]:
    """The rows of a file; ValueError or OSError, which name the line, for the first that is none."""
    expected = f"{argument}: expected a file with a JSON object on each line, got {path}"
    if path.is_dir():
        raise IsADirectoryError(f"{expected}, which is a folder")
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{expected}, which does not exist") from None
    except (OSError, ValueError) as error:
        raise OSError(f"{expected}, which cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            row = _row(line, number, place)
            if isinstance(row, str):
                raise ValueError(f"{argument}: {place}: {row}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{expected}, which is empty")
    return rows


def _row(line: bytes, number: int, place: str) -> Row | str:
    """Of a line; a text says what is wrong with it."""
    try:
        values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return f"expected UTF-8, got the byte {error.object[error.start]:#04x} at {error.start}"
    except json.JSONDecodeError as error:
        return f"expected a JSON object, whole on this line, got no JSON ({error.msg} at character {error.colno})"
    except ValueError as error:  # an integer of thousands of digits
        return f"expected a JSON object, got what cannot be read ({error})"
    except RecursionError:
        return "expected a JSON object, got one that is nested too deeply"
    if not isinstance(values, dict):
        return f"expected a JSON object with a prompt, one on each line, got a {type(values).__name__}"
    if "prompt" not in values:
        return f"expected the field prompt, got {', '.join(values) or 'no fields'}"
    text = values.pop("prompt")
    problem = problem_of(text)
    return Row(text, values, place) if problem is None else f"expected text or chat messages as prompt, got {problem}"


def hold_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows for training and validation, which share no prompt: split by a hash of it, so that it stays where it is
    when the file grows. None in one of the two only if there is one prompt."""
    hashes = [zlib.crc32(json.dumps(row.text).encode()) for row in rows]
    held = {value for value in hashes if value % HELD_OUT == 0}
    if not held or len(held) == len({*hashes}):
        held = {min(hashes)}
    if len({*hashes}) < 2:
        held = set()
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, value in zip(rows, hashes, strict=True):
        sides[value in held].append(row)
    return sides


class DataTask(Task):
    """Rows of data, and a reward.

    The steps of a run take their prompts one after the other from a sequence in which each row stands once before any
    stands a second time, and so on: epochs, each in an order of its own, drawn from the run's seed and the epoch's
    number. Which prompts a step gets follows from seed, step and number of prompts alone.
    """

    def __init__(self, name: str, source: Source, train: Sequence[Row], held: Sequence[Row]) -> None:
        self.name, self._source, self._rows, self._held = name, source, train, held
        self._names: frozenset[str] | None = None  # that the reward is called with; None: all
        self._order: tuple[str, list[int]] = ("", [])

    def prompts(self, count: int, *, seed: int, split: Split) -> list[Prompt]:
        """Of a step (training), or the first of an order that the seed gives (validation): each row once at most."""
        if split == "validation":
            return [self._held[i] for i in self._shuffled(f"validation {seed}", len(self._held))[:count]]
        run, step = divmod(seed, SEED_STRIDE)
        return [self._rows[i] for i in self._stream(run, step * count, count)]

    def known(self) -> Sequence[Prompt]:
        """All rows."""
        return [*self._rows, *self._held]

    def _stream(self, run: int, first: int, count: int) -> Iterator[int]:
        for position in range(first, first + count):
            epoch, place = divmod(position, len(self._rows))
            yield self._shuffled(f"run {run} epoch {epoch}", len(self._rows))[place]

    def _shuffled(self, seed: str, count: int) -> list[int]:
        if self._order[0] != seed:
            order = list(range(count))
            random.Random(seed).shuffle(order)
            self._order = (seed, order)
        return self._order[1]

    def _kinds(self) -> list[Text]:
        """Text, and chats by the roles of their turns."""
        return list({self._roles(row.text): row.text for row in (*self._rows, *self._held)}.values())

    @staticmethod
    def _roles(text: Text) -> tuple[str, ...]:
        return () if isinstance(text, str) else tuple(turn["role"] for turn in text)

    def verify(self, prompt: Prompt, completion: str) -> Any:
        """The reward's score, asked in this process."""
        args, named = self._question(prompt, completion)
        return self._scorer()(*args, **named)

    def _scorer(self) -> Callable[..., Any]:
        assert self._source is not None
        try:
            found: Callable[..., Any] = self._source.make()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._source.refused(error) from error
        return found

    def _question(self, prompt: Prompt, completion: str) -> Question:
        named = {**prompt.data, "prompt": prompt.text, "completion": completion}
        return (), named if self._names is None else {name: named[name] for name in named.keys() & self._names}

    def _begin(self, scorers: Scorers) -> None:
        """That every row has what the reward asks for."""
        takes = scorers.parameters()
        form = f"reward: expected reward(prompt, completion, **fields) -> float, got {self._source}"
        if takes.problem is not None:
            raise ValueError(f"{form}, {takes.problem}")
        self._names = None if takes.others else frozenset(takes.required + takes.optional)
        for row in (*self._rows, *self._held):
            if problem := self._problem(takes, row):
                raise ValueError(f"{form}, {problem}")

    @staticmethod
    def _problem(takes: Parameters, row: Row) -> str | None:
        lacking = [name for name in takes.required if name not in row.data and name not in ("prompt", "completion")]
        if lacking:
            has = ", ".join(row.data) or "none"
            return f"which names the field {lacking[0]}; of fields beside prompt {row.place}, has {has}"
        if takes.one_of and all(row.data.get(name) is None for name in takes.one_of):
            return f"which needs a field {' or '.join(takes.one_of)}; {row.place}, has none"
        if takes.others and "completion" in row.data:
            return f"which would get the field completion of {row.place}, in the place of the model's; rename it"
        return None
