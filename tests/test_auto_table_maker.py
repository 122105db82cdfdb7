"""`python -m benchmarks.auto_table`: from results to the table behind backend="auto", from a GPU run to a verdict."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import auto_table as maker
from entropy_kernels.backends import auto_table

MACHINE = {"machine": "some-machine", "commit": "abc123", "gpu": None}
HOPPER = {"machine": "nvidia-h200", "commit": None, "gpu": {"capability": "9.0", "cuda": "13.0"}}


def record(op: str, implementation: str, shape: str, median: float, **others: Any) -> dict[str, Any]:
    summary = {"median": median, "spread": others.pop("spread", 0.1)}
    defaults = {"dtype": "fp32", "device": "cpu", "cache": "hot", "status": "ok", "reason": "", "summary": summary}
    return {"op": op, "implementation": implementation, "shape": shape, **defaults, **others}


def bench(path: Path, *records: dict[str, Any], machine: dict[str, Any] = MACHINE) -> Path:
    document = {"machine": machine, "time": "2026-01-02T03:04:05+00:00", "groups": [{"records": list(records)}]}
    path.write_text(json.dumps(document))
    return path


def test_the_committed_table_is_what_its_sources_give() -> None:
    """Whoever replaces results, or changes the classes, makes the table anew."""
    table = auto_table.load()
    assert maker.text(maker.make(*maker.sources(table))) == auto_table.FILE.read_text(encoding="utf-8"), (
        "python -m benchmarks.auto_table RESULTS... --verified SUMMARY..."
    )


def test_rows_from_records(tmp_path: Path) -> None:
    path = bench(
        tmp_path / "bench.json",
        # two ops of one kernel in one class: the geometric mean of 4 and 9
        record("logprob_entropy", "ours-cpu", "512×151936", 1.0),
        record("logprob_entropy", "ours-torch", "512×151936", 4.0),
        record("token_stats", "ours-cpu", "whatever", 2.0, size={"rows": 512, "vocab": 151936}),
        record("token_stats", "ours-torch", "whatever", 18.0, size={"rows": 512, "vocab": 151936}),
        # none of these says anything about a backend of ours
        record("logprob_entropy", "compile", "512×151936", 0.1),
        record("logprob_entropy_fwdbwd", "ours-torch-inplace", "512×151936", 0.1),
        record("clip_cov_loss", "ours", "512×128 batch", 0.1),
        record("logprob_entropy", "ours-cuda", "512×151936", 0.1, status="skipped", summary={}),
        # on a CPU the host's time is the whole time; tokens stand in the shape, or in the size
        record("kl_cov_mask", "ours-torch", "64 normal", 1.0, cache="host"),
        record("kl_cov_mask", "ours-cpu", "64 normal", 3.0, cache="host"),
        record("clip_cov_mask", "ours-cpu", "x", 3.0, size={"tokens": 1 << 22}),
    )
    table = maker.make([path], [])
    row = table.rows["token_stats", "cpu", "fp32", "large"]
    assert (row.order, dict(row.times), row.measurements) == (("cpu", "torch"), {"cpu": 1.0, "torch": 6.0}, 2)
    assert row.sources == (auto_table.Source("bench.json", "some-machine", "abc123", "2026-01-02"),)
    assert table.rows["kl_cov_mask", "cpu", "fp32", "small"].order == ("torch", "cpu")
    assert table.rows["clip_cov_mask", "cpu", "fp32", "large"].order == ("cpu",)
    assert len(table.rows) == 3
    # what is written is what is read
    assert auto_table.parse(json.loads(maker.text(table))) == table


@pytest.mark.parametrize(("triton", "first"), [(8.0, "triton"), (9.9, "cuda"), (12.0, "cuda")])
def test_a_fused_kernel_has_to_beat_all_others(triton: float, first: str, tmp_path: Path) -> None:
    """From hidden states: by more than the spread, of the backend that is best in parts."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "bf16", "size": {"rows": 8192, "features": 64, "vocab": 999}}
    times = {"triton": triton, "torch": 20.0, "cuda": 10.0}
    records = [record("linear_logprob_entropy", f"ours-{name}", "x", time, **options) for name, time in times.items()]
    path = bench(tmp_path / "bench.json", *records, machine=HOPPER)
    (row,) = maker.make([path], []).rows.values()
    assert row.key == ("linear_token_stats", "sm_90", "bf16", "medium") and row.order[0] == first


def test_a_difference_below_the_spread_keeps_the_default_order(tmp_path: Path) -> None:
    def order(cuda: float, triton: float, spread: float) -> tuple[str, ...]:
        options: dict[str, Any] = {"device": "cuda", "dtype": "bf16"}
        path = bench(
            tmp_path / "bench.json",
            record("token_stats", "ours-torch", "8192×128256", 90.0, **options),
            record("token_stats", "ours-triton", "8192×128256", triton, **options, spread=spread),
            record("token_stats", "ours-cuda", "8192×128256", cuda, **options),
            machine=HOPPER,
        )
        return maker.make([path], []).rows["token_stats", "sm_90", "bf16", "large"].order

    assert order(1.0, 0.95, 0.1) == ("cuda", "triton", "torch")
    assert order(1.0, 0.85, 0.1) == ("triton", "cuda", "torch")
    assert order(1.0, 0.85, 0.3) == ("cuda", "triton", "torch")
    assert order(200.0, 150.0, 0.1) == ("torch", "triton", "cuda")


def test_host_time_of_a_gpu_call_is_not_the_time_of_its_work(tmp_path: Path) -> None:
    work = record("token_stats", "ours-cuda", "64×32000", 2.0, device="cuda")
    host = record("token_stats", "ours-torch", "4×64", 1.0, device="cuda", cache="host")
    table = maker.make([bench(tmp_path / "bench.json", work, host, machine=HOPPER)], [])
    assert list(table.rows) == [("token_stats", "sm_90", "fp32", "medium")]
    assert table.rows["token_stats", "sm_90", "fp32", "medium"].sources[0].commit == "unknown commit"


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_wrong_result_is_no_fast_result(tmp_path: Path, status: str) -> None:
    """Also where other cases of the class were right."""
    path = bench(
        tmp_path / "bench.json",
        record("token_stats", "ours-cpu", "512×151936", 1.0),
        record("token_stats", "ours-torch", "512×151936", 9.0),
        record("logprob_entropy", "ours-cpu", "512×151936", 1.0, status=status, reason="entropy 3 > 1", summary={}),
    )
    row = maker.make([path], []).rows["token_stats", "cpu", "fp32", "large"]
    assert row.order == ("torch",) and row.left_out == {"cpu": f"{status} in bench.json: entropy 3 > 1"}


def test_several_files_are_joined(tmp_path: Path) -> None:
    paths = [
        bench(
            tmp_path / f"{name}.json",
            record("token_stats", "ours-cpu", "512×151936", 1.0),
            record("token_stats", "ours-torch", "512×151936", ratio),
        )
        for name, ratio in (("one", 4.0), ("two", 16.0))
    ]
    row = maker.make(paths, []).rows["token_stats", "cpu", "fp32", "large"]
    assert row.times["torch"] == 8.0 and [source.file for source in row.sources] == ["one.json", "two.json"]


def without_summary(document: dict[str, Any]) -> None:
    del document["groups"][0]["records"][0]["summary"]


def no_time(document: dict[str, Any]) -> None:
    document["groups"][0]["records"][0]["summary"]["median"] = 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("machine"), "expected a bench.json, got one without 'machine'"),
        (lambda d: d.update(groups=[]), "expected timed records of our backends"),
        (lambda d: d["groups"][0]["records"][0].update(shape="a lot"), "expected a size, or a shape like 512×151936"),
        (lambda d: d["groups"][0]["records"][0].update(shape=""), "expected a size, or a shape like 512×151936"),
        (lambda d: d["groups"][0]["records"][0].update(dtype="int8"), "expected a size, or a shape"),
        (lambda d: d["groups"][0]["records"][0].update(device="cuda"), "expected machine.gpu with capability"),
        (without_summary, "without 'summary'"),
        (no_time, "expected a median > 0"),
    ],
)
def test_bad_results_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = bench(tmp_path / "bench.json", record("token_stats", "ours-cpu", "512×151936", 1.0))
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    output = tmp_path / "table.json"
    assert maker.main([str(path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "expected JSON"), ("[]", "a JSON object")])
def test_no_results_at_all(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        maker.make([path], [])


SUMMARY: dict[str, Any] = {
    "gpu": "NVIDIA H200",
    "architecture": "sm_90",
    "commit": "abc123",
    "date": "2026-01-02T03:04:05+00:00",
    "tests": {
        "elsewhere": {"passed": 5, "failed": 0, "skipped": 2, "complete": True},
        "pairs": [
            {"op": "token_stats", "backend": "cuda", "passed": 300, "failed": 0, "skipped": 3, "complete": True},
            {"op": "token_stats", "backend": "triton", "passed": 200, "failed": 1, "skipped": 0, "complete": True},
            {"op": "kl_cov_mask", "backend": "cuda", "passed": 40, "failed": 0, "skipped": 0, "complete": True},
            {"op": "clip_cov_mask", "backend": "cuda", "passed": 0, "failed": 0, "skipped": 40, "complete": True},
            {"op": "token_stats", "backend": "torch", "passed": 10, "failed": 0, "skipped": 0, "complete": True},
        ],
    },
    "self_check": [
        {"op": "token_stats", "backend": "cuda", "device": "cuda", "ok": True},
        {"op": "token_stats", "backend": "cuda", "device": "cuda", "ok": True},
        {"op": "token_stats", "backend": "triton", "device": "cuda", "ok": True},
        {"op": "kl_cov_mask", "backend": "cuda", "device": "cpu", "ok": True},
        {"op": "clip_cov_mask", "backend": "cuda", "device": "cuda", "ok": True},
    ],
}


def pairs(tmp_path: Path, change: Callable[[dict[str, Any]], Any] = lambda summary: None) -> list[tuple[str, str]]:
    summary = copy.deepcopy(SUMMARY)
    change(summary)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary))
    found = maker.make([], [path]).verified.values()
    assert all(pair.architecture == "sm_90" and pair.source.machine == "NVIDIA H200" for pair in found)
    return [(pair.op, pair.backend) for pair in found]


def test_verified_is_what_passed_everything(tmp_path: Path) -> None:
    # a failed test, no self-check on the GPU, no test that ran, and torch, which needs none, are left out
    assert pairs(tmp_path) == [("token_stats", "cuda")]
    assert pairs(tmp_path, lambda s: s["self_check"][1].update(ok=False)) == []
    assert pairs(tmp_path, lambda s: s["tests"]["pairs"][0].update(complete=False)) == []
    assert pairs(tmp_path, lambda s: s["tests"]["elsewhere"].update(complete=False)) == []
    assert pairs(tmp_path, lambda s: s["tests"]["elsewhere"].update(failed=1)) == []
    assert pairs(tmp_path, lambda s: s.update(architecture=None)) == []
    with pytest.raises(ValueError, match=r"expected a summary\.json of make gpu-check, got one without 'tests'"):
        pairs(tmp_path, lambda s: s.pop("tests"))


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = bench(tmp_path / "bench.json", record("token_stats", "ours-cpu", "512×151936", 1.0))
    summary, output = tmp_path / "summary.json", tmp_path / "table.json"
    summary.write_text(json.dumps(SUMMARY))
    assert maker.main([str(results), "--verified", str(summary), "--output", str(output)]) == 0
    table = auto_table.read(output)
    assert list(table.rows) == [("token_stats", "cpu", "fp32", "large")]
    assert table.verified["token_stats", "cuda", "sm_90"].tests == 300
    assert "verified: token_stats cuda on sm_90 (300 tests)" in capsys.readouterr().out
