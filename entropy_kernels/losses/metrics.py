"""The metrics of a loss: each is defined here and nowhere else.

All are 0-d device tensors without gradient in the dtype of the loss; nothing is read back by the host. Means and shares
are over the valid tokens of the call, or of all ranks with a ``batch_group``; without a valid token a metric is 0.
A metric that has no meaning in a call (no entropy given, nothing selected) is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A metric's definition for the reader, how its tokens are reduced, and when it is there."""

    definition: str
    reduce: Literal["mean", "max", "sum", "loss"]
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
    ),
    "clipfrac_lower": Metric(
        "share of tokens that the dual clip holds: A < 0 and max(l1, l2) > -A·dual_clip",
        "mean",
    ),
    "ppo_kl": Metric("mean of old_logprob - logprob, nats", "mean"),
    "ppo_kl_abs": Metric("mean of abs(logprob - old_logprob), nats", "mean"),
    "ratio_mean": Metric("mean of r = exp(logprob - old_logprob)", "mean"),
    "ratio_max": Metric("largest r", "max"),
    "cov_mean": Metric("mean of token_covariance(logprob, advantages)", "mean"),
    "cov_max": Metric("largest token_covariance", "max"),
    "band_frac": Metric(
        "share of tokens that are candidates of Clip-Cov: covariance in the band, not excluded by the preset",
        "mean",
        "clip_cov_loss that selects",
    ),
    "selected_frac": Metric(
        "share of tokens that are dropped (Clip-Cov) or penalised (KL-Cov)",
        "mean",
        "clip_cov_loss, kl_cov_loss",
    ),
    "entropy": Metric("mean of the entropy given, nats", "mean", "entropy given"),
    "ref_kl": Metric("mean of the KL estimate to the reference, nats", "mean", "ref_logprob given"),
    "nonfinite_tokens": Metric(
        "number of tokens at which an input, the ratio or a term of the loss is NaN or infinite",
        "sum",
    ),
}


def finish(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics but pg_loss from sums and maxima over all ranks, "tokens" being the number of valid tokens."""
    tokens = totals["tokens"]
    totals = {**totals, "ppo_kl": -totals["log_ratio"]}
    out: dict[str, Tensor] = {}
    for name, metric in METRICS.items():
        if name not in totals or metric.reduce == "loss":
            continue
        if metric.reduce == "mean":
            out[name] = totals[name] / tokens.clamp(min=1)
        elif metric.reduce == "max":
            out[name] = torch.where(tokens > 0, totals[name], 0)
        else:
            out[name] = totals[name]
    return out


def metric_table() -> str:
    """The metrics as a Markdown table, for docs/losses.md and anyone who logs them."""
    rows = [f"| `{name}` | {metric.definition} | {metric.given} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | definition | present |", "|---|---|---|", *rows])
