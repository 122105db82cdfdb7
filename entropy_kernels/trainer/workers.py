"""Who asks a task's scorer: this process, or processes of their own, so that nothing that a scorer does harms a run.

No fork of the trainer (it has threads, and maybe CUDA), and no second import of the user's program: the processes run
scoring.py, and import the scorer by its name.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Pipe, wait
from typing import TYPE_CHECKING, Any, Protocol

from entropy_kernels.trainer import scoring
from entropy_kernels.trainer.scoring import Parameters, Source, Unscored, described, draws_apart, judge, too_late
from entropy_kernels.trainer.tasks import SEED_STRIDE, Prompt, Task, prompts_of

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig

#: Seconds that a scorer may take to be imported, and how often in a row it may fail to.
LOADING, ATTEMPTS = 120.0, 3
#: Of the machine's memory, the part that a process may have.
SHARE = 0.5

#: What a scorer is called with: in order, and by name.
Question = tuple[tuple[Any, ...], dict[str, Any]]


class Scorers(Protocol):
    """What is asked for scores."""

    def parameters(self) -> Parameters:
        """What the scorer takes; ValueError if it cannot be had, with the reason."""
        ...

    def close(self) -> None:
        """Nothing is asked any more."""

    def ask(self, questions: Sequence[Question]) -> list[float]:
        """The scores, in order: finite numbers, :class:`Unscored` where there is none."""
        ...


class Inside:
    """This process: for objects that exist here only, and for a debugger."""

    def __init__(self, scorer: Any, *, seconds: float | None) -> None:
        self._scorer, self._seconds = scorer, seconds

    def parameters(self) -> Parameters:
        return scoring.parameters_of(self._scorer)

    def ask(self, questions: Sequence[Question]) -> list[float]:
        with draws_apart():
            return [judge(partial(self._scorer, *args, **named), seconds=self._seconds) for args, named in questions]

    def close(self) -> None:
        pass


class Workers:
    """Processes that have imported the scorer. One that takes too long is killed, and one that ends is replaced.

    Parameters
    ----------
    source : Source
    count : int
        Of processes; they start when there is something to ask.
    seconds : float
        Longest time of an answer's score.
    memory : int, optional
        Bytes that each may have; None: half of the machine's.
    """

    def __init__(self, source: Source, *, count: int, seconds: float, memory: int | None = None) -> None:
        self._source, self._count, self._seconds = source, count, seconds
        self._memory = memory or int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        self._workers: list[_Worker] = []
        self._parameters: Parameters | None = None
        self._failed = 0  # starts in a row

    def parameters(self) -> Parameters:
        while self._parameters is None:
            if not self._workers:
                self._workers.append(_Worker(self._source, self._memory))
            self._hear({})
        return self._parameters

    def ask(self, questions: Sequence[Question]) -> list[float]:
        waiting: deque[tuple[int, bytes]] = deque()
        scores: dict[int, float] = {}
        for number, question in enumerate(questions):
            try:
                waiting.append((number, pickle.dumps(question)))
            except Exception as error:  # whatever the user's objects do
                scores[number] = Unscored(f"cannot be sent to the scorer's process ({described(error)})")
        while len(scores) < len(questions):
            self._workers = [worker for worker in self._workers if not worker.gone]
            asked = sum(worker.question is not None for worker in self._workers)
            while waiting and len(self._workers) < min(self._count, len(waiting) + asked):
                self._workers.append(_Worker(self._source, self._memory, waiting[0][1]))
            for worker in self._workers:
                if worker.free and waiting:
                    worker.put(*waiting.popleft(), self._seconds)
            self._hear(scores)
        return [scores[number] for number in range(len(questions))]

    def close(self) -> None:
        """End all processes, with what they have started."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _hear(self, scores: dict[int, float]) -> None:
        """Wait for the next word of a worker, or the end of its time; what it says about a question is a score."""
        busy = [worker for worker in self._workers if not worker.free]
        wait([worker.connection for worker in busy], min((worker.left for worker in busy), default=0))
        for worker in busy:
            number, said = worker.question, worker.take()
            if said is None:
                continue
            if isinstance(said, Parameters):
                self._parameters, self._failed = said, 0
            elif number is not None:
                scores[number] = said
            elif isinstance(said, Unscored):
                self._failed += 1
                if self._parameters is None or self._failed >= ATTEMPTS:
                    raise self._source.refused(said.reason)
            if worker.over:
                self._workers.remove(worker)


class _Worker:
    """A process, and what it is at: it starts, waits for a question, or is at one until its time is up."""

    def __init__(self, source: Source, memory: int, sample: bytes = b"") -> None:
        self.connection, theirs = Pipe()
        self.question: int | None = None
        self.free = self.over = False
        self._seconds, self._until = LOADING, time.monotonic() + LOADING
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, scoring.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what a scorer prints would tear the bars
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's; and its group is what it has started
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", **os.environ},
            )
        place = (source.place, source.name, source.options)
        with suppress(OSError):  # it has ended already, which take() finds
            self.connection.send_bytes(pickle.dumps((place, sys.path, memory, os.getpid(), sample)))

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._until - time.monotonic())

    @property
    def gone(self) -> bool:
        """Whether it ended while it waited, which is the fault of no answer."""
        if self.free and self.connection.poll():
            self.end()
        return self.over

    def put(self, number: int, question: bytes, seconds: float) -> None:
        """Ask a question."""
        self.free, self.question = False, number
        self._seconds, self._until = seconds, time.monotonic() + seconds
        with suppress(OSError):
            self.connection.send_bytes(question)

    def take(self) -> float | Parameters | None:
        """A score, or what the scorer takes, once it has begun; Unscored if its time is up or it has ended; None: it is
        still at it."""
        try:
            if not self.connection.poll():
                return None if self.left else self.end(too_late(self._seconds))
            said = self.connection.recv()
        except Exception:  # its end, or no message of ours
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            return self.end(Unscored(f"ended its process ({_ending(self._process.poll())})"))
        self.free, self.question = True, None
        if isinstance(said, float):
            return said
        word, more = said
        if word == "ready":
            return Parameters(**more)
        return self.end(Unscored(more)) if word == "failed" else Unscored(word, more)

    def end(self, why: Unscored | None = None) -> Unscored | None:
        """Kill the process, with what it has started."""
        if self.over:
            return why
        self.over = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        return why


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


# --- rewards ----------------------------------------------------------------------------------------------------------


@contextmanager
def asked(task: Task, config: TrainerConfig) -> Iterator[None]:
    """Within: the task's scorer can be asked for scores, by processes of its own if it has a name; they end with this.

    Raises, with the reason, if it cannot, or if the task has no prompts or others than a model can be shown.
    """
    seconds = min(config.scoring_seconds, task.scoring_seconds or math.inf)
    some = prompts_of(task, config.prompts_per_step, seed=config.seed * SEED_STRIDE, split="train")
    prompts_of(task, 1, seed=0, split="validation")
    if task._source is None or not config.scoring_workers:
        task._scorers = Inside(task._scorer(), seconds=seconds)
    else:
        task._scorers = Workers(task._source, count=config.scoring_workers, seconds=seconds)
        try:
            pickle.dumps(some[0])
        except Exception as error:
            raise ValueError(
                f"task: expected prompts that can be sent to another process (pickled), got {described(error)} from "
                f"{task.name}; with scoring_workers = 0 there is none"
            ) from error
    try:
        task._begin(task._scorers)
        yield
    finally:
        task._scorers.close()
        task._scorers = None


def verify_all(
    task: Task, prompts: Sequence[Prompt], completions: Sequence[str], *, partial_credit: bool = False
) -> list[float]:
    """Rewards of completions, by their scores: see :func:`scores_of`."""
    return [reward_of(score, partial_credit) for score in scores_of(task, prompts, completions)]


def scores_of(task: Task, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """What the task's verifier says of completions; completion i belongs to prompt i // (completions per prompt).

    A verifier that raises, hangs or returns no finite number does not end the run: the score is :class:`Unscored`
    then. Outside of :func:`asked` it is asked in this process, without a limit on the time.
    """
    if not prompts or len(completions) % len(prompts):
        raise ValueError(f"completions: expected a multiple of {len(prompts)} prompts, got {len(completions)}")
    per_prompt = len(completions) // len(prompts)
    questions = [task._question(prompts[i // per_prompt], text) for i, text in enumerate(completions)]
    scorers = task._scorers or Inside(task._scorer(), seconds=None)
    return list(scorers.ask(questions))


#: What a score, and so a reward, has to be for a completion to count as right.
RIGHT = 1.0


def reward_of(score: float, partial_credit: bool) -> float:
    """The reward for a score: 1 for a full one (1 or more), else 0; under `partial_credit` the score itself."""
    return score if partial_credit or isinstance(score, Unscored) else float(score >= RIGHT)
