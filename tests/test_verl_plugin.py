"""What verl loads while it is imported: an unknown version is told, and breaks nothing. verl is a stub here."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import entropy_kernels as ek
from entropy_kernels.integrations import _patch
from entropy_kernels.integrations._patch import PatchRefused
from entropy_kernels.integrations.verl import PATCHES, losses, statistics, versions, worker
from entropy_kernels.integrations.verl.config import MODES, Settings

PLUGIN = "entropy_kernels.integrations.verl.plugin"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """verl's, in a module of its name."""
    losses: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Callable[[Any], Any]:
        return lambda function: losses.setdefault(name, function)

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["verl.trainer.ppo.core_algos"].register_policy_loss = register_policy_loss  # type: ignore[attr-defined]
    sys.modules.pop(PLUGIN, None)
    yield losses
    sys.modules.pop(PLUGIN, None)


def test_an_unknown_version_is_told_and_its_modes_raise_the_reason(
    registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, message, *args: told.append(message % args))
    version = importlib.metadata.version
    monkeypatch.setattr(_patch.importlib.metadata, "version", lambda name: "9.0" if name == "verl" else version(name))
    importlib.import_module(PLUGIN)  # raises nothing
    assert len(told) == 1 and "expected verl 0.9.1, which this was tested with, got 9.0" in told[0]
    assert list(registry) == list(MODES) and not any(patch.active for patch in PATCHES)
    for mode in MODES:
        with pytest.raises(PatchRefused, match=r"no loss_mode ek_\* works: .* got 9.0"):
            registry[mode](log_prob=None)


def test_whatever_goes_wrong_breaks_nothing(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch that is refused after others are in place, and an error of verl's own modules: all is undone."""
    told: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, message, *args: told.append(message % args))
    active: list[Any] = []
    monkeypatch.setattr(_patch.Patch, "active", property(lambda self: self in active))
    monkeypatch.setattr(_patch.Patch, "undo", lambda self: active.remove(self))

    def apply(self: Any) -> None:
        if self is statistics.FUNCTIONS[-1]:
            raise OSError("a library is missing")
        active.append(self)

    monkeypatch.setattr(_patch.Patch, "apply", apply)
    importlib.import_module(PLUGIN)
    assert not active and len(told) == 1 and "OSError: a library is missing" in told[0]
    with pytest.raises(PatchRefused, match=r"no loss_mode ek_\* works: OSError: a library is missing"):
        registry["ek_clip_cov"](log_prob=None)
    monkeypatch.delitem(sys.modules, "verl.trainer.ppo.core_algos")
    sys.modules.pop(PLUGIN)
    importlib.import_module(PLUGIN)
    assert len(told) == 2 and "No module named 'verl.trainer.ppo.core_algos'" in told[1]


def test_patches_name_what_they_are_for() -> None:
    names = [patch.target.rpartition(".")[2] for patch in worker.PATCHES]
    assert len(set(names)) == len(names) and all(patch.versions is versions.VERSIONS for patch in PATCHES)
    assert worker.PATCHES[:2] == worker.AT_IMPORT  # all that is in place before a mode of ours is configured


# ---- the memory of a method, beside verl's shards --------------------------------------------------------------------


class Frozen:
    """verl's configs: an attribute is set once."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise AttributeError(f"Field '{name}' is frozen and cannot be modified")
        object.__setattr__(self, name, value)


class Worker:
    """What a checkpoint reads of verl's TrainingWorker."""

    def __init__(self, settings: Settings | None) -> None:
        config: Any = Frozen()
        if settings is not None:
            config.ek_settings = settings
        self.loss_fn = SimpleNamespace(keywords={"config": config})
        self.config = config


ADAPTIVE = Settings("ek_adaptive_entropy", "ppo", {}, "adaptive_entropy", options={"coef": 0.5})


def original(self: Any, local_path: str, *args: Any, **kwargs: Any) -> str:
    return f"theirs {local_path}"


save, load = worker._saves_memory(original), worker._loads_memory(original)


def test_memory_is_saved_and_restored(tmp_path: Any) -> None:
    one, two = Worker(ADAPTIVE), Worker(ADAPTIVE)
    controller = losses.controller_of(ADAPTIVE, one.config)
    controller.load_state_dict({"calls": 5, "memory": {"coef": 0.125}})
    assert save(one, str(tmp_path), global_step=3) == f"theirs {tmp_path}"
    assert [path.name for path in tmp_path.iterdir()] == ["entropy_kernels.json"]
    assert json.loads((tmp_path / "entropy_kernels.json").read_text())["loss_mode"] == "ek_adaptive_entropy"
    assert load(two, str(tmp_path)) == f"theirs {tmp_path}"
    assert losses.controller_of(ADAPTIVE, two.config).state_dict() == {"calls": 5, "memory": {"coef": 0.125}}


STATE = {"calls": 5, "memory": {"coef": 0.125}}
OF = {"loss_mode": "ek_adaptive_entropy", "method": "adaptive_entropy", "target_method": None}
WHOLE = json.dumps({**OF, "state": STATE})


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (None, "got none"),
        (WHOLE[:40], r"got one that cannot be read \(JSONDecodeError"),
        ("[]", r"got one that cannot be read \(TypeError"),
        (json.dumps({"state": STATE}), r"got one that cannot be read \(KeyError: 'loss_mode'"),
        (json.dumps(OF), r"got one that cannot be read \(KeyError: 'state'"),
        (json.dumps({**OF, "state": {"calls": "5", "memory": {}}}), r"got one that cannot be read .*calls"),
        (json.dumps({**OF, "state": {"calls": 5, "memory": {"coeff": 1}}}), r"got one that cannot .*coeff"),
        (json.dumps({**OF, "method": "repo", "state": STATE}), r"got loss_mode=ek_adaptive_entropy, method=repo"),
        (json.dumps({"loss_mode": "ek_ppo", "method": None, "target_method": "bonus", "state": STATE}),
         "got loss_mode=ek_ppo, target_method=bonus"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_its_own_is_told_and_it_begins_anew(
    text: str | None, got: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(worker._log, "warning", lambda message, *args: told.append(message % args))
    if text is not None:
        (tmp_path / "entropy_kernels.json").write_text(text)
    one = Worker(ADAPTIVE)
    losses.controller_of(ADAPTIVE, one.config).load_state_dict(STATE)  # what the process did before
    assert load(one, str(tmp_path)) == f"theirs {tmp_path}"
    expected = "expected beside the checkpoint, of loss_mode=ek_adaptive_entropy, method=adaptive_entropy, "
    assert len(told) == 1 and f"{tmp_path / 'entropy_kernels.json'}: {expected}" in told[0]
    assert re.search(got + ".*: seeds and memory of the method begin anew$", told[0])
    assert losses.controller_of(ADAPTIVE, one.config).state_dict() == ADAPTIVE.controller().state_dict()


def test_a_whole_state_is_its_own(tmp_path: Any) -> None:
    (tmp_path / "entropy_kernels.json").write_text(WHOLE)
    one = Worker(ADAPTIVE)
    load(one, str(tmp_path))
    assert losses.controller_of(ADAPTIVE, one.config).state_dict() == STATE


def test_checkpoints_of_others_are_left_alone(tmp_path: Any) -> None:
    for other in (Worker(None), Worker(Settings("ek_ppo", "ppo", {}))):
        assert save(other, str(tmp_path)) == load(other, str(tmp_path)) == f"theirs {tmp_path}"
    assert not list(tmp_path.iterdir()) and isinstance(losses.controller_of(ADAPTIVE, SimpleNamespace()), ek.Controller)
