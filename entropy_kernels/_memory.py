"""The memory that a call needs at its peak, as torch's allocators count it; calls without Python's collector."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from entropy_kernels.backends import reused_memory


def peak_allocated(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch hands out at once during ``call``, above what was held before; its results are counted.

    On a GPU the allocator's own peak. Elsewhere from torch's profiler, which slows the call down and sees nothing that
    C++ code allocates by itself; what this library would keep for the next call comes from torch meanwhile. Python's
    collector waits: garbage of before that it freed meanwhile would count as room that the call had.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with without_collection():
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            output = call()
        torch.cuda.synchronize(device)
        del output
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with without_collection(), _quiet(), reused_memory.from_torch(), profiler as profile:
        output = call()
    del output
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Inside, Python's collector of cycles does not run by itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, C++ code writes nothing to stderr: the profiler says there that it starts, and what it will not see."""
    try:
        before = os.dup(2)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
