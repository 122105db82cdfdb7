"""The one registry of implementations: ours, per backend, and every peer, per op.

An implementation is a factory that takes a case and its inputs and returns the call to be timed, and a function that
says why it cannot run a case. Outputs of a call have the form that the op's check expects (:mod:`benchmarks.checks`).
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import peers
from benchmarks.shapes import BatchShape, Case, Inputs, LogitsShape, TokensShape
from entropy_kernels.backends import registry

# op -> what is timed. "floor" ops are limits of the machine, not rivals.
OPS: dict[str, str] = {
    "logprob_entropy": "log-prob and entropy from logits, no gradient",
    "logprob_entropy_fwdbwd": "log-prob and entropy, and the gradient of both with respect to the logits",
    "token_stats": "log-prob, entropy, collision probability and vocabulary covariance, no gradient",
    "logits_floor": "amax over the vocabulary; reading the logits once (integer sum); copying them",
    "token_covariance": "token-wise covariance of log-prob and advantage, with a mask",
    "clip_cov_mask": "Clip-Cov's tokens: a random n of those in the band",
    "kl_cov_mask": "KL-Cov's tokens: the n of largest covariance",
    "tokens_floor": "torch.topk(covariance, 800)",
    "policy_loss": "PPO's clipped loss and its gradient with respect to log-prob",
    "clip_cov_loss": "Clip-Cov loss (verl's definition), selection included, and its gradient",
    "kl_cov_loss": "KL-Cov loss (verl's definition), selection included, and its gradient",
}
SHAPE_OF: dict[str, type] = {
    **dict.fromkeys(("logprob_entropy", "logprob_entropy_fwdbwd", "token_stats", "logits_floor"), LogitsShape),
    **dict.fromkeys(("token_covariance", "clip_cov_mask", "kl_cov_mask", "tokens_floor"), TokensShape),
    **dict.fromkeys(("policy_loss", "clip_cov_loss", "kl_cov_loss"), BatchShape),
}

# Selected fractions: the library's defaults, the paper's 2e-4 (Clip-Cov) and 2e-3 (KL-Cov).
CLIP_COV_RATIO = 2e-4
KL_COV_RATIO = 2e-3
BAND = (1.0, 5.0)
TOPK = 800
SEED = 1234


@dataclass(frozen=True)
class Prepared:
    """``call`` is timed; ``reset``, run before each call and not timed, restores inputs that the call overwrites."""

    call: Callable[[], Any]
    reset: Callable[[], None] | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``role``: "ours" (held to the strict bound of the check), "peer" (held to the loose one) or "limit".
    ``supports``: None, or the reason why this case cannot run here.
    """

    op: str
    name: str
    role: str
    make: Callable[[Case, Inputs], Prepared]
    supports: Callable[[Case], str | None]


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


# --- limits of a case ------------------------------------------------------------------------------------------------


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(case: Case, copies: float) -> str | None:
    """Reason if ``copies`` fp32 tensors of the size of the logits do not fit into the memory that is free."""
    if not isinstance(case.shape, LogitsShape):
        return None
    needed = int(copies * case.shape.rows * case.shape.vocab * 4)
    free = _available_bytes(case.device)
    if needed > 0.9 * free:
        return f"needs about {needed / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB are free"
    return None


def _always(case: Case) -> str | None:
    return None


# --- forward and backward around any forward function ----------------------------------------------------------------

Forward = Callable[[Tensor, Tensor], Sequence[Tensor]]


def _forward(function: Forward, inputs: Inputs) -> Prepared:
    logits, target = inputs["logits"], inputs["target"]

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return function(logits, target)

    return Prepared(call)


def _forward_backward(function: Forward, inputs: Inputs) -> Prepared:
    logits, target = inputs["logits"], inputs["target"]
    upstream = (inputs["grad_logprob"], inputs["grad_entropy"])

    def call() -> Sequence[Tensor]:
        leaf = logits.detach().requires_grad_()
        logprob, entropy = function(leaf, target)
        gradients = [g.to(o.dtype) for g, o in zip(upstream, (logprob, entropy), strict=True)]
        (gradient,) = torch.autograd.grad([logprob, entropy], [leaf], gradients)
        return logprob.detach(), entropy.detach(), gradient

    return Prepared(call)


def _make_forward(load: Callable[[Case], Forward], case: Case, inputs: Inputs) -> Prepared:
    return _forward(load(case), inputs)


def _make_forward_backward(load: Callable[[Case], Forward], case: Case, inputs: Inputs) -> Prepared:
    return _forward_backward(load(case), inputs)


def _both(supports: Callable[[Case], str | None], copies: float, case: Case) -> str | None:
    return supports(case) or fits(case, copies)


def _register_statistics(
    name: str,
    load: Callable[[Case], Forward],
    supports: Callable[[Case], str | None],
    *,
    copies: float,
    backward_copies: float,
) -> None:
    """Register a peer, alone and with backward; ``copies``: its fp32 temporaries in sizes of the logits."""
    for op, make, size in (
        ("logprob_entropy", _make_forward, copies),
        ("logprob_entropy_fwdbwd", _make_forward_backward, backward_copies),
    ):
        register(
            Implementation(op, name, "peer", functools.partial(make, load), functools.partial(_both, supports, size))
        )


# --- ours ------------------------------------------------------------------------------------------------------------

OURS = {f"ours-{backend}": backend for backend in registry.BACKENDS}


def ours_for(device_type: str) -> str:
    """Name of our implementation that "auto" serves on a device: the one that the bars judge."""
    return f"ours-{registry.resolve('token_stats', 'auto', device_type)}"


def _ours_supports(function: str, op: str, backend: str, case: Case) -> str | None:
    if getattr(ek, function, None) is None:
        return f"entropy_kernels {ek.__version__} has no {function}"
    if backend in ("cpu", "cuda") and case.device.type != backend:
        return f"runs on {backend} tensors only"
    if backend == "triton" and case.device.type == "cpu":
        return "on the CPU only Triton's interpreter runs, which is for tests"
    return registry.unavailable(op, backend) if op in registry.OPS else None


def _ours_function(function: str, options: dict[str, Any], case: Case) -> Callable[..., Any]:
    return functools.partial(getattr(ek, function), **options)


def _inplace(backend: str, case: Case, inputs: Inputs) -> Prepared:
    """Gradient written over the logits: the call works on a copy that is refilled, untimed, before every call."""
    copy = inputs["logits"].clone()
    function = functools.partial(ek.logprob_entropy, backend=backend, inplace_backward=True)
    prepared = _forward_backward(function, {**inputs, "logits": copy})

    def reset() -> None:
        copy.copy_(inputs["logits"])

    return Prepared(prepared.call, reset)


def _tokens(
    load: Callable[[Case], Callable[..., Tensor]], arguments: tuple[str, ...], case: Case, inputs: Inputs
) -> Prepared:
    """A function of some of the inputs of a batch of tokens."""
    function, tensors = load(case), [inputs[argument] for argument in arguments]
    return Prepared(lambda: function(*tensors))


def _loss(function: Callable[..., tuple[Tensor, Any]], inputs: Inputs) -> Prepared:
    """``function(logprob, old_logprob, advantages, mask) -> (loss, metrics)`` with its backward pass."""
    rest = (inputs["old_logprob"], inputs["advantages"], inputs["mask"])

    def call() -> tuple[Tensor, Tensor]:
        leaf = inputs["logprob"].detach().requires_grad_()
        loss, _ = function(leaf, *rest)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    return Prepared(call)


def _make_loss(load: Callable[[Case], Callable[..., tuple[Tensor, Any]]], case: Case, inputs: Inputs) -> Prepared:
    return _loss(load(case), inputs)


_STATISTICS: tuple[tuple[str, str, Callable[..., Prepared]], ...] = (
    ("logprob_entropy", "logprob_entropy", _make_forward),
    ("logprob_entropy_fwdbwd", "logprob_entropy", _make_forward_backward),
    ("token_stats", "token_stats", _make_forward),
)
_SELECTION: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "token_covariance": (("logprob", "advantages", "mask"), {}),
    "clip_cov_mask": (("covariance",), {"seed": SEED, "ratio": CLIP_COV_RATIO, "low": BAND[0], "high": BAND[1]}),
    "kl_cov_mask": (("covariance",), {"ratio": KL_COV_RATIO}),
}
_LOSSES: dict[str, dict[str, Any]] = {
    "policy_loss": {"dual_clip": 3.0},  # as verl's vanilla loss has it by default
    "clip_cov_loss": {"preset": "verl", "seed": SEED, "ratio": CLIP_COV_RATIO},
    "kl_cov_loss": {"preset": "verl", "ratio": KL_COV_RATIO},
}


def _register_ours() -> None:
    for name, backend in OURS.items():
        supports = functools.partial(_ours_supports, "logprob_entropy", "token_stats", backend)
        for op, function, make in _STATISTICS:
            load = functools.partial(_ours_function, function, {"backend": backend})
            register(Implementation(op, name, "ours", functools.partial(make, load), supports))
        inplace = functools.partial(_inplace, backend)
        register(Implementation("logprob_entropy_fwdbwd", f"{name}-inplace", "ours", inplace, supports))
        for op, (arguments, options) in _SELECTION.items():
            load = functools.partial(_ours_function, op, {**options, "backend": backend})
            supports_op = functools.partial(_ours_supports, op, op, backend)
            register(Implementation(op, name, "ours", functools.partial(_tokens, load, arguments), supports_op))
    for op, options in _LOSSES.items():
        # a loss is plain torch around the selection, which picks its own backend
        load = functools.partial(_ours_function, op, options)
        supports_op = functools.partial(_ours_supports, op, op, "auto")
        register(Implementation(op, "ours", "ours", functools.partial(_make_loss, load), supports_op))


# --- plain torch, as it is written by hand ----------------------------------------------------------------------------


def eager_logprob_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax, gather, -Σ p log p, in the dtype of the logits."""
    logp = torch.log_softmax(logits, -1)  # (N, V)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def eager_upcast(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same after ``logits.float()``, as trainers that mind precision write it."""
    return eager_logprob_entropy(logits.float(), target)


def eager_token_stats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four statistics by their definitions."""
    logp = torch.log_softmax(logits, -1)  # (N, V)
    p = logp.exp()
    logprob = logp.gather(-1, target[:, None])[:, 0]
    entropy = -(p * logp).sum(-1)
    collision = (p * p).sum(-1)
    squared = (p * p * logp).sum(-1)
    covariance = logprob.exp() * (logprob + entropy) - (squared + entropy * collision)
    return logprob, entropy, collision, covariance


def eager_token_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(lp - mean lp)(A - mean A) with masked means."""
    count = mask.sum()
    centred = logprob - (logprob * mask).sum() / count
    return centred * (advantages - (advantages * mask).sum() / count) * mask


def eager_clip_cov_mask(covariance: Tensor) -> Tensor:
    """nonzero, randperm and an indexed write: two host syncs on a GPU, and no seed of its own."""
    low, high = BAND
    candidates = ((covariance > low) & (covariance < high)).nonzero().squeeze(-1)
    count = max(1, int(CLIP_COV_RATIO * covariance.numel()))
    chosen = candidates[torch.randperm(candidates.numel(), device=covariance.device)[:count]]
    mask = torch.zeros_like(covariance, dtype=torch.bool)
    mask[chosen] = True
    return mask


def eager_kl_cov_mask(covariance: Tensor) -> Tensor:
    """topk and an indexed write."""
    count = max(1, int(KL_COV_RATIO * covariance.numel()))
    mask = torch.zeros_like(covariance, dtype=torch.bool)
    mask[covariance.topk(count).indices] = True
    return mask


def _plain(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    return function


def _compiled(function: Any, case: Case) -> Callable[..., Any]:
    """torch.compile of a copy of a plain function: with a code object of its own, a case shares no recompilation."""
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, dynamic=False)


def _only_half(case: Case) -> str | None:
    return None if case.dtype.itemsize == 2 else "the same as eager for this dtype"


def _register_torch() -> None:
    how: dict[str, Callable[..., Callable[..., Any]]] = {"eager": _plain, "compile": _compiled}
    for name, load in how.items():
        # temporaries at the peak, counted: log-probs, p and p log p; with backward also the saved ones and gradients
        _register_statistics(
            name, functools.partial(load, eager_logprob_entropy), _always, copies=3.0, backward_copies=6.0
        )
        stats = functools.partial(_make_forward, functools.partial(load, eager_token_stats))
        register(Implementation("token_stats", name, "peer", stats, functools.partial(fits, copies=4.0)))
        arguments = _SELECTION["token_covariance"][0]
        covariance = functools.partial(_tokens, functools.partial(load, eager_token_covariance), arguments)
        register(Implementation("token_covariance", name, "peer", covariance, _always))
    _register_statistics(
        "eager-fp32", functools.partial(_plain, eager_upcast), _only_half, copies=4.0, backward_copies=7.0
    )
    for op, name, function in (
        ("clip_cov_mask", "eager-randperm", eager_clip_cov_mask),
        ("kl_cov_mask", "eager-topk", eager_kl_cov_mask),
    ):
        make = functools.partial(_tokens, functools.partial(_plain, function), ("covariance",))
        register(Implementation(op, name, "peer", make, _always))


# --- peers that are packages ------------------------------------------------------------------------------------------


def _load_peer(loader: peers.Loader, case: Case) -> Callable[..., Any]:
    return loader.load()


def _peer_supports(loader: peers.Loader, case: Case) -> str | None:
    return loader.reason()


def _register_packages() -> None:
    for name, loader in peers.LOGITS.items():
        _register_statistics(
            name,
            functools.partial(_load_peer, loader),
            functools.partial(_peer_supports, loader),
            copies=3.0,
            backward_copies=6.0,
        )
    for (op, name), loader in peers.LOSSES.items():
        make = functools.partial(_make_loss, functools.partial(_load_peer, loader))
        register(Implementation(op, name, "peer", make, functools.partial(_peer_supports, loader)))


# --- limits -----------------------------------------------------------------------------------------------------------


def _amax(case: Case, inputs: Inputs) -> Prepared:
    return Prepared(lambda: inputs["logits"].amax(-1))


def _copy(case: Case, inputs: Inputs) -> Prepared:
    destination = torch.empty_like(inputs["logits"])
    return Prepared(lambda: destination.copy_(inputs["logits"]))


def _read(case: Case, inputs: Inputs) -> Prepared:
    """Integer sum over the same bytes: torch's amax is not at the read limit for 16-bit types."""
    words = inputs["logits"].view(-1)[: inputs["logits"].numel() * case.dtype.itemsize // 8 * 8 // case.dtype.itemsize]
    words = words.view(torch.int64)
    return Prepared(lambda: words.sum())


def _topk(case: Case, inputs: Inputs) -> Prepared:
    count = min(TOPK, inputs["covariance"].numel())
    return Prepared(lambda: torch.topk(inputs["covariance"], count))


def _register_limits() -> None:
    register(Implementation("logits_floor", "amax", "limit", _amax, _always))
    register(Implementation("logits_floor", "read", "limit", _read, _always))
    register(Implementation("logits_floor", "copy", "limit", _copy, functools.partial(fits, copies=1.0)))
    register(Implementation("tokens_floor", "topk", "limit", _topk, _always))


_register_limits()
_register_ours()
_register_torch()
_register_packages()
