"""The mergeable softmax state of docs/math.md §2 in Triton: the one place that rescales, merges and finalizes.

A state in registers is (m, s, w, s2, w2): m in logits after softcap, before the division by the temperature. Exponents
are binary, so that one exp2 serves an element: ``scale`` = log2(e) / T turns a difference of logits into bits, and w
and w2 are counted in bits until a row is finished. Without second-order statistics s2 and w2 are carried unchanged, and
the compiler drops them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from entropy_kernels import _rows

STATISTICS_COUNT = tl.constexpr(len(_rows.STATISTICS))
SECOND_ORDER_BITS = tl.constexpr(_rows.SECOND_ORDER)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 of this is 0 in fp32 and in fp64, yet 0 times it is 0: what an entry at -inf is raised to
_FLOOR = tl.constexpr(-2000.0)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: `/` is an approximation in fp32. For what is done once per row."""
    a, b = tl.broadcast(a, b)
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def bits_per_logit(temperature):
    """log2(e) / T, the factor from differences of logits to bits; NaN for T <= 0 or NaN, which poisons the row."""
    one = temperature * 0 + LOG2E
    return tl.where(temperature > 0, divide(one, temperature), float("nan"))


@triton.jit
def finite_top(m):
    """The maximum to subtract: 0 in place of -inf, so that an empty part meets x - 0 = -inf and not inf - inf."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def bits_below(z, top, scale):
    """(z - top)·scale, at least _FLOOR. NaN stays, and so does the NaN of inf - inf: both poison the sums.

    The maximum is subtracted *before* scaling: at logits near 1000 the other order costs 1e-4 nats in fp32.
    """
    return tl.maximum((z - top) * scale, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2_probability(z, m, scale, log2_s):
    """log2 of the probability of z in a finished state with sum s; floored and poisoned as in bits_below."""
    return tl.maximum((z - m) * scale - log2_s, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def raise_top(m, s, w, s2, w2, top, scale, SECOND_ORDER: tl.constexpr):
    """Sums of the state (m, s, w, s2, w2) relative to ``top`` >= m instead of m."""
    t = bits_below(m, finite_top(top), scale)  # -δ in bits
    decay = tl.exp2(t)
    if SECOND_ORDER:
        square = decay * decay
        w2 = square * (w2 - t * s2)
        s2 = square * s2
    w = decay * (w - t * s)
    s = decay * s
    return s, w, s2, w2


@triton.jit
def _per_lane(x, WARPS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of x (STEPS, WARPS·LANES·WIDTH) per lane (WARPS, LANES): registers of one thread."""
    return tl.sum(tl.reshape(tl.sum(x, axis=0), (WARPS, LANES, WIDTH)), axis=2)


@triton.jit
def add_tile(
    z, m, s, w, s2, w2, scale,
    WARPS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, SECOND_ORDER: tl.constexpr,
):  # fmt: skip
    """Add logits z (STEPS, WARPS·LANES·WIDTH) to one state per warp with its sums per lane.

    m is (WARPS, 1), the sums (WARPS, LANES). Sums stay in the registers of a thread and the maximum moves within a
    warp, once per tile, so the loop over tiles has no barrier.
    """
    highest = tl.max(tl.reshape(tl.max(z, axis=0), (WARPS, LANES, WIDTH)), axis=2)
    top = tl.maximum(m, tl.max(highest, axis=1, keep_dims=True))
    s, w, s2, w2 = raise_top(m, s, w, s2, w2, top, scale, SECOND_ORDER)
    spread = tl.broadcast_to(finite_top(top)[:, :, None], (WARPS, LANES, WIDTH))
    t = bits_below(z, tl.reshape(spread, (1, WARPS * LANES * WIDTH)), scale)
    e = tl.exp2(t)
    te = t * e
    s += _per_lane(e, WARPS, LANES, WIDTH)
    w -= _per_lane(te, WARPS, LANES, WIDTH)
    if SECOND_ORDER:
        s2 += _per_lane(e * e, WARPS, LANES, WIDTH)
        w2 -= _per_lane(te * e, WARPS, LANES, WIDTH)
    return top, s, w, s2, w2


@triton.jit
def add_rows(z, m, s, w, s2, w2, scale, SECOND_ORDER: tl.constexpr):
    """Add logits z (ROWS, COLUMNS) to one state per row, m and sums and ``scale`` of shape (ROWS, 1)."""
    top = tl.maximum(m, tl.max(z, axis=1, keep_dims=True))
    s, w, s2, w2 = raise_top(m, s, w, s2, w2, top, scale, SECOND_ORDER)
    t = bits_below(z, finite_top(top), scale)
    e = tl.exp2(t)
    te = t * e
    s += tl.sum(e, axis=1, keep_dims=True)
    w -= tl.sum(te, axis=1, keep_dims=True)
    if SECOND_ORDER:
        s2 += tl.sum(e * e, axis=1, keep_dims=True)
        w2 -= tl.sum(te * e, axis=1, keep_dims=True)
    return top, s, w, s2, w2


@triton.jit
def total(s):
    """Sum of s over parts, in fp64: the part with the maximum holds 1 + little, and H ≈ log s lives in the little."""
    return tl.sum(s.to(tl.float64)).to(s.dtype)


@triton.jit
def merge_lanes(m, s, w, s2, w2, scale, SECOND_ORDER: tl.constexpr):
    """One scalar state from m (WARPS, 1) and sums (WARPS, LANES)."""
    top = tl.max(m)
    s, w, s2, w2 = raise_top(m, s, w, s2, w2, top, scale, SECOND_ORDER)
    return top, total(s), tl.sum(w), tl.sum(s2), tl.sum(w2)


@triton.jit
def finalize(m, s, w, s2, w2, x_y, temperature):
    """The statistics of a row in nats, in the order of _rows.STATISTICS; those of second order need s2 and w2.

    All of them: the compiler drops what nobody stores.
    """
    log_s = tl.log(s)
    logprob = divide(x_y - m, temperature) - log_s
    entropy = log_s + divide(w * LN2, s)
    collision = divide(divide(s2, s), s)
    q = -divide(divide(w2 * LN2 + log_s * s2, s), s)  # Σ p² log p
    p_y = tl.exp(logprob)
    own = tl.where(p_y == 0, 0.0, p_y * (logprob + entropy))
    covariance = own - (q + entropy * collision)
    p_max = divide(divide(s, s), s)  # NaN, as the others, of a row of nothing but -inf
    mean_logit = m - temperature * divide(w * LN2, s)
    return logprob, entropy, collision, covariance, p_max, mean_logit


@triton.jit
def store_state(state_ptr, plane, m, s, w, x_y, s2, w2, mask, SECOND_ORDER: tl.constexpr):
    """A state's values, ``plane`` apart."""
    tl.store(state_ptr, m, mask=mask)
    tl.store(state_ptr + plane, s, mask=mask)
    tl.store(state_ptr + 2 * plane, w, mask=mask)
    tl.store(state_ptr + 3 * plane, x_y, mask=mask)
    if SECOND_ORDER:
        tl.store(state_ptr + 4 * plane, s2, mask=mask)
        tl.store(state_ptr + 5 * plane, w2, mask=mask)


@triton.jit
def store_row(
    row,
    rows,
    m, s, w, s2, w2, x_y,
    target,
    temperature,
    ignore_index,
    vocab_size,
    stats_ptr,  # (S, N): those in WANT
    state_ptr,  # (K, N)
    WANT: tl.constexpr,
):  # fmt: skip
    """Statistics and state of one finished row, in nats."""
    ignored = target == ignore_index
    invalid = (target < 0) | (target >= vocab_size)
    nan = float("nan")
    rows = rows.to(tl.int64)
    stats = finalize(m, s, w, s2, w2, x_y, temperature)
    stats_ptr += row
    for bit in tl.static_range(STATISTICS_COUNT):
        if (WANT >> bit) & 1:
            tl.store(stats_ptr, tl.where(ignored, 0.0, tl.where(invalid, nan, stats[bit])))
            stats_ptr += rows
    # NaN marks m too: the maximum itself skips NaN, and whoever merges shards may skip a shard at -inf
    m = tl.where(ignored, 0.0, tl.where(s != s, nan, m))
    s = tl.where(ignored, 1.0, s)
    w = tl.where(ignored, 0.0, w * LN2)
    x_y = tl.where(ignored, 0.0, x_y)
    s2 = tl.where(ignored, 1.0, s2)
    w2 = tl.where(ignored, 0.0, w2 * LN2)
    store_state(state_ptr + row, rows, m, s, w, x_y, s2, w2, None, (SECOND_ORDER_BITS & WANT) != 0)
