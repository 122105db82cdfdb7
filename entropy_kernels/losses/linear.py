"""The policy losses from hidden states: gradients in the forward pass, three products (docs/linear.md)."""

from __future__ import annotations

import ast
import inspect
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._arguments import integer, process_group_of, scalar_tensor
from entropy_kernels.linear import changes_of, linear_loss, register_loss
from entropy_kernels.losses import functional, presets
from entropy_kernels.losses.aggregation import Aggregation
from entropy_kernels.losses.tokens import check_mask
from entropy_kernels.losses.tokens import _check_tensor as check_tensor
from entropy_kernels.losses.metrics import METRICS
from entropy_kernels.losses.functional import PolicyLoss
from entropy_kernels.selection import expand_advantages, seed_tensor

LOSSES: dict[str, Callable[..., PolicyLoss]] = {  # by `method`
    "ppo": functional.policy_loss,
    "clip_cov": functional.clip_cov_loss,
    "kl_cov": functional.kl_cov_loss,
}
_GIVEN = {"clip_cov": "dropped", "kl_cov": "penalized"}
_PER_TOKEN = ("ref_logprob", "dropped", "penalized")
# How a loss is summed up; the coefficient of one token needs none of it
_AGGREGATION: dict[str, Any] = {
    "loss_agg_mode": "token-mean", "dp_size": 1, "batch_num_tokens": None, "global_batch_size": None,
    "loss_scale_factor": None, "batch_group": None,
}  # fmt: skip
_OF_THE_TERM = (
    "clip_low", "clip_high", "dual_clip", "entropy_coef", "ref_logprob", "ref_kl_coef", "kl_estimator", "backend",
)  # fmt: skip
_TENSORS = (
    "ref_logprob", "dropped", "penalized", "token_index", "seed", "kl_coef", "entropy_coef", "ref_kl_coef",
    "batch_num_tokens", "global_batch_size", "loss_scale_factor",
)  # fmt: skip
_COUNTS = ("batch_num_tokens", "global_batch_size")
_KEYWORDS = {
    method: [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("entropy", "backend")
    ]
    for method, loss in LOSSES.items()
}
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
    are corrected (docs/linear.md). The backward pass multiplies by the factor of the loss, once.

    Args:
        hidden, weight, target, bias, temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size,
            logits_dtype: as in :func:`entropy_kernels.linear_logprob_entropy`. A weight that is a module or a function
            is computed as above, with recomputation.
        old_logprob, advantages, mask: as in :func:`entropy_kernels.policy_loss`, in ``target``'s shape (..., L).
            ``target`` is not read where the mask is 0; None: the tokens that have a label count.
        method: "ppo", "clip_cov" or "kl_cov".
        memory_budget: bytes for the logits of a part of the tokens and what goes with them, by default as in
            :func:`entropy_kernels.linear_logprob_entropy`; with a ``vocab_group`` the least of its ranks counts.
            ``linear_plan(..., policy_loss=True)`` says what it comes to; the head's gradient, summed in fp32 where
            there are several parts, is beside it.
        grad_buffer: fp32 (fp64 for fp64) of ``weight``'s shape, to which the head's gradient is added in this call,
            unrounded, instead of going to ``weight.grad``: for sums over micro-batches. It is the gradient of this
            loss: differentiate the loss as it is, and scale it by ``batch_num_tokens`` and the like. Every call with
            gradients adds to it, also the second one that a checkpoint with ``use_reentrant=False`` may make.
        backend: "auto", "torch", "triton", "cpu" or "cuda", for statistics, selection and loss.
        options: keyword arguments of :func:`entropy_kernels.policy_loss`, of :func:`entropy_kernels.clip_cov_loss` or
            of :func:`entropy_kernels.kl_cov_loss`, as the method says; not ``entropy``, which is computed here, whose
            bonus is ``entropy_coef`` as there. Coefficients are constants. To select over several calls,
            :class:`entropy_kernels.SelectionBatch` and ``dropped=`` or ``penalized=``: the result then does not depend
            on how the batch is split.

    Returns:
        :class:`entropy_kernels.PolicyLoss`, as the losses; the metric ``entropy`` is always there. One backward pass.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: as the functions above, before anything is computed.
        RuntimeError: a second backward pass, double backward, or a factor on the loss beside a ``grad_buffer``.
    """
    _check_names(method, options)
    loss = LOSSES[method]
    head: dict[str, Any] = {
        "temperature": temperature, "softcap": softcap, "ignore_index": ignore_index, "vocab_group": vocab_group,
        "vocab_start": vocab_start, "vocab_size": vocab_size, "logits_dtype": logits_dtype,
        "memory_budget": memory_budget, "backend": backend,
    }  # fmt: skip
    options = {**options, "backend": backend}
    for name, value in (("hidden", hidden), ("target", target), ("old_logprob", old_logprob)):
        check_tensor(name, value)
    ignore_index = integer("ignore_index", ignore_index)
    if old_logprob.shape != target.shape:
        raise ValueError(f"old_logprob: expected target's shape {tuple(target.shape)}, got {tuple(old_logprob.shape)}")
    if not torch.compiler.is_compiling():
        with torch.no_grad():  # every error of the loss, before the work and before anything is added to a buffer
            stand_in = old_logprob.detach().to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
            loss(stand_in, old_logprob, advantages, mask, entropy=torch.zeros_like(stand_in), **options)
    valid = check_mask("mask", mask, old_logprob)
    if valid is None:
        valid = target != ignore_index
    target = torch.where(valid, target, ignore_index)

    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias))
    if not isinstance(weight, Tensor) or not torch.is_grad_enabled() or not differentiable:
        if grad_buffer is not None and not isinstance(weight, Tensor):
            raise ValueError("grad_buffer: expected None beside a weight that is a module or a function, got a tensor")
        if grad_buffer is not None and torch.is_grad_enabled():
            raise ValueError("grad_buffer: expected None for a weight that needs no gradient, got a tensor")
        logprob, entropy = ek.linear_logprob_entropy(hidden, weight, target, bias, **head)
        return loss(logprob, old_logprob, advantages, valid, entropy=entropy, **options)
    for name in _TENSORS:
        if isinstance(options.get(name), Tensor) and options[name].requires_grad and name != "ref_logprob":
            raise ValueError(f"{name}: expected a constant, got a tensor that requires grad")
    names = _metric_names(method, options)
    description, tensors = _described(method, options, old_logprob.device)
    tensors += [old_logprob.detach(), expand_advantages(advantages, old_logprob), valid]
    value, metrics = linear_loss(
        hidden, weight, target, bias, description, tensors, metrics=len(names),
        changes=_changes(method, options, old_logprob.numel()), grad_buffer=grad_buffer, **head,
    )  # fmt: skip
    return PolicyLoss(value, dict(zip(names, metrics.unbind(), strict=True)))


def _selects(method: str, options: dict[str, Any]) -> bool:
    """Whether the call selects tokens by itself."""
    return method in _GIVEN and options.get(_GIVEN[method]) is None


def _preset(method: str, options: dict[str, Any]) -> Any:
    known: Any = presets.CLIP_COV if method == "clip_cov" else presets.KL_COV
    return presets.find(known, options.get("preset", "verl"))


def _changes(method: str, options: dict[str, Any], tokens: int) -> int | None:
    """See ``Coefficients`` in ops/linear_policy_loss.py."""
    if not _selects(method, options):
        return 0
    if options.get("batch_group") is not None:
        return None
    ratio, k = options.get("ratio"), options.get("k")
    return changes_of(_preset(method, options).ratio if ratio is None else ratio, k, tokens)


def _metric_names(method: str, options: dict[str, Any]) -> list[str]:
    """Of the loss's metrics, in their order."""
    absent = set()
    if method == "ppo":
        absent.add("selected_frac")
    if method != "clip_cov" or not _selects(method, options):
        absent.add("band_frac")
    if options.get("ref_logprob") is None:
        absent.add("ref_kl")
    return [name for name in METRICS if name not in absent]


def _described(method: str, options: dict[str, Any], device: torch.device) -> tuple[str, list[Tensor | None]]:
    """The loss in a string, and what of it are tensors, in the order of _TENSORS: an operator takes nothing else.

    Compiled code has a string for good. What changes from call to call becomes a tensor there.
    """
    tensors: list[Tensor | None] = []
    words = [f"'method': {method!r}"]
    for name in _TENSORS:
        value = options.get(name)
        if name == "seed" and value is not None:
            value = seed_tensor(value, device)
        elif torch.compiler.is_compiling() and value is not None and not isinstance(value, Tensor) and value != 0:
            value = scalar_tensor(value, torch.int64 if name in _COUNTS else torch.float64, device)
        tensors.append(value if isinstance(value, Tensor) else None)
    for name, value in options.items():
        if name == "batch_group":
            value = None if value is None else value.group_name
        said = name in _TENSORS and tensors[_TENSORS.index(name)] is not None
        if said or (value is None and name not in ("clip_low", "clip_high")):  # there None has a meaning
            continue
        words.append(f"{name!r}: {_literal(value)}")
    return "{" + ", ".join(words) + "}", tensors


def _literal(value: Any) -> str:
    """What ``ast.literal_eval`` makes the Python number, string or None of that ``value`` is (numpy's among them)."""
    if isinstance(value, str):
        return repr(str(value))
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, (numbers.Integral, torch.SymInt)):
        return repr(int(value))
    return repr(float(value)).replace("inf", "1e999")  # inf is no literal


class _Batch:
    """What the op asks of a loss: coefficients of some tokens before the selection, of all after it."""

    def __init__(self, description: str, tensors: list[Tensor | None]) -> None:
        options = ast.literal_eval(description)
        method = options.pop("method")
        self._old, self._advantages, mask = tensors[-3:]
        options |= {name: value for name, value in zip(_TENSORS, tensors, strict=False) if value is not None}
        if "batch_group" in options:
            options["batch_group"] = process_group_of(options["batch_group"])
        self._loss, self._options, self._mask = LOSSES[method], options, mask
        self._names = _metric_names(method, options)
        assert self._old is not None and self._advantages is not None
        self.changes = _changes(method, options, self._old.numel())
        self._term, self._term_options = self._predictor(method)
        if mask is None:
            mask = torch.ones_like(self._old, dtype=torch.bool)
        aggregation = Aggregation(*(options.get(name, default) for name, default in _AGGREGATION.items()))
        self._weights = aggregation.weights(mask)
        self._size = torch.where(mask, self._advantages, 0).double().abs()
        self._huge = _HUGE * self._size.sum() / self._size.count_nonzero().clamp(min=1)
        self.result: tuple[Tensor, Tensor]

    @property
    def scale(self) -> Tensor:
        """See ops/linear_policy_loss.py."""
        if not self._weights.numel():
            return self._weights.new_ones(()).float()
        largest = (self._weights * self._size.nan_to_num(0, 0).clamp(min=1)).amax()
        return torch.exp2(-torch.log2(largest.clamp(2.0**-60, 2.0**60)).ceil()).float()

    def _predictor(self, method: str) -> tuple[Callable[..., PolicyLoss], dict[str, Any]]:
        """The loss that a token has if it is not selected; where nothing is selected, the loss itself."""
        if not _selects(method, self._options):
            return self._loss, {k: v for k, v in self._options.items() if k not in (*_AGGREGATION, "token_index")}
        options = {k: v for k, v in self._options.items() if k in _OF_THE_TERM}
        chosen = _preset(method, self._options)
        for name in ("clip_low", "clip_high"):
            options[name] = presets.clip_or(name, options.get(name, "preset"), getattr(chosen, name))
        return functional.policy_loss, options

    def predicted(self, rows: Any, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """See ops/linear_policy_loss.py."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(-1)[rows]

        options = {k: part(v) if k in _PER_TOKEN else v for k, v in self._term_options.items()}
        tokens = (part(x) for x in (self._old, self._advantages, self._mask))
        _, (c, e) = _differentiated(self._term, logprob, entropy, *tokens, loss_agg_mode="token-sum", **options)
        weights = self._weights.reshape(-1)[rows]
        e = None if e is None else (e * weights).to(e.dtype)
        return (c * weights).to(c.dtype), e, ~(c.abs() <= self._huge)

    def final(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ops/linear_policy_loss.py."""
        assert self._old is not None
        shape = self._old.shape
        result, (c, e) = _differentiated(
            self._loss, logprob.view(shape), entropy.view(shape), self._old, self._advantages, self._mask,
            **self._options,
        )  # fmt: skip
        assert list(result.metrics) == self._names
        self.result = result.loss.detach(), torch.stack(list(result.metrics.values()))
        return c.reshape(-1), None if e is None else e.reshape(-1)


register_loss(_Batch)


def _differentiated(
    loss: Callable[..., PolicyLoss], logprob: Tensor, entropy: Tensor, *tokens: Tensor | None, **options: Any
) -> tuple[PolicyLoss, tuple[Tensor, Tensor | None]]:
    """The loss, and its derivatives by log-prob and entropy; None for the latter's where it has no coefficient."""
    leaves = [x.detach().requires_grad_() for x in (logprob, entropy)]
    result = loss(leaves[0], *tokens, entropy=leaves[1], **options)
    c, e = torch.autograd.grad(result.loss, leaves, allow_unused=True)
    return result, (torch.zeros_like(logprob) if c is None else c, e)


def _check_names(method: Any, options: dict[str, Any]) -> None:
    if method not in LOSSES:
        raise ValueError(f"method: expected one of {', '.join(map(repr, LOSSES))}, got {method!r}")
    unknown = [name for name in options if name not in _KEYWORDS[method]]
    if unknown:
        why = " (entropy is computed here)" if "entropy" in unknown else ""
        raise TypeError(
            f"linear_policy_loss: expected with method={method!r} keyword arguments among "
            f"{', '.join(_KEYWORDS[method])}, got {', '.join(unknown)}{why}"
        )
