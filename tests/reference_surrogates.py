"""The surrogates in float64 numpy, from the formulas of their papers, gradients derived by hand: no autograd, no torch.

With D = lp - old, r = e^D (never clamped) and the advantage A, a surrogate gives each token a value. Its gradient is
local, d value_t / d lp_t, or goes through a mean over the sequence, as of GSPO's ratio s_b = exp(mean D):
d value_t / d lp_u is then ``slope_t · share_u`` for every u of t's sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference_losses import Array, Reference, kl, weights


@dataclass
class Tokens:
    """(B, L) float64; ``mask`` bool. Everything is 0 where masked."""

    lp: Array
    old: Array
    adv: Array
    mask: Array

    @property
    def d(self) -> Array:
        return self.lp - self.old

    @property
    def ratio(self) -> Array:
        return np.exp(self.d)

    def mean(self, x: Array) -> Array:
        """(B, 1): over the valid tokens of each sequence, 0 where there is none."""
        return (np.where(self.mask, x, 0).sum(-1) / np.maximum(self.mask.sum(-1), 1))[:, None]


@dataclass
class Terms:
    """(B, L) each. ``share`` is None where the gradient is local."""

    value: Array
    slope: Array
    clipped: Array
    lower: Array
    share: Array | None = None
    size: Array | None = None  # absolute values of what the slope is made of, where it is a sum
    spread: Array | None = None  # what a rounding of D is multiplied by in the value; |D| where it is None


Options = dict[str, Any]
_DEFAULTS: Options = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "delta": None,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "ratio_cap": 20.0,
    "dro_beta": 0.1,
    "k_pos": 2.0,
    "lambda_pos": 3.0,
    "k_neg": 3.0,
    "lambda_neg": 2.0,
    "beta_low": 0.75,
    "beta_high": 1.0,
}


def _bounds(o: Options) -> tuple[float, float]:
    low, high = o["clip_low"], o["clip_high"]
    return -np.inf if low is None else 1 - low, np.inf if high is None else 1 + high


def _nothing(t: Tokens) -> Array:
    return np.zeros_like(t.mask)


def _clip(t: Tokens, ratio: Array, o: Options) -> Terms:
    """max(-A r, -A clamp(r)), held by a dual clip or by TRL's delta; the slope is with respect to log r."""
    first, second = -t.adv * ratio, -t.adv * np.clip(ratio, *_bounds(o))
    slope, lower = first.copy(), _nothing(t)
    if o["delta"] is not None:
        assert o["delta"] > _bounds(o)[1], "below it, delta takes the clip's place: nothing a trainer uses"
        beyond = ratio > o["delta"]
        first = np.where(beyond, -t.adv * o["delta"], first)
        slope[beyond] = 0
        lower = beyond & (t.adv < 0)
    clipped = second > first
    value = np.where(clipped, second, first)
    slope[clipped] = 0
    if o["dual_clip"] is not None:
        held = (t.adv < 0) & (value > -t.adv * o["dual_clip"])
        value = np.where(held, -t.adv * o["dual_clip"], value)
        slope[held] = 0
        lower = lower | held
    return Terms(value, slope, clipped, lower)


def _ppo(t: Tokens, o: Options) -> Terms:
    return _clip(t, t.ratio, o)


def _sequence_clip(t: Tokens, o: Options) -> Terms:
    terms = _clip(t, np.exp(t.mean(t.d)) * np.ones_like(t.d), o)
    terms.spread = t.mean(np.abs(t.d)) * np.ones_like(t.d)
    return terms


def _gspo(t: Tokens, o: Options) -> Terms:
    terms = _sequence_clip(t, o)
    terms.share = t.mask / np.maximum(t.mask.sum(-1, keepdims=True), 1)
    return terms


def _cispo(t: Tokens, o: Options) -> Terms:
    clamped = np.clip(t.ratio, *_bounds(o))
    return Terms(-clamped * t.adv * t.lp, -clamped * t.adv, clamped != t.ratio, _nothing(t))


def _cispo_trl(t: Tokens, o: Options) -> Terms:
    capped = np.minimum(t.ratio, o["clip_high"])
    return Terms(-capped * t.adv * t.lp, -capped * t.adv, (t.ratio > o["clip_high"]) & (t.adv > 0), _nothing(t))


def _sapo(t: Tokens, o: Options) -> Terms:
    tau = np.where(t.adv > 0, o["tau_pos"], o["tau_neg"])
    x = tau * (t.ratio - 1)
    small = np.exp(-np.abs(x))  # sigmoid without overflow on either side
    gate = np.where(x > 0, 1, small) / (1 + small)
    slope = -4 * t.adv * small / (1 + small) ** 2 * t.ratio  # e^-|x| r -> 0 as r grows
    return Terms(-t.adv * gate * 4 / tau, slope, _nothing(t), _nothing(t), size=np.abs(slope) * (1 + np.abs(x)))


def _truncated(t: Tokens, valid: Array, o: Options) -> Terms:
    weight = np.where(valid, np.minimum(t.ratio, o["ratio_cap"]), 0)
    return Terms(-t.adv * weight * t.lp, -t.adv * weight, ~valid, (t.ratio > o["ratio_cap"]) & valid)


def _dppo_tv(t: Tokens, o: Options) -> Terms:
    change = np.exp(t.lp) - np.exp(t.old)
    return _truncated(t, np.where(t.adv > 0, change <= o["clip_high"], change >= -o["clip_low"]), o)


def _dppo_kl(t: Tokens, o: Options) -> Terms:
    p, q = np.exp(t.lp), np.exp(t.old)
    divergence = q * -t.d + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
    up = (divergence <= o["clip_high"]) | (p <= q)
    down = (divergence <= o["clip_low"]) | (p >= q)
    return _truncated(t, np.where(t.adv > 0, up, down), o)


def _gmpo(t: Tokens, o: Options) -> Terms:
    """The geometric mean of ratios, each clipped on the side to which its own advantage pulls it."""
    floor = -np.inf if o["clip_low"] is None else -o["clip_low"]
    ceiling = np.inf if o["clip_high"] is None else o["clip_high"]
    held = ((t.adv > 0) & (t.d > ceiling)) | ((t.adv < 0) & (t.d < floor))
    kept = np.where(held, np.clip(t.d, floor, ceiling), t.d) * (t.adv != 0)  # sgn(A) = 0 takes the token's ratio out
    value = -t.adv * np.exp(t.mean(kept))
    share = (t.mask & ~held & (t.adv != 0)) / np.maximum(t.mask.sum(-1, keepdims=True), 1)
    outside = (t.d < floor) | (t.d > ceiling)
    spread = t.mean(np.abs(kept)) * np.ones_like(t.d)
    return Terms(value, value.copy(), outside & (t.adv > 0), outside & (t.adv < 0), share, spread=spread)


def _gpg(t: Tokens, o: Options) -> Terms:
    return Terms(-t.adv * t.lp, -t.adv, _nothing(t), _nothing(t))


def _dro(t: Tokens, o: Options) -> Terms:
    beta = o["dro_beta"]
    size = np.abs(t.adv) + abs(beta) * np.abs(t.d)
    return Terms(-(t.lp * t.adv - beta * t.d**2 / 2), -(t.adv - beta * t.d), _nothing(t), _nothing(t), size=size)


def _vespo(t: Tokens, o: Options) -> Terms:
    each = np.clip(t.d, -20, 20)
    log_w = np.clip(each.sum(-1, keepdims=True), np.log(1e-8), 20)
    k = np.where(t.adv >= 0, o["k_pos"], o["k_neg"])
    rate = np.maximum(np.where(t.adv >= 0, o["lambda_pos"], o["lambda_neg"]), 1e-4)
    phi = np.exp(rate + k * log_w - rate * np.exp(log_w))
    # log phi is a difference of large numbers, and a rounding of log w is multiplied by its derivative
    spread = (k + rate * np.exp(log_w)) * (1 + np.abs(each).sum(-1, keepdims=True)) + rate
    return Terms(-phi * t.adv * t.lp, -phi * t.adv, _nothing(t), _nothing(t), spread=spread)


def _ce_gppo(t: Tokens, o: Options) -> Terms:
    """PPO, but a clipped token keeps a gradient of bounded size; the value is that size too."""
    low, high = _bounds(o)
    terms = _clip(t, t.ratio, o)
    for beyond, bound in (
        ((t.adv < 0) & (t.ratio < low), o["beta_low"] * low),
        ((t.adv > 0) & (t.ratio > high), o["beta_high"] * high),
    ):
        for of in (terms.value, terms.slope):
            of[beyond] = (-t.adv * bound)[beyond]
    return terms


#: gspo_token is verl's "gspo": GSPO's value, but each token's gradient is that of its own log-prob alone.
SURROGATES: dict[str, Callable[[Tokens, Options], Terms]] = {
    "ppo": _ppo,
    "gspo": _gspo,
    "gspo_token": _sequence_clip,
    "cispo": _cispo,
    "cispo_trl": _cispo_trl,
    "sapo": _sapo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "gmpo": _gmpo,
    "gpg": _gpg,
    "dro": _dro,
    "vespo": _vespo,
    "ce_gppo": _ce_gppo,
}


def loss(
    name: str,
    lp: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    *,
    options: Options | None = None,
    mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
    token_weight: Array | None = None,
    upstream: Array | None = None,
    ref: Array | None = None,
    ref_kl_coef: float = 0.0,
    ref_kl_importance: bool = False,
    lengths: list[int] | None = None,
) -> Reference:
    """The aggregated loss of a surrogate, its gradient and metrics.

    Args:
        lp, old, advantages, mask: (B, L), float64 and bool; padding must hold finite values. With ``lengths`` packed:
            (N,), the sequences one after the other. ``token_weight``, ``upstream`` and ``ref`` likewise.
        options: the surrogate's, clips included, by the names of :func:`entropy_kernels.policy_loss`.
        mode: of :func:`reference_losses.weights`, or "none": the loss is then the array of the tokens' values, 0 where
            masked, and the gradient that of its sum with the factors ``upstream`` (1).
        token_weight: multiplies a token's value, a constant.
        ref_kl_importance: the reference KL of a token is multiplied by its r (GSPO's: by its sequence's s), through
            which its gradient goes as well.
    """
    if lengths is not None:
        return _packed(
            name, lp, old, advantages, mask, lengths, options=options, mode=mode, dp_size=dp_size,
            batch_num_tokens=batch_num_tokens, global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            token_weight=token_weight, upstream=upstream, ref=ref, ref_kl_coef=ref_kl_coef,
            ref_kl_importance=ref_kl_importance,
        )  # fmt: skip
    t = Tokens(*(np.where(mask, x, 0.0) for x in (lp, old, advantages)), mask)
    with np.errstate(all="ignore"):  # e^D may overflow, and a log-prob above 0 is none
        terms = SURROGATES[name](t, {**_DEFAULTS, **(options or {})})
    if mode == "none":
        w = mask.astype(float) * dp_size
    else:
        w = weights(mask, mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    weighted = w * (1.0 if token_weight is None else np.where(mask, token_weight, 0.0))
    outer = 1.0 if upstream is None else np.where(mask, upstream, 0.0)
    value, slope = np.where(mask, terms.value, 0), np.where(mask, terms.slope, 0)
    terms_of_slope = np.abs(slope) if terms.size is None else np.where(mask, terms.size, 0)
    gradient = _through(terms.share, weighted * outer * slope)
    size = _through(terms.share, np.abs(weighted * outer) * terms_of_slope)
    total, absolute = weighted * value, np.abs(weighted * value)

    n = max(int(mask.sum()), 1)
    metrics = {
        "pg_loss": float(total.sum()),
        "clipfrac": float((terms.clipped & mask).sum() / n),
        "clipfrac_lower": float((terms.lower & mask).sum() / n),
        "ppo_kl": float(-t.d.sum() / n),
        "ppo_kl_abs": float(np.abs(t.d).sum() / n),
    }
    if ref is not None:
        estimate, slope = (np.where(mask, x, 0) for x in kl(np.where(mask, lp - ref, 0.0), "k3"))
        metrics["ref_kl"] = float(estimate.sum() / n)
        factor = np.ones_like(t.d)
        through = np.zeros_like(t.d)  # d factor · estimate, by the log-ratio that the factor is of
        if ref_kl_importance:
            factor = np.exp(t.mean(t.d)) * np.ones_like(t.d) if name == "gspo" else t.ratio
            through = factor * estimate
        total = total + ref_kl_coef * w * factor * estimate
        share = terms.share if name == "gspo" else None
        gradient = gradient + ref_kl_coef * (w * outer * factor * slope + _through(share, w * outer * through))
        # k3 and its slope are differences of numbers near 1
        rough = np.abs(w * outer * factor)
        absolute = absolute + np.abs(ref_kl_coef * w * factor) * (np.abs(estimate) + 1)
        size = size + abs(ref_kl_coef) * (rough * (np.abs(slope) + 1) + _through(share, rough * (np.abs(estimate) + 1)))
    spread = np.abs(t.d) if terms.spread is None else np.where(mask, terms.spread, 0)
    # below 1e-30 fp32 ends, and rounding is no longer relative
    value = total if mode == "none" else float(total.sum())
    return Reference(value, gradient, None, metrics, float(absolute.sum()), size + 1e-30, spread)


def _through(share: Array | None, slopes: Array) -> Array:
    """From Σ_t slope_t · d(what the slope is of) to d / d lp."""
    return slopes if share is None else slopes.sum(-1, keepdims=True) * share


def pad(x: Array | None, lengths: list[int]) -> Array | None:
    """(N,) packed to (B, longest), 0 beyond the lengths."""
    if x is None:
        return None
    out = np.zeros((len(lengths), max(lengths, default=0)), dtype=x.dtype)
    out[np.arange(out.shape[1]) < np.array(lengths, dtype=int)[:, None]] = x
    return out


def _packed(
    name: str, lp: Array, old: Array, advantages: Array, mask: Array, lengths: list[int], **options: Any
) -> Reference:
    there = np.arange(max(lengths, default=0)) < np.array(lengths, dtype=int)[:, None]
    for key in ("token_weight", "upstream", "ref"):
        options[key] = pad(options[key], lengths)
    padded = loss(name, *(pad(x, lengths) for x in (lp, old, advantages, mask)), **options)
    padded.loss = padded.loss[there] if isinstance(padded.loss, np.ndarray) else padded.loss
    for key in ("logprob", "size", "log_ratio"):
        setattr(padded, key, getattr(padded, key)[there])
    return padded
