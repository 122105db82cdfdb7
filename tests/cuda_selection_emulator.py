"""The CUDA selection kernels on CPU tensors: cuda_selection_emulator.cpp behind the functions that every backend has.

Needs a C++ compiler, no toolkit and no GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cuda_emulator import compiled
from entropy_kernels.backends.radix_select import Band, Count

WARP_TOKENS = 128  # 4 for each lane
_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class _Call(ctypes.Structure):
    """``Call`` of cuda_selection_emulator.cpp."""

    _fields_ = (
        ("cluster", _I), ("blocks", _I), ("chunk", _I), ("order", ctypes.c_uint64),
        ("mask", _P), ("exclude", _P), ("index", _P), ("seed", _P), ("seed_number", _I), ("tokens", _L),
        ("ratio", _D), ("k", _L), ("at_least_one", _I), ("low", _D), ("high", _D), ("quantile", _I), ("closed", _I),
        ("numbers", _P), ("first", _P), ("second", _P), ("float64", _I), ("out", _P),
    )  # fmt: skip


def compile_library(folder: Path) -> ctypes.CDLL:
    return compiled("cuda_selection_emulator", folder, "emulate_selection", "emulate_budget", "emulate_covariance")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass
class Emulated:
    """The kernels as a grid of ``blocks``, their threads resumed in the order that ``order`` seeds.

    ``cluster``: the covariance as a cluster.
    """

    library: ctypes.CDLL
    blocks: int
    order: int = 0
    seed_by_value: bool = False
    cluster: bool = False

    def _call(self, tokens: int, mask: Tensor | None) -> _Call:
        each = -(-tokens // self.blocks)
        chunk = -(-each // WARP_TOKENS) * WARP_TOKENS
        return _Call(
            cluster=self.cluster, blocks=self.blocks, chunk=chunk, order=self.order, tokens=tokens, mask=_pointer(mask)
        )

    @staticmethod
    def _run(function, call: _Call) -> None:
        error = function(ctypes.byref(call))
        if error is not None:
            raise RuntimeError(error.decode())

    def token_covariance(self, logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.full(logprob.shape, torch.nan, dtype=torch.float32)
        call = self._call(logprob.numel(), mask)
        call.first, call.second, call.out = logprob.data_ptr(), advantages.data_ptr(), out.data_ptr()
        call.float64 = logprob.dtype == torch.float64
        self._run(self.library.emulate_covariance, call)
        return out

    @staticmethod
    def _set_count(call: _Call, count: Count) -> None:
        call.ratio = -1.0 if count.ratio is None else count.ratio
        call.k = -1 if count.k is None else count.k
        call.at_least_one, call.numbers = count.at_least_one, _pointer(count.numbers)

    def _set_band(self, call: _Call, seed: Tensor, band: Band) -> None:
        call.seed, call.seed_number, call.low, call.high = seed.data_ptr(), self.seed_by_value, band.low, band.high
        call.quantile, call.closed = band.quantile, band.closed

    def _select(self, call: _Call, covariance, exclude, token_index, count: Count) -> Tensor:
        self._set_count(call, count)
        return self._mask(self.library.emulate_selection, call, covariance, exclude, token_index)

    def _mask(self, function, call: _Call, values, exclude, token_index) -> Tensor:
        out = torch.full(values.shape, 77, dtype=torch.uint8)
        call.exclude, call.index, call.first = _pointer(exclude), _pointer(token_index), values.data_ptr()
        call.out = out.data_ptr()
        self._run(function, call)
        assert bool((out <= 1).all()), "not every token was written, or not with a bool"
        return out.view(torch.bool)

    def kl_cov_mask(self, covariance, mask, exclude, token_index, count: Count) -> Tensor:
        return self._select(self._call(covariance.numel(), mask), covariance, exclude, token_index, count)

    def budget_mask(self, score, mask, exclude, token_index, numbers: Tensor) -> Tensor:
        call = self._call(score.numel(), mask)
        call.numbers = numbers.data_ptr()
        return self._mask(self.library.emulate_budget, call, score, exclude, token_index)

    def clip_cov_mask(self, covariance, mask, exclude, token_index, seed, count: Count, band: Band) -> Tensor:
        call = self._call(covariance.numel(), mask)
        self._set_band(call, seed, band)
        return self._select(call, covariance, exclude, token_index, count)
