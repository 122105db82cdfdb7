"""What is read of a run: ``bench.md`` and plots beside its ``bench.json``, and tables of the docs, from it alone.

    python -m benchmarks.report FOLDER ...          # tables and plots again, also of a file from another machine
    python -m benchmarks.report --readme [--check]  # the tables of README.md and docs/, so that no figure is typed

A run calls :func:`write` in the end; where matplotlib is missing it leaves the plots out. In README.md and docs/*.md a
table stands between ``<!-- bench: FOLDER -->`` and ``<!-- /bench -->``, with FOLDER below benchmarks/results; that of
the functions on hidden states behind ``<!-- bench: FOLDER hidden -->``, and a short one of several machines behind
``<!-- bench: FOLDER, FOLDER -->``. ``--check`` changes nothing and fails if one is out of date.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, results
from benchmarks.cases import HEADLINE, HEADLINE_HIDDEN, STATED
from benchmarks.results import Measured, Record, fastest, over_products
from benchmarks.targets import BACK, BOTH, ONE, STATS, Outcome
from benchmarks.timing import FEWEST_SAMPLES
from entropy_kernels._require import missing

#: All that may stand beside bench.json and bench.md.
PICTURES = ("time_statistics", "time_selection", "error", "from_hidden", "error_hidden", *plots.CURVES)
_PNG = b"\x89PNG\r\n\x1a\n"

# --- Markdown ---------------------------------------------------------------------------------------------------------


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


def targets_table(outcomes: Sequence[Outcome], *, stated_sizes: bool = True) -> str:
    """Required against measured; whether it passed only at the sizes at which the targets are stated."""
    rows = []
    for outcome in outcomes:
        # a space before a unit, none before the multiplication sign
        unit = outcome.unit if outcome.unit == "×" else f" {outcome.unit}".rstrip()
        value, best = ("–" if v is None else f"{_significant(v)}{unit}" for v in (outcome.value, outcome.best))
        result = {True: "pass", False: "FAIL", None: "not measured"}[outcome.passed]
        if outcome.note:
            result += f": {outcome.note}"
        if outcome.samples is not None and outcome.samples < FEWEST_SAMPLES:
            result += f", on {outcome.samples} samples only"
        sense = {">=": "≥", "<=": "≤"}[outcome.sense]
        rows.append([outcome.text, outcome.shape, f"{sense} {outcome.limit:.3g}{unit}", value, best, result])
    headers = ["target", "shape", "required", "median", "minimum", "outcome"]
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


def markdown(head: Mapping[str, Any], outcomes: Sequence[Outcome], groups: Sequence[Measured]) -> str:
    """The whole report.

    Args:
        head: of the JSON document: ``machine``, ``command``, ``bandwidth``, ``settings``, ``stated_sizes``, …
        outcomes: of the targets; may be empty.
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
    if outcomes:
        parts.append("## Targets")
        if not head["stated_sizes"]:
            parts.append("The targets are stated at other sizes than those of this run: a hint only.")
        parts.append(targets_table(outcomes, stated_sizes=head["stated_sizes"]))
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


# --- files of a run ---------------------------------------------------------------------------------------------------


def write(folder: Path) -> str:
    """Write ``bench.md`` and the plots beside ``bench.json``; returns the Markdown."""
    head, measured = results.read(folder / "bench.json")
    text = markdown(head, outcomes(head), measured)
    (folder / "bench.md").write_text(text)
    for name in PICTURES:  # of an earlier run, which may have had other rows
        (folder / f"{name}.png").unlink(missing_ok=True)
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"{missing('matplotlib', 'a plot', 'analysis')} (python -m benchmarks.report draws later)", file=sys.stderr
        )
        return text
    try:
        for name, figure in plots.figures(head, measured):
            plots.save(figure, folder / f"{name}.png")
    except Exception as error:  # the figures are measured and written: a plot must not take them away
        print(f"plots failed: {type(error).__name__}: {error}", file=sys.stderr)
    return text


def outcomes(head: Mapping[str, Any]) -> list[Outcome]:
    """The targets of a document."""
    return [Outcome(**{k: v for k, v in target.items() if k != "passed"}) for target in head["targets"]]


def in_the_way(folder: Path) -> str | None:
    """A file of the user's that a run into `folder` would replace: one under the name of a result, and no result."""
    known = {"bench.json": _is_document, "bench.md": _is_table, **{f"{name}.png": _is_picture for name in PICTURES}}
    there = [name for name in known if os.path.lexists(folder / name)]
    ours = _is_document(folder / "bench.json")
    return next((name for name in there if not (ours and known[name](folder / name))), None)


def _is_document(path: Path) -> bool:
    try:
        found = json.loads(path.read_text())
        targets = found["targets"] if "targets" in found else found["bars"]
        lists = isinstance(found["groups"], list) and isinstance(targets, list)
        return lists and type(found["format"]) is int and found["command"].split()[:3] == results.COMMAND.split()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _is_table(path: Path) -> bool:
    try:
        return re.match(rf"# Benchmark[^\n]*\n\n`{re.escape(results.COMMAND)}\b", path.read_text()) is not None
    except (OSError, ValueError):
        return False


def _is_picture(path: Path) -> bool:
    """Whether a PNG names the benchmark as its program, or matplotlib with our resolution, as earlier ones do."""
    try:
        head = path.read_bytes()[:1000]  # both chunks stand before the pixels
    except OSError:
        return False
    per_metre = round(plots.DPI / 0.0254)
    resolution = b"pHYs" + struct.pack(">IIB", per_metre, per_metre, 1)
    before = b"tEXtSoftware\0Matplotlib version" in head and resolution in head
    return head.startswith(_PNG) and (b"tEXtSoftware\0" + plots.MADE_BY.encode() in head or before)


# --- tables of README.md and docs/ ------------------------------------------------------------------------------------

_BLOCK = re.compile(
    r"(<!-- bench: (?P<folders>[\w.-]+(?:, [\w.-]+)*)(?P<hidden> hidden)? -->\n).*?(?P<end><!-- /bench -->)", re.DOTALL
)
TELLING = 1e-3  # nats from which an error is said beside a time
_CPU, _GPU, _BATCH = str(STATED.logits[0]), str(HEADLINE), str(STATED.batches[0])
# per device: lines (label, op, shape, dtype; a label that says so is of ours in place), each with the fastest of ours
LINES = {
    "cpu": (
        ("log-prob + entropy", ONE, _CPU, "fp32"),
        ("the same, bf16", ONE, _CPU, "bf16"),
        ("all four statistics", STATS, _CPU, "fp32"),
        ("forward + backward", BOTH, _CPU, "fp32"),
        ("forward + backward, in place", BOTH, _CPU, "fp32"),
    ),
    "cuda": (
        ("log-prob + entropy, bf16", ONE, _GPU, "bf16"),
        ("all four statistics, bf16", STATS, _GPU, "bf16"),
        ("backward alone, bf16", BACK, _GPU, "bf16"),
        ("forward + backward, bf16", BOTH, _GPU, "bf16"),
        ("forward + backward, bf16, in place", BOTH, _GPU, "bf16"),
        ("Clip-Cov loss and gradient, 64 K tokens", "clip_cov_loss", _BATCH, "fp32"),
        ("KL-Cov loss and gradient, 64 K tokens", "kl_cov_loss", _BATCH, "fp32"),
    ),
}
# and columns: the fastest of these peers
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"torch eager": ("eager",), "torch.compile": ("compile",)},
    "cuda": {
        "torch.compile": ("compile",),
        "verl": ("verl", "verl-fused-ce"),
        "TRL": ("trl",),
        "Liger CE, no entropy": ("liger-ce", "liger-ce-mean"),
    },
}
# side by side: lines by the ops' names, and columns as above; of rows that compute less than ours the heading says so
SHORT = {ONE: "log-prob + entropy", STATS: "all four statistics", BOTH: "forward + backward of two"}
SHORT_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"torch.compile": ("compile",), "torch eager": ("eager",)},
    "cuda": {
        "torch.compile": ("compile",),
        "TRL": ("trl",),
        "Liger, no entropy": ("liger-logprob", "liger-grpo", "liger-ce", "liger-ce-mean"),
    },
}
HIDDEN = {"cpu": str(STATED.hidden[0]), "cuda": str(HEADLINE_HIDDEN)}
_HIDDEN_OPS = {
    "linear_logprob_entropy": "log-prob + entropy",
    "linear_logprob_entropy_fwdbwd": "the same with both gradients",
    "linear_clip_cov_loss": "Clip-Cov loss with both gradients",
}
_HIDDEN_OURS = ("ours", "ours-fp32-logits", "ours-recompute", "ours-composed", "ours-parts")


def logits_table(found: Sequence[Record]) -> str:
    """Ours beside the peers, at the sizes at which the targets are stated.

    Raises:
        ValueError: records without a time.
    """
    timed = [record for record in found if record.summary and record.cache != "host"]
    if not timed:
        raise ValueError("records: expected at least one with a time, got none")
    columns, lines, rows = COLUMNS[timed[0].device], LINES[timed[0].device], []

    def here(op: str, shape: str, dtype: str) -> list[Record]:
        return [r for r in timed if (r.op, r.shape, r.dtype) == (op, shape, dtype)]

    for label, *place in lines:
        there, inplace = here(*place), label.endswith("in place")
        mine = fastest(r for r in there if r.role == "ours" and r.implementation.endswith("-inplace") == inplace)
        if mine is None:
            continue
        rivals = (None if inplace else _of(there, peers) for peers in columns.values())
        cells = ["" if rival is None else _against(rival, mine) for rival in rivals]
        rows.append([label, f"**{seconds(mine.summary['median'])}**", *cells])
    first = here(*lines[0][1:])
    shown = [fastest(r for r in first if r.role == "ours"), *(_of(first, peers) for peers in columns.values())]
    rows.append(["extra memory of the forward", *map(_memory, shown)])
    return table(rows, ["", "ours", *columns])


def short_table(machines: Sequence[Sequence[Record]]) -> str:
    """Ours beside the peers on several machines: of each the dtype and the size of its first line in LINES."""
    head, cells = [""], {op: [label] for op, label in SHORT.items()}
    memory = ["extra memory of the forward"]
    for found in machines:
        timed = [record for record in found if record.summary and record.cache != "host"]
        device = timed[0].device
        _, _, *place = LINES[device][0]
        columns = SHORT_COLUMNS[device]
        head += [f"{'CPU' if device == 'cpu' else 'GPU'}: **ours**", *columns]
        for op, row in cells.items():
            here = [r for r in timed if (r.op, r.shape, r.dtype) == (op, *place)]
            mine = fastest(r for r in here if r.role == "ours" and not r.implementation.endswith("-inplace"))
            rivals = [_of(here, peers) for peers in columns.values()]
            row += ["" if mine is None else f"**{seconds(mine.summary['median'])}**"]
            row += ["" if rival is None else seconds(rival.summary["median"]) for rival in rivals]
            if op == ONE:
                memory += [_memory(record) for record in (mine, *rivals)]
    return table([*cells.values(), memory], head)


def hidden_table(found: Sequence[Record]) -> str:
    """From hidden states, in bf16 where that was timed: time, also over the products alone, and memory; ours first.

    Raises:
        ValueError: none of these was timed.
    """
    here = [r for r in found if r.shape == HIDDEN.get(r.device) and r.summary]
    rows = []
    for op, label in _HIDDEN_OPS.items():
        dtypes = {record.dtype for record in here if record.op == op}
        dtype = "bf16" if "bf16" in dtypes else min(dtypes, default="")
        label = f"{label}, {dtype}"
        timed = sorted((r for r in here if (r.op, r.dtype) == (op, dtype)), key=lambda r: r.summary["median"])
        mine = [r for r in timed if r.implementation in _HIDDEN_OURS]
        for record in [*mine, *(r for r in timed if r.role == "peer")]:
            name = f"**{record.implementation}**" if record.role == "ours" else record.implementation
            cells = [seconds(record.summary["median"]), times(over_products(record, here)), _memory(record)]
            error = record.errors.get("entropy (nats)")
            rows.append([label, name, *cells, "" if error is None else f"{error:.1e}", record.computes])
            label = ""
    if not rows:
        raise ValueError("records: expected some from hidden states where the targets are stated, got none")
    return table(rows, ["", "", "time", "over products", "extra memory", "entropy error (nats)", "computes"])


def _of(found: Iterable[Record], names: Sequence[str]) -> Record | None:
    return fastest(record for record in found if record.implementation in names)


def _against(rival: Record, mine: Record) -> str:
    ratio = rival.summary["median"] / mine.summary["median"]
    text = f"{seconds(rival.summary['median'])} ({f'{ratio:.2g}' if ratio < 100 else f'{ratio:.0f}'}×)"
    error = rival.errors.get("entropy (nats)", 0.0)
    return f"{text}, entropy off by {error:.2g} nats" if error >= TELLING else text


def _memory(record: Record | None) -> str:
    return "" if record is None or record.peak_extra_bytes is None else size(record.peak_extra_bytes)


def filled(text: str, folder: Path) -> str:
    """The text with its tables made anew from the results in a folder.

    Raises:
        ValueError: a folder without a result.
    """

    def records(name: str) -> list[Record]:
        path = folder / name / "bench.json"
        if not path.is_file():
            raise ValueError(f"<!-- bench: {name} --> names no result, {path} is not there")
        return [record for group in results.read(path)[1] for record in group.records]

    def block(match: re.Match[str]) -> str:
        found = [records(name) for name in match["folders"].split(", ")]
        if len(found) > 1:
            made = short_table(found)
        else:
            made = hidden_table(found[0]) if match["hidden"] else logits_table(found[0])
        return f"{match[1]}\n{made}\n\n{match['end']}"

    return _BLOCK.sub(block, text)


def _documents(check: bool) -> int:
    stale = []
    for path in (results.ROOT / "README.md", *sorted((results.ROOT / "docs").glob("*.md"))):
        before = path.read_text()
        try:
            after = filled(before, results.RESULTS)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(results.ROOT)}: {error}") from None
        if after != before:
            stale.append(path.relative_to(results.ROOT))
            if not check:
                path.write_text(after)
                print(f"{path}: tables written")
    if check and stale:
        names = ", ".join(map(str, stale))
        print(f"{names}: a table is not what its results give: python -m benchmarks.report --readme", file=sys.stderr)
    return int(check and bool(stale))


def main(argv: Sequence[str] | None = None) -> int:
    """Make the reports of the folders given, or the tables of the docs."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="with a bench.json in it")
    parser.add_argument("--readme", action="store_true", help="write the tables of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing; fail if it is out of date")
    given = parser.parse_args(argv)
    if given.readme == bool(given.folders) or (given.check and not given.readme):
        parser.error("expected either FOLDER ... or --readme [--check]")
    for folder in given.folders:
        if not (folder / "bench.json").is_file():
            parser.error(f"argument FOLDER: expected a folder with a bench.json, got {folder}")
        other = in_the_way(folder)
        if other is not None:
            parser.error(f"argument FOLDER: expected a folder of results, got {folder}, whose {other} is no result")
    for folder in given.folders:
        write(folder)
        print(folder / "bench.md")
    return _documents(given.check) if given.readme else 0


if __name__ == "__main__":
    sys.exit(main())
