"""Statistics of softmax rows in Triton: launches of the kernels in token_stats_kernels.py, cut by tiling.py.

Values that differ from call to call are plain arguments, never constexpr; those whose alignment or equality to 1 says
nothing about the code are excluded from Triton's automatic specialisation too, so that they do not recompile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_kernels._rows import state_rows
from entropy_kernels.backends.triton import tiling, tuning
from entropy_kernels.backends.triton.tiling import BackwardTiling, ForwardTiling
from entropy_kernels.backends.triton.token_stats_kernels import COMPILE, backward_kernel, forward_kernel, merge_kernel
from entropy_kernels.backends.triton.tuning import ShapeClass


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


def _scratch_logits(like: Tensor, columns: int, rows: int, aligned: bool, budget: int) -> Tensor:
    """(B, L, columns) zeros for timing: at least ``rows`` rows in ``budget`` bytes, the same L rows B times over."""
    odd = 0 if aligned else 1
    pitch = -(-columns // 16) * 16 + odd
    length = max(1, min(rows, budget // (pitch * like.element_size())))
    memory = torch.zeros(length * pitch + odd, dtype=like.dtype, device=like.device)
    return memory.as_strided((-(-rows // length), length, columns), (0, pitch, 1), odd)


def token_stats_forward(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    want: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics and softmax state of each row, from one read of the logits.

    Args:
        logits: (B, L, V) bf16, fp16, fp32 or fp64, any strides.
        target: (N,) int32 or int64 global ids, contiguous, N = B·L.
        temperature: (1,) or (N,), contiguous, fp32 (fp64 for fp64 logits).
        softcap: 0.0 for none.
        ignore_index: rows with this target give 0 and are not read.
        vocab_start: global id of column 0.
        vocab_size: columns whose global id is at or beyond it count as -inf.
        want: bitmask of outputs, 1 log-prob, 2 entropy, 4 collision, 8 vocabulary covariance.

    Returns:
        (logprob, entropy, collision, vocab_covariance, state): (N,) each, or (0,) where not wanted; state (K, N).
    """
    rows, columns = logits.shape[0] * logits.shape[1], max(0, min(logits.shape[2], vocab_size - vocab_start))
    if rows == 0:
        return forward_outputs(rows, temperature, want)
    device, aligned = logits.device, _aligned(logits, _rows_of(logits))
    shape = ShapeClass.of("forward", logits.dtype, aligned, want >= 4, softcap != 0, columns, rows)
    candidates = tiling.forward_candidates(logits.element_size(), columns, shape.rows, aligned, tiling.hardware(device))

    def scratch(budget: int) -> Callable[[ForwardTiling], object]:
        block = _scratch_logits(logits, columns, min(rows, tuning.MAX_ROWS), aligned, budget)
        labels = torch.zeros(block.shape[0] * block.shape[1], dtype=torch.int64, device=device)
        one = torch.ones(1, dtype=temperature.dtype, device=device)
        return lambda cut: _forward(cut, block, labels, one, softcap, -100, 0, columns, want)

    with torch.cuda.device_of(logits):
        cut = tuning.choose(shape, device, candidates, scratch)
        return _forward(cut, logits, target, temperature, softcap, ignore_index, vocab_start, vocab_size, want)


def forward_outputs(rows: int, temperature: Tensor, want: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprob, entropy, collision, covariance = (temperature.new_empty(rows if want & (1 << i) else 0) for i in range(4))
    return logprob, entropy, collision, covariance, temperature.new_empty((state_rows(want), rows))


def _forward(
    cut: ForwardTiling,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    want: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_stats_forward for at least one row, cut as ``cut`` says, on the current device."""
    batch, length, vocab = logits.shape
    rows, columns = batch * length, max(0, min(vocab, vocab_size - vocab_start))
    results = forward_outputs(rows, temperature, want)
    *outputs, state = results
    multiprocessors = tiling.hardware(logits.device).multiprocessors
    parts, tiles_per_part = cut.parts(rows, columns, logits.element_size(), multiprocessors)
    temperature_stride = 0 if temperature.numel() == 1 else 1
    split = temperature.new_empty((6, rows, parts)) if parts > 1 else state
    forward_kernel[(rows, parts)](
        logits, target, temperature, *outputs, split, rows, *_rows_of(logits), columns, temperature_stride,
        softcap, ignore_index, vocab_start, vocab_size, tiles_per_part,
        WANT=want, SOFTCAP=softcap != 0, PARTS=parts > 1, STEPS=cut.steps, WARPS=cut.warps, LANES=cut.lanes,
        WIDTH=cut.width, STAGES=cut.stages, num_warps=cut.warps, **COMPILE,
    )  # fmt: skip
    if parts > 1:
        merge_kernel[(rows,)](
            split, target, temperature, *outputs, state, rows, parts, temperature_stride, ignore_index, vocab_size,
            WANT=want, BLOCK=tiling.MAX_SPLITS, num_warps=1, **COMPILE,
        )  # fmt: skip
    return results


def token_stats_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_collision: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    inplace: bool,
) -> Tensor:
    """Gradient with respect to the logits, from one read and one write.

    Args:
        grad_logprob, grad_entropy, grad_collision: (N,) with any stride, or None.
        logits, target, temperature, softcap, ignore_index, vocab_start, vocab_size: as in the forward.
        state: (K, N), merged over all shards; K = 4 suffices without grad_collision.
        inplace: write over the logits.

    Returns:
        logits itself if ``inplace``, else a contiguous (B, L, V) tensor of its dtype. Rows that are ignored or whose
        upstream gradients are all 0 are not read and get 0, so NaN in padding does not leak.
    """
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    if dlogits.numel() == 0:
        return dlogits
    rows, width = logits.shape[0] * logits.shape[1], logits.shape[2]
    columns = max(0, min(width, vocab_size - vocab_start))
    grads = (grad_logprob, grad_entropy, grad_collision)
    device, aligned = logits.device, all(_aligned(x, _rows_of(x)) for x in (logits, dlogits))
    shape = ShapeClass.of("backward", logits.dtype, aligned, grad_collision is not None, softcap != 0, width, rows)
    candidates = tiling.backward_candidates(logits.element_size(), width, aligned, tiling.hardware(device))

    def scratch(budget: int) -> Callable[[BackwardTiling], object]:
        block = _scratch_logits(logits, width, min(rows, tuning.MAX_ROWS), aligned, budget)
        n = block.shape[0] * block.shape[1]
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        ones = temperature.new_ones((6, n))
        upstream = [None if grad is None else ones[0] for grad in grads]
        # in place: as many bytes are read and written as out of place
        return lambda cut: _backward(cut, upstream, block, block, labels, ones[0, :1], ones, softcap, -100, 0, columns)

    with torch.cuda.device_of(logits):
        cut = tuning.choose(shape, device, candidates, scratch)
        _backward(cut, grads, logits, dlogits, target, temperature, state, softcap, ignore_index, vocab_start, columns)
    return dlogits


def _backward(
    cut: BackwardTiling,
    grads: Sequence[Tensor | None],
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    columns: int,
) -> None:
    """Write the gradient to ``dlogits``, which may be ``logits``, cut as ``cut`` says, on the current device.

    ``grads``: of log-prob, entropy and collision.
    """
    batch, length, width = logits.shape
    rows = batch * length
    parts = -(-width // (cut.tile * cut.tiles))
    pointers = [state if grad is None else grad for grad in grads]
    strides = [0 if grad is None else grad.stride(0) for grad in grads]
    layout: tuple[int, ...] = _rows_of(logits)
    out_layout: tuple[int, ...] = _rows_of(dlogits)
    if layout[0] != out_layout[0]:  # one is evenly spaced and the other is not: address both by (B, L)
        layout = (length, *logits.stride())
        out_layout = (length, *dlogits.stride())
    backward_kernel[(rows * parts,)](
        *pointers, logits, dlogits, target, temperature, state, rows, *layout, *out_layout[1:], width, columns,
        *strides, 0 if temperature.numel() == 1 else 1, softcap, ignore_index, vocab_start, parts, cut.tiles,
        LOGPROB=grads[0] is not None, ENTROPY=grads[1] is not None, COLLISION=grads[2] is not None,
        SOFTCAP=softcap != 0, TILE=cut.tile, STAGES=cut.stages, num_warps=cut.warps, **COMPILE,
    )  # fmt: skip
