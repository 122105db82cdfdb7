"""``entropy-kernels doctor``: what is installed, which backend runs what and why, and whether the numbers are right."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._console import print_table
from entropy_kernels.backends import registry

_PACKAGES = (
    "torch", "numpy", "triton", "scipy", "statsmodels", "pandas", "matplotlib", "tensorboard", "transformers", "rich",
)  # fmt: skip
_SWITCHES = ("ENTROPY_KERNELS_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")

# Largest error allowed, in units of the result's own scale (1 for nats, the row's largest gradient for gradients).
# fp32 arithmetic on a few hundred terms is good to 1e-6; a wrong term is off by 1e-3 and more.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Check:
    """One comparison with float64: the largest error of ``what`` and where it came from."""

    op: str
    backend: str
    device: str
    what: str
    ok: bool
    detail: str
    seconds: float


def run(*, check: bool = True, as_json: bool = False) -> int:
    """Print everything; 0, or 1 if a check failed."""
    checks = self_check() if check else []
    if as_json:
        report = {
            "versions": dict(versions()),
            "hardware": dict(hardware()),
            "backends": ek.backends(),
            "auto": [dict(zip(("op", "device", "backend", "reason"), row, strict=True)) for row in auto_choices()],
            "checks": [asdict(c) for c in checks],
        }
        print(json.dumps(report, indent=2))
    else:
        print_table("Versions", versions())
        print_table("Hardware", hardware())
        print_table("Backends", _backend_rows(), ("backend", "state", "ops"))
        print_table("What backend='auto' chooses", auto_choices(), ("op", "device", "backend", "why"))
        if check:
            _print_checks(checks)
    return 0 if all(c.ok for c in checks) else 1


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
    native = _native()
    capability = getattr(native, "cpu_capability", None)
    rows = [
        ("machine", f"{platform.machine()}, {platform.system()} {platform.release()}"),
        ("CPU", _cpu_name()),
        ("cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable"),
        ("torch threads", str(torch.get_num_threads())),
        ("CPU capability, torch", torch.backends.cpu.get_cpu_capability()),
        ("CPU capability, ours", str(capability()) if capability else "no native build"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            rows.append((f"GPU {index}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows += [(key, value) for key, value in sorted(os.environ.items()) if key.startswith(_SWITCHES)]
    return rows


def auto_choices() -> list[tuple[str, str, str, str]]:
    """(op, device type, backend, why) for every device type that is here."""
    rows = []
    for op in registry.OPS:
        for device in _device_types():
            order = registry.preference(op, device)
            try:
                chosen = registry.resolve(op, "auto", device)
            except RuntimeError as error:
                rows.append((op, device, "none", str(error)))
                continue
            reason = registry.unavailable(op, chosen)
            if reason is not None:
                rows.append((op, device, "none", reason))
                continue
            skipped = [f"{b}: {registry.unavailable(op, b)}" for b in order[: order.index(chosen)]]
            why = f"first available of {', '.join(order)}"
            rows.append((op, device, chosen, "; ".join([why, *skipped])))
    return rows


def self_check() -> list[Check]:
    """Each available backend of each op against float64 on small random data."""
    checks = []
    for op, states in ek.backends().items():
        compare = _CHECKS.get(op)
        for backend, state in states.items():
            if state != "available" or compare is None:
                continue
            for device in _devices_of(backend):
                checks += _timed(op, backend, device, compare)
    return checks


def _timed(op: str, backend: str, device: str, compare: Any) -> list[Check]:
    begin = time.perf_counter()
    try:
        errors = compare(backend, device)
    except Exception as error:  # a backend that raises is a finding to print, and the others are still to be checked
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [Check(op, backend, device, "runs", False, text, time.perf_counter() - begin)]
    seconds = (time.perf_counter() - begin) / len(errors)
    return [
        Check(op, backend, device, what, error <= TOLERANCE, f"error {error:.1e}, allowed {TOLERANCE:.0e}", seconds)
        for what, error in errors.items()
    ]


def _check_token_stats(backend: str, device: str) -> dict[str, float]:
    """Largest scaled errors of values and gradients, fp32 and bf16 logits, odd width, an ignored and a masked entry."""
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 24, 257
    base = torch.randn(rows, vocab, generator=generator) * 3
    base[1, 5] = -math.inf
    target = torch.randint(6, vocab, (rows,), generator=generator)
    target[2] = -100
    weights = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    temperature = 0.7
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits = base.to(device, dtype).requires_grad_()
        stats = ek.token_stats(logits, target.to(device), temperature=temperature, backend=backend)
        w = weights.to(device, torch.float32)
        loss = (stats.logprob * w[0] + stats.entropy * w[1] + stats.collision * w[2]).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        exact, exact_gradient = _token_stats_float64(logits.detach().cpu().double(), target, temperature, weights)
        name = str(dtype).removeprefix("torch.")
        values = torch.stack([s.detach().cpu().double() for s in stats])
        errors[f"{name} values"] = _largest(values - exact, exact.abs().clamp(min=1.0))
        scale = exact_gradient.abs().amax(-1, keepdim=True).clamp(min=1e-12).expand_as(exact_gradient)
        # a bf16 gradient is rounded once: half a unit in the last of 8 bits of each element
        rounding = exact_gradient.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0.0)
        excess = ((gradient.cpu().double() - exact_gradient).abs() - rounding).clamp(min=0.0)
        excess[torch.isnan(gradient.cpu())] = math.nan
        errors[f"{name} gradient"] = _largest(excess, scale)
    return errors


def _token_stats_float64(z: Tensor, target: Tensor, temperature: float, w: Tensor) -> tuple[Tensor, Tensor]:
    """Dense float64 values (4, N) and the gradient of the weighted sum of the first three, by autograd."""
    z = z.requires_grad_()
    valid = target >= 0
    index = target.clamp(min=0)[:, None]
    logp = torch.log_softmax(z / temperature, -1)
    p = logp.exp()
    # 0·(-inf) of a masked entry counts as 0
    p_logp = torch.where(p > 0, p * logp.clamp(min=-1e4), 0.0)
    logprob, entropy, collision = logp.gather(1, index)[:, 0], -p_logp.sum(-1), (p * p).sum(-1)
    step = torch.zeros_like(p).scatter(1, index, 1.0) - p
    covariance = (p_logp * step).sum(-1) - p_logp.sum(-1) * (p * step).sum(-1)
    values = torch.where(valid, torch.stack([logprob, entropy, collision, covariance]), 0.0)
    (gradient,) = torch.autograd.grad((values[:3] * w).sum(), z)
    return values.detach(), gradient


def _largest(error: Tensor, scale: Tensor) -> float:
    """Largest scaled error; inf where anything is NaN, so that it fails."""
    scaled = (error.abs() / scale).amax().item()
    return scaled if math.isfinite(scaled) else math.inf


_CHECKS = {"token_stats": _check_token_stats}


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


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices_of(backend: str) -> list[str]:
    """Where a backend can be checked; Triton without a GPU is the interpreter, on CPU tensors."""
    if backend == "torch":
        return _device_types()
    if backend == "triton":
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    return [backend]


def _native() -> Any:
    """The module _C, or the reason why it is not there."""
    try:
        return importlib.import_module("entropy_kernels._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return "not built (no compiler, or ENTROPY_KERNELS_SKIP_CPP was set at install)" if missing else str(error)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
