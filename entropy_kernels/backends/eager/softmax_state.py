"""The mergeable softmax state in torch: merge over parts of the vocabulary, and the statistics that it yields.

A state is a tensor of shape (K, N), K = 4 or 6, rows ``m, s, w, x_y[, s2, w2]`` (docs/math.md): ``m`` is the largest
logit and ``x_y`` the target's, both after softcap but before the division by the temperature, so that bf16 maxima are
exact; the sums are over ``x = (z - m) / T``. Parts merge by rescaling to the larger ``m`` and adding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entropy_kernels._rows import SECOND_ORDER, RowOptions, wanted

# The first exp of a process that runs on several threads is now and then off by 1e-4 in the second thread's half
# (seen with torch 2.13 and MKL on a Xeon, in a third of fresh processes, in torch alone). One on one thread cures it.
torch.zeros(1).exp_()


def row_sums(terms: Tensor) -> Tensor:
    """Sums (rows,) of contiguous ``terms`` (rows, n); a row's have the same bits for any number of rows and threads.

    On the CPU torch adds up a contiguous row in an order that depends on n alone, unless there is no other row: then
    threads share it. Sums of 64 terms are added in fp64: in fp32 a large term would round all that is added to it in
    one direction. On a GPU the number of rows decides how many threads a contiguous row has, so there one half of each
    row is added to the other, over ``terms``, until a column is left: first see :func:`fold`.
    """
    if not terms.is_cpu:
        return _halved(fold(terms))
    whole = terms.shape[1] // 64 * 64
    sums = [terms[:, :whole].unflatten(1, (-1, 64)).sum(-1)] if whole else []
    parts = torch.cat([*sums, terms[:, whole:].sum(-1, keepdim=True)], 1).double()
    shared = parts.shape[0] == 1 and torch.get_num_threads() > 1
    return (parts.expand(2, -1).sum(-1)[:1] if shared else parts.sum(-1)).to(terms.dtype)


def fold(terms: Tensor, add: Callable[..., Tensor] = torch.sum) -> Tensor:
    """Contiguous ``terms`` (..., n) with 64 columns, far from each other, added up into one, if there are 128 or more.

    One launch, one read. torch gives each of its threads whole columns then, and how it does so depends on n alone. Of
    the 64 it adds up few one after the other, so in fp32 no large term rounds many.
    """
    whole = terms.shape[-1] // 64 * 64
    if whole < 128:
        return terms
    sums = add(terms[..., :whole].unflatten(-1, (64, -1)), -2)
    return sums if whole == terms.shape[-1] else torch.cat([sums, terms[..., whole:]], -1)


def _halved(terms: Tensor) -> Tensor:
    """Row sums, made over ``terms``."""
    while (columns := terms.shape[-1]) > 1:
        half = columns // 2
        terms[..., :half] += terms[..., columns - half :]
        terms = terms[..., : columns - half]
    return terms.sum(-1)


def merge(states: Tensor, temperature: Tensor) -> Tensor:
    """Merge states (R, K, N) of R parts of the vocabulary into one (K, N); ``temperature`` has 1 or N elements."""
    m = states[:, 0]  # (R, N)
    top = m.amax(0)  # NaN wins, so a poisoned part poisons the whole
    # A part without a finite element is the identity; its (m - top) would be inf - inf.
    empty = m == -torch.inf
    delta = torch.where(empty, 0, (top - m) / temperature)  # >= 0
    scale = torch.where(empty, 0, torch.exp(-delta))
    # exp(-delta) underflows before delta overflows to inf: 0 * inf would be NaN
    delta = torch.where(scale == 0, 0, delta)
    terms = [scale * states[:, 1], scale * (states[:, 2] + delta * states[:, 1])]
    if states.shape[1] == 6:
        square = scale * scale
        terms += [square * states[:, 4], square * (states[:, 5] + delta * states[:, 4])]
    s, w, *second = [row_sums(term.T.contiguous()) for term in terms]
    return torch.stack([top, s, w, states[:, 3].amax(0), *second])


def finalize(state: Tensor, temperature: Tensor, want: int, ignored: Tensor, invalid: Tensor) -> Tensor:
    """The statistics (S, N) of a state that ``want`` names.

    ``ignored`` rows give 0, ``invalid`` rows (label out of range) NaN; both are bool (N,). Made in fp64: log s and H
    are about 12 at large vocabularies, where each rounding to fp32 costs 5e-7.
    """
    dtype, state = state.dtype, state.double()
    m, s, w, x_y = state[:4]
    log_s = torch.log(s)
    logprob = (x_y - m) / temperature - log_s
    entropy = log_s + w / s
    formulas = {
        "logprob": lambda: logprob,
        "entropy": lambda: entropy,
        "p_max": lambda: s / s / s,  # NaN, as the others, of a row of nothing but -inf
        "mean_logit": lambda: m - temperature * (w / s),
    }
    if want & SECOND_ORDER:
        s2, w2 = state[4:]
        collision = s2 / (s * s)
        q = -(w2 + log_s * s2) / (s * s)  # sum of p² log p
        p_y = torch.exp(logprob)
        own = torch.where(p_y == 0, 0, p_y * (logprob + entropy))
        covariance = own - (q + entropy * collision)
        formulas |= {"collision": lambda: collision, "vocab_covariance": lambda: covariance}
    bad = invalid | ~(temperature > 0)
    found = [formulas[statistic.name]() for statistic in wanted(want)]
    stats = torch.stack(found) if found else state.new_empty((0, state.shape[1]))
    return torch.where(ignored, 0, torch.where(bad, torch.nan, stats)).to(dtype)


def finished(
    state: Tensor, temperature: Tensor, want: int, target: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """The statistics that ``want`` names, and the state, in which ignored rows are the state of one entry of 0."""
    ignored, invalid = options.ignored_invalid(target)
    neutral = state.new_zeros((state.shape[0], 1))  # filled there: a list would be copied from the host, a sync
    neutral[1::3] = 1  # s and s2
    state = torch.where(ignored, neutral, state)
    return finalize(state, temperature, want, ignored, invalid), state


def own_columns(target: Tensor, columns: int, options: RowOptions) -> tuple[Tensor, Tensor]:
    """Each label's column of these ``columns``, and whether it has one: it is not ignored, and of this shard."""
    local = target.long() - options.vocab_start
    return local, (local >= 0) & (local < columns) & (target != options.ignore_index)


def no_gradient(grad_stats: Tensor, want: int) -> Tensor:
    """The tokens of which no statistic has a gradient other than 0; ``grad_stats`` (S, N)."""
    return torch.stack([g == 0 for g, x in zip(grad_stats, wanted(want), strict=True) if x.differentiable]).all(0)
