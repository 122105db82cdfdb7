"""linear_policy_loss over real gloo ranks: a sharded vocabulary, a batch over ranks; both against one rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import entropy_kernels as ek
from calls import same_bits
from gloo import run_ranks
from linear_policy_cases import BUDGETS, SCENARIOS, B, Case, V, composed, make

NAMES = (
    "ppo, all terms",
    "clip_cov, entropy bonus",
    "kl_cov, first and last",
    "kl_cov, all",
    "kl_cov, was 0",
    "sequences",
)
BUDGET = {"one part": 1 << 30, "many parts": BUDGETS[torch.float64][2]}


def widths(world: int, equal: bool) -> list[int]:
    """Of the shards of 804 entries, of which the last is padding; unequal ones with an empty one among them."""
    if equal:
        return [-(-V // world)] * (world - 1) + [V + 1 - -(-V // world) * (world - 1)]
    return [V - 20 - (world - 2), *[0, 1][: world - 2], 21 + world - 2 - sum([0, 1][: world - 2])]


def sharded(rank: int, world: int) -> dict[tuple[str, str, bool], dict[str, Any]]:
    """Runs on every rank."""
    results = {}
    for name in NAMES:
        case = SCENARIOS[name]()
        assert case.bias is not None
        nothing = torch.full((1, case.weight.shape[1]), float("nan"), dtype=torch.float64)
        padded = torch.cat([case.weight, nothing]), torch.cat([case.bias, nothing[0, :1]])
        for mode, budget in BUDGET.items():
            for equal in (True, False):
                width = widths(world, equal)
                start = sum(width[:rank])
                weight, bias = (x[start : start + width[rank]].clone().requires_grad_() for x in padded)
                hidden = case.hidden.clone().requires_grad_()
                result = ek.linear_policy_loss(
                    hidden, weight, case.target, case.old_logprob, case.advantages, case.mask, bias,
                    method=case.method, vocab_group=dist.group.WORLD, vocab_start=start, vocab_size=V,
                    memory_budget=budget, **case.options,
                )  # fmt: skip
                result.loss.backward()
                results[name, mode, equal] = {
                    "loss": result.loss.detach(), "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad,
                    **{f"metric {k}": v for k, v in result.metrics.items()},
                }  # fmt: skip
    return results


@functools.cache
def sharded_results(world: int) -> list[Any]:
    return run_ranks(world, sharded)


@pytest.mark.parametrize("equal", (True, False), ids=("equal", "unequal"))
@pytest.mark.parametrize("mode", BUDGET)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", (2, 3, 4))
def test_a_sharded_vocabulary(world: int, name: str, mode: str, equal: bool) -> None:
    ranks = [result[name, mode, equal] for result in sharded_results(world)]
    assert [rank["weight"].shape[0] for rank in ranks] == widths(world, equal)
    expected, (hidden, weight, bias) = composed(SCENARIOS[name]())
    for other in ranks[1:]:
        for key in ("loss", "hidden", "metric ratio_mean"):
            assert same_bits(other[key], ranks[0][key]), key
    torch.testing.assert_close(ranks[0]["loss"], expected.loss.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ranks[0]["hidden"], hidden, rtol=1e-10, atol=1e-14)
    for key, right in (("weight", weight), ("bias", bias)):
        ours = torch.cat([rank[key] for rank in ranks])
        assert not ours[V:].any()
        torch.testing.assert_close(ours[:V], right, rtol=1e-10, atol=1e-13)
    for key, value in expected.metrics.items():
        torch.testing.assert_close(ranks[0][f"metric {key}"], value, rtol=1e-12, atol=1e-13)


BATCHES: dict[str, Callable[[], Case]] = {
    "ppo": lambda: make("ppo", entropy_coef=0.01),
    "clip_cov": lambda: make("clip_cov", entropy_coef=0.01, seed=3, ratio=0.1, low=0.01, high=50.0),
    "kl_cov": lambda: make("kl_cov", entropy_coef=0.01, ratio=0.1),
    "a token that is dropped": lambda: make("ppo", surrogate="gspo", nonfinite="drop"),
}


def split(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Runs on every rank: its sequences of the batch, of unequal number; gradients are summed."""
    results = {}
    first = (0, 1, B)[rank : rank + 2]
    rows = slice(*first)
    for name, batch in BATCHES.items():
        case = batch()
        case.old_logprob[-1, -1] += float("nan") if "nonfinite" in case.options else 0.0
        assert case.mask is not None and case.bias is not None
        weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
        hidden = case.hidden[rows].clone().requires_grad_()
        index = torch.arange(case.mask.numel()).view(case.mask.shape)[rows]
        if case.method != "ppo":
            case.options["token_index"] = index
        result = ek.linear_policy_loss(
            hidden, weight, case.target[rows], case.old_logprob[rows], case.advantages[rows], case.mask[rows], bias,
            method=case.method, batch_group=dist.group.WORLD, memory_budget=BUDGET["many parts"], **case.options,
        )  # fmt: skip
        result.loss.backward()
        results[name] = {
            "loss": result.loss.detach(), "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad,
            "selected": result.metrics.get("selected_frac"),
        }  # fmt: skip
    return results


def test_a_batch_over_two_ranks() -> None:
    ranks = run_ranks(2, split)
    for name, batch in BATCHES.items():
        case = batch()
        case.old_logprob[-1, -1] += float("nan") if "nonfinite" in case.options else 0.0
        expected, (hidden, weight, bias) = composed(case)
        found = [rank[name] for rank in ranks]
        torch.testing.assert_close(sum(f["loss"] for f in found), expected.loss.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.cat([f["hidden"] for f in found]), hidden, rtol=1e-10, atol=1e-14)
        for key, right in (("weight", weight), ("bias", bias)):
            torch.testing.assert_close(sum(f[key] for f in found), right, rtol=1e-10, atol=1e-13)
        if case.method != "ppo":
            assert found[0]["selected"] == found[1]["selected"] == expected.metrics["selected_frac"] > 0


def dtensors(rank: int, world: int) -> dict[str, Any]:
    """Runs on every rank: a DTensor head, gathered or as this rank's shard, without a buffer and with one."""
    mesh = init_device_mesh("cpu", (world,))
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    shard = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()

    def call(buffer: Any, group: Any) -> None:
        ek.linear_policy_loss(
            case.hidden, shard, case.target, case.old_logprob, case.advantages, case.mask, method="kl_cov",
            memory_budget=BUDGET["many parts"], vocab_group=group, grad_buffer=buffer, **case.options,
        ).loss.backward()  # fmt: skip

    results: dict[str, Any] = {}
    for name, group in (("gathered", None), ("shard", dist.group.WORLD)):
        shard.grad = None
        call(None, group)
        results[name] = shard.grad.full_tensor()
    shard.grad = None
    results["buffer"] = torch.zeros_like(shard.to_local()).detach()
    call(results["buffer"], dist.group.WORLD)
    results["untouched"] = shard.grad is None
    whole = torch.zeros_like(case.weight)
    for name, buffer, group in (
        ("DTensor", torch.zeros_like(shard).detach(), dist.group.WORLD), ("gathered weight", whole, None)
    ):  # fmt: skip
        try:
            call(buffer, group)
        except (TypeError, ValueError) as error:
            results[name] = str(error)
    return results


def test_a_dtensor_head() -> None:
    ranks = run_ranks(2, dtensors)
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    case.bias = None
    _, (_, right, _) = composed(case)
    for rank in ranks:
        torch.testing.assert_close(rank["gathered"], 2 * right, rtol=1e-10, atol=1e-13)  # both ranks have all tokens
        torch.testing.assert_close(rank["shard"], right, rtol=1e-10, atol=1e-13)
        assert rank["untouched"]
        assert "grad_buffer: expected a plain torch.Tensor" in rank["DTensor"]
        assert "grad_buffer: expected None beside a DTensor" in rank["gathered weight"]
    torch.testing.assert_close(torch.cat([rank["buffer"] for rank in ranks]), right, rtol=1e-10, atol=1e-13)


N, H, WIDE, NARROW = 1000, 16, 1900, 100


def bf16_batch() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=g).bfloat16(), torch.randn(WIDE + NARROW, H, generator=g).bfloat16()
    target = torch.randint(WIDE + NARROW, (N,), generator=g)
    old = ek.linear_logprob_entropy(hidden, weight, target).logprob + 0.1 * torch.randn(N, generator=g)
    return hidden, weight, target, old, torch.randn(N, generator=g)


def narrow(rank: int, world: int) -> torch.Tensor:
    """Runs on every rank: a shard that needs many parts, and one that alone would need a single one."""
    hidden, weight, target, old, advantages = bf16_batch()
    start, stop = ((0, WIDE), (WIDE, WIDE + NARROW))[rank]
    mine = weight[start:stop].clone().requires_grad_()
    ek.linear_policy_loss(
        hidden, mine, target, old, advantages, None, vocab_group=dist.group.WORLD, vocab_start=start,
        vocab_size=WIDE + NARROW, memory_budget=1_200_000, logits_dtype=torch.float32,
    ).loss.backward()  # fmt: skip
    assert mine.grad is not None
    return mine.grad


def test_a_narrow_shard_is_summed_as_the_others() -> None:
    """In fp32 and rounded once, though its own budget asks for no parts."""
    ours = run_ranks(2, narrow)[1]
    hidden, weight, target, old, advantages = bf16_batch()
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        w = weight.to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        logprob = ek.linear_logprob_entropy(hidden.to(dtype), w, target, logits_dtype=wide).logprob
        ek.policy_loss(logprob, old, advantages, None).loss.backward()
        assert w.grad is not None
        grads.append(w.grad[WIDE:].double())
    exact, base = grads
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= 1.05 * (base - exact).norm()
