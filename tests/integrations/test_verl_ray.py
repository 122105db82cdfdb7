"""verl's driver and workers over Ray, as one worker and as two: what arrives where, and that both choose alike.

One run (verl_run.py), in a process of its own whose platform is a CPU; the tests look at what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verl.utils.tracking import FileLogger

from entropy_kernels.analysis.logs import read_log
from entropy_kernels.analysis.metric_names import find_entropy, find_performance, held_by
from entropy_kernels.integrations.verl.config import MODES

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(1200)  # it took 3 minutes on two free cores
RANKS = pytest.mark.parametrize("ranks", [1, 2])
PATHS = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": PATHS, "VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_ENGINE_DEVICE": "cuda",
    "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("verl")
    with tempfile.TemporaryDirectory(
        prefix="ek", dir="/tmp", ignore_cleanup_errors=True
    ) as ray:  # sockets want short paths
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(HERE / "verl_run.py"), str(folder)],
            env={**ENVIRONMENT, "RAY_FOLDER": ray}, capture_output=True, text=True, timeout=1100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text())


def dropped(of: dict[str, Any]) -> list[float]:
    """Of all ranks and micro-batches, by the tokens' advantages."""
    return sorted(x for rank in of["ranks"] for call in rank["calls"] for x in call["dropped"])


def gradient(of: dict[str, Any]) -> np.ndarray:
    """FSDP's mean over ranks, which all of them have."""
    first, *others = [np.array(rank["grads"][0]) for rank in of["ranks"]]
    assert all(np.array_equal(first, other) for other in others)
    return first


@RANKS
def test_the_plugin_is_in_every_worker(found: dict[str, Any], ranks: int) -> None:
    """Through the entry point; what is needed was put in place by the config that the worker built."""
    workers = found[f"exact_cov {ranks}"][-1]["workers"]
    assert len(workers) == ranks
    for worker in workers:
        assert worker["modes"] == list(MODES)
        calls = {target.rpartition(":")[2]: calls for target, (active, calls) in worker["patches"].items() if active}
        assert calls["TrainingWorker.infer_batch"] == calls["BaseEngine.train_batch"] == 2
        assert calls["FSDPEngineWithLMHead.prepare_model_outputs"] > 0  # statistics, which the method reads
    untouched = found[f"splits {ranks}"]["workers"][0]["patches"]
    assert not any(active for target, (active, _) in untouched.items() if "prepare_model_outputs" in target)


def test_the_same_tokens_in_every_split_and_on_every_number_of_ranks(found: dict[str, Any]) -> None:
    """Bit for bit; 5 of 56 tokens, in 1, 2 and 4 micro-batches and by length, padded or not; the gradients, too."""
    every = {f"{ranks}: {name}": one for ranks in (1, 2) for name, one in found[f"splits {ranks}"]["splits"].items()}
    assert len(every) == 16
    one = every["1: nested 1"]
    counts = {len(rank["calls"]) for of in every.values() for rank in of["ranks"]}
    assert counts == {1, 2, 3, 4, 8}  # micro-batches
    assert len(dropped(one)) == 5
    for name, of in every.items():
        assert sum(call["tokens"] for rank in of["ranks"] for call in rank["calls"]) == 56, name
        assert dropped(of) == dropped(one), name
        np.testing.assert_allclose(gradient(of), gradient(one), rtol=1e-4, atol=1e-7, err_msg=name)
        assert of["metrics"]["actor/ek_touched"] == 5, name


def test_statistics_travel_from_the_old_log_probs_to_the_update(found: dict[str, Any]) -> None:
    for one, two in zip(found["exact_cov 1"], found["exact_cov 2"], strict=True):
        assert one["fields"] == two["fields"] == ["ek_vocab_covariance", "entropys", "old_log_probs"]
        assert dropped(one) == dropped(two) and len(dropped(one)) == 5
        for metric in ("decrease_share", "predicted_change"):
            mine, theirs = (of["metrics"][f"actor/ek_{metric}"] for of in (one, two))
            assert mine == pytest.approx(theirs, rel=1e-5)
        assert one["metrics"]["actor/ek_decrease_share"] > 0.4  # 9 % of the tokens


def test_trainer_v1_carries_them_by_itself(found: dict[str, Any]) -> None:
    """verl's default, over its TransferQueue: the tokens of v0, whose batches are padded."""
    for v0, v1 in zip(found["exact_cov 2"], found["v1 2"], strict=True):
        assert {"ek_vocab_covariance", "entropy", "old_log_probs"} <= {*v1["fields"]}
        assert dropped(v0) == dropped(v1) and len(dropped(v1)) == 5
        name = "actor/ek_predicted_change"
        assert v0["metrics"][name] == pytest.approx(v1["metrics"][name], rel=1e-5)


@RANKS
def test_a_target_plans_the_rollout_and_observes_it(found: dict[str, Any], ranks: int) -> None:
    steps = [step["metrics"] for step in found[f"target {ranks}"]["steps"]]
    assert [step["actor/ek_target_entropy"] for step in steps] == [4.2] * 3
    assert all(step["actor/ek_wanted_change"] > 0 for step in steps)  # above the entropy: tokens are dropped
    assert all(len(dropped(step)) > 3 for step in found[f"target {ranks}"]["steps"])
    assert np.isnan(steps[0]["actor/ek_measured_change"])
    measured = [step["actor/ek_measured_change"] for step in steps[1:]]
    assert all(0 < abs(x) < 0.1 for x in measured) and steps[1]["actor/ek_gain"] != 1


def test_its_log_is_read_as_fit_reads_it(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's file of what the driver logs: its own names are chosen beside ours, and what held the entropy is told."""
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "run.jsonl"))
    logger = FileLogger("project", "experiment")
    for number, step in enumerate(found["target 2"]["steps"]):
        own = {"actor/entropy": step["metrics"]["actor/ek_entropy"], "critic/score/mean": 0.1 * number}
        logger.log({**step["metrics"], **own}, number)
    logger.finish()
    log = read_log(tmp_path / "run.jsonl")
    assert find_entropy(log.columns).columns == ("actor/entropy",) and len(log) == 3
    assert find_performance(log.columns).columns == ("critic/score/mean",)
    told = held_by(log)
    assert "a target entropy (metric actor/ek_target_entropy)" in told and "actor/ek_touched" in str(told)


def test_a_target_is_the_same_on_every_number_of_ranks(found: dict[str, Any]) -> None:
    for one, two in zip(found["target 1"]["steps"], found["target 2"]["steps"], strict=True):
        assert dropped(one) == dropped(two)
        for metric in ("entropy", "planned_change", "gain"):
            mine, theirs = (of["metrics"][f"actor/ek_{metric}"] for of in (one, two))
            assert mine == pytest.approx(theirs, rel=1e-3), metric


@RANKS
def test_a_checkpoint_has_the_memory(found: dict[str, Any], ranks: int) -> None:
    """The step after it is the same from the checkpoint, also by two workers that begin with it."""
    run = found[f"target {ranks}"]
    assert ("new workers" in run) == (ranks == 2)
    saved, last = run["saved"], run["steps"][2]
    assert saved["loss_mode"] == "ek_ppo" and saved["state"]["calls"] == 2 and saved["state"]["memory"]["squares"] > 0
    assert "entropy_kernels.json" in run["files"] and not any(name.startswith(".") for name in run["files"])
    for again in (run[key] for key in ("again", "new workers") if key in run):
        assert dropped(again) == dropped(last)
        for metric in ("gain", "planned_change", "measured_change", "entropy"):
            name = f"actor/ek_{metric}"
            assert again["metrics"][name] == pytest.approx(last["metrics"][name], rel=1e-6), metric
