"""The CUDA kernels of token_stats run on CPU tensors: cuda_emulator.cpp behind the functions that every backend has.

Needs a C++ compiler, no toolkit and no GPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entropy_kernels._rows import RowOptions, state_rows

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
WARP, VECTORS, MAX_WARPS, BULK_WARPS, BACKWARD_WARPS = 32, 4, 8, 4, 4  # of csrc/cuda/problem.h
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Options(ctypes.Structure):
    """``RowOptions`` of csrc/common/row_options.h, and of entropy_kernels/_rows.py."""

    _fields_ = (("softcap", ctypes.c_double), *((name, _L) for name in RowOptions._fields[1:]))


class _Call(ctypes.Structure):
    """``Call`` of cuda_emulator.cpp."""

    _fields_ = (
        *((name, _I) for name in ("element", "bulk", "threads", "parts", "vectors", "reversed")),
        ("blocks", _I),
        ("seed", ctypes.c_uint64), ("logits", _P),
        *((name, _L) for name in ("batch_stride", "length_stride", "column_stride")),
        *((name, _I) for name in ("rows", "length", "vocab", "columns")),
        ("target", _P), ("wide_target", _I), ("temperature_stride", _I), ("temperature", _P), ("number", _I),
        ("options", _Options), ("want", _L), ("stats", _P),
        ("grad_stats", _P), ("statistic_stride", _L), ("grad_row_stride", _L),
        ("state", _P), ("field_stride", _L), ("row_stride", _L),
        ("dlogits", _P), *((name, _L) for name in ("out_batch_stride", "out_length_stride", "out_column_stride")),
    )  # fmt: skip


def compiled(name: str, folder: Path, *functions: str) -> ctypes.CDLL:
    """``NAME.cpp`` with ``functions``, compiled by the first process that asks for it in ``folder``."""
    library = folder / f"{name}.so"
    # -O1: the faster code of -O2 takes longer to make than it saves
    # a fortified longjmp takes the jump from one fiber to another for a mistake
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
    flags += ["-Wall", "-Wno-unknown-pragmas"]
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = library.with_suffix(".made")
            command = [COMPILER, *flags, f"-I{HERE.parent / 'csrc'}", str(HERE / f"{name}.cpp"), "-o", str(made)]
            subprocess.run(command, check=True)
            made.rename(library)
    loaded = ctypes.CDLL(str(library))
    for function in functions:
        getattr(loaded, function).argtypes, getattr(loaded, function).restype = [ctypes.c_void_p], ctypes.c_char_p
    return loaded


def compile_library(folder: Path) -> ctypes.CDLL:
    return compiled("cuda_emulator", folder, "emulate_forward", "emulate_backward")


def missing() -> str | None:
    """Why the emulator cannot be compiled here."""
    return None if shutil.which(COMPILER) else f"no C++ compiler {COMPILER}"


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """As csrc/cuda/token_stats.cpp has them: those of dimensions of size 1 are 0, or 1 for columns."""
    alone = (0, 0, 1)
    return tuple(s if n > 1 else a for n, s, a in zip(tensor.shape, tensor.stride(), alone, strict=True))


def _equally_aligned(a: Tensor, b: Tensor) -> bool:
    (ab, al, ac), (bb, bl, bc) = _strides(a), _strides(b)
    size = a.element_size()
    offsets = (a.data_ptr() - b.data_ptr(), (ab - bb) * size, (al - bl) * size)
    return ac == bc == 1 and all(offset % 16 == 0 for offset in offsets)


@dataclass
class Emulated:
    """The kernels with a given way to cut rows: whole, in ``parts``, through bulk copies or not.

    The backward pass may take the rows ``reversed``, and run only its first ``blocks``. Without ``vectors`` the forward
    pass reads every row by elements.
    """

    library: ctypes.CDLL
    bulk: bool = False
    parts: int = 1
    seed: int = 0
    most_warps: int = MAX_WARPS
    reversed: bool = False
    vectors: bool = True
    blocks: int | None = None

    def _common(self, logits, target, temperature, options: RowOptions, want: int) -> _Call:
        call = _Call(element=_ELEMENTS[logits.dtype], bulk=self.bulk, parts=self.parts, seed=self.seed)
        call.logits, call.target, call.temperature = logits.data_ptr(), target.data_ptr(), temperature.data_ptr()
        call.batch_stride, call.length_stride, call.column_stride = _strides(logits)
        call.rows, call.length, call.vocab = target.numel(), logits.shape[1], logits.shape[2]
        call.columns = options.columns(logits.shape[2])
        call.wide_target, call.temperature_stride = target.dtype == torch.int64, int(temperature.numel() != 1)
        call.number = temperature.dim() == 0
        call.options, call.want = _Options(*options), want
        per_warp = WARP * VECTORS * 16 // logits.element_size()
        warps = BULK_WARPS if self.bulk else max(1, min(self.most_warps, -(-call.columns // per_warp)))
        call.threads = WARP * warps
        return call

    @staticmethod
    def _run(function, call: _Call) -> None:
        error = function(ctypes.byref(call))
        if error is not None:
            raise RuntimeError(error.decode())

    def token_stats_forward(self, logits, target, temperature, options: RowOptions, want) -> tuple[Tensor, Tensor]:
        rows, dtype = target.numel(), temperature.dtype
        stats, state = (
            torch.full((count, rows), torch.nan, dtype=dtype) for count in (want.bit_count(), state_rows(want))
        )
        if rows:
            call = self._common(logits, target, temperature, options, want)
            call.stats, call.state = stats.data_ptr(), state.data_ptr()
            call.vectors = self.vectors and call.column_stride == 1
            if logits.element_size() == 8 or not call.vectors:
                call.bulk = 0
            self._run(self.library.emulate_forward, call)
        return stats, state

    def token_stats_backward(
        self, grad_stats, logits, target, temperature, state, options: RowOptions, want, inplace
    ) -> Tensor:
        dlogits = logits if inplace else torch.full(logits.shape, torch.nan, dtype=logits.dtype)
        if logits.numel():
            call = self._common(logits, target, temperature, options, want)
            call.vectors, call.reversed = _equally_aligned(logits, dlogits), self.reversed
            call.threads = min(call.threads, WARP * BACKWARD_WARPS)
            call.blocks = call.rows * call.parts if self.blocks is None else self.blocks
            call.grad_stats, (call.statistic_stride, call.grad_row_stride) = grad_stats.data_ptr(), grad_stats.stride()
            call.state, (call.field_stride, call.row_stride) = state.data_ptr(), state.stride()
            call.dlogits = dlogits.data_ptr()
            call.out_batch_stride, call.out_length_stride, call.out_column_stride = _strides(dlogits)
            self._run(self.library.emulate_backward, call)
        return dlogits
