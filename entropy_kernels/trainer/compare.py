"""``compare``: the methods from one start, on any model and task, beside the same run by torch's own operations."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
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
class Compare:
    """Train one model under several methods from one start, and once more by torch's own operations; writes a report
    with curves and with what a step costs."""

    config: Path
    """JSON file with fields of a run's configuration, what all runs have in common; those left out have their defaults.
    The config.json of a run is one."""
    out: Path = Path("runs/compare")
    """Directory of everything: runs, report.html, report.md, summary.json, curves.png, csv/."""
    methods: tuple[str, ...] = ("grpo", "clip_cov", "kl_cov")
    """Methods to run; grpo, the baseline, must be among them."""
    torch_ops: str | None = "clip_cov"
    """The method that is run once more under head = torch, or none."""
    steps: int | None = None
    """RL steps per run; none takes the configuration's."""
    seed: int | None = None
    """Seed of all runs; none takes the configuration's."""
    workers: int = 1
    """Runs at the same time. With one at a time their times are their own."""
    reuse: bool = False
    """Keep runs that are complete in `out` under the same configuration, and continue those that have a checkpoint."""
    progress: bool = True
    """Show progress."""


def run(options: Compare) -> Path:
    """Do it all; returns the path of report.html."""
    base = TrainerConfig.from_json(options.config)
    if options.steps is not None:
        base.steps = options.steps
    if options.seed is not None:
        base.seed = options.seed
    command = ["compare", "--config", str(options.config), "--out", str(options.out), "--methods", *options.methods]
    command += ["--reuse"] if options.reuse else []
    command += ["--torch-ops", str(options.torch_ops), "--steps", str(base.steps), "--seed", str(base.seed)]
    return run_methods(
        base,
        options.out,
        methods=options.methods,
        torch_ops=options.torch_ops,
        workers=options.workers,
        reuse=options.reuse,
        command="python -m entropy_kernels.trainer " + shlex.join([*command, "--workers", str(options.workers)]),
        title=f"{base.model} on {base.task}: entropy collapse and two cures",
        progress=options.progress,
    )


def run_methods(
    base: TrainerConfig,
    out: Path,
    *,
    methods: Sequence[str],
    torch_ops: str | None = None,
    workers: int,
    reuse: bool = False,
    kind: str = "compare",
    command: str,
    title: str,
    progress: bool,
) -> Path:
    """Train `base` under each of `methods` from one warm start, in directories of `out`, and report on them.

    Parameters
    ----------
    base : TrainerConfig
        What the runs have in common; its method, directory and start are replaced.
    torch_ops : str, optional
        A method that is run once more with head = torch.
    workers : int
        Runs at the same time.
    reuse : bool
        Keep what is complete in `out` already, and continue what has a checkpoint.
    kind : str
        The command that `out` belongs to.
    command, title : str
        For the report.

    Returns
    -------
    Path
        report.html. ValueError names a method that does not exist, or a missing baseline.
    """
    if "grpo" not in methods or {*methods, torch_ops or "grpo"} - set(METHODS):
        raise ValueError(
            f"methods, torch_ops: expected 'grpo' and others of {', '.join(METHODS)}, got {', '.join(methods)} and "
            f"{torch_ops}"
        )
    if workers < 1:
        raise ValueError(f"workers: expected an integer >= 1, got {workers}")
    base.validate()
    started = time.time()
    start = out / "warm_start"
    configs = {
        method: dataclasses.replace(base, out=out / method, method=method, warm_start_from=start)  # type: ignore
        for method in methods
    }
    if torch_ops is not None:
        name = f"{torch_ops}_torch_ops"
        configs[name] = dataclasses.replace(
            base, out=out / name, method=torch_ops, warm_start_from=start, head="torch"  # type: ignore[arg-type]
        )  # fmt: skip
    reports = (*REPORT_FILES, *kept_files("curves.png", configs))
    with experiment(out, kind, {} if reuse else configs, *reports), ProgressBoard(enabled=progress) as board:
        shared_warm_start(base, start, board)
        run_side_by_side(unfinished(configs) if reuse else configs, workers=workers, board=board)
        logs = load_runs({name: config.out for name, config in configs.items()})
        runs = {name: [log] for name, log in logs.items()}
        path = write_report(
            out,
            runs,
            base=base,
            experiment=start_experiment(base, start),
            command=command,
            seeds=[base.seed],
            seconds=time.time() - started,
            workers=workers,
            title=title,
        )
        write_kept(out, runs, names=logs, picture="curves.png")
    if progress:
        memory = memory_line(json.loads((out / "summary.json").read_text(encoding="utf-8"))["methods"])
        if memory:
            print(memory)
        print(f"report: {path}")
    return path
