"""Batches and options for the surrogates: log-probs that are ones (<= 0), and log-ratios as far as ±100."""

from __future__ import annotations

from typing import Any

import torch

from loss_cases import Batch, random_batch

#: (surrogate, its options): the defaults, and others that change what is clipped.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "ppo": (
        {}, {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}, {"clip_low": None, "clip_high": None},
        {"clip_low": 0.05, "clip_high": 0.05, "delta": 1.5},
    ),
    "gspo": ({}, {"clip_low": 3e-4, "clip_high": 4e-4}),
    "gspo_token": ({}, {"clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": ({}, {"clip_low": 1.0, "clip_high": 4.0}),
    "cispo_trl": ({"clip_high": 5.0}, {"clip_high": 1.0}),
    "sapo": ({}, {"tau_pos": 0.5, "tau_neg": 2.0}),
    "dppo_tv": ({}, {"clip_low": 0.02, "clip_high": 0.05, "ratio_cap": 1.5}),
    "dppo_kl": ({}, {"clip_low": 0.02, "clip_high": 0.05, "ratio_cap": 1.5}),
    "gmpo": ({}, {"clip_low": 0.4, "clip_high": 0.3}),
    "gpg": ({},),
    "dro": ({"dro_beta": 0.05}, {"dro_beta": 1.0}),
    "vespo": ({}, {"k_pos": 1.0, "lambda_pos": 0.1, "k_neg": 0.5, "lambda_neg": 0.2}),
    "ce_gppo": ({}, {"clip_low": 0.1, "clip_high": 0.05, "beta_low": 0.5, "beta_high": 0.7}),
}  # fmt: skip
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


def surrogate_batch(seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """:func:`loss_cases.random_batch` without log-probs above 0, of which dppo would take probabilities above 1.

    In every fourth batch a few advantages are 0.
    """
    batch = random_batch(seed, dtype)
    batch.logprob, batch.old_logprob = -batch.logprob.abs(), -batch.old_logprob.abs()
    if seed % 4 == 2:
        g = torch.Generator().manual_seed(seed + 2)
        batch.advantages = batch.advantages * (torch.rand(batch.advantages.shape, generator=g) < 0.8)
    return batch


def far_off(batch: Batch, seed: int, share: float = 0.3) -> Batch:
    """Some tokens at log-ratios near ±100."""
    g = torch.Generator().manual_seed(seed)
    draw = torch.rand(batch.logprob.shape, generator=g)
    logprob = torch.where(draw < share / 2, batch.logprob - 100, batch.logprob)
    old = torch.where(draw > 1 - share / 2, batch.old_logprob - 100, batch.old_logprob)
    return Batch(logprob, old, batch.advantages, batch.mask, f"{batch.name}, far off")


def weights_of(seed: int, batch: Batch) -> torch.Tensor:
    """Importance weights of a rollout, 0 among them (as a rejected token has); NaN in padding."""
    g = torch.Generator().manual_seed(seed + 1)
    drawn = 2 * torch.rand(batch.logprob.shape, generator=g)
    drawn = torch.where(torch.rand(drawn.shape, generator=g) < 0.1, 0.0, drawn)
    return torch.where(batch.mask != 0, drawn, float("nan")).to(batch.logprob.dtype)
