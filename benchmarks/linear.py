"""Log-prob and entropy from hidden states and a head: ours, what is written by hand, and the products alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.registry import Implementation, Prepared, always, fits, register
from benchmarks.shapes import Case, Inputs

Function = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
Load = Callable[[Case], Function]
ENOUGH = 1 << 50  # bytes: the logits are kept
# Made again in tiles: less than the bf16 logits take where the bars are stated; a GPU's tiles want more
TIGHT = {"cpu": 64 << 20, "cuda": 1 << 30}


def forward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """(log-prob, entropy) without a gradient."""
    function = load(case)
    arguments = (inputs["hidden"], inputs["weight"], inputs["target"])

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*arguments)

    return Prepared(call)


def forward_backward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """(log-prob, entropy, gradient of hidden, gradient of weight)."""
    function = load(case)

    def call() -> Sequence[Tensor]:
        hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))
        outputs = function(hidden, weight, inputs["target"])
        upstream = [inputs[name].to(output.dtype) for name, output in zip(_UPSTREAM, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, (hidden, weight), upstream)
        return *(output.detach() for output in outputs), *gradients

    return Prepared(call)


_UPSTREAM = ("grad_logprob", "grad_entropy")
_PASSES = {"linear_logprob_entropy": forward, "linear_logprob_entropy_fwdbwd": forward_backward}


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, then log_softmax, gather, -Σ p log p, in the dtype of the logits."""
    logp = torch.log_softmax(hidden @ weight.t(), -1)  # (N, V)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def composed(hidden: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
    """Logits, then our statistics of them, with the gradient written over them."""
    return ek.logprob_entropy(hidden @ weight.t(), target, inplace_backward=True)


def _ours(budget: dict[str, int] | int, case: Case) -> Function:
    bytes_ = budget if isinstance(budget, int) else budget[case.device.type]

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
        return ek.linear_logprob_entropy(hidden, weight, target, memory_budget=bytes_)

    return function


def ours_by(backend: str, case: Case) -> Function:
    return functools.partial(ek.linear_logprob_entropy, backend=backend)


def _plain(function: Function, case: Case) -> Function:
    return function


def _compiled(function: Function, case: Case) -> Function:
    def copy(hidden: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
        return function(hidden, weight, target)

    return torch.compile(copy, dynamic=False)


def _products(count: int, case: Case, inputs: Inputs) -> Prepared:
    """The products of the forward pass (1) or of both (3), with results that stand ready."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    logits = hidden @ weight.t()  # (N, V)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> Any:
        torch.mm(hidden, weight.t(), out=logits)
        if count == 3:
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)
        return logits

    return Prepared(call)


def register_all() -> None:
    """Add the three ops' implementations."""
    for op, one in _PASSES.items():
        backward = op.endswith("_fwdbwd")
        for name, role, load, copies in (
            ("ours", "ours", functools.partial(_ours, ENOUGH), 1.0),
            ("ours-recompute", "ours", functools.partial(_ours, TIGHT), 0.1),
            ("ours-on-logits", "ours", functools.partial(_plain, composed), 1.0),
            ("eager", "peer", functools.partial(_plain, eager), 6.0 if backward else 3.0),
            ("compile", "peer", functools.partial(_compiled, eager), 6.0 if backward else 3.0),
        ):
            if name == "ours-recompute" and not backward:
                continue  # the same call without a gradient
            room: Callable[[Case], str | None] = functools.partial(fits, copies=copies)
            register(Implementation(op, name, role, functools.partial(one, load), room))
    for count, name in ((1, "product"), (3, "three products")):
        register(Implementation("linear_floor", name, "limit", functools.partial(_products, count), always))
