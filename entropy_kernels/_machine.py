"""What the machine is, in words."""

from __future__ import annotations

import os
import platform

import torch


def cpu_name() -> str:
    """Of the processor, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpu_name(index: int) -> str:
    """Name, architecture and memory of a GPU."""
    p = torch.cuda.get_device_properties(index)
    architecture = getattr(p, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return f"{p.name}, {architecture}, {p.total_memory / 2**30:.0f} GiB"
