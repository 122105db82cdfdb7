"""Selection in steps: exact over any number of ranks, without a value ever read back by the host.

A backend gives the steps (:class:`Steps`); the order of steps, and the reductions between them, are here, once.
Tokens are flat: (N,). Keys are int64, 0 .. 2³² - 1, or -1 for a token that is no candidate; the selection is the n
largest keys, ties to the lower token index. The n-th largest key is found digit by digit: a histogram of the next 11
bits of the keys that share the digits found so far, added over the ranks, tells the next digit. Order statistics
of the quantile range and the tie-break on the 64-bit token index use the same rounds, and a budget does with sums of
scores in the place of numbers of keys.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_kernels._arguments import beside, process_group_of, values_are_checked

RADIX_BINS = 2048
KEY_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of each round
INDEX_DIGITS = ((53, 11), (42, 11), (31, 11), (20, 11), (9, 11), (0, 9))
# Default token indices are positions and stay below 2⁴⁴ (a batch of 17 T tokens): four rounds do.
POSITION_DIGITS = ((33, 11), (22, 11), (11, 11), (0, 11))

NO_KEY = 1 << 32  # a threshold that no key reaches
ZERO_KEY = 1 << 31  # of the score 0: those of scores above it are larger
LAST_INDEX = (1 << 63) - 1
ALL_TOKENS = 1 << 53  # more than any batch holds: a selection of so many returns all candidates

# Columns of a (rows, 3) int64 search state: digits found so far, how many of the keys that share them are still
# needed, how many there are.
PREFIX, NEED, EQUAL = range(3)

# csrc/common/fixed_point.h derives these
_TERM_BITS = 51
_SUM_BITS = 62
_LARGEST_EXPONENT = 1000


class Count(NamedTuple):
    """How many tokens to select: ``k``, or a share of those that count.

    ``numbers``: float64 [ratio, k, ...], k NaN if it is not given; where it is there, it is read in the place of ratio
    and k. It has not been checked: a share is clamped to [0, 1] and k to >= 0, NaN being 0.
    """

    ratio: float | None
    k: int | None
    at_least_one: bool
    numbers: Tensor | None = None

    def beside(self, device: torch.device) -> Count:
        """With the numbers on a device."""
        return self if self.numbers is None else self._replace(numbers=beside(self.numbers, device))

    def of(self, valid: Tensor) -> Tensor:
        """() int64 from the () int64 number of tokens that count."""
        if self.numbers is not None:
            share = _share(valid, _within_shares(self.numbers[0]), self.at_least_one)
            k = self.numbers[1]
            wanted = torch.where(k.isnan(), share, k.nan_to_num(nan=0.0).clamp(0, ALL_TOKENS).long())
        elif self.k is not None:
            wanted = torch.full_like(valid, self.k)
        else:
            assert self.ratio is not None
            wanted = _share(valid, self.ratio, self.at_least_one)
        return torch.where(valid > 0, wanted, 0)


def _share(valid: Tensor, ratio: Any, at_least_one: bool) -> Tensor:
    return (valid.double() * ratio).floor().long().clamp(min=int(at_least_one))


def _within_shares(value: Tensor) -> Tensor:
    return value.nan_to_num(nan=0.0).clamp(0, 1)


class Band(NamedTuple):
    """Range of covariance of Clip-Cov's candidates; ``quantile``: low and high are shares in [0, 1].

    ``numbers``: float64 [ratio, k, low, high], of which the last two are read in the place of low and high. They have
    not been checked: shares are clamped to [0, 1], and there is no candidate unless low < high.
    """

    low: float
    high: float
    quantile: bool
    closed: bool
    numbers: Tensor | None = None


class Budget(NamedTuple):
    """How much of the score to select: ``numbers``, float64 [budget, limit, share], NaN for those that are not given.

    The first that is there counts; without any, nothing is selected.
    """

    numbers: Tensor

    def of(self, exponent: Tensor, total: Tensor, candidates: Tensor) -> Tensor:
        """(1,) int64: what the selected scores have to come to, at least, in units of 2^-exponent.

        ``total`` and ``candidates``: (1,) sums over all tokens that count, and over the candidates, in these units.
        """
        budget, limit, share = self.numbers.split(1)
        scale, most = power_of_two(exponent), 2.0**_SUM_BITS  # no sum of scores comes to so much
        # A product that underflows is still above 0, or below it
        up = (budget * scale).ceil().clamp(1, most)
        down = (limit * scale).floor().clamp(-most, most)
        down = torch.where(limit < 0, down.clamp(max=-1), down).nan_to_num(nan=most).long()
        part = torch.where(share > 0, _share_of(candidates, share), 0)
        part = torch.where(limit.isnan(), part, total - down)
        return torch.where(budget.isnan(), part, torch.where(budget > 0, up, 0.0).long())


def _share_of(total: Tensor, share: Tensor) -> Tensor:
    """ceil(share · total), exact, of an int64 total in [0, 2⁶²) and a float64 share above 0, of which 1 is the most.

    The share is m·2^-(52 + shift). m and the total are multiplied in halves; ceil(ceil(x / a) / b) is ceil(x / (a·b)).
    """
    bits = share.clamp(max=1).view(torch.int64)
    exponent = (bits >> 52) & 0x7FF
    m = (bits & ((1 << 52) - 1)) | torch.where(exponent > 0, 1 << 52, 0)
    shift = (1023 - exponent.clamp(min=1)).clamp(0, 63)
    m1, m0, t1, t0 = m >> 27, m & ((1 << 27) - 1), total >> 31, total & ((1 << 31) - 1)
    low = (m0 * t1 << 4) + _ceil_shift(m0 * t0, 27)  # ceil(m0·total / 2²⁷)
    return _ceil_shift((m1 * t1 << 6) + _ceil_shift(m1 * t0 + low, 25), shift)


def _ceil_shift(value: Tensor, bits: Any) -> Tensor:
    return -(-value >> bits)


class InCommon(NamedTuple):
    """What the ranks of a selection have in common."""

    seed: Tensor | None  # None: the largest keys, and no range
    size: Count | Budget
    band: Band | None

    def packed(self, device: torch.device) -> Tensor:
        """(E,) int64, E depending on the device alone: flags (one number on a GPU), seed, ratio, k, low and high.

        Of a budget the last four are budget, limit, share and NaN.
        """
        unknown = math.nan  # also for None, as in `numbers`
        low, high, quantile, closed = (unknown, unknown, False, False) if self.band is None else self.band[:4]
        by_budget = isinstance(self.size, Budget)
        ratio, k, at_least_one = (None, None, False) if isinstance(self.size, Budget) else self.size[:3]
        flags = [self.seed is None and not by_budget, by_budget, quantile, closed, at_least_one]
        floats = [unknown if x is None else float(x) for x in (ratio, k, low, high)]
        own = self.size.numbers
        if device.type == "cpu":
            if own is not None:
                floats[: own.numel()] = own.tolist()
            seed = 0 if self.seed is None else int(self.seed)
            return torch.tensor([*map(int, flags), seed, *struct.unpack("<4q", struct.pack("<4d", *floats))])
        told = [torch.full((1,), x, dtype=torch.float64, device=device) for x in floats]
        if own is not None:
            told[: own.numel()] = own.split(1)
        digest = torch.full((1,), sum(flag << i for i, flag in enumerate(flags)), device=device)
        drawn = torch.zeros_like(digest) if self.seed is None else self.seed.view(1)
        return torch.cat([digest, drawn, torch.cat(told).view(torch.int64)])

    @staticmethod
    def numbers(packed: Tensor) -> Tensor:
        """(..., 4) float64 [ratio, k, low, high] of what is packed."""
        return packed[..., -4:].contiguous().view(torch.float64)

    def refuse(self, of_ranks: list[list[int]]) -> None:
        """Raise the same on all ranks, given what each has packed."""
        flags = ("kl_cov_mask", "budget_tokens", "band", "closed", "at_least_one")
        numbers = ("budget", "limit", "share", "") if isinstance(self.size, Budget) else ("ratio", "k", "low", "high")
        names = (*flags, "seed", *numbers)
        called = ("not called", "called")
        for i, values in enumerate(zip(*of_ranks, strict=True)):
            shown: list[Any] = list(values)
            number = i >= len(of_ranks[0]) - 4
            if number:
                shown = [struct.unpack("<d", struct.pack("<q", x))[0] for x in values]
                shown = [None if math.isnan(x) else x for x in shown]
            rounded = {None if x is None else ctypes.c_float(x).value for x in shown} if number else set(shown)
            if len(rounded) == 1:
                continue
            name, got = "options", ""  # flags of a GPU tell no more
            if len(of_ranks[0]) == len(names):
                name = names[i]
                if name == "k":
                    shown = [None if x is None else int(x) for x in shown]
                elif i < len(flags):
                    words = {"band": ("absolute", "quantile"), "kl_cov_mask": called, "budget_tokens": called}
                    shown = [words.get(name, (False, True))[x] for x in values]
                got = f", got {shown}"
            raise ValueError(f"{name}: expected the same on all ranks of the batch_group{got}")


class Steps(Protocol):
    """What a backend implements. All tensors are contiguous and on one device; masks are bool, None = all / none."""

    def covariance_extremes(self, logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
        """(3,) float64: max |logprob|, max |advantages|, number of tokens, over mask; inf for a non-finite value."""

    def covariance_sums(self, logprob: Tensor, advantages: Tensor, mask: Tensor | None, scales: Tensor) -> Tensor:
        """(2,) int64: sums of logprob and advantages times their power of two, each term rounded half to even."""

    def covariance_apply(self, logprob: Tensor, advantages: Tensor, mask: Tensor | None, means: Tensor) -> Tensor:
        """(N,) fp32: product of the deviations from the (2,) float64 means, in float64, rounded once; 0 off mask."""

    def selection_value_keys(self, covariance: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
        """(N,) keys in the order of the fp32 covariance (-0 = +0); -1 for NaN, masked and excluded tokens."""

    def selection_random_keys(
        self, value_keys: Tensor, band: Tensor, token_index: Tensor | None, offset: Tensor, seed: Tensor
    ) -> Tensor:
        """(N,) Philox keys of the tokens whose value key lies in the (2,) inclusive band, -1 for the others."""

    def largest_first(self, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """(N,) keys from the largest on, equal ones in their order, and their positions; None where a search by digits
        is quicker. What one process selects alone is read off from there."""

    def selection_key_histogram(self, keys: Tensor, state: Tensor, shift: int, bits: int) -> Tensor:
        """(rows, 2048) int64: digits of the keys that share each row's prefix."""

    def selection_weight_histogram(self, keys: Tensor, state: Tensor, scale: Tensor, shift: int, bits: int) -> Tensor:
        """The same of one row, but the sums of the keys' weights: of each the score above 0 times the () float64 scale,
        rounded half to even."""

    def selection_index_histogram(
        self,
        keys: Tensor,
        token_index: Tensor | None,
        offset: Tensor,
        key_state: Tensor,
        state: Tensor,
        shift: int,
        bits: int,
        known: int,
    ) -> Tensor:
        """(1, 2048) int64: digits of the reversed token index, of the tokens whose key is ``key_state``'s prefix and
        whose ``known`` bits above the digit are ``state``'s."""

    def selection_mask(
        self, keys: Tensor, token_index: Tensor | None, offset: Tensor, threshold: Tensor, last_index: Tensor
    ) -> Tensor:
        """(N,) bool: key above the threshold, or equal to it and token index at most ``last_index``."""

    def find_digit(self, histogram: Tensor, state: Tensor, bits: int) -> Tensor:
        """The next search state."""


class Group:
    """The reductions over a process group, or over this process alone (name "")."""

    # After the first sum of a selection over ranks: () bool, and the numbers of the first of them, which all use: 0.1
    # and a fp32 tensor of it are the same to whoever calls, and not the same share of many tokens
    agree: Tensor | None = None
    numbers: Tensor | None = None

    def __init__(self, name: str, options: InCommon | None = None) -> None:
        self.group = process_group_of(name) if name else None
        self._options = options if name else None

    def gather(self, value: Tensor) -> Tensor:
        """(ranks, *value.shape)."""
        if self.group is None:
            return value.unsqueeze(0)
        # A few numbers: adding zeros is exact, and sum is the one reduction that is needed anyway.
        gathered = value.new_zeros((self.group.size(), *value.shape))
        gathered[self.group.rank()] = value
        return self.sum(gathered)

    def sum(self, value: Tensor) -> Tensor:
        """The first one also tells whether the ranks have the same options; if not, all of them raise, or select none.

        It has the same size for all selections without token indices.
        """
        if self.group is None:
            return value
        options, self._options = self._options, None
        if options is None:
            value = value.contiguous()
            dist.all_reduce(value, group=self.group)
            return value
        local = options.packed(value.device)
        slots = local.new_zeros((self.group.size(), local.numel()))
        slots[self.group.rank()] = local
        packed = torch.cat([value.reshape(-1), slots.view(-1)])
        dist.all_reduce(packed, group=self.group)
        slots = packed[value.numel() :].view_as(slots)
        self.numbers = InCommon.numbers(slots[0])
        floats = InCommon.numbers(slots).float()
        alike = (floats == floats[0]) | (floats.isnan() & floats[0].isnan())
        self.agree = (slots[:, :-4] == slots[0, :-4]).all() & alike.all()
        if values_are_checked(value) and not self.agree:
            options.refuse(slots.tolist())
        return packed[: value.numel()].view(value.shape)

    def offset(self, like: Tensor) -> Tensor:
        """() int64: number of positions on lower ranks."""
        if self.group is None:
            return torch.zeros((), dtype=torch.int64, device=like.device)
        counts = self.gather(torch.full((1,), like.numel(), dtype=torch.int64, device=like.device))
        return counts[: self.group.rank()].sum()


def find_digit(histogram: Tensor, state: Tensor, bits: int) -> Tensor:
    """Digit of the need-th largest key of each row, in torch; the step that most backends share."""
    need = state[:, NEED : NEED + 1]
    at_least = histogram.flip(1).cumsum(1).flip(1)  # keys with this digit or a larger one
    digit = ((at_least >= need).sum(1, keepdim=True) - 1).clamp(min=0)
    equal = histogram.gather(1, digit)
    above = at_least.gather(1, digit) - equal
    return torch.cat([(state[:, :1] << bits) | digit, need - above, equal], 1)


def ordered_key(value: float) -> int:
    """Key of a float rounded to fp32 (overflow goes to infinity), as in csrc/common/radix_select.h."""
    try:
        (bits,) = struct.unpack("<I", struct.pack("<f", value + 0.0))
    except OverflowError:
        return ordered_key(math.copysign(math.inf, value))
    return bits ^ 0xFFFFFFFF if bits & 0x80000000 else bits | 0x80000000


def ordered_keys(values: Tensor) -> Tensor:
    """:func:`ordered_key` of a fp32 tensor, as int64; NaN has no place in it."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0 into +0
    return ((bits >> 31 | -0x80000000) ^ bits).long() & 0xFFFFFFFF


def key_weights(keys: Tensor, scale: Tensor) -> Tensor:
    """int64: the scores above 0 that keys stand for, times the scale, rounded half to even; 0 of key -1."""
    values = (keys.clamp(min=ZERO_KEY) - ZERO_KEY).int().view(torch.float32)
    return (values.double() * scale).round().long()


def token_covariance(steps: Steps, logprob: Tensor, advantages: Tensor, mask: Tensor | None, group: str) -> Tensor:
    ranks = Group(group)
    by_rank = ranks.gather(steps.covariance_extremes(logprob, advantages, mask))
    largest, count = by_rank[:, :2].amax(0), by_rank[:, 2].sum()
    exponent = fixed_point_exponent(largest, count)
    sums = ranks.sum(steps.covariance_sums(logprob, advantages, mask, power_of_two(exponent)))
    means = sums.double() * power_of_two(-exponent) / count
    means = torch.where(largest.isinf(), math.nan, means)
    return steps.covariance_apply(logprob, advantages, mask, means)


def _exponent_above(value: Tensor) -> Tensor:
    return ((value.view(torch.int64) >> 52) & 0x7FF) - 1022


def power_of_two(exponent: Tensor) -> Tensor:
    # from the bits: exp2 and pow need not be exact on every device
    return ((exponent + 1023) << 52).view(torch.float64)


def fixed_point_exponent(largest: Tensor, count: Tensor) -> Tensor:
    room = (_SUM_BITS - _exponent_above(count)).clamp(max=_TERM_BITS)
    return (room - _exponent_above(largest)).clamp(max=_LARGEST_EXPONENT)


def clip_cov_mask(
    steps: Steps,
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor,
    count: Count,
    band: Band,
    group: str,
) -> Tensor:
    """(N,) bool; the seed, and the numbers of count and band, on the tokens' device or the CPU."""
    seed, count = beside(seed, covariance.device), count.beside(covariance.device)
    band = band._replace(numbers=count.numbers)
    ranks = Group(group, InCommon(seed, count, band))
    offset = _offset(ranks, covariance, token_index)
    values = steps.selection_value_keys(covariance, mask, exclude)
    bounds = _quantiles(steps, ranks, values, band) if band.quantile else _bound_keys(band, covariance.device)
    if band.numbers is not None:
        bounds = torch.stack([torch.where(band.numbers[2] < band.numbers[3], bounds[0], NO_KEY), bounds[1]])
    if not band.closed:
        bounds = bounds + torch.stack([torch.ones_like(bounds[0]), -torch.ones_like(bounds[0])])
    keys = steps.selection_random_keys(values, bounds, token_index, offset, seed)
    return _largest(steps, ranks, keys, token_index, offset, _valid(covariance, mask), count)


def kl_cov_mask(
    steps: Steps,
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    count: Count,
    group: str,
) -> Tensor:
    count = count.beside(covariance.device)
    ranks = Group(group, InCommon(None, count, None))
    offset = _offset(ranks, covariance, token_index)
    keys = steps.selection_value_keys(covariance, mask, exclude)
    return _largest(steps, ranks, keys, token_index, offset, _valid(covariance, mask), count)


def budget_mask(
    steps: Steps,
    score: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    numbers: Tensor,
    group: str,
) -> Tensor:
    """(N,) bool: the shortest prefix of the candidates, by score descending, whose scores come to a budget.

    ``numbers``: on the tokens' device or the CPU.
    """
    budget = Budget(beside(numbers, score.device))
    ranks = Group(group, InCommon(None, budget, None))
    offset = _offset(ranks, score, token_index)
    finite = score.isfinite() if mask is None else score.isfinite() & mask
    # In bits: what the first sum of ranks carries is int64. Doubles >= 0 are in their order.
    largest = steps.covariance_extremes(score, score, finite)[:1].view(torch.int64)
    by_rank = ranks.gather(torch.cat([largest, _valid(score, mask).view(1)]))
    largest, count = by_rank[:, 0].amax(0, keepdim=True), by_rank[:, 1].sum(0, keepdim=True)
    exponent = fixed_point_exponent(largest.view(torch.float64), count.double())
    scale = power_of_two(exponent)
    keys = steps.selection_value_keys(score, finite, exclude)
    keys = torch.where(keys > ZERO_KEY, keys, -1)
    total = steps.covariance_sums(score, score, finite, scale.repeat(2))[:1]
    if (ordered := _ordered(steps, ranks, keys, token_index)) is not None:
        weights = key_weights(ordered[0], scale)
        up_to = weights.cumsum(0)
        need = torch.minimum(budget.of(exponent, total, up_to[-1:]), up_to[-1:]).clamp(min=0)
        return _first(steps, keys, token_index, offset, ordered, (up_to - weights < need).sum())
    weigh = functools.partial(_weigh, steps, keys, scale.view(()))
    histogram = weigh(_start(keys, total), *KEY_DIGITS[0])
    # The sum over all that counts travels with the first histogram
    packed = ranks.sum(torch.cat([histogram.view(-1), total]))
    histogram, candidates = packed[:-1].view(1, -1), packed[:-1].sum(0, keepdim=True)
    if ranks.numbers is not None:
        budget = Budget(ranks.numbers[:3])
    need = torch.minimum(budget.of(exponent, packed[-1:], candidates), candidates).clamp(min=0)
    if ranks.agree is not None:
        need = torch.where(ranks.agree, need, 0)
    key_state = _finish(steps, ranks, weigh, histogram, _start(keys, need))
    # Ties have one weight: from here on they are counted
    weight = key_weights(key_state[:, PREFIX], scale).clamp(min=1)
    key_state[:, NEED] = (key_state[:, NEED] + weight - 1) // weight
    key_state[:, EQUAL] = key_state[:, EQUAL] // weight
    return _selected(steps, ranks, keys, token_index, offset, key_state)


def _weigh(steps: Steps, keys: Tensor, scale: Tensor, state: Tensor, shift: int, bits: int) -> Tensor:
    return steps.selection_weight_histogram(keys, state, scale, shift, bits)


def _offset(ranks: Group, covariance: Tensor, token_index: Tensor | None) -> Tensor:
    if token_index is not None:
        return torch.zeros((), dtype=torch.int64, device=covariance.device)
    return ranks.offset(covariance)


def _valid(covariance: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((), covariance.numel(), dtype=torch.int64, device=covariance.device)
    return mask.sum()


def _bound_keys(band: Band, device: torch.device) -> Tensor:
    if band.numbers is not None:
        return ordered_keys(band.numbers[2:].float())
    # two fills: torch.tensor(list) would copy from the host, and wait for it
    keys = [torch.full((), ordered_key(bound), dtype=torch.int64, device=device) for bound in (band.low, band.high)]
    return torch.stack(keys)


def _quantiles(steps: Steps, ranks: Group, values: Tensor, band: Band) -> Tensor:
    """(2,) value keys of the lower order statistics number floor(q·(M - 1)) of the M candidates of the group."""
    total = ranks.sum((values >= 0).sum())
    numbers = band.numbers if ranks.numbers is None else ranks.numbers
    if numbers is not None:
        shares = _within_shares(numbers[2:])
    else:
        bounds = (torch.full((), q, dtype=torch.float64, device=values.device) for q in (band.low, band.high))
        shares = torch.stack(list(bounds))
    need = (total - (shares * (total - 1)).floor().long()).clamp(min=0)
    if ranks.group is None and (ordered := steps.largest_first(values)) is not None:
        return ordered[0][(need - 1).clamp(min=0)]
    state = _start(values, need)
    count = functools.partial(steps.selection_key_histogram, values)
    histogram = ranks.sum(count(state, *KEY_DIGITS[0]))
    return _finish(steps, ranks, count, histogram, state)[:, PREFIX].contiguous()


def _start(keys: Tensor, need: Tensor) -> Tensor:
    state = torch.zeros((need.numel(), 3), dtype=torch.int64, device=keys.device)
    state[:, NEED] = need
    return state


def _finish(
    steps: Steps, ranks: Group, histogram_of: Callable[..., Tensor], histogram: Tensor, state: Tensor
) -> Tensor:
    """State of the search for the need-th largest keys of the group, from the histogram of their first digits.

    ``histogram_of(state, shift, bits)``: this rank's of the next digit.
    """
    state = steps.find_digit(histogram, state, KEY_DIGITS[0][1])
    for shift, bits in KEY_DIGITS[1:]:
        histogram = ranks.sum(histogram_of(state, shift, bits))
        state = steps.find_digit(histogram, state, bits)
    return state


def _largest(
    steps: Steps, ranks: Group, keys: Tensor, token_index: Tensor | None, offset: Tensor, valid: Tensor, count: Count
) -> Tensor:
    """(N,) bool: the group's n largest keys, ties to the lower token index."""
    if (ordered := _ordered(steps, ranks, keys, token_index)) is not None:
        need = torch.minimum(count.of(valid), (keys >= 0).sum())
        return _first(steps, keys, token_index, offset, ordered, need)
    histogram_of = functools.partial(steps.selection_key_histogram, keys)
    histogram = histogram_of(_start(keys, valid.new_zeros(1)), *KEY_DIGITS[0])
    # The number of tokens that count, from which n follows, travels with the first histogram.
    packed = ranks.sum(torch.cat([histogram.view(-1), valid.view(1)]))
    histogram = packed[:-1].view(1, -1)
    if ranks.numbers is not None:
        count = count._replace(numbers=ranks.numbers)
    need = torch.minimum(count.of(packed[-1:]), histogram.sum(1))
    if ranks.agree is not None:
        need = torch.where(ranks.agree, need, 0)
    key_state = _finish(steps, ranks, histogram_of, histogram, _start(keys, need))
    return _selected(steps, ranks, keys, token_index, offset, key_state)


def _ordered(steps: Steps, ranks: Group, keys: Tensor, token_index: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Keys from the largest on, ties by token index, and their positions, if this process selects alone and so."""
    if ranks.group is not None:
        return None
    if token_index is None:
        return steps.largest_first(keys)
    by_index = steps.largest_first(~token_index)  # the lowest first
    if by_index is None:
        return None
    ordered = steps.largest_first(keys[by_index[1]])
    assert ordered is not None
    return ordered[0], by_index[1][ordered[1]]


def _first(
    steps: Steps, keys: Tensor, token_index: Tensor | None, offset: Tensor, ordered: tuple[Tensor, Tensor], need: Tensor
) -> Tensor:
    """(N,) bool: the first ``need``, () int64, of the ordered keys."""
    last = (need - 1).clamp(min=0)
    key, position = (x.index_select(0, last.view(1)).view(()) for x in ordered)
    threshold = torch.where(need > 0, key, NO_KEY)
    last_index = position if token_index is None else token_index.index_select(0, position.view(1)).view(())
    return steps.selection_mask(keys, token_index, offset, threshold, last_index)


def _selected(
    steps: Steps, ranks: Group, keys: Tensor, token_index: Tensor | None, offset: Tensor, key_state: Tensor
) -> Tensor:
    """(N,) bool: the tokens with keys above the prefix of the state, and as many as it needs of those that have it."""
    # An empty selection has a threshold that no key reaches; only there a need of 0 is left.
    need, equal = key_state[0, NEED], key_state[0, EQUAL]
    threshold = torch.where(need > 0, key_state[0, PREFIX], NO_KEY)
    if keys.device.type == "cpu" and bool((need == 0) | (need == equal)):
        last_index = torch.full_like(threshold, LAST_INDEX)  # all ties belong to it; every rank sees that alike
    else:
        last_index = _last_index(steps, ranks, keys, token_index, offset, key_state)
    return steps.selection_mask(keys, token_index, offset, threshold, last_index)


def _last_index(
    steps: Steps, ranks: Group, keys: Tensor, token_index: Tensor | None, offset: Tensor, key_state: Tensor
) -> Tensor:
    """() int64: of the tokens with the threshold's key, the last token index that is selected."""
    digits = POSITION_DIGITS if token_index is None else INDEX_DIGITS
    width = digits[0][0] + digits[0][1]
    state = key_state.clone()
    state[:, PREFIX] = 0
    for shift, bits in digits:
        histogram = steps.selection_index_histogram(
            keys, token_index, offset, key_state, state, shift, bits, width - shift - bits
        )
        state = steps.find_digit(ranks.sum(histogram), state, bits)
    # reversed order: largest first = lowest index first
    return state[0, PREFIX] ^ (LAST_INDEX if width == 64 else (1 << width) - 1)
