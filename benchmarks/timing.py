"""Clocks, interleaved rounds, and percentiles.

Implementations are timed in rounds: every round calls each of them, in a new random order, so that a slow minute of a
shared machine falls on all of them alike and a ratio survives it. Outputs are new in every call, as in training.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from benchmarks.cuda import CudaClock
from benchmarks.registry import Prepared

WARM_UP = 2  # calls before the first round, after the checked one
LONG = 0.2  # seconds; an implementation slower than this is warm after one call
BUDGET = 12.0  # seconds that one implementation may take of a group's rounds
FEWEST = 3  # rounds that even a slower one takes part in
SHORT = 20e-3  # an implementation faster than this is called several times per round
CALLS_PER_ROUND = 8


class Clock(Protocol):
    """Seconds of one call, after its reset."""

    def time(self, prepared: Prepared, /) -> float: ...


class CpuClock:
    """perf_counter around the call.

    Args:
        flush_bytes: 0 leaves the caches as the previous call left them ("hot"); otherwise a buffer of this size is
            written before each call ("cold"): at least twice the last-level cache.
    """

    def __init__(self, flush_bytes: int = 0) -> None:
        self._flush = torch.zeros(flush_bytes // 8, dtype=torch.int64) if flush_bytes else None

    def time(self, prepared: Prepared) -> float:
        if prepared.reset is not None:
            prepared.reset()
        if self._flush is not None:
            self._flush.add_(1)
        start = time.perf_counter()
        output = prepared.call()
        end = time.perf_counter()
        del output  # freed after the clock has stopped: the next call allocates anew
        return end - start


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L2 of a GPU; of a CPU what Linux reports, or 32 MiB where it reports nothing."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_sysfs_size(index) for index in range(8)]
    return max(sizes, default=0) or 32 << 20


def _sysfs_size(index: int) -> int:
    try:
        with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") as file:
            text = file.read().strip()
    except OSError:
        return 0
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def cpu_clock(device: torch.device, cache: str) -> CpuClock:
    """The clock of a CPU; ``cache`` is "hot" or "cold"."""
    return CpuClock(2 * cache_bytes(device) if cache == "cold" else 0)


@functools.cache
def cuda_clock(device: torch.device, cache: str) -> CudaClock:
    """The clock of a GPU, made once; ``cache`` is "hot" or "cold": four times L2, since its policy is not known."""
    return CudaClock(device, 4 * cache_bytes(device) if cache == "cold" else 0)


def clock_for(device: torch.device, cache: str) -> Clock:
    """The clock of a device; ``cache`` is "hot" or "cold"."""
    return cuda_clock(device, cache) if device.type == "cuda" else cpu_clock(device, cache)


def interleave(
    calls: Sequence[Prepared],
    clock: Clock,
    repeats: int,
    *,
    seed: int = 0,
    tick: Callable[[], Any] = lambda: None,
    deadline: float = math.inf,
    budget: float | None = None,
    several: bool = True,
) -> list[list[float]]:
    """Seconds of every call, as lists parallel to ``calls``: ``repeats`` rounds, a new order in each.

    Short calls are timed several times per round, so that their percentiles rest on more samples (not so without
    ``several``: a flush before each can take a tenth of a second); calls so long that ``repeats`` of them exceed
    ``budget`` (seconds, by default BUDGET) take part in fewer rounds, FEWEST at least.
    ``tick`` is called after each implementation's turn, for a progress bar. After ``deadline`` (of time.monotonic) no
    new round is begun, once every implementation has been in one.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected >= 1, got {repeats}")
    budget = BUDGET if budget is None else budget
    turns, rounds = [], []
    for prepared in calls:
        warm = clock.time(prepared)
        for _ in range(WARM_UP - 1 if warm < LONG and several else 0):
            warm = min(warm, clock.time(prepared))
        turns.append(max(1, min(CALLS_PER_ROUND if several else 1, int(SHORT / max(warm, 1e-9)))))
        rounds.append(max(FEWEST, min(repeats, int(budget / max(warm, 1e-9)))))
        tick()
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside a timed call would be charged to whoever happens to run
    try:
        for done in range(repeats):
            if done and time.monotonic() > deadline:
                break
            shuffle(order)
            for index in order:
                if done >= rounds[index]:
                    continue
                samples[index].extend(clock.time(calls[index]) for _ in range(turns[index]))
                tick()
            gc.collect(1)  # what a round left behind; a full collection takes longer than many a call
    finally:
        if collecting:
            gc.enable()
    return samples


def host_seconds(prepared: Prepared, device: torch.device, loops: int) -> float:
    """Mean seconds that the host spends per call over ``loops`` calls; device work is not waited for in between."""
    call = prepared.call
    start = time.perf_counter()
    for _ in range(loops):
        call()
    elapsed = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return elapsed / loops


@dataclass(frozen=True)
class Summary:
    """Order statistics of the samples in seconds; ``spread`` is (p90 - p10) / median."""

    count: int
    min: float
    median: float
    p10: float
    p90: float
    spread: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise(samples: Sequence[float]) -> Summary:
    """Summary of at least one sample; percentiles interpolate between order statistics."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    median, p10, p90 = statistics.median(ordered), quantile(0.1), quantile(0.9)
    return Summary(len(ordered), ordered[0], median, p10, p90, (p90 - p10) / median if median else 0.0)
