"""Advantages by every estimator, and the critic: float64 by hand, one update of a run, trained runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from safetensors.torch import load_file

from entropy_kernels.trainer import checkpoint, ppo, sweep
from entropy_kernels.trainer.advantages import ESTIMATORS, advantages_of, rewards_of_tokens, whitened
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.critic import Critic, critic_of, value_loss
from entropy_kernels.trainer.methods import METHODS, controller_of
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.rollout import Rollout, known_tokens
from entropy_kernels.trainer.rollout_metrics import value_columns
from entropy_kernels.trainer.start import build_policy
from trainer_setup import (  # noqa: F401
    SHORT,
    TINY,
    EasyTask,
    assert_near,
    assert_same_run,
    config,
    easy,
    resumed,
    rows_without_times,
    trained,
)

GAMMA, LAMBDA = 0.9, 0.7

# --- estimators, as loops over the tokens of a row -------------------------------------------------------------------


def drawn(seed: int = 0, rows: int = 8, length: int = 7) -> dict[str, Tensor]:
    """Rewards and values of tokens, ragged and with holes; the last row has one token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)
    mask &= torch.rand(rows, length, generator=generator) < 0.8
    mask[:, 0] = True
    mask[-1, 1:] = False
    rewards = torch.randn(rows, length, generator=generator, dtype=torch.float64) * mask
    return {
        "token_rewards": rewards,
        "mask": mask,
        "values": torch.randn(rows, length, generator=generator, dtype=torch.float64),  # also where masked
    }


def by_row(of_row: Any, given: dict[str, Tensor]) -> Tensor:
    """`of_row(rewards, values)` of each row's valid tokens, lists; 0 where masked."""
    found = torch.zeros(given["mask"].shape, dtype=torch.float64)
    for i, valid in enumerate(given["mask"]):
        found[i, valid] = torch.tensor(
            of_row(given["token_rewards"][i, valid].tolist(), given["values"][i, valid].tolist()), dtype=torch.float64
        )
    return found


def gae_by_hand(rewards: list[float], values: list[float]) -> list[float]:
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + GAMMA * after[t] - values[t] for t in range(n)]
    return [sum((GAMMA * LAMBDA) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def returns_by_hand(rewards: list[float], values: list[float]) -> list[float]:
    n = len(rewards)
    return [sum(GAMMA**k * rewards[t + k] for k in range(n - t)) for t in range(n)]


def whitened_by_hand(values: Tensor, mask: Tensor) -> Tensor:
    numbers = values[mask].tolist()
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)
    found = torch.zeros_like(values)
    found[mask] = torch.tensor([(x - mean) / math.sqrt(variance + 1e-8) for x in numbers], dtype=torch.float64)
    return found


@pytest.mark.parametrize("whiten", [None, True, False])
def test_gae_by_hand(whiten: bool | None) -> None:
    given = drawn()
    found = advantages_of("gae", **given, samples=1, gamma=GAMMA, gae_lambda=LAMBDA, whiten=whiten)
    plain = by_row(gae_by_hand, given)
    expected = plain if whiten is False else whitened_by_hand(plain, given["mask"])
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-12)
    assert found.returns is not None  # of advantages that are not whitened
    torch.testing.assert_close(found.returns, (plain + given["values"]) * given["mask"], rtol=1e-12, atol=1e-12)


def test_gae_at_its_ends() -> None:
    """lambda 1: rewards to go minus the value; lambda 0: one step."""
    given = drawn(1)
    whole = advantages_of("gae", **given, samples=1, gamma=GAMMA, whiten=False)
    to_go = by_row(returns_by_hand, given)
    torch.testing.assert_close(whole.advantages, (to_go - given["values"]) * given["mask"], rtol=1e-12, atol=1e-12)
    assert whole.returns is not None
    torch.testing.assert_close(whole.returns, to_go, rtol=1e-12, atol=1e-12)
    step = advantages_of("gae", **given, samples=1, gamma=GAMMA, gae_lambda=0.0, whiten=False)

    def one(rewards: list[float], values: list[float]) -> list[float]:
        return [r + GAMMA * later - v for r, later, v in zip(rewards, [*values[1:], 0.0], values, strict=True)]

    torch.testing.assert_close(step.advantages, by_row(one, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("whiten", [None, False])
def test_both_reinforce_plus_plus_by_hand(whiten: bool | None) -> None:
    given = drawn(2)
    del given["values"]
    found = advantages_of("reinforce_plus_plus", **given, samples=1, gamma=GAMMA, whiten=whiten)
    plain = by_row(returns_by_hand, drawn(2))
    expected = plain if whiten is False else whitened_by_hand(plain, given["mask"])
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-12)
    assert found.returns is None

    found = advantages_of("reinforce_plus_plus_baseline", **given, samples=4, whiten=whiten)
    plain = torch.zeros(8, 7, dtype=torch.float64)
    for i in range(8):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        mean = sum(float(given["token_rewards"][j].sum()) for j in group) / 4
        plain[i] = float(given["token_rewards"][i].sum()) - mean
    plain *= given["mask"]
    expected = plain if whiten is False else whitened_by_hand(plain, given["mask"])
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-12)


def test_whitening_of_little_and_of_equal_values() -> None:
    one = torch.tensor([[3.0, 7.0]])
    assert torch.equal(whitened(one, torch.tensor([[True, False]])), torch.zeros(1, 2))
    assert torch.equal(whitened(torch.full((2, 2), 0.1), torch.ones(2, 2, dtype=torch.bool)), torch.zeros(2, 2))
    assert torch.equal(whitened(one, torch.zeros(1, 2, dtype=torch.bool)), torch.zeros(1, 2))


def test_what_is_masked_reaches_no_advantage() -> None:
    for name, row in ESTIMATORS.items():
        given = drawn(3)
        if not row.critic:
            del given["values"]
        found = advantages_of(name, **given, samples=4, gamma=GAMMA, gae_lambda=LAMBDA, whiten=True)
        if row.critic:
            given["values"] = given["values"].masked_fill(~given["mask"], torch.nan)
        again = advantages_of(name, **given, samples=4, gamma=GAMMA, gae_lambda=LAMBDA, whiten=True)
        assert torch.equal(found.advantages, again.advantages) and bool((found.advantages[~given["mask"]] == 0).all())


def test_a_completions_reward_stands_at_its_last_token() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    found = rewards_of_tokens(torch.tensor([1.0, 2.0, 3.0]), mask)
    assert found.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0]]


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].control is not None])
def test_methods_take_an_advantage_per_token(method: str) -> None:
    """And decide over the whole minibatch, as with one per completion."""
    settings = dataclasses.replace(TINY, method=method, advantage="gae", cov_low=-9.0, cov_high=9.0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    rollout = a_rollout()
    noise = torch.randn(rollout.mask.shape, generator=generator)
    rollout = dataclasses.replace(rollout, advantages=noise, collision=rollout.entropy.exp(), vocab_covariance=noise)

    def decided(parts: int) -> Any:
        controller = controller_of(settings)
        assert controller is not None
        rows = list(torch.arange(16).chunk(parts))
        return controller.step(known_tokens(rollout, rows, settings), seed=3)

    (whole,), split = decided(1), decided(4)
    for name, value in whole._asdict().items():
        if isinstance(value, Tensor) and value.dim():
            assert value.shape == rollout.mask.shape
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), value), name


# --- the critic's loss -----------------------------------------------------------------------------------------------


def value_loss_by_hand(given: dict[str, Tensor], clip: float, mode: str) -> tuple[float, float]:
    rows, binding, tokens = [], 0, 0
    for i, valid in enumerate(given["mask"]):
        losses = []
        for j in valid.nonzero().flatten().tolist():
            new, old, target = (float(given[name][i, j]) for name in ("values", "old_values", "returns"))
            error, limited = (new - target) ** 2, (min(max(new, old - clip), old + clip) - target) ** 2
            losses.append(max(error, limited) if clip else error)
            binding, tokens = binding + (clip > 0 and limited > error), tokens + 1
        rows.append(losses)
    if mode == "token-mean":
        return 0.5 * sum(map(sum, rows)) / tokens, binding / tokens
    return 0.5 * sum(sum(losses) / len(losses) for losses in rows) / len(rows), binding / tokens


def errors(seed: int = 4) -> dict[str, Tensor]:
    """Values that move by more and by less than 0.5, to either side, towards the return and away."""
    generator = torch.Generator().manual_seed(seed)
    mask = drawn(seed)["mask"]
    values, old, returns = torch.randn(3, *mask.shape, generator=generator, dtype=torch.float64)
    return {"values": values, "old_values": old, "returns": returns, "mask": mask}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_value_loss_by_hand(clip: float, mode: str) -> None:
    given = errors()
    loss, share = value_loss(**given, clip=clip, loss_agg_mode=mode)
    expected, binding = value_loss_by_hand(given, clip, mode)
    assert float(loss) == pytest.approx(expected, rel=1e-12) and float(share) == pytest.approx(binding, abs=1e-7)
    moved = (given["values"] - given["old_values"])[given["mask"]]
    assert (moved > 0.5).any() and (moved < -0.5).any() and (moved.abs() < 0.5).any()
    assert (0 < binding < 1) == (clip > 0)


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_gradient_of_the_value_loss_by_differences(clip: float) -> None:
    given = errors(5)
    values = given.pop("values").requires_grad_()
    loss, _ = value_loss(values, **given, clip=clip, loss_agg_mode="token-mean")
    (grad,) = torch.autograd.grad(loss, values)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            ends = []
            for step in (1e-6, -1e-6):
                moved = values.detach().clone()
                moved[i, j] += step
                ends.append(float(value_loss(moved, **given, clip=clip, loss_agg_mode="token-mean")[0]))
            assert float(grad[i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)
    assert bool((grad[~given["mask"]] == 0).all()) and bool((grad[given["mask"]] == 0).any()) == (clip > 0)


def test_explained_variance_by_hand() -> None:
    rollout, given = a_rollout(), errors(6)
    mask, values, returns = given["mask"], given["values"], given["returns"]
    found = value_columns(dataclasses.replace(rollout, mask=mask, completed=mask, values=values, returns=returns))
    v, r = values[mask].tolist(), returns[mask].tolist()
    gap = [b - a for a, b in zip(v, r, strict=True)]

    def spread(numbers: list[float]) -> float:
        return sum((x - sum(numbers) / len(numbers)) ** 2 for x in numbers)

    assert found["explained_variance"] == pytest.approx(1 - spread(gap) / spread(r))
    assert (found["value_mean"], found["return_mean"]) == pytest.approx((sum(v) / len(v), sum(r) / len(r)))
    assert value_columns(dataclasses.replace(rollout, values=None)) == {}


# --- one update, against plain torch in float64 ----------------------------------------------------------------------


def rollout_of(settings: TrainerConfig, *, double: bool = False) -> tuple[Rollout, Policy, Critic | None]:
    policy = build_policy(settings, EasyTask())
    critic = critic_of(settings, policy)
    for learner in (policy.model, critic.module if critic else None):
        if double and learner is not None:
            learner.double()
    generator = torch.Generator().manual_seed(0)
    return ppo.collect(policy, EasyTask(), settings, step=0, generator=generator, critic=critic), policy, critic


@functools.cache
def a_rollout() -> Rollout:
    return rollout_of(dataclasses.replace(TINY, advantage="gae"))[0]


def moved_rollout(rollout: Rollout, policy: Policy, critic: Critic, settings: TrainerConfig) -> Rollout:
    """Ragged, and of weights of a while ago: ratios, values and returns away from where they begin."""
    generator = torch.Generator().manual_seed(1)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(rollout.mask.shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(rollout.ids.shape[1]) < 1 + torch.arange(len(rollout.ids))[:, None] % 4
    return dataclasses.replace(
        rollout, mask=mask, completed=mask, old_logprob=rollout.old_logprob.double() + noise(0.3),
        advantages=noise(1.0), values=noise(0.2), returns=noise(1.0),
    )  # fmt: skip


def test_a_value_head_learns_whatever_reaches_the_policy() -> None:
    settings = dataclasses.replace(TINY, advantage="gae", critic="shared", value_coef=0.0)
    rollout, policy, critic = rollout_of(settings)
    assert critic is not None
    with torch.no_grad():
        critic.head.weight.fill_(0.1)
    alone = dataclasses.replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=settings.lr, weight_decay=0.0)
    made = ppo.update(policy, optimizer, alone, torch.arange(8), settings, None, seed=0, critic=critic)
    assert made.grad_norm == 0 and made.critic_grad_norm is not None and made.critic_grad_norm > 0
    assert not torch.equal(critic.head.weight, torch.full_like(critic.head.weight, 0.1))


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_update_is_adamw_on_policy_and_value_gradients(kind: str, micro_batches: int) -> None:
    settings = dataclasses.replace(
        TINY, advantage="gae", critic=kind, value_clip=0.3, value_coef=0.7, critic_lr=1e-2,  # type: ignore[arg-type]
        micro_batches=micro_batches, grad_clip=0.05,
    )  # fmt: skip
    rollout, policy, critic = rollout_of(settings, double=True)
    assert critic is not None
    with torch.no_grad():  # a head at 0 would send nothing into the network
        critic.head.weight.copy_(torch.linspace(-1, 1, 16, dtype=torch.float64))
    rollout = moved_rollout(rollout, policy, critic, settings)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=settings.lr, weight_decay=0.0)
    rows = torch.tensor([3, 0, 9, 12, 6, 5])
    before = {id(p): p.detach().clone() for module in (policy.model, critic.module) for p in module.parameters()}

    # by hand: everything from the model's own logits and hidden states
    prompts, ids, mask = rollout.prompts[rows], rollout.ids[rows], rollout.mask[rows]
    attention = torch.cat([prompts.mask, mask.long()], dim=1)
    inputs = {
        "input_ids": torch.cat([prompts.ids, ids], dim=1), "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp_min(0),
    }  # fmt: skip
    length = ids.shape[1]
    logp = torch.log_softmax(policy.model(**inputs).logits[:, -length - 1 : -1], dim=-1)
    ratio = (logp.gather(-1, ids[..., None])[..., 0] - rollout.old_logprob[rows]).exp()
    advantages = rollout.advantages[rows]
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    trunk = policy.model.model if kind == "shared" else critic.module["backbone"]
    hidden = trunk(**inputs)[0][:, -length - 1 : -1]
    values = hidden @ critic.head.weight[0] + critic.head.bias[0]
    old, returns = rollout.values[rows], rollout.returns[rows]  # type: ignore[index]
    near = torch.minimum(torch.maximum(values, old - 0.3), old + 0.3)
    squares = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    policy_loss, critic_loss = surrogate[mask].sum() / mask.sum(), 0.5 * squares[mask].sum() / mask.sum()
    total = policy_loss + (0.7 if kind == "shared" else 1.0) * critic_loss
    weights = [[*policy.model.parameters()], [*critic.module.parameters()]]
    grads = [
        *torch.autograd.grad(total, weights[0], retain_graph=True),
        *torch.autograd.grad(critic_loss, weights[1]),
    ]
    clipped = (squares - (values - returns) ** 2 > 0) & mask
    assert clipped.any() and not clipped[mask].all() and (ratio[mask] > 1.2).any() and (ratio[mask] < 0.8).any()

    made = ppo.update(policy, optimizer, rollout, rows, settings, None, seed=0, critic=critic)
    norms, lrs = (made.grad_norm, made.critic_grad_norm), (settings.lr, settings.critic_lr)
    grads = iter(grads)  # type: ignore[assignment]
    for group, norm, lr in zip(weights, norms, lrs, strict=True):
        own = [next(grads) for _ in group]  # type: ignore[call-overload]
        expected = math.sqrt(sum(float((g * g).sum()) for g in own))
        assert norm == pytest.approx(expected, rel=1e-6) and expected > 0.05
        for p, g in zip(group, own, strict=True):
            g = g * (0.05 / (expected + 1e-6))
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-8)  # the model's norms are in float32
            # the first step of AdamW: both means are the gradient's own
            torch.testing.assert_close(
                p.detach(), before[id(p)] - lr * p.grad / (p.grad.abs() + 1e-8), rtol=1e-9, atol=0
            )
    told = {name: [float(loss.metrics[name]) for loss in made.losses] for name in ("pg_loss", "value_loss")}
    assert sum(told["pg_loss"]) == pytest.approx(float(policy_loss.detach()), rel=1e-6)
    assert sum(told["value_loss"]) == pytest.approx(float(critic_loss.detach()), rel=1e-6)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_a_critic_counts_tokens_as_the_policys_loss_does(mode: str) -> None:
    settings = dataclasses.replace(TINY, advantage="gae", critic="shared", loss_agg_mode=mode)  # type: ignore[arg-type]
    rollout, policy, critic = rollout_of(settings)
    assert critic is not None
    rollout = moved_rollout(rollout, policy, critic, settings)
    rollout.mask = rollout.mask & (torch.arange(16) % 3 > 0)[:, None]  # the others were cut off
    rollout.longest, rows = 20, torch.arange(12)
    outputs = policy.outputs(rollout.prompts[rows], rollout.ids[rows], rollout.completed[rows]).detach()
    made = [
        critic.backward(policy, rollout, part, outputs[part], tokens=rollout.counts(rows)[0], sequences=8)
        for part in rows.chunk(3)
    ]
    assert rollout.values is not None and rollout.returns is not None and rollout.counts(rows)[1] == 8
    returns, old = rollout.returns[rows], rollout.values[rows]  # its values are 0
    squares = [torch.maximum(r**2, ((-o).clamp(-0.5, 0.5) + o - r) ** 2) for r, o in zip(returns, old, strict=True)]
    each = [0.5 * square[kept] for square, kept in zip(squares, rollout.mask[rows], strict=True) if bool(kept.any())]
    expected = {
        "token-mean": torch.cat(each).mean(),
        "seq-mean-token-sum": sum(x.sum() for x in each) / 8,
        "seq-mean-token-mean": sum(x.mean() for x in each) / 8,
        "seq-mean-token-sum-norm": sum(x.sum() for x in each) / 8 / 20,
    }[mode]
    assert sum(float(part["value_loss"]) for part in made) == pytest.approx(float(expected), rel=1e-6)


# --- trained runs ----------------------------------------------------------------------------------------------------

#: Estimator and critic; those that compare no completions have one of each prompt.
KINDS: dict[str, dict[str, Any]] = {
    "reinforce_plus_plus": {"samples_per_prompt": 1, "prompts_per_step": 16, "gamma": 0.95},
    "reinforce_plus_plus_baseline": {},
    "gae-shared": {
        "critic": "shared", "gae_lambda": 0.9, "value_clip": 0.02, "method": "clip_cov", "cov_low": -9.0,
        "cov_high": 9.0, "cov_ratio": 0.1,
    },
    "gae-separate": {"critic": "separate", "samples_per_prompt": 1, "prompts_per_step": 16, "critic_warmup": 1},
}  # fmt: skip
RUN = {**SHORT, "steps": 2, "eval_every": 0, "final_eval_prompts": 1, "final_eval_samples": 1, "epochs": 2}


def kind_of(name: str) -> dict[str, Any]:
    return {**RUN, "advantage": name.partition("-")[0], **KINDS[name]}


def saved(out: Path) -> dict[str, Tensor]:
    return load_file(out / checkpoint.CHECKPOINT)


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, trained(tmp_path_factory, **kind_of(request.param))


def test_resumed_is_the_whole_bit_for_bit(whole: tuple[str, Path], tmp_path: Path) -> None:
    """Also where the second half computes activations anew."""
    name, out = whole
    ppo.train(config(tmp_path / "halves", **{**kind_of(name), "steps": 1}))
    ppo.train(config(tmp_path / "halves", **kind_of(name), resume=True, gradient_checkpointing=True))
    assert_same_run(tmp_path / "halves", out)
    assert any(key.startswith("optimizers/critic") for key in saved(out)) == name.startswith("gae")


def test_micro_batches_share_the_trajectory(whole: tuple[str, Path], tmp_path: Path) -> None:
    name, out = whole
    ppo.train(config(tmp_path / "parts", **kind_of(name), micro_batches=2))
    assert_near(out, tmp_path / "parts")


def test_what_a_run_with_a_critic_tells_and_exports(whole: tuple[str, Path]) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    name, out = whole
    rows = rows_without_times(out)
    told = {"value_mean", "return_mean", "explained_variance"}
    of_updates = {"value_loss", "value_clipfrac", "critic_grad_norm", "critic_lr"}
    critic = name.startswith("gae")
    for row in rows:
        assert (told <= row.keys()) == critic and (of_updates <= row.keys()) == (critic and row is not rows[-1])
        assert ("pg_loss" in row) == (row["step"] >= KINDS[name].get("critic_warmup", 0) and row is not rows[-1])
    if critic:
        assert rows[1]["value_mean"] != 0 and rows[0]["value_mean"] == 0  # its head begins at 0
        assert rows[0]["critic_lr"] == TINY.critic_lr
        assert (rows[1]["value_clipfrac"] > 0) == (KINDS[name].get("value_clip") is not None)  # type: ignore[operator]
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        exported = set(file.keys())
    _, report = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert exported == {key.removeprefix("modules/policy/") for key in saved(out) if key.startswith("modules/policy")}


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_only_the_critic_learns_at_first(tmp_path: Path, kind: str) -> None:
    """And the course of a target entropy begins where the steps are, not where it is first asked."""
    settings = {**kind_of("gae-separate"), "critic": kind, "steps": 2, "critic_warmup": 2}
    start = {f"modules/policy/{k}": v for k, v in build_policy(TINY, EasyTask()).model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"^critic_warmup = 2: in all 2 steps the critic learns alone, and the policy"):
        ppo.train(config(tmp_path / "run", target_entropy="0:4.5,3:4.2", **settings))
    after = saved(tmp_path / "run")
    assert all(torch.equal(after[key], value) for key, value in start.items())
    assert bool((after["modules/critic/head.weight"] != 0).any())
    whole = {**settings, "steps": 3, "target_entropy": "0:4.5,3:4.2"}
    ppo.train(config(tmp_path / "run", **whole, resume=True))
    row = rows_without_times(tmp_path / "run")[2]
    assert row["target_entropy"] == pytest.approx(4.3) and "planned_dh" in row
    ppo.train(config(tmp_path / "whole", **whole))
    for out in (tmp_path / "run", tmp_path / "whole"):
        assert any(not torch.equal(saved(out)[key], value) for key, value in start.items())
        assert checkpoint.load_checkpoint(out / checkpoint.CHECKPOINT)["controller"]["calls"] == 3
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")


def test_another_estimator_on_resume_begins_its_critic_anew(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ppo.train(config(out, **{**RUN, "steps": 1}))
    gae = {**RUN, "advantage": "gae", "resume": True}
    told = "critic_warmup: expected 0, or more than the 1 finished steps, since .*got 1"
    with pytest.raises(ValueError, match=told):
        ppo.train(config(out, **{**gae, "critic_warmup": 1, "resume_changes": ("advantage", "critic_warmup")}))
    ppo.train(config(out, **{**gae, "steps": 2, "resume_changes": ("advantage",)}))
    rows = rows_without_times(out)
    assert "value_mean" not in rows[0] and rows[1]["value_mean"] == 0 and rows[1]["value_loss"] > 0  # type: ignore[operator]
    changed = {"critic_lr": 5e-4, "weight_decay": 0.01}
    ppo.train(config(out, **{**gae, **changed, "steps": 3, "resume_changes": tuple(changed)}))
    row = rows_without_times(out)[2]
    assert row["critic_lr"] == 5e-4 and row["value_mean"] != 0
    (group,) = checkpoint.load_checkpoint(out / checkpoint.CHECKPOINT)["optimizers"]["critic"]["param_groups"]
    assert group["lr"] == 5e-4 and group["weight_decay"] == 0.01


def test_a_critic_beside_an_adapter_shares_what_is_not_trained(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = {**kind_of("gae-separate"), "lora_rank": 2}
    one = saved(resumed(tmp_path, 1, **settings)[0])
    kept = {key.removeprefix("modules/critic/") for key in one if key.startswith("modules/critic/")}
    assert all("lora" in key or key in ("head.weight", "head.bias", "frozen_weights") for key in kept)
    assert any("lora" in key for key in kept)
    policy = build_policy(config(tmp_path, **settings), EasyTask())
    critic = critic_of(config(tmp_path, **settings), policy)
    assert critic is not None
    ours, policys = ({id(p): p for p in module.parameters()} for module in (critic.module, policy.model))
    assert {p.requires_grad for key, p in ours.items() if key in policys} == {False}
    assert all(p.requires_grad for key, p in ours.items() if key not in policys)


def test_mixed_precision_keeps_the_critic_in_float32(tmp_path: Path) -> None:
    for kind in ("shared", "separate"):
        out = ppo.train(
            config(tmp_path / kind, **{**kind_of("gae-shared"), "critic": kind, "steps": 1, "dtype": "mixed"})
        )
        kept = {key: value for key, value in saved(out).items() if key.startswith("modules/critic")}
        assert {value.dtype for value in kept.values()} == {torch.float32} and bool(
            kept["modules/critic/head.weight"].any()
        )


def test_the_experiment_at_the_start_of_a_sweep_has_a_critic_too(tmp_path: Path) -> None:
    settings = config(tmp_path, advantage="gae")
    build_policy(settings, EasyTask()).save(tmp_path / "model")
    found = sweep.start_experiment(settings, tmp_path / "model")
    assert len(found["predicted"]) == len(found["measured"]) > 0
