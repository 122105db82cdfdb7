"""What the runs of control.py show, as numbers: curves of reference, paired differences at equal entropy, set points.

A run's entropy is that of its last validation, on held-out prompts. It is held against curves of the same seed and
start, :data:`CURVES`, read where they have that entropy: between two points of a curve linearly, beyond its ends not at
all (:data:`SLACK` apart). A difference per seed, and Student's t interval over the seeds. Beside it stands the plain
difference to GRPO's end, after as many steps. control_report.py makes tables and pictures of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.seeds import t_interval, window_means
from entropy_kernels.trainer.schedule import Schedule

if TYPE_CHECKING:
    from benchmarks.control import Spec

#: column of a validation -> what it is called
METRICS = {"pass1": "pass@1", "pass8": "pass@8", "pass32": "pass@32", "distinct": "distinct right answers of 32"}
#: Nats beyond the end of a curve at which its end still counts.
SLACK = 0.01
#: Steps of a mean: the entropy of one rollout has a noise of 0.013 to 0.018 nats.
WINDOW = 8
#: What is asked of the 8-step means of H - target: on average, and at worst.
ON_AVERAGE, AT_WORST = 0.02, 0.04

Validation = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A run of the table that is there."""

    spec: Spec
    record: Mapping[str, Any]

    @property
    def validations(self) -> list[Validation]:
        """At the temperature of training, by step."""
        return [v for v in self.record["validations"] if v["temperature"] == self.spec.settings["temperature"]]

    @property
    def last(self) -> Validation:
        """The policy at the end."""
        return self.validations[-1]

    @property
    def touched(self) -> float:
        """Share of the tokens that the method treated, mean over steps."""
        return statistics.fmean(self.record["steps"]["touched"])


# --- at equal entropy -------------------------------------------------------------------------------------------------


def on_its_way(runs: Sequence[Run]) -> list[Validation]:
    """GRPO's policies from the start to the end."""
    return [v for run in runs if run.spec.name == "grpo" for v in run.validations]


def heated(runs: Sequence[Run]) -> list[Validation]:
    """GRPO's last policy at temperatures from that of training up."""
    return [
        v for run in runs if run.spec.name == "grpo" for v in run.record["validations"] if v["step"] == run.last["step"]
    ]


def clip_cov(runs: Sequence[Run]) -> list[Validation]:
    """Clip-Cov's last policies at its strengths."""
    return [run.last for run in runs if run.spec.name == "clip_cov"]


#: The curves that methods are held against, made of the runs of one seed.
ON_THE_WAY = "GRPO on its way"
CURVES: dict[str, Callable[[Sequence[Run]], list[Validation]]] = {
    ON_THE_WAY: on_its_way,
    "GRPO heated": heated,
    "Clip-Cov": clip_cov,
}


def read_at(curve: Sequence[Validation], entropy: float, metric: str) -> float | None:
    """A metric of a curve where it has an entropy; None where it does not reach it."""
    points = sorted((point["entropy"], point[metric]) for point in curve)
    if len(points) < 2 or not points[0][0] - SLACK <= entropy <= points[-1][0] + SLACK:
        return None
    entropies, values = zip(*points, strict=True)
    return float(np.interp(entropy, entropies, values))


@dataclass(frozen=True)
class Interval:
    """Mean and t interval of 95 % of one value per seed; NaN without or with one."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        if self.seeds == 1:
            return f"{self.mean:+.3f} (1 seed)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Of a value per seed."""
    return Interval(*t_interval(values), len(values))


def by_seed(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """Runs of each seed."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.spec.seed, []).append(run)
    return found


@dataclass(frozen=True)
class Beside:
    """The runs of a method, or of one of its strengths, that a curve can be read beside: of a strength all or none."""

    runs: list[Run]
    curves: dict[int, list[Validation]]  # of each seed

    def read(self, run: Run, metric: str) -> float:
        """The curve's metric at the entropy of a run."""
        value = read_at(self.curves[run.spec.seed], run.last["entropy"], metric)
        assert value is not None
        return value

    def differences(self, metric: str) -> list[float]:
        """Of each seed: the runs' metric minus the curve's, mean over strengths."""
        per_seed = by_seed(self.runs).values()
        return [statistics.fmean(run.last[metric] - self.read(run, metric) for run in mine) for mine in per_seed]

    @property
    def strengths(self) -> list[str]:
        """Of these runs."""
        return list(dict.fromkeys(run.spec.strength for run in self.runs))


def beside(runs: Sequence[Run], curve: str, name: str, strength: str | None = None) -> Beside:
    """What of a method stands beside a curve; without a strength all of them."""
    curves = {seed: CURVES[curve](mine) for seed, mine in by_seed(runs).items()}
    mine = [run for run in runs if run.spec.name == name and strength in (None, run.spec.strength)]
    outside = {
        run.spec.strength for run in mine if read_at(curves[run.spec.seed], run.last["entropy"], "entropy") is None
    }
    return Beside([run for run in mine if run.spec.strength not in outside], curves)


def after_as_many_steps(runs: Sequence[Run], metric: str, name: str, strength: str) -> list[float]:
    """A metric at the end of a method's run minus that at the end of GRPO's, for each seed."""
    grpo = {run.spec.seed: run.last[metric] for run in runs if run.spec.name == "grpo"}
    mine = [run for run in runs if (run.spec.name, run.spec.strength) == (name, strength)]
    return [run.last[metric] - grpo[run.spec.seed] for run in mine if run.spec.seed in grpo]


# --- the closed loop --------------------------------------------------------------------------------------------------


def targets(run: Run) -> np.ndarray:
    """The target of each step, and at the end."""
    at = Schedule.parse("target_entropy", run.spec.settings["target_entropy"])
    return np.array([at(step) for step in range(run.spec.settings["steps"] + 1)])


def errors(run: Run) -> np.ndarray:
    """H - target of each rollout."""
    entropy = np.array(run.record["steps"]["entropy"])
    return entropy - targets(run)[: len(entropy)]


def second_half(values: np.ndarray) -> np.ndarray:
    """Of the steps of a run."""
    return values[len(values) // 2 :]


def judged(run: Run) -> np.ndarray:
    """What is asked to be small: means of :data:`WINDOW` steps of H - target over the second half."""
    return window_means(second_half(errors(run)), WINDOW)


def noise(run: Run) -> float:
    """The mean size that :func:`judged` would have if H were on its target and only the rollouts' noise were left.

    Noise of a rollout, with which the loop has nothing to do: from the differences of neighbouring steps. The mean size
    of a normal variable is sqrt(2/pi) of its standard deviation.
    """
    one = np.diff(second_half(errors(run))).std() / math.sqrt(2)
    return float(one) / math.sqrt(WINDOW) * math.sqrt(2 / math.pi)


def limits(run: Run) -> tuple[float, float]:
    """Shares of the second half's steps that asked for more, and for less, entropy than the step could give."""
    saturated = second_half(np.array(run.record["steps"]["saturated"]))
    return float((saturated > 0).mean()), float((saturated < 0).mean())


def moved(runs: Sequence[Run], name: str, base: tuple[str, str, str], metric: str) -> list[float]:
    """Of each seed, what a disturbance changed: mean H of the last quarter of the rollouts, or a metric at the end."""

    def of(run: Run) -> float:
        entropy = run.record["steps"]["entropy"]
        return statistics.fmean(entropy[-len(entropy) // 4 :]) if metric == "entropy" else run.last[metric]

    undisturbed = {run.spec.seed: of(run) for run in runs if (run.spec.part, run.spec.name, run.spec.strength) == base}
    mine = [run for run in runs if run.spec.part == "loop" and run.spec.name == name]
    return [of(run) - undisturbed[run.spec.seed] for run in mine if run.spec.seed in undisturbed]
