"""What a run leaves: records in ``bench.json``, whose format is documented here only, and what machine it was.

``bench.json``::

    format      FORMAT of this module; raised when a field changes its meaning
    command, time, seconds, machine (processor, GPU, versions, commit: :func:`describe`), settings
    bandwidth   read, copy: bytes per second of this run; copy counts bytes read and bytes written; buffer_bytes
    targets     benchmarks.targets.Outcome
    complete    false if a deadline or a lost device ended the run; not_reached: titles of the groups left out
    groups[]    title, host (true: host time per call), records[]: the fields of Record

A row of the measurements is a record with status "ok". Its key: op, implementation, size, dtype, device; its time:
``summary["median"]`` in seconds, with caches as ``cache`` says ("hot": as the previous call left them; "host": host
time per call). ``size`` has rows and vocab, or tokens and distribution, or sequences and length.

``benchmarks/results/<machine>/`` holds the newest run of a machine: a run writes over the one before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import entropy_kernels as ek
from entropy_kernels.backends import verdict
from entropy_kernels.trainer.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORMAT = 3
#: What every document's command begins with.
COMMAND = "python -m benchmarks.run"
_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")


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


def as_document(head: Mapping[str, Any], measured: Iterable[Measured], outcomes: Iterable[Any] = ()) -> dict[str, Any]:
    """The JSON document; ``outcomes`` have an ``as_dict``."""
    return {
        "format": FORMAT,
        **head,
        "targets": [outcome.as_dict() for outcome in outcomes],
        "groups": [asdict(part) for part in measured],
    }


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON so that a reader, or whoever cuts the run off, never sees half a file."""
    text = json.dumps(document, indent=1, ensure_ascii=False)
    # a list of samples on one line: a line for each makes a document of a grid hundreds of thousands of lines long
    write_text(path, _NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Head (everything but the groups) and groups of a document.

    Raises:
        ValueError: a format newer than this one. Of an older one, fields that it lacks have their defaults.
    """
    document = json.loads(path.read_text())
    if document["format"] > FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT} or older, got {document['format']}")
    if document["format"] < 3:
        document["targets"] = document.pop("bars")
    known = {item.name for item in dataclasses.fields(Record)}
    measured = []
    for group in document.pop("groups"):
        records = [_renamed(Record(**{k: v for k, v in r.items() if k in known})) for r in group["records"]]
        host = group.get("host", any(record.cache == "host" for record in records))
        measured.append(Measured(group["title"], host, records))
    return document, measured


def _renamed(record: Record) -> Record:
    """What formats before 3 called otherwise."""
    role = "roofline" if record.role == "limit" else record.role
    return replace(record, op=record.op.replace("_floor", "_roofline"), role=role)


# --- what is looked up among them -------------------------------------------------------------------------------------

# op from hidden states -> which products of linear_roofline its time is compared with, in tables too
PRODUCTS = {
    "linear_logprob_entropy": "product",
    "linear_logprob_entropy_fwdbwd": "three products",
    "linear_policy_loss": "three products",
    "linear_clip_cov_loss": "three products",
}


def find(records: Sequence[Record], op: str, name: str, shape: str, dtype: str, *, host: bool = False) -> Record | None:
    """The record of one implementation; host times are looked for at whatever size they have."""
    for record in records:
        place = (record.op, record.implementation, record.dtype, record.cache == "host")
        if place == (op, name, dtype, host) and (host or record.shape == shape):
            return record
    return None


def fastest(records: Iterable[Record]) -> Record | None:
    """By its median, of those that were timed."""
    timed = (record for record in records if record.summary and record.cache != "host")
    return min(timed, key=lambda record: record.summary["median"], default=None)


def products_beside(record: Record, records: Sequence[Record], name: str) -> Record | None:
    """The products alone: as they were timed in turns with a record, or else in rounds or rows of their own."""
    if name in record.products:
        return replace(
            record, op="linear_roofline", implementation=name, role="roofline", summary=record.products[name]
        )
    return find(records, "linear_roofline", name, record.shape, record.dtype)


def over_products(record: Record, records: Sequence[Record]) -> float | None:
    """Median time over that of the matrix products alone; None for other ops, or where either was not timed."""
    products = products_beside(record, records, PRODUCTS.get(record.op, ""))
    if products is None or not products.summary or not record.summary:
        return None
    return record.summary["median"] / products.summary["median"]


# --- the machine ------------------------------------------------------------------------------------------------------

_PACKAGES = (
    "torch", "triton", "numpy", "transformers",
    "verl", "trl", "liger-kernel", "flash-attn", "fla-core", "quack-kernels",
)  # fmt: skip
# switches that change what is measured
_VARIABLES = re.compile(
    r"^(OMP_|MKL_|KMP_|GOMP_|MALLOC_|LD_PRELOAD|TORCH|ENTROPY_KERNELS_|TRITON_|CUDA_VISIBLE_DEVICES)"
)


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, software and repository state, ready for JSON."""
    cpu, versions = _cpuinfo(), {"entropy_kernels": ek.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "machine": slug(device),
        "platform": platform.platform(),
        "cpu": {
            "model": cpu.get("model name", platform.processor() or platform.machine()),
            "family": cpu.get("cpu family"),
            "number": cpu.get("model"),
            "logical": os.cpu_count(),
            "flags": sorted(cpu.get("flags", "").split()),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled") or None,
        "gpu": _gpu(device),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "versions": versions,
        "backends": ek.backends(),
        "variables": {key: value for key, value in sorted(os.environ.items()) if _VARIABLES.match(key)},
        "commit": os.environ.get("ENTROPY_KERNELS_COMMIT") or _git("rev-parse", "HEAD"),  # copies lack the repository
        # results of earlier runs do not change what is measured
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results") or ""),
    }


def slug(device: torch.device) -> str:
    """Folder name of a machine's results, from its GPU or its processor: "amd-epyc-zen3-2cpu", "nvidia-h200"."""
    if device.type == "cuda":
        return _slugify(torch.cuda.get_device_name(device))
    cpu = _cpuinfo()
    name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*|\d+-Core", "", cpu.get("model name", platform.machine()))
    widest = next((isa for isa in ("avx512f", "avx2") if isa in cpu.get("flags", "").split()), "")
    return _slugify(f"{name} {cpu.get('cpu family', '')} {cpu.get('model', '')} {widest} {os.cpu_count()}cpu")


def _slugify(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    """First processor's fields of /proc/cpuinfo; empty where there is none."""
    fields = (line.partition(":") for line in _text("/proc/cpuinfo").split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def _text(path: str) -> str:
    """Of a file of the kernel's; nothing where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": verdict.machine(device).driver,
    }


def main() -> None:
    """Print a name for times that may be compared: of this machine's GPU or processor, with its number of threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{slug(device)}-{torch.get_num_threads()}threads")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository; None outside one."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


if __name__ == "__main__":
    main()
