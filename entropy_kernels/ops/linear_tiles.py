"""Statistics and gradients of hidden @ weightᵀ + bias, a tile of tokens × vocabulary at a time.

Products are torch's, statistics the registry's ``token_stats`` kernels, which take a tile as a part of the vocabulary
and give the state that merges (docs/math.md §2). How large a tile is: :mod:`.linear_plan`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_kernels._arguments import process_group_of, traced
from entropy_kernels._rows import RowOptions, state_rows
from entropy_kernels.backends import registry, reused_memory
from entropy_kernels.backends.eager.softmax_state import finalize, merge, no_gradient
from entropy_kernels.ops.linear_plan import Problem, padded, tiles
from entropy_kernels.ops.products import multiply, multiply_add
from entropy_kernels.ops.token_stats import merge_shards


class Numbers(NamedTuple):
    """What of a call is neither a tensor nor decided by one."""

    row: RowOptions
    product: torch.dtype  # of the operands
    logits: torch.dtype  # that the products are rounded to
    budget: int  # bytes
    group: str
    backend: str

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Numbers:
        """From the arguments of an operator."""
        width = len(RowOptions._fields)
        return cls(RowOptions(*flat[:width]), *flat[width:])

    @property
    def flat(self) -> tuple[Any, ...]:
        """As an operator has them."""
        return (*self.row, *self[1:])


Needs = tuple[bool, bool, bool]  # gradients of hidden, weight, bias


def problem(hidden: Tensor, weight: Tensor, numbers: Numbers, needs: Needs) -> Problem:
    """What the plan depends on, for ``hidden`` (N, H) and ``weight`` (V, H)."""
    return Problem(
        hidden.shape[0], hidden.shape[1], numbers.row.columns(weight.shape[0]), hidden.dtype, weight.dtype,
        numbers.product, numbers.logits, hidden.device.type, *needs, bool(numbers.group), numbers.budget,
    )  # fmt: skip


def parts(total: int, size: int) -> list[slice]:
    """At least one: a rank may hold no column at all."""
    return [slice(begin, min(begin + size, total)) for begin in range(0, max(1, total), size)]


def parts_of_sequences(total: int, size: int, cuts: int | Sequence[int] | None) -> list[slice]:
    """At least one, of at most ``size`` tokens; ``cuts`` as in ops/linear_policy_loss.py, one length dividing ``size``.

    A compiler learns of ``total`` how it compares to multiples of ``size``, and no more.
    """
    found, begin = [], 0
    while begin + size < total:
        end = begin + size
        if cuts is not None and not isinstance(cuts, (int, torch.SymInt)):
            end = max(cut for cut in cuts if cut <= end)
        found.append(slice(begin, end))
        begin = end
    return [*found, slice(begin, total)]


def without_autocast(tensor: Tensor) -> Any:
    """Inside, every operand has the dtype that it is to have."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised (rows, columns) with aligned rows, in memory that served an earlier call where that fits.

    On a CPU the padding behind the rows is 0, because a product may read it. A compiler plans memory by itself.
    """
    shape = torch.Size((rows, padded(columns)))
    if device.type != "cpu" or traced():
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = reused_memory.empty(shape, dtype)
    buffer[:, columns:] = 0
    return buffer


def kept_rows(dropped: Tensor) -> Tensor | None:
    """Indices of the rows that are not ``dropped``; None for all of them, and on a GPU, where to ask costs a sync."""
    if dropped.device.type != "cpu" or traced() or not dropped.any():
        return None
    return (~dropped).nonzero()[:, 0]


def picked(rows: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """``rows`` of each tensor along its first dimension."""
    return [x if x is None or rows is None else x.index_select(0, rows) for x in tensors]


def at(temperature: Tensor, rows: slice | Tensor | None) -> Tensor:
    """``temperature`` (1,) or (N,) of some rows."""
    return temperature if temperature.numel() == 1 or rows is None else temperature[rows]


def spread(rows: Tensor | None, value: Tensor, total: int, dim: int = 0) -> Tensor:
    """The opposite of :func:`picked`, along ``dim``: 0 in the rows that were dropped."""
    if rows is None:
        return value
    shape = (*value.shape[:dim], total, *value.shape[dim + 1 :])
    return value.new_zeros(shape).index_copy_(dim, rows, value)


def merged(
    state_of: Callable[[slice, slice], Tensor],
    row_parts: list[slice],
    column_parts: list[slice],
    temperature: Tensor,  # (1,) or (N,)
    want: int,
) -> Tensor:
    """The state (K, N) of all tiles; ``state_of(rows, columns)`` gives the state (K, n) of one."""
    state = temperature.new_empty((state_rows(want), sum(r.stop - r.start for r in row_parts)))
    for rows in row_parts:
        states = state.new_empty((len(column_parts), state.shape[0], rows.stop - rows.start))
        for i, columns in enumerate(column_parts):
            states[i] = state_of(rows, columns)
        state[:, rows] = states[0] if len(column_parts) == 1 else merge(states, at(temperature, rows))
    return state


def finished(
    state: Tensor,  # (K, N), of all of this rank's columns
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    numbers: Numbers,
    want: int,
    end: int,
) -> tuple[Tensor, Tensor]:
    """The statistics (S, N) and the state, of the columns of all ranks.

    ``end``: first global id beyond this rank's shard.
    """
    if numbers.group:
        return merge_shards(state, target, temperature, numbers.row, end, want, numbers.group)
    return finalize(state, temperature, want, *numbers.row.ignored_invalid(target)), state


def state_of_logits(z: Tensor, target: Tensor, temperature: Tensor, numbers: Numbers, start: int, want: int) -> Tensor:
    """The state (K, n) of a tile z (n, v) that begins at column ``start`` of the shard."""
    run = registry.kernel("token_stats", "token_stats_forward", numbers.backend, z)
    return run(z[None], target, temperature, numbers.row.of_part(start), want)[1]


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    numbers: Numbers,
    want: int,
    kept: Tensor | None,  # (N, V) or wider: takes the logits of the rows that are not ignored
    needs: Needs,
) -> tuple[Tensor, Tensor]:
    """The statistics and the state, as :func:`finished` gives them."""
    total, end = target.numel(), numbers.row.vocab_start + weight.shape[0]
    everything = target, temperature
    rows = kept_rows(target == numbers.row.ignore_index)
    hidden, target = picked(rows, hidden, target)
    temperature = at(temperature, rows)
    p = problem(hidden, weight, numbers, needs)
    row_size, column_size = tiles(p, kept is not None)
    fused = None if kept is not None else _fused(p, numbers, hidden.device)
    scratch = row_size * padded(column_size) * numbers.logits.itemsize  # bytes that a tile takes, or would take
    if fused is not None and weight.dtype == p.operand:
        column_size = max(1, p.columns)  # there is no tile, and no copy of a part of the weight
    buffer = kept
    if kept is None and fused is None:
        buffer = workspace(row_size, column_size, numbers.logits, hidden.device)

    def state_of(r: slice, c: slice) -> Tensor:
        h, w, b = hidden[r].to(p.operand), weight[c].to(p.operand), None if bias is None else bias[c]
        labels, t = target[r], at(temperature, r)
        if fused is not None:
            return fused(h, w, b, labels, t, numbers.row.of_part(c.start), want, numbers.logits, scratch)[1]
        assert buffer is not None
        z = _tile(buffer, r, c, kept is not None)
        multiply(z, h, w.t(), b)
        return state_of_logits(z, labels, t, numbers, c.start, want)

    state = merged(state_of, parts(p.rows, row_size), parts(p.columns, column_size), temperature, want)
    if numbers.group:  # which compares the labels of all rows
        return finished(spread(rows, state, total, 1), *everything, numbers, want, end)
    stats, state = finished(state, target, temperature, numbers, want, end)
    return spread(rows, stats, total, 1), spread(rows, state, total, 1)


def _fused(p: Problem, numbers: Numbers, device: torch.device) -> Callable | None:
    """A kernel that makes states without logits, where one serves; there is none for fp64."""
    if p.product == torch.float64:
        return None
    return registry.fused("linear_token_stats", numbers.backend, device)


def _tile(buffer: Tensor, r: slice, c: slice, whole: bool) -> Tensor:
    """The tile of rows ``r`` and columns ``c``, in a buffer of all logits or of one tile."""
    if whole:
        return buffer[r, c]
    columns = c.stop - c.start
    if buffer.is_cpu:  # as workspace has it
        buffer[:, columns : padded(columns)] = 0
    return buffer[: r.stop - r.start, :columns]


def backward(
    grad_stats: Tensor,  # (S, N)
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    state: Tensor,  # (K, N)
    kept: Tensor | None,  # (N, V) or wider, as the forward pass filled it
    overwrite: bool,  # write the logits' gradient over them
    numbers: Numbers,
    want: int,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each one that is not needed."""
    need_hidden, need_weight, need_bias = needs
    total = target.numel()
    silent = target == numbers.row.ignore_index
    everywhere = kept is not None or numbers.group  # the rows must be those of the forward pass, or of other ranks
    rows = kept_rows(silent) if everywhere else None
    # No gradient comes in: none goes out, whatever the row holds, so NaN in padding does not leak
    silent = silent | no_gradient(grad_stats, want)
    if not everywhere:
        rows = kept_rows(silent)
    hidden, target, silent, states, upstream = picked(rows, hidden, target, silent, state.t(), grad_stats.t())
    temperature = at(temperature, rows)
    state, grad_stats = states.t(), upstream.t()
    p = problem(hidden, weight, numbers, needs)
    row_size, column_size = tiles(p, kept is not None and overwrite)
    row_parts, column_parts = parts(p.rows, row_size), parts(p.columns, column_size)
    tiled = len(column_parts) > 1
    buffer = workspace(row_size, column_size, numbers.logits, hidden.device) if kept is None else kept
    h = hidden.to(p.operand)
    safe = h  # as a factor of the head's gradient: 0 · NaN would be NaN
    if need_weight and (hidden.device.type != "cpu" or silent.any()):
        safe = torch.where(silent[:, None], 0, h)
    wide = p.wide

    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    # summed over tiles and ranks in fp32, rounded once
    sum_hidden = torch.empty_like(d_hidden, dtype=wide) if tiled or numbers.group else d_hidden
    d_weight = weight.new_empty(weight.shape if need_weight else (0,))
    d_bias = weight.new_empty(0) if bias is None or not need_bias else torch.empty_like(bias)
    for gradient in (d_weight, d_bias):
        gradient[p.columns :] = 0  # padding
    reduction = None
    for j, c in enumerate(column_parts):
        w = weight[c].to(p.operand)
        sum_weight = d_weight[c]
        if need_weight and len(row_parts) > 1 and weight.dtype.itemsize < wide.itemsize:
            sum_weight = torch.empty_like(sum_weight, dtype=wide)
        sum_bias = torch.zeros(c.stop - c.start if need_bias else 0, dtype=wide, device=h.device)
        for i, r in enumerate(row_parts):
            z = _tile(buffer, r, c, kept is not None)
            if kept is None:
                multiply(z, h[r], w.t(), None if bias is None else bias[c])
            run = registry.kernel("token_stats", "token_stats_backward", numbers.backend, z)
            dz = run(
                grad_stats[:, r], z[None], target[r], at(temperature, r), state[:, r].contiguous(),
                numbers.row.of_part(c.start), want, kept is None or overwrite,
            )[0].to(p.operand)  # fmt: skip
            if need_hidden:
                (multiply if j == 0 else multiply_add)(sum_hidden[r], dz, w)
                if numbers.group and j + 1 == len(column_parts) and i + 1 == len(row_parts):
                    # while the head's gradient is computed
                    reduction = dist.all_reduce(sum_hidden, group=process_group_of(numbers.group), async_op=True)
            if need_weight:
                (multiply if i == 0 else multiply_add)(sum_weight, dz.t(), safe[r])
            if need_bias:
                # torch's sum accumulates in fp32 anyway; told to return it, it first makes an fp32 copy on a CPU
                sum_bias += dz.sum(0, dtype=None if len(row_parts) == 1 and dz.dtype == d_bias.dtype else wide)
            del z, dz  # before the next tile is made
        if sum_weight.dtype != d_weight.dtype:
            d_weight[c] = sum_weight
        if need_bias:
            d_bias[c] = sum_bias
        del w, sum_weight
    if reduction is not None:
        reduction.wait()
    if need_hidden:
        if sum_hidden is not d_hidden:
            d_hidden.copy_(sum_hidden)
        d_hidden = spread(rows, d_hidden, total)
    return d_hidden, d_weight, d_bias
