"""The trainer's advantages and value loss against verl's own functions, on ragged inputs with holes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty

import entropy_kernels as ek
from entropy_kernels.trainer.advantages import advantages_of
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.critic import value_loss
from entropy_kernels.trainer.reference import loss_penalty, reward_penalty

ROWS, LENGTH, SAMPLES = 24, 11, 4
#: Of prompts, as verl has it.
INDEX = np.repeat(np.arange(ROWS // SAMPLES), SAMPLES)


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    mask &= torch.rand(ROWS, LENGTH, generator=generator) < 0.85  # verl's observation tokens
    mask[:, 0] = True
    draw = lambda: torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return {"token_rewards": draw() * mask, "mask": mask, "values": draw(), "returns": draw(), "old_values": draw()}


def theirs(name: str, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    function = getattr(core_algos, f"compute_{name}")
    found: tuple[Tensor, Tensor] = function(
        token_level_rewards=given["token_rewards"].clone(), response_mask=given["mask"].to(torch.float64), **options
    )
    return found


def close(one: Tensor, other: Tensor, mask: Tensor) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one[mask], other[mask], rtol=1e-9, atol=1e-9)
    assert bool((one[~mask] == 0).all())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.5, 0.0), (0.0, 1.0)])
def test_gae(seed: int, gamma: float, lam: float) -> None:
    given = drawn(seed)
    advantages, returns = theirs("gae_advantage_return", given, values=given["values"], gamma=gamma, lam=lam)
    values, mask = given["values"], given["mask"]
    options = {"samples": 1, "values": values, "gamma": gamma, "gae_lambda": lam}
    made = advantages_of("gae", given["token_rewards"], mask, **options)  # type: ignore[arg-type]
    close(made.advantages, advantages, mask)
    assert made.returns is not None
    close(made.returns, returns, mask)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        ("grpo", "grpo_outcome_advantage", {"normalize_std": True}),
        ("grpo", "grpo_outcome_advantage", {"normalize_std": False}),
        ("rloo", "rloo_outcome_advantage", {}),
        ("reinforce_plus_plus", "reinforce_plus_plus_outcome_advantage", {"gamma": 1.0}),
        ("reinforce_plus_plus", "reinforce_plus_plus_outcome_advantage", {"gamma": 0.9}),
        ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline_outcome_advantage", {}),
    ],
)
def test_estimators_without_a_critic(seed: int, ours: str, name: str, options: dict[str, Any]) -> None:
    given = drawn(seed)
    mask = given["mask"]
    told: dict[str, Any] = {} if ours == "reinforce_plus_plus" else {"index": INDEX}
    if "gamma" in options:
        told["config"] = AlgoConfig(gamma=options["gamma"])
    if "normalize_std" in options:
        told["norm_adv_by_std_in_grpo"] = options["normalize_std"]
    advantages, _ = theirs(name, given, **told)
    made = advantages_of(ours, given["token_rewards"], mask, samples=SAMPLES, **options)
    close(made.advantages, advantages, mask)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_value_loss(mode: str, clip: float) -> None:
    given = drawn(7)
    mask = given["mask"]
    values = given["values"].clone().requires_grad_()
    loss, share = core_algos.compute_value_loss(
        values, given["returns"], given["old_values"], mask.to(torch.float64), clip, mode
    )
    (grad,) = torch.autograd.grad(loss, values)
    ours, our_share = value_loss(values, given["old_values"], given["returns"], mask, clip=clip, loss_agg_mode=mode)
    (our_grad,) = torch.autograd.grad(ours, values)
    torch.testing.assert_close(ours, loss, rtol=1e-7, atol=0)  # verl divides by a sum + 1e-8
    torch.testing.assert_close(our_grad, grad, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(our_share.double(), share.double(), rtol=1e-6, atol=0)
    assert 0 < float(share) < 1


@pytest.mark.parametrize("parts", [1, 3])
def test_value_loss_of_micro_batches(parts: int) -> None:
    """Normalised by the whole minibatch, as verl does with the numbers of tokens and of sequences."""
    given = drawn(8)
    whole, _ = core_algos.compute_value_loss(
        given["values"], given["returns"], given["old_values"], given["mask"].double(), 0.2, "token-mean"
    )
    rows = torch.arange(ROWS).chunk(parts)
    added = sum(
        value_loss(
            given["values"][part], given["old_values"][part], given["returns"][part], given["mask"][part], clip=0.2,
            loss_agg_mode="token-mean", batch_num_tokens=int(given["mask"].sum()), global_batch_size=ROWS,
        )[0]
        for part in rows
    )  # fmt: skip
    torch.testing.assert_close(added, whole, rtol=1e-9, atol=0)


# --- the KL divergence from a reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_a_penalty_in_the_reward(seed: int, estimator: str) -> None:
    given = drawn(seed)
    mask, logprob, ref_logprob = given["mask"], given["values"] * given["mask"], given["returns"] * given["mask"]
    batch = {
        "response_mask": mask.double(), "token_level_scores": given["token_rewards"], "old_log_probs": given["values"],
        "ref_log_prob": given["returns"],
    }  # fmt: skip
    controller = core_algos.FixedKLController(kl_coef=0.3)
    theirs, metrics = apply_kl_penalty(DataProto.from_dict(tensors=batch), controller, kl_penalty=estimator)
    config = TrainerConfig(ref_kl_coef=0.3, ref_kl_in="reward", ref_kl_estimator=estimator)
    ours = given["token_rewards"] - reward_penalty(config, logprob, ref_logprob)
    torch.testing.assert_close(ours, theirs.batch["token_level_rewards"], rtol=1e-12, atol=1e-12)
    assert metrics["actor/reward_kl_penalty"] != 0


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"])
def test_a_penalty_in_the_loss(estimator: str, mode: str) -> None:
    given = drawn(0)
    mask = given["mask"]
    logprob, other = (given["values"].clone().requires_grad_() for _ in range(2))
    rollout: Any = SimpleNamespace(ref_logprob=given["returns"])
    config = TrainerConfig(ref_kl_coef=0.3, ref_kl_estimator=estimator)
    penalty = loss_penalty(config, rollout, torch.arange(ROWS))
    ek.policy_loss(
        logprob, logprob.detach(), torch.zeros(ROWS, LENGTH), mask, loss_agg_mode=mode, **penalty
    ).loss.backward()
    kld = core_algos.kl_penalty(other, given["returns"], kl_penalty=estimator)
    (0.3 * core_algos.agg_loss(loss_mat=kld, loss_mask=mask.double(), loss_agg_mode=mode)).backward()
    # verl adds 1e-8 to the length of a sequence
    torch.testing.assert_close(logprob.grad, other.grad, rtol=3e-8, atol=1e-12)
