"""``python -m benchmarks.auto_table RESULTS...``: the table behind ``backend="auto"``, from measurements.

RESULTS are ``bench.json`` files of the suite. They rank our backends in every class that they hold at least one timed
case of. ``--verified`` takes ``summary.json`` of ``make gpu-check``: a GPU backend of an op is verified on that GPU's
architecture if every test of it and doctor's self-check passed there. The whole table is made anew from what is given;
its sources are named in it, so that it can be made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.shapes import DTYPES, parse_logits
from entropy_kernels.backends import auto_table, registry
from entropy_kernels.backends.auto_table import Row, Source, Table, Verified

# Ops of the suite that time an op of the registry by another name
OP_OF = dict.fromkeys(("logprob_entropy", "logprob_entropy_bwd", "logprob_entropy_fwdbwd"), "token_stats")
OP_OF["linear_logprob_entropy"] = "linear_token_stats"
_PREFIX = "ours-"  # implementations named ours-<backend>; ours-<backend>-inplace is the same kernel, called otherwise
Class = tuple[str, str, str, str]  # op, architecture, dtype, size class


@dataclass(frozen=True)
class Timing:
    """Median and spread, (p90 - p10) / median, of one backend in one timed case."""

    case: str
    backend: str
    seconds: float
    spread: float


@dataclass
class Cell:
    """What the results say of one class."""

    timings: list[Timing]
    left_out: dict[str, str]  # backend -> what went wrong
    sources: list[Source]


def read_results(path: Path, cells: dict[Class, Cell]) -> None:
    """Add the records of our backends in a ``bench.json`` to ``cells``; ValueError if it is none, or holds none."""
    document = _document(path)
    try:
        source = Source(
            _name(path), document["machine"]["machine"], _commit(document["machine"]), document["time"][:10]
        )
        records = [record for group in document["groups"] for record in group["records"]]
        found = [added for record in records if (added := _add(record, document["machine"], str(path), source, cells))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a bench.json, got one without {error}") from error
    if not found:
        raise ValueError(f"{path}: expected timed records of our backends (ours-<backend>), got none")


def _add(record: dict[str, Any], machine: dict[str, Any], file: str, source: Source, cells: dict[Class, Cell]) -> bool:
    """Whether the record says something about one of our backends."""
    op = OP_OF.get(record["op"], record["op"])
    backend = record["implementation"].removeprefix(_PREFIX)
    if op not in registry.OPS or record["implementation"] != _PREFIX + backend or backend not in registry.BACKENDS:
        return False
    # A call's host time is all of its time on a CPU; on a GPU the work goes on after it
    if record["status"] == "skipped" or (record["cache"] == "host" and record["device"] != "cpu"):
        return False
    key = op, _architecture(record["device"], machine, file), record["dtype"], _size(op, record, file)
    cell = cells.setdefault(key, Cell([], {}, []))
    if source not in cell.sources:
        cell.sources.append(source)
    if record["status"] != "ok":
        cell.left_out[backend] = f"{record['status']} in {source.file}: {record['reason']}"
        return True
    case = " ".join((file, record["op"], record["shape"], record["cache"]))
    median, spread = record["summary"]["median"], record["summary"]["spread"]
    if not (median > 0 and spread >= 0):
        raise ValueError(f"{file}: expected a median > 0 and a spread >= 0 of {case}, got {median} and {spread}")
    cell.timings.append(Timing(case, backend, median, spread))
    return True


def _architecture(device: str, machine: dict[str, Any], file: str) -> str:
    if device == "cpu":
        return "cpu"
    capability = (machine["gpu"] or {}).get("capability")
    if capability is None or machine["gpu"].get("cuda") is None:
        raise ValueError(f"{file}: expected machine.gpu with capability and cuda, for records on {device!r}")
    return "sm_" + capability.replace(".", "")


def _size(op: str, record: dict[str, Any], file: str) -> str:
    """The size class of a record, from its ``size`` or from its shape: "512×151936", "4096 normal", "64×128 batch"."""
    size = record.get("size") or {}
    try:
        shape = record["shape"].split()[0]
        if {"rows", "vocab"} <= set(size):
            count = size["rows"] * size["vocab"]
        elif "tokens" in size:
            count = size["tokens"]
        elif "×" in shape:
            two = parse_logits(shape)
            count = two.rows * two.vocab
        else:
            count = int(shape)
        itemsize = DTYPES[record["dtype"]].itemsize
    except (ValueError, LookupError) as error:
        raise ValueError(f"{file}: expected a size, or a shape like 512×151936, got {record['shape']!r}") from error
    return auto_table.size_class(op, count, itemsize)


def rows_of(cells: dict[Class, Cell]) -> list[Row]:
    """A row for every class in which at least one backend was timed and none of its results was wrong."""
    rows = []
    for key, cell in sorted(cells.items(), key=lambda item: (*item[0][:3], auto_table.SIZES.index(item[0][3]))):
        timings = [timing for timing in cell.timings if timing.backend not in cell.left_out]
        device = "cpu" if key[1] == "cpu" else "cuda"
        measured = {timing.backend for timing in timings}
        order = ranking([name for name in registry.default_order(key[0], device) if name in measured], timings)
        if order:
            times = {name: float(f"{compare(name, order[0], timings)[0]:.4g}") for name in order}
            cases = len({timing.case for timing in timings})
            rows.append(Row(*key, tuple(order), times, cases, tuple(cell.sources), cell.left_out))
    return rows


def ranking(default: Sequence[str], timings: Sequence[Timing]) -> list[str]:
    """``default`` with a backend moved before another that it beats by more than the spread of both."""
    order: list[str] = []
    for name in default:
        place = len(order)
        while place > 0:
            ratio, spread = compare(name, order[place - 1], timings)
            if not ratio * (1 + spread) < 1:  # also where there is no case of both
                break
            place -= 1
        order.insert(place, name)
    return order


def compare(one: str, other: str, timings: Iterable[Timing]) -> tuple[float, float]:
    """(time of ``one`` over that of ``other``, spread): geometric mean over the cases of both, and median of the larger
    spread of the two in each; NaN where there is no such case.
    """
    by_backend: dict[str, dict[str, Timing]] = {one: {}, other: {}}
    for timing in timings:
        if timing.backend in by_backend:
            by_backend[timing.backend][timing.case] = timing
    both = [(by_backend[one][case], by_backend[other][case]) for case in by_backend[one] if case in by_backend[other]]
    if not both:
        return math.nan, math.nan
    ratio = statistics.geometric_mean(a.seconds / b.seconds for a, b in both)
    return ratio, statistics.median(max(a.spread, b.spread) for a, b in both)


def read_verified(path: Path) -> list[Verified]:
    """The op × backend pairs that a ``summary.json`` of gpu-check has verified; ValueError if it is none.

    A pair is not verified if its tests did not end, and none is where the tests that belong to no pair did not, or one
    of them failed.
    """
    summary = _document(path)
    try:
        architecture, tests, checks = summary["architecture"], summary["tests"], summary["self_check"]
        source = Source(_name(path), summary["gpu"], _commit(summary), summary["date"][:10])
        if not tests["elsewhere"]["complete"] or tests["elsewhere"]["failed"] or not architecture:
            return []
        pairs = []
        for entry in tests["pairs"]:
            op, backend = entry["op"], entry["backend"]
            mine = [c["ok"] for c in checks if (c["op"], c["backend"], c["device"]) == (op, backend, "cuda")]
            known = op in registry.OPS and backend in ("triton", "cuda") and entry["complete"]
            if known and entry["passed"] > 0 and not entry["failed"] and mine and all(mine):
                pairs.append(Verified(op, backend, architecture, entry["passed"], source))
        return pairs
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a summary.json of make gpu-check, got one without {error}") from error


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(document).__name__}")
    return document


def _name(path: Path) -> str:
    """Relative to the repository, where it is in it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _commit(holder: dict[str, Any]) -> str:
    return holder["commit"] or "unknown commit"


def make(results: Sequence[Path], verified: Sequence[Path]) -> Table:
    """The table of these files.

    Raises:
        ValueError: a file is missing, damaged or says nothing of our backends; two verify the same pair.
    """
    cells: dict[Class, Cell] = {}
    for path in results:
        read_results(path, cells)
    return Table.of(rows_of(cells), [pair for path in verified for pair in read_verified(path)])


def text(table: Table) -> str:
    """As it stands in the file."""
    return json.dumps(table.as_dict(), indent=1, ensure_ascii=False) + "\n"


def sources(table: Table) -> tuple[list[Path], list[Path]]:
    """(results, verified): the files that a table was made from."""
    results = dict.fromkeys(source.file for row in table.rows.values() for source in row.sources)
    verified = dict.fromkeys(entry.source.file for entry in table.verified.values())
    return [ROOT / file for file in results], [ROOT / file for file in verified]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table; 0, or 2 with one line on what is wrong with a file."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.auto_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="bench.json files")
    parser.add_argument(
        "--verified", type=Path, nargs="+", default=[], metavar="SUMMARY", help="summary.json files of make gpu-check"
    )
    parser.add_argument("--output", type=Path, default=auto_table.FILE, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        table = make(arguments.results, arguments.verified)
    except ValueError as error:
        print(f"auto_table: error: {error}", file=sys.stderr)
        return 2
    arguments.output.write_text(text(table), encoding="utf-8")
    for row in table.rows.values():
        times = ", ".join(f"{name} {row.times[name]:g}" for name in row.order)
        print(f"{' '.join(row.key):40} {times}  ({row.measurements} cases)")
    for pair in table.verified.values():
        print(f"verified: {pair.op} {pair.backend} on {pair.architecture} ({pair.tests} tests)")
    print(f"{len(table.rows)} rows, {len(table.verified)} verified; written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
