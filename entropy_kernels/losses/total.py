"""The last step of every loss: policy term, entropy bonus, reference KL and metrics, aggregated together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels.losses import metrics
from entropy_kernels.losses.aggregation import Aggregation, Counts, over_group
from entropy_kernels.losses.inputs import Tokens, used
from entropy_kernels.losses.kl import kl_estimate
from entropy_kernels.losses.surrogate import Branches


class PolicyLoss(NamedTuple):
    """A loss to call backward on, and its metrics (:data:`entropy_kernels.losses.METRICS`)."""

    loss: Tensor  # 0-d, fp32 (fp64 for fp64 log-probs)
    metrics: dict[str, Tensor]  # 0-d, detached, on the device


class Extras(NamedTuple):
    """The terms beside the policy term."""

    entropy_coef: float | Tensor
    ref_kl_coef: float | Tensor
    kl_estimator: str


def total(
    tokens: Tokens,
    policy_term: Tensor,
    extras: Extras,
    aggregation: Aggregation,
    found: Branches,
    covariance: Tensor,
    selected: Tensor | None = None,
    in_band: Tensor | None = None,
) -> PolicyLoss:
    """loss = [policy term] - entropy_coef·[entropy] + ref_kl_coef·[reference KL], [x] the aggregate of x."""
    token_loss = policy_term
    ref_kl = None
    if tokens.ref_log_ratio is not None:
        ref_kl = kl_estimate(tokens.ref_log_ratio, extras.kl_estimator)
        if used(extras.ref_kl_coef):
            token_loss = token_loss + extras.ref_kl_coef * ref_kl
    if tokens.entropy is not None and used(extras.entropy_coef):
        token_loss = token_loss - extras.entropy_coef * tokens.entropy

    # Counted also where a coefficient of 0 keeps it out of the loss
    finite = torch.isfinite(token_loss.detach())
    if tokens.entropy is not None:
        finite = finite & torch.isfinite(tokens.entropy.detach())
    if tokens.ref_log_ratio is not None and ref_kl is not None:
        comparable = torch.isfinite(tokens.ref_log_ratio.detach())
        finite = finite & comparable
        # k3 clamps, and would show an infinite ratio as a small divergence
        ref_kl = torch.where(comparable, ref_kl.detach(), float("nan"))

    numerator = aggregation.numerator(token_loss, tokens.mask)
    counts = Counts.of(tokens.mask)
    values = metrics.TokenValues(
        mask=tokens.mask,
        log_ratio=tokens.log_ratio.detach(),
        ratio=found.ratio,
        clipped=found.clipped,
        clipped_lower=found.clipped_lower,
        covariance=covariance,
        nonfinite=tokens.mask & ~finite,
        in_band=in_band,
        selected=None if selected is None else selected & tokens.mask,
        entropy=None if tokens.entropy is None else tokens.entropy.detach(),
        ref_kl=ref_kl,
    )
    sums, maxima = metrics.local_reductions(values)
    sums["pg_loss"] = aggregation.numerator(policy_term.detach(), tokens.mask)
    sums["tokens"], sums["sequences"] = counts
    totals = over_group(sums, maxima, aggregation.group, tokens.dtype)

    denominator = aggregation.denominator(Counts(totals["tokens"], totals["sequences"]), tokens.mask.shape[-1])
    loss = numerator / denominator * aggregation.dp_size
    pg_loss = totals["pg_loss"] / denominator
    if aggregation.group is None:
        pg_loss = pg_loss * aggregation.dp_size
    return PolicyLoss(loss.to(tokens.dtype), metrics.finish(totals, totals["tokens"], pg_loss.to(tokens.dtype)))
