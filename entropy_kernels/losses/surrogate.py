"""The PPO surrogate per token, with and without clips, and what happens to dropped and penalised tokens.

The branch of every token (moving, held by a clip, dropped) is decided without gradient; then the ratio is formed anew,
only for the tokens that move. A token that does not move therefore never meets exp in the backward pass, where
0 · inf would turn an overflowing ratio into NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels.losses.inputs import Tokens, check_number
from entropy_kernels.losses.kl import kl_estimate


class Branches(NamedTuple):
    """Constants, of the tokens' shape, 0 or False where masked."""

    ratio: Tensor  # exp(logprob - old_logprob), not clamped
    value: Tensor  # the surrogate, after the clips
    clipped: Tensor  # bool, l2 > l1, strict
    clipped_lower: Tensor  # bool, held by the dual clip


def check_clips(clip_low: float | None, clip_high: float | None, dual_clip: float | None) -> None:
    """The clips are None or numbers in range."""
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if value is not None:
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name}: expected >= 0 or None, got {value}")
    if dual_clip is not None:
        check_number("dual_clip", dual_clip)
        if not dual_clip > 1:
            raise ValueError(f"dual_clip: expected > 1 or None, got {dual_clip}")


@torch.no_grad()
def branches(tokens: Tokens, clip_low: float | None, clip_high: float | None, dual_clip: float | None) -> Branches:
    """PPO clip (arXiv 1707.06347) and dual clip (arXiv 1912.09729): which of them holds each token."""
    ratio = torch.where(tokens.mask, torch.exp(tokens.log_ratio), 0)
    gain = -tokens.advantages
    # an advantage of 0 gives 0, also where the ratio overflows
    value = torch.where(tokens.advantages == 0, gain, gain * ratio)
    none = torch.zeros_like(tokens.mask)
    clipped = clipped_lower = none
    if clip_low is not None or clip_high is not None:
        low = None if clip_low is None else 1 - clip_low
        high = None if clip_high is None else 1 + clip_high
        held = gain * ratio.clamp(low, high)
        clipped = held > value
        value = torch.where(clipped, held, value)
    if dual_clip is not None:
        bound = gain * dual_clip
        clipped_lower = (tokens.advantages < 0) & (value > bound)
        value = torch.where(clipped_lower, bound, value)
    return Branches(ratio, value, clipped, clipped_lower)


def surrogate(tokens: Tokens, found: Branches, dropped: Tensor | None = None, dropped_value: str = "zero") -> Tensor:
    """Loss per token, 0 where masked; the gradient of tokens held by a clip or ``dropped`` is removed.

    ``dropped_value`` "zero" removes their value too, "keep" leaves it.
    """
    value = found.value
    held = found.clipped | found.clipped_lower | (tokens.advantages == 0)
    if dropped is not None:
        held = held | dropped
        if dropped_value == "zero":
            value = torch.where(dropped, 0, value)
    moves = (tokens.mask & ~held) | tokens.nonfinite  # what is not finite shows, dropped or not
    moving = -tokens.advantages * torch.exp(torch.where(moves, tokens.log_ratio, 0))
    return torch.where(moves, moving, value) * tokens.poison


def penalty(tokens: Tokens, penalized: Tensor, coefficient: float | Tensor, estimator: str) -> Tensor:
    """KL-Cov's penalty on the log-ratio per token, 0 elsewhere (Eq. 13 of arXiv 2505.22617)."""
    distance = kl_estimate(torch.where(penalized, tokens.log_ratio, 0), estimator)  # 0 in padding
    return torch.where(penalized, coefficient * distance, 0)
