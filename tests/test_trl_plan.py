"""From a method's control to TRL's micro-batches, without TRL: dicts as its loss gets them."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations.trl.plan import Planner, Statistics, check, coefficients, penalty, placed

B, T = 4, 6
PARTS = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
DEFAULTS: dict[str, Any] = {
    "method": None, "method_options": None, "preset": None, "target_entropy": None, "target_method": "exact_cov",
    "target_observe": True, "plan_from": "auto", "fused_head": None, "seed": 7, "loss_type": "dapo", "epsilon": 0.2,
    "epsilon_high": None, "delta": None, "entropy_coef": 0.0, "use_adaptive_entropy": False, "num_iterations": 1,
    "steps_per_generation": 1, "gradient_accumulation_steps": 1, "max_completion_length": T,
    "importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
}  # fmt: skip


def config(**given: Any) -> SimpleNamespace:
    made = SimpleNamespace(**{**DEFAULTS, **given})
    check(made)
    return made


def micro_batch(seed: int, first_row: int = 0, off_policy: bool = False) -> tuple[dict[str, Any], Statistics]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    logprob = -draw(B, T).abs() - 0.1
    inputs = {
        "completion_mask": (torch.arange(T) < lengths).long(), "advantages": draw(B),
        "num_items_in_batch": torch.tensor(30), "ek_row": torch.arange(first_row, first_row + B),
    }  # fmt: skip
    if off_policy:
        inputs["old_per_token_logps"] = logprob + 0.3 * draw(B, T)
    return inputs, Statistics(logprob, draw(B, T).abs(), draw(B, T))


def planner(**given: Any) -> Planner:
    return Planner(config(**given), batch_group=None, ranks=1, vocab_size=100)


def plan(made: Planner, *micro: tuple[dict[str, Any], Statistics]) -> dict[str, float]:
    return made.plan([x for x, _ in micro], [y for _, y in micro], lr=1e-3, temperature=1.0)


def of_all(micro: tuple[tuple[dict[str, Any], Statistics], ...], name: str) -> Tensor:
    return torch.cat([inputs[name].expand(B, T) if inputs[name].dim() == 2 else inputs[name] for inputs, _ in micro])


def test_a_dropped_token_has_the_advantage_0_and_others_their_own() -> None:
    micro = (micro_batch(0), micro_batch(1, B))
    raw = of_all(micro, "advantages")
    metrics = plan(planner(method="exact_cov", method_options={"k": 5}, gradient_accumulation_steps=2,
                           steps_per_generation=2), *micro)  # fmt: skip
    found, mask = of_all(micro, "advantages"), of_all(micro, "completion_mask")
    assert ((found == 0) & (mask == 1)).sum() == metrics["touched"] == 5
    assert torch.equal(found[found != 0], raw[:, None].expand(found.shape)[found != 0])


def test_a_rollout_that_is_used_again_is_planned_from_its_own_advantages() -> None:
    micro, made = (micro_batch(0, off_policy=True),), planner(method="random", method_options={"ratio": 0.4})
    raw, found = micro[0][0]["advantages"].clone(), []
    for _ in range(4):
        plan(made, *micro)
        found.append(micro[0][0]["advantages"] == 0)
    assert all(x.sum() == found[0].sum() for x in found) and not torch.equal(found[0], found[1])
    assert torch.equal(micro[0][0]["ek_advantages"], raw)


@pytest.mark.parametrize("method", [name for name in ek.methods() if name != "kl_cov"])
def test_effects_are_those_of_the_control(method: str) -> None:
    """As ``ek.policy_loss(control=)`` has them: gradient of TRL's term in these advantages, on-policy."""
    inputs, read = micro_batch(3)
    given = {"k": 4, "low": -100.0, "high": 100.0} if method == "clip_cov" else {"mu": 0.1} if "clip_" in method else {}
    if method == "erc":
        inputs["ek_entropy"] = read.entropy * 1.1
    made = planner(method=method, method_options=given)
    raw, mask = inputs["advantages"], inputs["completion_mask"]
    batch = ek.TokenBatch(
        read.logprob, None, raw, mask, entropy=read.entropy, old_entropy=inputs.get("ek_entropy"),
        vocab_covariance=read.vocab_covariance, coefficient=made.weights(inputs),
        token_index=inputs["ek_row"][:, None] * 2**32 + torch.arange(T),
    )  # fmt: skip
    decided = ek.control(method, batch, seed=7, **given)
    metrics = plan(made, (inputs, read))
    logprob = read.logprob.clone().requires_grad_()
    entropy = read.entropy.clone().requires_grad_()
    loss = ek.policy_loss(
        logprob, read.logprob, raw, mask, control=decided, entropy=entropy, loss_agg_mode="token-sum"
    ).loss  # fmt: skip
    expected = torch.autograd.grad(loss, logprob)[0]
    mine = -inputs["advantages"] * mask if inputs["advantages"].dim() == 2 else -inputs["advantages"][:, None] * mask
    torch.testing.assert_close(mine, expected.float(), rtol=1e-5, atol=1e-6)
    assert metrics["touched"] == decided.metrics["touched"]
    if decided.entropy_coef is not None:
        assert metrics["entropy_coef"] == decided.entropy_coef and made.sets_bonus


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_the_penalty_is_summed_as_the_loss_is(loss_type: str) -> None:
    inputs, read = micro_batch(5, off_policy=True)
    made = planner(method="kl_cov", method_options={"k": 3, "kl_coef": 2.0}, loss_type=loss_type, num_iterations=2)
    plan(made, (inputs, read))
    logprob = read.logprob.clone().requires_grad_()
    value = penalty(inputs, logprob)
    gap, chosen = read.logprob - inputs["old_per_token_logps"], inputs["ek_penalty"] != 0
    assert chosen.sum() == 3 and not made.clips
    mode, more = {
        "grpo": ("seq-mean-token-mean", {"global_batch_size": B}), "bnpo": ("token-mean", {}),
        "dr_grpo": ("seq-mean-token-sum-norm", {"global_batch_size": B, "loss_scale_factor": T}),
        "dapo": ("token-mean", {"batch_num_tokens": 30}), "luspo": ("seq-mean-token-sum", {"global_batch_size": B}),
    }[loss_type]  # fmt: skip
    expected = ek.aggregate(2.0 * gap.abs() * chosen, inputs["completion_mask"], loss_agg_mode=mode, **more)
    torch.testing.assert_close(value, expected.float())
    (gradient,) = torch.autograd.grad(value, logprob)
    torch.testing.assert_close(gradient, inputs["ek_penalty"] * gap.sign())
    del inputs["old_per_token_logps"]  # on-policy
    assert penalty(inputs, logprob) == 0


@pytest.mark.parametrize("method", ["exact_cov", "steer", "repo"])
def test_advantages_per_token(method: str) -> None:
    """As a subclass of TRL's trainer may have them."""
    found = []
    for per_token in (False, True):
        inputs, read = micro_batch(3)
        if per_token:
            inputs["advantages"] = inputs["advantages"][:, None].expand(B, T).clone()
        plan(planner(method=method), (inputs, read))
        found.append(inputs["advantages"])
    assert torch.equal(*found) and found[0].shape == (B, T)


def test_weights_of_a_step_add_up_over_micro_batches_and_ranks() -> None:
    """dapo: 1/N of the rollout's tokens in the step; grpo: 1/B of each row's mean."""
    inputs, _ = micro_batch(0)
    mask = inputs["completion_mask"]
    given: dict[str, Any] = {"accumulation": 2, "steps_per_generation": 4, "ranks": 3, "longest": T}
    dapo = coefficients(inputs, "dapo", **given)
    torch.testing.assert_close(dapo, mask / (30 / 3 / 4 * 2))
    grpo = coefficients(inputs, "grpo", **given)
    torch.testing.assert_close(grpo.sum(-1), torch.full((B,), 1 / (B * 2)))
    ratio = torch.rand(B, 1)
    weighed = coefficients({**inputs, "importance_sampling_ratio": ratio}, "grpo", **given)
    torch.testing.assert_close(weighed, grpo * ratio)
    tools = {**inputs, "tool_mask": (torch.arange(T) > 0).long().expand(B, T)}
    assert not coefficients(tools, "bnpo", **given)[:, 0].any()


@pytest.mark.parametrize("compact", [False, True])
def test_reads_are_put_where_their_tokens_are(compact: bool) -> None:
    """TRL reads the positions that count, or on a CPU all of them; prompts are padded on the left, answers right."""
    attention = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    positions = torch.arange(18.0).view(3, 6)[:, 1:]
    counts = attention.bool()[:, 1:] & (torch.arange(5) >= 2)
    found = placed(positions[counts] if compact else positions.reshape(-1), attention, 3)
    expected = torch.where(attention[:, 3:] == 1, torch.arange(18.0).view(3, 6)[:, 3:], 0.0)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError):
        placed(torch.zeros(4), attention, 3)


def test_selection_does_not_depend_on_padding_or_order() -> None:
    micro = micro_batch(0), micro_batch(1, B)
    given: dict[str, Any] = {"method": "random", "method_options": {"ratio": 0.3}, **PARTS}
    plan(planner(**given), *micro)
    expected = [inputs["advantages"] == 0 for inputs, _ in micro]
    again = micro_batch(1, B), micro_batch(0)
    for inputs, _ in again:
        inputs["completion_mask"] = torch.nn.functional.pad(inputs["completion_mask"], (0, 3))
    again = tuple((x, Statistics(*(torch.nn.functional.pad(t, (0, 3)) for t in y))) for x, y in again)
    plan(planner(**given), *again)
    assert [torch.equal(x["advantages"][:, :T] == 0, y) for (x, _), y in zip(again, expected[::-1], strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize(
    ("given", "source", "old"),
    [
        ({"method": "exact_cov"}, "forward", False),
        ({"method": "exact_cov", "plan_from": "old"}, "old", True),
        ({"method": "exact_cov", **PARTS}, "old", True),
        ({"method": "clip_b", "plan_from": "fresh", **PARTS}, "fresh", True),
        ({"method": "erc", "num_iterations": 2}, "forward", True),
        ({"method": "erc", **PARTS}, "fresh", True),
        ({"target_entropy": 1.0}, "forward", False),
        ({"target_entropy": 1.0, "num_iterations": 2}, "old", True),
        ({"target_entropy": 1.0, "steps_per_generation": 2, "plan_from": "fresh"}, "old", True),
    ],
)  # fmt: skip
def test_where_statistics_come_from(given: dict[str, Any], source: str, old: bool) -> None:
    made = planner(**given)
    assert (made.source, made.old) == (source, old)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="it is installed")
def test_without_trl_a_line_says_what_to_install() -> None:
    import entropy_kernels.integrations.trl as drop_in

    with pytest.raises(ImportError, match=r"trl.GRPOTrainer needs trl, which is not installed: pip install trl$"):
        drop_in.GRPOTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'PPOTrainer'"):
        drop_in.PPOTrainer  # noqa: B018
