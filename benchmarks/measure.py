"""From groups of cases to records: prepare, check, time, measure memory; on a GPU also host syncs and CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers  # noqa: F401  (registers what ours is measured against)
from benchmarks.cases import (
    HEADLINE,
    HEADLINE_HIDDEN,
    SLOW_TO_PREPARE,
    Case,
    Group,
    HiddenShape,
    Inputs,
    LogitsShape,
    logits_bytes,
    make_inputs,
)
from benchmarks.checks import check
from benchmarks.ours import Implementation, Prepared, available_bytes, of_op
from benchmarks.results import PRODUCTS, Record
from benchmarks.timing import (
    AHEAD,
    FEWEST,
    FEWEST_SAMPLES,
    SLOW_HOST,
    Bandwidth,
    CudaClock,
    calls_between_events,
    clock_for,
    cuda_clock,
    host_seconds,
    host_seconds_of,
    interleave,
    least_traffic,
    peak_extra_memory,
    summarise,
)

HOST_LOOPS = 50  # calls per sample of the host time
ROW_SECONDS = 0.1  # device time that the samples of one row may take, hot and cold each
OUT_OF_TIME = "the run's time was up"
#: What a host waits in, as the CUDA runtime and the driver name it.
SYNCS = re.compile(
    r"(cuda(Device|Stream|Event)|cu(Ctx|Stream|Event))Synchronize|cudaMemcpy((To|From)Symbol)?|cuMemcpyDtoH_v2"
)
_CALL = "benchmarks: the call"

Tick = Callable[[str], Any]
Key = tuple[str, str, str, str, bool]


class DeviceLost(Exception):
    """A kernel has broken the CUDA context: nothing more can be measured in this process.

    ``records``: those of the group that were made before, the breaking one's included.
    """

    def __init__(self, message: str, records: Sequence[Record] = ()) -> None:
        super().__init__(message)
        self.records = list(records)


@dataclass(frozen=True)
class Settings:
    """Choices that hold for a whole run.

    ``cache``: "hot", "cold" or "both". ``names``: implementations to run, None for all. ``deadline``: of
    time.monotonic, after which nothing new is begun. ``budget``: seconds that an implementation may take of a group's
    rounds on a CPU, None for the usual. ``done``: rows that an earlier process of this run has measured.
    """

    repeats: int
    cache: str
    names: frozenset[str] | None = None
    memory: bool = True
    deadline: float = math.inf
    budget: float | None = None
    done: frozenset[Key] = frozenset()

    @property
    def cold_repeats(self) -> int:
        """Rounds with cold caches beside those with hot ones, on a CPU: they tell less there."""
        return min(self.repeats, max(FEWEST, self.repeats // 2))

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Entry:
    """An implementation on a case, and its record."""

    implementation: Implementation
    case: Case
    record: Record

    def __str__(self) -> str:
        return f"{self.implementation.op} {self.implementation.name} {self.case.dtype_name}"


def candidates(group: Group, settings: Settings) -> Iterator[tuple[Implementation, Case]]:
    """Implementations that a group runs, skipped ones included."""
    for op, case in group.entries:
        # what compiles first comes last: a deadline should cut off that
        for implementation in sorted(of_op(op), key=lambda implementation: implementation.name in SLOW_TO_PREPARE):
            name = implementation.name
            wanted = settings.names is None or name in settings.names
            if wanted and name not in group.without and (group.only is None or name in group.only):
                yield implementation, case


def steps(group: Group, settings: Settings) -> int:
    """Ticks that :func:`run_group` makes at most, for a progress bar."""
    rounds = settings.repeats + (settings.cold_repeats if settings.cache == "both" and group.cold else 0)
    return sum(2 + rounds + settings.memory for _ in candidates(group, settings))


def run_group(group: Group, settings: Settings, device: torch.device, bandwidth: Bandwidth, tick: Tick) -> list[Record]:
    """Check, time and weigh every implementation of a group.

    On a CPU they are timed in interleaved rounds, because ratios have to survive a shared machine. A GPU is one's own
    and its memory is short: there each has its turn, and nothing of it is left for the next.

    Args:
        tick: called with a few words on what is being done, after each step.

    Raises:
        DeviceLost: on a GPU.
    """
    one_by_one = device.type == "cuda" and not group.host
    measuring = _Measuring(group, settings, device, bandwidth, tick, keep=not one_by_one)
    try:
        (measuring.one_by_one if one_by_one else measuring.in_rounds)()
    except DeviceLost as error:
        raise DeviceLost(str(error), measuring.records) from error
    return measuring.records


class _Measuring:
    """A group under way; ``records``: of the implementations that came up so far, the skipped ones included."""

    def __init__(
        self, group: Group, settings: Settings, device: torch.device, bandwidth: Bandwidth, tick: Tick, *, keep: bool
    ) -> None:
        self.group, self.settings, self.device = group, settings, device
        self.bandwidth, self.tick = bandwidth, tick
        self.records: list[Record] = []
        self.made: dict[Case, Inputs] = {}
        self.keep = keep  # the inputs of all cases; else, where memory is short, of one at a time

    def inputs(self, case: Case) -> Inputs:
        if case not in self.made:
            if not self.keep:
                self.made.clear()
            self.made[case] = make_inputs(case)
        return self.made[case]

    def too_large(self, case: Case) -> str | None:
        """Reason if inputs that are not there yet do not fit."""
        needed, free = logits_bytes(case), available_bytes(case.device)
        if case in self.made or needed <= 0.8 * free:
            return None
        return f"logits of {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"

    def entries(self) -> Iterator[Entry]:
        """The implementations that can run, one after the other."""
        settings = self.settings
        cache = "host" if self.group.host else "cold" if settings.cache == "cold" else "hot"
        for implementation, case in candidates(self.group, settings):
            record = Record(
                implementation.op, implementation.name, implementation.role, str(case.shape), case.dtype_name,
                self.device.type, cache, size=asdict(case.shape), computes=implementation.computes,
            )  # fmt: skip
            if record.key in settings.done:
                continue
            self.records.append(record)
            late = OUT_OF_TIME if settings.out_of_time else None
            reason = late or self.too_large(case) or implementation.supports(case)
            if reason is None:
                yield Entry(implementation, case, record)
            else:
                record.status, record.reason = "skipped", reason

    def checked(self, entry: Entry) -> Prepared | None:
        """The prepared call if its result passes; else None, with status and reason in the record."""
        record, inputs = entry.record, self.inputs(entry.case)
        try:
            prepared = entry.implementation.make(entry.case, inputs)
            if prepared.reset is not None:
                prepared.reset()
            result = check(entry.implementation, entry.case, inputs, prepared.call())
        except torch.OutOfMemoryError:
            record.status, record.reason = "skipped", "out of memory"
            return None
        except Exception as error:  # a peer may fail in any way; it must not end the run, and its reason is reported
            record.status, record.reason = "failed", _in_a_line(error)
            return None
        record.errors, record.stated_bytes = result.errors, prepared.stated_bytes
        if not result.passed:
            record.status, record.reason = "wrong", "; ".join(result.failures)
            return None
        return prepared

    def rates(self, entry: Entry) -> None:
        """What follows from the times."""
        record = entry.record
        least = least_traffic(record.op, record.implementation, entry.case)
        record.least_bytes = {"read": least.read, "written": least.written}
        record.bytes_per_second = least.total / record.summary["median"]
        record.of_read_bandwidth = record.bytes_per_second / self.bandwidth.read
        record.of_copy_bandwidth = record.bytes_per_second / self.bandwidth.copy
        if record.cold:
            record.cold_of_copy_bandwidth = least.total / record.cold["median"] / self.bandwidth.copy

    def memory(self, entry: Entry, prepared: Prepared) -> None:
        if self.settings.memory:
            peak = peak_extra_memory(prepared, self.device)
            entry.record.peak_extra_bytes, entry.record.peak_method = peak.bytes, peak.method

    # --- in interleaved rounds ---

    def in_rounds(self) -> None:
        timed = []
        for entry in self.entries():
            self.tick(f"checking {entry}")
            prepared = self.checked(entry)
            if prepared is not None:
                timed.append((entry, prepared))
        calls, settings = [prepared for _, prepared in timed], self.settings
        if self.group.host:
            for (entry, _), series in zip(timed, self.rounds(map(self.host_call, calls), "hot"), strict=True):
                _keep(entry.record, [seconds / HOST_LOOPS for seconds in series])
            return
        first = timed[0][0].record.cache if timed else ""
        for (entry, _), series in zip(timed, self.rounds(calls, first), strict=True):
            _keep(entry.record, series)
        if settings.cache == "both" and self.group.cold and not settings.out_of_time:
            for (entry, _), series in zip(timed, self.rounds(calls, "cold", settings.cold_repeats), strict=True):
                _keep(entry.record, series, cold=True)
        for entry, prepared in timed:
            self.rates(entry)
            self.tick(f"memory of {entry}")
            self.memory(entry, prepared)

    def rounds(self, calls: Iterable[Prepared], cache: str, repeats: int | None = None) -> list[list[float]]:
        title = self.group.title[0].lower() + self.group.title[1:]
        return interleave(
            list(calls), clock_for(torch.device("cpu"), cache), repeats or self.settings.repeats,
            tick=lambda: self.tick(f"timing {title}"), deadline=self.settings.deadline, budget=self.settings.budget,
            several=cache == "hot",
        )  # fmt: skip

    def host_call(self, prepared: Prepared) -> Prepared:
        return Prepared(lambda: host_seconds(prepared, self.device, HOST_LOOPS), prepared.reset)

    # --- one by one, on a GPU ---

    def one_by_one(self) -> None:
        for entry in self.entries():
            self.tick(str(entry))
            try:
                self.on_gpu(entry)
                gc.collect(1)
            except torch.OutOfMemoryError:
                entry.record.status, entry.record.reason = "skipped", "out of memory"
                gc.collect()  # takes a tenth of a second: not after every row
            except Exception as error:  # after the check only a fault of the suite or of the device gets here
                entry.record.status, entry.record.reason = "failed", _in_a_line(error)
            self.release(entry)

    def release(self, entry: Entry) -> None:
        """Give the memory back, and find out whether the device still answers."""
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            if entry.record.status == "ok":
                entry.record.status, entry.record.reason = "failed", _in_a_line(error)
            raise DeviceLost(f"{entry}: {entry.record.reason}") from error

    def on_gpu(self, entry: Entry) -> None:
        record, device, prepared = entry.record, self.device, self.checked(entry)
        if prepared is None:
            return
        hot = cuda_clock(device, "hot")
        hot.time(prepared)
        record.host_seconds = host_seconds_of(prepared, device)
        warm = hot.time(prepared, 1, record.host_seconds)
        syncs = count_syncs(prepared, device, record.host_seconds)
        record.syncs, record.syncs_method = syncs.count, syncs.method
        record.calls_per_sample = calls_between_events(prepared, warm, record.host_seconds)
        record.hidden = syncs.count == 0 and record.calls_per_sample * record.host_seconds < AHEAD / 1.5
        # products take tens of milliseconds, and targets rest on their ratios
        fewest = FEWEST_SAMPLES if isinstance(entry.case.shape, HiddenShape) else FEWEST
        repeats = max(fewest, min(self.settings.repeats, int(ROW_SECONDS / max(warm, 1e-6))))
        for cache in ("hot", "cold") if self.settings.cache == "both" else (self.settings.cache,):
            clock = hot if cache == "hot" else cuda_clock(device, "cold")
            # the cold clock flushes before a sample: of several calls only the first would be cold
            calls = record.calls_per_sample if cache == "hot" else 1
            beside = self.products(entry) if cache == record.cache else {}
            samples: list[float] = []
            in_turn: dict[str, list[float]] = {name: [] for name in beside}
            for _ in range(repeats):
                samples.append(clock.time(prepared, calls, record.host_seconds))
                for name, products in beside.items():
                    in_turn[name].append(clock.time(products))
            record.products |= {name: summarise(seconds).as_dict() for name, seconds in in_turn.items()}
            _keep(record, samples, cold=cache != record.cache)
        self.memory(entry, prepared)
        record.graph = self.graph(entry, prepared, hot, repeats)
        self.rates(entry)

    def products(self, entry: Entry) -> dict[str, Prepared]:
        """The products alone that a row from hidden states is compared with: in turns, since a GPU's clocks wander."""
        op, name = entry.implementation.op, entry.implementation.name
        wanted = {PRODUCTS.get(op), "four products" if name == "ours-recompute" else None}
        return {
            products.name: products.make(entry.case, self.inputs(entry.case))
            for products in of_op("linear_roofline")
            if op in PRODUCTS and products.name in wanted and products.supports(entry.case) is None
        }

    def graph(self, entry: Entry, prepared: Prepared, clock: CudaClock, repeats: int) -> dict[str, Any]:
        """Replay of a captured call, or the reason why there is none."""
        implementation, case, record = entry.implementation, entry.case, entry.record
        # peers are captured at some cases; at all of them it would take minutes
        telling = case.shape in (HEADLINE, HEADLINE_HIDDEN) or not isinstance(case.shape, (LogitsShape, HiddenShape))
        if implementation.role != "ours" and (implementation.role == "roofline" or not telling):
            return {}
        if record.syncs:
            return {"reason": "it waits for the device"}
        if (record.host_seconds or 0.0) > SLOW_HOST:
            return {"reason": "it takes the host too long"}
        remade = implementation.op == "logprob_entropy_bwd"
        if remade and implementation.name == "compile":
            return {"reason": "its forward pass would have to be compiled again"}
        make = (lambda: implementation.make(case, self.inputs(case))) if remade else (lambda: prepared)
        try:
            found = replay(make, self.device, clock, repeats)
        except Exception as error:  # not every call can be captured; whether the device survived is asked afterwards
            return {"reason": _in_a_line(error)}
        return {"equal": found.equal, "summary": summarise(found.samples).as_dict(), "samples": found.samples}


def _keep(record: Record, samples: list[float], *, cold: bool = False) -> None:
    if cold:
        record.cold_samples, record.cold = samples, summarise(samples).as_dict()
    else:
        record.samples, record.summary = samples, summarise(samples).as_dict()


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


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
    found = None
    if host_seconds <= SLOW_HOST:
        with contextlib.suppress(RuntimeError):  # no CUPTI, or somebody else profiles
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                with torch.profiler.record_function(_CALL):
                    output = prepared.call()
                torch.cuda.synchronize(device)
            del output
            found = syncs_among(profile.events())
    if found is not None:
        return Syncs(found, "profiler")
    return Syncs(_warned_syncs(prepared), "torch's sync check")


def syncs_among(events: Iterable[Any]) -> int | None:
    """Waits within the call among a profile's events; None if the profile has no runtime calls at all."""
    host = torch.autograd.DeviceType.CPU
    # a range is also drawn on the device's line, under the same name
    events = [event for event in events if getattr(event, "device_type", host) == host]
    if not any(event.name.startswith(("cuda", "cu")) for event in events):
        return None
    inside = next(event.time_range for event in events if event.name == _CALL)
    return sum(
        bool(SYNCS.fullmatch(event.name))
        and inside.start <= event.time_range.start
        and event.time_range.end <= inside.end
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


class Replay(NamedTuple):
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
    replayed = tensors_in(output)
    for tensor in replayed:  # so that a replay that does not write its output shows
        if tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -1)
    reset()
    graph.replay()
    torch.cuda.synchronize(device)
    equal = len(eager) == len(replayed) and all(same_bits(a, b) for a, b in zip(eager, replayed, strict=True))
    once = Prepared(graph.replay, prepared.reset)
    device_seconds = clock.time(once)
    calls = calls_between_events(once, device_seconds, 10e-6)
    return Replay(equal, [clock.time(once, calls, 10e-6) for _ in range(repeats)])


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of a call's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of the bits, so that NaN equals itself; some rows at a time, since gradients are large."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = (x.reshape(-1).view(words) for x in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a.split(1 << 27), b.split(1 << 27), strict=True))
