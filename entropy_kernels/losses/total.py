"""The last step of every loss: policy term, entropy bonus, reference KL and metrics, aggregated together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels.losses import metrics
from entropy_kernels.losses.aggregation import Aggregation, Counts, over_group
from entropy_kernels.losses.inputs import Inputs, used
from entropy_kernels.losses.kl import kl_estimate
from entropy_kernels.policy import MAXIMA, MEANS_AND_MAXIMA, SUMS_AND_MAXIMA, Evaluated, Policy, Selected


class PolicyLoss(NamedTuple):
    """A loss to call backward on, and its metrics (:data:`entropy_kernels.losses.METRICS`)."""

    loss: Tensor  # 0-d, fp32 (fp64 for fp64 log-probs)
    metrics: dict[str, Tensor]  # 0-d, detached, on the device


class Extras(NamedTuple):
    """The terms beside the policy term."""

    entropy_coef: float | Tensor
    ref_kl_coef: float | Tensor
    kl_estimator: str


class _Terms(NamedTuple):
    """Per token, 0 in padding; ``plain``: the loss is the policy term alone, and nothing has been added to either."""

    policy: Tensor
    loss: Tensor
    plain: bool
    sums: dict[str, Tensor]  # what the extras add to the sums of the metrics


def total(inputs: Inputs, policy: Policy, evaluated: Evaluated, extras: Extras, aggregation: Aggregation) -> PolicyLoss:
    """loss = [policy term] - entropy_coef·[entropy] + ref_kl_coef·[reference KL], [x] the aggregate of x."""
    terms = _add_extras(inputs, evaluated, extras)
    if aggregation.group is None:
        loss, pg_loss = _alone(inputs, evaluated, terms, aggregation)
        found = dict(zip(MEANS_AND_MAXIMA, evaluated.metrics.unbind(), strict=True))
        weight = found["weight"]
        for name, value in terms.sums.items():
            found[name] = (value if name == "nonfinite_tokens" else value * weight).to(inputs.dtype)
    else:
        loss, pg_loss, found = _over_ranks(inputs, evaluated, terms, aggregation)
    found["pg_loss"] = pg_loss
    if not policy.finds_band:
        found.pop("band_frac", None)
    if policy.selected_as == Selected.UNCHANGED:
        found.pop("selected_frac", None)
    return PolicyLoss(loss, {name: found[name] for name in metrics.METRICS if name in found})


def _add_extras(inputs: Inputs, evaluated: Evaluated, extras: Extras) -> _Terms:
    if inputs.entropy is None and inputs.ref_logprob is None:
        return _Terms(evaluated.term, evaluated.term, True, {})
    policy_term, valid = evaluated.term, inputs.valid
    sums: dict[str, Tensor] = {}
    # Counted also where a coefficient of 0 keeps it out of the loss
    finite = torch.ones_like(valid)
    added: list[Tensor] = []
    log_ratio = inputs.ref_log_ratio()
    if log_ratio is not None:
        comparable = torch.isfinite(log_ratio.detach())
        ref_kl = kl_estimate(log_ratio, extras.kl_estimator)
        if used(extras.ref_kl_coef):
            # k3 clamps, and would show an infinite ratio as a small divergence: nothing hides what is not finite
            policy_term = policy_term * torch.where(comparable, 1.0, float("nan")).to(inputs.dtype)
            added.append(extras.ref_kl_coef * ref_kl)
        finite = finite & comparable
        sums["ref_kl"] = torch.where(comparable, ref_kl.detach(), float("nan")).sum()
    if inputs.entropy is not None:
        entropy = torch.where(valid, inputs.entropy.to(inputs.dtype), 0)
        if used(extras.entropy_coef):
            added.append(-extras.entropy_coef * entropy)
        finite = finite & torch.isfinite(entropy.detach())
        sums["entropy"] = entropy.detach().sum()
    token_loss = policy_term
    for term in added:
        token_loss = token_loss + term
    finite = finite & torch.isfinite(token_loss.detach())
    sums["nonfinite_tokens"] = (valid & ~finite).count_nonzero()
    return _Terms(policy_term, token_loss, not added, sums)


def _alone(inputs: Inputs, evaluated: Evaluated, terms: _Terms, aggregation: Aggregation) -> tuple[Tensor, Tensor]:
    """Loss and pg_loss of a batch that no other rank shares."""
    if aggregation.is_mean_of_call and terms.plain:
        return evaluated.mean, evaluated.metrics[MEANS_AND_MAXIMA.index("pg_loss")]
    mask = inputs.valid
    denominator = aggregation.denominator(Counts.of(mask), mask.shape[-1])
    loss = (aggregation.numerator(terms.loss, mask) / denominator * aggregation.dp_size).to(inputs.dtype)
    if terms.plain:
        return loss, loss.detach().clone()
    policy = aggregation.numerator(terms.policy.detach(), mask) / denominator * aggregation.dp_size
    return loss, policy.to(inputs.dtype)


def _over_ranks(
    inputs: Inputs, evaluated: Evaluated, terms: _Terms, aggregation: Aggregation
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of this rank's share, pg_loss and metrics of the whole batch."""
    mask = inputs.valid
    sums = dict(zip(SUMS_AND_MAXIMA, evaluated.totals.unbind(), strict=True))
    maxima = {name: torch.where(sums["tokens"] > 0, sums.pop(name), -float("inf")) for name in MAXIMA}
    sums |= terms.sums
    if evaluated.in_band is not None:
        sums["band_frac"] = evaluated.in_band
    sums["pg_loss"] = aggregation.numerator(terms.policy.detach(), mask)
    sums["sequences"] = Counts.of(mask).sequences
    totals = over_group(sums, maxima, aggregation.group)
    denominator = aggregation.denominator(Counts(totals["tokens"], totals["sequences"]), mask.shape[-1])
    loss = aggregation.numerator(terms.loss, mask) / denominator * aggregation.dp_size
    found = {name: value.to(inputs.dtype) for name, value in metrics.finish(totals).items()}
    return loss.to(inputs.dtype), (totals["pg_loss"] / denominator).to(inputs.dtype), found
