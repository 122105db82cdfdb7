"""Statistics of softmax rows in Triton: launches of the kernels in token_stats_kernels.py, cut by tiling.py.

Values that differ from call to call are plain arguments, never constexpr; those whose alignment or equality to 1 says
nothing about the code are excluded from Triton's automatic specialisation too, so that they do not recompile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_kernels._arguments import beside
from entropy_kernels._rows import COLLISION, SECOND_ORDER, RowOptions, state_rows
from entropy_kernels.backends.triton import tiling
from entropy_kernels.backends.triton.tiling import BackwardTiling, ForwardTiling
from entropy_kernels.backends.triton.token_stats_kernels import COMPILE, backward_kernel, forward_kernel, merge_kernel
from entropy_kernels.backends.triton.tuning import ShapeClass, tuned


def _rows_of(tensor: Tensor) -> tuple[int, int, int, int]:
    """(L, stride of B, stride of L, stride of V) of a (B, L, V) tensor, evenly spaced rows as one batch of length N.

    So strides of dimensions of size 1, which mean nothing, neither recompile nor hide that rows are aligned.
    """
    batch, length, width = tensor.shape
    stride_b, stride_l, stride_v = tensor.stride()
    stride_v = stride_v if width > 1 else 1
    if length == 1:
        return batch, 0, stride_b, stride_v
    if batch == 1 or stride_b == length * stride_l:
        return batch * length, 0, stride_l, stride_v
    return length, stride_b, stride_l, stride_v


def _aligned(tensor: Tensor, layout: tuple[int, int, int, int]) -> bool:
    """Whether Triton can prove that rows start on 16 bytes: it looks for base % 16 bytes and strides % 16 elements."""
    return tensor.data_ptr() % 16 == 0 and layout[1] % 16 == 0 and layout[2] % 16 == 0 and layout[3] == 1


def token_stats_forward(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    options: RowOptions,
    want: int,
) -> tuple[Tensor, Tensor]:
    """Statistics and softmax state of each row, from one read of the logits.

    Args:
        logits: (B, L, V) bf16, fp16, fp32 or fp64, any strides.
        target: (N,) int32 or int64 global ids, contiguous, N = B·L.
        temperature: (1,) or (N,), contiguous, or () also on the CPU, fp32 (fp64 for fp64 logits).
        options: rows with the target ``ignore_index`` give 0 and are not read.
        want: bitmask of _rows.STATISTICS.

    Returns:
        (stats, state): (S, N), the statistics in ``want`` in the order of their bits, and (K, N).
    """
    temperature = beside(temperature, logits.device)
    if target.numel() == 0:
        return forward_outputs(0, temperature, want)
    with torch.cuda.device_of(logits):
        cut = tuned(logits.device, *forward_choices(logits, options, want))
        return forward(cut, logits, target, temperature, options, want)


def forward_choices(logits: Tensor, options: RowOptions, want: int) -> tuple[ShapeClass, tuple[ForwardTiling, ...]]:
    """The class of shapes of a forward pass, and its tilings."""
    rows, columns = logits.shape[0] * logits.shape[1], options.columns(logits.shape[2])
    aligned = _aligned(logits, _rows_of(logits))
    shape = ShapeClass.of("forward", logits.dtype, aligned, want & SECOND_ORDER, options, columns, rows)
    on = tiling.hardware(logits.device)
    return shape, tiling.forward_candidates(logits.element_size(), columns, shape.rows, aligned, on)


def forward_outputs(rows: int, temperature: Tensor, want: int) -> tuple[Tensor, Tensor]:
    """Stats and state of a forward pass, not yet written."""
    return temperature.new_empty((want.bit_count(), rows)), temperature.new_empty((state_rows(want), rows))


def forward(
    cut: ForwardTiling,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    options: RowOptions,
    want: int,
) -> tuple[Tensor, Tensor]:
    """token_stats_forward for at least one row, cut as ``cut`` says, on the current device."""
    batch, length, vocab = logits.shape
    rows, columns = batch * length, options.columns(vocab)
    stats, state = forward_outputs(rows, temperature, want)
    multiprocessors = tiling.hardware(logits.device).multiprocessors
    parts, tiles_per_part = cut.parts(rows, columns, logits.element_size(), multiprocessors)
    temperature_stride = 0 if temperature.numel() == 1 else 1
    split = temperature.new_empty((6, rows, parts)) if parts > 1 else state
    forward_kernel[(rows, parts)](
        logits, target, temperature, stats, split, rows, *_rows_of(logits), columns, temperature_stride,
        *options, tiles_per_part,
        WANT=want, SOFTCAP=options.softcap != 0, PARTS=parts > 1, STEPS=cut.steps, WARPS=cut.warps, LANES=cut.lanes,
        WIDTH=cut.width, STAGES=cut.stages, num_warps=cut.warps, **COMPILE,
    )  # fmt: skip
    if parts > 1:
        merge_kernel[(rows,)](
            split, target, temperature, stats, state, rows, parts, temperature_stride, options.ignore_index,
            options.vocab_size, WANT=want, BLOCK=tiling.MAX_SPLITS, num_warps=1, **COMPILE,
        )  # fmt: skip
    return stats, state


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
    """Gradient with respect to the logits, from one read and one write.

    Args:
        grad_stats: (S, N) with any strides, the rows as in the forward's stats; not read are those of statistics that
            are not differentiable.
        logits, target, temperature, options, want: as in the forward.
        state: (K, N), merged over all shards; K = 4 suffices if ``want`` has no collision.
        inplace: write over the logits.

    Returns:
        logits itself if ``inplace``, else a contiguous (B, L, V) tensor of its dtype. Rows that are ignored or whose
        upstream gradients are all 0 are not read and get 0, so NaN in padding does not leak.
    """
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    if dlogits.numel() == 0:
        return dlogits
    temperature = beside(temperature, logits.device)
    with torch.cuda.device_of(logits):
        cut = tuned(logits.device, *backward_choices(logits, dlogits, options, want))
        backward(cut, grad_stats, logits, dlogits, target, temperature, state, options, want)
    return dlogits


def backward_choices(
    logits: Tensor, dlogits: Tensor, options: RowOptions, want: int
) -> tuple[ShapeClass, tuple[BackwardTiling, ...]]:
    """The class of shapes of a backward pass, and its tilings."""
    rows, width = logits.shape[0] * logits.shape[1], logits.shape[2]
    aligned = all(_aligned(x, _rows_of(x)) for x in (logits, dlogits))
    shape = ShapeClass.of("backward", logits.dtype, aligned, want & COLLISION, options, width, rows)
    on = tiling.hardware(logits.device)
    return shape, tiling.backward_candidates(logits.element_size(), width, aligned, on)


def backward(
    cut: BackwardTiling,
    grad_stats: Tensor,
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    options: RowOptions,
    want: int,
) -> None:
    """Write the gradient to ``dlogits``, which may be ``logits``, cut as ``cut`` says, on the current device."""
    batch, length, width = logits.shape
    rows = batch * length
    parts = -(-width // (cut.tile * cut.tiles))
    layout: tuple[int, ...] = _rows_of(logits)
    out_layout: tuple[int, ...] = _rows_of(dlogits)
    if layout[0] != out_layout[0]:  # one is evenly spaced and the other is not: address both by (B, L)
        layout = (length, *logits.stride())
        out_layout = (length, *dlogits.stride())
    backward_kernel[(rows * parts,)](
        grad_stats, logits, dlogits, target, temperature, state, rows, *layout, *out_layout[1:], width,
        options.columns(width), *grad_stats.stride(), 0 if temperature.numel() == 1 else 1, options.softcap,
        options.ignore_index, options.vocab_start, parts, cut.tiles,
        WANT=want, SOFTCAP=options.softcap != 0, TILE=cut.tile, STAGES=cut.stages, num_warps=cut.warps, **COMPILE,
    )  # fmt: skip
