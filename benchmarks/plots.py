"""Figures of a run: time per implementation and error per implementation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.records import Measured, Record
from benchmarks.verdicts import PRODUCTS, over_products
from entropy_kernels.analysis import plot_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOR = {"ours": "#0072b2", "peer": "#9a9a9a", "limit": "#e0c080"}
_ROLE = {"ours": "entropy_kernels", "peer": "peers", "limit": "reference operations"}
# marker, and a shift that keeps equal errors apart
_ERRORS = {"logprob (nats)": ("o", -0.14), "entropy (nats)": ("D", 0.14)}
#: Of every picture: the resolution, and what its metadata name as its program.
DPI, MADE_BY = 130, "entropy_kernels benchmarks"
_NOISE = 1e-8  # smaller errors, zero among them, are drawn here

_WIDE = 20  # ratio of slowest to fastest from which a panel's axis is logarithmic

_SHORT = {
    "linear_logprob_entropy": "forward",
    "linear_logprob_entropy_fwdbwd": "forward + backward",
    "linear_policy_loss": "PPO loss, both gradients",
    "linear_clip_cov_loss": "Clip-Cov loss, both gradients",
}

Panel = tuple[str, list[Record]]


def time_figure(groups: Sequence[Measured], note: str) -> Figure | None:
    """Median time of every implementation with p10 to p90, a panel per group and dtype; None if nothing was timed."""
    panels: list[Panel] = []
    for group in groups:
        dtypes = dict.fromkeys(record.dtype for record in group.records)
        for dtype in dtypes:
            timed = [record for record in group.records if record.summary and record.dtype == dtype]
            if timed:
                panels.append((f"{group.title}, {dtype}" if len(dtypes) > 1 else group.title, timed))
    if not panels:
        return None
    columns = 1 if len(panels) == 1 else 2
    lines = [
        max(len(panels[i + j][1]) for j in range(columns) if i + j < len(panels))
        for i in range(0, len(panels), columns)
    ]
    figure, axes = style.figure(
        len(lines), columns, (7.4 * columns, sum(lines) * 0.27 + 1.2 * len(lines)), height_ratios=[n + 3 for n in lines]
    )
    for position, (ax, (title, records)) in enumerate(zip(axes.flat, panels, strict=False)):
        _time_panel(ax, title, records, lines[position // columns])
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    _roles(figure, [record for _, records in panels for record in records], note)
    return figure


def _time_panel(ax: Axes, title: str, records: list[Record], lines: int) -> None:
    """``lines``: the most bars of a panel in this row of the figure, so that all bars are equally thick."""
    from matplotlib.ticker import LogLocator, NullFormatter

    several = len({record.op for record in records}) > 1
    order = list(dict.fromkeys(record.op for record in records))
    records = sorted(records, key=lambda r: (order.index(r.op), r.summary["median"]))
    scale, unit = _unit(max(record.summary["median"] for record in records))
    medians = [record.summary["median"] for record in records]
    logarithmic = max(medians) > _WIDE * min(medians)
    for position, record in enumerate(records):
        median, p10, p90 = (record.summary[key] / scale for key in ("median", "p10", "p90"))
        if logarithmic:  # a bar's length means nothing on this axis
            ax.plot([p10, p90], [position, position], color=_COLOR[record.role], linewidth=2)
            ax.plot(median, position, "o", color=_COLOR[record.role], markersize=7)
        else:
            ax.barh(position, median, color=_COLOR[record.role], height=0.72)
            ax.plot([p10, p90], [position, position], color=style.INK, linewidth=1.2, solid_capstyle="butt")
        ax.annotate(
            f"{median:.3g}", (max(median, p90), position), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=style.MUTED,
        )  # fmt: skip
    labels = [f"{_short(r.op)}  {r.implementation}" if several else r.implementation for r in records]
    ax.set_yticks(range(len(records)), labels, fontsize=8.5)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.margins(x=0.1)
    if logarithmic:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())  # over a short range it would print over the others
    else:
        ax.set_xlim(left=0)
        ax.grid(False, axis="y")
    ax.set_xlabel(f"time ({unit}{', logarithmic' if logarithmic else ''}): median, line from p10 to p90")
    style.title(ax, title)


def hidden_figure(groups: Sequence[Measured], note: str) -> Figure | None:
    """Time over the products alone, and extra memory, of what starts from hidden states; a row per group and op.

    None if nothing of it was timed.
    """
    rows: list[tuple[str, list[Record], list[Record]]] = []
    for group in groups:
        for op in PRODUCTS:
            records = [r for r in group.records if r.op == op and over_products(r, group.records) is not None]
            if records:
                rows.append(
                    (
                        f"{_SHORT[op]}, {records[0].shape.removesuffix(' hidden')} {records[0].dtype}",
                        records,
                        group.records,
                    )
                )
    if not rows:
        return None
    lines = [len(records) for _, records, _ in rows]
    size = (14.8, sum(lines) * 0.27 + 1.2 * len(lines))
    figure, axes = style.figure(len(rows), 2, size, height_ratios=[n + 3 for n in lines])
    for (times, memory), (title, records, among) in zip(axes, rows, strict=True):
        records = sorted(records, key=lambda record: record.summary["median"])
        ratios = [over_products(record, among) or 0.0 for record in records]
        _bars(times, records, ratios, "{:.2f}")
        times.axvline(1.0, color=style.INK, linewidth=1.0)
        times.set_xlabel("time over that of the products alone")
        style.title(times, title)
        _bars(memory, records, [(record.peak_extra_bytes or 0) / 1e6 for record in records], "{:.0f}")
        memory.set_xlabel("extra memory at the peak, results included (MB)")
    shown = [record for _, records, _ in rows for record in records]
    partial = "* a part of it, see the table    " if any(record.computes for record in shown) else ""
    _roles(figure, shown, f"{partial}{note}")
    return figure


def _bars(ax: Axes, records: Sequence[Record], values: Sequence[float], text: str) -> None:
    """A bar per record from the top, with its value; the name says with a star that it computes a part only."""
    for position, (record, value) in enumerate(zip(records, values, strict=True)):
        ax.barh(position, value, color=_COLOR[record.role], height=0.72)
        ax.annotate(
            text.format(value), (value, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
            color=style.MUTED,
        )  # fmt: skip
    names = [f"{record.implementation}{'*' if record.computes else ''}" for record in records]
    ax.set_yticks(range(len(records)), names, fontsize=8.5)
    ax.set_ylim(len(records) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.margins(x=0.1)
    ax.grid(False, axis="y")


def error_figure(groups: Sequence[Measured], note: str, op: str = "logprob_entropy") -> Figure | None:
    """Largest error of log-prob and entropy against float64 per implementation, a panel per dtype; None without any."""
    found: dict[str, dict[str, Record]] = {}
    for group in groups:
        for record in group.records:
            if record.op == op and record.errors and record.cache != "host":
                found.setdefault(record.dtype, {}).setdefault(record.implementation, record)
    if not found:
        return None
    lines = max(len(records) for records in found.values())
    figure, axes = style.figure(1, len(found), (6.2 * len(found) + 0.6, 0.36 * lines + 1.9), sharex=True)
    for ax, (dtype, by_name) in zip(axes[0], found.items(), strict=True):
        records = sorted(by_name.values(), key=lambda record: max(record.errors.values()))
        for position, record in enumerate(records):
            for name, (marker, shift) in _ERRORS.items():
                if name not in record.errors:  # a cross-entropy has no entropy
                    continue
                error = max(record.errors[name], _NOISE)
                ax.plot(error, position + shift, marker, color=_COLOR[record.role], markersize=7)
        ax.set_xscale("log")
        ax.set_yticks(range(len(records)), [record.implementation for record in records], fontsize=9)
        ax.set_ylim(len(records) - 0.4, -0.6)
        ax.set_xlabel("largest error of the checked rows (nats)")
        style.title(
            ax,
            f"Error against float64, {dtype} {'logits' if op == 'logprob_entropy' else 'hidden states'}",
            "circle: log-prob, diamond: entropy",
        )
    _roles(figure, [record for by_name in found.values() for record in by_name.values()], note)
    return figure


def save(figure: Figure | None, path: Path) -> Path | None:
    """Write a figure as PNG; None where there is none."""
    if figure is None:
        return None
    figure.savefig(path, dpi=DPI, metadata={"Software": MADE_BY})
    return path


def _unit(seconds: float) -> tuple[float, str]:
    for name, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return scale, name
    return 1e-6, "µs"


def _short(op: str) -> str:
    return {"logits_floor": "limit", "tokens_floor": "limit"}.get(op, op)


def _roles(figure: Figure, records: Sequence[Record], note: str) -> None:
    from matplotlib.patches import Patch

    present = [role for role in _COLOR if any(record.role == role for record in records)]
    handles = [Patch(color=_COLOR[role], label=_ROLE[role]) for role in present]
    style.legend(figure, handles=handles, loc="outside lower left", ncols=len(handles))
    figure.text(0.995, 0.005, note, ha="right", va="bottom", fontsize=7.5, color=style.MUTED)
