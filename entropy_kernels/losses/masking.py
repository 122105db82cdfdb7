"""Choosing tokens without branches: what is masked is 0, whatever stands there, and its NaN reaches nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bool ``mask`` as :func:`keep` wants it for values of ``dtype`` (fp32 or fp64): all bits set where True.

    On a CPU torch chooses by ``&`` ten times as fast as by ``where``. A compiler does not, so it is given the mask.
    """
    return mask if torch.compiler.is_compiling() else mask.to(_BITS[dtype]).neg_()


def keep(mask: Tensor | None, *values: Tensor) -> list[Tensor]:
    """Each of ``values`` where ``mask`` (made by :func:`bits`; None: everywhere), else 0."""
    if mask is None:
        return list(values)
    kept = []
    for x in values:
        kept.append(torch.where(mask, x, 0) if mask.dtype == torch.bool else (x.view(mask.dtype) & mask).view(x.dtype))
    return kept


def unless(condition: Tensor, *values: Tensor) -> list[Tensor]:
    """Each of ``values`` where the bool ``condition`` does not hold, else 0."""
    if torch.compiler.is_compiling():
        return [torch.where(condition, 0, x) for x in values]
    kept, mask = [], condition.to(_BITS[values[0].dtype]).sub_(1)
    for x in values:
        kept.append((x.view(mask.dtype) & mask).view(x.dtype))
    return kept


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, where 0 · inf is 0: an advantage of 0 gives no loss, also where its ratio overflows.

    NaN becomes 0, too; a loss adds the NaN of its inputs again.
    """
    if torch.compiler.is_compiling():
        return torch.where(a == 0, 0, a * b)
    return (a * b).nan_to_num_(0.0, math.inf, -math.inf)


def largest(x: Tensor, mask: Tensor | None) -> Tensor:
    """The maximum of ``x`` (fp32 or fp64) over the tokens of ``mask``, the lowest without any; ``x`` is 0 elsewhere."""
    if x.numel() == 0:
        return x.new_full((), -math.inf)
    if mask is None:
        return x.amax()
    if mask.dtype == torch.bool:
        return torch.where(mask, x, -math.inf).amax()
    # ~mask is 0 for a token that counts, -1 for another, which is lowered beyond all
    return torch.add(x, (~mask).to(x.dtype), alpha=torch.finfo(x.dtype).max).amax()
