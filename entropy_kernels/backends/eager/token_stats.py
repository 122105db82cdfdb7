"""Statistics of softmax rows in plain torch, a chunk of rows at a time (no V-sized fp32 copy of the whole batch).

A row's bits do not depend on the number of rows, on the threads or on the layout: beside sums (``row_sums``) and
maxima, which are exact, everything is done per element of contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_kernels._rows import SECOND_ORDER, state_rows
from entropy_kernels.backends.eager.softmax_state import finalize, row_sums

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
    temperature: Tensor,  # (1,) or (N,)
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    want: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = target.numel(), logits.shape[2]
    dtype = temperature.dtype
    columns = max(0, min(vocab, vocab_size - vocab_start))
    state = logits.new_empty((state_rows(want), rows), dtype=dtype)  # (K, N)
    ignored = target == ignore_index
    local = target.long() - vocab_start
    here = (local >= 0) & (local < columns) & ~ignored
    for part in _chunks(rows, vocab):
        if state.device.type == "cpu" and ignored[part].all():
            continue  # not read; on a GPU to ask would be a sync
        z, _ = _capped(_rows(logits, part, dtype, columns), softcap)
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
    neutral = state.new_zeros((state.shape[0], 1))  # filled there: a list would be copied from the host, a sync
    neutral[1::3] = 1  # s and s2
    state = torch.where(ignored, neutral, state)
    invalid = ((target < 0) | (target >= vocab_size)) & ~ignored
    logprob, entropy, collision, covariance = finalize(state, temperature, want, ignored, invalid)
    return logprob, entropy, collision, covariance, state


def token_stats_backward(
    grad_logprob: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    grad_collision: Tensor | None,  # (N,)
    logits: Tensor,  # (B, L, V)
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    state: Tensor,  # (K, N)
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    inplace: bool,
) -> Tensor:
    length, vocab = logits.shape[1:]
    dtype = temperature.dtype
    columns = max(0, min(vocab, vocab_size - vocab_start))
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    m, s, w = state[:3]
    log_s = torch.log(s)
    entropy = log_s + w / s
    collision = state[4] / (s * s) if grad_collision is not None else None
    ignored = target == ignore_index
    local = target.long() - vocab_start
    here = (local >= 0) & (local < columns) & ~ignored
    # No gradient comes in: none goes out, whatever the row holds, so NaN in padding does not leak
    upstream = [g for g in (grad_logprob, grad_entropy, grad_collision) if g is not None]
    silent = ignored | torch.stack([g == 0 for g in upstream]).all(0)
    for part in _chunks(target.numel(), vocab):
        z, tanh = _capped(_rows(logits, part, dtype, columns), softcap)
        t = _per_row(temperature, part)
        logp = (z - m[part, None]) / t - log_s[part, None]
        p = torch.exp(logp)
        slope = torch.zeros_like(p)  # d loss / d log p, without the target's own term
        if grad_logprob is not None:
            slope -= grad_logprob[part, None]
        if grad_entropy is not None:
            slope -= grad_entropy[part, None] * (logp + entropy[part, None])
        if grad_collision is not None and collision is not None:
            slope += 2 * grad_collision[part, None] * (p - collision[part, None])
        grad = torch.where(p == 0, 0, slope * p)
        if grad_logprob is not None and columns:
            own = torch.where(here[part], grad_logprob[part], 0).to(dtype)
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
