"""The driver of `make gpu-check`: steps with limits, logs that survive, one deadline."""

from __future__ import annotations

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest

import gpu_check


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_failure_does_not_stop_the_rest(tmp_path: Path) -> None:
    steps = [
        gpu_check.Step("build", python("print('built')"), 20),
        gpu_check.Step("tests", python("import sys; print('1 failed'); sys.exit(1)"), 20, needs="build"),
        gpu_check.Step("after", python("print('seen')"), 20, needs="tests"),
        gpu_check.Step("missing", ("/no/such/program",), 20),
        gpu_check.Step("last", python("print('done')"), 20, needs="build"),
    ]
    results = gpu_check.run(steps, tmp_path, deadline=60)
    assert [(r.name, r.state) for r in results] == [
        ("build", "passed"), ("tests", "failed"), ("after", "not run"), ("missing", "failed"), ("last", "passed"),
    ]  # fmt: skip
    assert results[1].note == "1 failed" and "needs tests" in results[2].note
    assert [entry["state"] for entry in json.loads((tmp_path / "summary.json").read_text())] == [
        r.state for r in results
    ]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"build.log", "tests.log", "last.log", "summary.json"} <= set(archive.getnames())
        assert archive.extractfile("last.log").read() == b"done\n"  # type: ignore[union-attr]


def test_a_hanging_step_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    (result,) = gpu_check.run([gpu_check.Step("hangs", python(code), 1.0)], tmp_path, deadline=60)
    assert result.state == "out of time" and time.monotonic() - started < 20
    time.sleep(3.5)
    assert not mark.exists()


def test_the_deadline_is_for_all(tmp_path: Path) -> None:
    steps = [gpu_check.Step(name, python("import time; time.sleep(1)"), 30) for name in ("one", "two")]
    results = gpu_check.run(steps, tmp_path, deadline=8)
    assert [r.state for r in results] == ["passed", "not run"] and "left" in results[1].note


def test_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some-1.0-py3-none-any.whl").touch()
    names = [step.name for step in gpu_check.plan("python3", tmp_path, wheels=tmp_path)]
    assert names.index("wheels") < names.index("build") < names.index("tests") < names.index("benchmark")
    assert {"memcheck", "racecheck", "initcheck", "synccheck"} < set(names)
    assert gpu_check.main(["--list", "--only", "build,tests"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nonsense"])
