"""A test that hangs or loses the device is named, in the log and in the output, and the other tests go on."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import needs_fake_gpu
from stub_gpu import HERE, run_on_fake_gpu

pytestmark = needs_fake_gpu
TESTS = """
import ctypes
import pytest
import torch

@pytest.mark.parametrize("number", range(4))
@pytest.mark.gpu(backend="cuda", ops=("token_stats", "kl_cov_mask"))
def test_good(number):
    assert torch.ones(2, device="cuda").sum() == 2

@pytest.mark.timeout(1)  # alone, so that no other test's end depends on how busy the machine is
@pytest.mark.gpu(backend="torch")
def test_hangs():
    torch.cuda.synchronize()

@pytest.mark.timeout(1)
@pytest.mark.gpu(backend="triton", ops=("token_stats",))
def test_hangs_and_keeps_the_gil():
    while True:
        ctypes.PyDLL(None).sleep(100)

@pytest.mark.gpu
def test_loses_the_device():
    torch.ones(2, device="cuda")

@pytest.mark.gpu
def test_fails():
    assert torch.zeros(2, device="cuda").sum() == 2

@pytest.mark.gpu
def test_is_skipped():
    pytest.skip("for a reason")

def test_without_a_gpu(): ...

def test_is_interrupted():
    raise KeyboardInterrupt
"""
FAULTS = {"test_hangs ": "hang", "test_loses": "lost"}


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """pytest in another process, and its log."""
    (folder / "test_inner.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = ("-m", "pytest", "-p", "gpu_guard", "-p", "no:cacheprovider", "--gpu-log", "log", *options)
    done = run_on_fake_gpu(*command, cwd=folder, paths=(HERE,), faults=FAULTS)
    return done, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def of(log: list[dict[str, Any]], event: str) -> dict[str, dict[str, Any]]:
    """The entries of an event by their test, each of which has one."""
    entries = [entry for entry in log if entry["event"] == event]
    found = {entry["test"].removeprefix("test_inner.py::"): entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.slow
def test_hung_and_lost_tests_end_alone(tmp_path: Path) -> None:
    done, log = run(tmp_path, "-n", "2", "-k", "not interrupted")
    output = done.stdout + done.stderr
    begun, ended = of(log, "begin"), of(log, "end")
    good = [f"test_good[{number}]" for number in range(4)]
    outcomes = {
        **dict.fromkeys((*good, "test_without_a_gpu"), "passed"),
        **dict.fromkeys(
            ("test_hangs", "test_hangs_and_keeps_the_gil", "test_loses_the_device", "test_fails"), "failed"
        ),
        "test_is_skipped": "skipped",
    }
    assert {name: entry["outcome"] for name, entry in ended.items()} == outcomes, output
    assert begun.keys() == ended.keys() and log[0] == {"event": "collected", "tests": len(outcomes)}
    assert log[-1] == {"event": "finish", "exit": done.returncode} and done.returncode == 1
    for name, backend, ops in (
        ("test_good[1]", "cuda", ["token_stats", "kl_cov_mask"]),
        ("test_hangs", "torch", []),
        ("test_hangs_and_keeps_the_gil", "triton", ["token_stats"]),
        ("test_without_a_gpu", "", []),
    ):
        assert (
            (ended[name]["backend"], ended[name]["ops"])
            == (backend, ops)
            == (begun[name]["backend"], begun[name]["ops"])
        )
    for name in ("test_hangs", "test_hangs_and_keeps_the_gil"):
        assert re.search(f"crashed while running .*{name}'", ended[name]["error"]) and ended[name]["seconds"] > 0.5
        assert re.search(f"FAILED test_inner.py::{name}\\b", output)
    lost = of(log, "device_lost")
    assert list(lost) == ["test_loses_the_device"] and "illegal memory access" in lost["test_loses_the_device"]["error"]
    assert "illegal memory access" in ended["test_loses_the_device"]["error"]
    assert (
        output.count("device lost in test_inner.py::test_loses_the_device: CUDA error") == 2
    )  # at once, and at the end
    assert "assert" in ended["test_fails"]["error"] and not ended["test_is_skipped"]["error"]


@pytest.mark.slow
def test_without_workers_the_run_stops(tmp_path: Path) -> None:
    """At the lost device, named; at a hang or an interrupt, with what was begun in the log."""
    done, log = run(tmp_path, "-k", "good or loses or without", "--gpu-backend", "none,torch")
    assert "Exit: device lost in test_inner.py::test_loses_the_device: CUDA error" in done.stdout + done.stderr
    assert of(log, "end").keys() == of(log, "begin").keys() == {"test_loses_the_device"}
    assert log[-1] == {"event": "finish", "exit": 1}
    done, log = run(tmp_path, "--gpu-backend", "torch")
    assert done.returncode == 1 and "Timeout" in done.stdout
    assert of(log, "begin").keys() == {"test_hangs"} and not of(log, "end") and log[-1]["event"] == "begin"
    done, log = run(tmp_path, "-k", "interrupted")
    assert "begun and not ended: test_inner.py::test_is_interrupted" in done.stdout
    assert [entry["event"] for entry in log] == ["collected", "begin", "finish"] and log[-1]["exit"] == 2
