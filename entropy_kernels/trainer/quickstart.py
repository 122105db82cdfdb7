"""``quickstart``: warm start, then GRPO, Clip-Cov and KL-Cov from the same start and seed, and a report."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from entropy_kernels.trainer.compare import run_methods
from entropy_kernels.trainer.config import TrainerConfig


@dataclass
class Quickstart:
    """Train a tiny model under GRPO, Clip-Cov and KL-Cov and write report.html: three to six minutes on two cores."""

    out: Path = Path("runs/quickstart")
    """Directory of the report and of the runs below it; only what quickstart wrote there earlier is replaced."""
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
    reuse: bool = False
    """Keep runs that are complete in `out` under the same configuration, and continue those that have a checkpoint."""
    progress: bool = True
    """Show progress."""


def run(options: Quickstart) -> Path:
    """Do it all; returns the path of report.html."""
    methods = ["grpo", "clip_cov", "kl_cov", *(["random_dropped"] if options.control else [])]
    command = ["quickstart", "--out", str(options.out), "--seed", str(options.seed)]
    command += ["--steps", str(options.steps), "--warm-steps", str(options.warm_steps)]
    return run_methods(
        TrainerConfig(seed=options.seed, steps=options.steps, warm_steps=options.warm_steps),
        options.out,
        methods=methods,
        workers=options.workers,
        reuse=options.reuse,
        kind="quickstart",
        command="python -m entropy_kernels.trainer " + shlex.join(command),
        title="Entropy collapse and two cures, on a task that fits into a minute",
        progress=options.progress,
    )
