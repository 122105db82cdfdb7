"""The self-check of ``entropy-kernels doctor``: every available backend against float64 on small random data."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import entropy_kernels as ek

# Largest error allowed, in units of the result's own scale (1 for nats, the row's largest gradient for gradients).
# fp32 arithmetic on a few hundred terms is good to 1e-6; a wrong term is off by 1e-3 and more.
TOLERANCE = 2e-5

# what was compared -> (largest error, largest error allowed)
Errors = dict[str, tuple[float, float]]
Compare = Callable[[str, str], Errors]


@dataclass(frozen=True)
class Check:
    """One comparison with float64: the largest error of ``what`` and where it came from."""

    op: str
    backend: str
    device: str
    what: str
    ok: bool
    detail: str
    seconds: float


def self_check(wanted: Callable[[str, str, str], bool] = lambda op, backend, device: True) -> list[Check]:
    """Each available backend of each op, if ``wanted`` on a device type, against float64 on small random data."""
    checks = []
    for op, states in ek.backends().items():
        compare = _CHECKS.get(op)
        for backend, state in states.items():
            if state != "available" or compare is None:
                continue
            for device in _devices_of(backend):
                checks += _timed(op, backend, device, compare) if wanted(op, backend, device) else []
    return checks


def _timed(op: str, backend: str, device: str, compare: Compare) -> list[Check]:
    begin = time.perf_counter()
    try:
        errors = compare(backend, device)
    except Exception as error:  # a backend that raises is a finding to print, and the others are still to be checked
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Check(op, backend, device, "runs", False, text, time.perf_counter() - begin)]
    seconds = (time.perf_counter() - begin) / len(errors)
    return [
        Check(op, backend, device, what, error <= allowed, f"{error:.2g}, allowed {allowed:g}", seconds)
        for what, (error, allowed) in errors.items()
    ]


def _check_token_stats(backend: str, device: str) -> Errors:
    """Largest scaled errors of values and gradients, fp32 and bf16 logits, odd width, an ignored and a masked entry."""
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 8, 257  # few: Triton's interpreter takes a second for them
    base = torch.randn(rows, vocab, generator=generator) * 3
    base[1, 5] = -math.inf
    target = torch.randint(6, vocab, (rows,), generator=generator)
    target[2] = -100
    weights = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    temperature = 0.7
    errors: Errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits = base.to(device, dtype).requires_grad_()
        stats = ek.token_stats(logits, target.to(device), temperature=temperature, backend=backend)
        w = weights.to(device, torch.float32)
        loss = (stats.logprob * w[0] + stats.entropy * w[1] + stats.collision * w[2]).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        exact, exact_gradient = _token_stats_float64(logits.detach().cpu().double(), target, temperature, weights)
        name = str(dtype).removeprefix("torch.")
        values = torch.stack([s.detach().cpu().double() for s in stats])
        errors[f"{name} values"] = (_largest(values - exact, exact.abs().clamp(min=1.0)), TOLERANCE)
        scale = exact_gradient.abs().amax(-1, keepdim=True).clamp(min=1e-12).expand_as(exact_gradient)
        # a bf16 gradient is rounded once: half a unit in the last of 8 bits of each element
        rounding = exact_gradient.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0.0)
        excess = ((gradient.cpu().double() - exact_gradient).abs() - rounding).clamp(min=0.0)
        excess[torch.isnan(gradient.cpu())] = math.nan
        errors[f"{name} gradient"] = (_largest(excess, scale), TOLERANCE)
    return errors


def _check_linear_token_stats(backend: str, device: str) -> Errors:
    """Largest scaled errors from hidden states: the pass without a gradient, and one that makes its logits again."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(8, 24, generator=generator), torch.randn(257, 24, generator=generator) / 4
    target = torch.randint(257, (8,), generator=generator)
    target[2] = -100
    weights = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    errors: Errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        run = functools.partial(
            ek.linear_token_stats, h, w, target.to(device), temperature=0.7, logits_dtype=torch.float32, backend=backend
        )
        with torch.no_grad():
            values = run()
        logits = h.detach().cpu().double() @ w.detach().cpu().double().t()
        exact, d_logits = _token_stats_float64(logits, target, 0.7, weights)
        name = str(dtype).removeprefix("torch.")
        got = torch.stack([value.cpu().double() for value in values])
        errors[f"{name} values"] = (_largest(got - exact, exact.abs().clamp(min=1.0)), TOLERANCE)
        if dtype == torch.bfloat16:
            continue  # its gradients are products of a rounded gradient of the logits
        stats = run(memory_budget=10_000)  # less than the logits take
        loss = torch.stack([(x * u.to(device)).sum() for x, u in zip(stats, weights.float(), strict=False)]).sum()
        gradients = torch.autograd.grad(loss, (h, w))
        for what, ours, right in zip(
            ("hidden", "weight"), gradients, (d_logits @ weight.double(), d_logits.t() @ hidden.double()), strict=True
        ):
            error = ours.cpu().double() - right
            errors[f"{name} gradient of {what}"] = (_largest(error, right.abs().amax()), TOLERANCE)
    return errors


def _token_stats_float64(z: Tensor, target: Tensor, temperature: float, w: Tensor) -> tuple[Tensor, Tensor]:
    """Dense float64 values (4, N) and the gradient of the weighted sum of the first three, by autograd."""
    z = z.requires_grad_()
    valid = target >= 0
    index = target.clamp(min=0)[:, None]
    logp = torch.log_softmax(z / temperature, -1)
    p = logp.exp()
    # 0·(-inf) of a masked entry counts as 0
    p_logp = torch.where(p > 0, p * logp.clamp(min=-1e4), 0.0)
    logprob, entropy, collision = logp.gather(1, index)[:, 0], -p_logp.sum(-1), (p * p).sum(-1)
    step = torch.zeros_like(p).scatter(1, index, 1.0) - p
    covariance = (p_logp * step).sum(-1) - p_logp.sum(-1) * (p * step).sum(-1)
    values = torch.where(valid, torch.stack([logprob, entropy, collision, covariance]), 0.0)
    (gradient,) = torch.autograd.grad((values[:3] * w).sum(), z)
    return values.detach(), gradient


def _check_token_covariance(backend: str, device: str) -> Errors:
    """Largest error of (lp - mean lp)·(A - mean A), with a mask that hides NaN."""
    logprob, advantages, mask = (t.to(device) for t in _batch())
    covariance = ek.token_covariance(logprob, advantages, mask, backend=backend).cpu()
    exact = _covariance_float64(*_batch())
    return {"values": (_largest(covariance.double() - exact, exact.abs().clamp(min=1.0)), TOLERANCE)}


def _check_kl_cov_mask(backend: str, device: str) -> Errors:
    """Tokens chosen wrongly, against a sort; the data ties across the last place."""
    covariance, mask = _selection_batch()
    chosen = ek.kl_cov_mask(covariance.to(device), mask.to(device), k=_CHOSEN, backend=backend).cpu()
    # ties go to the lower index: a stable sort of the negated values
    order = torch.sort(torch.where(mask, -covariance, math.inf), stable=True).indices
    expected = torch.zeros_like(mask).scatter(0, order[:_CHOSEN], True)
    return {"tokens chosen wrongly": (float((chosen != expected).sum()), 0.0)}


def _check_clip_cov_mask(backend: str, device: str) -> Errors:
    """Tokens out of the band, too many or too few; tokens that the plain torch backend does not draw from the seed."""
    covariance, mask = _selection_batch()
    low, high = 0.2, 1.5

    def draw(backend: str, device: str, seed: int) -> Tensor:
        tokens = covariance.to(device), mask.to(device)
        return ek.clip_cov_mask(*tokens, seed=seed, k=_CHOSEN, low=low, high=high, backend=backend).cpu()

    chosen = draw(backend, device, 7)
    outside = int((chosen & ~(mask & (covariance > low) & (covariance < high))).sum())
    errors = {"tokens outside the band or missing": (float(outside + abs(int(chosen.sum()) - _CHOSEN)), 0.0)}
    errors["other seed, same tokens"] = (float(torch.equal(chosen, draw(backend, device, 8))), 0.0)
    if backend != "torch":
        errors["tokens unlike the torch backend"] = (float((chosen != draw("torch", "cpu", 7)).sum()), 0.0)
    return errors


_CHOSEN = 40


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, advantages and a mask of 1000 tokens; what the mask hides is NaN."""
    generator = torch.Generator().manual_seed(1)
    logprob = -torch.rand(1000, generator=generator) * 4
    advantages = torch.randn(1000, generator=generator)
    mask = torch.rand(1000, generator=generator) < 0.9
    logprob[~mask] = math.nan
    return logprob, advantages, mask


def _covariance_float64(logprob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    lp, a = logprob.double(), advantages.double()
    return torch.where(mask, (lp - lp[mask].mean()) * (a - a[mask].mean()), 0.0)


def _selection_batch() -> tuple[Tensor, Tensor]:
    """Covariances rounded to .05, so that many tie, and their mask."""
    logprob, advantages, mask = _batch()
    return (_covariance_float64(logprob, advantages, mask) * 20).round().float() / 20, mask


def _largest(error: Tensor, scale: Tensor) -> float:
    """Largest scaled error; inf where anything is NaN, so that it fails."""
    scaled = (error.abs() / scale).amax().item()
    return scaled if math.isfinite(scaled) else math.inf


_CHECKS: dict[str, Compare] = {
    "token_stats": _check_token_stats,
    "linear_token_stats": _check_linear_token_stats,
    "token_covariance": _check_token_covariance,
    "clip_cov_mask": _check_clip_cov_mask,
    "kl_cov_mask": _check_kl_cov_mask,
}


def device_types() -> list[str]:
    """Device types that tensors can be on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices_of(backend: str) -> list[str]:
    """Where a backend can be checked; Triton without a GPU is the interpreter, on CPU tensors."""
    if backend == "torch":
        return device_types()
    if backend == "triton":
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    return [backend]
