"""Bytes: the least an op must move, what the machine can move, and the extra memory that a call needs at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.registry import Prepared
from benchmarks.shapes import Case, HiddenShape, LogitsShape, TokensShape
from benchmarks.timing import cache_bytes, clock_for
from entropy_kernels._memory import peak_allocated
from entropy_kernels.backends import reused_memory


@dataclass(frozen=True)
class Traffic:
    """Bytes that must be read and written: every input once per pass that needs it, every output once."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def least_traffic(op: str, name: str, case: Case) -> Traffic:
    """The floor of an op for a case; for the floor ops, what they do."""
    shape = case.shape
    if isinstance(shape, LogitsShape):
        logits, tokens = shape.rows * shape.vocab * case.dtype.itemsize, shape.rows
        if op == "logits_floor":
            return Traffic(logits, logits if name == "copy" else 0)
        if op == "logprob_entropy_bwd":  # reads the logits and the rows' states, writes the gradient
            return Traffic(logits + 32 * tokens, logits)
        if op == "logprob_entropy_fwdbwd":  # forward reads; backward reads again and writes the gradient
            return Traffic(2 * logits + 32 * tokens, logits + 8 * tokens)
        return Traffic(logits + 8 * tokens, (16 if op == "token_stats" else 8) * tokens)
    if isinstance(shape, TokensShape):
        read, written = {"token_covariance": (9, 4), "tokens_floor": (4, 0)}.get(op, (4, 1))
        return Traffic(read * shape.tokens, written * shape.tokens)
    if isinstance(shape, HiddenShape):  # a product's operands and results; nobody needs the logits in memory
        factors = (shape.rows + shape.vocab) * shape.features * case.dtype.itemsize
        once = Traffic(factors + 8 * shape.rows, 8 * shape.rows)
        forward = op == "linear_logprob_entropy" or name == "product"
        return once if forward else Traffic(2 * once.read, once.written + factors)
    tokens = shape.sequences * shape.length
    return Traffic(13 * tokens, 4 * tokens)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second measured in this run; a copy counts the bytes read and those written."""

    read: float
    copy: float
    buffer_bytes: int


def measure_bandwidth(device: torch.device, *, repeats: int = 9) -> Bandwidth:
    """Read (integer sum; on a GPU or amax, if faster) and copy rate, medians, over eight times the last-level cache.

    256 MiB at least. On a GPU 2 GiB: a quarter of a millisecond would still show how a kernel begins and ends.
    """
    buffer_bytes = max(2 << 30 if device.type == "cuda" else 256 << 20, 8 * cache_bytes(device))
    source = torch.ones(buffer_bytes // 8, dtype=torch.int64, device=device)
    destination = torch.zeros_like(source)
    clock = clock_for(device, "hot")

    def median(call: Callable[[], Any]) -> float:
        prepared = Prepared(call)
        clock.time(prepared)
        return statistics.median(clock.time(prepared) for _ in range(repeats))

    read, copy = median(source.sum), median(lambda: destination.copy_(source))
    if device.type == "cuda":
        read = min(read, median(source.view(torch.float32).amax))
    return Bandwidth(buffer_bytes / read, 2 * buffer_bytes / copy, buffer_bytes)


# --- peak extra memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """``bytes`` above what was held before the call, its outputs included; ``method`` says how it was seen."""

    bytes: int
    method: str


def peak_extra_memory(prepared: Prepared, device: torch.device, *, tries: int = 3) -> Peak:
    """Peak memory that one (warm) call adds. The smallest of ``tries``: other threads can only add to it.

    A peak above 64 MB is taken as it is: what disturbs it is far smaller, and such calls are slow.

    On Linux the high-water mark of the resident set (VmHWM, reset through /proc/self/clear_refs), which also sees what
    C++ code allocates on its own; the kernel counts it to about 0.1 MB. Elsewhere torch's own allocations, from its
    profiler. On CUDA the allocator's peak.
    """
    if tries < 1:
        raise ValueError(f"tries: expected >= 1, got {tries}")
    if device.type == "cuda":  # the allocator counts exactly
        tries = 1
    measure = _peak_resident if device.type != "cuda" and _resets_high_water() else _peak_allocated
    peaks = []
    for _ in range(tries):
        if prepared.reset is not None:
            prepared.reset()
        peaks.append(measure(prepared.call, device))
        if peaks[-1].bytes > 64 << 20:
            break
    return Peak(max(0, min(peak.bytes for peak in peaks)), peaks[0].method)


def _resets_high_water() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        _reset_high_water()
    except OSError:
        return False
    return True


def _reset_high_water() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _peak_resident(call: Callable[[], Any], device: torch.device) -> Peak:
    with contextlib.suppress(OSError, AttributeError):
        # glibc keeps freed memory resident: give it back, else a call that needs it again seems to need nothing
        ctypes.CDLL(None).malloc_trim(0)
    reused_memory.release()  # the same for the gradient that our backward pass keeps
    _reset_high_water()
    before = _status("VmRSS")
    output = call()
    peak = _status("VmHWM") - before
    del output
    return Peak(peak, "resident set high-water mark")


def _peak_allocated(call: Callable[[], Any], device: torch.device) -> Peak:
    method = "CUDA allocator peak" if device.type == "cuda" else "torch profiler, torch's allocations only"
    return Peak(peak_allocated(call, device), method)
