"""Packed sequences: which tokens of a flattened batch are one, for the losses and for control."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import check_device, check_tensor, values_are_checked
from entropy_kernels._selection_request import per_token
from entropy_kernels._torch import assert_async


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


def packed_sequences(cu_seqlens: Any, logprob: Tensor) -> Sequences | None:
    """The sequences that ``cu_seqlens`` (S + 1,) cuts the flattened tokens of ``logprob`` into; None for None."""
    if cu_seqlens is None:
        return None
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    check_device("cu_seqlens", cu_seqlens, "logprob", logprob)
    tokens = logprob.numel()
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if not torch.compiler.is_compiling() and values_are_checked(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"cu_seqlens: expected numbers that rise from 0 to the number of tokens, {tokens}, got "
                f"{ends if len(ends) < 8 else [*ends[:3], '...', *ends[-3:]]}"
            )
    ends = cu_seqlens.detach().long()
    if torch.compiler.is_compiling() or not values_are_checked(cu_seqlens):
        right = (ends[0] == 0) & (ends[-1] == tokens) & (ends.diff() >= 0).all()
        assert_async(right, "cu_seqlens: expected numbers that rise from 0 to the number of tokens")
        ends = ends.clamp(0, tokens).cummax(0).values  # nothing reads beyond the tokens before that is heard
    return Sequences.packed(ends.diff(), tokens, logprob.shape[-1])


def per_token_or_sequence(name: str, value: Tensor, logprob: Tensor, sequences: Sequences | None) -> Tensor:
    """As :func:`per_token`; one per sequence where they are packed, and a weight may be a mask."""
    check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if name == "token_weight" and value.dtype == torch.bool:
        value = value.to(torch.float32)
    if value.dtype != torch.bool and not (value.is_floating_point() and value.itemsize > 1):
        value = value.double()  # few operators know all kinds of integers, or of floats of a byte
    if sequences is not None and sequences.lengths is not None and value.dim() > 0 and value.shape != logprob.shape:
        count = sequences.lengths.numel()
        if value.shape not in ((count,), (count, 1)):
            raise ValueError(
                f"{name}: expected logprob's shape {tuple(logprob.shape)}, one per sequence ({count},), or 0-d, got "
                f"{tuple(value.shape)}"
            )
        check_device(name, value, "logprob", logprob)
        value = sequences.spread(value.reshape(-1)).view(logprob.shape)
    return per_token(name, value, logprob)
