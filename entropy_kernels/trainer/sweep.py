"""Several runs from one supervised start: quickstart, reproduce and compare are rows of one table.

Read :data:`SWEEPS` first, what the commands are; then :func:`planned` and :func:`run_sweep`, what they do; then the
parts in their order: :func:`configurations`, :func:`experiment` (the folder), :func:`supervised_start`,
:func:`unfinished`, :func:`run_side_by_side`. A single run is ppo.py; what is said of many, report.py.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from entropy_kernels._console import did_you_mean, print_text
from entropy_kernels._progress import ProgressBoard
from entropy_kernels._require import require_installed
from entropy_kernels.trainer import checkpoint
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import OwnFiles, fields_of, locked, read_json, write_json
from entropy_kernels.trainer.log import about_time, describe_row, read_rows
from entropy_kernels.trainer.methods import BASELINE, METHODS, PAPER, TARGET_RUN
from entropy_kernels.trainer.ppo import prepared
from entropy_kernels.trainer.report import report_names, write_report
from entropy_kernels.trainer.report_text import TORCH_OPS, label, verdict_lines
from entropy_kernels.trainer.start import build_policy, check_model, load_policy, warm_start
from entropy_kernels.trainer.workers import asked

#: Seconds between looks at the logs of running processes.
_POLL = 0.5
#: Seconds that runs have to end when they are stopped: less than schedulers of jobs leave (30 s and more).
_GRACE = 20.0
#: Of float64 logits in the experiment with logits as parameters, which holds a few such tensors.
_EXPERIMENT_BYTES = 512 << 20

_CONTROLS = tuple(name for name in PAPER if METHODS[name].control_of is not None)
_MAIN = tuple(name for name in PAPER if name not in _CONTROLS)
_LABELS = ", ".join(METHODS[name].label for name in _MAIN)


class RunFailed(RuntimeError):
    """A run of several ended with an error, which its log has told."""


# --- the commands ----------------------------------------------------------------------------------------------------


@dataclass
class Flags:
    """What can be asked of a sweep; the defaults of its own stand in SWEEPS."""

    out: Path
    """Directory of everything: runs, report.html, report.md, summary.json, pictures, csv/. Only what the same command
    wrote there earlier is replaced."""
    config: Path | None = None
    """JSON file with fields of a run's configuration, what all runs have in common; those left out have their defaults.
    The config.json of a run is one."""
    methods: tuple[str, ...] = _MAIN
    """Methods to run, any of those that --method of a single run knows; the baseline must be among them."""
    target_entropy: str | None = None
    """One more run, under this target entropy, as single runs have it; none takes the configuration's, if any."""
    control: bool = True
    """Run also those of the methods that are controls: as many tokens, chosen at random."""
    torch_ops: str | None = None
    """A method that is run once more under head = torch, or none."""
    seed: int | None = None
    """Seed of all runs, unless `seeds` names theirs; none takes the configuration's."""
    seeds: tuple[int, ...] = ()
    """Seeds of the runs: one run per method and seed."""
    steps: int | None = None
    """RL steps per run; none takes the configuration's."""
    warm_steps: int | None = None
    """Supervised steps before RL; none takes the configuration's."""
    eval_every: int | None = None
    """Steps between validations; none takes the configuration's."""
    workers: int = 1
    """Runs at the same time. With one at a time their times are their own."""
    reuse: bool = False
    """Keep runs that are complete in `out` under the same configuration, and continue those that have a checkpoint."""
    progress: bool = True
    """Show progress."""


@dataclass(frozen=True)
class Sweep:
    """A command: methods × seeds from one supervised start, and a report on them."""

    about: str  # for --help
    title: str  # of the report, with {model}, {task} and {seeds}, their number
    flags: Flags
    picture: str = "curves.png"  # beside report.md
    changes: Mapping[str, Any] = field(default_factory=dict)  # of every run, to the common configuration
    repeats: Mapping[str, Any] = field(default_factory=dict)  # and of the runs of further seeds and of controls
    numbered: bool = False  # runs are named METHOD-SEED even if there is one seed
    configured: bool = False  # the common configuration is the user's, in a file
    judged: bool = False  # a claim that does not hold is an error


#: The commands by their names.
SWEEPS = {
    "quickstart": Sweep(
        about=f"A tiny model under {_LABELS}, a target entropy and a control, and report.html: three to nine minutes "
        "on two cores.",
        title="Clip-Cov, KL-Cov and a target entropy beside GRPO",
        flags=Flags(Path("runs/quickstart"), methods=(*_MAIN, _CONTROLS[0]), target_entropy="0.4", workers=2),
    ),
    "reproduce": Sweep(
        about=f"{_LABELS} and the random-token controls over several seeds, and the claims checked (exit code 1 if one "
        "does not hold): about 25 minutes on two cores.",
        title="Clip-Cov, KL-Cov and random tokens beside GRPO, {seeds} seeds",
        flags=Flags(Path("runs/reproduce-toy"), methods=PAPER, seeds=(0, 1, 2), eval_every=16, workers=2),
        picture="toy.png",
        changes={"tensorboard": False},
        # measuring entropy changes takes a fifth of a step: on the first seed's methods, not on all fifteen
        repeats={"measure_entropy_change": False, "first_order_every": 0},
        numbered=True,
        judged=True,
    ),
    "compare": Sweep(
        about="Train one model, any (--config FILE), under several methods from one start, and once more by torch's "
        "own operations; writes a report with curves and with what a step costs.",
        title="{model} on {task}: policy entropy and methods that hold it",
        flags=Flags(Path("runs/compare"), torch_ops=_MAIN[1]),
        configured=True,
    ),
}


@dataclass(frozen=True)
class Plan:
    """A sweep that was asked for: what its runs have in common, and every run."""

    name: str  # of SWEEPS
    flags: Flags
    base: TrainerConfig
    seeds: tuple[int, ...]
    rows: Mapping[str, Sequence[TrainerConfig]]  # of the report -> a configuration per seed

    @property
    def runs(self) -> dict[str, TrainerConfig]:
        """By the names of their folders, in the order in which they start."""
        return {config.out.name: config for configs in zip(*self.rows.values(), strict=True) for config in configs}

    @property
    def announced(self) -> str:
        """What is about to be done, how long about, where it is written, and how to stop it."""
        runs, workers, base = self.runs.values(), self.flags.workers, self.base
        first = f" after {base.warm_steps} supervised ones that they share" if base.warm_steps else ""
        names = ", ".join(dict.fromkeys(label(row) for row in self.rows))
        seeds = f" on the seeds {', '.join(map(str, self.seeds))}" if len(self.seeds) > 1 else ""
        return (
            f"{names}{seeds}: {len(runs)} runs of {base.steps} steps{first}, {workers} at a time, into "
            f"{self.flags.out}, with report.html at the end; {about_time(*runs, start=base, workers=workers)}. "
            "Ctrl-C stops; --reuse goes on."
        )


def planned(name: str, flags: Flags, base: TrainerConfig | None = None) -> Plan:
    """What `run_sweep` is to do.

    Parameters
    ----------
    name : str
        Of SWEEPS.
    flags : Flags
    base : TrainerConfig, optional
        What the runs have in common, in place of the file `flags.config`; method, directory and start are replaced.

    Raises
    ------
    ValueError
        A method that does not exist, no baseline, or a setting that cannot work.
    FileNotFoundError
        No such file `flags.config`.
    ImportError
        A package of the report is not installed.
    """
    sweep = SWEEPS[name]
    # now, and not after minutes of training
    require_installed(("matplotlib", "pandas", "scipy", "statsmodels"), "the report", "train")
    if base is None:
        if sweep.configured and flags.config is None:
            raise ValueError("--config: expected a JSON FILE of what the runs have in common, got none")
        base = TrainerConfig() if flags.config is None else TrainerConfig.from_json(flags.config)
    if flags.seed is not None and flags.seeds:
        raise ValueError(
            f"seed: expected none where seeds names those of the runs ({', '.join(map(str, flags.seeds))}), got "
            f"{flags.seed}; --seeds {flags.seed} runs that one alone"
        )
    common = {key: getattr(flags, key) for key in ("seed", "steps", "warm_steps", "eval_every")}
    base = dataclasses.replace(base, **{key: value for key, value in common.items() if value is not None})
    base, task = prepared(base)
    with asked(task, base):  # so its scorer is there
        rows = configurations(sweep, flags, base)
    plan = Plan(name, flags, base, flags.seeds or (base.seed,), rows)
    for config in plan.runs.values():
        config.validate()
    return plan


def run_sweep(plan: Plan) -> int:
    """Train and report, all below `plan.flags.out`; the exit code: 1 if claims are judged and one does not hold.

    Raises
    ------
    OSError
        Files of the user's or another process are in the way; nothing was written then.
    RunFailed
        With the end of its log, if a run fails; the others are stopped.
    """
    sweep, started, runs = SWEEPS[plan.name], time.time(), plan.runs
    flags, base, rows = plan.flags, plan.base, plan.rows
    with (
        experiment(flags.out, plan.name, {} if flags.reuse else runs, *report_names(sweep.picture, runs)),
        ProgressBoard(enabled=flags.progress) as board,
    ):
        board.say(plan.announced)
        start = supervised_start(base, flags.out / "warm_start", board)
        run_side_by_side(unfinished(runs) if flags.reuse else runs, workers=flags.workers, board=board)
        board.say("writing the report")
        logs = load_runs({key: config.out for key, config in runs.items()})
        record = write_report(
            flags.out,
            {row: [logs[config.out.name] for config in configs] for row, configs in rows.items()},
            base=base,
            experiment=start_experiment(base, start),
            command=command_line(plan.name, flags, base),
            seeds=plan.seeds,
            seconds=time.time() - started,
            workers=flags.workers,
            title=sweep.title.format(model=base.model, task=base.task, seeds=len(plan.seeds)),
            kept=logs,
            picture=sweep.picture,
        )
    if flags.progress:
        said = verdict_lines(record)
        for check in record["criteria"]:
            told = ("PASS" if check["holds"] else "FAIL") if sweep.judged else "does not hold:" * (not check["holds"])
            said += [f"{told} {check['claim']}: {check['figure']}"] if told else []
        for line in said:
            print_text(line, indent="  ")
        print(f"report: {flags.out / 'report.html'}")
    return 1 if sweep.judged and not all(check["holds"] for check in record["criteria"]) else 0


def configurations(sweep: Sweep, flags: Flags, base: TrainerConfig) -> dict[str, list[TrainerConfig]]:
    """The configuration of every run: row of the report (method, method + TORCH_OPS, TARGET_RUN) -> one per seed."""
    for option, names in (("methods", flags.methods), ("torch_ops", filter(None, [flags.torch_ops]))):
        for name in names:
            if name not in METHODS:
                near = did_you_mean(name, METHODS)
                raise ValueError(f"{option}: expected names among {', '.join(METHODS)}, got {name!r}{near}")
    if BASELINE not in flags.methods:
        raise ValueError(
            f"methods: expected {BASELINE!r} among them, which the others are compared with, got "
            f"{' '.join(flags.methods) or 'none'}"
        )
    if flags.workers < 1:
        raise ValueError(f"workers: expected an integer >= 1, got {flags.workers}")
    rows: dict[str, dict[str, Any]] = {
        method: {"method": method} for method in flags.methods if method not in _CONTROLS
    }
    target = flags.target_entropy or base.target_entropy
    if target is not None:
        options = {} if base.target_entropy is None else base.method_options
        rows[TARGET_RUN] = {"method": BASELINE, "target_entropy": target, "method_options": options}
    if flags.control:
        rows |= {method: {"method": method} for method in flags.methods if method in _CONTROLS}
    if flags.torch_ops is not None:
        rows[flags.torch_ops + TORCH_OPS] = {"method": flags.torch_ops, "head": "torch"}
    seeds = flags.seeds or (base.seed,)
    if len({*seeds}) < len(seeds):  # two runs in one folder, and a spread of 0 over "several" seeds
        raise ValueError(f"seeds: expected different ones, got {', '.join(map(str, seeds))}")
    numbered = sweep.numbered or len(seeds) > 1

    def configuration(row: str, seed: int) -> TrainerConfig:
        repeats = sweep.repeats if seed != seeds[0] or rows[row]["method"] in _CONTROLS else {}
        out = flags.out / (f"{row}-{seed}" if numbered else row)
        changes = {**sweep.changes, **repeats, **rows[row]}
        start = flags.out / "warm_start"
        return dataclasses.replace(
            base.under(rows[row]["method"]), seed=seed, out=out, warm_start_from=start, **changes
        )

    return {row: [configuration(row, seed) for seed in seeds] for row in rows}


def command_line(name: str, flags: Flags, base: TrainerConfig) -> str:
    """The call that does the same again, with what `flags` leave to the configuration; booleans where not as usual."""
    words = [name]
    for key, usual in vars(SWEEPS[name].flags).items():
        if key == "seed" and flags.seeds:
            continue
        value = getattr(flags, key)
        value = getattr(base, key, None) if value is None and key not in ("config", "torch_ops") else value
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{'' if value else 'no-'}{option}"] if value != usual and key != "progress" else []
        elif isinstance(value, tuple):
            words += [f"--{option}", *map(str, value)] if value else []
        elif value is not None or usual is not None:
            words += [f"--{option}", "none" if value is None else str(value)]
    return "python -m entropy_kernels.trainer " + shlex.join(words)


# --- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def experiment(out: Path, command: str, runs: Mapping[str, TrainerConfig], *reports: str) -> Iterator[None]:
    """Within: `out` is this command's, with its `reports` and the directories of its `runs`.

    Raises before anything is written, if another process is at work there or files of the user's are in the way. Also
    FileExistsError: a directory holds another command's files, or a run that was started by itself.
    """
    with locked(out):
        files = OwnFiles(out, command)
        files.tidy()
        files.check(*reports)
        files.claim()  # no other command's from now on
        for config in runs.values():
            if config.out.exists():
                with locked(config.out):
                    _place(config)
        yield


def _place(config: TrainerConfig) -> OwnFiles:
    """The files of a run that is to be started; FileExistsError for a run there that no sweep has started."""
    files = checkpoint.own_files(config.out)
    if not config.resume and files.has("metrics.jsonl") and not files.has("request.json"):
        raise FileExistsError(
            f"out: expected in {config.out} no run, or one of an earlier call, got one that was started by itself; "
            "move it away or choose another --out"
        )
    files.claim(*checkpoint.DRIVER_FILES)
    return files


# --- the start -------------------------------------------------------------------------------------------------------


def supervised_start(config: TrainerConfig, directory: Path, board: ProgressBoard) -> Path:
    """The model that all runs start from, saved in `directory`; one made earlier under the same settings is kept."""
    config, task = prepared(config)
    key = {**config.warm_start_key(), "threads": config.threads, "torch": torch.__version__}
    with locked(directory, "out"):
        files = OwnFiles(directory, "model", alone=True)
        files.tidy()
        with suppress(OSError, ValueError):  # what is not whole is made anew
            check_model(str(directory.absolute()))
            if read_json(directory / checkpoint.STAMP) == key:
                board.say(f"supervised start: kept from {directory}")
                return directory
        torch.set_num_threads(config.threads)
        policy = build_policy(config, task)
        steps = config.warm_steps or 0
        if steps:
            board.update("supervised start", 0, steps)
        warm_start(
            policy, task, config,
            on_step=lambda done, loss: board.update("supervised start", done, steps, f"loss {loss:.3f}"),
        )  # fmt: skip
        files.remove(checkpoint.STAMP)
        policy.write(files)
        # the stamp comes last: without it the directory is made anew
        write_json(files.file(checkpoint.STAMP), key)
    del policy
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the runs, which are other processes, cannot have it otherwise
    return directory


def start_experiment(config: TrainerConfig, directory: Path) -> dict[str, list[float]]:
    """Measured and predicted entropy change with the logits of the start as parameters; see `logits_as_parameters`."""
    from entropy_kernels.trainer.critic import critic_of
    from entropy_kernels.trainer.ppo import collect
    from entropy_kernels.trainer.probes import logits_as_parameters

    torch.set_num_threads(config.threads)
    config, task = prepared(config)
    policy = load_policy(directory, config, task)
    sampler = torch.Generator(policy.device).manual_seed(config.seed)
    with asked(task, config):
        rollout = collect(policy, task, config, step=0, generator=sampler, critic=critic_of(config, policy))
    row = 8 * rollout.ids.shape[1] * policy.vocab_size  # bytes of its logits
    rows = max(1, min(128, _EXPERIMENT_BYTES // row))
    return logits_as_parameters(policy, rollout, temperature=config.temperature, rows=rows)


# --- the runs --------------------------------------------------------------------------------------------------------


def run_side_by_side(runs: Mapping[str, TrainerConfig], *, workers: int, board: ProgressBoard) -> None:
    """Train every configuration in a process of its own, at most `workers` at once, in the given order.

    Raises RunFailed with the end of its log if a run fails; the others are stopped then.
    """
    for name, config in runs.items():
        config.validate()
        board.add(name, config.steps)
    done, total = dict.fromkeys(runs, 0), sum(config.steps for config in runs.values())
    if len(runs) > 1:
        board.add("all runs", total)
    waiting, complete = list(runs), 0
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                running[name] = _start(runs[name])
                board.starting(name)
            time.sleep(_POLL)
            for name in list(running):
                code = running[name].poll()
                done[name] = _show(name, runs[name], board)
                if code is None:
                    continue
                del running[name]
                complete += 1
                if code != 0:
                    tail = (runs[name].out / "run.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RunFailed(f"run {name}: expected exit code 0, got {code}; the end of its log:\n{tail}")
            steps = sum(done.values())
            if len(runs) > 1 and (0 < steps < total or complete == len(runs)):
                board.update("all runs", steps, total, f"{complete} of {len(runs)} complete")
    finally:
        _stop(list(running.values()))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes of runs: SIGTERM lets each finish its step and save it, as far as the time allows."""
    until = time.monotonic() + _GRACE
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:  # also when this process is stopped once more
        for process in processes:
            process.kill()
            process.wait()


def _start(config: TrainerConfig) -> subprocess.Popen[bytes]:
    config = dataclasses.replace(config, overwrite=not config.resume, progress=False)
    with locked(config.out):
        files = _place(config)
        if not config.resume:
            # an earlier run would be read as this one's progress until it starts
            checkpoint.remove_run(files)
        write_json(files.file("request.json"), config.to_dict())
        files.remove("run.log")
    with open(config.out / "run.log", "xb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "entropy_kernels.trainer", "from-config", str(config.out / "request.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            # a growing key-value cache leaves behind blocks that fit nothing else, and runs share a GPU
            env={
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                **os.environ,
                "OMP_NUM_THREADS": str(config.threads),
            },
        )


def _show(name: str, config: TrainerConfig, board: ProgressBoard) -> int:
    """A run's last row on the board; returns its step."""
    path = config.out / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    if not rows:
        return 0
    validated = [row for row in rows if "val_pass1" in row]
    done = int(rows[-1]["step"])
    board.update(name, done, config.steps, describe_row(rows[-1], validated[-1] if validated else None))
    return done


def complete(plan: Plan) -> str:
    """Which runs of a plan are complete in their directories, as the start of a sentence."""
    runs, todo = plan.runs, unfinished(plan.runs)
    begun = sum(config.resume for config in todo.values())
    partly = f", and {begun} with a checkpoint" if begun else ""
    return f"kept in {plan.flags.out}: {len(runs) - len(todo)} of {len(runs)} runs complete{partly}"


def unfinished(runs: Mapping[str, TrainerConfig]) -> dict[str, TrainerConfig]:
    """The runs that are not complete in their directories, to be continued where they left a checkpoint."""
    todo = {}
    for name, config in runs.items():
        same = _same_configuration(config)
        rows = read_rows(config.out / "metrics.jsonl") if same else []
        if not rows or rows[-1]["step"] != config.steps:
            todo[name] = dataclasses.replace(config, resume=same and (config.out / checkpoint.CHECKPOINT).exists())
    return todo


def _same_configuration(config: TrainerConfig) -> bool:
    """Whether the run in the directory of `config` was made under it."""
    saved, metrics = config.out / "config.json", config.out / "metrics.jsonl"
    if not (saved.exists() and metrics.exists()):
        return False
    start = None if config.warm_start_from is None else config.warm_start_from / checkpoint.STAMP
    if start is not None and start.exists() and start.stat().st_mtime_ns > saved.stat().st_mtime_ns:
        return False  # the run began at another one
    values, usual, ignored = fields_of(saved), TrainerConfig().to_dict(), {"overwrite", "progress", "resume"}
    return bool(values) and all(values.get(k, usual[k]) == v for k, v in config.to_dict().items() if k not in ignored)


def load_runs(directories: Mapping[str, Path]) -> dict[str, Any]:
    """Logs as DataFrames, one row per step."""
    import pandas as pd

    return {name: pd.DataFrame(read_rows(path / "metrics.jsonl")) for name, path in directories.items()}
