"""Properties of the losses over drawn shapes, masks, values and options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference_losses as ref
from loss_cases import MODES, Batch, assert_matches, differentiated, ek, leaf

pytestmark = pytest.mark.usefixtures("loss_on")

numbers = st.floats(-30, 30, width=32)
coefficients = st.sampled_from([0.0, 0.01, -0.3, 2.0])
clips = st.sampled_from([None, 0.0, 0.2, 0.28, 1.0])


@st.composite
def batches(draw: Any) -> Batch:
    """Up to 3 × 4 tokens: every token's value drawn on its own, from a few numbers so that ties are common."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def matrix(elements: Any) -> torch.Tensor:
        flat = draw(st.lists(elements, min_size=rows * length, max_size=rows * length))
        return torch.tensor(flat, dtype=torch.float64).view(rows, length)

    old = matrix(st.floats(-20, 0))
    change = matrix(st.one_of(st.sampled_from([0.0, 0.1, -0.1, 0.2, 50.0, -50.0]), st.floats(-3, 3)))
    advantages = matrix(st.one_of(st.sampled_from([0.0, 1.0, -1.0]), numbers))
    return Batch(old + change, old, advantages, matrix(st.sampled_from([0.0, 1.0])), "drawn")


few = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def near_a_branch(batch: Batch, *bounds: float | None) -> bool:
    """A ratio within rounding of a clip's bound: which side it falls on is the rounding's business."""
    ratio = (batch.logprob - batch.old_logprob).exp()
    return any(bool(((ratio / bound - 1).abs() < 1e-9).any()) for bound in bounds if bound)


@few
@given(st.data())
def test_any_combination_equals_the_reference(data: Any) -> None:
    """Clips, dual clip, drops, penalties, entropy, reference KL and aggregation together, in fp64."""
    draw = data.draw
    batch = draw(batches())
    low, high, dual = draw(clips), draw(clips), draw(st.sampled_from([None, 1.5, 3.0]))
    if near_a_branch(batch, None if low is None else 1 - low, None if high is None else 1 + high, dual):
        return
    lp, old, adv, valid = batch.arrays()
    chosen = torch.tensor(draw(st.lists(st.booleans(), min_size=lp.size, max_size=lp.size))).view(lp.shape)
    terms = {
        "clip_low": low,
        "clip_high": high,
        "dual_clip": dual,
        "entropy_coef": draw(coefficients),
        "ref_kl_coef": draw(coefficients),
        "kl_estimator": draw(st.sampled_from(["k1", "abs", "k2", "k3", "k3+"])),
    }
    mode = draw(st.sampled_from(MODES))
    whole = {
        "dp_size": draw(st.integers(1, 3)),
        "batch_num_tokens": draw(st.integers(1, 50)),
        "global_batch_size": draw(st.integers(1, 9)),
        "loss_scale_factor": draw(st.sampled_from([None, 1, 2.5])),
    }
    reference = batch.old_logprob - 0.3
    entropy = leaf(batch.old_logprob.abs())
    common = {"entropy": entropy, "ref_logprob": reference, "loss_agg_mode": mode, **terms, **whole}
    arrays = {"entropy": entropy.detach().numpy(), "ref": np.where(valid, reference.numpy(), 0), "mode": mode}
    which = draw(st.sampled_from(["policy", "verl", "paper", "kl"]))
    function, ours, theirs = ek.policy_loss, {}, {}
    if which == "kl":
        beta, estimator = draw(coefficients), draw(st.sampled_from(["abs", "k2", "k3"]))
        function = ek.kl_cov_loss
        ours = {"penalized": chosen, "kl_coef": beta, "penalty_estimator": estimator}
        theirs = {"penalized": chosen.numpy(), "kl_coef": beta, "penalty": estimator}
    elif which != "policy":
        function, ours = ek.clip_cov_loss, {"preset": which, "dropped": chosen}
        theirs = {"dropped": chosen.numpy(), "keep_value": which == "paper"}
    out, gradient = differentiated(function, *batch.args, **common, **ours)
    expected = ref.loss(lp, old, adv, valid, **arrays, **terms, **whole, **theirs)
    del expected.metrics["cov_mean"], expected.metrics["cov_max"]  # fp32
    assert_matches(out, gradient, expected, entropy if terms["entropy_coef"] else None, name=which)


@few
@given(batches(), st.sampled_from(MODES), st.integers(0, 3))
def test_padding_columns_and_row_order_change_nothing(batch: Batch, mode: str, pad: int) -> None:
    """More padding, filled with NaN, and sequences in another order; -norm's scale is given, as its default is L."""
    nan = torch.full((len(batch.mask), pad), float("nan"), dtype=torch.float64)
    wide = [torch.cat([x, nan], 1).flip(0) for x in batch.args[:3]]
    wide.append(torch.cat([batch.mask, torch.zeros_like(nan)], 1).flip(0))
    (a, grad_a), (b, grad_b) = (
        differentiated(ek.policy_loss, *tensors, loss_agg_mode=mode, loss_scale_factor=3)
        for tensors in (batch.args, wide)
    )
    torch.testing.assert_close(b.loss, a.loss)
    torch.testing.assert_close(grad_b.flip(0)[:, : grad_a.shape[1]], grad_a)
    torch.testing.assert_close(b.metrics, a.metrics, rtol=1e-5, atol=1e-6)


@few
@given(batches(), st.integers(0, 2**40), st.sampled_from(["verl", "paper"]), st.floats(0.01, 1.0))
def test_selecting_here_equals_selecting_first(batch: Batch, seed: int, preset: str, ratio: float) -> None:
    """clip_cov_loss(seed=...) is token_covariance, clip_cov_mask and clip_cov_loss(dropped=...) in one."""
    here = ek.clip_cov_loss(*batch.args, preset=preset, seed=seed, ratio=ratio, low=-5.0, high=5.0)
    cov = ek.token_covariance(batch.logprob, batch.advantages, batch.mask)
    ratios = (batch.logprob - batch.old_logprob).exp()
    clipped = (-batch.advantages * ratios.clamp(0.8, 1.2) > -batch.advantages * ratios) & (batch.mask != 0)
    mask = ek.clip_cov_mask(
        cov, batch.mask, seed=seed, ratio=ratio, low=-5.0, high=5.0, closed=preset == "paper",
        at_least_one=preset == "verl", exclude=clipped if preset == "verl" else None,
    )  # fmt: skip
    first = ek.clip_cov_loss(*batch.args, preset=preset, dropped=mask)
    assert torch.equal(here.loss, first.loss)
    assert torch.equal(here.metrics["selected_frac"], first.metrics["selected_frac"])
    here = ek.kl_cov_loss(*batch.args, preset=preset, ratio=ratio)
    mask = ek.kl_cov_mask(cov, batch.mask, ratio=ratio, at_least_one=preset == "verl")
    assert torch.equal(here.loss, ek.kl_cov_loss(*batch.args, preset=preset, penalized=mask).loss)


@few
@given(batches())
def test_the_clip_bounds_the_gain(batch: Batch) -> None:
    """No token gains more than A·(1 + clip_high) or -A·(1 - clip_low), whatever the ratio: what the clip is for."""
    advantages = batch.advantages
    losses = ek.policy_loss(*batch.args[:3], None, loss_agg_mode="none").loss
    assert (losses >= -torch.maximum(1.2 * advantages, 0.8 * advantages) - 1e-12).all()
