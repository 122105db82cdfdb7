"""Functions of one form each, wrapped into the calls that the suite times: forward, backward, both, losses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Prepared
from benchmarks.shapes import Case, Inputs

Forward = Callable[[Tensor, Tensor], Sequence[Tensor]]
Load = Callable[[Case], Callable[..., Any]]
# The upstream gradients of a forward's outputs, in their order; an output that nothing flows into is not listed.
UPSTREAM = ("grad_logprob", "grad_entropy")


def forward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The outputs of ``function(logits, target)`` without a gradient."""
    function, logits, target = load(case), inputs["logits"], inputs["target"]

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return function(logits, target)

    return Prepared(call)


def _upstream(outputs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    return [inputs[name].to(output.dtype) for name, output in zip(UPSTREAM, outputs, strict=False)]


def forward_backward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The outputs (log-prob, and entropy if there is one) and the gradient, as a new tensor."""
    function, logits, target = load(case), inputs["logits"], inputs["target"]
    upstream: list[Tensor] = []

    def call() -> Sequence[Tensor]:
        leaf = logits.detach().requires_grad_()
        outputs = function(leaf, target)
        if not upstream:  # casts of the upstream gradients are the loss's work: the first, checked call pays for them
            upstream.extend(_upstream(outputs, inputs))
        (gradient,) = torch.autograd.grad(outputs, [leaf], upstream)
        return *(output.detach() for output in outputs), gradient

    return Prepared(call)


def backward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The gradient alone: the graph is made once, outside the clock, and retained."""
    import torch._functorch.config  # by itself it is loaded with the compiler only

    function, target = load(case), inputs["target"]
    leaf = inputs["logits"].detach().requires_grad_()
    # a compiled backward pass frees what its forward saved unless told that it will be asked again
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = function(leaf, target)
    upstream = _upstream(outputs, inputs)

    def call() -> tuple[Tensor]:
        (gradient,) = torch.autograd.grad(outputs, [leaf], upstream, retain_graph=True)
        return (gradient,)

    return Prepared(call)


def on_a_copy(make: Callable[[Case, Inputs], Prepared], case: Case, inputs: Inputs) -> Prepared:
    """For a call that writes over its logits: it works on a copy that is refilled, untimed, before every call."""
    copy = inputs["logits"].clone()
    prepared = make(case, {**inputs, "logits": copy})

    def reset() -> None:
        copy.copy_(inputs["logits"])

    return Prepared(prepared.call, reset)


def tokens(load: Load, arguments: tuple[str, ...], case: Case, inputs: Inputs) -> Prepared:
    """A function of some of the inputs of a batch of tokens."""
    function, tensors = load(case), [inputs[argument] for argument in arguments]
    return Prepared(lambda: function(*tensors))


def loss(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """``function(logprob, old_logprob, advantages, mask) -> (loss, metrics)`` with its backward pass."""
    function = load(case)
    rest = (inputs["old_logprob"], inputs["advantages"], inputs["mask"])

    def call() -> tuple[Tensor, Tensor]:
        leaf = inputs["logprob"].detach().requires_grad_()
        value, _ = function(leaf, *rest)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    return Prepared(call)


# passes over the logits: op -> how a forward function becomes its call
PASSES: dict[str, Callable[[Load, Case, Inputs], Prepared]] = {
    "logprob_entropy": forward,
    "logprob_entropy_bwd": backward,
    "logprob_entropy_fwdbwd": forward_backward,
}


def of_pass(op: str, load: Load) -> Callable[[Case, Inputs], Prepared]:
    """The factory of an op in :data:`PASSES` for a forward function."""
    return functools.partial(PASSES[op], load)
