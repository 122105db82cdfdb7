"""The policy term that losses are made of: its clips, what it selects, and its evaluation by the op ``policy_loss``.

Over the ranks of a batch_group the covariance and the selection come from their own ops, whose sums cross ranks, and
the op is given both; otherwise it makes them itself, where the backend can in the same launch. Advantages in fp64 have
their covariance from its own op too, which does not round them: one rank selects what several do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import check_number, scalar_tensor
from entropy_kernels.backends.eager.policy_loss import branches
from entropy_kernels.backends.policy_names import MAXIMA, METRICS, PENALTIES, TOTALS, Selected
from entropy_kernels.backends.radix_select import ALL_TOKENS
from entropy_kernels.ops.policy_loss import policy_loss as op
from entropy_kernels.selection import (
    CLIP_COV_RATIO,
    check_band,
    check_count,
    check_token_index,
    clip_cov_mask,
    kl_cov_mask,
    seed_tensor,
    token_covariance,
)

__all__ = [
    "MAXIMA",
    "MEANS_AND_MAXIMA",
    "SUMS_AND_MAXIMA",
    "Clips",
    "Evaluated",
    "Policy",
    "Selected",
    "Selection",
    "evaluate",
]

SUMS_AND_MAXIMA, MEANS_AND_MAXIMA = TOTALS, METRICS  # names of what Evaluated.totals and .metrics hold


class Clips(NamedTuple):
    """Distances from a ratio of 1, and the dual clip; None: no clip."""

    low: float | None
    high: float | None
    dual: float | None

    def check(self) -> None:
        """The clips are None or numbers in range."""
        for name, value in (("clip_low", self.low), ("clip_high", self.high)):
            if value is not None:
                check_number(name, value)
                if value < 0:
                    raise ValueError(f"{name}: expected >= 0 or None, got {value}")
        if self.dual is not None:
            check_number("dual_clip", self.dual)
            if not self.dual > 1:
                raise ValueError(f"dual_clip: expected > 1 or None, got {self.dual}")

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Of the ratio, and the dual clip; infinite where there is none."""
        return (
            -math.inf if self.low is None else 1 - float(self.low),
            math.inf if self.high is None else 1 + float(self.high),
            math.inf if self.dual is None else float(self.dual),
        )


class Selection(NamedTuple):
    """A selection made in the call: of the tokens in a band at random (with a seed), or those of largest covariance."""

    ratio: float | None
    k: int | None
    at_least_one: bool
    token_index: Tensor | None
    seed: int | Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    band: str = "absolute"
    closed: bool = False
    exclude_clipped: bool = False

    def check(self, logprob: Tensor) -> Selection:
        """Values and their combination are valid; the same with its numbers in Python's types."""
        ratio, k = check_count(self.ratio, self.k, CLIP_COV_RATIO)
        low, high = check_band(self.low, self.high, self.band) if self.seed is not None else (0.0, 0.0)
        token_index = check_token_index(self.token_index, "logprob", logprob)
        seed = None if self.seed is None else seed_tensor(self.seed, logprob.device)
        return self._replace(ratio=ratio, k=k, low=low, high=high, token_index=token_index, seed=seed)


class Policy(NamedTuple):
    """What a loss does with its tokens: ``selection`` finds those that are ``selected_as``, or ``given`` says them."""

    clips: Clips
    selected_as: Selected = Selected.UNCHANGED
    selection: Selection | None = None
    given: Tensor | None = None  # bool
    penalty: str = "abs"  # estimator, with its '+' if it has one
    coefficient: float | Tensor = 0.0  # of the penalty

    @property
    def finds_band(self) -> bool:
        """Whether there is a number of candidates to report."""
        return self.selection is not None and self.selection.seed is not None


class Evaluated(NamedTuple):
    """The op's outputs; term and mean are differentiable."""

    term: Tensor  # logprob's shape, 0 in padding
    mean: Tensor  # over the valid tokens of this rank
    totals: Tensor  # SUMS_AND_MAXIMA
    metrics: Tensor  # MEANS_AND_MAXIMA
    in_band: Tensor | None = None  # number of Clip-Cov's candidates on this rank, where the totals do not have it


def evaluate(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    policy: Policy,
    batch_group: Any,
    backend: str,
) -> Evaluated:
    """Term and totals of ``policy``.

    Args:
        logprob, old_logprob, advantages, mask: of one shape and device; checked by the caller, logprob fp32 or fp64,
            mask bool or None.
        batch_group: covariance and selection are over all its ranks; term, mean and totals are of this rank.
    """
    selection = None if policy.selection is None else policy.selection.check(logprob)
    dtype = logprob.dtype
    covariance, given, in_band = None, policy.given, None
    if batch_group is not None or dtype != advantages.dtype == torch.float64:
        over_ranks: dict[str, Any] = {"batch_group": batch_group, "backend": backend}
        covariance = token_covariance(logprob, advantages, mask, **over_ranks)
        if batch_group is not None and selection is not None:
            exclude = None
            if selection.exclude_clipped:
                valid = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
                lp, old, adv = (x.detach().to(dtype) for x in (logprob, old_logprob, advantages))
                exclude = branches(lp, old, adv, valid, *policy.clips.bounds).clipped
            given, in_band = _select(covariance, mask, exclude, selection, over_ranks)
            selection = None
    coefficient = None
    if policy.selected_as == Selected.PENALISED:
        coefficient = policy.coefficient
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(logprob.device, non_blocking=True)
        else:
            coefficient = scalar_tensor(coefficient, dtype, logprob.device)
    select = selection if selection is not None else Selection(None, 0, False, None)
    term, mean, _, totals, metrics = op(
        logprob,
        old_logprob,
        advantages,
        mask,
        covariance,
        given,
        select.token_index,
        select.seed,
        coefficient,
        *policy.clips.bounds,
        int(policy.selected_as),
        selection is not None,
        select.exclude_clipped,
        PENALTIES.index(policy.penalty.removesuffix("+")),
        policy.penalty.endswith("+"),
        select.ratio,
        select.k,
        select.at_least_one,
        select.low,
        select.high,
        select.band == "quantile",
        select.closed,
        backend,
    )
    return Evaluated(term, mean, totals, metrics, in_band)


def _select(
    covariance: Tensor, mask: Tensor | None, exclude: Tensor | None, selection: Selection, over_ranks: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The selected tokens of this rank, and how many of its tokens were candidates of Clip-Cov."""
    count: dict[str, Any] = {
        "ratio": selection.ratio, "k": selection.k, "at_least_one": selection.at_least_one,
        "token_index": selection.token_index, **over_ranks,
    }  # fmt: skip
    if selection.seed is None:
        return kl_cov_mask(covariance, mask, **count), None
    band: dict[str, Any] = {
        "low": selection.low, "high": selection.high, "band": selection.band, "closed": selection.closed,
        "exclude": exclude,
    }  # fmt: skip
    candidates = clip_cov_mask(covariance, mask, seed=0, k=ALL_TOKENS, **band, **over_ranks)
    return clip_cov_mask(covariance, mask, seed=selection.seed, **count, **band), candidates.count_nonzero()
