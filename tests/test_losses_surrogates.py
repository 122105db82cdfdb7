"""Every surrogate against its float64 reference: value, gradient and metrics, padded and packed, far off, your own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference_surrogates as ref
from loss_cases import MODES, Batch, assert_matches, assert_same, differentiated, ek, leaf, random_options
from surrogate_cases import CASES, OPTIONS, case_id, far_off, surrogate_batch, weights_of

pytestmark = pytest.mark.usefixtures("loss_on")

BATCHES = 60
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
# What stops a gradient within its value, which differences do not see
STOPPED = {"gspo_token", "cispo", "cispo_trl", "dppo_tv", "dppo_kl", "vespo", "ce_gppo"}


def run(surrogate: Any, batch: Batch, **options: Any) -> tuple[Any, Tensor]:
    return differentiated(ek.policy_loss, *batch.args, surrogate=surrogate, **options)


def array(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else np.nan_to_num(x.double().numpy(), nan=0.0, posinf=0.0, neginf=0.0)


def test_every_surrogate_is_judged() -> None:
    assert set(ek.surrogates()) == set(OPTIONS) == set(ref.SURROGATES)


@every_case
@every_dtype
def test_surrogate_equals_the_reference(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """Padding holds NaN and infinities, a third of the batches has weights, a sixth a reference KL with its ratio."""
    name, options = case
    for seed in range(0, BATCHES, 1 if dtype == torch.float64 else 7):
        batch = surrogate_batch(seed, dtype)
        weight = weights_of(seed, batch) if seed % 3 == 0 else None
        _, whole = random_options(seed, batch.mask)
        del whole["mode"]
        mode = MODES[seed // 2 % len(MODES)]
        more: dict[str, Any] = {}
        if seed % 6 == 1 and name != "gmpo":  # of whose ratio no trainer makes a weight of the reference KL
            g = torch.Generator().manual_seed(seed)
            reference = batch.old_logprob + 0.5 * torch.randn(batch.logprob.shape, generator=g).to(dtype)
            more = {"ref_logprob": reference, "ref_kl_coef": 0.3, "ref_kl_importance": seed % 12 == 1}
            more["kl_estimator"] = ("k1", "k2", "k3", "abs")[seed // 12 % 4]
        out, gradient = run(name, batch, token_weight=weight, loss_agg_mode=mode, **whole, **options, **more)
        if more:
            more["ref"] = array(more.pop("ref_logprob"))
        expected = ref.loss(
            name, *batch.arrays(), options=options, mode=mode, token_weight=array(weight), **whole, **more
        )
        assert_matches(out, gradient, expected, name=f"seed {seed} ({batch.name}), {mode}")


@every_case
@every_dtype
def test_log_ratios_of_100(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """No NaN, and where fp32 can hold the result, the result: what overflows is infinite, and its gradient as well."""
    name, options = case
    largest = torch.finfo(dtype).max
    finite = 0
    for seed in range(0, 30, 5 if dtype == torch.float64 else 1):  # e^100 is beyond fp32 alone
        batch = far_off(surrogate_batch(seed, dtype), seed)
        expected = ref.loss(name, *batch.arrays(), options=options, mode="token-sum")
        each = ref.loss(name, *batch.arrays(), options=options, mode="none")
        out, gradient = run(name, batch, loss_agg_mode="token-sum", **options)
        fits = np.abs(each.loss) < largest / 2
        assert not gradient.isnan().any(), f"seed {seed}"
        if fits.all() and expected.absolute < largest / 2 and expected.size.max(initial=0) < largest / 2:
            finite += 1
            assert_matches(out, gradient, expected, name=f"seed {seed} ({batch.name})")
    assert finite >= 3


@every_case
@every_dtype
def test_without_aggregation(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """The loss of each token, and its gradient for any factors from above."""
    name, options = case
    for seed in range(8):
        batch = surrogate_batch(seed, dtype)
        upstream = torch.randn(batch.logprob.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        upstream[batch.mask == 0] = float("nan")  # as 0 · NaN is of a caller's own mask
        weight = weights_of(seed, batch) if seed % 2 else None
        logprob = leaf(batch.logprob)
        value = ek.policy_loss(
            logprob, *batch.args[1:], surrogate=name, loss_agg_mode="none", token_weight=weight, **options
        ).loss
        value.backward(upstream)
        expected = ref.loss(
            name, *batch.arrays(), options=options, mode="none", token_weight=array(weight), upstream=array(upstream)
        )
        assert value.shape == batch.logprob.shape and logprob.grad is not None
        allowed = torch.finfo(dtype).eps * (1 + np.abs(expected.log_ratio))
        # sapo's gate is a sigmoid of what may be near 0, dro's value a difference
        factor = 1 if weight is None else np.abs(array(weight))
        floor = np.abs(batch.arrays()[2]) * (1 + np.abs(expected.log_ratio) ** 2) * factor
        error = np.abs(value.detach().double().numpy() - expected.loss)
        assert (error <= 16 * allowed * (np.abs(expected.loss) + floor)).all(), f"seed {seed}"
        error = np.abs(logprob.grad.double().numpy() - expected.logprob)
        assert (error <= 8 * allowed * expected.size).all(), f"seed {seed}"


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
        common = {"loss_agg_mode": mode, **whole, **options}
        padded = Batch(batch.logprob, batch.old_logprob, batch.advantages, mask, batch.name)
        out, gradient = run(name, padded, token_weight=weight, **common)
        packed = Batch(*(x.expand(rows, length)[there] for x in padded.args), "")
        weight = None if weight is None else weight[there]
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        also = run(name, packed, token_weight=weight, cu_seqlens=bounds, **common)
        torch.testing.assert_close((also[0].loss, also[1]), (out.loss, gradient[there]), rtol=1e-12, atol=1e-14)
        assert_same(also, (out, gradient[there]), rtol=1e-10, atol=1e-12)
        expected = ref.loss(
            name, *packed.arrays(), options=options, mode=mode, token_weight=array(weight), **whole,
            lengths=lengths.tolist(),
        )  # fmt: skip
        assert_matches(*also, expected, name=f"seed {seed}, {mode}")


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
        (gradient,) = torch.autograd.grad(loss, x)
        options = {"clip_low": 0.2, "clip_high": 0.3, "beta_low": 0.5, "beta_high": 0.9}
        expected = ref.loss("ce_gppo", *batch.arrays(), options=options, mode="token-sum")
        assert expected.loss == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(expected.logprob, gradient.numpy(), rtol=1e-12, atol=1e-14)


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
    options = {} if tau is None else {"tau": tau}
    for seed in range(20):
        batch = surrogate_batch(seed)
        weight = weights_of(seed, batch)
        out, gradient = run(surrogate, batch, loss_agg_mode="seq-mean-token-mean", token_weight=weight, **options)
        lp, old, adv, mask = (torch.from_numpy(x) for x in batch.arrays())
        x = leaf(lp)
        count = mask.sum(-1, keepdim=True)
        log_ratio = x - old
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1, keepdim=True) / count.clamp(min=1)).expand_as(x)
        values = -adv * torch.tanh((tau or 1.0) * log_ratio) * torch.from_numpy(array(weight)) * mask
        loss = (values / count.clamp(min=1)).sum() / max(int((count > 0).sum()), 1)
        torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, *torch.autograd.grad(loss, x), rtol=1e-10, atol=1e-14)
        clipped = ((log_ratio.abs() > 1) & mask).sum() / max(int(mask.sum()), 1)
        assert float(out.metrics["clipfrac"]) == pytest.approx(float(clipped))
        assert float(out.metrics["clipfrac_lower"]) == 0
