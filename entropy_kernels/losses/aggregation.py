"""From per-token losses to the scalar loss, over micro-batches and data-parallel ranks.

Every mode is linear in the tokens, Σ w_i x_i / D, with a weight w_i that a rank knows alone (1, or 1 / the length of
the sequence) and a denominator D that is a count over the whole batch. So only counts ever cross ranks, a token's
derivative is its weight, and micro-batches add up exactly.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels import _agreement as agreement
from entropy_kernels._arguments import all_gather, traced
from entropy_kernels._sequences import Sequences

AGG_MODES: dict[str, str] = {
    "token-mean": "Σ_b L_b / Σ_b m_b",
    "token-sum": "Σ_b L_b",
    "seq-mean-token-sum": "mean of L_b over the sequences with m_b > 0",
    "seq-mean-token-mean": "mean of L_b / m_b over the sequences with m_b > 0",
    "seq-mean-token-sum-norm": "mean of L_b over the sequences with m_b > 0, / loss_scale_factor (default: L)",
}
"""``loss_agg_mode`` by name; L_b: sum of the losses of sequence b over its valid tokens, m_b: their number."""
# The keyword that gives the count of tokens, or of sequences, of the whole batch
COUNTS = ("batch_num_tokens", "global_batch_size")


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
        """What the ranks of the group must have alike: no denominators, which may be each rank's own where given."""
        return {"loss_agg_mode": self.mode}

    def denominators(self) -> dict[str, Any]:
        """Those that the caller gives."""
        count = COUNTS[int(self.by_sequence)]
        return {"dp_size": self.dp_size, count: self.given_count, "loss_scale_factor": self.loss_scale_factor}

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

    def denominator(self, counts: Counts, width: int, tokens: Tensor | None = None) -> Tensor:
        """D, 0-d; never 0, so that a batch without valid tokens has loss 0. ``tokens``: that of a mean over tokens."""
        if tokens is not None and self.given_count is None and not self.by_sequence and self.mode != "token-sum":
            return tokens
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


# What may cross ranks, each in its place, so that ranks of which one lacks some still send as much as the others
_SUMS = (
    *Counts._fields, "nonfinite", "policy", "clipfrac", "clipfrac_low", "clipfrac_high", "clipfrac_lower", "ppo_kl",
    "ppo_kl_abs", "ratio_mean", "cov_mean", "band_frac", "selected_frac", "entropy", "ref_kl",
)  # fmt: skip
_MAXIMA = ("ratio_max", "cov_max")


def over_group(
    sums: dict[str, Tensor], maxima: dict[str, Tensor], group: Any, in_common: dict[str, Any]
) -> dict[str, Tensor]:
    """Sums and maxima of 0-d tensors over the ranks of ``group``, in one collective; fp64.

    No gradient passes; the same numbers, bit for bit, on every rank. Where the ranks have not ``in_common`` what they
    should, all of them raise the same, or get NaN where values are not looked at. In compiled code, whose numbers are
    tensors, a rank tells the others nothing of what it has; then a number that another rank lacks is NaN.
    """
    merged = {**sums, **maxima}
    like = next(iter(merged.values()))
    device, missing = like.device, like.new_full((), math.nan, dtype=torch.float64)
    names = (*_SUMS, *_MAXIMA)
    local = torch.stack([merged[name].detach().double() if name in merged else missing for name in names])
    compiled = traced()
    if compiled:
        common = local.new_full((agreement.room(device),), agreement.UNKNOWN)
    else:
        common = agreement.sent(in_common, device)
    gathered = local.new_empty((group.size(), local.numel() + common.numel()))
    all_gather(gathered.view(-1), torch.cat([local, common]), group=group)
    gathered, common = gathered.split([local.numel(), common.numel()], 1)
    totals = torch.cat([gathered[:, : len(_SUMS)].sum(0), gathered[:, len(_SUMS) :].amax(0)])
    if not compiled and device.type == "cpu":
        agreement.check(in_common, common)
    totals = torch.where(agreement.differing(common).any(), math.nan, totals)
    return {name: total for name, total in zip(names, totals.unbind(), strict=True) if name in merged}
