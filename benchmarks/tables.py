"""Markdown from records: bars first, then one table per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.bars import FEWEST_SAMPLES, Verdict
from benchmarks.measure import Record


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


def bars_table(verdicts: Sequence[Verdict], *, stated_sizes: bool = True) -> str:
    """Required against measured; with the verdict only at the sizes at which the bars are stated."""
    rows = []
    for verdict in verdicts:
        # a space before a unit, none before the multiplication sign
        unit = verdict.unit if verdict.unit == "×" else f" {verdict.unit}"
        value, best = ("–" if v is None else f"{_significant(v)}{unit}" for v in (verdict.value, verdict.best))
        result = {True: "pass", False: "FAIL", None: f"not measured: {verdict.note}"}[verdict.passed]
        if verdict.samples is not None and verdict.samples < FEWEST_SAMPLES:
            result += f", on {verdict.samples} samples only"
        sense = {">=": "≥", "<=": "≤"}[verdict.sense]
        rows.append([verdict.text, verdict.shape, f"{sense} {verdict.limit:g}{unit}", value, best, result])
    headers = ["bar", "shape", "required", "median", "minimum", "verdict"]
    if not stated_sizes:
        rows, headers = [row[:-1] for row in rows], headers[:-1]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def group_table(records: Sequence[Record], *, host: bool = False) -> str:
    """Times, traffic, memory and errors of one group, fastest first within op and dtype."""
    headers = ["op", "dtype", "implementation", "median", "min", "p10", "p90", "spread"]
    headers += [] if host else ["GB/s", "of read", "of copy", "extra memory"]
    headers += ["largest errors against float64"]
    rows: list[list[str]] = []
    ops = list(dict.fromkeys((record.op, record.dtype) for record in records))
    timed = [record for record in records if record.summary]
    for record in sorted(timed, key=lambda r: (ops.index((r.op, r.dtype)), r.summary["median"])):
        summary = record.summary
        row = [record.op, record.dtype, record.implementation]
        row += [seconds(summary[key]) for key in ("median", "min", "p10", "p90")] + [f"{summary['spread']:.0%}"]
        if not host:
            row += [
                f"{record.bytes_per_second / 1e9:.1f}" if record.bytes_per_second else "",
                f"{record.of_read_bandwidth:.0%}" if record.of_read_bandwidth else "",
                f"{record.of_copy_bandwidth:.0%}" if record.of_copy_bandwidth else "",
                size(record.peak_extra_bytes) if record.peak_extra_bytes is not None else "",
            ]
        rows.append([*row, ", ".join(f"{name} {error:.1e}" for name, error in record.errors.items())])
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


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
        f"- **{name}** {status}: {reason} ({', '.join(places)})" for (name, status, reason), places in lines.items()
    )


def markdown(
    result: Mapping[str, Any], verdicts: Sequence[Verdict], groups: Sequence[tuple[str, bool, Sequence]]
) -> str:
    """The whole report.

    Args:
        result: the JSON document's head: ``machine``, ``command``, ``bandwidth``, ``settings``, ``stated_sizes``.
        verdicts: bars; may be empty.
        groups: (title, host time or not, records).
    """
    machine, bandwidth = result["machine"], result["bandwidth"]
    device = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]["model"]
    dirty = " with uncommitted changes" if machine["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Benchmark on {device}",
        f"`{result['command']}`, {result['time']}, commit {machine['commit'] or 'unknown'}{dirty}; "
        f"{machine['threads']} threads, load {_load(machine)} at the start; {versions}.",
        f"Ceilings measured in this run: read {bandwidth['read'] / 1e9:.1f} GB/s, copy (read + written) "
        f'{bandwidth["copy"] / 1e9:.1f} GB/s. "of read" and "of copy" divide the least traffic of an op by its '
        "median time and by these. Times of a group come from interleaved rounds in random order. Extra memory "
        "is the peak above what was held before the call, outputs included.",
    ]
    if verdicts:
        parts.append("## Bars")
        if not result["stated_sizes"]:
            parts.append("The bars are stated at other sizes than those of this run: a hint, no verdict.")
        parts.append(bars_table(verdicts, stated_sizes=result["stated_sizes"]))
    for title, host, records in groups:
        if any(record.summary for record in records):
            parts += [f"## {title}", group_table(records, host=host)]
    missing = not_timed([record for _, _, records in groups for record in records])
    if missing:
        parts += ["## Not timed", missing]
    return "\n\n".join(parts) + "\n"


def _load(machine: Mapping[str, Any]) -> str:
    load = machine["cpu"]["load_average"]
    return f"{load[0]:.2f}" if load else "unknown"
