"""What quickstart and reproduce share: one warm start for all runs, and runs side by side in processes of their own."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entropy_kernels.trainer.config import TrainerConfig, as_saved
from entropy_kernels.trainer.files import OwnFiles, locked, read_json, write_json
from entropy_kernels.trainer.metrics_log import read_rows
from entropy_kernels.trainer.policy import build_policy, load_policy
from entropy_kernels.trainer.pretrained import check_model
from entropy_kernels.trainer.progress import ProgressBoard, describe_row
from entropy_kernels.trainer.run_folder import (
    DRIVER_FILES,
    RUN_FILES,
    STAMP,
    model_files,
    own_files,
    remove_run,
    report_files,
)
from entropy_kernels.trainer.tasks import make_task
from entropy_kernels.trainer.warm_start import warm_start

#: Seconds between looks at the logs of running processes.
_POLL = 0.5
#: Of float64 logits in the experiment with logits as parameters, which holds a few such tensors.
_EXPERIMENT_BYTES = 512 << 20


class RunFailed(RuntimeError):
    """A run of several ended with an error, which its log has told."""


def shared_warm_start(config: TrainerConfig, directory: Path, board: ProgressBoard) -> Path:
    """The model that all runs start from, saved in `directory`; one made earlier under the same settings is kept."""
    key = {**config.warm_start_key(), "threads": config.threads, "torch": torch.__version__}
    with locked(directory, "out"):
        files = model_files(directory)
        files.tidy()
        if _is_kept(directory, key):
            board.say(f"warm start: kept from {directory}")
            return directory
        torch.set_num_threads(config.threads)
        task = make_task(config.task, max_new_tokens=config.max_new_tokens)
        policy = build_policy(config, task)

        def on_step(step: int, loss: float) -> None:
            board.update("warm start", step, config.warm_steps, f"loss {loss:.3f}")

        if config.warm_steps:
            warm_start(policy, task, config, on_step=on_step)
        files.remove(STAMP)
        policy.write(files)
        # the stamp comes last: without it the directory is made anew
        write_json(files.file(STAMP), key)
    del policy
    _leave_gpu()  # to the runs
    return directory


def _is_kept(directory: Path, key: dict[str, Any]) -> bool:
    """Whether a directory holds the warm start of these settings, whole."""
    try:
        check_model(str(directory.absolute()))
        return read_json(directory / STAMP) == key
    except (OSError, ValueError):
        return False


def _leave_gpu() -> None:
    """Give cached memory back: other processes cannot have it otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_side_by_side(runs: dict[str, TrainerConfig], *, workers: int, board: ProgressBoard) -> None:
    """Train every configuration in a process of its own, at most `workers` at once, in the given order.

    Raises RunFailed with the end of its log if a run fails; the others are stopped then.
    """
    for name, config in runs.items():
        config.validate()
        board.add(name, config.steps)
    waiting = list(runs)
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                running[name] = _start(runs[name])
            time.sleep(_POLL)
            for name in list(running):
                code = running[name].poll()
                _show(name, runs[name], board)
                if code is None:
                    continue
                del running[name]
                if code != 0:
                    tail = (runs[name].out / "run.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RunFailed(f"run {name}: expected exit code 0, got {code}; the end of its log:\n{tail}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


@contextmanager
def experiment(out: Path, command: str, runs: Mapping[str, TrainerConfig], *reports: str) -> Iterator[None]:
    """Within: `out` is this command's, with its `reports` and the directories of its `runs`.

    Raises before anything is written, if another process is at work there or files of the user's are in the way. Also
    FileExistsError: a directory holds another command's files, or a run that was started by itself.
    """
    with locked(out):
        report_files(out, command, *reports)
        for config in runs.values():
            if config.out.exists():
                with locked(config.out):
                    _place(config)
        yield


def _place(config: TrainerConfig) -> OwnFiles:
    """The files of a run that is to be started; FileExistsError for a run there that no driver has started."""
    files = own_files(config.out, *RUN_FILES)
    if not config.resume and files.has("metrics.jsonl") and not files.has("request.json"):
        raise FileExistsError(
            f"out: expected in {config.out} no run, or one of an earlier call, got one that was started by itself; "
            "move it away or choose another --out"
        )
    files.claim(*DRIVER_FILES)
    return files


def _start(config: TrainerConfig) -> subprocess.Popen[bytes]:
    config = dataclasses.replace(config, overwrite=not config.resume, progress=False)
    with locked(config.out):
        files = _place(config)
        if not config.resume:
            # an earlier run would be read as this one's progress until it starts
            remove_run(files)
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


def _show(name: str, config: TrainerConfig, board: ProgressBoard) -> None:
    path = config.out / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    if rows:
        validated = [row for row in rows if "val_pass1" in row]
        note = describe_row({**(validated[-1] if validated else {}), **rows[-1]})
        board.update(name, min(len(rows), config.steps), config.steps, note)


def unfinished(runs: dict[str, TrainerConfig]) -> dict[str, TrainerConfig]:
    """The runs that are not complete in their directories, to be continued where they have a checkpoint."""
    waiting = {name: config for name, config in runs.items() if not _complete(config)}
    return {name: dataclasses.replace(config, resume=_continuable(config)) for name, config in waiting.items()}


def _continuable(config: TrainerConfig) -> bool:
    """Whether a run of exactly this configuration left a checkpoint in its directory."""
    return _same_configuration(config) and (config.out / "checkpoint.pt").exists()


def _complete(config: TrainerConfig) -> bool:
    """Whether a run of exactly this configuration has finished in its directory."""
    if not _same_configuration(config):
        return False
    rows = read_rows(config.out / "metrics.jsonl")
    return bool(rows) and rows[-1]["step"] == config.steps


def _same_configuration(config: TrainerConfig) -> bool:
    """Whether the run in the directory of `config` was made under it."""
    saved, metrics = config.out / "config.json", config.out / "metrics.jsonl"
    if not (saved.exists() and metrics.exists()):
        return False
    start = None if config.warm_start_from is None else config.warm_start_from / STAMP
    if start is not None and start.exists() and start.stat().st_mtime_ns > saved.stat().st_mtime_ns:
        return False  # the run began at another one
    try:
        values = as_saved(read_json(saved))
    except (ValueError, TypeError):
        return False
    ignored = {"overwrite", "progress", "resume"}
    return all(values.get(k) == v for k, v in config.to_dict().items() if k not in ignored)


def start_experiment(config: TrainerConfig, directory: Path) -> dict[str, list[float]]:
    """Measured and predicted entropy change with the logits of the start as parameters; see `logits_as_parameters`."""
    from entropy_kernels.trainer.entropy_change import logits_as_parameters
    from entropy_kernels.trainer.rollout import collect

    torch.set_num_threads(config.threads)
    task = make_task(config.task, max_new_tokens=config.max_new_tokens)
    policy = load_policy(directory, config, task)
    task.partial_credit = config.partial_credit
    sampler = torch.Generator(policy.device).manual_seed(config.seed)
    rollout = collect(policy, task, config, step=0, generator=sampler)
    row = 8 * rollout.ids.shape[1] * policy.model.config.vocab_size  # bytes of its logits
    rows = max(1, min(128, _EXPERIMENT_BYTES // row))
    return logits_as_parameters(policy, rollout, temperature=config.temperature, rows=rows)


def load_runs(directories: dict[str, Path]) -> dict[str, Any]:
    """Logs as DataFrames, one row per step."""
    import pandas as pd

    return {name: pd.DataFrame(read_rows(path / "metrics.jsonl")) for name, path in directories.items()}
