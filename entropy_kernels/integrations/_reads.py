"""What a replaced function has read beside what its caller has room for, picked up by who asked for it.

verl and TRL call a head for log-prob and entropy, and have no place for Σp² or the vocabulary covariance of the same
read. Who wants them makes the call inside :func:`collect`; the replacement asks :func:`wanted` and :func:`leave`s them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Collected", "collect", "collected", "leave", "wanted"]

NAMES = ("entropy", "collision", "vocab_covariance")


class Collected:
    """The statistics left by the calls inside a :func:`collect`, in their order; ``reads``: a dict for each call."""

    def __init__(self, *names: str) -> None:
        for name in names:
            if name not in NAMES:
                raise ValueError(f"names: expected of {', '.join(NAMES)}, got {name!r}")
        self.names = names
        self.reads: list[dict[str, Tensor]] = []

    def __getitem__(self, name: str) -> Tensor:
        """The statistic of all reads, flat: (tokens,), detached."""
        if not self.reads:
            raise RuntimeError(
                f"{name}: expected a call of a head that was replaced by ours, got none: the model went another way"
            )
        return torch.cat([read[name].reshape(-1) for read in self.reads])


_collecting: ContextVar[Collected | None] = ContextVar("entropy_kernels_collecting", default=None)


@contextlib.contextmanager
def collect(*names: str) -> Iterator[Collected]:
    """Collect the statistics of these names of what is read inside."""
    inside = Collected(*names)
    token = _collecting.set(inside)
    try:
        yield inside
    finally:
        _collecting.reset(token)


def collected() -> Collected | None:
    """What is being collected here, if anything."""
    return _collecting.get()


def wanted() -> tuple[str, ...]:
    """Names of the statistics that somebody collects here; empty where nobody does."""
    found = collected()
    return () if found is None else found.names


def leave(**statistics: Tensor) -> None:
    """Leave the statistics of one read, by name; without effect where nobody collects."""
    found = collected()
    if found is not None:
        found.reads.append({name: statistics[name].detach() for name in found.names})
