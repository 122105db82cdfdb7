"""``linear_tile_stats``, ``linear_tile_grads``: a loss whose gradients are made in the forward pass, by three products.

The tokens are taken in parts: logits of a part, its statistics, the gradient written over its logits, its share of all
gradients. A loss that selects tokens of the whole batch knows which only when it has seen all of them. So a part's
gradients are made with the coefficients c = ∂loss/∂logprob and e = ∂loss/∂entropy that its tokens have if they are
*not* selected, and when the selection has changed a few tokens' c to c', their logits are made again and

    Σ (c' - c) · uᵀ h,    u = (onehot - p) / T, the derivative of the log-prob by the logits,

is added to the head's gradient (a product over those tokens alone), while their own hidden states' gradient is computed
anew from c' and e. Nothing is scaled: e stays what it was, and c may have been 0.

c would cancel badly where it is huge, and not at all where it is not finite. Such a token is held out (its c is taken
as 0 at first) and is added when c' is known; where that is 0, nothing is left to do.

The operators do what is done with logits. What happens between the parts is plain torch, so that a compiler sees the
loss; it is handed over as :class:`Coefficients`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_kernels import _agreement as agreement
from entropy_kernels._arguments import process_group_of, refuse_transforms, traced, values_are_checked
from entropy_kernels._rows import ENTROPY, LOGPROB, state_rows
from entropy_kernels._torch import assert_async
from entropy_kernels.backends import registry
from entropy_kernels.ops import linear_tiles
from entropy_kernels.ops.checks import check_floats, check_state, check_tensors, register
from entropy_kernels.ops.linear_plan import HELD_OUT, kept_dtype
from entropy_kernels.ops.linear_tiles import Needs, Numbers, at, kept_rows, picked, spread
from entropy_kernels.ops.linear_token_stats import NUMBERS, check_call
from entropy_kernels.ops.products import multiply, multiply_add
from entropy_kernels.ops.token_stats import check_values, int64s, refuse_options
from entropy_kernels.ops.token_stats import in_common as common_options

_NAME = "linear_policy_loss"
_WANT = LOGPROB | ENTROPY


class Final(NamedTuple):
    """A loss of all N tokens. ``factor`` (0-d), if any: what all coefficients of the call, c and e predicted or final,
    are multiplied by in the end, as a denominator that is known only when all tokens were seen; ``loss`` has it."""

    loss: Tensor  # 0-d
    metrics: Tensor  # (M,)
    c: Tensor  # (N,)
    e: Tensor | None  # (N,)
    factor: Tensor | None = None


class Coefficients(Protocol):
    """What a loss is to this file. Tokens are flat; a coefficient is ∂loss/∂logprob (c) or ∂loss/∂entropy (e, or None),
    of the statistics' dtype. Nothing is differentiated; under a compiler the methods are traced, and change no state.
    """

    @property
    def changes(self) -> int | None:
        """Most tokens that have another c than predicted; None: they are counted, which costs a GPU a sync, and makes
        all tokens a second time in compiled code, which cannot count."""

    @property
    def cuts(self) -> int | Sequence[int] | None:
        """Where a part may end, if it must hold whole sequences: their one length, or the positions at which they end,
        of which the last is N. None: anywhere, and ignored tokens may be left out."""

    @property
    def scale(self) -> Tensor:
        """0-d, a power of 2: coefficients × scale are about as large as the advantages."""

    def predicted(self, rows: Any, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """c, e and which c are huge, of the tokens ``rows`` (a slice or indices) if none of them is selected."""

    def final(self, logprob: Tensor, entropy: Tensor) -> Final:
        """Of all tokens; those that were left out have 0 as their statistics."""


_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_TILE = "Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor temperature"
_library.define(
    f"linear_tile_stats({_TILE}, {NUMBERS}, SymInt end) -> (Tensor stats, Tensor state)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"linear_tile_grads({_TILE}, {NUMBERS}, Tensor state, Tensor c, Tensor? e, Tensor again, Tensor change, "
    "SymInt begin, Tensor(b!)? d_hidden, Tensor(c!)? d_weight, Tensor(d!)? d_bias, bool adds, bool summed) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_tile(
    call: Numbers, logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    temperature: Tensor,
) -> None:  # fmt: skip
    check_call(hidden, weight, bias, target, temperature, call)
    check_tensors(hidden.device, ("logits", logits, call.logits, logits.shape))
    least = (hidden.shape[0], weight.shape[0])
    if logits.dim() != 2 or logits.shape[0] < least[0] or logits.shape[1] < least[1]:
        raise ValueError(f"logits: expected at least shape {least}, got {tuple(logits.shape)}")


def _check_grads(*arguments: Any) -> None:
    """All arguments of ``linear_tile_grads``."""
    hidden, weight, _bias, target, temperature = arguments[1:6]
    *numbers, state, c, e, again, change, begin, d_hidden, d_weight, d_bias, _, _ = arguments[6:]
    _check_tile(Numbers.of(numbers), *arguments[:6])
    more, dtype, device = again.shape[0] if again.dim() == 1 else 0, temperature.dtype, hidden.device
    check_tensors(device, ("c", c, dtype, target.shape), ("e", e, dtype, target.shape))
    check_state(state, target, temperature, _WANT)
    check_tensors(device, ("again", again, torch.int64, (more,)), ("change", change, dtype, (more,)))
    width = hidden.shape[1:]
    for name, x, shape in (("d_hidden", d_hidden, width), ("d_weight", d_weight, width), ("d_bias", d_bias, ())):
        if x is not None:
            check_floats(name, x, 1 + len(shape), "(n, H)" if shape else "(V,)")
            check_tensors(device, (name, x, x.dtype, (x.shape[0], *shape)))
    own, kept = hidden.shape[0] - more, 0 if d_hidden is None else d_hidden.shape[0]
    if own < 0:
        raise ValueError(f"again: expected at most {hidden.shape[0]} tokens, those of hidden, got {more}")
    if begin < 0 or (d_hidden is not None and begin + own > kept):
        raise ValueError(f"begin: expected 0 to {kept - own}, as d_hidden has {kept} rows, got {begin}")
    for name, x in (("d_weight", d_weight), ("d_bias", d_bias)):
        if x is not None and x.shape[0] < weight.shape[0]:
            raise ValueError(f"{name}: expected at least {weight.shape[0]} rows, got {x.shape[0]}")


def _stats(
    logits: Tensor,  # (≥ n, ≥ V): takes those of the tokens
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H), without padding; it and hidden of the operands' dtype
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (n,)
    temperature: Tensor,  # (1,) or (n,)
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy (2, n) and the state (K, n). ``end``: first global id beyond this rank's shard."""
    *numbers, end = rest
    call = Numbers.of(numbers)
    _check_tile(call, logits, hidden, weight, bias, target, temperature)
    if not call.group:
        check_values(target, temperature, call.row)
    columns = weight.shape[0]
    if logits.is_cpu:  # as linear_tiles.workspace has it; a compiler's buffer has not
        logits[:, columns:] = 0
    z = logits[: hidden.shape[0], :columns]
    multiply(z, hidden, weight.t(), bias)
    found = linear_tiles.state_of_logits(z, target, temperature, call, 0, _WANT)
    return linear_tiles.finished(found, target, temperature, call, _WANT, end)


def _fake_stats(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check_tile(Numbers.of(inputs[6:-1]), *inputs[:6])
    rows, temperature = inputs[1].shape[0], inputs[5]
    return temperature.new_empty((2, rows)), temperature.new_empty((state_rows(_WANT), rows))


def _grads(
    logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, *rest: Any
) -> None:
    """Adds the share of some tokens to the gradients, and writes over their logits.

    First come ``own`` tokens, whose logits are there and which are those from ``begin`` on in ``d_hidden``; then those
    that are made ``again`` (their indices there), ``change`` being what their c has changed by since they were added.
    c and e are those of now. ``adds``: ``d_weight`` holds something; ``summed``: there are several parts.
    """
    _check_grads(logits, hidden, weight, bias, target, temperature, *rest)
    *numbers, state, c, e, again, change, begin, d_hidden, d_weight, d_bias, adds, summed = rest
    if again.numel() and d_hidden is not None and values_are_checked(again):
        lowest, highest = again.aminmax()
        if lowest < 0 or highest >= d_hidden.shape[0]:
            raise IndexError(
                f"again: expected rows of d_hidden, 0 to {d_hidden.shape[0] - 1}, got {lowest} to {highest}"
            )
    call = Numbers.of(numbers)
    columns, n, more = weight.shape[0], hidden.shape[0], again.numel()
    own = n - more
    z = logits[:n, :columns]
    if more:
        multiply(z[own:], hidden[own:], weight.t(), bias)
        made = z[own:].clone()
    silent = c == 0 if e is None else (c == 0) & (e == 0)
    silent |= target == call.row.ignore_index

    def differentiate(of: slice, c: Tensor, e: Tensor | None) -> Tensor:
        run = registry.kernel("token_stats", "token_stats_backward", call.backend, z)
        grad_stats, want = (c[None], LOGPROB) if e is None else (torch.stack([c, e]), _WANT)
        return run(
            grad_stats, z[None, of], target[of], at(temperature, of), state[:, of].contiguous(), call.row, want, True
        )[0].to(hidden.dtype)

    dz = differentiate(slice(0, n), c, e)
    work = None
    if d_hidden is not None:
        out = d_hidden.new_empty(hidden.shape, dtype=d_hidden.dtype if not call.group else temperature.dtype)
        multiply(out, dz, weight)
        if call.group:  # while the head's gradient is computed
            work = dist.all_reduce(out, group=process_group_of(call.group), async_op=True)
    if d_weight is not None or d_bias is not None:
        if more:
            z[own:] = made
            dz[own:] = differentiate(slice(own, n), change, None)
            silent[own:] = change == 0
        if d_weight is not None:
            # as a factor of the head's gradient 0 · NaN would be NaN
            safe = hidden if hidden.is_cpu and not silent.any() else torch.where(silent[:, None], 0, hidden)
            (multiply_add if adds else multiply)(d_weight[:columns], dz.t(), safe)
        if d_bias is not None:
            # torch's sum accumulates in fp32 anyway; told to return it, it first makes an fp32 copy on a CPU
            d_bias[:columns] += dz.sum(0, dtype=d_bias.dtype if summed else None)
    if work is not None:
        work.wait()
    if d_hidden is not None:
        d_hidden[begin : begin + own] = out[:own]
        if more:
            d_hidden[again] = torch.where(change[:, None] != 0, out[own:].to(d_hidden.dtype), d_hidden[again])


register(_library, "linear_tile_stats", _stats, _fake_stats, no_grad=True)
register(_library, "linear_tile_grads", _grads, _check_grads, no_grad=True)

_ops = torch.ops.entropy_kernels
Made = tuple[
    "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"
]  # of hidden, weight, bias; their factor


def gradients(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    numbers: Numbers,
    needs: Needs,
    coefficients: Coefficients,
    size: int,  # most tokens at a time
    grad_buffer: Tensor | None,  # (V, H): the head's gradient is added to it
) -> tuple[Tensor, Tensor, Made]:
    """Loss, metrics, and the gradients of hidden, weight and bias with what they are multiplied by in the end."""
    total, cuts, changes = target.shape[0], coefficients.cuts, coefficients.changes
    summed = size < total  # in fp32, as there may be several parts
    unread = _reading_back_costs(hidden.device)
    rows = None if unread or cuts is not None else kept_rows(target == numbers.row.ignore_index)
    h, labels = picked(rows, hidden, target)
    t = at(temperature, rows)
    p = linear_tiles.problem(h, weight, numbers, needs)
    operand, wide = p.operand, p.wide
    row_parts = linear_tiles.parts_of_sequences(p.rows, size, cuts)
    # fp16 cannot hold a share of a mean over many tokens, and the factor of a GradScaler comes only later
    scale = coefficients.scale if torch.float16 in (operand, p.logits) else None

    d_hidden = torch.empty_like(h, dtype=kept_dtype(h.dtype, wide, False)) if p.need_hidden else None
    d_weight = grad_buffer if scale is None else None
    adds = d_weight is not None
    if p.need_weight and d_weight is None:
        d_weight = torch.empty_like(weight, dtype=kept_dtype(weight.dtype, wide, summed))
        if p.columns < weight.shape[0]:  # padding
            d_weight[p.columns :] = 0
    d_bias = None
    if p.need_bias and bias is not None:
        d_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, wide))

    h, w = h.to(operand), weight[: p.columns].to(operand)
    b = None if bias is None else bias[: p.columns]
    buffer = linear_tiles.workspace(size, p.columns, numbers.logits, h.device)
    stats = temperature.new_empty((2, p.rows))
    logprob, entropy = stats
    state = temperature.new_empty((state_rows(_WANT), p.rows))
    applied, applied_e = torch.zeros_like(logprob), torch.zeros_like(logprob)  # c and e, so far
    held = torch.zeros((), dtype=torch.int64, device=h.device)
    # where their number is not read back, there is room for so many beside those selected
    most_held = HELD_OUT if changes is not None and unread else p.rows

    def see(r: slice) -> None:
        stats[:, r], state[:, r] = _ops.linear_tile_stats(
            buffer, h[r], w, b, labels[r], at(t, r), *numbers.flat, numbers.row.vocab_start + weight.shape[0]
        )

    def add(r: slice, c: Tensor, e: Tensor | None, again: Tensor, change: Tensor) -> None:
        """The tokens ``r`` and those that are made ``again``, by how much their c has changed; c, e: of all tokens."""
        nonlocal adds
        index: Any = r
        if again.shape[0]:
            index = torch.cat([torch.arange(r.start, r.stop, device=h.device), again])
        c, e = c[index], None if e is None else e[index]
        if scale is not None:
            c, e, change = c * scale, None if e is None else e * scale, change * scale
        _ops.linear_tile_grads(
            buffer, h[index], w, b, labels[index], at(t, index), *numbers.flat, state[:, index], c, e, again, change,
            r.start, d_hidden, d_weight, d_bias, adds, summed,
        )  # fmt: skip
        adds = True

    nothing, last = labels.new_empty(0, dtype=torch.int64), row_parts[-1]
    for r in row_parts[:-1]:
        see(r)
        c, e, huge = coefficients.predicted(r if rows is None else rows[r], logprob[r], entropy[r])
        if changes != 0:
            finite = torch.isfinite(c)
            count = held + (huge & finite).cumsum(0)
            held = count[-1]
            c = torch.where(finite & ~(huge & (count <= most_held)), c, 0)
        applied[r] = c
        if e is not None:
            applied_e[r] = e
        add(r, applied, None if e is None else applied_e, nothing, applied[:0])
    see(last)

    loss, metrics, c, e, factor = coefficients.final(spread(rows, logprob, total), spread(rows, entropy, total))
    c, e = picked(rows, c, e)
    again, change = nothing, applied[:0]
    if changes != 0 and len(row_parts) > 1:
        again, change = _changed(c[: last.start], applied[: last.start], changes)
    room = size - (last.stop - last.start)
    add(last, c, e, again[:room], change[:room])
    while room < again.shape[0]:
        add(slice(last.stop, last.stop), c, e, again[room : room + size], change[room : room + size])
        room += size

    if d_hidden is not None:
        if changes and unread:  # more than there was room for? Then the gradient is not finite, and is to show it
            d_hidden.masked_fill_(~torch.isfinite(c)[:, None], float("nan"))
        d_hidden = spread(rows, d_hidden, total)
    if grad_buffer is not None:
        if scale is not None and d_weight is not None:
            grad_buffer.addcdiv_(d_weight, scale)
        d_weight = None
    if scale is not None:
        factor = 1 / scale if factor is None else factor / scale
    return loss, metrics, (d_hidden, d_weight, d_bias, factor)


def agreed(
    size: int, target: Tensor, temperature: Tensor, numbers: Numbers, in_common: dict[str, Any],
    tensors: dict[str, Tensor | None],
) -> int:  # fmt: skip
    """The least ``size`` of all ranks: shards may be unequal, and the ranks merge the statistics of each part.

    One read back; what else the ranks have in common goes along, so that all of them refuse it before the work:
    ``in_common`` as in :mod:`entropy_kernels._agreement`, and the ``tensors``, whose names are the same on all ranks.
    """
    if not numbers.group:
        return size
    device = target.device
    known = temperature.expand(target.shape)
    known = known.masked_fill(target == numbers.row.ignore_index, 0)
    labels = {"target": target, "temperature": known.view(torch.int32 if known.element_size() == 4 else torch.int64)}
    sums = {name: agreement.sums(x, device) for name, x in {**labels, **tensors}.items()}
    options = agreement.sent(in_common, device)
    unknown = options.isnan()
    head = int64s([*common_options(numbers.row), target.numel()], device)
    local = torch.cat([head, *sums.values()])
    options = options.view(torch.int64)
    # ~ turns the order around, as - would; what is not known is beyond all numbers, and never the least
    both = [torch.where(unknown, _LARGEST, x) for x in (options, ~options)]
    packed = torch.cat([int64s([size], device), local, both[0], ~local, both[1]])
    dist.all_reduce(packed, dist.ReduceOp.MIN, group=process_group_of(numbers.group))
    least, *rest = packed.tolist()
    low, high = rest[: len(rest) // 2], [~x for x in rest[len(rest) // 2 :]]
    refuse_options([low[:3], high[:3]])
    if low[3] != high[3]:
        raise ValueError(
            f"target: expected the same number of tokens on all ranks of the vocab_group, got {low[3]} and {high[3]}"
        )
    first = len(local)
    for column, (a, b) in enumerate(zip(low[first:], high[first:], strict=True)):
        if a < b:
            values = [struct.unpack("<d", struct.pack("<q", x))[0] for x in (a, b)]
            agreement.refuse(in_common, column, values, "vocab_group")
    for i, name in enumerate(sums):
        value = tensors.get(name)
        noise = agreement.NOISE if value is not None and value.is_floating_point() else 0
        if max(high[j] - low[j] for j in (4 + 2 * i, 5 + 2 * i)) > noise:
            raise ValueError(f"{name}: expected the same on all ranks of the vocab_group, got others on some")
    return least


_LARGEST = torch.iinfo(torch.int64).max


def _reading_back_costs(device: torch.device) -> bool:
    return device.type != "cpu" or traced()


def _changed(final: Tensor, applied: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Indices of the tokens whose coefficient is another one, beyond rounding, and by how much.

    On a GPU always ``most`` of them, if known, so that nothing is read back: some may change by 0. Those that are not
    finite come first, because then the gradient is to say so.
    """
    change = final - applied
    changed = ~(change.abs() <= 16 * torch.finfo(change.dtype).eps * applied.abs())  # NaN: changed
    if not _reading_back_costs(change.device) or (most is None and not traced()):
        index = changed.nonzero()[:, 0]
        return index, change[index]
    size = torch.where(changed, change.abs().nan_to_num(nan=float("inf")), -1)
    index = size.topk(size.shape[0] if most is None else min(most, size.shape[0])).indices
    return index, torch.where(changed, change, 0)[index]


class _LinearPolicyLoss(torch.autograd.Function):
    """Gives a loss the gradients that were made with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: Tensor, buffered: bool, *made: Any
    ) -> Tensor:  # fmt: skip
        # Not among the saved tensors: they are the backward pass itself, and are handed out once
        ctx.made, ctx.buffered = made, buffered
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(f"{_NAME}: double backward (create_graph=True) is not supported")
        if ctx.made is None:
            raise RuntimeError(
                f"{_NAME}: its gradients were made in the forward pass and handed out by the first backward pass; for "
                "a second one (retain_graph=True) call the function again"
            )
        (*made, factor), ctx.made = ctx.made, None
        if ctx.buffered:
            _check_factor(upstream)
        if factor is not None:
            upstream = upstream * factor
        found = [
            None if gradient is None else _scaled(gradient, upstream, dtype)
            for gradient, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        return (*found, *(None,) * 6)


def _check_factor(upstream: Tensor) -> None:
    message = (
        "grad_buffer: expected a loss that is differentiated as it is, because the head's gradient is in the buffer "
        "since the forward pass; scale it by dp_size, batch_num_tokens, global_batch_size or loss_scale_factor instead "
        "of multiplying the loss"
    )
    if upstream.device.type != "cpu" or type(upstream) is not Tensor or torch.compiler.is_compiling():
        assert_async(upstream == 1, message)
    elif upstream.item() != 1:
        raise RuntimeError(f"{message}; got a factor of {upstream.item()}")


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient`` · ``factor``, rounded to ``dtype`` once; in the same memory where that does."""
    if type(gradient) is not Tensor or torch.compiler.is_compiling():  # a compiler plans memory by itself
        return (gradient * factor).to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if out is gradient and factor.device.type == "cpu" and factor.item() == 1:
        return out
    if factor.is_cuda:  # a GPU rounds a 0-d tensor to the other operand's dtype first; one with dimensions it does not
        factor = factor.view([1] * gradient.dim())
    return torch.mul(gradient, factor, out=out)


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor, numbers: Numbers,
    needs: Needs, coefficients: Coefficients, size: int, grad_buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, whose backward pass hands out what :func:`gradients` made, and its metrics."""
    if not traced():
        refuse_transforms(_NAME, *(x for x in (hidden, weight, bias) if x is not None))
        # of all tokens, before anything is added to a buffer
        check_values(target, temperature, numbers.row)
    with torch.no_grad(), linear_tiles.without_autocast(hidden):
        loss, metrics, made = gradients(
            hidden, weight, bias, target, temperature, numbers, needs, coefficients, size, grad_buffer
        )
    return _LinearPolicyLoss.apply(hidden, weight, bias, loss, grad_buffer is not None, *made), metrics
