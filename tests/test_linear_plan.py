"""linear_plan: its memory against what torch allocates, its modes, its tiles."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels._memory import peak_allocated
from entropy_kernels.ops import linear_plan as planning
from linear_cases import Linear, budgets, make

GRADS = (("hidden", "weight", "bias"), ("hidden",), ("weight",), ())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """oneDNN's workspace, which is not counted, grows with the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peak_of(case: Linear, grad: tuple[str, ...], budget: int) -> int:
    """Bytes that torch's allocator hands out at once in forward and backward, without results and gradients."""
    leaves = case.copy(*grad)
    ours = 0

    def forward_and_backward() -> None:
        nonlocal ours
        out = ek.linear_logprob_entropy(
            leaves.hidden, leaves.weight, leaves.target, leaves.bias, **case.kwargs, memory_budget=budget
        )
        results = [*out]
        if grad:
            results += torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [getattr(leaves, n) for n in grad])
        ours = sum(value.numel() * value.element_size() for value in results)

    peak = peak_allocated(forward_and_backward, torch.device("cpu"))
    assert peak > 0
    return peak - ours


@pytest.mark.parametrize("grad", GRADS, ids=lambda g: "+".join(g) or "none")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_predicted_memory(dtype: torch.dtype, grad: tuple[str, ...], undisturbed: None) -> None:
    """What is used stays within the plan, the plan within the budget; and the plan is not far above what is used."""
    case = make(300, features=64, vocab=6000, dtype=dtype)
    for options in ({}, {"logits_dtype": torch.float32}):
        each = dataclasses.replace(case, kwargs=options)
        leaves = each.copy(*grad)
        for _, budget in budgets(each):
            plan = ek.linear_plan(leaves.hidden, leaves.weight, leaves.bias, **options, memory_budget=budget)
            used = peak_of(each, grad, budget)
            # vectors of tokens, and what torch's products need by themselves: oneDNN an fp32 copy of the hidden states
            small = 100_000 + 40 * 300 + 4 * 300 * 64
            assert used <= plan.peak_bytes + small, f"{plan}: {used}"
            assert plan.peak_bytes <= budget
            assert plan.peak_bytes <= 2.5 * used + small, f"{plan}: {used}"
            if plan.mode == "keep":
                assert plan.kept_bytes >= 300 * 6000 * (options.get("logits_dtype") or dtype).itemsize


def large(rows: int, features: int, vocab: int, *grad: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shapes = {"hidden": (rows, features), "weight": (vocab, features)}
    return [torch.empty(s, dtype=dtype, device="meta", requires_grad=n in grad) for n, s in shapes.items()]


@pytest.mark.parametrize("vocab", (32_000, 128_256, 151_936, 262_144))
def test_plans_of_real_sizes(vocab: int) -> None:
    """At 8192 tokens: within a gigabyte, wide tiles, all rows in each, so that the head's gradient is never summed."""
    plan = ek.linear_plan(*large(8192, 4096, vocab, "hidden", "weight"))
    assert plan.mode == ("keep" if vocab == 32_000 else "recompute")
    assert plan.products == (3 if plan.mode == "keep" else 4)
    assert plan.peak_bytes <= 1 << 30 and plan.row_chunks == 1 and plan.vocab_chunk >= 8192
    frozen = ek.linear_plan(*large(8192, 4096, vocab, "hidden"))
    assert frozen.products == plan.products - 1
    rollout = ek.linear_plan(*large(8192, 4096, vocab))
    assert rollout.mode == "no_grad" and rollout.products == 1 and rollout.peak_bytes <= 1 << 30
    roomy = ek.linear_plan(*large(8192, 4096, vocab, "hidden", "weight"), memory_budget=8 << 30)
    assert roomy.mode == "keep" and roomy.kept_bytes >= 8192 * vocab * 2


def test_a_million_tokens_without_gradients_take_little() -> None:
    plan = ek.linear_plan(*large(1 << 20, 4096, 151_936), memory_budget=2 << 30)
    assert plan.peak_bytes <= 2 << 30 and plan.row_chunk >= 4096 and plan.vocab_chunk >= 1024


def test_grad_mode_counts() -> None:
    hidden, weight = large(64, 8, 1000, "hidden", "weight")
    assert ek.linear_plan(hidden, weight).mode == "keep"
    with torch.no_grad():
        assert ek.linear_plan(hidden, weight).mode == "no_grad"


def test_tiles_cover_everything_once() -> None:
    case = make(300, features=64, vocab=6001)
    for grad in GRADS:
        leaves = case.copy(*grad)
        for _, budget in budgets(case):
            plan = ek.linear_plan(leaves.hidden, leaves.weight, leaves.bias, memory_budget=budget)
            assert (plan.row_chunks - 1) * plan.row_chunk < 300 <= plan.row_chunks * plan.row_chunk
            assert (plan.vocab_chunks - 1) * plan.vocab_chunk < 6001 <= plan.vocab_chunks * plan.vocab_chunk


def test_padded() -> None:
    assert [planning.padded(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


@pytest.mark.parametrize("grad", GRADS[:3], ids="+".join)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_predicted_memory_of_a_policy_loss(dtype: torch.dtype, grad: tuple[str, ...], undisturbed: None) -> None:
    """What is used stays within the plan, and the plan is not far above it; the budget bounds what is no gradient."""
    rows, features, vocab = 600, 64, 6000
    case = make(rows, features=features, vocab=vocab, dtype=dtype)
    old, advantages = torch.zeros(rows), torch.linspace(-1, 1, rows)
    for logits_dtype in (None, torch.float32):
        seen = set()
        for budget in (1 << 30, 9_000_000, 2_000_000):
            leaves = case.copy(*grad)
            plan = ek.linear_plan(
                leaves.hidden, leaves.weight, leaves.bias, memory_budget=budget, logits_dtype=logits_dtype,
                policy_loss=True,
            )  # fmt: skip
            assert plan.mode == "in_forward" and plan.products == 1 + ("hidden" in grad) + ("weight" in grad)
            assert (plan.row_chunks - 1) * plan.row_chunk < rows <= plan.row_chunks * plan.row_chunk
            seen.add(plan.row_chunks)
            given = 0

            def forward_and_backward(leaves: Linear = leaves, budget: int = budget, logits: Any = logits_dtype) -> None:
                nonlocal given
                loss = ek.linear_policy_loss(
                    leaves.hidden, leaves.weight, case.target, old, advantages, None, leaves.bias, method="clip_cov",
                    seed=1, low=-1e9, high=1e9, ratio=2e-3, memory_budget=budget, logits_dtype=logits,
                ).loss  # fmt: skip
                gradients = torch.autograd.grad(loss, [getattr(leaves, n) for n in grad])
                given = sum(value.numel() * value.element_size() for value in gradients)

            used = peak_allocated(forward_and_backward, torch.device("cpu")) - given
            small = 300_000 + 100 * rows + 4 * rows * features
            assert used <= plan.peak_bytes + small, f"{plan}: {used}"
            assert plan.peak_bytes <= 2.5 * used + small, f"{plan}: {used}"
            fixed = vocab * features * 8 + rows * features * 24
            assert plan.peak_bytes <= budget + fixed
        assert 1 in seen and max(seen) > 3


@pytest.mark.parametrize("changes", [0, 3, 16, None])
def test_the_least_budget_of_a_policy_loss_is_the_one_it_names(changes: int | None) -> None:
    def rows(budget: int) -> int:
        dtypes = [torch.float32] * 4
        return planning.loss_rows(
            planning.Problem(50, 32, 300, *dtypes, "cpu", True, True, False, False, budget), changes
        )

    with pytest.raises(ValueError, match="memory_budget: expected at least") as refused:
        rows(1)
    named = re.search(r"at least (\d+) bytes", str(refused.value))
    assert named is not None
    least = int(named[1])
    assert rows(least) >= 16
    with pytest.raises(ValueError, match=f"expected at least {least} bytes"):
        rows(least - 1)
