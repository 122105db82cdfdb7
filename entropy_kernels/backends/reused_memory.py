"""Memory for large CPU gradients, handed out again once the tensor that held it is gone.

The gradient of 512 x 151936 fp32 logits is 311 MB. The C library returns so large a block to the system when it is
freed, and the next backward pass pays for the first touch of every page again: more than for the gradient itself. GPU
allocators keep such blocks for the same reason. Here the last one is kept, in a state in which the system may take its
pages whenever somebody else needs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

#: Blocks below this come from torch's allocator: the C library keeps them by itself.
LARGE_BYTES = 16 << 20
_HUGE_PAGE = 2 << 20
_SUPPORTED = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")  # Linux

# One block at most, the last that came back. A deque, not a lock: a tensor can die anywhere, also inside of `empty`.
_kept: deque[mmap.mmap] = deque(maxlen=1)
_from_torch = False


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor, uninitialised; a large one in the memory of an earlier one where that fits.

    Its storage cannot be resized. Whoever holds the tensor or a view of it holds the memory.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LARGE_BYTES or not _SUPPORTED or _from_torch:
        return torch.empty(shape, dtype=dtype)
    block = _block(size)
    lease = (ctypes.c_char * size).from_buffer(block)
    # The storage holds the lease; when it dies, the block comes back.
    weakref.finalize(lease, _give_back, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def _block(size: int) -> mmap.mmap:
    try:
        block = _kept.pop()
    except IndexError:
        pass
    else:
        if len(block) >= size:
            return block
        block.close()
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    block.madvise(mmap.MADV_FREE)
    _kept.append(block)


def release() -> None:
    """Return the kept block to the system."""
    while _kept:
        _kept.pop().close()


@contextlib.contextmanager
def from_torch() -> Iterator[None]:
    """Inside, large blocks come from torch's allocator, too: whoever measures memory sees them."""
    global _from_torch
    before, _from_torch = _from_torch, True
    try:
        yield
    finally:
        _from_torch = before
