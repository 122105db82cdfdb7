"""Inputs of the functions on hidden states, and what their results are held to.

The measure is the same-dtype computation in torch, logits materialised: errors against float64, per row, must not be
larger than its own, but for a factor (two roundings of the same product differ) and a floor of a few ulps of the terms
that are added, which may cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
import reference
from compare import ULPS, gradient_terms
from sample import labels, normal

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32, torch.float64)
DIFFERENTIABLE = ("logprob", "entropy", "collision")


@dataclass
class Linear:
    """One call."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    target: Tensor  # (...)
    bias: Tensor | None = None  # (V,)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def copy(self, *grad: str, dtype: torch.dtype | None = None) -> Linear:
        """The same values as leaves of ``dtype``; those named in ``grad`` require a gradient."""
        values = {name: getattr(self, name).detach().to(dtype) for name in self.factors()}
        return replace(self, **{name: x.requires_grad_(name in grad) for name, x in values.items()})

    def to(self, device: str) -> Linear:
        def there(values: dict[str, Any]) -> dict[str, Any]:
            return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}

        return Linear(**there(vars(self) | {"kwargs": there(self.kwargs)}))

    def factors(self) -> list[str]:
        return ["hidden", "weight"] + (["bias"] if self.bias is not None else [])


def make(
    *shape: int, features: int = 12, vocab: int = 803, dtype: torch.dtype = torch.float32, bias: bool = True,
    device: str = "cpu", **kwargs: Any,
) -> Linear:  # fmt: skip
    """Normal hidden states of tokens (20,) or ``shape``, logits of a few units."""
    shape = shape or (20,)
    return Linear(
        normal(*shape, features, dtype=dtype, device=device, scale=1.0),
        normal(vocab, features, dtype=dtype, device=device, scale=0.8, seed=4),
        labels(*shape, vocab=kwargs.get("vocab_size", vocab), device=device),
        normal(vocab, dtype=dtype, device=device, scale=1.0, seed=5) if bias else None,
        kwargs,
    )


def budgets(case: Linear) -> Iterator[tuple[str, int]]:
    """(mode, memory_budget) of every way to compute the case: logits kept, recomputed in one, some and many tiles."""
    # a call that needs a gradient, whatever the case's tensors do now
    probe = case.copy(*case.factors())
    options = {"vocab_size": case.kwargs.get("vocab_size"), "logits_dtype": case.kwargs.get("logits_dtype")}

    def plan(budget: int) -> ek.LinearPlan | None:
        try:
            return ek.linear_plan(probe.hidden, probe.weight, probe.bias, memory_budget=budget, **options)
        except ValueError:
            return None

    seen = set()
    for budget in (1 << 30, *(int(1.2**i) for i in range(90, 40, -1))):
        found = plan(budget)
        if found is None:
            return
        key = (found.mode, min(found.vocab_chunks, 3), min(found.row_chunks, 3))
        if key not in seen:
            seen.add(key)
            yield f"{found.mode} {found.row_chunks}x{found.vocab_chunks}", budget


def upstream(case: Linear, names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    dtype = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    return {
        name: normal(*case.target.shape, dtype=dtype, device=str(case.target.device), scale=1.0, seed=6 + i)
        for i, name in enumerate(names)
    }


def run(
    case: Linear, grad: tuple[str, ...] | None = None, names: tuple[str, ...] = DIFFERENTIABLE, **kwargs: Any
) -> dict[str, Tensor]:
    """Our outputs by name, and the gradients of ``grad`` (default: of all factors) as ``d_<name>``."""
    grad = tuple(case.factors()) if grad is None else grad
    leaves = case.copy(*grad)
    outputs = ek.linear_token_stats(leaves.hidden, leaves.weight, leaves.target, leaves.bias, **case.kwargs, **kwargs)
    results = {name: value.detach() for name, value in outputs._asdict().items()}
    if grad:
        up = upstream(case, names)
        gradients = torch.autograd.grad(
            [getattr(outputs, name) for name in up], [getattr(leaves, name) for name in grad], list(up.values())
        )
        results |= {f"d_{name}": value for name, value in zip(grad, gradients, strict=True)}
    return results


def _statistics(case: Linear, dtype: torch.dtype) -> tuple[reference.Dense, torch.dtype, Tensor, Tensor]:
    """Of materialised logits, in fp32 at least; the logits' dtype; hidden (N, H) and weight (V, H) in ``dtype``."""
    leaves = case.copy(dtype=dtype)
    # a padded entry takes no part, whatever its weight holds
    weight = leaves.weight.clone()
    weight[case.kwargs.get("vocab_size", len(weight)) :] = 0
    logits = torch.nn.functional.linear(leaves.hidden, weight, leaves.bias)
    logits = logits.to(case.kwargs.get("logits_dtype") or dtype) if dtype != torch.float64 else logits
    options = {k: v for k, v in case.kwargs.items() if k != "logits_dtype"}
    found = reference.dense(logits, case.target, **options, dtype=torch.promote_types(dtype, torch.float32))
    # an ignored row takes no part, whatever it holds
    ignored = (case.target == options.get("ignore_index", -100)).reshape(-1, 1)
    hidden = leaves.hidden.reshape(-1, leaves.hidden.shape[-1]).masked_fill(ignored, 0)
    return found, logits.dtype, hidden, weight


def _products(d_logits: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Gradients of the factors from that of the logits (N, V)."""
    wide = torch.promote_types(d_logits.dtype, torch.float32)
    d_bias = d_logits.sum(0, dtype=wide).to(d_logits.dtype)
    return {"d_hidden": d_logits @ weight, "d_weight": d_logits.t() @ hidden, "d_bias": d_bias}


def dense(case: Linear, dtype: torch.dtype, names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    """The same in ``dtype`` with materialised logits."""
    found, logits_dtype, hidden, weight = _statistics(case, dtype)
    results = {name: getattr(found, name) for name in ("logprob", "entropy", "collision", "vocab_covariance")}
    d_logits = reference.gradient(found, **upstream(case, names)).to(logits_dtype).to(dtype)  # (N, V)
    results |= _products(d_logits, hidden, weight)
    results["d_hidden"] = results["d_hidden"].view_as(case.hidden)
    return results


def terms(case: Linear, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Size of what a gradient is the sum of before it cancels: a certain token's leaves nothing but its rounding."""
    found, _, hidden, weight = _statistics(case, torch.float64)
    size = gradient_terms(found, upstream(case, names)) * found.cap_grad / found.temperature
    return _products(size.masked_fill(found.nothing, 0), hidden.abs(), weight.abs())


References = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def references(case: Linear, names: tuple[str, ...] = DIFFERENTIABLE) -> References:
    """What :func:`judge` compares with: exact, in the case's dtype, and the size of the terms."""
    return dense(case, torch.float64, names), dense(case, case.hidden.dtype, names), terms(case, names)


def judge(
    case: Linear, results: dict[str, Tensor], names: tuple[str, ...] = DIFFERENTIABLE, by: References | None = None
) -> None:
    """``results`` of :func:`run` are within the errors of the same-dtype computation."""
    dtype = case.hidden.dtype
    exact, baseline, added = by or references(case, names)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # sums of H products of a few units: what their order can do to a logit, and so to every result
    noise = 16 * eps * case.hidden.shape[-1] ** 0.5
    for name, actual in results.items():
        gradient = name.startswith("d_")
        expected_dtype = dtype if gradient else torch.promote_types(dtype, torch.float32)
        assert actual.dtype == expected_dtype, f"{name}: {actual.dtype}, expected {expected_dtype}"
        size = 0.51 * torch.finfo(dtype).eps if gradient else 0.0
        right, base = exact[name].reshape(-1), baseline[name].double().reshape(-1)
        ours = actual.double().reshape(-1)
        assert ours.shape == right.shape, f"{name}: {tuple(actual.shape)}"
        special = ~right.isfinite()
        assert torch.equal(ours[special], right[special]) or ours[special].isnan().equal(right[special].isnan()), name
        good = ~special & base.isfinite()
        ours, base, right = ours[good], base[good], right[good]
        if not right.numel():
            continue
        scale = right.abs().max() + (0 if gradient else 1)
        rms = (base - right).square().mean().sqrt()
        error = (ours - right).abs()
        # all together no worse than the baseline; no element far beyond its worst
        floor = torch.full_like(right, float(noise * scale))
        if gradient:
            floor += ULPS * eps * added[name].reshape(-1)[good]
        most = floor.square().mean().sqrt()
        assert error.square().mean().sqrt() <= 1.3 * rms + most + size * right.square().mean().sqrt(), (
            f"{name}: rms error {error.square().mean().sqrt():.3g}, baseline {rms:.3g}, floor {most:.3g}"
        )
        worst = 2 * (base - right).abs().max() + 2 * floor + size * right.abs()
        assert (error <= worst).all(), f"{name}: error {error.max():.3g}, allowed {worst.min():.3g}"
