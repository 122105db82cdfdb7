"""Log-prob, entropy and losses from hidden states and a head: ours, what is written by hand, and the products alone.

:mod:`benchmarks.linear_peers` has the packages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.registry import (
    BAND,
    CLIP_COV_RATIO,
    LINEAR_LOSSES,
    SEED,
    Implementation,
    Prepared,
    always,
    fits,
    register,
)
from benchmarks.shapes import Case, Inputs

Function = Callable[..., Any]
Load = Callable[[Case], Function]
Supports = Callable[[Case], str | None]
BOTH = "linear_logprob_entropy_fwdbwd"
ENOUGH = 1 << 50  # bytes: the logits are kept
# Made again in tiles: less than the bf16 logits take where the bars are stated; a GPU's tiles want more
TIGHT = {"cpu": 64 << 20, "cuda": 10**9}
MANY = 4  # tiles along the tokens and along the vocabulary, at least, where the errors of their sums are looked at
POLICY = ("hidden", "weight", "target", "old_logprob", "advantages", "mask")

# --- calls ------------------------------------------------------------------------------------------------------------


def forward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """What ``function(hidden, weight, target)`` returns, without a gradient."""
    function = load(case)
    arguments = (inputs["hidden"], inputs["weight"], inputs["target"])

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*arguments)

    return Prepared(call)


def _leaves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["hidden"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_()


def forward_backward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """(log-prob, entropy if there is one, gradient of hidden, gradient of weight)."""
    function = load(case)

    def call() -> Sequence[Tensor]:
        leaves = _leaves(inputs)
        outputs = function(*leaves, inputs["target"])
        if outputs[0].ndim == 0:  # a mean: its loss is minus it
            return outputs[0].detach(), *torch.autograd.grad(-outputs[0], leaves)
        upstream = [inputs[name].to(output.dtype) for name, output in zip(_UPSTREAM, outputs, strict=False)]
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return *(output.detach() for output in outputs), *gradients

    return Prepared(call)


_UPSTREAM = ("grad_logprob", "grad_entropy")
PASSES = {"linear_logprob_entropy": forward, BOTH: forward_backward}


def policy(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """(loss, gradient of hidden, gradient of weight) of a ``function`` of the inputs in :data:`POLICY`."""
    function = load(case)

    def call() -> Sequence[Tensor]:
        leaves = _leaves(inputs)
        loss = function(*leaves, *(inputs[name] for name in POLICY[2:]))
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return Prepared(call)


# --- ours -------------------------------------------------------------------------------------------------------------

Budget = Callable[..., int]  # of hidden, weight and the options of the call


def _kept(hidden: Tensor, weight: Tensor, **options: Any) -> int:
    return ENOUGH


def _tight(hidden: Tensor, weight: Tensor, **options: Any) -> int:
    return TIGHT[hidden.device.type]


def tiled(hidden: Tensor, weight: Tensor, **options: Any) -> int:
    """The largest budget, to a few percent, at which tiles are made again and tokens and vocabulary are cut into many.

    The least one if none does.
    """
    budget = ek.linear_plan(hidden, weight, memory_budget=ENOUGH, **options).peak_bytes
    try:
        while True:
            plan = ek.linear_plan(hidden, weight, memory_budget=budget, **options)
            if plan.mode == "recompute" and min(plan.row_chunks, plan.vocab_chunks) >= MANY:
                return budget
            least, budget = budget, int(0.97 * budget)
    except ValueError:  # below the smallest tile
        return least


def result_bytes(op: str, case: Case) -> int:
    """Of log-prob and entropy in fp32, or of a loss, and of the gradients where there are some."""
    shape: Any = case.shape
    gradients = (shape.rows + shape.vocab) * shape.features * case.dtype.itemsize
    return (4 if op in LINEAR_LOSSES else 8 * shape.rows) + (0 if op == "linear_logprob_entropy" else gradients)


def _ours(op: str, budget: Budget, options: dict[str, Any], case: Case, inputs: Inputs) -> Prepared:
    with torch.set_grad_enabled(op == BOTH):
        leaves = _leaves(inputs)
        options = {**options, "memory_budget": budget(*leaves, **options)}
        plan = ek.linear_plan(*leaves, **options)
    function = functools.partial(ek.linear_logprob_entropy, **options)
    prepared = PASSES[op](lambda _: function, case, inputs)
    return replace(prepared, stated_bytes=plan.peak_bytes + result_bytes(op, case))


def composed(hidden: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
    """Logits, then our statistics of them, with the gradient written over them."""
    return ek.logprob_entropy(hidden @ weight.t(), target, inplace_backward=True)


def _composed_loss(op: str, hidden: Tensor, weight: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
    """Our log-prob, then our loss: five operations of the library's in a row."""
    logprob = ek.linear_logprob_entropy(hidden, weight, target, memory_budget=ENOUGH).logprob
    if op == "linear_policy_loss":
        return ek.policy_loss(logprob, *rest).loss
    return ek.clip_cov_loss(logprob, *rest, seed=SEED, ratio=CLIP_COV_RATIO).loss


def _ours_loss(op: str, budget: Budget, case: Case, inputs: Inputs) -> Prepared:
    options: dict[str, Any] = {"method": "ppo"}
    if op == "linear_clip_cov_loss":
        options = {"method": "clip_cov", "seed": SEED, "ratio": CLIP_COV_RATIO}
    leaves = _leaves(inputs)
    options["memory_budget"] = budget(*leaves)
    plan = ek.linear_plan(*leaves, memory_budget=options["memory_budget"], policy_loss=True)

    def fused(*arguments: Tensor) -> Tensor:
        return ek.linear_policy_loss(*arguments, **options).loss

    return replace(policy(lambda _: fused, case, inputs), stated_bytes=plan.peak_bytes + result_bytes(op, case))


# --- plain torch, as it is written by hand ----------------------------------------------------------------------------


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, then log_softmax, gather, -Σ p log p, in the dtype of the logits."""
    logp = torch.log_softmax(hidden @ weight.t(), -1)  # (N, V)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def eager_upcast(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same from ``logits.float()``, as trainers that mind precision write it."""
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)  # (N, V)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def eager_loss(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> Tensor:
    """PPO's clipped loss of the log-probs of :func:`eager`; for Clip-Cov without a random n of the band's tokens."""
    logprob = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, target[:, None])[:, 0].float()
    ratio = (logprob - old_logprob).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    tokens, count = torch.maximum(plain, clipped), mask.sum()
    if op == "linear_clip_cov_loss":
        centred = logprob.detach() - logprob.detach()[mask].mean()
        covariance = centred * (advantages - advantages[mask].mean())
        band = mask & (clipped <= plain) & (covariance > BAND[0]) & (covariance < BAND[1])
        candidates = band.nonzero().squeeze(-1)
        drawn = torch.randperm(candidates.numel(), device=mask.device)[: max(1, int(CLIP_COV_RATIO * count))]
        tokens = tokens.index_fill(0, candidates[drawn], 0.0)
    return (tokens * mask).sum() / count


def ours_by(backend: str, case: Case) -> Function:
    return functools.partial(ek.linear_logprob_entropy, backend=backend)


def _plain(function: Function, case: Case) -> Function:
    return function


def _compiled(function: Function, case: Case) -> Function:
    def copy(hidden: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
        return function(hidden, weight, target)

    return torch.compile(copy, dynamic=False)


# --- limits -----------------------------------------------------------------------------------------------------------


def _products(count: int, case: Case, inputs: Inputs) -> Prepared:
    """The products of the forward pass (1), of both (3), of both with the logits made again (4); results ready."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    logits = hidden @ weight.t()  # (N, V)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> Tensor:
        torch.mm(hidden, weight.t(), out=logits)
        if count == 4:
            torch.mm(hidden, weight.t(), out=logits)
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)
        return logits

    return Prepared(call)


def _one_product(case: Case, inputs: Inputs) -> Prepared:
    """The gradient by the logits in fp32, rounded, then one product for each: what many tiles are judged by."""
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"][:, None]
    into_logprob, into_entropy = (inputs[name][:, None] for name in _UPSTREAM)

    def call() -> Sequence[Tensor]:
        logp = torch.log_softmax(hidden.float() @ weight.float().t(), -1)  # (N, V)
        p, logprob = logp.exp(), logp.gather(-1, target)
        entropy = -(p * logp).sum(-1, keepdim=True)
        by_logits = logp.add_(entropy).mul_(into_entropy).add_(into_logprob).mul_(p).neg_()
        by_logits = by_logits.scatter_add_(-1, target, into_logprob).to(case.dtype)
        return logprob[:, 0], entropy[:, 0], by_logits @ weight, by_logits.t() @ hidden

    return Prepared(call)


# --- what there is ----------------------------------------------------------------------------------------------------


def _only_half(case: Case) -> str | None:
    return None if case.dtype.itemsize == 2 else "the same as without it for this dtype"


def _not_fp64(case: Case) -> str | None:
    return "its logits would be rounded" if case.dtype == torch.float64 else None


def _only_cuda(case: Case) -> str | None:
    return None if case.device.type == "cuda" else "judged on a GPU only"


def room(copies: float, *others: Supports) -> Supports:
    """The first reason of ``others``, or that so many fp32 tensors of the size of the logits do not fit."""
    limits: tuple[Supports, ...] = (*others, functools.partial(fits, copies=copies))
    return lambda case: next((reason for limit in limits if (reason := limit(case)) is not None), None)


def _register_ours(op: str) -> None:
    rows: tuple[tuple[str, Budget, dict[str, Any], Supports], ...] = (
        ("ours", _kept, {}, always),
        ("ours-fp32-logits", _kept, {"logits_dtype": torch.float32}, _only_half),
        ("ours-recompute", _tight, {}, always),
        ("ours-tiles", tiled, {"logits_dtype": torch.float32}, _not_fp64),
    )
    for name, budget, options, supports in rows:
        if op == BOTH or budget is _kept:  # the others are the same call without a gradient
            copies = 2.0 if budget is _kept else 0.1
            make = functools.partial(_ours, op, budget, options)
            register(Implementation(op, name, "ours", make, room(copies, supports)))
    make = functools.partial(PASSES[op], functools.partial(_plain, composed))
    register(Implementation(op, "ours-on-logits", "ours", make, room(1.0)))


def _register_torch(op: str) -> None:
    copies = 6.0 if op == BOTH else 3.0
    rows: tuple[tuple[str, Load, Supports], ...] = (
        ("eager", functools.partial(_plain, eager), room(copies)),
        ("eager-fp32", functools.partial(_plain, eager_upcast), room(copies + 1, _only_half)),
        ("compile", functools.partial(_compiled, eager), room(copies)),
    )
    for name, load, supports in rows:
        register(Implementation(op, name, "peer", functools.partial(PASSES[op], load), supports))


def register_all() -> None:
    """Add the ops' implementations that need no package."""
    for op in PASSES:
        _register_ours(op)
        _register_torch(op)
    for op in LINEAR_LOSSES:
        for name, budget, supports in (("ours", _kept, room(1.0)), ("ours-parts", _tight, room(0.1))):
            register(Implementation(op, name, "ours", functools.partial(_ours_loss, op, budget), supports))
        rows: tuple[tuple[str, str, Function, Supports], ...] = (
            ("ours-composed", "ours", _composed_loss, room(1.0)),
            ("eager", "peer", eager_loss, room(4.0)),
        )
        for name, role, function, supports in rows:
            load = functools.partial(_plain, functools.partial(function, op))
            register(Implementation(op, name, role, functools.partial(policy, load), supports))
    register(Implementation(BOTH, "one-product", "limit", _one_product, room(4.0, _only_half)))
    for count, name, wanted in (
        (1, "product", always),
        (3, "three products", always),
        (4, "four products", _only_cuda),
    ):
        register(Implementation("linear_floor", name, "limit", functools.partial(_products, count), wanted))
