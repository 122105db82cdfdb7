"""Every implementation, registered: ours, per backend, the peers, and the limits of the machine."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import calls, linear, linear_peers, peers
from benchmarks.registry import (
    BAND,
    CLIP_COV_RATIO,
    EVERYTHING,
    KL_COV_RATIO,
    LOGPROB,
    OPS,
    REGISTRY,
    SEED,
    TOPK,
    Implementation,
    Prepared,
    always,
    fits,
    names,
    of_op,
    register,
)
from benchmarks.shapes import Case, Inputs
from entropy_kernels.backends import registry

__all__ = ["OPS", "REGISTRY", "Implementation", "Prepared", "names", "of_op", "ours_for", "register"]

# --- ours ------------------------------------------------------------------------------------------------------------

OURS = {f"ours-{backend}": backend for backend in registry.BACKENDS}


def ours_for(device_type: str) -> str:
    """Name of our implementation that "auto" serves on a device: the one that the bars judge."""
    return f"ours-{registry.resolve('token_stats', 'auto', torch.device(device_type))}"


def _ours_supports(function: str, op: str, backend: str, case: Case) -> str | None:
    if getattr(ek, function, None) is None:
        return f"entropy_kernels {ek.__version__} has no {function}"
    if backend in ("cpu", "cuda") and case.device.type != backend:
        return f"runs on {backend} tensors only"
    if backend == "triton" and case.device.type == "cpu":
        return "on the CPU only Triton's interpreter runs, which is for tests"
    return registry.unavailable(op, backend, case.device) if op in registry.OPS and backend != "auto" else None


def _ours_function(function: str, options: dict[str, Any], case: Case) -> Callable[..., Any]:
    return functools.partial(getattr(ek, function), **options)


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


_LINEAR = "linear_logprob_entropy"


def _only_on_gpu(case: Case) -> str | None:
    return None if case.device.type == "cuda" else "on the CPU the same as ours"


def _takes_backend(function: str) -> bool:
    return "backend" in inspect.signature(getattr(ek, function)).parameters


def _register_ours() -> None:
    for name, backend in OURS.items():
        supports = functools.partial(_ours_supports, "logprob_entropy", "token_stats", backend)
        load = functools.partial(_ours_function, "logprob_entropy", {"backend": backend})
        for op in calls.PASSES:
            register(Implementation(op, name, "ours", calls.of_pass(op, load), supports))
        inplace = functools.partial(_ours_function, "logprob_entropy", {"backend": backend, "inplace_backward": True})
        make = functools.partial(calls.on_a_copy, functools.partial(calls.forward_backward, inplace))
        register(Implementation("logprob_entropy_fwdbwd", f"{name}-inplace", "ours", make, supports))
        load = functools.partial(_ours_function, "token_stats", {"backend": backend})
        register(Implementation("token_stats", name, "ours", functools.partial(calls.forward, load), supports))
        # "auto" takes the kernel with the statistics in the product's epilogue where this has found it faster
        by_backend = functools.partial(_ours_supports, _LINEAR, "linear_token_stats", backend)
        make = functools.partial(linear.forward, functools.partial(linear.ours_by, backend))
        register(Implementation(_LINEAR, name, "ours", make, _all_of(_only_on_gpu, by_backend)))
        for op, (arguments, options) in _SELECTION.items():
            load = functools.partial(_ours_function, op, {**options, "backend": backend})
            supports_op = functools.partial(_ours_supports, op, op, backend)
            register(Implementation(op, name, "ours", functools.partial(calls.tokens, load, arguments), supports_op))
    for op, options in _LOSSES.items():
        # torch's operations, around the selection of a backend where there is one
        named: dict[str, str | None] = dict(OURS) if _takes_backend(op) else {"ours": None}
        for name, chosen in named.items():
            load = functools.partial(_ours_function, op, options if chosen is None else {**options, "backend": chosen})
            supports_op = functools.partial(_ours_supports, op, "clip_cov_mask", chosen or "auto")
            register(Implementation(op, name, "ours", functools.partial(calls.loss, load), supports_op))


# --- plain torch, as it is written by hand ----------------------------------------------------------------------------


def eager_logprob_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax, gather, -Σ p log p, in the dtype of the logits."""
    logp = torch.log_softmax(logits, -1)  # (N, V)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def eager_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor]:
    """torch's own cross-entropy, which is log-prob without entropy."""
    return (-torch.nn.functional.cross_entropy(logits, target, reduction="none"),)


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


def _all_of(*limits: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """The first reason of several."""
    return lambda case: next((reason for limit in limits if (reason := limit(case)) is not None), None)


def _register_passes(
    name: str,
    load: calls.Load,
    supports: Callable[[Case], str | None],
    *,
    copies: float,
    backward_copies: float,
    computes: str = EVERYTHING,
) -> None:
    """Register a peer for every pass; ``copies``: its fp32 temporaries at the peak in sizes of the logits."""
    for op in calls.PASSES:
        room = functools.partial(fits, copies=copies if op == "logprob_entropy" else backward_copies)
        register(Implementation(op, name, "peer", calls.of_pass(op, load), _all_of(supports, room), computes))


def _register_torch() -> None:
    how: dict[str, Callable[..., Callable[..., Any]]] = {"eager": _plain, "compile": _compiled}
    for name, load in how.items():
        # temporaries, counted: log-probs, p and p log p; with backward also the saved ones and gradients
        function = functools.partial(load, eager_logprob_entropy)
        _register_passes(name, function, always, copies=3.0, backward_copies=6.0)
        stats = functools.partial(calls.forward, functools.partial(load, eager_token_stats))
        register(Implementation("token_stats", name, "peer", stats, functools.partial(fits, copies=4.0)))
        arguments = _SELECTION["token_covariance"][0]
        covariance = functools.partial(calls.tokens, functools.partial(load, eager_token_covariance), arguments)
        register(Implementation("token_covariance", name, "peer", covariance, always))
    function = functools.partial(_plain, eager_upcast)
    _register_passes("eager-fp32", function, _only_half, copies=4.0, backward_copies=7.0)
    function = functools.partial(_plain, eager_cross_entropy)
    _register_passes("torch-ce", function, always, copies=1.0, backward_copies=2.0, computes=LOGPROB)
    for op, name, select in (
        ("clip_cov_mask", "eager-randperm", eager_clip_cov_mask),
        ("kl_cov_mask", "eager-topk", eager_kl_cov_mask),
    ):
        make = functools.partial(calls.tokens, functools.partial(_plain, select), ("covariance",))
        register(Implementation(op, name, "peer", make, always))


# --- peers that are packages ------------------------------------------------------------------------------------------


def _load_peer(loader: peers.Loader, case: Case) -> Callable[..., Any]:
    return loader.load()


def _make_special(make: Callable[..., Prepared], loader: peers.Loader, case: Case, inputs: Inputs) -> Prepared:
    return make(loader.load(), case, inputs)


def _register_packages() -> None:
    for peer in peers.LOGITS:
        whole = peer.computes == EVERYTHING
        _register_passes(
            peer.name,
            functools.partial(_load_peer, peer.loader),
            peer.loader.reason,
            copies=3.0 if whole else 0.1,
            backward_copies=6.0 if whole else 1.0,
            computes=peer.computes,
        )
    for op, name, loader, computes, special in peers.SPECIAL:
        make = functools.partial(_make_special, special, loader)
        supports = _all_of(loader.reason, functools.partial(fits, copies=2.0))
        register(Implementation(op, name, "peer", make, supports, computes))
    for (op, name), loader in peers.LOSSES.items():
        make = functools.partial(calls.loss, functools.partial(_load_peer, loader))
        register(Implementation(op, name, "peer", make, loader.reason))


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
    register(Implementation("logits_floor", "amax", "limit", _amax, always))
    register(Implementation("logits_floor", "read", "limit", _read, always))
    register(Implementation("logits_floor", "copy", "limit", _copy, functools.partial(fits, copies=1.0)))
    register(Implementation("tokens_floor", "topk", "limit", _topk, always))


_register_limits()
linear.register_all()
_register_ours()
_register_torch()
_register_packages()
linear_peers.register_all()
