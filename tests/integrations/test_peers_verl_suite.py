"""verl's own CPU tests of its losses pass with ours in their place. verl's wheel has its tests in it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

FOLDER = "tests/trainer/ppo"
FILES = (
    "test_core_algos_on_cpu.py",  # kl_penalty
    "test_dynamic_policy_losses_on_cpu.py",  # dro
    "test_loss_aggregation_on_cpu.py",
    "test_rollout_corr_integration.py",  # vanilla with weights
    "test_value_loss_normalization_on_cpu.py",  # agg_loss in every mode, in micro-batches and over ranks
)
HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH}


def test_verls_own_tests_pass_with_ours(tmp_path: Path) -> None:
    root = Path(str(importlib.metadata.distribution("verl").locate_file("")))
    files = [root / FOLDER / name for name in FILES]
    assert all(file.is_file() for file in files), f"no tests of verl in {root / FOLDER}"
    calls = tmp_path / "calls"
    # none of our configuration: another root, no conftest, no options
    command = [sys.executable, "-m", "pytest", "-q", "-p", "swapped", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [*command, f"--rootdir={root}", *map(str, files)],
        env={**ENVIRONMENT, "SWAPPED_CALLS": str(calls), "PYTEST_ADDOPTS": ""},
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(line.split() for line in calls.read_text().splitlines())
    assert all(int(count) > 0 for count in counts.values()), f"never called: {counts}"
    print(done.stdout.splitlines()[-1], counts)


def test_the_swap_is_seen() -> None:
    """The registry of verl still holds its own functions; what the tests import is ours."""
    code = (
        "import swapped\n"
        "from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla\n"
        "assert agg_loss.__wrapped__ is swapped.agg_loss\n"
        "assert compute_policy_loss_vanilla.__module__ == 'swapped'\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=300)
