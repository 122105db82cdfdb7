"""What a run of TRL leaves behind: checkpoints that go on as if nothing had happened, logs for ``fit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl_runs import differences, run

from entropy_kernels.analysis.logs import read_log
from entropy_kernels.analysis.metric_names import find_entropy, find_performance, held_by

TARGET: dict[str, Any] = {"target_entropy": 4.2, "method_options": {"max_change": 0.2}, "learning_rate": 1e-2}
DRAWN: dict[str, Any] = {"method": "clip_cov", "method_options": {"ratio": 0.1, "low": 0.01, "high": 50.0}}
REMEMBERED: dict[str, Any] = {"method": "adaptive_entropy", "method_options": {"target": 10.0}}


@pytest.mark.parametrize("given", [TARGET, DRAWN, REMEMBERED], ids=["target", "clip_cov", "adaptive_entropy"])
def test_a_run_goes_on_where_it_was_saved(given: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit: what the loop has learned, which seed is next, the coefficient."""
    whole = run(**given, max_steps=8, save_strategy="steps", save_steps=4, output_dir=tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    state = json.loads((checkpoint / "entropy_kernels.json").read_text())["state"]
    assert state["calls"] == (0 if given is REMEMBERED else 4) and not list(checkpoint.glob("*.partial"))
    resumed = run(**given, max_steps=8, resume=str(checkpoint), output_dir=tmp_path / "resumed")
    assert resumed.trainer._planner.controller.state_dict() == whole.trainer._planner.controller.state_dict()
    assert len(resumed.log) == 8 and not differences(resumed, whole)


def test_another_state_is_refused_and_none_is_told(tmp_path: Path) -> None:
    run(**DRAWN, max_steps=2, save_strategy="steps", save_steps=1, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"entropy_kernels.json: expected the state of \{'method': 'random'"):
        run(method="random", max_steps=2, resume=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / "entropy_kernels.json").unlink()
    resumed = run(**DRAWN, max_steps=2, resume=str(tmp_path / "checkpoint-1"))
    assert resumed.trainer._planner.controller.state_dict()["calls"] == 1


@pytest.mark.parametrize(
    ("given", "held"),
    [({}, []), (DRAWN, ["ek/touched"]), (TARGET, ["ek/touched", "ek/target_entropy"]), (REMEMBERED, ["entropy_coef"])],
    ids=["stock", "clip_cov", "target", "adaptive_entropy"],
)
def test_logs_are_read_as_fit_reads_them(given: dict[str, Any], held: list[str], tmp_path: Path) -> None:
    """TRL's entropy and reward are chosen beside our metrics, and what held the entropy is told."""
    run(**given, max_steps=6, output_dir=tmp_path).trainer.save_state()
    log = read_log(tmp_path / "trainer_state.json")
    assert find_entropy(log.columns).columns == ("entropy",) and len(log) == 6
    assert find_performance(log.columns).columns == ("reward",)
    told = held_by(log)
    assert len(told) == len(held) and all(f"(metric {name})" in text for name, text in zip(held, told, strict=True))
