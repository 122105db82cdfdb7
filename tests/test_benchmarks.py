"""The benchmark suite itself: it runs, its gate has teeth, its clocks and targets are right. No test judges a time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ours, results, targets, timing
from benchmarks.cases import OPS, QUICK, STATED, Case, Group, LogitsShape, TokensShape, groups
from benchmarks.measure import Settings, run_group
from benchmarks.ours import REGISTRY, Implementation, Prepared
from benchmarks.results import Record
from benchmarks.run import LOGITS, main
from waiting import Clock

CPU = torch.device("cpu")
# a machine's ceilings are not needed where no time is judged
BANDWIDTH = timing.Bandwidth(read=1e10, copy=1e10, buffer_bytes=1)


@pytest.fixture(autouse=True)
def _unlimited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """--threads changes the whole process; --quick has a time limit, which a busy machine may reach.

    To flush the caches of a server before each call takes longer than all calls here.
    """
    monkeypatch.setattr("benchmarks.run.QUICK_SECONDS", 1e9)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 20)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the suite runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_run_writes_json_table_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], blank_figures: None
) -> None:
    # everything but torch.compile, which takes seconds per case
    chosen = ",".join(name for name in ours.names() if name != "compile")
    arguments = ["--quick", "--shape", "6,97", "--tokens", "5000", "--repeats", "2", "--threads", "1"]
    assert main([*arguments, "--cache", "both", "--impl", chosen, "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    records = [record for group in document["groups"] for record in group["records"]]
    assert {record["status"] for record in records} <= {"ok", "skipped"}
    assert all(record["reason"] for record in records if record["status"] == "skipped")
    ran = {(record["op"], record["implementation"]) for record in records if record["status"] == "ok"}
    assert {("logprob_entropy", "ours-torch"), ("logprob_entropy_fwdbwd", "eager"), ("tokens_roofline", "topk")} <= ran
    for record in records:
        if record["status"] == "ok":
            assert len(record["samples"]) >= 2 and all(sample > 0 for sample in record["samples"])
            assert record["errors"] and record["summary"]["min"] <= record["summary"]["median"]
            assert record["cache"] == "host" or record["peak_extra_bytes"] >= 0
            assert record["cache"] == "host" or record["cold"]["median"] > 0
            assert set(record["size"]) in ({"rows", "vocab"}, {"tokens", "distribution"}, {"sequences", "length"})
    described = document["machine"]
    assert described["cpu"]["logical"] and described["threads"] == 1 and described["versions"]["torch"]
    assert set(described) >= {"commit", "dirty", "variables", "platform"} and document["bandwidth"]["read"] > 0
    text = (tmp_path / "bench.md").read_text()
    assert "## Targets" in text and "at other sizes" in text and text in capsys.readouterr().out
    for name in ("time_statistics", "time_selection", "error"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ops", "logprob"], ["no op 'logprob'", "logprob_entropy", "clip_cov_mask"]),
        (["--impl", "eager,fast"], ["no implementation 'fast'", "ours-cpu", "topk"]),
        (["--dtype", "fp8"], ["no dtype 'fp8'", "bf16"]),
        (["--shape", "12"], ["expected N,V", "'12'"]),
        (["--repeats", "0"], ["expected an integer >= 1", "'0'"]),
        (["--device", "tpu"], ["expected cpu or cuda", "'tpu'"]),
    ],
)
def test_unknown_names_say_what_exists(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_a_shape_on_the_command_line() -> None:
    assert LOGITS("512,151936") == LogitsShape(512, 151936) == LOGITS("512x151936")
    with pytest.raises(argparse.ArgumentTypeError, match="N and V > 0"):
        LOGITS("0,5")


def test_groups_hold_what_is_compared() -> None:
    """Ratios are taken within a group only: both dtypes, both statistics and the floors have to share one."""
    forward = groups(STATED, list(OPS), [torch.float32, torch.bfloat16], CPU)[0]
    assert {op for op, _ in forward.entries} == {"logits_roofline", "logprob_entropy", "token_stats"}
    assert {case.dtype for _, case in forward.entries} == {torch.float32, torch.bfloat16}
    assert targets.at_the_stated_sizes(STATED, "cpu") and not targets.at_the_stated_sizes(QUICK, "cpu")


def test_saved_times_are_kept_apart_by_machine_and_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What make bench-save and bench-compare use as a folder: one word, another one for each."""
    names = set()
    for cpu, threads in (("EPYC", 1), ("EPYC", 2), ("Xeon", 2)):
        monkeypatch.setattr(results, "_cpuinfo", lambda cpu=cpu: {"model name": f"Some(R) {cpu} 16-Core"})
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.main()
        (name,) = capsys.readouterr().out.split()
        names.add(name)
    assert len(names) == 3 and all("/" not in name for name in names)


# --- the gate ---------------------------------------------------------------------------------------------------------


def _run(op: str, implementation: Implementation, case: Case) -> Record:
    key = (op, implementation.name)
    REGISTRY[key] = implementation
    try:
        settings = Settings(repeats=2, cache="hot", names=frozenset({implementation.name}), memory=False)
        (record,) = run_group(Group("g", ((op, case),)), settings, CPU, BANDWIDTH, lambda _: None)
    finally:
        del REGISTRY[key]
    return record


@pytest.mark.parametrize("role", ["ours", "peer"])
def test_a_wrong_result_is_reported_and_not_timed(role: str) -> None:
    calls = []

    def make(case: Case, inputs: dict) -> Prepared:
        def call() -> tuple:
            calls.append(1)
            return torch.zeros(case.shape.rows), torch.zeros(case.shape.rows)

        return Prepared(call)

    record = _run(
        "logprob_entropy",
        Implementation("logprob_entropy", "zero", role, make, lambda case: None),
        Case(LogitsShape(6, 97), torch.float32, CPU),
    )
    assert record.status == "wrong" and "entropy" in record.reason and record.errors
    assert len(calls) == 1 and not record.samples and not record.summary


def test_an_exception_is_reported_and_ends_nothing() -> None:
    def make(case: Case, inputs: dict) -> Prepared:
        raise RuntimeError("no kernel image\nsecond line")

    record = _run(
        "token_stats",
        Implementation("token_stats", "broken", "peer", make, lambda case: None),
        Case(LogitsShape(6, 97), torch.float32, CPU),
    )
    assert (record.status, record.reason) == ("failed", "RuntimeError: no kernel image")


# --- clocks, memory, traffic ------------------------------------------------------------------------------------------


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``takes(seconds)``: as long passes on the clock of timing.py."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return lambda seconds: setattr(clock, "now", clock.now + seconds)


def test_interleave_resets_before_every_call_and_counts_samples(takes: Callable[[float], None]) -> None:
    log: list[str] = []
    slow = Prepared(lambda: (log.append("call"), takes(0.03)), lambda: (log.append("reset"), takes(1.0)))
    fast = Prepared(lambda: None)
    samples = timing.interleave([slow, fast], timing.CpuClock(), 3)
    assert [len(series) for series in samples] == [3, 3 * timing.CALLS_PER_ROUND]
    assert samples[0] == pytest.approx([0.03] * 3) and log == ["reset", "call"] * (3 + timing.WARM_UP)


def test_long_calls_take_part_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch, takes: Callable[[float], None]) -> None:
    monkeypatch.setattr(timing, "BUDGET", 0.05)
    samples = timing.interleave([Prepared(lambda: takes(0.03)), Prepared(lambda: None)], timing.CpuClock(), 6)
    assert [len(series) for series in samples] == [timing.FEWEST, 6 * timing.CALLS_PER_ROUND]


def test_cold_clock_flushes_and_times_the_same_call(takes: Callable[[float], None]) -> None:
    clock = timing.clock_for(CPU, "cold")
    assert clock.time(Prepared(lambda: takes(0.01))) == pytest.approx(0.01) and clock._flush.eq(1).all()


def test_summarise() -> None:
    summary = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.count, summary.min, summary.median) == (5, 1.0, 3.0)
    assert (summary.p10, summary.p90) == (pytest.approx(1.4), pytest.approx(4.6))
    assert summary.spread == pytest.approx(3.2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        timing.summarise([])


def test_bandwidth_is_measured_within_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the cache: two buffers of an eighth of what is free."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 480 << 20)
    monkeypatch.setattr(timing, "available_bytes", lambda device: 80 << 20)
    found = timing.measure_bandwidth(torch.device("cpu"), repeats=1)
    assert found.buffer_bytes == 10 << 20 and found.read > 0 and found.copy > 0


@pytest.mark.parametrize("method", ["resident", "profiler"])
def test_peak_memory_sees_temporaries(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose temporary of 64 MB is gone when it returns."""
    if method == "profiler":
        monkeypatch.setattr(timing, "resets_high_water", lambda: False)
    elif not timing.resets_high_water():
        pytest.skip("no /proc/self/clear_refs here")

    def call() -> torch.Tensor:
        return torch.ones(64 << 18).sum()

    call()
    assert timing.peak_extra_memory(Prepared(call), CPU).bytes == pytest.approx(64 << 20, abs=2 << 20)
    assert timing.peak_extra_memory(Prepared(lambda: None), CPU).bytes < 1 << 20


def test_least_traffic() -> None:
    logits = Case(LogitsShape(10, 1000), torch.bfloat16, CPU)
    assert timing.least_traffic("logprob_entropy", "eager", logits) == timing.Traffic(20000 + 80, 80)
    assert timing.least_traffic("logprob_entropy_fwdbwd", "eager", logits).total == 3 * 20000 + 400
    assert timing.least_traffic("logits_roofline", "copy", logits).total == 40000
    tokens = Case(TokensShape(100), torch.float32, CPU)
    assert timing.least_traffic("kl_cov_mask", "x", tokens) == timing.Traffic(400, 100)


def test_a_case_that_does_not_fit_is_skipped_with_its_size() -> None:
    case = Case(LogitsShape(1 << 20, 1 << 18), torch.float32, CPU)
    reason = REGISTRY["logprob_entropy", "eager"].supports(case)
    assert reason is not None and "GB of temporaries" in reason


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        ours.register(REGISTRY["tokens_roofline", "topk"])
    with pytest.raises(ValueError, match="op: expected one of"):
        ours.register(replace(REGISTRY["tokens_roofline", "topk"], op="sort"))
