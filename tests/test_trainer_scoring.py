"""Whatever a scorer does, a run goes on: scorers in processes of their own, and in the trainer's."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from entropy_kernels.trainer.scoring import Source, Unscored, judge, parameters_of, time_limit
from entropy_kernels.trainer.workers import Inside, Question, Workers

REWARD = """
import ctypes, os, signal, sys, threading, time
HOME = os.getcwd()

def hang():
    while True:
        try:
            while True: pass
        except BaseException: pass

def grow():
    kept = []
    while True: kept.append(bytearray(1 << 24))

def close():
    os.close(1), os.close(2), sys.stdout.close()

def die_later():
    threading.Timer(0.05, os._exit, (1,)).start()

def end_a_child():
    (there, here), child = os.pipe(), os.fork()
    while not child: os.write(here, b"x"), time.sleep(1000)
    os.read(there, 1)
    os.kill(child, 15)
    return float(os.waitpid(child, 0)[1] == 15)

ACTIONS = {
    "is told to end": lambda: os.kill(os.getpid(), 15) or 0.25, "ends a child": end_a_child,
    "raises": lambda: 1 / 0, "hangs": hang, "hangs in C": lambda: ctypes.PyDLL(None).sleep(1000),
    "sleeps": lambda: time.sleep(1000), "exits": lambda: os._exit(3), "calls exit": sys.exit,
    "crashes": lambda: ctypes.string_at(0), "interrupts": lambda: os.kill(os.getpid(), 2), "grows": grow,
    "none": lambda: None, "text": lambda: "yes", "nan": lambda: float("nan"), "list": lambda: [1.0],
    "closes files": lambda: os.closerange(3, 100), "prints": lambda: print("x" * 1_000_000) or 0.25,
    "moves": lambda: os.chdir("/") or 0.25, "closes": lambda: close() or 0.25,
    "dies later": lambda: die_later() or 0.25, "forks": lambda: 0.25 if os.fork() == 0 else time.sleep(0.1) or 0.75,
    "sets an alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 0.05) and 0.25,
    "outlives it": lambda: time.sleep(0.1) or 1,
    "large": lambda: 1e300,
    "at home": lambda: float(os.getcwd() == HOME), "torch": lambda: float("torch" in sys.modules),
    "wrong": lambda: -1.5, "right": lambda: 1,
}

def reward(completion, answer=None):
    return ACTIONS[completion]()
"""
#: What the scorer does -> the end of the reason, or the score.
CONTAINED = {
    "raises": "raised ZeroDivisionError: division by zero",
    "hangs": "took longer than 1 s",
    "hangs in C": "took longer than 1 s",
    "sleeps": "took longer than 1 s",
    "exits": "ended its process (exit code 3)",
    "calls exit": "called exit()",
    "crashes": "ended its process (SIGSEGV)",
    "interrupts": "raised KeyboardInterrupt",
    "grows": "raised MemoryError",
    "none": "expected a finite number (at most 1e+15) as score, got None",
    "text": "expected a finite number (at most 1e+15) as score, got 'yes'",
    "nan": "expected a finite number (at most 1e+15) as score, got nan",
    "list": "expected a finite number (at most 1e+15) as score, got [1.0]",
    "large": "expected a finite number (at most 1e+15) as score, got 1e+300",
    "is told to end": 0.25,  # as all processes of a job are: the trainer finishes its step first
    "ends a child": 1.0,
    "closes files": "ended its process (exit code 0)",
    "forks": 0.75,
    "sets an alarm": 0.25,
    "outlives it": 1.0,
    "prints": 0.25,
    "moves": 0.25,
    "at home": 1.0,
    "torch": 0.0,
    "closes": 0.25,
    "wrong": -1.5,
    "right": 1.0,
}


def question(completion: str) -> Question:
    return (), {"completion": completion}


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("user") / "reward.py"
    path.write_text(REWARD)
    return Source(str(path), "reward", argument="reward")


@pytest.fixture
def workers(reward: Source) -> Iterator[Workers]:
    made = Workers(reward, count=1, seconds=1.0, memory=200 << 20)
    yield made
    made.close()


def pids(workers: Workers) -> list[int]:
    return [worker._process.pid for worker in workers._workers]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_until_gone(pid: int) -> None:
    while not is_gone(pid):
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_scorer_may_do(reward: Source, count: int) -> None:
    asked = [name for action in CONTAINED for name in (action, "right")]
    workers = Workers(reward, count=count, seconds=1.0, memory=200 << 20)
    try:
        scores = workers.ask([question(name) for name in asked])
        ended = pids(workers)
    finally:
        workers.close()
    found = {name: getattr(score, "reason", score) for name, score in zip(asked, scores, strict=True)}
    found["grows"] = "raised MemoryError" if scores[asked.index("grows")].late else found["grows"]  # type: ignore
    assert found == CONTAINED
    assert scores[1::2] == [1.0] * len(CONTAINED), "the answer after it was judged as ever"
    late = [name for name, score in zip(asked, scores, strict=True) if isinstance(score, Unscored) and score.late]
    assert set(late) - {"grows"} == {"hangs", "hangs in C", "sleeps"}
    assert all(map(is_gone, ended))


def test_a_process_that_ends_while_it_waits_is_replaced(workers: Workers) -> None:
    assert workers.ask([question("dies later")]) == [0.25]
    (pid,) = pids(workers)
    wait_until_gone(pid)
    scores = workers.ask([question("right")])
    assert scores == [1.0] and pids(workers) != [pid]


def test_what_a_scorer_has_started_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(
        "import subprocess\ndef reward(completion):\n    return subprocess.Popen(['sleep', '1000']).pid\n"
    )
    workers = Workers(Source(str(tmp_path / "starts.py"), "reward"), count=1, seconds=30)
    (pid,) = workers.ask([question("")])
    assert not is_gone(int(pid))
    workers.close()
    wait_until_gone(int(pid))


UNGUARDED = """
import sys
from entropy_kernels.trainer.scoring import Source
from entropy_kernels.trainer.workers import Workers
workers = Workers(Source(sys.argv[1], "reward"), count=1, seconds=1000)
assert workers.ask([((), {"completion": "right"})]) == [1.0]
print(workers._workers[0]._process.pid, flush=True)
workers.ask([((), {"completion": "hangs in C"})])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's signal at the parent's death")
def test_no_scorer_outlives_a_trainer_that_is_killed(reward: Source) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", UNGUARDED, reward.place], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    time.sleep(0.1)
    assert not is_gone(pid)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_until_gone(pid)


def test_questions_that_cannot_be_sent(workers: Workers) -> None:
    scores = workers.ask([((), {"completion": "right", "answer": lambda: 0}), question("right")])
    assert scores == [0.0, 1.0] and "cannot be sent to the scorer's process" in scores[0].reason  # type: ignore


def test_scorers_that_cannot_be_imported(tmp_path: Path, reward: Source) -> None:
    cases = {
        "x = (": r"reward: .*got \S*user\.py:reward \(SyntaxError: '\(' was never closed \(user\.py, line 1\)\)$",
        "import nosuch": r"\(ModuleNotFoundError: No module named 'nosuch'\)$",
        "import os; os._exit(7)": r"\(ended its process \(exit code 7\)\)$",
        "exit()": r"\(SystemExit: None\)$",
        "raise ValueError('a\\nb')": r"\(ValueError: a b\)$",
        "def rewrad(): pass": r"\(AttributeError: it has no reward; did you mean rewrad\?\)$",
    }
    for number, (text, message) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "user.py"
        path.write_text(text)
        workers = Workers(Source(str(path), "reward", argument="reward"), count=1, seconds=1)
        with pytest.raises(ValueError, match=message):
            workers.parameters()
        workers.close()


def test_a_scorer_that_is_lost_on_the_way_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "user.py"
    path.write_text("import os\ndef reward(completion):\n    os._exit(0)\n")
    workers = Workers(Source(str(path), "reward", argument="reward"), count=1, seconds=10)
    workers.parameters()
    path.write_text("def reward(")
    with pytest.raises(ValueError, match=r"reward: expected .* that can be imported, got .*SyntaxError"):
        workers.ask([question("")] * 2)
    workers.close()


def test_a_file_imports_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("right = 1.0\n")
    (tmp_path / "user.py").write_text("import beside_it\ndef reward(completion):\n    return beside_it.right\n")
    workers = Workers(Source(str(tmp_path / "user.py"), "reward"), count=1, seconds=10)
    assert workers.ask([question("")]) == [1.0]
    workers.close()


def numpy_state() -> str:
    return repr(np.random.get_bit_generator().state["state"]["key"].tolist())


def test_draws_of_a_scorer_are_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "draws.py").write_text(
        "import random\ndef reward(completion):\n    import numpy\n"
        "    return random.random() + numpy.random.random() + numpy.random.normal()\n"
    )
    source, found = Source(str(tmp_path / "draws.py"), "reward"), []
    state = random.getstate(), numpy_state()
    for scorers in (*(Workers(source, count=count, seconds=10) for count in (1, 3)), Inside(source.make(), seconds=10)):
        found.append(scorers.ask([question("")] * 6))
        scorers.close()
    assert found[0] == found[1] == found[2] and len({*found[0]}) == 1
    assert state == (random.getstate(), numpy_state())


def test_draws_from_torch_are_a_scorers_own() -> None:
    before = torch.get_rng_state()
    scores = Inside(lambda: float(torch.rand(())), seconds=None).ask([((), {})] * 2)
    assert scores[0] == scores[1] and torch.equal(torch.get_rng_state(), before)


# --- in the trainer's process -----------------------------------------------------------------------------------------


def stubborn() -> float:
    """Catches two interruptions."""
    for _ in range(2):
        with suppress(BaseException):
            time.sleep(1000)
    time.sleep(1000)
    return 1.0


def test_a_scorer_is_interrupted_until_it_gives_up() -> None:
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    scores = Inside(lambda ask: ask(), seconds=0.1).ask([((ask,), {}) for ask in (stubborn, lambda: 1.0)])
    assert [getattr(score, "reason", score) for score in scores] == ["took longer than 0.1 s", 1.0]
    assert scores[0].late  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGALRM) is handler and bool(signal.getitimer(signal.ITIMER_REAL)[0]) == bool(
        timer[0]
    )


def test_another_timer_goes_on() -> None:
    came: list[bool] = []
    before, timer = signal.signal(signal.SIGALRM, lambda *_: came.append(True)), signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        with time_limit(0.05):
            time.sleep(10)
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] < 100 and not came
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # the suite's own limit


def test_a_scorer_does_not_move_the_trainer(tmp_path: Path) -> None:
    home = os.getcwd()
    assert judge(lambda: os.chdir(tmp_path) or 1.0) == 1.0
    assert os.getcwd() == home


def test_parameters_of_functions() -> None:
    def named(prompt: str, completion: str, answer: str, *, weight: float = 1.0, **others: object) -> float:
        return 0.0

    async def later(completion: str) -> float:
        return 0.0

    async def parts(completion: str) -> Any:
        yield 0.0

    class Later:
        async def __call__(self, completion: str) -> float:
            return 0.0

    found = parameters_of(named)
    assert (found.required, found.optional, found.others) == (("prompt", "completion", "answer"), ("weight",), True)
    assert found.problem is None
    for function, problem in (
        (later, "an async function"),
        (functools.partial(later), "an async function"),
        (Later(), "an async function"),
        (parts, "a generator function"),
        (lambda completion: (yield), "a generator function"),
        (lambda completions, **kwargs: [], "a function of lists"),
        (dict, "which is no function"),
        (3, "a int, which is no function"),
        (lambda completion, /: 0.0, "have no name"),
    ):
        assert problem in (parameters_of(function).problem or "")
