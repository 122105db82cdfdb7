"""Runs for the tests of reports: the committed logs of the reproduction, with what such logs leave out made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.log import COVARIANCE_COLUMNS
from entropy_kernels.trainer.report import write_report

ROOT = Path(__file__).parent.parent
RUNS = ("grpo", "clip_cov", "kl_cov", "target", "random_dropped", "random_penalized")


def logs(seeds: int) -> dict[str, list[pd.DataFrame]]:
    """Run -> logs. The run under a target, of which none is committed, is Clip-Cov's with one written in."""
    found: dict[str, list[pd.DataFrame]] = {}
    for run in RUNS:
        name = "clip_cov" if run == "target" else run
        folder = ROOT / "benchmarks" / "results" / "toy" / "csv"
        found[run] = [pd.read_csv(folder / f"{name}-{seed}.csv") for seed in range(seeds)]
        for log in found[run]:
            log["tokens"], log["tokens_touched"] = 3584, 100.0
            for i, column in enumerate(COVARIANCE_COLUMNS.values()):
                log[column] = np.where(log["step"] == 0, 4.0 / 3**i, np.nan)
            for i, part in enumerate(("step", "sample", "verify", "score", "update", "measure", "ops")):
                log[f"time/{part}"] = 0.4 / (1 + i) * (1.09 if run == "kl_cov" else 1.0)
            for i, head in enumerate(("linear", "logits", "torch")):
                log[f"memory/{head}"] = np.where(log["step"] == 0, 1.5e6 * 2**i, np.nan)
            if run == "target":
                log["target_entropy"] = 0.5
    return found


def report(out: Path, seeds: int, *without: str, **changes: Any) -> dict[str, Any]:
    """Write a report of them into `out`; returns what summary.json holds."""
    runs = {run: found for run, found in logs(seeds).items() if run not in without}
    step = np.linspace(-3e-6, 2e-6, 40)
    keywords = {
        "base": TrainerConfig(), "experiment": {"predicted": step.tolist(), "measured": step.tolist()},
        "command": "python -m entropy_kernels.trainer reproduce --out runs/reproduce-toy --seeds 0 1 2 --steps 240 "
        "--warm-steps 800 --eval-every 16 --workers 2", "seeds": [*range(seeds)], "seconds": 500.0, "workers": 2,
        "title": "Clip-Cov, KL-Cov and a target entropy beside GRPO",
        "kept": {run: log for run, (log, *_) in runs.items()}, **changes,
    }  # fmt: skip
    return write_report(out, runs, **keywords)
