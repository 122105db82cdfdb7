"""kill -9, SIGTERM and a full disk: what is kept, and that a run that goes on is one that was never stopped."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tyro")

import kill_runs
import trainer_setup
from entropy_kernels.trainer import checkpoint, ppo, signals, sweep
from entropy_kernels.trainer import run as run_module
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.files import Unwritable, write_json, writing
from entropy_kernels.trainer.log import MetricsLog
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.probes import Probe, Step
from entropy_kernels.trainer.samples import SAMPLES, Samples
from entropy_kernels.trainer.signals import Terminated
from trainer_setup import SHORT, again, config, contents, easy, rows_without_times  # noqa: F401

trained_run, run = trainer_setup.trained_run, trainer_setup.run  # fixtures


class At(Probe):
    """Does something once, at a moment of a step."""

    def __init__(self, number: int, moment: str, do: Callable[[], object]) -> None:
        self.number, self.do = number, do
        setattr(self, moment, self._once)

    def _once(self, step: Step) -> None:
        if step.number == self.number:
            self.number = -1
            self.do()


def sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """Each run goes on from what the one before left: the rows, weights and files of one that was never killed."""
    path = tmp_path / "told"
    assert kill_runs.forked(lambda: path.write_text(json.dumps(kill_runs.main(tmp_path, 0, 20)))) == 0
    told = json.loads(path.read_text())
    assert told["whole"] == 0 and set(told["codes"]) == {0, -signal.SIGKILL}
    assert told["codes"].count(-signal.SIGKILL) == 20
    for out in map(Path, told["runs"]):
        assert_as_whole(out, tmp_path / "whole")


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    return trainer_setup.trained(tmp_path_factory, steps=3)


def assert_as_whole(out: Path, whole: Path) -> None:
    """The same rows, samples, weights and checkpoints."""
    trainer_setup.assert_same_run(out, whole)
    assert (out / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()
    one, other = (path / "model" / "model.safetensors" for path in (out, whole))
    assert one.read_bytes() == other.read_bytes()
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, whole)]
    assert names[0] - {"checkpoint.previous.safetensors"} == names[1] - {"checkpoint.previous.safetensors"}


@pytest.mark.parametrize("moment", ["before_step", "after_rollout", "after_update", "after_step"])
def test_sigterm_ends_a_run_after_its_step_with_a_checkpoint(tmp_path: Path, moment: str, whole: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    settings = {**SHORT, "steps": 3}
    probes = [At(1, moment, sigterm), *ppo.default_probes(config(tmp_path, **settings), ppo.backward)]
    with pytest.raises(Terminated) as stop:
        ppo.train(config(tmp_path, **settings), probes=probes)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert [row["step"] for row in rows_without_times(tmp_path)] == [0, 1]
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 2  # though save_every is 0
    ppo.train(config(tmp_path, **settings, resume=True))
    assert_as_whole(tmp_path, whole)


def test_a_second_sigterm_ends_it_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "TOGETHER", 0.0)
    before = contents(run)["checkpoint.safetensors"]
    with pytest.raises(Terminated):
        ppo.train(
            config(run, **SHORT | {"steps": 5, "resume": True}),
            probes=[At(4, "after_update", lambda: (sigterm(), sigterm()))],
        )
    assert contents(run)["checkpoint.safetensors"] == before
    again(run)


def test_sigterms_that_come_together_are_one(tmp_path: Path, whole: Path) -> None:
    """A scheduler's to all processes of a job, and that of the sweep that has got it, too."""
    settings = {**SHORT, "steps": 3}
    probes = [
        At(1, "after_update", lambda: (sigterm(), sigterm())),
        *ppo.default_probes(config(tmp_path, **settings), ppo.backward),
    ]
    with pytest.raises(Terminated):
        ppo.train(config(tmp_path, **settings), probes=probes)
    ppo.train(config(tmp_path, **settings, resume=True))
    assert_as_whole(tmp_path, whole)


def test_the_log_is_on_disk_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut between the two leaves no checkpoint whose rows are lost."""
    flushed: list[str] = []
    fsync = os.fsync

    def noted(number: int) -> None:
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    ppo.train(config(tmp_path, **{**SHORT, "steps": 2, "save_every": 1, "eval_every": 1}))
    checkpoints = [i for i, name in enumerate(flushed) if name == "checkpoint.safetensors"]
    assert len(checkpoints) == 2 and all(flushed[i - 1] == "metrics.jsonl" for i in checkpoints)
    assert "samples.jsonl" in flushed[: checkpoints[0]]


def test_sigterm_in_the_last_round(tmp_path: Path, whole: Path) -> None:
    """Before it the checkpoint is written and that is all; within it the run ends by itself."""
    settings = {**SHORT, "steps": 3}
    with pytest.raises(Terminated):
        ppo.train(config(tmp_path, **settings), probes=[At(2, "after_step", sigterm)])
    assert not (tmp_path / "model").exists()
    ppo.train(config(tmp_path, **settings, resume=True), probes=[At(3, "after_rollout", sigterm)])
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


def test_sigterm_before_the_first_step_ends_a_command_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = run_module.first_policy
    monkeypatch.setattr(run_module, "first_policy", lambda *args: (sigterm(), build(*args))[1])
    write_json(tmp_path / "c.json", {**config(tmp_path / "run").to_dict(), **SHORT})
    assert main(["from-config", str(tmp_path / "c.json")]) == 143
    assert capfd.readouterr().err.startswith("stopped before the first step, and nothing is kept. To begin again:")


def test_a_command_that_got_sigterm_says_how_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "c.json", {**config(tmp_path / "run").to_dict(), **SHORT, "steps": 3})
    monkeypatch.setattr(ppo, "default_probes", lambda *_: [At(1, "after_rollout", sigterm)])
    assert main(["from-config", str(tmp_path / "c.json")]) == 143
    said = capfd.readouterr().err
    assert said.startswith("\nSIGTERM: stops after this step, with a checkpoint; another one stops at once\n")
    assert (
        "the log and the last checkpoint. To go on from there:\n  python -m entropy_kernels.trainer from-config" in said
    )
    assert main(["from-config", str(tmp_path / "c.json"), "--resume"]) == 0


def test_in_another_thread_signals_are_left_alone(tmp_path: Path) -> None:
    handlers = []
    probe = At(0, "after_rollout", lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=lambda: ppo.train(config(tmp_path, **SHORT), probes=[probe]))
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)] and (tmp_path / "model").exists()


@pytest.mark.parametrize("ending", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_a_sweep_waits_for_its_runs_and_not_for_ever(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(sweep, "_GRACE", 0.5)
    code = f"import signal, time; {ending}print('on', flush=True); time.sleep(600)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
    started = time.monotonic()
    sweep._stop(processes)
    assert {process.returncode for process in processes} == {-signal.SIGKILL if ending else -signal.SIGTERM}
    assert time.monotonic() - started < 10
    for process in processes:
        process.stdout.close()  # type: ignore[union-attr]


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger(size: int) -> Iterator[None]:
    """Within: as if the disk were full, of what is written beyond so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "owner", "method", "room"),
    [
        ("checkpoint.safetensors", ppo.checkpoint, "save_checkpoint", 5000),
        ("metrics.jsonl", MetricsLog, "write", 5),
        ("model", Policy, "save", 5000),
        ("samples.jsonl", Samples, "append_to", 5),
    ],
)
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, method: str, room: int
) -> None:
    path, write = run / "checkpoint.safetensors", getattr(owner, method)
    before = path.read_bytes()

    def full(*args: Any, **options: Any) -> Any:
        appended = (run / name).stat().st_size if name.endswith(".jsonl") else 0
        with no_file_larger(appended + room):
            return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, full)
        with pytest.raises(
            Unwritable, match=rf"{name}: cannot be written \(File too large\); .*; --resume goes on from the last"
        ) as told:
            again(run)
    assert "\n" not in str(told.value)
    if name in ("model", "samples.jsonl"):  # which are written after the last one
        assert checkpoint.load_checkpoint(path)["step"] == 4
    else:
        assert path.read_bytes() == before
    assert not [path for path in run.rglob("*") if "tmp" in path.name]
    again(run)
    rows = [row["step"] for row in rows_without_times(run)]
    assert rows == [0, 1, 2, 3, 4]


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    with no_file_larger(0), pytest.raises(
        Unwritable, match=r"run/\.entropy_kernels\.lock: cannot be written \(File too large\); nothing was begun$"
    ):  # fmt: skip
        ppo.train(config(tmp_path / "run", **SHORT))
    assert not (tmp_path / "run").exists()


def test_what_libraries_say_of_a_full_disk_is_told_in_our_words(tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")):
        with pytest.raises(Unwritable) as told, writing(tmp_path / "x"):
            raise error
        assert (
            str(told.value) == f"{tmp_path / 'x'}: cannot be written (No space left on device); what was there is kept"
        )
    with pytest.raises(Unwritable) as told, writing(tmp_path / "y"), writing(tmp_path / "x"):
        raise error
    assert str(told.value).count("cannot be written") == 1
    with pytest.raises(KeyError), writing(tmp_path / "x"):
        raise KeyError


def test_a_checkpoint_has_the_rights_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    checkpoint.save_tree(tmp_path / "x.safetensors", {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
