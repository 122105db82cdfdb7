"""The report of ``benchmarks.trl_step`` from runs whose numbers are known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.trl_step import ARMS, SETTINGS, report

pytest.importorskip("scipy")


def of(arm: str, seed: int, scale: float) -> dict[str, Any]:
    seconds = [100.0, *(scale * (1 + 0.1 * seed) for _ in range(9))]  # the first step does not count
    return {
        "arm": arm, "seed": seed, "seconds": seconds, "cpu": seconds, "training": seconds, "peak": int(scale * 1e9),
        "log": {"entropy": [2.0 - 0.1 * step for step in range(10)]}, "load": [1.0, 1.5], "time": f"day {seed}",
        "settings": SETTINGS, "machine": {"processor": "a processor", "torch": "2.0"},
    }  # fmt: skip


def test_report() -> None:
    scales = dict(zip(ARMS, (2.0, 1.0, 1.5), strict=True))
    text = report([of(arm, seed, scale) for seed in range(3) for arm, scale in scales.items()])
    assert "3 seeds an arm, 1 thread. a processor, torch 2.0; load average 1.0 to 1.5" in text
    assert "| TRL | 2.200 [1.703, 2.697] |" in text and "| our head | 0.500 [0.500, 0.500] |" in text
    assert "| our head, exact_cov | 0.750 [0.750, 0.750] |" in text and "| 10 | 1.100 [1.100, 1.100] |" in text
    assert "- our head, step, s: shown, less\n" in text


def test_an_interval_that_holds_1_shows_nothing() -> None:
    runs = [of(arm, seed, 2.0 if arm == "TRL" else 1.0 + seed) for seed in range(3) for arm in ARMS]
    assert report(runs).count(": no difference shown\n") == 8


def test_one_seed_has_no_interval() -> None:
    assert "| our head | 0.500 | 0.500 | 0.500 | 0.500 |" in (
        text := report([of(arm, 0, scale) for arm, scale in zip(ARMS, (2.0, 1.0, 1.5), strict=True)])
    )
    assert "our head, peak, GB: one seed shows nothing" in text
