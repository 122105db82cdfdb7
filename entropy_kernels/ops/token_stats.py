"""``entropy_kernels::token_stats``: the statistics of softmax rows, from one read of the logits.

Schema, fake and autograd of the operator. The functions in :mod:`entropy_kernels.statistics` are its public face.
The last output is the softmax state (K, N) that the backward pass starts from; it is no statistic.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import (
    all_gather,
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
from entropy_kernels._rows import COLLISION, ENTROPY, LOGPROB, UNBOUNDED, VOCAB_COVARIANCE, state_rows
from entropy_kernels.backends import registry
from entropy_kernels.backends.eager.softmax_state import finalize, merge
from entropy_kernels.ops.checks import check_backward, check_rows, check_want, register

__all__ = ["COLLISION", "ENTROPY", "LOGPROB", "UNBOUNDED", "VOCAB_COVARIANCE", "token_stats"]

_STATE = 4  # index of the state among the outputs

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_library.define(
    "token_stats(Tensor logits, Tensor target, Tensor temperature, float softcap, int ignore_index, "
    "SymInt vocab_start, SymInt vocab_size, int want, bool inplace_backward, str group, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_BACKWARD_ARGUMENTS = (
    "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_collision, {logits}, Tensor target, "
    "Tensor temperature, Tensor state, float softcap, int ignore_index, SymInt vocab_start, SymInt vocab_size, "
    "str backend"
)
_library.define(
    f"token_stats_backward({_BACKWARD_ARGUMENTS.format(logits='Tensor logits')}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"token_stats_backward_({_BACKWARD_ARGUMENTS.format(logits='Tensor(a!) logits')}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_values(target: Tensor, temperature: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Errors that need the values, where they are looked at."""
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
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    want: int,
    inplace_backward: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(logits, target, temperature, softcap, vocab_start, vocab_size)
    check_want(want)
    if not group:
        check_values(target, temperature, ignore_index, vocab_size)
    kernel = registry.kernel("token_stats", "token_stats_forward", backend, logits)
    outputs = kernel(logits, target, temperature, softcap, ignore_index, vocab_start, vocab_size, want)
    if not group:
        return outputs
    shard = vocab_start, vocab_start + logits.shape[2]
    return merge_shards(outputs[_STATE], shard, target, temperature, softcap, ignore_index, vocab_size, want, group)


def merge_shards(
    state: Tensor,
    shard: tuple[int, int],
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_size: int,
    want: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One all-gather of the packed state, then merge and finalize: the same on every rank of the group.

    ``shard``: this rank's first global id, and the first one beyond. It travels along, with all that the ranks have in
    common: where they do not, or where shards overlap or leave ids out, every rank raises the same error, or all
    outputs that depend on it are NaN where values are not looked at. (K, N) has to be the same, or the ranks wait for
    each other; ENTROPY_KERNELS_DEBUG=1 asks first.
    """
    process_group, (kinds, rows) = process_group_of(group), state.shape
    if debugging():
        _check_sizes(state, process_group)
    bits = torch.int32 if state.dtype == torch.float32 else torch.int64
    local = int64s([*shard, *in_common(softcap, ignore_index, vocab_size)], state.device)
    tokens = target.to(bits), temperature.expand(rows).view(bits)
    packed = torch.cat([state.view(bits).reshape(-1), *tokens, local.view(bits)])
    gathered = packed.new_empty((process_group.size(), packed.numel()))
    all_gather(gathered.view(-1), packed, group=process_group)
    states, tokens, common = gathered.split([kinds * rows, 2 * rows, gathered.shape[1] - (kinds + 2) * rows], 1)
    tokens, common = tokens.unflatten(1, (2, rows)), common.contiguous().view(torch.int64)
    ignored = target == ignore_index
    differs = (tokens != tokens[:1]).any(0)  # (2, N): labels, temperatures
    differs[1] &= ~ignored
    options = (common[:, 2:] != common[:1, 2:]).any(0)
    starts, ends = common[:, :2].clamp(max=vocab_size).sort(0).values.unbind(1)
    apart = (starts[0] != 0) | (starts[1:] != ends[:-1]).any()  # each begins where another one ends
    if values_are_checked(target):
        if options.any():
            refuse_options(common[:, 2:].tolist())
        _check_tokens(differs, tokens)
        overlap = bool((starts[1:] < ends[:-1]).any())
        if not overlap:  # else it says little what the last id is
            check_values(target, temperature, ignore_index, int(ends[-1]))
        if overlap or apart:
            shards = ", ".join(f"[{start}, {end})" for start, end, *_ in common.tolist())
            raise ValueError(
                "vocab_start: expected shards that begin at 0 and follow each other without overlap or gap, got the "
                f"ids {shards} on the ranks of the vocab_group"
            )
    invalid = differs.any(0) | options.any() | apart
    ignored = ignored & ~invalid
    invalid = invalid | (((target < 0) | (target >= ends[-1])) & ~ignored)
    merged = merge(states.view(state.dtype).unflatten(1, (kinds, rows)), temperature)
    logprob, entropy, collision, covariance = finalize(merged, temperature, want, ignored, invalid)
    return logprob, entropy, collision, covariance, merged


def _check_backward(*arguments: Any) -> None:
    logits, target, temperature, state, softcap, _, vocab_start, vocab_size = arguments[3:11]
    check_rows(logits, target, temperature, softcap, vocab_start, vocab_size)
    check_backward(arguments[:3], target, temperature, state)


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


def in_common(softcap: float, ignore_index: int, vocab_size: int) -> list[int]:
    """What the ranks of a group have in common, as int64."""
    return [*struct.unpack("<q", struct.pack("<d", softcap)), ignore_index, vocab_size]


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
    *tensors_and_numbers, backend = arguments
    _check_backward(*arguments)
    kernel = registry.kernel("token_stats", "token_stats_backward", backend, arguments[3])
    return kernel(*tensors_and_numbers, inplace)


def _backward(*arguments: Any) -> Tensor:
    return _run_backward(*arguments, inplace=False)


def _backward_(*arguments: Any) -> None:
    logits = arguments[3]
    check_own_memory("logits", logits, "the gradient is written over them")
    names = ("grad_logprob", "grad_entropy", "grad_collision", "logits", "target", "temperature", "state")
    for name, x in zip(names, arguments[:7], strict=True):
        if x is not None and x is not logits and share_memory(x, logits):
            raise ValueError(f"{name}: expected memory apart from the logits', which are written over, got some of it")
    _run_backward(*arguments, inplace=True)
    torch.autograd.graph.increment_version(arguments[3])


def _fake(logits: Tensor, target: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    softcap, _, vocab_start, vocab_size, want = rest[:5]
    check_rows(logits, target, temperature, softcap, vocab_start, vocab_size)
    check_want(want)
    rows = target.shape[0]
    sizes = [rows if want & bit else 0 for bit in (LOGPROB, ENTROPY, COLLISION, VOCAB_COVARIANCE)]
    outputs = [logits.new_empty(size, dtype=temperature.dtype) for size in sizes]
    return (*outputs, logits.new_empty((state_rows(want), rows), dtype=temperature.dtype))


def _fake_backward(*arguments: Any) -> Tensor:
    _check_backward(*arguments)
    return torch.empty_like(arguments[3], memory_format=torch.contiguous_format)


register(_library, "token_stats", _forward, _fake)
register(_library, "token_stats_backward", _backward, _fake_backward)
register(_library, "token_stats_backward_", _backward_, _check_backward)


class _TokenStats(torch.autograd.Function):
    """Autograd of the op. Registered by hand: torch.library.register_autograd costs 70 µs more per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        logits, target, temperature, *numbers, want, ctx.inplace, _group, backend = inputs
        with torch._C._AutoDispatchBelowAutograd():
            output = token_stats(*inputs)
        ctx.save_for_backward(*recorded(logits, target, temperature, output[_STATE]))
        ctx.numbers = (*numbers, backend)
        ctx.overwritten = False
        ctx.set_materialize_grads(False)  # an output that was not used costs nothing
        unwanted = [output[i] for i in range(3) if not want & (1 << i)]
        ctx.mark_non_differentiable(*unwanted, output[3], output[_STATE])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.overwritten:
            raise RuntimeError(
                "inplace_backward: the first backward pass wrote the gradient over the logits, so there can be no "
                "second; call with inplace_backward=False to use retain_graph=True"
            )
        none = (None,) * 10
        if all(grad is None for grad in grads[:3]):
            return (None, *none)
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
            others = (*grads[:3], target, temperature)
            *grads3, target, temperature = (
                x.clone() if x is not None and share_memory(x, logits) else x for x in others
            )
            grads = tuple(grads3)
        arguments = (*grads[:3], logits, target, temperature, state, *ctx.numbers)
        if ctx.inplace:
            torch.ops.entropy_kernels.token_stats_backward_.default(*arguments)
            return (logits, *none)
        return (torch.ops.entropy_kernels.token_stats_backward.default(*arguments), *none)


class _TokenStatsBackward(torch.autograd.Function):
    """Only there to say, instead of a silent wrong second derivative, that there is none."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.entropy_kernels.token_stats_backward.default(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError("logprob_entropy / token_stats: double backward (create_graph=True) is not supported")


def _forward_autograd(*inputs: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and inputs[0] is not None and inputs[0].requires_grad:
        refuse_functional_grad("logprob_entropy / token_stats", inputs[0])
        return _TokenStats.apply(*inputs)
    refuse_forward_mode("logprob_entropy / token_stats", inputs[0])
    with torch._C._AutoDispatchBelowAutograd():
        return token_stats(*inputs)


def _backward_autograd(*inputs: Any) -> Tensor:
    if torch.is_grad_enabled():
        return _TokenStatsBackward.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.entropy_kernels.token_stats_backward.default(*inputs)


_library.impl("token_stats", _forward_autograd, "Autograd")
_library.impl("token_stats_backward", _backward_autograd, "Autograd")

token_stats = torch.ops.entropy_kernels.token_stats.default
