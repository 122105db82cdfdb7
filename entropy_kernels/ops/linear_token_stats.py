"""``entropy_kernels::linear_token_stats``: the statistics of softmax(hidden @ weightᵀ + bias), without all the logits.

Schema, fake and autograd of the operator. The functions in :mod:`entropy_kernels.linear` are its public face.
Beside statistics and state, as ``token_stats`` has them, it returns, where ``keep`` is true, the logits for the
backward pass, (N, V) with V padded to aligned rows, else an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import recorded, refuse_forward_mode, refuse_functional_grad
from entropy_kernels._rows import DIFFERENTIABLE, state_rows, wanted
from entropy_kernels._torch import below_autograd
from entropy_kernels.ops import linear_tiles
from entropy_kernels.ops.checks import (
    check_backward,
    check_head,
    check_tensors,
    check_want,
    once_differentiable,
    register,
)
from entropy_kernels.ops.linear_plan import padded
from entropy_kernels.ops.linear_tiles import Needs, Numbers
from entropy_kernels.ops.token_stats import ROW, check_values

_NAME = "linear_logprob_entropy / linear_token_stats"

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
NUMBERS = (  # of linear_tiles.Numbers
    f"{ROW}, ScalarType product_dtype, ScalarType logits_dtype, SymInt memory_budget, str group, str backend"
)
INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor temperature"
_library.define(
    f"linear_token_stats({INPUTS}, {NUMBERS}, int want, bool keep, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor stats, Tensor state, Tensor logits)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_BACKWARD_ARGUMENTS = (
    f"Tensor grad_stats, {INPUTS}, Tensor state, {{logits}}, {NUMBERS}, int want, bool need_hidden, bool need_weight, "
    "bool need_bias"
)
_library.define(
    f"linear_token_stats_backward({_BACKWARD_ARGUMENTS.format(logits='Tensor? logits')}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"linear_token_stats_backward_({_BACKWARD_ARGUMENTS.format(logits='Tensor(a!) logits')}) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_call(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, call: Numbers
) -> None:
    """The arguments that all ops from hidden states have."""
    check_head(hidden, weight, bias, target, temperature, call.product, call.logits, call.row)
    if call.budget < 0:
        raise ValueError(f"memory_budget: expected >= 0, got {call.budget}")


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, want, keep, need_hidden, need_weight, need_bias = rest
    call = Numbers.of(numbers)
    check_call(hidden, weight, bias, target, temperature, call)
    check_want(want)
    if not call.group:
        check_values(target, temperature, call.row)
    kept = None
    if keep:
        columns = call.row.columns(weight.shape[0])
        kept = linear_tiles.workspace(hidden.shape[0], columns, call.logits, hidden.device)
    needs = (need_hidden, need_weight, need_bias)
    with linear_tiles.without_autocast(hidden):
        stats, state = linear_tiles.forward(hidden, weight, bias, target, temperature, call, want, kept, needs)
    return (stats, state, hidden.new_empty(0, dtype=call.logits) if kept is None else kept)


def _check_backward(*arguments: Any) -> None:
    grad_stats, hidden, weight, bias, target, temperature, state, logits, *numbers, want = arguments[:-3]
    call = Numbers.of(numbers)
    check_call(hidden, weight, bias, target, temperature, call)
    check_backward(grad_stats, target, temperature, state, want)
    if logits is not None:
        columns = padded(call.row.columns(weight.shape[0]))
        check_tensors(hidden.device, ("logits", logits, call.logits, (hidden.shape[0], columns)))


def _run_backward(*arguments: Any, overwrite: bool) -> tuple[Tensor, ...]:
    _check_backward(*arguments)
    grad_stats, hidden, weight, bias, target, temperature, state, logits, *numbers, want = arguments[:-3]
    needs: Needs = arguments[-3:]
    with linear_tiles.without_autocast(hidden):
        return linear_tiles.backward(
            grad_stats, hidden, weight, bias, target, temperature, state, logits, overwrite, Numbers.of(numbers), want,
            needs,
        )  # fmt: skip


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _run_backward(*arguments, overwrite=False)


def _backward_(*arguments: Any) -> tuple[Tensor, ...]:
    return _run_backward(*arguments, overwrite=True)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, want, keep, _, _, _ = rest
    call = Numbers.of(numbers)
    check_call(hidden, weight, bias, target, temperature, call)
    check_want(want)
    columns, rows = padded(call.row.columns(weight.shape[0])), target.shape[0]
    kept = hidden.new_empty((rows, columns) if keep else (0,), dtype=call.logits)
    return temperature.new_empty((len(wanted(want)), rows)), temperature.new_empty((state_rows(want), rows)), kept


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_backward(*arguments)
    hidden, weight, bias = arguments[1:4]
    need_hidden, need_weight, need_bias = arguments[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


register(_library, "linear_token_stats", _forward, _fake)
register(_library, "linear_token_stats_backward", _backward, _fake_backward)
register(_library, "linear_token_stats_backward_", _backward_, _fake_backward)


class _LinearTokenStats(torch.autograd.Function):
    """Autograd of the op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, target, temperature, *numbers = inputs[:-5]
        want, keep = inputs[-5:-3]
        with below_autograd():
            stats, state, logits = linear_token_stats(*inputs)
        kept = logits if keep else None
        ctx.save_for_backward(*recorded(hidden, weight, bias, target, temperature, state, kept))
        ctx.numbers = (*numbers, want)
        ctx.overwritten = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([] if want & DIFFERENTIABLE else [stats]), state, logits)
        return stats, state, logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rest = (None,) * (len(ctx.numbers) + 6)
        if grad is None:
            return (None, None, None, *rest)
        needs = ctx.needs_input_grad[:3]
        *saved, logits = ctx.saved_tensors
        if ctx.overwritten:
            logits = None  # a second pass (retain_graph) makes them again
        # a compiler traces with tensors of its own types, and plans memory by itself
        inplace = type(logits) is Tensor and not torch.compiler.is_compiling()
        ctx.overwritten = ctx.overwritten or inplace
        ops = torch.ops.entropy_kernels
        run = ops.linear_token_stats_backward_ if inplace else ops.linear_token_stats_backward
        gradients = run.default(grad, *saved, logits, *ctx.numbers, *needs)
        return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *rest)


def _forward_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    tensors = [x for x in inputs[:3] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse_functional_grad(_NAME, *tensors)
        return _LinearTokenStats.apply(*inputs)
    for tensor in tensors:
        refuse_forward_mode(_NAME, tensor)
    with below_autograd():
        return linear_token_stats(*inputs)


_library.impl("linear_token_stats", _forward_autograd, "Autograd")
for _op in ("linear_token_stats_backward", "linear_token_stats_backward_"):
    once_differentiable(_library, _NAME, _op)

linear_token_stats = torch.ops.entropy_kernels.linear_token_stats.default
