"""vocab_group: a head sharded over real gloo ranks against the whole one, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from calls import same_bits
from gloo import collectives_called, equal_shards, one_result, run_ranks, run_ranks_once, with_empty_shard
from linear_cases import Linear, judge, make, upstream
from sample import INF, NAN

WORLDS = (2, 3, 4)
# by rank, again and again; the free memory that gives the default on a GPU is another on each
BUDGETS = {"keep": [1 << 30], "recompute": [40_000], "keep beside recompute": [1 << 30, 40_000]}


def unequal(vocab: int, world: int) -> list[int]:
    widths = [1, *(70 * (i + 1) for i in range(world - 2))]
    return [*widths, vocab - sum(widths)]


def padded(dtype: torch.dtype) -> Linear:
    """1150 ids in 1200 rows; the others hold NaN."""
    case = make(dtype=dtype, vocab=1200, vocab_size=1150, temperature=0.8)
    assert case.bias is not None
    case.weight[1150:], case.bias[1150:] = NAN, INF
    case.target[0] = 1149
    return case


def ignored(dtype: torch.dtype) -> Linear:
    case = make(2, 12, dtype=dtype, vocab=1200)
    case.target[0, 3:], case.hidden[0, 3:] = -100, NAN
    return case


SCENARIOS: dict[str, tuple[Callable[[torch.dtype], Linear], Callable | None, torch.dtype]] = {
    "equal": (lambda d: make(dtype=d, vocab=1200), None, torch.float32),
    "equal bf16": (lambda d: make(dtype=d, vocab=1200), None, torch.bfloat16),
    "equal fp64": (lambda d: make(dtype=d, vocab=1200, temperature=0.4), None, torch.float64),
    "fp32 logits": (lambda d: make(dtype=d, vocab=1200, logits_dtype=torch.float32), None, torch.bfloat16),
    "unequal": (lambda d: make(dtype=d, vocab=1201, bias=False), unequal, torch.float32),
    "an empty shard": (lambda d: make(dtype=d, vocab=1201), with_empty_shard, torch.float32),
    "padded": (padded, None, torch.float32),
    "padded unequal": (padded, unequal, torch.float32),
    "softcap": (lambda d: make(dtype=d, vocab=1200, softcap=3.0), None, torch.float32),
    "ignored": (ignored, unequal, torch.float32),
    "no tokens": (lambda d: make(0, dtype=d, vocab=1200), None, torch.float32),
}


def widths_of(name: str, case: Linear, world: int) -> list[int]:
    return (SCENARIOS[name][1] or equal_shards)(case.weight.shape[0], world)


def shard_results(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Runs on every rank: outputs and gradients of this rank's shard, for each scenario and mode."""
    results = {}
    for name, (build, split, dtype) in SCENARIOS.items():
        case = build(dtype)
        widths = widths_of(name, case, world)
        start = sum(widths[:rank])
        rows = slice(start, start + widths[rank])
        for mode, budgets in BUDGETS.items():
            leaves = case.copy("hidden")
            weight = case.weight[rows].clone().requires_grad_()
            bias = None if case.bias is None else case.bias[rows].clone().requires_grad_()
            out = ek.linear_token_stats(
                leaves.hidden, weight, case.target, bias, **case.kwargs, vocab_group=dist.group.WORLD,
                vocab_start=start if split else None, memory_budget=budgets[rank % len(budgets)],
            )  # fmt: skip
            up = upstream(case)
            torch.autograd.backward([getattr(out, n) for n in up], list(up.values()))
            found = {key: value.detach() for key, value in out._asdict().items()}
            found |= {"d_hidden": leaves.hidden.grad, "d_weight": weight.grad}
            if bias is not None:
                found["d_bias"] = bias.grad
            results[name, mode] = found
    return results


@pytest.mark.parametrize("mode", BUDGETS)
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_shards_equal_the_whole(name: str, mode: str, world: int) -> None:
    ranks = [result[name, mode] for result in run_ranks_once(world, shard_results)]
    build, _, dtype = SCENARIOS[name]
    case = build(dtype)
    for other in ranks[1:]:
        for key in ("logprob", "entropy", "collision", "vocab_covariance", "d_hidden"):
            assert same_bits(other[key], ranks[0][key]), f"{key} differs between ranks"
    whole = {key: ranks[0][key] for key in ranks[0] if key not in ("d_weight", "d_bias")}
    for key in ("d_weight", "d_bias"):
        if key in ranks[0]:
            assert [rank[key].shape[0] for rank in ranks] == widths_of(name, case, world)
            whole[key] = torch.cat([rank[key] for rank in ranks])
    judge(case, whole)


def test_the_hidden_gradient_of_one_rank_fails() -> None:
    """The comparison sees a reduction that was left out."""
    found = dict(run_ranks_once(2, shard_results)[0]["equal", "keep"])
    case = make(vocab=1200)
    alone = ek.linear_token_stats(case.hidden, case.weight[:600], case.target.clamp(max=599), case.bias[:600])  # type: ignore[index]
    for key in ("d_weight", "d_bias"):
        found.pop(key)
    judge(case, found)
    with pytest.raises(AssertionError, match="d_hidden"):
        judge(case, found | {"d_hidden": found["d_hidden"] / 2})
    with pytest.raises(AssertionError, match="entropy"):
        judge(case, {"entropy": alone.entropy})


def collectives(rank: int, world: int, budgets: list[int]) -> dict[str, Any]:
    calls = collectives_called()
    case = make(vocab=1200)
    found = {}
    for grad in (("hidden", "weight"), ("weight",)):
        del calls[:]
        leaves = case.copy(*grad)
        weight = leaves.weight[600 * rank : 600 * rank + 600]
        out = ek.linear_token_stats(
            leaves.hidden, weight, case.target, vocab_group=dist.group.WORLD, memory_budget=budgets[rank % len(budgets)]
        )
        forward = list(calls)
        (out.logprob.sum() + out.collision.sum()).backward()
        found["+".join(grad)] = (forward, calls[len(forward) :])
    return found


@pytest.mark.parametrize("mode", BUDGETS)
def test_one_collective_each_way(mode: str) -> None:
    """The state's all-gather forward; backward the hidden states' gradient, once, where it is needed."""
    for found in run_ranks(2, collectives, BUDGETS[mode]):
        for forward, _ in found.values():
            assert len(forward) == 1 and "gather" in forward[0]
        assert found["hidden+weight"][1] == ["all_reduce"] and found["weight"][1] == []


def wrong_calls(rank: int, world: int) -> dict[str, str]:
    """Calls that must fail on every rank alike: a rank that raised alone would leave the others waiting."""
    hidden, weight = torch.randn(3, 4), torch.randn(10, 4)
    messages = {}
    for name, target, options in (
        ("label beyond all shards", [0, 20, 1], {}),
        ("label in the padding", [0, 15, 1], {"vocab_size": 15}),
        ("negative label", [0, -1, 1], {}),
    ):
        try:
            ek.linear_logprob_entropy(hidden, weight, torch.tensor(target), vocab_group=dist.group.WORLD, **options)
            messages[name] = "nothing was raised"
        except IndexError as error:
            messages[name] = str(error)
    ek.linear_logprob_entropy(hidden, weight, torch.tensor([0, 19, 5]), vocab_group=dist.group.WORLD)
    return messages


def test_errors_are_the_same_on_every_rank() -> None:
    first = one_result(2, wrong_calls)
    for message in first.values():
        assert message.startswith("target: expected") and "got" in message


def compiled(rank: int, world: int) -> dict[str, torch.Tensor]:
    case = make(vocab=1200, temperature=0.7)
    leaves = case.copy("hidden")
    weight = case.weight[600 * rank : 600 * rank + 600].clone().requires_grad_()
    bias = case.bias[600 * rank : 600 * rank + 600].clone().requires_grad_()  # type: ignore[index]
    group = dist.group.WORLD

    @torch.compile(fullgraph=True, backend="aot_eager")
    def statistics(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        return ek.linear_token_stats(h, w, case.target, b, temperature=0.7, vocab_group=group)

    out = statistics(leaves.hidden, weight, bias)
    up = upstream(case)
    torch.autograd.backward([getattr(out, n) for n in up], list(up.values()))
    assert leaves.hidden.grad is not None and weight.grad is not None and bias.grad is not None
    return {
        "logprob": out.logprob.detach(),
        "d_hidden": leaves.hidden.grad,
        "d_weight": weight.grad,
        "d_bias": bias.grad,
    }


def test_compiled() -> None:
    first, second = run_ranks(2, compiled)
    whole = {key: first[key] for key in ("logprob", "d_hidden")}
    judge(
        make(vocab=1200, temperature=0.7), whole | {k: torch.cat([first[k], second[k]]) for k in ("d_weight", "d_bias")}
    )
