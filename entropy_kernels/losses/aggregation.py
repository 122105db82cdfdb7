"""From per-token losses to the scalar loss, over micro-batches and data-parallel ranks.

Every mode is linear in the tokens, Σ w_i x_i / D, with a weight w_i that a rank knows alone (1, or 1 / the length of
the sequence) and a denominator D that is a count over the whole batch. So only counts ever cross ranks, a token's
derivative is its weight, and micro-batches add up exactly.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import all_gather, traced

# L_b: sum of the losses of sequence b over its valid tokens, m_b: their number. The docs print this table.
AGG_MODES: dict[str, str] = {
    "token-mean": "Σ_b L_b / Σ_b m_b",
    "token-sum": "Σ_b L_b",
    "seq-mean-token-sum": "mean of L_b over the sequences with m_b > 0",
    "seq-mean-token-mean": "mean of L_b / m_b over the sequences with m_b > 0",
    "seq-mean-token-sum-norm": "mean of L_b over the sequences with m_b > 0, / loss_scale_factor (default: L)",
}
# The keyword that gives the count of tokens, or of sequences, of the whole batch
COUNTS = ("batch_num_tokens", "global_batch_size")


class Sequences(NamedTuple):
    """Which tokens are a sequence: those along the last dimension, or runs of (N,) tokens of the ``lengths`` given."""

    lengths: Tensor | None = None  # (S,) int64
    ids: Tensor | None = None  # (N,) int64: of each token its sequence
    width: int | None = None  # of the rows that were flattened

    @classmethod
    def packed(cls, lengths: Tensor, tokens: int, width: int | None = None) -> Sequences:
        """Of ``tokens`` tokens in all; ``lengths`` >= 0, of that sum."""
        positions = torch.arange(tokens, device=lengths.device)
        return cls(lengths, torch.searchsorted(lengths.cumsum(0), positions, right=True), width)

    def sum(self, values: Tensor) -> Tensor:
        """Per sequence: (..., L) -> (...), or (N,) -> (S,) in fp64, because it adds one after the other."""
        if self.lengths is None:
            return values.sum(-1)
        return torch.segment_reduce(values.double(), "sum", lengths=self.lengths, axis=0, unsafe=True, initial=0)

    def spread(self, values: Tensor) -> Tensor:
        """To the tokens: (...) -> (..., 1), or (S,) -> (N,); a 0-d value is everybody's."""
        if values.dim() == 0:
            return values
        return values.unsqueeze(-1) if self.ids is None else values.index_select(0, self.ids)


class Counts(NamedTuple):
    """0-d tensors: what is counted over this rank's tokens, or over the group's."""

    tokens: Tensor  # valid tokens
    sequences: Tensor | None  # sequences with at least one valid token; None where the mode asks for none

    def there(self) -> dict[str, Tensor]:
        """Those that are not None, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def of(cls, named: dict[str, Tensor]) -> Counts:
        """The opposite of :meth:`there`; other names may be among them."""
        return cls(named["tokens"], named.get("sequences"))


class Aggregation(NamedTuple):
    """The arguments that say how a loss is aggregated, checked; see :func:`entropy_kernels.policy_loss`."""

    mode: str
    by_sequence: bool  # whether the mode asks what a sequence is
    dp_size: int
    given_count: int | Tensor | None  # of the whole batch, where the caller gives the one that the mode divides by
    loss_scale_factor: float | Tensor | None
    group: Any
    group_name: str  # "" without one

    def counted(self, valid: Tensor, sequences: Sequences) -> tuple[Counts, Tensor | float]:
        """What is counted over this rank's tokens, ``valid`` (bool) being those that count, and the weights w_i.

        They are 1, or per sequence.
        """
        tokens = valid.count_nonzero()
        if not self.by_sequence:
            return Counts(tokens, None), 1.0
        lengths = sequences.sum(valid)
        counts = Counts(tokens, lengths.count_nonzero())
        return counts, lengths.clamp(min=1).double().reciprocal() if self.mode == "seq-mean-token-mean" else 1.0

    def in_common(self) -> dict[str, Any]:
        """What the ranks of the group must have alike."""
        count = COUNTS[self.by_sequence]
        return {
            "loss_agg_mode": self.mode, "dp_size": self.dp_size, count: self.given_count,
            "loss_scale_factor": self.loss_scale_factor,
        }  # fmt: skip

    def whole(self, counts: Counts, in_common: dict[str, Any]) -> Counts:
        """Over the ranks of the group, if there is one."""
        if self.group is None:
            return counts
        return Counts.of(over_group(counts.there(), {}, self.group, in_common))

    def weighted_sum(self, values: Tensor, weight: Tensor | float, sequences: Sequences) -> Tensor:
        """Σ w_i x_i in fp64, 0-d; ``weight`` as :meth:`counted` gives it. Rows are summed as they come, in blocks."""
        if self.by_sequence:
            return (sequences.sum(values).double() * weight).sum()
        if torch.compiler.is_compiling():  # one pass with other sums
            return values.sum(dtype=torch.float64)
        return values.sum(-1).sum(dtype=torch.float64)

    def denominator(self, counts: Counts, width: int) -> Tensor:
        """D, 0-d; never 0, so that a batch without valid tokens has loss 0."""
        given, count = self.given_count, counts.sequences if self.by_sequence else counts.tokens
        assert count is not None
        if self.mode == "token-sum":
            return torch.ones_like(count, dtype=torch.float64)
        if given is not None:
            if isinstance(given, Tensor):
                count = given.to(count.device, non_blocking=True)
            else:
                count = torch.ones_like(count) * given
        count = count.clamp(min=1).double()
        if self.mode != "seq-mean-token-sum-norm":
            return count
        return count * (max(width, 1) if self.loss_scale_factor is None else self.loss_scale_factor)


def over_group(
    sums: dict[str, Tensor], maxima: dict[str, Tensor], group: Any, in_common: dict[str, Any]
) -> dict[str, Tensor]:
    """Sums and maxima of 0-d tensors over the ranks of ``group``, in one collective; fp64.

    No gradient passes; the same numbers, bit for bit, on every rank. All ranks call it with the same names. Where they
    have not ``in_common`` what they should, all of them raise the same, or get NaN where values are not looked at.
    """
    merged = {**sums, **maxima}
    local = torch.stack([value.detach().double() for value in merged.values()])
    common = _digest(in_common, local.device)
    gathered = local.new_empty((group.size(), local.numel() + common.numel()))
    all_gather(gathered.view(-1), torch.cat([local, common]), group=group)
    gathered, common = gathered.split([local.numel(), common.numel()], 1)
    totals = torch.cat([gathered[:, : len(sums)].sum(0), gathered[:, len(sums) :].amax(0)])
    differ = (common != common[:1]).any(0)
    if len(in_common) == common.shape[1] and differ.any():  # of the CPU
        i = int(differ.nonzero()[0])
        name, value = list(in_common.items())[i]
        got = (
            "" if isinstance(value, str) else f", got {[None if x == -math.inf else x for x in common[:, i].tolist()]}"
        )
        raise ValueError(f"{name}: expected the same on all ranks of the batch_group{got}")
    if common.shape[1]:
        totals = torch.where(differ.any(), math.nan, totals)
    return dict(zip(merged, totals.unbind(), strict=True))


def _digest(in_common: dict[str, Any], device: torch.device) -> Tensor:
    """fp64: every value where the host can read it; on a GPU one number of those that the host has.

    Nothing in compiled code, whose numbers are tensors.
    """
    if traced():
        return torch.zeros(0, dtype=torch.float64, device=device)
    known = []
    for value in in_common.values():
        if isinstance(value, str):
            value = zlib.crc32(value.encode())
        if isinstance(value, Tensor) and value.device.type != "cpu":
            value = None  # it is not read back
        number = -math.inf if value is None else float(value)
        known.append(number if number == number else math.inf)
    if device.type == "cpu":
        return torch.tensor(known, dtype=torch.float64)
    return torch.full((1,), zlib.crc32(struct.pack(f"{len(known)}d", *known)), dtype=torch.float64, device=device)
