"""Which backend implements which op here, and the reason where one does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_kernels._require import install
from entropy_kernels.backends import verdict
from entropy_kernels.backends.verdict import architecture

BACKENDS = ("torch", "triton", "cpu", "cuda")


class Op(NamedTuple):
    name: str
    kernels: tuple[str, ...]  # the functions that a backend must have to serve it
    stem: str  # file of its kernels in eager/ and triton/
    # Backend -> a kernel, in a file of the op's name, that does all of a pass in one. Who names the backend gets it;
    # "auto" does not take it: no measurement has shown it to be faster than the parts.
    fused: Mapping[str, str] = MappingProxyType({})


_STATISTICS = ("token_stats_forward", "token_stats_backward")
OPS = {
    op.name: op
    for op in (
        Op("token_stats", _STATISTICS, "token_stats"),
        # products by torch, a tile at a time, between these
        Op("linear_token_stats", _STATISTICS, "token_stats", {"triton": "linear_token_stats_forward"}),
        Op("token_covariance", ("token_covariance",), "selection"),
        Op("clip_cov_mask", ("clip_cov_mask",), "selection"),
        Op("kl_cov_mask", ("kl_cov_mask",), "selection"),
        Op("budget_mask", ("budget_mask",), "selection"),
    )
}
# Device type -> backends in the order that "auto" tries them in.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}

# (op, backend, architecture) that a hardware run of the project has verified -> the folder with its results, from the
# root of the repository. What `entropy-kernels verify` found on the user's own GPU comes before it.
VERIFIED: dict[tuple[str, str, str], str] = {
    ("token_stats", "cuda", "sm_90"): "benchmarks/results/nvidia-h200",
    ("linear_token_stats", "cuda", "sm_90"): "benchmarks/results/nvidia-h200",
    ("token_covariance", "cuda", "sm_90"): "benchmarks/results/nvidia-h200",
    ("clip_cov_mask", "cuda", "sm_90"): "benchmarks/results/nvidia-h200",
    ("kl_cov_mask", "cuda", "sm_90"): "benchmarks/results/nvidia-h200",
    ("budget_mask", "cuda", "sm_90"): "benchmarks/results/nvidia-h200",
}


def _module_name(op: str, backend: str) -> str:
    if backend in ("cpu", "cuda"):
        return "entropy_kernels.backends.native"
    folder = {"torch": "eager", "triton": "triton"}[backend]
    return f"entropy_kernels.backends.{folder}.{OPS[op].stem}"


@functools.cache
def unavailable(op: str, backend: str, device: torch.device | None = None) -> str | None:
    """None if ``backend`` can run ``op`` in this process, else the reason why not.

    ``device``: of the tensors; without one the current GPU is asked, where the backend needs one.
    """
    if backend == "cuda":
        return _cuda_unavailable(op, device)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return f"triton is not installed ({install('triton', 'triton')})"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "no GPU here; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
    if backend == "cpu":
        from entropy_kernels.backends import native

        if native.load_error is not None:
            return native.load_error
    try:
        module = importlib.import_module(_module_name(op, backend))
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    missing = [name for name in OPS[op].kernels if not hasattr(module, name)]
    return f"no kernel {', '.join(missing)} in {module.__name__}" if missing else None


def _cuda_unavailable(op: str, device: torch.device | None) -> str | None:
    from entropy_kernels.backends import native

    if native.cuda_load_error is not None:
        return native.cuda_load_error
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0 or higher, this GPU is {architecture(device)}"
    missing = [name for name in OPS[op].kernels if not native.has_cuda_kernel(name)]
    return f"no CUDA kernel {', '.join(missing)} yet" if missing else None


def gpus() -> list[torch.device]:
    """One GPU of each model that is here, the current one first."""
    if not torch.cuda.is_available():
        return []
    order = sorted(range(torch.cuda.device_count()), key=lambda index: index != torch.cuda.current_device())
    found: dict[str, torch.device] = {}
    for device in (torch.device("cuda", index) for index in order):
        found.setdefault(torch.cuda.get_device_properties(device).name, device)
    return list(found.values())


@functools.cache
def verdict_of(device: torch.device) -> verdict.Verdict | None:
    """What `entropy-kernels verify` found on a GPU, read once."""
    return verdict.read(verdict.machine(device))


def unverified(op: str, backend: str, device: torch.device) -> str | None:
    """Why "auto" does not choose a backend that could run: our GPU kernels, until hardware has verified them."""
    if device.type == "cpu" or backend == "torch":
        return None
    found = verdict_of(device)
    pair = None if found is None else found.of(op, backend)
    if pair is None:  # what was seen here counts before what was seen on another GPU of its kind
        if (op, backend, architecture(device)) in VERIFIED:
            return None
        return f"not verified on this {architecture(device)} yet: run `entropy-kernels verify`"
    if pair.verified:
        return None
    what = next((f"{name}: {text}" for name, text in pair.failed.items()), "no call of it ran")
    return f"not right here, says `entropy-kernels verify`: {what}"


def preference(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that "auto" tries for ``op``, in order; torch, which always can, comes last."""
    return tuple(name for name in ORDER.get(device_type, ("torch",)) if name not in OPS[op].fused)


@functools.cache
def resolve(op: str, backend: str, device: torch.device) -> str:
    """Name of the backend that serves ``op`` on a device; raises if the one asked for cannot.

    Args:
        device: of a tensor, so that a GPU comes with its index: two GPUs of a machine may differ, and what was
            found for one of them is remembered.
    """
    if backend == "auto":
        chosen = next(name for name in preference(op, device.type) if not skipped(op, name, device))
        if chosen == "torch":
            _warn_once_of_unverified(op, device)
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend in ("cpu", "cuda") and backend != device.type:
        raise ValueError(f"backend: expected one that runs on {device.type} tensors, got {backend!r}")
    reason = unavailable(op, backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op} here: {reason}")
    return backend


def skipped(op: str, backend: str, device: torch.device) -> str | None:
    """Why "auto" passes over a backend; torch is what is left, and raises by itself where it cannot."""
    return None if backend == "torch" else unavailable(op, backend, device) or unverified(op, backend, device)


_warned: set[str] = set()  # architectures


def forget() -> None:
    """What was found here so far; the next call looks again."""
    for cached in (unavailable, resolve, kernel_of, verdict_of):
        cached.cache_clear()
    _warned.clear()


def _warn_once_of_unverified(op: str, device: torch.device) -> None:
    """That plain torch serves where faster kernels could, and what to type; once per process and architecture."""
    if device.type != "cuda" or architecture(device) in _warned:
        return
    for name in preference(op, device.type)[:-1]:
        reason = None if unavailable(op, name, device) else unverified(op, name, device)
        if reason is not None:
            _warned.add(architecture(device))
            warnings.warn(
                f"entropy_kernels: backend='auto' serves {op} with plain torch operations on "
                f"{torch.cuda.get_device_properties(device).name}; the {name} kernels are {reason}; "
                "`entropy-kernels doctor` shows all",
                stacklevel=2,
            )
            return


@functools.cache
def kernel_of(op: str, name: str, backend: str, device: torch.device) -> Callable:
    """Kernel function ``name`` of ``op`` for tensors on ``device``.

    Called inside the op, so that a compiled graph holds the backend's name and no look-up.

    Raises:
        ValueError: no such backend, or one that does not run on this type of device.
        RuntimeError: the backend cannot run here, with the reason.
    """
    return getattr(importlib.import_module(_module_name(op, resolve(op, backend, device))), name)


def kernel(op: str, name: str, backend: str, tensor: Tensor) -> Callable:
    """:func:`kernel_of` for a call on ``tensor``."""
    return kernel_of(op, name, backend, tensor.device)


def fused(op: str, backend: str, device: torch.device) -> Callable | None:
    """The kernel that does a forward pass of ``op`` in one, where it serves ``backend``; None: it is done in parts."""
    chosen = resolve(op, backend, device)
    name = OPS[op].fused.get(chosen)
    if name is None:
        return None
    return getattr(importlib.import_module(f"entropy_kernels.backends.{chosen}.{op}"), name)


def backends() -> dict[str, dict[str, str]]:
    """Which backends can run which operators in this process, on its current GPU if it has one.

    "cpu" and "cuda" are the C++ and CUDA kernels, "triton" Triton's, "torch" plain torch operations, on any device.
    ``backend="auto"`` takes on a CPU "cpu", else "torch"; on a GPU the first of "cuda", "triton" and "torch" that is
    verified there (``entropy-kernels doctor`` shows all of it). Raises nothing.

    Returns:
        ``{operator: {backend: "available" or the reason why not}}``.

    Source:
        docs/gpu.md.
    """
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {op: {name: unavailable(op, name, gpu) or "available" for name in BACKENDS} for op in OPS}
