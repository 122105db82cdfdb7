"""Which backend implements which op here, and the reason where one does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

BACKENDS = ("torch", "triton", "cpu", "cuda")

# op -> the kernel functions that a backend must have to serve it
OPS: dict[str, tuple[str, ...]] = {
    "token_stats": ("token_stats_forward", "token_stats_backward"),
    "token_covariance": ("token_covariance",),
    "clip_cov_mask": ("clip_cov_mask",),
    "kl_cov_mask": ("kl_cov_mask",),
    "policy_loss": ("policy_loss",),
}
# op -> file stem of its kernels in eager/ and triton/
_STEM = {"token_stats": "token_stats", "token_covariance": "selection", "clip_cov_mask": "selection"}
_STEM |= {"kl_cov_mask": "selection", "policy_loss": "policy_loss"}

# Rows of the table behind "auto": device type -> backends in order of preference. A row is there because a measurement
# (benchmarks/results) or, where there is none yet, a count of bytes put it there.
_AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),
}
# (op, backend) -> architectures, such as "sm_90", on which a hardware run has verified our GPU kernels: "auto" chooses
# them nowhere else. Empty: no GPU has run any of them yet.
VERIFIED: dict[tuple[str, str], tuple[str, ...]] = {}


def _module_name(op: str, backend: str) -> str:
    if backend in ("cpu", "cuda"):
        return "entropy_kernels.backends.native"
    folder = {"torch": "eager", "triton": "triton"}[backend]
    return f"entropy_kernels.backends.{folder}.{_STEM[op]}"


@functools.cache
def unavailable(op: str, backend: str) -> str | None:
    """None if ``backend`` can run ``op`` in this process, else the reason why not."""
    if backend == "cuda":
        return _cuda_unavailable(op)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'entropy_kernels[triton]')"
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
    missing = [name for name in OPS[op] if not hasattr(module, name)]
    return f"no kernel {', '.join(missing)} in {module.__name__}" if missing else None


def _cuda_unavailable(op: str) -> str | None:
    from entropy_kernels.backends import native

    if native.cuda_load_error is not None:
        return native.cuda_load_error
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs compute capability 8.0 or higher, this GPU is {architecture()}"
    missing = [name for name in OPS[op] if not native.has_cuda_kernel(name)]
    return f"no CUDA kernel {', '.join(missing)} yet" if missing else None


@functools.cache
def architecture() -> str:
    """Of the current GPU: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def unverified(op: str, backend: str, device_type: str) -> str | None:
    """Why "auto" does not choose a backend that could run: our GPU kernels, until hardware has verified them."""
    if device_type == "cpu" or backend == "torch" or architecture() in VERIFIED.get((op, backend), ()):
        return None
    return f"no hardware run has verified it on {architecture()} yet; backend={backend!r} runs it all the same"


def preference(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that "auto" tries for ``op`` on a device type, in order."""
    return _AUTO.get(device_type, ("torch",))


@functools.cache
def _auto(op: str, device_type: str) -> str:
    for backend in preference(op, device_type):
        if unavailable(op, backend) is None and unverified(op, backend, device_type) is None:
            return backend
    return "torch"


@functools.cache
def resolve(op: str, backend: str, device_type: str) -> str:
    """Name of the backend that serves ``op`` on a device type; raises if the one asked for cannot."""
    if backend == "auto":
        return _auto(op, device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend in ("cpu", "cuda") and backend != device_type:
        raise ValueError(f"backend: expected one that runs on {device_type} tensors, got {backend!r}")
    reason = unavailable(op, backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op} here: {reason}")
    return backend


@functools.cache
def _kernel(op: str, name: str, backend: str, device_type: str) -> Callable:
    module = importlib.import_module(_module_name(op, resolve(op, backend, device_type)))
    return getattr(module, name)


def kernel(op: str, name: str, backend: str, device: torch.device) -> Callable:
    """Kernel function ``name`` of ``op`` for tensors on ``device``.

    Called inside the op, so that a compiled graph holds the backend's name and no look-up.

    Raises:
        ValueError: no such backend, or one that does not run on this device type.
        RuntimeError: the backend cannot run here, with the reason.
    """
    return _kernel(op, name, backend, device.type)


def backends() -> dict[str, dict[str, str]]:
    """``{op: {backend: "available" or the reason why not}}`` for this process."""
    return {op: {name: unavailable(op, name) or "available" for name in BACKENDS} for op in OPS}
