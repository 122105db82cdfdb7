"""The kernels of token_stats: one read forward; one read and one write backward. token_stats.py launches them.

Forward: a program owns a row, or one of several parts of a row when rows are few; it walks over tiles of
(STEPS, WARPS·LANES·WIDTH) logits with the next tiles' loads in flight and keeps one state per warp, sums per lane
(softmax_state.py), merged once at the end. Parts of a row leave their states in a buffer that a second, tiny kernel
merges. Backward: a program owns a stretch of a row.

The next tiles wait in registers (STAGES = 1) or, copied asynchronously, in shared memory (STAGES - 1 tiles ahead).

Values that differ from call to call are plain arguments, never constexpr; those whose alignment or equality to 1 says
nothing about the code are excluded from Triton's automatic specialisation too, so that they do not recompile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from entropy_kernels import _rows
from entropy_kernels.backends.triton.softcap import cap
from entropy_kernels.backends.triton.softmax_state import (
    LN2,
    SECOND_ORDER_BITS,
    add_tile,
    bits_per_logit,
    divide,
    log2_probability,
    merge_lanes,
    raise_top,
    store_row,
    store_state,
    total,
)

LOGPROB, ENTROPY, COLLISION = (tl.constexpr(bit) for bit in (_rows.LOGPROB, _rows.ENTROPY, _rows.COLLISION))

# Each loop says for itself how far it loads ahead (num_stages is for those that do not); sums of products are fused.
COMPILE = {"num_stages": 1, "enable_fp_fusion": True}

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _row_offset(row, length, stride_b, stride_l):
    """Offset of row b·length + l; 64 bits before the product with a stride, as rows·V may exceed 2³¹."""
    return (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


@triton.jit
def _all_or_none(like, tile, end):
    """Mask of ``like``'s shape, the same everywhere (so that it allows wide loads): tile < end."""
    return tl.full(like.shape, tile, tl.int32) < end


_ROW_ARGUMENTS = ["rows", "length", "temperature_stride", "ignore_index", "vocab_start", "vocab_size"]
_ROW_POINTERS = ["target_ptr", "temperature_ptr"]


@triton.jit(
    do_not_specialize=[*_ROW_ARGUMENTS, "tiles_per_part", "softcap"],
    do_not_specialize_on_alignment=_ROW_POINTERS,
)
def forward_kernel(
    logits_ptr,  # row n = b·length + l starts at b·stride_b + l·stride_l, column j lies j·stride_v further
    target_ptr,  # (N,), global ids
    temperature_ptr,  # (1,) with temperature_stride 0, or (N,)
    stats_ptr,  # (S, N): those in WANT
    state_ptr,  # (K, N); with PARTS the buffer (6, N, parts) of unmerged states
    rows,  # N
    length,
    stride_b,
    stride_l,
    stride_v,
    columns,  # those of this shard that exist: min(V, vocab_size - vocab_start)
    temperature_stride,
    softcap: tl.float64,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    vocab_size: tl.int64,
    tiles_per_part,
    WANT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (N, parts): the state of one row or of one part of it, and its results if it is the whole."""
    TILE: tl.constexpr = STEPS * WARPS * LANES * WIDTH
    SECOND: tl.constexpr = (SECOND_ORDER_BITS & WANT) != 0
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0)
    part = tl.program_id(1)
    target = tl.load(target_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    scale = bits_per_logit(temperature)
    softcap = tl.cast(softcap, ACC)
    row_ptr = logits_ptr + _row_offset(row, length, stride_b, stride_l)

    limit = tl.where(target == ignore_index, 0, columns)  # an ignored row is not read
    whole_tiles = limit // TILE
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, whole_tiles)

    step = tl.arange(0, STEPS)[:, None]
    place = tl.arange(0, WARPS * LANES * WIDTH)[None, :]
    column = step * (WARPS * LANES * WIDTH) + place  # (STEPS, WARPS·LANES·WIDTH)
    offset = column.to(tl.int64) * stride_v
    jump = tl.cast(stride_v, tl.int64) * TILE

    m = tl.full((WARPS, 1), -float("inf"), ACC)
    s = tl.zeros((WARPS, LANES), ACC)
    w = tl.zeros((WARPS, LANES), ACC)
    s2 = tl.zeros((WARPS, LANES), ACC)
    w2 = tl.zeros((WARPS, LANES), ACC)

    # Whole tiles are loaded without a mask per element: with one, loads of 16 bytes would need columns % 8 == 0.
    tile_ptr = row_ptr + first.to(tl.int64) * jump
    if STAGES > 1:
        for _tile in tl.range(first, last, num_stages=STAGES):
            z, _q = cap(tl.load(tile_ptr + offset).to(ACC), softcap, SOFTCAP)
            tile_ptr += jump
            m, s, w, s2, w2 = add_tile(z, m, s, w, s2, w2, scale, WARPS, LANES, WIDTH, SECOND)
    else:
        following = tl.load(tile_ptr + offset, mask=_all_or_none(column, first, last))
        for tile in range(first, last):
            current = following
            tile_ptr += jump
            following = tl.load(tile_ptr + offset, mask=_all_or_none(column, tile + 1, last))
            z, _q = cap(current.to(ACC), softcap, SOFTCAP)
            m, s, w, s2, w2 = add_tile(z, m, s, w, s2, w2, scale, WARPS, LANES, WIDTH, SECOND)

    if (whole_tiles >= first) & (whole_tiles < first + tiles_per_part) & (whole_tiles * TILE < limit):
        exists = column < limit - whole_tiles * TILE
        rest = tl.load(row_ptr + whole_tiles.to(tl.int64) * jump + offset, mask=exists, other=0.0)
        z, _ = cap(rest.to(ACC), softcap, SOFTCAP)
        z = tl.where(exists, z, -float("inf"))
        m, s, w, s2, w2 = add_tile(z, m, s, w, s2, w2, scale, WARPS, LANES, WIDTH, SECOND)

    top, sum_s, sum_w, sum_s2, sum_w2 = merge_lanes(m, s, w, s2, w2, scale, SECOND)
    local = target - vocab_start
    here = (local >= 0) & (local < limit) & (part == 0)
    x_y = tl.load(row_ptr + local * stride_v, mask=here, other=0.0).to(ACC)
    x_y, _ = cap(x_y, softcap, SOFTCAP)
    x_y = tl.where(here, x_y, -float("inf"))
    if PARTS:
        parts = tl.num_programs(1)
        plane = rows.to(tl.int64) * parts
        state_ptr += row.to(tl.int64) * parts + part
        store_state(state_ptr, plane, top, sum_s, sum_w, x_y, sum_s2, sum_w2, None, SECOND)
    else:
        store_row(
            row, rows, top, sum_s, sum_w, sum_s2, sum_w2, x_y, target, temperature, ignore_index, vocab_size,
            stats_ptr, state_ptr, WANT,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["rows", "parts", "temperature_stride", "ignore_index", "vocab_size"],
    do_not_specialize_on_alignment=_ROW_POINTERS,
)
def merge_kernel(
    parts_ptr,  # (6, N, parts): m, s, w, x_y, s2, w2, the w in bits
    target_ptr,  # (N,)
    temperature_ptr,  # (1,) or (N,)
    stats_ptr,  # (S, N): those in WANT
    state_ptr,  # (K, N)
    rows,
    parts,
    temperature_stride,
    ignore_index: tl.int64,
    vocab_size: tl.int64,
    WANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): merge the parts of one row and write its results."""
    SECOND: tl.constexpr = (SECOND_ORDER_BITS & WANT) != 0
    row = tl.program_id(0)
    target = tl.load(target_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    part = tl.arange(0, BLOCK)
    exists = part < parts
    plane = rows.to(tl.int64) * parts
    pointers = parts_ptr + row.to(tl.int64) * parts + part
    m = tl.load(pointers, mask=exists, other=-float("inf"))
    s = tl.load(pointers + plane, mask=exists, other=0.0)
    w = tl.load(pointers + 2 * plane, mask=exists, other=0.0)
    x_y = tl.max(tl.load(pointers + 3 * plane, mask=exists, other=-float("inf")))
    s2 = s
    w2 = w
    if SECOND:
        s2 = tl.load(pointers + 4 * plane, mask=exists, other=0.0)
        w2 = tl.load(pointers + 5 * plane, mask=exists, other=0.0)
    top = tl.max(m)
    s, w, s2, w2 = raise_top(m, s, w, s2, w2, top, bits_per_logit(temperature), SECOND)
    store_row(
        row, rows, top, total(s), tl.sum(w), tl.sum(s2), tl.sum(w2), x_y, target, temperature, ignore_index,
        vocab_size, stats_ptr, state_ptr, WANT,
    )  # fmt: skip


@triton.jit
def rounded(x, OUT: tl.constexpr):
    """x in dtype OUT, rounded to nearest even."""
    if OUT == tl.bfloat16 and INTERPRETED:  # noqa: SIM300
        # a cast in Triton's interpreter truncates, where the hardware rounds
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        y = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(OUT)
    return y


@triton.jit
def _gradient(z, local, row, softcap, SOFTCAP: tl.constexpr, SECOND: tl.constexpr):
    """dL/dz of a tile z (TILE,): p·(constant + per_log2_p·log2 p + per_p·p), and ``at_target`` at ``local``."""
    m, scale, log2_s, constant, per_log2_p, per_p, at_target = row
    z, q = cap(z, softcap, SOFTCAP)
    log2_p = log2_probability(z, m, scale, log2_s)
    p = tl.exp2(log2_p)
    factor = constant + per_log2_p * log2_p
    if SECOND:
        factor += per_p * p
    gradient = p * factor
    size: tl.constexpr = z.shape[0]
    if (local >= 0) & (local < size):  # one tile of the row holds the target; in fp32, before the rounding
        gradient += tl.where(tl.arange(0, size) == local, at_target, 0.0)
    if SOFTCAP:
        gradient *= 4 * q / ((1 + q) * (1 + q))  # 1 - tanh²
    return gradient


@triton.jit(
    do_not_specialize=[
        *_ROW_ARGUMENTS, "grad_stride", "grad_row_stride", "parts", "tiles_per_part", "softcap",
    ],
    do_not_specialize_on_alignment=[*_ROW_POINTERS, "grad_stats_ptr", "state_ptr"],
)  # fmt: skip
def backward_kernel(
    grad_stats_ptr,  # (S, N) with strides that may be 0: those in WANT; read are log-prob, entropy and collision
    logits_ptr,  # addressed as in the forward
    dlogits_ptr,  # may be logits_ptr: a program reads each tile before it writes it
    target_ptr,  # (N,)
    temperature_ptr,  # (1,) or (N,)
    state_ptr,  # (K, N)
    rows,
    length,
    stride_b,
    stride_l,
    stride_v,
    out_b,
    out_l,
    out_v,
    width,  # V
    columns,  # those that exist; the rest gets 0
    grad_stride,  # from statistic to statistic
    grad_row_stride,
    temperature_stride,
    softcap: tl.float64,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    parts,
    tiles_per_part,
    WANT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (N·parts,), the parts of a row side by side: the gradient of a stretch of one row."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    OUT: tl.constexpr = dlogits_ptr.dtype.element_ty
    SECOND: tl.constexpr = (COLLISION & WANT) != 0
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    target = tl.load(target_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    plane = rows.to(tl.int64)
    m = tl.load(state_ptr + row)
    s = tl.load(state_ptr + plane + row)
    w = tl.load(state_ptr + 2 * plane + row)
    softcap = tl.cast(softcap, ACC)
    log_s = tl.log(s)

    # docs/math.md §2, with log p = ln 2 · log2 p, sorted by powers of p. A gradient of 0 switches its term off.
    grad_ptr = grad_stats_ptr + row.to(tl.int64) * grad_row_stride
    at_target = s * 0
    constant = at_target
    per_log2_p = at_target
    per_p = at_target
    silent = target == ignore_index
    quiet = True  # every upstream gradient is 0
    if LOGPROB & WANT:
        at_target = tl.load(grad_ptr).to(ACC)
        constant -= at_target
        quiet = quiet & (at_target == 0)
        grad_ptr += grad_stride
    if ENTROPY & WANT:
        g = tl.load(grad_ptr).to(ACC)
        constant -= tl.where(g == 0, 0.0, g * (log_s + divide(w, s)))
        per_log2_p -= g * LN2
        quiet = quiet & (g == 0)
        grad_ptr += grad_stride
    if COLLISION & WANT:
        g = tl.load(grad_ptr).to(ACC)
        collision = divide(divide(tl.load(state_ptr + 4 * plane + row), s), s)
        constant -= tl.where(g == 0, 0.0, 2 * g * collision)
        per_p += 2 * g
        quiet = quiet & (g == 0)
    at_target = divide(at_target, temperature)
    constant = divide(constant, temperature)
    per_log2_p = divide(per_log2_p, temperature)
    per_p = divide(per_p, temperature)
    constants = (m, bits_per_logit(temperature), tl.log2(s), constant, per_log2_p, per_p, at_target)

    # A row that is ignored, or on which nothing depends, is not read: its gradient is 0 whatever it holds.
    limit = tl.where(silent | quiet, 0, columns)
    local = target - vocab_start
    local = tl.where((local >= 0) & (local < limit), local, -1).to(tl.int32)
    row_ptr = logits_ptr + _row_offset(row, length, stride_b, stride_l)
    out_ptr = dlogits_ptr + _row_offset(row, length, out_b, out_l)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(width, TILE))
    whole_end = tl.minimum(last, limit // TILE)

    column = tl.arange(0, TILE)
    offset = column.to(tl.int64) * stride_v
    out_offset = column.to(tl.int64) * out_v
    jump = tl.cast(stride_v, tl.int64) * TILE
    out_jump = tl.cast(out_v, tl.int64) * TILE
    tile_ptr = row_ptr + first.to(tl.int64) * jump
    if STAGES > 1:
        for tile in tl.range(first, whole_end, num_stages=STAGES):
            current = tl.load(tile_ptr + offset)
            tile_ptr += jump
            gradient = _gradient(current.to(ACC), local - tile * TILE, constants, softcap, SOFTCAP, SECOND)
            tl.store(out_ptr + tile * out_jump + out_offset, rounded(gradient, OUT))
    else:
        following = tl.load(tile_ptr + offset, mask=_all_or_none(column, first, whole_end))
        for tile in range(first, whole_end):
            current = following
            tile_ptr += jump
            following = tl.load(tile_ptr + offset, mask=_all_or_none(column, tile + 1, whole_end))
            gradient = _gradient(current.to(ACC), local - tile * TILE, constants, softcap, SOFTCAP, SECOND)
            tl.store(out_ptr + tile * out_jump + out_offset, rounded(gradient, OUT))

    # What is left: the tile in which the existing columns end, padded columns, rows without a gradient.
    for tile in range(tl.maximum(first, whole_end), last):
        place = column + tile * TILE
        exists = place < limit
        rest = tl.load(row_ptr + tile * jump + offset, mask=exists, other=0.0)
        gradient = _gradient(rest.to(ACC), local - tile * TILE, constants, softcap, SOFTCAP, SECOND)
        gradient = tl.where(exists, gradient, 0.0)
        tl.store(out_ptr + tile * out_jump + out_offset, rounded(gradient, OUT), mask=place < width)
