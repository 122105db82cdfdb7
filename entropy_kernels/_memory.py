"""The memory that a call needs at its peak, as torch's allocators count it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from entropy_kernels.backends import reused_memory


def peak_allocated(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch hands out at once during ``call``, above what was held before; its results are counted.

    On a GPU the allocator's own peak. Elsewhere from torch's profiler, which slows the call down and sees nothing that
    C++ code allocates by itself; what this library would keep for the next call comes from torch meanwhile.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = call()
        torch.cuda.synchronize(device)
        del output
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with reused_memory.from_torch(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        output = call()
    del output
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
