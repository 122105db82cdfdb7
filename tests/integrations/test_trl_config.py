"""The fields that ``GRPOConfig`` has more than TRL's: as flags, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from trl_runs import folder, prompts, reward, run, settings, tokenizer

from entropy_kernels.integrations._patch import PatchRefused
from entropy_kernels.integrations.trl import GRPOConfig, GRPOTrainer
from entropy_kernels.integrations.trl.head import HEAD

CLIP_COV = {"method": "clip_cov"}
KL_COV = {"method": "kl_cov", "num_iterations": 2}


@pytest.mark.parametrize("parser", [trl.TrlParser, transformers.HfArgumentParser])
def test_flags(parser: Any, tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (found,) = parser(GRPOConfig).parse_args_into_dataclasses(
        [*flags, "--method", "clip_cov", "--method_options", '{"ratio": 0.01, "low": 0.5}', "--preset", "paper"]
    )
    assert (found.method, found.method_options, found.preset) == ("clip_cov", {"ratio": 0.01, "low": 0.5}, "paper")
    assert found.fused_head is None and found.target_entropy is None
    (found,) = parser(GRPOConfig).parse_args_into_dataclasses(
        [*flags, "--target_entropy", "0.4", "--target_method", "weight", "--fused_head", "true"]
    )
    assert (found.target_entropy, found.target_method, found.fused_head) == (0.4, "weight", True)
    (found,) = parser(GRPOConfig).parse_args_into_dataclasses([*flags, "--target-entropy", "[[0, 0.8], [200, 0.3]]"])
    assert found.target_entropy == [[0, 0.8], [200, 0.3]]


def test_a_file_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: exact_cov\nmethod_options: {share: 0.4}\nuse_cpu: true\nbf16: false\n")
    (found,) = trl.TrlParser(GRPOConfig).parse_args_and_config(["--config", str(path), "--output_dir", str(tmp_path)])
    assert (found.method, found.method_options) == ("exact_cov", {"share": 0.4})
    assert found.to_json_string()


def test_every_field_of_trls_is_as_it_was() -> None:
    ours = {f.name: f for f in dataclasses.fields(GRPOConfig)}
    theirs = {f.name: f for f in dataclasses.fields(trl.GRPOConfig)}
    assert {*ours} - {*theirs} == {
        "method", "method_options", "preset", "target_entropy", "target_method", "target_observe", "plan_from",
        "fused_head", "any_trl_version",
    }  # fmt: skip
    assert all(ours[name].default == theirs[name].default for name in theirs)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "clipcov"}, r"method: expected one of clip_cov, .* got 'clipcov'; did you mean clip_cov\?"),
    ({**CLIP_COV, "method_options": {"ration": 0.1}}, r"method_options: .* got 'ration'; did you mean ratio"),
    ({**CLIP_COV, "method_options": {"low": 6.0}}, r"low: expected <= high, got low=6.0, high=5.0"),
    ({**CLIP_COV, "method_options": [1]}, r"method_options: expected a dict, got list"),
    ({**CLIP_COV, "method_options": {"clip_low": 0.1}}, r"expected clip_low as the field epsilon"),
    ({**CLIP_COV, "preset": "papr"}, r"preset: expected one of 'verl', 'paper', got 'papr'"),
    ({**CLIP_COV, "preset": "paper", "method_options": {"preset": "verl"}}, r"preset: expected once, got 'paper'"),
    ({"method": "steer", "preset": "paper"}, r"preset: expected None: only clip_cov and kl_cov"),
    ({"preset": "paper"}, r"preset: expected None without method and target_entropy"),
    ({"method_options": {"ratio": 0.1}}, r"method_options: expected None without method and target_entropy"),
    ({**CLIP_COV, "target_entropy": 0.4}, r"target_entropy: expected None beside method='clip_cov', got 0.4"),
    ({"target_entropy": "high"}, r"target_entropy: expected a number of nats or .* got 'high'"),
    ({"target_entropy": -1.0}, r"target: expected an entropy >= 0"),
    ({"target_entropy": 0.4, "target_method": "clip_cov"}, r"target_method: expected one of 'exact_cov'"),
    ({"target_entropy": 0.4, "method_options": {"kpp": 1}}, r"got 'kpp'; did you mean kp"),
    ({**CLIP_COV, "plan_from": "new"}, r"plan_from: expected 'auto', 'old' or 'fresh', got 'new'"),
    ({"method": "exact_cov", "fused_head": False}, r"fused_head: expected None or True, .* needs vocab_covariance"),
    ({"method": "adaptive_entropy", "entropy_coef": 0.1}, r"entropy_coef: expected 0 and use_adaptive_entropy=False"),
    ({"target_entropy": 1.0, "target_method": "bonus", "use_adaptive_entropy": True}, r"beside a bonus, which sets"),
    ({**KL_COV, "epsilon": 0.3}, r"epsilon, epsilon_high, delta: expected none beside kl_cov"),
    ({**CLIP_COV, "preset": "paper", "delta": 2.0}, r"none beside clip_cov \(preset paper\), which has no PPO"),
    ({**KL_COV, "loss_type": "sapo"}, r"loss_type: expected one of grpo, .* for kl_cov"),
    ({"method_options": "ratio=0.1"}, r"method_options: expected JSON like '{\"ratio\": 0.1}', got 'ratio=0.1'"),
    ({"method_options": "[1]"}, r"method_options: expected JSON like .* got '\[1\]'"),
    ({"method": "exact_cov", "method_options": {"share": 7.0}}, r"share: expected"),
    ({"method": "steer", "method_options": {"w_min": -1.0}}, r"w_min"),
    ({"target_entropy": 1.0, "method_options": {"max_change": -1.0}}, r"max_change: expected"),
    ({"method": "exact_cov", "delta": 0.9}, r"delta: expected"),
    ({"method": "exact_cov", "epsilon": -0.1}, r"epsilon: expected"),
    ({"target_method": "weigth"}, r"target_method: expected one of 'exact_cov', .* got 'weigth'"),
    ({"target_method": "weight"}, r"target_method: expected 'exact_cov' without target_entropy, got 'weight'"),
    ({**CLIP_COV, "target_observe": False}, r"target_observe: expected True without target_entropy, got False"),
    ({"plan_from": "old"}, r"plan_from: expected 'auto' without method and target_entropy, got 'old'"),
    *(
        ({**given, "importance_sampling_level": "sequence", "loss_type": loss_type},
         r"importance_sampling_level: expected 'token' with .*, got 'sequence': .* loss_type cispo or vespo")
        for given in ({"method": "steer"}, {"target_entropy": 1.0})
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")
    ),
    ({**CLIP_COV, "top_entropy_quantile": 0.2}, r"top_entropy_quantile: expected 1 with clip_cov, .*'top_entropy'"),
    ({"target_entropy": 1.0, "top_entropy_quantile": 0.2}, r"top_entropy_quantile: expected 1 with target_entropy"),
    ({**KL_COV, "off_policy_mask_threshold": 0.1}, r"off_policy_mask_threshold: expected None with kl_cov"),
    ({"method": "kl_cov"}, r"num_iterations: expected more than 1, or steps_per_generation > gradient_accum.* kl_cov"),
    ({"method": "random", "method_options": {"effect": "penalized"}, "gradient_accumulation_steps": 2},
     r"num_iterations: .*with random, .* got 1, 2 and 2"),
    ({**CLIP_COV, "gradient_accumulation_steps": 4, "steps_per_generation": 2}, r"steps_per_generation: expected a"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GRPOConfig(**settings(tmp_path, **given))


@pytest.mark.parametrize(
    "given",
    [
        *({**CLIP_COV, "importance_sampling_level": "sequence", "loss_type": x} for x in ("cispo", "vespo")),
        {"method": "adaptive_entropy", "importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"method": "kl_cov", "steps_per_generation": 2},
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.2, "off_policy_mask_threshold": 0.1},
    ],
    ids=str,
)
def test_what_is_refused_beside_others_only(given: dict[str, Any], tmp_path: Path) -> None:
    GRPOConfig(**settings(tmp_path, **given))


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_a_ratio_that_is_a_percentage_is_told(method: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {**settings(tmp_path), "method": method, "num_iterations": 2}
    with pytest.warns(UserWarning, match=r"ratio=0.2 is 20 % of the tokens; the paper's 0.2 % is 0.002 \(docs/mig"):
        GRPOConfig(**given, method_options={"ratio": 0.2})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        GRPOConfig(**given, method_options={"ratio": 0.1})
    assert not [x for x in told if "of the tokens" in str(x.message)]


def test_a_target_above_what_the_vocabulary_has() -> None:
    with pytest.raises(ValueError, match=r"target: expected at most log\(vocab_size\) = 4.78"):
        run(target_entropy=5.0, max_steps=1)


def test_trls_own_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"args: expected an entropy_kernels.integrations.trl.GRPOConfig, got trl"):
        GRPOTrainer(
            folder("llama"), reward, trl.GRPOConfig(**settings(tmp_path)), prompts(), processing_class=tokenizer()
        )


def test_another_version_of_trl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ours would run; TRL's own goes on as it is, and who knows better may."""
    monkeypatch.setattr(HEAD, "versions", ("0.1",))
    run(max_steps=1)
    for given in (CLIP_COV, {"fused_head": True}):
        with pytest.raises(
            PatchRefused, match=r"expected trl 0.1, which this was tested with, got 1.16.0; .*GRPOConfig\(any"
        ):
            run(max_steps=1, **given)
    before = HEAD.calls
    run(max_steps=1, fused_head=True, any_trl_version=True)
    assert HEAD.calls > before


def test_trl_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys, entropy_kernels.integrations.trl as ours; assert ours.PATCHES and ours.patch_head\n"
        "assert not {'trl', 'transformers'} & {*sys.modules}\nours.GRPOTrainer; assert 'trl' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
