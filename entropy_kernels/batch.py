"""The tokens of a batch with what is known of each, for control: as a caller gives them, and as a method sees them.

:class:`TokenBatch` is a micro-batch, checked. :class:`WholeBatch` is all micro-batches of this rank, flat, with means,
maxima and selections that are those of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_kernels import _agreement as agreement
from entropy_kernels import _torch, selection
from entropy_kernels._arguments import (
    check_float,
    check_place,
    check_scalar,
    check_tensor,
    group_name,
    number,
    poisoned,
)
from entropy_kernels._selection_request import boolean_of, broadcast, check_token_index
from entropy_kernels._sequences import packed_sequences, per_token_or_sequence
from entropy_kernels.selection import TokenMoments

#: What may be asked of a batch by name.
FIELDS = (
    "logprob", "old_logprob", "advantages", "entropy", "old_entropy", "collision", "vocab_covariance", "coefficient",
    "temperature",
)  # fmt: skip


class TokenBatch:
    """A batch of tokens, or one of its micro-batches, with what is known of each token: what control is decided from.

    All is constant: tensors are detached, kept by reference, and left unchanged until the control is there. They are
    attributes of the arguments' names (but ``cu_seqlens``): masks as bool, what is one per sequence in ``logprob``'s
    shape.

    Args:
        logprob: (..., L), often (B, L): log-probs of the sampled tokens in nats under the policy that is trained (or
            the old ones, for a control that is planned before the update), any floating-point dtype.
        old_logprob: of the policy that sampled them, nats, ``logprob``'s shape, any floating-point dtype, as of the
            next ones. None: the same, every ratio is 1.
        advantages: ``logprob``'s shape, or (B,) or (B, 1) for one per sequence; floating point or integers, raw.
        mask: ``logprob``'s shape, bool, int or float 0/1, 1 = counts; None: all tokens count. What stands in padding,
            NaN included, reaches nothing.
        entropy: H of each token's distribution in nats, as from :func:`entropy_kernels.token_stats`; floating point,
            ``logprob``'s shape.
        old_entropy: of the policy that sampled the tokens, nats; floating point, ``logprob``'s shape.
        collision: Σp², as from :func:`entropy_kernels.token_stats`; floating point, ``logprob``'s shape.
        vocab_covariance: C = Cov_{a~π}(log π(a), 1[a=y] - π(a)), nats, as from :func:`entropy_kernels.token_stats`;
            floating point, ``logprob``'s shape.
        coefficient: the loss's weight of each token; floating point or integers, ``logprob``'s shape or one per
            sequence; None: 1/N, N the number of tokens that count over the whole batch ("token-mean").
        temperature: of the softmax, as it was given to the statistics; a number or a tensor that broadcasts.
        cu_seqlens: (S + 1,) int32 or int64, for packed rows: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
            of the flattened batch; then advantages may be (S,).
        token_index: int64, ``logprob``'s shape, distinct over the batch: makes a draw, and who wins a tie, independent
            of padding and order; :func:`entropy_kernels.random_tokens`.
        exclude: shape and dtype as of ``mask``; True = counts in means and shares, but is left as it is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Source:
        docs/control.md.
    """

    def __init__(
        self,
        logprob: Tensor,
        old_logprob: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        *,
        entropy: Tensor | None = None,
        old_entropy: Tensor | None = None,
        collision: Tensor | None = None,
        vocab_covariance: Tensor | None = None,
        coefficient: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        cu_seqlens: Tensor | None = None,
        token_index: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> None:
        check_float("logprob", logprob)
        sequences = packed_sequences(cu_seqlens, logprob)
        self.mask, wrong = boolean_of("mask", mask, "logprob", logprob)
        self.exclude, strange = boolean_of("exclude", exclude, "logprob", logprob)
        self.logprob = poisoned(logprob.detach(), wrong, strange)
        self.advantages = per_token_or_sequence("advantages", advantages, logprob, sequences)
        if coefficient is not None:
            coefficient = per_token_or_sequence("coefficient", coefficient, logprob, sequences)
        self.coefficient = coefficient
        self.token_index = check_token_index(token_index, "logprob", logprob)
        self.temperature = _temperature(temperature, logprob)
        self.old_logprob = _like("old_logprob", old_logprob, logprob)
        self.entropy = _like("entropy", entropy, logprob)
        self.old_entropy = _like("old_entropy", old_entropy, logprob)
        self.collision = _like("collision", collision, logprob)
        self.vocab_covariance = _like("vocab_covariance", vocab_covariance, logprob)


def _like(name: str, value: Any, logprob: Tensor) -> Tensor | None:
    if value is None:
        return None
    check_float(name, value)
    check_place(name, value, "logprob", logprob)
    return value.detach()


def _temperature(value: Any, logprob: Tensor) -> float | Tensor:
    """A number, or a tensor of ``logprob``'s shape."""
    if not isinstance(value, Tensor):
        value = number("temperature", value)
        if not value > 0:
            raise ValueError(f"temperature: expected > 0, got {value}")
        return value
    check_tensor("temperature", value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"temperature: expected a floating-point dtype, got {value.dtype}")
    if value.dim() == 0:
        check_scalar("temperature", value, logprob.device)
        return value.detach().to(logprob.device, non_blocking=True).expand(logprob.shape)
    return broadcast("temperature", value.detach(), "logprob", logprob)


class WholeBatch:
    """The whole batch as a method sees it: (N,) tensors of this rank's tokens, and figures over those of all ranks.

    ``batch["entropy"]`` is a field of :class:`TokenBatch`, (N,) float64, 0 where masked. Beside the fields there are
    "ratio" (π/π_old, 1 without old log-probs), "covariance" (:func:`entropy_kernels.token_covariance`),
    "self_information" (S = p·(log p + H), whose mean over π is 0) and "coefficient" (1/N where none is given).
    A method gets one, and never makes one; ``len(batch)`` is the number of micro-batches.

    Args:
        batches: the micro-batches of this rank, a :class:`TokenBatch` each.
        group: torch.distributed process group over the ranks that share the batch, or None.
        backend: "auto", "torch", "triton", "cpu" or "cuda", of the selection.

    Attributes:
        mask: (N,) bool, which tokens count.
        free: (N,) bool, which of them may be treated.
        shared: whether there is a group of ranks.
        device: of the tensors.
        decrease: what :func:`entropy_kernels.control` has computed for these options, so that it is computed once.

    Raises:
        TypeError: a group that is none.

    Source:
        docs/control.md.
    """

    def __init__(self, batches: Sequence[TokenBatch], group: Any, backend: str) -> None:
        group_name(group)
        self._batches, self._group, self._backend = batches, group, backend
        self.device = batches[0].logprob.device if batches else _device(group)
        self.shared = group is not None
        self._known: dict[str, Tensor] = {}
        self.decrease: tuple[Any, Tensor] | None = None  # with the options it was computed under
        self._mask, self._exclude = self._flat("mask", True), self._flat("exclude", False)
        count = sum(batch.logprob.numel() for batch in batches)
        self.mask = torch.ones(count, dtype=torch.bool, device=self.device) if self._mask is None else self._mask
        self.free = self.mask if self._exclude is None else self.mask & ~self._exclude

    def has(self, name: str) -> bool:
        """Whether all micro-batches have a field; a rank without any has everything.

        Args:
            name: of the field.

        Returns:
            A bool.

        Raises:
            AttributeError: no such field.
        """
        return all(getattr(batch, name) is not None for batch in self._batches)

    def expect(self, name: str) -> None:
        """Refuse a batch without a field that is needed.

        Args:
            name: of the field.

        Raises:
            ValueError: a micro-batch without it.
            KeyError: no such field.
        """
        if name not in FIELDS:
            known = ", ".join(dict.fromkeys((*FIELDS, *_MADE)))
            raise KeyError(f"{name}: expected one of {known}, got {name}")
        if not self.has(name):
            raise ValueError(f"{name}: expected a tensor in the TokenBatch, which this method needs, got None")

    def agree(self, in_common: dict[str, Any]) -> None:
        """Compare what all ranks must have alike.

        Args:
            in_common: name -> value.

        Raises:
            ValueError: on all ranks, where one has another value (on a GPU only with ENTROPY_KERNELS_DEBUG=1).
        """
        if self.shared:
            agreement.expect(in_common, self._group, self.device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            make = _MADE.get(name)
            self._known[name] = self._field(name) if make is None else make(self)
        return self._known[name]

    def _field(self, name: str) -> Tensor:
        """In float64, 0 where masked: what stands in padding reaches nothing."""
        return torch.where(self.mask, self._raw(name).double(), 0.0)

    def _raw(self, name: str) -> Tensor:
        self.expect(name)
        found = self._flat(name)
        return torch.zeros(0, device=self.device) if found is None else found

    def _flat(self, name: str, default: bool | Tensor | None = None) -> Any:
        """(N,) of all micro-batches; None where none of them has it, ``default`` where only some have."""
        parts = [getattr(batch, name) for batch in self._batches]
        if all(part is None for part in parts):
            return None
        filled = []
        for part, batch in zip(parts, self._batches, strict=True):
            value: Any = default if part is None else part
            if not isinstance(value, Tensor):
                dtype = torch.bool if part is None else torch.float64
                value = torch.full_like(batch.logprob, value, dtype=dtype)
            filled.append(value.expand(batch.logprob.shape).reshape(-1))
        return filled[0] if len(filled) == 1 else torch.cat(filled)

    def _each(self, function: Callable[..., Tensor], *flat: Sequence[Tensor]) -> Tensor:
        """(N,) of ``function(micro-batch, ...)``."""
        parts = [function(*given).reshape(-1) for given in zip(self._batches, *flat, strict=True)]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self._batches)

    def advantages(self, flat: Tensor) -> list[Tensor]:
        """:meth:`split`, in the dtype in which the micro-batches came with theirs, at least fp32: shifts are small.

        Args:
            flat: as in :meth:`split`.

        Returns:
            One tensor per micro-batch, of its shape, fp32 or fp64, in the unit of ``flat``.

        Raises:
            RuntimeError: as in :meth:`split`.
        """
        pairs = zip(self.split(flat), self._batches, strict=True)
        return [x.to(torch.promote_types(batch.advantages.dtype, torch.float32)) for x, batch in pairs]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Back to micro-batches.

        Args:
            flat: (N,) of any dtype.

        Returns:
            One tensor per micro-batch, of its shape, in the dtype and unit of ``flat``.

        Raises:
            RuntimeError: another number of tokens.
        """
        shapes = [batch.logprob.shape for batch in self._batches]
        parts = flat.split([shape.numel() for shape in shapes]) if shapes else ()
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    # ---- over all ranks: the same bits for any split of the batch and on any device, without a value read back -------

    def moments(self, values: Tensor, *, std: bool = False) -> TokenMoments:
        """:func:`entropy_kernels.token_moments` over the tokens that count, of all ranks.

        Args:
            values: (N,) floating point.
            std: as in :func:`entropy_kernels.token_moments`.

        Returns:
            :class:`entropy_kernels.TokenMoments`.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.token_moments`.
        """
        return selection.token_moments(values, self._mask, std=std, batch_group=self._group)

    def totals(self, *values: Tensor) -> Sequence[Tensor]:
        """Sums over the tokens that count, of all ranks, in one reduction.

        Args:
            values: each (N,) float64.

        Returns:
            As many 0-d float64 tensors, in the unit of the values.

        Raises:
            RuntimeError: torch's own, of shapes that differ.
        """
        return selection.totals_of(torch.stack(values), self._mask, group_name(self._group))

    def top(self, score: Tensor, *, exclude: Tensor | None = None, **count: Any) -> Tensor:
        """:func:`entropy_kernels.top_tokens` among the tokens that neither the batch nor ``exclude`` excludes.

        Args:
            score: (N,) floating point, compared in fp32.
            exclude: (N,) bool, or None.
            count: ratio or k, and at_least_one, as :func:`entropy_kernels.top_tokens` takes them.

        Returns:
            (N,) bool.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.top_tokens`.
        """
        return selection.top_tokens(score, **self.candidates(exclude), backend=self._backend, **count)

    def random(self, score: Tensor, *, exclude: Tensor | None = None, **options: Any) -> Tensor:
        """:func:`entropy_kernels.random_tokens`, the same.

        Args:
            options: seed, ratio or k, low, high and so on, as :func:`entropy_kernels.random_tokens` takes them.
            others: as in :meth:`top`.

        Returns:
            (N,) bool.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.random_tokens`.
        """
        return selection.random_tokens(score, **self.candidates(exclude), backend=self._backend, **options)

    def budget(self, score: Tensor, *, exclude: Tensor | None = None, **bound: Any) -> Tensor:
        """:func:`entropy_kernels.budget_tokens`, the same.

        Args:
            bound: budget, limit or share, as :func:`entropy_kernels.budget_tokens` takes them.
            others: as in :meth:`top`.

        Returns:
            (N,) bool.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.budget_tokens`.
        """
        return selection.budget_tokens(score, **self.candidates(exclude), backend=self._backend, **bound)

    def candidates(self, exclude: Tensor | None = None) -> dict[str, Any]:
        """What the functions of a selection are told of the tokens. Raises nothing.

        Args:
            exclude: (N,) bool, or None.

        Returns:
            Their arguments mask, exclude, token_index and batch_group.
        """
        excluded = self._exclude if exclude is None or self._exclude is None else self._exclude | exclude
        return {
            "mask": self._mask, "exclude": exclude if self._exclude is None else excluded,
            "token_index": self._index(), "batch_group": self._group,
        }  # fmt: skip

    def _index(self) -> Tensor | None:
        """(N,) token index; None for the position, which over ranks is made here.

        A rank without any micro-batch cannot know which of the two the others have, and takes part in both.
        """
        index = self._flat("token_index")
        if not self.shared:
            return index
        ranks, rank = self._group.size(), self._group.rank()
        counts = torch.zeros(ranks, 1, dtype=torch.float64, device=self.device)
        counts[rank] = len(self.mask)
        counts = torch.stack(list(selection.totals_of(counts, None, group_name(self._group))))
        if index is not None:
            return index
        return torch.arange(len(self.mask), device=self.device) + counts[:rank].sum().long()

    def clipped(self, clip_low: Any, clip_high: Any, dual_clip: Any = None, advantages: Tensor | None = None) -> Tensor:
        """Where PPO's clip stops the token's gradient, in the losses' own arithmetic. Raises nothing.

        Args:
            clip_low, clip_high: a number, a 0-d tensor, or None: no clip on that side.
            dual_clip: a number > 1, a 0-d tensor, or None: no dual clip.
            advantages: (N,) floating point, in the place of the batch's; None: the batch's.

        Returns:
            (N,) bool.
        """

        def stopped(batch: TokenBatch, advantages: Tensor) -> Tensor:
            dtype = torch.float64 if batch.logprob.dtype == torch.float64 else torch.float32
            gain, ratio = -advantages.to(dtype), _log_ratio(batch, dtype).exp()
            clamped = ratio if clip_low is None else ratio.clamp(min=1 - clip_low)
            clamped = clamped if clip_high is None else clamped.clamp(max=1 + clip_high)
            stops = gain * clamped > gain * ratio
            return stops if dual_clip is None else stops | ((gain > 0) & (ratio > dual_clip))

        own = [batch.advantages for batch in self._batches] if advantages is None else self.advantages(advantages)
        return self._each(stopped, own).bool() & self.mask


def _device(group: Any) -> torch.device:
    return torch.device("cpu") if group is None else _torch.default_device(group)


def _log_ratio(batch: TokenBatch, dtype: torch.dtype = torch.float64) -> Tensor:
    logprob = batch.logprob.to(dtype)
    return torch.zeros_like(logprob) if batch.old_logprob is None else logprob - batch.old_logprob.to(dtype)


def _ratio(batch: WholeBatch) -> Tensor:
    return torch.where(batch.mask, batch._each(_log_ratio).double().exp(), 0.0)


def _self_information(batch: WholeBatch) -> Tensor:
    logprob = batch["logprob"]
    return torch.where(logprob.isneginf(), 0.0, logprob.exp() * (logprob + batch["entropy"])) * batch.mask


def _covariance(batch: WholeBatch) -> Tensor:
    logprob, advantages = batch._raw("logprob"), batch._raw("advantages")
    return selection.token_covariance(
        logprob, advantages, batch._mask, batch_group=batch._group, backend=batch._backend
    )


def _coefficient(batch: WholeBatch) -> Tensor:
    # the tokens are counted also where all have one: a rank without micro-batches cannot know that
    default = 1 / batch.moments(batch["logprob"]).tokens.clamp(min=1)
    found = batch._flat("coefficient", default)
    return torch.where(batch.mask, default if found is None else found.double(), 0.0)


_MADE: dict[str, Callable[[WholeBatch], Tensor]] = {
    "ratio": _ratio, "self_information": _self_information, "covariance": _covariance, "coefficient": _coefficient,
}  # fmt: skip
