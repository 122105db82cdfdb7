"""What a run tells of its rollouts and validations: columns against hand calculations, and the file of samples."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.analysis.metric_names import find_entropy, find_performance
from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.log import DEFINITIONS, defined, read_rows
from entropy_kernels.trainer.model import Encoded
from entropy_kernels.trainer.probes import Update, update_metrics
from entropy_kernels.trainer.rollout import Rollout
from entropy_kernels.trainer.rollout_metrics import rollout_columns, spread
from entropy_kernels.trainer.samples import COMPLETIONS, PROMPTS, SAMPLES, Answers, Samples, keep_before
from entropy_kernels.trainer.scoring import Unscored
from entropy_kernels.trainer.tasks import Prompt
from entropy_kernels.trainer.trackers import scalars
from trainer_setup import SHORT, EasyTask, config, easy, rows_without_times, trained, whole_rollout  # noqa: F401  (fixture)

# --- columns of a rollout --------------------------------------------------------------------------------------------

LENGTHS = [3, 5, 5, 1, 2, 5]
CUT = [False, True, True, False, False, False]
REWARDS = [[1.0, 1.0], [0.0, 0.25], [1.0, 0.5]]
PROMPT_LENGTHS = [4, 4, 2, 2, 7, 7]


def made_up(rewards: list[list[float]] = REWARDS, masked: tuple[int, ...] = ()) -> Rollout:
    """Two completions of each of three prompts, of up to five tokens; rows `masked` are not trained on."""
    length, shape = torch.tensor(LENGTHS), (6, 5)
    completed = torch.arange(5) < length[:, None]
    mask = completed.clone()
    mask[list(masked)] = False
    advantages = torch.where(mask, torch.arange(30.0).view(shape).sin(), 0)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    prompts = (torch.arange(7) >= 7 - torch.tensor(PROMPT_LENGTHS)[:, None]).long()
    return whole_rollout(
        mask, (-values, values, values, values), prompts=Encoded(torch.zeros_like(prompts), prompts),
        ids=torch.zeros(shape, dtype=torch.int64), rewards=torch.tensor(rewards), advantages=advantages,
        completed=completed, truncated=torch.tensor(CUT),
    )  # fmt: skip


def test_columns_of_a_rollout_are_those_of_a_hand_calculation() -> None:
    for masked in ((), (1, 2)):
        rollout = made_up(masked=masked)
        found = rollout_columns(rollout)
        ended = [n for n, cut in zip(LENGTHS, CUT, strict=True) if not cut]
        flat = [x for group in REWARDS for x in group]
        counted = [
            math.sin(5 * row + t) for row, n in enumerate(LENGTHS) if row not in masked for t in range(n)
        ]  # fmt: skip
        expected = {
            "length_mean": sum(LENGTHS) / 6, "length_min": 1, "length_max": 5,
            "length_ended_mean": sum(ended) / 4, "length_ended_min": 1, "length_ended_max": 5, "truncated": 2 / 6,
            "prompt_length_mean": 26 / 6, "prompt_length_min": 2, "prompt_length_max": 7,
            "reward": sum(flat) / 6, "reward_std": statistics.stdev(flat), "reward_min": 0.0, "reward_max": 1.0,
            "reward_group_std": sum(map(statistics.stdev, REWARDS)) / 3,
            "groups_right": 1 / 3, "groups_wrong": 1 / 3, "groups_mixed": 2 / 3,  # 0 and 0.25 differ, none is right
            "advantage_mean": statistics.mean(counted), "advantage_std": statistics.stdev(counted),
            "advantage_min": min(counted), "advantage_max": max(counted),
        }  # fmt: skip
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert found.keys() <= DEFINITIONS.keys()


def test_what_would_describe_nothing_is_left_out() -> None:
    nothing = made_up(masked=tuple(range(6)))
    nothing.truncated = torch.ones(6, dtype=torch.bool)
    found = rollout_columns(nothing)
    assert found["truncated"] == 1.0 and found["length_mean"] == pytest.approx(sum(LENGTHS) / 6)
    assert not [name for name in found if name.startswith(("advantage", "length_ended"))]
    alone = made_up([[0.0]] * 6)
    found = rollout_columns(alone)
    assert "reward_group_std" not in found and found["reward_std"] == 0.0 and found["groups_wrong"] == 1.0
    assert spread("x", torch.tensor([2.0])) == {"x_mean": 2.0, "x_std": 0.0, "x_min": 2.0, "x_max": 2.0}


@pytest.mark.parametrize("parts", [1, 2])
def test_clips_from_below_and_from_above_are_counted_apart(parts: int) -> None:
    """In micro-batches of unequal length, as in one: token by token in float64."""
    rollout, settings = made_up(), config(Path("unused"))
    change = torch.linspace(-0.6, 0.7, 30).view(6, 5)
    logprob = rollout.old_logprob + change
    rows = list(torch.arange(6).chunk(parts))
    losses = [
        ek.policy_loss(
            logprob[part], rollout.old_logprob[part], rollout.advantages[part], rollout.mask[part],
            batch_num_tokens=int(rollout.mask.sum()),
        )
        for part in rows
    ]  # fmt: skip
    found = update_metrics(Update(rows, losses, [None] * parts, 1.0, 0.0), rollout, settings, lr=1.0)
    low = high = 0
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            ratio, advantage = math.exp(float(change[row, t].double())), math.sin(5 * row + t)
            low += advantage < 0 and ratio < 1 - settings.clip_low
            high += advantage > 0 and ratio > 1 + settings.clip_high
    assert low > 0 and high > 0 and low != high
    assert found["clipfrac_low"] == pytest.approx(low / sum(LENGTHS))
    assert found["clipfrac_high"] == pytest.approx(high / sum(LENGTHS))
    assert found["clipfrac"] == pytest.approx(found["clipfrac_low"] + found["clipfrac_high"])


# --- what the method remembers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, names",
    [
        ({"method": "adaptive_entropy", "method_options": {"target": 9.0, "delta": 0.25}}, {"coef": [0.5, 1.0]}),
        ({"method": "repo", "method_options": {"zeta": 0.002, "target": 9.0}}, {"zeta": [0.008, 0.032]}),
        ({"method": "entrocraft"}, {"step": [2.0, 4.0]}),
        ({"target_entropy": "0.4"}, {"unit": None, "measured_change": None}),
    ],
)  # fmt: skip
def test_a_row_has_what_the_method_remembers(tmp_path: Path, options: dict[str, Any], names: dict[str, Any]) -> None:
    """After the step's two updates; a method without memory has no such column."""
    rows = read_rows(ppo.train(config(tmp_path / "run", **{**SHORT, "steps": 2}, **options)) / "metrics.jsonl")
    for name, values in names.items():
        got = [row[f"method/{name}"] for row in rows[:-1]]
        assert got == pytest.approx(values) if values else all(x is None or math.isfinite(x) for x in got)
    assert not [name for name in rows[-1] if name.startswith("method/")]  # no update
    assert all(defined(name) for row in rows for name in row)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with validations before, within and after."""
    return trained(tmp_path_factory, **VALIDATED, steps=3)


#: With a checkpoint after each step.
VALIDATED = {name: value for name, value in SHORT.items() if name != "steps"} | {"eval_every": 2, "save_every": 1}


def test_a_fit_finds_its_columns_among_them(whole: Path) -> None:
    """In the log, and under the names that dashboards export."""
    rows = read_rows(whole / "metrics.jsonl")
    for prefix, named in (("", rows[0]), ("train/", scalars(rows[0]))):
        assert find_entropy([*named]).columns == (f"{prefix}entropy",)
        found = find_performance([*named])
        assert found.columns == (f"{prefix}val_pass1",) and not found.training
        without = [name for name in named if "val_pass" not in name]
        assert find_performance(without).columns == (f"{prefix}reward",)


# --- samples ---------------------------------------------------------------------------------------------------------


def samples_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]


def test_samples_are_the_first_answers_of_each_validation(whole: Path) -> None:
    found = samples_of(whole)
    rows = read_rows(whole / "metrics.jsonl")
    validations = [(row["step"], kind) for row in rows for kind in ("val", "final") if f"{kind}_pass1" in row]
    assert validations == [(0, "val"), (2, "val"), (3, "val"), (3, "final")]
    shown = list(dict.fromkeys((line["step"], line["validation"]) for line in found))
    assert shown == validations
    prompts = EasyTask().prompts(4, seed=0, split="validation")
    for step, kind in validations:
        lines = [line for line in found if (line["step"], line["validation"]) == (step, kind)]
        samples = 2 if kind == "val" else 4
        assert [line["prompt_number"] for line in lines] == [i for i in range(4) for _ in range(samples)]
        row = rows[step]
        assert sum(line["reward"] for line in lines) / len(lines) == pytest.approx(row[f"{kind}_reward"])
        assert {line["length"] for line in lines} == {row[f"{kind}_length"]} == {4}
        assert row[f"{kind}_truncated"] == 0 and not any(line["truncated"] for line in lines)
        for line in lines:
            prompt = prompts[line["prompt_number"]]
            assert line["prompt"] == prompt.text and EasyTask().verify(prompt, line["completion"]) == line["reward"]


def test_samples_are_few_and_whole(tmp_path: Path) -> None:
    chat: Any = [{"role": "user", "content": "How? \udcff"}, {"role": "assistant", "content": "So."}]
    shown = Samples(5, "val")
    for number in range(PROMPTS + 3):
        text: Any = chat if number else "plain"
        shown(Answers(Prompt(text), ["a"] * 6, [0.5, Unscored("odd")] * 3, [0.0] * 6, range(6), [False, True] * 3))
    shown.append_to(tmp_path / SAMPLES)
    found = samples_of(tmp_path)
    assert len(found) == PROMPTS * COMPLETIONS and found[0]["prompt"] == "plain" and found[-1]["prompt"] == chat
    assert found[1] == {
        "step": 5, "validation": "val", "prompt_number": 0, "prompt": "plain", "completion": "a", "score": 0.0,
        "reward": 0.0, "unscored": "odd", "length": 1, "truncated": True,
    }  # fmt: skip
    assert found[2]["score"] == 0.5 and "unscored" not in found[2]


@pytest.mark.parametrize("cut", [False, True])
def test_a_resumed_run_has_the_samples_of_one_never_stopped(tmp_path: Path, whole: Path, cut: bool) -> None:
    """Stopped after two of three steps, with the validation of step 2 behind it, whole or in part."""
    out = tmp_path / "run"
    ppo.train(config(out, **VALIDATED, steps=2))
    if cut:
        with open(out / SAMPLES, "ab") as file:
            file.write(b'{"step": 2, "validation": "val", "pro')
    ppo.train(config(out, **VALIDATED, steps=3, resume=True))
    assert rows_without_times(out) == rows_without_times(whole)
    assert (out / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()


def test_lines_that_are_no_samples_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / SAMPLES
    keep_before(path, 3)
    assert not path.exists()
    path.write_bytes(b'{"step": 1}\nnote\n{"step": "x"}\n[1]\n{"step": 3}\n{"step": 2}\n\n{"step": 1')
    keep_before(path, 3)
    assert path.read_bytes() == b'{"step": 1}\nnote\n{"step": "x"}\n[1]\n{"step": 2}\n\n'
