"""Markdown from records: bars first, then one table per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bars import FEWEST_SAMPLES, Verdict
from benchmarks.records import Measured, Record
from benchmarks.verdicts import over_products


def seconds(value: float) -> str:
    """Three significant digits in a unit that suits: "41.2 ms", "18.3 µs"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale or unit == "µs":
            return f"{_significant(value / scale)} {unit}"
    raise AssertionError("unreachable")


def size(value: int) -> str:
    """Bytes as MB (1e6), "0.02 MB" at the smallest."""
    return f"{value / 1e6:.2f} MB" if value < 10e6 else f"{value / 1e6:.0f} MB"


def _significant(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float | None) -> str:
    """A ratio, "1.08×"; nothing for None."""
    return "" if value is None else f"{_significant(value)}×"


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(headers), rule, *map(line, rows)])


def bars_table(verdicts: Sequence[Verdict], *, stated_sizes: bool = True) -> str:
    """Required against measured; with the verdict only at the sizes at which the bars are stated."""
    rows = []
    for verdict in verdicts:
        # a space before a unit, none before the multiplication sign
        unit = verdict.unit if verdict.unit == "×" else f" {verdict.unit}".rstrip()
        value, best = ("–" if v is None else f"{_significant(v)}{unit}" for v in (verdict.value, verdict.best))
        result = {True: "pass", False: "FAIL", None: "not measured"}[verdict.passed]
        if verdict.note:
            result += f": {verdict.note}"
        if verdict.samples is not None and verdict.samples < FEWEST_SAMPLES:
            result += f", on {verdict.samples} samples only"
        sense = {">=": "≥", "<=": "≤"}[verdict.sense]
        rows.append([verdict.text, verdict.shape, f"{sense} {verdict.limit:.3g}{unit}", value, best, result])
    headers = ["bar", "shape", "required", "median", "minimum", "verdict"]
    if not stated_sizes:
        rows, headers = [row[:-1] for row in rows], headers[:-1]
    return table(rows, headers)


def _time(summary: Mapping[str, float], key: str) -> str:
    return seconds(summary[key]) if summary else ""


def _percent(value: float | None) -> str:
    return f"{value:.0%}" if value else ""


def _timed(record: Record) -> str:
    """How a GPU's device time was taken."""
    if record.hidden is None:
        return ""
    calls = "1 call" if record.calls_per_sample == 1 else f"{record.calls_per_sample} calls"
    return calls if record.hidden else f"{calls}, host included"


def _replay(record: Record) -> str:
    if not record.graph:
        return ""
    if "summary" not in record.graph:
        return f"no: {record.graph['reason']}"[:60]
    return seconds(record.graph["summary"]["median"]) + ("" if record.graph["equal"] else " (DIFFERS)")


# header -> cell of a record, which is one of a group's; a column that is empty for all rows of a group is left out
_COLUMNS = {
    "op": lambda r, _: r.op,
    "dtype": lambda r, _: r.dtype,
    "implementation": lambda r, _: r.implementation,
    "median": lambda r, _: _time(r.summary, "median"),
    "min": lambda r, _: _time(r.summary, "min"),
    "p10": lambda r, _: _time(r.summary, "p10"),
    "p90": lambda r, _: _time(r.summary, "p90"),
    "spread": lambda r, _: f"{r.summary['spread']:.0%}",
    "cold median": lambda r, _: _time(r.cold, "median"),
    "cold p10": lambda r, _: _time(r.cold, "p10"),
    "cold p90": lambda r, _: _time(r.cold, "p90"),
    "timed": lambda r, _: _timed(r),
    "graph replay": lambda r, _: _replay(r),
    "GB/s": lambda r, _: f"{r.bytes_per_second / 1e9:.1f}" if r.bytes_per_second else "",
    "of read": lambda r, _: _percent(r.of_read_bandwidth),
    "of copy": lambda r, _: _percent(r.of_copy_bandwidth),
    "cold of copy": lambda r, _: _percent(r.cold_of_copy_bandwidth),
    "over products": lambda r, group: times(over_products(r, group)),
    "extra memory": lambda r, _: size(r.peak_extra_bytes) if r.peak_extra_bytes is not None else "",
    "stated memory": lambda r, _: size(r.stated_bytes) if r.stated_bytes is not None else "",
    "syncs": lambda r, _: str(r.syncs) if r.syncs is not None else "",
    "host time": lambda r, _: seconds(r.host_seconds) if r.host_seconds is not None else "",
    "computes": lambda r, _: r.computes,
    "largest errors against float64": lambda r, _: ", ".join(f"{name} {error:.1e}" for name, error in r.errors.items()),
}


def group_table(records: Sequence[Record]) -> str:
    """Times, traffic, memory and errors of one group, fastest first within op and dtype."""
    ops = list(dict.fromkeys((record.op, record.dtype) for record in records))
    timed = sorted(
        (record for record in records if record.summary),
        key=lambda r: (ops.index((r.op, r.dtype)), r.summary["median"]),
    )
    columns = {header: [cell(record, records) for record in timed] for header, cell in _COLUMNS.items()}
    columns = {header: cells for header, cells in columns.items() if any(cells)}
    return table(list(zip(*columns.values(), strict=True)), list(columns))


def not_timed(records: Sequence[Record]) -> str:
    """List of the implementations that were skipped, failed or gave a wrong result, with the reason."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        if record.status != "ok":
            where = f"{record.op} {record.dtype}"
            places = lines.setdefault((record.implementation, record.status, record.reason), [])
            if where not in places:
                places.append(where)
    return "\n".join(
        f"- {name}: {status} ({reason}): {', '.join(places)}" for (name, status, reason), places in lines.items()
    )


_GPU_NOTE = (
    "Device time between two events, the host's work hidden behind an idling kernel where possible (column “timed”: "
    "calls per sample, and where the host's time is in it). Hot: L2 as the previous call left it; cold: another buffer "
    "of four times its size was read before each call. Graph replay: the call captured in a CUDA graph, hot. "
    "Syncs: how often a call makes the host wait; host time: until it returns, its queue empty."
)


def markdown(head: Mapping[str, Any], verdicts: Sequence[Verdict], groups: Sequence[Measured]) -> str:
    """The whole report.

    Args:
        head: of the JSON document: ``machine``, ``command``, ``bandwidth``, ``settings``, ``stated_sizes``, …
        verdicts: bars; may be empty.
    """
    machine, bandwidth = head["machine"], head["bandwidth"]
    device = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]["model"]
    dirty = " with uncommitted changes" if machine["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    if machine["gpu"]:
        versions += f", CUDA {machine['gpu']['cuda']}, driver {machine['gpu'].get('driver') or 'unknown'}"
    parts = [
        f"# Benchmark on {device}",
        f"`{head['command']}`, {head['time']}, commit {machine['commit'] or 'unknown'}{dirty}; "
        f"{machine['threads']} threads, load {_load(machine)} at the start; {versions}.",
        f"Ceilings measured in this run: read {bandwidth['read'] / 1e9:.1f} GB/s, copy (read + written) "
        f'{bandwidth["copy"] / 1e9:.1f} GB/s. "of read" and "of copy" divide the least traffic of an op by its '
        "median time and by these. "
        + ("" if machine["gpu"] else "Times of a group come from interleaved rounds in random order. ")
        + "Extra memory is the peak above what was held before the call, outputs included; stated is what an "
        + "implementation's documentation allows it. Over products: the time over that of the matrix products alone, "
        + "one or three. A share above 100 % means that some of the data came from a cache; amax and topk are "
        + "references, which may be beaten.",
    ]
    if machine["gpu"]:
        parts.append(_GPU_NOTE)
    if not head.get("complete", True):
        parts.append(f"**Cut off**: {head.get('why_incomplete') or 'it ended early'}. Left out: {_left_out(head)}.")
    if verdicts:
        parts.append("## Bars")
        if not head["stated_sizes"]:
            parts.append("The bars are stated at other sizes than those of this run: a hint, no verdict.")
        parts.append(bars_table(verdicts, stated_sizes=head["stated_sizes"]))
    for group in groups:
        if any(record.summary for record in group.records):
            parts += [f"## {group.title}", group_table(group.records)]
    missing = not_timed([record for group in groups for record in group.records])
    if missing:
        parts += ["## Not timed", missing]
    return "\n\n".join(parts) + "\n"


def _left_out(head: Mapping[str, Any]) -> str:
    titles = head.get("not_reached") or ["nothing but the last group's rest"]
    shown = "; ".join(titles[:6])
    return shown if len(titles) <= 6 else f"{shown}; and {len(titles) - 6} more"


def _load(machine: Mapping[str, Any]) -> str:
    load = machine["cpu"]["load_average"]
    return f"{load[0]:.2f}" if load else "unknown"
