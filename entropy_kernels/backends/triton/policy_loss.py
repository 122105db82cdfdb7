"""The policy surrogate with selection in Triton: covariance, mask, term, slope and the totals of the metrics.

The selection is that of selection.py. What is new here are three kernels: which tokens the PPO clip holds (where those
are no candidates), the term with its derivative and partial totals per block, and the totals. The meaning of the
numbers is that of csrc/common/policy_term.h and csrc/cuda/policy_loss_kernels.h, in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_kernels.backends import radix_select
from entropy_kernels.backends.policy_names import METRICS, TOTALS
from entropy_kernels.backends.radix_select import Band, Count
from entropy_kernels.backends.triton.selection import (
    BLOCK,
    STEPS,
    as_bytes,
    block_positions,
    key_value,
    kl_cov_mask,
    launch,
    ordered_key,
    token_covariance,
    valid_tokens,
)

__all__ = ["policy_loss"]

# enum Selected
UNCHANGED, DROPPED, DETACHED, PENALISED = (tl.constexpr(i) for i in range(4))
# enum Penalty
K1, ABS, K2, K3 = (tl.constexpr(i) for i in range(4))
# enum PolicySum, then enum PolicyMaximum: rows of the partial totals, and the order of the result
(
    TERM, CLIPPED, CLIPPED_LOWER, LOG_RATIO, ABSOLUTE_LOG_RATIO, RATIO, COVARIANCE, IN_BAND, SELECTED, NONFINITE,
    TOKENS, LARGEST_RATIO, LARGEST_COVARIANCE,
) = (tl.constexpr(i) for i in range(13))  # fmt: skip
METRICS_COUNT = tl.constexpr(len(METRICS))
TOTALS_BLOCK = 1024  # partial totals that a program adds at a time
WARPS = 8  # four tokens per thread: e^x in fp64 takes registers

_RUNTIME = ["tokens", "blocks", "clip_low", "clip_high", "dual_clip"]


@triton.jit
def _exp(x):
    """e^x of fp32, rounded once: Triton's own in fp32 loses digits in proportion to |x|, the term's ratio with it."""
    return tl.exp(x.to(tl.float64)).to(tl.float32)


@triton.jit
def _branch(logprob, old_logprob, advantage, valid, clip_low, clip_high, dual_clip):
    """policy_branch of a block: (log ratio, advantage, ratio, value, clipped, clipped below, not finite).

    Numbers are 0 and flags False where not ``valid``; clips are infinite where there are none.
    """
    log_ratio = tl.where(valid, logprob - old_logprob, 0.0)
    advantage = tl.where(valid, advantage, 0.0)
    # a difference is finite only if both sides are
    infinity = float("inf")
    nonfinite = ((tl.abs(log_ratio) < infinity) & (tl.abs(advantage) < infinity)) == 0
    ratio = tl.where(valid, _exp(log_ratio), 0.0)
    gain = -advantage
    value = tl.where(advantage == 0, gain, gain * ratio)  # also where the ratio overflows
    clamped = tl.where(ratio < clip_low, clip_low, tl.where(ratio > clip_high, clip_high, ratio))
    held = gain * clamped
    clipped = valid & (held > value)
    value = tl.where(clipped, held, value)
    bound = gain * dual_clip
    lower = (advantage < 0) & (value > bound)
    value = tl.where(lower, bound, value)
    return log_ratio, advantage, ratio, value, clipped, lower, nonfinite


@triton.jit
def _penalty(log_ratio, PENALTY: tl.constexpr, SQUARE_SLOPE: tl.constexpr):
    """penalty_term of a block: (value, slope)."""
    value = log_ratio
    slope = log_ratio * 0 + 1
    if PENALTY == ABS:
        value = tl.abs(log_ratio)
        slope = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio < 0, -1.0, 0.0))
    elif PENALTY == K2:
        value = 0.5 * log_ratio * log_ratio
        slope = log_ratio
    elif PENALTY == K3:
        limit = 20.0
        reverse = tl.where(-log_ratio < -limit, -limit, tl.where(-log_ratio > limit, limit, -log_ratio))
        e = _exp(reverse)
        value = e - reverse - 1
        inside = (tl.abs(log_ratio) <= limit) & (value <= 10)  # it is never below 0 by more than rounding
        slope = tl.where(inside, 1 - e, 0.0)
        value = tl.where(value > 10, 10.0, value)
    if SQUARE_SLOPE:
        slope = log_ratio
    return value, slope


@triton.jit(do_not_specialize=_RUNTIME)
def clipped_kernel(
    logprob_ptr,  # (N,) fp32
    old_logprob_ptr,  # (N,) fp32
    advantages_ptr,  # (N,) fp32
    mask_ptr,  # (N,) or None
    clipped_ptr,  # (N,) int8
    tokens,
    clip_low: tl.float32,
    clip_high: tl.float32,
    dual_clip: tl.float32,
    BLOCK: tl.constexpr,
):
    """Which tokens the PPO clip holds."""
    position = block_positions(BLOCK)
    inside = position < tokens
    valid = valid_tokens(mask_ptr, position, inside)
    logprob = tl.load(logprob_ptr + position, mask=valid, other=0.0)
    old_logprob = tl.load(old_logprob_ptr + position, mask=valid, other=0.0)
    advantage = tl.load(advantages_ptr + position, mask=valid, other=0.0)
    _, _, _, _, clipped, _, _ = _branch(logprob, old_logprob, advantage, valid, clip_low, clip_high, dual_clip)
    tl.store(clipped_ptr + position, clipped.to(tl.int8), mask=inside)


@triton.jit
def _largest(value, valid):
    """Key of the largest valid value, as a float64 that holds it exactly: 0 if there is none, NaN above everything."""
    key = tl.where(value == value, ordered_key(value), 0xFFFFFFFF)
    return tl.max(tl.where(valid, key, 0), 0).to(tl.float64)


@triton.jit
def _count(flag):
    # fp32 is exact up to a block's size; sums of integers LLVM turns into population counts by way of local memory
    return tl.sum(tl.where(flag, 1.0, 0.0), 0).to(tl.float64)


@triton.jit
def _add(value):
    return tl.sum(value.to(tl.float64), 0)


@triton.jit(do_not_specialize=_RUNTIME)
def term_kernel(
    logprob_ptr,  # (N,) fp32
    old_logprob_ptr,  # (N,) fp32
    advantages_ptr,  # (N,) fp32
    mask_ptr,  # (N,) or None
    covariance_ptr,  # (N,) fp32
    chosen_ptr,  # (N,) selected tokens, or None
    band_ptr,  # (2,) int64 value keys of the candidates, both inclusive, or None
    coefficient_ptr,  # () fp32 of the penalty, or None for 0
    term_ptr,  # (N,) fp32
    slope_ptr,  # (N,) fp32
    partial_ptr,  # (TOTALS, blocks) float64; of the maxima their keys
    tokens,
    blocks,
    clip_low: tl.float32,
    clip_high: tl.float32,
    dual_clip: tl.float32,
    SELECTED_AS: tl.constexpr,
    EXCLUDE_CLIPPED: tl.constexpr,
    PENALTY: tl.constexpr,
    SQUARE_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The term of each token, its derivative by logprob, and the block's share of the totals."""
    position = block_positions(BLOCK)
    inside = position < tokens
    valid = valid_tokens(mask_ptr, position, inside)
    logprob = tl.load(logprob_ptr + position, mask=valid, other=0.0)
    old_logprob = tl.load(old_logprob_ptr + position, mask=valid, other=0.0)
    advantage = tl.load(advantages_ptr + position, mask=valid, other=0.0)
    covariance = tl.load(covariance_ptr + position, mask=valid, other=0.0)
    log_ratio, advantage, ratio, value, clipped, lower, nonfinite = _branch(
        logprob, old_logprob, advantage, valid, clip_low, clip_high, dual_clip
    )
    acted_on = valid & (position < 0)
    if chosen_ptr is not None:
        acted_on = valid & (tl.load(chosen_ptr + position, mask=valid, other=0) != 0)

    # policy_term: tokens that a clip holds, or that are dropped, keep a value but no slope; what is not finite shows
    moves = valid & ((clipped | lower | (advantage == 0)) == 0)
    if SELECTED_AS == DROPPED or SELECTED_AS == DETACHED:  # noqa: SIM109 (no `in` for constants in Triton)
        moves = moves & (acted_on == 0)
    if SELECTED_AS == DROPPED:
        value = tl.where(acted_on, 0.0, value)
    moving = -advantage * ratio
    slope = tl.where(moves, moving, 0.0)
    term = tl.where(moves, moving, value)
    term = tl.where(nonfinite, float("nan"), term)
    slope = tl.where(nonfinite, float("nan"), slope)
    if SELECTED_AS == PENALISED:
        coefficient = 0.0
        if coefficient_ptr is not None:
            coefficient = tl.load(coefficient_ptr)
        penalty, penalty_slope = _penalty(log_ratio, PENALTY, SQUARE_SLOPE)
        term = tl.where(acted_on, term + coefficient * penalty, term)
        slope = tl.where(acted_on, slope + coefficient * penalty_slope, slope)
    tl.store(term_ptr + position, term, mask=inside)
    tl.store(slope_ptr + position, slope, mask=inside)

    out = partial_ptr + tl.program_id(0)
    wide = blocks.to(tl.int64)
    tl.store(out + TERM * wide, _add(term))
    tl.store(out + CLIPPED * wide, _count(clipped))
    tl.store(out + CLIPPED_LOWER * wide, _count(lower))
    tl.store(out + LOG_RATIO * wide, _add(log_ratio))
    tl.store(out + ABSOLUTE_LOG_RATIO * wide, _add(tl.abs(log_ratio)))
    tl.store(out + RATIO * wide, _add(ratio))
    tl.store(out + COVARIANCE * wide, _add(covariance))
    in_band = valid & (position < 0)
    if band_ptr is not None:
        key = ordered_key(covariance)
        in_band = valid & (covariance == covariance) & (key >= tl.load(band_ptr)) & (key <= tl.load(band_ptr + 1))
        if EXCLUDE_CLIPPED:
            in_band = in_band & (clipped == 0)
    tl.store(out + IN_BAND * wide, _count(in_band))
    tl.store(out + SELECTED * wide, _count(acted_on))
    tl.store(out + NONFINITE * wide, _count(valid & ((tl.abs(term) < float("inf")) == 0)))
    tl.store(out + TOKENS * wide, _count(valid))
    tl.store(out + LARGEST_RATIO * wide, _largest(ratio, valid))
    tl.store(out + LARGEST_COVARIANCE * wide, _largest(covariance, valid))


@triton.jit(do_not_specialize=_RUNTIME)
def totals_kernel(
    partial_ptr,  # (TOTALS, blocks) float64
    totals_ptr,  # (TOTALS,) float64
    blocks,
    BLOCK: tl.constexpr,
):
    """Grid (TOTALS,): one total over all blocks, in an order that depends on nothing but their number."""
    total = tl.program_id(0)
    row = partial_ptr + total.to(tl.int64) * blocks
    lane = tl.arange(0, BLOCK)
    is_sum = total < LARGEST_RATIO
    running = tl.zeros((BLOCK,), tl.float64)  # keys of maxima are never negative
    for first in range(0, blocks, BLOCK):
        partial = tl.load(row + first + lane, mask=first + lane < blocks, other=0.0)
        running = tl.where(is_sum, running + partial, tl.maximum(running, partial))
    if is_sum:
        result = tl.sum(running, 0)
    else:
        key = tl.max(running, 0).to(tl.int64)
        result = tl.where(key == 0, 0.0, key_value(key).to(tl.float64))
    tl.store(totals_ptr + total, result)


@triton.jit
def metrics_kernel(
    totals_ptr,  # (TOTALS,) float64
    mean_ptr,  # () fp32
    metrics_ptr,  # (METRICS,) fp32
    BLOCK: tl.constexpr,
):
    """Grid (1,): policy_metric."""
    index = tl.arange(0, BLOCK)
    tokens = tl.load(totals_ptr + TOKENS)
    weight = 1 / tl.where(tokens > 0, tokens, 1.0)
    source = tl.where(index > NONFINITE, index + 1, index)  # the number of tokens is no metric
    value = tl.load(totals_ptr + source, mask=index < METRICS_COUNT - 1, other=0.0)
    mean = tl.where(source == LOG_RATIO, 0 - value, value) * weight  # of old - new
    value = tl.where(source < NONFINITE, mean, value)
    value = tl.where(index == METRICS_COUNT - 1, weight, value)
    tl.store(metrics_ptr + index, value.to(tl.float32), mask=index < METRICS_COUNT)
    tl.store(mean_ptr, (tl.load(totals_ptr + TERM) * weight).to(tl.float32))


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
    penalty: int,
    square_slope: bool,
    ratio: float,
    k: int,
    at_least_one: bool,
    low: float,
    high: float,
    quantile: bool,
    closed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Term of the policy loss per token, its derivative by logprob, and the metrics; ops/policy_loss.py.

    Args:
        logprob, old_logprob, advantages: (N,) fp32, contiguous, as are the other tensors.
        mask: (N,) bool, True = counts; None: all do.
        covariance: (N,) fp32; None: it is made here.
        given: (N,) bool, the tokens to act on, unless ``select``; None: none.
        token_index: (N,) int64, or None for the positions.
        seed: () int64 of Clip-Cov's draw; None selects by KL-Cov's rule.
        coefficient: () fp32 of the penalty; None: 0.
        clip_low, clip_high: bounds of the ratio (1 ± the clip); infinite: no clip.
        dual_clip: bound of the ratio for negative advantages; infinite: none.
        selected: what becomes of the selected: 0 nothing, 1 dropped, 2 detached, 3 penalised.
        select: select here, by the arguments from ``ratio`` on.
        exclude_clipped: tokens that the PPO clip holds are no candidates.
        penalty: 0 k1, 1 |log ratio|, 2 k2, 3 k3; ``square_slope``: with the slope of k2.
        ratio, k: how many to select; -1 for the one that does not say.
        low, high, quantile, closed: Clip-Cov's band.

    Returns:
        (term, slope, covariance, chosen, totals, mean, metrics): (N,) fp32 three times, the covariance (0,) if given;
        (N,) bool, or (0,) unless ``select``; (13,) float64, sums and maxima over the valid tokens; () and (13,) fp32.
    """
    tokens, device = logprob.numel(), logprob.device
    term, slope = torch.empty_like(logprob), torch.empty_like(logprob)
    nothing = torch.empty(0, dtype=torch.bool, device=device)
    if tokens == 0:
        totals = logprob.new_zeros(len(TOTALS), dtype=torch.float64)
        return (
            term,
            slope,
            logprob.new_empty(0),
            nothing,
            totals,
            logprob.new_zeros(()),
            logprob.new_zeros(len(METRICS)),
        )
    inputs = (logprob, old_logprob, advantages, as_bytes(mask))
    clips = (clip_low, clip_high, dual_clip)
    own_covariance = logprob.new_empty(0)
    if covariance is None:
        covariance = own_covariance = token_covariance(logprob, advantages, mask, "")
    chosen, bounds = given, None
    if select:
        exclude = None
        if exclude_clipped:
            exclude = torch.empty(tokens, dtype=torch.bool, device=device)
            arguments = (*inputs, as_bytes(exclude), tokens, *clips)
            launch(clipped_kernel, tokens, BLOCK, 1, *arguments, BLOCK=BLOCK, num_warps=WARPS)
        count = Count(ratio if k < 0 else None, k if k >= 0 else None, at_least_one)
        if seed is None:
            chosen = kl_cov_mask(covariance, mask, exclude, token_index, count, "")
        else:
            chosen, bounds = radix_select.clip_cov_mask_and_band(
                STEPS, covariance, mask, exclude, token_index, seed, count, Band(low, high, quantile, closed), ""
            )
    blocks = triton.cdiv(tokens, BLOCK)
    partial = torch.empty((len(TOTALS), blocks), dtype=torch.float64, device=device)
    totals = torch.empty(len(TOTALS), dtype=torch.float64, device=device)
    penalised = selected == PENALISED.value
    launch(
        term_kernel, tokens, BLOCK, 1, *inputs, covariance, as_bytes(chosen), bounds,
        coefficient if penalised else None, term, slope, partial, tokens, blocks, *clips,
        # what does not matter has one value, so that it does not compile again
        SELECTED_AS=selected if chosen is not None else UNCHANGED.value,
        EXCLUDE_CLIPPED=exclude_clipped and bounds is not None,
        PENALTY=penalty if penalised else 0, SQUARE_SLOPE=square_slope and penalised, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    launch(totals_kernel, len(TOTALS), 1, 1, partial, totals, blocks, BLOCK=TOTALS_BLOCK)
    mean, metrics = logprob.new_empty(()), logprob.new_empty(len(METRICS))
    launch(metrics_kernel, 1, 1, 1, totals, mean, metrics, BLOCK=16, num_warps=1)
    return term, slope, own_covariance, chosen if select and chosen is not None else nothing, totals, mean, metrics
