"""Tasks of the user's: classes, objects, data with a reward; as the docs have them, and whatever is wrong with them."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")

from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.checks import idle
from entropy_kernels.trainer.config import TrainerConfig, check_resumable
from entropy_kernels.trainer.data import data_task, hold_out, read_data, reward_source
from entropy_kernels.trainer.start import WARM_STEPS, warm_steps_of
from entropy_kernels.trainer.tasks import SEED_STRIDE, Prompt, Task, WalkTask, as_task, prompts_of
from entropy_kernels.trainer.workers import asked, verify_all
from trainer_setup import SHORT, TINY, rows_without_times

DOCS = Path(__file__).parent.parent / "docs" / "trainer.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes, and a chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def small(model: Path | str, **changes: Any) -> TrainerConfig:
    usual: dict[str, Any] = {"model": str(model), "warm_steps": None, "max_new_tokens": 4, "out": Path("run"), **SHORT}
    return dataclasses.replace(TINY, **{**usual, "eval_every": 0, "device": "cpu", **changes})


def write_data(path: Path, rows: int = 24, **fields: Any) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i + 1), **fields}) + "\n" for i in range(rows))
    )
    return path


# --- as the docs have them --------------------------------------------------------------------------------------------


def documented() -> tuple[dict[str, str], list[list[str]]]:
    """The files of the section, and the words of its commands."""
    section = DOCS.read_text().split("## Your own task\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL)
    files = dict(zip(("sums.py", "prompts.jsonl", "reward.py"), (text for kind, text in blocks if kind), strict=True))
    import shlex

    return files, [shlex.split(text) for kind, text in blocks if not kind]


@pytest.mark.parametrize("number", [0, 1])
def test_the_documented_task_and_data_train(folder: Path, model: Path, number: int) -> None:
    files, commands = documented()
    assert len(files["sums.py"].strip().splitlines()) <= 30
    for name, text in files.items():
        (folder / name).write_text(text)
    words = commands[number]
    assert words[:2] == ["entropy-kernels", "train"]
    words[words.index("--model") + 1] = str(model)
    few = "--steps 1 --prompts-per-step 2 --samples-per-prompt 2 --minibatches 1 --max-new-tokens 4 --device cpu"
    few += " --eval-prompts 2 --eval-samples 2 --final-eval-prompts 2 --final-eval-samples 2 --no-measure-memory"
    assert main([*words[2:], *few.split(), "--no-tensorboard", "--no-progress", "--first-order-every", "0"]) == 0
    out = Path(words[words.index("--out") + 1])
    rows = rows_without_times(out)
    assert [row["unscored"] for row in rows] == [0, 0] and rows[-1]["final_unscored"] == 0
    saved = json.loads((out / "config.json").read_text())
    assert saved["warm_steps"] == 0 and (saved["task"], saved["data"]) in (
        ("sums.py:Sums?largest=20", None),
        ("walk", "prompts.jsonl"),
    )


def test_the_documented_reward_and_task_score(folder: Path) -> None:
    files, _ = documented()
    for name, text in files.items():
        (folder / name).write_text(text)
    config = small("tiny", data=Path("prompts.jsonl"), reward="reward.py:reward")
    task = data_task(config)
    with asked(task, config):
        prompts = sorted((*task._rows, *task._held), key=lambda row: row.place)
        answers = ["It is 23.", "27", "31", "33", "Ninety-seven: 97", "97 or 98"]
        assert verify_all(task, prompts, answers) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    sums = ppo.task_of(small("tiny", task="sums.py:Sums?largest=20"))
    assert (sums.name, sums.max_new_tokens) == ("Sums", 16)
    train, held = ({p.text for p in prompts_of(sums, 60, seed=3, split=s)} for s in ("train", "validation"))  # type: ignore
    assert not train & held
    assert sums.verify(Prompt("", 21), " 21\n") == 1.0 and sums.verify(Prompt("", 21), "22") == 0.0


# --- objects ----------------------------------------------------------------------------------------------------------


class Duck:
    """Two methods and nothing else; counts, which only works in the trainer's process."""

    asked = 0

    def prompts(self, count: int, *, seed: int, split: str) -> list[Prompt]:
        rng = random.Random(f"{split} {seed}")
        return [Prompt([{"role": "user", "content": f"{split} {rng.random():.3f}"}]) for _ in range(count)]

    def verify(self, prompt: Prompt, completion: str) -> float:
        self.asked += 1
        if self.asked % 2:
            raise ValueError("odd")
        return -1.0 if self.asked % 4 else 2.5


def test_an_object_trains(folder: Path, model: Path) -> None:
    task = Duck()
    ppo.train(small(model), task=task)
    rows = rows_without_times(folder / "run")
    drawn = TINY.prompts_per_step * TINY.samples_per_prompt
    assert task.asked == 2 * drawn + TINY.eval_prompts * TINY.eval_samples + (
        TINY.final_eval_prompts * TINY.final_eval_samples
    )
    assert rows[0]["unscored"] == drawn / 2 and rows[0]["unscored_late"] == 0 and rows[0]["reward"] == 0.25
    saved = json.loads((folder / "run" / "config.json").read_text())
    assert (saved["task"], saved["warm_steps"]) == ("Duck", 0)
    kept = [json.loads(line) for line in (folder / "run" / "unscored.jsonl").read_text().splitlines()]
    assert len(kept) == drawn / 2 and {line["reason"] for line in kept} == {"raised ValueError: odd"}
    ppo.train(small(model, out=Path("partial"), partial_credit=True), task=Duck())
    assert rows_without_times(folder / "partial")[0]["reward"] == pytest.approx((2.5 - 1.0) / 4)


class NoVerify(Task):
    def prompts(self, count: int, *, seed: int, split: str) -> list[Prompt]:
        return [Prompt("x")] * count


class Odd(NoVerify):
    found: Any = None

    def __init__(self, found: Any) -> None:
        self.found = found

    def prompts(self, count: int, *, seed: int, split: str) -> Any:
        return self.found

    def verify(self, prompt: Prompt, completion: str) -> float:
        return 0.0


def odd(**members: Any) -> Odd:
    """With other members than the class."""
    return type("Odd", (Odd,), members)([Prompt("x")] * 4)  # type: ignore[no-any-return]


async def later(prompt: Prompt, completion: str) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            odd(prompts=lambda self, count, seed: []),
            r"task: expected a method prompts\(count, \*, seed, split\) of Odd, got one with \(count, seed\) \(",
        ),
        (odd(prompts=lambda self, count, *, seed, split: (yield)), r"of Odd, got a generator function"),
        (odd(verify=lambda self, prompt: 1.0), r"verify\(prompt, completion\) of Odd, got one with \(prompt\)"),
        (odd(verify=staticmethod(later)), r"verify\(prompt, completion\) of Odd, got an async function$"),
        (
            odd(demonstrations=lambda self: []),
            r"demonstrations\(count, \*, seed, wrong_fraction\) of Odd, got one with",
        ),
        (
            odd(prompts=lambda self, count, *, seed, split: 1 / 0),
            r"expected 4 prompts from Odd, got ZeroDivisionError: division by zero \(test_user_tasks.py, line \d+\)$",
        ),
        (odd(scoring_seconds="3"), r"task: expected scoring_seconds of Odd to be a number > 0 or None, got '3'$"),
        (odd(scoring_seconds=float("nan")), r"got nan$"),
        (Odd([Prompt([{"role": "\ud800", "content": "x"}])] * 4), r"got text that is no Unicode \(half a surrogate"),
        (object(), r"task: expected an object with the methods prompts and verify, got a object without prompts$"),
        (NoVerify(), r"got a NoVerify without verify$"),
        (Duck, r"got the class Duck and no object of it: Duck\(\)$"),
        (types.SimpleNamespace(prompts=0, verify=0), r"got a SimpleNamespace without prompts$"),
        (Odd(None), r"task: expected a list of Prompt from prompts of Odd, got a NoneType$"),
        (Odd(["a"] * 4), r"got a str in it$"),
        (Odd([]), r"task: expected 4 prompts for train from Odd, got 0$"),
        (Odd([Prompt("x")] * 5), r"got 5$"),
        (Odd([Prompt("")] * 4), r"task: expected prompts that are text or chat messages from Odd, got an empty one$"),
        (Odd([Prompt(3)] * 4), r"got a int: 3$"),  # type: ignore[arg-type]
        (Odd([Prompt("\ud800")] * 4), r"got text that is no Unicode \(half a surrogate pair\): '\\ud800'$"),
        (Odd([Prompt([])] * 4), r"got no messages$"),
        (Odd([Prompt([{"content": "x"}])] * 4), r"got a message that is no object with a role: "),
    ],
)
def test_objects_that_are_no_tasks(task: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ppo.train(small("tiny"), task=task)
    assert not list(folder.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([("a", "b")], r"task: expected \d+ demonstrations from Duck, pairs of prompt and completion, got 1$"),
        ([("x", 3)] * 50, r"got \('x', 3\)$"),
        (3, r"got a int$"),
    ],
)
def test_demonstrations_that_are_none(folder: Path, model: Path, found: Any, message: str) -> None:
    task = Duck()
    task.demonstrations = lambda count, *, seed, wrong_fraction: found  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        ppo.train(small(model, warm_steps=2, warm_batch=25), task=task)


def test_words_that_are_not_those_of_the_prompts(folder: Path) -> None:
    task = Duck()
    task.words = lambda: ["a", "b"]  # type: ignore[attr-defined]
    task.prompts = lambda count, *, seed, split: [Prompt("c")] * count  # type: ignore
    with pytest.raises(ValueError, match=r"model: expected text that its tokenizer takes .*got 'c' \(WordLevel error"):
        ppo.train(small("tiny"), task=task)


def test_paths_and_names_may_be_written_as_in_a_file() -> None:
    written = TrainerConfig(out="a", data="b", lora_targets=["q_proj"])  # type: ignore[arg-type]
    assert written == TrainerConfig(out=Path("a"), data=Path("b"), lora_targets=("q_proj",))
    assert TrainerConfig.from_dict(written.to_dict()) == written


def test_the_name_and_the_defaults_of_a_task() -> None:
    task = as_task(Duck())
    assert (task.name, task.max_new_tokens, task.fixed_length, task.words()) == ("Duck", 256, False, None)
    assert task.demonstrations(3, seed=0, wrong_fraction=0.0) == []


def test_a_class_of_the_users_is_a_task_by_its_name(folder: Path) -> None:
    """As the object itself is: it need not know of Task; what is a task already is one."""
    (folder / "duck.py").write_text(
        "class Duck:\n    def prompts(self, count, *, seed, split): return []\n    def verify(self, p, c): return 1.0\n"
    )
    task = ppo.task_of(small("tiny", task="duck.py:Duck"))
    assert task.name == "Duck" and task.verify(Prompt("x"), "y") == 1.0 and as_task(task) is task


def test_supervised_steps_are_as_many_as_there_are_demonstrations_for() -> None:
    walk, without = WalkTask(), as_task(Duck())
    tiny, other = TrainerConfig(), TrainerConfig(model="other")
    assert [warm_steps_of(c, t) for c in (tiny, other) for t in (walk, without)] == [WARM_STEPS, 0, 0, 0]
    assert warm_steps_of(TrainerConfig(model="other", warm_steps=3), walk) == 3
    with pytest.raises(
        ValueError, match=r"warm_steps: expected 0 or none for Duck, which has no demonstrations, got 3"
    ):
        warm_steps_of(TrainerConfig(warm_steps=3), without)
    old = {**TrainerConfig().to_dict(), "warm_steps": WARM_STEPS}  # of a run from before it could be none
    assert check_resumable(old, ppo.prepared(TrainerConfig())[0], finished=0) == {}
    assert "warm_steps" not in idle(TrainerConfig(warm_steps=WARM_STEPS, warm_start_from=Path("x")))
    assert "warm_steps" in idle(TrainerConfig(warm_steps=9, warm_start_from=Path("x")))


# --- data -------------------------------------------------------------------------------------------------------------


def task_of(folder: Path, rows: int = 24, **changes: Any) -> Any:
    data = write_data(folder / "data.jsonl", rows)
    return data_task(small("tiny", data=data, reward="exact", **changes))


def test_epochs_pass_over_the_data_evenly(folder: Path) -> None:
    task, count = task_of(folder), 4
    rows = [row.text for row in task._rows]
    assert len(rows) % count, "an epoch ends within a step"
    for seed in (0, 3):
        steps = [
            [prompt.text for prompt in task.prompts(count, seed=seed * SEED_STRIDE + step, split="train")]
            for step in range(40)
        ]
        drawn = [text for step in steps for text in step]
        for end in range(1, len(drawn) + 1):
            seen = collections.Counter(drawn[:end])
            assert max(seen.values()) - min(seen[row] for row in rows) <= 1
        epochs = [tuple(drawn[i : i + len(rows)]) for i in range(0, len(drawn) - len(rows), len(rows))]
        assert len({*epochs}) == len(epochs) > 3, "the order is not the same in every epoch"
        again = data_task(small("tiny", data=folder / "data.jsonl", reward="exact"))
        assert [p.text for p in again.prompts(count, seed=seed * SEED_STRIDE + 17, split="train")] == steps[17]
    assert task.prompts(4, seed=0, split="train") != task.prompts(4, seed=SEED_STRIDE, split="train")


def test_what_is_held_out(folder: Path) -> None:
    task = task_of(folder, 400)
    train, held = {row.text for row in task._rows}, {row.text for row in task._held}
    assert len(train | held) == 400 and not train & held and 30 < len(held) < 70
    assert f"{len(held)} of the 400 prompts of {folder / 'data.jsonl'} are held out" in task.remark
    more = task_of(folder, 500)  # what was trained on stays there
    assert train <= {row.text for row in more._rows}
    few = prompts_of(task, 1000, seed=0, split="validation")
    assert sorted(prompt.text for prompt in few) == sorted(held), "each once"
    assert prompts_of(task, 5, seed=0, split="validation") == few[:5]
    for count in range(2, 10):
        assert all(hold_out(read_data(write_data(folder / "few.jsonl", count), "data")))
    both = data_task(small("tiny", data=folder / "data.jsonl", eval_data=folder / "few.jsonl", reward="exact"))
    assert (len(both._rows), len(both._held), both.remark) == (500, 9, "")


def test_data_trains_and_goes_on_bit_for_bit(folder: Path, model: Path) -> None:
    write_data(folder / "data.jsonl")
    (folder / "reward.py").write_text("def reward(prompt, completion, answer):\n    return len(completion) % 2\n")
    base = small(model, data=Path("data.jsonl"), reward="reward.py:reward", steps=2)
    ppo.train(base)
    whole = rows_without_times(folder / "run")
    assert whole[0]["groups_mixed"] > 0 and whole[0]["unscored"] == 0, "the test shows nothing"  # type: ignore[operator]
    halves = dataclasses.replace(base, out=Path("halves"), steps=1)
    ppo.train(halves)
    ppo.train(dataclasses.replace(halves, steps=2, resume=True, scoring_workers=2))
    assert rows_without_times(folder / "halves")[:2] == whole[:2]
    inside = dataclasses.replace(base, out=Path("inside"), scoring_workers=0)
    ppo.train(inside)
    assert rows_without_times(folder / "inside") == whole


def test_files_that_change_while_a_run_is_stopped_are_told(folder: Path, model: Path) -> None:
    write_data(folder / "data.jsonl")
    (folder / "reward.py").write_text("def reward(completion):\n    return 0.0\n")
    config = small(model, data=Path("data.jsonl"), reward="reward.py:reward", steps=1)
    ppo.train(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppo.train(dataclasses.replace(config, steps=2, resume=True))
    (folder / "reward.py").write_text("def reward(completion):\n    return 1.0\n")
    with pytest.warns(UserWarning, match=r"^reward.py has changed since the run was last started"):
        ppo.train(dataclasses.replace(config, steps=3, resume=True))
    assert TrainerConfig.from_json(folder / "run").reward == config.reward


def test_a_prompt_that_the_model_cannot_take_is_found_before_its_step(folder: Path, model: Path) -> None:
    chat = {"prompt": [{"role": "user", "content": "3 + 4 ="}], "answer": "7"}
    (folder / "data.jsonl").write_text(write_data(folder / "data.jsonl", 60).read_text() + json.dumps(chat) + "\n")
    config = small(model, data=Path("data.jsonl"), reward="exact", chat_template=False)
    with pytest.raises(ValueError, match=r"prompt: expected text, as the model's tokenizer has no chat template"):
        ppo.train(config)
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_answers_that_cannot_be_scored_are_counted_and_kept(folder: Path, model: Path) -> None:
    write_data(folder / "data.jsonl")
    (folder / "reward.py").write_text("def reward(**fields):\n    return None\n")
    config = small(model, data=Path("data.jsonl"), reward="reward.py:reward", prompts_per_step=8, steps=2)
    with pytest.warns(UserWarning, match=r"an answer could not be judged, its reward is 0 \(expected a finite number"):
        ppo.train(config)
    rows = rows_without_times(folder / "run")
    assert [row["unscored"] for row in rows] == [32] * 3 and [row["reward"] for row in rows] == [0.0] * 3
    assert rows[-1]["final_unscored"] == 3 * TINY.final_eval_samples, "of the three rows that are held out"
    assert len((folder / "run" / "unscored.jsonl").read_text().splitlines()) == 20


FULL = '{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"data: expected a file with a JSON object on each line, got data.jsonl, which is empty$"),
        (b"\n \n", r"which is empty$"),
        (
            FULL.encode() + b"\n{\n",
            r"data: data.jsonl, line 4: expected a JSON object, whole on this line, got no JSON \(.* at character 2\)$",
        ),
        (b"[1]\n", r"line 1: expected a JSON object with a prompt, one on each line, got a list$"),
        (b'{"question": "a", "answer": 1}', r"line 1: expected the field prompt, got question, answer$"),
        (b"{}", r"line 1: expected the field prompt, got no fields$"),
        (b'{"prompt": 3}', r"line 1: expected text or chat messages as prompt, got a int: 3$"),
        (b'{"prompt": "  "}', r"got an empty one$"),
        (b'{"prompt": []}', r"got no messages$"),
        (b'{"prompt": [{"role": "user", "content": null}]}', r"got a NoneType: None$"),
        (b'{"prompt": "\\ud800"}', r"line 1: .*got text that is no Unicode \(half a surrogate pair\)"),
        (FULL.encode() + b'{"prompt": "\xff"}', r"line 3: expected UTF-8, got the byte 0xff at 12$"),
        (b"[" * 100_000, r"line 1: expected a JSON object, (got one that is nested too deeply|.*got no JSON .*)$"),
        (b'{"prompt": "a"}\n{"prompt": "a"}', r"data: expected at least two different prompts.*--eval-data FILE"),
    ],
)
def test_data_that_is_none(folder: Path, text: bytes, message: str) -> None:
    (folder / "data.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        ppo.train(small("tiny", data=Path("data.jsonl"), reward="exact"))
    assert "\n" not in str(error.value) and not (folder / "run").exists()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exat", r"reward: expected file.py:FUNCTION, module:FUNCTION or one of exact, math_verify.*mean exact\?$"),
        ("reward.py", r"got 'reward.py'; did you mean reward.py:FUNCTION\?$"),
        ("nosuch.py:reward", r"reward: expected a file, got nosuch.py, which does not exist$"),
        ("nosuch:reward", r"got nosuch:reward \(ModuleNotFoundError: No module named 'nosuch'\)$"),
        ("reward.py:rewrd", r"\(AttributeError: it has no rewrd; did you mean reward\?\)$"),
        (
            "reward.py:reward",
            r"got reward.py:reward, which names the field goal; of fields beside prompt data.jsonl, line 1",
        ),
        ("reward.py:lists", r"a function of lists \(prompts, completions\), as TRL's are$"),
        ("reward.py:number", r"a int, which is no function$"),
        ("broken.py:reward", r"got broken.py:reward \(SyntaxError: .*\(broken.py, line 1\)\)$"),
    ],
)
def test_rewards_that_are_none(folder: Path, reward: str, message: str) -> None:
    (folder / "data.jsonl").write_text(FULL)
    (folder / "broken.py").write_text("def reward(:\n")
    (folder / "reward.py").write_text(
        "def reward(prompt, completion, goal): return 1\ndef lists(completions, **kwargs): return [1]\nnumber = 3\n"
    )
    with pytest.raises((ValueError, OSError), match=message) as error:
        ppo.train(small("tiny", data=Path("data.jsonl"), reward=reward))
    assert "\n" not in str(error.value) and not (folder / "run").exists()


def test_a_field_that_is_the_completions(folder: Path) -> None:
    write_data(folder / "data.jsonl", 4, completion="5")
    (folder / "reward.py").write_text("def all(**fields): return 1.0\ndef some(completion): return completion == 'x'\n")
    with pytest.raises(
        ValueError, match=r"which would get the field completion of data.jsonl, line \d, in the place of"
    ):
        ppo.train(small("tiny", data=Path("data.jsonl"), reward="reward.py:all"))
    config = small("tiny", data=Path("data.jsonl"), reward="reward.py:some")
    task = data_task(config)
    with asked(task, config):
        assert verify_all(task, task._rows[:1], ["x", "5"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "exact"}, r"reward: expected none without data \(--data FILE\), got exact$"),
        ({"eval_data": Path("x")}, r"eval_data: expected none without data"),
        ({"data": Path("x")}, r"reward: expected file.py:FUNCTION.* beside data = x, got none$"),
        ({"data": Path("x"), "reward": "exact"}, r"data: expected a file .*got x, which does not exist$"),
        ({"data": Path("."), "reward": "exact"}, r"data: expected a file .*got \., which is a folder$"),
        ({"data": Path("x"), "reward": "exact", "task": "walk?goals=1-9"}, r"task: expected none beside data"),
        ({"task": "reasoning_gim:chain_sum"}, r"task: expected module:NAME.*did you mean reasoning_gym:chain_sum\?$"),
        ({"task": "wolk"}, r"did you mean walk\?$"),
        ({"task": "nosuch.py:Task"}, r"task: expected file.py:NAME, got nosuch.py:Task, where there is no such file$"),
        ({"task": "nosuch:Task"}, r"got nosuch:Task \(ModuleNotFoundError: No module named 'nosuch'\)$"),
        ({"task": "mine.py:Toy?size=3"}, r"got mine.py:Toy \(RuntimeError: too small\)$"),
        ({"task": "mine.py:Toy?sise=3"}, r"\(TypeError: .*unexpected keyword argument 'sise'.*\)$"),
        ({"task": "mine.py:Tay"}, r"\(AttributeError: it has no Tay; did you mean Toy\?\)$"),
        (
            {"task": "mine.py:number"},
            r"task: expected an object with the methods prompts and verify, got a int without",
        ),
        ({"task": "ends.py:Toy"}, r"got ends.py:Toy \(SystemExit: bye\)$"),
        ({"scoring_seconds": 0.0}, r"scoring_seconds: expected a finite number > 0, got 0.0$"),
        ({"scoring_workers": -1}, r"scoring_workers: expected an integer >= 0, got -1$"),
        ({"model": "./nosuch"}, r"model: expected a folder with a model .* got ./nosuch, which does not exist$"),
    ],
)
def test_configurations_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "ends.py").write_text("raise SystemExit('bye')\n")
    (folder / "mine.py").write_text(
        "class Toy:\n    def __init__(self, size=9):\n"
        "        if size < 5: raise RuntimeError('too\\nsmall')\nnumber = 3\n"
    )
    with pytest.raises((ValueError, OSError), match=message) as error:
        ppo.train(small(changes.pop("model", "tiny"), **changes))
    assert "\n" not in str(error.value) and not (folder / "run").exists()


def test_errors_are_one_line_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.jsonl").write_text(FULL)
    for words, said in (
        ("--data data.jsonl --reward exact --task walk", "--task: expected none beside data, got walk"),
        (
            "--data data.jsonl --reward exact",
            "model: expected a pretrained model for the task data.jsonl (--model NAME)",
        ),
        ("--data none.jsonl --reward exact", "--data: expected a file with a JSON object on each line, got none.jsonl"),
        ("--scoring-workers 3", "--scoring-workers: does nothing on walk"),
    ):
        assert main([*words.split(), "--out", "run", "--no-progress", "--no-tensorboard"]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1, told
    assert not (folder / "run").exists()


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("entropy_kernels.trainer.__main__._main", closed)
    with pytest.raises(BrokenPipeError):  # the command's main is silent about it
        main([])


def test_exact_and_math_verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = reward_source("exact").make()
    assert [exact(text, 42) for text in ("<answer> 42 </answer>", "so\n42\n", "42.", "")] == [1.0, 1.0, 0.0, 0.0]
    limits = []

    def parse(text: str, parsing_timeout: int | None = 5) -> list[str]:
        limits.append(parsing_timeout)
        return re.findall(r"\d+", text)

    def verify(right: list[str], found: list[str], timeout_seconds: int | None = 5) -> bool:
        limits.append(timeout_seconds)
        return right == found

    monkeypatch.setitem(sys.modules, "math_verify", types.SimpleNamespace(parse=parse, verify=verify))  # type: ignore
    reward = reward_source("exact").__class__(reward_source("exact").place, "math_verify_reward", {}).make()
    assert (reward("is 7", answer="7"), reward("8", solution="7"), reward("7", answer="7", solution="8")) == (1, 0, 1)
    with pytest.raises(ValueError, match="math-verify finds no answer in 'none'"):
        reward("7", answer="none")
    assert {*limits} == {None}, "its own limits are signals"


def test_math_verify_has_to_be_there(folder: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("math_verify"):
        pytest.skip("math-verify is installed")
    (folder / "data.jsonl").write_text(FULL)
    with pytest.raises(
        ImportError, match=r"reward = math_verify needs math-verify, which is not installed: pip install"
    ):
        ppo.train(small("tiny", data=Path("data.jsonl"), reward="math_verify"))


def test_math_verify_wants_one_of_two_fields(folder: Path) -> None:
    (folder / "reward.py").write_text(
        "def reward(completion, answer=None, solution=None): return 1.0\nreward.one_of = ('answer', 'solution')\n"
    )
    (folder / "data.jsonl").write_text(FULL + '{"prompt": "c", "Answer": 3}\n')
    with pytest.raises(ValueError, match=r"which needs a field answer or solution; data.jsonl, line 3, has none$"):
        ppo.train(small("tiny", data=Path("data.jsonl"), reward="reward.py:reward"))


def test_names_of_the_package() -> None:
    from entropy_kernels import trainer
    from entropy_kernels.trainer import config, ppo, tasks

    found = {name: getattr(trainer, name) for name in trainer.__all__}
    of = {"Prompt": tasks.Prompt, "Task": tasks.Task, "TrainerConfig": config.TrainerConfig, "train": ppo.train}
    assert found == of
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        trainer.nothing  # noqa: B018
