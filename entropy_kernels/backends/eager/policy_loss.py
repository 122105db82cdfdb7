"""Covariance, selection, policy surrogate, its slope and the totals of the metrics, in torch on any device.

What each token's branch, term and slope are is csrc/common/policy_term.h, with whole tensors: derivatives are written
out, so no branch that a token does not take can turn 0 · inf into NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels.backends.eager import selection
from entropy_kernels.backends.policy_names import PENALTIES, TOTALS, Selected
from entropy_kernels.backends.radix_select import ALL_TOKENS, Band, Count


class Branches(NamedTuple):
    """(N,) each, 0 or False where masked."""

    log_ratio: Tensor
    advantages: Tensor
    ratio: Tensor  # exp(logprob - old_logprob), not clamped
    value: Tensor  # the surrogate, after the clips
    clipped: Tensor  # bool, l2 > l1, strict
    clipped_lower: Tensor  # bool, held by the dual clip
    nonfinite: Tensor  # bool, a valid token with an input that is not finite


def branches(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Branches:
    """PPO clip (arXiv 1707.06347) and dual clip (arXiv 1912.09729): which of them holds each token.

    The clips bound the ratio itself: ``clip_low`` is 1 - ε, -inf for none, ``clip_high`` 1 + ε, inf for none.
    """
    log_ratio = torch.where(mask, logprob - old_logprob, 0)
    advantages = torch.where(mask, advantages, 0)
    # a difference is finite only if both sides are
    nonfinite = ~(torch.isfinite(log_ratio) & torch.isfinite(advantages))
    ratio = torch.where(mask, torch.exp(log_ratio), 0)
    gain = -advantages
    # an advantage of 0 gives 0, also where the ratio overflows
    value = torch.where(advantages == 0, gain, gain * ratio)
    held = gain * ratio.clamp(clip_low, clip_high)
    clipped = (held > value) & mask
    value = torch.where(clipped, held, value)
    bound = gain * dual_clip
    clipped_lower = (advantages < 0) & (value > bound)
    return Branches(
        log_ratio, advantages, ratio, torch.where(clipped_lower, bound, value), clipped, clipped_lower, nonfinite
    )


def surrogate(found: Branches, selected: Tensor, selected_as: Selected) -> tuple[Tensor, Tensor]:
    """Term of the loss and its slope by the log-prob, (N,) each. What is not finite shows in both, dropped or not."""
    value = found.value
    held = found.clipped | found.clipped_lower | (found.advantages == 0)
    if selected_as in (Selected.DROPPED, Selected.DETACHED):
        held = held | selected
    if selected_as == Selected.DROPPED:
        value = torch.where(selected, 0, value)
    moving = -found.advantages * found.ratio
    term = torch.where(held, value, moving)
    nan = torch.full_like(term, math.nan)
    return torch.where(found.nonfinite, nan, term), torch.where(found.nonfinite, nan, torch.where(held, 0, moving))


def penalty(log_ratio: Tensor, estimator: str, square_slope: bool) -> tuple[Tensor, Tensor]:
    """Estimate of the divergence from the old policy and its slope; ``square_slope``: k2's slope whatever the value."""
    if estimator == "k1":
        value, slope = log_ratio, torch.ones_like(log_ratio)
    elif estimator == "abs":
        value, slope = log_ratio.abs(), log_ratio.sign()
    elif estimator == "k2":
        value, slope = 0.5 * log_ratio.square(), log_ratio
    else:
        reverse = (-log_ratio).clamp(-20, 20)
        exponential = torch.exp(reverse)
        value = exponential - reverse - 1
        slope = torch.where((log_ratio.abs() <= 20) & (value <= 10), 1 - exponential, 0)
        value = value.clamp(max=10)
    return value, log_ratio if square_slope else slope


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    covariance: Tensor | None,
    given: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor | None,
    coefficient: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    selected: int,
    select: bool,
    exclude_clipped: bool,
    penalty_kind: int,
    square_slope: bool,
    ratio: float,
    k: int,
    at_least_one: bool,
    low: float,
    high: float,
    quantile: bool,
    closed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ops/policy_loss.py, which has the contract; here also for fp64."""
    selected_as = Selected(selected)
    valid = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    found = branches(logprob, old_logprob, advantages, valid, clip_low, clip_high, dual_clip)
    values = selection.token_covariance(logprob, advantages, mask, "") if covariance is None else covariance
    in_band = torch.zeros_like(valid)
    if not select:
        chosen = torch.zeros_like(valid) if given is None else given & valid
    else:
        exclude = found.clipped if exclude_clipped else None
        count = Count(None if ratio < 0 else ratio, None if k < 0 else k, at_least_one)
        if seed is None:
            chosen = selection.kl_cov_mask(values, mask, exclude, token_index, count, "")
        else:
            band = Band(low, high, quantile, closed)
            chosen = selection.clip_cov_mask(values, mask, exclude, token_index, seed, count, band, "")
            in_band = candidates(values, valid, exclude, seed, band)
    term, slope = surrogate(found, chosen, selected_as)
    if selected_as == Selected.PENALISED:
        assert coefficient is not None
        added, added_slope = penalty(found.log_ratio, PENALTIES[penalty_kind], square_slope)
        term = torch.where(chosen, term + coefficient * added, term)
        slope = torch.where(chosen, slope + coefficient * added_slope, slope)

    nonfinite = valid & ~torch.isfinite(term)
    per_token = (
        term, found.clipped, found.clipped_lower, found.log_ratio, found.log_ratio.abs(), found.ratio, values, in_band,
        chosen, nonfinite, valid,
    )  # fmt: skip
    totals = torch.stack([*(_sum(x) for x in per_token), _maximum(found.ratio, valid), _maximum(values, valid)])
    empty = values.new_empty(0)
    return (
        term, slope, empty if covariance is not None else values, chosen if select else chosen[:0], totals,
        *finish(totals, term.dtype),
    )  # fmt: skip


def candidates(covariance: Tensor, valid: Tensor, exclude: Tensor | None, seed: Tensor, band: Band) -> Tensor:
    """The candidates of Clip-Cov."""
    if band.quantile:  # the bounds are order statistics: let the selection find them, and take every candidate
        everything = Count(None, ALL_TOKENS, True)
        return selection.clip_cov_mask(covariance, valid, exclude, None, seed, everything, band, "")
    found = valid if exclude is None else valid & ~exclude
    if band.closed:
        return found & (covariance >= band.low) & (covariance <= band.high)
    return found & (covariance > band.low) & (covariance < band.high)


def _sum(values: Tensor) -> Tensor:
    # of a bool tensor a sum would first write int64 copies
    return values.count_nonzero().double() if values.dtype == torch.bool else values.sum(dtype=torch.float64)


def _maximum(values: Tensor, valid: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros((), dtype=torch.float64)
    largest = torch.where(valid, values, -math.inf).amax()
    return torch.where(valid.any(), largest, 0).double()


def finish(totals: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean of the term, and the metrics, from the totals: policy_metric of policy_term.h."""
    tokens = totals[TOTALS.index("tokens")]
    nonfinite = TOTALS.index("nonfinite_tokens")
    weight = 1 / tokens.clamp(min=1)
    means = totals[:nonfinite] * weight
    kl = TOTALS.index("log_ratio")
    vector = [means[:kl], 0 - means[kl : kl + 1], means[kl + 1 :], totals[nonfinite : nonfinite + 1]]
    return means[0].to(dtype), torch.cat([*vector, totals[nonfinite + 2 :], weight[None]]).to(dtype)
