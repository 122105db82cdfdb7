"""Policy losses: PPO's surrogate, Clip-Cov and KL-Cov (arXiv 2505.22617), aggregation, metrics, presets."""

from entropy_kernels.losses.aggregation import AGG_MODES
from entropy_kernels.losses.evaluate import METRICS, metric_table
from entropy_kernels.losses.functional import (
    ClipCovLoss,
    KlCovLoss,
    PolicyLoss,
    PolicyLossModule,
    aggregate,
    clip_cov_loss,
    kl_cov_loss,
    policy_loss,
)
from entropy_kernels.losses.kl import KL_ESTIMATORS, kl_estimate
from entropy_kernels.losses.linear import LOSSES, linear_policy_loss
from entropy_kernels.losses.options import CLIP_COV, KL_COV, ClipCovPreset, KlCovPreset
from entropy_kernels.losses.surrogates import Surrogate, clip_ratio, surrogate_table, surrogates

__all__ = [
    "AGG_MODES",
    "CLIP_COV",
    "KL_COV",
    "KL_ESTIMATORS",
    "LOSSES",
    "METRICS",
    "ClipCovLoss",
    "ClipCovPreset",
    "KlCovLoss",
    "KlCovPreset",
    "PolicyLoss",
    "PolicyLossModule",
    "Surrogate",
    "aggregate",
    "clip_cov_loss",
    "clip_ratio",
    "kl_cov_loss",
    "kl_estimate",
    "linear_policy_loss",
    "metric_table",
    "policy_loss",
    "surrogate_table",
    "surrogates",
]
