"""Public functions on hidden states and a head's weight: validate, plan, call the op (docs/linear.md).

Read on in ops/: linear_plan.py (how large a tile is), linear_token_stats.py (the op), linear_tiles.py (its loops) over
products.py; linear_head.py, where the head is a module or a function; linear_policy_loss.py, gradients in the forward.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels import _fsdp as fsdp
from entropy_kernels._arguments import (
    check_own_memory,
    check_tensor,
    integer,
    of_type,
    refuse_forward_mode,
    share_memory,
)
from entropy_kernels._dtensor import as_whole, local_head
from entropy_kernels._rows import ENTROPY, LOGPROB, UNBOUNDED, RowArguments, RowOptions
from entropy_kernels._torch import constant_when_compiled
from entropy_kernels.ops import linear_plan as planning
from entropy_kernels.ops import linear_policy_loss as policy_op
from entropy_kernels.ops import linear_token_stats as op
from entropy_kernels.ops.linear_head import Head, head_token_stats
from entropy_kernels.ops.linear_plan import LinearPlan, Problem
from entropy_kernels.ops.linear_policy_loss import Coefficients
from entropy_kernels.ops.linear_policy_loss import Final as Final  # of linear_loss, for losses/linear.py
from entropy_kernels.ops.linear_tiles import Numbers
from entropy_kernels.ops.products import adds_to_fp32
from entropy_kernels.ops.token_stats import taken_apart
from entropy_kernels.statistics import (
    LogprobEntropy,
    TokenStats,
    asked_for,
    in_order,
    labels,
    row_options,
    temperature_tensor,
    validate_options,
    validate_rows,
)

_LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor | Callable[..., Tensor],
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> LogprobEntropy:
    """:func:`entropy_kernels.logprob_entropy` of the logits ``hidden @ weight.T + bias``, in bounded memory.

    Differentiable with respect to ``hidden``, ``weight`` and ``bias``; each gradient is computed only where it is
    needed, accumulates in fp32 and is rounded once. How it is computed, and in how much memory, says
    :func:`linear_plan`. Under torch.autocast the products are made in its dtype. A row's last bits depend on the number
    of rows, by which products and tiles are chosen; those of :func:`entropy_kernels.logprob_entropy` do not.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or, on the CPU, fp64, with any strides.
        weight: (V, H) of ``hidden``'s dtype (of any under autocast); under ``vocab_group`` this rank's rows of it. A
            DTensor is gathered once, or with ``vocab_group`` taken as this rank's shard. Or a head that is no plain
            weight: a module called with (n, H) hidden states that returns (n, V) logits, or a function called with
            ``(hidden, start, stop)`` that returns logits ``start`` to ``stop``; docs/linear.md has their contract.
        target: (...) int32 or int64 token ids; global ids under ``vocab_group``.
        bias: (V,) of ``weight``'s dtype. An entry of -inf masks its token.
        temperature, softcap, ignore_index, vocab_start, vocab_size, backend: as in
            :func:`entropy_kernels.logprob_entropy`. Ignored tokens give 0 and contribute nothing to any gradient,
            whatever their hidden state holds; on the CPU they cost nothing either.
        vocab_group: torch.distributed process group over vocabulary shards. ``hidden``, ``target`` and the upstream
            gradients are the same on all ranks, and so are the results and ``hidden``'s gradient.
        logits_dtype: bf16, fp16 or fp32, that the products are rounded to before the statistics; by default their own
            dtype, as in ``F.linear``. fp32 keeps the 16 bits that bf16 logits lose, at twice the memory.
        memory_budget: bytes that the call may use beside inputs, results and gradients. By default 1 GiB, and on a GPU
            a 16th of the memory that is free at the first call of the process, from 1 to 4 GiB. The logits are kept for
            the backward pass if they fit, else made again there.

    Returns:
        ``LogprobEntropy(logprob, entropy)``, each of ``target``'s shape, fp32 (fp64 for fp64), in nats.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range, or a budget that is too small.
        IndexError: a label out of range (CPU; on a GPU the token's outputs are NaN).
        RuntimeError: double backward; a backend that cannot run here.
        NotImplementedError: forward-mode differentiation, torch.func's derivatives.

    Source:
        docs/math.md §2; docs/linear.md.
    """
    row = RowArguments(temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size, backend)
    given = LinearArguments(row, logits_dtype, memory_budget)
    return LogprobEntropy(*stats_of(hidden, weight, target, bias, given, LOGPROB | ENTROPY))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor | Callable[..., Tensor],
    target: Tensor | None,
    bias: Tensor | None = None,
    *,
    statistics: Sequence[str] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> TokenStats | Any:
    """:func:`entropy_kernels.token_stats` of the logits ``hidden @ weight.T + bias``, in bounded memory.

    Memory and gradients are those of :func:`linear_logprob_entropy`.

    Args:
        target, statistics: as in :func:`entropy_kernels.token_stats`.
        others: as in :func:`linear_logprob_entropy`.

    Returns:
        As :func:`entropy_kernels.token_stats`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: as in :func:`linear_logprob_entropy` and
            :func:`entropy_kernels.token_stats`.

    Source:
        docs/math.md §2; docs/linear.md.
    """
    row = RowArguments(temperature, softcap, ignore_index, vocab_group, vocab_start, vocab_size, backend)
    given = LinearArguments(row, logits_dtype, memory_budget)
    record, want = asked_for(statistics)
    return in_order(record, stats_of(hidden, weight, target, bias, given, want), want)


def linear_plan(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    policy_loss: bool = False,
    sequence_length: int | None = None,
    selects: bool = True,
) -> LinearPlan:
    """How :func:`linear_logprob_entropy` would compute these arguments: mode, products, tiles, bytes.

    Nothing is computed; tensors on the meta device are planned for as on a GPU of which nothing is known: 1 GiB unless
    ``memory_budget`` says otherwise, and products that it cannot add to fp32 sums without a copy. The mode follows from
    ``requires_grad`` (under the grad mode of this call) and the budget; docs/linear.md has the formula. Ignored tokens
    are counted as if they were not.

    Args:
        weight: (V, H) of ``hidden``'s dtype; no module or function.
        policy_loss: plan a call of :func:`entropy_kernels.linear_policy_loss`.
        sequence_length: tokens of the longest sequence, of a policy loss of whole sequences: it makes its gradients in
            the forward pass where that fits the budget, and else follows the statistics. None: a loss of tokens.
        selects: whether the policy loss makes a selection, of at most 0.2 % of the tokens; False: none, or a given one.
        others: as in :func:`linear_logprob_entropy`.

    Returns:
        :class:`LinearPlan`; bytes and numbers of tokens.

    Raises:
        TypeError, ValueError: as in :func:`linear_logprob_entropy`.

    Source:
        docs/linear.md.
    """
    check_tensor("hidden", hidden)
    of_type("policy_loss", policy_loss, bool)
    of_type("selects", selects, bool)
    target = hidden.new_empty(hidden.shape[:-1], dtype=torch.int64)
    validate_rows("hidden", hidden, target)
    row = RowArguments(vocab_group=vocab_group, vocab_start=vocab_start, vocab_size=vocab_size)
    validate_options(False, row)
    if vocab_group is None:
        weight, bias = as_whole(weight), as_whole(bias)
    _, problem = _row_and_problem(hidden, weight, bias, LinearArguments(row, logits_dtype, memory_budget))
    if sequence_length is not None and (not policy_loss or integer("sequence_length", sequence_length) < 1):
        raise ValueError(f"sequence_length: expected None or, for a policy loss, an int >= 1, got {sequence_length}")
    if policy_loss and problem.backward:
        adds = adds_to_fp32(problem.operand, hidden.device)
        changes = changes_of(2e-3, None, problem.rows) if selects else 0
        return planning.loss_plan(problem, changes, adds, sequence_length)
    return planning.plan(problem)


def changes_of(ratio: float | None, k: int | None, tokens: int) -> int:
    """Most tokens whose coefficient is another than predicted: those selected, and those held out."""
    selected = k if k is not None else max(1, math.floor((ratio or 0.0) * tokens))
    return min(tokens, selected + planning.HELD_OUT)


class LinearArguments(NamedTuple):
    """The keyword arguments that all functions of hidden states share, as their caller gave them."""

    row: RowArguments
    logits_dtype: torch.dtype | None
    memory_budget: int | None


def stats_of(
    hidden: Tensor, weight: Any, target: Tensor | None, bias: Tensor | None, given: LinearArguments, want: int
) -> Sequence[Tensor]:
    """The statistics that ``want`` names, in the order of the table, each of ``hidden``'s shape without H."""
    target, row = labels("hidden", hidden, target, given.row, want)
    given = given._replace(row=row)
    if callable(weight) and not isinstance(weight, Tensor):
        validate_rows("hidden", hidden, target)
        validate_options(False, given.row)
        _refuse_beside_a_head(bias=bias, vocab_group=given.row.vocab_group, vocab_start=given.row.vocab_start)
        units = fsdp.sharded(weight.modules()) if isinstance(weight, torch.nn.Module) else []

        def through(hidden: Tensor) -> Sequence[Tensor]:
            with fsdp.gathered_once(units):
                return _through_head(hidden, weight, target, given, want)

        return fsdp.as_forward(units, through, hidden, called=weight)
    call = _checked(hidden, weight, target, bias, given)
    keep = planning.keeps_logits(call.problem)
    stats, _, _ = op.linear_token_stats(*call.tensors, *call.numbers.flat, want, keep, *call.needs)
    return taken_apart(stats, target.shape, want)


class _Checked(NamedTuple):
    """A call with a plain weight, after its arguments were checked."""

    # hidden (N, H), weight, bias, target (N,), temperature
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
    numbers: Numbers
    problem: Problem

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Whether hidden, weight and bias need a gradient."""
        return self.problem.need_hidden, self.problem.need_weight, self.problem.need_bias


def _checked(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, given: LinearArguments) -> _Checked:
    validate_rows("hidden", hidden, target)
    validate_options(False, given.row)
    weight, bias, local = local_head(weight, bias, given.row)
    given = given._replace(row=local)
    (options, group), problem = _row_and_problem(hidden, weight, bias, given)
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1).contiguous(),
        temperature_tensor("hidden", local.temperature, target, planning.accumulator(problem.product)),
    )
    numbers = Numbers(options, problem.product, problem.logits, problem.budget, group, local.backend)
    return _Checked(tensors, numbers, problem)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    given: LinearArguments,
    coefficients: Coefficients | None,
    *,
    alike: Callable[[], tuple[dict[str, Any], dict[str, Tensor | None]]] = lambda: ({}, {}),
    grad_buffer: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """A loss whose gradients are made in the forward pass, and its metrics: ops/linear_policy_loss.py.

    None, before anything is computed, without ``coefficients`` and where a part must hold whole sequences and the
    longest does not fit the budget, on all ranks of a vocab_group alike: the statistics are then to be computed first,
    and the loss of them. ``alike``: the options and tensors that these ranks compare.

    ``weight`` is a tensor; at least one of hidden, weight and bias requires a gradient. Other arguments and errors as
    of :func:`linear_logprob_entropy`. In compiled code the ranks of a vocab_group do not ask each other how many tokens
    a part has. There ``memory_budget`` must be the same on all of them (None: 1 GiB), and parts are cut as if each
    shard were as wide as the widest can be: of ``vocab_size`` entries, where ``vocab_start`` says that they may differ.
    """
    call = _checked(hidden, weight, target, bias, given)
    for tensor in call.tensors[:3]:
        if tensor is not None:
            refuse_forward_mode("linear_policy_loss", tensor)
    head, problem, numbers = call.tensors[1], call.problem, call.numbers
    if grad_buffer is not None and coefficients is not None:
        _check_buffer(grad_buffer, weight, head, problem, numbers.group)
    if numbers.group and torch.compiler.is_compiling():
        unequal = given.row.vocab_start is not None or head is not weight
        columns = numbers.row.vocab_size if unequal else head.shape[0]
        if columns == UNBOUNDED:
            raise ValueError("vocab_size: expected an int beside vocab_start in compiled code, got None")
        budget = planning.DEFAULT_BUDGET if given.memory_budget is None else problem.budget
        problem = dataclasses.replace(problem, columns=columns, budget=budget)
    size, longest = 0, None
    if coefficients is not None:
        cuts = coefficients.cuts
        if cuts is not None:
            longest = max([0, *map(operator.sub, cuts, [0, *cuts])]) if isinstance(cuts, Sequence) else cuts
        size = planning.loss_rows(problem, coefficients.changes, longest)
    if numbers.group and not torch.compiler.is_compiling():
        size = policy_op.agreed(size, *call.tensors[3:], numbers, *alike())
    if coefficients is None:
        return None
    if size == 0:
        if grad_buffer is not None:
            raise ValueError(
                f"memory_budget: expected more than {problem.budget} bytes beside a grad_buffer, for the logits of the "
                f"longest sequence, of {longest} tokens"
            )
        return None
    return policy_op.linear_policy_loss(*call.tensors, numbers, call.needs, coefficients, size, grad_buffer)


def _check_buffer(grad_buffer: Any, weight: Tensor, head: Tensor, problem: Problem, group: str) -> None:
    check_tensor("grad_buffer", grad_buffer, " or None")
    if head is not weight and not group:
        raise ValueError(
            "grad_buffer: expected None beside a DTensor weight without a vocab_group, whose gradient is reduced over "
            "the mesh, got a tensor; pass weight.full_tensor().detach().requires_grad_(), reduce the buffer"
        )
    if not problem.need_weight:
        raise ValueError("grad_buffer: expected None for a weight that needs no gradient, got a tensor")
    if (grad_buffer.shape, grad_buffer.dtype, grad_buffer.device) != (head.shape, problem.wide, head.device):
        raise ValueError(
            f"grad_buffer: expected {problem.wide} of weight's shape {tuple(head.shape)} on {head.device}, got "
            f"{grad_buffer.dtype} of shape {tuple(grad_buffer.shape)} on {grad_buffer.device}"
        )
    check_own_memory("grad_buffer", grad_buffer, "the gradient is added to them")
    if share_memory(grad_buffer, head):
        raise ValueError("grad_buffer: expected memory of its own, got a tensor that shares weight's")
    if grad_buffer.requires_grad:
        raise ValueError("grad_buffer: expected a tensor that does not require grad, got one that does")
    if not torch.compiler.is_compiling() and grad_buffer.is_inference():
        raise ValueError("grad_buffer: expected a tensor made outside of torch.inference_mode(), got one made inside")


def _refuse_beside_a_head(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected None beside a weight that is a module or a function, got {type(value).__name__}"
            )


def _through_head(hidden: Tensor, function: Any, target: Tensor, given: LinearArguments, want: int) -> Sequence[Tensor]:
    module = isinstance(function, torch.nn.Module)
    width = getattr(function, "out_features", None) if module else None
    vocab: Any = given.row.vocab_size if width is None else width
    if vocab is None:
        raise ValueError(
            "vocab_size: expected the number of logits that the head gives, as it has no out_features, got None"
        )
    dtype = planning.accumulator(hidden.dtype)
    options, group = row_options("weight", vocab, dtype, given.row)
    if module:
        function, parameters = fsdp.with_whole_parameters(function)
    else:
        found = getattr(function, "parameters", ())
        parameters = {p: p for p in (found() if callable(found) else found)}
    if not torch.is_grad_enabled():
        parameters = {}
    if not torch.compiler.is_compiling() and any(map(torch.nn.parameter.is_lazy, parameters)):
        raise ValueError(
            "weight: expected a head whose parameters have values, got a lazy one, which gets them from its first call"
        )
    tracked = hidden.requires_grad or any(parameter.requires_grad for parameter in parameters)
    if tracked and not torch.compiler.is_compiling() and any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            "weight: expected a head whose parameters autograd can save, got some made under torch.inference_mode(); "
            "make the head outside of it, or clone them"
        )
    trained = {used: source for used, source in parameters.items() if used.requires_grad}
    head = Head(
        function,
        not module,
        vocab if width is not None else options.vocab_size,
        [*trained],
        [*trained.values()],
        None if given.logits_dtype is None else _logits_dtype(given.logits_dtype, hidden.dtype),
    )
    budget = _budget(given.memory_budget, hidden.device)
    numbers = Numbers(options, hidden.dtype, hidden.dtype, budget, group, given.row.backend)
    stats = head_token_stats(
        head, hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).contiguous(),
        temperature_tensor("hidden", given.row.temperature, target, dtype), numbers, want,
    )  # fmt: skip
    return taken_apart(stats, target.shape, want)


def _validate_head(hidden: Tensor, weight: Any, bias: Any) -> torch.dtype:
    """The dtype of the products."""
    product = _autocast_dtype(hidden)
    for name, value, shape in (("weight", weight, (None, hidden.shape[-1])), ("bias", bias, (None,))):
        if value is None and name == "bias":
            continue
        check_tensor(name, value)
        expected = ("V", hidden.shape[-1]) if name == "weight" else (weight.shape[0],)
        if value.dim() != len(shape) or value.shape[-1] != expected[-1]:
            raise ValueError(
                f"{name}: expected shape ({', '.join(map(str, expected))}{',' if len(expected) == 1 else ''}) "
                f"for hidden of shape {tuple(hidden.shape)}, got {tuple(value.shape)}"
            )
        if value.device != hidden.device:
            raise ValueError(f"{name}: expected on the device of hidden, {hidden.device}, got {value.device}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected the dtype of hidden, {hidden.dtype}, got {value.dtype}")
        if product is None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected the dtype of hidden, {hidden.dtype}, got {value.dtype}; cast {name} or hidden, e.g. "
                f"{name}.to(hidden.dtype), or call under torch.autocast, which casts both; where FSDP2 casts (its "
                f"MixedPrecisionPolicy), {fsdp.CURE}"
            )
    return hidden.dtype if product is None else product


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    """torch 2.11's compiler does not know the question."""
    return torch.amp.is_autocast_available(device_type)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What torch.autocast, if enabled, makes of a product with ``hidden``; it leaves fp64 alone."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _logits_dtype(logits_dtype: Any, product: torch.dtype) -> torch.dtype:
    if logits_dtype is None:
        return product
    allowed = (torch.float64,) if product == torch.float64 else _LOGITS_DTYPES
    if not isinstance(logits_dtype, torch.dtype) or logits_dtype not in allowed:
        raise TypeError(
            f"logits_dtype: expected None or one of {', '.join(map(str, allowed))} for products in {product}, "
            f"got {logits_dtype}"
        )
    return logits_dtype


def _budget(memory_budget: Any, device: torch.device) -> int:
    if memory_budget is None:
        return planning.default_budget(device)
    memory_budget = integer("memory_budget", memory_budget)
    if memory_budget < 0:
        raise ValueError(f"memory_budget: expected a number of bytes >= 0, got {memory_budget}")
    return memory_budget


def _row_and_problem(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, given: LinearArguments
) -> tuple[tuple[RowOptions, str], Problem]:
    """What statistics.row_options gives, and what the plan depends on, of a head that is local."""
    product = _validate_head(hidden, weight, bias)
    options, group = row_options("weight", weight.shape[0], planning.accumulator(product), given.row)
    grad = torch.is_grad_enabled()
    problem = Problem(
        rows=math.prod(hidden.shape[:-1]),
        features=hidden.shape[-1],
        columns=options.columns(weight.shape[0]),
        hidden=hidden.dtype,
        weight=weight.dtype,
        product=product,
        logits=_logits_dtype(given.logits_dtype, product),
        device_type=hidden.device.type,
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and weight.requires_grad,
        need_bias=grad and bias is not None and bias.requires_grad,
        sharded=bool(group),
        budget=_budget(given.memory_budget, hidden.device),
    )
    return (options, group), problem
