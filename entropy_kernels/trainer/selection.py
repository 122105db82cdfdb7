"""Which tokens of a minibatch the method treats: statistics in, one mask per micro-batch out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.config import TrainerConfig


@dataclass
class Part:
    """A micro-batch as selection sees it; all (B, L). `logprob` carries no gradient."""

    logprob: Tensor
    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor
    token_index: Tensor  # int64: position in the rollout, which makes the draw independent of the split


def select(config: TrainerConfig, parts: list[Part], *, seed: int, backend: str = "auto") -> list[Tensor]:
    """Masks (B, L) bool, one per part, of the tokens that Clip-Cov, KL-Cov or their controls drop or penalise.

    Means, counts and ranks are those of all parts together. The controls count what their method would have selected
    and draw as many valid tokens with a key of their own.
    """
    if config.loss == "ppo":
        raise ValueError(f"config.method: expected one that selects tokens, got {config.method!r}")
    drops = config.loss == "clip_cov"
    batch = ek.SelectionBatch(backend=backend)
    for part in parts:
        exclude = ppo_clipped(part, config) if drops else None
        batch.add(part.logprob, part.advantages, part.mask, part.token_index, exclude=exclude)
    if drops:
        chosen = batch.clip_cov(
            seed=seed,
            ratio=config.selection_ratio,
            low=config.cov_low,
            high=config.cov_high,
            band=config.cov_band,
        )
    else:
        chosen = batch.kl_cov(ratio=config.selection_ratio)
    if config.method in ("clip_cov", "kl_cov"):
        return chosen
    count = int(sum(int(mask.sum()) for mask in chosen))
    if count == 0:
        return chosen
    uniform = ek.SelectionBatch(backend=backend)
    for part in parts:
        # equal advantages make every covariance 0, so that every valid token is in the band
        uniform.add(part.logprob, torch.zeros_like(part.advantages), part.mask, part.token_index)
    return uniform.clip_cov(seed=seed + 1, k=count, low=-1.0, high=1.0)


def ppo_clipped(part: Part, config: TrainerConfig) -> Tensor:
    """(B, L) bool: tokens whose gradient the PPO clip already removes. They are no candidates of Clip-Cov."""
    ratio = torch.exp(part.logprob - part.old_logprob)
    clamped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    return (-part.advantages * clamped > -part.advantages * ratio) & part.mask
