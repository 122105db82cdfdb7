"""The GPU's half of the suite on a CPU: clocks, syncs, graphs, a lost device, with a fake torch.cuda."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import measure, run, timing
from benchmarks.cases import (
    GRID,
    GRID_ROWS,
    GRID_VOCAB,
    HEADLINE,
    OPS,
    SLOW_TO_PREPARE,
    Case,
    Group,
    HiddenShape,
    LogitsShape,
    groups,
)
from benchmarks.measure import DeviceLost, Settings, run_group
from benchmarks.ours import REGISTRY, Implementation, Prepared
from benchmarks.results import over_products
from benchmarks.timing import FEWEST_SAMPLES, Bandwidth
from waiting import Clock

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BANDWIDTH = Bandwidth(read=1e10, copy=1e10, buffer_bytes=1)


class _Event:
    """A device that is never behind its host."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


class _Graph:
    """Replays what the test says."""

    action = staticmethod(lambda: None)

    def replay(self) -> None:
        self.action()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch.cuda that runs on the CPU; a log of the idling kernels, flushes and synchronisations."""
    log: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes: dict[str, Any] = {
        "Event": _Event,
        "CUDAGraph": _Graph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "_sleep": lambda cycles: log.append("idle"),
        "synchronize": lambda device=None: log.append("synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 4196,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(
        measure, "cuda_clock", lambda device, cache: timing.CudaClock(CPU, 64 if cache == "cold" else 0)
    )
    monkeypatch.setattr(measure, "count_syncs", lambda *arguments: measure.Syncs(0, "a fake"))
    yield log


def _implementation(name: str, call: Any, role: str = "peer") -> Implementation:
    return Implementation(
        "logprob_entropy", name, role, lambda case, inputs: Prepared(lambda: call(inputs)), lambda c: None
    )


def _right(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    logp = inputs["logits"].double().log_softmax(-1)
    logprob = logp.gather(-1, inputs["target"][:, None])[:, 0]
    return logprob.float(), -(logp.exp() * logp).sum(-1).float()


def _run(implementations: list[Implementation], settings: Settings) -> list[measure.Record]:
    case = Case(LogitsShape(6, 97), torch.float32, CPU)
    names = {implementation.name for implementation in implementations}
    for implementation in implementations:
        REGISTRY[implementation.op, implementation.name] = implementation
    try:
        group = Group("g", (("logprob_entropy", case),), only=frozenset(names))
        return run_group(group, settings, GPU, BANDWIDTH, lambda _: None)
    finally:
        for name in names:
            del REGISTRY["logprob_entropy", name]


# --- a row ------------------------------------------------------------------------------------------------------------


def test_a_row_has_everything(device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = measure.Replay(True, [1e-6, 2e-6])
    monkeypatch.setattr(measure, "replay", lambda make, device, clock, repeats: replayed)
    (record,) = _run([_implementation("right", _right, "ours")], Settings(repeats=4, cache="both"))
    assert record.status == "ok", record.reason
    assert (record.cache, len(record.samples), len(record.cold_samples)) == ("hot", 4, 4)
    assert record.cold["median"] > 0 and record.cold_of_copy_bandwidth > 0
    assert record.peak_extra_bytes == 4096 and record.host_seconds > 0
    assert (record.syncs, record.hidden) == (0, True) and record.calls_per_sample >= 1
    assert record.graph["equal"] and record.graph["summary"]["count"] == 2


def test_products_are_timed_in_turns_with_what_they_are_compared_with(device: list[str]) -> None:
    case = Case(HiddenShape(8, 16, 97), torch.float32, CPU)
    op, names = "linear_logprob_entropy_fwdbwd", frozenset({"ours", "three products"})
    group = Group("g", (("linear_roofline", case), (op, case)), only=names)
    found = run_group(group, Settings(repeats=4, cache="both", memory=False), GPU, BANDWIDTH, lambda _: None)
    ours = next(record for record in found if record.op == op)
    assert ours.status == "ok" and len(ours.samples) == FEWEST_SAMPLES  # targets rest on it
    assert list(ours.products) == ["three products"] and ours.products["three products"]["count"] == len(ours.samples)
    assert all(not record.products for record in found if record is not ours)
    assert over_products(ours, []) == ours.summary["median"] / ours.products["three products"]["median"]


def test_a_call_that_waits_is_not_captured(device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "count_syncs", lambda *arguments: measure.Syncs(2, "a fake"))
    (record,) = _run([_implementation("waits", _right, "ours")], Settings(repeats=3, cache="both"))
    assert (record.syncs, record.hidden) == (2, False) and record.graph == {"reason": "it waits for the device"}


def test_wrong_results_are_not_timed(device: list[str]) -> None:
    wrong = _implementation("wrong", lambda inputs: tuple(x + 1 for x in _right(inputs)))
    (record,) = _run([wrong], Settings(repeats=3, cache="both"))
    assert record.status == "wrong" and not record.samples and not record.graph


def test_out_of_memory_is_no_failure(device: list[str]) -> None:
    def call(inputs: dict) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    (record,) = _run([_implementation("large", call, "ours")], Settings(repeats=3, cache="both"))
    assert (record.status, record.reason) == ("skipped", "out of memory")


def test_no_row_is_begun_after_the_deadline(device: list[str]) -> None:
    settings = Settings(repeats=3, cache="both", deadline=time.monotonic() - 1)
    (record,) = _run([_implementation("right", _right)], settings)
    assert (record.status, record.reason) == ("skipped", measure.OUT_OF_TIME)


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_host_runs_ahead_of_every_sample(device: list[str]) -> None:
    clock = timing.CudaClock(CPU, 0)
    device.clear()
    clock.time(Prepared(lambda: device.append("call"), lambda: device.append("reset")), 3)
    assert device == ["reset", "synchronize", "idle", "call", "call", "call"]


def test_short_calls_are_timed_together() -> None:
    call, restored = Prepared(lambda: None), Prepared(lambda: None, lambda: None)
    assert timing.calls_between_events(call, 10e-6, 20e-6) == timing.SEVERAL
    assert timing.calls_between_events(call, 50e-6, 20e-6) == 4
    assert timing.calls_between_events(call, 1e-3, 20e-6) == 1
    assert timing.calls_between_events(call, 10e-6, 1e-3) == 3  # more could not be hidden
    assert timing.calls_between_events(restored, 10e-6, 20e-6) == 1


# --- syncs and graphs -------------------------------------------------------------------------------------------------


def _event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_syncs_are_counted_within_the_call_only() -> None:
    call = _event(measure._CALL, 10, 20)
    launch, inside = _event("cudaLaunchKernel", 11, 12), _event("cudaStreamSynchronize", 12, 13)
    outside = _event("cudaDeviceSynchronize", 21, 22)
    copy = _event("cudaMemcpyAsync", 14, 15)
    assert measure.syncs_among([call, launch, inside, copy, outside]) == 1
    assert measure.syncs_among([call, launch, outside]) == 0
    assert measure.syncs_among([call, _event("aten::item", 11, 12)]) is None  # the profile saw no runtime


def test_replay_compares_bits_and_sees_what_is_not_written(device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    value, out = torch.tensor([1.0, torch.nan, -0.0]), torch.empty(3)
    prepared = Prepared(lambda: (out.copy_(value), {"mask": torch.ones(2, dtype=torch.bool)})[:1])
    clock = timing.CudaClock(CPU, 0)

    def equal(action: Any) -> bool:
        monkeypatch.setattr(_Graph, "action", staticmethod(action))
        found = measure.replay(lambda: prepared, CPU, clock, 2)
        assert len(found.samples) == 2
        return found.equal

    assert equal(prepared.call)
    assert not equal(lambda: None)
    assert not equal(lambda: out.copy_(value + 1))
    assert not equal(lambda: out.copy_(torch.tensor([1.0, torch.nan, 0.0])))  # the sign of zero is a bit


def test_tensors_in_and_same_bits() -> None:
    a, b, c = (torch.zeros(2) for _ in range(3))
    assert [id(x) for x in measure.tensors_in((a, {"k": [b]}, 3, c))] == [id(a), id(b), id(c)]
    assert not measure.same_bits(a, a.double()) and not measure.same_bits(a, torch.zeros(3))
    assert measure.same_bits(torch.zeros(2, 3, dtype=torch.bfloat16).t(), torch.zeros(3, 2, dtype=torch.bfloat16))


# --- a device that is lost --------------------------------------------------------------------------------------------


def test_a_lost_device_keeps_the_rows_and_names_the_one(device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "replay", lambda make, device, clock, repeats: measure.Replay(True, [1e-6]))

    def broken(inputs: dict) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", dead)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    def dead(device: Any = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="logprob_entropy broken fp32: RuntimeError: CUDA error") as lost:
        _run([_implementation("right", _right), _implementation("broken", broken)], Settings(repeats=3, cache="both"))
    assert [record.status for record in lost.value.records] == ["ok", "failed"]


def test_after_a_loss_a_new_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(run.os, "execv", lambda path, arguments: begun.append(arguments))
    monkeypatch.setattr(run, "time", Clock())
    command = ["--device", "cuda", "--seconds", "300", "--output", "x"]
    run._begin_again(command, 100.4, "why")
    (arguments,) = begun
    assert arguments[:3] == [sys.executable, "-m", "benchmarks.run"]
    assert arguments[3:7] == ["--device", "cuda", "--output", "x"] and arguments[-1] == "--resume"
    assert arguments[7:9] == ["--seconds", "100"]
    run._begin_again(command, 5.0, "too little time")
    run._begin_again(["--device", "cuda", "--resume"], float("inf"), "no limit")
    assert begun[1:] == [[*arguments[:5], "--resume"]]


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_is_whole_and_begins_with_what_the_targets_need() -> None:
    found = groups(GRID, list(OPS), [torch.float32, torch.bfloat16], GPU)
    head = Case(HEADLINE, torch.bfloat16, GPU)
    assert [case for group in found[:3] for _, case in group.entries] == [head] * 5
    assert {op for group in found[:3] for op, _ in group.entries} >= {"logprob_entropy_bwd", "logits_roofline"}
    assert {op for group in found[3:8] for op, _ in group.entries} >= {"clip_cov_loss", "tokens_roofline"}
    for op in ("logprob_entropy", "logprob_entropy_bwd", "logprob_entropy_fwdbwd"):
        for only in (None, SLOW_TO_PREPARE):
            cases = [
                case for group in found if group.only == only and not group.host for o, case in group.entries if o == op
            ]
            expected = {(r, v, d) for r in GRID_ROWS for v in GRID_VOCAB for d in (torch.float32, torch.bfloat16)}
            expected -= set() if only is None else {(HEADLINE.rows, HEADLINE.vocab, torch.bfloat16)}
            assert len(cases) == len(expected)
            assert {(case.shape.rows, case.shape.vocab, case.dtype) for case in cases} == expected
    dtypes = [group.entries[0][1].dtype for group in found if "logits" in group.title and group.only is None]
    assert dtypes == sorted(dtypes, key=lambda dtype: dtype.itemsize)  # bf16 first
    assert all(group.only == SLOW_TO_PREPARE for group in found[-100:])
