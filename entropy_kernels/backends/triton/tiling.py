"""How the Triton kernels of token_stats cut rows into tiles and parts, by dtype and size. Nothing is autotuned yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_SPLITS = 128  # parts of one row; the merge kernel reads them as one vector


@dataclass(frozen=True)
class Tiling:
    """How the forward kernel cuts a row: ``width`` neighbours per thread and load, ``steps`` loads per tile."""

    steps: int
    warps: int
    lanes: int
    width: int

    @property
    def tile(self) -> int:
        return self.steps * self.warps * self.lanes * self.width


# bytes per logit -> elements per thread and tile. 64 bytes (fp32: 128) in flight per thread and the warps below
# cover more than the ~40 KB that a multiprocessor's share of the bandwidth times the latency asks for.
_ELEMENTS = {2: 32, 4: 32, 8: 8}
# bytes per logit -> warps that a multiprocessor of 64 K registers holds (tests/test_triton_aot.py counts registers)
RESIDENT_WARPS = {2: 24, 4: 16, 8: 16}
_ELEMENTS_UNALIGNED = 16  # single loads keep an address each


def forward_tiling(itemsize: int, columns: int, aligned: bool, warp_size: int) -> Tiling:
    """Tiling for rows of ``columns`` logits of ``itemsize`` bytes.

    ``aligned`` rows are read 16 bytes at a time, others one element per thread (still whole sectors per warp). With
    short rows, fewer warps leave less of the tile empty, and there are many programs to hide the latency instead.
    """
    elements = _ELEMENTS[itemsize] if aligned else _ELEMENTS_UNALIGNED
    width = 16 // itemsize if aligned else 1
    warps = 8
    for fewer in (4, 1):
        if columns <= 2 * fewer * warp_size * elements:
            warps = fewer
    return Tiling(elements // width, warps, warp_size, width)


def split_count(rows: int, tiles: int, programs: int) -> int:
    """In how many parts to cut each row, for a GPU that runs ``programs`` programs at a time.

    The cheapest power of two, if a program costs its tiles plus 2 (start, merge of lanes), programs run in waves, and
    the second kernel costs as much as 4 tiles (about 4 µs).
    """

    def cost(parts: int) -> int:
        waves = -(-rows * parts // programs)
        return waves * (-(-tiles // parts) + 2) + (4 if parts > 1 else 0)

    choices = [parts for parts in (1, 2, 4, 8, 16, 32, 64, MAX_SPLITS) if parts <= max(1, tiles)]
    return min(choices, key=cost)


BACKWARD_TILES = 8  # tiles per program: enough to have the next loads in flight, few enough for an even end


def backward_tiling(itemsize: int, width: int, warp_size: int) -> tuple[int, int]:
    """(elements per tile, warps) of the backward kernel: 16 per thread (fp64: 8), one warp for short rows."""
    elements = 8 if itemsize == 8 else 16
    warps = 4 if width > 4 * warp_size * elements else 1
    return elements * warps * warp_size, warps


def hardware(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, threads per warp). The interpreter pays per operation and not per element: wide warps."""
    if device.type != "cuda":
        return 1, 256
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.warp_size
