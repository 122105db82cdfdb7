"""Token covariance and selection masks in torch, on any device: the steps of :mod:`..radix_select`."""

from __future__ import annotations

import functools
import math
import sys
from typing import cast

import torch
from torch import Tensor

from entropy_kernels.backends import radix_select
from entropy_kernels.backends.eager.philox import token_key
from entropy_kernels.backends.radix_select import LAST_INDEX, RADIX_BINS, find_digit, key_weights, ordered_keys

__all__ = ["budget_mask", "clip_cov_mask", "find_digit", "kl_cov_mask", "largest_first", "token_covariance"]

_LANES = 64  # histograms that are filled side by side

_STEPS = cast(radix_select.Steps, sys.modules[__name__])
# The kernels of the contract: the shared driver over the steps of this module.
token_covariance = functools.partial(radix_select.token_covariance, _STEPS)
clip_cov_mask = functools.partial(radix_select.clip_cov_mask, _STEPS)
kl_cov_mask = functools.partial(radix_select.kl_cov_mask, _STEPS)
budget_mask = functools.partial(radix_select.budget_mask, _STEPS)


def _where_valid(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0.0)


# Operations below take fp32 tokens beside an fp64 tensor of one element (a 0-d one would not count) where that saves a
# pass over the tokens: on a GPU torch converts as it loads.


def covariance_extremes(logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    if logprob.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=logprob.device)
    count = torch.full((), logprob.numel(), device=logprob.device) if mask is None else mask.sum()
    ends = [torch.aminmax(_where_valid(value, mask)) for value in (logprob, advantages)]
    largest = [torch.maximum(-least, most).nan_to_num(nan=math.inf, posinf=math.inf).double() for least, most in ends]
    return torch.stack([*largest, count.double()])


def covariance_sums(logprob: Tensor, advantages: Tensor, mask: Tensor | None, scales: Tensor) -> Tensor:
    return torch.stack([_integers(_where_valid(x, mask), scales[i]).sum() for i, x in enumerate((logprob, advantages))])


def _integers(values: Tensor, scale: Tensor) -> Tensor:
    """(N,) int64 of values (N,) times a () float64 power of two, rounded half to even; below 2⁵¹, or inf or NaN.

    1.5 · 2⁵² + x has integers for its last bits.
    """
    shift = torch.full((1,), 1.5 * 2.0**52, dtype=torch.float64, device=values.device)
    return torch.addcmul(shift, values, scale.view(1)).view(torch.int64) - shift.view(torch.int64)


def covariance_apply(logprob: Tensor, advantages: Tensor, mask: Tensor | None, means: Tensor) -> Tensor:
    product = torch.empty_like(logprob, dtype=torch.float32)
    torch.mul(logprob - means[:1], advantages - means[1:], out=product)
    return _where_valid(product, mask)


def selection_value_keys(covariance: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
    candidate = ~covariance.isnan()
    if mask is not None:
        candidate &= mask
    if exclude is not None:
        candidate &= ~exclude
    return torch.where(candidate, ordered_keys(covariance), -1)


def _index(keys: Tensor, token_index: Tensor | None, offset: Tensor) -> Tensor:
    return torch.arange(keys.numel(), device=keys.device) + offset if token_index is None else token_index


def selection_random_keys(
    value_keys: Tensor, band: Tensor, token_index: Tensor | None, offset: Tensor, seed: Tensor
) -> Tensor:
    candidate = (value_keys >= 0) & (value_keys >= band[0]) & (value_keys <= band[1])
    return torch.where(candidate, token_key(_index(value_keys, token_index, offset), seed), -1)


def largest_first(keys: Tensor) -> tuple[Tensor, Tensor] | None:
    # On a CPU digits are quicker
    return None if keys.is_cpu or not keys.numel() else torch.sort(keys, descending=True, stable=True)


def _count_digits(digits: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """(2048,) sums of the weights, or numbers, of each of the (N,) digits in [0, 2^bits); others are in no bin.

    ``_LANES`` histograms, added up: additions to one address wait for each other, and most keys may have one digit.
    bincount would wait for its input's maximum.
    """
    digits = digits.clamp(-1, 1 << bits) + 1
    if rest := -digits.numel() % _LANES:
        digits = torch.nn.functional.pad(digits, (0, rest))
        weights = None if weights is None else torch.nn.functional.pad(weights, (0, rest))
    digits = digits.view(-1, _LANES)
    weights = digits.new_ones(()).expand_as(digits) if weights is None else weights.view_as(digits)
    bins = digits.new_zeros(((1 << bits) + 2, _LANES)).scatter_add_(0, digits, weights).sum(1)[1:-1]
    return torch.nn.functional.pad(bins, (0, RADIX_BINS - bins.numel()))


def selection_key_histogram(keys: Tensor, state: Tensor, shift: int, bits: int) -> Tensor:
    # -1 >> anything is -1, which is below all digits
    digits = keys >> shift
    return torch.stack([_count_digits(digits - (prefix << bits), bits) for prefix in state[:, 0]])


def selection_weight_histogram(keys: Tensor, state: Tensor, scale: Tensor, shift: int, bits: int) -> Tensor:
    return _count_digits((keys >> shift) - (state[0, 0] << bits), bits, key_weights(keys, scale)).unsqueeze(0)


def selection_index_histogram(
    keys: Tensor,
    token_index: Tensor | None,
    offset: Tensor,
    key_state: Tensor,
    state: Tensor,
    shift: int,
    bits: int,
    known: int,
) -> Tensor:
    ties = _index(keys, token_index, offset) ^ LAST_INDEX
    digits = ((ties >> shift) & ((1 << (known + bits)) - 1)) - (state[0, 0] << bits)
    return _count_digits(torch.where(keys == key_state[0, 0], digits, -1), bits).unsqueeze(0)


def selection_mask(
    keys: Tensor, token_index: Tensor | None, offset: Tensor, threshold: Tensor, last_index: Tensor
) -> Tensor:
    return (keys > threshold) | ((keys == threshold) & (_index(keys, token_index, offset) <= last_index))
