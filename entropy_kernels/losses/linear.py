"""The policy losses from hidden states: gradients in the forward pass, three products (docs/linear.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import (
    check_float,
    check_place,
    check_tensor,
    integer,
    keywords,
    refuse_mapped,
    traced,
    word,
)
from entropy_kernels._rows import ENTROPY, LOGPROB, RowArguments
from entropy_kernels._sequences import Sequences
from entropy_kernels.linear import Final, LinearArguments, changes_of, linear_loss, stats_of
from entropy_kernels.losses import functional, tokens
from entropy_kernels.losses.aggregation import COUNTS
from entropy_kernels.losses.evaluate import evaluate, metric_names, surrogate_losses, token_losses
from entropy_kernels.losses.functional import PolicyLoss
from entropy_kernels.losses.options import CLIP_COV, KL_COV, LossOptions, controlled, make, seeded, used
from entropy_kernels.losses.surrogates import keep
from entropy_kernels.losses.tokens import Tokens

LOSSES: dict[str, Callable[..., PolicyLoss]] = {
    "ppo": functional.policy_loss,
    "clip_cov": functional.clip_cov_loss,
    "kl_cov": functional.kl_cov_loss,
}
"""The functions behind ``method=`` of :func:`entropy_kernels.linear_policy_loss`, by its name."""
# The keywords of each, with their defaults
_KEYWORDS: dict[str, dict[str, Any]] = {method: keywords(loss) for method, loss in LOSSES.items()}
_HUGE = 8.0  # × the mean size of the advantages that are not 0


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor | Callable[..., Tensor],
    target: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    bias: Tensor | None = None,
    *,
    method: str = "ppo",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    grad_buffer: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> PolicyLoss:
    """The losses of PPO, Clip-Cov and KL-Cov from hidden states and a head, with three matrix products.

    Equal, but for rounding, to

        logprob, entropy = ek.linear_logprob_entropy(hidden, weight, target, bias, ...)
        ek.clip_cov_loss(logprob, old_logprob, advantages, mask, entropy=entropy, ...)        # or the others

    which makes its logits a second time where they do not fit ``memory_budget``. Here all gradients are made in the
    forward pass, the logits of some tokens at a time; the few tokens that a selection over the whole call then changes
    are corrected. The backward pass multiplies by the factor of the loss, once. Losses of which too little is known
    while a token's logits are there are computed as above, in up to four products: docs/linear.md has the table.

    Args:
        hidden, weight, target, bias, temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size,
            logits_dtype: as in :func:`entropy_kernels.linear_logprob_entropy`. A weight that is a module or a function
            is computed as above, with recomputation. ``target`` is not read where the mask is 0.
        old_logprob, advantages, mask: as in :func:`entropy_kernels.policy_loss`, in ``target``'s shape (..., L). A mask
            of None: the tokens that have a label count.
        method: "ppo", "clip_cov" or "kl_cov".
        memory_budget: bytes for the logits of a part of the tokens and what goes with them, by default as in
            :func:`entropy_kernels.linear_logprob_entropy`; with a ``vocab_group`` the least of its ranks counts.
            ``linear_plan(..., policy_loss=True)`` says what it comes to; the head's gradient, summed in fp32 where
            there are several parts, is beside it.
        grad_buffer: (V, H) as ``weight``, fp32 (fp64 for fp64), to which the head's gradient is added in this call,
            unrounded, instead of going to ``weight.grad``: for sums over micro-batches. It is the gradient of this
            loss: differentiate the loss as it is, and scale it by ``batch_num_tokens`` and the like. Every call with
            gradients adds to it, also the second one that a checkpoint with ``use_reentrant=False`` may make.
        backend: "auto", "torch", "triton", "cpu" or "cuda", for statistics and selection.
        options: keyword arguments of :func:`entropy_kernels.policy_loss`, of :func:`entropy_kernels.clip_cov_loss` or
            of :func:`entropy_kernels.kl_cov_loss`, as the method says, ``surrogate`` and its options among them; not
            ``entropy``, which is computed here, whose bonus is ``entropy_coef`` as there. Coefficients are constants.
            To select over several calls, :class:`entropy_kernels.SelectionBatch` and ``dropped=`` or ``penalized=``:
            the result then does not depend on how the batch is split.

    Returns:
        :class:`entropy_kernels.PolicyLoss`: 0-d, fp32 (fp64 for fp64), in the unit of the advantages; the metric
        ``entropy`` is always there. One backward pass.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: as the functions above, before anything is computed.
        RuntimeError: a second backward pass, double backward, or a factor on the loss beside a ``grad_buffer``.

    Source:
        docs/linear.md; arXiv 2505.22617, Eq. 12 and 13.
    """
    given = _keywords(method, options)
    tensors = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "temperature": temperature}
    refuse_mapped({**tensors, "old_logprob": old_logprob, "advantages": advantages, "mask": mask, **options})
    row = RowArguments(temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size, backend)
    head = LinearArguments(row, logits_dtype, memory_budget)
    ignore_index = integer("ignore_index", ignore_index)
    check_tensor("hidden", hidden)
    check_tensor("target", target)
    check_float("old_logprob", old_logprob)
    check_place("old_logprob", old_logprob, "target", target)
    # Every error of the loss comes before the work, and before anything is added to a buffer: in place of the log-probs
    # that are not there yet, the old ones are checked
    given |= {"old_logprob": old_logprob, "advantages": advantages, "mask": mask, "backend": backend}
    given |= {"logprob": old_logprob, "entropy": old_logprob}
    given = controlled(method, given)
    chosen = make(method, given, old_logprob.device)
    for name in ("entropy_coef", "ref_kl_coef"):
        if isinstance(given[name], Tensor) and given[name].requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a constant, got a tensor that requires grad")
    checked = tokens.checked(given, chosen)
    batch = checked.tokens
    if batch.mask is None:
        batch = batch._replace(mask=(target != ignore_index).view(batch.old_logprob.shape))
    assert batch.mask is not None
    target = torch.where(batch.mask.view(target.shape), target, ignore_index)

    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias))
    why = _why_composed(weight, chosen, batch, grad_buffer, differentiable and torch.is_grad_enabled())
    if why and grad_buffer is not None and torch.is_grad_enabled():
        raise ValueError(f"grad_buffer: expected None {why}, got a tensor")
    made = None
    if isinstance(weight, Tensor):
        coefficients = None if why else _Coefficients(chosen, batch, _changes(chosen, given, target.numel()))
        if coefficients is not None or (vocab_group is not None and not traced()):
            made = linear_loss(
                hidden, weight, target, bias, head, coefficients, alike=lambda: _alike(chosen, batch, why),
                grad_buffer=grad_buffer,
            )  # fmt: skip
    if made is None:
        logprob, entropy = stats_of(hidden, weight, target, bias, head, LOGPROB | ENTROPY)
        flat = batch.old_logprob.shape
        return functional.apply(logprob.view(flat), entropy.view(flat), batch, target.shape, seeded(chosen))
    loss, values = made
    names = metric_names(chosen, True, batch.ref_logprob is not None)
    return PolicyLoss(loss, dict(zip(names, values.unbind(), strict=True)))


def _keywords(method: Any, given: dict[str, Any]) -> dict[str, Any]:
    """All keywords of the loss ``method``, those of its surrogate apart."""
    word("method", method, LOSSES)
    if "entropy" in given:
        raise TypeError("linear_policy_loss: expected no entropy, got entropy (entropy is computed here)")
    known = _KEYWORDS[method]
    others = {name: value for name, value in given.items() if name not in known}
    return {**known, **{name: value for name, value in given.items() if name in known}, "surrogate_options": others}


def _why_composed(
    weight: Any, chosen: LossOptions, batch: Tokens, grad_buffer: Tensor | None, differentiable: bool
) -> str:
    """Why gradients cannot be made in the forward pass; "" if they can."""
    if not isinstance(weight, Tensor):
        return "beside a weight that is a module or a function"
    if not differentiable:
        return "for a weight that needs no gradient"
    if chosen.aggregation.mode == "none":
        return "with loss_agg_mode='none', whose factors come only with the backward pass"
    if chosen.drop_nonfinite:
        mode, given = chosen.aggregation.mode, chosen.aggregation.given_count
        if mode == "seq-mean-token-mean":
            return "with nonfinite='drop', which leaves lengths of sequences that are known only after all tokens"
        if grad_buffer is not None and given is None and mode != "token-sum":  # else it is a factor that comes late
            name = COUNTS[int(chosen.aggregation.by_sequence)]
            return f"with nonfinite='drop', whose count is known only after all tokens where no {name} gives it"
    # A penalty is the token's own; a token that is dropped takes its share of the derivative of all its sequence along
    pooled = chosen.surrogate.pools and not chosen.surrogate.local
    if pooled and chosen.selection is not None and chosen.effect != "penalized":
        return "with a selection in the call and a surrogate whose ratio is a sequence's (give the mask as `dropped`)"
    return ""


def _ends_of_sequences(batch: Tokens) -> int | Sequence[int]:
    """Positions in the flattened batch at which a sequence ends; one number: the length of all of them."""
    lengths = batch.sequences.lengths
    if lengths is None:
        return max(1, batch.old_logprob.shape[-1])
    if lengths.is_cuda or torch.compiler.is_compiling():
        return batch.old_logprob.numel()  # the host does not read them: one part, or none
    return lengths.cumsum(0).tolist()


def _changes(chosen: LossOptions, given: dict[str, Any], tokens: int) -> int | None:
    """Most tokens whose coefficient a selection in the call changes, and those held out; None where it is not known.

    ``given`` says it also in compiled code, where the record of a selection has tensors alone.
    """
    if chosen.selection is None:
        return 0
    ratio, k = given["ratio"], given["k"]
    # tensors are not read back, and the tokens of a group not counted
    if chosen.aggregation.group is not None or isinstance(ratio, Tensor) or isinstance(k, Tensor):
        return None
    if ratio is k is None:
        known: Any = CLIP_COV if chosen.selection.seed is not None else KL_COV
        ratio = known[given["preset"]].ratio
    return changes_of(ratio, None if k is None else integer("k", k), tokens)


def _alike(chosen: LossOptions, batch: Tokens, why: str) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """What the ranks of a vocab_group must have alike: all options and constants, and whether it is composed.

    Of what is per token the tokens that count are looked at.
    """
    in_common = chosen.in_common(True, batch.ref_logprob is not None)
    in_common = {**in_common, **chosen.aggregation.denominators(), **chosen.selecting(), "requires_grad": why}
    names = {"weight": "token_weight"}
    tensors: dict[str, Tensor | None] = {"seed": chosen.next_seed(), "cu_seqlens": batch.sequences.lengths}
    for name, value in zip(Tokens._fields[:-1], batch[:-1], strict=True):
        if value is not None and batch.mask is not None:
            value = torch.where(batch.mask, value, 0)
        tensors[names.get(name, name)] = value
    return in_common, tensors


class _Coefficients:
    """What a loss is to ops/linear_policy_loss.py, which has the contract."""

    def __init__(self, chosen: LossOptions, batch: Tokens, changes: int | None) -> None:
        self._options, self._batch, self.changes = chosen, batch, changes
        self.cuts = _ends_of_sequences(batch) if chosen.surrogate.pools else None
        mask, aggregation, sequences = batch.mask, chosen.aggregation, batch.sequences
        assert mask is not None
        counts, own = aggregation.counted(mask, sequences)
        counts = aggregation.whole(counts, chosen.in_common(True, batch.ref_logprob is not None))
        share = own * aggregation.dp_size / aggregation.denominator(counts, sequences.width or mask.shape[-1])
        # fp64, of the tokens' shape: what a token's loss is multiplied by, before what is not finite is dropped
        self._weights = sequences.spread(share).expand(mask.shape) * mask
        self._share = share
        self._size = torch.where(mask, batch.advantages, 0).double().abs().nan_to_num(0, 0)
        self._huge = _HUGE * self._size.sum() / self._size.count_nonzero().clamp(min=1)

    @property
    def scale(self) -> Tensor:
        """0-d, a power of 2: coefficients × scale are about as large as the advantages."""
        if not self._weights.numel():
            return self._weights.new_ones(()).float()
        largest = (self._weights * self._size.clamp(min=1)).amax()
        return torch.exp2(-torch.log2(largest.clamp(2.0**-60, 2.0**60)).ceil()).float()

    def predicted(self, rows: Any, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """c, e and which c are huge, of the tokens ``rows`` if none of them is selected."""
        shape, sequences = self._layout(rows, logprob.numel())
        part = self._batch.part(rows, sequences, shape)
        weights = self._weights.reshape(-1)[rows].view(shape)
        logprob, entropy = logprob.view(shape), entropy.view(shape)
        found = surrogate_losses(logprob, part, self._options)
        treated = part._replace(mask=found.valid).treated
        by_token = token_losses(logprob, entropy, found, part, self._options, treated)
        c, e = self._derivatives(by_token, weights)
        return c, e, ~(c.abs() <= (self._huge * weights).reshape(-1))

    def final(self, logprob: Tensor, entropy: Tensor) -> Final:
        """The loss, its metrics, c and e of all tokens."""
        shape = self._batch.old_logprob.shape
        # A counter of seeds is asked here, where nothing is left that could be refused
        found = evaluate(logprob.view(shape), entropy.view(shape), self._batch, seeded(self._options))
        c, e = self._derivatives(found.by_token, self._weights)
        factor = None
        aggregation = self._options.aggregation
        if self._options.drop_nonfinite and aggregation.mode != "token-sum" and aggregation.given_count is None:
            factor = found.weight / self._share
        return Final(found.loss, torch.stack(found.metrics), c, e, factor)

    def _derivatives(self, by_token: Any, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of Σ weights · loss by log-prob and entropy, flat; None for the latter's where it has no coefficient."""
        weights = weights.to(by_token.loss.dtype)
        c = by_token.pullback(weights).reshape(-1)
        if not used(self._options.entropy_coef):
            return c, None
        e = (-self._options.entropy_coef * weights).to(c.dtype)
        return c, keep(by_token.pullback.mask, e)[0].reshape(-1)

    def _layout(self, rows: Any, count: int) -> tuple[tuple[int, ...], Sequences]:
        """Shape and sequences of the tokens ``rows``."""
        if self.cuts is None:
            return (count,), Sequences()
        lengths = self._batch.sequences.lengths
        if isinstance(self.cuts, int):
            if lengths is None:
                return (count // self.cuts, self.cuts), Sequences()
            return (count,), self._batch.sequences
        assert lengths is not None
        first, last = (sum(cut <= end for cut in self.cuts) for end in (rows.start, rows.stop))
        return (count,), Sequences.packed(lengths[first:last], count)
