"""The losses in float64 numpy, from SPEC's formulas, with gradients derived by hand: no autograd, no torch.

Follows verl's functions step by step where the preset is `verl` (masked means over N, strict comparisons, n at least 1,
a permutation of the candidates in row-major order), and Eq. 12 and 13 of the paper where it is `paper`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class Reference:
    """Value, gradients and metrics of a loss, and the sizes that a rounding bound needs."""

    loss: float
    logprob: Array  # d loss / d logprob
    entropy: Array | None  # d loss / d entropy
    metrics: dict[str, float]
    absolute: float  # the same aggregate of absolute values: what cancellation loses digits of
    size: Array  # per token: the sum of the absolute values of the gradient's terms
    log_ratio: Array
    selected: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))


def covariance(lp: Array, advantages: Array, mask: Array) -> Array:
    """(lp - mean lp)(A - mean A), means over the mask, 0 elsewhere."""
    if not mask.any():
        return np.zeros_like(lp)
    cov = (lp - lp[mask].mean()) * (advantages - advantages[mask].mean())
    return np.where(mask, cov, 0.0)


def clipped_by_ppo(
    lp: Array, old: Array, advantages: Array, mask: Array, low: float | None, high: float | None
) -> Array:
    """l2 > l1, strict."""
    ratio = np.exp(np.where(mask, lp - old, 0.0))
    floor = -np.inf if low is None else 1 - low
    ceiling = np.inf if high is None else 1 + high
    return (-advantages * np.clip(ratio, floor, ceiling) > -advantages * ratio) & mask


def candidates(cov: Array, mask: Array, clipped: Array, low: float, high: float, preset: str) -> Array:
    """Flat positions of the tokens that Clip-Cov draws from, in row-major order."""
    if preset == "verl":
        return np.flatnonzero(mask & ~clipped & (cov > low) & (cov < high))
    return np.flatnonzero(mask & (cov >= low) & (cov <= high))


def select_clip_cov(found: Array, permutation: Array, mask: Array, ratio: float, preset: str) -> Array:
    """The first n of the candidates ``found``, put in the order of ``permutation``."""
    n = int(ratio * int(mask.sum()))
    if preset == "verl":
        n = max(n, 1)
    chosen = np.zeros(mask.size, dtype=bool)
    chosen[found[permutation][:n]] = True
    return chosen.reshape(mask.shape)


def select_kl_cov(cov: Array, mask: Array, ratio: float, preset: str) -> Array:
    """The n largest, ties to the lower index."""
    valid = np.flatnonzero(mask)
    n = int(len(valid) * ratio)
    if preset == "verl" and len(valid):
        n = max(1, n)
    order = valid[np.argsort(-cov.reshape(-1)[valid], kind="stable")]
    chosen = np.zeros(cov.size, dtype=bool)
    chosen[order[:n]] = True
    return chosen.reshape(cov.shape)


def kl(delta: Array, estimator: str) -> tuple[Array, Array]:
    """Value and derivative with respect to delta."""
    name = estimator.removesuffix("+")
    if name in ("k1", "kl"):
        value, slope = delta, np.ones_like(delta)
    elif name == "abs":
        value, slope = np.abs(delta), np.sign(delta)
    elif name in ("k2", "mse"):
        value, slope = delta**2 / 2, delta
    elif name in ("k3", "low_var_kl"):
        inner = np.clip(-delta, -20, 20)
        raw = np.exp(inner) - inner - 1
        value = np.clip(raw, -10, 10)
        slope = np.where((np.abs(delta) <= 20) & (raw <= 10), 1 - np.exp(inner), 0.0)
    else:
        raise NotImplementedError(estimator)
    return value, delta if estimator.endswith("+") else slope


def _k3(estimator: str) -> float:
    """Size of what cancels in e^-D + D - 1 at D = 0."""
    return float(estimator.removesuffix("+") in ("k3", "low_var_kl"))


def weights(
    mask: Array, mode: str, dp: int, tokens: float | None, sequences: float | None, scale: float | None
) -> Array:
    """What each token's loss is multiplied by in the aggregate."""
    length = mask.sum(-1)
    non_empty = max((length > 0).sum(), 1) if sequences is None else sequences
    one = mask.astype(float) * dp
    if mode == "token-mean":
        return one / (max(mask.sum(), 1) if tokens is None else tokens)
    if mode == "token-sum":
        return one
    if mode == "seq-mean-token-sum":
        return one / non_empty
    if mode == "seq-mean-token-mean":
        return one / np.maximum(length, 1)[..., None] / non_empty
    assert mode == "seq-mean-token-sum-norm"
    return one / non_empty / (mask.shape[-1] if scale is None else scale)


def loss(
    lp: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    dropped: Array | None = None,
    keep_value: bool = False,
    penalized: Array | None = None,
    kl_coef: float = 1.0,
    penalty: str = "abs",
    entropy: Array | None = None,
    entropy_coef: float = 0.0,
    ref: Array | None = None,
    ref_kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Reference:
    """All arrays (..., L) float64, ``mask``, ``dropped`` and ``penalized`` bool; padding must hold finite values."""
    delta = np.where(mask, lp - old, 0.0)
    adv = np.where(mask, advantages, 0.0)
    ratio = np.exp(delta)
    l1 = -adv * ratio
    value = l1.copy()
    slope = l1.copy()  # d(-A r) / d lp = -A r
    terms, penalty_size = np.zeros_like(l1), np.zeros_like(l1)
    clipped = clipped_by_ppo(lp, old, adv, mask, clip_low, clip_high)
    floor = -np.inf if clip_low is None else 1 - clip_low
    ceiling = np.inf if clip_high is None else 1 + clip_high
    value[clipped] = (-adv * np.clip(ratio, floor, ceiling))[clipped]
    slope[clipped] = 0
    lower = np.zeros_like(mask)
    if dual_clip is not None:
        lower = (adv < 0) & (value > -adv * dual_clip)
        value[lower] = (-adv * dual_clip)[lower]
        slope[lower] = 0
    selected = np.zeros_like(mask)
    if dropped is not None:
        selected = dropped & mask
        slope[selected] = 0
        if not keep_value:
            value[selected] = 0
    if penalized is not None:
        selected = penalized & mask
        extra, extra_slope = kl(delta, penalty)
        value = value + np.where(selected, kl_coef * extra, 0)
        slope = slope + np.where(selected, kl_coef * extra_slope, 0)
        penalty_size = np.where(selected, abs(kl_coef) * (np.abs(extra) + _k3(penalty)), 0)
        terms = np.where(selected, np.abs(l1) + abs(kl_coef) * (np.abs(extra_slope) + 1), 0)

    w = weights(mask, mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    policy = float((w * value).sum())
    total, absolute = policy, float((w * (np.abs(value) + 2 * penalty_size)).sum())
    gradient, size = w * slope, w * np.maximum(np.abs(slope), terms)
    n = max(int(mask.sum()), 1)

    def mean(x: Array) -> float:
        return float(np.where(mask, x, 0).sum() / n)

    cov = covariance(lp, adv, mask)
    metrics = {
        "pg_loss": policy,
        "clipfrac": mean(clipped),
        "clipfrac_lower": mean(lower),
        "ppo_kl": mean(-delta),
        "ppo_kl_abs": mean(np.abs(delta)),
        "ratio_mean": mean(ratio),
        "ratio_max": float(ratio[mask].max()) if mask.any() else 0.0,
        "cov_mean": mean(cov),
        "cov_max": float(cov[mask].max()) if mask.any() else 0.0,
        "nonfinite_tokens": 0.0,
    }
    if dropped is not None or penalized is not None:
        metrics["selected_frac"] = mean(selected)
    gradient_entropy = None
    if entropy is not None:
        h = np.where(mask, entropy, 0.0)
        metrics["entropy"] = mean(h)
        total -= entropy_coef * float((w * h).sum())
        absolute += abs(entropy_coef) * float((w * np.abs(h)).sum())
        gradient_entropy = -entropy_coef * w
    if ref is not None:
        estimate, estimate_slope = kl(np.where(mask, lp - ref, 0.0), kl_estimator)
        metrics["ref_kl"] = mean(estimate)
        total += ref_kl_coef * float((w * estimate).sum())
        absolute += abs(ref_kl_coef) * float((w * (np.abs(estimate) + _k3(kl_estimator))).sum())
        gradient = gradient + ref_kl_coef * w * estimate_slope
        # of k3's slope 1 - e^-D both terms count: they cancel at D = 0
        size = size + np.abs(ref_kl_coef * w) * (np.abs(estimate_slope) + 1)
    return Reference(total, gradient, gradient_entropy, metrics, absolute, size, delta, selected)
