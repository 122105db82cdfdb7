"""Statistics of softmax rows in plain torch, a chunk of rows at a time (no V-sized fp32 copy of the whole batch).

Here, for a CPU: chunks stay in its caches. token_stats_gpu.py has the same for a GPU, where launches and passes count.

A row's bits do not depend on the number of rows, on the threads or on the layout: beside sums (``row_sums``) and
maxima, which are exact, everything is done per element of contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_kernels._rows import SECOND_ORDER, RowOptions, state_rows, wanted
from entropy_kernels.backends.eager import token_stats_gpu
from entropy_kernels.backends.eager.softmax_state import finished, no_gradient, own_columns, row_sums

_CHUNK_ELEMENTS = 1 << 22  # 16 MB of fp32 per temporary


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, vocab))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _rows(logits: Tensor, part: slice, dtype: torch.dtype, columns: int) -> Tensor:
    """Rows ``part`` of (B, L, V) logits, counted over (B, L), as a contiguous (rows, columns) tensor of ``dtype``."""
    length = logits.shape[1]
    if logits.shape[0] == 1:
        rows = logits[0, part, :columns]
    elif length == 1:
        rows = logits[part, 0, :columns]
    else:
        index = torch.arange(part.start, part.stop, device=logits.device)
        rows = logits[index // length, index % length, :columns]
    return rows.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _capped(z: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Softcapped logits and tanh(z / softcap), or the logits as they are and None."""
    if not softcap:
        return z, None
    tanh = torch.tanh(z / softcap)
    return softcap * tanh, tanh


def _per_row(temperature: Tensor, part: slice) -> Tensor:
    return (temperature if temperature.numel() == 1 else temperature[part]).unsqueeze(-1)


def token_stats_forward(
    logits: Tensor,  # (B, L, V)
    target: Tensor,  # (N,), N = B * L
    temperature: Tensor,  # (1,) or (N,), or () also on the CPU
    options: RowOptions,
    want: int,
) -> tuple[Tensor, Tensor]:
    """The statistics (S, N) that ``want`` names, in the order of the table, and the state (K, N)."""
    if not logits.is_cpu:
        return token_stats_gpu.token_stats_forward(logits, target, temperature, options, want)
    rows, vocab = target.numel(), logits.shape[2]
    dtype = temperature.dtype
    columns = options.columns(vocab)
    state = logits.new_empty((state_rows(want), rows), dtype=dtype)
    ignored = target == options.ignore_index
    local, here = own_columns(target, columns, options)
    for part in _chunks(rows, vocab):
        if ignored[part].all():
            continue  # not read
        z, _ = _capped(_rows(logits, part, dtype, columns), options.softcap)
        minus_inf = torch.full((z.shape[0], 1), -torch.inf, dtype=dtype, device=z.device)
        m = z.amax(-1, keepdim=True) if columns else minus_inf
        # All -inf: keep the differences at -inf, so that every sum is 0 (the identity state)
        d = (z - torch.where(m == -torch.inf, 0, m)) / _per_row(temperature, part)
        e = torch.exp(d)
        d.masked_fill_(d == -torch.inf, 0)  # an impossible entry adds 0, not 0 * inf
        state[0, part] = m[:, 0]
        state[1, part] = row_sums(e)
        state[2, part] = -row_sums(d * e)
        if columns:
            picked = z.gather(-1, local[part].clamp(0, columns - 1).unsqueeze(-1))
            state[3, part] = torch.where(here[part].unsqueeze(-1), picked, minus_inf)[:, 0]
        else:
            state[3, part] = -torch.inf
        if want & SECOND_ORDER:
            e.square_()
            state[4, part] = row_sums(e)
            state[5, part] = -row_sums(d * e)
    return finished(state, temperature, want, target, options)


def token_stats_backward(
    grad_stats: Tensor,  # (S, N), rows as in stats, any strides; those that are not differentiable are not read
    logits: Tensor,  # (B, L, V)
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    state: Tensor,  # (K, N)
    options: RowOptions,
    want: int,
    inplace: bool,
) -> Tensor:
    """The gradient of the logits, in their place or as a contiguous tensor.

    A statistic whose gradient is 0 in a row has no part in that row, whatever the row holds: the caller writes 0 for
    what nobody differentiates, and its factor, such as the entropy of a row of overflowing moments, may be NaN or inf.
    A row with gradients of 0 alone, or an ignored one, gets 0.
    """
    if not logits.is_cpu:
        return token_stats_gpu.token_stats_backward(
            grad_stats, logits, target, temperature, state, options, want, inplace
        )
    length, vocab = logits.shape[1:]
    dtype = temperature.dtype
    columns = options.columns(vocab)
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    m, s, w = state[:3]
    log_s = torch.log(s)
    grads = {x.name: g for x, g in zip(wanted(want), grad_stats, strict=True) if x.differentiable}
    if "entropy" in grads:
        entropy = torch.where(grads["entropy"] == 0, 0, log_s + w / s)
    if "collision" in grads:
        collision = torch.where(grads["collision"] == 0, 0, state[4] / (s * s))
    local, here = own_columns(target, columns, options)
    silent = (target == options.ignore_index) | no_gradient(grad_stats, want)

    for part in _chunks(target.numel(), vocab):
        z, tanh = _capped(_rows(logits, part, dtype, columns), options.softcap)
        t = _per_row(temperature, part)
        logp = (z - m[part, None]) / t - log_s[part, None]
        p = torch.exp(logp)
        per_logp = torch.zeros_like(p)  # d loss / d log p, without the target's own term
        if "logprob" in grads:
            per_logp -= grads["logprob"][part, None]
        if "entropy" in grads:
            per_logp -= grads["entropy"][part, None] * (logp + entropy[part, None])
        if "collision" in grads:
            per_logp += 2 * grads["collision"][part, None] * (p - collision[part, None])
        grad = torch.where(p == 0, 0, per_logp * p)
        if "logprob" in grads and columns:
            own = torch.where(here[part], grads["logprob"][part], 0).to(dtype)
            grad.scatter_add_(-1, local[part].clamp(0, columns - 1).unsqueeze(-1), own.unsqueeze(-1))
        grad /= t
        if tanh is not None:
            grad *= 1 - tanh * tanh
        grad = torch.where(silent[part, None], 0, grad)
        if columns < vocab:
            grad = torch.nn.functional.pad(grad, (0, vocab - columns))
        index = torch.arange(part.start, part.stop, device=logits.device)
        dlogits[index // length, index % length] = grad.to(logits.dtype)
    return dlogits
