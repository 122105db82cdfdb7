"""From per-token losses to the scalar loss, over micro-batches and data-parallel ranks.

Every mode is linear in the tokens, Σ w_i x_i / D, with a weight w_i that a rank knows alone (1, or 1 / the length of
the sequence) and a denominator D that is a count over the whole batch. So only counts ever cross ranks, autograd sees
a division by a constant, and micro-batches add up exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import all_gather, check_number, integer

# L_b: sum of the losses of sequence b over its valid tokens, m_b: their number. The docs print this table.
AGG_MODES: dict[str, str] = {
    "token-mean": "Σ_b L_b / Σ_b m_b",
    "token-sum": "Σ_b L_b",
    "seq-mean-token-sum": "mean of L_b over the sequences with m_b > 0",
    "seq-mean-token-mean": "mean of L_b / m_b over the sequences with m_b > 0",
    "seq-mean-token-sum-norm": "mean of L_b over the sequences with m_b > 0, / loss_scale_factor (default: L)",
}


class Aggregation(NamedTuple):
    """The arguments that say how a loss is aggregated; see :func:`entropy_kernels.policy_loss`."""

    mode: str
    dp_size: int
    batch_num_tokens: int | Tensor | None
    global_batch_size: int | Tensor | None
    loss_scale_factor: float | Tensor | None
    group: Any

    def check(self, logprob: Tensor) -> None:
        """Values and their combination are valid for ``logprob``'s shape."""
        if self.mode not in AGG_MODES:
            raise ValueError(f"loss_agg_mode: expected one of {', '.join(map(repr, AGG_MODES))}, got {self.mode!r}")
        if integer("dp_size", self.dp_size) < 1:
            raise ValueError(f"dp_size: expected >= 1, got {self.dp_size}")
        _check_count("batch_num_tokens", self.batch_num_tokens)
        _check_count("global_batch_size", self.global_batch_size)
        scale = self.loss_scale_factor
        if scale is not None and not isinstance(scale, Tensor):
            check_number("loss_scale_factor", scale)
            if not scale > 0:
                raise ValueError(f"loss_scale_factor: expected > 0, got {scale}")
        if self.group is not None and getattr(self.group, "group_name", None) is None:
            raise TypeError(
                f"batch_group: expected a torch.distributed process group or None, got {type(self.group).__name__}"
            )
        if self._by_sequence and logprob.dim() < 2:
            raise ValueError(
                f"logprob: expected (..., sequences, tokens) with loss_agg_mode={self.mode!r}, "
                f"got shape {tuple(logprob.shape)}"
            )
        if self.dp_size > 1 and self.group is None and self.mode != "token-sum":
            name = "global_batch_size" if self._by_sequence else "batch_num_tokens"
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}: expected the number of the whole batch (or a batch_group that counts it) "
                    f"with dp_size={self.dp_size}, got None"
                )

    @property
    def _by_sequence(self) -> bool:
        return self.mode.startswith("seq-")

    @property
    def is_mean_of_call(self) -> bool:
        """Whether the loss is the mean over the valid tokens of this call."""
        return self.mode == "token-mean" and self.batch_num_tokens is None and self.group is None

    def numerator(self, values: Tensor, mask: Tensor) -> Tensor:
        """Σ w_i x_i of this rank's tokens, differentiable; ``values`` are 0 where masked."""
        if self.mode != "seq-mean-token-mean":
            return values.sum()
        return (values.sum(-1) / mask.sum(-1).clamp(min=1)).sum()

    def weights(self, mask: Tensor) -> Tensor:
        """What a token's loss is multiplied by before all are added up, fp64 of ``mask``'s shape, 0 where masked.

        The derivative of ``numerator / denominator · dp_size``; counts over the ranks of the group, if there is one.
        """
        counts = Counts.of(mask)
        if self.group is not None:
            counts = Counts(**over_group(counts._asdict(), {}, self.group))
        share = mask.double()
        if self.mode == "seq-mean-token-mean":
            share = share / mask.sum(-1, keepdim=True).clamp(min=1)
        return share * self.dp_size / self.denominator(counts, mask.shape[-1])

    def denominator(self, counts: Counts, length: int) -> Tensor | int | float:
        """D without dp_size; never 0, so that a batch without valid tokens has loss 0."""
        if self.mode == "token-sum":
            return 1
        given = self.global_batch_size if self._by_sequence else self.batch_num_tokens
        counted = counts.sequences if self._by_sequence else counts.tokens
        if given is None:
            count: Tensor | int | float = counted.clamp(min=1)
        else:
            count = given.clamp(min=1) if isinstance(given, Tensor) else max(given, 1)
        if self.mode != "seq-mean-token-sum-norm":
            return count
        return count * (max(length, 1) if self.loss_scale_factor is None else self.loss_scale_factor)


class Counts(NamedTuple):
    """0-d tensors: what is counted over this rank's tokens, or over the group's."""

    tokens: Tensor  # valid tokens
    sequences: Tensor  # sequences with at least one valid token

    @classmethod
    def of(cls, mask: Tensor) -> Counts:
        """Over this rank's tokens."""
        return cls(mask.count_nonzero(), mask.any(-1).count_nonzero())


def over_group(sums: dict[str, Tensor], maxima: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Sums and maxima of 0-d tensors over the ranks of ``group``, in one collective; fp64.

    No gradient passes; the same numbers, bit for bit, on every rank. All ranks call it with the same names.
    """
    merged = {**sums, **maxima}
    local = torch.stack([value.detach().double() for value in merged.values()])
    gathered = local.new_empty((group.size(), local.numel()))
    all_gather(gathered.view(-1), local, group=group)
    totals = torch.cat([gathered[:, : len(sums)].sum(0), gathered[:, len(sums) :].amax(0)])
    return dict(zip(merged, totals.unbind(), strict=True))


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"{name}: expected a number or a 0-d tensor, got {value.dtype} of shape {tuple(value.shape)}"
            )
        return
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected >= 0, got {value}")
