"""Colours, axes and seed averaging that every figure shares. No pyplot: nothing here touches global state."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entropy_kernels._require import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from pandas import DataFrame

INK = "#222222"
MUTED = "#767676"
GRID = "#e4e4e4"
#: Inches: the width of a figure for a phone, where its smallest text is still legible, and the height of its panels.
NARROW, NARROW_PANEL = 4.2, 3.0
#: Points: the smallest text of a figure that has a narrow form, and the lowest note's distance from its axes.
NOTE_SIZE, NOTE_ABOVE = 8.5, 5.0
TITLE, NOTE = "title", "note"

# Okabe-Ito, which stays apart under the three common colour deficiencies and in grey-scale print.
_BASELINE, _BLUE, _VERMILION, _GREEN, _PURPLE = "#3b3b3b", "#0072b2", "#d55e00", "#009e73", "#aa4499"
_SKY = "#56b4e9"
_SPARE = (
    *("#b8860b", "#882255", "#44aa99", "#999933", "#cc6677", "#332288", "#117733", "#661100", "#6699cc"),
    *("#ee8866", "#bbcc33", "#99ddff", "#777711"),
)

#: Colours of things that are no methods.
PALETTE = (_BLUE, _VERMILION, _GREEN, _PURPLE, _BASELINE, _SKY, *_SPARE)

# (pattern on the lower-cased name with - and space as _, colour, label). First match wins.
_METHODS = (
    (r"^target", _GREEN, "Target"),
    (r"clip_?higher", _SKY, "Clip-higher"),
    (r"clip_?cov", _BLUE, "Clip-Cov"),
    (r"kl_?cov", _VERMILION, "KL-Cov"),
    (r"entropy_?(bonus|coef|reg)", _PURPLE, "Entropy bonus"),
    (r"^baseline$", _BASELINE, "Baseline"),
    (r"^grpo$", _BASELINE, "GRPO"),
    (r"^rloo$", _BASELINE, "RLOO"),
    (r"^ppo$", _BASELINE, "PPO"),
)
# What stands beside a method, by a word in its name.
_BESIDE = ((r"random|control", "random tokens"), (r"torch_ops", "torch ops"))
# Controls that are named by what they do: dropping is Clip-Cov's treatment, the penalty KL-Cov's.
_CONTROLS = ((r"drop", _BLUE, "Random tokens dropped"), (r"penal", _VERMILION, "Random tokens penalised"))


@dataclass(frozen=True)
class MethodStyle:
    """How a run is drawn everywhere: one colour per method, controls dashed in their method's colour, and so
    is a run by torch's own operations."""

    color: str
    label: str
    control: bool

    def line(self) -> dict[str, Any]:
        """Keyword arguments of ``Axes.plot``."""
        return {
            "color": self.color,
            "linestyle": (0, (4, 2)) if self.control else "-",
            "linewidth": 1.4 if self.control else 2.0,
            "alpha": 0.75 if self.control else 1.0,
            "label": self.label,
        }


def method_style(name: str, position: int = 0) -> MethodStyle:
    """Style of a run by its name: "clip_cov", "KL-Cov", "kl_cov_random", "baseline", … ; others by ``position``.

    A name with "random" or "control" in it is a control: its method's colour, dashed and thinner. So is one with
    "torch_ops": the method by torch's own operations.
    """
    key = re.sub(r"[\s-]+", "_", name.strip().lower())
    beside = next((text for pattern, text in _BESIDE if re.search(pattern, key)), None)
    control = beside is not None
    for pattern, color, label in _METHODS:
        if re.search(pattern, key):
            return MethodStyle(color, f"{label}, {beside}" if control else _display(name, key, label), control)
    if control:
        for pattern, color, label in _CONTROLS:
            if re.search(pattern, key):
                return MethodStyle(color, label, control)
    return MethodStyle(_SPARE[position % len(_SPARE)], name, control)


def _display(name: str, key: str, label: str) -> str:
    """The method's own spelling for a bare method name; the run's name where it says more ("clip_cov r=0.05")."""
    bare = re.sub(r"[^a-z]", "", key)
    return label if bare == re.sub(r"[^a-z]", "", label.lower()) else name


def styles(names: Sequence[str]) -> dict[str, MethodStyle]:
    """Styles of several runs; runs of unknown methods get different spare colours."""
    unknown = 0
    result = {}
    for name in names:
        result[name] = method_style(name, unknown)
        unknown += result[name].color in _SPARE
    return result


def figure(rows: int, columns: int, size: tuple[float, float], **keywords: Any) -> tuple[Figure, Any]:
    """Figure with a (rows, columns) array of axes in the house style; ``size`` in inches.

    Titles and notes (:func:`title`) that are wider than their axes are wrapped whenever the figure is laid out.
    """
    module = require("matplotlib.figure", "a plot")
    from entropy_kernels.analysis._wrapped_layout import WrappedLayout

    fig = module.Figure(figsize=size, layout=WrappedLayout(), facecolor="white")
    axes = fig.subplots(rows, columns, squeeze=False, **keywords)
    for ax in axes.flat:
        decorate(ax)
    return fig, axes


def panels(
    count: int, size: tuple[float, float], *, narrow: bool = False, across: int = 4, **keywords: Any
) -> tuple[Figure, list[Axes]]:
    """Figure with `count` panels of `size` in inches, at most `across` beside each other; with ``narrow`` one under
    another, for the width of a phone."""
    columns = 1 if narrow else min(count, across)
    rows = math.ceil(count / columns)
    width, height = (NARROW, min(size[1], NARROW_PANEL)) if narrow else (size[0] * columns + 0.4, size[1])
    fig, axes = figure(rows, columns, (width, height * rows), **keywords)
    for ax in list(axes.flat)[count:]:
        ax.remove()
    return fig, list(axes.flat)[:count]


def decorate(ax: Axes) -> None:
    """Two spines, a light grid below the data, muted ticks."""
    ax.set_facecolor("white")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#b0b0b0")
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=MUTED, labelsize=9, length=3)
    ax.xaxis.label.set(color=INK, fontsize=10)
    ax.yaxis.label.set(color=INK, fontsize=10)


def title(ax: Axes, text: str, note: str | None = None) -> None:
    """Left-aligned title, with a muted line below it."""
    heading = ax.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK, pad=19 if note else 8)
    below = ax.annotate(
        note or "", (0, 1), xycoords="axes fraction", xytext=(0, NOTE_ABOVE), textcoords="offset points",
        fontsize=NOTE_SIZE, color=MUTED, va="bottom",
    )  # fmt: skip
    # for WrappedLayout: which they are, and what they say before lines are broken (_: nothing for a legend)
    heading.set(gid=TITLE, label=f"_{text}")
    below.set(gid=NOTE, label=f"_{note or ''}")


def legend(target: Any, **keywords: Any) -> None:
    """Frameless legend of an axes or, given ``handles``, of a figure: of at most ``ncols`` columns, as it is wide, and
    it becomes as much higher."""
    look = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 2.2, "columnspacing": 1.4, **keywords}
    made = target.legend(**look)
    if not hasattr(target, "set_figheight"):
        return
    room, columns = target.get_window_extent().width, look.get("ncols", 1)
    room -= look["fontsize"] / 72 * target.dpi  # half of it stays free on either side
    while columns > 1 and made.get_window_extent().width > room:
        made.remove()
        columns -= 1
        made = target.legend(**{**look, "ncols": columns})
    if (excess := made.get_window_extent().width - room) > 0:
        widest = max(text.get_window_extent().width for text in made.get_texts())
        for text in made.get_texts():
            wrap(text, text.get_text(), widest - excess)
    target.set_figheight(target.get_figheight() + made.get_window_extent().height / target.dpi)


def wrap(text: Text, given: str, width: float) -> None:
    """Show what was given in lines of at most `width` pixels, broken at blanks, or within words that are wider."""

    def fits(line: str) -> bool:
        text.set_text(line)
        return text.get_window_extent().width <= width

    def most(parts: Sequence[str], glue: str) -> int:
        """How many of the first parts fit into a line."""
        return bisect_left(range(1, len(parts) + 1), True, key=lambda n: not fits(glue.join(parts[:n])))

    words, lines = given.split(), []
    while words and not fits(" ".join(words)):
        if count := most(words, " "):
            lines.append(" ".join(words[:count]))
            words = words[count:]
        else:
            word = words.pop(0)
            count = most(word[:-1], "")
            count = count if count > 1 else len(word)
            lines.append(word[:count])
            words[:0] = [word[count:]] if word[count:] else []
    text.set_text("\n".join([*lines, " ".join(words)] if words else lines))


def shared_legend(fig: Figure, axes: Sequence[Axes], **keywords: Any) -> None:
    """One legend above all panels of a figure."""
    shown: dict[str, Any] = {}  # of equal labels the first's
    for ax in axes:
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            shown.setdefault(text, handle)
    if shown:
        keywords = {"loc": "outside upper left", "ncols": 6, **keywords}
        legend(fig, handles=[*shown.values()], labels=[*shown], **keywords)


def seeds(run: DataFrame | Sequence[DataFrame]) -> list[DataFrame]:
    """A run is one log or one log per seed: the list of logs."""
    return list(run) if isinstance(run, Sequence) else [run]


def curve(run: DataFrame | Sequence[DataFrame], column: str, step: str = "step") -> DataFrame:
    """``mean``, ``low`` and ``high`` over the seeds, indexed by step; empty if no log has the column."""
    pd = require("pandas", "a plot")
    series = [
        log.loc[log[column].notna(), [step, column]].groupby(step)[column].last()
        for log in seeds(run)
        if column in log.columns
    ]
    if not series:
        return pd.DataFrame(columns=["mean", "low", "high"], dtype=float)
    # inner: a step that a seed has not reached would make the mean jump
    table = pd.concat(series, axis=1, join="inner").astype(float)
    return pd.DataFrame({"mean": table.mean(axis=1), "low": table.min(axis=1), "high": table.max(axis=1)})


def check_runs(runs: Mapping[str, Any], columns: Sequence[str]) -> None:
    """ValueError with the columns that exist if ``runs`` is empty or no run has any of ``columns``."""
    if not runs:
        raise ValueError("runs: expected at least one run, got none")
    present = sorted({str(column) for run in runs.values() for log in seeds(run) for column in log.columns})
    if not any(column in present for column in columns):
        raise ValueError(f"runs: expected a column among {list(columns)}, got {present}")
