"""Token covariance and selection masks as Triton kernels: the steps of :mod:`..radix_select`.

Integers decide everything, so the results equal those of the other backends bit for bit. A missing mask or token
index is passed as None, which Triton compiles out.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_kernels.backends import radix_select
from entropy_kernels.backends.radix_select import RADIX_BINS

__all__ = ["budget_mask", "clip_cov_mask", "kl_cov_mask", "token_covariance"]

BLOCK = 1024
HISTOGRAM_BLOCK = 4096  # fewer, larger blocks: each adds up to 2048 bins to the global histogram
HISTOGRAM_WARPS = 8  # 16 keys per thread: with 32 the registers do not hold the token indices
# Products are rounded before they are added, as on the CPU.
COMPILE = {"enable_fp_fusion": False}

# Values that change from call to call: a kernel specialised on them would be compiled again and again.
_RUNTIME = ["tokens", "shift", "bits", "bin_mask", "known_mask"]


@triton.jit
def _round_key(c0, c1, c2, c3, k0, k1):
    """One Philox4x32 round; all words are uint32."""
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p1 = c2.to(tl.uint64) * 0xCD9E8D57
    high0, high1 = (p0 >> 32).to(tl.uint32), (p1 >> 32).to(tl.uint32)
    return high1 ^ c1 ^ k0, p1.to(tl.uint32), high0 ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def philox_word(index, seed):
    """First word of Philox4x32-10 for counter (index low, index high, 0, 0), key (seed low, seed high); int64 in."""
    c0 = index.to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    # Key words as uint64: a sum that wraps is what is wanted, and the interpreter would warn of it in 32 bits.
    k0 = (seed & 0xFFFFFFFF).to(tl.uint64)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint64)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round_key(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0


@triton.jit
def ordered_key(value):
    """fp32 -> int64 in 0 .. 2³² - 1 in the same order, -0 as +0; NaN has no place in it."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def block_positions(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def valid_tokens(mask_ptr, position, inside):
    """Tokens of this block that count."""
    valid = inside
    if mask_ptr is not None:
        valid = inside & (tl.load(mask_ptr + position, mask=inside, other=0) != 0)
    return valid


@triton.jit
def _token_index(index_ptr, offset_ptr, position, inside):
    index = position + tl.load(offset_ptr)
    if index_ptr is not None:
        index = tl.load(index_ptr + position, mask=inside, other=0)
    return index


@triton.jit
def _magnitude(value):
    """|value|, +inf for NaN."""
    magnitude = tl.abs(value.to(tl.float64))
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def _fixed_point(value, scale):
    """value * scale rounded half to even, as in csrc/common/fixed_point.h."""
    shifted = value.to(tl.float64) * scale + 6755399441055744.0
    return shifted.to(tl.int64, bitcast=True) - 0x4338000000000000


@triton.jit
def _load_pair(logprob_ptr, advantages_ptr, mask_ptr, tokens, BLOCK: tl.constexpr):
    """(positions of this block, which of them are tokens, which of those count, log-prob, advantages), 0 off mask."""
    position = block_positions(BLOCK)
    inside = position < tokens
    valid = valid_tokens(mask_ptr, position, inside)
    logprob = tl.load(logprob_ptr + position, mask=valid, other=0.0)
    advantages = tl.load(advantages_ptr + position, mask=valid, other=0.0)
    return position, inside, valid, logprob, advantages


@triton.jit(do_not_specialize=_RUNTIME)
def covariance_extremes_kernel(
    logprob_ptr,  # (N,)
    advantages_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    partial_ptr,  # (blocks, 3) float64
    tokens,
    BLOCK: tl.constexpr,
):
    _, _, valid, logprob, advantages = _load_pair(logprob_ptr, advantages_ptr, mask_ptr, tokens, BLOCK)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(out, tl.max(_magnitude(logprob), 0))
    tl.store(out + 1, tl.max(_magnitude(advantages), 0))
    tl.store(out + 2, tl.sum(valid.to(tl.int64), 0).to(tl.float64))


@triton.jit(do_not_specialize=_RUNTIME)
def covariance_sums_kernel(
    logprob_ptr,  # (N,)
    advantages_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    scales_ptr,  # (2,) float64
    partial_ptr,  # (blocks, 2) int64
    tokens,
    BLOCK: tl.constexpr,
):
    _, _, _, logprob, advantages = _load_pair(logprob_ptr, advantages_ptr, mask_ptr, tokens, BLOCK)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(out, tl.sum(_fixed_point(logprob, tl.load(scales_ptr)), 0))
    tl.store(out + 1, tl.sum(_fixed_point(advantages, tl.load(scales_ptr + 1)), 0))


@triton.jit(do_not_specialize=_RUNTIME)
def covariance_apply_kernel(
    logprob_ptr,  # (N,)
    advantages_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    means_ptr,  # (2,) float64
    covariance_ptr,  # (N,) fp32
    tokens,
    BLOCK: tl.constexpr,
):
    position, inside, valid, logprob, advantages = _load_pair(logprob_ptr, advantages_ptr, mask_ptr, tokens, BLOCK)
    product = (logprob.to(tl.float64) - tl.load(means_ptr)) * (advantages.to(tl.float64) - tl.load(means_ptr + 1))
    tl.store(covariance_ptr + position, tl.where(valid, product.to(tl.float32), 0.0), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def value_keys_kernel(
    covariance_ptr,  # (N,) fp32
    mask_ptr,  # (N,) or None
    exclude_ptr,  # (N,) or None
    keys_ptr,  # (N,) int64
    tokens,
    BLOCK: tl.constexpr,
):
    position = block_positions(BLOCK)
    inside = position < tokens
    candidate = valid_tokens(mask_ptr, position, inside)
    if exclude_ptr is not None:
        candidate = candidate & (tl.load(exclude_ptr + position, mask=inside, other=1) == 0)
    value = tl.load(covariance_ptr + position, mask=inside, other=0.0)
    key = tl.where(candidate & (value == value), ordered_key(value), -1)
    tl.store(keys_ptr + position, key, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def random_keys_kernel(
    value_keys_ptr,  # (N,) int64
    band_ptr,  # (2,) int64, both inclusive
    index_ptr,  # (N,) int64 or None
    offset_ptr,  # () int64
    seed_ptr,  # () int64
    keys_ptr,  # (N,) int64
    tokens,
    BLOCK: tl.constexpr,
):
    position = block_positions(BLOCK)
    inside = position < tokens
    value = tl.load(value_keys_ptr + position, mask=inside, other=-1)
    candidate = (value >= 0) & (value >= tl.load(band_ptr)) & (value <= tl.load(band_ptr + 1))
    index = _token_index(index_ptr, offset_ptr, position, inside)
    key = philox_word(index, tl.load(seed_ptr)).to(tl.int64)
    tl.store(keys_ptr + position, tl.where(candidate, key, -1), mask=inside)


@triton.jit
def _add_histogram(histogram_ptr, digit, match, BINS: tl.constexpr):
    # What does not match is counted in bin 0 and taken out again: histogram's own mask is newer than some Tritons.
    counts = tl.histogram(tl.where(match, digit, 0).to(tl.int32), BINS).to(tl.int64)
    bin_ = tl.arange(0, BINS)
    counts -= tl.where(bin_ == 0, tl.sum((match == 0).to(tl.int64), 0), 0)
    tl.atomic_add(histogram_ptr + bin_, counts, mask=counts != 0, sem="relaxed")


@triton.jit(do_not_specialize=_RUNTIME)
def key_histogram_kernel(
    keys_ptr,  # (N,) int64
    state_ptr,  # (rows, 3) int64; grid (blocks, rows)
    histogram_ptr,  # (rows, BINS) int64
    tokens,
    shift,
    bits,
    bin_mask,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    position = block_positions(BLOCK)
    key = tl.load(keys_ptr + position, mask=position < tokens, other=-1)
    # -1 >> anything is -1, which is no prefix
    match = (key >> (shift + bits)) == tl.load(state_ptr + row * 3)
    _add_histogram(histogram_ptr + row * BINS, (key >> shift) & bin_mask, match, BINS)


@triton.jit(do_not_specialize=_RUNTIME)
def weight_histogram_kernel(
    keys_ptr,  # (N,) int64
    state_ptr,  # (1, 3) int64
    scale_ptr,  # () float64
    histogram_ptr,  # (1, BINS) int64
    tokens,
    shift,
    bits,
    bin_mask,
    BLOCK: tl.constexpr,
):
    position = block_positions(BLOCK)
    key = tl.load(keys_ptr + position, mask=position < tokens, other=-1)
    match = (key >> (shift + bits)) == tl.load(state_ptr)
    # of scores above 0 these are the bits
    score = (key & 0x7FFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    weight = _fixed_point(tl.where(match, score, 0.0), tl.load(scale_ptr))
    tl.atomic_add(histogram_ptr + ((key >> shift) & bin_mask), weight, mask=match & (weight != 0), sem="relaxed")


@triton.jit(do_not_specialize=_RUNTIME)
def index_histogram_kernel(
    keys_ptr,  # (N,) int64
    index_ptr,  # (N,) int64 or None
    offset_ptr,  # () int64
    key_state_ptr,  # (1, 3) int64
    state_ptr,  # (1, 3) int64
    histogram_ptr,  # (1, BINS) int64
    tokens,
    shift,
    bits,
    bin_mask,
    known_mask,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = block_positions(BLOCK)
    inside = position < tokens
    key = tl.load(keys_ptr + position, mask=inside, other=-1)
    tie = _token_index(index_ptr, offset_ptr, position, inside) ^ 0x7FFFFFFFFFFFFFFF
    above = tl.where(known_mask == 0, 0, shift + bits)  # a shift by 64 would be undefined
    match = inside & (key == tl.load(key_state_ptr)) & (((tie >> above) & known_mask) == tl.load(state_ptr))
    _add_histogram(histogram_ptr, (tie >> shift) & bin_mask, match, BINS)


@triton.jit(do_not_specialize=_RUNTIME)
def find_digit_kernel(
    histogram_ptr,  # (rows, BINS) int64; grid (rows,)
    state_ptr,  # (rows, 3) int64
    next_ptr,  # (rows, 3) int64
    bits,
    BINS: tl.constexpr,
):
    row = tl.program_id(0)
    bin_ = tl.arange(0, BINS)
    count = tl.load(histogram_ptr + row * BINS + bin_)
    prefix = tl.load(state_ptr + row * 3)
    need = tl.load(state_ptr + row * 3 + 1)
    up_to = tl.cumsum(count, 0)
    at_least = tl.sum(count, 0) - up_to + count  # keys with this digit or a larger one
    digit = tl.maximum(tl.sum((at_least >= need).to(tl.int64), 0) - 1, 0)
    equal = tl.sum(tl.where(bin_ == digit, count, 0), 0)
    above = tl.sum(tl.where(bin_ == digit, at_least, 0), 0) - equal
    tl.store(next_ptr + row * 3, (prefix << bits) | digit)
    tl.store(next_ptr + row * 3 + 1, need - above)
    tl.store(next_ptr + row * 3 + 2, equal)


@triton.jit(do_not_specialize=_RUNTIME)
def mask_kernel(
    keys_ptr,  # (N,) int64
    index_ptr,  # (N,) int64 or None
    offset_ptr,  # () int64
    threshold_ptr,  # () int64
    last_index_ptr,  # () int64
    selected_ptr,  # (N,) int8
    tokens,
    BLOCK: tl.constexpr,
):
    position = block_positions(BLOCK)
    inside = position < tokens
    key = tl.load(keys_ptr + position, mask=inside, other=-1)
    threshold = tl.load(threshold_ptr)
    index = _token_index(index_ptr, offset_ptr, position, inside)
    selected = (key > threshold) | ((key == threshold) & (index <= tl.load(last_index_ptr)))
    tl.store(selected_ptr + position, selected.to(tl.int8), mask=inside)


_HISTOGRAM = {"BINS": RADIX_BINS, "BLOCK": HISTOGRAM_BLOCK, "num_warps": HISTOGRAM_WARPS}


def launch(
    kernel: Any, *tensors: Tensor | None, numbers: tuple[int, ...] = (), rows: int = 1, **constants: Any
) -> None:
    """Run a kernel over blocks of tokens, of which the first tensor has one element each.

    The kernel takes the tensors, a bool one as int8, which Triton loads; the number of tokens; and ``numbers``.
    """
    tokens = cast(Tensor, tensors[0]).numel()
    constants = constants or {"BLOCK": BLOCK}
    if tokens > 0:
        pointers = [x.view(torch.int8) if x is not None and x.dtype == torch.bool else x for x in tensors]
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            grid = (triton.cdiv(tokens, constants["BLOCK"]), rows)
            kernel[grid](*pointers, tokens, *numbers, **constants, **COMPILE)


def covariance_extremes(logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    # one row of zeros at least: the maximum over no block
    blocks = max(1, triton.cdiv(logprob.numel(), BLOCK))
    partial = torch.zeros((blocks, 3), dtype=torch.float64, device=logprob.device)
    launch(covariance_extremes_kernel, logprob, advantages, mask, partial)
    return torch.cat([partial[:, :2].amax(0), partial[:, 2].sum(0, keepdim=True)])


def covariance_sums(logprob: Tensor, advantages: Tensor, mask: Tensor | None, scales: Tensor) -> Tensor:
    partial = torch.zeros((triton.cdiv(logprob.numel(), BLOCK), 2), dtype=torch.int64, device=logprob.device)
    launch(covariance_sums_kernel, logprob, advantages, mask, scales, partial)
    return partial.sum(0)


def covariance_apply(logprob: Tensor, advantages: Tensor, mask: Tensor | None, means: Tensor) -> Tensor:
    covariance = torch.empty_like(logprob, dtype=torch.float32)
    launch(covariance_apply_kernel, logprob, advantages, mask, means, covariance)
    return covariance


def selection_value_keys(covariance: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
    keys = torch.empty_like(covariance, dtype=torch.int64)
    launch(value_keys_kernel, covariance, mask, exclude, keys)
    return keys


def selection_random_keys(
    value_keys: Tensor, band: Tensor, token_index: Tensor | None, offset: Tensor, seed: Tensor
) -> Tensor:
    keys = torch.empty_like(value_keys)
    launch(random_keys_kernel, value_keys, band, token_index, offset, seed, keys)
    return keys


def selection_key_histogram(keys: Tensor, state: Tensor, shift: int, bits: int) -> Tensor:
    rows = state.shape[0]
    histogram = torch.zeros((rows, RADIX_BINS), dtype=torch.int64, device=keys.device)
    numbers = (shift, bits, (1 << bits) - 1)
    launch(key_histogram_kernel, keys, state, histogram, numbers=numbers, rows=rows, **_HISTOGRAM)
    return histogram


def selection_weight_histogram(keys: Tensor, state: Tensor, scale: Tensor, shift: int, bits: int) -> Tensor:
    histogram = torch.zeros((1, RADIX_BINS), dtype=torch.int64, device=keys.device)
    launch(weight_histogram_kernel, keys, state, scale, histogram, numbers=(shift, bits, (1 << bits) - 1))
    return histogram


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
    histogram = torch.zeros((1, RADIX_BINS), dtype=torch.int64, device=keys.device)
    numbers = (shift, bits, (1 << bits) - 1, (1 << known) - 1)
    tensors = (keys, token_index, offset, key_state, state, histogram)
    launch(index_histogram_kernel, *tensors, numbers=numbers, **_HISTOGRAM)
    return histogram


def find_digit(histogram: Tensor, state: Tensor, bits: int) -> Tensor:
    following = torch.empty_like(state)
    with torch.cuda.device_of(histogram):
        find_digit_kernel[(state.shape[0],)](histogram, state, following, bits, BINS=RADIX_BINS, **COMPILE)
    return following


def selection_mask(
    keys: Tensor, token_index: Tensor | None, offset: Tensor, threshold: Tensor, last_index: Tensor
) -> Tensor:
    selected = torch.empty_like(keys, dtype=torch.bool)
    launch(mask_kernel, keys, token_index, offset, threshold, last_index, selected)
    return selected


def largest_first(keys: Tensor) -> None:
    """Digits are quicker."""


STEPS = cast(radix_select.Steps, sys.modules[__name__])
# The kernels of the contract: the shared driver over the steps of this module.
token_covariance = functools.partial(radix_select.token_covariance, STEPS)
clip_cov_mask = functools.partial(radix_select.clip_cov_mask, STEPS)
kl_cov_mask = functools.partial(radix_select.kl_cov_mask, STEPS)
budget_mask = functools.partial(radix_select.budget_mask, STEPS)
