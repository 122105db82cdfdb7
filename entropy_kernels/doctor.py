"""``entropy-kernels doctor``: what is installed, which backend runs what and why, and whether the numbers are right."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import entropy_kernels as ek
from entropy_kernels._console import print_table
from entropy_kernels._machine import cpu_name, gpu_name, usable_cores
from entropy_kernels._require import install, requirements
from entropy_kernels._version import WINDOW
from entropy_kernels.backends import native, registry, switches, verdict
from entropy_kernels.integrations._patch import Patch, patches
from entropy_kernels.smoke_matrix import DOCTOR, Call, compare

_PACKAGES = (
    "torch", "numpy", "triton", "scipy", "statsmodels", "pandas", "matplotlib", "tensorboard", "transformers", "rich",
)  # fmt: skip
_SWITCHES = ("ENTROPY_KERNELS_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def run(*, check: bool = True, as_json: bool = False) -> int:
    """Print everything; 0, or 1 if a check failed."""
    checks = self_check(_safe) if check else []
    if as_json:
        report = {
            "versions": dict(versions()),
            "untested": outside(),
            "extras": dict(extras()),
            "hardware": dict(hardware()),
            "backends": ek.backends(),
            "auto": [asdict(choice) for choice in auto_choices()],
            "verdicts": verdicts(),
            "triton_tilings": triton_tilings(),
            "integrations": [
                {"package": patch.package, "target": patch.target, "what": patch.what, "state": patch_state(patch)}
                for patch in patches()
            ],
            "verl_plugin": verl_plugin(),
            "checks": [asdict(c) for c in checks],
        }
        print(json.dumps(report, indent=2))
    else:
        print_table("Versions", versions())
        for line in outside():
            print(f"{line}\n")
        print_table("Extras", [(extra, _extra_state(extra, missing)) for extra, missing in extras()])
        print_table("Hardware", hardware())
        print_table("Backends", _backend_rows(), ("backend", "state", "ops"))
        print_table("What backend='auto' chooses", _auto_rows(), ("device", "backend", "why", "ops"))
        for found in verdicts():
            print(f"verified on {found['device']}: {found['text']}\n")
        if tilings := triton_tilings():
            switch = "are in use" if switches.TRITON_TUNE else "serve with ENTROPY_KERNELS_TRITON_TUNE=1"
            rows = [
                (row["device"], row["class"], ", ".join(f"{k}={v}" for k, v in row["tiling"].items()))
                for row in tilings
            ]  # fmt: skip
            title = f"Tilings that `entropy-kernels tune` has kept; they {switch}"
            print_table(title, rows, ("device", "class of shapes", "tiling"))
        print_table("Integrations", integrations())
        for package in _peers():
            if _version(package) is not None:
                rows = [
                    (patch.target.partition(":")[2], patch_state(patch), patch.what)
                    for patch in patches()
                    if patch.package == package
                ]
                print_table(f"What ours can replace in {package}", rows, ("theirs", "state", "ours"))
        if check:
            _print_checks(checks)
    return 0 if all(c.ok for c in checks) else 1


@dataclass(frozen=True)
class Check:
    """One call of :data:`.smoke_matrix.DOCTOR`, and its largest error or what went wrong."""

    op: str
    backend: str
    device: str
    what: str
    ok: bool
    detail: str
    seconds: float


def self_check(safe: Callable[[str, str, str], bool] = lambda op, backend, device: True) -> list[Check]:
    """Each available backend of each op, where that is ``safe`` on a device type, against float64 on small data."""
    return [
        _check_of(op, backend, device, call)
        for op, states in ek.backends().items()
        for backend, state in states.items()
        if state == "available" and op in DOCTOR
        for device in _devices_of(backend)
        if safe(op, backend, device)
        for call in DOCTOR[op]()
    ]


def _check_of(op: str, backend: str, device: str, call: Call) -> Check:
    begin = time.perf_counter()
    try:
        wrong, share = compare(call, device, backend)
        detail = wrong or f"{share:.2g} of what is allowed"
    except Exception as error:  # a backend that raises is a finding to print, and the others are still to be checked
        wrong = detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Check(op, backend, device, call.name, not wrong, detail, time.perf_counter() - begin)


def device_types() -> list[str]:
    """Device types that tensors can be on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices_of(backend: str) -> list[str]:
    """Where a backend can be checked; Triton without a GPU is the interpreter, on CPU tensors."""
    if backend == "torch":
        return device_types()
    if backend == "triton":
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    return [backend]


def _safe(op: str, backend: str, device: str) -> bool:
    """A kernel that no hardware run has verified could end or hang this process: `entropy-kernels verify` is for it."""
    return device != "cuda" or registry.unverified(op, backend, registry.gpus()[0]) is None


def triton_tilings() -> list[dict[str, Any]]:
    """What `entropy-kernels tune` has kept for each model of GPU here."""
    if not registry.gpus() or registry.unavailable("token_stats", "triton") is not None:
        return []
    kept = importlib.import_module("entropy_kernels.backends.triton.tuning").kept
    return [
        {"device": str(device), "class": name, "tiling": tiling}
        for device in registry.gpus()
        for name, tiling in kept(device).items()
    ]


def _backend_rows() -> list[tuple[str, str, str]]:
    """(backend, state, ops in that state): most ops of a backend share one reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, states in ek.backends().items():
        for backend, state in states.items():
            groups.setdefault((backend, state), []).append(op)
    order = {name: i for i, name in enumerate(registry.BACKENDS)}
    ranked = sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1] != "available"))
    return [(backend, state, _ops(ops)) for (backend, state), ops in ranked]


def _ops(names: list[str]) -> str:
    return "all" if set(names) == set(registry.OPS) else ", ".join(names)


def outside() -> list[str]:
    """Sentences on versions that lie outside of the support window; empty where none does."""
    lines, found = [], dict(versions())
    for name, (oldest, newest) in WINDOW.items():
        version = found[name].split(" ")[0]
        if not version[:1].isdigit():  # not installed
            continue
        kind = "older" if _minor(version) < _minor(oldest) else "newer" if _minor(version) > _minor(newest) else ""
        if kind:
            lines.append(f"{name} {version} is {kind} than what is tested, {oldest} to {newest}.")
    return lines


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def extras() -> list[tuple[str, list[str]]]:
    """What each extra that a command needs lacks here."""
    return [(extra, [name for name in requirements(extra) if not _installed(name)]) for extra in ("analysis", "train")]


def _installed(requirement: str) -> bool:
    name = re.split(r"[^\w.-]", requirement)[0]
    return any(True for _ in importlib.metadata.distributions(name=name))


def _extra_state(extra: str, missing: list[str]) -> str:
    does = {"analysis": "entropy-kernels fit, figures", "train": "entropy-kernels train"}[extra]
    return f"{does}: " + (f"lacks {', '.join(missing)}; {install(extra)}" if missing else "all there")


def versions() -> list[tuple[str, str]]:
    """Package versions, and the compiler of the native half."""
    rows = [
        ("entropy_kernels", ek.__version__),
        ("package location", os.path.dirname(ek.__file__)),
        ("python", f"{platform.python_version()} ({sys.executable})"),
    ]
    rows += [(package, _version(package) or "not installed") for package in _PACKAGES]
    try:
        rows += [(f"native build, {key}", value) for key, value in native.cpu_build().items()]
    except RuntimeError as error:
        rows.append(("native build", str(error)))
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
class AutoChoice:
    """What "auto" serves on a device; ``skipped``: backend that would come first -> why it does not.

    ``backend`` is "none" where nothing can run.
    """

    op: str
    device: str
    backend: str
    skipped: dict[str, str]


def auto_choices() -> list[AutoChoice]:
    """One for every op and kind of device that is here."""
    devices = [torch.device(name) for name in device_types() if name != "cuda"] + registry.gpus()
    return [_choice(op, device) for op in registry.OPS for device in devices]


def _choice(op: str, device: torch.device) -> AutoChoice:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of is in the table
        chosen = registry.resolve(op, "auto", device)
    order = registry.preference(op, device.type)
    skipped = {name: registry.skipped(op, name, device) or "" for name in order[: order.index(chosen)]}
    reason = registry.unavailable(op, chosen, device)
    if reason is not None:
        chosen, skipped = "none", {**skipped, chosen: reason}
    return AutoChoice(op, str(device), chosen, skipped)


def _auto_rows() -> list[tuple[str, str, str, str]]:
    """Ops of one choice share a row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for choice in auto_choices():
        order = ", ".join(registry.preference(choice.op, torch.device(choice.device).type))
        first = f"first choice (order: {order})"
        why = "; ".join(f"not {name}: {reason}" for name, reason in choice.skipped.items()) or first
        groups.setdefault((choice.device, choice.backend, why), []).append(choice.op)
    return [(device, backend, why, _ops(ops)) for (device, backend, why), ops in groups.items()]


def integrations() -> list[tuple[str, str]]:
    """The packages that have patches, as they are installed; none is imported."""
    rows = []
    for package in _peers():
        tested = sorted({version for patch in patches() if patch.package == package for version in patch.versions})
        found = _version(package)
        state = "tested" if found in tested else f"not tested, no function of it is replaced: {' or '.join(tested)} is"
        rows.append((package, "not installed" if found is None else f"{found}, {state}"))
    if _version("verl") is not None:
        rows.append(("verl's plugin", verl_plugin()))
    return rows


def _peers() -> list[str]:
    return list(dict.fromkeys(patch.package for patch in patches()))


def patch_state(patch: Patch) -> str:
    """Whether ours is in its place, and if not whether it could be."""
    if patch.active:
        return f"in place; calls: {patch.calls}"
    reason = patch.refusal()
    return "ready" if reason is None else "refused"


def verl_plugin() -> str:
    """Whether verl will load our plugin: its entry point, and what verl's own switch says."""
    points = importlib.metadata.entry_points(group="verl.plugins")
    if "entropy_kernels" not in points.names:
        return "no entry point: install entropy_kernels again, with pip"
    switch = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    named = [name.strip() for name in switch.lower().split(",")]
    if named == ["auto"] or "entropy_kernels" in named:
        return f"loaded when verl is imported (VERL_USE_EXTERNAL_PLUGINS={switch}); a loss_mode ek_* turns it on"
    return f"not loaded: VERL_USE_EXTERNAL_PLUGINS={switch} does not name entropy_kernels"


def verdicts() -> list[dict[str, str]]:
    """By whom and when the kernels were seen to be right on each model of GPU here."""
    rows = []
    for device in registry.gpus():
        architecture, found = verdict.architecture(device), registry.verdict_of(device)
        texts = sorted(
            {f"{folder} ({architecture})" for (_, _, name), folder in registry.VERIFIED.items() if name == architecture}
        )
        if found is not None:
            right = sum(pair.verified for pair in found.pairs)
            path = verdict.file(found.machine)
            texts.append(f"{right} of {len(found.pairs)} pairs of op and backend, {found.date}, {path}")
            wrong = (pair for pair in found.pairs if not pair.verified)
            texts += [f"{p.backend} {p.op} {registry.unverified(p.op, p.backend, device)}" for p in wrong]
        rows.append({"device": str(device), "text": "; ".join(texts) or "nothing yet: run `entropy-kernels verify`"})
    return rows


def _print_checks(checks: list[Check]) -> None:
    if not checks:
        print("Self-check: no backend is available")
        return
    rows = []
    groups = itertools.groupby(checks, lambda check: (check.op, check.backend, check.device, check.ok))
    for (op, backend, device, ok), group in groups:
        found = list(group)
        seen = f"{len(found)} right" if ok else "; ".join(f"{check.what}: {check.detail}" for check in found)
        milliseconds = sum(check.seconds for check in found) * 1e3
        rows.append((op, backend, device, "OK" if ok else "FAIL", seen, f"{milliseconds:.0f} ms"))
    print_table("Self-check against float64", rows, ("op", "backend", "device", "result", "calls", "time"))
    failed = sum(not c.ok for c in checks)
    print(f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")


def _capability() -> str:
    """The instruction set that the C++ kernels use, and those that they could."""
    try:
        found = native.cpu_capability()
    except RuntimeError as error:  # not built, or ENTROPY_KERNELS_CPU_CAPABILITY asks for one that this CPU lacks
        return str(error)
    return f"{found.selected} (available: {', '.join(found.available)})"
