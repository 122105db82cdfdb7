"""Where the rows of the log go beside metrics.jsonl: TensorBoard, wandb, trackio.

None of them is needed for the run: one that cannot begin is an error before any training, one that fails later is told
once, and metrics.jsonl has all rows. What wandb and trackio write is theirs and is never deleted from here.
"""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from entropy_kernels._console import one_line
from entropy_kernels._require import require, require_installed
from entropy_kernels.trainer.files import OwnFiles, fields_of

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig

#: What the configuration's `trackers` may name; TensorBoard has a field of its own.
SERVICES = ("wandb", "trackio")
#: Of all runs, where the service's own variable (WANDB_PROJECT, TRACKIO_PROJECT) names no other.
PROJECT = "entropy_kernels"


@dataclass
class Tracker:
    """One that has begun: what takes a step's scalars, and what ends it, with whether the run has failed."""

    name: str
    log: Callable[[dict[str, float], int], object]
    finish: Callable[[bool], object]
    sent: Mapping[int, Collection[str]] = field(default_factory=dict)  # step -> names that it has, of an earlier part
    _told: bool = field(default=False, init=False)

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of the log."""
        step, values = row["step"], scalars(row)
        new = {name: value for name, value in values.items() if name not in self.sent.get(step, ())}
        if new or step not in self.sent:
            self._contained(lambda: self.log(new, step), f"the row of step {step}")

    def close(self, failed: bool) -> None:
        """End it, whatever is left to send sent."""
        self._contained(lambda: self.finish(failed), "the end of the run")

    def _contained(self, call: Callable[[], object], what: str) -> None:
        try:
            call()
        except Exception as error:
            if not self._told:
                reason = one_line(error, 200)
                warnings.warn(
                    f"{self.name} did not take {what} ({reason}); the run goes on, and metrics.jsonl has everything",
                    stacklevel=4,
                )
            self._told = True


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that are finite, by the names under which dashboards have them."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


class Trackers:
    """Those that a configuration asks for: a context, which ends them.

    ImportError, with what to install, for one whose package is not there.
    """

    def __init__(self, config: TrainerConfig) -> None:
        if config.tensorboard:
            require_installed(("tensorboard",), "tensorboard = True (off: --no-tensorboard)", "train")
        for name in config.trackers:
            require_installed((name,), f"trackers = {name}", "trackers")
        self._config = config
        self._begun: list[Tracker] = []
        #: Of the run, for a service that tells runs apart by more than their names; kept in config.json.
        self.run_id: str | None = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for tracker in self._begun:
            tracker.close(kind is not None)
        self._begun.clear()

    def begin(self, *, goes_on: bool) -> None:
        """Begin the services' runs; `goes_on`: the run is the one that the directory holds, not another experiment."""
        if not self._config.trackers:
            return
        before = fields_of(self._config.out / "config.json") if goes_on else {}
        known, had = before.get("run_id"), before.get("trackers")
        self.run_id = known if isinstance(known, str) and known.isalnum() else secrets.token_hex(4)
        for name in self._config.trackers:
            tracker = _begin(name, self._config, self.run_id, resumed=goes_on)
            if isinstance(had, list) and name in had:  # the log has rows beyond the checkpoint yet
                tracker.sent = _sent(self._config.out / "metrics.jsonl")
            self._begun.append(tracker)

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of the log, to all. TensorBoard begins with the first, when its folder is no earlier run's any more."""
        if self._config.tensorboard and not any(tracker.name == "tensorboard" for tracker in self._begun):
            self._begun.append(_tensorboard(self._config, first=row["step"]))
        for tracker in self._begun:
            tracker.write(row)


def _sent(log: Path) -> dict[int, Collection[str]]:
    from entropy_kernels.trainer.log import read_rows

    return {row["step"]: scalars(row).keys() for row in read_rows(log)} if log.exists() else {}


def _begin(name: str, config: TrainerConfig, run_id: str, *, resumed: bool) -> Tracker:
    """ValueError for a service that does not begin."""
    module: Any = require(name, f"trackers = {name}", "trackers")
    wandb = name == "wandb"
    about: dict[str, Any] = {
        "project": os.environ.get(f"{name.upper()}_PROJECT") or PROJECT,
        "name": config.out.absolute().name,
        "config": config.to_dict(),
        "resume": "allow" if resumed or wandb else "never",
    }
    if wandb:  # trackio knows runs by their names alone, and has one folder for all
        about |= {"id": run_id, "dir": str(config.out), "settings": {"console": "off"}}
    try:
        run = module.init(**about)
    except Exception as error:
        reason = one_line(error, 300)
        way_out = "set WANDB_MODE=offline to log without its server, or leave it out" if wandb else "leave it out"
        raise ValueError(f"trackers: expected {name} to begin a run, got an error ({reason}); {way_out}") from error

    def finish(failed: bool) -> None:
        if wandb:
            run.finish(exit_code=int(failed))
        else:
            module.finish()  # a run's own leaves it the current one, to be finished once more

    return Tracker(name, lambda values, step: run.log(values, step=step), finish)


def _tensorboard(config: TrainerConfig, *, first: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    directory = config.out / "tensorboard"
    files = OwnFiles(directory, "tensorboard", alone=True)
    before = set(directory.iterdir())
    writer = SummaryWriter(str(directory), purge_step=first)
    files.adopt(*(path.name for path in set(directory.iterdir()) - before))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", log, lambda failed: writer.close())
