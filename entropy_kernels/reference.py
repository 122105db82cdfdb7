"""What the kernels compute, straight from the definitions: dense, in float64, differentiated by autograd.

Nothing here shares code with a kernel, so that ``entropy-kernels doctor``, the benchmarks and your own tests can hold
kernels against it. Read it as the definition that docs/math.md derives things from; it is slow, and N × V large.

    values = reference.statistics(logits, target, temperature=0.7)          # {"logprob": (N,), "entropy": (N,), ...}
    d_logits = reference.gradient(logits, target, {"logprob": upstream}, temperature=0.7)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Softmax rows with what their statistics are made of; x = z / temperature.

    Attributes:
        z: (..., V) float64 logits after the softcap, before the temperature; -inf where a column does not exist.
        logp: (..., V) float64 log softmax(x), nats.
        p: (..., V) float64 probabilities.
        finite_logp: (..., V) float64 logp, and 0 where p is 0, whose product with p is 0 whatever logp is.
        label: (..., 1) int64, the target; 0 where it is ignored.

    Source:
        docs/math.md §2.
    """

    z: Tensor
    logp: Tensor
    p: Tensor
    finite_logp: Tensor
    label: Tensor | None


def _logprob(row: Rows) -> Tensor:
    assert row.label is not None
    return row.logp.gather(-1, row.label)[..., 0]


def _entropy(row: Rows) -> Tensor:
    return 0.0 - (row.p * row.finite_logp).sum(-1)  # 0 - 0 is 0, and -0 is not


def _collision(row: Rows) -> Tensor:
    return row.p.square().sum(-1)


def _vocab_covariance(row: Rows) -> Tensor:
    """Cov_{a~p}(log p(a), 1[a = y] - p(a)) = E[log p · step] - E[log p] · E[step]."""
    assert row.label is not None
    step = torch.zeros_like(row.p).scatter(-1, row.label, 1.0) - row.p
    return (row.p * row.finite_logp * step).sum(-1) + _entropy(row) * (row.p * step).sum(-1)


def _p_max(row: Rows) -> Tensor:
    return row.p.amax(-1)


def _mean_logit(row: Rows) -> Tensor:
    return (row.p * torch.where(row.p > 0, row.z, 0.0)).sum(-1)


FORMULAS: dict[str, Callable[[Rows], Tensor]] = {
    "logprob": _logprob,
    "entropy": _entropy,
    "collision": _collision,
    "vocab_covariance": _vocab_covariance,
    "p_max": _p_max,
    "mean_logit": _mean_logit,
}
"""Name of a statistic -> its value per row, a function of :class:`Rows`."""
NEED_TARGET = ("logprob", "vocab_covariance")
"""The statistics that need a target."""


def statistics(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Statistics of softmax(softcap · tanh(logits / softcap) / temperature), differentiable.

    Args:
        logits: (..., V) floating point, on any device that has float64.
        target: (...) int labels in [0, V) or ``ignore_index``; None: only what needs no target.
        temperature: number, or tensor that broadcasts to (...).
        softcap: logits become softcap · tanh(logits / softcap); None for none.
        ignore_index: the label of rows that give 0 and have gradient 0, whatever stands in them.
        vocab_size: columns at or beyond it count as -inf.
        names: of :data:`FORMULAS`; None: all (without a target those that need none).

    Returns:
        By name: (...) float64 of ``logits``' device, in nats (collision, p_max and mean_logit without unit), all
        differentiable, whether or not the package differentiates them.

    Raises:
        KeyError: a name that is not in :data:`FORMULAS`.
        RuntimeError: torch's own, of shapes that do not fit; arguments are not checked here.

    Source:
        docs/math.md §2.
    """
    divisor = temperature.double()[..., None] if isinstance(temperature, Tensor) else temperature
    z = logits.double()
    absent = torch.arange(z.shape[-1], device=z.device) >= (z.shape[-1] if vocab_size is None else vocab_size)
    ignored = torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device) if target is None else target == ignore_index
    z = z.masked_fill(ignored[..., None] | absent, 0.0)  # first, so that NaN in them reaches no gradient
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(absent, -math.inf)
    logp = torch.log_softmax(z / divisor, -1)
    p = logp.exp()
    label = None if target is None else target.long().masked_fill(ignored, 0)[..., None]
    row = Rows(z, logp, p, torch.where(p == 0, 0.0, logp), label)
    if names is None:
        names = [name for name in FORMULAS if target is not None or name not in NEED_TARGET]
    return {name: FORMULAS[name](row).masked_fill(ignored, 0.0) for name in names}


def gradient(logits: Tensor, target: Tensor | None, upstream: Mapping[str, Tensor], **options: Any) -> Tensor:
    """d/dlogits of Σ upstream · statistic, in float64.

    Args:
        logits, target: as in :func:`statistics`.
        upstream: by name of the statistic, (...) of any real dtype: what flows into it.
        options: temperature, softcap, ignore_index and vocab_size of :func:`statistics`.

    Returns:
        ``logits``' shape, float64, in the unit of upstream · statistic per logit.

    Raises:
        KeyError, RuntimeError: as in :func:`statistics`.

    Source:
        docs/math.md §2.
    """
    logits = logits.detach().double().requires_grad_()
    with torch.enable_grad():
        values = statistics(logits, target, names=upstream, **options)
    return torch.autograd.grad([*values.values()], logits, [upstream[name].double() for name in values])[0]


# ---- the batch: which tokens are acted on ----------------------------------------------------------------------------


def token_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """(lp - mean lp)·(A - mean A), means over the tokens of ``mask``; 0 elsewhere.

    Args:
        logprob: (...) floating point, nats.
        advantages: broadcastable to its shape, any real dtype.
        mask: bool, ``logprob``'s shape; None: all tokens count.

    Returns:
        ``logprob``'s shape, float64, nats times the unit of the advantages.

    Raises:
        RuntimeError, IndexError: torch's own, of shapes that do not fit; arguments are not checked here.

    Source:
        arXiv 2505.22617, Eq. 10.
    """
    lp, a = logprob.double(), advantages.double().expand(logprob.shape)
    if mask is None:
        return (lp - lp.mean()) * (a - a.mean())
    return torch.where(mask, (lp - lp[mask].mean()) * (a - a[mask].mean()), 0.0)


def kl_cov_mask(
    covariance: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    k: int | None = None,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
) -> Tensor:
    """The n tokens of largest covariance in fp32, ties to the lower index: :func:`entropy_kernels.kl_cov_mask`.

    Args:
        covariance: (...) floating point.
        mask, exclude: bool, ``covariance``'s shape, or None.
        ratio: share of the tokens of ``mask``; a Python number, here and below.
        k: number of tokens instead.
        at_least_one: one token even where ratio · N < 1.
        token_index: int64, ``covariance``'s shape; None: the position.

    Returns:
        bool, ``covariance``'s shape.

    Raises:
        ValueError: ratio and k, or neither; other arguments are not checked here.

    Source:
        docs/math.md §3.
    """
    n = _wanted(covariance, mask, ratio, k, at_least_one)
    return _top(n, covariance.float(), _candidates(covariance, mask, exclude), token_index)


def clip_cov_mask(
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
    """n tokens drawn by their random keys from a covariance range: :func:`entropy_kernels.clip_cov_mask`.

    Args:
        seed: int, >= 0.
        low, high, band, closed: as in :func:`in_range`.
        others: as in :func:`kl_cov_mask`.

    Returns:
        bool, ``covariance``'s shape.

    Raises:
        ValueError: as in :func:`kl_cov_mask`.

    Source:
        docs/math.md §3.
    """
    n = _wanted(covariance, mask, ratio, k, at_least_one)
    inside = in_range(covariance, _candidates(covariance, mask, exclude), low=low, high=high, band=band, closed=closed)
    index = torch.arange(covariance.numel(), device=covariance.device).view(covariance.shape)
    keys = random_keys(index if token_index is None else token_index, seed)
    return _top(n, keys, inside, token_index)


def budget_tokens(
    score: Tensor,
    mask: Tensor | None = None,
    *,
    budget: float | None = None,
    limit: float | None = None,
    share: float | None = None,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
) -> Tensor:
    """The fewest tokens of largest score that come to a budget, in integers: :func:`entropy_kernels.budget_tokens`.

    Args:
        score: (...) floating point.
        mask, exclude: bool, ``score``'s shape, or None.
        budget, limit, share: a Python number, one of the three.
        token_index: int64, ``score``'s shape; None: the position.

    Returns:
        bool, ``score``'s shape. Without any of the three nothing is selected.

    Raises:
        RuntimeError: torch's own, of shapes that do not fit; arguments are not checked here.

    Source:
        docs/math.md §3.
    """
    value = score.float()
    finite = value.isfinite() if mask is None else value.isfinite() & mask
    valid = score.numel() if mask is None else int(mask.sum())
    largest = float(value[finite].abs().max()) if bool(finite.any()) else 0.0
    # frexp(x) is the smallest e with x < 2^e
    bits = min(1000, min(51, 62 - math.frexp(valid)[1]) - math.frexp(largest)[1])
    units = torch.where(finite, value.double() * 2.0**bits, 0.0).round().long()
    candidates = (units > 0) if exclude is None else (units > 0) & ~exclude
    order = _descending(value, candidates, token_index)
    sums = units.reshape(-1)[order].cumsum(0)
    most = int(sums[-1]) if len(sums) else 0
    number, scale = (limit if budget is None else budget), Fraction(2) ** bits
    if share is not None:
        need = math.ceil(Fraction(share) * most)
    elif number is None or math.isnan(number):
        need = 0
    elif math.isinf(number):
        need = most if (number > 0) == (limit is None) else 0
    else:
        need = (
            math.ceil(Fraction(number) * scale)
            if limit is None
            else int(units.sum()) - math.floor(Fraction(number) * scale)
        )
    return _chosen(score, order[: int((sums < need).sum()) + 1 if need > 0 else 0])


def in_range(
    covariance: Tensor,
    candidates: Tensor,
    *,
    low: float = 1.0,
    high: float = 5.0,
    band: str = "absolute",
    closed: bool = False,
) -> Tensor:
    """Which of the candidates lie in the range. Arguments are not checked here.

    Args:
        covariance: (...) floating point, compared in fp32.
        candidates: bool, ``covariance``'s shape.
        low, high: bounds of the range.
        band: "absolute"; "quantile": the bounds are shares, and stand for order statistics of the candidates.
        closed: whether the bounds belong to the range.

    Returns:
        bool, ``covariance``'s shape.

    Raises:
        RuntimeError: torch's own, of shapes that do not fit.

    Source:
        docs/math.md §3.
    """
    value = covariance.float()
    least, most = value.new_tensor(low), value.new_tensor(high)
    if band == "quantile":
        order = value[candidates].sort().values
        if not len(order):
            return candidates
        least, most = (order[math.floor(share * (len(order) - 1))] for share in (low, high))
    inside = (value >= least) & (value <= most) if closed else (value > least) & (value < most)
    return candidates & inside


def random_keys(token_index: Tensor, seed: int) -> Tensor:
    """First word of Philox4x32-10 for counter (token index, 0, 0) and key ``seed``.

    Args:
        token_index: int64, any shape.
        seed: int of 64 bits.

    Returns:
        ``token_index``'s shape, int64, a key in [0, 2³²) without unit.

    Raises:
        TypeError: torch's own, of what is no tensor of integers.

    Source:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; docs/math.md §3.
    """
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = token_index & word, (token_index >> 32) & word, 0 * token_index, 0 * token_index
    for i in range(10):
        k0, k1 = (seed + i * 0x9E3779B9) & word, ((seed >> 32) + i * 0xBB67AE85) & word
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2⁶⁴, with a sign that the masks take off again
        c0, c1, c2, c3 = ((p1 >> 32) & word) ^ c1 ^ k0, p1 & word, ((p0 >> 32) & word) ^ c3 ^ k1, p0 & word
    return c0


def _candidates(covariance: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
    candidates = ~covariance.isnan()
    candidates = candidates if mask is None else candidates & mask
    return candidates if exclude is None else candidates & ~exclude


def _wanted(like: Tensor, mask: Tensor | None, ratio: float | None, k: int | None, at_least_one: bool) -> int:
    """n = max(1, ⌊ratio · N⌋), N the tokens that count; 0 if there are none."""
    if (ratio is None) == (k is None):
        raise ValueError(f"ratio, k: expected one of them, got ratio={ratio} and k={k}")
    valid = like.numel() if mask is None else int(mask.sum())
    if valid == 0:
        return 0
    if k is not None:
        return k
    assert ratio is not None
    return max(int(at_least_one), math.floor(ratio * valid))


def _top(n: int, score: Tensor, candidates: Tensor, token_index: Tensor | None) -> Tensor:
    """The n candidates of largest score, ties to the lower index."""
    return _chosen(score, _descending(score, candidates, token_index)[:n])


def _descending(score: Tensor, candidates: Tensor, token_index: Tensor | None) -> Tensor:
    """Positions of the candidates by score, largest first, ties by index."""
    order = candidates.reshape(-1).nonzero()[:, 0]
    if token_index is not None:
        order = order[token_index.reshape(-1)[order].argsort()]
    return order[score.reshape(-1)[order].argsort(descending=True, stable=True)]


def _chosen(like: Tensor, positions: Tensor) -> Tensor:
    chosen = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    chosen[positions] = True
    return chosen.view(like.shape)


# ---- losses ----------------------------------------------------------------------------------------------------------


def clipped(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
) -> Tensor:
    """The tokens that PPO's clip stops, strictly.

    Args:
        others: as in :func:`policy_loss`.

    Returns:
        bool, ``logprob``'s shape.

    Raises:
        RuntimeError: torch's own, of shapes that do not fit; arguments are not checked here.

    Source:
        arXiv 1707.06347, Eq. 7.
    """
    free, bounded = _ppo_losses(logprob, old_logprob, advantages, clip_low, clip_high)
    return bounded > free


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    dropped: Tensor | None = None,
    keep_value: bool = False,
    penalized: Tensor | None = None,
    kl_coef: float = 1.0,
) -> Tensor:
    """Mean over the tokens of ``mask`` of max(-A·r, -A·clamp(r)), r = exp(logprob - old_logprob), in float64.

    Args:
        logprob: (...) floating point, nats, differentiable.
        old_logprob, advantages: ``logprob``'s shape, floating point.
        mask: bool, ``logprob``'s shape; None: all tokens count.
        clip_low, clip_high: r is clamped to 1 - clip_low .. 1 + clip_high; None: no clip on that side.
        dual_clip: for A < 0 a token's loss is at most -A · dual_clip.
        entropy: ``logprob``'s shape, floating point, nats, differentiable.
        entropy_coef: of the entropy bonus.
        dropped: bool, ``logprob``'s shape: tokens that lose their gradient and their value: Clip-Cov.
        keep_value: these keep their value.
        penalized: bool, ``logprob``'s shape: tokens with kl_coef·|logprob - old_logprob| on top: KL-Cov, which has no
            clip.
        kl_coef: of that penalty.

    Returns:
        0-d, float64, in the unit of the advantages.

    Raises:
        RuntimeError: torch's own, of shapes that do not fit; arguments are not checked here.

    Source:
        arXiv 1707.06347, Eq. 7; arXiv 1912.09729, Eq. 5; arXiv 2505.22617, Eq. 12 and 13.
    """
    free, bounded = _ppo_losses(logprob, old_logprob, advantages, clip_low, clip_high)
    loss = torch.where(bounded > free, bounded, free)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages.double()), loss)
    if dropped is not None:
        loss = torch.where(dropped, loss.detach() if keep_value else 0.0, loss)
    if penalized is not None:
        loss = loss + kl_coef * penalized * (logprob.double() - old_logprob.double()).abs()
    if entropy is not None:
        loss = loss - entropy_coef * entropy.double()
    if mask is None:
        return loss.mean()
    return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp(min=1)


def _ppo_losses(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """-A·r and -A·clamp(r)."""
    ratio, gain = (logprob.double() - old_logprob.double()).exp(), -advantages.double()
    low = -math.inf if clip_low is None else 1 - clip_low
    return gain * ratio, gain * ratio.clamp(low, math.inf if clip_high is None else 1 + clip_high)
