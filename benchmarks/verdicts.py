"""A bar, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.records import Record

_NOT_ASKED = "was not part of this run"
FEWEST_SAMPLES = 7


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured. ``value`` is the one that counts (of medians), ``best`` that of the minima."""

    text: str
    shape: str
    sense: str  # ">=" or "<="
    limit: float
    unit: str
    value: float | None
    best: float | None
    note: str
    samples: int | None = None  # the fewest that the value rests on

    @property
    def absent(self) -> bool:
        """True if what the bar compares was not asked for in this run."""
        return self.value is None and self.note.endswith(_NOT_ASKED)

    @property
    def passed(self) -> bool | None:
        """None: not measured in this run."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.sense == ">=" else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def find(records: Sequence[Record], op: str, name: str, shape: str, dtype: str, *, host: bool = False) -> Record | None:
    """The record of one implementation; host times are looked for at whatever size they have."""
    for record in records:
        place = (record.op, record.implementation, record.dtype, record.cache == "host")
        if place == (op, name, dtype, host) and (host or record.shape == shape):
            return record
    return None


def why(record: Record | None, op: str, name: str) -> str:
    """Why there is no time."""
    if record is None:
        return f"{name} of {op} {_NOT_ASKED}"
    return f"{name} of {op}: {record.reason or record.status}"
