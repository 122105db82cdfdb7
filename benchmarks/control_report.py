"""report.md of control.py, and its pictures: control_numbers.py says what the numbers are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.control_numbers import (
    AT_WORST,
    CURVES,
    METRICS,
    ON_AVERAGE,
    ON_THE_WAY,
    SLACK,
    WINDOW,
    Run,
    after_as_many_steps,
    beside,
    by_seed,
    errors,
    heated,
    interval,
    judged,
    limits,
    moved,
    noise,
    targets,
)
from benchmarks.plots import save
from benchmarks.seeds import holm, markdown, window_means
from entropy_kernels.analysis import plot_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.control import Loop, Method, Spec


@dataclass(frozen=True)
class Experiment:
    """The table of runs, and the records of those that are there."""

    specs: Sequence[Spec]
    records: Mapping[str, Mapping[str, Any]]  # by key
    methods: Mapping[str, Method]
    loops: Mapping[str, Loop]
    without: str  # what the runs without feedback are

    def runs(self, *parts: str) -> list[Run]:
        """Those that are there, of one part after the other."""
        there = [spec for part in parts for spec in self.specs if spec.part == part and spec.key in self.records]
        return [Run(spec, self.records[spec.key]) for spec in there]


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
    """Where every method ends, and GRPO's policy at other temperatures."""
    columns, rows = ("entropy", *METRICS), []
    for (name, strength), mine in _cells(runs, methods).items():
        cells = [_spread([run.last[column] for run in mine]) for column in columns]
        touched = 100 * statistics.fmean(run.touched for run in mine)
        rows.append([methods[name].label, strength, f"{len(mine)}", *cells, f"{touched:.2f} %" if touched else ""])
        if name == "grpo":
            ends = [heated([run]) for run in mine]
            for points in zip(*ends, strict=True):
                if (t := points[0]["temperature"]) != mine[0].spec.settings["temperature"]:
                    cells = [_spread([point[column] for point in points]) for column in columns]
                    rows.append([f"GRPO heated to T {t:g}", "", f"{len(points)}", *cells, ""])
    return markdown(["method", "strength", "seeds", "entropy", *METRICS.values(), "tokens touched"], rows)


_Row = tuple[list[str], list[list[float]]]  # its first cells, and of each further column a value per seed


def _table(header: Sequence[str], rows: Sequence[_Row], *, mark: bool) -> str:
    """Of intervals, those in bold that Holm's correction leaves, if asked for."""
    kept = iter(holm([sample for _, samples in rows for sample in samples])) if mark else None
    text = []
    for cells, samples in rows:
        found = [str(interval(sample)) for sample in samples]
        text.append([*cells, *(f"**{one}**" if kept is not None and next(kept) else one for one in found)])
    return markdown(header, text)


def differences_table(runs: Sequence[Run], methods: Mapping[str, Method], curve: str, *, by_strength: bool) -> str:
    """Paired differences to a curve at equal entropy: a row per method, or per strength."""
    on_the_way = curve == ON_THE_WAY
    rows: list[_Row] = []
    there = _cells(runs, methods)
    for name, strength in there if by_strength else [(name, None) for name in methods]:
        if name == "grpo" or methods[name].label == curve or not any(run.spec.name == name for run in runs):
            continue
        found = beside(runs, curve, name, strength)
        strengths = [own for of, own in there if of == name]
        cells = [methods[name].label, strength or f"{len(found.strengths)} of {len(strengths)}"]
        if not found.runs:
            rows.append(([*cells, "", "not on the curve", *([""] if on_the_way else [])], [[]] * len(METRICS)))
            continue
        means = [
            statistics.fmean(r.last["entropy"] for r in found.runs if r.spec.strength == s) for s in found.strengths
        ]
        low, high = f"{min(means):.2f}", f"{max(means):.2f}"
        cells += [f"{len(by_seed(found.runs))}", low if low == high else f"{low} to {high}"]
        if on_the_way:
            steps = [found.read(run, "step") for run in found.runs]
            cells.append(f"{min(steps):.0f} to {max(steps):.0f}")
        rows.append((cells, [found.differences(metric) for metric in METRICS]))
    header = ["method", "strength" if by_strength else "strengths", "seeds", "entropy"]
    header += ["GRPO's step there"] if on_the_way else []
    return _table([*header, *METRICS.values()], rows, mark=not by_strength)


def steps_table(runs: Sequence[Run], methods: Mapping[str, Method]) -> str:
    """Differences to GRPO's end after as many steps."""
    rows = []
    for name, strength in _cells(runs, methods):
        samples = [after_as_many_steps(runs, metric, name, strength) for metric in ("entropy", *METRICS)]
        if name != "grpo" and samples[0]:
            rows.append(([methods[name].label, strength, f"{len(samples[0])}"], samples))
    return _table(["method", "strength", "seeds", "entropy", *METRICS.values()], rows, mark=True)


def loop_table(runs: Sequence[Run], loops: Mapping[str, Loop]) -> str:
    """How well each target is held, and what comes of it."""
    rows = []
    for name, loop in loops.items():
        mine = [run for run in runs if run.spec.name == name]
        if not mine or loop.target is None:
            continue
        means = [float(np.abs(judged(run)).mean()) for run in mine]
        worst = [float(np.abs(judged(run)).max()) for run in mine]
        held = sum(m <= ON_AVERAGE and w <= AT_WORST for m, w in zip(means, worst, strict=True))
        apart = [run.last["entropy"] - targets(run)[-1] for run in mine]
        touched = 100 * statistics.fmean(run.touched for run in mine)
        shares = [100 * statistics.fmean(values) for values in zip(*map(limits, mine), strict=True)]
        rows.append([
            loop.label, _spread(means), f"{max(worst):.3f}", f"{held} of {len(mine)}",
            f"{statistics.fmean(map(noise, mine)):.3f}", f"{statistics.fmean(apart):+.3f}, {max(apart, key=abs):+.3f}",
            *(_spread([run.last[column] for run in mine]) for column in ("pass1", "pass8")),
            "" if loop.settings.get("target_method") == "bonus" else f"{touched:.1f} %",
            *(f"{share:.0f} %" for share in shares),
        ])  # fmt: skip
    header = [
        "target", "mean size", "worst", "held in", "noise alone", "held-out H - target: mean, worst",
        "pass@1", "pass@8", "tokens touched", "could not rise", "could not fall",
    ]  # fmt: skip
    return markdown(header, rows)


def long_table(runs: Sequence[Run], loops: Mapping[str, Loop]) -> str:
    """H of the rollouts at three times of the runs with the most steps, and their ends; empty if all have as many."""
    least, most = (of(run.spec.settings["steps"] for run in runs) for of in (min, max))
    if least == most:
        return ""
    parts = [slice(end - 40, end) for end in (most // 3, 2 * most // 3, most)]
    rows = []
    for name, loop in loops.items():
        mine = [run for run in runs if run.spec.name == name and run.spec.settings["steps"] == most]
        if mine:
            courses = [run.record["steps"]["entropy"] for run in mine]
            at = [_spread([statistics.fmean(course[part]) for course in courses]) for part in parts]
            ends = [_spread([run.last[metric] for run in mine]) for metric in ("pass1", "pass8")]
            rows.append([loop.label, f"{len(mine)}", *at, *ends])
    header = [f"H, steps {part.start + 1} to {part.stop}" for part in parts]
    return markdown(["run", "seeds", *header, "pass@1", "pass@8"], rows)


def disturbed_table(runs: Sequence[Run], loops: Mapping[str, Loop], without: str) -> str:
    """What each disturbance does under a target, and without feedback; empty if there is none of these runs."""
    rows: list[_Row] = []
    for change in dict.fromkeys(loop.change for loop in loops.values() if loop.change):
        both = [(name, loop) for name, loop in loops.items() if loop.change == change]  # under a target, and without
        samples = [
            [] if metric == "pass1" and loop.second else moved(runs, name, loop.against, metric)  # other prompts
            for metric in ("entropy", "pass1")
            for name, loop in both
        ]
        if samples[1]:
            rows.append(([change], samples))
    columns = [
        f"{what} {how}" for what in ("H", "pass@1") for how in ("under the target", f"without feedback ({without})")
    ]
    return _table(["change", *columns], rows, mark=False) if rows else ""


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


def report(found: Experiment, *, quick: bool = False) -> str:
    """The text of report.md."""
    equal, loop = found.runs("equal"), found.runs("loop")
    there, asked = {run.spec.key for run in (*equal, *loop)}, {spec.key for spec in found.specs}
    missing = len(asked) - len(there)
    parts = ["# Control: what it is worth at equal entropy, and how well a set point holds"]
    if quick:
        parts.append("**A rehearsal** with few steps, seeds and prompts: it shows that all works, and no result.")
    parts.append(
        f"{len(there)} of {len(asked)} runs"
        + (f"; **{missing} are missing**, so rows have fewer seeds or strengths than planned." if missing else ".")
        + f" `python -m benchmarks.control`; {_origin([*equal, *loop])}."
    )
    parts += _equal_parts(equal, found.methods) if equal else []
    parts += _loop_parts(found) if loop else []
    return "\n\n".join(parts) + "\n"


def write_report(out: Path, found: Experiment, *, quick: bool = False) -> Path:
    """report.md and its pictures, from the runs that are there; returns the report's path."""
    equal, loop = found.runs("equal"), found.runs("loop")
    if not equal and not loop:
        raise FileNotFoundError(f"out: expected runs in {out}, got none; run python -m benchmarks.control first")
    out.mkdir(parents=True, exist_ok=True)
    if equal:
        save(frontier_figure(equal, found.methods), out / "entropy.png")
        save(differences_figure(equal, found.methods), out / "differences.png")
    if loop:
        save(loop_figure([*equal, *loop], found.loops), out / "loop.png")
    path = out / "report.md"
    path.write_text(report(found, quick=quick), encoding="utf-8")
    return path


def _equal_parts(runs: Sequence[Run], methods: Mapping[str, Method]) -> list[str]:
    parts = [
        "## At equal entropy",
        "Where each method ends, mean ± standard deviation over seeds with a supervised start each, at strengths from "
        "weak to strong; and GRPO's last policy sampled at other temperatures:",
        ends_table(runs, methods),
        "![pass@k and distinct answers against entropy](entropy.png)",
        "### After as many steps",
        "The end of a run minus the end of GRPO's run of the same seed and start, after as many steps, at whatever "
        "entropy each has: mean and t interval of 95 % over seeds. Bold here and below: what Holm's correction for all "
        "intervals of a table leaves, on a level of 5 %. They are not independent: all of a seed share GRPO's run, and "
        "the metrics are those of one policy.",
        steps_table(runs, methods),
        "### At the same entropy",
        "The end of a run minus a curve of the same seed and start where it has the same entropy, mean over a method's "
        "strengths for each seed. A strength that ends where the curve of some seed does not reach "
        f"({SLACK} nats apart) is left out for all, so that no seeds are chosen by what came of them; most of these "
        "end at GRPO's entropy, for which the table above is right. GRPO on its way has an entropy after a part of "
        "the steps, which stand beside it: this is what a method makes of steps that GRPO does not have left there, "
        "and says nothing against GRPO's last policy. Heated, GRPO has had all steps. Clip-Cov's curve is made of "
        "straight lines through its three strengths, a little below a smooth one; it has no row there.",
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
    parts.append(
        "All seeds are validated on one set of prompts, with samples of their own: the intervals cover other starts "
        "and runs, not other prompts."
    )
    return parts


def _loop_parts(found: Experiment) -> list[str]:
    runs = found.runs("equal", "loop")
    parts = [
        "## A set point",
        f"Means of {WINDOW} steps of H - target over the second half of a run: their mean size, the largest of all "
        f"seeds, and in how many seeds they are within {ON_AVERAGE} on average and {AT_WORST} at worst. Noise alone: "
        "the mean size that they would have if H were on its target, since a rollout measures H with a noise (taken "
        "from the differences of neighbouring rollouts). H is that of the rollouts, at which the loop aims; held-out "
        "is that of the validation's prompts at the end. Could not rise: share of the second half's steps in which "
        "more was wanted than is left when all decrease is taken away, or than max_change allows; could not fall: in "
        "which less was wanted than the step gives as it is. By weight, tokens are weighted and not dropped.",
        loop_table(found.runs("loop"), found.loops),
        "![entropy under a target](loop.png)",
    ]
    if longest := long_table(runs, found.loops):
        parts += ["### Over more steps", "The longest runs, under targets and without:", longest]
    if disturbed := disturbed_table(runs, found.loops, found.without):
        parts += [
            "### Disturbances, with feedback and without",
            "What a change at half-time moves, against the same seed without it: H, mean of the last quarter of the "
            "rollouts, and pass@1 at the end (where the prompts are the same). Mean and t interval of 95 % over seeds.",
            disturbed,
        ]
    return parts


# --- pictures ---------------------------------------------------------------------------------------------------------

_MARKERS = "osD^vP*XhdpH<>"


def _mean_curve(runs: Sequence[Run], curve: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Entropies and metric of a curve's points, means over seeds."""
    points = [CURVES[curve](mine) for mine in by_seed(runs).values()]
    full = max(map(len, points))
    points = [found for found in points if len(found) == full]  # runs that are there
    values = np.array([[[point["entropy"], point[metric]] for point in found] for found in points]).mean(0)
    return values[:, 0], values[:, 1]


def frontier_figure(runs: Sequence[Run], methods: Mapping[str, Method]) -> Figure:
    """A panel per metric: the ends of methods against entropy, strengths joined, and GRPO's curves."""
    names = [name for name in methods if any(run.spec.name == name for run in runs)]
    looks = style.styles([methods[name].label for name in names])
    fig, axes = style.figure(2, 2, (11.5, 9.6))
    right = max(point["entropy"] for run in runs for point in run.validations)
    for ax, (metric, label) in zip(axes.flat, METRICS.items(), strict=True):
        for curve, dashes in ((ON_THE_WAY, "-"), ("GRPO heated", (0, (2, 2)))):
            x, y = _mean_curve(runs, curve, metric) if "grpo" in names else (np.empty(0), np.empty(0))
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
                found = interval(beside(runs, curve, name).differences(metric))
                if not found.seeds:
                    ax.annotate("not on the curve", (0, y), xycoords=("axes fraction", "data"), xytext=(3, 0),
                                textcoords="offset points", va="center", fontsize=7, color=style.MUTED)  # fmt: skip
                    continue
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
    """H with targets and without, in short and long runs; then a panel per row of the table, each seed's H - target."""
    held = [run for run in runs if run.spec.part == "loop" and loops[run.spec.name].target is not None]
    names = [name for name in loops if any(run.spec.name == name for run in held)]
    drawn = [
        run for run in runs if run.spec.name == "grpo" or (run.spec.part == "loop" and loops[run.spec.name].course)
    ]
    courses = sorted({run.spec.settings["steps"] for run in drawn})
    columns = min(4, len(names) + len(courses))
    lines = math.ceil((len(names) + len(courses)) / columns)
    fig, axes = style.figure(lines, columns, (3.4 * columns, 2.7 * lines))
    for ax in axes.flat[len(names) + len(courses) :]:
        ax.set_visible(False)
    for ax, steps in zip(axes.flat, courses, strict=False):
        _courses(ax, [run for run in drawn if run.spec.settings["steps"] == steps])
        style.title(ax, "Entropy", f"targets dashed, without one grey, means of {WINDOW}")
    for ax, name in zip(axes.flat[len(courses) :], names, strict=False):
        mine = [run for run in held if run.spec.name == name]
        _errors(ax, mine)
        style.title(ax, loops[name].label, f"H - target, {len(mine)} seed{'s' * (len(mine) > 1)}")
    for ax in axes[:, 0]:
        ax.set_ylabel("nats per token")
    return fig


def _smooth(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the means over :data:`WINDOW` steps."""
    means = window_means(values, WINDOW)
    return np.arange(len(means)) + (WINDOW - 1) / 2, means


def _courses(ax: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        held = "target_entropy" in run.spec.settings
        color = "#0072b2" if held else style.MUTED
        ax.plot(*_smooth(run.record["steps"]["entropy"]), color=color, linewidth=0.8, alpha=0.6)
        if held:
            ax.plot(targets(run), color="#d55e00", linewidth=1.2, linestyle=(0, (4, 2)))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step")


def _errors(ax: Axes, runs: Sequence[Run]) -> None:
    for bound, alpha in ((AT_WORST, 0.12), (ON_AVERAGE, 0.18)):
        ax.axhspan(-bound, bound, color=style.MUTED, alpha=alpha, linewidth=0)
    ax.axhline(0, color="#d55e00", linewidth=1.2, linestyle=(0, (4, 2)))
    for run in runs:
        ax.plot(*_smooth(errors(run)), color="#0072b2", linewidth=1.0, alpha=0.7)
    ax.axvline(runs[0].spec.settings["steps"] / 2, color=style.MUTED, linewidth=0.8, linestyle=":")
    reach = [1.15 * float(of(judged(run))) for run in runs for of in (np.min, np.max)]
    ax.set_ylim(min(-0.1, *reach), max(0.1, *reach))
    ax.set_xlabel("step")
