"""linear_policy_loss as it is called: buffers, factors, checkpoints, wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import entropy_kernels as ek
from conftest import BackendDevice, backend_devices
from linear_policy_cases import (
    BUDGETS,
    LOSSES,
    MANY,
    SELECT,
    VALID,
    B,
    H,
    L,
    V,
    assert_same,
    composed,
    counted_products,
    fused,
    gradients,
    make,
)  # fmt: skip

products = pytest.fixture(counted_products)


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("count", (1, 2, 3, 6))
def test_micro_batches_into_one_buffer(method: str, count: int) -> None:
    """The sum does not depend on the split: selection over the batch, gradient of the head in the buffer alone."""
    case = make(method, entropy_coef=0.01, **SELECT[method])
    expected, right = composed(case)
    case.options = {"entropy_coef": 0.01, "batch_num_tokens": int(case.mask.sum())}
    micro = [case.part(slice(i, i + B // count)) for i in range(0, B, B // count)]
    selection = ek.SelectionBatch()
    for part in micro:
        exclude = None
        if method == "clip_cov":  # as the preset does: tokens that the PPO clip holds
            ratio, a = (part.logprob - part.old_logprob).exp(), part.advantages
            exclude = -a * ratio.clamp(0.8, 1.2) > -a * ratio
        selection.add(part.logprob, part.advantages, part.mask, exclude=exclude)
    masks: list[dict[str, Tensor]] = [{}] * count
    if method == "clip_cov":
        masks = [{"dropped": m} for m in selection.clip_cov(**SELECT[method])]
    if method == "kl_cov":
        masks = [{"penalized": m} for m in selection.kl_cov(**SELECT[method])]
    buffer = torch.full_like(case.weight, 3.0)
    hidden, weight, bias = case.leaves()
    total = 0.0
    for part, h, given in zip(micro, hidden.split(B // count), masks, strict=True):
        loss = part.loss(h, weight, bias, grad_buffer=buffer, memory_budget=MANY, **given).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-12)
    assert weight.grad is None
    torch.testing.assert_close([hidden.grad, buffer - 3.0, bias.grad], right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_buffer_is_fp32_and_not_rounded(dtype: torch.dtype) -> None:
    """Many small gradients of halves add up in fp32; in bf16 they would stop to."""
    case = make("ppo", entropy_coef=0.01).to(dtype, torch.float32)
    buffer, once = torch.zeros(2, V, H)
    for _ in range(40):
        fused(case, BUDGETS[dtype][1], grad_buffer=buffer)
    fused(case, BUDGETS[dtype][1], grad_buffer=once)
    assert (buffer / 40 - once).norm() <= 1e-5 * once.norm()
    _, right = composed(case)
    assert (once - right[1].float()).norm() <= 3e-2 * once.norm()


def test_a_factor_on_the_loss() -> None:
    """Applied once, before anything is rounded to fp16, whose small gradients a scaler is there to save."""
    case = make("kl_cov", ratio=0.1)
    leaves = case.leaves()
    (case.loss(*leaves).loss * -3).backward()
    _, right = composed(case)
    torch.testing.assert_close(gradients(leaves), [-3 * x for x in right], rtol=1e-11, atol=1e-14)
    small = make("ppo", batch_num_tokens=10**7).to(torch.float16, torch.float32)
    leaves = small.leaves()
    (small.loss(*leaves).loss * 65536).backward()
    _, exact = composed(small.to(torch.float64))
    for ours, right64 in zip(gradients(leaves), exact, strict=True):
        assert (ours.double() / 65536 - right64).norm() <= 3e-2 * right64.norm()


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
    result = assert_same(make(method, **given), MANY)
    assert result.metrics["selected_frac"] > 0
    assert torch.equal(result.loss, fused(make(method, **plain), MANY)[0].loss)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed(reentrant: bool, products: list[int]) -> None:
    """The gradients of the loss inside are not the checkpoint's: it has nothing to make again but what others saved."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    _, right = composed(case)
    for early in (False, True):
        for buffer in (None, torch.ones_like(case.weight)):
            leaves = case.leaves()

            def loss(*inputs: Tensor, buffer: Tensor | None = buffer) -> Tensor:
                return case.loss(*inputs, memory_budget=MANY, grad_buffer=buffer).loss

            products.clear()
            with set_checkpoint_early_stop(early):
                checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
            if not reentrant:
                assert sum(products) <= 3 * (len(VALID) + int(0.1 * len(VALID))) * H * V
            found = gradients(leaves)
            if buffer is not None:
                assert found[1] is None
                found[1] = buffer - 1
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-14)


def test_constants() -> None:
    """A gradient is never lost without a word."""
    case = make("kl_cov")
    leaves = case.leaves()
    for name in ("entropy_coef", "kl_coef", "loss_scale_factor"):
        with pytest.raises(ValueError, match=f"{name}: expected a constant, got a tensor that requires grad"):
            case.loss(*leaves, **{name: torch.tensor(0.1, requires_grad=True)})
    buffer = torch.zeros_like(case.weight)
    for frozen in ((case.hidden, case.weight), (leaves[0], case.weight, case.bias)):
        with pytest.raises(ValueError, match="grad_buffer: expected None for a weight that needs no gradient"):
            case.loss(*frozen, method="ppo", grad_buffer=buffer)
    with torch.no_grad():  # as an evaluation with the arguments of a training step
        case.loss(*leaves, grad_buffer=buffer)
    assert not buffer.any()


def test_without_gradients_and_through_a_head() -> None:
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    expected, right = composed(case)
    head = torch.nn.Linear(H, V, dtype=torch.float64)
    with torch.no_grad():
        result = case.loss(case.hidden, case.weight, case.bias)
        head.weight.copy_(case.weight)
        head.bias.copy_(case.bias)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss.detach())
    hidden = case.hidden.clone().requires_grad_()
    case.loss(hidden, head).loss.backward()
    torch.testing.assert_close([hidden.grad, head.weight.grad, head.bias.grad], right)


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
    "buffer": (TypeError, "grad_buffer: expected a torch.Tensor or None, got int", {"grad_buffer": 3}),
    "buffer that requires grad": (ValueError, "grad_buffer: expected a tensor that does not",
                                  {"grad_buffer": torch.zeros(V, H, requires_grad=True)}),
    "budget": (ValueError, "memory_budget: expected at least", {"budget": 1000}),
    "temperature": (ValueError, "temperature", {"temperature": 0.0}),
    "ignore_index": (TypeError, "ignore_index: expected an int, got float", {"ignore_index": 1.5}),
    "backend": (ValueError, "backend", {"backend": "mkl"}),
    "a typing error": (TypeError, r"clip_lo: expected one of .*delta; got clip_lo; did you mean clip_low\?",
                       {"clip_lo": 0.1}),
    "another surrogate's option": (TypeError, "tau_pos: .*an option of surrogate='sapo'",
                                   {"surrogate": "cispo", "tau_pos": 1.0}),
    "a surrogate that is none": (ValueError, "surrogate: expected an ek.Surrogate or one of ppo, ",
                                 {"surrogate": "gsop"}),
    "weights of a wrong shape": (ValueError, "token_weight: expected logprob's shape", {"token_weight": torch.ones(L)}),
    "sequences that end early": (ValueError, "cu_seqlens: expected numbers that rise",
                                 {"cu_seqlens": torch.tensor([0, 7])}),
    "no rule for what is not finite": (ValueError, "nonfinite: expected one of 'propagate', 'drop', got",
                                       {"nonfinite": "keep"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_come_before_anything_is_added(name: str) -> None:
    kind, message, options = ERRORS[name]
    buffer = torch.zeros(V, H)
    with pytest.raises(kind, match=message):
        fused(make("ppo").to(torch.float32, torch.float32), **{"budget": 120_000, "grad_buffer": buffer, **options})
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
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            ek.linear_policy_loss(*args[:i], value, *args[i + 1 :], bias)


def test_one_backward_pass() -> None:
    case = make("ppo")
    hidden, weight, bias = leaves = case.leaves()
    loss = case.loss(*leaves).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for a second one"):
        loss.backward()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(case.loss(*leaves).loss, hidden, create_graph=True)
    loss = case.loss(*leaves, grad_buffer=torch.zeros_like(case.weight)).loss
    with pytest.raises(RuntimeError, match=r"grad_buffer: expected a loss .* got a factor of 0.5"):
        (0.5 * loss).backward()
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden))
        case.loss(dual, weight, bias)


@pytest.mark.parametrize("on", backend_devices("token_covariance"))
def test_a_factor_is_not_rounded(on: BackendDevice) -> None:
    """1/3 has no exact bf16; the gradients are rounded, not the factor. Old log-probs may be of any dtype."""
    case = make("ppo", entropy_coef=0.01).to(torch.bfloat16).changed("advantages", Tensor.float).on(on.device)
    results = []
    for factor in (1.0, 1 / 3):
        leaves = case.leaves()
        (case.loss(*leaves, backend=on.backend).loss * factor).backward()
        results.append(leaves[0].grad)
    hidden, third = results  # rounded once before the factor, and once after it
    assert torch.equal((hidden.float() * torch.tensor(1 / 3, device=on.device)).bfloat16(), third)
