"""Two processes of `accelerate launch` (gloo) make the steps of one: same tokens, same trajectory.

Completions are fixed, so that both train on the same. Gradients are averaged in another order, so weights differ by
rounding; with SGD that does not grow. The tokens that are dropped are the same ones exactly.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_ranks

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "stock": {},
    "clip_cov": {"method": "clip_cov", "method_options": {"ratio": 0.1, "low": 0.01, "high": 50.0}},
    "exact_cov": {"method": "exact_cov", "method_options": {"share": 0.5}},
    "exact_cov, grpo, two parts": {
        "method": "exact_cov", "method_options": {"ratio": 0.1}, "loss_type": "grpo", "gradient_accumulation_steps": 2,
    },
    "kl_cov": {"method": "kl_cov", "method_options": {"ratio": 0.1, "kl_coef": 5.0}, "num_iterations": 2},
    "target": {"target_entropy": 4.4, "method_options": {"max_change": 0.2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ended with, by case."""
    # --multi_gpu: one process per device, of whatever kind; for "CPUs" accelerate would ask for MPI
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--dynamo_backend", "no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    folder = tmp_path_factory.mktemp("two")
    result = subprocess.run(
        [*command, str(HERE / "trl_ranks.py"), str(folder), json.dumps(CASES)],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_steps_of_one(case: str, of_two: list[dict[str, Any]], tmp_path: Path) -> None:
    given = CASES[case]
    one, (first, second) = trl_ranks.trained(str(tmp_path), **given), (ranks[case] for ranks in of_two)
    largest = max(float(x.abs().max()) for x in one["weights"].values())
    for name, x in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert torch.allclose(first["weights"][name], x, atol=2e-6 * largest), name
    assert len(one["log"]) == len(first["log"]) == 6
    parts = given.get("gradient_accumulation_steps", 1)
    for x, y in zip(one["log"], first["log"], strict=True):
        # of TRL's entropy the mean over micro-batches, which are others on two processes
        # and of the reward nothing, where a rollout is used again
        for name in (k for k in x if k == "reward" or k.startswith("ek/") or (k == "entropy" and parts == 1)):
            assert y[name] == (None if x[name] is None else pytest.approx(x[name], rel=2e-4, abs=2e-6)), name
        assert y["loss"] == pytest.approx(x["loss"], abs=2e-6)
    assert "reward" in one["log"][0]
    if given:
        both = [a + b for a, b in zip(first["dropped"], second["dropped"], strict=True)]
        steps = [
            [sorted(itertools.chain(*calls[i : i + parts])) for i in range(0, len(calls), parts)]
            for calls in (one["dropped"], both)
        ]
        assert steps[0] == steps[1] and any(steps[0])
