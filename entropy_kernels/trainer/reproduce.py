"""``reproduce``: three seeds of every method and of the random-token controls, a report and a verdict."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_kernels.analysis import plots
from entropy_kernels.trainer.checkpoint import write_bytes, write_text
from entropy_kernels.trainer.config import METHODS, TrainerConfig
from entropy_kernels.trainer.drivers import load_runs, run_side_by_side, shared_warm_start, start_experiment
from entropy_kernels.trainer.metrics_log import read_rows
from entropy_kernels.trainer.progress import ProgressBoard
from entropy_kernels.trainer.report import change_lines, end_rows, law_lines, limits, memory_line, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: Columns of the small per-run logs that are worth keeping under version control.
KEPT_COLUMNS = (
    "step",
    "entropy",
    "reward",
    "val_pass1",
    "val_pass8",
    "val_distinct",
    "final_pass1",
    "final_pass8",
    "final_pass32",
    "final_distinct",
    "cov_mean",
    "tokens_in_band",
    "tokens_dropped",
    "tokens_penalized",
    "clipfrac",
    "ppo_kl_abs",
    "predicted_dh",
    "measured_dh",
    "first_order_dh",
    "first_update_dh",
    "small_update_dh",
    "first_order_step_dh",
)


@dataclass
class Reproduce:
    """GRPO, Clip-Cov, KL-Cov and the two random-token controls over several seeds: about 25 minutes on two cores."""

    out: Path = Path("runs/reproduce-toy")
    """Directory of everything: runs, report.html, report.md, summary.json, toy.png, csv/."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed."""
    methods: tuple[str, ...] = METHODS
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
    with ProgressBoard(enabled=options.progress) as board:
        base = TrainerConfig(steps=options.steps, warm_steps=options.warm_steps)
        start = shared_warm_start(base, options.out / "warm_start", board)
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
        todo = configs
        if options.reuse:
            waiting = {name: c for name, c in configs.items() if not complete(c)}
            todo = {name: dataclasses.replace(c, resume=continuable(c)) for name, c in waiting.items()}
        run_side_by_side(todo, workers=options.workers, board=board)
    logs = load_runs({name: c.out for name, c in configs.items()})
    runs = {method: [logs[f"{method}-{seed}"] for seed in options.seeds] for method in options.methods}
    command = "python -m entropy_kernels.trainer reproduce --out " + shlex.quote(str(options.out))
    command += f" --seeds {' '.join(map(str, options.seeds))} --steps {options.steps} --warm-steps {options.warm_steps}"
    write_report(
        options.out,
        runs,
        experiment=start_experiment(base, start),
        command=command,
        seeds=options.seeds,
        seconds=time.time() - started,
        title=f"Entropy collapse and two cures over {len(options.seeds)} seeds, with random-token controls",
    )
    for name, log in logs.items():
        small = log[[column for column in KEPT_COLUMNS if column in log]]
        write_text(options.out / "csv" / f"{name}.csv", small.to_csv(index=False, float_format="%.5g"))
    write_bytes(options.out / "toy.png", plots.png(overview(runs), dpi=110))
    return verdict(options.out, quiet=not options.progress)


def measured(method: str, seed: int, options: Reproduce) -> bool:
    """Whether a run measures its entropy changes."""
    return seed == options.seeds[0] and not method.startswith("random")


def continuable(config: TrainerConfig) -> bool:
    """Whether a run of exactly this configuration left a checkpoint in its directory."""
    return same_configuration(config) and (config.out / "checkpoint.pt").exists()


def complete(config: TrainerConfig) -> bool:
    """Whether a run of exactly this configuration has finished in its directory."""
    if not same_configuration(config):
        return False
    rows = read_rows(config.out / "metrics.jsonl")
    return bool(rows) and rows[-1]["step"] == config.steps


def same_configuration(config: TrainerConfig) -> bool:
    """Whether the run in the directory of `config` was made under it."""
    saved, metrics = config.out / "config.json", config.out / "metrics.jsonl"
    if not (saved.exists() and metrics.exists()):
        return False
    values = json.loads(saved.read_text(encoding="utf-8"))
    ignored = {"overwrite", "progress", "resume"}
    return all(values.get(k) == v for k, v in config.to_dict().items() if k not in ignored)


def overview(runs: Mapping[str, Sequence[DataFrame]]) -> Figure:
    """One picture: entropy and pass@8 over the steps, every method, mean and range over the seeds."""
    columns = {"entropy": "policy entropy (nats)", "val_pass1": "pass@1", "val_pass8": "pass@8"}
    return plots.performance_figure(dict(runs), columns=columns, title="Walk")


def verdict(out: Path, *, quiet: bool) -> int:
    """Write report.md from summary.json and print the criteria; 0 if all hold."""
    record = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    write_text(out / "report.md", markdown(record))
    memory = memory_line(record["methods"])
    if memory and not quiet:
        print(memory)
    for check in record["criteria"]:
        if not quiet:
            print(f"{'PASS' if check['holds'] else 'FAIL'}  {check['claim']}: {check['figure']}")
    return 0 if all(check["holds"] for check in record["criteria"]) else 1


def markdown(record: Mapping[str, Any]) -> str:
    """The report as Markdown: criteria, end values, the law, entropy changes, what does not show."""
    summary = record["methods"]
    memory = memory_line(summary)
    head, rows = end_rows(summary)
    table = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    checks = [
        f"| {c['claim']} | {c['figure']} | {'holds' if c['holds'] else '**does not hold**'} |"
        for c in record["criteria"]
    ]
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    return "\n".join(
        [
            f"# Walk, {len(record['seeds'])} seeds, with random-token controls",
            "",
            f"`{record['command']}` took {record['seconds'] / 60:.0f} minutes ({versions}).",
            "",
            "![entropy, pass@1 and pass@8 over training steps](toy.png)",
            "",
            "## Criteria",
            "",
            "| claim | measured | |",
            "| --- | --- | --- |",
            *checks,
            "",
            "## End values, mean ± standard deviation over seeds",
            "",
            *table,
            "",
            *([memory, ""] if memory else []),
            "## The law",
            "",
            *(f"- {line}" for line in law_lines(summary)),
            "",
            "## Entropy change, measured against predicted",
            "",
            *(f"- {line}" for line in change_lines(summary, record["logits_as_parameters"])),
            "",
            "## What does not show at this scale",
            "",
            *(f"- {line}" for line in limits(summary)),
            "",
        ]
    )
