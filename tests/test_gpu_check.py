"""The driver of `make gpu-check`: steps with limits, results that survive, one deadline; what it says of the tests."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

import gpu_check
import gpu_summary
import kernel_calls
from benchmarks import auto_table
from gpu_summary import Gpu, Result

H200 = Gpu("NVIDIA H200", 9, 0)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_failure_does_not_stop_the_rest(tmp_path: Path) -> None:
    steps = [
        gpu_check.Step("build", python("print('built')"), 20),
        gpu_check.Step("tests", python("import sys; print('1 failed'); sys.exit(1)"), 20, needs="build"),
        gpu_check.Step("after", python("print('seen')"), 20, needs="tests"),
        gpu_check.Step("missing", ("/no/such/program",), 20),
        gpu_check.Step("last", python("import os; print('done', os.environ['X'])"), 20, "build", variables={"X": "y"}),
    ]
    work, out = tmp_path / "work", tmp_path / "out"
    results = gpu_check.run(steps, work, out, deadline=60, gpu=H200, head={"commit": "abc", "sources": "s"})
    assert [(r.name, r.state) for r in results] == [
        ("build", "passed"), ("tests", "failed"), ("after", "not run"), ("missing", "failed"), ("last", "passed"),
    ]  # fmt: skip
    assert results[1].note == "1 failed" and "needs tests" in results[2].note and "No such file" in results[3].note
    assert results[4].note == "done y" and results[4].command.startswith("X=y ")
    summary = json.loads((out / "summary.json").read_text())
    assert [step["state"] for step in summary["steps"]] == [r.state for r in results]
    assert (summary["gpu"], summary["commit"], gpu_summary.sources_of(work)) == ("NVIDIA H200", "abc", "s")
    page = (out / "summary.md").read_text()
    assert "| tests | failed |" in page and "## End of tests.log" in page and "## End of build.log" not in page
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"build.log", "tests.log", "last.log", "summary.json"} <= set(archive.getnames())
        assert archive.extractfile("last.log").read() == b"done y\n"  # type: ignore[union-attr]


def test_a_second_call_goes_on(tmp_path: Path) -> None:
    """What an earlier call found stays, a step that is run again is replaced, and one that is needed is known."""
    failing = gpu_check.Step("build", python("import sys; sys.exit(1)"), 20)
    later = gpu_check.Step("later", python("print(1)"), 20, needs="build")
    gpu_check.run([failing], tmp_path / "w", tmp_path / "o", deadline=60)
    (result,) = gpu_check.run([later], tmp_path / "w", tmp_path / "o", deadline=60)
    assert result.state == "not run"
    gpu_check.run([gpu_check.Step("build", python("print(2)"), 20)], tmp_path / "w", tmp_path / "o", deadline=60)
    (result,) = gpu_check.run([later], tmp_path / "w", tmp_path / "o", deadline=60)
    assert result.state == "passed"
    steps = json.loads((tmp_path / "o" / "summary.json").read_text())["steps"]
    assert [(step["name"], step["state"]) for step in steps] == [("build", "passed"), ("later", "passed")]
    # in a new folder nothing is known, and nothing is missed: the extension may have been built by hand
    (result,) = gpu_check.run([later], tmp_path / "new", tmp_path / "o", deadline=60)
    assert result.state == "passed"


def test_a_hanging_step_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    (result,) = gpu_check.run([gpu_check.Step("hangs", python(code), 1.0)], tmp_path, tmp_path / "o", deadline=60)
    assert result.state == "out of time" and time.monotonic() - started < 20
    time.sleep(3.5)
    assert not mark.exists()


def test_a_step_out_of_time_may_write_what_it_has(tmp_path: Path) -> None:
    """As pytest does its report, and the benchmark its document."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written')"
    (result,) = gpu_check.run([gpu_check.Step("slow", python(code), 10.0)], tmp_path, tmp_path / "o", deadline=60)
    assert result.state == "out of time" and (tmp_path / "slow.log").read_text() == "written\n"


def test_the_deadline_is_for_all_and_a_reserve_for_one(tmp_path: Path) -> None:
    def results(reserve: float) -> list[Result]:
        steps = [
            gpu_check.Step("one", python("import time; time.sleep(1)"), 30),
            gpu_check.Step(
                "two", (*python("import sys; print(sys.argv[1])"), "{seconds}"), 30, reserve=reserve, ending=1
            ),
        ]
        return gpu_check.run(steps, tmp_path, tmp_path / "o", deadline=8)

    one, two = results(0)
    assert (one.state, two.state) == ("passed", "not run") and "left" in two.note
    one, two = results(8)
    assert (one.state, two.state) == ("not run", "passed")
    assert two.note in ("6", "7"), "the seconds that are left, less those for its ending"


def test_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some-1.0-py3-none-any.whl").touch()
    steps = gpu_check.plan("python3", tmp_path, wheels=tmp_path, gpu=H200, commit="abc", profile=True)
    names = [step.name for step in steps]
    assert names.index("wheels") < names.index("build") < names.index("tests-cuda") < names.index("benchmark")
    assert {"memcheck", "racecheck", "initcheck", "synccheck", "tests-triton", "tests-rest"} < set(names)
    assert names[-2:] == ["benchmark", "profile"], "nothing runs beside a measurement, and tuning comes last"
    by_name = {step.name: step for step in steps}
    assert by_name["build"].variables["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert by_name["benchmark"].variables["ENTROPY_KERNELS_COMMIT"] == "abc"
    assert by_name["benchmark"].reserve >= 150 and "{seconds}" in by_name["benchmark"].command
    assert "profile" not in [step.name for step in gpu_check.plan("python3", tmp_path, wheels=tmp_path, gpu=None)]
    assert gpu_check.main(["--list", "--only", "build,tests-cuda"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nonsense"])


def test_gpus() -> None:
    assert (H200.slug, H200.build_target) == ("h200", "9.0a")
    assert Gpu("NVIDIA H100 80GB HBM3", 9, 0).slug == "h100-80gb-hbm3"
    assert (
        Gpu("NVIDIA A100-SXM4-80GB", 8, 0).build_target == "8.0" and Gpu("NVIDIA B200", 10, 0).build_target == "10.0a"
    )


def test_results_of_other_sources_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = gpu_check.Step("build", python("print(1)"), 20)
    monkeypatch.setattr(gpu_check, "plan", lambda *_, **__: [step])
    monkeypatch.setattr(gpu_check, "fingerprint", lambda: "new")
    arguments = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--commit", "abc"]
    for before, kept in (("new", True), ("old", False)):
        old = [Result("other", "", "passed", 1.0)]
        (tmp_path / "w").mkdir(exist_ok=True)
        gpu_summary.write(tmp_path / "w", tmp_path / "o", old, None, {"sources": before})
        assert gpu_check.main([*arguments, "--rehearse"]) == 0
        summary = json.loads((tmp_path / "o" / "summary.json").read_text())
        assert ("other" in [s["name"] for s in summary["steps"]]) == kept
        assert (summary["sources"], summary["commit"]) == ("new", "abc")


@pytest.mark.parametrize("argument", ["--out", "--work", "$OUT"])
@pytest.mark.parametrize(
    ("place", "why"),
    [("file", "File exists"), ("file/below", "Not a directory"), ("/proc", None)],  # /proc: not even for root
)
def test_a_folder_that_cannot_be_written_to(
    argument: str,
    place: str,
    why: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: pytest.fail("a step was run"))
    (tmp_path / "file").write_text("")
    folders = {"--out": tmp_path / "o", "--work": tmp_path / "w"}
    name = "--out" if argument == "$OUT" else argument
    folders[name] = tmp_path / place
    if argument == "$OUT":
        monkeypatch.setenv("OUT", str(folders.pop("--out")))
    flags = [word for flag, folder in folders.items() for word in (flag, str(folder))]
    assert gpu_check.main([*flags, "--rehearse"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"argument {name}: expected a folder to write to, got {tmp_path / place}" in said
    assert why is None or why in said


def test_a_rehearsal_pretends_a_gpu(tmp_path: Path) -> None:
    """Tests and benchmark run behind tools/gpu_pretence.py; the others as they are."""
    plan = gpu_check.plan(sys.executable, tmp_path, wheels=tmp_path, gpu=None)
    commands = {step.name: gpu_check.pretended(step).command for step in plan}
    assert commands["tests-cuda"][1:6] == ("-m", "pytest", "-p", "gpu_pretence", "-q")
    assert commands["benchmark"][1:4] == ("tools/gpu_pretence.py", "-m", "benchmarks.run")
    assert all(commands[step.name] == step.command for step in plan if step.name in ("machine", "build", "memcheck"))


def test_the_fingerprint_is_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "csrc" / "a.cu").write_text("1")
    first = gpu_check.fingerprint()
    (tmp_path / "csrc" / "a.o").write_text("built")
    (tmp_path / "benchmarks" / "results" / "bench.json").write_text("measured")
    assert gpu_check.fingerprint() == first
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert gpu_check.fingerprint() != first


def test_at_most_eight_files_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "w", tmp_path / "o"
    (work / "benchmark").mkdir(parents=True)
    for name in ("bench.json", "bench.md", "a.png", "time_selection.png", "bandwidth_bf16.png", "z.png"):
        (work / "benchmark" / name).write_text(name)
    monkeypatch.setattr(gpu_summary, "ARCHIVE_LIMIT", 50_000)
    monkeypatch.setattr(gpu_summary, "LARGE_FILE", 10_000)
    (work / "huge.log").write_bytes(os.urandom(200_000))
    gpu_summary.write(work, out, [], H200, {})
    found = {path.name for path in out.iterdir()}
    assert found == {
        "summary.json", "summary.md", "bench.json", "bench.md", "results.tar.gz",
        "bandwidth_bf16.png", "time_selection.png", "a.png",
    }  # fmt: skip
    assert (out / "results.tar.gz").stat().st_size < 50_000
    with tarfile.open(out / "results.tar.gz") as archive:
        names = set(archive.getnames())
    assert "huge.log" not in names and "benchmark/z.png" in names


def test_a_crash_is_not_read_as_the_success_of_an_earlier_call(tmp_path: Path) -> None:
    report = tmp_path / "tests-cuda.xml"
    text = '<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>'
    good = gpu_check.Step("tests-cuda", python(f"open({str(report)!r}, 'w').write({text!r})"), 20)
    gpu_check.run([good], tmp_path, tmp_path / "out", deadline=60)
    summary = tmp_path / "summary.json"
    assert json.loads(summary.read_text())["tests"]["passed"] == 1
    gpu_check.run(
        [gpu_check.Step("tests-cuda", python("import os; os.abort()"), 20)], tmp_path, tmp_path / "out", deadline=60
    )
    assert json.loads(summary.read_text())["tests"]["passed"] == 0


# ---- what the tests said --------------------------------------------------------------------------------------------

TESTS = """
import pytest

@pytest.mark.gpu(backend="cuda", ops=("token_stats",))
@pytest.mark.parametrize("bad", [0, {bad}])
def test_one(bad):
    assert not bad, "wrong | value"

@pytest.mark.gpu(backend="triton", ops=("kl_cov_mask", "clip_cov_mask"))
def test_two():
    pass

@pytest.mark.gpu(backend="triton", ops=("kl_cov_mask",))
def test_three():
    pytest.skip("not here")

@pytest.mark.gpu
def test_anything():
    pass

def test_on_the_cpu():
    assert False
"""
CHECKS = [
    {"op": op, "backend": backend, "device": "cuda", "what": "values", "ok": True, "detail": ""}
    for op, backend in (("token_stats", "cuda"), ("kl_cov_mask", "triton"))
]


def check_with_tests(folder: Path, *backends: str, bad: int = 0) -> dict:
    """summary.json of a run whose tests are those above, collected by this suite's own conftest."""
    file = folder / "test_some.py"
    file.write_text(TESTS.format(bad=bad))
    (folder / "doctor.json").write_text(json.dumps({"architecture": "sm_90", "checks": CHECKS, "versions": {}}))
    here = Path(__file__).parent
    steps = []
    for backend in backends:
        command = (
            sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "-m", "gpu",
            "--gpu-backend", backend, f"--rootdir={folder}", "-c", str(here.parent / "pyproject.toml"),
            f"--junit-xml={folder / f'tests-{backend}.xml'}", str(file),
        )  # fmt: skip
        variables = {"PYTHONPATH": str(here), "TRITON_INTERPRET": "0"}
        steps.append(gpu_check.Step(f"tests-{backend}", command, 100, variables=variables))
    gpu_check.run(steps, folder, folder / "out", deadline=200, gpu=H200, head={"date": "2026-01-02", "commit": "abc"})
    return json.loads((folder / "out" / "summary.json").read_text())


@pytest.mark.slow
def test_tests_are_counted_for_their_pairs_and_decide_what_is_verified(tmp_path: Path) -> None:
    summary = check_with_tests(tmp_path, "cuda", "triton", "rest")
    tests = summary["tests"]
    assert (tests["complete"], tests["passed"], tests["failed"], tests["skipped"]) == (True, 4, 0, 1), summary["steps"]
    counts = {(p["op"], p["backend"]): (p["passed"], p["failed"], p["skipped"]) for p in tests["pairs"]}
    assert counts == {
        ("token_stats", "cuda"): (2, 0, 0),
        ("kl_cov_mask", "triton"): (1, 0, 1),
        ("clip_cov_mask", "triton"): (1, 0, 0),
    }  # fmt: skip
    assert tests["elsewhere"]["passed"] == 1
    path = tmp_path / "out" / "summary.json"
    verified = [(pair.op, pair.backend, pair.tests) for pair in auto_table.read_verified(path)]
    # the self-check did not look at clip_cov_mask
    assert verified == [("kl_cov_mask", "triton", 1), ("token_stats", "cuda", 2)]

    # a second call, in which a test of one pair fails
    summary = check_with_tests(tmp_path, "cuda", bad=1)
    assert summary["tests"]["complete"] and summary["tests"]["failed"] == 1
    assert "test_one[1]" in summary["tests"]["failures"][0]["test"]
    assert "wrong \\| value" in (tmp_path / "out" / "summary.md").read_text()
    assert [(pair.op, pair.backend) for pair in auto_table.read_verified(path)] == [("kl_cov_mask", "triton")]


def test_a_failure_that_names_no_pair_and_tests_that_did_not_end_verify_nothing(tmp_path: Path) -> None:
    report = tmp_path / "tests-cuda.xml"
    (tmp_path / "tests-rest.xml").write_text('<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>')
    properties = (
        '<properties><property name="gpu_backend" value="cuda"/><property name="gpu_ops" value="{}"/></properties>'
    )
    good = f'<testcase classname="a" name="b">{properties.format("token_stats")}</testcase>'
    bad = f'<testcase classname="a" name="c">{properties.format("")}<error message="in a fixture"/></testcase>'

    def verified(cases: str, state: str = "passed", rest: str = "passed") -> list:
        report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        (tmp_path / "doctor.json").write_text(json.dumps({"architecture": "sm_90", "checks": CHECKS}))
        results = [Result("tests-cuda", "", state, 1.0), Result("tests-rest", "", rest, 1.0)]
        gpu_summary.write(tmp_path, tmp_path / "out", results, H200, {"date": "2026-01-02", "commit": None})
        return auto_table.read_verified(tmp_path / "out" / "summary.json")

    assert len(verified(good)) == 1
    assert verified(good + bad) == []
    assert verified(good, "out of time") == [] and verified(good, "not run") == []
    assert verified(good, rest="out of time") == []
    assert verified("") == []
    report.write_text("<testsuites><test")
    results = [Result(name, "", "passed", 1.0) for name in gpu_summary.TEST_STEPS]
    assert not gpu_summary.digest_tests(tmp_path, results)["complete"]


def test_every_test_on_a_gpu_is_in_a_file_of_the_plan() -> None:
    words = ("mark.gpu", "on_gpu(", "place: Place", "selection_place", "loss_place", "(place")
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text()
        if path.name != Path(__file__).name and any(word in text for word in words):
            assert any(fnmatch(path.name, pattern) for pattern in gpu_check.TEST_FILES), path.name


# ---- the calls for the sanitizer -------------------------------------------------------------------------------------


def test_kernel_calls_are_right_and_see_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole small set with the C++ kernels in the place of a GPU's, then with one result that is off."""
    calls = [call._replace(backends=("cpu",)) for call in kernel_calls.small()]
    monkeypatch.setattr(kernel_calls, "BACKENDS", ("cpu",))
    monkeypatch.setitem(kernel_calls.SETS, "small", lambda: iter(calls))
    if kernel_calls.ek.backends()["token_stats"]["cpu"] != "available":
        pytest.skip("the C++ kernels are not built")
    assert kernel_calls.main(["small", "--device", "cpu"]) == 0
    assert f"{len(calls)} calls, 0 wrong" in capsys.readouterr().out
    for call in (calls[0], next(call for call in calls if "700 tokens" in call.name)):

        def broken(device: str, backend: str, call: kernel_calls.Call = call) -> kernel_calls.Results:
            *first, last = call.run(device, backend)
            return (*first, last if backend == "torch" else last.roll(1, -1))

        monkeypatch.setitem(
            kernel_calls.SETS, "small", lambda call=call, broken=broken: iter([call._replace(run=broken)])
        )
        assert kernel_calls.main(["small", "--device", "cpu"]) == 1
        assert "WRONG" in capsys.readouterr().out


def test_the_kernel_calls_without_a_backend_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_calls, "BACKENDS", ())
    assert kernel_calls.main(["small"]) == 1


def test_make_passes_the_commit() -> None:
    shown = subprocess.run(
        ["make", "-n", "gpu-check", "COMMIT=abc"], capture_output=True, text=True, cwd=gpu_check.ROOT
    )
    assert "tools/gpu_check.py" in shlex.join(shown.stdout.split())


def test_without_a_gpu_nothing_is_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "run", lambda *arguments, **options: pytest.fail("a step was run"))
    assert gpu_check.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err
