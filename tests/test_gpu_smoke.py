"""`make gpu-smoke`, `gpu-verify`, `gpu-bench`: steps with limits, results that survive, what is verified."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_smoke
from conftest import BackendDevice, needs_fake_gpu
from entropy_kernels.backends import registry, verdict
from entropy_kernels.backends.verdict import Pair, Verdict
from entropy_kernels.smoke_matrix import Family
from entropy_kernels.verify import Outcome
from gpu_smoke import Course, Gpu, Step
from stub_gpu import HERE, add_stub_gpu, run_on_fake_gpu
from waiting import Clock, has_begun, lives, was_ended

ROOT = Path(__file__).resolve().parent.parent
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.1")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def course(folder: Path, seconds: float = 600) -> Course:
    return Course("smoke", argparse.Namespace(out=folder, seconds=seconds), H100)


def records(folder: Path, name: str = "smoke") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "PATH", "")
    monkeypatch.setenv("PATH", "")
    for name in gpu_smoke.COURSES:
        assert gpu_smoke.main([name]) == 2
        assert capsys.readouterr().err == f"gpu-{name}: nvidia-smi is not installed here, or shows no GPU\n"


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The GPU is the one that torch takes; a driver that hangs or finds nothing is told, and no error."""

    def program(name: str, text: str) -> str:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    monkeypatch.setattr(gpu_smoke, "PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", program("python", "echo 'NVIDIA H100 80GB HBM3'; echo 9.0"))
    for text, gpu in (
        ("echo 580.1; echo 580.1", H100),
        ("echo No devices were found", "nvidia-smi is not installed here, or shows no GPU"),
        ("exit 9", "nvidia-smi is not installed here, or shows no GPU"),
    ):
        program("nvidia-smi", text)
        assert gpu_smoke.find_gpu() == gpu
    program("nvidia-smi", "echo 580.1")
    program("python", "echo 'RuntimeError: no driver' >&2; exit 1")
    assert "has no torch that can use the GPU (RuntimeError: no driver)" in gpu_smoke.find_gpu()
    assert [Gpu("", c, "").build_target for c in ("8.0", "9.0", "10.0")] == ["8.0", "9.0a", "10.0a"]


def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_smoke, "find_gpu", lambda: H100)
    (tmp_path / "file").touch()
    assert gpu_smoke.main(["smoke", "--out", str(tmp_path / "file" / "x")]) == 2
    assert "argument --out: expected a folder to write to" in capsys.readouterr().err


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_a_failure_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = course(tmp_path)
    assert run.run("good", python("import os; print('done', os.environ['X'])"), 600, X="y")
    assert not run.run(
        "bad", python("import sys; print('{\"a\": 1}'); print('3 failed'); print('x'); sys.exit(1)"), 600
    )
    assert not run.run("missing", ("/no/such/program",), 20)
    assert not run.step("raises", 20, lambda seconds: 1 // 0)  # type: ignore[arg-type, return-value]
    states = [(step.name, step.state, step.note) for step in run.steps]
    assert states[:2] == [("good", "passed", "done y"), ("bad", "failed", "3 failed")]
    assert "No such file" in states[2][2] and states[3][2].startswith("ZeroDivisionError")
    found = records(tmp_path)
    assert (found[0]["gpu"], found[0]["driver"]) == (H100.name, "580.1")
    assert [r["record"] for r in found] == ["course", "step", "bad", "log", "step", "step", "step"]
    assert found[2]["a"] == 1 and found[3]["tail"] == ['{"a": 1}', "3 failed", "x"]
    assert run.finish() == 1
    table = capsys.readouterr().out
    assert "3 failed" in table and "OK" in table
    assert (tmp_path / "logs" / "smoke-good.log").read_text() == "done y\n"


def test_a_hanging_step_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    monkeypatch.setattr(gpu_smoke, "time", Clock(lambda: has_begun(child)))
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {lives(child)!r}]); time.sleep(60)"
    run = course(tmp_path)
    assert not run.run("hangs", python(code), 1.0)
    assert run.steps[0].state == "out of time" and was_ended(child)


def test_a_step_out_of_time_may_write_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    monkeypatch.setattr(gpu_smoke, "time", Clock(begun.exists))
    monkeypatch.setattr(gpu_smoke, "GRACE", 100.0)
    code = f"import pathlib, time\ntry: pathlib.Path({str(begun)!r}).touch(); time.sleep(600)\n"
    code += "except KeyboardInterrupt: print('{\"written\": true}')"
    run = course(tmp_path)
    run.run("slow", python(code), 600)
    assert run.steps[0].state == "out of time" and {"written": True}.items() <= records(tmp_path)[1].items()


def test_the_time_is_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(gpu_smoke, "time", clock)
    run = course(tmp_path, seconds=32)
    assert run.run("one", python("print('x')"), 10)
    clock.now = 20.0
    assert run.run("two", (*python("import sys; print(sys.argv[1])"), "{seconds}"), 30), "12 s are enough to begin"
    assert run.steps[1].note == "2", "what is left for its work, after time to end"
    assert not run.run("three", python("print(1)"), 100)
    assert (run.steps[2].state, run.steps[2].note) == ("not run", "12 s left of its 100")


@pytest.mark.parametrize("refused", [None, "built from other sources"])
def test_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str | None) -> None:
    """Prebuilt ones where they load; else they are built, and that is no failure."""
    run = course(tmp_path)
    run.arguments = argparse.Namespace(build=True, prebuilt=tmp_path, seconds=60)
    ran: list[Any] = []
    monkeypatch.setattr(gpu_smoke.gpu_prebuilt, "install", lambda folder, package: refused)
    monkeypatch.setattr(run, "program", lambda *arguments: ran.append(arguments) or ("passed", "built"))
    gpu_smoke.libraries(run)
    assert [step.state for step in run.steps] == ["passed"]
    assert (run.steps[0].note == "built") == bool(ran) == bool(refused)
    if refused:
        assert ran[0][3]["TORCH_CUDA_ARCH_LIST"] == "9.0a"
        assert run.recorded["prebuilt"] == {"refused": refused}
    run.arguments.build = False
    gpu_smoke.libraries(run)
    assert len(run.steps) == 1


def test_families_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful_registry: None) -> None:
    """What an earlier course found of the same kernels stands; without that they are run."""
    add_stub_gpu(monkeypatch, kernels="")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_smoke, "families", lambda course, limit: [limit])
    run = course(tmp_path)
    assert gpu_smoke.families_seen(run, 60) == [60]
    text = "wrong, it differs"
    known = [op for op in registry.OPS if op != "token_covariance"]
    pairs = [Pair(op, "cuda", 9, {"cuda/backward-strided": text} if "stats" in op else {}) for op in known]
    verdict.write(Verdict(verdict.machine(torch.device("cuda", 0)), "2026-01-01", pairs))
    found = gpu_smoke.families_seen(run, 60)
    assert {o.family.name for o in found} >= {"cuda/forward-bulk", "cuda/selection-grid", "cuda/backward-strided"}
    assert all("token_covariance" not in o.family.ops for o in found), "nothing is known of it"
    assert [(o.family.name, o.detail) for o in found if not o.passed] == [("cuda/backward-strided", text)]
    assert run.steps[0].state == "failed" and "as found 2026-01-01" in run.steps[0].note


# ---- what is verified ------------------------------------------------------------------------------------------------


def end(test: str, outcome: str = "passed", backend: str = "cuda", ops: str = "token_stats") -> list[dict[str, Any]]:
    named = {"test": test, "backend": backend, "ops": ops.split()}
    return [{"event": "begin", **named}, {"event": "end", "outcome": outcome, "seconds": 1.0, "error": "", **named}]


FINISH = [{"event": "finish", "exit": 0}]
MORE = {"event": "collected", "tests": 500}
SELECTION = end("s", ops="kl_cov_mask")
GOOD = [*end("a"), *SELECTION, *end("b", backend="triton"), *end("c", backend="", ops="")]


@pytest.mark.parametrize(
    ("events", "state", "race", "verified"),  # "collected" is put in front
    [
        ([*GOOD, *FINISH], "passed", "passed", {"token_stats", "kl_cov_mask"}),
        # of another op, of another backend
        ([*GOOD, *end("x", "failed", ops="kl_cov_mask"), *FINISH], "passed", "passed", {"token_stats"}),
        ([*GOOD, *end("x", "failed", backend="triton"), *FINISH], "passed", "passed", {"token_stats", "kl_cov_mask"}),
        ([*GOOD, *end("x", "failed", backend="torch"), *FINISH], "passed", "passed", {"token_stats", "kl_cov_mask"}),
        # of none: of all
        ([*GOOD, *end("x", "failed", backend="", ops=""), *FINISH], "passed", "passed", set()),
        (GOOD, "passed", "passed", set()),
        ([*GOOD, {"event": "finish", "exit": 2}], "passed", "passed", set()),
        ([*GOOD, {"event": "collect_failed", "file": "test_x.py", "error": "x"}, *FINISH], "passed", "passed", set()),
        ([MORE, *GOOD, *FINISH], "passed", "passed", set()),
        ([*GOOD, *end("x")[:1], *FINISH], "passed", "passed", set()),
        ([*GOOD, *FINISH], "hung", "passed", {"kl_cov_mask"}),
        ([*GOOD, *FINISH], "passed", "failed", set()),
        ([*SELECTION, *end("y", "skipped"), *FINISH], "passed", "passed", {"kl_cov_mask"}),
        ([], "passed", "passed", set()),
    ],
)
def test_what_is_verified(tmp_path: Path, events: list[Any], state: str, race: str, verified: set[str]) -> None:
    run = course(tmp_path)
    run.steps.append(Step("racecheck", race, 1.0, ""))
    log = tmp_path / "log"
    count = len({event["test"] for event in events if event["event"] == "end"})
    events = events if MORE in events else [{"event": "collected", "tests": count}, *events]
    log.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "cut o')
    outcomes = [
        Outcome(Family("cuda", "forward", ("token_stats",), tuple), state, 3, ""),
        Outcome(Family("cuda", "selection", ("kl_cov_mask",), tuple), "passed", 3, ""),
    ]
    gpu_smoke.conclude(run, outcomes, log)
    document = json.loads((tmp_path / "verification.json").read_text())
    assert (document["architecture"], document["gpu"]) == ("sm_90", H100.name)
    assert {pair["op"] for pair in document["pairs"] if pair["verified"]} == verified
    assert all(pair["verified"] == (not pair["not"]) for pair in document["pairs"])
    assert run.steps[-1].state == ("passed" if len(verified) == 2 else "failed")


# ---- the rehearsal ---------------------------------------------------------------------------------------------------

# The whole of smoke; what comes after it has programs in the place of families and of machine() that say that all is
# right: these have been seen.
PROGRAM = """
import json
import sys
import gpu_smoke
import waiting
from entropy_kernels import verify

gpu_smoke.time = verify.time = waiting.Clock()  # nothing runs out of time
verify.FAMILIES = {name: verify.FAMILIES[name] for name in ("cuda/forward-parts", "cuda/selection-grid")}
gpu_smoke.has_gpu_tests = lambda path: path.name == "test_hardware.py"
gpu = gpu_smoke.find_gpu()
gpu_smoke.find_gpu = lambda: gpu
codes = []
for arguments in json.loads(sys.argv[1]):
    codes.append(gpu_smoke.main(arguments))
    verify._CHILD = "print('{\\"begin\\": \\"a\\"}'); print('{\\"call\\": \\"a\\", \\"wrong\\": \\"\\"}')"
    gpu_smoke._MACHINE = "print('{}')"
print("exit codes", codes)
"""
TIMINGS = "--scale 4096 --only selection"
BENCHMARK = "--ops kl_cov_mask --impl ours-cuda --tokens 1000 --repeats 1 --no-memory --cache hot"
COURSES = [
    ["smoke", "--timings", TIMINGS],
    ["verify", "--pytest", "-k 'cuda and (5000 or waits)' --timeout 300 -n 0"],
    ["bench", "--bench", BENCHMARK, "--pytest", "-k 'is_that_of_the_cpu and 5000 and torch' -n 0"],
]
IN_WRONG_TEST = "test_selection_is_that_of_the_cpu[5000-cuda]"


def state_of(found: list[dict[str, Any]]) -> dict[str, str]:
    return {record["name"]: record["state"] for record in found if record["record"] == "step"}


def test_all_files_with_gpu_tests_are_found(request: pytest.FixtureRequest) -> None:
    """By their text: a file that is passed over would count as verified. As far as they are part of this run."""
    assert gpu_smoke.has_gpu_tests(ROOT / "tests" / "test_hardware.py")
    assert not gpu_smoke.has_gpu_tests(ROOT / "tests" / "test_cli.py")
    for item in request.session.items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        # on a GPU, what runs on a backend and device here does so there, as does what picks its device by itself
        on_device = hasattr(item.module, "DEVICE") or any(isinstance(value, BackendDevice) for value in parameters)
        if on_device or item.get_closest_marker("gpu"):
            assert gpu_smoke.has_gpu_tests(item.path), item.nodeid


@pytest.mark.slow
@needs_fake_gpu
def test_rehearsal(tmp_path: Path) -> None:
    """All courses, each to its end: planted wrong results of a family and of a test are named, and hinder nothing."""
    courses = [[*course, "--seconds", "400", "--no-build", "--out", str(tmp_path / "out")] for course in COURSES]
    faults = {"cuda/selection-grid": "wrong", IN_WRONG_TEST: "wrong"}
    path = f"{HERE / 'fake_gpu' / 'bin'}:{os.environ['PATH']}"
    paths = (ROOT / "tools", HERE)
    done = run_on_fake_gpu("-c", PROGRAM, json.dumps(courses), paths=paths, faults=faults, COMMIT="abc", PATH=path)
    output = done.stdout + done.stderr
    assert done.stdout.endswith("exit codes [1, 1, 0]\n"), output
    smoke, verification, bench = (records(tmp_path / "out", name) for name, *_ in COURSES)

    assert smoke[0]["commit"] == "abc"
    families = {r["family"]: r for r in smoke if r["record"] == "family"}
    states = {name: family["state"] for name, family in families.items()}
    assert states == {"cuda/forward-parts": "passed", "cuda/selection-grid": "wrong"}
    assert " differ" in families["cuda/selection-grid"]["detail"]
    assert [r["family"] for r in smoke if r["record"] == "memcheck"] == ["cuda/forward-parts"]
    assert any("median_us" in r for r in smoke if r["record"] == "timings")
    assert state_of(smoke) == {
        "machine": "passed", "families": "failed", "memcheck": "passed", "timings": "passed", "profile": "passed",
    }, output  # fmt: skip
    assert any("cuda/selection-grid" in r["note"] for r in smoke if r["record"] == "step")

    tests = {(r["event"], r["test"].rpartition("::")[2]) for r in verification if r["record"] == "test"}
    assert tests == {("end", IN_WRONG_TEST)}, output
    assert state_of(verification) == {
        "machine": "passed", "families": "passed", "tests-cuda-none": "failed", "racecheck": "passed",
        "verified": "failed",
    }, output  # fmt: skip
    document = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert document["commit"] == "abc"
    right = {pair["op"] for pair in document["pairs"] if pair["verified"]}
    assert right == {"token_stats", "linear_token_stats"}, "the fault was planted in a test of other ops"

    assert list(state_of(bench).items()) == [
        ("machine", "passed"), ("families", "passed"), ("benchmark", "passed"), ("synccheck", "passed"),
        ("initcheck", "passed"), ("tests-triton-torch", "passed"),
    ], output  # fmt: skip
    assert (tmp_path / "out" / "benchmark" / "bench.json").exists()


def test_what_tests_leave_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is no result of a test that ended well."""
    run = course(tmp_path)
    log = tmp_path / "logs" / "smoke-tests-cuda-none.jsonl"
    begun = end("hung")[:1]
    lost = [{"event": "device_lost", "test": "lost", "error": "x"}]
    uncollected = [{"event": "collect_failed", "file": "test_x.py", "error": "x"}]
    events = [*end("good"), *end("bad", "failed"), *begun, *lost, *uncollected]
    run.arguments.pytest = []
    monkeypatch.setattr(run, "run", lambda *_, **__: log.write_text("".join(json.dumps(e) + "\n" for e in events)))
    assert gpu_smoke.tests(run, "cuda,none", 60) == log
    found = [(r["event"], r.get("test", r.get("file"))) for r in records(tmp_path) if r["record"] == "test"]
    assert found == [
        ("end", "bad"), ("device_lost", "lost"), ("collect_failed", "test_x.py"), ("begun and not ended", "hung")
    ]  # fmt: skip
