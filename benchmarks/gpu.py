"""What only a GPU has: device time of short calls, CUDA graphs, host syncs.

No machine with a GPU has run this yet.

Device time is taken between two events on the current stream. An event says when the *device* reaches it, so a device
that waits for the host would charge the host's time to the call. Every measured call therefore stands in the queue
behind a kernel that does nothing for longer than the host needs to enqueue it. Where that cannot be (a call that
waits for the device by itself, or takes the host longer than AHEAD), the time between the events is what the caller
waits for, and the row says so.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import Prepared

AHEAD = 5e-3  # seconds of host time that are hidden behind the idling kernel at most
SHORT = 100e-6  # a shorter call is timed several times between two events, whose resolution is half a microsecond
SEVERAL = 20  # calls between two events at most
#: What a host waits in, as the CUDA runtime and the driver name it.
SYNCS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpyToSymbol",
    "cudaMemcpyFromSymbol",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuMemcpyDtoH_v2",
)
_CALL = "benchmarks: the call"
_HOST = torch.autograd.DeviceType.CPU
LONG = 0.05  # seconds of host time from which a call is not profiled: so many launches are slow to read


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
        if seconds[-1] > LONG:  # the rest would tell nothing new
            break
    return statistics.median(seconds)


def calls_between_events(prepared: Prepared, device_seconds: float, host_seconds: float) -> int:
    """How many calls one sample times: several where one is too short for the events, and all can be hidden."""
    if prepared.reset is not None or device_seconds >= SHORT:
        return 1
    hidden = int(AHEAD / (1.5 * max(host_seconds, 1e-6)))
    return max(1, min(SEVERAL, int(2 * SHORT / max(device_seconds, 1e-6)), hidden))


# --- host syncs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Syncs:
    """``count``: how often one call makes the host wait for the device; ``method`` says how that was seen."""

    count: int
    method: str


def count_syncs(prepared: Prepared, device: torch.device, host_seconds: float = 0.0) -> Syncs:
    """Calls of the CUDA runtime that wait, from the profiler; without it, what torch's own sync check reports.

    The profiler also sees waits in kernels that torch knows nothing of.
    """
    if prepared.reset is not None:
        prepared.reset()
    torch.cuda.synchronize(device)
    if host_seconds > LONG:
        return Syncs(_warned_syncs(prepared), "torch's sync check")
    try:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function(_CALL):
                output = prepared.call()
            torch.cuda.synchronize(device)
        del output
        found = syncs_among(profile.events())
    except RuntimeError:  # no CUPTI, or somebody else profiles
        found = None
    if found is not None:
        return Syncs(found, "profiler")
    return Syncs(_warned_syncs(prepared), "torch's sync check")


def syncs_among(events: Iterable[Any]) -> int | None:
    """Waits within the call among a profile's events; None if the profile has no runtime calls at all."""
    # a range is also drawn on the device's line, under the same name
    events = [event for event in events if getattr(event, "device_type", _HOST) == _HOST]
    if not any(event.name.startswith(("cuda", "cu")) for event in events):
        return None
    inside = next(event.time_range for event in events if event.name == _CALL)
    return sum(
        event.name in SYNCS and inside.start <= event.time_range.start and event.time_range.end <= inside.end
        for event in events
    )


def _warned_syncs(prepared: Prepared) -> int:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepared.call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """A captured call. ``equal``: its outputs are those of an eager call, bit for bit; ``samples``: seconds."""

    equal: bool
    samples: list[float]


def replay(make: Callable[[], Prepared], device: torch.device, clock: CudaClock, repeats: int) -> Replay:
    """Capture a call into a CUDA graph, compare a replay with an eager call, and time replays with hot caches.

    Args:
        make: prepares the call; run on the capturing stream, since a backward pass runs where its forward pass ran.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        prepared = make()
        reset = prepared.reset or (lambda: None)
        for _ in range(2):
            reset()
            prepared.call()
        reset()
        eager = [tensor.clone() for tensor in tensors_in(prepared.call())]
        reset()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = prepared.call()
    replayed = list(tensors_in(output))
    for tensor in replayed:
        _poison(tensor)
    reset()
    graph.replay()
    torch.cuda.synchronize(device)
    equal = len(eager) == len(replayed) and all(same_bits(a, b) for a, b in zip(eager, replayed, strict=True))
    once = Prepared(graph.replay, prepared.reset)
    device_seconds = clock.time(once)
    calls = calls_between_events(once, device_seconds, 10e-6)
    return Replay(equal, [clock.time(once, calls, 10e-6) for _ in range(repeats)])


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of a call's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)


def _poison(tensor: Tensor) -> None:
    """So that a replay that does not write its output shows."""
    if tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(-1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of the bits, so that NaN equals itself; some rows at a time, since gradients are large."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = (x.reshape(-1).view(words) for x in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a.split(1 << 27), b.split(1 << 27), strict=True))
