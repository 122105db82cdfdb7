"""The table behind ``backend="auto"``: what measurements say of (op, architecture, dtype, size class).

``auto_table.json`` beside this file is written by ``python -m benchmarks.auto_table`` from committed results, and holds
two lists: *rows*, which order the backends that were measured in one class, and *verified*, the GPU kernels that a
hardware run has shown to be right. What to do with them is :mod:`.registry`'s business.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("auto_table.json")
FORMAT = 1

# Size classes, small to large, by the largest amount of the first two; a larger one is "large". They are where the
# work of an implementation changes its kind, not where one result happened to turn:
# - bytes of logits: below 1 MiB a call costs more than the reading; up to 64 MiB the rows are few, so kernels split
#   them, and the logits stay in a last-level cache (60 MB on an H200); beyond, memory is streamed.
# - tokens: up to 4096 one block of threads selects; up to 512 Ki one cluster keeps all keys in shared memory.
SIZES = ("small", "medium", "large")
_BYTES = (1 << 20, 1 << 26)
_TOKENS = (1 << 12, 1 << 19)
_COUNTED_IN_BYTES = ("token_stats", "linear_token_stats")
SIZE_TEXT = (
    f"small, medium, large are up to {_BYTES[0] >> 20} MiB, up to {_BYTES[1] >> 20} MiB and more of logits; "
    f"up to {_TOKENS[0]}, up to {_TOKENS[1]} and more tokens"
)

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
# Backends that a row may name, by whether its architecture is the CPU
_RUNS_ON = {True: {"torch", "cpu"}, False: {"torch", "triton", "cuda"}}


def size_class(op: str, elements: int, itemsize: int) -> str:
    """One of SIZES, for logits of so many elements of so many bytes, or for so many tokens."""
    if op in _COUNTED_IN_BYTES:
        return SIZES[bisect_left(_BYTES, elements * itemsize)]
    return SIZES[bisect_left(_TOKENS, elements)]


def dtypes_of(op: str, device_type: str) -> tuple[str, ...]:
    """Names of the dtypes that ``op``'s kernels are given: selections compare in fp32 whatever comes."""
    if op not in _COUNTED_IN_BYTES:
        return ("fp32",)
    return tuple(DTYPES.values()) if device_type == "cpu" else ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Source:
    """Where a measurement stands: a committed file and what it was made on."""

    file: str
    machine: str
    commit: str
    date: str

    def __str__(self) -> str:
        return f"{self.machine}, {self.date}, commit {self.commit[:10]}"


@dataclass(frozen=True)
class Row:
    """One class as measured.

    Attributes:
        order: backends that were measured, best first; where a difference is below the spread, in the default order.
        times: of each of them, relative to the first of ``order``: geometric mean over ``measurements`` timed cases.
        left_out: backends whose result was wrong, or that raised, in this class -> what happened.
    """

    op: str
    architecture: str
    dtype: str
    size: str
    order: tuple[str, ...]
    times: Mapping[str, float]
    measurements: int
    sources: tuple[Source, ...]
    left_out: Mapping[str, str]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.architecture, self.dtype, self.size


@dataclass(frozen=True)
class Verified:
    """A GPU backend whose tests and self-check all passed on an architecture; ``tests``: how many passed."""

    op: str
    backend: str
    architecture: str
    tests: int
    source: Source


@dataclass(frozen=True)
class Table:
    """Both lists, by what they are looked up by."""

    rows: Mapping[tuple[str, str, str, str], Row]
    verified: Mapping[tuple[str, str, str], Verified]

    @classmethod
    def of(cls, rows: list[Row], verified: list[Verified]) -> Table:
        """A table; the same class twice is an error."""
        table = cls({row.key: row for row in rows}, {(v.op, v.backend, v.architecture): v for v in verified})
        if len(table.rows) < len(rows) or len(table.verified) < len(verified):
            raise ValueError("expected one entry per class, got two for the same")
        return table

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows, verified = self.rows.values(), self.verified.values()
        return {
            "format": FORMAT,
            "rows": [asdict(row) for row in rows],
            "verified": [asdict(entry) for entry in verified],
        }


@functools.cache
def load() -> Table:
    """The table of this installation, read once.

    Raises:
        RuntimeError: it is missing or damaged. Choosing as if nothing had been measured would hide a broken install.
    """
    return read(FILE)


def read(path: Path) -> Table:
    """The table in a file; RuntimeError, naming it, for anything but a whole one."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise RuntimeError(
            f'{path}, the table behind backend="auto": expected what `python -m benchmarks.auto_table` writes, '
            f"got {type(error).__name__}: {what}; reinstall entropy_kernels, or name a backend"
        ) from error


def parse(document: Any) -> Table:
    """The table of a JSON document.

    Raises:
        ValueError, TypeError, KeyError: another format, missing fields, or values that no table can have.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    rows = [_row(entry) for entry in document["rows"]]
    verified = [Verified(**{**entry, "source": Source(**entry["source"])}) for entry in document["verified"]]
    return Table.of(rows, verified)


def _row(entry: dict[str, Any]) -> Row:
    sources = tuple(Source(**source) for source in entry["sources"])
    row = Row(**{**entry, "order": tuple(entry["order"]), "sources": sources})
    allowed = _RUNS_ON[row.architecture == "cpu"]
    if not row.order or not {*row.order, *row.left_out} <= allowed:
        raise ValueError(f"row {row.key}: expected an order of {sorted(allowed)}, got {list(row.order)}")
    if set(row.times) != set(row.order) or not all(time > 0 for time in row.times.values()):
        raise ValueError(f"row {row.key}: expected a time > 0 for each of {list(row.order)}, got {dict(row.times)}")
    if row.size not in SIZES or row.dtype not in DTYPES.values():
        raise ValueError(f"row {row.key}: expected a size of {SIZES} and a dtype of {tuple(DTYPES.values())}")
    return row
