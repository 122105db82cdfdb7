"""``quickstart``: warm start, then GRPO, Clip-Cov and KL-Cov from the same start and seed, and a report."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.drivers import load_runs, run_side_by_side, shared_warm_start, start_experiment
from entropy_kernels.trainer.progress import ProgressBoard
from entropy_kernels.trainer.report import memory_line, write_report


@dataclass
class Quickstart:
    """Train a tiny model under GRPO, Clip-Cov and KL-Cov and write report.html: three to six minutes on two cores."""

    out: Path = Path("runs/quickstart")
    """Directory of the report and of the runs below it; earlier quickstart runs there are replaced."""
    seed: int = 0
    """Seed of all runs."""
    steps: int = 240
    """RL steps per run."""
    workers: int = 2
    """Runs at the same time, one thread each."""
    control: bool = True
    """Add Clip-Cov's control: as many tokens dropped at random."""
    warm_steps: int = 800
    """Supervised steps before RL."""
    progress: bool = True
    """Show progress."""


def run(options: Quickstart) -> Path:
    """Do it all; returns the path of report.html."""
    if options.workers < 1:
        raise ValueError(f"workers: expected an integer >= 1, got {options.workers}")
    started = time.time()
    methods = ["grpo", "clip_cov", "kl_cov", *(["random_dropped"] if options.control else [])]
    base = TrainerConfig(seed=options.seed, steps=options.steps, warm_steps=options.warm_steps)
    with ProgressBoard(enabled=options.progress) as board:
        start = shared_warm_start(base, options.out / "warm_start", board)
        configs = {
            method: TrainerConfig(
                out=options.out / method,
                seed=options.seed,
                steps=options.steps,
                method=method,  # type: ignore[arg-type]
                warm_steps=options.warm_steps,
                warm_start_from=start,
            )
            for method in methods
        }
        run_side_by_side(configs, workers=options.workers, board=board)
    experiment = start_experiment(base, start)
    command = [
        "python",
        "-m",
        "entropy_kernels.trainer",
        "quickstart",
        "--out",
        str(options.out),
        "--seed",
        str(options.seed),
    ]
    command += ["--steps", str(options.steps), "--warm-steps", str(options.warm_steps)]
    path = write_report(
        options.out,
        {name: [log] for name, log in load_runs({name: c.out for name, c in configs.items()}).items()},
        experiment=experiment,
        command=shlex.join(command),
        seeds=[options.seed],
        seconds=time.time() - started,
        title="Entropy collapse and two cures, on a task that fits into a minute",
    )
    if options.progress:
        memory = memory_line(json.loads((options.out / "summary.json").read_text(encoding="utf-8"))["methods"])
        if memory:
            print(memory)
        print(f"report: {path}")
    return path
