"""The error bound that values and gradients are held to.

    |ours - float64| <= |same-dtype torch - float64| + floor

The floor is what rounding alone can do to *this* element: first-order error propagation of a few ulps of the
accumulation dtype through the formula, from the terms that are added, before they cancel. It scales with the element
(gradients scale as 1/V, a constant tolerance does not), so that a gradient without its softmax term, or without its
entropy term, or with the target corrected after rounding fails; test_compare.py holds that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import reference
from reference import Dense

ULPS = 4  # of the accumulation dtype, per operation that rounds


@dataclass
class Errors:
    """First-order bounds of the rounding errors of one row's intermediate results."""

    eps: float
    p: Tensor  # (N, V) relative
    logp: Tensor  # (N, V) absolute
    entropy: Tensor  # (N,) absolute
    collision: Tensor  # (N,) absolute
    p_max: Tensor  # (N,) relative
    mean: Tensor  # (N,) absolute, of Σ p x


def _finite(x: Tensor) -> Tensor:
    """Impossible entries have p = 0 and take no part in any error."""
    return torch.where(x.isfinite(), x, 0)


def errors(d: Dense, softcap: float | None, accumulate: torch.dtype) -> Errors:
    """Rounding errors of a computation in ``accumulate`` that follows docs/math.md §2, from the float64 reference."""
    eps = torch.finfo(accumulate).eps * (2 if accumulate == torch.float64 else 1)  # there the reference rounds as well
    exponent = _finite(d.x).abs()  # (N, V)
    if softcap is not None:
        # tanh rounds the logit itself, so the error is relative to it and no longer to the distance to the maximum
        exponent = exponent + ULPS * _finite(d.capped).abs() / d.temperature
    log_s = -d.logp.amax(-1)  # (N,)
    size = 1 + log_s + d.entropy
    spread = torch.where(d.p == 0, 0, d.p * (d.logp + d.entropy[:, None]).abs())  # |dH / dx|
    sum_error = eps * ((d.p * exponent).sum(-1) + ULPS)  # relative error of s, absolute error of log s
    logp = eps * (exponent + _finite(d.logp).abs()) + (sum_error + eps * log_s)[:, None]
    entropy = eps * ((spread * exponent).sum(-1) + ULPS * size)
    pull = 2 * d.p * (d.p - d.collision[:, None]).abs()  # |dS2 / dx|
    collision = eps * ((pull * exponent).sum(-1) + 2 * ULPS * d.collision)
    mean_x = (d.p * _finite(d.x)).sum(-1)
    off = torch.where(d.p == 0, 0, d.p * (1 + _finite(d.x) - mean_x[:, None]).abs())  # |d Σ p x / dx|
    mean = eps * ((off * exponent).sum(-1) - ULPS * mean_x)
    return Errors(eps, torch.where(d.p == 0, 0, logp + ULPS * eps), logp, entropy, collision, sum_error, mean)


def value_floor(d: Dense, e: Errors) -> dict[str, Tensor]:
    """Floor of each statistic, (N,)."""

    def at_target(x: Tensor) -> Tensor:
        return (d.one_hot * _finite(x)).sum(-1)

    p_y, logp_y = at_target(d.p), at_target(d.logp)
    own = p_y * ((logp_y.abs() + d.entropy) * at_target(e.p) + at_target(e.logp) + e.entropy)
    squares = torch.where(d.p == 0, 0, d.p * d.p * (d.logp.abs() * 2 * e.p + e.p)).sum(-1)  # Σ p² log p
    rest = d.entropy * e.collision + d.collision * e.entropy
    # E[u] is a difference of two numbers of the size of p_y and S2, multiplied by H
    rounding = 2 * ULPS * e.eps * d.entropy * (p_y + d.collision)
    return {
        "logprob": at_target(e.logp) + ULPS * e.eps,
        "entropy": e.entropy,
        "collision": e.collision,
        "vocab_covariance": own + squares + rest + rounding,
        "p_max": d.p_max * (e.p_max + ULPS * e.eps),
        "mean_logit": d.temperature[:, 0] * e.mean
        + ULPS * e.eps * (_finite(d.capped.amax(-1)).abs() + d.mean_logit.abs()),
    }


def gradient_terms(d: Dense, upstream: dict[str, Tensor]) -> Tensor:
    """Size of the terms that a gradient by the scaled, capped logits is the sum of, before they cancel, (N, V)."""
    g = {name: upstream[name].reshape(-1, 1).double().abs() for name in upstream}
    # where p = 0 no term is left but the target's own, however large log p is
    logp = torch.where(d.p == 0, 0, d.logp).abs()
    size = torch.zeros_like(d.p)
    if "logprob" in g:
        size += g["logprob"] * (d.one_hot + d.p)
    if "entropy" in g:
        size += g["entropy"] * d.p * (logp + d.entropy[:, None])
    if "collision" in g:
        size += g["collision"] * 2 * d.p * (d.p + d.collision[:, None])
    return size


def gradient_floor(d: Dense, e: Errors, dtype: torch.dtype, upstream: dict[str, Tensor]) -> Tensor:
    """Floor of the gradient in ``dtype``, (N, V)."""
    g = {name: upstream[name].reshape(-1, 1).double().abs() for name in upstream}
    logp, entropy = torch.where(d.p == 0, 0, d.logp).abs(), d.entropy[:, None]
    size = gradient_terms(d, upstream)
    error = torch.zeros_like(d.p)
    if "logprob" in g:
        error += g["logprob"] * d.p * e.p
    if "entropy" in g:
        error += g["entropy"] * d.p * ((logp + entropy) * e.p + e.p + e.entropy[:, None])
    if "collision" in g:
        error += g["collision"] * 2 * d.p * ((2 * d.p + d.collision[:, None]) * e.p + e.collision[:, None])
    error = (error + ULPS * e.eps * size) * d.cap_grad
    # 1 - tanh² cancels: its own error is absolute. A p below the smallest normal number may be flushed to 0.
    flushed = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).tiny
    weight = sum(g.values(), torch.zeros_like(entropy)) * (1 + logp + entropy)
    error = error + (d.cap_grad != 1) * 2 * ULPS * e.eps * size + flushed * weight * 4
    exact = reference.gradient(d, **upstream)
    out = torch.finfo(dtype)
    # rounding to nearest is half an ulp; the bound is a little more, as the error before it moves the point
    return 1.01 * error / d.temperature + 0.51 * out.eps * _finite(exact).abs() + out.smallest_normal * out.eps


def assert_within(name: str, actual: Tensor, exact: Tensor, baseline: Tensor, floor: Tensor) -> None:
    """``actual`` is NaN and inf exactly where ``exact`` is, and elsewhere within the bound; all of one shape."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    # what overflows the output dtype is inf there
    exact_out = exact.to(actual.dtype)
    special = ~exact_out.isfinite()
    same = torch.where(exact_out.isnan(), actual.isnan(), actual == exact_out)
    wrong = special & ~same
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise AssertionError(f"{name}{at}: got {actual[tuple(at)]}, expected {exact_out[tuple(at)]}")
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    error = torch.where(special, zero, (actual.double() - exact).abs())
    allowed = torch.where(baseline.isfinite(), (baseline.double() - exact).abs(), zero) + floor
    bad = ~(error <= allowed) & ~special
    if bad.any():
        at = torch.where(bad, error / allowed, zero).nan_to_num(nan=torch.inf).argmax()
        index = [int(i) for i in torch.unravel_index(at, error.shape)]
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} beyond the bound; worst at {index}: "
            f"got {actual.reshape(-1)[at].item():.9g}, expected {exact.reshape(-1)[at].item():.9g}, error "
            f"{error.reshape(-1)[at].item():.3g} > allowed {allowed.reshape(-1)[at].item():.3g} "
            f"(floor {floor.reshape(-1)[at].item():.3g})"
        )


class Bound:
    """The references for one input; checks any number of results against them."""

    def __init__(self, logits: Tensor, target: Tensor, **kwargs: object) -> None:
        self.dtype = logits.dtype
        self.accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.exact = reference.dense(logits.detach(), target, **kwargs)  # type: ignore[arg-type]
        self.baseline = reference.dense(logits.detach(), target, **kwargs, dtype=self.accumulate)  # type: ignore[arg-type]
        self.errors = errors(self.exact, kwargs.get("softcap"), self.accumulate)  # type: ignore[arg-type]

    def check_values(self, **values: Tensor) -> None:
        floors = value_floor(self.exact, self.errors)
        for name, value in values.items():
            assert value.dtype == self.accumulate, f"{name}: dtype {value.dtype}, expected {self.accumulate}"
            exact, baseline = getattr(self.exact, name), getattr(self.baseline, name)
            assert_within(name, value.detach().reshape(-1), exact, baseline, floors[name])

    def check_gradient(self, actual: Tensor, **upstream: Tensor) -> None:
        assert actual.dtype == self.dtype, f"gradient: dtype {actual.dtype}, expected {self.dtype}"
        exact = reference.gradient(self.exact, **upstream)
        baseline = reference.gradient(self.baseline, **upstream).to(self.dtype)
        floor = gradient_floor(self.exact, self.errors, self.dtype, upstream)
        assert_within("gradient", actual.reshape(exact.shape), exact, baseline, floor)
