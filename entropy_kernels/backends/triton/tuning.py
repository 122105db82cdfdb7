"""Which of a few tilings a call is cut by: the default, or the one that ``entropy-kernels tune`` found to be faster.

A call measures nothing: it may be captured in a CUDA graph, or write over its logits, which cannot be done twice. It
takes the first candidate (tiling.py), which `entropy-kernels verify` has run, or with ENTROPY_KERNELS_TRITON_TUNE=1 the
one that the command has kept for its class of shapes on this GPU, in the user's cache folder. The file is read once per
process. Results of two tilings differ by rounding, so all ranks of a run have to read the same one.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from entropy_kernels._rows import RowOptions
from entropy_kernels.backends import switches, verdict

FORMAT = 1
MAX_ROWS = 8192  # more rows are more of the same

Tiling = TypeVar("Tiling")


class ShapeClass(NamedTuple):
    """What a measurement is valid for. Columns and rows count by powers of two: (2ᵇ⁻¹, 2ᵇ]."""

    direction: str  # forward, backward, linear-B for H of (2ᴮ⁻¹, 2ᴮ]
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
        second_order: int,
        options: RowOptions,
        columns: int,
        rows: int,
    ) -> ShapeClass:
        bits = [max(0, n - 1).bit_length() for n in (columns, min(rows, MAX_ROWS))]
        name = str(dtype).removeprefix("torch.")
        return cls(direction, name, aligned, bool(second_order), options.softcap != 0, *bits)

    @property
    def rows(self) -> int:
        """The most rows of the class: what candidates are made for, so that all of a class share them."""
        return 1 << self.rows_bits

    @property
    def name(self) -> str:
        names = {"aligned": self.aligned, "second": self.second_order, "softcap": self.softcap}
        flags = [name for name, on in names.items() if on] or ["plain"]
        return "-".join((self.direction, self.dtype, *flags, str(self.columns_bits), str(self.rows_bits)))


def tuned(device: torch.device, shape: ShapeClass, candidates: tuple[Tiling, ...]) -> Tiling:
    """The candidate for calls of class ``shape``; the first is the default."""
    if switches.ROW_INVARIANT or not switches.TRITON_TUNE:
        return candidates[0]  # what is fastest depends on the number of rows
    return _kept_one(device, shape, candidates)


@functools.cache
def _kept_one(device: torch.device, shape: ShapeClass, candidates: tuple[Any, ...]) -> Any:
    found = kept(device).get(shape.name)
    return next((candidate for candidate in candidates if asdict(candidate) == found), candidates[0])


@functools.cache
def kept(device: torch.device) -> Mapping[str, Any]:
    """The tilings kept for a GPU, by name of the class of shapes; read once. None outside of GPUs."""
    try:
        return {} if device.type != "cuda" else read(file(device))
    except OSError:  # no home folder: nothing can have been kept
        return {}


def file(device: torch.device) -> Path:
    """Where the tilings of a GPU are kept: under its name, and all versions that a measurement depends on."""
    return verdict.file(verdict.machine(device), "tuned")


def read(path: Path) -> dict[str, Any]:
    """{name of a class: fields of its tiling}; nothing, with a warning, from a file that cannot be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"expected an object of format {FORMAT}")
        tilings = document.get("tilings")
        if not isinstance(tilings, dict) or not all(isinstance(tiling, dict) for tiling in tilings.values()):
            raise ValueError("tilings: expected an object of objects")
        return tilings
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path}: ignored: {error}; `entropy-kernels tune` writes it anew", stacklevel=2)
        return {}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Add tilings to those that are kept, for later processes; OSError where the folder cannot be written."""
    verdict.keep(path, {"format": FORMAT, "tilings": {**read(path), **{k: asdict(v) for k, v in found.items()}}})
