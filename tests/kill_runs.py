"""Runs that are killed (kill -9) at random moments, each a fork of this process, which has everything imported.

``python kill_runs.py FOLDER SEED KILLS`` prints what came of them as JSON; test_trainer_stops.py judges it. A moment is
either the n-th thing that the run asks of the file system (opening, renaming, removing: between any two steps of
writing a checkpoint, the log or the model), or a time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from entropy_kernels.trainer import checkpoint, ppo
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.start import build_policy
from trainer_setup import SHORT, EasyTask, config

SETTINGS = {**SHORT, "steps": 3, "save_every": 1, "eval_every": 1, "method": "adaptive_entropy"}
#: Audit events of a process's dealings with files, and what these are called, "" for any.
EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
FILES = ("checkpoint.safetensors", "metrics.jsonl", "model/", "")
_seen = dict.fromkeys(FILES, 0)
_last = ["", -1]  # which file, and its how manieth event is the process's last


def watch(event: str, args: tuple[object, ...]) -> None:
    """The audit hook: a process dies at its n-th event."""
    if event in EVENTS:
        for name in FILES:
            if any(name in str(arg) for arg in args):
                _seen[name] += 1
                if [name, _seen[name]] == _last:
                    os.kill(os.getpid(), signal.SIGKILL)


def forked(run: Callable[[], object], *, seconds: float | None = None) -> int:
    """What became of `run` in a process of its own, which is killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # one that has ended is there until it is waited for
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def train(out: Path, name: str = "", until: int = -1) -> None:
    """As a user goes on: from the checkpoint if there is one, else anew."""
    _seen.update(dict.fromkeys(FILES, 0))
    _last[:] = name, until
    goes_on = (out / checkpoint.CHECKPOINT).exists()
    ppo.train(config(out, **SETTINGS, resume=goes_on, overwrite=not goes_on))


def main(folder: Path, seed: int, kills: int) -> dict[str, object]:
    torch.set_num_threads(1)
    ppo.make_task = lambda name, max_new_tokens=None: EasyTask()  # type: ignore[assignment]
    build_policy(TrainerConfig(), EasyTask())  # imports what is imported late
    sys.addaudithook(watch)
    draw, out, codes, moments, started = random.Random(seed), folder / "killed", [], [], time.monotonic()
    whole = forked(lambda: (train(folder / "whole"), (folder / "events").write_text(json.dumps(_seen))))
    seconds = time.monotonic() - started
    events = json.loads((folder / "events").read_text())
    finished = 0
    while len(moments) < kills:
        # most moments are early: a run that goes on has less to do each time
        moment = draw.random() * (1 if len(moments) % 4 == 0 else 0.4)
        if draw.random() < 0.7:
            name = draw.choice(FILES)
            code = forked(partial(train, out, name, 1 + int(moment * events[name])))
        else:
            code = forked(partial(train, out), seconds=moment * seconds)
        codes.append(code)
        if code == -signal.SIGKILL:
            moments.append(moment)
        elif code == 0:
            finished += 1
            out = folder / f"killed{finished}"
        else:
            break
    codes.append(forked(lambda: train(out)))
    runs = [folder / "killed", *(folder / f"killed{n + 1}" for n in range(finished))]
    return {"whole": whole, "codes": codes, "runs": [str(path) for path in runs if path.exists()]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
