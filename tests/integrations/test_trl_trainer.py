"""Real GRPO steps of TRL with every method, and TRL's own run bit for bit where a method decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl_runs
from trl_runs import differences, run

import entropy_kernels as ek
from entropy_kernels.integrations.trl import GRPOTrainer
from entropy_kernels.integrations.trl.head import HEAD

STEPS = 20
METHODS: dict[str, dict[str, Any]] = {
    "clip_cov": {"ratio": 0.1, "low": 0.01, "high": 100.0},
    "kl_cov": {"ratio": 0.2, "kl_coef": 5.0},
    "exact_cov": {"share": 0.8},
    "random": {"ratio": 0.2},
    "clip_b": {"mu": 0.3},
    "clip_v": {"mu": 0.3, "ratio": 0.2},
    "steer": {"w_min": 0.2},
    "top_entropy": {"rho": 0.5},
    "erc": {"low": 0.999, "high": 1.001},
    "entropy_advantage": {},
    "repo": {"zeta": 0.05},
    "adaptive_entropy": {"target": 10.0, "delta": 0.02},
    "entrocraft": {"low": 0.1, "high": 0.2},
}
AGAIN = {"kl_cov", "erc"}  # nothing is done in the first update of a rollout
NOTHING = {"method": "clip_cov", "method_options": {"low": 1e6, "high": 2e6}}  # an empty range


def test_every_method_is_here() -> None:
    assert {*METHODS} == {*ek.methods()}


@pytest.mark.parametrize("method", METHODS)
def test_method(method: str) -> None:
    """20 steps; what it touches is touched, and the policy goes another way than TRL's."""
    given: dict[str, Any] = {"max_steps": STEPS, "num_iterations": 2 if method in AGAIN else 1}
    stock, before = run(stock=True, **given), HEAD.calls
    mine = run(method=method, method_options=METHODS[method], **given)
    assert len(mine.log) == STEPS and all(torch.isfinite(x).all() for x in mine.weights.values())
    row = ek.methods()[method]
    assert (HEAD.calls > before) == bool(row.needs)  # our head, where its statistics are needed, and only there
    touched = sum(entry["ek/touched"] for entry in mine.log)
    assert (touched > 0) == (row.effects[0] != "entropy_coef")
    if method == "adaptive_entropy":
        coefficients = [entry["entropy_coef"] for entry in mine.log]
        assert coefficients == pytest.approx([0.02 * i for i in range(STEPS)])
        assert coefficients == [entry["ek/entropy_coef"] for entry in mine.log]
    assert any(not torch.equal(x, mine.weights[name]) for name, x in stock.weights.items())


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov", "exact_cov"])
def test_another_family(method: str) -> None:
    mine = run("qwen2", method=method, method_options=METHODS[method], num_iterations=2, max_steps=STEPS)
    assert sum(entry["ek/touched"] for entry in mine.log) > 0 and len(mine.log) == STEPS


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("clip_cov", {"effect": "detached"}),
        ("random", {"effect": "penalized", "kl_coef": 5.0}),
        ("exact_cov", {"effect": "token_weight", "weight": 0.1, "ratio": None}),
        ("clip_cov", {"preset": "paper", "low": 0.01, "high": 100.0, "ratio": 0.1}),
    ],
)
def test_other_effects(method: str, options: dict[str, Any]) -> None:
    options = {**METHODS[method], **options} if method != "exact_cov" else options
    given: dict[str, Any] = {"max_steps": 6, "num_iterations": 2}
    mine, stock = run(method=method, method_options=options, **given), run(stock=True, **given)
    assert sum(entry["ek/touched"] for entry in mine.log) > 0
    assert differences(mine, stock)


def test_dropping_what_lowers_the_entropy_keeps_it_up() -> None:
    given: dict[str, Any] = {"max_steps": 60, "learning_rate": 1e-2}
    stock = run(stock=True, **given)
    mine = run(method="exact_cov", method_options={"share": 1.0}, **given)
    ends = [sum(e["entropy"] for e in x.log[-10:]) / 10 for x in (stock, mine)]
    assert ends[0] < stock.log[0]["entropy"] - 0.3 and ends[1] > ends[0] + 0.3, ends
    assert all(entry["ek/predicted_change"] >= 0 for entry in mine.log)


@pytest.mark.parametrize("target_method", ["exact_cov", "weight", "bonus"])
def test_target(target_method: str) -> None:
    """The entropy ends nearer to its target than without; what is planned and measured is in the log."""
    given: dict[str, Any] = {"max_steps": 60, "learning_rate": 1e-2}
    stock, target = run(stock=True, **given), 3.6
    options = {"coef": 0.05, "delta": 0.02} if target_method == "bonus" else {"max_change": 0.1}
    mine = run(target_entropy=target, target_method=target_method, method_options=options, **given)
    off = [abs(sum(e["entropy"] for e in x.log[-10:]) / 10 - target) for x in (stock, mine)]
    assert off[1] < 0.6 * off[0], off
    last = mine.log[-1]
    assert last["ek/target_entropy"] == target and last["ek/entropy"] == pytest.approx(last["entropy"], abs=1e-4)
    if target_method != "bonus":
        assert last["ek/measured_change"] is not None and mine.log[0]["ek/measured_change"] is None
        assert last["ek/gain"] != 1.0  # it was learned


def test_target_over_several_updates_a_rollout() -> None:
    """One plan per rollout: the metrics come once in its updates; a schedule counts rollouts."""
    mine = run(
        target_entropy=[[0, 3.5], [2, 3.1]], max_steps=8, num_iterations=2, steps_per_generation=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    assert [entry.get("ek/target_entropy") for entry in mine.log] == [3.5, None, None, None, 3.3, None, None, None]


# ---- TRL's own, bit for bit ------------------------------------------------------------------------------------------

SAME: dict[str, dict[str, Any]] = {
    **{loss_type: {"loss_type": loss_type} for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")},
    "beta": {"beta": 0.04},
    "beta, grpo": {"beta": 0.04, "loss_type": "grpo", "num_iterations": 2},
    "iterations": {"num_iterations": 2},
    "iterations, dr_grpo": {"num_iterations": 2, "loss_type": "dr_grpo"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "steps of a rollout": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2,
                           "per_device_train_batch_size": 4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "luspo of tokens": {"loss_type": "luspo", "num_iterations": 2},
    "two-sided clip": {"delta": 1.5, "epsilon_high": 0.3, "num_iterations": 2},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 9.0},
    "bonus": {"entropy_coef": 0.01, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "off-policy mask": {"off_policy_mask_threshold": 1e-3, "num_iterations": 2, "learning_rate": 1e-2},
    "top entropy": {"top_entropy_quantile": 0.3},
    "completions": {"log_completions": True},
    "truncated": {"mask_truncated_completions": True},
}  # fmt: skip


@pytest.mark.parametrize("given", SAME.values(), ids=list(SAME))
def test_what_decides_nothing_is_trls_own(given: dict[str, Any]) -> None:
    """Every logged number of four steps, and the weights: without a method, and with one whose range is empty."""
    stock = run(stock=True, **given)
    assert not differences(run(**given), stock)
    with_method = run(**NOTHING, **given)
    assert not differences(with_method, stock)
    touched = [entry["ek/touched"] for entry in with_method.log if "ek/touched" in entry]
    assert touched and not any(touched)


def test_what_decides_nothing_in_a_model_of_experts() -> None:
    """With its auxiliary loss."""
    mine, stock = run("mixtral", **NOTHING), run("mixtral", stock=True)
    assert not differences(mine, stock) and stock.log[0]["aux_loss"] > 0


def test_adapters() -> None:
    """LoRA, with the reference that TRL reads by the same model; statistics are the policy's."""
    peft = pytest.importorskip("peft")

    def with_lora(trainer: Any) -> Any:
        return lambda **named: trainer(**named, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    given: dict[str, Any] = {"beta": 0.04, "num_iterations": 2, "learning_rate": 1e-2}
    stock = run(kind=with_lora(trl_runs.trl.GRPOTrainer), stock=True, **given)
    mine = run(kind=with_lora(GRPOTrainer), **NOTHING, **given)
    assert not differences(mine, stock)
    treated = run(kind=with_lora(GRPOTrainer), method="exact_cov", plan_from="old", **given)
    old = treated.trainer._buffered_inputs[0]
    assert torch.equal(old["ek_logprob"], old["old_per_token_logps"]) and treated.log[-1]["ek/touched"] > 0


@pytest.mark.parametrize("given", [{"bf16": True}, {"gradient_checkpointing": True}, {"cast_lm_head_to_fp32": True}])
def test_precision_and_checkpointing(given: dict[str, Any]) -> None:
    """What ours reads agrees with what TRL logs, under autocast and beside a head in fp32, too."""
    mine = run(method="exact_cov", plan_from="old", num_iterations=2, **given)
    stock = run(stock=True, num_iterations=2, **given)
    assert mine.log[0]["entropy"] == pytest.approx(stock.log[0]["entropy"], rel=2e-3)
    inputs = mine.trainer._buffered_inputs[0]
    mask = inputs["completion_mask"] == 1
    assert inputs["ek_vocab_covariance"][mask].abs().min() > 0 and not inputs["ek_vocab_covariance"][~mask].any()
    assert sum(entry["ek/touched"] for entry in mine.log) > 0


@pytest.mark.parametrize("given", [SAME["beta"], SAME["steps of a rollout"], SAME["adaptive entropy"]])
def test_our_head_beside_trls_loss(given: dict[str, Any]) -> None:
    """Rounding apart: other kernels of the same statistics."""
    stock, before = run(stock=True, **given), HEAD.calls
    mine = run(fused_head=True, **given)
    assert HEAD.calls - before >= len(mine.log)
    assert mine.log[0]["reward"] == stock.log[0]["reward"]
    for name in ("loss", "grad_norm", "entropy"):
        assert mine.log[0][name] == pytest.approx(stock.log[0][name], rel=1e-5, abs=1e-6), name


def test_statistics_cost_no_forward_where_a_step_is_one_micro_batch() -> None:
    """Calls of our head: one a step, and those of the passes that TRL makes (two iterations) or that are asked for."""
    for given, calls in (({}, 4), ({"num_iterations": 2}, 6), ({"plan_from": "old"}, 8)):
        before = HEAD.calls
        run(method="exact_cov", max_steps=4, **given)
        assert HEAD.calls - before == calls, given


def test_a_head_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic: TRL reads the logits another way, and nobody notices."""
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction

    class Another(original):  # type: ignore[misc, valid-type]
        apply = staticmethod(original.apply)

    def another(self: Any, *args: Any, **named: Any) -> Any:
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Another)
        return stock(self, *args, **named)

    stock = trl_runs.trl.GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(trl_runs.trl.GRPOTrainer, "_get_per_token_logps_and_entropies", another)
    with pytest.raises(RuntimeError, match=r"fused_head: expected TRL's model to read its logits through"):
        run(fused_head=True, max_steps=1)


def test_a_method_that_takes_no_part_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be with a TRL that prepares its inputs elsewhere."""
    monkeypatch.setattr(GRPOTrainer, "_plan_ahead", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"method: expected TRL's trainer to prepare its inputs .* without a plan"):
        run(method="exact_cov", plan_from="old", max_steps=1)


def test_a_patch_of_the_users_stays() -> None:
    from entropy_kernels.integrations.trl import patch_head

    with patch_head():
        run(method="exact_cov", max_steps=1)
        assert HEAD.active
    assert not HEAD.active
