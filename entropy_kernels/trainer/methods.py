"""The methods, in one table: the loss of each, the tokens that it treats, and what reports call it.

No other file of the trainer names a method. A new one is a row of :data:`METHODS`; it can be added from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import entropy_kernels as ek

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig


@dataclass
class Part:
    """A micro-batch as selection sees it; all (B, L). `logprob` carries no gradient."""

    logprob: Tensor
    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor
    token_index: Tensor  # int64: position in the rollout, which makes the draw independent of the split


#: (config, parts, seed, backend) -> one mask (B, L) bool per part. Means, counts and ranks are those of all parts.
Select = Callable[["TrainerConfig", list[Part], int, str], list[Tensor]]
#: (config, mask, backend) -> arguments of the loss beyond those that all losses take.
Options = Callable[["TrainerConfig", Tensor | None, str], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One row: how updates are made, and how the method is compared with the others."""

    label: str
    """In plots, tables and sentences."""
    loss: str
    """The `method` of :func:`entropy_kernels.linear_policy_loss`."""
    options: Options
    select: Select | None = None
    """The tokens that the loss treats; None for none."""
    treats: Literal["dropped", "penalized"] | None = None
    """What the loss does to them: removes their gradient, or adds a penalty."""
    ratio: float = 0.0
    """Fraction of a minibatch to select, at this scale."""
    paper_ratio: float = 0.0
    """The paper's fraction."""
    control_of: str | None = None
    """The method of which this one selects as many tokens, at random."""
    entropy_factor: float | None = None
    """What a reproduction on the embedded task claims: it ends with this many times the baseline's entropy."""


def in_covariance_range(config: TrainerConfig, parts: list[Part], seed: int, backend: str) -> list[Tensor]:
    """Clip-Cov's tokens: drawn among those whose covariance lies in the range, PPO-clipped ones left out."""
    batch = ek.SelectionBatch(backend=backend)
    for part in parts:
        exclude = ppo_clipped(part, config)
        batch.add(part.logprob, part.advantages, part.mask, part.token_index, exclude=exclude)
    return batch.clip_cov(
        seed=seed, ratio=config.selection_ratio, low=config.cov_low, high=config.cov_high, band=config.cov_band
    )


def largest_covariance(config: TrainerConfig, parts: list[Part], seed: int, backend: str) -> list[Tensor]:
    """KL-Cov's tokens."""
    batch = ek.SelectionBatch(backend=backend)
    for part in parts:
        batch.add(part.logprob, part.advantages, part.mask, part.token_index)
    return batch.kl_cov(ratio=config.selection_ratio)


def as_many_at_random(select: Select) -> Select:
    """As many valid tokens as `select` gives, drawn with a key of their own."""

    def drawn(config: TrainerConfig, parts: list[Part], seed: int, backend: str) -> list[Tensor]:
        chosen = select(config, parts, seed, backend)
        count = int(sum(int(mask.sum()) for mask in chosen))
        if count == 0:
            return chosen
        uniform = ek.SelectionBatch(backend=backend)
        for part in parts:
            # equal advantages make every covariance 0, so that every valid token is in the range
            uniform.add(part.logprob, torch.zeros_like(part.advantages), part.mask, part.token_index)
        return uniform.clip_cov(seed=seed + 1, k=count, low=-1.0, high=1.0)

    return drawn


def ppo_clipped(part: Part, config: TrainerConfig) -> Tensor:
    """(B, L) bool: tokens whose gradient the PPO clip already removes. They are no candidates of Clip-Cov."""
    ratio = torch.exp(part.logprob - part.old_logprob)
    clamped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    return (-part.advantages * clamped > -part.advantages * ratio) & part.mask


def _ppo(config: TrainerConfig, selected: Tensor | None, backend: str) -> dict[str, Any]:
    return {"clip_low": config.clip_low, "clip_high": config.clip_high}


def _clip_cov(config: TrainerConfig, selected: Tensor | None, backend: str) -> dict[str, Any]:
    return {"preset": "verl", "backend": backend, **_ppo(config, selected, backend), "dropped": selected}


def _kl_cov(config: TrainerConfig, selected: Tensor | None, backend: str) -> dict[str, Any]:
    return {"preset": "verl", "backend": backend, "kl_coef": config.kl_coef, "penalized": selected}


def _control(method: str, label: str) -> Method:
    """The row of a method with its tokens chosen at random."""
    row = METHODS[method]
    assert row.select is not None
    return dataclasses.replace(
        row, label=label, select=as_many_at_random(row.select), control_of=method, entropy_factor=None
    )


METHODS: dict[str, Method] = {
    "grpo": Method("GRPO", "ppo", _ppo),
    "clip_cov": Method(
        "Clip-Cov", "clip_cov", _clip_cov, in_covariance_range, "dropped",
        ratio=0.03, paper_ratio=2e-4, entropy_factor=2.0,
    ),
    "kl_cov": Method(
        "KL-Cov", "kl_cov", _kl_cov, largest_covariance, "penalized",
        ratio=0.07, paper_ratio=2e-3, entropy_factor=1.6,
    ),
}  # fmt: skip
METHODS["random_dropped"] = _control("clip_cov", "Random tokens dropped")
METHODS["random_penalized"] = _control("kl_cov", "Random tokens penalised")

#: What the others are compared with.
BASELINE = next(iter(METHODS))


def select(config: TrainerConfig, parts: list[Part], *, seed: int, backend: str = "auto") -> list[Tensor]:
    """Masks (B, L) bool, one per part, of the tokens that the configuration's method treats."""
    method = METHODS[config.method]
    if method.select is None:
        raise ValueError(f"config.method: expected one that selects tokens, got {config.method!r}")
    return method.select(config, parts, seed, backend)
