"""What a case is made of: the call that it stands for, its entry in the list, and numbers to fill it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
INF, NAN = float("inf"), float("nan")
IGNORE = -100


@dataclass
class Sample:
    """One call of a statistics function."""

    logits: Tensor  # (..., V), often a view
    target: Tensor  # (...)
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    build: Callable[[torch.dtype, str], Sample]
    dtypes: tuple[torch.dtype, ...] = ALL  # in which the case exists
    slow_dtypes: tuple[torch.dtype, ...] = ALL  # in which it has something of its own to show: all that slow ones run

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(reason: str, dtypes: tuple[torch.dtype, ...] = ALL, numeric: bool = False) -> Callable:
    """Register the builder below as the case of its name; ``numeric``: the range of the dtype matters to it."""

    def register(build: Callable[[torch.dtype, str], Sample]) -> Callable:
        slow = ALL if numeric else (torch.bfloat16, torch.float32)
        CASES.append(Case(build.__name__, reason, build, dtypes, tuple(d for d in slow if d in dtypes)))
        return build

    return register


def normal(*shape: int, dtype: torch.dtype, device: str, scale: float = 3.0, seed: int = 1) -> Tensor:
    """The same numbers on every device and, but for rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def labels(*shape: int, vocab: int, device: str, dtype: torch.dtype = torch.int64, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, shape, generator=generator).to(device, dtype)


def plain(dtype: torch.dtype, device: str, rows: int = 5, vocab: int = 97, **kwargs: Any) -> Sample:
    """Nothing special: (rows, vocab) normal logits."""
    return Sample(
        normal(rows, vocab, dtype=dtype, device=device), labels(rows, vocab=vocab, device=device), dict(kwargs)
    )


def of_plain(name: str, reason: str, dtypes: tuple[torch.dtype, ...] = ALL, **given: Any) -> Callable:
    """The case of a :func:`plain` call; tensors among its arguments are moved to the device."""

    def build(dtype: torch.dtype, device: str) -> Sample:
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
        return plain(dtype, device, **moved)

    build.__name__ = name
    return case(reason, dtypes)(build)


def of_shape(
    name: str, reason: str, shape: tuple[int, ...], view: Callable[[Tensor], Tensor] = lambda z: z
) -> Callable:
    """The case of a view of normal logits."""

    def build(dtype: torch.dtype, device: str) -> Sample:
        logits = view(normal(*shape, dtype=dtype, device=device))
        return Sample(logits, labels(*logits.shape[:-1], vocab=logits.shape[-1], device=device))

    build.__name__ = name
    return case(reason)(build)
