"""The tensors of a loss, checked once and brought to one shape."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import values_are_checked
from entropy_kernels.losses.aggregation import Aggregation, Sequences
from entropy_kernels.losses.options import LossOptions, used


class Tokens(NamedTuple):
    """What is constant of a batch: tensors of one shape, values in padding as they came."""

    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor | None  # bool, True = counts; None: all do
    covariance_advantages: Tensor | None  # None: the advantages
    weight: Tensor | None
    ref_logprob: Tensor | None
    chosen: Tensor | None  # bool: the tokens under the effect, where they are given
    token_index: Tensor | None
    sequences: Sequences

    def part(self, rows: Any, sequences: Sequences, shape: tuple[int, ...]) -> Tokens:
        """The tokens ``rows`` (a slice or indices of the flattened batch), in ``shape``."""
        own = (None if x is None else x.reshape(-1)[rows].view(shape) for x in self[:-1])
        return Tokens(*own, sequences)  # type: ignore[arg-type]


class Checked(NamedTuple):
    """``logprob`` and ``entropy`` are as given, but flat where sequences are packed; ``shape`` is that of the call."""

    logprob: Tensor
    entropy: Tensor | None
    tokens: Tokens
    shape: torch.Size


def check(given: dict[str, Any], options: LossOptions) -> Checked:
    """The tensors among the keywords ``given`` of a loss.

    Raises:
        TypeError, ValueError: one of the wrong type, dtype, device or shape, or one that is missing.
    """
    logprob = given["logprob"]
    _check_tensor("logprob", logprob)
    if not logprob.is_floating_point():
        raise TypeError(f"logprob: expected a floating-point dtype, got {logprob.dtype}")
    if logprob.dim() == 0:
        raise ValueError("logprob: expected at least one dimension, often (B, L), got a 0-d tensor")
    why = f"surrogate={given['surrogate']!r}" if options.surrogate.pools else ""
    sequences = _sequences("logprob", logprob, given["cu_seqlens"], options.aggregation, why)
    like = {name: _like(name, given.get(name), logprob) for name in ("old_logprob", "ref_logprob", "entropy")}
    if like["old_logprob"] is None:
        raise TypeError("old_logprob: expected a torch.Tensor, got NoneType")
    masks = {name: check_mask(name, given.get(name), logprob) for name in ("mask", options.given) if name}
    per_token = [
        None if name != "advantages" and given[name] is None else _per_token(name, given[name], logprob, sequences)
        for name in ("advantages", "covariance_advantages", "token_weight")
    ]
    for term, coefficient in (("ref_logprob", "ref_kl_coef"), ("entropy", "entropy_coef")):
        if like[term] is None and used(getattr(options, coefficient)):
            raise ValueError(f"{term}: expected a tensor with {coefficient}={given[coefficient]}, got None")
    index = given.get("token_index")
    if index is not None:
        _check_tensor("token_index", index)
        if index.dtype != torch.int64:
            raise TypeError(f"token_index: expected dtype torch.int64, got {index.dtype}")
        _check_place("token_index", index, logprob)
    entropy, ref = like["entropy"], like["ref_logprob"]
    if entropy is not None:
        _warn_about_lost_gradient(entropy, options, logprob)
    old = like["old_logprob"].detach()
    own = (old, per_token[0], masks["mask"], *per_token[1:], None if ref is None else ref.detach())
    own = (*own, masks.get(options.given), index)
    if sequences is None:
        return Checked(logprob, entropy, Tokens(*own, Sequences()), logprob.shape)
    flat = [None if x is None else x.reshape(-1) for x in (logprob, entropy, *own)]
    return Checked(flat[0], flat[1], Tokens(*flat[2:], sequences), logprob.shape)  # type: ignore[arg-type]


def check_term(
    term: Any, mask: Any, cu_seqlens: Any, aggregation: Aggregation
) -> tuple[Tensor, Tensor | None, Sequences]:
    """Of :func:`entropy_kernels.aggregate`: the term in fp32 or fp64, the mask as bool; raises as :func:`check`."""
    _check_tensor("term", term)
    if not term.is_floating_point() or term.dim() == 0:
        raise TypeError(f"term: expected a floating-point tensor of at least one dimension, got {term.dtype}")
    valid = check_mask("mask", mask, term, "term")
    sequences = _sequences("term", term, cu_seqlens, aggregation, "")
    term = term.to(torch.float64 if term.dtype == torch.float64 else torch.float32)
    if sequences is None:
        return term, valid, Sequences()
    return term.reshape(-1), None if valid is None else valid.reshape(-1), sequences


def _sequences(name: str, like: Tensor, cu_seqlens: Any, aggregation: Aggregation, why: str) -> Sequences | None:
    """The packed sequences of a call, None where they are the rows or nobody asks; ``why`` else they are asked for."""
    if aggregation.by_sequence:
        why = f"loss_agg_mode={aggregation.mode!r}"
    if why and cu_seqlens is None and like.dim() < 2:
        raise ValueError(
            f"{name}: expected (..., sequences, tokens) with {why}, or cu_seqlens beside it, got shape {tuple(like.shape)}"
        )
    return packed_sequences(cu_seqlens, like)


def packed_sequences(cu_seqlens: Any, logprob: Tensor) -> Sequences | None:
    """The sequences that ``cu_seqlens`` (S + 1,) cuts the flattened tokens of ``logprob`` into; None for None."""
    if cu_seqlens is None:
        return None
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != logprob.device:
        raise ValueError(f"cu_seqlens: expected on the device of logprob, {logprob.device}, got {cu_seqlens.device}")
    tokens = logprob.numel()
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if not torch.compiler.is_compiling() and values_are_checked(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(
                f"cu_seqlens: expected numbers that rise from 0 to the number of tokens, {tokens}, got "
                f"{ends if len(ends) < 8 else [*ends[:3], '...', *ends[-3:]]}"
            )
    return Sequences.packed(cu_seqlens.long().diff(), tokens)


def check_mask(name: str, value: Any, logprob: Tensor, like: str = "logprob") -> Tensor | None:
    """``value`` as bool in the shape of ``logprob``, which is the argument ``like``; None stays None."""
    if value is None:
        return None
    _check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: expected a bool, int or float 0/1 dtype, got {value.dtype}")
    _check_place(name, value, logprob, like)
    value = value.detach()
    return value if value.dtype == torch.bool else value != 0


def _per_token(name: str, value: Any, logprob: Tensor, sequences: Sequences | None) -> Tensor:
    """``value`` in ``logprob``'s shape: as given; one per sequence; 0-d one for all. A constant, floating point."""
    _check_tensor(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    value = value.detach()
    if not value.is_floating_point():
        value = value.to(torch.float64)
    shape = logprob.shape
    if value.device != logprob.device:
        raise ValueError(f"{name}: expected on the device of logprob, {logprob.device}, got {value.device}")
    if value.shape == shape:
        return value
    per_sequence = tuple(shape[:-1])
    if sequences is not None and sequences.lengths is not None:
        per_sequence = tuple(sequences.lengths.shape)
        if value.shape in (per_sequence, (*per_sequence, 1)):
            return sequences.spread(value.reshape(-1)).view(shape)
    # One per sequence, never one per position: of a square batch (B,) could be read both ways
    elif value.shape in (per_sequence, (*per_sequence, 1)) and value.dim() > 0:
        return value.reshape(*per_sequence, 1).expand(shape)
    fits = value.dim() == len(shape) and all(a in (1, b) for a, b in zip(value.shape, shape, strict=True))
    if value.dim() > 0 and (sequences is not None or not fits):
        raise ValueError(
            f"{name}: expected logprob's shape {tuple(shape)}, one per sequence {per_sequence}, or size 1 where one "
            f"value serves all, got {tuple(value.shape)}"
        )
    return value.expand(shape)


def _like(name: str, value: Any, logprob: Tensor) -> Tensor | None:
    if value is None:
        return None
    _check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    _check_place(name, value, logprob)
    return value


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_place(name: str, value: Tensor, logprob: Tensor, like: str = "logprob") -> None:
    if value.device != logprob.device:
        raise ValueError(f"{name}: expected on the device of {like}, {logprob.device}, got {value.device}")
    if value.shape != logprob.shape:
        raise ValueError(f"{name}: expected {like}'s shape {tuple(logprob.shape)}, got {tuple(value.shape)}")


def _warn_about_lost_gradient(entropy: Tensor, options: LossOptions, logprob: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not used(options.entropy_coef):
        return
    if logprob.requires_grad and not entropy.requires_grad:
        warnings.warn(
            "entropy: expected a tensor that requires grad where entropy_coef is not 0; without a gradient the bonus "
            "changes the value of the loss and nothing else (logprob_entropy returns a differentiable entropy)",
            stacklevel=5,
        )
