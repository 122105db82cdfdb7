"""verl's own CPU tests that touch what we replace: what passes without us passes with all of ours in place.

verl's wheel has its tests in it. Neither it nor the source distribution has tests of the functions of statistics, and
TRL's distributions have no tests at all: ``test_verl_statistics.py`` and ``test_trl_head.py`` are the judges there.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(str(importlib.metadata.distribution("verl").locate_file("")))
TESTS = ("tests/trainer", "tests/test_base_config_on_cpu.py", "tests/plugin")
#: What these tests call, of losses, configs: agg_loss in every mode, in micro-batches and over ranks; kl_penalty; the
#: losses vanilla, with weights, and dro; the records that take our keys.
CALLED = {
    "agg_loss", "kl_penalty", "compute_policy_loss_vanilla", "compute_policy_loss_dro",
    "verl.workers.config.actor:PolicyLossConfig.__init__", "verl.workers.config.actor:ActorConfig.__post_init__",
}  # fmt: skip
HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "PYTEST_ADDOPTS": ""}


def outcomes(folder: Path, *options: str, **environment: str) -> dict[str, str]:
    """Of each test by its id: passed, failure, error, skipped. None of our configuration: another root, no conftest."""
    report = folder / f"{len(list(folder.iterdir()))}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={ROOT}"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *options, *(str(ROOT / name) for name in TESTS)],
        env={**ENVIRONMENT, **environment}, cwd=folder, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    print(done.stdout[-3000:])
    cases = xml.etree.ElementTree.parse(report).getroot().iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}


def test_what_passes_without_us_passes_with_us(tmp_path: Path) -> None:
    assert all((ROOT / name).exists() for name in TESTS), f"no tests of verl in {ROOT}"
    before = outcomes(tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    calls = tmp_path / "calls"
    after = outcomes(tmp_path, "-p", "swapped", SWAPPED_CALLS=str(calls), VERL_USE_EXTERNAL_PLUGINS="auto")
    passed = {name for name, outcome in before.items() if outcome == "passed"}
    assert len(passed) > 150 and not {name: after.get(name) for name in passed if after.get(name) != "passed"}
    counts = {name: int(count) for name, count in (line.split() for line in calls.read_text().splitlines())}
    print(f"{len(passed)} of {len(before)} passed before, and all of these after; calls: {counts}")
    assert {name for name in CALLED if not counts[name]} == set(), "never called"


def test_the_swap_is_seen() -> None:
    """What the tests import from verl is ours, from verl's registry."""
    code = (
        "import swapped\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, compute_policy_loss_vanilla\n"
        "assert agg_loss.__wrapped__ is swapped.agg_loss\n"
        "assert compute_policy_loss_vanilla.__wrapped__.__wrapped__ is POLICY_LOSS_REGISTRY['ek_ppo']\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=300)
