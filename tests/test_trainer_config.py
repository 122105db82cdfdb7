"""The trainer's configuration: values that are refused, files, courses of the learning rate, and what does nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import entropy_kernels as ek
from entropy_kernels.trainer import ppo
from entropy_kernels.trainer.checks import idle
from entropy_kernels.trainer.config import TrainerConfig, check_resumable
from trainer_setup import TINY, config


def settings_of(**changes: Any) -> TrainerConfig:
    found = dataclasses.replace(TINY, **changes)
    found.validate()
    return found


# --- what is refused -------------------------------------------------------------------------------------------------

#: Factors in a loss, with what reads them: float32 holds 1e38.
FACTORS: dict[str, dict[str, Any]] = {
    "ref_kl_coef": {}, "value_coef": {"advantage": "gae", "critic": "shared"}, "lora_alpha": {"lora_rank": 2},
    "kl_coef": {"method": "kl_cov"},
}  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    # sizes, numbers and names
    ({"temperature": 0.0}, r"temperature: expected a finite number > 0, got 0.0"),
    ({"minibatches": 3}, r"minibatches, micro_batches: expected a product that divides .* = 16, got '3 \* 1 = 3'"),
    ({"cov_low": 5.0}, r"cov_low: expected less than cov_high = 5.0, got 5.0"),
    ({"cov_band": "quantile"}, r"cov_low, cov_high: expected quantiles in \[0, 1\]"),
    ({"cov_ratio": 2.0}, r"cov_ratio: expected a fraction in \(0, 1\], got 2.0"),
    ({"head": "hidden"}, r"head: expected one of linear, logits, torch, got 'hidden'"),
    ({"memory_budget": 0}, r"memory_budget: expected a number of bytes > 0, got 0"),
    ({"method": "clipcov"}, r"method: expected one of grpo, clip_cov.*got 'clipcov'"),
    ({"num_heads": 3}, r"hidden_size: expected a multiple of num_heads = 3, got 16"),
    ({"steps": -1}, r"steps: expected an integer >= 0, got -1"),
    ({"warm_weight_decay": -1.0}, r"warm_weight_decay: expected a finite number >= 0, got -1.0"),
    ({"adam_beta1": 1.0}, r"adam_beta1: expected a number in \[0, 1\), got 1.0"),
    ({"device": "gpu"}, r"device: expected auto or a torch device that is there.*, got 'gpu'"),
    ({"device": "cuda:77"}, r"device: expected auto or a torch device that is there.*, got 'cuda:77'"),
    ({"resume": True, "overwrite": True}, r"resume, overwrite: expected at most one"),
    ({"steps": 2.5}, r"^steps: expected an integer >= 0, got 2\.5"),
    ({"minibatches": True}, r"^minibatches: expected an integer >= 1, got True"),
    ({"lr": "3e-4"}, r"^lr: expected a finite number > 0, got '3e\-4'"),
    ({"cov_ratio": "0.02"}, r"^cov_ratio: expected a fraction in \(0, 1\], got '0\.02'"),
    ({"gamma": None}, r"^gamma: expected a number in \[0, 1\], got None"),
    ({"memory_budget": 1e6}, r"^memory_budget: expected a number of bytes > 0, got 1000000\.0"),
    ({"lora_rank": -1}, r"lora_rank: expected"),
    ({"lora_alpha": 0.0}, r"lora_alpha: expected"),
    ({"lora_alpha": math.nan}, r"lora_alpha: expected"),
    ({"dtype": "bfloat16"}, r"^dtype: expected float32 or mixed \(which keeps float32 weights .*\), got 'bfloat16'$"),
    ({"dtype": "float16"}, r"^dtype: expected float32 or mixed \(which keeps float32 weights .*\), got 'float16'$"),
    ({"dtype": "fp16"}, r"^dtype: expected float32 or mixed \(which keeps float32 weights .*\), got 'fp16'$"),
    ({"dtype": "float64"}, r"^dtype: expected float32 or mixed, got 'float64'$"),
    ({"dtype": "int8"}, r"^dtype: expected float32 or mixed, got 'int8'$"),
    ({"trackers": ("mlflow",)}, r"^trackers: expected some of wandb, trackio, each once, got"),
    ({"trackers": ("wandb", "wandb")}, r"^trackers: expected some of wandb, trackio, each once, got"),
    # advantages, critic, reference
    ({"advantage": "gae", "critic": "shared", "head": "logits"}, r"critic: expected separate under head = logits"),
    ({"samples_per_prompt": 1}, r"samples_per_prompt: expected at least 2"),
    ({"advantage": "reinforce_plus_plus_baseline", "samples_per_prompt": 1}, r"samples_per_prompt: expected at le"),
    ({"advantage": "gea"}, r"advantage: expected one of grpo, .*did you mean gae"),
    ({"gamma": 1.1}, r"gamma: expected a number in \[0, 1\]"),
    ({"gae_lambda": math.nan}, r"gae_lambda: expected a number in \[0, 1\]"),
    ({"critic_lr": 0.0}, r"critic_lr: expected a finite number > 0"),
    ({"value_clip": -0.1}, r"value_clip: expected a finite number >= 0"),
    ({"critic_warmup": -1}, r"critic_warmup: expected an integer >= 0"),
    ({"ref_kl_coef": 0.1, "ref_kl_in": "reward", "ref_kl_estimator": "k1+"},
     r"ref_kl_estimator: expected one without \+ under ref_kl_in = reward.* k1\+"),
    ({"ref_kl_coef": -1}, r"ref_kl_coef: expected a finite number >= 0, got -1"),
    ({"ref_kl_estimator": "k4"}, r"ref_kl_estimator: expected one of k1, abs, k2, k3, .*got 'k4'"),
    ({"dynamic_sampling": 2, "advantage": "reinforce_plus_plus"},
     r"dynamic_sampling: expected 0 under advantage = reinforce_plus_plus, .*got 2"),
    *(({name: 1e39, **beside}, rf"^{name}: expected at most 1e\+38, which float32 holds, got 1e\+39$")
      for name, beside in FACTORS.items()),
    *(({name: 10**13}, rf"^{name}: expected an integer within ±2\^40, got 10000000000000")
      for name in ("seed", "warm_seed")),
    # surrogates
    ({"surrogate": "gsp0"}, r"surrogate: expected one of ppo, gspo, .*got 'gsp0'; did you mean gspo\?"),
    ({"surrogate_options": {"delt": 4}}, r"surrogate_options: .*ppo \(delta\), got delt; did you mean delta\?"),
    ({"surrogate": "gspo", "surrogate_options": {"tau_pos": 1}}, r"got tau_pos; tau_pos is one of sapo"),
    ({"surrogate_options": {"mask": 1}}, r"surrogate_options: expected options of ppo \(delta\), got mask"),
    ({"surrogate": "sapo", "surrogate_options": {"tau_neg": 0}}, r"surrogate_options: tau_neg: expected > 0 .*got 0"),
    ({"surrogate_options": {"delta": "x"}}, r"surrogate_options: delta: expected a number, got str"),
    ({"dual_clip": 1.0}, r"dual_clip: expected > 1 or None, got 1.0"),
    ({"surrogate": "cispo_trl"}, r"clip_high: expected above 1 under cispo_trl.*got 0.2"),
    ({"surrogate": "gspo", "method": "kl_cov"},
     r"surrogate: expected ppo under kl_cov, whose .*, got gspo; leave one out"),
    ({"surrogate": "gspo", "method": "random_penalized"}, r"surrogate: expected ppo under random_penalized"),
    ({"surrogate": "gpg", "method": "clip_cov", "method_options": {"preset": "paper"}},
     r"surrogate: expected ppo under clip_cov, whose own loss"),
    ({"surrogate": "gspo", "method": "exact_cov", "method_options": {"clip_high": 0.3}},
     r"method_options: expected no clip_high beside surrogate = gspo"),
    # methods
    ({"method": "exact_cof"}, r"method: expected one of grpo, .*, got 'exact_cof'; did you mean exact_cov\?"),
    ({"method": "exact_cov", "method_options": {"budet": 1}},
     r"method_options: budet: expected an option of exact_cov \("),
    ({"method": "exact_cov", "method_options": {"seed": 3}},
     r"method_options: seed: expected an option of exact_cov \("),
    ({"method": "entrocraft", "method_options": {"total_steps": 0}}, r"method_options: total_steps: expected .*got 0"),
    ({"method": "exact_cov", "method_options": {"ratio": 2}}, r"method_options: ratio: expected .*got 2"),
    ({"method": "exact_cov", "method_options": {"effect": "penalized"}},
     r"method_options: effect: expected one of 'dropped'"),
    ({"method": "steer", "method_options": {"map": "square"}}, r"method_options: map: expected one of 'exponential'"),
    ({"method": "clip_cov", "method_options": {"preset": "trl"}},
     r"method_options: preset: expected one of 'verl', 'paper'"),
    ({"method": "repo", "method_options": {"zeta": "high"}}, r"method_options: zeta: expected "),
    ({"method": "grpo", "method_options": {"ratio": 0.1}},
     r"method_options: expected none for grpo, got \{'ratio': 0\.1\}"),
    ({"method": "adaptive_entropy", "entropy_coef": 0.1}, r"entropy_coef: expected 0 for adaptive_entropy.*got 0\.1"),
    # a target entropy
    ({"target_entropy": "-0.1"}, r"target_entropy.*expected an entropy >= 0 in nats, got -0\.1"),
    ({"target_entropy": "0:1,5:-2"}, r"target_entropy.*expected an entropy >= 0 in nats, got -2"),
    ({"target_entropy": [[0, 0.8]]}, r"target_entropy: expected a number, or points STEP:VALUE .*got \[\[0, 0\.8\]\]"),
    ({"target_entropy": True}, r"target_entropy: expected a number, or points STEP:VALUE .*got True"),
    ({"target_entropy": "high"}, r"target_entropy: expected a number, or points STEP:VALUE .*got 'high'"),
    ({"target_entropy": "0.4", "method": "clip_cov"}, r"method: expected grpo beside target_entropy.*got clip_cov"),
    ({"target_entropy": "0.4", "target_method": "drop"}, r"target_method: expected one of exact_cov, weight, bonus"),
    ({"target_entropy": "0.4", "method_options": {"kq": 1}}, r"method_options: kq: expected an option of "),
    ({"target_entropy": "0.4", "method_options": {"ratio": 7}}, r"method_options: ratio: expected .*got 7"),
    ({"target_entropy": "0.4", "method_options": {"method": "weight"}}, r"method_options: .*got method; target_entr"),
    ({"target_entropy": "0.4", "method_options": {"target": 1}}, r"method_options: expected options of .*got target"),
    ({"target_entropy": "0.4", "method_options": {"kp": -1}}, r"method_options: kp: expected a finite number >= 0"),
    ({"target_entropy": "0.4", "target_method": "bonus", "entropy_coef": 0.1},
     r"entropy_coef: expected 0 for target_method bonus, which sets it, got 0\.1"),
    ({"lr_schedule": "0:1,5:-1"}, r"lr_schedule: expected factors >= 0, got "),
    ({"resume_changes": ("lr", "lrr", "model")}, r"resume_changes: expected fields .*, got 'lrr, model'"),
    # the course of the learning rate
    ({"lr_schedule": "cosin"}, r"lr_schedule: .*got 'cosin'; or one of cosine, linear; did you mean cosine\?"),
    *(({"lr_schedule": text}, r"lr_schedule: expected a number, or points STEP:VALUE .*got ") for text in
      ("", "x", "0.4,0.5", "nan", "0:inf", "20:1,10:2", "-1:1", "0:1,5:2,5:3,5:4", "0.5:1")),
    ({"lr_warmup_steps": -1}, r"lr_warmup_steps: expected an integer >= 0, got -1"),
    ({"lr_schedule": "1e39"}, r"^lr_schedule: expected factors of at most 1e\+10, got '1e39'$"),
    ({"lr": 1e39}, r"^lr: expected at most 1e\+10, got 1e\+39$"),
    ({"warm_lr": 1e39}, r"^warm_lr: expected at most 1e\+10, got 1e\+39$"),
    ({"critic_lr": 1e39}, r"^critic_lr: expected at most 1e\+10, got 1e\+39$"),
    ({"weight_decay": 1e39}, r"^weight_decay: expected at most 1e\+10, got 1e\+39$"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_said_before_any_training(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo.train(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "beside"), FACTORS.items())
def test_the_largest_factors_are_taken(name: str, beside: dict[str, Any]) -> None:
    settings_of(**{name: 1e38}, **beside)


def test_estimators_that_learn_from_groups_may_replace_them() -> None:
    for advantage in ("grpo", "rloo", "reinforce_plus_plus_baseline"):
        settings_of(dynamic_sampling=2, advantage=advantage)


# --- files -----------------------------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    for settings in (TINY, dataclasses.replace(TINY, lora_targets=("q_proj",), lora_rank=2)):
        assert TrainerConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1}, r"config: expected fields of TrainerConfig, got unknown lrr"),
        ({"method_options": "k=3"}, r"config: method_options: expected dict\[str, Any\], got 'k=3'"),
        ({"lr_schedule": [1]}, r"config: lr_schedule: expected str \| None, got \[1\]"),
        ({"resume_changes": [1]}, r"config: resume_changes: expected a list of words, got \[1\]"),
    ],
)
def test_a_files_values_of_another_kind_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig.from_dict(values)
    assert TrainerConfig.from_dict({"lr_schedule": 1}).lr_schedule == "1"


# --- the course of the learning rate ---------------------------------------------------------------------------------

#: lr 1 over 8 steps: schedule, warm-up, the learning rate of each step.
COURSES = [
    (None, 0, [1, 1, 1, 1, 1, 1, 1, 1]),
    (None, 4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ("linear", 0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ("linear", 4, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
    ("cosine", 0, [1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.0380602]),
    ("cosine", 2, [0.5, 1, 1, 0.933013, 0.75, 0.5, 0.25, 0.0669873]),
    ("0:1,4:1,4:2", 2, [0.5, 1, 1, 1, 2, 2, 2, 2]),
    ("0:0,4:1", 0, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ("linear", 8, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]),
    ("cosine", 16, [0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5]),
]


@pytest.mark.parametrize(("schedule", "warmup", "expected"), COURSES)
def test_courses_of_the_learning_rate(schedule: str | None, warmup: int, expected: list[float]) -> None:
    settings = settings_of(lr=1.0, steps=8, lr_schedule=schedule, lr_warmup_steps=warmup)
    assert [settings.lr_at(step) for step in range(8)] == pytest.approx(expected, abs=1e-6)


def test_a_rise_that_is_over_when_a_run_goes_on_is_refused() -> None:
    before = settings_of(steps=3).to_dict()

    def resumed(**changes: Any) -> dict[str, Any]:
        now = settings_of(steps=9, resume=True, **changes)
        return check_resumable(before, dataclasses.replace(now, resume_changes=("steps", *changes)), finished=3)

    told = (
        r"lr_warmup_steps: expected 0, or more than the 3 finished steps, since .*, got 3 \(--resume-changes lr_warmup"
    )
    with pytest.raises(ValueError, match=told):
        resumed(lr_warmup_steps=3)
    assert {*resumed(lr_warmup_steps=4)} == {"lr_warmup_steps"}
    assert "lr_warmup_steps" in resumed(lr_warmup_steps=3, lr_schedule="linear")  # which falls from its end on


def test_more_steps_of_a_falling_course_have_to_be_named() -> None:
    before = settings_of(lr_schedule="cosine", steps=3)
    after = dataclasses.replace(before, steps=6, resume=True)
    with pytest.raises(
        ValueError, match=r"steps: expected 3 \(as saved\), got 6, over which lr_schedule = cosine falls"
    ):
        check_resumable(before.to_dict(), after, finished=3)
    named = dataclasses.replace(after, resume_changes=("steps",))
    named.validate()
    assert check_resumable(before.to_dict(), named, finished=3) == {"steps": (3, 6)}
    for course in (None, "0:1,4:2"):  # no step changes that is done
        one, other = (dataclasses.replace(c, lr_schedule=course, lr_warmup_steps=2) for c in (before, after))
        assert check_resumable(one.to_dict(), other, finished=3) == {}


# --- what does nothing -----------------------------------------------------------------------------------------------


def test_clips_that_nothing_reads_are_idle() -> None:
    clips = {"clip_low": 0.1, "clip_high": 1.5, "dual_clip": 3.0}
    for surrogate, row in ek.surrogates().items():
        for method in ("grpo", "exact_cov"):
            found = idle(settings_of(surrogate=surrogate, method=method, **clips))
            assert {*clips} & found.keys() == {*clips} - {*row.clips}, (surrogate, method)
    assert idle(settings_of(method="kl_cov", dual_clip=3.0)) == {"dual_clip": "under kl_cov"}
    assert idle(settings_of(ref_kl_in="reward"))["ref_kl_in"] == "with ref_kl_coef = 0"


def test_what_critics_and_estimators_do_not_read_is_idle() -> None:
    for name in ("gae", "reinforce_plus_plus"):
        settings_of(advantage=name, samples_per_prompt=1, prompts_per_step=16)
    changed = {
        "gamma": 0.9, "gae_lambda": 0.9, "critic": "shared", "critic_lr": 0.1, "critic_warmup": 2, "value_clip": 0.0,
        "value_coef": 0.5,
    }  # fmt: skip

    def idle_under(advantage: str, **more: object) -> set[str]:
        return set(idle(dataclasses.replace(TrainerConfig(), advantage=advantage, **{**changed, **more})))  # type: ignore[arg-type]

    assert idle_under("grpo") == idle_under("reinforce_plus_plus_baseline") == set(changed)
    assert idle_under("reinforce_plus_plus") == set(changed) - {"gamma"}
    assert idle_under("gae") == set() and idle_under("gae", critic="separate") == {"value_coef"}


def test_fields_of_adapters() -> None:
    changed = {"lora_alpha": 3.0, "lora_targets": ("q_proj",)}
    assert idle(settings_of(**changed)).keys() == changed.keys() and not idle(settings_of(lora_rank=2, **changed))
