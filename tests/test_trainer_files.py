"""What the trainer does to files: its user's, and those of another process. Damaged ones: test_trainer_damage.py."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import trainer_setup
from entropy_kernels.trainer import ppo, sweep
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.files import OwnFiles, locked, scratch_of, write_text
from entropy_kernels.trainer.log import read_rows
from entropy_kernels.trainer.start import build_policy
from trainer_setup import SHORT, TINY, EasyTask, again, config, contents, easy, rows_without_times, without_drawing  # noqa: F401

trained_run, run = trainer_setup.trained_run, trainer_setup.run  # fixtures

# --- the user's files ------------------------------------------------------------------------------------------------


def test_files_beside_a_run_stay(tmp_path: Path) -> None:
    mine = ["thesis.txt", "model.txt", "notes/metrics.jsonl", ".checkpoint.safetensors.tmp", "checkpoint.pt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for overwrite in (False, True):
        ppo.train(config(tmp_path, overwrite=overwrite, **SHORT))
        assert all((tmp_path / name).read_text() == "x" for name in mine)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "checkpoint.safetensors", "config.json", "checkpoint.previous.safetensors", "model/thesis.txt",
     "model",
     "checkpoint.safetensors/thesis.txt", "unscored.jsonl", "samples.jsonl", "nonfinite.safetensors",
     "tensorboard/thesis.txt", "reference.safetensors", "model/adapter/adapter_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_under_the_names_of_a_run_are_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(OSError, match=r"^out: expected "):
        ppo.train(config(tmp_path, overwrite=overwrite, **SHORT))
    assert contents(tmp_path) == {name: b"x"}


def test_a_link_is_not_followed_to_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(FileExistsError, match=r"out: expected no metrics.jsonl in "):
        ppo.train(config(tmp_path / "run", overwrite=True, **SHORT))
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_overwrite_removes_a_run_and_nothing_else(run: Path) -> None:
    for name in ("thesis.txt", "model/thesis.txt"):
        (run / name).write_text("x")
    stale = contents(run)
    ppo.train(config(run, overwrite=True, seed=7, **SHORT))
    assert all((run / name).read_text() == "x" for name in ("thesis.txt", "model/thesis.txt"))
    assert len(read_rows(run / "metrics.jsonl")) == 2
    assert not (run / "checkpoint.previous.safetensors").exists()
    assert contents(run)["model/model.safetensors"] != stale["model/model.safetensors"]


def test_what_cannot_start_removes_nothing(run: Path) -> None:
    before = contents(run)
    for wrong in ({"model": "./nosuch"}, {"warm_start_from": run / "nowhere"}, {"lr": -1.0}):
        with pytest.raises((ValueError, OSError)):
            ppo.train(config(run, overwrite=True, **wrong, **SHORT))
        assert contents(run) == before


def test_a_users_log_and_checkpoint_are_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_text("x")
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint at .*or is of another program"):
        again(tmp_path)
    with pytest.raises(FileExistsError, match=r"expected no checkpoint.safetensors in .* move it away"):
        ppo.train(config(tmp_path, **SHORT))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_copy_of_a_run_goes_on_once_its_record_is_there(run: Path) -> None:
    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    (copy / ".entropy_kernels.json").unlink()  # cp -r run/* leaves it behind
    with pytest.raises(FileExistsError, match=r"copy its \.entropy_kernels\.json, too"):
        again(copy)
    assert contents(copy) == contents(run)
    shutil.copy(run / ".entropy_kernels.json", copy)
    assert read_rows(again(copy) / "metrics.jsonl")[-1]["step"] == 4


@pytest.mark.parametrize("name", [".entropy_kernels.json", ".entropy_kernels.lock"])
@pytest.mark.parametrize("text", ["x", "[]", '{"kind": "run", "files": [], "mine": 1}'])
def test_the_users_files_under_the_names_of_lock_and_record(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match=rf"out: expected no {name} in .* move it away"):
        ppo.train(config(tmp_path, **SHORT))
    assert (tmp_path / name).read_text() == text and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_out_that_no_system_can_have(tmp_path: Path, name: str) -> None:
    for start in (ppo.train, again, compare_in):
        with pytest.raises((OSError, ValueError), match=r"^out: expected a path of this system, got "):
            start(config(tmp_path / name, **SHORT) if start is ppo.train else tmp_path / name)


def test_what_fails_in_loading_leaves_no_folder(run: Path) -> None:
    (run / "model" / "config.json").write_text('{"model_type": "nosuch"}')
    (run.parent / "empty").mkdir()
    for out in (run.parent / "empty", run.parent / "new" / "inner"):
        with pytest.raises(ValueError, match="that transformers can load"):
            ppo.train(config(out, model=str(run / "model"), **SHORT))
    assert not list((run.parent / "empty").iterdir()) and not (run.parent / "new").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "dangling"])
def test_out_that_is_no_folder(tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for command in ([], ["quickstart"], ["reproduce"]):
        assert main([*command, "--out", str(tmp_path / out), "--no-progress", "--warm-steps", "0"]) == 2
        error = capsys.readouterr().err
        assert "trainer: error: --out: expected a folder" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "x"


def test_out_with_a_tilde_is_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").write_text("x")
    assert main(["--out=~/run"]) == 2
    assert not (tmp_path / "~").exists()


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep in this process; no picture is drawn."""
    without_drawing(monkeypatch)
    trainer_setup.runs_here(monkeypatch)


def compare_in(out: Path, kind: str = "compare", reuse: bool = False, **changes: Any) -> Path:
    flags = sweep.Flags(out, methods=("grpo",), reuse=reuse, progress=False)
    sweep.run_sweep(sweep.planned(kind, flags, dataclasses.replace(TINY, **{**SHORT, **changes})))
    return out / "report.html"


def test_sweeps_replace_what_they_wrote_and_nothing_else(tmp_path: Path, instant: None) -> None:
    mine = ["thesis.txt", "grpo/thesis.txt", "csv/thesis.csv", "grpo/tensorboard.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    compare_in(tmp_path)
    (tmp_path / "grpo" / "model" / "thesis.txt").write_text("x")
    (tmp_path / "warm_start" / "thesis.txt").write_text("x")
    compare_in(tmp_path, seed=1)
    for name in [*mine, "grpo/model/thesis.txt", "warm_start/thesis.txt"]:
        assert (tmp_path / name).read_text() == "x"
    assert json.loads((tmp_path / "grpo" / "config.json").read_text())["seed"] == 1
    with pytest.raises(
        FileExistsError, match=r"out: expected a folder for a quickstart, got .*, which is for a compare"
    ):
        compare_in(tmp_path, kind="quickstart")


@pytest.mark.parametrize(
    "name", ["report.html", "summary.json", "csv/grpo.csv", "csv", "grpo/run.log", "grpo/request.json", "grpo",
             "grpo/metrics.jsonl", "grpo/model/thesis.txt", "warm_start/thesis.txt", "warm_start"],
)  # fmt: skip
def test_sweeps_refuse_files_in_their_way_before_they_begin(tmp_path: Path, name: str, instant: None) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(OSError, match=r"^out: expected "):
        compare_in(tmp_path)
    assert contents(tmp_path) == {name: b"x"}


def test_a_sweep_does_not_replace_a_run_of_the_users(run: Path, instant: None) -> None:
    out = run.parent / "out"
    out.mkdir()
    run.rename(out / "grpo")
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"got one that was started by itself"):
        compare_in(out)
    assert contents(out) == before


def test_saving_a_policy_keeps_the_users_files(tmp_path: Path) -> None:
    policy = build_policy(TINY, EasyTask())
    policy.save(tmp_path / "model")
    (tmp_path / "model" / "thesis.txt").write_text("x")
    policy.save(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.txt").read_text() == "x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("x")
    with pytest.raises(FileExistsError, match=r"directory: expected .* to be new or one of ours"):
        policy.save(tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_text() == "x"


# --- two processes, and killed ones ----------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def hold() -> Iterator[Any]:
    """A process that has a folder, and is in the midst of writing the files named."""
    held = []

    def in_process(folder: Path, names: tuple[str, ...], told: Any) -> None:
        with locked(folder):
            for name in names:
                scratch_of(folder / name).write_text("half")
            told.set()
            signal.pause()

    def start(folder: Path, *names: str) -> Any:
        told = FORK.Event()
        held.append(FORK.Process(target=in_process, args=(folder, names, told)))
        held[-1].start()
        assert told.wait(60)
        return held[-1]

    yield start
    for process in held:
        process.kill()
        process.join()


def test_a_second_process_is_refused_until_the_first_is_gone(run: Path, hold: Any) -> None:
    process = hold(run, "checkpoint.safetensors", "thesis.txt", "config.json")
    before = contents(run)
    message = rf"out: expected a folder that no other process writes into, got {run}, which process {process.pid} on "
    for changes in ({}, {"resume": False, "overwrite": True}):
        with pytest.raises(BlockingIOError, match=message):
            again(run, **changes)
    with pytest.raises(BlockingIOError, match=message):
        sweep._start(config(run))
    with (
        pytest.raises(BlockingIOError, match=message),
        sweep.experiment(run.parent / "out", "compare", {"grpo": config(run)}),
    ):
        pass
    assert contents(run) == before
    process.kill()
    process.join()
    again(run)
    assert sorted(path.name for path in run.glob(".*.tmp")) == [f".thesis.txt.{process.pid}.tmp"]


def test_the_lock_is_one_between_threads_and_ends_with_its_block(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def second() -> None:
        try:
            with locked(tmp_path):
                pass
        except BaseException as error:
            caught.append(error)

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            signal.pause()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert isinstance(caught[0], BlockingIOError)
    second()
    assert len(caught) == 1


def test_leftovers_of_the_living_and_of_others_stay(tmp_path: Path) -> None:
    files = OwnFiles(tmp_path, "run")
    files.claim("checkpoint.safetensors", "csv/a.csv")
    dead = 2**22 + 1  # above any process number
    (tmp_path / "csv").mkdir()
    gone = [
        f".checkpoint.safetensors.{dead}.tmp",
        f".checkpoint.safetensors.{os.getpid()}.tmp",
        f"csv/.a.csv.{dead}.tmp",
    ]
    stay = [
        f".checkpoint.safetensors.{os.getppid()}.tmp",
        f".thesis.{dead}.tmp",
        ".checkpoint.safetensors.x.tmp",
        f"csv/.b.csv.{dead}.tmp",
    ]
    for name in gone + stay:
        (tmp_path / name).write_text("half")
    (tmp_path / f".checkpoint.safetensors.{dead + 1}.tmp").mkdir()  # with what a library writes on its way
    (tmp_path / f".checkpoint.safetensors.{dead + 1}.tmp" / ".tmpAbCdEf").write_text("half")
    files.tidy()
    assert set(contents(tmp_path)) == set(stay)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "csv"]


@pytest.mark.parametrize("name", ["unscored.jsonl", "nonfinite.safetensors", "reference.safetensors", "metrics.broken"])
def test_a_run_owns_no_file_that_it_did_not_write(run: Path, name: str) -> None:
    """Of a name that it might have written, but had no reason to."""
    (run / name).write_text("the user's")
    before = contents(run)
    for changes in ({"resume": True, "steps": 4}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=rf"expected no {name} in"):
            ppo.train(config(run, **{**SHORT, **changes}))
        assert contents(run) == before


def test_a_name_that_was_claimed_and_not_used_is_the_users_again(tmp_path: Path) -> None:
    OwnFiles(tmp_path, "run").claim("config.json", "metrics.jsonl")
    write_text(tmp_path / "config.json", "ours")
    OwnFiles(tmp_path, "run").tidy()
    (tmp_path / "metrics.jsonl").write_text("the user's")
    with pytest.raises(FileExistsError, match=r"expected no metrics.jsonl in"):
        OwnFiles(tmp_path, "run").claim("config.json", "metrics.jsonl")
