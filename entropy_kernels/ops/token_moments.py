"""``entropy_kernels::token_moments``: sums over a batch whose bits depend on neither its order nor its split.

Every term is rounded to an integer multiple of one power of two, which is chosen from the largest term and the count
of the whole group (csrc/common/fixed_point.h has the rounding), and integers add exactly. The operations are torch's
on every device: they are small beside what the statistics cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropy_kernels.backends.radix_select import Group, fixed_point_exponent, power_of_two
from entropy_kernels.ops.checks import check_tensors, register

MOMENTS = ("tokens", "total", "mean", "std", "largest")

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_library.define(
    "token_moments(Tensor values, Tensor? mask, bool deviation, str group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _moments(values: Tensor, mask: Tensor | None, deviation: bool, group: str) -> Tensor:
    """(K, 5) of ``values`` (K, N) float64 at ``mask`` (N,), in the order of MOMENTS; std 0 unless ``deviation``."""
    _check(values, mask)
    ranks = Group(group)
    valid = torch.ones_like(values[:1], dtype=torch.bool) if mask is None else mask[None]
    # a column that never counts: an empty batch has a maximum, too
    valid, values = pad(valid, (0, 1)), pad(values, (0, 1))
    count = valid.sum().double()
    largest = torch.where(valid, values, -math.inf).amax(1)
    # the maxima of two rounds in the first one: |x|, and x
    size = _size(values, valid)
    by_rank = ranks.gather(torch.stack([size, largest, count.expand_as(size)]))
    size, largest, count = by_rank[:, 0].amax(0), by_rank[:, 1].amax(0), by_rank[:, 2, 0].sum()
    total = _sum(values, valid, size, count, ranks)
    mean = total / count.clamp(min=1)
    std = torch.zeros_like(mean)
    if deviation:
        unit = power_of_two(fixed_point_exponent(size, torch.ones_like(size)))  # or squares could overflow
        squares = (values * unit[:, None] - (mean * unit)[:, None]).square()
        size = ranks.gather(_size(squares, valid)).amax(0)
        std = (_sum(squares, valid, size, count, ranks) / count.clamp(min=1)).sqrt() / unit
    largest = torch.where(count > 0, largest, 0)
    return torch.stack([count.expand_as(mean), total, mean, std, largest], 1)


def _size(values: Tensor, valid: Tensor) -> Tensor:
    """(K,) largest magnitude; inf where one is not finite."""
    return torch.where(valid, values.abs().nan_to_num(nan=math.inf, posinf=math.inf), 0).amax(1)


def _sum(values: Tensor, valid: Tensor, size: Tensor, count: Tensor, ranks: Group) -> Tensor:
    exponent = fixed_point_exponent(size, count)
    terms = (torch.where(valid, values, 0) * power_of_two(exponent)[:, None]).round().nan_to_num(0, 0, 0).long()
    total = ranks.sum(terms.sum(1)).double() * power_of_two(-exponent)
    return torch.where(size.isinf(), math.nan, total)


def _check(values: Tensor, mask: Tensor | None) -> None:
    if values.dtype != torch.float64 or values.dim() != 2 or not len(values):
        got = f"{values.dtype} of shape {tuple(values.shape)}"
        raise TypeError(f"values: expected float64 of shape (K, N), K > 0, got {got}")
    check_tensors(values.device, ("mask", mask, torch.bool, values.shape[1:]))


def _fake(values: Tensor, mask: Tensor | None, deviation: bool, group: str) -> Tensor:
    _check(values, mask)
    return values.new_empty(len(values), len(MOMENTS))


register(_library, "token_moments", _moments, _fake, no_grad=True)
token_moments = torch.ops.entropy_kernels.token_moments.default
