"""Columns of the log that describe a rollout: lengths, rewards, advantages, values; log.py defines each name."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_kernels.trainer.advantages import differ
from entropy_kernels.trainer.rollout import Rollout
from entropy_kernels.trainer.workers import RIGHT


def rollout_columns(rollout: Rollout) -> dict[str, float]:
    """All of them, in float64. What would describe no token, or no completion, is left out."""
    return {
        **rewards(rollout.sampled_rewards),
        **lengths(rollout),
        **spread("advantage", rollout.advantages[rollout.mask]),
        **value_columns(rollout),
    }


def lengths(rollout: Rollout) -> dict[str, float]:
    """Of completions, of those among them that ended by themselves, and of prompts, in tokens."""
    ended = ~rollout.truncated
    return {
        **spread("length", rollout.lengths, std=False),
        **spread("length_ended", rollout.lengths[ended], std=False),
        **spread("prompt_length", rollout.prompts.mask.sum(dim=1), std=False),
        "truncated": float(rollout.truncated.double().mean()),
    }


def rewards(given: Tensor) -> dict[str, float]:
    """Of rewards (prompts, samples): how far they are apart, and in how many groups there is something to learn."""
    right = given >= RIGHT
    found = {"reward": float(given.mean()), **spread("reward", given)}
    del found["reward_mean"]  # the same
    if given.shape[1] > 1:
        found["reward_group_std"] = float(given.double().std(dim=1).mean())
    groups = {"right": right.all(dim=1), "wrong": ~right.any(dim=1), "mixed": differ(given)}
    return found | {f"groups_{name}": float(which.float().mean()) for name, which in groups.items()}


def value_columns(rollout: Rollout) -> dict[str, float]:
    """Of the critic's values and what it learns, over the tokens that count; {} without a critic or such a token."""
    if rollout.values is None or rollout.returns is None or not bool(rollout.mask.any()):
        return {}
    values, returns = rollout.values[rollout.mask].double(), rollout.returns[rollout.mask].double()
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0)  # NaN of equal returns
    columns = spread("value", values, std=False) | spread("return", returns, std=False)
    return columns | {"explained_variance": float(1 - unexplained)}


def spread(name: str, values: Tensor, *, std: bool = True) -> dict[str, float]:
    """``name_mean``, ``_std`` (n - 1 in the denominator; 0 of a single one), ``_min`` and ``_max``; {} of nothing."""
    if values.numel() == 0:
        return {}
    wide = values.double()
    made = {"mean": wide.mean(), "min": wide.min(), "max": wide.max()}
    if std:
        made["std"] = wide.std(correction=min(1, wide.numel() - 1))
    return {f"{name}_{which}": value for which, value in zip(made, torch.stack([*made.values()]).tolist(), strict=True)}
