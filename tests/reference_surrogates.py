"""The surrogates in float64 numpy, from the formulas of their papers; reference_losses makes the losses of them."""

from __future__ import annotations

from typing import Any

import numpy as np

import reference_losses
from reference_losses import Array, Reference, Terms, Tokens, bounds, clip, ppo


def gspo_token(t: Tokens, **clips: float | None) -> Terms:
    """verl's "gspo": GSPO's value, but each token's gradient is that of its own log-prob alone."""
    ratio = np.exp(t.mean(t.d))
    terms = clip(t, ratio, **clips)
    terms.ratio, terms.spread = ratio, t.mean(np.abs(t.d))
    return terms


def gspo(t: Tokens, **clips: float | None) -> Terms:
    terms = gspo_token(t, **clips)
    terms.share = t.mask / np.maximum(t.mask.sum(-1, keepdims=True), 1)
    return terms


def cispo(t: Tokens, clip_low: float | None = 0.2, clip_high: float | None = 0.2) -> Terms:
    clamped = np.clip(t.ratio, *bounds(clip_low, clip_high))
    return Terms(-clamped * t.adv * t.lp, -clamped * t.adv, clamped != t.ratio)


def cispo_trl(t: Tokens, clip_high: float) -> Terms:
    capped = np.minimum(t.ratio, clip_high)
    return Terms(-capped * t.adv * t.lp, -capped * t.adv, (t.ratio > clip_high) & (t.adv > 0))


def sapo(t: Tokens, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Terms:
    tau = np.where(t.adv > 0, tau_pos, tau_neg)
    x = tau * (t.ratio - 1)
    small = np.exp(-np.abs(x))  # sigmoid without overflow on either side
    gate = np.where(x > 0, 1, small) / (1 + small)
    grad = -4 * t.adv * small / (1 + small) ** 2 * t.ratio  # e^-|x| r -> 0 as r grows
    return Terms(-t.adv * gate * 4 / tau, grad, size=np.abs(grad) * (1 + np.abs(x)))


def _truncated(t: Tokens, valid: Array, cap: float) -> Terms:
    weight = np.where(valid, np.minimum(t.ratio, cap), 0)
    return Terms(-t.adv * weight * t.lp, -t.adv * weight, ~valid, (t.ratio > cap) & valid)


def dppo_tv(t: Tokens, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float = 20.0) -> Terms:
    change = np.exp(t.lp) - np.exp(t.old)
    return _truncated(t, np.where(t.adv > 0, change <= clip_high, change >= -clip_low), ratio_cap)


def dppo_kl(t: Tokens, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float = 20.0) -> Terms:
    p, q = np.exp(t.lp), np.exp(t.old)
    divergence = q * -t.d + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
    up, down = (divergence <= clip_high) | (p <= q), (divergence <= clip_low) | (p >= q)
    return _truncated(t, np.where(t.adv > 0, up, down), ratio_cap)


def gmpo(t: Tokens, clip_low: float = 0.2, clip_high: float = 0.2) -> Terms:
    """The geometric mean of ratios, each clipped on the side to which its own advantage pulls it."""
    above, below = t.d > clip_high, t.d < -clip_low
    free = ((t.adv > 0) & ~above) | ((t.adv < 0) & ~below)
    kept = np.where(free, t.d, np.clip(t.d, -clip_low, clip_high)) * (t.adv != 0)  # sgn(A) = 0 takes the ratio out
    value = -t.adv * np.exp(t.mean(kept))
    share = (t.mask & free) / np.maximum(t.mask.sum(-1, keepdims=True), 1)
    outside = above | below
    return Terms(value, value, outside & (t.adv > 0), outside & (t.adv < 0), share, spread=t.mean(np.abs(kept)))


def gpg(t: Tokens) -> Terms:
    return Terms(-t.adv * t.lp, -t.adv)


def dro(t: Tokens, dro_beta: float = 1.0) -> Terms:
    size = np.abs(t.adv) + abs(dro_beta) * np.abs(t.d)
    return Terms(-(t.lp * t.adv - dro_beta * t.d**2 / 2), -(t.adv - dro_beta * t.d), size=size)


def vespo(t: Tokens, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0) -> Terms:
    each = np.clip(t.d, -20, 20)
    log_w = np.clip(each.sum(-1, keepdims=True), np.log(1e-8), 20)
    k = np.where(t.adv >= 0, k_pos, k_neg)
    rate = np.maximum(np.where(t.adv >= 0, lambda_pos, lambda_neg), 1e-4)
    phi = np.exp(rate + k * log_w - rate * np.exp(log_w))
    # log phi is a difference of large numbers, and a rounding of log w is multiplied by its derivative
    spread = (k + rate * np.exp(log_w)) * (1 + np.abs(each).sum(-1, keepdims=True)) + rate
    return Terms(-phi * t.adv * t.lp, -phi * t.adv, spread=spread)


def ce_gppo(
    t: Tokens, clip_low: float = 0.2, clip_high: float = 0.2, beta_low: float = 0.75, beta_high: float = 1.0
) -> Terms:
    """PPO, but a clipped token keeps a gradient of bounded size; the value is that size too."""
    terms = ppo(t, clip_low=clip_low, clip_high=clip_high)
    low, high = bounds(clip_low, clip_high)
    bound = np.where(t.adv < 0, beta_low * low, beta_high * high)
    stopped = ((t.adv < 0) & (t.ratio < low)) | ((t.adv > 0) & (t.ratio > high))
    value, grad = (np.where(stopped, -t.adv * bound, x) for x in (terms.value, terms.grad))
    return Terms(value, grad, terms.clipped)


SURROGATES = {
    surrogate.__name__: surrogate
    for surrogate in (
        ppo, gspo, gspo_token, cispo, cispo_trl, sapo, dppo_tv, dppo_kl, gmpo, gpg, dro, vespo, ce_gppo,
    )
}  # fmt: skip


def pad(x: Any, lengths: list[int]) -> Any:
    """(N,) packed to (B, longest), 0 beyond the lengths; what is no array as it is."""
    if not isinstance(x, Array):
        return x
    out = np.zeros((len(lengths), max(lengths, default=0)), dtype=x.dtype)
    out[_there(lengths)] = x
    return out


def _there(lengths: list[int]) -> Array:
    return np.arange(max(lengths, default=0)) < np.array(lengths, dtype=int)[:, None]


def loss(
    name: str,
    lp: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    *,
    options: dict[str, Any] | None = None,
    lengths: list[int] | None = None,
    **rest: Any,
) -> Reference:
    """:func:`reference_losses.loss` of a surrogate with its ``options``; with ``lengths`` of packed arrays (N,)."""
    arrays = (lp, old, advantages, mask)
    if lengths is not None:
        arrays = tuple(pad(x, lengths) for x in arrays)
        rest = {key: pad(x, lengths) for key, x in rest.items()}
    out = reference_losses.loss(*arrays, surrogate=SURROGATES[name], **(options or {}), **rest)
    for metric in ("ratio_mean", "ratio_max", "cov_mean", "cov_max"):  # overflow sooner, and covariances are fp32
        del out.metrics[metric]
    if lengths is not None:
        for key in ("logprob", "size", "log_ratio", *(["loss"] if isinstance(out.loss, Array) else [])):
            setattr(out, key, getattr(out, key)[_there(lengths)])
    return out
