"""Figures over the vocabulary: bandwidth, time, error and memory of every implementation against V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.records import Measured, Record
from entropy_kernels.analysis import plot_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PASSES = {
    "logprob_entropy": "Forward",
    "logprob_entropy_bwd": "Backward alone",
    "logprob_entropy_fwdbwd": "Forward + backward",
}
# Ours strong and thick; peers apart from each other, thinner. One colour and marker per implementation in all figures.
_OURS = {
    "ours-cuda": ("#0072b2", "o"),
    "ours-cpu": ("#0072b2", "o"),
    "ours-triton": ("#d55e00", "s"),
    "ours-torch": ("#009e73", "^"),
}
_PEER_COLORS = ("#3b3b3b", "#aa4499", "#b8860b", "#56b4e9", "#882255", "#44aa99", "#999933", "#cc6677", "#888888")
_PEER_MARKERS = ("v", "D", "P", "X", "<", ">", "h", "p", "d", "*")
#: Of the figures.
NAMES = ("bandwidth", "time", "memory", "error_vocabulary", "bandwidth_rows")
_LEAST_VOCABULARIES = 2
_NOISE = 1e-9  # smaller errors, zero among them, are drawn here


@dataclass(frozen=True)
class _Panel:
    title: str
    records: list[Record]


Value = Callable[[Record], float | None]


def figures(
    groups: Sequence[Measured], bandwidth: Mapping[str, float], note: str
) -> Iterator[tuple[str, Figure | None]]:
    """Names and figures; none where only one vocabulary was measured."""
    rows = [record for group in groups for record in group.records if record.summary and record.role != "limit"]
    rows = [record for record in rows if record.op in _PASSES]
    chosen = _main_series(rows)
    if chosen is None:
        return
    dtype, count = chosen
    main = [record for record in rows if record.dtype == dtype and record.size["rows"] == count]
    passes = [_Panel(title, [record for record in main if record.op == op]) for op, title in _PASSES.items()]
    where = f"{count} rows, {dtype}"
    yield "bandwidth", _figure(passes, _rate, "GB/s (least bytes / time)", where, note, ceilings=bandwidth)
    yield "time", _figure(passes, lambda r: r.summary["median"] * 1e3, "time (ms)", where, note, logarithmic=True)
    yield "memory", _figure(passes, _memory, "extra memory at the peak (MB)", where, note, logarithmic=True)
    forward = [record for record in main if record.op == "logprob_entropy"]
    errors = [
        _Panel(f"Error of {name}", [record for record in forward if f"{name} (nats)" in record.errors])
        for name in ("logprob", "entropy")
    ]
    yield "error_vocabulary", _error_figure(errors, where, note)
    by_rows = [
        _Panel(
            f"Forward, {n} rows", [r for r in rows if (r.op, r.dtype, r.size["rows"]) == ("logprob_entropy", dtype, n)]
        )
        for n in sorted({record.size["rows"] for record in rows})
    ]
    if len(by_rows) > 1:
        yield "bandwidth_rows", _figure(by_rows, _cold_rate, "GB/s, caches cold", dtype, note, ceilings=bandwidth)


def _main_series(records: Sequence[Record]) -> tuple[str, int] | None:
    """dtype and rows of the series with most vocabularies; of equal ones bf16, then the one with most records."""
    series: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        series.setdefault((record.dtype, record.size["rows"]), []).append(record)

    def worth(key: tuple[str, int]) -> tuple[int, bool, int]:
        return len({record.size["vocab"] for record in series[key]}), key[0] == "bf16", len(series[key])

    best = max(series, key=worth, default=None)
    return best if best is not None and worth(best)[0] >= _LEAST_VOCABULARIES else None


def _rate(record: Record) -> float | None:
    return record.bytes_per_second / 1e9 if record.bytes_per_second else None


def _cold_rate(record: Record) -> float | None:
    if not record.cold:
        return _rate(record)
    return sum(record.least_bytes.values()) / record.cold["median"] / 1e9


def _memory(record: Record) -> float | None:
    # what allocates less than a hundredth of a MB is drawn there
    return None if record.peak_extra_bytes is None else max(record.peak_extra_bytes / 1e6, 0.01)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each implementation is drawn, by its name among all."""
    peers = [name for name in names if not name.startswith("ours")]
    looks = {}
    for name in names:
        if name.startswith("ours"):
            color, marker = _OURS.get(name.removesuffix("-inplace"), ("#0072b2", "o"))
            looks[name] = {"color": color, "marker": marker, "linewidth": 2.2, "zorder": 3}
            if name.endswith("-inplace"):
                looks[name] |= {"linestyle": (0, (4, 2)), "linewidth": 1.5, "markerfacecolor": "white"}
        else:
            i = peers.index(name)
            color, marker = _PEER_COLORS[i % len(_PEER_COLORS)], _PEER_MARKERS[i % len(_PEER_MARKERS)]
            looks[name] = {"color": color, "marker": marker, "linewidth": 1.1, "alpha": 0.9}
    return looks


def _names(panels: Sequence[_Panel]) -> list[str]:
    found = dict.fromkeys(record.implementation for panel in panels for record in panel.records)
    return sorted(found, key=lambda name: (not name.startswith("ours"), list(found).index(name)))


def _figure(
    panels: Sequence[_Panel],
    value: Value,
    label: str,
    where: str,
    note: str,
    *,
    logarithmic: bool = False,
    ceilings: Mapping[str, float] | None = None,
) -> Figure | None:
    panels = [panel for panel in panels if panel.records]
    if not panels:
        return None
    names = _names(panels)
    looks = _looks(names)
    figure, axes = style.figure(1, len(panels), (4.3 * len(panels) + 0.6, 4.9), sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        _lines(ax, panel, value, looks)
        if logarithmic:
            ax.set_yscale("log")
        style.title(ax, panel.title, where)
        if ceilings is not None:
            _roofline(ax, ceilings)
    axes[0][0].set_ylabel(label)
    _legend(figure, names, looks, panels, note)
    return figure


def _lines(ax: Axes, panel: _Panel, value: Value, looks: Mapping[str, dict[str, Any]]) -> None:
    for name, look in looks.items():
        points = sorted(
            (record.size["vocab"], found)
            for record in panel.records
            if record.implementation == name and (found := value(record)) is not None
        )
        if points:
            ax.plot(*zip(*points, strict=True), markersize=5, **look)
    _vocabulary_axis(ax, panel)


def _vocabulary_axis(ax: Axes, panel: _Panel) -> None:
    vocabularies = sorted({record.size["vocab"] for record in panel.records})
    ax.set_xscale("log")
    ax.minorticks_off()
    # neighbours closer than a label is wide share one
    shown = [v for i, v in enumerate(vocabularies) if i == 0 or v / vocabularies[i - 1] > 1.12]
    ax.set_xticks(shown, [f"{v / 1000:.0f}k" if v >= 1000 else str(v) for v in shown], fontsize=8)
    ax.set_xlabel("vocabulary V")


def _roofline(ax: Axes, ceilings: Mapping[str, float]) -> None:
    for name, dashes, below in (("copy", "-", True), ("read", (0, (2, 2)), False)):
        rate = ceilings[name] / 1e9
        ax.axhline(rate, color=style.MUTED, linewidth=1.2, linestyle=dashes, zorder=1)
        above = (ceilings[name] >= ceilings["read" if name == "copy" else "copy"]) or not below
        ax.annotate(
            f"{name} {rate:.3g} GB/s", (0.01, rate), xycoords=("axes fraction", "data"), fontsize=8, color=style.MUTED,
            xytext=(0, 2 if above else -2), textcoords="offset points", va="bottom" if above else "top",
        )  # fmt: skip
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.12 * max(ceilings["copy"], ceilings["read"]) / 1e9))


def _error_figure(panels: Sequence[_Panel], where: str, note: str) -> Figure | None:
    panels = [panel for panel in panels if panel.records]
    if not panels:
        return None
    names = _names(panels)
    looks = _looks(names)
    figure, axes = style.figure(1, len(panels), (4.6 * len(panels) + 0.6, 4.9), sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        output = f"{panel.title.removeprefix('Error of ')} (nats)"
        _lines(ax, panel, lambda record, output=output: max(record.errors[output], _NOISE), looks)  # type: ignore[misc]
        ax.set_yscale("log")
        style.title(ax, panel.title, f"{where}; largest of the checked rows, against float64")
    axes[0][0].set_ylabel("error (nats)")
    _legend(figure, names, looks, panels, note)
    return figure


def _legend(
    figure: Figure, names: Sequence[str], looks: Mapping[str, dict[str, Any]], panels: Sequence[_Panel], note: str
) -> None:
    from matplotlib.lines import Line2D

    partial = {record.implementation for panel in panels for record in panel.records if record.computes}
    labels = {name: f"{name}*" if name in partial else name for name in names}
    handles = [Line2D([], [], label=labels[name], markersize=5, **looks[name]) for name in names]
    style.legend(figure, handles=handles, loc="outside upper left", ncols=min(8, len(handles)))
    if partial:
        note = f"* no entropy    {note}"
    figure.supxlabel(note, x=0.995, ha="right", fontsize=7.5, color=style.MUTED)
