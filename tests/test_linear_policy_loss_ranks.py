"""linear_policy_loss over real gloo ranks: a sharded vocabulary, a batch over ranks; both against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import entropy_kernels as ek
from calls import same_bits
from gloo import one_result, run_ranks, run_ranks_once
from linear_policy_cases import MANY, ONE, SCENARIOS, SELECT, B, Case, V, composed, fused, make

NAMES = (
    "ppo, all terms",
    "clip_cov, entropy bonus",
    "kl_cov, first and last",
    "kl_cov, all",
    "kl_cov, was 0",
    "sequences",
)
BUDGET = {"one part": ONE, "many parts": MANY}


def widths(world: int, equal: bool) -> list[int]:
    """Of the shards of 804 entries, of which the last is padding; unequal ones with an empty one among them."""
    if equal:
        return [-(-V // world)] * (world - 1) + [V + 1 - -(-V // world) * (world - 1)]
    return [V - 20 - (world - 2), *[0, 1][: world - 2], 21 + world - 2 - sum([0, 1][: world - 2])]


def sharded(rank: int, world: int) -> dict[tuple[str, str, bool], Any]:
    """Runs on every rank: the loss, its metrics and gradients."""
    results = {}
    for name in NAMES:
        case = SCENARIOS[name]()
        nothing = torch.full((1, case.weight.shape[1]), float("nan"), dtype=torch.float64)
        padded = torch.cat([case.weight, nothing]), torch.cat([case.bias, nothing[0, :1]])
        for mode, budget in BUDGET.items():
            for equal in (True, False):
                width = widths(world, equal)
                start = sum(width[:rank])
                case.weight, case.bias = (x[start : start + width[rank]] for x in padded)
                case.head = {"vocab_group": dist.group.WORLD, "vocab_start": start, "vocab_size": V}
                results[name, mode, equal] = fused(case, budget)
    return results


@pytest.mark.parametrize("equal", (True, False), ids=("equal", "unequal"))
@pytest.mark.parametrize("mode", BUDGET)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", (2, 3, 4))
def test_a_sharded_vocabulary(world: int, name: str, mode: str, equal: bool) -> None:
    ranks = [result[name, mode, equal] for result in run_ranks_once(world, sharded)]
    (first, (hidden, *_)), right = ranks[0], composed(SCENARIOS[name]())
    for result, (other, *_) in ranks[1:]:
        assert same_bits(result.loss, first.loss) and same_bits(other, hidden)
        assert same_bits(result.metrics["ratio_mean"], first.metrics["ratio_mean"])
    assert [weight.shape[0] for _, (_, weight, _) in ranks] == widths(world, equal)
    torch.testing.assert_close(first, right[0], rtol=1e-12, atol=1e-13)
    heads = [torch.cat([found[i] for _, found in ranks]) for i in (1, 2)]
    assert not any(x[V:].any() for x in heads)
    torch.testing.assert_close([hidden, *(x[:V] for x in heads)], right[1], rtol=1e-10, atol=1e-14)


def batches() -> dict[str, Case]:
    cases = {method: make(method, entropy_coef=0.01, **options) for method, options in SELECT.items()}
    dropping = make("ppo", surrogate="gspo", nonfinite="drop")
    dropping.old_logprob[-1, -1] = float("nan")
    return {**cases, "a token that is dropped": dropping}


def split(rank: int, world: int) -> dict[str, Any]:
    """Runs on every rank: its sequences of the batch, of unequal number; gradients are summed."""
    results = {}
    rows = slice(*(0, 1, B)[rank : rank + 2])
    for name, case in batches().items():
        index = torch.arange(case.mask.numel()).view(case.mask.shape)[rows]
        select = {} if case.method == "ppo" else {"token_index": index}
        results[name] = fused(case.part(rows), MANY, batch_group=dist.group.WORLD, **select)
    return results


def test_a_batch_over_two_ranks() -> None:
    ranks = run_ranks(2, split)
    for name, case in batches().items():
        expected, right = composed(case)
        (one, ours), (two, theirs) = (rank[name] for rank in ranks)
        torch.testing.assert_close(one.loss + two.loss, expected.loss, rtol=1e-12, atol=1e-13)
        sums = [torch.cat([ours[0], theirs[0]]), ours[1] + theirs[1], ours[2] + theirs[2]]
        torch.testing.assert_close(sums, right, rtol=1e-10, atol=1e-14)
        if case.method != "ppo":
            shares = [x.metrics["selected_frac"] for x in (one, two, expected)]
            assert shares[0] == shares[1] == shares[2] > 0


def dtensors(rank: int, world: int) -> dict[str, Any]:
    """Runs on every rank: a DTensor head, gathered or as this rank's shard, without a buffer and with one."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    shard = distribute_tensor(case.weight, init_device_mesh("cpu", (world,)), [Shard(0)]).requires_grad_()

    def call(buffer: Any, group: Any) -> Any:
        shard.grad = None
        case.loss(case.hidden, shard, memory_budget=MANY, vocab_group=group, grad_buffer=buffer).loss.backward()
        return shard.grad

    results: dict[str, Any] = {
        "gathered": call(None, None).full_tensor(), "shard": call(None, dist.group.WORLD).full_tensor(),
        "buffer": torch.ones_like(shard.to_local()).detach(),
    }  # fmt: skip
    results["untouched"] = call(results["buffer"], dist.group.WORLD) is None
    for name, buffer, group in (
        ("DTensor", torch.zeros_like(shard).detach(), dist.group.WORLD),
        ("gathered weight", torch.zeros_like(case.weight), None),
    ):
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
        torch.testing.assert_close(rank["gathered"], right, rtol=1e-10, atol=1e-13)  # both have all tokens: a mean
        torch.testing.assert_close(rank["shard"], right, rtol=1e-10, atol=1e-13)
        assert rank["untouched"]
        assert "grad_buffer: expected a plain torch.Tensor" in rank["DTensor"]
        assert "grad_buffer: expected None beside a DTensor" in rank["gathered weight"]
    torch.testing.assert_close(torch.cat([rank["buffer"] for rank in ranks]) - 1, right, rtol=1e-10, atol=1e-13)


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
        grads.append(w.grad[WIDE:].double())
    exact, base = grads
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= 1.05 * (base - exact).norm()


def disagreeing(rank: int, world: int) -> dict[str, str]:
    """Messages of calls in which the last rank has another argument; nothing may be added to a buffer."""
    last, case = rank == world - 1, make("ppo")
    start = V // world * rank
    stop = V if last else start + V // world
    other = case.target.clone()
    other[0, 0] = (other[0, 0] + 1) % V
    calls: dict[str, dict[str, Any]] = {
        "target": {"target": other if last else case.target},
        "target, ignored by one": {"target": torch.full_like(other, -100) if last else case.target},
        "temperature": {"temperature": 1.0 + last},
        "softcap": {"softcap": 30.0 if last else None},
        "ignore_index": {"ignore_index": -1 if last else -100},
        "vocab_size": {"vocab_size": V - last},
        "vocab_start": {"vocab_start": start - last},
        "clip_low": {"clip_low": 0.3 if last else 0.2},
        "surrogate": {"surrogate": "cispo" if last else "ppo"},
        "loss_agg_mode": {"loss_agg_mode": "token-sum" if last else "token-mean"},
        "loss_agg_mode, composed on one": {"loss_agg_mode": "none" if last else "token-mean", "grad_buffer": None},
        "entropy_coef": {"entropy_coef": 0.1 * last},
        "dp_size": {"dp_size": 1 + last, "batch_num_tokens": 9},
        "batch_num_tokens": {"batch_num_tokens": 9 + last},
        "old_logprob": {"old_logprob": case.old_logprob + last},
        "old_logprob, composed": {"old_logprob": case.old_logprob + last, "loss_agg_mode": "none", "grad_buffer": None},
        "advantages": {"advantages": case.advantages * (1 + last)},
        "advantages, in another order": {"advantages": case.advantages.flip(0) if last else case.advantages},
        "advantages, but for their last bits": {"advantages": case.advantages * (1 + 1e-7 * last)},
        "token_weight": {"token_weight": torch.ones_like(case.advantages) if last else None},
        "dropped": {"method": "clip_cov", "dropped": case.mask & (not last)},
        "seed": {"method": "clip_cov", "ratio": 0.4, "seed": 1 + last},
        "seed, counted": {"method": "clip_cov", "ratio": 0.4, "seed": ek.SeedCounter(1 + last)},
        "ratio": {"method": "clip_cov", "ratio": torch.tensor(0.4 + last / 8), "seed": 1},
        "k": {"method": "kl_cov", "k": 1 + last},
        "low": {"method": "clip_cov", "low": 0.5 * last, "seed": 1},
    }
    messages = {}
    for name, changes in calls.items():
        buffer = torch.zeros(stop - start, case.weight.shape[1], dtype=torch.float64)
        weight = case.weight[start:stop].clone().requires_grad_()
        given = {
            "vocab_group": dist.group.WORLD,
            "vocab_start": start,
            "vocab_size": V,
            "memory_budget": MANY,
            **changes,
        }
        own = (case.target, case.old_logprob, case.advantages)
        tensors = [given.pop(name, x) for name, x in zip(("target", "old_logprob", "advantages"), own, strict=True)]
        given = {"grad_buffer": buffer, **given}
        try:
            ek.linear_policy_loss(case.hidden, weight, *tensors, case.mask, **given)
            messages[name] = "nothing was raised"
        except (ValueError, IndexError) as error:
            messages[name] = str(error)
        assert name.endswith("last bits") or not buffer.any(), name
    return messages


def test_ranks_that_disagree_all_raise_the_same() -> None:
    first = one_result(2, disagreeing)
    assert first.pop("advantages, but for their last bits") == "nothing was raised"
    for name, message in first.items():
        assert message.startswith(f"{name.split(',')[0]}: expected") and "ranks of the vocab_group" in message, message
