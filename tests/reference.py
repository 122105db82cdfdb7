"""The statistics straight from their definitions (docs/math.md §2): dense, in float64, apart from the package.

``dense`` writes out log p, p and what follows from them for every column; ``gradient`` is the closed form of the
gradient. In float32 the same functions are the baseline that a plain torch user has, by whose error ours is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("logprob", "entropy", "collision", "vocab_covariance", "p_max", "mean_logit")
DIFFERENTIABLE = NAMES[:3]


@dataclass
class Dense:
    """Everything about N rows of V columns, in one dtype."""

    capped: Tensor  # (N, V) logits after the softcap
    cap_grad: Tensor  # (N, V) d capped / d logits
    temperature: Tensor  # (N, 1)
    nothing: Tensor  # (N, V) bool: ignored row or padded column, no gradient whatever else is there
    one_hot: Tensor  # (N, V) 1 at the target
    x: Tensor  # (N, V) (capped - max) / temperature, <= 0
    logp: Tensor  # (N, V)
    p: Tensor  # (N, V)
    logprob: Tensor  # (N,)
    entropy: Tensor  # (N,)
    collision: Tensor  # (N,)
    vocab_covariance: Tensor  # (N,)
    p_max: Tensor  # (N,)
    mean_logit: Tensor  # (N,)


def dense(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Dense:
    """Statistics of (..., V) logits; the leading dimensions become N = the number of tokens."""
    vocab = logits.shape[-1]
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.device, dtype).expand(target.shape).reshape(-1, 1)
    else:
        temperature = torch.full((target.numel(), 1), temperature, dtype=dtype, device=logits.device)
    target = target.reshape(-1).long()
    z = logits.reshape(target.numel(), vocab).to(dtype)
    cap_grad = torch.ones_like(z)
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, cap_grad = softcap * tanh, 1 - tanh * tanh
    beyond = torch.arange(vocab, device=z.device) >= (vocab if vocab_size is None else vocab_size)
    z, cap_grad = z.masked_fill(beyond, -torch.inf), cap_grad.masked_fill(beyond, 0)
    ignored = target == ignore_index
    # An ignored row must not matter, whatever it holds.
    z = z.masked_fill(ignored[:, None], 0)
    label = target.masked_fill(ignored, 0)[:, None]

    x = (z - z.amax(-1, keepdim=True)) / temperature
    logp = torch.log_softmax(x, -1)
    p = logp.exp()
    logprob = logp.gather(-1, label)[:, 0]
    plogp = torch.where(p == 0, 0, p * logp)
    entropy = -plogp.sum(-1) + 0.0  # not -0
    collision = (p * p).sum(-1)
    # Cov_{a~p}(log p(a), 1[a = y] - p(a)) = E[log p · (1[a = y] - p)] - E[log p] E[1[a = y] - p]
    one_hot = torch.zeros_like(p).scatter_(-1, label, 1)
    covariance = (plogp * (one_hot - p)).sum(-1) + entropy * (p * (one_hot - p)).sum(-1)
    top = z.amax(-1)
    mean = top + torch.where(p == 0, 0, p * (z - top[:, None])).sum(-1)  # Σ p z overflows where all z are the lowest
    everything = (logprob, entropy, collision, covariance, p.amax(-1), mean)
    values = [value.masked_fill(ignored, 0) for value in everything]
    return Dense(z, cap_grad, temperature, ignored[:, None] | beyond, one_hot, x, logp, p, *values)


def gradient(
    d: Dense, logprob: Tensor | None = None, entropy: Tensor | None = None, collision: Tensor | None = None
) -> Tensor:
    """d/dlogits of Σ_i g_i · value_i, (N, V), for upstream gradients (N,) of the outputs that are given."""

    def column(upstream: Tensor) -> Tensor:
        return upstream.reshape(-1, 1).to(d.p.dtype)

    total = torch.zeros_like(d.p)
    zero = d.p == 0
    if logprob is not None:
        total = total + column(logprob) * (d.one_hot - d.p)
    if entropy is not None:
        total = total - column(entropy) * torch.where(zero, 0, d.p * (d.logp + d.entropy[:, None]))
    if collision is not None:
        total = total + column(collision) * 2 * d.p * (d.p - d.collision[:, None])
    return (total * d.cap_grad / d.temperature).masked_fill(d.nothing, 0)


def differentiable(d_logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None) -> tuple[Tensor, ...]:
    """(logprob, entropy, collision) for autograd to differentiate: a second way to the gradient, for finite rows."""
    x = d_logits if softcap is None else softcap * torch.tanh(d_logits / softcap)
    logp = torch.log_softmax(x / temperature, -1)
    p = logp.exp()
    return logp.gather(-1, target[:, None].long())[:, 0], -(p * logp).sum(-1), (p * p).sum(-1)
