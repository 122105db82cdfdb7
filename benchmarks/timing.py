"""Clocks, interleaved rounds and percentiles; and bytes: what an op must move, what the machine can, what a call takes.

On a CPU implementations are timed in rounds: every round calls each of them, in a new random order, so that a slow
minute of a shared machine falls on all of them alike and a ratio survives it. Outputs are new in every call, as in
training.

Device time is taken between two events on the current stream. An event says when the *device* reaches it, so a device
that waits for the host would charge the host's time to the call. Every measured call therefore stands in the queue
behind a kernel that does nothing for longer than the host needs to enqueue it. Where that cannot be (a call that
waits for the device by itself, or takes the host longer than AHEAD), the time between the events is what the caller
waits for, and the row says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.cases import Case, HiddenShape, LogitsShape, TokensShape
from benchmarks.ours import Prepared, available_bytes
from entropy_kernels._memory import peak_allocated, without_collection
from entropy_kernels.backends import reused_memory

WARM_UP = 2  # calls before the first round, after the checked one
LONG = 0.2  # seconds; an implementation slower than this is warm after one call
BUDGET = 12.0  # seconds that one implementation may take of a group's rounds
FEWEST = 3  # rounds that even a slower one takes part in
FEWEST_SAMPLES = 7  # that a target should rest on
SHORT = 20e-3  # an implementation faster than this is called several times per round
CALLS_PER_ROUND = 8
# of a GPU
AHEAD = 5e-3  # seconds of host time that are hidden behind the idling kernel at most
RESOLVED = 100e-6  # a shorter call is timed several times between two events, whose resolution is half a microsecond
SEVERAL = 20  # calls between two events at most
SLOW_HOST = 0.05  # seconds of host time from which a call is neither profiled nor captured: so many launches


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


class CudaClock:
    """Seconds of device time per call.

    Args:
        flush_bytes: 0 leaves the caches as the previous call left them ("hot"); otherwise a buffer of this size is
            read before each call ("cold"), so that L2 holds nothing of it, and nothing that has yet to be written back.
    """

    def __init__(self, device: torch.device, flush_bytes: int = 0) -> None:
        self._device = device
        self._flush = torch.ones(flush_bytes // 8, dtype=torch.int64, device=device) if flush_bytes else None
        self._cycles_per_second = _cycles_per_second(device)

    def time(self, prepared: Prepared, calls: int = 1, host_seconds: float = 100e-6) -> float:
        """``host_seconds``: what enqueueing one call takes, to be hidden. Several calls only without a reset."""
        if prepared.reset is not None:
            prepared.reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        if self._flush is not None:
            self._flush.sum()
        ahead = min(AHEAD, 1.5 * calls * host_seconds + 30e-6)
        torch.cuda._sleep(int(ahead * self._cycles_per_second))
        start.record()
        for _ in range(calls):
            output = prepared.call()
        end.record()
        end.synchronize()
        del output
        return start.elapsed_time(end) * 1e-3 / calls


def _cycles_per_second(device: torch.device) -> float:
    """Of the idling kernel's clock, measured: it is the multiprocessors' clock, which varies."""
    cycles = 2_000_000
    elapsed = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        elapsed.append(start.elapsed_time(end) * 1e-3)
    return cycles / min(elapsed[1:])


Clock = CpuClock | CudaClock


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


@functools.cache
def cuda_clock(device: torch.device, cache: str) -> CudaClock:
    """The clock of a GPU, made once; ``cache`` is "hot" or "cold": four times L2, since its policy is not known."""
    return CudaClock(device, 4 * cache_bytes(device) if cache == "cold" else 0)


def clock_for(device: torch.device, cache: str) -> Clock:
    """The clock of a device; ``cache`` is "hot" or "cold"."""
    if device.type == "cuda":
        return cuda_clock(device, cache)
    return CpuClock(2 * cache_bytes(device) if cache == "cold" else 0)


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
    gc.collect()
    with without_collection():  # one inside a timed call would be charged to whoever happens to run
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


def host_seconds_of(prepared: Prepared, device: torch.device, tries: int = 5) -> float:
    """Seconds until a call returns to a host whose queue is empty; the median. A call that syncs waits in it."""
    seconds = []
    for _ in range(tries):
        if prepared.reset is not None:
            prepared.reset()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        output = prepared.call()
        seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
        del output
        if seconds[-1] > SLOW_HOST:  # the rest would tell nothing new
            break
    return statistics.median(seconds)


def calls_between_events(prepared: Prepared, device_seconds: float, host_seconds: float) -> int:
    """How many calls one sample times: several where one is too short for the events, and all can be hidden."""
    if prepared.reset is not None or device_seconds >= RESOLVED:
        return 1
    hidden = int(AHEAD / (1.5 * max(host_seconds, 1e-6)))
    return max(1, min(SEVERAL, int(2 * RESOLVED / max(device_seconds, 1e-6)), hidden))


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
    at = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return Summary(len(samples), min(samples), median, p10, p90, (p90 - p10) / median if median else 0.0)


# --- bytes: the least, the rate, the peak -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that must be read and written: every input once per pass that needs it, every output once."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def least_traffic(op: str, name: str, case: Case) -> Traffic:
    """The least of an op for a case; of the roofline ops, what they do."""
    shape = case.shape
    if isinstance(shape, LogitsShape):
        logits, tokens = shape.rows * shape.vocab * case.dtype.itemsize, shape.rows
        if op == "logits_roofline":
            return Traffic(logits, logits if name == "copy" else 0)
        if op == "logprob_entropy_bwd":  # reads the logits and the rows' states, writes the gradient
            return Traffic(logits + 32 * tokens, logits)
        if op == "logprob_entropy_fwdbwd":  # forward reads; backward reads again and writes the gradient
            return Traffic(2 * logits + 32 * tokens, logits + 8 * tokens)
        return Traffic(logits + 8 * tokens, (16 if op == "token_stats" else 8) * tokens)
    if isinstance(shape, TokensShape):
        read, written = {"token_covariance": (9, 4), "tokens_roofline": (4, 0)}.get(op, (4, 1))
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

    256 MiB at least. On a GPU 2 GiB: a quarter of a millisecond would still show how a kernel begins and ends. Where
    that is more than an eighth of the free memory, as under a server's cache of hundreds of MB, an eighth: two such
    buffers then leave three quarters to whoever shares the machine, and ``buffer_bytes`` says what was taken.
    """
    wanted = max(2 << 30 if device.type == "cuda" else 256 << 20, 8 * cache_bytes(device))
    buffer_bytes = min(wanted, max(1 << 20, available_bytes(device) // 8)) // 8 * 8
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
    measure = _peak_resident if device.type != "cuda" and resets_high_water() else _peak_allocated
    peaks = []
    for _ in range(tries):
        if prepared.reset is not None:
            prepared.reset()
        peaks.append(measure(prepared.call, device))
        if peaks[-1].bytes > 64 << 20:
            break
    return Peak(max(0, min(peak.bytes for peak in peaks)), peaks[0].method)


def resets_high_water() -> bool:
    """Reset it, where the system has it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def process_status(key: str) -> int:
    """Bytes that Linux counts of this process: VmRSS, VmHWM."""
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
    resets_high_water()
    before = process_status("VmRSS")
    output = call()
    peak = process_status("VmHWM") - before
    del output
    return Peak(peak, "resident set high-water mark")


def _peak_allocated(call: Callable[[], Any], device: torch.device) -> Peak:
    method = "CUDA allocator peak" if device.type == "cuda" else "torch profiler, torch's allocations only"
    return Peak(peak_allocated(call, device), method)
