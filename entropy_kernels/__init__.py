"""Fused log-prob, entropy, covariance and Clip-Cov / KL-Cov kernels for RL on language models."""

from entropy_kernels.analysis import EntropyLaw, fit_entropy_law, predicted_entropy_change
from entropy_kernels.backends.registry import backends
from entropy_kernels.functional import LogprobEntropy, TokenStats, logprob_entropy, token_stats

__all__ = [
    "EntropyLaw",
    "LogprobEntropy",
    "TokenStats",
    "backends",
    "fit_entropy_law",
    "logprob_entropy",
    "predicted_entropy_change",
    "token_stats",
]
__version__ = "0.1.0"
