"""Covariance and selection as docs/math.md has them: float64, Python integers and sorting, token after token.

Shares no code with the library; Philox is written from the paper (Salmon et al., SC 2011).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def random_key(index: int, seed: int) -> int:
    index, seed = index % 2**64, seed % 2**64
    return philox4x32_10([index % 2**32, index >> 32, 0, 0], [seed % 2**32, seed >> 32])[0]


def covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """float64; means by exact (fsum) summation."""
    logprob, advantages = logprob.double(), advantages.double().expand(logprob.shape)
    mask = torch.ones(logprob.shape, dtype=torch.bool) if mask is None else mask.expand(logprob.shape) != 0
    count = int(mask.sum())
    if count == 0:
        return torch.zeros_like(logprob)
    means = [math.fsum(value[mask].tolist()) / count for value in (logprob, advantages)]
    return torch.where(mask, (logprob - means[0]) * (advantages - means[1]), 0.0)


def wanted(valid: int, ratio: float | None, k: int | None, at_least_one: bool) -> int:
    if valid == 0:
        return 0
    if k is not None:
        return k
    return max(int(at_least_one), math.floor(ratio * valid))


def _flat(value: Tensor | None, like: Tensor, default: bool) -> list[bool]:
    if value is None:
        return [default] * like.numel()
    return (value.expand(like.shape).reshape(-1) != 0).tolist()


def _top(order: list[tuple], n: int, like: Tensor) -> Tensor:
    """Mask of the first n of (sort key, token index, position)."""
    selected = torch.zeros(like.numel(), dtype=torch.bool)
    for *_, position in sorted(order)[:n]:
        selected[position] = True
    return selected.view(like.shape)


def kl_cov(
    covariance: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    k: int | None = None,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
) -> Tensor:
    if ratio is None and k is None:
        ratio = 2e-3
    values = covariance.float().reshape(-1).tolist()
    valid, excluded = _flat(mask, covariance, True), _flat(exclude, covariance, False)
    index = list(range(len(values))) if token_index is None else token_index.reshape(-1).tolist()
    order = [
        (-values[i], index[i], i)
        for i in range(len(values))
        if valid[i] and not excluded[i] and not math.isnan(values[i])
    ]
    return _top(order, wanted(sum(valid), ratio, k, at_least_one), covariance)


def clip_cov(
    covariance: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int,
    ratio: float | None = None,
    k: int | None = None,
    low: float = 1.0,
    high: float = 5.0,
    band: str = "absolute",
    closed: bool = False,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
) -> Tensor:
    if ratio is None and k is None:
        ratio = 2e-4
    values = covariance.float().reshape(-1).tolist()
    valid, excluded = _flat(mask, covariance, True), _flat(exclude, covariance, False)
    index = list(range(len(values))) if token_index is None else token_index.reshape(-1).tolist()
    pool = [i for i in range(len(values)) if valid[i] and not excluded[i] and not math.isnan(values[i])]
    if band == "quantile":
        ordered = sorted(values[i] for i in pool)
        last = len(ordered) - 1
        low, high = (ordered[math.floor(q * last)] for q in (low, high)) if pool else (0.0, 0.0)
    else:
        low, high = torch.tensor([low, high], dtype=torch.float32).tolist()
    pool = [i for i in pool if low < values[i] < high or (closed and values[i] in (low, high))]
    order = [(-random_key(index[i], seed), index[i], i) for i in pool]
    return _top(order, wanted(sum(valid), ratio, k, at_least_one), covariance)


def _exponent_above(x: Fraction) -> int:
    """The smallest e with x < 2^e, of x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    while x >= Fraction(2) ** e:
        e += 1
    while x < Fraction(2) ** (e - 1):
        e -= 1
    return e


def budget(
    score: Tensor,
    mask: Tensor | None = None,
    *,
    budget: float | None = None,
    limit: float | None = None,
    share: float | None = None,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
) -> Tensor:
    """In fractions: the shortest prefix, token after token."""
    values = score.float().reshape(-1).tolist()
    valid, excluded = _flat(mask, score, True), _flat(exclude, score, False)
    index = list(range(len(values))) if token_index is None else token_index.reshape(-1).tolist()
    counted = {i: Fraction(x) for i, x in enumerate(values) if valid[i] and math.isfinite(x)}
    largest = max(map(abs, counted.values()), default=Fraction(0))
    if largest == 0:
        return torch.zeros(score.shape, dtype=torch.bool)
    k = min(1000, min(51, 62 - _exponent_above(Fraction(sum(valid)))) - _exponent_above(largest))
    unit = Fraction(2) ** k
    units = {i: round(x * unit) for i, x in counted.items()}  # of a fraction: half to even
    order = sorted((-values[i], index[i], i) for i in counted if not excluded[i] and units[i] > 0)
    candidates = sum(units[i] for *_, i in order)
    number = next(x for x in (budget, limit, share) if x is not None)
    if math.isnan(number):
        need: float = 0
    elif budget is not None:
        need = math.ceil(Fraction(budget) * unit) if math.isfinite(budget) else budget
    elif limit is not None:
        need = sum(units.values()) - math.floor(Fraction(limit) * unit) if math.isfinite(limit) else -limit
    else:
        need = math.ceil(Fraction(min(share, 1.0)) * candidates) if share > 0 else 0
    selected, reached = torch.zeros(score.numel(), dtype=torch.bool), 0
    for *_, i in order:
        if reached >= need:
            break
        selected[i] = True
        reached += units[i]
    return selected.view(score.shape)
