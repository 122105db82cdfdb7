"""From groups of cases to records: prepare, check, time, measure memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import (
    gpu,
    peers,  # noqa: F401  (registers what ours is measured against)
)
from benchmarks.cases import (
    HEADLINE,
    HEADLINE_HIDDEN,
    SLOW_TO_PREPARE,
    Case,
    Group,
    HiddenShape,
    LogitsShape,
    logits_bytes,
    make_inputs,
    size_of,
)
from benchmarks.checks import check
from benchmarks.ours import Implementation, Prepared, available_bytes, of_op
from benchmarks.results import PRODUCTS, Record
from benchmarks.timing import (
    FEWEST,
    FEWEST_SAMPLES,
    Bandwidth,
    cpu_clock,
    cuda_clock,
    host_seconds,
    interleave,
    least_traffic,
    peak_extra_memory,
    summarise,
)

HOST_LOOPS = 50  # calls per sample of the host time
ROW_SECONDS = 0.1  # device time that the samples of one row may take, hot and cold each
OUT_OF_TIME = "the run's time was up"

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
    records: list[Record] = []
    on_gpu = device.type == "cuda" and not group.host
    try:
        (_one_by_one if on_gpu else _in_rounds)(group, settings, device, bandwidth, tick, records)
    except DeviceLost as error:
        raise DeviceLost(str(error), records) from error
    return records


def _entries(
    group: Group, settings: Settings, device: torch.device, inputs: _Inputs, records: list[Record]
) -> Iterator[Entry]:
    """The implementations that can run, one after the other; their records, and those of the others, in ``records``."""
    for implementation, case in candidates(group, settings):
        record = Record(
            implementation.op, implementation.name, implementation.role, str(case.shape), case.dtype_name, device.type,
            "host" if group.host else "cold" if settings.cache == "cold" else "hot",
            size=size_of(case.shape), computes=implementation.computes,
        )  # fmt: skip
        if record.key in settings.done:
            continue
        records.append(record)
        reason = (
            OUT_OF_TIME
            if settings.out_of_time
            else inputs.too_large(implementation, case) or implementation.supports(case)
        )
        if reason is not None:
            record.status, record.reason = "skipped", reason
            continue
        yield Entry(implementation, case, record)


class _Inputs:
    """Inputs of the cases of a group, made once; of one case at a time where memory is short."""

    def __init__(self, *, keep: bool) -> None:
        self._made: dict[Case, Any] = {}
        self._keep = keep

    def of(self, entry: Entry) -> Any:
        key = entry.case
        if key not in self._made:
            if not self._keep:
                self._made.clear()
            self._made[key] = make_inputs(entry.case)
        return self._made[key]

    def too_large(self, implementation: Implementation, case: Case) -> str | None:
        """Reason if inputs that are not there yet do not fit."""
        if case in self._made:
            return None
        needed, free = logits_bytes(case), available_bytes(case.device)
        return f"logits of {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > 0.8 * free else None


def _checked(entry: Entry, inputs: Any) -> Prepared | None:
    """The prepared call if its result passes; else None, with status and reason in the record."""
    record = entry.record
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


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _rates(entry: Entry, bandwidth: Bandwidth) -> None:
    """What follows from the times."""
    record = entry.record
    least = least_traffic(record.op, record.implementation, entry.case)
    record.least_bytes = {"read": least.read, "written": least.written}
    record.bytes_per_second = least.total / record.summary["median"]
    record.of_read_bandwidth = record.bytes_per_second / bandwidth.read
    record.of_copy_bandwidth = record.bytes_per_second / bandwidth.copy
    if record.cold:
        record.cold_of_copy_bandwidth = least.total / record.cold["median"] / bandwidth.copy


# --- in interleaved rounds --------------------------------------------------------------------------------------------


def _in_rounds(
    group: Group,
    settings: Settings,
    device: torch.device,
    bandwidth: Bandwidth,
    tick: Tick,
    records: list[Record],
) -> None:
    inputs, timed = _Inputs(keep=True), []
    for entry in _entries(group, settings, device, inputs, records):
        tick(f"checking {entry}")
        prepared = _checked(entry, inputs.of(entry))
        if prepared is not None:
            timed.append((entry, prepared))
    title = group.title[0].lower() + group.title[1:]

    def rounds(calls: Sequence[Prepared], cache: str, repeats: int) -> list[list[float]]:
        def ticked() -> None:
            tick(f"timing {title}")

        clock = cpu_clock(torch.device("cpu"), cache)
        return interleave(
            calls,
            clock,
            repeats,
            tick=ticked,
            deadline=settings.deadline,
            budget=settings.budget,
            several=cache == "hot",
        )

    calls = [prepared for _, prepared in timed]
    if group.host:
        calls = [_host_call(prepared, device) for prepared in calls]
        for (entry, _), series in zip(timed, rounds(calls, "hot", settings.repeats), strict=True):
            entry.record.samples = [seconds / HOST_LOOPS for seconds in series]
            entry.record.summary = summarise(entry.record.samples).as_dict()
        return
    first = "cold" if settings.cache == "cold" else "hot"
    for (entry, _), series in zip(timed, rounds(calls, first, settings.repeats), strict=True):
        entry.record.samples = series
        entry.record.summary = summarise(series).as_dict()
    if settings.cache == "both" and group.cold and not settings.out_of_time:
        for (entry, _), series in zip(timed, rounds(calls, "cold", settings.cold_repeats), strict=True):
            entry.record.cold_samples = series
            entry.record.cold = summarise(series).as_dict()
    for entry, prepared in timed:
        _rates(entry, bandwidth)
        if settings.memory:
            tick(f"memory of {entry}")
            peak = peak_extra_memory(prepared, device)
            entry.record.peak_extra_bytes, entry.record.peak_method = peak.bytes, peak.method


def _host_call(prepared: Prepared, device: torch.device) -> Prepared:
    return Prepared(lambda: host_seconds(prepared, device, HOST_LOOPS), prepared.reset)


# --- one by one, on a GPU ---------------------------------------------------------------------------------------------


def _one_by_one(
    group: Group,
    settings: Settings,
    device: torch.device,
    bandwidth: Bandwidth,
    tick: Tick,
    records: list[Record],
) -> None:
    inputs = _Inputs(keep=False)
    for entry in _entries(group, settings, device, inputs, records):
        tick(str(entry))
        try:
            _on_gpu(entry, inputs, settings, device)
            if entry.record.summary:
                _rates(entry, bandwidth)
            gc.collect(1)
        except torch.OutOfMemoryError:
            entry.record.status, entry.record.reason = "skipped", "out of memory"
            gc.collect()  # takes a tenth of a second: not after every row
        except Exception as error:  # after the check only a fault of the suite or of the device gets here
            entry.record.status, entry.record.reason = "failed", _in_a_line(error)
        _release(entry, device)


def _release(entry: Entry, device: torch.device) -> None:
    """Give the memory back, and find out whether the device still answers."""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if entry.record.status == "ok":
            entry.record.status, entry.record.reason = "failed", _in_a_line(error)
        raise DeviceLost(f"{entry}: {entry.record.reason}") from error


def _on_gpu(entry: Entry, inputs: _Inputs, settings: Settings, device: torch.device) -> None:
    record, given = entry.record, inputs.of(entry)
    prepared = _checked(entry, given)
    if prepared is None:
        return
    hot = cuda_clock(device, "hot")
    hot.time(prepared)
    record.host_seconds = gpu.host_seconds_of(prepared, device)
    warm = hot.time(prepared, 1, record.host_seconds)
    syncs = gpu.count_syncs(prepared, device, record.host_seconds)
    record.syncs, record.syncs_method = syncs.count, syncs.method
    record.calls_per_sample = gpu.calls_between_events(prepared, warm, record.host_seconds)
    record.hidden = syncs.count == 0 and record.calls_per_sample * record.host_seconds < gpu.AHEAD / 1.5
    # products take tens of milliseconds, and targets rest on their ratios
    fewest = FEWEST_SAMPLES if isinstance(entry.case.shape, HiddenShape) else FEWEST
    repeats = max(fewest, min(settings.repeats, int(ROW_SECONDS / max(warm, 1e-6))))
    clocks = {"hot": hot} if settings.cache != "cold" else {}
    if settings.cache != "hot":
        clocks["cold"] = cuda_clock(device, "cold")
    for cache, clock in clocks.items():
        # the cold clock flushes before a sample: of several calls only the first would be cold
        calls = record.calls_per_sample if cache == "hot" else 1
        beside = _products(entry, given) if cache == record.cache else {}
        samples: list[float] = []
        in_turn: dict[str, list[float]] = {name: [] for name in beside}
        for _ in range(repeats):
            samples.append(clock.time(prepared, calls, record.host_seconds))
            for name, products in beside.items():
                in_turn[name].append(clock.time(products))
        record.products |= {name: summarise(seconds).as_dict() for name, seconds in in_turn.items()}
        if cache == record.cache:
            record.samples, record.summary = samples, summarise(samples).as_dict()
        else:
            record.cold_samples, record.cold = samples, summarise(samples).as_dict()
    if settings.memory:
        peak = peak_extra_memory(prepared, device)
        record.peak_extra_bytes, record.peak_method = peak.bytes, peak.method
    record.graph = _graph(entry, prepared, given, device, hot, repeats)


def _products(entry: Entry, inputs: Any) -> dict[str, Prepared]:
    """The products alone that a row from hidden states is compared with: in turns, since the clocks of a GPU wander."""
    implementation = entry.implementation
    if implementation.op not in PRODUCTS:
        return {}
    wanted = {PRODUCTS[implementation.op]} | ({"four products"} if implementation.name == "ours-recompute" else set())
    return {
        products.name: products.make(entry.case, inputs)
        for products in of_op("linear_roofline")
        if products.name in wanted and products.supports(entry.case) is None
    }


def _telling(case: Case) -> bool:
    """Cases at which peers are captured too; at all of them it would take minutes."""
    return case.shape in (HEADLINE, HEADLINE_HIDDEN) or not isinstance(case.shape, (LogitsShape, HiddenShape))


def _graph(
    entry: Entry, prepared: Prepared, inputs: Any, device: torch.device, clock: gpu.CudaClock, repeats: int
) -> dict[str, Any]:
    """Replay of a captured call, or the reason why there is none."""
    implementation = entry.implementation
    if implementation.role != "ours" and (implementation.role == "roofline" or not _telling(entry.case)):
        return {}
    if entry.record.syncs:
        return {"reason": "it waits for the device"}
    if (entry.record.host_seconds or 0.0) > gpu.LONG:
        return {"reason": "it takes the host too long"}
    remade = implementation.op == "logprob_entropy_bwd"
    if remade and implementation.name == "compile":
        return {"reason": "its forward pass would have to be compiled again"}
    make = (lambda: implementation.make(entry.case, inputs)) if remade else (lambda: prepared)
    try:
        found = gpu.replay(make, device, clock, repeats)
    except Exception as error:  # not every call can be captured; whether the device survived it is asked afterwards
        return {"reason": _in_a_line(error)}
    return {"equal": found.equal, "summary": summarise(found.samples).as_dict(), "samples": found.samples}
