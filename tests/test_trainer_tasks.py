"""Tasks of the reference trainer: prompts, verifiers, options."""

from __future__ import annotations

import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from entropy_kernels.trainer import tasks
from entropy_kernels.trainer.tasks import Prompt, WalkTask, extract_answer, make_task, task_options, verify_all

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


def test_extract_answer() -> None:
    assert extract_answer("so <answer> 42 </answer> done") == "42"
    assert extract_answer("<answer>42") == "42"
    assert extract_answer("first\n 7 \n") == "7"
    assert extract_answer("") == ""


def test_task_names() -> None:
    with pytest.raises(ValueError, match=r"task: expected walk or reasoning_gym:NAME, got 'chess'"):
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
            while answer == "for ever":
                pass
            return float(eval(answer) == 5)
        except Exception:
            return 0.01


@pytest.fixture
def evaluating(monkeypatch: pytest.MonkeyPatch) -> None:
    gym = types.SimpleNamespace(create_dataset=lambda *_, **__: Scorer())
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)  # type: ignore[arg-type]
    monkeypatch.setattr(tasks, "SCORING_SECONDS", 0.2)


def test_an_answer_that_takes_for_ever_is_wrong(evaluating: None) -> None:
    task = make_task("reasoning_gym:products")
    handler = signal.getsignal(signal.SIGALRM)
    assert task.verify(Prompt("", {}), "for ever") == 0.0
    assert task.verify(Prompt("", {}), "2 + 3") == 1.0
    assert task.verify(Prompt("", {}), "2 +") == 0.01
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with ThreadPoolExecutor() as pool:  # where no signal comes
        assert pool.submit(task.verify, Prompt("", {}), "5").result() == 1.0


def test_what_the_model_wrote_is_not_run(evaluating: None) -> None:
    task = make_task("reasoning_gym:countdown")
    assert task.verify(Prompt("", {}), "<answer>(1 + 9) / 2</answer>") == 1.0
    for answer in ("9**9**9**9", "__import__('os').getpid() * 0 + 5", "len('12345')", "factorial(10**9)"):
        assert task.verify(Prompt("", {}), f"<answer>{answer}</answer>") == 0.0
