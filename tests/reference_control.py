"""The methods of control as their papers define them: Python floats, one token after the other; METHODS at the end.

Shares no code with the library. A batch is the list of its valid tokens; a method gives, per token, True where it is
treated, or the weight or advantage that it gets; or one number, the coefficient of the entropy bonus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reference_selection import budget, random_key

INF = math.inf


@dataclass
class Token:
    lp: float
    adv: float
    index: int  # token index
    old: float
    H: float = math.nan
    old_H: float = math.nan
    C: float = math.nan  # vocabulary covariance
    c: float = math.nan  # coefficient
    T: float = 1.0
    excluded: bool = False

    @property
    def p(self) -> float:
        return math.exp(self.lp)

    @property
    def r(self) -> float:
        difference = 0.0 if self.lp == self.old else self.lp - self.old
        return math.exp(difference) if difference < 700 else INF

    @property
    def S(self) -> float:
        return 0.0 if self.lp == -INF else self.p * (self.lp + self.H)

    def stopped(self, low: Any = 0.2, high: Any = 0.2, dual: Any = None, adv: float | None = None) -> bool:
        """PPO: no gradient where A > 0 and r > 1 + high, or A < 0 and r < 1 - low, or A < 0 and r > the dual clip."""
        adv = self.adv if adv is None else adv
        if adv > 0:
            return high is not None and self.r > 1 + high
        return adv < 0 and ((low is not None and self.r < 1 - low) or (dual is not None and self.r > dual))

    def decrease(self, low: Any = 0.2, high: Any = 0.2, dual: Any = None, adv: float | None = None) -> float:
        """c·F, F = A·r·C/T² (docs/control.md)."""
        own = self.adv if adv is None else adv
        if own == 0 or self.stopped(low, high, dual, adv):
            return 0.0
        return self.c * own * self.r * self.C / self.T**2


Tokens = list[Token]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def std(values: list[float]) -> float:
    """Of the population."""
    middle = mean(values)
    return math.sqrt(mean([(x - middle) ** 2 for x in values]))


def many(tokens: Tokens, ratio: float | None, k: int | None = None, at_least_one: bool = True) -> int:
    if not tokens:
        return 0
    return k if k is not None else max(int(at_least_one), math.floor(ratio * len(tokens)))


def first(tokens: Tokens, order: list[tuple[Any, int]], n: int) -> list[bool]:
    """True for the first n of (rank, token index) in ascending order."""
    chosen = {index for _, index in sorted(order)[:n]}
    return [t.index in chosen for t in tokens]


def in_fp32(x: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def largest(tokens: Tokens, score: list[float], n: int, allowed: list[bool]) -> list[bool]:
    """In fp32; ties to the lower token index."""
    order = [
        (-in_fp32(x), t.index)
        for t, x, there in zip(tokens, score, allowed, strict=True)
        if there and not t.excluded and x == x
    ]
    return first(tokens, order, n)


def drawn(tokens: Tokens, n: int, seed: int, allowed: list[bool]) -> list[bool]:
    order = [
        (-random_key(t.index, seed), t.index)
        for t, there in zip(tokens, allowed, strict=True)
        if there and not t.excluded
    ]
    return first(tokens, order, n)


def covariances(tokens: Tokens) -> list[float]:
    """2505.22617, Eq. 10, in fp32 as it is handed on."""
    lp, adv = mean([t.lp for t in tokens]), mean([t.adv for t in tokens])
    return [float(np.float32((t.lp - lp) * (t.adv - adv))) for t in tokens]


def clip_cov(
    tokens: Tokens, *, seed: int, ratio: Any = None, k: Any = None, low: float = 1.0, high: float = 5.0,
    paper: bool = False, band: str = "absolute",
) -> list[bool]:  # fmt: skip
    ratio = 2e-4 if ratio is None else ratio
    score = covariances(tokens)
    pool = [not t.excluded and (paper or not t.stopped()) for t in tokens]
    if band == "quantile":
        ordered = sorted(x for x, there in zip(score, pool, strict=True) if there)
        low, high = (ordered[math.floor(q * (len(ordered) - 1))] for q in (low, high)) if ordered else (0.0, 0.0)
    else:
        low, high = float(np.float32(low)), float(np.float32(high))
    inside = [low <= x <= high if paper else low < x < high for x in score]
    pool = [a and b for a, b in zip(pool, inside, strict=True)]
    return drawn(tokens, many(tokens, ratio, k, not paper), seed, pool)


def kl_cov(tokens: Tokens, *, ratio: Any = None, k: Any = None, paper: bool = False) -> list[bool]:
    ratio = (2e-3 if paper else 2e-4) if ratio is None else ratio
    return largest(tokens, covariances(tokens), many(tokens, ratio, k, not paper), [True] * len(tokens))


def exact_cov(
    tokens: Tokens, *, ratio: Any = None, k: Any = None, at_least_one: bool = True, clip_low: Any = 0.2,
    clip_high: Any = 0.2, dual_clip: Any = None, every: bool = False, **bounds: float,
) -> list[bool]:  # fmt: skip
    score = [t.decrease(clip_low, clip_high, dual_clip) for t in tokens]
    allowed = [in_fp32(x) > 0 for x in score]
    if every:
        return [x and not t.excluded for t, x in zip(tokens, allowed, strict=True)]
    if bounds:
        numbers = [torch.tensor([getattr(t, name) for t in tokens]) for name in ("excluded", "index")]
        exclude, index = numbers[0].bool(), numbers[1].long()
        enough = budget(torch.tensor(score, dtype=torch.float64), exclude=exclude, token_index=index, **bounds).tolist()
        if ratio is k is None:
            return enough
        allowed = [a and b for a, b in zip(allowed, enough, strict=True)]
    return largest(tokens, score, many(tokens, 0.02 if ratio is None else ratio, k, at_least_one), allowed)


def weighed(weight: float = 0.5, **options: Any) -> Callable[[Tokens], list[float]]:
    """exact_cov as a factor: on all tokens of F > 0 where no number is given."""

    def of(tokens: Tokens) -> list[float]:
        return [weight if x else 1.0 for x in exact_cov(tokens, every=not options, **options)]

    return of


def random(tokens: Tokens, *, seed: int, ratio: float = 2e-4, k: Any = None, exclude_clipped: bool = False) -> list:
    return drawn(tokens, many(tokens, ratio, k), seed, [not (exclude_clipped and t.stopped()) for t in tokens])


def clip_b(tokens: Tokens, *, mu: float = 2.5) -> list[bool]:
    """2602.03392, Clip_B: dropped are A < 0 with S - mean S < -mu·std S."""
    score = [t.S for t in tokens]
    middle, deviation = mean(score), std(score)
    if not deviation >= 1e-12:
        return [False] * len(tokens)
    return [t.adv < 0 and x - middle < -mu * deviation for t, x in zip(tokens, score, strict=True)]


def clip_v(tokens: Tokens, *, mu: float = 8.5, ratio: float = 1e-4, k: Any = None) -> list[bool]:
    """2602.03392, Clip_V: D = E_π[S] - S = -C, not centred."""
    score = [-t.C for t in tokens]
    deviation = std(score)
    beyond = [t.adv < 0 and x > mu * deviation and deviation >= 1e-12 for t, x in zip(tokens, score, strict=True)]
    return largest(tokens, score, many(tokens, ratio, k), beyond)


def steer(
    tokens: Tokens, *, w_min: float = 0.8, w_max: float = 1.2, linear: bool = False, theorem: bool = False
) -> list[float]:
    """2510.10150: Ω = |A/p_old·p(1-p)(log p + H)|, not finite: 0."""
    size = []
    for t in tokens:
        omega = 0.0 if t.p == 0 or t.adv == 0 else abs(t.adv * t.r * (1 - t.p) * (t.lp + t.H))
        if theorem:
            omega = 0.0 if t.stopped() else omega * t.p
        size.append(omega if math.isfinite(omega) else 0.0)
    most, least = max(size, default=0.0), min(size, default=0.0)
    if linear:
        if most == least:
            return [(w_min + w_max) / 2] * len(tokens)
        return [w_max - (x - least) * (w_max - w_min) / (most - least) for x in size]
    rate = -math.log(w_min) / max(most, 0.02)
    return [min(max(math.exp(-rate * x), w_min), 1.0) for x in size]


def top_entropy(tokens: Tokens, *, rho: float = 0.2) -> list[bool]:
    """2506.01939: kept is H >= the 1 - rho quantile; dropped the others. TRL: of two order statistics the upper one."""
    ordered = sorted((float(np.float32(t.H)) for t in tokens if t.H == t.H and not t.excluded), reverse=True)
    least = ordered[math.floor(rho * (len(ordered) - 1))] if ordered else INF
    return [not float(np.float32(t.H)) >= least for t in tokens]


def erc(tokens: Tokens, *, low: float = 0.95, high: float = 1.05) -> list[bool]:
    return [not low < (t.H + 1e-8) / (t.old_H + 1e-8) < high for t in tokens]


def entropy_advantage(tokens: Tokens, *, alpha: float = 0.4, kappa: float = 2.0) -> list[float]:
    return [t.adv + min(alpha * t.H, abs(t.adv) / kappa) for t in tokens]


def repo(tokens: Tokens, *, zeta: float = 1e-3, center: bool = False, floor: float = -20.0) -> list[float]:
    """2603.11682, REPO-R."""
    shaped = []
    for t in tokens:
        level = max(t.lp, floor) + (t.H if center else 0.0)
        if t.adv > 0:
            shaped.append(max(t.adv * (1 - zeta * level), 0.0))
        else:
            shaped.append(min(t.adv * (1 + zeta * level), 0.0) if t.adv < 0 else t.adv)
    return shaped


def adaptive_entropy(tokens: Tokens, *, target: float = 0.2, coef: float = 0.0) -> float:
    return coef if mean([t.H for t in tokens]) <= target else 0.0


def entrocraft(tokens: Tokens, *, low: float = 0.6, high: float = 0.7) -> list[float]:
    """2604.26326, Alg. 1: m = 1(H > high) - 1(H < low); kept where m·A >= 0."""
    entropy = mean([t.H for t in tokens])
    sign = (entropy > high) - (entropy < low)
    return [t.adv if sign * t.adv >= 0 else 0.0 for t in tokens]


METHODS: dict[str, Callable[..., Any]] = {
    "clip_cov": clip_cov, "kl_cov": kl_cov, "exact_cov": exact_cov, "random": random, "clip_b": clip_b,
    "clip_v": clip_v, "steer": steer, "top_entropy": top_entropy, "erc": erc, "entropy_advantage": entropy_advantage,
    "repo": repo, "adaptive_entropy": adaptive_entropy, "entrocraft": entrocraft,
}  # fmt: skip


def metrics(
    tokens: Tokens, touched: list[bool], left: list[float], advantages: list[float], clips: tuple[Any, Any, Any]
) -> dict[str, float]:
    """``left``: what is left of each token's gradient; ``advantages``: those that the loss gets; ``clips``: PPO's."""
    free = [t.decrease(*clips) for t in tokens]
    kept = [t.decrease(*clips, a) * x for t, a, x in zip(tokens, advantages, left, strict=True) if x != 0]
    every = math.fsum(max(x, 0.0) for x in free)
    carried = math.fsum(max(x, 0.0) for x, there in zip(free, touched, strict=True) if there)
    count = max(len(tokens), 1)
    return {
        "touched": float(sum(touched)), "touched_frac": sum(touched) / count,
        "decrease_share": carried / every if every else 0.0,
        "predicted_change": -math.fsum(kept) / count, "predicted_change_free": -math.fsum(free) / count,
    }  # fmt: skip
