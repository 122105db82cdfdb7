"""The driver of `make gpu-train`: parts of the weights, one start for both comparisons, and calls that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")

import gpu_train
import gpu_wheels
from entropy_kernels.trainer import checkpoint
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.tasks import make_task
from trainer_setup import TINY

CONFIGS = sorted((gpu_train.ROOT / "benchmarks" / "smollm2").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_can_work(path: Path) -> None:
    config = TrainerConfig.from_json(path)
    config.validate()
    assert config.model == "smollm2" and config.steps >= 100 and config.save_every > 0
    pytest.importorskip("reasoning_gym")
    task = make_task(config.task, max_new_tokens=config.max_new_tokens)
    (prompt,) = task.prompts(1, seed=0, split="train")
    assert task.verify(prompt, f"<answer>{prompt.data['answer']}</answer>") == 1.0


def wheel(path: Path, name: str = "carried") -> bytes:
    """A package of one module, as a wheel."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "VALUE = 7\n" + "# " + os.urandom(3000).hex())
        meta = f"{name}-1.0.dist-info"
        archive.writestr(f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{meta}/RECORD", "")
    return path.read_bytes()


def test_a_wheel_in_parts_is_installed_when_all_have_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "carried-1.0-py3-none-any.whl"
    data = wheel(whole)
    wheels, site = tmp_path / "wheels", tmp_path / "there" / "site"
    site.parent.mkdir()
    parts = gpu_wheels.split(whole, wheels, size=2000)
    assert len(parts) > 2 and not whole.exists()
    assert b"".join(part.read_bytes() for part in parts) == data
    assert len({part.parent for part in parts}) == len(parts)
    late = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"carried-1.0-py3-none-any.whl: expected {len(parts)} parts"):
        gpu_train.install(wheels, site)
    parts[1].write_bytes(late)
    with pytest.raises(FileNotFoundError, match=r"trainer: expected in .* beside weights-\*, got none"):
        gpu_train.install(wheels, site)
    (wheels / "trainer").mkdir()
    gpu_train.install(wheels, site)
    assert "VALUE = 7" in (site / "carried.py").read_text()
    # what comes later is installed, too, and nothing twice
    wheel(wheels / "trainer" / "late-1.0-py3-none-any.whl", "late")
    gpu_train.install(wheels, site)
    assert (site / "late.py").exists()
    monkeypatch.setattr(gpu_train.subprocess, "run", lambda *_, **__: pytest.fail("installed again"))
    gpu_train.install(wheels, site)


def test_nothing_to_install(tmp_path: Path) -> None:
    gpu_train.install(tmp_path / "none", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_call_whose_time_is_up_and_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**TINY.to_dict(), "warm_steps": 2, "warm_batch": 8, "save_every": 1, "measure_memory": False}
    checkpoint.write_json(tmp_path / "tiny.json", {**values, "lr": 1e-3})
    monkeypatch.setattr(gpu_train, "WHEELS", tmp_path / "none")
    few = ("--methods", "grpo", "--torch-ops", "None")
    monkeypatch.setattr(gpu_train, "COMPARISONS", {"cost": (*few, "--steps", "1"), "curves": few})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, work = tmp_path / "out", tmp_path / "work"
    call = ["--out", str(out), "--work", str(work), "--config", str(tmp_path / "tiny.json")]
    started = time.monotonic()
    assert gpu_train.main([*call, "--seconds", str(gpu_train.GRACE + 4)]) == gpu_train.AGAIN
    assert time.monotonic() - started < gpu_train.GRACE + 4 + 5
    assert gpu_train.main(call) == 0
    for name, steps in (("cost", 1), ("curves", 3)):
        record = json.loads((out / f"smollm2-{name}-summary.json").read_text())
        assert set(record["methods"]) == {"grpo"}
        rows = (work / name / "grpo" / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == steps + 1
    first = [
        json.loads((work / name / "grpo" / "metrics.jsonl").read_text().splitlines()[0]) for name in ("cost", "curves")
    ]
    assert first[0]["entropy"] == first[1]["entropy"]  # one start
    with tarfile.open(out / "smollm2-logs.tar.gz") as archive:
        names = archive.getnames()
    assert "curves/grpo/metrics.jsonl" in names and not any("safetensors" in name for name in names)


def test_a_run_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_json(tmp_path / "bad.json", {"temperature": 0.0})
    monkeypatch.setattr(gpu_train, "WHEELS", tmp_path / "none")
    call = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--config", str(tmp_path / "bad.json")]
    assert gpu_train.main([*call, "--only", "cost"]) == 1


def test_a_signal_stops_the_runs_too(tmp_path: Path) -> None:
    values = {**TINY.to_dict(), "warm_steps": 2000, "warm_batch": 8}
    checkpoint.write_json(tmp_path / "slow.json", values)
    command = [sys.executable, str(gpu_train.ROOT / "tools" / "gpu_train.py"), "--config", str(tmp_path / "slow.json")]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not child.exists():
        process.kill()
        pytest.skip("no /proc here")
    while not (children := child.read_text().split()):
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{number}").exists() for number in children)
