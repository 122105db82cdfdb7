"""``entropy_kernels::linear_policy_loss``: a loss whose gradients are made in the forward pass, with three products.

The tokens are taken in parts: logits of a part, its statistics, the gradient written over its logits, its share of all
gradients. A loss that selects tokens of the whole batch knows which only when it has seen all of them. So a part's
gradients are made with the coefficients c = ∂loss/∂logprob and e = ∂loss/∂entropy that its tokens have if they are
*not* selected, and when the selection has changed a few tokens' c to c', their logits are made again and

    Σ (c' - c) · uᵀ h,    u = (onehot - p) / T, the derivative of the log-prob by the logits,

is added to the head's gradient (a product over those tokens alone), while their own hidden states' gradient is computed
anew from c' and e. Nothing is scaled: e stays what it was, and c may have been 0.

c would cancel badly where it is huge, and not at all where it is not finite. Such a token is held out (its c is taken
as 0 at first) and is added when c' is known; where that is 0, nothing is left to do.

The operator knows of the loss a description, in a string, and tensors; entropy_kernels/losses/linear.py makes the
:class:`Coefficients` of them. It returns the loss, its metrics, the gradients of hidden, weight and bias (empty where
not needed) and what they are multiplied by (empty: nothing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_kernels._arguments import process_group_of, refuse_functional_grad
from entropy_kernels.backends import registry
from entropy_kernels.backends.eager.softmax_state import ENTROPY, LOGPROB, state_rows
from entropy_kernels.ops import linear_tiles
from entropy_kernels.ops.linear_plan import HELD_OUT, Problem, kept_dtype
from entropy_kernels.ops.linear_tiles import Needs, Numbers, at, kept_rows, parts, picked, spread
from entropy_kernels.ops.linear_token_stats import INPUTS, NUMBERS
from entropy_kernels.ops.products import multiply, multiply_add
from entropy_kernels.ops.token_stats import check_values

_NAME = "linear_policy_loss"


class Coefficients(Protocol):
    """What a loss is to this op. Tokens are flat; a coefficient is ∂loss/∂logprob (c) or ∂loss/∂entropy (e, or None).

    ``changes``: upper bound of how many tokens have another c than predicted; None: it is counted, which costs a GPU a
    sync.
    """

    changes: int | None

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """The loss, 0-d, and its metrics, in one tensor; after ``final``."""

    @property
    def scale(self) -> Tensor:
        """0-d, a power of 2: coefficients × scale are about as large as the advantages."""

    def predicted(self, rows: Any, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """c, e and which c are huge, of the tokens ``rows`` (a slice or indices) if none of them is selected."""

    def final(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """c and e of all tokens."""


LossOf = Callable[[str, "list[Tensor | None]"], Coefficients]


def _same(value: Tensor) -> Tensor:
    return value


@contextlib.contextmanager
def _differentiating() -> Iterator[None]:
    """Autograd works inside, as the loss needs it, though this op runs below autograd.

    The caller's hooks on saved tensors are not for this graph: those of a checkpoint would run this very call again.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad(), hooks:
        for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
            torch._C._dispatch_tls_set_dispatch_key_excluded(getattr(torch._C.DispatchKey, name), False)
        yield


class _Sums:
    """The gradients as they grow, part by part."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, p: Problem, group: str, summed: bool,
        buffer: Tensor | None, scale: Tensor | None,
    ) -> None:  # fmt: skip
        self.group = process_group_of(group) if group else None
        self.waiting: list[tuple[Any, Tensor, Callable[[Tensor], None]]] = []
        wide = p.wide
        self.hidden = torch.empty_like(hidden, dtype=kept_dtype(hidden.dtype, wide, False)) if p.need_hidden else None
        self.product = wide if group else None
        self.summed, self.buffer, self.scale = summed, buffer, scale
        self.weight = buffer if scale is None else None
        self.started = self.weight is not None
        if p.need_weight and self.weight is None:
            self.weight = torch.empty_like(weight, dtype=kept_dtype(weight.dtype, wide, summed))
            self.weight[p.columns :] = 0  # padding
        self.columns = p.columns
        self.bias = None
        if p.need_bias and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, wide))

    def add_hidden(self, dz: Tensor, weight: Tensor, write: Callable[[Tensor], None]) -> None:
        """``write`` gets dz @ weight, in the end."""
        assert self.hidden is not None
        out = self.hidden.new_empty((dz.shape[0], weight.shape[1]), dtype=self.product)
        multiply(out, dz, weight)
        if self.group is None:
            write(out)
        else:  # while the head's gradient is computed
            self.waiting.append((dist.all_reduce(out, group=self.group, async_op=True), out, write))

    def add_head(self, dz: Tensor, hidden: Tensor) -> None:
        if self.weight is not None:
            (multiply_add if self.started else multiply)(self.weight[: self.columns], dz.t(), hidden)
            self.started = True
        if self.bias is not None:
            # torch's sum accumulates in fp32 anyway; told to return it, it first makes an fp32 copy on a CPU
            self.bias[: self.columns] += dz.sum(0, dtype=self.bias.dtype if self.summed else None)

    def finish(self) -> None:
        for work, out, write in self.waiting:
            work.wait()
            write(out)
        if self.buffer is None:
            return
        if self.scale is not None and self.weight is not None:
            self.buffer.addcdiv_(self.weight, self.scale)
        self.weight = None


def gradients(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    temperature: Tensor,  # (1,) or (N,)
    numbers: Numbers,
    needs: Needs,
    coefficients: Coefficients,
    part: int,  # most tokens at a time
    grad_buffer: Tensor | None,  # (V, H): the head's gradient is added to it
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, and their scale; see the head of this file."""
    total = target.numel()
    rows = kept_rows(target == numbers.ignore_index)
    h, labels = picked(rows, hidden, target)
    t = at(temperature, rows)
    p = linear_tiles.problem(h, weight, numbers, needs)
    changes, on_cpu = coefficients.changes, h.device.type == "cpu"
    size = _agreed(part, numbers.group, h.device)
    row_parts = parts(p.rows, size)
    # fp16 cannot hold a share of a mean over many tokens, and the factor of a GradScaler comes only later
    scale = coefficients.scale if p.scaled else None
    sums = _Sums(h, weight, bias, p, numbers.group, size < total, grad_buffer, scale)
    h = h.to(p.operand)
    w = weight[: p.columns].to(p.operand)
    b = None if bias is None else bias[: p.columns]
    buffer = linear_tiles.workspace(size, p.columns, numbers.logits, h.device)[:, : p.columns]

    want = LOGPROB | ENTROPY
    logprob, entropy = temperature.new_empty((2, p.rows)).unbind()
    state = temperature.new_empty((state_rows(want), p.rows))
    applied, applied_e = torch.zeros_like(logprob), torch.zeros_like(logprob)  # c and e, so far
    held = torch.zeros((), dtype=torch.int64, device=h.device)
    # where their number is not read back, there is room for so many beside those selected
    most_held = HELD_OUT if changes is not None and _reading_back_costs(h.device) else p.rows

    def differentiate(z: Tensor, index: Any, c: Tensor, e: Tensor | None) -> Tensor:
        """The gradient of the logits ``z`` of the tokens ``index``, over them."""
        if scale is not None:
            c, e = c * scale, None if e is None else e * scale
        run = registry.kernel("token_stats", "token_stats_backward", numbers.backend, z)
        return run(
            c, e, None, z[None], labels[index], at(t, index), state[:, index].contiguous(), numbers.softcap,
            numbers.ignore_index, numbers.vocab_start, numbers.vocab_size, True,
        )[0].to(p.operand)  # fmt: skip

    def safe(index: Any, silent: Tensor) -> Tensor:
        """Hidden states as a factor of the head's gradient: 0 · NaN would be NaN."""
        own = h[index]
        return own if on_cpu and not silent.any() else torch.where(silent[:, None], 0, own)

    def add(r: slice, z: Tensor, c: Tensor, e: Tensor | None, again: Tensor, change: Tensor) -> None:
        """The tokens ``r``, whose logits are ``z[: r.stop - r.start]``, and those that are made ``again``, after them.

        c, e: of all N tokens; change (len(again),): c' - c of the latter.
        """
        own = r.stop - r.start
        both = own + again.numel()
        z = z[:both]
        index: Any = r
        if again.numel():
            multiply(z[own:], h[again], w.t(), b)
            index = torch.cat([torch.arange(own, device=h.device) + r.start, again])
            logits = z[own:].clone()
        part_c, part_e = c[index], None if e is None else e[index]
        silent = part_c == 0 if part_e is None else (part_c == 0) & (part_e == 0)
        silent = silent | (labels[index] == numbers.ignore_index)
        dz = differentiate(z, index, part_c, part_e)
        if needs[0]:

            def write(out: Tensor) -> None:
                assert sums.hidden is not None
                sums.hidden[r] = out[:own]
                if again.numel():
                    new = torch.where(change[:, None] != 0, out[own:].to(sums.hidden.dtype), sums.hidden[again])
                    sums.hidden[again] = new

            sums.add_hidden(dz, w, write)
        if not (needs[1] or needs[2]):
            return
        if again.numel():
            z[own:] = logits
            dz[own:] = differentiate(z[own:], again, change, None)
            silent = torch.cat([silent[:own], change == 0])
        sums.add_head(dz, safe(index, silent))

    nothing = labels.new_empty(0, dtype=torch.int64)
    for r in row_parts:
        z = buffer[: r.stop - r.start]
        multiply(z, h[r], w.t(), b)
        found = linear_tiles.state_of_logits(z, labels[r], at(t, r), numbers, 0, want)
        (logprob[r], entropy[r], _, _), state[:, r] = linear_tiles.finished(
            found, labels[r], at(t, r), numbers, want, numbers.vocab_start + weight.shape[0]
        )
        if r is row_parts[-1]:
            break
        with _differentiating():
            c, e, huge = coefficients.predicted(r if rows is None else rows[r], logprob[r], entropy[r])
        if changes != 0:
            finite = torch.isfinite(c)
            count = held + (huge & finite).cumsum(0)
            held = count[-1]
            c = torch.where(finite & ~(huge & (count <= most_held)), c, 0)
        applied[r] = c
        if e is not None:
            applied_e[r] = e
        add(r, buffer, applied, None if e is None else applied_e, nothing, applied[:0])

    with _differentiating():
        c, e = coefficients.final(spread(rows, logprob, total), spread(rows, entropy, total))
    c, e = picked(rows, c, e)
    last = row_parts[-1]
    again, change = nothing, applied[:0]
    if changes != 0 and last.start > 0:
        again, change = _changed(c[: last.start], applied[: last.start], changes)
    room = size - (last.stop - last.start)
    add(last, buffer, c, e, again[:room], change[:room])
    end = slice(last.stop, last.stop)
    for begin in range(room, again.numel(), size):
        add(end, buffer, c, e, again[begin : begin + size], change[begin : begin + size])
    sums.finish()
    if sums.hidden is not None:
        if changes and _reading_back_costs(h.device):
            # More than there was room for? Then the gradient is not finite, and is to show it
            sums.hidden.masked_fill_(~torch.isfinite(c)[:, None], float("nan"))
        sums.hidden = spread(rows, sums.hidden, total)
    if sums.weight is not None:  # another rank may have asked for more parts than this one
        sums.weight = sums.weight.to(kept_dtype(weight.dtype, p.wide, part < total))
    return sums.hidden, sums.weight, sums.bias, scale


def _agreed(size: int, group: str, device: torch.device) -> int:
    """The least of all ranks: shards may be unequal, and the ranks merge the statistics of each part. One read back."""
    if not group:
        return size
    least = torch.tensor(size, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=process_group_of(group))
    return int(least.item())


def _reading_back_costs(device: torch.device) -> bool:
    return device.type != "cpu"


def _changed(final: Tensor, applied: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Indices of the tokens whose coefficient is another one, beyond rounding, and by how much.

    On a GPU always ``most`` of them, if known, so that nothing is read back: some may change by 0. Those that are not
    finite come first, because then the gradient is to say so.
    """
    change = final - applied
    changed = ~(change.abs() <= 16 * torch.finfo(change.dtype).eps * applied.abs())  # NaN: changed
    if most is None or not _reading_back_costs(change.device):
        index = changed.nonzero()[:, 0]
        return index, change[index]
    size = torch.where(changed, change.abs().nan_to_num(nan=float("inf")), -1)
    index = size.topk(min(most, size.numel())).indices
    return index, torch.where(changed, change, 0)[index]


_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_library.define(
    f"linear_policy_loss({INPUTS}, Tensor?[] tokens, Tensor(a!)? grad_buffer, {NUMBERS}, SymInt part, str loss, "
    "int metrics, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor loss, Tensor metrics, Tensor, Tensor, "
    "Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_makers: list[LossOf] = []


def register_loss(maker: LossOf) -> None:
    """The losses lie above the ops, and enter what makes them here."""
    _makers[:] = [maker]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor,
    tokens: list[Tensor | None], grad_buffer: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *numbers, part, loss, _, need_hidden, need_weight, need_bias = rest
    call = Numbers(*numbers)
    check_values(target, temperature, call.ignore_index, call.vocab_size)
    coefficients = _makers[0](loss, tokens)
    needs = (need_hidden, need_weight, need_bias)
    with linear_tiles.without_autocast(hidden):
        made = gradients(hidden, weight, bias, target, temperature, call, needs, coefficients, part, grad_buffer)
    if grad_buffer is not None:
        torch.autograd.graph.increment_version(grad_buffer)
    nothing = hidden.new_empty(0)
    return (*coefficients.result, *(nothing if x is None else x for x in made))


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor,
    tokens: list[Tensor | None], grad_buffer: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *numbers, part, _, metrics, need_hidden, need_weight, need_bias = rest
    p = linear_tiles.problem(hidden, weight, Numbers(*numbers), (need_hidden, need_weight, need_bias))
    wide, summed = p.wide, part < hidden.shape[0]

    def like(value: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(0) if value is None or not needed else torch.empty_like(value, dtype=dtype)

    return (
        temperature.new_empty(()),
        temperature.new_empty(metrics),
        like(hidden, need_hidden, kept_dtype(hidden.dtype, wide, False)),
        like(weight, need_weight and grad_buffer is None, kept_dtype(weight.dtype, wide, summed)),
        like(bias, need_bias, hidden.dtype if bias is None else torch.promote_types(bias.dtype, wide)),
        temperature.new_empty(()) if p.scaled else hidden.new_empty(0),
    )


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = linear_policy_loss(*inputs)
        # Not among the saved tensors: they are the backward pass itself, and are handed out once
        ctx.made = outputs[2:]
        ctx.inputs = len(inputs)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.buffered = inputs[6] is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(f"{_NAME}: double backward (create_graph=True) is not supported")
        if upstream is None:
            return (None,) * ctx.inputs
        if ctx.made is None:
            raise RuntimeError(
                f"{_NAME}: its gradients were made in the forward pass and handed out by the first backward pass; for "
                "a second one (retain_graph=True) call the function again"
            )
        (*made, scale), ctx.made = ctx.made, None
        if ctx.buffered:
            _check_factor(upstream)
        if scale.numel():
            upstream = upstream / scale
        found = [
            _scaled(gradient, upstream, dtype) if need else None
            for gradient, dtype, need in zip(made, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        ]
        if ctx.buffered:
            found[1] = None
        return (*found, *(None,) * (ctx.inputs - 3))


def _check_factor(upstream: Tensor) -> None:
    message = (
        "grad_buffer: expected a loss that is differentiated as it is, because the head's gradient is in the buffer "
        "since the forward pass; scale it by dp_size, batch_num_tokens, global_batch_size or loss_scale_factor instead "
        "of multiplying the loss"
    )
    if upstream.device.type != "cpu" or type(upstream) is not Tensor or torch.compiler.is_compiling():
        torch._assert_async(upstream == 1, message)
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


def _autograd(*inputs: Any) -> tuple[Tensor, ...]:
    tensors = [x for x in inputs[:3] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse_functional_grad("linear_policy_loss", *tensors)
        return _LinearPolicyLoss.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_policy_loss(*inputs)


_library.impl("linear_policy_loss", _forward, "CompositeExplicitAutograd")
_library.impl("linear_policy_loss", _autograd, "Autograd")
torch.library.register_fake("entropy_kernels::linear_policy_loss", _fake, lib=_library)

linear_policy_loss = torch.ops.entropy_kernels.linear_policy_loss.default
