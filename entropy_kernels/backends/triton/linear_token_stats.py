"""Statistics of softmax(hidden @ weightᵀ + bias) in Triton, without logits in memory: product and state in one kernel.

A program computes tiles of the logits, as a product in fp32, for some tokens and a run of neighbouring parts of the
vocabulary, and adds each to the softmax state of its tokens (softmax_state.py) where it stands, in the accumulator.
What it leaves is a state per token and run, which the merge kernel of token_stats finishes. Programs of the same run
stand side by side in groups of tokens, so that they find its weights, and their own hidden states, in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from entropy_kernels._rows import SECOND_ORDER, RowOptions, state_rows
from entropy_kernels.backends.triton import tiling
from entropy_kernels.backends.triton.softcap import cap
from entropy_kernels.backends.triton.softmax_state import add_rows, bits_per_logit, store_state
from entropy_kernels.backends.triton.tiling import LinearTiling
from entropy_kernels.backends.triton.token_stats import forward_outputs
from entropy_kernels.backends.triton.token_stats_kernels import COMPILE, INTERPRETED, merge_kernel, rounded
from entropy_kernels.backends.triton.tuning import ShapeClass, tuned

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _block(matrix, first, count, k, features, stride, stride_k,
           ROWS: tl.constexpr, FEATURES: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """(ROWS, FEATURES) of a matrix (count, features), from row ``first`` and column k on; 0 outside of it."""
    if DESCRIPTORS:
        block = matrix.load([first, k])
    else:
        row = first + tl.arange(0, ROWS)[:, None]
        column = k + tl.arange(0, FEATURES)[None, :]
        place = matrix + row.to(tl.int64) * stride + column.to(tl.int64) * stride_k
        block = tl.load(place, mask=(row < count) & (column < features), other=0.0)
    return block


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "bias_stride", "temperature_stride", "softcap", "ignore_index", "vocab_start", "parts",
        "tiles_per_part", "group",
    ],
    do_not_specialize_on_alignment=["bias_ptr", "target_ptr", "temperature_ptr", "parts_ptr"],
)  # fmt: skip
def linear_forward_kernel(
    hidden_ptr,  # (N, H); it and the weight with DESCRIPTORS as tensor descriptors of a block
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,), not read without BIAS
    target_ptr,  # (N,), global ids
    temperature_ptr,  # (1,) with temperature_stride 0, or (N,)
    parts_ptr,  # (4 or 6, N, parts): m, s, w, x_y, s2, w2, the w in bits, as merge_kernel takes them
    rows,  # N
    columns,  # of the weight that exist: min(V, vocab_size - vocab_start)
    features,  # H
    hidden_stride,
    hidden_stride_k,
    weight_stride,
    weight_stride_k,
    bias_stride,
    temperature_stride,
    softcap: tl.float64,
    ignore_index: tl.int64,
    vocab_start: tl.int64,
    parts,
    tiles_per_part,
    group,  # tiles of rows that share the parts of the vocabulary before the next group begins
    SECOND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LOGITS: tl.constexpr,  # dtype that the logits are rounded to
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of rows · parts,): the states of ROWS rows over tiles_per_part tiles of COLUMNS columns."""
    around = tl.program_id(0) // (group * parts) * group  # first tile of rows of the group
    members = tl.minimum(tl.cdiv(rows, ROWS) - around, group)
    within = tl.program_id(0) % (group * parts)
    part = within // members
    first_row = (around + within % members) * ROWS

    row = first_row + tl.arange(0, ROWS)[:, None]  # (ROWS, 1), as all that is one per row
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride, mask=exists, other=1.0)
    scale = bits_per_logit(temperature)
    softcap = tl.cast(softcap, tl.float32)
    counts = exists & (target != ignore_index)
    local = tl.where(counts, target - vocab_start, -1)
    local = tl.where((local >= 0) & (local < columns), local, -1).to(tl.int32)

    m = tl.full((ROWS, 1), -float("inf"), tl.float32)
    x_y = m
    s = tl.zeros((ROWS, 1), tl.float32)
    w = s
    s2 = s
    w2 = s
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tl.cdiv(columns, COLUMNS))
    if tl.max(counts.to(tl.int32)) == 0:
        last = first  # nothing but ignored rows
    for tile in range(first, last):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        # what is added to the product stands in its sums from the start, where it costs no registers afterwards
        z = tl.zeros((1, COLUMNS), tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + column.to(tl.int64) * bias_stride, mask=column < columns, other=0.0)
            z = bias.to(tl.float32)
        z = tl.broadcast_to(tl.where(column < columns, z, -float("inf")), (ROWS, COLUMNS))
        for k in tl.range(0, features, FEATURES, num_stages=STAGES):
            h = _block(
                hidden_ptr, first_row, rows, k, features, hidden_stride, hidden_stride_k, ROWS, FEATURES, DESCRIPTORS
            )
            v = _block(
                weight_ptr, tile * COLUMNS, columns, k, features, weight_stride, weight_stride_k, COLUMNS, FEATURES,
                DESCRIPTORS,
            )  # fmt: skip
            if INTERPRETED:  # whose dot takes the bits of bf16 for integers
                h = h.to(tl.float32)
                v = v.to(tl.float32)
            z = tl.dot(h, v.T, z, input_precision="ieee")
        # one half of the columns after the other: half the registers on the way
        halves = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            start = tile * COLUMNS + half * (COLUMNS // 2)
            column = start + tl.arange(0, COLUMNS // 2)[None, :]
            x, _ = cap(rounded(halves[half], LOGITS).to(tl.float32), softcap, SOFTCAP)
            if SOFTCAP:
                x = tl.where(column < columns, x, -float("inf"))
            if tl.max(((local >= start) & (local < start + COLUMNS // 2)).to(tl.int32)) > 0:
                x_y = tl.maximum(x_y, tl.max(tl.where(column == local, x, -float("inf")), axis=1, keep_dims=True))
            m, s, w, s2, w2 = add_rows(x, m, s, w, s2, w2, scale, SECOND)

    plane = rows.to(tl.int64) * parts
    store_state(parts_ptr + row.to(tl.int64) * parts + part, plane, m, s, w, x_y, s2, w2, exists, SECOND)


def linear_token_stats_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    options: RowOptions,
    want: int,
    logits_dtype: torch.dtype,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Statistics and softmax state of each token, without its logits.

    Args:
        hidden: (N, H) bf16, fp16 or fp32, any strides.
        weight: (V, H) of the same dtype, any strides.
        bias: (V,) of any floating dtype, or None.
        target, temperature, options, want: as in token_stats_forward, for logits (N, V).
        logits_dtype: bf16, fp16 or fp32; the logits, bias included, are rounded to it once.
        scratch_bytes: for the states of parts of the vocabulary: about how much to use, at least one state per token.

    Returns:
        As token_stats_forward.
    """
    if target.numel() == 0:
        return forward_outputs(0, temperature, want)
    with torch.cuda.device_of(hidden):
        cut = tuned(hidden.device, *choices(hidden, weight, options, want))
        return forward(cut, hidden, weight, bias, target, temperature, options, want, logits_dtype, scratch_bytes)


def choices(
    hidden: Tensor, weight: Tensor, options: RowOptions, want: int
) -> tuple[ShapeClass, tuple[LinearTiling, ...]]:
    """The class of shapes of a call, and its tilings."""
    rows, columns = hidden.shape[0], options.columns(weight.shape[0])
    described = _described(hidden, weight, columns)
    # "linear-12": H of (2¹¹, 2¹²], which decides how much of the time the epilogue is
    direction = f"linear-{max(0, hidden.shape[1] - 1).bit_length()}"
    shape = ShapeClass.of(direction, hidden.dtype, described, want & SECOND_ORDER, options, columns, rows)
    on = tiling.hardware(hidden.device)
    return shape, tiling.linear_candidates(hidden.element_size(), shape.rows, described, options.softcap != 0, on)


def _described(hidden: Tensor, weight: Tensor, columns: int) -> bool:
    """Whether the hardware copies blocks of both by itself."""
    on = tiling.hardware(hidden.device)
    return on.descriptors and columns > 0 and _describable(hidden) and _describable(weight)


def _describable(matrix: Tensor) -> bool:
    """Whether the hardware can copy blocks of it by itself: aligned rows of neighbouring elements.

    Not of fp32, where the factors go on to registers, and not of rows that overlap, such as one that is expanded.
    """
    size = matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * size % 16 == 0
    apart = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return size == 2 and aligned and apart and min(matrix.shape) > 0


def forward(
    cut: LinearTiling,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    options: RowOptions,
    want: int,
    logits_dtype: torch.dtype,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """linear_token_stats_forward for at least one row, cut as ``cut`` says, on the current device."""
    (rows, features), columns = hidden.shape, options.columns(weight.shape[0])
    stats, state = forward_outputs(rows, temperature, want)
    most = scratch_bytes // (state_rows(want) * rows * state.element_size())
    parts, tiles_per_part = cut.parts(rows, columns, most, tiling.hardware(hidden.device).multiprocessors)
    split = state.new_empty((state_rows(want), rows, parts))
    temperature_stride = 0 if temperature.numel() == 1 else 1
    described = _described(hidden, weight, columns)
    matrices: tuple[Any, Any] = hidden, weight
    if described:
        matrices = (
            TensorDescriptor.from_tensor(hidden, [cut.rows, cut.features]),
            TensorDescriptor.from_tensor(weight[:columns], [cut.columns, cut.features]),
        )
    linear_forward_kernel[(-(-rows // cut.rows) * parts,)](
        *matrices, state if bias is None else bias, target, temperature, split, rows, columns, features,
        *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), temperature_stride,
        options.softcap, options.ignore_index, options.vocab_start, parts, tiles_per_part, cut.group,
        SECOND=bool(want & SECOND_ORDER), SOFTCAP=options.softcap != 0, BIAS=bias is not None, DESCRIPTORS=described,
        LOGITS=DTYPES[logits_dtype], ROWS=cut.rows, COLUMNS=cut.columns, FEATURES=cut.features, STAGES=cut.stages,
        num_warps=cut.warps, **COMPILE,
    )  # fmt: skip
    merge_kernel[(rows,)](
        split, target, temperature, stats, state, rows, parts, temperature_stride, options.ignore_index,
        options.vocab_size, WANT=want, BLOCK=tiling.MAX_SPLITS, num_warps=1, **COMPILE,
    )  # fmt: skip
    return stats, state
