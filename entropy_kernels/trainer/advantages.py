"""Advantages of a rollout's tokens, by the estimators of one table, and the unbiased pass@k estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Added to the standard deviation, as in GRPO's public implementations; a group of equal rewards gets advantage 0.
STD_EPSILON = 1e-6
#: Added to the variance that advantages are whitened by, as in verl.
VARIANCE_EPSILON = 1e-8


class Advantages(NamedTuple):
    """Of tokens, 0 where masked."""

    advantages: Tensor  # (B, L)
    returns: Tensor | None  # (B, L), what the critic learns: values + advantages before whitening; None without values


@dataclass(frozen=True)
class Scored:
    """What an estimator sees of a rollout: B completions, those of a prompt adjacent, of up to L tokens."""

    token_rewards: Tensor  # (B, L)
    mask: Tensor  # (B, L) bool
    samples: int  # completions of a prompt
    values: Tensor | None  # (B, L), of the critic
    normalize_std: bool
    gamma: float
    gae_lambda: float

    def groups(self) -> Tensor:
        """Rewards of whole completions, (prompts, samples)."""
        return self.token_rewards.sum(dim=1).view(-1, self.samples)


@dataclass(frozen=True)
class Estimator:
    """One row of :data:`ESTIMATORS`."""

    advantages: Callable[[Scored], Tensor]
    """(B, L), or (B, 1) for one of a whole completion; before whitening."""
    groups: bool = False
    """Whether it compares the completions of a prompt, and so needs two or more."""
    critic: bool = False
    """Whether it needs values."""
    whitened: bool = False
    """Whether its advantages are whitened unless the configuration says otherwise, as in verl."""
    reads: tuple[str, ...] = ()
    """Fields of the configuration that do nothing under an estimator that does not read them."""


def _centred(scored: Scored) -> Tensor:
    rewards = scored.groups()
    return rewards - rewards.mean(dim=1, keepdim=True)


def _reward_minus_mean(scored: Scored) -> Tensor:
    return _centred(scored).view(-1, 1)


def _grpo(scored: Scored) -> Tensor:
    centred = _centred(scored)
    if scored.normalize_std:
        centred = centred / (scored.groups().std(dim=1, keepdim=True) + STD_EPSILON)
    return centred.view(-1, 1)


def _rloo(scored: Scored) -> Tensor:
    # r_i - (sum - r_i)/(n - 1) = (r_i - mean) n/(n - 1)
    return (_centred(scored) * (scored.samples / (scored.samples - 1))).view(-1, 1)


def _gae(scored: Scored) -> Tensor:
    assert scored.values is not None
    rewards, values, decay = scored.token_rewards, scored.values, scored.gamma * scored.gae_lambda
    found = torch.zeros_like(values)
    after, advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])  # of the next valid token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + scored.gamma * after - values[:, t]
        valid = scored.mask[:, t]
        advantage = torch.where(valid, delta + decay * advantage, advantage)
        after = torch.where(valid, values[:, t], after)
        found[:, t] = advantage
    return found


def _discounted_returns(scored: Scored) -> Tensor:
    found = torch.zeros_like(scored.token_rewards)
    rest = torch.zeros_like(found[:, 0])  # of the next valid token
    for t in reversed(range(found.shape[1])):
        rest = torch.where(scored.mask[:, t], scored.token_rewards[:, t] + scored.gamma * rest, rest)
        found[:, t] = rest
    return found


#: By the configuration's names; the first is the default.
ESTIMATORS = {
    "grpo": Estimator(_grpo, groups=True),
    "rloo": Estimator(_rloo, groups=True),
    "gae": Estimator(
        _gae, critic=True, whitened=True,
        reads=("gamma", "gae_lambda", "critic", "critic_lr", "critic_warmup", "value_clip", "value_coef"),
    ),
    "reinforce_plus_plus": Estimator(_discounted_returns, whitened=True, reads=("gamma",)),
    "reinforce_plus_plus_baseline": Estimator(_reward_minus_mean, groups=True, whitened=True),
}  # fmt: skip


def advantages_of(
    estimator: str,
    token_rewards: Tensor,
    mask: Tensor,
    *,
    samples: int,
    values: Tensor | None = None,
    whiten: bool | None = None,
    counted: Tensor | None = None,
    normalize_std: bool = True,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> Advantages:
    """Advantages of a rollout's tokens.

    Parameters
    ----------
    estimator : str
        ``"grpo"``: R - mean of the group, over its standard deviation (n - 1 in the denominator) if `normalize_std`
        (Shao et al. 2024, arXiv 2402.03300); R is a completion's reward, the sum of its tokens'.
        ``"rloo"``: R - mean of the n - 1 others (Ahmadian et al. 2024, arXiv 2402.14740).
        ``"gae"``: sum over later tokens of (gamma gae_lambda)^k (r + gamma V' - V), V' the next valid token's value and
        0 after the last (Schulman et al. 2016, arXiv 1506.02438).
        ``"reinforce_plus_plus"``: the rewards from the token on, discounted by gamma;
        ``"reinforce_plus_plus_baseline"``: R - mean of the group (both Hu 2025, arXiv 2501.03262).
    token_rewards : Tensor
        (B, L) float, rows of a prompt adjacent. Masked tokens' must be 0.
    mask : Tensor
        (B, L) bool. Masked tokens are passed over, also between valid ones: they take no step of the discount.
    samples : int
        Completions of each prompt; at least 2 for an estimator with groups.
    values : Tensor, optional
        (B, L) float, the critic's; for ``"gae"``.
    whiten : bool, optional
        Divide by the standard deviation over all valid tokens once the mean is taken off; None: as verl does for this
        estimator (all but grpo and rloo are).
    counted : Tensor, optional
        (B, L) bool, the tokens that are learned from, which mean and deviation are of; None: all valid ones.

    Returns
    -------
    Advantages
        In the dtype of `token_rewards`.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    row = ESTIMATORS[estimator]
    if row.groups and samples < 2:
        raise ValueError(f"samples: expected at least 2 for {estimator}, a group to compare within, got {samples}")
    if row.critic and values is None:
        raise ValueError(f"values: expected the critic's for {estimator}, got None")
    scored = Scored(token_rewards, mask, samples, values, normalize_std, gamma, gae_lambda)
    advantages = torch.where(mask, row.advantages(scored), 0)
    returns = None if values is None else torch.where(mask, advantages + values, 0)
    if row.whitened if whiten is None else whiten:
        advantages = whitened(advantages, mask if counted is None else counted)
    return Advantages(advantages, returns)


def differ(rewards: Tensor) -> Tensor:
    """Of groups (G, n), which have completions with different rewards, and so something to compare: (G,) bool."""
    return (rewards != rewards[:, :1]).any(dim=1)


def rewards_of_tokens(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards of completions (B,) at their last valid tokens: (B, L); of a row without one, at its first position."""
    found = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    last = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).amax(dim=1, keepdim=True) - 1
    return found.scatter_(1, last.clamp_min(0), rewards[:, None])


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 (n - 1 in the denominator) over valid tokens; 0 where masked. Sums are in float64."""
    wide, count = torch.where(mask, values.double(), 0), mask.sum()
    centred = torch.where(mask, wide - wide.sum() / count.clamp_min(1), 0)
    variance = (centred * centred).sum() / (count - 1).clamp_min(1)
    return (centred * torch.rsqrt(variance + VARIANCE_EPSILON)).to(values.dtype)


def pass_at_k(correct: Tensor, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k completions is right (Chen et al. 2021, arXiv 2107.03374).

    Parameters
    ----------
    correct : Tensor
        (G,) integer: right completions per prompt, out of `samples`.
    samples, k : int
        1 <= k <= samples.

    Returns
    -------
    float
        Mean over prompts of 1 - C(samples - c, k)/C(samples, k).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: expected 1 <= k <= samples = {samples}, got {k}")
    if correct.numel() == 0:
        raise ValueError("correct: expected at least one prompt, got none")
    wrong = (samples - correct).to(torch.float64)
    # C(w, k)/C(n, k) as a product, so that no factorial overflows; a factor reaches 0 as soon as w < k
    index = torch.arange(k, dtype=torch.float64, device=correct.device)
    miss = ((wrong[:, None] - index).clamp_min(0.0) / (samples - index)).prod(dim=1)
    return float((1.0 - miss).mean())
