"""Fused log-prob, entropy, covariance and Clip-Cov / KL-Cov kernels for RL on language models."""

from entropy_kernels.backends.registry import backends

__all__ = ["backends"]
__version__ = "0.1.0"
