"""Figures of the entropy analysis: functions from DataFrames to a matplotlib Figure.

``runs`` is everywhere a mapping from a run's name to its log, a DataFrame with a ``step`` column, or to a list of logs,
one per seed (drawn as their mean with the band of smallest to largest). What a log has as ``target_entropy`` is drawn
dashed beside its ``entropy``. Names choose the colours: see
:func:`entropy_kernels.analysis.plot_style.method_style`. With ``narrow`` a figure is for the width of a phone: its
panels stand one under another, and its text can still be read there. Figures are made without pyplot, so they need no
display, and belong to the caller: ``figure.savefig(path)`` or :func:`png`.

Column names of the reference trainer's logs, the defaults here: ``step``, ``entropy``, ``val_pass1``, ``val_pass8``,
``predicted_dh``, ``measured_dh``.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from entropy_kernels._require import require
from entropy_kernels.analysis import plot_style as style
from entropy_kernels.analysis.entropy_law import EntropyLaw, fit_entropy_law
from entropy_kernels.analysis.logs import pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

    Logs: TypeAlias = DataFrame | Sequence[DataFrame]

# Mean covariance of the top fractions of tokens at step 1 of Qwen2.5-7B: arXiv 2505.22617, table 1.
PAPER_COVARIANCE = {0.0002: 5.654, 0.002: 3.112, 0.02: 1.385, 0.2: 0.351, 0.5: 0.152, 1.0: 0.003}

# Points and names that one axes shows at most: more are drawn over each other, and take long.
_MOST_MARKERS, _MOST_NAMED = 3000, 24


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """The figure as PNG bytes, of 256 colours: a third of the size.

    Args:
        figure: of one of the functions here, or any of matplotlib.
        dpi: dots per inch.

    Returns:
        The file's bytes.

    Raises:
        ImportError: Pillow is missing (extra ``analysis``).

    Source:
        docs/entropy-law.md.
    """
    image = require("PIL.Image", "a plot")
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 0})  # it is read back at once
    picture = image.open(buffer).convert("RGB").quantize(256, dither=image.Dither.NONE)
    picture.save(small, format="png", optimize=True, dpi=(dpi, dpi))
    return small.getvalue()


def entropy_figure(
    runs: Mapping[str, Logs], *, column: str = "entropy", log_scale: bool = False, narrow: bool = False
) -> Figure:
    """Policy entropy over training steps, one line per run.

    Args:
        runs: name → log, or the logs of its seeds: DataFrames with a ``step`` column.
        column: the one to draw; runs without it are left out.
        log_scale: of the entropies.
        narrow: for the width of a phone: panels stand one under another.

    Returns:
        A matplotlib figure, made without pyplot.

    Raises:
        ValueError: no run has what is to be drawn.
        ImportError: matplotlib is missing (extra ``analysis``).

    Source:
        docs/entropy-law.md.
    """
    style.check_runs(runs, [column])
    fig, (ax,) = style.panels(1, (6.8, 4.2), narrow=narrow)
    _curves(ax, runs, column)
    ax.set(xlabel="training step", ylabel="policy entropy (nats per token)")
    if log_scale:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    style.title(ax, "Policy entropy", _seed_note(runs))
    style.shared_legend(fig, [ax])
    return fig


def performance_figure(
    runs: Mapping[str, Logs],
    *,
    columns: Mapping[str, str] | None = None,
    title: str = "Validation",
    narrow: bool = False,
) -> Figure:
    """Validation performance over steps, one panel per column.

    Args:
        columns: column → its panel's title; None: pass@1 beside pass@8. Those that no run has are left out.
        title: stands before the panels' titles.
        others: as in :func:`entropy_figure`.

    Returns:
        A figure, as :func:`entropy_figure` gives.

    Raises:
        ValueError, ImportError: as of :func:`entropy_figure`.

    Source:
        docs/entropy-law.md.
    """
    columns = {"val_pass1": "pass@1", "val_pass8": "pass@8"} if columns is None else columns
    style.check_runs(runs, list(columns))
    present = {
        column: name for column, name in columns.items() if any(len(style.curve(r, column)) for r in runs.values())
    }
    fig, axes = style.panels(len(present), (4.0, 4.0), narrow=narrow)
    for ax, (column, name) in zip(axes, present.items(), strict=True):
        _curves(ax, runs, column)
        ax.set(xlabel="training step", ylabel=name)
        style.title(ax, f"{title}: {name}" if title else name, _seed_note(runs))
    style.shared_legend(fig, axes)
    return fig


def law_figure(
    runs: Mapping[str, Logs],
    *,
    entropy: str = "entropy",
    performance: str = "val_pass1",
    laws: Mapping[str, EntropyLaw] | None = None,
    narrow: bool = False,
) -> Figure:
    """R against H, one panel per run on common axes: points, the law, a straight line in H and the ceiling.

    Each evaluation is paired with the entropy of its step, or else the latest before it
    (:func:`entropy_kernels.analysis.logs.pairs`); darker points are later. Seeds of a run are fitted together.

    Args:
        entropy, performance: columns.
        laws: name → a law that is already fitted; runs without one are fitted here, and those with fewer than three
            points show the points alone.
        others: as in :func:`entropy_figure`.

    Returns:
        A figure, as :func:`entropy_figure` gives.

    Raises:
        ValueError, ImportError: as of :func:`entropy_figure`; a fit needs statsmodels and scipy.

    Source:
        docs/entropy-law.md.
    """
    style.check_runs(runs, [entropy])
    style.check_runs(runs, [performance])
    fig, axes = style.panels(len(runs), (3.1, 3.8), narrow=narrow, sharex=True, sharey=True)
    looks = style.styles(list(runs))
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
        points = [
            pairs(log, entropy, performance)[["entropy", "performance"]].to_numpy(float)
            for log in style.seeds(run)
            if entropy in log and performance in log
        ]
        h, r = np.concatenate(points).T if points else np.empty((2, 0))
        age: Any = np.concatenate([np.linspace(0.25, 1.0, len(p)) for p in points]) if points else None
        law = (laws or {}).get(name)
        if law is None and len(h) >= 3 and np.ptp(h) > 0:
            law = fit_entropy_law(h, r)
        ax.scatter(h, r, s=22, color=looks[name].color, alpha=age, edgecolors="none", zorder=3)
        note = "too few points for a fit"
        if law is not None:
            _law_lines(ax, law, looks[name].color)
            note = f"R² {law.r2:.3f}, RMSE {law.rmse:.3f}; straight line: {law.r2_linear:.3f}, {law.rmse_linear:.3f}"
        style.title(ax, looks[name].label, note)
        ax.set(xlabel="policy entropy H (nats)", ylabel=f"validation {_pretty(performance)}")
    axes[0].set_xlim(left=0)
    for ax in axes:
        ax.label_outer()
    style.shared_legend(fig, axes)
    return fig


def fit_figure(
    entropy: Any,
    performance: Any,
    law: EntropyLaw,
    *,
    steps: Any = None,
    extrapolated: EntropyLaw | None = None,
    bound: bool = True,
    entropy_name: str = "policy entropy H (nats)",
    performance_name: str = "validation performance R",
    title: str = "Entropy law",
) -> Figure:
    """One run's R against H: points, the law with its prediction band, the straight line, and the ceiling at H = 0.

    Of more than 3000 points as many are drawn, evenly spaced.

    Args:
        entropy, performance: n numbers each, NaN where there is none; nats, and the law's unit.
        law: fitted to them; its prediction band and its ceiling's interval are drawn.
        steps: n numbers that colour the points; None: their order.
        extrapolated: the law of the first points only, drawn beside it.
        bound: False: what stands at H = 0 is not called a ceiling.
        entropy_name, performance_name, title: of the axes and the figure.

    Returns:
        A figure, as :func:`entropy_figure` gives.

    Raises:
        ImportError: matplotlib or scipy is missing (extra ``analysis``).

    Source:
        docs/entropy-law.md.
    """
    h, r = np.asarray(entropy, float), np.asarray(performance, float)
    order = np.arange(len(h)) if steps is None else np.asarray(steps)
    keep = ~(np.isnan(h) | np.isnan(r))
    h, r, order = h[keep], r[keep], order[keep]
    early = slice(0) if extrapolated is None or extrapolated.n > _MOST_MARKERS else slice(extrapolated.n)
    drawn = _thinned(len(h))
    name = "ceiling" if bound else "at H = 0:"
    fig, (ax,) = style.panels(1, (7.0, 5.3))
    grid = np.linspace(0, max(law.entropy_range[1], float(h.max())) * 1.04, 200)
    low, high = law.interval(grid)
    ax.fill_between(
        grid, low, high, color="#0072b2", alpha=0.10, linewidth=0, label=f"{law.confidence:.0%} prediction band"
    )
    _law_lines(ax, law, "#0072b2", bound)
    if extrapolated is not None:
        label = f"law of the first {extrapolated.n} points"
        ax.plot(grid, extrapolated.predict(grid), color="#d55e00", linewidth=1.6, linestyle=(0, (5, 2)), label=label)
        ax.scatter(h[early], r[early], s=70, facecolors="none", edgecolors="#d55e00", zorder=4)
    marks = ax.scatter(
        h[drawn], r[drawn], c=order[drawn], cmap="viridis", s=26, zorder=5, edgecolors="white", linewidths=0.4
    )
    bar = fig.colorbar(marks, ax=ax, pad=0.02, fraction=0.05)
    bar.set_label("step" if steps is not None else "measurement", fontsize=9, color=style.INK)
    bar.ax.tick_params(colors=style.MUTED, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bottom, top = law.ceiling_interval
    ax.errorbar(
        [0], [law.ceiling], yerr=[[law.ceiling - bottom], [top - law.ceiling]], color="#0072b2",
        fmt="D" if bound else "o", markerfacecolor="#0072b2" if bound else "white", markersize=6, capsize=4,
        clip_on=False, zorder=6, label=f"{name} {law.ceiling:.3g} [{bottom:.3g}, {top:.3g}]",
    )  # fmt: skip
    ax.set(xlabel=entropy_name, ylabel=performance_name)
    ax.set_xlim(left=0)
    note = f"{_equation(law)}; R² {law.r2:.3f}, RMSE {law.rmse:.3g}"
    note += f"; straight line in H: {law.r2_linear:.3f}, {law.rmse_linear:.3g}"
    style.title(ax, title, note)
    style.shared_legend(fig, [ax])
    return fig


def fits_figure(
    points: Mapping[str, DataFrame],
    laws: Mapping[str, EntropyLaw],
    *,
    bound: Mapping[str, bool] | None = None,
    entropy_name: str = "policy entropy H (nats)",
    performance_name: str = "validation performance R",
    title: str = "Entropy laws",
) -> Figure:
    """R against H of several runs on one axes: points, the law of each and its value at H = 0.

    A law is dotted below the entropies that the run has seen. The legend names the first 24 runs.

    Args:
        points: name → a DataFrame with ``entropy`` and ``performance``, as :func:`entropy_kernels.analysis.logs.pairs`
            gives.
        laws: name → the law fitted to them.
        bound: name → whether its value at H = 0 is a ceiling, a diamond, or none, a ring; None: all are.
        entropy_name, performance_name, title: as in :func:`fit_figure`.

    Returns:
        A figure, as :func:`entropy_figure` gives.

    Raises:
        KeyError: a run without a law.
        ImportError: as of :func:`entropy_figure`.

    Source:
        docs/entropy-law.md.
    """
    fig, (ax,) = style.panels(1, (7.0, 5.3))
    colors = list(style.PALETTE)[: len(points)]
    if len(points) > len(colors):  # more runs than colours that can be told apart
        shades = require("matplotlib", "a plot").colormaps["viridis"](np.linspace(0, 0.88, len(points)))
        colors = [require("matplotlib.colors", "a plot").to_hex(shade) for shade in shades]
    named = list(points)[:_MOST_NAMED]
    for (name, frame), color in zip(points.items(), colors, strict=True):
        law = laws[name]
        h, r = frame["entropy"].to_numpy(float), frame["performance"].to_numpy(float)
        drawn = _thinned(len(h), _MOST_MARKERS // len(points) + 2)
        ax.scatter(h[drawn], r[drawn], s=14, color=color, alpha=0.45, edgecolors="none", zorder=2)
        seen, below = np.linspace(*law.entropy_range, 100), np.linspace(0, law.entropy_range[0], 100)
        is_bound = bound is None or bound[name]
        short = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
        label = f"{short}: ceiling {law.ceiling:.3g}" if is_bound else f"{short}: {law.ceiling:.3g} at H = 0"
        ax.plot(seen, law.predict(seen), color=color, linewidth=2.0, label=label if name in named else "_", zorder=3)
        ax.plot(below, law.predict(below), color=color, linewidth=1.4, linestyle=(0, (1, 1.5)), zorder=3)
        ax.scatter(
            [0], [law.ceiling], s=40, marker="D" if is_bound else "o", zorder=5, clip_on=False,
            facecolors=[color] if is_bound else "white", edgecolors=[color], linewidths=1.5,
        )  # fmt: skip
    ax.set(xlabel=entropy_name, ylabel=performance_name)
    ax.set_xlim(left=0)
    more = f"; {len(points) - len(named)} more runs are not named" if len(points) > len(named) else ""
    style.title(ax, title, f"dotted: below what the run has seen{more}")
    style.shared_legend(fig, [ax], ncols=3)
    return fig


def entropy_change_figure(
    panels: Mapping[str, Any],
    *,
    predicted: str = "predicted_dh",
    measured: str = "measured_dh",
    scaleless: Collection[str] = (),
    narrow: bool = False,
) -> Figure:
    """Measured against predicted ΔH, one panel per entry, with y = x, correlation, slope and share of equal signs.

    The slope is that of the least-squares line through the origin: 1 where the prediction has the right size.

    Args:
        panels: name → a pair (predicted, measured) of n numbers each, in nats, or a log with these two columns.
        predicted, measured: the columns of logs.
        scaleless: names of panels whose predictions are of arbitrary scale, as those for a unit step: no y = x, no
            slope, and axes of their own.
        narrow: as in :func:`entropy_figure`.

    Returns:
        A figure, as :func:`entropy_figure` gives.

    Raises:
        ValueError: no entry, pairs of unequal length, or an unknown name in ``scaleless``.
        ImportError: as of :func:`entropy_figure`.

    Source:
        docs/entropy-law.md.
    """
    if not panels:
        raise ValueError("panels: expected at least one entry, got none")
    if unknown := {*scaleless} - {*panels}:
        raise ValueError(f"scaleless: expected names of panels ({', '.join(panels)}), got {', '.join(sorted(unknown))}")
    fig, axes = style.panels(len(panels), (3.7, 4.3), narrow=narrow)
    looks = style.styles(list(panels))
    for ax, (name, panel) in zip(axes, panels.items(), strict=True):
        x, y = (panel[predicted], panel[measured]) if hasattr(panel, "columns") else panel
        x, y = np.asarray(x, float), np.asarray(y, float)
        if x.shape != y.shape:
            raise ValueError(f"panels[{name!r}]: expected equal shapes, got {x.shape} and {y.shape}")
        keep = np.isfinite(x) & np.isfinite(y)
        x, y = x[keep], y[keep]
        note = _agreement(x, y)
        if name in scaleless:
            (x, across), (y, up) = _scaled(x), _scaled(y)
            ax.axhline(0, color=style.MUTED, linewidth=0.8)
            ax.axvline(0, color=style.MUTED, linewidth=0.8)
            across += ", arbitrary scale"
        else:
            both, across = _scaled(np.stack([x, y]))
            (x, y), up = both, across
            _slopes(ax, x, y, looks[name].color)
        ax.scatter(x, y, s=16, color=looks[name].color, alpha=0.55, edgecolors="none", zorder=3)
        ax.set(xlabel=f"predicted ΔH ({across})", ylabel=f"measured ΔH ({up})")
        style.title(ax, looks[name].label, note)
    return fig


def _slopes(ax: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    """y = x and the line through the origin, on equal scales."""
    bound = 1.08 * max(np.abs([x, y]).max(initial=0.0), 1e-12)
    ax.plot([-bound, bound], [-bound, bound], color=style.MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="y = x")
    if (x @ x) > 0:
        slope = float(x @ y / (x @ x))
        reach = np.array([x.min(), x.max()])
        ax.plot(reach, slope * reach, color=color, linewidth=1.8, label=f"slope {slope:.3g}")
    ax.set(xlim=(-bound, bound), ylim=(-bound, bound))
    ax.set_aspect("equal", anchor="W")
    style.legend(ax, loc="upper left")


def covariance_table(
    runs: Mapping[str, Logs],
    columns: Mapping[float, str],
    *,
    step: int | Literal["first", "last"] = "first",
    paper: bool = True,
) -> DataFrame:
    """Mean covariance of the top fractions of tokens: a row per run, a column per fraction (as the paper's table 1).

    Args:
        runs: logs; with seeds, their mean.
        columns: fraction of the tokens → the log's column that holds the mean covariance of that top fraction.
        step: the step to show, or each log's first or last row that has the columns. Runs with one start agree at the
            first; what a method leaves of the covariance shows at the last.
        paper: add the paper's row (Qwen2.5-7B, step 1) for the fractions that it has.

    Returns:
        A DataFrame of covariances.

    Raises:
        ValueError: a log lacks a column, or the step.
        ImportError: pandas is missing (extra ``analysis``).

    Source:
        arXiv 2505.22617, table 1.
    """
    pd = require("pandas", "the covariance table")
    fractions = sorted(columns)
    rows: dict[str, list[float]] = {}
    for name, run in runs.items():
        found = [_covariance_row(log, [columns[f] for f in fractions], step) for log in style.seeds(run)]
        rows[style.method_style(name).label] = np.mean(found, axis=0).tolist()
    if paper:
        rows["Qwen2.5-7B (paper)"] = [PAPER_COVARIANCE.get(f, np.nan) for f in fractions]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=[_fraction(f) for f in fractions])
    table.columns.name = "top share of tokens"
    return table


def _curves(ax: Axes, runs: Mapping[str, Logs], column: str) -> None:
    looks = style.styles(list(runs))
    for name, run in runs.items():
        line = style.curve(run, column)
        if len(line) == 0:
            continue
        steps = line.index.to_numpy(float)
        dots = "o" if len(line) <= 60 else ""
        ax.plot(steps, line["mean"], marker=dots, markersize=3, **looks[name].line())
        target = style.curve(run, f"target_{column}")
        if len(target):
            named = any(other.get_label() == "target" for other in ax.get_lines())
            ax.plot(
                target.index.to_numpy(float), target["mean"], color=looks[name].color, linewidth=1.2,
                linestyle=(0, (6, 3)), label="_nolegend_" if named else "target",
            )  # fmt: skip
        if len(style.seeds(run)) > 1:
            ax.fill_between(steps, line["low"], line["high"], color=looks[name].color, alpha=0.13, linewidth=0)


def _thinned(count: int, most: int = _MOST_MARKERS) -> np.ndarray:
    """Positions of ``most`` of ``count`` points, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _law_lines(ax: Axes, law: EntropyLaw, color: str, bound: bool = True) -> None:
    """The law from H = 0 to the largest H of its fit, the straight line on the same points, and the ceiling if it is
    a bound."""
    grid = np.linspace(0, law.entropy_range[1] * 1.04, 200)
    ax.plot(grid, law.predict(grid), color=color, linewidth=2.0, label="law  −a·e$^H$ + b", zorder=2)
    ax.plot(
        grid,
        law.predict_linear(grid),
        color=style.MUTED,
        linewidth=1.3,
        linestyle=(0, (1, 1.5)),
        label="straight line in H",
    )
    if not bound:
        return
    ax.axhline(law.ceiling, color=color, linewidth=0.9, linestyle=(0, (6, 3)), alpha=0.6)
    ax.margins(y=0.12)  # its label has room below the title
    ax.annotate(
        f"ceiling {law.ceiling:.3g}", (1, law.ceiling), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=color,
    )  # fmt: skip


def _seed_note(runs: Mapping[str, Logs]) -> str | None:
    count = max(len(style.seeds(run)) for run in runs.values())
    return f"mean of {count} seeds; band: smallest to largest" if count > 1 else None


def _scaled(values: np.ndarray) -> tuple[np.ndarray, str]:
    """In a power of ten of nats that gives short tick labels, and that unit's name."""
    largest = np.abs(values).max(initial=0.0)
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    if power >= -1:
        return values, "nats"
    return values * 10.0**-power, f"10$^{{{power}}}$ nats"


def _agreement(x: np.ndarray, y: np.ndarray) -> str:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return f"n {len(x)}"
    moved = (x != 0) & (y != 0)
    sign = float(np.mean(np.sign(x[moved]) == np.sign(y[moved]))) if moved.any() else float("nan")
    return f"correlation {np.corrcoef(x, y)[0, 1]:.4f}, same sign {sign:.0%}, n {len(x)}"


def _covariance_row(log: DataFrame, columns: list[str], step: int | Literal["first", "last"]) -> list[float]:
    missing = [column for column in columns if column not in log.columns]
    if missing:
        raise ValueError(f"columns: expected columns of the log, got {missing}; it has {[str(c) for c in log.columns]}")
    rows = log.dropna(subset=columns)
    if not isinstance(step, str):
        rows = rows[rows["step"] == step]
    elif step not in ("first", "last"):
        raise ValueError(f"step: expected a number, 'first' or 'last', got {step!r}")
    if len(rows) == 0:
        raise ValueError(f"step: expected one with covariance values, got {step!r}")
    row: Series = rows.iloc[-1 if step == "last" else 0]
    return [float(row[column]) for column in columns]


def _equation(law: EntropyLaw) -> str:
    return f"R = {'−' if law.a >= 0 else ''}{abs(law.a):.3g}·e$^H$ + {law.b:.3g}"


def _fraction(value: float) -> str:
    return "all" if value >= 1 else f"{value * 100:g} %"


def _pretty(column: str) -> str:
    return {"val_pass1": "pass@1", "val_pass8": "pass@8"}.get(column, column)
