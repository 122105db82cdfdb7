"""Validation of what all losses take, once."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import check_number
from entropy_kernels.selection import expand_advantages


class Inputs(NamedTuple):
    """What all losses take, checked; tensors have ``logprob``'s shape, values under padding are as they came."""

    logprob: Tensor  # fp32 (fp64 if it came so): gradients of several terms are added before they are rounded
    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor | None  # bool, True = counts; None: all do
    entropy: Tensor | None
    ref_logprob: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the loss: fp32, or fp64 for fp64 log-probs."""
        return self.logprob.dtype

    @property
    def valid(self) -> Tensor:
        """The mask, all True where there is none."""
        return torch.ones_like(self.logprob, dtype=torch.bool) if self.mask is None else self.mask

    def ref_log_ratio(self) -> Tensor | None:
        """logprob - ref_logprob, differentiable, 0 in padding."""
        if self.ref_logprob is None:
            return None
        return torch.where(self.valid, self.logprob - self.ref_logprob.to(self.dtype), 0)


def check_inputs(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    entropy: Tensor | None,
    entropy_coef: float | Tensor,
    ref_logprob: Tensor | None,
    ref_kl_coef: float | Tensor,
) -> Inputs:
    """Check tensors and coefficients and bring them to one shape; constants carry no gradient any more."""
    check_tensor("logprob", logprob)
    if not logprob.is_floating_point():
        raise TypeError(f"logprob: expected a floating-point dtype, got {logprob.dtype}")
    if logprob.dim() == 0:
        raise ValueError("logprob: expected at least one dimension, often (B, L), got a 0-d tensor")
    valid = check_mask("mask", mask, logprob)
    old = _like("old_logprob", old_logprob, logprob).detach()
    ref = None if ref_logprob is None else _like("ref_logprob", ref_logprob, logprob).detach()
    advantages = expand_advantages(advantages, logprob)
    check_coefficient("entropy_coef", entropy_coef)
    check_coefficient("ref_kl_coef", ref_kl_coef)
    if ref is None and used(ref_kl_coef):
        raise ValueError(f"ref_logprob: expected a tensor with ref_kl_coef={ref_kl_coef}, got None")
    if entropy is None and used(entropy_coef):
        raise ValueError(f"entropy: expected a tensor with entropy_coef={entropy_coef}, got None")
    if entropy is not None:
        entropy = _like("entropy", entropy, logprob)
        _warn_about_lost_gradient(entropy, entropy_coef, logprob)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    return Inputs(logprob.to(dtype), old, advantages, valid, entropy, ref)


def check_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_mask(name: str, value: Any, logprob: Tensor) -> Tensor | None:
    """``value`` as bool in ``logprob``'s shape; None stays None."""
    if value is None:
        return None
    check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: expected a bool, int or float 0/1 dtype, got {value.dtype}")
    _check_device(name, value, logprob)
    if value.shape != logprob.shape:
        raise ValueError(f"{name}: expected logprob's shape {tuple(logprob.shape)}, got {tuple(value.shape)}")
    value = value.detach()
    return value if value.dtype == torch.bool else value != 0


def check_coefficient(name: str, value: Any) -> None:
    """``value`` is a finite number, or a 0-d tensor (not read back: a schedule on the device stays there)."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"{name}: expected a number or a 0-d tensor, got {value.dtype} of shape {tuple(value.shape)}"
            )
    else:
        check_number(name, value)


def used(coefficient: float | Tensor) -> bool:
    """Whether the term enters the loss; a tensor is not read back, so it always does."""
    return isinstance(coefficient, Tensor) or coefficient != 0


def _like(name: str, value: Any, logprob: Tensor) -> Tensor:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    _check_device(name, value, logprob)
    if value.shape != logprob.shape:
        raise ValueError(f"{name}: expected logprob's shape {tuple(logprob.shape)}, got {tuple(value.shape)}")
    return value


def _check_device(name: str, value: Tensor, logprob: Tensor) -> None:
    if value.device != logprob.device:
        raise ValueError(f"{name}: expected on the device of logprob, {logprob.device}, got {value.device}")


def _warn_about_lost_gradient(entropy: Tensor, coefficient: float | Tensor, logprob: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not used(coefficient):
        return
    if logprob.requires_grad and not entropy.requires_grad:
        warnings.warn(
            "entropy: expected a tensor that requires grad where entropy_coef is not 0; without a gradient the bonus "
            "changes the value of the loss and nothing else (logprob_entropy returns a differentiable entropy)",
            stacklevel=4,
        )
