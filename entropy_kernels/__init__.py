"""Fused log-prob, entropy, covariance and Clip-Cov / KL-Cov kernels for RL on language models."""

from entropy_kernels._rows import NAMES as STATISTICS
from entropy_kernels._version import __version__ as __version__
from entropy_kernels.analysis import EntropyLaw, fit_entropy_law, predicted_entropy_change
from entropy_kernels.backends.registry import backends
from entropy_kernels.batch import TokenBatch
from entropy_kernels.control import Control, Controller, SelectionBatch, control
from entropy_kernels.linear import LinearPlan, linear_logprob_entropy, linear_plan, linear_token_stats
from entropy_kernels.losses import (
    ClipCovLoss,
    KlCovLoss,
    PolicyLoss,
    PolicyLossModule,
    Surrogate,
    aggregate,
    clip_cov_loss,
    kl_cov_loss,
    linear_policy_loss,
    policy_loss,
    surrogates,
)
from entropy_kernels.methods import Method, methods
from entropy_kernels.selection import (
    SeedCounter,
    TokenMoments,
    budget_tokens,
    clip_cov_mask,
    kl_cov_mask,
    random_tokens,
    token_covariance,
    token_moments,
    top_tokens,
)
from entropy_kernels.statistics import LogprobEntropy, TokenStats, entropy, logprob_entropy, token_stats
from entropy_kernels.target_entropy import TargetEntropy

__all__ = [
    "STATISTICS",
    "ClipCovLoss",
    "Control",
    "Controller",
    "EntropyLaw",
    "KlCovLoss",
    "LinearPlan",
    "LogprobEntropy",
    "Method",
    "PolicyLoss",
    "PolicyLossModule",
    "SeedCounter",
    "SelectionBatch",
    "Surrogate",
    "TargetEntropy",
    "TokenBatch",
    "TokenMoments",
    "TokenStats",
    "aggregate",
    "backends",
    "budget_tokens",
    "clip_cov_loss",
    "clip_cov_mask",
    "control",
    "entropy",
    "fit_entropy_law",
    "hf",
    "kl_cov_loss",
    "kl_cov_mask",
    "linear_logprob_entropy",
    "linear_plan",
    "linear_policy_loss",
    "linear_token_stats",
    "logprob_entropy",
    "methods",
    "policy_loss",
    "predicted_entropy_change",
    "random_tokens",
    "surrogates",
    "token_covariance",
    "token_moments",
    "token_stats",
    "top_tokens",
]

from entropy_kernels.integrations import hf  # last: it uses the names above
