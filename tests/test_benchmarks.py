"""The benchmark suite itself: it runs, its gate has teeth, its clocks and bars are right. No test judges a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bars, implementations, tables, timing, traffic
from benchmarks.checks import check
from benchmarks.implementations import REGISTRY, Implementation, Prepared, ours_for
from benchmarks.measure import Group, Record, Settings, groups, run_group
from benchmarks.run import main
from benchmarks.shapes import (
    BARS,
    QUICK,
    BatchShape,
    Case,
    LogitsShape,
    TokensShape,
    make_inputs,
    parse_logits,
)

CPU = torch.device("cpu")
# a machine's ceilings are not needed where no time is judged
BANDWIDTH = traffic.Bandwidth(read=1e10, copy=1e10, buffer_bytes=1)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """--threads changes the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the suite runs ---------------------------------------------------------------------------------------------------


def test_quick_run_writes_json_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # everything but torch.compile, which takes seconds per case
    chosen = ",".join(name for name in implementations.names() if name != "compile")
    arguments = ["--quick", "--shape", "6,97", "--tokens", "5000", "--repeats", "2", "--threads", "1"]
    assert main([*arguments, "--impl", chosen, "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    records = [record for group in document["groups"] for record in group["records"]]
    assert {record["status"] for record in records} <= {"ok", "skipped"}
    assert all(record["reason"] for record in records if record["status"] == "skipped")
    ran = {(record["op"], record["implementation"]) for record in records if record["status"] == "ok"}
    assert {("logprob_entropy", "ours-torch"), ("logprob_entropy_fwdbwd", "eager"), ("tokens_floor", "topk")} <= ran
    for record in records:
        if record["status"] == "ok":
            assert len(record["samples"]) >= 2 and all(sample > 0 for sample in record["samples"])
            assert record["errors"] and record["summary"]["min"] <= record["summary"]["median"]
            assert record["cache"] == "host" or record["peak_extra_bytes"] >= 0
    described = document["machine"]
    assert described["cpu"]["logical"] and described["threads"] == 1 and described["versions"]["torch"]
    assert set(described) >= {"commit", "dirty", "variables", "platform"} and document["bandwidth"]["read"] > 0
    text = (tmp_path / "bench.md").read_text()
    assert "## Bars" in text and "at other sizes" in text and text in capsys.readouterr().out
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


def test_parse_logits() -> None:
    assert parse_logits("512,151936") == LogitsShape(512, 151936) == parse_logits("512x151936")
    with pytest.raises(ValueError, match="N and V > 0"):
        parse_logits("0,5")


def test_groups_hold_what_is_compared() -> None:
    """Ratios are taken within a group only: both dtypes, both statistics and the floors have to share one."""
    forward = groups(BARS, list(implementations.OPS), [torch.float32, torch.bfloat16], CPU)[0]
    assert {op for op, _ in forward.entries} == {"logits_floor", "logprob_entropy", "token_stats"}
    assert {case.dtype for _, case in forward.entries} == {torch.float32, torch.bfloat16}
    assert bars.at_the_stated_sizes(BARS) and not bars.at_the_stated_sizes(QUICK)


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


def _exact(inputs: dict) -> dict[str, torch.Tensor]:
    """Correct outputs in float32, with the parts of the gradient that a wrong kernel may lose."""
    logp = inputs["logits"].double().log_softmax(-1)
    p, target = logp.exp(), inputs["target"]
    entropy = -(p * logp).sum(-1)
    onehot = torch.nn.functional.one_hot(target, logp.shape[-1])
    g_lp, g_h = inputs["grad_logprob"].double()[:, None], inputs["grad_entropy"].double()[:, None]
    return {
        "logprob": logp.gather(-1, target[:, None])[:, 0],
        "entropy": entropy,
        "onehot": g_lp * onehot,
        "softmax": -g_lp * p,
        "entropy_term": -g_h * p * (logp + entropy[:, None]),
        "shifted": g_lp * onehot.roll(1, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("parts", "passes"),
    [
        (("onehot", "softmax", "entropy_term"), True),
        ((), False),
        (("onehot", "entropy_term"), False),
        (("shifted", "softmax", "entropy_term"), False),
        (("onehot", "softmax"), False),
    ],
    ids=["right", "zero", "no softmax term", "shifted target", "no entropy term"],
)
def test_wrong_gradients_do_not_pass(parts: tuple[str, ...], passes: bool, dtype: torch.dtype) -> None:
    # a vocabulary wide enough that the target's element hides the others
    case = Case(LogitsShape(24, 30011), dtype, CPU)
    inputs = make_inputs(case)
    exact = _exact(inputs)
    zero = torch.zeros(inputs["logits"].shape, dtype=torch.float64)
    gradient = sum((exact[part] for part in parts), zero).to(dtype)
    outputs = (exact["logprob"].float(), exact["entropy"].float(), gradient)
    assert check("logprob_entropy_fwdbwd", case, inputs, "x", "ours", outputs).passed is passes


def test_strict_for_ours_loose_for_peers_and_never_nan() -> None:
    case = Case(LogitsShape(8, 4001), torch.float32, CPU)
    inputs = make_inputs(case)
    exact = _exact(inputs)
    coarse = (exact["logprob"].float() + 1e-2, exact["entropy"].float())
    assert not check("logprob_entropy", case, inputs, "x", "ours", coarse).passed
    result = check("logprob_entropy", case, inputs, "x", "peer", coarse)
    assert result.passed and result.errors["logprob (nats)"] == pytest.approx(1e-2, rel=0.01)
    nan = (exact["logprob"].float() * math.nan, exact["entropy"].float())
    assert not check("logprob_entropy", case, inputs, "x", "peer", nan).passed


def test_selection_check_counts_and_looks_at_the_band() -> None:
    case = Case(TokensShape(20000), torch.float32, CPU)
    inputs = make_inputs(case)
    right = implementations.eager_clip_cov_mask(inputs["covariance"])
    outside = (inputs["covariance"] < 0).nonzero()[0]
    more = right.clone()
    more[outside] = True
    swapped = more.clone()
    swapped[right.nonzero()[0]] = False
    verdicts = [check("clip_cov_mask", case, inputs, "x", "ours", mask).passed for mask in (right, more, swapped)]
    assert verdicts == [True, False, False]


def test_ties_of_kl_cov_are_determined_for_ours_only() -> None:
    case = Case(TokensShape(5000, "equal"), torch.float32, CPU)
    inputs = make_inputs(case)
    last = torch.zeros(5000, dtype=torch.bool)
    last[-10:] = True
    assert check("kl_cov_mask", case, inputs, "x", "peer", last).passed
    assert not check("kl_cov_mask", case, inputs, "x", "ours", last).passed
    assert check("kl_cov_mask", case, inputs, "x", "ours", last.flip(0)).passed


@pytest.mark.parametrize("op", ["policy_loss", "clip_cov_loss", "kl_cov_loss"])
def test_loss_checks_accept_the_definition_and_refuse_a_neighbour(op: str) -> None:
    """The surrogate by hand in float32, right, and with its gradient's sign turned."""
    case = Case(BatchShape(32, 128), torch.float32, CPU)
    inputs = make_inputs(case)
    leaf, mask = inputs["logprob"].clone().requires_grad_(), inputs["mask"]
    difference = leaf - inputs["old_logprob"]
    ratio, advantages = difference.exp(), inputs["advantages"]
    covariance = (leaf - leaf[mask].mean()) * (advantages - advantages[mask].mean())
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    tokens = torch.maximum(plain, clipped)
    if op == "policy_loss":
        tokens = torch.where(advantages < 0, torch.minimum(tokens, -3 * advantages), tokens)
    elif op == "clip_cov_loss":
        band = mask & (clipped <= plain) & (covariance > 1) & (covariance < 5)
        drop = torch.zeros_like(mask)
        drop.view(-1)[band.view(-1).nonzero()[: max(1, int(2e-4 * int(mask.sum())))]] = True
        tokens = torch.where(drop, 0.0, tokens)
    else:
        chosen = covariance.detach().masked_fill(~mask, -torch.inf).view(-1).topk(int(2e-3 * int(mask.sum()))).indices
        penalty = torch.zeros_like(tokens).view(-1).index_fill(0, chosen, 1.0).view_as(tokens)
        tokens = plain + penalty * difference.abs()
    loss = (tokens * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert check(op, case, inputs, "x", "ours", (loss.detach(), gradient)).passed
    assert not check(op, case, inputs, "x", "peer", (loss.detach(), -gradient)).passed


# --- clocks, memory, traffic ------------------------------------------------------------------------------------------


def test_interleave_resets_before_every_call_and_counts_samples() -> None:
    log: list[str] = []
    slow = Prepared(lambda: (log.append("call"), time.sleep(0.03)), lambda: log.append("reset"))
    fast = Prepared(lambda: None)
    samples = timing.interleave([slow, fast], timing.CpuClock(), 3)
    assert [len(series) for series in samples] == [3, 3 * timing.CALLS_PER_ROUND]
    assert min(samples[0]) >= 0.03 and log == ["reset", "call"] * (3 + timing.WARM_UP)


def test_long_calls_take_part_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET", 0.05)
    samples = timing.interleave([Prepared(lambda: time.sleep(0.03)), Prepared(lambda: None)], timing.CpuClock(), 6)
    assert [len(series) for series in samples] == [timing.FEWEST, 6 * timing.CALLS_PER_ROUND]


def test_cold_clock_flushes_and_times_the_same_call() -> None:
    clock = timing.clock_for(CPU, "cold")
    assert clock.time(Prepared(lambda: time.sleep(0.01))) >= 0.01


def test_summarise() -> None:
    summary = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.count, summary.min, summary.median) == (5, 1.0, 3.0)
    assert (summary.p10, summary.p90) == (pytest.approx(1.4), pytest.approx(4.6))
    assert summary.spread == pytest.approx(3.2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        timing.summarise([])


@pytest.mark.parametrize("method", ["resident", "profiler"])
def test_peak_memory_sees_temporaries(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose temporary of 64 MB is gone when it returns."""
    if method == "profiler":
        monkeypatch.setattr(traffic, "_resets_high_water", lambda: False)
    elif not traffic._resets_high_water():
        pytest.skip("no /proc/self/clear_refs here")

    def call() -> torch.Tensor:
        return torch.ones(64 << 18).sum()

    call()
    assert traffic.peak_extra_memory(Prepared(call), CPU).bytes == pytest.approx(64 << 20, abs=2 << 20)
    assert traffic.peak_extra_memory(Prepared(lambda: None), CPU).bytes < 1 << 20


def test_least_traffic() -> None:
    logits = Case(LogitsShape(10, 1000), torch.bfloat16, CPU)
    assert traffic.least_traffic("logprob_entropy", "eager", logits) == traffic.Traffic(20000 + 80, 80)
    assert traffic.least_traffic("logprob_entropy_fwdbwd", "eager", logits).total == 3 * 20000 + 400
    assert traffic.least_traffic("logits_floor", "copy", logits).total == 40000
    tokens = Case(TokensShape(100), torch.float32, CPU)
    assert traffic.least_traffic("kl_cov_mask", "x", tokens) == traffic.Traffic(400, 100)


def test_a_case_that_does_not_fit_is_skipped_with_its_size() -> None:
    case = Case(LogitsShape(1 << 20, 1 << 18), torch.float32, CPU)
    reason = REGISTRY["logprob_entropy", "eager"].supports(case)
    assert reason is not None and "GB of temporaries" in reason


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        implementations.register(REGISTRY["tokens_floor", "topk"])
    with pytest.raises(ValueError, match="op: expected one of"):
        implementations.register(replace(REGISTRY["tokens_floor", "topk"], op="sort"))


# --- bars -------------------------------------------------------------------------------------------------------------


def _record(op: str, name: str, shape: str, dtype: str, median: float, **fields: object) -> Record:
    record = Record(
        op, name, "ours", shape, dtype, "cpu", "hot", summary={"count": 7, "min": 0.9 * median, "median": median}
    )
    return replace(record, **fields)


def test_bars_are_judged_by_medians() -> None:
    ours, shape = ours_for("cpu"), "512×151936"
    records = [
        _record("logprob_entropy", ours, shape, "fp32", 1.0, peak_extra_bytes=200_000),
        _record("logprob_entropy", ours, shape, "bf16", 1.2),
        _record("logprob_entropy", "eager", shape, "fp32", 8.5),
        _record("logits_floor", "amax", shape, "fp32", 0.4),
        _record("tokens_floor", "topk", "4194304 normal", "fp32", 30.0),
        _record("clip_cov_mask", ours, "4194304 normal", "fp32", 2.0),
        _record("kl_cov_mask", ours, "64 normal", "fp32", 45e-6, cache="host"),
    ]
    verdicts = {(verdict.text, verdict.shape): verdict for verdict in bars.judge(records, BARS, "cpu")}

    def passed(text: str, shape: str = shape) -> bool | None:
        return verdicts[text, shape].passed

    assert verdicts["forward, faster than torch eager", shape].value == pytest.approx(8.5)
    assert passed("forward, faster than torch eager") is True
    assert passed("forward, time over logits.amax(-1)") is False  # 2.5 > 2
    assert passed("forward, bf16 over fp32") is False
    assert passed("forward, extra memory") is True
    assert passed("forward, faster than torch.compile") is None
    assert verdicts["forward, faster than torch.compile", shape].absent
    assert not verdicts["forward, faster than torch eager", shape].absent
    assert passed("clip_cov_mask, faster than torch.topk(cov, 800)", "4194304 normal") is True
    assert passed("kl_cov_mask, host time of a call", "64 normal") is True
    table = tables.bars_table(list(verdicts.values()))
    assert "FAIL" in table and "not measured: compile of logprob_entropy was not part of this run" in table


def test_units() -> None:
    assert [tables.seconds(value) for value in (1.25, 0.0412, 18.34e-6)] == ["1.25 s", "41.2 ms", "18.3 µs"]
    assert [tables.size(value) for value in (20_000, 311_164_928)] == ["0.02 MB", "311 MB"]
