"""The metrics of a loss: each is defined here and nowhere else.

All are 0-d device tensors without gradient in the dtype of the loss; nothing is read back by the host. Means and shares
are over the valid tokens of the call, or of all ranks with a ``batch_group``; without a valid token a metric is 0.
A metric that has no meaning in a call (no entropy given, nothing selected) is absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from entropy_kernels.losses.options import LossOptions


class Metric(NamedTuple):
    """A metric's definition for the reader, and when it is there."""

    definition: str
    given: str = "always"


METRICS: dict[str, Metric] = {
    "pg_loss": Metric(
        "the surrogate, token weights and KL-Cov's penalty included, without entropy bonus and reference KL, "
        'aggregated like the loss ("none": token-mean); with a batch_group that of the whole batch',
    ),
    "clipfrac": Metric(
        "share of tokens that the surrogate clips; ppo: l2 > l1, l1 = -A·r, "
        "l2 = -A·clamp(r, 1 - clip_low, 1 + clip_high)",
    ),
    "clipfrac_lower": Metric(
        "share of tokens that the dual clip stops, A < 0 and max(l1, l2) > -A·dual_clip, or the surrogate's other clip",
    ),
    "ppo_kl": Metric("mean of old_logprob - logprob, nats"),
    "ppo_kl_abs": Metric("mean of abs(logprob - old_logprob), nats"),
    "ratio_mean": Metric("mean of r = exp(logprob - old_logprob)"),
    "ratio_max": Metric("largest r"),
    "cov_mean": Metric("mean of token_covariance(logprob, advantages)"),
    "cov_max": Metric("largest token_covariance"),
    "band_frac": Metric(
        "share of tokens that are candidates of Clip-Cov: covariance in the band, not excluded by the preset",
        "clip_cov_loss that selects",
    ),
    "selected_frac": Metric(
        "share of tokens that are dropped (Clip-Cov) or penalised (KL-Cov)",
        "clip_cov_loss, kl_cov_loss",
    ),
    "entropy": Metric("mean of the entropy given, nats", "entropy given"),
    "ref_kl": Metric("mean of the KL estimate to the reference, nats", "ref_logprob given"),
    "nonfinite_tokens": Metric(
        "number of tokens at which an input or a term of the loss is NaN or infinite (an infinite ratio that a clip "
        'stops is none), or which nonfinite="drop" dropped',
    ),
}


def names(options: LossOptions, entropy: bool, ref_logprob: bool) -> list[str]:
    """The metrics of a loss, in their order."""
    there = {
        "selected_frac": options.effect != "none",
        "band_frac": options.selection is not None and options.selection.seed is not None,
        "entropy": entropy, "ref_kl": ref_logprob,
    }  # fmt: skip
    found = []
    for name in METRICS:
        if there.get(name, True):
            found.append(name)
    return found


def metric_table() -> str:
    """The metrics as a Markdown table, for docs/losses.md and anyone who logs them."""
    rows = [f"| `{name}` | {metric.definition} | {metric.given} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | definition | present |", "|---|---|---|", *rows])
