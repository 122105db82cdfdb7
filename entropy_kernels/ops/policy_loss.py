"""``entropy_kernels::policy_loss``: covariance, selection, policy surrogate, its slope and the metrics, in one op.

Schema, fake and autograd of the operator; :mod:`entropy_kernels.losses` is its public face. The kernels return the
derivative of each token's term beside the term, so the backward pass is one product.

A kernel ``policy_loss`` of a backend takes the arguments of the schema in their order, flat and contiguous, floats in
fp32 ("torch": or fp64), ratio and k as numbers (-1: not given), without the backend; it returns

    (term (N,), slope (N,), covariance (N,) or empty if given, selected (N,) bool or empty unless it selects,
     totals (13,) float64, mean (), metrics (13,))

totals and metrics in the order of policy_names.py. csrc/common/policy_term.h says what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import refuse_forward_mode, refuse_functional_grad
from entropy_kernels.backends import registry
from entropy_kernels.backends.policy_names import METRICS, TOTALS
from entropy_kernels.ops.selection import flat

__all__ = ["policy_loss"]

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_library.define(
    "policy_loss(Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor? mask, Tensor? covariance, "
    "Tensor? given, Tensor? token_index, Tensor? seed, Tensor? coefficient, float clip_low, float clip_high, "
    "float dual_clip, int selected, bool select, bool exclude_clipped, int penalty, bool square_slope, float? ratio, "
    "SymInt? k, bool at_least_one, float low, float high, bool quantile, bool closed, str backend) "
    "-> (Tensor term, Tensor mean, Tensor slope, Tensor totals, Tensor metrics)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _result(logprob: Tensor) -> torch.dtype:
    return torch.float64 if logprob.dtype == torch.float64 else torch.float32


def _forward(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    covariance: Tensor | None,
    given: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor | None,
    coefficient: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *numbers, ratio, k, at_least_one, low, high, quantile, closed, backend = options
    dtype = _result(logprob)
    if dtype == torch.float64 and backend != "torch":
        if backend != "auto":
            raise TypeError(f"logprob: expected at most fp32 with backend={backend!r}, got {logprob.dtype}")
        backend = "torch"
    tokens = logprob.to(dtype)
    kernel = registry.kernel("policy_loss", "policy_loss", backend, tokens)
    term, slope, _, _, totals, mean, metrics = kernel(
        *(flat(x.to(dtype)) for x in (tokens, old_logprob, advantages)),
        *(flat(x) for x in (mask, covariance, given, token_index)),
        seed,
        None if coefficient is None else coefficient.to(dtype),
        *numbers,
        -1.0 if ratio is None else ratio,
        -1 if k is None else k,
        at_least_one,
        low,
        high,
        quantile,
        closed,
    )
    return term.view(logprob.shape), mean, slope.view(logprob.shape), totals, metrics


_library.impl("policy_loss", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("entropy_kernels::policy_loss", lib=_library)
def _fake(logprob: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = _result(logprob)
    shapes = (logprob.shape, (), logprob.shape, (len(TOTALS),), (len(METRICS),))
    dtypes = (dtype, dtype, dtype, torch.float64, dtype)
    return tuple(logprob.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, dtypes, strict=True))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = policy_loss(*inputs)
        _, _, slope, totals, metrics = outputs
        ctx.save_for_backward(slope, inputs[0])
        ctx.metrics = metrics  # not among the saved: a metric changed in place, as by an all_reduce, spoils no "weight"
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(slope, totals, metrics)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_term: Tensor | None, grad_mean: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        slope, logprob = ctx.saved_tensors
        gradient = None
        if grad_mean is not None:
            gradient = grad_mean * ctx.metrics[METRICS.index("weight")]
        if grad_term is not None:
            gradient = grad_term if gradient is None else grad_term + gradient
        if gradient is not None:
            gradient = (slope * gradient).to(logprob.dtype)
            if torch.is_grad_enabled():
                gradient = _OnlyOnce.apply(gradient, logprob)
        return (gradient, *(None,) * (ctx.inputs - 1))


class _OnlyOnce(torch.autograd.Function):
    """Only there to say, instead of a silent wrong second derivative, that there is none."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logprob: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError("policy_loss: double backward (create_graph=True) is not supported")


def _autograd(*inputs: Any) -> tuple[Tensor, ...]:
    if inputs[0].requires_grad and torch.is_grad_enabled():
        refuse_functional_grad("policy_loss", inputs[0])
        return _PolicyLoss.apply(*inputs)
    refuse_forward_mode("policy_loss", inputs[0])
    with torch._C._AutoDispatchBelowAutograd():
        return policy_loss(*inputs)


_library.impl("policy_loss", _autograd, "Autograd")

policy_loss = torch.ops.entropy_kernels.policy_loss.default
