"""A test that hangs or loses the device is named, in the log and in the output, and the other tests go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# In the place of torch, which takes seconds to import: all that gpu_guard.py asks of it.
TORCH = """
class cuda:
    lost = False

    def is_available():
        return True

    def synchronize():
        if cuda.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
TESTS = """
import ctypes
import pytest
import torch

@pytest.mark.parametrize("number", range(4))
@pytest.mark.gpu(backend="cuda", ops=("token_stats", "kl_cov_mask"))
def test_good(number):
    torch.cuda.synchronize()

@pytest.mark.timeout(1)  # alone, so that no other test's end depends on how busy the machine is
@pytest.mark.gpu(backend="torch")
def test_hangs():
    ctypes.CDLL(None).sleep(100)

@pytest.mark.timeout(1)
@pytest.mark.gpu(backend="triton", ops=("token_stats",))
def test_hangs_and_keeps_the_gil():
    while True:
        ctypes.PyDLL(None).sleep(100)

@pytest.mark.gpu
def test_loses_the_device():
    torch.cuda.lost = True  # and every later test of this process with it
    torch.cuda.synchronize()

@pytest.mark.gpu
def test_fails():
    assert 1 == 2

@pytest.mark.gpu
def test_is_skipped():
    pytest.skip("for a reason")

def test_without_a_gpu(): ...

def test_is_interrupted():
    raise KeyboardInterrupt
"""


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """pytest in another process, and its log."""
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_inner.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = (sys.executable, "-m", "pytest", "-p", "gpu_guard", "-p", "no:cacheprovider", "--gpu-log", "log")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, env=environment)
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
