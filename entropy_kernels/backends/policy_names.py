"""Names of what the op ``policy_loss`` takes and returns as numbers: csrc/common/policy_term.h in Python."""

from __future__ import annotations

import enum

# Index in the totals: sums over the valid tokens, then maxima.
TOTALS = (
    "pg_loss", "clipfrac", "clipfrac_lower", "log_ratio", "ppo_kl_abs", "ratio_mean", "cov_mean", "band_frac",
    "selected_frac", "nonfinite_tokens", "tokens", "ratio_max", "cov_max",
)  # fmt: skip
MAXIMA = TOTALS[-2:]
# Index in the metrics; "pg_loss" is the op's mean again, "weight" 1 / the number of valid tokens, 1 without any.
METRICS = (
    "pg_loss", "clipfrac", "clipfrac_lower", "ppo_kl", "ppo_kl_abs", "ratio_mean", "cov_mean", "band_frac",
    "selected_frac", "nonfinite_tokens", "ratio_max", "cov_max", "weight",
)  # fmt: skip
PENALTIES = ("k1", "abs", "k2", "k3")


class Selected(enum.IntEnum):
    """What becomes of a selected token."""

    UNCHANGED = 0
    DROPPED = 1  # value and slope 0
    DETACHED = 2  # slope 0
    PENALISED = 3  # a penalty is added
