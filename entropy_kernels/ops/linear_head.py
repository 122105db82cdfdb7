"""Statistics from hidden states through a head that is a module or a function, a tile of its logits at a time.

For heads that are no plain weight: LoRA-wrapped, quantised, computed. Not an operator of torch.library, whose schemas
know tensors only; compiled code breaks its graph here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import check_tensor, recorded, refuse_mapped, refuse_transforms
from entropy_kernels._rows import DIFFERENTIABLE
from entropy_kernels._torch import not_compiled
from entropy_kernels.backends import registry
from entropy_kernels.backends.eager.softmax_state import no_gradient
from entropy_kernels.ops import linear_tiles
from entropy_kernels.ops.linear_plan import head_tile
from entropy_kernels.ops.linear_tiles import Numbers, at, kept_rows, parts, picked, spread
from entropy_kernels.ops.products import accumulator
from entropy_kernels.ops.token_stats import check_values

_NAME = "linear_logprob_entropy / linear_token_stats"
_WRITES = (
    "weight: expected a head whose call writes neither to its argument nor to its buffers, since it is called once per "
    "tile and again in the backward pass, got one that does; eval mode stops those of spectral_norm and its like, "
    "else take the logits themselves"
)
_REENTRANT = (
    "weight: expected a head whose gradients torch.autograd.grad can ask for, got one with a reentrant checkpoint; "
    "give use_reentrant=False to torch.utils.checkpoint.checkpoint, or leave it out: the logits are computed "
    "again in the backward pass anyway"
)


@dataclass
class Head:
    """``function(hidden)`` gives all logits of some tokens or, with ``sliced``, ``function(hidden, start, stop)`` some.

    ``parameters`` are the tensors, beside the hidden states, that it uses and that gradients flow to; ``sources`` the
    same, or what each of them is a detached view of.
    """

    function: Callable
    sliced: bool
    vocab: int
    parameters: list[Tensor]
    sources: list[Tensor]
    logits: torch.dtype | None  # that its result is rounded to

    def __call__(self, hidden: Tensor, columns: slice) -> Tensor:
        before = self._written(hidden)
        try:
            z = self.function(hidden, columns.start, columns.stop) if self.sliced else self.function(hidden)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" in str(error):
                raise ValueError(_WRITES) from error
            others = {p.dtype for p in self._tensors("parameters") if p.is_floating_point()} - {hidden.dtype}
            if "dtype" not in str(error) or not others:
                raise
            raise TypeError(
                f"weight: expected a head that takes hidden's dtype, {hidden.dtype}, got one with parameters of "
                f"{', '.join(map(str, others))}, whose product fails; cast one of the two, have the head cast its "
                f"argument, or call under torch.autocast ({error})"
            ) from error
        if self._written(hidden) != before:
            raise ValueError(_WRITES)
        shape = (hidden.shape[0], columns.stop - columns.start)
        if isinstance(z, Tensor):
            check_tensor("weight: the head's logits", z)
        if not isinstance(z, Tensor) or z.shape != shape or not z.is_floating_point():
            got = f"{tuple(z.shape)} of {z.dtype}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"weight: expected the head to return floating-point logits of shape {shape}, got {got}")
        if self.logits is not None:
            z = z.to(self.logits)
        if (z.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(f"weight: expected the head to return logits for {hidden.dtype} states, got {z.dtype}")
        return z

    def _tensors(self, kind: str) -> Iterable[Tensor]:
        """Parameters or buffers of a module, or of what goes for one."""
        found = getattr(self.function, kind, ())
        return found() if callable(found) else found

    def _written(self, hidden: Tensor) -> list[tuple[int, int]]:
        """Changes where something is written to them; tensors of inference mode do not tell."""
        tensors = [hidden, *self._tensors("buffers")]
        return [(id(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]


class _State:
    """Random numbers and autocast as they are now, for a second run that must equal the first (dropout)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        devices = [self.device] if self.cuda is not None else []
        enabled, dtype = self.autocast
        with torch.random.fork_rng(devices=devices), torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def _gradients(z: Tensor, wanted: Sequence[Tensor], dz: Tensor) -> list[Tensor | None]:
    try:
        return list(torch.autograd.grad(z, wanted, dz, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(f"{_REENTRANT} ({error})") from error


def _check_leaves(z: Tensor, known: Sequence[Tensor]) -> None:
    """No gradient would be dropped without a word: every leaf behind ``z`` is among the parameters."""
    names = {id(parameter) for parameter in known}
    seen, queue = set(), [z.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in names:
            raise ValueError(
                "weight: expected a head whose parameters() yields every tensor that needs a gradient, got one that "
                f"uses another, of shape {tuple(leaf.shape)}; a function needs an attribute `parameters`, and a module "
                "that makes them in its call (FSDP1, offloaded weights) serves under torch.no_grad() only"
            )
        queue += [edge[0] for edge in node.next_functions]


class _HeadTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, numbers: Numbers, want: int, hidden: Tensor, target: Tensor, temperature: Tensor,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        total = target.numel()
        rows = kept_rows(target == numbers.row.ignore_index)
        h, labels = picked(rows, hidden, target)
        t = at(temperature, rows)
        ctx.cut = head_tile(h.shape[0], head.vocab, head.sliced, accumulator(h.dtype), h.device.type, numbers.budget)
        row_parts, column_parts = parts(h.shape[0], ctx.cut[0]), parts(head.vocab, ctx.cut[1])
        states: list[_State] = []
        tracked: list[bool] = []  # False: the head lets no gradient through, as under torch.no_grad()

        def state_of(r: slice, c: slice) -> Tensor:
            if ctx.needs_input_grad[3] or parameters:
                if not states:
                    leaf = h[r][:1].detach().requires_grad_(ctx.needs_input_grad[3])
                    with _State(h.device).again(), torch.enable_grad():
                        z = head(leaf, c)
                    tracked.append(z.requires_grad)
                    _check_leaves(z, [leaf, *head.parameters])
                states.append(_State(h.device))
            return linear_tiles.state_of_logits(head(h[r], c), labels[r], at(t, r), numbers, c.start, want)

        state = linear_tiles.merged(state_of, row_parts if h.shape[0] else [], column_parts, t, want)
        stats, state = linear_tiles.finished(state, labels, t, numbers, want, head.vocab)
        stats = spread(rows, stats, total, 1)
        ctx.save_for_backward(hidden, *recorded(target, temperature), state, *parameters)
        ctx.head, ctx.numbers, ctx.want, ctx.rows, ctx.states = head, numbers, want, rows, states
        if not want & DIFFERENTIABLE or False in tracked:
            ctx.mark_non_differentiable(stats)
        return stats

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(f"{_NAME}: double backward (create_graph=True) is not supported")
        hidden, target, temperature, state = ctx.saved_tensors[:4]
        head, numbers, need_hidden = ctx.head, ctx.numbers, ctx.needs_input_grad[3]
        parameters = head.parameters
        total = target.numel()
        h, labels, upstream = picked(ctx.rows, hidden, target, grad_stats.t())
        grad_stats = upstream.t()
        t = at(temperature, ctx.rows)
        silent = (labels == numbers.row.ignore_index) | no_gradient(grad_stats, ctx.want)
        h = torch.where(silent[:, None], 0, h)  # a row without a gradient may hold NaN, and 0 · NaN is NaN
        row_parts, column_parts = parts(h.shape[0], ctx.cut[0]), parts(head.vocab, ctx.cut[1])
        d_hidden = torch.zeros_like(h, dtype=accumulator(h.dtype))
        sums: list[Tensor | None] = [None] * len(parameters)
        states = iter(ctx.states)
        for r in row_parts if h.shape[0] else []:
            for c in column_parts:
                leaf = h[r].detach().requires_grad_(need_hidden)
                with next(states).again(), torch.enable_grad():
                    z = head(leaf, c)
                wanted = [leaf, *parameters] if need_hidden else parameters
                run = registry.kernel("token_stats", "token_stats_backward", numbers.backend, z)
                dz = run(
                    grad_stats[:, r], z.detach()[None], labels[r], at(t, r), state[:, r].contiguous(),
                    numbers.row.of_part(c.start), ctx.want, False,
                )[0]  # fmt: skip
                found = _gradients(z, wanted, dz) if z.requires_grad else []
                if need_hidden and found:
                    first = found.pop(0)
                    if first is not None:
                        d_hidden[r] += first
                for i, gradient in enumerate(found):
                    if gradient is not None:
                        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                        so_far = sums[i]
                        sums[i] = wide if so_far is None else so_far.add_(wide)
                del z, dz, found
        results = [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        own = spread(ctx.rows, d_hidden.to(hidden.dtype), total) if need_hidden else None
        return (None, None, None, own, None, None, *results)


@not_compiled
def head_token_stats(
    head: Head, hidden: Tensor, target: Tensor, temperature: Tensor, numbers: Numbers, want: int
) -> Tensor:
    """As ``linear_token_stats``'s, through ``head``; hidden (N, H), target (N,), temperature (1,) or (N,)."""
    refuse_mapped({"hidden": hidden, "target": target, "temperature": temperature})
    refuse_transforms(_NAME, hidden, *head.parameters)
    check_values(target, temperature, numbers.row)
    # A Function is told what requires grad, whatever the grad mode; and the head may save its argument
    (hidden,) = recorded(hidden) if torch.is_grad_enabled() else (hidden.detach(),)
    if torch.is_grad_enabled() and not hidden.requires_grad and not head.parameters and target.numel():
        with _State(hidden.device).again():  # a gradient that nobody asked for, and that somebody may miss
            _check_leaves(head(hidden[:1], slice(0, min(head.vocab, 64) if head.sliced else head.vocab)), [])
    return _HeadTokenStats.apply(head, numbers, want, hidden, target, temperature, *head.sources)
