"""examples/trl_grpo.py does what its head says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def entropies(*flags: str) -> list[float]:
    """Of the printed lines."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "trl_grpo.py"), *flags],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    head, *rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert head[:3] == ["step", "reward", "entropy"] and [int(row[0]) for row in rows] == list(range(10, 160, 10))
    assert float(rows[-1][1]) > 0.9
    return [float(row[2]) for row in rows]


@pytest.mark.timeout(250)
@pytest.mark.parametrize(
    ("flags", "low", "high"),
    [
        ((), 0.0, 0.6),
        (("--target_entropy", "2.5"), 2.2, 2.8),
        (("--method", "exact_cov", "--method_options", '{"share": 0.2}'), 3.2, 4.5),
    ],
    ids=["TRL's", "target", "exact_cov"],
)
def test_it_shows_what_it_says(flags: tuple[str, ...], low: float, high: float) -> None:
    found = entropies(*flags)
    assert 4.4 < found[0] < 4.7 and all(low < x < high for x in found[-3:]), found
