"""``entropy-kernels doctor``: what is installed, which backend runs what and why, and whether the numbers are right."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

import entropy_kernels as ek
from entropy_kernels._console import print_table
from entropy_kernels._machine import cpu_name, gpu_name, usable_cores
from entropy_kernels.backends import auto_table, registry
from entropy_kernels.self_check import Check, device_types, self_check

_PACKAGES = (
    "torch", "numpy", "triton", "scipy", "statsmodels", "pandas", "matplotlib", "tensorboard", "transformers", "rich",
)  # fmt: skip
_SWITCHES = ("ENTROPY_KERNELS_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def run(*, check: bool = True, as_json: bool = False) -> int:
    """Print everything; 0, or 1 if a check failed."""
    checks = self_check() if check else []
    if as_json:
        report = {
            "versions": dict(versions()),
            "hardware": dict(hardware()),
            "backends": ek.backends(),
            "architecture": registry.architecture(_gpus()[0]) if "cuda" in device_types() else None,
            "auto": [{**asdict(choice), "reason": choice.reason} for choice in auto_choices()],
            "triton_tilings": triton_tilings(),
            "checks": [asdict(c) for c in checks],
        }
        print(json.dumps(report, indent=2))
    else:
        print_table("Versions", versions())
        print_table("Hardware", hardware())
        print_table("Backends", _backend_rows(), ("backend", "state", "ops"))
        print_table("What backend='auto' chooses", _auto_rows(), ("op", "device", "for", "backend", "why"))
        print(f"{auto_table.SIZE_TEXT}\n")
        if tilings := triton_tilings():
            rows = [
                (", ".join(f"{k}={v}" for k, v in row.items() if k not in ("tiling", "origin", "milliseconds")),
                 ", ".join(f"{k}={v}" for k, v in row["tiling"].items()), row["origin"])
                for row in tilings
            ]  # fmt: skip
            print_table(
                "Tilings that Triton's kernels run with", rows, ("class of shapes", "tiling", "how it was found")
            )
        if check:
            _print_checks(checks)
    return 0 if all(c.ok for c in checks) else 1


def triton_tilings() -> list[dict[str, Any]]:
    """What this process's calls on a GPU have chosen (the self-check makes some); nothing without one."""
    if not torch.cuda.is_available() or registry.unavailable("token_stats", "triton") is not None:
        return []
    return importlib.import_module("entropy_kernels.backends.triton.tuning").report()


def _backend_rows() -> list[tuple[str, str, str]]:
    """(backend, state, ops in that state): most ops of a backend share one reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, states in ek.backends().items():
        for backend, state in states.items():
            groups.setdefault((backend, state), []).append(op)
    order = {name: i for i, name in enumerate(registry.BACKENDS)}
    ranked = sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1] != "available"))
    return [(backend, state, ", ".join(ops)) for (backend, state), ops in ranked]


def versions() -> list[tuple[str, str]]:
    """Package versions, and the compiler of the native half."""
    rows = [("entropy_kernels", ek.__version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    native = _native()
    if isinstance(native, str):
        rows.append(("native build", native))
    else:
        rows += [(f"native build, {key}", str(value)) for key, value in native.build_info().items()]
    return rows


def hardware() -> list[tuple[str, str]]:
    """CPU, GPUs, threads and the environment variables that change what runs."""
    rows = [
        ("machine", f"{platform.machine()}, {platform.system()} {platform.release()}"),
        ("CPU", cpu_name()),
        ("cores", f"{usable_cores()} usable"),
        ("torch threads", str(torch.get_num_threads())),
        ("CPU capability, torch", torch.backends.cpu.get_cpu_capability()),
        ("CPU capability, ours", _capability()),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            rows.append((f"GPU {index}", gpu_name(index)))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows += [(key, value) for key, value in sorted(os.environ.items()) if key.startswith(_SWITCHES)]
    return rows


@dataclass(frozen=True)
class Choice:
    """What "auto" serves in one class, and why.

    Attributes:
        backend: "none" where nothing can run.
        times: of the backends that were measured, relative to the best; empty where nothing was measured.
        sources: of that measurement.
        skipped: backend that would come first -> why it does not.
    """

    op: str
    device: str
    dtype: str
    size: str
    backend: str
    times: dict[str, float]
    sources: tuple[auto_table.Source, ...]
    skipped: dict[str, str]

    @property
    def reason(self) -> str:
        """Why, without the ratios, which differ from class to class."""
        if self.sources:
            best = "best" if next(iter(self.times)) == self.backend else "best that may run"
            why = [f"{best} of those measured ({'; '.join(map(str, self.sources))})"]
        else:
            order = registry.preference(self.op, torch.device(self.device))
            why = [f"not measured; the first of {', '.join(order)} that may run"]
        return "; ".join([*why, *(f"not {name}: {reason}" for name, reason in self.skipped.items())])


def auto_choices() -> list[Choice]:
    """One for every op, kind of device that is here, dtype and size class."""
    devices = [device for name in device_types() for device in (_gpus() if name == "cuda" else [torch.device(name)])]
    return [
        _choice(op, device, dtype, size)
        for op in registry.OPS
        for device in devices
        for dtype in auto_table.dtypes_of(op, device.type)
        for size in auto_table.SIZES
    ]


def _gpus() -> list[torch.device]:
    """One GPU of each architecture, the current one first."""
    current = torch.cuda.current_device()
    order = sorted(range(torch.cuda.device_count()), key=lambda index: index != current)
    found: dict[str, torch.device] = {}
    for device in (torch.device("cuda", index) for index in order):
        found.setdefault(registry.architecture(device), device)
    return list(found.values())


def _choice(op: str, device: torch.device, dtype: str, size: str) -> Choice:
    row, chosen = registry.measured(op, device, dtype, size), registry.resolve(op, "auto", device, dtype, size)
    order = registry.preference(op, device, dtype, size)
    skipped = dict(row.left_out) if row else {}
    for name in order[: order.index(chosen)]:
        skipped[name] = registry.skipped(op, name, device) or ""
    reason = registry.unavailable(op, chosen, device)
    if reason is not None:
        chosen, skipped = "none", {**skipped, chosen: reason}
    times = {name: row.times[name] for name in row.order} if row else {}
    return Choice(op, str(device), dtype, size, chosen, times, row.sources if row else (), skipped)


def _auto_rows() -> list[tuple[str, str, str, str, str]]:
    """(op, device, classes, backend, why): classes of one choice and one reason share a row."""
    groups: dict[tuple[str, str, str, str], list[Choice]] = {}
    for choice in auto_choices():
        groups.setdefault((choice.op, choice.device, choice.backend, choice.reason), []).append(choice)
    rows = []
    for (op, device, backend, reason), choices in groups.items():
        sizes: dict[str, list[str]] = {}  # dtype -> its sizes
        for choice in choices:
            sizes.setdefault(choice.dtype, []).append(choice.size)
        dtypes: dict[str, list[str]] = {}  # sizes -> dtypes that have them
        for dtype, names in sizes.items():
            text = "any size" if len(names) == len(auto_table.SIZES) else ", ".join(names)
            dtypes.setdefault(text, []).append(dtype)
        classes = "; ".join(f"{', '.join(names)}: {text}" for text, names in dtypes.items())
        rows.append((op, device, classes, backend, "; ".join(filter(None, [_ratios(choices), reason]))))
    return rows


def _ratios(choices: list[Choice]) -> str:
    """ "torch takes 13–20 times as long as cpu": how far apart the measured backends are in these classes."""
    parts = []
    for name in dict.fromkeys(name for choice in choices for name in choice.times if name != choice.backend):
        ratios = [c.times[name] / c.times[c.backend] for c in choices if {name, c.backend} <= set(c.times)]
        if ratios:
            low, high = f"{min(ratios):.3g}", f"{max(ratios):.3g}"
            span = low if low == high else f"{low}–{high}"
            parts.append(f"{name} takes {span} times as long as {choices[0].backend}")
    return ", ".join(parts)


def _print_checks(checks: list[Check]) -> None:
    if not checks:
        print("Self-check: no backend is available")
        return
    rows = [
        (c.op, c.backend, c.device, c.what, "OK" if c.ok else "FAIL", c.detail, f"{c.seconds * 1e3:.0f} ms")
        for c in checks
    ]
    title = "Self-check against float64"
    print_table(title, rows, ("op", "backend", "device", "what", "result", "largest error", "time"))
    failed = sum(not c.ok for c in checks)
    print(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")


def _native() -> Any:
    """The module _C, or the reason why it is not there."""
    try:
        return importlib.import_module("entropy_kernels._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return "not built (no compiler, or ENTROPY_KERNELS_SKIP_CPP was set at install)" if missing else str(error)


def _capability() -> str:
    """The instruction set that the C++ kernels use, and those that they could."""
    native = _native()
    if isinstance(native, str):
        return native
    try:
        found = native.cpu_capability()
    except RuntimeError as error:  # ENTROPY_KERNELS_CPU_CAPABILITY asks for one that this CPU lacks
        return f"error: {error}"
    return f"{found['selected']} (available: {', '.join(found['available'])})"
