"""What every layer knows of a softmax row: the options of a call, and the table of the statistics that it yields."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

UNBOUNDED = 1 << 40  # vocab_size of a vocabulary-parallel call that leaves it open: no padded columns


class RowArguments(NamedTuple):
    """The arguments that all public functions of rows share, as their caller gave them."""

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    vocab_group: Any = None
    vocab_start: int | None = None
    vocab_size: int | None = None
    backend: str = "auto"


class RowOptions(NamedTuple):
    """How the kernels read a row; the fields are those of csrc/common/row_options.h, in its order."""

    softcap: float  # 0: none
    ignore_index: int
    vocab_start: int  # global id of the row's first column
    vocab_size: int  # ids at or beyond it count as -inf

    def columns(self, width: int) -> int:
        """How many of a shard's ``width`` columns are no padding."""
        return max(0, min(width, self.vocab_size - self.vocab_start))

    def of_part(self, start: int) -> RowOptions:
        """Those of a part of the row, from its column ``start`` on."""
        return self._replace(vocab_start=self.vocab_start + start)

    def ignored_invalid(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which labels are ignored, and which of the others are none."""
        ignored = target == self.ignore_index
        return ignored, ((target < 0) | (target >= self.vocab_size)) & ~ignored


class Statistic(NamedTuple):
    """One value per row. Its formula stands in ``finalize``: csrc/common/softmax_state.h, triton/, eager/."""

    name: str
    second_order: bool  # needs s2 and w2 of the state
    differentiable: bool
    needs_target: bool


# In the order of their bits in ``want``, and of their rows in the stats (S, N) that an op returns: of those wanted.
STATISTICS = (
    Statistic("logprob", False, True, True),
    Statistic("entropy", False, True, False),
    Statistic("collision", True, True, False),
    Statistic("vocab_covariance", True, False, True),
    Statistic("p_max", False, False, False),
    Statistic("mean_logit", False, False, False),
)
NAMES = tuple(statistic.name for statistic in STATISTICS)
"""Names of the statistics, as ``statistics=`` of :func:`entropy_kernels.token_stats` takes them."""


def bits(*names: str) -> int:
    """The bitmask ``want`` of some statistics."""
    return sum({1 << NAMES.index(name) for name in names})


_WANTED = [
    tuple(statistic for i, statistic in enumerate(STATISTICS) if want >> i & 1) for want in range(1 << len(STATISTICS))
]


def wanted(want: int) -> tuple[Statistic, ...]:
    """The statistics in a bitmask, in the order of their rows."""
    return _WANTED[want]


LOGPROB, ENTROPY, COLLISION, VOCAB_COVARIANCE = (bits(name) for name in NAMES[:4])
SECOND_ORDER = bits(*(statistic.name for statistic in STATISTICS if statistic.second_order))
DIFFERENTIABLE = bits(*(statistic.name for statistic in STATISTICS if statistic.differentiable))


def state_rows(want: int) -> int:
    """Rows of the state that the statistics in the bitmask ``want`` need."""
    return 6 if want & SECOND_ORDER else 4
