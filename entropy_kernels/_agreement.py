"""What the ranks of a group must have alike, as numbers of a fixed length that go along with a collective.

The length depends on nothing that a rank may have differently, so that ranks that disagree hear of it instead of
waiting for each other: neither on their options nor on whether a rank is compiled. Compiled code, whose numbers are
tensors, sends that it knows nothing, which agrees with everything.
"""

from __future__ import annotations

import ctypes
import math
import numbers
import re
import struct
import zlib
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import all_gather, debugging, traced

UNKNOWN = math.nan
_NONE, _NAN = -math.inf, math.inf
_ROOM = 64  # options; those beyond it count as one


def room(device: torch.device) -> int:
    """How many numbers :func:`digest` gives."""
    return _ROOM if device.type == "cpu" else 2


def digest(in_common: dict[str, Any], device: torch.device) -> list[float]:
    """One number per option; on a GPU, where every number costs a launch, one of all words and one of all numbers."""
    found = [_number(value) for value in in_common.values()]
    if device.type == "cpu":
        if len(found) > _ROOM:
            found[_ROOM - 1 :] = [_checksum(found[_ROOM - 1 :])]
        return found + [UNKNOWN] * (_ROOM - len(found))
    words = [x for x, value in zip(found, in_common.values(), strict=True) if not _is_number(value)]
    values = [x for x, value in zip(found, in_common.values(), strict=True) if _is_number(value)]
    return [_checksum(words), _checksum(values)]


def sent(in_common: dict[str, Any], device: torch.device) -> Tensor:
    """fp64, on ``device`` without a copy that would wait for it."""
    found = digest(in_common, device)
    if device.type == "cpu":
        return torch.tensor(found, dtype=torch.float64)
    return torch.cat([torch.full((1,), x, dtype=torch.float64, device=device) for x in found])


def expect(in_common: dict[str, Any], group: Any, device: torch.device) -> None:
    """Raise the same on all ranks of ``group`` where they have not alike what they should; one small collective.

    On a GPU only with ENTROPY_KERNELS_DEBUG=1, as it waits for the device; in compiled code never.
    """
    if traced() or (device.type != "cpu" and not debugging()):
        return
    own = sent(in_common, device)
    gathered = own.new_empty(group.size(), own.numel())
    all_gather(gathered.view(-1), own, group=group)
    check(in_common, gathered)


def differing(gathered: Tensor) -> Tensor:
    """(C,) bool: of what the ranks have :func:`sent`, (ranks, C), where two know other numbers."""
    known = ~gathered.isnan()
    least, most = (torch.where(known, gathered, x) for x in (math.inf, -math.inf))
    return least.amin(0) < most.amax(0)


def check(in_common: dict[str, Any], gathered: Tensor) -> None:
    """Raise for the first of them."""
    differ = differing(gathered)
    if differ.any():
        column = int(differ.nonzero()[0])
        refuse(in_common, column, gathered[:, column].tolist(), "batch_group")


def refuse(in_common: dict[str, Any], column: int, values: list[float], group: str) -> None:
    """Raise, the same on all ranks, for one number of :func:`digest` and what the ranks have there."""
    name, own = [*in_common.items()][column] if column < _ROOM - 1 else ("options", "")
    got = f", got {[_shown(x) for x in values]}" if _is_number(own) else ""
    raise ValueError(f"{name}: expected the same on all ranks of the {group}{got}")


def _shown(x: float) -> float | str | None:
    return None if x == _NONE else "unknown" if math.isnan(x) else math.nan if x == _NAN else float(f"{x:.7g}")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _number(value: Any) -> float:
    """Rounded to fp32, as 0.2 and a tensor of it are the same; of what is no number a checksum."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return UNKNOWN  # it is not read back
        if value.dim() == 0 and not value.is_complex():
            value = value.item()
    if value is None:
        return _NONE
    if _is_number(value):
        value = float(value)
        return _NAN if math.isnan(value) else ctypes.c_float(value).value
    return float(zlib.crc32(_text(value).encode()))


def _text(value: Any) -> str:
    """The same in every process: without addresses and the order of sets."""
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(_text, value)))
    if isinstance(value, dict):
        return str(sorted((_text(key), _text(x)) for key, x in value.items()))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _checksum(values: list[float]) -> float:
    if any(map(math.isnan, values)):
        return UNKNOWN
    return float(zlib.crc32(struct.pack(f"<{len(values)}d", *values)))


# Of the bits of a positive fp64 number: 1e-6 of it. Ranks may have added up an advantage in another order.
NOISE = 1 << 32


def sums(values: Tensor | None, device: torch.device) -> Tensor:
    """(2,) int64 on ``device``, which other values, or the same in another order, or None, hardly have.

    Of floating-point values the bits of two positive sums, so that those of values that are nearly the same are near.
    """
    if values is None:
        return torch.full((2,), -(1 << 62), device=device)
    values = values.reshape(-1)
    place = torch.arange(values.numel(), device=values.device)
    if values.is_floating_point():
        weights = 1 + (place * 0.6180339887498949).double().frac()
        values = values.double().nan_to_num(3.0, 5.0, -7.0)
        size = values.abs()
        return torch.stack([(weights * size).sum(), (weights * (size + values / 2)).sum()]).view(torch.int64)
    odd = 2 * place + 1
    return (values.long() * (odd * 0x9E3779B97F4A7C1 + (odd << 33))).sum().expand(2)
