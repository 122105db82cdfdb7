"""The figures of a run: times, errors, memory from hidden states; over the vocabulary where several were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import PRODUCTS, Measured, Record, over_products
from entropy_kernels.analysis import plot_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of every picture: the resolution, and what its metadata name as its program.
DPI, MADE_BY = 130, "entropy_kernels benchmarks"
#: Names of the figures over the vocabulary.
CURVES = ("bandwidth", "time", "memory", "error_vocabulary", "bandwidth_rows")
ALL_PANELS = 12  # groups up to which every one has a panel of times; of more, those that are not in the curves
_ROLES = {
    "ours": ("entropy_kernels", "#0072b2"),
    "peer": ("peers", "#9a9a9a"),
    "roofline": ("reference operations", "#e0c080"),
}
_NOISE = 1e-8  # smaller errors, zero among them, are drawn here
_WIDE = 20  # ratio of slowest to fastest from which a panel's axis is logarithmic


def figures(head: Mapping[str, Any], measured: Sequence[Measured]) -> Iterator[tuple[str, Figure | None]]:
    """Names and figures of a document; None where there is nothing to show."""
    machine = head["machine"]
    threads = "" if machine["gpu"] else f", {machine['threads']} threads"
    note = f"{machine['machine']}{threads}, {head['time'][:10]}, {(machine['commit'] or 'unknown')[:10]}"
    kinds: dict[str, list[Measured]] = {"logits": [], "hidden": [], "rest": []}
    for part in measured:
        size = part.records[0].size if part.records and not part.host else {}
        kinds["hidden" if "features" in size else "logits" if "vocab" in size else "rest"].append(part)
    if len(kinds["logits"]) <= ALL_PANELS // 2:
        yield "time_statistics", time_figure(kinds["logits"], note)
    yield "time_selection", time_figure(kinds["rest"][:ALL_PANELS], note)
    yield "error", error_figure(kinds["logits"], note)
    yield "from_hidden", hidden_figure(kinds["hidden"][: ALL_PANELS // 3], note)
    yield "error_hidden", error_figure(kinds["hidden"], note, "linear_logprob_entropy")
    yield from curves(kinds["logits"], head["bandwidth"], note)


def save(figure: Figure | None, path: Path) -> Path | None:
    """Write a figure as PNG; None where there is none."""
    if figure is None:
        return None
    figure.savefig(path, dpi=DPI, metadata={"Software": MADE_BY})
    return path


def _legend_of_roles(figure: Figure, records: Sequence[Record], note: str) -> None:
    from matplotlib.patches import Patch

    present = {record.role for record in records}
    handles = [Patch(color=color, label=label) for role, (label, color) in _ROLES.items() if role in present]
    style.legend(figure, handles=handles, loc="outside lower left", ncols=len(handles))
    figure.text(0.995, 0.005, note, ha="right", va="bottom", fontsize=7.5, color=style.MUTED)


def _value(ax: Axes, text: str, x: float, position: int) -> None:
    ax.annotate(
        text, (x, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=style.MUTED
    )


def _lines_of(ax: Axes, names: Sequence[str], count: int) -> None:
    """A name per line from the top; ``count``: lines of the tallest panel beside it, so that all are equally thick."""
    ax.set_yticks(range(len(names)), names, fontsize=8.5)
    ax.set_ylim(count - 0.4, -0.6)
    ax.margins(x=0.1)


# --- bars -------------------------------------------------------------------------------------------------------------


def time_figure(groups: Sequence[Measured], note: str) -> Figure | None:
    """Median time of every implementation with p10 to p90, a panel per group and dtype; None if nothing was timed."""
    panels: list[tuple[str, list[Record]]] = []
    for group in groups:
        dtypes = dict.fromkeys(record.dtype for record in group.records)
        for dtype in dtypes:
            timed = [record for record in group.records if record.summary and record.dtype == dtype]
            if timed:
                panels.append((f"{group.title}, {dtype}" if len(dtypes) > 1 else group.title, timed))
    if not panels:
        return None
    columns = 1 if len(panels) == 1 else 2
    lines = [max(len(records) for _, records in panels[i : i + columns]) for i in range(0, len(panels), columns)]
    size = (7.4 * columns, sum(lines) * 0.27 + 1.2 * len(lines))
    figure, axes = style.figure(len(lines), columns, size, height_ratios=[n + 3 for n in lines])
    for position, (ax, (title, records)) in enumerate(zip(axes.flat, panels, strict=False)):
        _time_panel(ax, title, records, lines[position // columns])
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    _legend_of_roles(figure, [record for _, records in panels for record in records], note)
    return figure


def _time_panel(ax: Axes, title: str, records: list[Record], lines: int) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    order = list(dict.fromkeys(record.op for record in records))
    records = sorted(records, key=lambda r: (order.index(r.op), r.summary["median"]))
    medians = [record.summary["median"] for record in records]
    scale, unit = next((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if max(medians) >= s or u == "µs")
    logarithmic = max(medians) > _WIDE * min(medians)
    for position, record in enumerate(records):
        median, p10, p90 = (record.summary[key] / scale for key in ("median", "p10", "p90"))
        color = _ROLES[record.role][1]
        if logarithmic:  # a bar's length means nothing on this axis
            ax.plot([p10, p90], [position, position], color=color, linewidth=2)
            ax.plot(median, position, "o", color=color, markersize=7)
        else:
            ax.barh(position, median, color=color, height=0.72)
            ax.plot([p10, p90], [position, position], color=style.INK, linewidth=1.2, solid_capstyle="butt")
        _value(ax, f"{median:.3g}", max(median, p90), position)
    shown = {op: "roofline" if op.endswith("_roofline") else op for op in order}
    _lines_of(
        ax, [f"{shown[r.op]}  {r.implementation}" if len(order) > 1 else r.implementation for r in records], lines
    )
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


_HIDDEN_TITLES = {
    "linear_logprob_entropy": "forward",
    "linear_logprob_entropy_fwdbwd": "forward + backward",
    "linear_policy_loss": "PPO loss, both gradients",
    "linear_clip_cov_loss": "Clip-Cov loss, both gradients",
}


def hidden_figure(groups: Sequence[Measured], note: str) -> Figure | None:
    """Time over the products alone, and extra memory, of what starts from hidden states; a row per group and op.

    None if nothing of it was timed.
    """
    rows: list[tuple[str, list[tuple[float, Record]]]] = []
    for group in groups:
        for op in PRODUCTS:
            timed = [(over_products(record, group.records), record) for record in group.records if record.op == op]
            found = sorted(((ratio, record) for ratio, record in timed if ratio is not None), key=lambda pair: pair[0])
            if found:
                first = found[0][1]
                rows.append((f"{_HIDDEN_TITLES[op]}, {first.shape.removesuffix(' hidden')} {first.dtype}", found))
    if not rows:
        return None
    lines = [len(found) for _, found in rows]
    size = (14.8, sum(lines) * 0.27 + 1.2 * len(lines))
    figure, axes = style.figure(len(rows), 2, size, height_ratios=[n + 3 for n in lines])
    for (times, memory), (title, found) in zip(axes, rows, strict=True):
        _bars(times, found, "{:.2f}")
        times.axvline(1.0, color=style.INK, linewidth=1.0)
        times.set_xlabel("time over that of the products alone")
        style.title(times, title)
        _bars(memory, [((record.peak_extra_bytes or 0) / 1e6, record) for _, record in found], "{:.0f}")
        memory.set_xlabel("extra memory at the peak, results included (MB)")
    shown = [record for _, found in rows for _, record in found]
    partial = "* a part of it, see the table    " if any(record.computes for record in shown) else ""
    _legend_of_roles(figure, shown, f"{partial}{note}")
    return figure


def _bars(ax: Axes, found: Sequence[tuple[float, Record]], text: str) -> None:
    """A bar per record from the top, with its value; the name says with a star that it computes a part only."""
    for position, (value, record) in enumerate(found):
        ax.barh(position, value, color=_ROLES[record.role][1], height=0.72)
        _value(ax, text.format(value), value, position)
    _lines_of(ax, [f"{r.implementation}{'*' if r.computes else ''}" for _, r in found], len(found))
    ax.set_xlim(left=0)
    ax.grid(False, axis="y")


def error_figure(groups: Sequence[Measured], note: str, op: str = "logprob_entropy") -> Figure | None:
    """Largest error of log-prob and entropy against float64 per implementation, a panel per dtype; None without any."""
    found: dict[str, dict[str, Record]] = {}
    for record in (record for group in groups for record in group.records):
        if record.op == op and record.errors and record.cache != "host":
            found.setdefault(record.dtype, {}).setdefault(record.implementation, record)
    if not found:
        return None
    lines = max(len(records) for records in found.values())
    figure, axes = style.figure(1, len(found), (6.2 * len(found) + 0.6, 0.36 * lines + 1.9), sharex=True)
    for ax, (dtype, by_name) in zip(axes[0], found.items(), strict=True):
        records = sorted(by_name.values(), key=lambda record: max(record.errors.values()))
        for position, record in enumerate(records):
            # a shift keeps equal errors apart; a cross-entropy has no entropy
            for name, marker, shift in (("logprob (nats)", "o", -0.14), ("entropy (nats)", "D", 0.14)):
                if name in record.errors:
                    error, color = max(record.errors[name], _NOISE), _ROLES[record.role][1]
                    ax.plot(error, position + shift, marker, color=color, markersize=7)
        ax.set_xscale("log")
        _lines_of(ax, [record.implementation for record in records], len(records))
        ax.set_xlabel("largest error of the checked rows (nats)")
        of = "logits" if op == "logprob_entropy" else "hidden states"
        style.title(ax, f"Error against float64, {dtype} {of}", "circle: log-prob, diamond: entropy")
    _legend_of_roles(figure, [record for by_name in found.values() for record in by_name.values()], note)
    return figure


# --- over the vocabulary ----------------------------------------------------------------------------------------------

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
_LEAST_VOCABULARIES = 2
Panel = tuple[str, list[Record]]
Value = Callable[[Record], float | None]


def curves(
    groups: Sequence[Measured], bandwidth: Mapping[str, float], note: str
) -> Iterator[tuple[str, Figure | None]]:
    """Rate, time, memory and error of every implementation against V; none where only one vocabulary was measured."""
    rows = [r for group in groups for r in group.records if r.summary and r.role != "roofline" and r.op in _PASSES]
    series: dict[tuple[str, int], list[Record]] = {}
    for record in rows:
        series.setdefault((record.dtype, record.size["rows"]), []).append(record)

    def worth(key: tuple[str, int]) -> tuple[int, bool, int]:
        """Of dtype and rows: most vocabularies; of equal ones bf16, then the one with most records."""
        return len({record.size["vocab"] for record in series[key]}), key[0] == "bf16", len(series[key])

    best = max(series, key=worth, default=None)
    if best is None or worth(best)[0] < _LEAST_VOCABULARIES:
        return
    dtype, main, where = best[0], series[best], f"{best[1]} rows, {best[0]}"
    passes = [(title, [record for record in main if record.op == op]) for op, title in _PASSES.items()]
    yield "bandwidth", _figure(passes, _rate, "GB/s (least bytes / time)", where, note, ceilings=bandwidth)
    yield "time", _figure(passes, lambda r: r.summary["median"] * 1e3, "time (ms)", where, note, logarithmic=True)
    yield "memory", _figure(passes, _memory, "extra memory at the peak (MB)", where, note, logarithmic=True)
    forward = [record for record in main if record.op == "logprob_entropy"]
    errors = [(f"Error of {of}", [r for r in forward if f"{of} (nats)" in r.errors]) for of in ("logprob", "entropy")]
    values: list[Value] = [
        lambda r: max(r.errors["logprob (nats)"], _NOISE),
        lambda r: max(r.errors["entropy (nats)"], _NOISE),
    ]
    checked = f"{where}; largest of the checked rows, against float64"
    yield "error_vocabulary", _figure(errors, values, "error (nats)", checked, note, logarithmic=True)
    by_rows = [
        (f"Forward, {n} rows", [r for r in rows if (r.op, r.dtype, r.size["rows"]) == ("logprob_entropy", dtype, n)])
        for n in sorted({record.size["rows"] for record in rows})
    ]
    if len(by_rows) > 1:
        yield "bandwidth_rows", _figure(by_rows, _cold_rate, "GB/s, caches cold", dtype, note, ceilings=bandwidth)


def _rate(record: Record) -> float | None:
    return record.bytes_per_second / 1e9 if record.bytes_per_second else None


def _cold_rate(record: Record) -> float | None:
    return sum(record.least_bytes.values()) / record.cold["median"] / 1e9 if record.cold else _rate(record)


def _memory(record: Record) -> float | None:
    # what allocates less than a hundredth of a MB is drawn there
    return None if record.peak_extra_bytes is None else max(record.peak_extra_bytes / 1e6, 0.01)


def _figure(
    panels: Sequence[Panel],
    value: Value | Sequence[Value],
    label: str,
    where: str,
    note: str,
    *,
    logarithmic: bool = False,
    ceilings: Mapping[str, float] | None = None,
) -> Figure | None:
    """A panel per title with a line per implementation; ``value``: for all panels, or one for each."""
    values = [value] * len(panels) if callable(value) else value
    shown = [(panel, of) for panel, of in zip(panels, values, strict=True) if panel[1]]
    if not shown:
        return None
    looks = _looks([record for (_, records), _ in shown for record in records])
    figure, axes = style.figure(1, len(shown), (4.3 * len(shown) + 0.6, 4.9), sharey=True)
    for ax, ((title, records), of) in zip(axes[0], shown, strict=True):
        for name, look in looks.items():
            mine = [record for record in records if record.implementation == name]
            points = sorted((record.size["vocab"], found) for record in mine if (found := of(record)) is not None)
            if points:
                ax.plot(*zip(*points, strict=True), markersize=5, **look)
        _vocabulary_axis(ax, sorted({record.size["vocab"] for record in records}))
        if logarithmic:
            ax.set_yscale("log")
        style.title(ax, title, where)
        if ceilings is not None:
            _roofline(ax, ceilings)
    axes[0][0].set_ylabel(label)
    _legend(figure, looks, {r.implementation for (_, records), _ in shown for r in records if r.computes}, note)
    return figure


def _looks(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Of the implementations, ours first."""
    names = sorted(dict.fromkeys(record.implementation for record in records), key=lambda n: not n.startswith("ours"))
    peers = [name for name in names if not name.startswith("ours")]
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in peers:
            i = peers.index(name)
            color, marker = _PEER_COLORS[i % len(_PEER_COLORS)], _PEER_MARKERS[i % len(_PEER_MARKERS)]
            looks[name] = {"color": color, "marker": marker, "linewidth": 1.1, "alpha": 0.9}
            continue
        color, marker = _OURS.get(name.removesuffix("-inplace"), ("#0072b2", "o"))
        looks[name] = {"color": color, "marker": marker, "linewidth": 2.2, "zorder": 3}
        if name.endswith("-inplace"):
            looks[name] |= {"linestyle": (0, (4, 2)), "linewidth": 1.5, "markerfacecolor": "white"}
    return looks


def _vocabulary_axis(ax: Axes, vocabularies: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.minorticks_off()
    # neighbours closer than a label is wide share one
    shown = [v for i, v in enumerate(vocabularies) if i == 0 or v / vocabularies[i - 1] > 1.12]
    ax.set_xticks(shown, [f"{v / 1000:.0f}k" if v >= 1000 else str(v) for v in shown], fontsize=8)
    ax.set_xlabel("vocabulary V")


def _roofline(ax: Axes, ceilings: Mapping[str, float]) -> None:
    """Lines at the rates of a copy and of a read, the higher one's label above it."""
    highest = max(ceilings["copy"], ceilings["read"])
    for name, dashes in (("copy", "-"), ("read", (0, (2, 2)))):
        rate, above = ceilings[name] / 1e9, ceilings[name] == highest
        ax.axhline(rate, color=style.MUTED, linewidth=1.2, linestyle=dashes, zorder=1)
        ax.annotate(
            f"{name} {rate:.3g} GB/s", (0.01, rate), xycoords=("axes fraction", "data"), fontsize=8, color=style.MUTED,
            xytext=(0, 2 if above else -2), textcoords="offset points", va="bottom" if above else "top",
        )  # fmt: skip
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.12 * highest / 1e9))


def _legend(figure: Figure, looks: Mapping[str, dict[str, Any]], partial: set[str], note: str) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=f"{n}*" if n in partial else n, markersize=5, **look) for n, look in looks.items()]
    style.legend(figure, handles=handles, loc="outside upper left", ncols=min(8, len(handles)))
    text = f"* no entropy    {note}" if partial else note
    figure.supxlabel(text, x=0.995, ha="right", fontsize=7.5, color=style.MUTED)
