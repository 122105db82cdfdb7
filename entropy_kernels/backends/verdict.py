"""Whether our kernels were seen to be right on a GPU: what ``entropy-kernels verify`` found here, kept on disk.

A verdict holds for one GPU, driver, torch, Triton, version of this package and build of its kernels; each combination
has a file of its own in the user's cache folder. One that is damaged, or of something else, is ignored with a warning.
What hardware runs of the project have shown stands in :data:`.registry.VERIFIED`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from entropy_kernels import _json_file, _torch
from entropy_kernels._version import __version__

FORMAT = 1
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Machine:
    """All that a verdict depends on; ``kernels``: digest of the CUDA library, the Triton kernels and their callers."""

    gpu: str
    architecture: str
    driver: str
    torch: str
    triton: str
    entropy_kernels: str
    kernels: str


@dataclass(frozen=True)
class Pair:
    """An op and backend: how many calls gave the right result, and what did not, by family of kernels."""

    op: str
    backend: str
    calls: int
    failed: Mapping[str, str]

    @property
    def verified(self) -> bool:
        return self.calls > 0 and not self.failed


@dataclass(frozen=True)
class Verdict:
    """What a run of ``entropy-kernels verify`` found; ``date`` in ISO 8601."""

    machine: Machine
    date: str
    pairs: Sequence[Pair]

    def of(self, op: str, backend: str) -> Pair | None:
        return next((pair for pair in self.pairs if (pair.op, pair.backend) == (op, backend)), None)


def architecture(device: torch.device | None = None) -> str:
    """Of a GPU, the current one by default: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def machine(device: torch.device) -> Machine:
    """This process's, with one of its GPUs."""
    return Machine(
        torch.cuda.get_device_properties(device).name,
        architecture(device),
        _driver(),
        torch.__version__,
        _triton(),
        __version__,
        _kernels(),
    )


def _triton() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def _driver() -> str:
    """Version of the kernel module; of what it offers where a container hides that."""
    name = "amdgpu" if torch.version.hip is not None else "nvidia"
    try:
        return Path(f"/sys/module/{name}/version").read_text(encoding="utf-8").strip()
    except OSError:
        version = _torch.driver_version()
        return "unknown" if version is None else f"CUDA {version}"


@functools.cache
def _kernels() -> str:
    digest = hashlib.sha256()
    sources = (path for room in ("backends", "ops") for path in sorted((_PACKAGE / room).rglob("*.py")))
    for path in (_PACKAGE / "_ops_cuda.so", *sources):
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def folder(kind: str = "verified") -> Path:
    """Of the verdicts, or of what else is kept: ``entropy_kernels/KIND`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        OSError: there is no home folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "entropy_kernels" / kind
    except RuntimeError as error:  # as for a user without an entry in /etc/passwd
        raise OSError(f"expected a folder for what is kept, got none: {error} Set XDG_CACHE_HOME.") from error


def file(machine: Machine, kind: str = "verified") -> Path:
    """Of a machine's verdict, or of what else is kept of it."""
    name = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    digest = hashlib.sha256(json.dumps(asdict(machine), sort_keys=True).encode()).hexdigest()[:12]
    return folder(kind) / f"{name}-{digest}.json"


def write(verdict: Verdict) -> Path:
    """Keep a verdict for later processes; OSError where the folder cannot be written."""
    path = file(verdict.machine)
    keep(path, {"format": FORMAT, **asdict(verdict)})
    return path


def keep(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON into the user's cache folder, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _json_file.write(path, document)


def read(machine: Machine) -> Verdict | None:
    """The verdict of a machine; None, with a warning for a file that cannot be used, where there is none."""
    path: Path | None = None
    try:
        path = file(machine)
        verdict = parse(json.loads(path.read_text(encoding="utf-8")))
        if verdict.machine != machine:
            raise ValueError(f"machine: expected {machine}, got {verdict.machine}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        if path is None:
            return None  # nothing can have been kept
        warnings.warn(f"{path}: ignored: {error}; `entropy-kernels verify` writes it anew", stacklevel=2)
        return None
    return verdict


def parse(document: Any) -> Verdict:
    """The verdict of a JSON document; ValueError, naming what is wrong, for one that is none."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    fields = _fields(document, "verdict", format=int, machine=dict, date=str, pairs=list)
    strings = dict.fromkeys(Machine.__dataclass_fields__, str)
    pairs = []
    for entry in fields["pairs"]:
        pair = Pair(**_fields(entry, "pair", op=str, backend=str, calls=int, failed=dict))
        if pair.calls < 0 or not all(isinstance(text, str) for text in pair.failed.values()):
            raise ValueError(f"pair: expected calls >= 0 and a text for each failure, got {pair}")
        pairs.append(pair)
    if len({(pair.op, pair.backend) for pair in pairs}) < len(pairs):
        raise ValueError("pairs: expected each op and backend once, got one twice")
    return Verdict(Machine(**_fields(fields["machine"], "machine", **strings)), fields["date"], pairs)


def _fields(entry: Any, what: str, **types: type) -> dict[str, Any]:
    if not isinstance(entry, dict) or set(entry) != set(types):
        raise ValueError(f"{what}: expected the fields {', '.join(types)}, got {entry!r:.200}")
    for name, kind in types.items():
        if type(entry[name]) is not kind:
            raise ValueError(f"{what}: {name}: expected {kind.__name__}, got {entry[name]!r:.80}")
    return entry
