"""TensorBoard, wandb and trackio beside metrics.jsonl: what they are handed, and that no run depends on them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entropy_kernels.trainer import ppo, run
from entropy_kernels.trainer.__main__ import main
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.log import read_rows
from entropy_kernels.trainer.trackers import SERVICES, Tracker, scalars
from trainer_setup import SHORT, config, easy  # noqa: F401  (a fixture)

ONE = {**SHORT, "eval_every": 0, "trackers": SERVICES}


class Stub:
    """A service, and its only run: what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.begun, self.rows, self.finished = name, [], [], []  # type: ignore[var-annotated]
        self.fails: BaseException | None = None

    def init(self, **given: Any) -> Stub:
        known = {"project", "name", "config", "resume"} | ({"id", "dir", "settings"} if self.name == "wandb" else set())
        assert given.keys() == known
        if isinstance(self.fails, PermissionError):
            raise self.fails
        self.begun.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails is not None:
            raise self.fails
        self.rows.append((step, values))

    def finish(self, **given: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.finished.append(given)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Stub]]:
    made = {name: Stub(name) for name in SERVICES}
    for name, stub in made.items():
        module = types.ModuleType(name)
        module.init, module.finish = stub.init, stub.finish  # type: ignore[attr-defined]
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return made  # type: ignore[return-value]


def test_services_get_every_row_and_a_resumed_run_goes_on(
    tmp_path: Path, services: dict[str, Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    out = ppo.train(config(tmp_path / "run", **{**ONE, "save_every": 1}))
    rows = read_rows(out / "metrics.jsonl")
    written = json.loads((out / "config.json").read_text())
    for name, stub in services.items():
        (begun,) = stub.begun
        assert begun["name"] == "run" and begun["project"] == ("mine" if name == "trackio" else "entropy_kernels")
        assert begun["config"]["trackers"] == [*SERVICES] and json.dumps(begun["config"])
        assert [step for step, _ in stub.rows] == [0, 1]
        for row, (_, values) in zip(rows, stub.rows, strict=True):
            assert values == scalars(row) and values["train/entropy"] == row["entropy"] and "step" not in values
        assert stub.finished == [{"exit_code": 0} if name == "wandb" else {}]
    wandb, trackio = services["wandb"], services["trackio"]
    assert wandb.begun[0]["id"] == written["run_id"] and wandb.begun[0]["dir"] == str(out)
    assert trackio.begun[0]["resume"] == "never"

    longer = {**ONE, "steps": 2, "resume": True}
    ppo.train(config(out, **longer))
    assert wandb.begun[1]["id"] == wandb.begun[0]["id"] and wandb.begun[1]["resume"] == "allow"
    assert trackio.begun[1]["resume"] == "allow"
    row = read_rows(out / "metrics.jsonl")[1]
    for stub in (wandb, trackio):  # of step 1 what its updates added, and of what is done again nothing
        assert [step for step, _ in stub.rows] == [0, 1, 1, 2]
        (_, first), (_, second) = stub.rows[1:3]
        assert not first.keys() & second.keys() and first.keys() | second.keys() >= scalars(row).keys()
        assert second["train/loss"] == row["loss"]
    os.replace(out / "checkpoint.previous.safetensors", out / "checkpoint.safetensors")
    ppo.train(config(out, **longer))
    assert len(wandb.rows) == len(trackio.rows) == 4
    os.replace(out / "checkpoint.previous.safetensors", out / "checkpoint.safetensors")
    ppo.train(config(out, **{**longer, "trackers": ("trackio",)}))
    ppo.train(config(out, **{**longer, "steps": 3}))  # one that had been left out gets rows whole
    assert [step for step, _ in wandb.rows[4:]] == [2, 3] and wandb.rows[4][1]["train/entropy"]
    assert [step for step, _ in trackio.rows[4:]] == [2, 3] and "train/entropy" not in trackio.rows[4][1]
    del wandb.begun[1:-1], trackio.begun[1:-1]
    ppo.train(config(out, **{**longer, "steps": 4}, lr=1e-4, resume_changes=("lr",)))
    assert wandb.begun[2]["id"] != wandb.begun[0]["id"]  # another experiment
    assert trackio.begun[2]["resume"] == "never"
    assert json.loads((out / "config.json").read_text())["run_id"] == wandb.begun[2]["id"]
    assert TrainerConfig.from_json(out).trackers == SERVICES


def test_a_service_that_fails_on_the_way_is_told_of_once(tmp_path: Path, services: dict[str, Stub]) -> None:
    services["wandb"].fails = ConnectionError("no route\nto host")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = ppo.train(config(tmp_path / "run", **{**ONE, "tensorboard": True}))
    (told_once,) = [str(w.message) for w in told if "wandb" in str(w.message)]
    assert told_once == (
        "wandb did not take the row of step 0 (no route to host); the run goes on, and metrics.jsonl has everything"
    )
    assert len(read_rows(out / "metrics.jsonl")) == 2 == len(services["trackio"].rows)
    assert any((out / "tensorboard").glob("events*"))


def test_a_run_that_fails_is_a_failed_one_there_too(tmp_path: Path, services: dict[str, Stub]) -> None:
    class Broken(ppo.Probe):
        def after_rollout(self, step: ppo.Step) -> None:
            raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError):
        ppo.train(config(tmp_path / "run", **ONE), probes=[Broken()])
    assert services["wandb"].finished == [{"exit_code": 1}] and services["trackio"].finished == [{}]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_cannot_begin_is_one_line_before_any_training(
    tmp_path: Path, services: dict[str, Stub], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "warm_start", lambda *args, **named: pytest.fail("training has begun"))
    services[name].fails = PermissionError("no API key\nwas given")
    settings = config(tmp_path / "run", **{**ONE, "warm_steps": 1})
    way_out = "set WANDB_MODE=offline to log without its server, or leave it out" if name == "wandb" else "leave it out"
    words = rf"^trackers: expected {name} to begin a run, got an error \(no API key was given\); {way_out}$"
    with pytest.raises(ValueError, match=words):
        ppo.train(settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    other = next(stub for stub in services.values() if stub.name != name)
    assert len(other.begun) == len(other.finished)  # what has begun ends
    # a directory that is refused begins nothing
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError):
        ppo.train(config(tmp_path / "taken", **ONE))
    assert len(other.begun) == len(other.finished)


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_told_before_anything_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module))
    assert main(["--out", str(tmp_path / "run"), "--trackers", name, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert f"trackers = {name} needs {name}, which is not installed: pip install" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_names_that_are_none_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "run"), "--trackers", "wandbb"])
    assert "wandb" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^config: trackers: expected a list of words, got 'wandb'"):
        TrainerConfig.from_dict({"trackers": "wandb"})


def test_numbers_that_are_none_are_left_out() -> None:
    row = {"step": 3, "entropy": math.nan, "reward": None, "memory/torch": math.inf, "tokens": 7, "loss": -0.5}
    assert scalars(row) == {"train/tokens": 7, "train/loss": -0.5}
    seen: list[Any] = []
    Tracker("x", lambda values, step: seen.append((step, values)), seen.append).write({"step": 3, "reward": None})
    assert seen == [(3, {})]
