"""The losses in float64 numpy, from the formulas of docs/losses.md, gradients derived by hand: no autograd, no torch.

With D = lp - old, r = e^D (never clamped) and the advantage A, a surrogate gives each token a value. Its gradient is
local, d value_t / d lp_t, or goes through a mean over the sequence, as of GSPO's ratio s_b = exp(mean D):
d value_t / d lp_u is then ``grad_t · share_u`` for every u of t's sequence.

Follows verl's functions step by step where the preset is `verl` (masked means over N, strict comparisons, n at least 1,
a permutation of the candidates in row-major order), and Eq. 12 and 13 of the paper where it is `paper`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass
class Reference:
    """Value, gradients and metrics of a loss, and the sizes that a rounding bound needs."""

    loss: Any  # a number, or with mode "none" those of the tokens
    logprob: Array  # d loss / d logprob
    entropy: Array | None  # d loss / d entropy
    metrics: dict[str, float]
    absolute: float  # the same aggregate of absolute values: what cancellation loses digits of
    size: Array  # per token: the sum of the absolute values of the gradient's terms
    log_ratio: Array


class Tokens:
    """(B, L) float64; ``mask`` bool. Everything is 0 where masked."""

    def __init__(self, lp: Array, old: Array, advantages: Array, mask: Array) -> None:
        self.lp, self.old, self.adv = (np.where(mask, x, 0.0) for x in (lp, old, advantages))
        self.mask, self.d = mask, self.lp - self.old
        self.ratio = np.exp(self.d)

    def mean(self, x: Array) -> Array:
        """(B, L): over the valid tokens of each sequence, 0 where there is none."""
        mean = np.where(self.mask, x, 0).sum(-1) / np.maximum(self.mask.sum(-1), 1)
        return mean[..., None] * np.ones_like(self.lp)


@dataclass
class Terms:
    """(B, L) each. ``share`` is None where the gradient is local."""

    value: Array
    grad: Array
    clipped: Array | bool = False
    lower: Array | bool = False
    share: Array | None = None
    size: Array | None = None  # absolute values of what the grad is made of, where it is a sum
    ratio: Array | None = None  # that may multiply a reference KL; the token's where it is None
    spread: Array | None = None  # what a rounding of D is multiplied by in the value; |D| where it is None


def bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    return -np.inf if clip_low is None else 1 - clip_low, np.inf if clip_high is None else 1 + clip_high


def clip(
    t: Tokens,
    ratio: Array,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Terms:
    """max(-A r, -A clamp(r)), bounded by a dual clip or by TRL's delta; the grad is with respect to log r."""
    first, second = -t.adv * ratio, -t.adv * np.clip(ratio, *bounds(clip_low, clip_high))
    grad, lower = first.copy(), np.zeros_like(t.mask)
    if delta is not None:
        assert delta > bounds(clip_low, clip_high)[1], "below it, delta takes the clip's place: nothing a trainer uses"
        beyond = ratio > delta
        first = np.where(beyond, -t.adv * delta, first)
        grad[beyond] = 0
        lower = beyond & (t.adv < 0)
    clipped = second > first
    value = np.where(clipped, second, first)
    grad[clipped] = 0
    if dual_clip is not None:
        held = (t.adv < 0) & (value > -t.adv * dual_clip)
        value = np.where(held, -t.adv * dual_clip, value)
        grad[held] = 0
        lower = lower | held
    return Terms(value, grad, clipped, lower)


def ppo(t: Tokens, **clips: float | None) -> Terms:
    return clip(t, t.ratio, **clips)


def covariance(lp: Array, advantages: Array, mask: Array) -> Array:
    """(lp - mean lp)(A - mean A), means over the mask, 0 elsewhere."""
    if not mask.any():
        return np.zeros_like(lp)
    cov = (lp - lp[mask].mean()) * (advantages - advantages[mask].mean())
    return np.where(mask, cov, 0.0)


def clipped_by_ppo(
    lp: Array, old: Array, advantages: Array, mask: Array, low: float | None, high: float | None
) -> Array:
    """Strictly, so not on a bound."""
    return ppo(Tokens(lp, old, advantages, mask), clip_low=low, clip_high=high).clipped


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
        value, grad = delta, np.ones_like(delta)
    elif name == "abs":
        value, grad = np.abs(delta), np.sign(delta)
    elif name in ("k2", "mse"):
        value, grad = delta**2 / 2, delta
    elif name in ("k3", "low_var_kl"):
        inner = np.clip(-delta, -20, 20)
        raw = np.exp(inner) - inner - 1
        value = np.clip(raw, -10, 10)
        grad = np.where((np.abs(delta) <= 20) & (raw <= 10), 1 - np.exp(inner), 0.0)
    else:
        raise NotImplementedError(estimator)
    return value, delta if estimator.endswith("+") else grad


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
    if mode in ("token-sum", "none"):
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
    surrogate: Callable[..., Terms] = ppo,
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
    ref_kl_importance: bool = False,
    mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
    token_weight: Array | None = None,
    upstream: Array | None = None,
    **options: Any,
) -> Reference:
    """The aggregated loss, its gradients and metrics.

    Args:
        lp, old, advantages, mask: (..., L) float64 and bool, as all arrays; padding must hold finite values.
        surrogate: gets ``options``.
        ref_kl_importance: the reference KL of a token is multiplied by its r (GSPO's: by its sequence's s), through
            which its gradient goes as well.
        mode: of :func:`weights`, or "none": the loss is then the array of the tokens' values, 0 where masked, and the
            gradients are those of its sum with the factors ``upstream`` (1).
        token_weight: multiplies a token's value, a constant.
    """
    t = Tokens(lp, old, advantages, mask)
    with np.errstate(all="ignore"):  # e^D may overflow, and a log-prob above 0 is none
        terms = surrogate(t, **options)
    value, grad = np.where(mask, terms.value, 0), np.where(mask, terms.grad, 0)
    size = np.abs(grad) if terms.size is None else np.where(mask, terms.size, 0)
    absolute = np.abs(value)
    own, own_size = np.zeros_like(grad), np.zeros_like(grad)  # of the token's log-prob, whatever grad is of
    selected = np.zeros_like(mask)
    if dropped is not None:
        selected = dropped & mask
        grad, size = np.where(selected, 0, grad), np.where(selected, 0, size)
        if not keep_value:
            value, absolute = np.where(selected, 0, value), np.where(selected, 0, absolute)
    if penalized is not None:
        selected = penalized & mask
        extra, own = (np.where(selected, kl_coef * x, 0) for x in kl(t.d, penalty))
        own_size = np.where(selected, np.abs(own) + abs(kl_coef), 0)
        value = value + extra
        absolute = np.abs(value) + 2 * np.where(selected, np.abs(extra) + abs(kl_coef) * _k3(penalty), 0)

    w = weights(mask, mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    weighted = w * (1.0 if token_weight is None else np.where(mask, token_weight, 0.0))
    outer = 1.0 if upstream is None else np.where(mask, upstream, 0.0)
    gradient = _through(terms.share, weighted * outer * grad) + weighted * outer * own
    size = _through(terms.share, np.abs(weighted * outer) * size) + np.abs(weighted * outer) * own_size
    total, absolute = weighted * value, np.abs(weighted) * absolute
    n = max(int(mask.sum()), 1)

    def mean(x: Array | bool) -> float:
        return float(np.where(mask, x, 0).sum() / n)

    cov = covariance(t.lp, t.adv, mask)
    metrics = {
        "pg_loss": float(total.sum()),
        "clipfrac": mean(terms.clipped),
        "clipfrac_low": mean(terms.clipped & (t.adv < 0)),
        "clipfrac_high": mean(terms.clipped & (t.adv > 0)),
        "clipfrac_lower": mean(terms.lower),
        "ppo_kl": mean(-t.d),
        "ppo_kl_abs": mean(np.abs(t.d)),
        "ratio_mean": mean(t.ratio),
        "ratio_max": float(t.ratio[mask].max()) if mask.any() else 0.0,
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
        total = total - entropy_coef * w * h
        absolute = absolute + np.abs(entropy_coef * w * h)
        gradient_entropy = -entropy_coef * w * outer
    if ref is not None:
        estimate, grad = kl(np.where(mask, lp - ref, 0.0), kl_estimator)
        metrics["ref_kl"] = mean(estimate)
        factor = np.ones_like(t.d)
        if ref_kl_importance:
            factor = t.ratio if terms.ratio is None else terms.ratio
        each = ref_kl_coef * w * factor
        total = total + each * estimate
        gradient = gradient + each * outer * grad
        # k3 and its grad are differences of numbers near 1
        absolute = absolute + np.abs(each) * (np.abs(estimate) + _k3(kl_estimator))
        size = size + np.abs(each * outer) * (np.abs(grad) + 1)
        if ref_kl_importance:
            gradient = gradient + _through(terms.share, each * outer * estimate)
            size = size + _through(terms.share, np.abs(each * outer) * (np.abs(estimate) + 1))
    spread = np.abs(t.d) if terms.spread is None else np.where(mask, terms.spread, 0)
    value = total if mode == "none" else float(total.sum())
    # below 1e-30 fp32 ends, and rounding is no longer relative
    return Reference(value, gradient, gradient_entropy, metrics, float(absolute.sum()), size + 1e-30, spread)


def _through(share: Array | None, grads: Array) -> Array:
    """From Σ_t grad_t · d(what the grad is of) to d / d lp."""
    return grads if share is None else grads.sum(-1, keepdims=True) * share
