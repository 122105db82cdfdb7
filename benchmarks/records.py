"""What one implementation gave on one case, and the JSON document that a run writes: the format, in this one place.

``bench.json``::

    format      FORMAT of this module; raised when a field changes its meaning
    command, time, seconds, machine (processor, GPU, versions, commit: benchmarks.machine), settings
    bandwidth   read, copy: bytes per second of this run; copy counts bytes read and bytes written; buffer_bytes
    bars        benchmarks.bars.Verdict
    complete    false if a deadline or a lost device ended the run; not_reached: titles of the groups left out
    groups[]    title, host (true: host time per call), records[]: the fields of Record

A row of the measurements is a record with status "ok". Its key: op, implementation, size, dtype, device; its time:
``summary["median"]`` in seconds, with caches as ``cache`` says ("hot": as the previous call left them; "host": host
time per call). ``size`` has rows and vocab, or tokens and distribution, or sequences and length.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2
#: What every document's command begins with.
COMMAND = "python -m benchmarks.run"
_NUMBERS = re.compile(r"\[\s+-?[\d.][\d.eE+-]*(?:,\s+-?[\d.][\d.eE+-]*)*\s+\]")


@dataclass
class Record:
    """One implementation on one case. Times in seconds, sizes in bytes.

    ``status``: "ok", "skipped", "failed" (raised) or "wrong" (did not pass), with the ``reason``.
    ``computes``: "" for all of the op, else what is computed of it.
    ``samples``, ``summary``: with caches as ``cache`` says; ``cold_samples``, ``cold``: flushed before each call.
    ``calls_per_sample``: a sample is the mean of so many calls. ``hidden``: whether the host's time could be kept out
    of a device time (None on a CPU).
    ``stated_bytes``: the extra memory that the implementation's documentation allows it, results included.
    ``graph``: of a CUDA graph of the call: "equal" (replay equals an eager call bit for bit), "summary", or "reason".
    ``products``: from hidden states on a GPU, summaries of the products alone, timed in turns with ``samples``.
    """

    op: str
    implementation: str
    role: str
    shape: str
    dtype: str
    device: str
    cache: str
    size: dict[str, Any] = field(default_factory=dict)
    computes: str = ""
    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    calls_per_sample: int = 1
    hidden: bool | None = None
    cold_samples: list[float] = field(default_factory=list)
    cold: dict[str, float] = field(default_factory=dict)
    least_bytes: dict[str, int] = field(default_factory=dict)
    bytes_per_second: float | None = None
    of_read_bandwidth: float | None = None
    of_copy_bandwidth: float | None = None
    cold_of_copy_bandwidth: float | None = None
    peak_extra_bytes: int | None = None
    peak_method: str = ""
    stated_bytes: int | None = None
    host_seconds: float | None = None
    syncs: int | None = None
    syncs_method: str = ""
    graph: dict[str, Any] = field(default_factory=dict)
    products: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str, bool]:
        """Tells the rows of a run apart."""
        return self.op, self.implementation, self.shape, self.dtype, self.cache == "host"


@dataclass
class Measured:
    """The records of a group."""

    title: str
    host: bool
    records: list[Record]


def as_document(head: Mapping[str, Any], measured: Iterable[Measured], verdicts: Iterable[Any] = ()) -> dict[str, Any]:
    """The JSON document; ``verdicts`` have an ``as_dict``."""
    return {
        "format": FORMAT,
        **head,
        "bars": [verdict.as_dict() for verdict in verdicts],
        "groups": [asdict(part) for part in measured],
    }


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON so that a reader, or whoever cuts the run off, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(document, indent=1, ensure_ascii=False)
    # a list of samples on one line: a line for each makes a document of a grid hundreds of thousands of lines long
    scratch.write_text(_NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n")
    os.replace(scratch, path)


def read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Head (everything but the groups) and groups of a document.

    Raises:
        ValueError: a format newer than this one. Of an older one, fields that it lacks have their defaults.
    """
    document = json.loads(path.read_text())
    if document["format"] > FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT} or older, got {document['format']}")
    known = {item.name for item in dataclasses.fields(Record)}
    measured = []
    for group in document.pop("groups"):
        records = [Record(**{k: v for k, v in record.items() if k in known}) for record in group["records"]]
        host = group.get("host", any(record.cache == "host" for record in records))
        measured.append(Measured(group["title"], host, records))
    return document, measured
