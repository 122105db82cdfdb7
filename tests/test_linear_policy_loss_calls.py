"""linear_policy_loss as it is called: buffers, factors, checkpoints, wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import entropy_kernels as ek
from conftest import Place, places
from linear_policy_cases import (
    BUDGETS,
    LOSSES,
    VALID,
    B,
    H,
    L,
    V,
    assert_same,
    composed,
    counted_products,
    fused,
    make,
)  # fmt: skip


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted_products(monkeypatch)


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("count", (1, 2, 3, 6))
def test_micro_batches_into_one_buffer(method: str, count: int) -> None:
    """The sum does not depend on the split: selection over the batch, gradient of the head in the buffer alone."""
    select: dict[str, Any] = {"clip_cov": {"seed": 3, "ratio": 0.1, "low": 0.01, "high": 50.0}}.get(
        method, {"ratio": 0.1}
    )
    case = make(method, entropy_coef=0.01, **({} if method == "ppo" else select))
    assert case.mask is not None
    expected, right = composed(case)
    logprob = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias).logprob
    rows = [slice(i, i + B // count) for i in range(0, B, B // count)]
    selection = ek.SelectionBatch()
    for r in rows:
        exclude = None
        if method == "clip_cov":  # as the preset does: tokens that the PPO clip holds
            ratio, a = (logprob[r] - case.old_logprob[r]).exp(), case.advantages[r]
            exclude = -a * ratio.clamp(0.8, 1.2) > -a * ratio
        selection.add(logprob[r], case.advantages[r], case.mask[r], exclude=exclude)
    masks: list[dict[str, Tensor]] = [{}] * count
    if method == "clip_cov":
        masks = [{"dropped": m} for m in selection.clip_cov(**select)]
    if method == "kl_cov":
        masks = [{"penalized": m} for m in selection.kl_cov(**select)]
    buffer = torch.full_like(case.weight, 3.0)
    hidden, weight, bias = case.leaves()
    total = 0.0
    for r, given in zip(rows, masks, strict=True):
        assert hidden is not None
        loss = ek.linear_policy_loss(
            hidden[r], weight, case.target[r], case.old_logprob[r], case.advantages[r], case.mask[r], bias,
            method=method, grad_buffer=buffer, memory_budget=BUDGETS[torch.float64][2], entropy_coef=0.01,
            batch_num_tokens=int(case.mask.sum()), **given,
        ).loss  # fmt: skip
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-12)
    assert weight is not None and weight.grad is None and hidden is not None and bias is not None
    for ours, theirs in zip((hidden.grad, buffer - 3.0, bias.grad), right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_buffer_is_fp32_and_not_rounded(dtype: torch.dtype) -> None:
    """Many small gradients of halves add up in fp32; in bf16 they would stop to."""
    case = make("ppo", entropy_coef=0.01).to(dtype)
    case.advantages, case.old_logprob = case.advantages.float(), case.old_logprob.float()
    buffer = torch.zeros(V, H)
    for _ in range(40):
        fused(case, BUDGETS[dtype][1], grad_buffer=buffer)
    once = torch.zeros(V, H)
    fused(case, BUDGETS[dtype][1], grad_buffer=once)
    assert (buffer / 40 - once).norm() <= 1e-5 * once.norm()
    _, right = composed(case)
    assert right[1] is not None
    assert (once - right[1].float()).norm() <= 3e-2 * once.norm()


def test_a_factor_on_the_loss() -> None:
    """Applied once, before anything is rounded to fp16, whose small gradients a scaler is there to save."""
    case = make("kl_cov", ratio=0.1)
    hidden, weight, bias = case.leaves()
    args = (case.target, case.old_logprob, case.advantages, case.mask, bias)
    loss = ek.linear_policy_loss(hidden, weight, *args, method="kl_cov", ratio=0.1).loss
    (loss * -3).backward()
    _, right = composed(case)
    for leaf, theirs in zip((hidden, weight, bias), right, strict=True):
        assert leaf is not None and theirs is not None
        torch.testing.assert_close(leaf.grad, -3 * theirs, rtol=1e-11, atol=1e-14)
    small = make("ppo", batch_num_tokens=10**7).to(torch.float16)
    small.advantages, small.old_logprob = small.advantages.float(), small.old_logprob.float()
    hidden, weight, bias = small.leaves()
    args = (small.target, small.old_logprob, small.advantages, small.mask, bias)
    loss = ek.linear_policy_loss(hidden, weight, *args, batch_num_tokens=10**7).loss
    (loss * 65536).backward()
    _, exact = composed(small.to(torch.float64))
    for leaf, right64 in zip((hidden, weight, bias), exact, strict=True):
        assert leaf is not None and leaf.grad is not None and right64 is not None
        assert (leaf.grad.double() / 65536 - right64).norm() <= 3e-2 * right64.norm()


def test_large_advantages_in_fp16() -> None:
    """Raw rewards: what the composed path holds as a share of a mean does not overflow here."""
    case = make("ppo")
    case.advantages = (case.advantages * 1e5).float()
    case.old_logprob = case.old_logprob.float()
    low = case.to(torch.float16)
    _, exact = composed(low.to(torch.float64))
    _, base = composed(low)
    for budget in BUDGETS[torch.float16]:
        _, found = fused(low, budget)
        for right, theirs, ours in zip(exact, base, found, strict=True):
            assert right is not None and theirs is not None and ours is not None
            theirs, ours = ((x.double() - right).norm() / right.norm() for x in (theirs, ours))
            assert ours <= 1.5 * theirs


NUMBERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "numpy's ints": ("kl_cov", {"k": np.int64(3), "dp_size": np.int32(2), "batch_num_tokens": np.int64(70)},
                     {"k": 3, "dp_size": 2, "batch_num_tokens": 70}),
    "numpy's others": ("clip_cov", {"ratio": np.float64(0.1), "seed": np.int64(3), "preset": np.str_("paper"),
                                    "clip_low": np.float64(0.5), "low": np.float64(-1)},
                       {"ratio": 0.1, "seed": 3, "preset": "paper", "clip_low": 0.5, "low": -1.0}),
    "an open band": ("clip_cov", {"ratio": 0.1, "seed": 3, "low": 0.01, "high": float("inf")},
                     {"ratio": 0.1, "seed": 3, "low": 0.01, "high": 1e300}),
    "no band": ("clip_cov", {"ratio": 0.1, "seed": 3, "low": -float("inf"), "high": np.inf},
                {"ratio": 0.1, "seed": 3, "low": -1e300, "high": 1e300}),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_library(name: str) -> None:
    method, given, plain = NUMBERS[name]
    result = assert_same(make(method, **given), BUDGETS[torch.float64][2], 1e-12)
    assert result.metrics["selected_frac"] > 0
    assert torch.equal(result.loss, fused(make(method, **plain), BUDGETS[torch.float64][2])[0].loss)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed(reentrant: bool, products: list[int]) -> None:
    """The gradients of the loss inside are not the checkpoint's: it has nothing to make again but what others saved."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    assert case.mask is not None
    _, right = composed(case)
    for early in (False, True):
        for buffer in (None, torch.zeros_like(case.weight)):
            hidden, weight, bias = leaves = case.leaves()

            def loss(h: Tensor, w: Tensor, b: Tensor, buffer: Tensor | None = buffer) -> Tensor:
                return ek.linear_policy_loss(
                    h, w, case.target, case.old_logprob, case.advantages, case.mask, b, method="kl_cov",
                    memory_budget=BUDGETS[torch.float64][2], grad_buffer=buffer, **case.options,
                ).loss  # fmt: skip

            products.clear()
            with set_checkpoint_early_stop(early):
                checkpoint(loss, hidden, weight, bias, use_reentrant=reentrant).backward()
            if not reentrant:
                assert sum(products) <= 3 * (len(VALID) + int(0.1 * len(VALID))) * H * V
            found = [None if x is None else x.grad for x in leaves]
            if buffer is not None:
                found[1] = buffer
            for ours, theirs in zip(found, right, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def test_constants() -> None:
    """A gradient is never lost without a word."""
    case = make("kl_cov")
    hidden, weight, bias = case.leaves()
    args = (hidden, weight, case.target, case.old_logprob, case.advantages, case.mask, bias)
    for name in ("entropy_coef", "kl_coef", "loss_scale_factor"):
        with pytest.raises(ValueError, match=f"{name}: expected a constant, got a tensor that requires grad"):
            ek.linear_policy_loss(*args, method="kl_cov", **{name: torch.tensor(0.1, requires_grad=True)})
    frozen = (case.hidden, case.weight, *args[2:-1])
    buffer = torch.zeros_like(case.weight)
    with pytest.raises(ValueError, match="grad_buffer: expected None for a weight that needs no gradient"):
        ek.linear_policy_loss(*frozen, grad_buffer=buffer)
    with torch.no_grad():  # as an evaluation with the arguments of a training step
        ek.linear_policy_loss(*args, method="kl_cov", grad_buffer=buffer)
    assert not buffer.any()


def test_without_gradients_and_through_a_head() -> None:
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    expected, right = composed(case)
    with torch.no_grad():
        result = ek.linear_policy_loss(
            case.hidden, case.weight, case.target, case.old_logprob, case.advantages, case.mask, case.bias,
            method="kl_cov", **case.options,
        )  # fmt: skip
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss.detach())
    head = torch.nn.Linear(H, V, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(case.weight)
        head.bias.copy_(case.bias)
    hidden = case.hidden.clone().requires_grad_()
    result = ek.linear_policy_loss(
        hidden, head, case.target, case.old_logprob, case.advantages, case.mask, method="kl_cov", **case.options
    )
    result.loss.backward()
    for ours, theirs in zip((hidden.grad, head.weight.grad, head.bias.grad), right, strict=True):
        torch.testing.assert_close(ours, theirs)


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "method": (ValueError, "method: expected one of 'ppo', 'clip_cov', 'kl_cov', got 'grpo'", {"method": "grpo"}),
    "another method's option": (TypeError, "got seed", {"seed": 1}),
    "entropy": (TypeError, "entropy is computed here", {"entropy": torch.zeros(B, L)}),
    "no seed": (ValueError, "seed: expected an int", {"method": "clip_cov"}),
    "a mask and a ratio": (ValueError, "dropped: expected no", {"method": "clip_cov", "ratio": 0.1,
                                                               "dropped": torch.zeros(B, L)}),
    "aggregation": (ValueError, "loss_agg_mode: expected", {"loss_agg_mode": "mean"}),
    "dp_size": (ValueError, "batch_num_tokens: expected", {"dp_size": 2}),
    "reference": (ValueError, "ref_logprob: expected", {"ref_kl_coef": 0.1}),
    "reference's shape": (ValueError, "ref_logprob: expected", {"ref_logprob": torch.zeros(3)}),
    "clip": (ValueError, "clip_low: expected >= 0", {"clip_low": -1.0}),
    "preset": (ValueError, "preset: expected one of", {"method": "kl_cov", "preset": "mine"}),
    "buffer's dtype": (ValueError, "grad_buffer: expected torch.float32", {"grad_buffer": torch.zeros(V, H).half()}),
    "buffer's shape": (ValueError, "grad_buffer: expected torch.float32", {"grad_buffer": torch.zeros(H, V)}),
    "buffer": (TypeError, "grad_buffer: expected a plain torch.Tensor", {"grad_buffer": 3}),
    "buffer that requires grad": (ValueError, "grad_buffer: expected a tensor that does not",
                                  {"grad_buffer": torch.zeros(V, H, requires_grad=True)}),
    "budget": (ValueError, "memory_budget: expected at least", {"memory_budget": 1000}),
    "temperature": (ValueError, "temperature", {"temperature": 0.0}),
    "ignore_index": (TypeError, "ignore_index: expected an int, got float", {"ignore_index": 1.5}),
    "backend": (ValueError, "backend", {"backend": "mkl"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_come_before_anything_is_added(name: str) -> None:
    kind, message, options = ERRORS[name]
    case = make("ppo").to(torch.float32)
    case.old_logprob = case.old_logprob.float()
    hidden, weight, bias = case.leaves()
    buffer = torch.zeros(V, H)
    with pytest.raises(kind, match=message):
        ek.linear_policy_loss(
            hidden, weight, case.target, case.old_logprob, case.advantages, case.mask, bias,
            **{"grad_buffer": buffer, "memory_budget": 120_000, **options},
        )  # fmt: skip
    assert not buffer.any()


def test_errors_of_tensors() -> None:
    case = make("ppo")
    hidden, weight, bias = case.leaves()
    args = [hidden, weight, case.target, case.old_logprob, case.advantages, case.mask]
    for i, value, message in (
        (0, case.hidden[:2], "target: expected the shape of hidden"),
        (1, case.weight.float(), "weight: expected the dtype of hidden"),
        (2, case.target + V, "target: expected ids in"),
        (3, case.old_logprob[:, :3], "old_logprob: expected target's shape"),
        (3, case.target, "old_logprob|floating"),
        (4, case.advantages[:, :3], "advantages: expected"),
        (0, [1.0], "hidden: expected a torch.Tensor"),
        (5, torch.ones(3), "mask: expected"),
    ):
        wrong = [*args[:i], value, *args[i + 1 :]]
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            ek.linear_policy_loss(*wrong, bias)
    with pytest.raises(ValueError, match="grad_buffer: expected None for a weight that needs no gradient"):
        ek.linear_policy_loss(
            hidden, case.weight, *args[2:], case.bias, grad_buffer=torch.zeros(V, H, dtype=torch.float64)
        )


def test_one_backward_pass() -> None:
    case = make("ppo")
    hidden, weight, bias = case.leaves()
    args = (case.target, case.old_logprob, case.advantages, case.mask, bias)
    loss = ek.linear_policy_loss(hidden, weight, *args).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for a second one"):
        loss.backward()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(ek.linear_policy_loss(hidden, weight, *args).loss, hidden, create_graph=True)
    buffer = torch.zeros_like(case.weight)
    loss = ek.linear_policy_loss(hidden, weight, *args, grad_buffer=buffer).loss
    with pytest.raises(RuntimeError, match=r"grad_buffer: expected a loss .* got a factor of 0.5"):
        (0.5 * loss).backward()
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden))
        ek.linear_policy_loss(dual, weight, *args)


@pytest.mark.parametrize("place", places("token_covariance"))
def test_a_factor_is_not_rounded(place: Place) -> None:
    """1/3 has no exact bf16; the gradients are rounded, not the factor. Old log-probs may be of any dtype."""
    case = make("ppo", entropy_coef=0.01).to(torch.bfloat16)
    rest = [x.to(place.device) for x in (case.target, case.old_logprob, case.advantages.float(), case.mask)]  # type: ignore[union-attr]
    results = []
    for factor in (1.0, 1 / 3):
        leaves = [x.detach().to(place.device).requires_grad_() for x in case.leaves()]  # type: ignore[union-attr]
        loss = ek.linear_policy_loss(*leaves[:2], *rest, leaves[2], entropy_coef=0.01, backend=place.backend).loss
        (loss * factor).backward()
        results.append([x.grad for x in leaves])
    hidden, third = results[0][0], results[1][0]  # rounded once before the factor, and once after it
    assert torch.equal((hidden.float() * torch.tensor(1 / 3, device=place.device)).bfloat16(), third)
