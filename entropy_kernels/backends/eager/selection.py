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

__all__ = ["budget_mask", "clip_cov_mask", "find_digit", "kl_cov_mask", "token_covariance"]

_STEPS = cast(radix_select.Steps, sys.modules[__name__])
# The kernels of the contract: the shared driver over the steps of this module.
token_covariance = functools.partial(radix_select.token_covariance, _STEPS)
clip_cov_mask = functools.partial(radix_select.clip_cov_mask, _STEPS)
kl_cov_mask = functools.partial(radix_select.kl_cov_mask, _STEPS)
budget_mask = functools.partial(radix_select.budget_mask, _STEPS)


def _where_valid(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0.0)


def covariance_extremes(logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    count = torch.full((), logprob.numel(), device=logprob.device) if mask is None else mask.sum()
    if logprob.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=logprob.device)
    largest = [
        _where_valid(value, mask).abs().nan_to_num(nan=math.inf, posinf=math.inf).amax()
        for value in (logprob, advantages)
    ]
    return torch.stack([largest[0].double(), largest[1].double(), count.double()])


def covariance_sums(logprob: Tensor, advantages: Tensor, mask: Tensor | None, scales: Tensor) -> Tensor:
    values = (_where_valid(logprob, mask), _where_valid(advantages, mask))
    # torch.round goes to even
    return torch.stack([(value.double() * scales[i]).round().long().sum() for i, value in enumerate(values)])


def covariance_apply(logprob: Tensor, advantages: Tensor, mask: Tensor | None, means: Tensor) -> Tensor:
    product = (logprob.double() - means[0]) * (advantages.double() - means[1])
    return _where_valid(product.float(), mask)


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


def _count_digits(values: Tensor, match: Tensor, shift: int, bits: int, weights: Tensor | None = None) -> Tensor:
    digit = (values >> shift) & ((1 << bits) - 1)
    # scatter_add into one bin more, for what does not match: bincount would wait for its input's maximum
    bins = torch.zeros(RADIX_BINS + 1, dtype=torch.int64, device=values.device)
    weights = torch.ones_like(digit) if weights is None else weights
    return bins.scatter_add_(0, torch.where(match, digit, RADIX_BINS), weights)[:RADIX_BINS]


def selection_key_histogram(keys: Tensor, state: Tensor, shift: int, bits: int) -> Tensor:
    # -1 >> anything is -1, which is no prefix
    rows = [_count_digits(keys, (keys >> (shift + bits)) == prefix, shift, bits) for prefix in state[:, 0]]
    return torch.stack(rows)


def selection_weight_histogram(keys: Tensor, state: Tensor, scale: Tensor, shift: int, bits: int) -> Tensor:
    match = (keys >> (shift + bits)) == state[0, 0]
    return _count_digits(keys, match, shift, bits, key_weights(keys, scale)).unsqueeze(0)


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
    match = keys == key_state[0, 0]
    if known:
        match &= ((ties >> (shift + bits)) & ((1 << known) - 1)) == state[0, 0]
    return _count_digits(ties, match, shift, bits).unsqueeze(0)


def selection_mask(
    keys: Tensor, token_index: Tensor | None, offset: Tensor, threshold: Tensor, last_index: Tensor
) -> Tensor:
    return (keys > threshold) | ((keys == threshold) & (_index(keys, token_index, offset) <= last_index))
