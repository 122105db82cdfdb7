"""From a plan to records: prepare, check, time in interleaved rounds, measure memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.checks import check
from benchmarks.implementations import SHAPE_OF, Implementation, Prepared, of_op
from benchmarks.shapes import TINY_LOGITS, TINY_TOKENS, Case, LogitsShape, Plan, Shape, make_inputs
from benchmarks.timing import clock_for, host_seconds, interleave, summarise
from benchmarks.traffic import Bandwidth, least_traffic, peak_extra_memory

HOST_LOOPS = 50  # calls per sample of the host time


@dataclass
class Record:
    """One implementation on one case. ``status``: "ok", "skipped", "failed" (raised) or "wrong" (did not pass)."""

    op: str
    implementation: str
    role: str
    shape: str
    dtype: str
    device: str
    cache: str
    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)  # seconds
    summary: dict[str, float] = field(default_factory=dict)
    least_bytes: dict[str, int] = field(default_factory=dict)
    bytes_per_second: float | None = None
    of_read_bandwidth: float | None = None
    of_copy_bandwidth: float | None = None
    peak_extra_bytes: int | None = None
    peak_method: str = ""


@dataclass(frozen=True)
class Group:
    """Cases that are timed together, in the same rounds, because ratios between them are judged."""

    title: str
    entries: tuple[tuple[str, Case], ...]  # (op, case)
    host: bool = False  # host time per call at a tiny size instead of the time of the work


@dataclass(frozen=True)
class Settings:
    """Choices that hold for a whole run. ``names``: implementations to run, None for all."""

    repeats: int
    cache: str
    names: frozenset[str] | None = None
    memory: bool = True


def groups(plan: Plan, ops: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Group]:
    """Groups of a plan, restricted to some ops; a group without entries is left out."""
    result = []
    for logits in plan.logits:
        for title, members in (
            ("Forward", ("logits_floor", "logprob_entropy", "token_stats")),
            ("Forward + backward", ("logprob_entropy_fwdbwd",)),
        ):
            cases = [(op, Case(logits, dtype, device)) for op in members if op in ops for dtype in dtypes]
            result.append(Group(f"{title}, logits {logits}", tuple(cases)))
    for tokens in plan.tokens:
        # the covariance itself does not depend on the distribution of the given one: once is enough
        last = ("token_covariance",) if tokens.distribution == "normal" else ()
        selection = ("tokens_floor", "clip_cov_mask", "kl_cov_mask", *last)
        cases = [(op, Case(tokens, torch.float32, device)) for op in selection if op in ops]
        result.append(Group(f"Selection, {_TOKENS[tokens.distribution].format(tokens.tokens)}", tuple(cases)))
    for batch in plan.batches:
        cases = [(op, Case(batch, torch.float32, device)) for op in _LOSSES if op in ops]
        result.append(Group(f"Losses, forward + backward, {batch}", tuple(cases)))
    tiny: list[tuple[str, Case]] = []
    for op in _HOST:
        shape: Shape = TINY_LOGITS if SHAPE_OF[op] is LogitsShape else TINY_TOKENS
        if op in ops:
            tiny.append((op, Case(shape, torch.float32, device)))
    result.append(Group("Host time per call at a tiny size", tuple(tiny), host=True))
    return [group for group in result if group.entries]


_LOSSES = ("policy_loss", "clip_cov_loss", "kl_cov_loss")
_HOST = (
    "logprob_entropy",
    "logprob_entropy_fwdbwd",
    "token_stats",
    "token_covariance",
    "clip_cov_mask",
    "kl_cov_mask",
)
_TOKENS = {
    "normal": "{} tokens, normal covariance",
    "band": "{} tokens, all in the band",
    "equal": "{} tokens, all equal",
}


def candidates(group: Group, settings: Settings) -> Iterator[tuple[Implementation, Case]]:
    """Implementations that a group runs, skipped ones included."""
    for op, case in group.entries:
        for implementation in of_op(op):
            if settings.names is None or implementation.name in settings.names:
                yield implementation, case


def steps(group: Group, settings: Settings) -> int:
    """Ticks that :func:`run_group` makes at most, for a progress bar."""
    return sum(2 + settings.repeats + settings.memory for _ in candidates(group, settings))


def run_group(
    group: Group, settings: Settings, device: torch.device, bandwidth: Bandwidth, tick: Callable[[str], Any]
) -> list[Record]:
    """Check, time and weigh every implementation of a group.

    Args:
        tick: called with a few words on what is being done, after each step.
    """
    records, timed = [], []
    inputs: dict[tuple[Any, Case], Any] = {}
    for implementation, case in candidates(group, settings):
        label = f"{implementation.op} {implementation.name} {case.dtype_name}"
        cache = "host" if group.host else settings.cache
        record = Record(
            implementation.op, implementation.name, implementation.role,
            str(case.shape), case.dtype_name, device.type, cache,
        )  # fmt: skip
        records.append(record)
        reason = implementation.supports(case)
        if reason is not None:
            record.status, record.reason = "skipped", reason
            continue
        tick(f"checking {label}")
        key = (SHAPE_OF[implementation.op], case)
        if key not in inputs:
            inputs[key] = make_inputs(case)
        prepared = _checked(implementation, case, inputs[key], record)
        if prepared is not None:
            timed.append((record, prepared, implementation, case))
    _time(group, settings, device, timed, tick)
    for record, prepared, implementation, case in timed:
        summary = summarise(record.samples)
        record.summary = summary.as_dict()
        if group.host:
            continue
        least = least_traffic(implementation.op, implementation.name, case)
        record.least_bytes = {"read": least.read, "written": least.written}
        record.bytes_per_second = least.total / summary.median
        record.of_read_bandwidth = record.bytes_per_second / bandwidth.read
        record.of_copy_bandwidth = record.bytes_per_second / bandwidth.copy
        if settings.memory:
            tick(f"memory of {record.op} {record.implementation} {record.dtype}")
            peak = peak_extra_memory(prepared, device)
            record.peak_extra_bytes, record.peak_method = peak.bytes, peak.method
    return records


def _checked(implementation: Implementation, case: Case, inputs: Any, record: Record) -> Prepared | None:
    """The prepared call if its result passes; else None, with status and reason in the record."""
    try:
        prepared = implementation.make(case, inputs)
        if prepared.reset is not None:
            prepared.reset()
        result = check(implementation.op, case, inputs, implementation.name, implementation.role, prepared.call())
    except Exception as error:  # a peer may fail in any way; it must not end the run, and its reason is reported
        lines = str(error).strip().splitlines()
        record.status, record.reason = "failed", f"{type(error).__name__}: {lines[0] if lines else ''}"
        return None
    record.errors = result.errors
    if not result.passed:
        record.status, record.reason = "wrong", "; ".join(result.failures)
        return None
    return prepared


def _time(
    group: Group,
    settings: Settings,
    device: torch.device,
    timed: Sequence[tuple[Record, Prepared, Implementation, Case]],
    tick: Callable[[str], Any],
) -> None:
    calls = [prepared for _, prepared, _, _ in timed]
    title = group.title[0].lower() + group.title[1:]

    def ticked() -> None:
        tick(f"timing {title}")

    if group.host:
        calls = [_host_call(prepared, device) for prepared in calls]
        samples = interleave(calls, clock_for(torch.device("cpu"), "hot"), settings.repeats, tick=ticked)
        samples = [[seconds / HOST_LOOPS for seconds in series] for series in samples]
    else:
        samples = interleave(calls, clock_for(device, settings.cache), settings.repeats, tick=ticked)
    for (record, *_), series in zip(timed, samples, strict=True):
        record.samples = series


def _host_call(prepared: Prepared, device: torch.device) -> Prepared:
    return Prepared(lambda: host_seconds(prepared, device, HOST_LOOPS), prepared.reset)
