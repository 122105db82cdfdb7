"""Which backend implements which op here, and the reason where one does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from entropy_kernels.backends import auto_table
from entropy_kernels.backends.auto_table import Row, size_class

BACKENDS = ("torch", "triton", "cpu", "cuda")

# op -> the kernel functions that a backend must have to serve it
OPS: dict[str, tuple[str, ...]] = {
    "token_stats": ("token_stats_forward", "token_stats_backward"),
    # products by torch, a tile at a time, between these
    "linear_token_stats": ("token_stats_forward", "token_stats_backward"),
    "token_covariance": ("token_covariance",),
    "clip_cov_mask": ("clip_cov_mask",),
    "kl_cov_mask": ("kl_cov_mask",),
    "policy_loss": ("policy_loss",),
}
# op -> file stem of its kernels in eager/ and triton/
_STEM = {"token_stats": "token_stats", "token_covariance": "selection", "clip_cov_mask": "selection"}
_STEM |= {"kl_cov_mask": "selection", "policy_loss": "policy_loss", "linear_token_stats": "token_stats"}

# (op, backend) -> a kernel, in a file of the op's name, that does all of a pass in one. Whoever names the backend gets
# it; "auto" takes it only in classes in which it was measured to be the fastest.
_FUSED = {("linear_token_stats", "triton"): "linear_token_stats_forward"}

# Device type -> backends in the order that "auto" tries them in where nothing was measured. What was measured, and
# which GPU kernels a hardware run has verified, is in auto_table.json.
_DEFAULT_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),
}


def _module_name(op: str, backend: str) -> str:
    if backend in ("cpu", "cuda"):
        return "entropy_kernels.backends.native"
    folder = {"torch": "eager", "triton": "triton"}[backend]
    return f"entropy_kernels.backends.{folder}.{_STEM[op]}"


@functools.cache
def unavailable(op: str, backend: str, device: torch.device | None = None) -> str | None:
    """None if ``backend`` can run ``op`` in this process, else the reason why not.

    ``device``: of the tensors; without one the current GPU is asked, where the backend needs one.
    """
    if backend == "cuda":
        return _cuda_unavailable(op, device)
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


def _cuda_unavailable(op: str, device: torch.device | None) -> str | None:
    from entropy_kernels.backends import native

    if native.cuda_load_error is not None:
        return native.cuda_load_error
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0 or higher, this GPU is {architecture(device)}"
    missing = [name for name in OPS[op] if not native.has_cuda_kernel(name)]
    return f"no CUDA kernel {', '.join(missing)} yet" if missing else None


@functools.cache
def architecture(device: torch.device | None = None) -> str:
    """Of a GPU, the current one by default: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def unverified(op: str, backend: str, device: torch.device) -> str | None:
    """Why "auto" does not choose a backend that could run: our GPU kernels, until hardware has verified them."""
    if device.type == "cpu" or backend == "torch":
        return None
    if (op, backend, architecture(device)) in auto_table.load().verified:
        return None
    return f"no hardware run has verified it on {architecture(device)} yet; backend={backend!r} runs it all the same"


def measured(op: str, device: torch.device, dtype: str | None, size: str | None) -> Row | None:
    """The table's row for a class on this machine's CPU or one of its GPUs; None where nothing was measured."""
    if dtype is None or size is None or device.type not in _DEFAULT_ORDER:
        return None
    return auto_table.load().rows.get((op, "cpu" if device.type == "cpu" else architecture(device), dtype, size))


def default_order(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that can serve "auto", in the order to prefer where measurements do not tell them apart.

    Torch can do everything: those behind it, fused ones, are taken only where a measurement puts them before it.
    """
    order = _DEFAULT_ORDER.get(device_type, ("torch",))
    return tuple(sorted(order, key=lambda name: (op, name) in _FUSED))


def preference(op: str, device: torch.device, dtype: str | None = None, size: str | None = None) -> tuple[str, ...]:
    """The backends that "auto" tries for ``op`` on a device, in order.

    Those that were measured for this dtype ("bf16") and size class ("large") come as the measurement ranks them, the
    others behind them, and torch, which always can, ends the list.
    """
    row, ranked = measured(op, device, dtype, size), [*default_order(op, device.type)]
    if row is not None:
        rest = (name for name in ranked if name not in row.order and name not in row.left_out)
        ranked = [*row.order, *rest, "torch"]
    return tuple(ranked[: ranked.index("torch") + 1])


@functools.cache
def resolve(op: str, backend: str, device: torch.device, dtype: str | None = None, size: str | None = None) -> str:
    """Name of the backend that serves ``op`` on a device; raises if the one asked for cannot.

    Args:
        device: of a tensor, so that a GPU comes with its index: two GPUs of a machine may differ, and what was
            found for one of them is remembered.
        dtype, size: see :mod:`.auto_table`; they matter to "auto" only, which takes the default order without them.
    """
    if backend == "auto":
        return next(name for name in preference(op, device, dtype, size) if not skipped(op, name, device))
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


@functools.cache
def _kernel(
    op: str, name: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, size: str | None = None
) -> Callable:
    chosen = resolve(op, backend, device, None if dtype is None else auto_table.DTYPES.get(dtype), size)
    return getattr(importlib.import_module(_module_name(op, chosen)), name)


def kernel(op: str, name: str, backend: str, tensor: Tensor) -> Callable:
    """Kernel function ``name`` of ``op`` for a call on ``tensor``: its logits, or what it has one of per token.

    Called inside the op, so that a compiled graph holds the backend's name and no look-up.

    Raises:
        ValueError: no such backend, or one that does not run on this type of device.
        RuntimeError: the backend cannot run here, with the reason.
    """
    if backend != "auto":
        return _kernel(op, name, backend, tensor.device)
    size = size_class(op, tensor.numel(), tensor.element_size())
    return _kernel(op, name, backend, tensor.device, tensor.dtype, size)


def fused(op: str, backend: str, device: torch.device, dtype: torch.dtype, size: str) -> Callable | None:
    """The kernel that does a forward pass of ``op`` in one, where it serves ``backend``; None: it is done in parts."""
    chosen = resolve(op, backend, device, auto_table.DTYPES.get(dtype), size)
    name = _FUSED.get((op, chosen))
    if name is None:
        return None
    return getattr(importlib.import_module(f"entropy_kernels.backends.{chosen}.{op}"), name)


def backends() -> dict[str, dict[str, str]]:
    """``{op: {backend: "available" or the reason why not}}`` for this process, and its current GPU if it has one."""
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {op: {name: unavailable(op, name, gpu) or "available" for name in BACKENDS} for op in OPS}
