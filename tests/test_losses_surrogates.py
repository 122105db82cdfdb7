"""Every surrogate against its float64 reference: value, gradient and metrics, padded and packed, far off, your own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference_surrogates as ref
from loss_cases import Batch, assert_matches, ek, leaf, random_options
from surrogate_cases import CASES, OPTIONS, case_id, far_off, surrogate_batch, weights_of

pytestmark = pytest.mark.usefixtures("loss_place")

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
BATCHES = 60
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
# What stops a gradient within its value, which differences do not see
STOPPED = {"gspo_token", "cispo", "cispo_trl", "dppo_tv", "dppo_kl", "vespo", "ce_gppo"}


def run(surrogate: Any, batch: Batch, **options: Any) -> tuple[Any, Tensor]:
    """The loss after its backward pass, and the leaf with the gradient."""
    logprob = leaf(batch.logprob)
    out = ek.policy_loss(logprob, *batch.args[1:], surrogate=surrogate, **options)
    out.loss.sum().backward()
    return out, logprob


def array(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else np.nan_to_num(x.double().numpy(), nan=0.0, posinf=0.0, neginf=0.0)


def assert_exact(out: Any, logprob: Tensor, expected: ref.Reference, name: str) -> None:
    """To 1e-10 of what the loss, or the gradient of a token, is made of."""
    assert logprob.grad is not None
    spread = 1 + np.abs(expected.log_ratio)
    error = abs(float(out.loss.detach()) - expected.loss)
    assert error <= 1e-10 * expected.absolute, f"{name}: loss {float(out.loss.detach())}, expected {expected.loss}"
    error = np.abs(logprob.grad.numpy() - expected.logprob)
    assert (error <= 1e-10 * expected.size + 1e-13 * expected.size * spread).all(), (
        f"{name}: gradient off by {error.max()}"
    )


def test_every_surrogate_is_judged() -> None:
    assert set(ek.surrogates()) == set(OPTIONS) == set(ref.SURROGATES)


@every_case
@every_dtype
def test_surrogate_equals_the_reference(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """Padding holds NaN and infinities, a third of the batches has weights, a sixth a reference KL with its ratio."""
    name, options = case
    for seed in range(BATCHES):
        batch = surrogate_batch(seed, dtype)
        weight = weights_of(seed, batch) if seed % 3 == 0 else None
        whole, _ = random_options(seed, batch.mask)
        mode = MODES[seed // 2 % len(MODES)]
        kl: dict[str, Any] = {}
        # of gmpo's and gspo_token's ratio no trainer makes a weight of the reference KL
        if seed % 6 == 1 and name not in ("gmpo", "gspo_token"):
            g = torch.Generator().manual_seed(seed)
            reference = batch.old_logprob + 0.5 * torch.randn(batch.logprob.shape, generator=g).to(dtype)
            kl = {"ref_kl_coef": 0.3, "ref_kl_importance": seed % 12 == 1}
        out, logprob = run(
            name, batch, token_weight=weight, **{**whole, "loss_agg_mode": mode}, **options, **kl,
            **({"ref_logprob": reference} if kl else {}),
        )  # fmt: skip
        whole.pop("loss_agg_mode")
        expected = ref.loss(
            name, *batch.arrays(), options=options, mode=mode, token_weight=array(weight), **whole, **kl,
            **({"ref": array(reference)} if kl else {}),
        )  # fmt: skip
        label = f"seed {seed} ({batch.name}), {mode}"
        assert_matches(out, logprob, expected, name=label)
        if dtype == torch.float64:
            assert_exact(out, logprob, expected, label)


@every_case
@every_dtype
def test_log_ratios_of_100(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """No NaN, and where fp32 can hold the result, the result: what overflows is infinite, and its gradient as well."""
    name, options = case
    largest = torch.finfo(dtype).max
    finite = 0
    for seed in range(30):
        batch = far_off(surrogate_batch(seed, dtype), seed)
        expected = ref.loss(name, *batch.arrays(), options=options, mode="token-sum")
        each = ref.loss(name, *batch.arrays(), options=options, mode="none")
        out, logprob = run(name, batch, loss_agg_mode="token-sum", **options)
        fits = np.abs(each.loss) < largest / 2
        assert logprob.grad is not None and not logprob.grad.isnan().any(), f"seed {seed}"
        if fits.all() and expected.absolute < largest / 2 and expected.size.max(initial=0) < largest / 2:
            finite += 1
            assert_matches(out, logprob, expected, name=f"seed {seed} ({batch.name})")
    assert finite >= 3


@every_case
@every_dtype
def test_without_aggregation(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """The loss of each token, and its gradient for any factors from above."""
    name, options = case
    for seed in range(8):
        batch = surrogate_batch(seed, dtype)
        upstream = torch.randn(batch.logprob.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        weight = weights_of(seed, batch) if seed % 2 else None
        logprob = leaf(batch.logprob)
        out = ek.policy_loss(
            logprob, *batch.args[1:], surrogate=name, loss_agg_mode="none", token_weight=weight, **options
        )
        expected = ref.loss(
            name, *batch.arrays(), options=options, mode="none", token_weight=array(weight), upstream=array(upstream)
        )
        assert out.loss.shape == batch.logprob.shape
        eps = torch.finfo(dtype).eps
        spread = 1 + np.abs(expected.log_ratio)
        error = np.abs(out.loss.detach().double().numpy() - expected.loss)
        # sapo's gate is a sigmoid of what may be near 0, dro's value a difference
        floor = (
            np.abs(batch.arrays()[2])
            * (1 + np.abs(expected.log_ratio) ** 2)
            * (np.abs(array(weight)) if seed % 2 else 1)
        )
        assert (error <= 16 * eps * spread * (np.abs(expected.loss) + floor)).all(), f"seed {seed}"
        out.loss.backward(upstream)
        assert logprob.grad is not None
        error = np.abs(logprob.grad.double().numpy() - expected.logprob)
        assert (error <= 8 * eps * spread * expected.size).all(), f"seed {seed}"


@every_case
def test_packed_equals_padded(case: tuple[str, dict[str, Any]]) -> None:
    """Sequences one after the other, an empty one and masked tokens among them; and against the packed reference."""
    name, options = case
    for seed in range(10):
        batch = surrogate_batch(seed)
        rows, length = batch.logprob.shape
        lengths = torch.randint(0, length + 1, (rows,), generator=torch.Generator().manual_seed(seed))
        there = torch.arange(length) < lengths[:, None]
        mask = (batch.mask != 0) & there
        weight = weights_of(seed, batch) if seed % 2 else None
        whole = {"loss_scale_factor": 7.0, "global_batch_size": rows + 1, "batch_num_tokens": 50} if seed % 3 else {}
        mode = MODES[seed % (4 if not whole else 5)]
        padded = Batch(batch.logprob, batch.old_logprob, batch.advantages, mask, batch.name)
        out, logprob = run(name, padded, token_weight=weight, loss_agg_mode=mode, **whole, **options)
        packed = Batch(
            batch.logprob[there],
            batch.old_logprob[there],
            batch.advantages.expand(rows, length)[there],
            mask[there],
            "",
        )
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        flat_weight = None if weight is None else weight[there]
        also, flat = run(
            name, packed, token_weight=flat_weight, cu_seqlens=bounds, loss_agg_mode=mode, **whole, **options
        )
        assert logprob.grad is not None and flat.grad is not None
        torch.testing.assert_close(also.loss, out.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(flat.grad, logprob.grad[there], rtol=1e-12, atol=1e-14)
        for key, value in out.metrics.items():
            torch.testing.assert_close(also.metrics[key], value, rtol=1e-10, atol=1e-12)
        expected = ref.loss(
            name, *packed.arrays(), options=options, mode=mode, token_weight=array(flat_weight), **whole,
            lengths=lengths.tolist(),
        )  # fmt: skip
        assert_matches(also, flat, expected, name=f"seed {seed}, {mode}")
        assert_exact(also, flat, expected, f"seed {seed}, {mode}")


def test_ce_gppo_is_the_papers() -> None:
    """With stopped gradients, as the paper writes it (Eq. 6), by autograd: β·bound / sg(r) · r of a clipped token."""
    for seed in range(40):
        batch = surrogate_batch(seed)
        lp, old, adv, mask = (torch.from_numpy(x) for x in batch.arrays())
        x = leaf(lp)
        ratio = (x - old).exp()
        one = ratio / ratio.detach()
        free = torch.where((adv > 0) & (ratio > 1.3), 0.9 * 1.3 * one, ratio)
        free = torch.where((adv < 0) & (ratio < 0.8), 0.5 * 0.8 * one, free)
        loss = -(adv * free)[mask].sum()
        loss.backward()
        options = {"clip_low": 0.2, "clip_high": 0.3, "beta_low": 0.5, "beta_high": 0.9}
        expected = ref.loss("ce_gppo", *batch.arrays(), options=options, mode="token-sum")
        assert expected.loss == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-12)
        assert x.grad is not None
        np.testing.assert_allclose(expected.logprob, x.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - STOPPED))
def test_the_references_gradient_is_that_of_its_value(name: str) -> None:
    """Of those whose ratio is no constant: central differences, in float64."""
    for seed in range(5):
        lp, old, adv, mask = surrogate_batch(4 * seed + 1).arrays()
        value = functools.partial(ref.loss, name, old=old, advantages=adv, mask=mask, mode="seq-mean-token-mean")
        step, exact = 1e-6, ref.loss(name, lp, old, adv, mask, mode="seq-mean-token-mean").logprob
        for at in np.argwhere(mask)[:12]:
            moved = np.zeros_like(lp)
            moved[tuple(at)] = step
            difference = (value(lp=lp + moved).loss - value(lp=lp - moved).loss) / (2 * step)
            assert difference == pytest.approx(exact[tuple(at)], rel=1e-5, abs=1e-8), f"seed {seed}, {at}"


# ---- one from outside -----------------------------------------------------------------------------------------------


def soft(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """-A·tanh(τ·log r): clipped where |log r| > 1."""
    bent = torch.tanh(options.tau * log_ratio)
    return -advantages * bent, -advantages * options["tau"] * (1 - bent**2), log_ratio.abs() > 1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("tau", [None, 0.5])
def test_a_surrogate_from_outside(level: str, tau: float | None) -> None:
    """What it has to say is its formula; weights, aggregation, packing, metrics and the chain rule come with it."""
    surrogate = ek.Surrogate(soft, level=level, defaults={"tau": 1.0})
    for seed in range(20):
        batch = surrogate_batch(seed)
        weight = weights_of(seed, batch)
        out, logprob = run(
            surrogate, batch, loss_agg_mode="seq-mean-token-mean", token_weight=weight,
            **({} if tau is None else {"tau": tau}),
        )  # fmt: skip
        lp, old, adv, mask = (torch.from_numpy(x) for x in batch.arrays())
        x = leaf(lp)
        count = mask.sum(-1, keepdim=True)
        log_ratio = x - old
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1, keepdim=True) / count.clamp(min=1)).expand_as(x)
        values = -adv * torch.tanh((1.0 if tau is None else tau) * log_ratio) * torch.from_numpy(array(weight)) * mask
        loss = (values / count.clamp(min=1)).sum() / max(int((count > 0).sum()), 1)
        loss.backward()
        assert logprob.grad is not None and x.grad is not None
        torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(logprob.grad, x.grad, rtol=1e-10, atol=1e-14)
        clipped = ((log_ratio.abs() > 1) & mask).sum() / max(int(mask.sum()), 1)
        assert float(out.metrics["clipfrac"]) == pytest.approx(float(clipped))
        assert float(out.metrics["clipfrac_lower"]) == 0


def test_an_option_that_it_has_not() -> None:
    with pytest.raises(TypeError, match="tau"):
        ek.policy_loss(*surrogate_batch(1).args, surrogate=ek.Surrogate(soft, defaults={"tau": 1.0}), theta=1.0)
