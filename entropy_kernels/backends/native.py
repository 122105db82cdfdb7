"""The C++ kernels of ``_ops.so`` and the CUDA kernels of ``_ops_cuda.so`` under the names that every backend shares.

Both register under the same operators: torch picks by the device of the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from entropy_kernels import _torch
from entropy_kernels._rows import RowOptions
from entropy_kernels.backends import radix_select, reused_memory, switches
from entropy_kernels.backends.radix_select import Count

_FOLDER = Path(__file__).parent.parent
_LIBRARY = _FOLDER / "_ops.so"
_CUDA_LIBRARY = _FOLDER / "_ops_cuda.so"


def _load() -> str | None:
    """Load the extension; None, or the reason why it is not there."""
    if not _LIBRARY.exists():
        if (_FOLDER.parent / "csrc").is_dir():  # a clone, which hides an installed package from who works in it
            return (
                f"imported from the sources in {_FOLDER.parent}, which have no kernels: leave this folder, or build "
                "them in place, with a C++ compiler: pip install -e ."
            )
        return "the C++ extension was not built (no compiler, or ENTROPY_KERNELS_SKIP_CPP was set at install)"
    return _load_library(_LIBRARY)


def _load_cuda() -> str | None:
    """The same for the CUDA half, which needs the schemas of the other."""
    if load_error is not None:
        return load_error
    if not _CUDA_LIBRARY.exists():
        return "built without CUDA (no CUDA torch or toolkit at install, or ENTROPY_KERNELS_SKIP_CUDA was set)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return _load_library(_CUDA_LIBRARY)


def _load_library(library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None


load_error = _load()
cuda_load_error = _load_cuda()
_ops = torch.ops.entropy_kernels_native


def token_stats_forward(
    logits: Tensor, target: Tensor, temperature: Tensor, options: RowOptions, want: int
) -> tuple[Tensor, Tensor]:
    return _ops.token_stats_forward(logits, target, temperature, *options, want)


def token_stats_backward(
    grad_stats: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    options: RowOptions,
    want: int,
    inplace: bool,
) -> Tensor:
    if inplace:
        dlogits = logits
    elif logits.is_cpu:
        dlogits = reused_memory.empty(logits.shape, logits.dtype)
    else:
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _ops.token_stats_backward(grad_stats, logits, target, temperature, state, *options, want, dlogits)
    return dlogits


class _SelectionSteps:
    """The C++ steps of :mod:`..radix_select`; finding a digit in 2048 bins is left to torch."""

    find_digit = staticmethod(radix_select.find_digit)
    largest_first = staticmethod(lambda keys: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(_ops, name)


_steps = cast(radix_select.Steps, _SelectionSteps())


def _over_ranks_in_steps(name: str, alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel of the contract: ``alone``, or the shared driver over our steps where there is a group of ranks."""
    shared = getattr(radix_select, name)

    def kernel(*given: Any) -> Tensor:
        return shared(_steps, *given) if given[-1] else alone(*given[:-1])

    return kernel


def _size(count: Count) -> tuple[float, int, bool]:
    return -1.0 if count.ratio is None else count.ratio, -1 if count.k is None else count.k, count.at_least_one


def _clip_cov_mask(*given: Any) -> Tensor:
    *tokens, seed, count, band = given
    return _ops.clip_cov_mask(*tokens, seed, *_size(count), *band[:4], count.numbers)


def _kl_cov_mask(*given: Any) -> Tensor:
    *tokens, count = given
    return _ops.kl_cov_mask(*tokens, *_size(count), count.numbers)


token_covariance = _over_ranks_in_steps("token_covariance", lambda *given: _ops.token_covariance(*given))
clip_cov_mask = _over_ranks_in_steps("clip_cov_mask", _clip_cov_mask)
kl_cov_mask = _over_ranks_in_steps("kl_cov_mask", _kl_cov_mask)
budget_mask = _over_ranks_in_steps("budget_mask", lambda *given: _ops.budget_mask(*given))


class CpuCapability(NamedTuple):
    """Instruction sets of the C++ kernels: what they use, and all that this CPU has, the best last."""

    selected: str
    available: list[str]


def cpu_capability() -> CpuCapability:
    """The best that this CPU has, unless ENTROPY_KERNELS_CPU_CAPABILITY names another.

    Raises:
        RuntimeError: without the C++ extension, or if the variable names an instruction set that is not there.
    """
    selected, *available = _cpu_answer("capability")
    if not selected:
        raise RuntimeError(*available)
    return CpuCapability(selected, available)


def cpu_build() -> dict[str, str]:
    """Compiler and C++ standard of the C++ extension.

    Raises:
        RuntimeError: without it.
    """
    return dict(zip(("compiler", "cplusplus"), _cpu_answer("build"), strict=True))


def _cpu_answer(name: str) -> list[str]:
    """``entropy_kernels_cpu_<name>`` of the C++ extension (csrc/cpu/build.cpp)."""
    if load_error is not None:
        raise RuntimeError(load_error)
    function = getattr(ctypes.CDLL(str(_LIBRARY)), f"entropy_kernels_cpu_{name}")
    function.restype = ctypes.c_char_p
    return function().decode().split("\t")


def has_cuda_kernel(name: str) -> bool:
    """Whether the CUDA half that is loaded implements the operator ``name``."""
    return _torch.has_kernel(f"entropy_kernels_native::{name}", "CUDA")


@dataclass(frozen=True)
class CudaKernel:
    """What one compiled kernel takes on the current device; bytes but for the registers."""

    name: str
    registers: int
    shared: int  # static
    local: int  # spills and stack: 0, or something is wrong
    ptx_version: int


def cuda_kernels() -> list[CudaKernel]:
    """The CUDA kernels as the driver has loaded them for the current device.

    Raises:
        RuntimeError: without the CUDA half, or without a device.
    """
    return parse_cuda_kernels(_cuda_function("kernels", ctypes.c_char_p)().decode())


def _cuda_function(name: str, result: Any, *arguments: Any) -> Any:
    """``entropy_kernels_cuda_<name>`` of the CUDA half (csrc/cuda/kernels.cpp)."""
    if cuda_load_error is not None:
        raise RuntimeError(cuda_load_error)
    function = getattr(ctypes.CDLL(str(_CUDA_LIBRARY)), f"entropy_kernels_cuda_{name}")
    function.argtypes, function.restype = arguments, result
    return function


def parse_cuda_kernels(report: str) -> list[CudaKernel]:
    kernels = []
    for line in report.splitlines():
        name, *numbers = line.split("\t")
        if len(numbers) != 4:
            raise RuntimeError(f"CUDA kernels: {report.strip()}")
        kernels.append(CudaKernel(name, *map(int, numbers)))
    return kernels


def largest_cluster() -> int:
    """Blocks of the largest cluster that the current device grants the covariance kernel; 0 where it has no clusters.

    Raises:
        RuntimeError: without the CUDA half, or without a device.
    """
    answer = _cuda_function("largest_cluster", ctypes.c_char_p)().decode()
    if not answer.isdigit():
        raise RuntimeError(f"largest cluster: {answer}")
    return int(answer)


# The values that each may have; csrc/cuda/switches.h says what they do.
CUDA_SWITCHES = {"cluster_tokens": range(2**63), "backward_reversed": range(2), "row_invariant": range(2)}


def set_cuda_switch(name: str, value: int) -> int:
    """Change what later launches of CUDA kernels do, in the whole process, to measure it. Returns the value before.

    A CUDA graph keeps what it was captured with.

    Raises:
        ValueError: no such switch, or a value that it cannot have.
        RuntimeError: without the CUDA half.
    """
    if name not in CUDA_SWITCHES:
        raise ValueError(f"name: expected one of {', '.join(CUDA_SWITCHES)}, got {name!r}")
    values = CUDA_SWITCHES[name]
    if not isinstance(value, int) or value not in values:
        raise ValueError(f"value: expected an integer from 0 to {values[-1]} for {name}, got {value!r}")
    return _cuda_function("switch", ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)(name.encode(), value)


if switches.ROW_INVARIANT and cuda_load_error is None:
    set_cuda_switch("row_invariant", 1)
