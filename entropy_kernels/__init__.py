"""Fused log-prob, entropy, covariance and Clip-Cov / KL-Cov kernels for RL on language models."""

from entropy_kernels.analysis import EntropyLaw, fit_entropy_law, predicted_entropy_change
from entropy_kernels.backends.registry import backends
from entropy_kernels.functional import LogprobEntropy, TokenStats, logprob_entropy, token_stats
from entropy_kernels.selection import SelectionBatch, clip_cov_mask, kl_cov_mask, token_covariance

__all__ = [
    "EntropyLaw",
    "LogprobEntropy",
    "SelectionBatch",
    "TokenStats",
    "backends",
    "clip_cov_mask",
    "fit_entropy_law",
    "kl_cov_mask",
    "logprob_entropy",
    "predicted_entropy_change",
    "token_covariance",
    "token_stats",
]
__version__ = "0.1.0"
