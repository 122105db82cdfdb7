"""What the runs of control.py show: curves of reference, paired differences at equal entropy, set points; report.md.

A run's entropy is that of its last validation, on held-out prompts. It is held against curves of the same seed and
start, :data:`CURVES`, read where they have that entropy: between two points of a curve linearly, beyond its ends not at
all (:data:`SLACK` apart). A difference per seed, and Student's t interval over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.plots import save
from benchmarks.seeds import markdown, t_interval, window_means
from entropy_kernels.analysis import plot_style as style
from entropy_kernels.trainer.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.control import Loop, Method, Spec

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
CURVES: dict[str, Callable[[Sequence[Run]], list[Validation]]] = {
    "GRPO on its way": on_its_way,
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


def differences(runs: Sequence[Run], curve: str, metric: str, name: str, strength: str | None = None) -> list[float]:
    """A method's metric minus that of a curve of its seed at its entropy: a number for each seed that has one.

    Without a strength the mean over those that the seed has.
    """
    found = []
    for mine in by_seed(runs).values():
        points = CURVES[curve](mine)
        values = [
            run.last[metric] - other
            for run in mine
            if run.spec.name == name and strength in (None, run.spec.strength)
            for other in [read_at(points, run.last["entropy"], metric)]
            if other is not None
        ]
        if values:
            found.append(statistics.fmean(values))
    return found


# --- the closed loop --------------------------------------------------------------------------------------------------


def targets(run: Run) -> np.ndarray:
    """The target of each step."""
    at = Schedule.parse("target_entropy", run.spec.settings["target_entropy"])
    return np.array([at(step) for step in range(len(run.record["steps"]["entropy"]))])


def errors(run: Run) -> np.ndarray:
    """H - target of each step, as means of :data:`WINDOW` steps, over the second half."""
    wrong = np.array(run.record["steps"]["entropy"]) - targets(run)
    return window_means(wrong[len(wrong) // 2 :], WINDOW)


# --- report.md --------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _cells(runs: Sequence[Run], methods: Mapping[str, Method]) -> dict[tuple[str, str], list[Run]]:
    """Runs of each method and strength that is there, in the order of the table."""
    found: dict[tuple[str, str], list[Run]]
    found = {(name, str(strength)): [] for name, method in methods.items() for strength in method.strengths}
    for run in runs:
        found[run.spec.name, run.spec.strength].append(run)
    return {cell: mine for cell, mine in found.items() if mine}


def ends_table(runs: Sequence[Run], methods: Mapping[str, Method]) -> str:
    """Where every method ends."""
    rows = []
    for (name, strength), mine in _cells(runs, methods).items():
        cells = [_spread([run.last[column] for run in mine]) for column in ("entropy", *METRICS)]
        touched = 100 * statistics.fmean(run.touched for run in mine)
        rows.append([methods[name].label, strength, f"{len(mine)}", *cells, f"{touched:.2f} %" if touched else ""])
    return markdown(["method", "strength", "seeds", "entropy", *METRICS.values(), "tokens touched"], rows)


def differences_table(runs: Sequence[Run], methods: Mapping[str, Method], curve: str, *, by_strength: bool) -> str:
    """Paired differences to a curve: a row per method, or per strength."""
    rows = []
    for name, strength in _cells(runs, methods) if by_strength else [(name, None) for name in methods]:
        if name == "grpo" or methods[name].label == curve:
            continue
        found = [interval(differences(runs, curve, metric, name, strength)) for metric in METRICS]
        if any(run.spec.name == name for run in runs):
            cells = [methods[name].label, *([strength] if strength is not None else []), f"{found[0].seeds}"]
            rows.append([*cells, *map(str, found)])
    return markdown(["method", *(["strength"] if by_strength else []), "seeds", *METRICS.values()], rows)


def _actuator(run: Run) -> tuple[float, float]:
    """Share of the tokens touched, and of the steps in which no control would have held the entropy high enough."""
    saturated = run.record["steps"]["saturated"]
    return run.touched, statistics.fmean(value > 0 for value in saturated)


def loop_table(runs: Sequence[Run], loops: Mapping[str, Loop]) -> str:
    """How well each target is held, and what comes of it."""
    rows = []
    for name, loop in loops.items():
        mine = [run for run in runs if run.spec.name == name]
        if not mine:
            continue
        means = [float(np.abs(errors(run)).mean()) for run in mine]
        worst = [float(np.abs(errors(run)).max()) for run in mine]
        held = sum(m <= ON_AVERAGE and w <= AT_WORST for m, w in zip(means, worst, strict=True))
        cells = [_spread([run.last[column] for run in mine]) for column in ("entropy", "pass1", "pass8")]
        shares = [100 * statistics.fmean(values) for values in zip(*map(_actuator, mine), strict=True)]
        held_in = f"{held} of {len(mine)}"
        rows.append([loop.label, _spread(means), f"{max(worst):.3f}", held_in, *cells, *(f"{s:.1f} %" for s in shares)])
    header = [
        "run",
        "mean",
        "worst",
        "held in",
        "entropy at the end",
        "pass@1",
        "pass@8",
        "tokens touched",
        "at its limit",
    ]
    return markdown(header, rows)


def _origin(runs: Sequence[Run]) -> str:
    """Machines, versions and commits of the runs."""
    said = []
    for label, of in (
        ("machine", lambda record: record["machine"]),
        ("commit", lambda record: str(record["commit"])[:10] + (" (changed)" if record["dirty"] else "")),
        ("versions", lambda record: ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
    ):
        values = list(dict.fromkeys(of(run.record) for run in runs))
        said.append(f"{label}{'s' * (len(values) > 1 and label != 'versions')}: {'; '.join(values)}")
    hours = sum({run.spec.key: run.record["cpu_seconds"] for run in runs}.values()) / 3600
    return "; ".join(said) + f"; one thread per run, {hours:.1f} hours of CPU in all"


def write_report(
    out: Path,
    specs: Sequence[Spec],
    records: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, Method],
    loops: Mapping[str, Loop],
    *,
    quick: bool = False,
) -> Path:
    """report.md and its pictures, from the runs that are there; returns the report's path."""
    runs = [Run(spec, records[spec.key]) for spec in specs if spec.key in records]
    if not runs:
        raise FileNotFoundError(f"out: expected runs in {out}, got none; run python -m benchmarks.control first")
    equal, loop = ([run for run in runs if run.spec.part == part] for part in ("equal", "loop"))
    there, asked = ({spec.key for spec in of} for of in ([run.spec for run in runs], specs))
    missing = len(asked) - len(there)
    parts = ["# Control: what it is worth at equal entropy, and how well a set point holds"]
    if quick:
        parts.append("**A rehearsal** with few steps, seeds and prompts: it shows that all works, and no result.")
    parts.append(
        f"{len(there)} of {len(asked)} runs"
        + (f"; **{missing} are missing**, so rows have fewer seeds or strengths than planned." if missing else ".")
        + f" `python -m benchmarks.control`; {_origin(runs)}."
    )
    out.mkdir(parents=True, exist_ok=True)
    if equal:
        save(frontier_figure(equal, methods), out / "entropy.png")
        save(differences_figure(equal, methods), out / "differences.png")
        parts += _equal_parts(equal, methods)
    if loop:
        save(loop_figure(loop, loops), out / "loop.png")
        parts += [
            "## A set point",
            f"Means of {WINDOW} steps of H - target over the second half of a run: their mean size, the largest of all "
            f"seeds, and in how many seeds they are within {ON_AVERAGE} on average and {AT_WORST} at worst. At its "
            "limit: share of all steps in which no control that the method can give would have raised the entropy "
            "enough. The target is for the tokens of the rollouts; entropy and pass@k at the end are those of held-out "
            "prompts, where it differs a little.",
            loop_table(loop, loops),
            "![entropy under a target](loop.png)",
        ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _equal_parts(runs: Sequence[Run], methods: Mapping[str, Method]) -> list[str]:
    parts = [
        "## At equal entropy",
        "Where each method ends, mean ± standard deviation over seeds with a supervised start each:",
        ends_table(runs, methods),
        "![pass@k and distinct answers against entropy](entropy.png)",
        "### Paired differences",
        "The method minus a curve of the same seed and start at the same entropy: a mean over the method's strengths "
        "for each seed, then mean and t interval of 95 % over seeds. Entropies that a curve does not reach are left "
        "out. GRPO has an entropy on its way after fewer steps than the method; heated it has had as many. Intervals "
        "are for one comparison each: of twenty without any effect, one misses zero. Clip-Cov makes its curve itself: "
        "it has no row there.",
    ]
    for curve in CURVES:
        parts += [f"**Against {curve}**", differences_table(runs, methods, curve, by_strength=False)]
    parts.append("![paired differences](differences.png)")
    for curve in CURVES:
        parts += [
            f"<details><summary>Each strength against {curve}</summary>",
            differences_table(runs, methods, curve, by_strength=True),
            "</details>",
        ]
    return parts


# --- pictures ---------------------------------------------------------------------------------------------------------

_MARKERS = "osD^vP*XhdpH<>"


def _mean_curve(runs: Sequence[Run], curve: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A curve's mean over seeds, on the entropies that it reaches in all of them."""
    points = [CURVES[curve](mine) for mine in by_seed(runs).values()]
    points = [found for found in points if len(found) > 1]
    if not points:
        return np.empty(0), np.empty(0)
    low = max(min(point["entropy"] for point in found) for found in points)
    high = min(max(point["entropy"] for point in found) for found in points)
    grid = np.linspace(low, high, 60) if low < high else np.empty(0)
    values = [[read_at(found, h, metric) for h in grid] for found in points]
    return grid, np.mean(np.array(values, float), axis=0)


def frontier_figure(runs: Sequence[Run], methods: Mapping[str, Method]) -> Figure:
    """A panel per metric: the ends of methods against entropy, strengths joined, and GRPO's curves."""
    names = [name for name in methods if any(run.spec.name == name for run in runs)]
    looks = style.styles([methods[name].label for name in names])
    fig, axes = style.figure(2, 2, (11.5, 9.6))
    right = max(point["entropy"] for run in runs for point in run.validations)
    for ax, (metric, label) in zip(axes.flat, METRICS.items(), strict=True):
        for curve, dashes in (("GRPO on its way", "-"), ("GRPO heated", (0, (2, 2)))):
            x, y = _mean_curve(runs, curve, metric)
            ax.plot(
                x[x <= right], y[x <= right], color=style.MUTED, linewidth=5 if dashes == "-" else 2.2,
                alpha=0.45 if dashes == "-" else 0.9, linestyle=dashes, label=curve, zorder=1,
            )  # fmt: skip
        for marker, name in zip(_MARKERS, names, strict=False):
            mine = [cell for (of, _), cell in _cells(runs, methods).items() if of == name]
            ends = [[statistics.fmean(run.last[of] for run in cell) for cell in mine] for of in ("entropy", metric)]
            line = {**looks[methods[name].label].line(), "linewidth": 1.2, "label": methods[name].label}
            ax.plot(*ends, marker=marker, markersize=6, zorder=3, **line)
        ax.set(xlabel="policy entropy H (nats per token)", ylabel=label)
        ax.set_xlim(0, 1.05 * right)
        style.title(ax, label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    style.legend(fig, handles=handles, labels=labels, loc="outside lower center", ncols=5)
    return fig


def differences_figure(runs: Sequence[Run], methods: Mapping[str, Method]) -> Figure:
    """A panel per curve and metric: the paired difference of each method with its t interval."""
    names = [name for name in methods if name != "grpo" and any(run.spec.name == name for run in runs)]
    looks = style.styles([methods[name].label for name in names])
    fig, axes = style.figure(
        len(CURVES), len(METRICS), (13.5, 1.1 + len(CURVES) * (0.9 + 0.24 * len(names))), sharey=True
    )
    for row, curve in zip(axes, CURVES, strict=True):
        for ax, (metric, label) in zip(row, METRICS.items(), strict=True):
            ax.axvline(0, color=style.MUTED, linewidth=1.0)
            for y, name in enumerate(names):
                if methods[name].label == curve:
                    continue
                found = interval(differences(runs, curve, metric, name))
                reach = None if found.seeds < 2 else [[found.mean - found.low], [found.high - found.mean]]
                ax.errorbar(
                    [found.mean], [y], xerr=reach, fmt="o", color=looks[methods[name].label].color, markersize=5,
                    capsize=3, linewidth=1.6,
                )  # fmt: skip
            ax.locator_params(axis="x", nbins=4)
            style.title(ax, label, f"minus {curve}")
        row[0].set_yticks(range(len(names)), [methods[name].label for name in names])
        row[0].set_ylim(len(names) - 0.5, -0.5)
    return fig


def loop_figure(runs: Sequence[Run], loops: Mapping[str, Loop]) -> Figure:
    """A panel per row of the table: the entropy of each seed, and the target."""
    names = [name for name in loops if any(run.spec.name == name for run in runs)]
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    fig, axes = style.figure(lines, columns, (3.4 * columns, 2.7 * lines))
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        mine = [run for run in runs if run.spec.name == name]
        _course(ax, mine)
        style.title(ax, loops[name].label, f"{len(mine)} seed{'s' * (len(mine) > 1)}, means of {WINDOW} steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("entropy (nats)")
    return fig


def _course(ax: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        entropy = run.record["steps"]["entropy"]
        smooth = window_means(entropy, WINDOW)
        ax.plot(np.arange(len(smooth)) + (WINDOW - 1) / 2, smooth, color="#0072b2", linewidth=1.1, alpha=0.7)
    ax.plot(targets(runs[0]), color="#d55e00", linewidth=1.4, linestyle=(0, (4, 2)))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
