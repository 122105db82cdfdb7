"""The metrics of a loss: each is defined here and nowhere else.

All are 0-d device tensors without gradient in the dtype of the loss; nothing is read back by the host. Means and shares
are over the valid tokens of the call, or of all ranks with a ``batch_group``; without a valid token a metric is 0.
A metric that has no meaning in a call (no entropy given, nothing selected) is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class TokenValues(NamedTuple):
    """What metrics are made of: detached tensors of the tokens' shape, 0 or False where masked."""

    mask: Tensor
    log_ratio: Tensor  # logprob - old_logprob
    ratio: Tensor  # exp of it
    clipped: Tensor  # l2 > l1, strict
    clipped_lower: Tensor
    covariance: Tensor
    nonfinite: Tensor
    in_band: Tensor | None = None
    selected: Tensor | None = None
    entropy: Tensor | None = None
    ref_kl: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A metric's definition for the reader, how its tokens are reduced, and its value at each token."""

    definition: str
    reduce: Literal["mean", "max", "sum", "loss"]
    of_token: Callable[[TokenValues], Tensor | None] | None = None  # None: not in this call
    given: str = "always"


METRICS: dict[str, Metric] = {
    "pg_loss": Metric(
        "the policy term, KL-Cov's penalty included, without entropy bonus and reference KL, aggregated like the loss; "
        "with a batch_group that of the whole batch",
        "loss",
    ),
    "clipfrac": Metric(
        "share of tokens that the PPO clip holds: l2 > l1, l1 = -A·r, l2 = -A·clamp(r, 1 - clip_low, 1 + clip_high)",
        "mean",
        lambda t: t.clipped,
    ),
    "clipfrac_lower": Metric(
        "share of tokens that the dual clip holds: A < 0 and max(l1, l2) > -A·dual_clip",
        "mean",
        lambda t: t.clipped_lower,
    ),
    "ppo_kl": Metric("mean of old_logprob - logprob, nats", "mean", lambda t: -t.log_ratio),
    "ppo_kl_abs": Metric("mean of abs(logprob - old_logprob), nats", "mean", lambda t: t.log_ratio.abs()),
    "ratio_mean": Metric("mean of r = exp(logprob - old_logprob)", "mean", lambda t: t.ratio),
    "ratio_max": Metric("largest r", "max", lambda t: t.ratio),
    "cov_mean": Metric("mean of token_covariance(logprob, advantages)", "mean", lambda t: t.covariance),
    "cov_max": Metric("largest token_covariance", "max", lambda t: t.covariance),
    "band_frac": Metric(
        "share of tokens that are candidates of Clip-Cov: covariance in the band, not excluded by the preset",
        "mean",
        lambda t: t.in_band,
        "clip_cov_loss that selects",
    ),
    "selected_frac": Metric(
        "share of tokens that are dropped (Clip-Cov) or penalised (KL-Cov)",
        "mean",
        lambda t: t.selected,
        "clip_cov_loss, kl_cov_loss",
    ),
    "entropy": Metric("mean of the entropy given, nats", "mean", lambda t: t.entropy, "entropy given"),
    "ref_kl": Metric("mean of the KL estimate to the reference, nats", "mean", lambda t: t.ref_kl, "ref_logprob given"),
    "nonfinite_tokens": Metric(
        "number of tokens at which an input, the ratio or a term of the loss is NaN or infinite",
        "sum",
        lambda t: t.nonfinite,
    ),
}


def local_reductions(values: TokenValues) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums and maxima over this rank's tokens, by name of the metric."""
    sums: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    for name, metric in METRICS.items():
        per_token = metric.of_token(values) if metric.of_token is not None else None
        if per_token is None:
            continue
        if metric.reduce != "max":
            boolean = per_token.dtype == torch.bool  # whose sum would first write int64 copies
            sums[name] = per_token.count_nonzero() if boolean else per_token.sum()
        elif per_token.numel() == 0:
            maxima[name] = per_token.new_full((), -float("inf"))
        else:
            maxima[name] = torch.where(values.mask, per_token, -float("inf")).amax()
    return sums, maxima


def finish(totals: dict[str, Tensor], tokens: Tensor, pg_loss: Tensor) -> dict[str, Tensor]:
    """The metrics from sums and maxima over all ranks, ``tokens`` the number of valid tokens."""
    count = tokens.clamp(min=1)
    out: dict[str, Tensor] = {}
    for name, metric in METRICS.items():
        if metric.reduce == "loss":
            out[name] = pg_loss
        elif name in totals:
            total = totals[name]
            if metric.reduce == "mean":
                total = total / count
            elif metric.reduce == "max":
                total = torch.where(tokens > 0, total, 0)
            out[name] = total
    return out


def metric_table() -> str:
    """The metrics as a Markdown table, for docs/losses.md and anyone who logs them."""
    rows = [f"| `{name}` | {metric.definition} | {metric.given} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | definition | present |", "|---|---|---|", *rows])
