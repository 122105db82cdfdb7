"""Estimators of a KL divergence from log-prob differences of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_kernels.losses.surrogates import unless

KL_ESTIMATORS: dict[str, tuple[tuple[str, ...], str]] = {
    "k1": (("kl",), "D"),
    "abs": ((), "|D|"),
    "k2": (("mse",), "D²/2"),
    "k3": (("low_var_kl",), "exp(-D) + D - 1, with D clamped to ±20 and the result to ±10"),
}
"""Estimators of a KL divergence: name -> (other names in use, formula of D = log π - log π_other)."""
_CANONICAL = {alias: name for name, (aliases, _) in KL_ESTIMATORS.items() for alias in (name, *aliases)}


def check_estimator(argument: str, name: str) -> str:
    """The canonical name, with its '+' if it has one."""
    plain = name.removesuffix("+") if isinstance(name, str) else ""
    if plain not in _CANONICAL:
        raise ValueError(f"{argument}: expected one of {', '.join(sorted(_CANONICAL))}, or with '+', got {name!r}")
    return _CANONICAL[plain] + name[len(plain) :]


def kl_estimate(log_ratio: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(π‖π_other) from D = log π - log π_other at tokens sampled from π.

    k1 is unbiased with high variance; k3 is unbiased where its clamps do not act, non-negative, with low variance. Of
    the *gradients* only k2's is that of the KL divergence in expectation (for tokens sampled from the present policy),
    hence the suffix '+': the value of the estimator named, the gradient of k2, which is D.

    Args:
        log_ratio: D in nats, floating point, any shape.
        estimator: "k1", "abs", "k2" or "k3", each optionally with '+'; "kl", "mse" and "low_var_kl" are other names of
            k1, k2 and k3.

    Returns:
        The estimate in nats, ``log_ratio``'s shape and dtype, differentiable.

    Raises:
        ValueError: an unknown estimator.

    Source:
        J. Schulman, "Approximating KL divergence", 2020; docs/losses.md.
    """
    name = check_estimator("estimator", estimator)
    value = _value(log_ratio, name.removesuffix("+"))
    if not name.endswith("+"):
        return value
    square = _value(log_ratio, "k2")
    return value.detach() + (square - square.detach())


def kl_and_grad(log_ratio: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimate (its canonical name, fp32 or fp64) and its derivative by D, written out."""
    name = estimator.removesuffix("+")
    value = _value(log_ratio, name)
    if estimator != name or name == "k2":
        return value, log_ratio
    if name == "k1":
        return value, torch.ones_like(log_ratio)
    if name == "abs":
        return value, log_ratio.sign()
    # Where D is clamped the value is, too: it is above 10 from D = 11 on
    return value, unless(value >= 10, 1 - torch.exp(-log_ratio))[0]


def _value(log_ratio: Tensor, name: str) -> Tensor:
    if name == "k1":
        return log_ratio
    if name == "abs":
        return log_ratio.abs()  # its gradient at 0 is 0
    if name == "k2":
        return 0.5 * log_ratio.square()
    reverse = (-log_ratio).clamp(-20, 20)
    return (torch.exp(reverse) - reverse - 1).clamp(-10, 10)
