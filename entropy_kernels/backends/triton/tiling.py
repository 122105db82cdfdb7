"""How the Triton kernels of token_stats and linear_token_stats cut their work: the candidates of tuning.py.

The first candidate is the choice without a measurement; it comes from counts of registers, instructions and bytes in
flight (docs/gpu.md, "Triton"), as does the reason beside each of the others. tests/test_triton_aot.py compiles the
first of each class for spills; tests/aot_triton.py all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from entropy_kernels.backends import switches

MAX_SPLITS = 128  # parts of one row; the merge kernel reads them as one vector


@dataclass(frozen=True)
class Hardware:
    """What a choice depends on.

    ``asynchronous``: copies into shared memory that no register waits for; ``descriptors``: of whole blocks, by the
    hardware (TMA); ``shared``: bytes of that memory that a program may have; ``tensor_memory``: products are summed
    in memory of their own, not in registers.
    """

    multiprocessors: int
    warp_size: int
    asynchronous: bool
    descriptors: bool = True
    shared: int = 227 << 10
    tensor_memory: bool = False


@functools.cache
def hardware(device: torch.device) -> Hardware:
    """Of a device. The interpreter pays per operation and not per element: wide warps."""
    if device.type != "cuda":
        return Hardware(1, 256, True)
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    return Hardware(
        properties.multi_processor_count,
        properties.warp_size,
        asynchronous=nvidia and properties.major >= 8,
        descriptors=nvidia and properties.major >= 9,
        # what may be had beyond the 48 KB that need no asking
        shared=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        tensor_memory=nvidia and properties.major in (10, 11),
    )


@dataclass(frozen=True)
class ForwardTiling:
    """How the forward kernel cuts a row: ``width`` neighbours per thread and load, ``steps`` loads per tile."""

    steps: int
    warps: int
    lanes: int
    width: int
    stages: int = 1  # 1: the next tile waits in registers; more: stages - 1 tiles wait in shared memory
    split: int = 0  # parts per row: those of split_count, times 2 to this power

    @property
    def tile(self) -> int:
        return self.steps * self.warps * self.lanes * self.width

    def parts(self, rows: int, columns: int, itemsize: int, multiprocessors: int) -> tuple[int, int]:
        """(parts of each row, tiles of each part)."""
        tiles = max(1, -(-columns // self.tile))
        if switches.ROW_INVARIANT:
            return 1, tiles
        parts = split_count(rows, tiles, resident_programs(itemsize, self.warps, multiprocessors))
        parts = parts << self.split if self.split >= 0 else parts >> -self.split
        tiles_per_part = -(-tiles // min(max(parts, 1), tiles, MAX_SPLITS))
        return -(-tiles // tiles_per_part), tiles_per_part


@dataclass(frozen=True)
class BackwardTiling:
    """How the backward kernel cuts a row: programs of ``tiles`` tiles of ``tile`` logits."""

    tile: int
    warps: int
    tiles: int
    stages: int = 1


# bytes per logit -> warps that a multiprocessor of 64 K registers holds (tests/test_triton_aot.py counts registers)
RESIDENT_WARPS = {2: 24, 4: 32, 8: 24}
# Bytes per thread and tile. In registers a tile has to be large, as it is all that is in flight.
_ASYNCHRONOUS_BYTES = 64
_REGISTER_ELEMENTS = {2: 32, 4: 32, 8: 8}
_UNALIGNED_ELEMENTS = 16  # single loads keep an address each
_STAGES = 3


def resident_programs(itemsize: int, warps: int, multiprocessors: int) -> int:
    return multiprocessors * RESIDENT_WARPS[itemsize] // warps


@functools.lru_cache(maxsize=1024)  # a call should not pay for it again
def forward_candidates(
    itemsize: int, columns: int, rows: int, aligned: bool, on: Hardware
) -> tuple[ForwardTiling, ...]:
    """Tilings worth a measurement for about ``rows`` rows of ``columns`` logits of ``itemsize`` bytes; default first.

    ``aligned`` rows are read 16 bytes at a time, others one element per thread (still whole sectors per warp). With
    short rows, fewer warps leave less of the tile empty, and there are many programs to hide the latency instead.
    """
    width = 16 // itemsize if aligned else 1

    def cut(elements: int, warps: int | None = None, stages: int = 1) -> ForwardTiling:
        if warps is None:
            warps = 8
            for fewer in (4, 1):
                if columns <= 2 * fewer * on.warp_size * elements:
                    warps = fewer
        return ForwardTiling(elements // width, warps, on.warp_size, width, stages)

    others: list[ForwardTiling]
    if not aligned:
        first = cut(_UNALIGNED_ELEMENTS)
        others = [cut(_UNALIGNED_ELEMENTS // 2)]  # fewer addresses, more programs per multiprocessor
    elif not on.asynchronous:
        elements = _REGISTER_ELEMENTS[itemsize]
        first = cut(elements)
        others = [cut(elements // 2), cut(elements // 2, stages=3)]  # fewer registers; two smaller tiles ahead
    else:
        elements = _ASYNCHRONOUS_BYTES // itemsize
        first = cut(elements, stages=_STAGES)
        others = [
            cut(_REGISTER_ELEMENTS[itemsize]),  # no barrier per tile: warps drift apart
            cut(2 * elements, max(1, first.warps // 2), _STAGES),  # half the maxima and barriers per logit
            replace(first, stages=_STAGES + 1),  # more in flight, for more bandwidth times latency
        ]
    # Smaller programs hide each other's start and end, which is much of a short row.
    others.append(replace(first, warps=max(1, first.warps // 2)))
    if rows // 2 < resident_programs(itemsize, first.warps, on.multiprocessors) and columns > 2 * first.tile:
        # What a program's start and the second kernel cost, split_count only guesses.
        others = [o for o in others if o.stages <= _STAGES] + [replace(first, split=1), replace(first, split=-1)]
    return tuple(dict.fromkeys([first, *others]))


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


@functools.lru_cache(maxsize=1024)
def backward_candidates(itemsize: int, width: int, aligned: bool, on: Hardware) -> tuple[BackwardTiling, ...]:
    """Tilings of the backward worth a measurement for rows of ``width`` logits; the default first.

    By default 16 logits per thread (fp64: 8) and 8 tiles per program: enough to have the next loads in flight, few
    enough for an even end; one warp for short rows. A program reads as much as it writes, so half the bytes in flight
    of the forward suffice.
    """
    elements = 8 if itemsize == 8 else 16
    warps = 4 if width > 4 * on.warp_size * elements else 1

    def cut(elements: int, warps: int, tiles: int, stages: int = 1) -> BackwardTiling:
        return BackwardTiling(elements * warps * on.warp_size, warps, tiles, stages)

    first = cut(elements, warps, 8)
    others = [cut(elements, warps, 2)]  # short programs: the scheduler keeps loads in flight, and evens out the end
    if not aligned:
        others.append(cut(elements // 2, warps, 8))  # fewer addresses: twice the warps per multiprocessor
    elif on.asynchronous:
        others.append(cut(elements, warps, 8, _STAGES))  # two tiles ahead
        others.append(cut(2 * elements, warps, 4, _STAGES))  # half the barriers
    else:
        others.append(cut(2 * elements, warps, 4))  # more in flight per thread
    if warps > 1:
        others.append(cut(elements, 2 * warps, 8))  # a row's constants once for twice the logits
    return tuple(dict.fromkeys([first, *others]))


@dataclass(frozen=True)
class LinearTiling:
    """How linear_token_stats cuts products: tiles of ``rows`` tokens × ``columns`` of the vocabulary, ``features`` of H
    at a time, of which ``stages`` wait in shared memory; ``group`` tiles of rows go through the vocabulary together.
    """

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    group: int = 16

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory for the factors."""
        return (self.rows + self.columns) * self.features * itemsize * self.stages

    @property
    def resident(self) -> int:
        """Programs of a multiprocessor at a time; tests/test_triton_aot.py counts registers and shared memory."""
        return 2 if self.warps == 4 else 1

    def parts(self, rows: int, columns: int, most: int, multiprocessors: int) -> tuple[int, int]:
        """(parts of the vocabulary, at most ``most`` unless that is 0; tiles of each part).

        Programs run in waves of as many as are resident, and each costs its tiles and about half a tile more. Not so
        few that more than one group would run at a time: the hidden states of all would not stay in the L2 cache.
        """
        programs = multiprocessors * self.resident
        tiles, row_tiles = max(1, -(-columns // self.columns)), -(-rows // self.rows)
        most = max(1, min(most, tiles, MAX_SPLITS))
        fewest = min(most, -(-2 * programs // min(row_tiles, self.group)))

        def cost(parts: int) -> float:
            return -(-row_tiles * parts // programs) * (-(-tiles // parts) + 0.5)

        tiles_per_part = -(-tiles // min(range(fewest, most + 1), key=cost))
        return -(-tiles // tiles_per_part), tiles_per_part


@functools.lru_cache(maxsize=1024)
def linear_candidates(
    itemsize: int, rows: int, described: bool, softcap: bool, on: Hardware
) -> tuple[LinearTiling, ...]:
    """Tilings of linear_token_stats worth a measurement for about ``rows`` tokens; the default first.

    Of two programs of 128 × 128 on a multiprocessor, one multiplies while the other is in its epilogue; a single one of
    128 × 256 reads less per multiplication, but nothing multiplies meanwhile. Both hold 128 sums per thread, which
    leaves no registers for a softcap, nor for addresses where no hardware copies ``described`` blocks. Where the sums
    come from tensor memory, the first spills without a bias. fp32 is not for tensor cores, and its factors take
    registers.
    """
    if itemsize == 4:
        return (LinearTiling(64, 32, 32, 4, 2),)
    height = 64 if rows <= 64 else 128  # half of a taller tile would be empty
    cuts = []
    if described and not softcap and height == 128:
        pair, wide = LinearTiling(128, 128, 64, 4, 3), LinearTiling(128, 256, 64, 8, 3)
        cuts = [wide, pair] if on.tensor_memory else [pair, wide]
        cuts.append(replace(wide, stages=4))
    if described:
        cuts.append(LinearTiling(height, 128, 64, 8, 3 if height == 128 else 4))
    room = on.shared - (4 << 10)  # for what crosses warps in the sums of rows
    fitting = [cut for cut in cuts if cut.shared(itemsize) <= room]
    return tuple(fitting) or (LinearTiling(height, 128, 32, 8, 4 if on.asynchronous else 2),)
