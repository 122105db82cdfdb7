"""Which of a few ways to cut the work is fastest here: with ENTROPY_KERNELS_TRITON_TUNE=1 measured, and kept on disk.

Without it the first candidate serves: the one that `entropy-kernels verify` has run. With it the first call of a class
on a GPU times its candidates (tiling.py) on scratch tensors, never on the caller's: a gradient written in place cannot
be written twice. The choice is kept in Triton's own cache, under the GPU, Triton's version and the kernels' source, so
that later processes, and all calls of a run, make the same one. Results of two choices differ by rounding only. In
the interpreter, while a CUDA graph is captured and with too little free memory the first candidate serves, too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.runtime.cache import get_cache_manager

from entropy_kernels.backends import switches

__all__ = ["Choice", "ShapeClass", "choose", "forget", "report"]

SWITCH = "ENTROPY_KERNELS_TRITON_TUNE"
MAX_ROWS = 8192  # more rows are more of the same
SCRATCH_BYTES = 256 << 20  # beyond the L2 of most GPUs
_FREE_SHARE = 8  # of the free memory, scratch takes one part in so many; the timer needs about as much again
_MARGIN = 0.98  # a candidate must beat the default by 2 %, so that noise does not move the choice

Tiling = TypeVar("Tiling")
Timer = Callable[[Callable[[], object]], float]


class ShapeClass(NamedTuple):
    """What a choice is valid for. Columns and rows count by powers of two: (2ᵇ⁻¹, 2ᵇ]."""

    direction: str  # forward, backward
    dtype: str
    aligned: bool  # rows are read 16 bytes at a time
    second_order: bool  # collision or vocabulary covariance, or the former's gradient
    softcap: bool
    columns_bits: int
    rows_bits: int

    @classmethod
    def of(
        cls,
        direction: str,
        dtype: torch.dtype,
        aligned: bool,
        second_order: bool,
        softcap: bool,
        columns: int,
        rows: int,
    ) -> ShapeClass:
        bits = [max(0, n - 1).bit_length() for n in (columns, min(rows, MAX_ROWS))]
        return cls(direction, str(dtype).removeprefix("torch."), aligned, second_order, softcap, *bits)

    @property
    def rows(self) -> int:
        """The most rows of the class: what candidates are made for, so that all of a class share them."""
        return 1 << self.rows_bits

    @property
    def file(self) -> str:
        flags = "-".join(
            name
            for name, on in (
                ("aligned", self.aligned),
                ("second", self.second_order),
                ("softcap", self.softcap),
            )
            if on
        )
        sizes = f"{self.columns_bits}-{self.rows_bits}"
        return f"{self.direction}-{self.dtype}-{flags or 'plain'}-{sizes}.json"


class Choice(NamedTuple):
    """A tiling, and how it was found: "measured", "disk", or why there was no measurement."""

    tiling: Any
    origin: str
    milliseconds: tuple[float | None, ...] = ()  # of the candidates, in their order; None: it did not run


_choices: dict[tuple[int, ShapeClass], Choice] = {}
_lock = threading.Lock()


def median_milliseconds(run: Callable[[], object]) -> float:
    """The timer: CUDA events, a flushed L2 before each run."""
    return triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")


timer: Timer = median_milliseconds  # tests put their own here


def choose(
    shape: ShapeClass,
    device: torch.device,
    candidates: Sequence[Tiling],
    scratch: Callable[[int], Callable[[Tiling], object]],
) -> Tiling:
    """The candidate for calls of class ``shape`` on ``device``; times them if that has not been done yet.

    Args:
        candidates: the default first.
        scratch: makes tensors of at most the given number of bytes, and returns what runs a candidate on them.
    """
    if switches.ROW_INVARIANT or not _on_gpu(device):
        return candidates[0]  # what is fastest depends on the number of rows
    key = (_index(device), shape)
    known = _choices.get(key)
    if known is not None:
        return known.tiling
    if _capturing():
        return candidates[0]  # for now: the next call outside of a capture may measure
    with _lock:
        if key not in _choices:
            _choices[key] = _find(shape, device, candidates, scratch)
        return _choices[key].tiling


def report() -> list[dict[str, Any]]:
    """The choices of this process: class, tiling and how it was found, for people."""
    rows = []
    for (index, shape), choice in sorted(_choices.items()):
        row = {"device": index, **shape._asdict(), "tiling": asdict(choice.tiling), "origin": choice.origin}
        rows.append(row | {"milliseconds": list(choice.milliseconds)})
    return rows


def forget() -> None:
    """Drop the choices of this process; those on disk stay."""
    _choices.clear()


# What tests without a GPU replace.


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


@functools.cache
def _identity(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {getattr(properties, 'gcnArchName', '')} {properties.multi_processor_count}"


def _find(
    shape: ShapeClass,
    device: torch.device,
    candidates: Sequence[Tiling],
    scratch: Callable[[int], Callable[[Tiling], object]],
) -> Choice:
    if os.environ.get(SWITCH, "0") != "1":
        return Choice(candidates[0], f"default; {SWITCH}=1 measures")
    if len(candidates) == 1:
        return Choice(candidates[0], "the only candidate")
    stored = _read(shape, device, candidates)
    if stored is not None:
        return stored
    budget = min(SCRATCH_BYTES, _free_memory(device) // _FREE_SHARE)
    if budget < SCRATCH_BYTES // 4:
        return Choice(candidates[0], "too little free memory to measure")
    try:
        run = scratch(budget)
    except torch.cuda.OutOfMemoryError:
        return Choice(candidates[0], "too little free memory to measure")
    times = tuple(_time(run, candidate) for candidate in candidates)
    ran = [(time, i) for i, time in enumerate(times) if time is not None]
    if not ran:
        return Choice(candidates[0], "no candidate ran")
    best, i = min(ran)
    if times[0] is not None and best > _MARGIN * times[0]:
        i = 0
    choice = Choice(candidates[i], "measured", times)
    _write(shape, device, choice)
    return choice


def _time(run: Callable[[Tiling], object], candidate: Tiling) -> float | None:
    try:
        return timer(functools.partial(run, candidate))
    except Exception:  # does not compile, or needs more than this GPU has: whatever Triton and its compilers raise
        return None


@functools.cache
def _sources() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _cache(device: torch.device) -> Any:
    text = f"entropy_kernels {triton.__version__} {_identity(device)} "
    return get_cache_manager(hashlib.sha256(text.encode() + _sources()).hexdigest())


def _read(shape: ShapeClass, device: torch.device, candidates: Sequence[Tiling]) -> Choice | None:
    """What an earlier process has found; None if there is nothing, or nothing that can be used."""
    try:
        path = _cache(device).get_file(shape.file)
        stored = None if path is None else json.loads(Path(path).read_text())
        for candidate in candidates:
            if stored is not None and stored["tiling"] == asdict(candidate):  # type: ignore[call-overload]
                return Choice(candidate, "disk", tuple(stored["milliseconds"]))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        pass  # no cache folder, or a broken file: measure again
    return None


def _write(shape: ShapeClass, device: torch.device, choice: Choice) -> None:
    text = json.dumps({"tiling": asdict(choice.tiling), "milliseconds": choice.milliseconds})
    with contextlib.suppress(OSError, RuntimeError):  # no folder to write to: the next process measures again
        _cache(device).put(text, shape.file, binary=False)
