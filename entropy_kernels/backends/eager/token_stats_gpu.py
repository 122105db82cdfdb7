"""Statistics of softmax rows on a GPU in torch's operations: a few passes over large tiles of rows.

Launches are a constant, and another for each tile of ``TILE_BYTES``; temporaries are two tiles, three with a softcap
(docs/gpu.md, "Plain torch"). Operations take tensors of two dtypes where that saves a pass: on a GPU torch converts as
it loads and stores.

A row's bits do not depend on the other rows: beside sums (``row_sums``) and maxima, which are exact, everything is done
per element.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_kernels._arguments import beside
from entropy_kernels._rows import SECOND_ORDER, RowOptions, state_rows, wanted
from entropy_kernels.backends.eager.softmax_state import finished, fold, no_gradient, own_columns, row_sums

TILE_BYTES = 1 << 28  # of each temporary
_FAR_BELOW = -800.0  # its exp is 0 in fp64, too


def _tiles(logits: Tensor, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the first two dimensions of (B, L, V) logits."""
    batch, length, vocab = logits.shape
    rows = max(1, TILE_BYTES // (itemsize * max(1, vocab)))
    if length > rows:
        for row in range(batch):
            for begin in range(0, length, rows):
                yield slice(row, row + 1), slice(begin, min(begin + rows, length))
        return
    step = rows // max(1, length)
    for begin in range(0, batch, step):
        yield slice(begin, min(begin + step, batch)), slice(0, length)


def _temporaries(count: int, z: Tensor, dtype: torch.dtype) -> list[Tensor]:
    rows = max(((b.stop - b.start) * (n.stop - n.start) for b, n in _tiles(z, dtype.itemsize)), default=0)
    return [torch.empty(rows * z.shape[2], dtype=dtype, device=z.device) for _ in range(count)]


def _divisor(temperature: Tensor, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The temperature beside (B, L, V); None for the host's number 1: a division by 1 changes nothing."""
    if temperature.is_cpu and temperature.numel() == 1 and float(temperature) == 1:
        return None
    return beside(temperature, device).view((1,) if temperature.numel() == 1 else (*shape[:2], 1))


def token_stats_forward(
    logits: Tensor, target: Tensor, temperature: Tensor, options: RowOptions, want: int
) -> tuple[Tensor, Tensor]:
    """As :func:`..token_stats.token_stats_forward`."""
    batch, length, vocab = logits.shape
    device, dtype, columns, softcap = logits.device, temperature.dtype, options.columns(vocab), options.softcap
    state = torch.zeros((state_rows(want), target.numel()), dtype=dtype, device=device)
    state[::3] = -torch.inf  # m and x_y of a shard of no columns
    z = logits[..., :columns]
    tiles = list(_tiles(z, dtype.itemsize)) if z.numel() else []
    if tiles:
        local, here = own_columns(target, columns, options)
        index = local.clamp(0, columns - 1).view(batch, length, 1)
        m = _capped(z.amax(-1), softcap, dtype)
        state[0] = m.reshape(-1)
        picked = _capped(z.gather(-1, index), softcap, dtype)
        state[3] = torch.where(here, picked.reshape(-1), -torch.inf)
        # All -inf: keep the differences at -inf, so that every sum is 0 (the identity state)
        m = torch.where(m == -torch.inf, 0, m).unsqueeze(-1)
    t = _divisor(temperature, logits.shape, device)
    temporaries = _temporaries(2, z, dtype)
    for part in tiles:
        d, e = _shaped(temporaries, z[part])
        if softcap:
            _cap(d.copy_(z[part]), softcap).sub_(m[part])
        else:
            torch.sub(z[part], m[part], out=d)
        if t is not None:
            d.div_(_of(t, part))
        torch.exp(d, out=e)
        sums = torch.stack([fold(e), _without_nan(d.mul_(e))])
        if want & SECOND_ORDER:
            d.mul_(e)
            sums = torch.cat([sums, torch.stack([fold(e.square_()), _without_nan(d)])])
        row = part[0].start * length + part[1].start
        rows = slice(row, row + e.shape[0] * e.shape[1])
        added = row_sums(sums.flatten(0, 2).double()).view(-1, rows.stop - rows.start)
        state[1, rows] = added[0]
        state[2, rows] = added[0] - added[0] - added[1]  # NaN if the first is
        if want & SECOND_ORDER:
            state[4, rows] = added[2]
            state[5, rows] = -added[3]
    return finished(state, beside(temperature, device), want, target, options)


def _without_nan(products: Tensor) -> Tensor:
    """As ``fold``, but NaN adds nothing: those of impossible entries, which are -inf * 0."""
    return fold(products, torch.nansum).nan_to_num_(0.0)  # there is NaN in columns that are left


def _of(per_row: Tensor, part: tuple[slice, slice]) -> Tensor:
    return per_row if per_row.numel() == 1 else per_row[part]


def _shaped(temporaries: list[Tensor], tile: Tensor) -> list[Tensor]:
    return [x[: tile.numel()].view(tile.shape) for x in temporaries]


def _cap(z: Tensor, softcap: float) -> Tensor:
    return z.div_(softcap).tanh_().mul_(softcap)


def _capped(z: Tensor, softcap: float, dtype: torch.dtype) -> Tensor:
    z = z.to(dtype)
    return softcap * torch.tanh(z / softcap) if softcap else z


def token_stats_backward(
    grad_stats: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    options: RowOptions,
    want: int,
    inplace: bool,
) -> Tensor:
    """As :func:`..token_stats.token_stats_backward`.

    With u = log p + H and q = e^u, so p = q e^-H, an element's gradient is q (a + b u + c q), with a, b and c of the
    row. u is a difference of large numbers, so it is made in fp64 and rounded once; q <= e^H cannot overflow.
    """
    batch, length, vocab = logits.shape
    dtype, columns, softcap = temperature.dtype, options.columns(vocab), options.softcap
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    z, written = logits[..., :columns], dlogits[..., :columns]
    t = beside(temperature, logits.device).double().view(-1)
    m, s, w = state[:3].double()
    log_s = torch.log(s)
    grads = {x.name: g.double() for x, g in zip(wanted(want), grad_stats, strict=True) if x.differentiable}
    entropy, a, b, c = (torch.zeros_like(s) for _ in range(4))
    if "logprob" in grads:
        a = a - grads["logprob"]
    if "entropy" in grads:
        entropy = torch.where(grads["entropy"] == 0, 0, log_s + w / s)
        b = -grads["entropy"]
    if "collision" in grads:
        a = a - 2 * torch.where(grads["collision"] == 0, 0, grads["collision"] * (state[4].double() / (s * s)))
        c = 2 * grads["collision"] * torch.exp(-entropy)
    # Rows without a gradient get 0 whatever they hold: u far below, and no coefficient. Those whose state is poisoned
    # get NaN, which u does not keep.
    silent = (target == options.ignore_index) | no_gradient(grad_stats, want)
    weight = torch.exp(-entropy) / t + 0 * (m + log_s)
    a, b, c = (torch.where(silent, 0, weight * x) for x in (a, b, c))
    centre = torch.where(silent, torch.inf, m + t * (log_s - entropy))

    tiles = list(_tiles(z, dtype.itemsize)) if z.numel() else []
    if tiles and "logprob" in grads:
        local, here = own_columns(target, columns, options)
        index = local.clamp(0, columns - 1).view(batch, length, 1)
        own_term = here & ~silent & (grads["logprob"] != 0)
        x_y = state[3].double()
        u = (x_y - centre) / t
        q = torch.exp(u)
        own = torch.where(q == 0, 0, q * (a + b * u + c * q)) + grads["logprob"] / t
        if softcap:
            own = own * (1 - (x_y / softcap).square())
    a, b, c = (x.to(dtype).view(batch, length, 1) for x in (a, b, c))
    centre = centre.view(batch, length, 1)
    divisor = _divisor(temperature, logits.shape, logits.device)
    far_below, nothing = torch.tensor(_FAR_BELOW, dtype=dtype), torch.tensor(0.0, dtype=dtype)  # numbers of the host
    one = torch.ones(1, dtype=dtype, device=z.device)
    temporaries = _temporaries(3 if softcap else 2, z, dtype)
    for part in tiles:
        u, q, *capped = _shaped(temporaries, z[part])
        if softcap:
            tanh = capped[0].copy_(z[part]).div_(softcap).tanh_()
            torch.mul(tanh, softcap, out=u)
            u.sub_(centre[part])
        else:
            torch.sub(z[part], centre[part], out=u)
        if divisor is not None:
            u.div_(_of(divisor, part))
        torch.fmax(u, far_below, out=u)
        torch.exp(u, out=q)
        torch.addcmul(a[part], u, b[part], out=u)
        if "collision" in grads:
            u.addcmul_(q, c[part])
        if softcap:
            torch.addcmul(one, tanh, tanh, value=-1, out=tanh)
            u.mul_(torch.fmax(tanh, nothing, out=tanh))  # NaN of a row without a gradient is 0
        torch.mul(u, q, out=written[part])
    if tiles and "logprob" in grads:
        own = torch.where(own_term, own.to(dlogits.dtype), written.gather(-1, index).view(-1))
        written.scatter_(-1, index, own.view(batch, length, 1))
    dlogits[..., columns:] = 0
    return dlogits
