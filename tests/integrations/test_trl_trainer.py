"""Real GRPO steps of TRL with every method, and TRL's own run bit for bit where a method decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl_ranks
import trl_runs
from trl_runs import differences, run

import entropy_kernels as ek
from entropy_kernels.integrations.trl import GRPOTrainer
from entropy_kernels.integrations.trl.head import HEAD
from entropy_kernels.integrations.trl.plan import Planner

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


@pytest.mark.parametrize("model", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_method(method: str, model: str) -> None:
    """20 steps; what it touches is touched, and the policy goes another way than TRL's."""
    given: dict[str, Any] = {"max_steps": STEPS, "num_iterations": 2 if method in AGAIN else 1}
    stock, before = run(model, stock=True, **given), HEAD.calls
    mine = run(model, method=method, method_options=METHODS[method], **given)
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
    **{
        f"{loss_type}, beta {beta}, {iterations} iterations": {
            "loss_type": loss_type, "beta": beta, "num_iterations": iterations,
        }
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo") for beta in (0.0, 0.04) for iterations in (1, 2)
    },
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
    if "top_entropy_quantile" in given:
        return  # refused beside a method
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


@pytest.mark.parametrize(
    "given", [SAME["dapo, beta 0.04, 1 iterations"], SAME["steps of a rollout"], SAME["adaptive entropy"]]
)
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


def test_a_penalty_without_log_probs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be with a TRL whose loss reads them elsewhere."""

    def elsewhere(self: Any, model: Any, inputs: Any) -> Any:
        logprob = model(inputs["completion_ids"]).logits.log_softmax(-1)[..., 0]
        return (logprob * inputs["completion_mask"]).sum()

    monkeypatch.setattr(trl_runs.trl.GRPOTrainer, "_compute_loss", elsewhere)
    with pytest.raises(RuntimeError, match=r"method: expected TRL's loss to read the log-probs that .* penalty is of"):
        run(method="kl_cov", plan_from="old", num_iterations=2, max_steps=1)


def test_a_loss_that_fails_leaves_no_plan_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever catches it and goes on does not plan in a forward of something else."""
    trainer = run(method="exact_cov", max_steps=1).trainer

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(trl_runs.trl.GRPOTrainer, "_compute_loss", failing)
    trainer.model.train()
    with pytest.raises(torch.OutOfMemoryError):
        trainer._compute_loss(trainer.model, trainer._buffered_inputs[0])
    assert trainer._awaits_plan is None


@pytest.mark.parametrize("parts", [1, 2])
def test_a_target_plans_with_the_current_learning_rate(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear schedule, at the first update of each rollout; two rollouts' updates share none."""
    seen: list[float] = []
    step = ek.TargetEntropy.step

    def recorded(self: Any, *args: Any, lr: float, **named: Any) -> Any:
        seen.append(lr)
        return step(self, *args, lr=lr, **named)

    monkeypatch.setattr(ek.TargetEntropy, "step", recorded)
    given = {"lr_scheduler_type": "linear", "learning_rate": 1e-2, "max_steps": 4, "num_iterations": parts}
    run(target_entropy=4.0, **given)
    assert [x for x in seen if x] == pytest.approx([1e-2 * (1 - i / 4) for i in range(0, 4, parts)])


@pytest.mark.parametrize("given", [{"method": "exact_cov"}, {"method": "kl_cov", "num_iterations": 2},
                                   {"method": "random", "method_options": {"ratio": 0.2}, "plan_from": "old"},
                                   {"target_entropy": 4.0}], ids=str)  # fmt: skip
def test_an_evaluation_between_steps_disturbs_nothing(given: dict[str, Any]) -> None:
    """With completions that are fixed, as an evaluation draws random numbers; rows are shuffled otherwise, and sums of
    them differ by rounding."""

    def evaluated(**named: Any) -> Any:
        return trl_ranks.Recorded(**named, eval_dataset=trl_runs.prompts(8))

    without = run(kind=trl_ranks.Recorded, **given)
    mine = run(kind=evaluated, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8, **given)
    treated = [[sorted(step) for step in x.trainer.dropped] for x in (mine, without)]
    assert treated[0] == treated[1] and any(treated[0])
    for x, y in zip(mine.log, without.log, strict=True):
        for name in (k for k in y if k.startswith("ek/") or k in ("loss", "entropy", "reward")):
            assert x[name] == (None if y[name] is None else pytest.approx(y[name], rel=1e-3, abs=1e-5)), name
    assert sum("eval_loss" in entry for entry in mine.trainer.state.log_history) == 4


@pytest.mark.parametrize("plan_from", ["auto", "old"])
def test_temperature(plan_from: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decision reads is of the softmax at TRL's temperature, in float64 by the logits."""
    seen: list[Any] = []
    planned = Planner.plan

    def recorded(self: Any, micro: Any, now: Any, **named: Any) -> Any:
        seen.append((micro[0], now[0], named["temperature"]))
        return planned(self, micro, now, **named)

    monkeypatch.setattr(Planner, "plan", recorded)
    trained = run(method="exact_cov", plan_from=plan_from, temperature=0.7, learning_rate=0.0, max_steps=1)
    (inputs, read, temperature) = seen[0]
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        logits = trained.trainer.model(ids, attention_mask=mask).logits[:, -read.logprob.shape[1] - 1 : -1]
    log_p = (logits.double() / 0.7).log_softmax(-1)
    logprob = log_p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    names = ("logprob", "vocab_covariance")
    expected = ek.token_stats(logits.double(), inputs["completion_ids"], statistics=names, temperature=0.7)
    real = inputs["completion_mask"] == 1
    torch.testing.assert_close(expected.logprob, logprob)
    assert temperature == 0.7
    for name in names:
        mine, right = getattr(read, name)[real].double(), getattr(expected, name)[real]
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_a_patch_of_the_users_stays() -> None:
    from entropy_kernels.integrations.trl import patch_head

    with patch_head():
        run(method="exact_cov", max_steps=1)
        assert HEAD.active
    assert not HEAD.active
