"""``entropy_kernels::linear_token_stats``: the statistics of softmax(hidden @ weightᵀ + bias), without all the logits.

Schema, fake and autograd of the operator. The functions in :mod:`entropy_kernels.linear` are its public face.
The last two outputs are no statistics: the softmax state (K, N) and, where ``keep`` is true, the logits for the
backward pass, (N, V) with V padded to aligned rows, else an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import recorded, refuse_forward_mode, refuse_functional_grad
from entropy_kernels._rows import COLLISION, ENTROPY, LOGPROB, VOCAB_COVARIANCE, state_rows
from entropy_kernels.ops import linear_tiles
from entropy_kernels.ops.checks import check_backward, check_head, check_tensors, check_want, register
from entropy_kernels.ops.linear_plan import columns_here, padded
from entropy_kernels.ops.linear_tiles import Grads, Needs, Numbers
from entropy_kernels.ops.token_stats import check_values

_STATE, _LOGITS = 4, 5  # indices among the outputs
_NAME = "linear_logprob_entropy / linear_token_stats"

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
NUMBERS = (  # of linear_tiles.Numbers
    "float softcap, int ignore_index, SymInt vocab_start, SymInt vocab_size, ScalarType product_dtype, "
    "ScalarType logits_dtype, SymInt memory_budget, str group, str backend"
)
INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor temperature"
_library.define(
    f"linear_token_stats({INPUTS}, {NUMBERS}, int want, bool keep, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_BACKWARD_ARGUMENTS = (
    f"Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_collision, {INPUTS}, Tensor state, {{logits}}, "
    f"{NUMBERS}, bool need_hidden, bool need_weight, bool need_bias"
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
    check_head(
        hidden, weight, bias, target, temperature, call.product, call.logits, call.softcap, call.vocab_start,
        call.vocab_size,
    )  # fmt: skip
    if call.budget < 0:
        raise ValueError(f"memory_budget: expected >= 0, got {call.budget}")


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, want, keep, need_hidden, need_weight, need_bias = rest
    call = Numbers(*numbers)
    check_call(hidden, weight, bias, target, temperature, call)
    check_want(want)
    if not call.group:
        check_values(target, temperature, call.ignore_index, call.vocab_size)
    kept = None
    if keep:
        columns = columns_here(weight.shape[0], call.vocab_start, call.vocab_size)
        kept = linear_tiles.workspace(hidden.shape[0], columns, call.logits, hidden.device)
    needs = (need_hidden, need_weight, need_bias)
    with linear_tiles.without_autocast(hidden):
        outputs, state = linear_tiles.forward(hidden, weight, bias, target, temperature, call, want, kept, needs)
    return (*outputs, state, hidden.new_empty(0, dtype=call.logits) if kept is None else kept)


def _check_backward(*arguments: Any) -> None:
    hidden, weight, bias, target, temperature, state, logits, *numbers = arguments[3:-3]
    call = Numbers(*numbers)
    check_call(hidden, weight, bias, target, temperature, call)
    check_backward(arguments[:3], target, temperature, state)
    if logits is not None:
        columns = padded(columns_here(weight.shape[0], call.vocab_start, call.vocab_size))
        check_tensors(hidden.device, ("logits", logits, call.logits, (hidden.shape[0], columns)))


def _run_backward(*arguments: Any, overwrite: bool) -> tuple[Tensor, ...]:
    _check_backward(*arguments)
    grads: Grads = arguments[:3]
    hidden, weight, bias, target, temperature, state, logits, *numbers = arguments[3:-3]
    needs: Needs = arguments[-3:]
    with linear_tiles.without_autocast(hidden):
        return linear_tiles.backward(
            grads, hidden, weight, bias, target, temperature, state, logits, overwrite, Numbers(*numbers), needs
        )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _run_backward(*arguments, overwrite=False)


def _backward_(*arguments: Any) -> tuple[Tensor, ...]:
    return _run_backward(*arguments, overwrite=True)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, want, keep = rest[:11]
    call = Numbers(*numbers)
    check_call(hidden, weight, bias, target, temperature, call)
    check_want(want)
    rows = target.shape[0]
    sizes = [rows if want & bit else 0 for bit in (LOGPROB, ENTROPY, COLLISION, VOCAB_COVARIANCE)]
    outputs = [temperature.new_empty(size) for size in sizes]
    columns = columns_here(weight.shape[0], call.vocab_start, call.vocab_size)
    kept = hidden.new_empty((hidden.shape[0], padded(columns)) if keep else (0,), dtype=call.logits)
    return (*outputs, temperature.new_empty((state_rows(want), rows)), kept)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_backward(*arguments)
    hidden, weight, bias = arguments[3:6]
    need_hidden, need_weight, need_bias = arguments[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


register(_library, "linear_token_stats", _forward, _fake)
register(_library, "linear_token_stats_backward", _backward, _fake_backward)
register(_library, "linear_token_stats_backward_", _backward_, _fake_backward)


def _backward_op(inplace: bool) -> Any:
    ops = torch.ops.entropy_kernels
    return (ops.linear_token_stats_backward_ if inplace else ops.linear_token_stats_backward).default


class _LinearTokenStats(torch.autograd.Function):
    """Autograd of the op. Registered by hand: torch.library.register_autograd costs 70 µs more per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, target, temperature, *numbers = inputs[:-5]
        want, keep = inputs[-5:-3]
        with torch._C._AutoDispatchBelowAutograd():
            output = linear_token_stats(*inputs)
        logits = output[_LOGITS] if keep else None
        ctx.save_for_backward(*recorded(hidden, weight, bias, target, temperature, output[_STATE], logits))
        ctx.numbers = numbers
        ctx.overwritten = False
        ctx.set_materialize_grads(False)  # an output that was not used costs nothing
        unwanted = [output[i] for i in range(3) if not want & (1 << i)]
        ctx.mark_non_differentiable(*unwanted, *output[3:])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rest = (None,) * (len(ctx.numbers) + 7)
        if all(grad is None for grad in grads[:3]):
            return (None, None, None, *rest)
        needs = ctx.needs_input_grad[:3]
        *saved, logits = ctx.saved_tensors
        if ctx.overwritten:
            logits = None  # a second pass (retain_graph) makes them again
        # a compiler traces with tensors of its own types, and plans memory by itself
        inplace = type(logits) is Tensor and not torch.compiler.is_compiling()
        ctx.overwritten = ctx.overwritten or inplace
        gradients = _backward_op(inplace)(*grads[:3], *saved, logits, *ctx.numbers, *needs)
        return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *rest)


class _LinearTokenStatsBackward(torch.autograd.Function):
    """Only there to say, instead of a silent wrong second derivative, that there is none."""

    @staticmethod
    def forward(ctx: Any, inplace: bool, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward_op(inplace)(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{_NAME}: double backward (create_graph=True) is not supported")


def _forward_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    tensors = [x for x in inputs[:3] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse_functional_grad(_NAME, *tensors)
        return _LinearTokenStats.apply(*inputs)
    for tensor in tensors:
        refuse_forward_mode(_NAME, tensor)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_token_stats(*inputs)


def _backward_autograd(*inputs: Any, inplace: bool = False) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        return _LinearTokenStatsBackward.apply(inplace, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(inplace)(*inputs)


_library.impl("linear_token_stats", _forward_autograd, "Autograd")
_library.impl("linear_token_stats_backward", _backward_autograd, "Autograd")
_library.impl("linear_token_stats_backward_", lambda *inputs: _backward_autograd(*inputs, inplace=True), "Autograd")

linear_token_stats = torch.ops.entropy_kernels.linear_token_stats.default
