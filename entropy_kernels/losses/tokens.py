"""The tensors of a loss, checked once and brought to one shape."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import boolean, check_float, check_place, check_tensor, poisoned
from entropy_kernels._selection_request import check_token_index
from entropy_kernels._sequences import Sequences, packed_sequences, per_token_or_sequence
from entropy_kernels.losses.aggregation import Aggregation
from entropy_kernels.losses.options import LossOptions, used

# What a tensor has to be: of a dtype and shape like the log-prob's, a mask, or a number per token or per sequence
_KINDS = {
    "old_logprob": "like", "advantages": "per token", "mask": "mask", "covariance_advantages": "per token",
    "token_weight": "per token", "ref_logprob": "like", "entropy": "like", "dropped": "mask", "detached": "mask",
    "penalized": "mask", "token_index": "index",
}  # fmt: skip
_EXPECTED = {
    "like": "floating-point", "per token": "floating-point", "mask": "bool, int or float 0/1", "index": "int64",
}  # fmt: skip
_UNPACKED = Sequences()


class Treated(NamedTuple):
    """Tokens under an effect, bool, True only at tokens that count; None: none."""

    dropped: Tensor | None  # value and gradient are removed
    detached: Tensor | None  # the gradient is removed
    penalized: Tensor | None  # the penalty is added

    def any(self) -> Tensor | None:
        """Those under one of them."""
        found = None
        for mask in self:
            found = mask if found is None else found if mask is None else found | mask
        return found


class Tokens(NamedTuple):
    """What is constant of a batch: tensors of one shape, values in padding as they came."""

    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor | None  # bool, True = counts; None: all do
    covariance_advantages: Tensor | None  # None: the advantages
    weight: Tensor | None
    ref_logprob: Tensor | None
    dropped: Tensor | None  # bool: tokens under an effect, where they are given
    detached: Tensor | None
    penalized: Tensor | None
    token_index: Tensor | None
    sequences: Sequences

    @property
    def treated(self) -> Treated:
        """The tokens under an effect that are given and count."""
        masks: list[Tensor | None] = [self.dropped, self.detached, self.penalized]
        if self.mask is not None:
            masks = [None if x is None else x & self.mask for x in masks]
        return Treated(*masks)

    def part(self, rows: Any, sequences: Sequences, shape: tuple[int, ...]) -> Tokens:
        """The tokens ``rows`` (a slice or indices of the flattened batch), in ``shape``."""
        own: Any = [None if x is None else x.reshape(-1)[rows].view(shape) for x in self[:-1]]
        return Tokens._make([*own, sequences])


class Checked(NamedTuple):
    """``logprob`` and ``entropy`` are as given, but flat where sequences are packed; ``shape`` is that of the call."""

    logprob: Tensor
    entropy: Tensor | None
    tokens: Tokens
    shape: torch.Size


def checked(given: dict[str, Any], options: LossOptions) -> Checked:
    """The tensors among the keywords ``given`` of a loss.

    Raises:
        TypeError, ValueError: one of the wrong type, dtype, device or shape, or one that is missing.
    """
    logprob = given["logprob"]
    check_float("logprob", logprob)
    if logprob.dim() == 0:
        raise ValueError("logprob: expected at least one dimension, often (B, L), got a 0-d tensor")
    shape, device, sequences = logprob.shape, logprob.device, None
    pools, by_sequence = options.surrogate.level == "sequence", options.aggregation.by_sequence
    if pools or by_sequence or given["cu_seqlens"] is not None:
        why = f"surrogate={given['surrogate']!r}" if pools else ""
        sequences = _sequences("logprob", logprob, given["cu_seqlens"], options.aggregation, why)
    found: dict[str, Any] = {}
    wrong: list[Tensor | None] = []
    for name, kind in _KINDS.items():
        value: Any = given.get(name)
        found[name] = value
        if value is None and name not in ("old_logprob", "advantages"):
            continue
        check_tensor(name, value)
        if value.is_complex():
            raise TypeError(f"{name}: expected a {_EXPECTED[kind]} dtype, got {value.dtype}")
        if kind == "index":
            value = check_token_index(value, "logprob", logprob)
        elif kind == "per token":
            usual = value.device == device and value.is_floating_point() and value.itemsize > 1
            if usual and sequences is None and value.shape == (*shape[:-1], 1):
                value = value.expand(shape)
            elif not usual or value.shape != shape:
                value = per_token_or_sequence(name, value, logprob, sequences)
        else:
            if value.device != device or value.shape != shape:
                check_place(name, value, "logprob", logprob)
            if kind == "like" and not value.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
            if kind == "mask" and value.dtype != torch.bool:
                value, where = boolean(name, value)
                wrong.append(where)
        if name != "entropy":
            value = (value.detach() if value.requires_grad else value).resolve_neg()
        found[name] = value
    for name, multiplied in (("ref_kl_coef", "ref_logprob"), ("entropy_coef", "entropy")):
        if found[multiplied] is None and used(getattr(options, name)):
            raise ValueError(f"{multiplied}: expected a tensor with {name}={given[name]}, got None")
    entropy = found["entropy"]
    if entropy is not None and not entropy.requires_grad and logprob.requires_grad:
        _warn_about_lost_gradient(options)
    if wrong:
        found["old_logprob"] = poisoned(found["old_logprob"], *wrong)
    masks = Treated(found["dropped"], found["detached"], found["penalized"])
    if options.effect == "detached" and masks.dropped is not None:  # which is what the preset does to dropped tokens
        masks = Treated(None, masks._replace(penalized=None).any(), masks.penalized)
    tokens = Tokens(
        found["old_logprob"], found["advantages"], found["mask"], found["covariance_advantages"],
        found["token_weight"], found["ref_logprob"], *masks, found["token_index"], sequences or _UNPACKED,
    )  # fmt: skip
    if sequences is None:
        return Checked(logprob, entropy, tokens, shape)
    entropy = None if entropy is None else entropy.reshape(-1)
    return Checked(logprob.reshape(-1), entropy, tokens.part(slice(None), sequences, (-1,)), shape)


def check_summand(
    term: Any, mask: Any, cu_seqlens: Any, aggregation: Aggregation
) -> tuple[Tensor, Tensor | None, Sequences]:
    """Of :func:`entropy_kernels.aggregate`: the summand in fp32 or fp64, the mask as bool; errors: :func:`checked`."""
    check_tensor("term", term)
    if not term.is_floating_point() or term.dim() == 0:
        raise TypeError(f"term: expected a floating-point tensor of at least one dimension, got {term.dtype}")
    if mask is not None:
        check_tensor("mask", mask)
        check_place("mask", mask, "term", term)
        mask, wrong = boolean("mask", mask)
        term = poisoned(term, wrong)
    sequences = _sequences("term", term, cu_seqlens, aggregation, "")
    term = term.to(torch.float64 if term.dtype == torch.float64 else torch.float32)
    if sequences is None:
        return term, mask, _UNPACKED
    return term.reshape(-1), None if mask is None else mask.reshape(-1), sequences


def _sequences(name: str, like: Tensor, cu_seqlens: Any, aggregation: Aggregation, why: str) -> Sequences | None:
    """The packed sequences of a call, None where they are the rows or nobody asks; ``why`` else they are asked for."""
    if aggregation.by_sequence:
        why = f"loss_agg_mode={aggregation.mode!r}"
    if why and cu_seqlens is None and like.dim() < 2:
        raise ValueError(
            f"{name}: expected (..., sequences, tokens) with {why}, or cu_seqlens beside it, got shape "
            f"{tuple(like.shape)}"
        )
    return packed_sequences(cu_seqlens, like)


def _warn_about_lost_gradient(options: LossOptions) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not used(options.entropy_coef):
        return
    warnings.warn(
        "entropy: expected a tensor that requires grad where entropy_coef is not 0; without a gradient the bonus "
        "changes the value of the loss and nothing else (logprob_entropy returns a differentiable entropy)",
        stacklevel=5,
    )
