"""Tasks of the reference trainer: prompts, verifiers, options."""

from __future__ import annotations

import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from entropy_kernels.trainer import scoring
from entropy_kernels.trainer.rewards import extract_answer, is_plain
from entropy_kernels.trainer.scoring import Unscored, judge
from entropy_kernels.trainer.tasks import Prompt, Task, WalkTask, make_task, task_options
from entropy_kernels.trainer.workers import Inside, reward_of, verify_all

# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("x3 36 +8 44 -2 42 +15", 1.0),
        ("+15 27 +15 42 +8 50 +8", 0.0),  # ends on 58
        ("x3 36 +8 45 -2 43 +15", 0.0),  # 36 + 8 is not 45
        ("x3 36 +8 44 -2 42", 0.0),  # too short
        ("x3 36 +8 44 -2 42 +15 57", 0.0),  # too long
        ("x3 36 x3 108 -6 102 -6", 0.0),  # leaves 0..99
        ("36 x3 +8 44 -2 42 +15", 0.0),  # a value where a move belongs
        ("", 0.0),
    ],
)
def test_walk_verifier(completion: str, reward: float) -> None:
    assert WalkTask().verify(Prompt("12 57", (12, 57)), completion) == reward


def test_walk_prompts_are_solvable_seeded_and_split() -> None:
    task = WalkTask()
    train = task.prompts(200, seed=1, split="train")
    held = task.prompts(200, seed=1, split="validation")
    assert train == task.prompts(200, seed=1, split="train")
    assert train != task.prompts(200, seed=2, split="train")
    assert not {p.data for p in train} & {p.data for p in held}
    reachable = {}
    for prompt in (*train, *held):
        start, goal = prompt.data
        if start not in reachable:
            ends = {start}
            for _ in range(4):
                ends = {after for value in ends for _, after in task.successors[value]}
            reachable[start] = ends
        assert goal in reachable[start]


def test_walk_demonstrations_are_right_except_for_the_share_asked() -> None:
    task = WalkTask()

    def share_right(wrong_fraction: float) -> float:
        pairs = task.demonstrations(400, seed=0, wrong_fraction=wrong_fraction)
        prompts = [Prompt(p, tuple(map(int, p.split()))) for p, _ in pairs]
        assert all(task.split_of(*p.data) == "train" for p in prompts), "a held-out pair was shown"
        return sum(verify_all(task, prompts, [c for _, c in pairs])) / len(pairs)

    assert share_right(0.0) == 1.0
    assert 0.6 < share_right(0.3) < 0.8


def test_walks_with_other_goals_and_fewer_moves() -> None:
    task = make_task("walk?goals=50-60&without=x2,+15,-6")
    assert isinstance(task, WalkTask) and task.words() == WalkTask().words()
    for split in ("train", "validation"):
        assert all(50 <= prompt.data[1] <= 60 for prompt in task.prompts(40, seed=0, split=split))  # type: ignore
    for text, words in task.demonstrations(60, seed=0, wrong_fraction=0.0):
        start, goal = map(int, text.split())
        assert 50 <= goal <= 60 and task.verify(Prompt(text, (start, goal)), words) == 1
        assert not {"x2", "+15", "-6"} & {*words.split()}
    right = "x2 24 x2 48 +8 56 +1"
    assert (task.verify(Prompt("12 57", (12, 57)), right), WalkTask().verify(Prompt("12 57", (12, 57)), right)) == (
        0,
        1,
    )


def test_walk_without_options_is_the_walk() -> None:
    plain, spelled = WalkTask(), make_task("walk?goals=0-99")
    assert plain.prompts(50, seed=3, split="train") == spelled.prompts(50, seed=3, split="train")
    assert plain.demonstrations(50, seed=3, wrong_fraction=0.3) == spelled.demonstrations(
        50, seed=3, wrong_fraction=0.3
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("walk?goals=50", r"task: expected goals=LOW-HIGH within 0-99 .*got goals=50$"),
        ("walk?goals=70-60", r"got goals=70-60"),
        ("walk?goals=100-120", r"got goals=100-120"),
        ("walk?without=x4", r"task: expected without=MOVES, some of \+1,\+3,.*got without=x4"),
        ("walk?without=-2,-6,%2B1", r"so that every value keeps one, got without=-2,-6,\+1"),
        ("walk?moves=3", r"task: expected walk\?goals=LOW-HIGH&without=MOVES.*got 'walk\?moves=3'"),
        ("walk?goals", r"task: expected options as key=value&key=value after the \?, got 'goals'"),
        ("walking", r"task: expected walk, reasoning_gym:NAME, .*got 'walking'; did you mean walk\?"),
    ],
)
def test_walks_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name)


def test_extract_answer() -> None:
    assert extract_answer("so <answer> 42 </answer> done") == "42"
    assert extract_answer("<answer>42") == "42"
    assert extract_answer("first\n 7 \n") == "7"
    assert extract_answer("") == ""


def test_task_names() -> None:
    with pytest.raises(
        ValueError, match=r"task: expected walk, reasoning_gym:NAME, module:CLASS or file.py:CLASS, got 'chess'$"
    ):
        make_task("chess")
    with pytest.raises(ValueError, match=r"max_new_tokens: expected 7 .*got 9"):
        make_task("walk", max_new_tokens=9)


def test_task_options() -> None:
    assert task_options("") == {}
    assert task_options("max_terms=2&share=0.5&kind=plain&both=[1, 2]") == {
        "max_terms": 2,
        "share": 0.5,
        "kind": "plain",
        "both": [1, 2],
    }
    with pytest.raises(ValueError, match=r"task: expected options as key=value&key=value after the [?], got 'max'"):
        task_options("max")


def test_reasoning_gym_options() -> None:
    pytest.importorskip("reasoning_gym")
    easy = make_task("reasoning_gym:chain_sum?max_terms=2&min_digits=1&max_digits=1")
    assert all(abs(int(prompt.data["answer"])) <= 18 for prompt in easy.prompts(50, seed=0, split="train"))
    with pytest.raises(ValueError, match=r"task: expected options that chain_sum has, got .*max_turms"):
        make_task("reasoning_gym:chain_sum?max_turms=2")


def test_reasoning_gym_adapter() -> None:
    pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym:simple_equations")
    prompts = task.prompts(3, seed=0, split="train")
    for other in (task.prompts(3, seed=0, split="validation"), task.prompts(3, seed=1, split="train")):
        assert {p.text for p in prompts}.isdisjoint(p.text for p in other)
    for prompt, (text, completion) in zip(prompts, task.demonstrations(3, seed=0, wrong_fraction=0.0), strict=True):
        assert text == prompt.text
        assert task.verify(prompt, completion) == 1.0
        assert task.verify(prompt, "<answer>no number</answer>") < 1.0


class Scorer(list):
    """What reasoning-gym makes, with a scorer that evaluates the answer."""

    def score_answer(self, answer: str, entry: dict[str, str]) -> float:
        try:
            while answer == "ever":
                pass
            return float(eval(answer) == 5)
        except Exception:
            return 0.01


@pytest.fixture
def evaluating(monkeypatch: pytest.MonkeyPatch) -> None:
    gym = types.SimpleNamespace(create_dataset=lambda *_, **__: Scorer())
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)  # type: ignore[arg-type]


def asked(task: Task, completion: str, data: object, seconds: float | None = None) -> float:
    """The reward of one completion, asked in this process."""
    prompt = Prompt("", data)
    (score,) = Inside(task._scorer(), seconds=seconds).ask([task._question(prompt, completion)])
    return reward_of(score, partial_credit=False)


def test_an_answer_that_takes_for_ever_is_wrong(evaluating: None) -> None:
    task = make_task("reasoning_gym:products")
    handler, timed = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    late = asked(task, "ever", {}, 0.2)
    assert isinstance(late, Unscored) and late.late and late.reason == "took longer than 0.2 s"
    assert asked(task, "2 + 3", {}, 0.2) == 1.0
    assert asked(task, "2 +", {}, 0.2) == 0.0
    assert signal.getsignal(signal.SIGALRM) is handler and (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == timed
    with ThreadPoolExecutor() as pool:  # where no signal comes
        assert pool.submit(asked, task, "5", {}, 0.2).result() == 1.0


def test_a_scorer_that_goes_on_when_its_time_is_up_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 9.0])
    monkeypatch.setattr(scoring, "time", types.SimpleNamespace(monotonic=lambda: next(now, 9.0)))
    reward = judge(lambda: 1.0, seconds=5.0)
    assert isinstance(reward, Unscored) and reward.reason == "took longer than 5 s"


def test_what_the_model_wrote_is_not_run(evaluating: None) -> None:
    task = make_task("reasoning_gym:countdown")
    assert asked(task, "<answer>(1 + 9) / 2</answer>", {}) == 1.0
    for answer in ("9**9**9**9", "__import__('os').getpid() * 0 + 5", "len('12345')", "factorial(10**9)"):
        assert asked(task, f"<answer>{answer}</answer>", {}) == 0.0


# --- scorers that cannot be relied on --------------------------------------------------------------------------------


def scorer_giving(monkeypatch: pytest.MonkeyPatch, score: object) -> Task:
    """The task of a dataset whose scorer returns `score(answer)`, or raises or returns `score` itself."""

    class Dataset(list):
        def score_answer(self, answer: str, entry: dict[str, str]) -> object:
            if isinstance(score, BaseException):
                raise score
            return score(answer) if callable(score) else score

    gym = types.SimpleNamespace(create_dataset=lambda *_, **__: Dataset())
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)  # type: ignore[arg-type]
    return make_task("reasoning_gym:any")


class BadText(Exception):
    """Of which nobody can make a text."""

    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


@pytest.mark.parametrize(
    "score",
    [float("nan"), float("inf"), None, "1", "right", 10**400, torch.ones(2), [1.0], 1j, np.array("1"),
     Decimal("nan"), torch.tensor(float("nan")), type("PanicException", (BaseException,), {})("a\nb"), BadText(),
     BadText, ValueError("odd\nanswer"), KeyError(0), RecursionError(), MemoryError(), SystemExit(0), AssertionError()],
    ids=lambda score: type(score).__name__,
)  # fmt: skip
def test_a_scorer_that_fails_gives_no_reward_and_is_told(monkeypatch: pytest.MonkeyPatch, score: object) -> None:
    task = scorer_giving(monkeypatch, score)
    for reward in (asked(task, "5", {}), verify_all(task, [Prompt("", {})], ["5"])[0]):
        assert reward == 0.0 and isinstance(reward, Unscored) and reward.reason


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), type("Terminated", (SystemExit,), {})(143)])
def test_the_user_can_stop_a_scorer(monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    with pytest.raises(type(stop)):
        asked(scorer_giving(monkeypatch, stop), "5", {})


def test_a_verifier_of_any_task_may_fail() -> None:
    class Odd(WalkTask):
        def verify(self, prompt: Prompt, completion: str) -> float:
            return {"right": 1.0, "half": 0.5}[completion]

    rewards = verify_all(Odd(), [Prompt("")], ["right", "half", "neither"])
    assert rewards == [1.0, 0.0, 0.0]
    assert verify_all(Odd(), [Prompt("")], ["half"], partial_credit=True) == [0.5]
    assert [getattr(reward, "reason", None) for reward in rewards] == [None, None, "raised KeyError: 'neither'"]


@pytest.mark.parametrize(
    ("score", "exact"),
    [
        (0.01, 0.0),
        (0.05, 0.0),
        (0.999999, 0.0),
        (-0.5, 0.0),
        (1.5, 1.0),
        (1.0, 1.0),
        (1, 1.0),
        (True, 1.0),
        (torch.tensor(1.0), 1.0),
        (Decimal(1), 1.0),
        (np.float32(1), 1.0),
        (np.bool_(True), 1.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.0),
    ],
)
def test_only_a_full_score_is_a_reward_unless_asked(
    monkeypatch: pytest.MonkeyPatch, score: float, exact: float
) -> None:
    task = scorer_giving(monkeypatch, score)
    assert asked(task, "5", {}) == exact
    assert verify_all(task, [Prompt("", {})], ["5"], partial_credit=True) == [float(score)]


@pytest.mark.parametrize("answer", ["nan", "NaN", "-nan", "nan+nanj", "1 + nani", "(nan)"])
def test_nan_is_never_right(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    task = scorer_giving(monkeypatch, 1.0)
    assert asked(task, answer, {"answer": "3"}) == 0.0
    assert asked(task, answer, {"answer": answer}) == 1.0, "the right answer"


def test_full_scores_for_anything_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    no = scorer_giving(monkeypatch, lambda answer: float(answer != "True"))  # as game_of_life_halting
    scores = [asked(no, a, {"answer": "False"}) for a in ("False", "false", "x", "", "0", "True")]
    assert scores == [1, 1, 0, 0, 0, 0]
    prefix = scorer_giving(monkeypatch, lambda answer: float("0.02685".startswith(answer)))  # as coin_flip
    scores = [asked(prefix, a, {"answer": "0.02685"}) for a in ("0.02685", "0.0268", "0.0", "0")]
    assert scores == [1, 1, 0, 0]
    several = scorer_giving(monkeypatch, lambda answer: float(answer in ("2+3", "3+2")))
    assert [asked(several, a, {"answer": "2+3"}) for a in ("2+3", "3+2", "4+1")] == [1, 1, 0]


@pytest.mark.parametrize(
    "answer",
    ["__import__('os')._exit(1)", "exit()", "open ('x', 'w')", "[].__class__", "().real", "9**9**9**9", "(9**9)**9**9",
     "9 ** (9 ** 9)", "9^9^9", "(9**9)**999", "2**99999", "1<<99", "99999999!", "factorial(9)", "lambda: 0",
     "[0]*999999999", "'9'*9999", "'%99999d' % 1", "[x for x in (1,)]", "x := 3", "if", "import os", "a;b"],
)  # fmt: skip
def test_an_answer_that_would_run_is_not_plain(answer: str) -> None:
    assert not is_plain(answer)


@pytest.mark.parametrize(
    "answer",
    ["5", "(1 + 9) / 2 * 3", "x**2 - 3*x + 1", "X**3/3 + C", "2*sin(x) + exp(3*x)/3 - log(x)", "(x**2 + 1)**3/6",
     "[1, 2]", "[['1', '2'], ['3', '4']]", "1.5e-3", "0x1f", "3 != 4", "2 and (3)", "x" * 20000, "A B C. ", ""],
)  # fmt: skip
def test_arithmetic_is_plain(answer: str) -> None:
    assert is_plain(answer)


#: Of each kind that was seen: it evaluates, raises, takes nan, takes anything, counts a prefix, gives partial credit.
TELLING = ["countdown", "simple_integration", "binary_matrix", "prime_factorization", "game_of_life",
           "complex_arithmetic", "game_of_life_halting", "coin_flip", "boxnet", "chain_sum"]  # fmt: skip


@pytest.mark.parametrize("name", TELLING)
def test_hostile_answers_to_reasoning_gym(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = make_task(f"reasoning_gym:{name}")
    hostile = ["", " ", "nan", "NaN", "inf", "None", "[]", "{}", "0", "-", "1e999", "9" * 6000, "١٢٣", "½", "1/0",
               "[[1,2],[3]]", '{"a": 1}', "()", "9**9**9**9", "__import__('os')._exit(1)", "exit()", "\x00", "(" * 3000,
               "\ud800"]  # fmt: skip
    for prompt in task.prompts(2, seed=1, split="train"):
        right = prompt.data["answer"]
        if right is not None:
            assert task.verify(prompt, f"<answer>{right}</answer>") == 1.0
        for answer in hostile:
            assert answer == right or asked(task, f"<answer>{answer}</answer>", prompt.data) == 0.0, (answer, right)
