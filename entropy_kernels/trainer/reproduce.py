"""``reproduce``: three seeds of every method and of the random-token controls, a report and a verdict."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from entropy_kernels.trainer.config import METHODS, TrainerConfig
from entropy_kernels.trainer.drivers import (
    experiment,
    load_runs,
    run_side_by_side,
    shared_warm_start,
    start_experiment,
    unfinished,
)
from entropy_kernels.trainer.progress import ProgressBoard
from entropy_kernels.trainer.report import REPORT_FILES, kept_files, write_kept, write_report
from entropy_kernels.trainer.report_text import memory_line


@dataclass
class Reproduce:
    """GRPO, Clip-Cov, KL-Cov and the two random-token controls over several seeds: about 25 minutes on two cores."""

    out: Path = Path("runs/reproduce-toy")
    """Directory of everything: runs, report.html, report.md, summary.json, toy.png, csv/."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run; grpo, the baseline, must be among them."""
    steps: int = 240
    """RL steps per run."""
    workers: int = 2
    """Runs at the same time, one thread each."""
    eval_every: int = 16
    """Steps between validations."""
    warm_steps: int = 800
    """Supervised steps before RL."""
    reuse: bool = False
    """Keep runs that are complete in `out` under the same configuration, and continue those that have a checkpoint."""
    progress: bool = True
    """Show progress."""


def run(options: Reproduce) -> int:
    """Do it all; returns 0 if every criterion holds, else 1."""
    if "grpo" not in options.methods or set(options.methods) - set(METHODS):
        raise ValueError(
            f"methods: expected 'grpo' and others of {', '.join(METHODS)}, got {', '.join(options.methods)}"
        )
    if not options.seeds or options.workers < 1:
        raise ValueError(f"seeds, workers: expected at least one of each, got {options.seeds} and {options.workers}")
    started = time.time()
    base = TrainerConfig(steps=options.steps, warm_steps=options.warm_steps)
    start = options.out / "warm_start"
    configs = {
        f"{method}-{seed}": TrainerConfig(
            out=options.out / f"{method}-{seed}",
            seed=seed,
            steps=options.steps,
            method=method,  # type: ignore[arg-type]
            warm_steps=options.warm_steps,
            warm_start_from=start,
            tensorboard=False,
            eval_every=options.eval_every,
            # measuring entropy changes takes a fifth of a step: on the first seed's methods, not on all fifteen
            measure_entropy_change=measured(method, seed, options),
            first_order_every=8 if measured(method, seed, options) else 0,
        )
        for seed in options.seeds
        for method in options.methods
    }
    reports = (*REPORT_FILES, *kept_files("toy.png", configs))
    with (
        experiment(options.out, "reproduce", {} if options.reuse else configs, *reports),
        ProgressBoard(enabled=options.progress) as board,
    ):
        shared_warm_start(base, start, board)
        todo = unfinished(configs) if options.reuse else configs
        run_side_by_side(todo, workers=options.workers, board=board)
        logs = load_runs({name: c.out for name, c in configs.items()})
        runs = {method: [logs[f"{method}-{seed}"] for seed in options.seeds] for method in options.methods}
        command = "python -m entropy_kernels.trainer reproduce --out " + shlex.quote(str(options.out))
        command += (
            f" --seeds {' '.join(map(str, options.seeds))} --steps {options.steps} --warm-steps {options.warm_steps}"
        )
        write_report(
            options.out,
            runs,
            base=base,
            experiment=start_experiment(base, start),
            command=command,
            seeds=options.seeds,
            seconds=time.time() - started,
            workers=options.workers,
            title=f"Entropy collapse and two cures over {len(options.seeds)} seeds, with random-token controls",
        )
        write_kept(options.out, runs, names=logs, picture="toy.png")
    return verdict(options.out, quiet=not options.progress)


def measured(method: str, seed: int, options: Reproduce) -> bool:
    """Whether a run measures its entropy changes."""
    return seed == options.seeds[0] and not method.startswith("random")


def verdict(out: Path, *, quiet: bool) -> int:
    """Print the criteria of summary.json; 0 if all hold."""
    record = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    memory = memory_line(record["methods"])
    if memory and not quiet:
        print(memory)
    for check in record["criteria"]:
        if not quiet:
            print(f"{'PASS' if check['holds'] else 'FAIL'}  {check['claim']}: {check['figure']}")
    return 0 if all(check["holds"] for check in record["criteria"]) else 1
