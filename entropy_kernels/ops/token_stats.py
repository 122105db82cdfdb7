"""``entropy_kernels::token_stats``: the statistics of softmax rows, from one read of the logits.

Schema, fake and autograd of the operator. The functions in :mod:`entropy_kernels.statistics` are its public face.
It returns the statistics (S, N) that the bitmask ``want`` names, rows in the order of ``_rows.STATISTICS``, and the
softmax state (K, N) that the backward pass starts from. A temperature that is a number is 0-d and, as for torch's own
operators, may be on the CPU beside tensors of a GPU: no launch has to write it there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import (
    all_gather,
    beside,
    check_own_memory,
    debugging,
    divisor_range,
    process_group_of,
    recorded,
    refuse_forward_mode,
    refuse_functional_grad,
    share_memory,
    values_are_checked,
)
from entropy_kernels._rows import DIFFERENTIABLE, UNBOUNDED, RowOptions, bits, state_rows, wanted
from entropy_kernels._torch import below_autograd, in_transform
from entropy_kernels.backends import registry
from entropy_kernels.backends.eager.softmax_state import finalize, merge
from entropy_kernels.ops.checks import check_backward, check_rows, check_want, once_differentiable, register

_NAME = "logprob_entropy / token_stats"
_library = torch.library.Library("entropy_kernels", "FRAGMENT")
ROW = "float softcap, int ignore_index, SymInt vocab_start, SymInt vocab_size"  # of RowOptions
_library.define(
    f"token_stats(Tensor logits, Tensor target, Tensor temperature, {ROW}, int want, bool inplace_backward, str group, "
    "str backend) -> (Tensor stats, Tensor state)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_BACKWARD_ARGUMENTS = (
    f"Tensor grad_stats, {{logits}}, Tensor target, Tensor temperature, Tensor state, {ROW}, int want, str backend"
)
_library.define(
    f"token_stats_backward({_BACKWARD_ARGUMENTS.format(logits='Tensor logits')}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"token_stats_backward_({_BACKWARD_ARGUMENTS.format(logits='Tensor(a!) logits')}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_values(target: Tensor, temperature: Tensor, options: RowOptions) -> None:
    """Errors that need the values, where they are looked at."""
    ignore_index, vocab_size = options.ignore_index, options.vocab_size
    if target.numel() == 0 or not values_are_checked(target):
        return
    lowest, highest = target.aminmax()
    if lowest.item() < 0 or highest.item() >= vocab_size:
        wrong = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
        if wrong.any():
            raise IndexError(
                f"target: expected ids in [0, {vocab_size}) or ignore_index={ignore_index}, "
                f"got {int(target[wrong][0])} ({int(wrong.sum())} such of {target.numel()})"
            )
    temperature = beside(temperature, target.device)
    lowest, highest = (temperature, temperature) if temperature.numel() == 1 else temperature.aminmax()
    least, most = divisor_range(temperature.dtype)
    if not (least <= lowest.item() and highest.item() <= most):
        wrong = ~((temperature >= least) & (temperature <= most)) & (target != ignore_index)
        if wrong.any():
            raise ValueError(
                f"temperature: expected numbers > 0 within [{least:.2g}, {most:.2g}], "
                f"got {temperature.expand_as(wrong)[wrong][0].item()}"
            )


def _forward(
    logits: Tensor,  # (B, L, V)
    target: Tensor,  # (N,), N = B * L
    temperature: Tensor,  # (1,) or (N,), or ()
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *row, want, _inplace_backward, group, backend = rest
    options = RowOptions(*row)
    check_rows(logits, target, temperature, options)
    check_want(want)
    if not group:
        check_values(target, temperature, options)
    kernel = registry.kernel("token_stats", "token_stats_forward", backend, logits)
    stats, state = kernel(logits, target, temperature, options, want)
    if not group:
        return stats, state
    temperature = beside(temperature, logits.device)
    return merge_shards(state, target, temperature, options, options.vocab_start + logits.shape[2], want, group)


def merge_shards(
    state: Tensor, target: Tensor, temperature: Tensor, options: RowOptions, end: int, want: int, group: str
) -> tuple[Tensor, Tensor]:
    """One all-gather of the packed state, then merge and finalize: the same on every rank of the group.

    ``end``: the first global id beyond this rank's shard. Both ends travel along, with all that the ranks have in
    common: where they do not, or where shards overlap or leave ids out, every rank raises the same error, or all
    outputs that depend on it are NaN where values are not looked at. (K, N) has to be the same, or the ranks wait for
    each other; ENTROPY_KERNELS_DEBUG=1 asks first.
    """
    process_group, (kinds, rows) = process_group_of(group), state.shape
    if debugging():
        _check_sizes(state, process_group)
    bits = torch.int32 if state.dtype == torch.float32 else torch.int64
    local = int64s([options.vocab_start, end, *in_common(options)], state.device)
    tokens = target.to(bits), temperature.expand(rows).view(bits)
    packed = torch.cat([state.view(bits).reshape(-1), *tokens, local.view(bits)])
    gathered = packed.new_empty((process_group.size(), packed.numel()))
    all_gather(gathered.view(-1), packed, group=process_group)
    states, tokens, common = gathered.split([kinds * rows, 2 * rows, gathered.shape[1] - (kinds + 2) * rows], 1)
    tokens, common = tokens.unflatten(1, (2, rows)), common.contiguous().view(torch.int64)
    ignored = target == options.ignore_index
    differs = (tokens != tokens[:1]).any(0)  # (2, N): labels, temperatures
    differs[1] &= ~ignored
    mixed = (common[:, 2:] != common[:1, 2:]).any(0)  # options
    starts, ends = common[:, :2].clamp(max=options.vocab_size).sort(0).values.unbind(1)
    apart = (starts[0] != 0) | (starts[1:] != ends[:-1]).any()  # each begins where another one ends
    if values_are_checked(target):
        if mixed.any():
            refuse_options(common[:, 2:].tolist())
        _check_tokens(differs, tokens)
        overlap = bool((starts[1:] < ends[:-1]).any())
        if not overlap:  # else it says little what the last id is
            check_values(target, temperature, options._replace(vocab_size=int(ends[-1])))
        if overlap or apart:
            shards = ", ".join(f"[{start}, {end})" for start, end, *_ in common.tolist())
            raise ValueError(
                "vocab_start: expected shards that begin at 0 and follow each other without overlap or gap, got the "
                f"ids {shards} on the ranks of the vocab_group"
            )
    invalid = differs.any(0) | mixed.any() | apart
    ignored = ignored & ~invalid
    invalid = invalid | (((target < 0) | (target >= ends[-1])) & ~ignored)
    merged = merge(states.view(state.dtype).unflatten(1, (kinds, rows)), temperature)
    return finalize(merged, temperature, want, ignored, invalid), merged


def _check_backward(
    grad_stats: Tensor, logits: Tensor, target: Tensor, temperature: Tensor, state: Tensor, *rest: Any
) -> None:
    *row, want, _backend = rest
    check_rows(logits, target, temperature, RowOptions(*row))
    check_backward(grad_stats, target, temperature, state, want)


def int64s(values: list[int], device: torch.device) -> Tensor:
    """Numbers on a device, without a copy that would wait for it."""
    if device.type == "cpu":
        return torch.tensor(values)
    return torch.cat([torch.full((1,), value, device=device) for value in values])


def _check_sizes(state: Tensor, process_group: Any) -> None:
    local = int64s(list(state.shape), state.device)
    sizes = local.new_empty((process_group.size(), 2))
    all_gather(sizes.view(-1), local, group=process_group)
    if (sizes != sizes[0]).any():
        raise ValueError(
            "target: expected the same number of tokens and the same function on all ranks of the vocab_group, got "
            f"{sizes[:, 1].tolist()} tokens and states of {sizes[:, 0].tolist()} numbers"
        )


def in_common(options: RowOptions) -> list[int]:
    """What the ranks of a group have in common, as int64."""
    return [*struct.unpack("<q", struct.pack("<d", options.softcap)), options.ignore_index, options.vocab_size]


def refuse_options(of_ranks: list[list[int]]) -> None:
    """Raise where :func:`in_common` is not the same for all ranks."""
    bits, ignore_index, sizes = zip(*of_ranks, strict=True)
    given = {
        "softcap": [struct.unpack("<d", struct.pack("<q", x))[0] or None for x in bits],
        "ignore_index": list(ignore_index),
        "vocab_size": [None if size == UNBOUNDED else size for size in sizes],
    }
    for name, values in given.items():
        if len(set(values)) > 1:
            raise ValueError(f"{name}: expected the same on all ranks of the vocab_group, got {values}")


def _check_tokens(differs: Tensor, tokens: Tensor) -> None:
    for i, name in enumerate(("target", "temperature")):
        if differs[i].any():
            token = int(differs[i].nonzero()[0])
            got = tokens[:, i, token].contiguous()
            values = got if name == "target" else got.view(torch.float32 if got.dtype == torch.int32 else torch.float64)
            raise ValueError(
                f"{name}: expected the same on all ranks of the vocab_group, got {values.tolist()} for token {token}"
            )


def _run_backward(*arguments: Any, inplace: bool) -> Tensor:
    _check_backward(*arguments)
    tensors, (*row, want, backend) = arguments[:5], arguments[5:]
    kernel = registry.kernel("token_stats", "token_stats_backward", backend, tensors[1])
    return kernel(*tensors, RowOptions(*row), want, inplace)


def _backward(*arguments: Any) -> Tensor:
    return _run_backward(*arguments, inplace=False)


def _backward_(*arguments: Any) -> None:
    logits = arguments[1]
    check_own_memory("logits", logits, "the gradient is written over them")
    names = ("grad_stats", "logits", "target", "temperature", "state")
    for name, x in zip(names, arguments[:5], strict=True):
        if x is not logits and share_memory(x, logits):
            raise ValueError(f"{name}: expected memory apart from the logits', which are written over, got some of it")
    _run_backward(*arguments, inplace=True)
    torch.autograd.graph.increment_version(logits)


def _fake(logits: Tensor, target: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *row, want, _inplace_backward, _group, _backend = rest
    check_rows(logits, target, temperature, RowOptions(*row))
    check_want(want)
    rows, dtype = target.shape[0], temperature.dtype
    sizes = len(wanted(want)), state_rows(want)
    return logits.new_empty((sizes[0], rows), dtype=dtype), logits.new_empty((sizes[1], rows), dtype=dtype)


def _fake_backward(*arguments: Any) -> Tensor:
    _check_backward(*arguments)
    return torch.empty_like(arguments[1], memory_format=torch.contiguous_format)


register(_library, "token_stats", _forward, _fake)
register(_library, "token_stats_backward", _backward, _fake_backward)
register(_library, "token_stats_backward_", _backward_, _check_backward)


class _TokenStats(torch.autograd.Function):
    """Autograd of the op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        stats, state = _recorded_forward(ctx, inputs)
        ctx.mark_non_differentiable(*([state] if ctx.want & DIFFERENTIABLE else [stats, state]))
        return stats, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _gradient(ctx, grad, ctx.want), *_NONE


class _Rows(torch.autograd.Function):
    """The same for eager calls: each statistic is an output of its own, and those without a gradient cost none."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, *inputs: Any) -> tuple[Tensor, ...]:
        stats, _ = _recorded_forward(ctx, inputs)
        rows = apart(stats, shape)
        ctx.differentiable = [x.differentiable for x in wanted(ctx.want)]
        ctx.mark_non_differentiable(*(row for row, it_is in zip(rows, ctx.differentiable, strict=True) if not it_is))
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = [(x, grad.reshape(-1)) for x, grad in zip(wanted(ctx.want), grads, strict=True) if grad is not None]
        stacked = None
        if given:
            stacked = torch.stack([grad for _, grad in given]) if len(given) > 1 else given[0][1].unsqueeze(0)
        return None, _gradient(ctx, stacked, bits(*(x.name for x, _ in given))), *_NONE


_NONE = (None,) * 10  # the gradients of all inputs but the logits


def _recorded_forward(ctx: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    logits, target, temperature, *row, ctx.want, ctx.inplace, _group, backend = inputs
    with below_autograd():
        stats, state = token_stats(*inputs)
    ctx.save_for_backward(*recorded(logits, target, temperature, state))
    ctx.row, ctx.backend = row, backend
    ctx.overwritten = False
    ctx.set_materialize_grads(False)
    return stats, state


def _gradient(ctx: Any, grad: Tensor | None, want: int) -> Tensor | None:
    """Of the logits; ``grad`` (S, N), of the statistics in ``want``."""
    if ctx.overwritten:
        raise RuntimeError(
            "inplace_backward: the first backward pass wrote the gradient over the logits, so there can be no "
            "second; call with inplace_backward=False to use retain_graph=True"
        )
    if grad is None:
        return None
    try:
        logits, target, temperature, state = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "logits: expected as they were in the forward pass, got them overwritten since then, by an in-place "
            "operation or by the backward pass of another call with inplace_backward=True on the same tensor"
        ) from error
    if ctx.inplace:
        ctx.overwritten = True
        logits = logits.detach()
        # What is read while the gradient is written must lie elsewhere
        others = grad, target, temperature
        grad, target, temperature = (x.clone() if share_memory(x, logits) else x for x in others)
    arguments = (grad, logits, target, temperature, state, *ctx.row, want, ctx.backend)
    if ctx.inplace:
        torch.ops.entropy_kernels.token_stats_backward_.default(*arguments)
        return logits
    return torch.ops.entropy_kernels.token_stats_backward.default(*arguments)


def _forward_autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and inputs[0] is not None and inputs[0].requires_grad:
        refuse_functional_grad(_NAME, inputs[0])
        return _TokenStats.apply(*inputs)
    refuse_forward_mode(_NAME, inputs[0])
    with below_autograd():
        return token_stats(*inputs)


def apart(stats: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """The rows of ``stats`` (S, N), each of ``shape``: parts of its memory that torch does not know as views of it.

    So no row has to be copied, and writing to one leaves the others', and what autograd has saved of them, valid.
    """
    return tuple([x.data for x in (stats if len(shape) == 1 else stats.view(stats.shape[0], *shape)).unbind()])


def rows(shape: torch.Size, *inputs: Any) -> Sequence[Tensor]:
    """The statistics in ``want``, each of ``shape``, with a gradient where it has one, of the op's inputs."""
    if not _eager():
        stats, _ = token_stats(*inputs)
        return taken_apart(stats, shape, inputs[-4])
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return _Rows.apply(shape, *inputs)
    refuse_forward_mode(_NAME, inputs[0])
    with below_autograd():
        stats, _ = token_stats(*inputs)
    return apart(stats, shape)


def taken_apart(stats: Tensor, shape: torch.Size, want: int) -> Sequence[Tensor]:
    """The rows of ``stats`` (S, N), each of ``shape``, so that users may write to any of them.

    They share its memory, or are copies where autograd or a compiler has to know where they come from.
    """
    if not stats.requires_grad and _eager():
        return apart(stats, shape)
    rows = stats if len(shape) == 1 else stats.view(stats.shape[0], *shape)
    if not torch.compiler.is_compiling() and in_transform():  # torch 2.11 cannot map the other
        found: Any = [row.clone() for row in rows.unbind()]
    else:
        found = torch.unbind_copy(rows)  # type: ignore[func-returns-value]
    if stats.requires_grad:
        found = [row if x.differentiable else row.detach() for row, x in zip(found, wanted(want), strict=True)]
    return found


def _eager() -> bool:
    return not (torch.compiler.is_compiling() or in_transform() or torch.jit.is_tracing())


_library.impl("token_stats", _forward_autograd, "Autograd")
once_differentiable(_library, _NAME, "token_stats_backward")

token_stats = torch.ops.entropy_kernels.token_stats.default
