"""The one registry of implementations, the passes that make calls of functions, and what is ours; and rooflines.

An implementation is a factory that takes a case and its inputs and returns the call to be timed, and a function that
says why it cannot run a case. Outputs of a call have the form that the op's check expects (:mod:`benchmarks.checks`).
:mod:`benchmarks.peers` adds the others: torch by hand, and the packages.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks.cases import (
    BAND,
    CLIP_COV_RATIO,
    KL_COV_RATIO,
    LINEAR_LOSSES,
    OPS,
    SEED,
    TOPK,
    BatchShape,
    Case,
    HiddenShape,
    Inputs,
    LogitsShape,
)
from entropy_kernels.backends import registry

# What an implementation computes of its op. A cross-entropy has no entropy: it is timed beside those that have one,
# checked on what it does compute, and its rows say so.
EVERYTHING = ""
LOGPROB = "log-prob only, no entropy"
MEAN_LOGPROB = "mean log-prob only, no entropy, no gradient per token"
GRADIENT = "a policy loss on log-prob, no entropy, log-prob not returned"

Function = Callable[..., Any]
Load = Callable[[Case], Function]
Supports = Callable[[Case], str | None]


@dataclass(frozen=True)
class Prepared:
    """``call`` is timed; ``reset``, run before each call and not timed, restores inputs that the call overwrites.

    ``stated_bytes``: the extra memory that the call's own documentation allows it, results included; None: none stated.
    """

    call: Callable[[], Any]
    reset: Callable[[], None] | None = None
    stated_bytes: int | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``role``: "ours" (held to the strict bound of the check), "peer" (held to the loose one) or "roofline".
    ``supports``: None, or the reason why this case cannot run here.
    ``computes``: EVERYTHING, or what it computes of its op, in words for the tables.
    """

    op: str
    name: str
    role: str
    make: Callable[[Case, Inputs], Prepared]
    supports: Supports
    computes: str = EVERYTHING


REGISTRY: dict[tuple[str, str], Implementation] = {}


def register(implementation: Implementation) -> None:
    """Add an implementation; the same (op, name) twice is an error."""
    key = (implementation.op, implementation.name)
    if implementation.op not in OPS:
        raise ValueError(f"op: expected one of {sorted(OPS)}, got {implementation.op!r}")
    if key in REGISTRY:
        raise ValueError(f"implementation {implementation.name!r} of {implementation.op} is already registered")
    REGISTRY[key] = implementation


def of_op(op: str) -> list[Implementation]:
    """All implementations of an op, in the order of registration."""
    return [implementation for (name, _), implementation in REGISTRY.items() if name == op]


def names() -> list[str]:
    """Names of all implementations, each once."""
    return list(dict.fromkeys(name for _, name in REGISTRY))


# --- reasons not to run a case ----------------------------------------------------------------------------------------


def available_bytes(device: torch.device) -> int:
    """Bytes that a call may take: free memory, on a GPU also what torch's allocator holds and nobody uses."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(case: Case, copies: float) -> str | None:
    """Reason if ``copies`` fp32 tensors of the size of the logits do not fit into the memory that is free."""
    if not isinstance(case.shape, (LogitsShape, HiddenShape)):
        return None
    needed, free = int(copies * case.shape.rows * case.shape.vocab * 4), available_bytes(case.device)
    return (
        f"needs about {needed / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB are free"
        if needed > 0.9 * free
        else None
    )


def always(case: Case) -> str | None:
    """No limit."""
    return None


def room(copies: float, *others: Supports) -> Supports:
    """The first reason of ``others``, or that so many fp32 tensors of the size of the logits do not fit."""
    limits: tuple[Supports, ...] = (*others, functools.partial(fits, copies=copies))
    return lambda case: next((reason for limit in limits if (reason := limit(case)) is not None), None)


def unless(holds: Callable[[Case], bool], reason: str) -> Supports:
    return lambda case: None if holds(case) else reason


ONLY_HALF = unless(lambda case: case.dtype.itemsize == 2, "the same as without it for this dtype")
_NOT_FP64 = unless(lambda case: case.dtype != torch.float64, "its logits would be rounded")
_ONLY_CUDA = unless(lambda case: case.device.type == "cuda", "on a GPU only")

# --- passes: a function of one form becomes the call that is timed ----------------------------------------------------

DIFFERENTIABLE: dict[type, tuple[str, ...]] = {
    LogitsShape: ("logits",),
    BatchShape: ("logprob",),
    HiddenShape: ("hidden", "weight"),
}
# The upstream gradients of a forward's outputs, in their order; an output that nothing flows into is not listed.
UPSTREAM = ("grad_logprob", "grad_entropy")
POLICY = ("old_logprob", "advantages", "mask")


def _leaves(case: Case, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE[type(case.shape)]]


def _upstream(outputs: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    return [inputs[name].to(output.dtype) for name, output in zip(UPSTREAM, outputs, strict=False)]


def forward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The outputs of ``function(logits, target)`` or ``function(hidden, weight, target)`` without a gradient."""
    function, arguments = load(case), [inputs[name] for name in (*DIFFERENTIABLE[type(case.shape)], "target")]

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*arguments)

    return Prepared(call)


def forward_backward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The outputs (log-prob, and entropy if there is one), then the gradients, as new tensors."""
    function, upstream = load(case), list[Tensor]()

    def call() -> Sequence[Tensor]:
        leaves = _leaves(case, inputs)
        outputs = function(*leaves, inputs["target"])
        if outputs[0].ndim == 0:  # a mean: its loss is minus it
            return outputs[0].detach(), *torch.autograd.grad(-outputs[0], leaves)
        if not upstream:  # casts of the upstream gradients are the loss's work: the first, checked call pays for them
            upstream.extend(_upstream(outputs, inputs))
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        return *(output.detach() for output in outputs), *gradients

    return Prepared(call)


def backward(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The gradient alone: the graph is made once, outside the clock, and retained."""
    import torch._functorch.config  # by itself it is loaded with the compiler only

    function, leaves = load(case), _leaves(case, inputs)
    # a compiled backward pass frees what its forward saved unless told that it will be asked again
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = function(*leaves, inputs["target"])
    upstream = _upstream(outputs, inputs)
    return Prepared(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))


def on_a_copy(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """:func:`forward_backward` of what writes over its logits: of a copy, refilled, untimed, before every call."""
    copy = inputs["logits"].clone()
    prepared = forward_backward(load, case, {**inputs, "logits": copy})

    def reset() -> None:
        copy.copy_(inputs["logits"])

    return Prepared(prepared.call, reset)


def tokens(load: Load, arguments: tuple[str, ...], case: Case, inputs: Inputs) -> Prepared:
    """A function of some of the inputs of a batch of tokens."""
    function, tensors = load(case), [inputs[argument] for argument in arguments]
    return Prepared(lambda: function(*tensors))


def loss(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """A loss, or (loss, metrics), of (logprob, old_logprob, advantages, mask), with its gradient.

    From hidden states: of (hidden, weight, target, old_logprob, advantages, mask), with both gradients.
    """
    names = ("target", *POLICY) if isinstance(case.shape, HiddenShape) else POLICY
    function, rest = load(case), [inputs[name] for name in names]

    def call() -> Sequence[Tensor]:
        leaves = _leaves(case, inputs)
        value = function(*leaves, *rest)
        value = value[0] if isinstance(value, tuple) else value
        return value.detach(), *torch.autograd.grad(value, leaves)

    return Prepared(call)


BOTH = "linear_logprob_entropy_fwdbwd"
PASSES: dict[str, Callable[[Load, Case, Inputs], Prepared]] = {
    "logprob_entropy": forward,
    "logprob_entropy_bwd": backward,
    "logprob_entropy_fwdbwd": forward_backward,
}
LINEAR_PASSES: dict[str, Callable[[Load, Case, Inputs], Prepared]] = {
    "linear_logprob_entropy": forward,
    BOTH: forward_backward,
}


def add(
    op: str,
    name: str,
    role: str,
    make: Callable[[Load, Case, Inputs], Prepared],
    load: Load | Function,
    supports: Supports = always,
    computes: str = EVERYTHING,
) -> None:
    """Register ``make``, a pass, of what ``load`` gives for a case."""
    register(Implementation(op, name, role, functools.partial(make, load), supports, computes))


def plain(function: Function) -> Load:
    """The function itself, whatever the case."""
    return lambda case: function


# --- ours -------------------------------------------------------------------------------------------------------------

OURS = {f"ours-{backend}": backend for backend in registry.BACKENDS}
SELECTION: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "token_covariance": (("logprob", "advantages", "mask"), {}),
    "clip_cov_mask": (("covariance",), {"seed": SEED, "ratio": CLIP_COV_RATIO, "low": BAND[0], "high": BAND[1]}),
    "kl_cov_mask": (("covariance",), {"ratio": KL_COV_RATIO}),
}
LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "policy_loss": {"dual_clip": 3.0},  # as verl's vanilla loss has it by default
    "clip_cov_loss": {"preset": "verl", "seed": SEED, "ratio": CLIP_COV_RATIO},
    "kl_cov_loss": {"preset": "verl", "ratio": KL_COV_RATIO},
}


def ours_for(device_type: str) -> str:
    """Name of our implementation that "auto" serves on a device: the one that the targets judge."""
    return f"ours-{registry.resolve('token_stats', 'auto', torch.device(device_type))}"


def _available(function: str, op: str, backend: str, case: Case) -> str | None:
    if getattr(ek, function, None) is None:
        return f"entropy_kernels {ek.__version__} has no {function}"
    if backend in ("cpu", "cuda") and case.device.type != backend:
        return f"runs on {backend} tensors only"
    if backend == "triton" and case.device.type == "cpu":
        return "on the CPU only Triton's interpreter runs, which is for tests"
    return registry.unavailable(op, backend, case.device) if op in registry.OPS and backend != "auto" else None


def _public(function: str, **options: Any) -> Load:
    return lambda case: functools.partial(getattr(ek, function), **options)


def _add_ours() -> None:
    for name, backend in OURS.items():
        supports: Supports = functools.partial(_available, "logprob_entropy", "token_stats", backend)
        for op, make in PASSES.items():
            add(op, name, "ours", make, _public("logprob_entropy", backend=backend), supports)
        inplace = _public("logprob_entropy", backend=backend, inplace_backward=True)
        add("logprob_entropy_fwdbwd", f"{name}-inplace", "ours", on_a_copy, inplace, supports)
        add("token_stats", name, "ours", forward, _public("token_stats", backend=backend), supports)
        # "auto" takes the kernel with the statistics in the product's epilogue where this has found it faster
        supports = functools.partial(_available, "linear_logprob_entropy", "linear_token_stats", backend)
        load = _public("linear_logprob_entropy", backend=backend)
        add("linear_logprob_entropy", name, "ours", forward, load, room(0.0, _ONLY_CUDA, supports))
        for op, (arguments, options) in SELECTION.items():
            load = _public(op, **options, backend=backend)
            supports = functools.partial(_available, op, op, backend)
            make = functools.partial(tokens, load, arguments)
            register(Implementation(op, name, "ours", make, supports))
    for op, options in LOSS_OPTIONS.items():
        # torch's operations, around the selection of a backend where there is one
        backends = OURS if "backend" in inspect.signature(getattr(ek, op)).parameters else {"ours": None}
        for name, chosen in backends.items():
            load = _public(op, **options, **({} if chosen is None else {"backend": chosen}))
            add(op, name, "ours", loss, load, functools.partial(_available, op, "clip_cov_mask", chosen or "auto"))


# --- ours from hidden states ------------------------------------------------------------------------------------------

Budget = Callable[..., int]  # of hidden, weight and the options of the call
ENOUGH = 1 << 50  # bytes: the logits are kept
# Made again in tiles: less than the bf16 logits take where the targets are stated; a GPU's tiles want more
TIGHT = {"cpu": 64 << 20, "cuda": 10**9}
MANY = 4  # tiles along the tokens and along the vocabulary, at least, where the errors of their sums are looked at


def _kept(hidden: Tensor, weight: Tensor, **options: Any) -> int:
    return ENOUGH


def _tight(hidden: Tensor, weight: Tensor, **options: Any) -> int:
    return TIGHT[hidden.device.type]


def tiled(hidden: Tensor, weight: Tensor, **options: Any) -> int:
    """The largest budget, to a few percent, at which tiles are made again and tokens and vocabulary are cut into many.

    The least one if none does.
    """
    budget = ek.linear_plan(hidden, weight, memory_budget=ENOUGH, **options).peak_bytes
    try:
        while True:
            plan = ek.linear_plan(hidden, weight, memory_budget=budget, **options)
            if plan.mode == "recompute" and min(plan.row_chunks, plan.vocab_chunks) >= MANY:
                return budget
            least, budget = budget, int(0.97 * budget)
    except ValueError:  # below the smallest tile
        return least


def result_bytes(op: str, case: Case) -> int:
    """Of log-prob and entropy in fp32, or of a loss, and of the gradients where there are some."""
    shape: Any = case.shape
    gradients = (shape.rows + shape.vocab) * shape.features * case.dtype.itemsize
    return (4 if op in LINEAR_LOSSES else 8 * shape.rows) + (0 if op == "linear_logprob_entropy" else gradients)


def _within(op: str, budget: Budget, options: dict[str, Any], case: Case, inputs: Inputs) -> Prepared:
    """Our function within a memory budget; it states the memory of its plan."""
    planned: dict[str, Any] = {"policy_loss": True} if op in LINEAR_LOSSES else options
    with torch.set_grad_enabled(op != "linear_logprob_entropy"):
        leaves = _leaves(case, inputs)
        memory = budget(*leaves, **({} if op in LINEAR_LOSSES else options))
        plan = ek.linear_plan(*leaves, memory_budget=memory, **planned)
    function = ek.linear_policy_loss if op in LINEAR_LOSSES else ek.linear_logprob_entropy
    make = loss if op in LINEAR_LOSSES else LINEAR_PASSES[op]
    prepared = make(plain(functools.partial(function, **options, memory_budget=memory)), case, inputs)
    return replace(prepared, stated_bytes=plan.peak_bytes + result_bytes(op, case))


def _composed(hidden: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
    """Logits, then our statistics of them, with the gradient written over them."""
    return ek.logprob_entropy(hidden @ weight.t(), target, inplace_backward=True)


def _composed_loss(op: str, hidden: Tensor, weight: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
    """Our log-prob, then our loss: five operations of the library's in a row."""
    logprob = ek.linear_logprob_entropy(hidden, weight, target, memory_budget=ENOUGH).logprob
    if op == "linear_policy_loss":
        return ek.policy_loss(logprob, *rest).loss
    return ek.clip_cov_loss(logprob, *rest, seed=SEED, ratio=CLIP_COV_RATIO).loss


def _add_ours_from_hidden() -> None:
    fp32: dict[str, Any] = {"logits_dtype": torch.float32}
    clip_cov: dict[str, Any] = {"method": "clip_cov", "seed": SEED, "ratio": CLIP_COV_RATIO}
    rows: list[tuple[str, str, Budget, dict[str, Any], Supports]] = [
        ("linear_logprob_entropy", "ours", _kept, {}, room(2.0)),
        ("linear_logprob_entropy", "ours-fp32-logits", _kept, fp32, room(2.0, ONLY_HALF)),
        (BOTH, "ours", _kept, {}, room(2.0)),
        (BOTH, "ours-fp32-logits", _kept, fp32, room(2.0, ONLY_HALF)),
        (BOTH, "ours-recompute", _tight, {}, room(0.1)),
        (BOTH, "ours-tiles", tiled, fp32, room(0.1, _NOT_FP64)),
    ]
    for op, options in zip(LINEAR_LOSSES, ({"method": "ppo"}, clip_cov), strict=True):
        rows += [(op, "ours", _kept, options, room(1.0)), (op, "ours-parts", _tight, options, room(0.1))]
    for op, name, budget, options, supports in rows:
        register(Implementation(op, name, "ours", functools.partial(_within, op, budget, options), supports))
    for op, make in LINEAR_PASSES.items():
        add(op, "ours-on-logits", "ours", make, plain(_composed), room(1.0))
    for op in LINEAR_LOSSES:
        add(op, "ours-composed", "ours", loss, plain(functools.partial(_composed_loss, op)), room(1.0))


# --- rooflines --------------------------------------------------------------------------------------------------------


def _amax(case: Case, inputs: Inputs) -> Prepared:
    return Prepared(lambda: inputs["logits"].amax(-1))


def _copy(case: Case, inputs: Inputs) -> Prepared:
    destination = torch.empty_like(inputs["logits"])
    return Prepared(lambda: destination.copy_(inputs["logits"]))


def _read(case: Case, inputs: Inputs) -> Prepared:
    """Integer sum over the same bytes: torch's amax is slower than a read for 16-bit types."""
    words = inputs["logits"].view(-1)[: inputs["logits"].numel() * case.dtype.itemsize // 8 * 8 // case.dtype.itemsize]
    words = words.view(torch.int64)
    return Prepared(lambda: words.sum())


def _topk(case: Case, inputs: Inputs) -> Prepared:
    count = min(TOPK, inputs["covariance"].numel())
    return Prepared(lambda: torch.topk(inputs["covariance"], count))


def _products(count: int, case: Case, inputs: Inputs) -> Prepared:
    """The products of the forward pass (1), of both (3), of both with the logits made again (4); results ready."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    logits = hidden @ weight.t()  # (N, V)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> Tensor:
        torch.mm(hidden, weight.t(), out=logits)
        if count == 4:
            torch.mm(hidden, weight.t(), out=logits)
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)
        return logits

    return Prepared(call)


def _one_product(case: Case, inputs: Inputs) -> Prepared:
    """The gradient by the logits in fp32, rounded, then one product for each: what many tiles are judged by."""
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"][:, None]
    into_logprob, into_entropy = (inputs[name][:, None] for name in UPSTREAM)

    def call() -> Sequence[Tensor]:
        logp = torch.log_softmax(hidden.float() @ weight.float().t(), -1)  # (N, V)
        p, logprob = logp.exp(), logp.gather(-1, target)
        entropy = -(p * logp).sum(-1, keepdim=True)
        by_logits = logp.add_(entropy).mul_(into_entropy).add_(into_logprob).mul_(p).neg_()
        by_logits = by_logits.scatter_add_(-1, target, into_logprob).to(case.dtype)
        return logprob[:, 0], entropy[:, 0], by_logits @ weight, by_logits.t() @ hidden

    return Prepared(call)


def _add_rooflines() -> None:
    rows: tuple[tuple[str, str, Callable[[Case, Inputs], Prepared], Supports], ...] = (
        ("logits_roofline", "amax", _amax, always),
        ("logits_roofline", "read", _read, always),
        ("logits_roofline", "copy", _copy, room(1.0)),
        ("tokens_roofline", "topk", _topk, always),
        (BOTH, "one-product", _one_product, room(4.0, ONLY_HALF)),
        ("linear_roofline", "product", functools.partial(_products, 1), always),
        ("linear_roofline", "three products", functools.partial(_products, 3), always),
        ("linear_roofline", "four products", functools.partial(_products, 4), _ONLY_CUDA),
    )
    for op, name, make, supports in rows:
        register(Implementation(op, name, "roofline", make, supports))


_add_rooflines()
_add_ours()
_add_ours_from_hidden()
