"""Peer packages on hidden states and a head, in our form or with the reason why they cannot be had here.

As in :mod:`benchmarks.peers`, nothing is copied: each is imported from the package that is installed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear, peers, standins
from benchmarks.peers import Loader, Unavailable
from benchmarks.registry import (
    BAND,
    CLIP_COV_RATIO,
    EVERYTHING,
    GRADIENT,
    LOGPROB,
    MEAN_LOGPROB,
    Implementation,
    Prepared,
    always,
    register,
)
from benchmarks.shapes import Case, HiddenShape, Inputs

_TRL_CHUNK = 32768  # vocabulary entries per tile, as TRL's trainers have it
_VERL = ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel")

# --- TRL --------------------------------------------------------------------------------------------------------------


def _trl() -> Callable[..., Any]:
    try:
        function = peers.attribute(peers.module_of("trl.trainer.utils"), "_ChunkedLogProbFunction")
    except Unavailable:
        function = peers.attribute(_trl_alone("trl.kernels.chunked_logprob"), "ChunkedLogProbFunction")

    def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return function.apply(hidden, weight, None, target, 1.0, _TRL_CHUNK, None, 1.0, ("entropy",))[:2]

    return chunked


@peers.cached
def _trl_alone(name: str) -> ModuleType:
    """Without the trainers' dependencies; the one function of theirs that it calls gathers DeepSpeed's shards."""
    gather = {"maybe_gather_lm_head_ctx": lambda *parameters: contextlib.nullcontext()}
    return standins.load(
        name,
        bare=("trl", "trl.kernels"),
        stand_ins=("transformers", "trl.trainer"),
        keep={"trl.trainer.utils": gather},
    )


# --- verl -------------------------------------------------------------------------------------------------------------


def _verl() -> Callable[..., Any]:
    fused = peers.alone("verl.utils.experimental.torch_functional", _VERL, ())
    return peers.attribute(fused, "FusedLinearForPPO")()


def _verl_triton() -> Callable[..., Any]:
    function = peers.attribute(_verl_kernel("verl.utils.kernel.linear_cross_entropy"), "linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target, 1.0, "none")


@peers.cached
def _verl_kernel(name: str) -> ModuleType:
    try:
        return peers.module_of(name)
    except Unavailable:  # it imports its kernels when it is called
        keep: dict[str, dict[str, Any]] = {"verl.utils.kernel.kernels": {}, "verl.utils.kernel": {}}
        return standins.load(name, bare=_VERL, stand_ins=("ray",), keep=keep)


def _verl_loss(mode: str, **settings: Any) -> Callable[..., Any]:
    """verl's fused log-prob, then verl's loss of one sequence."""
    fused, loss = _verl(), peers.verl_loss(mode, **settings)

    def policy(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        return loss(fused(hidden, weight, target)[0][None], *(tensor[None] for tensor in rest))[0]

    return policy


# --- Liger ------------------------------------------------------------------------------------------------------------


def _liger_scaled() -> Callable[..., Any]:
    """CuTe kernels on an H100 or H200; elsewhere the package itself falls back to chunks in torch."""
    module = peers.module_of("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = peers.attribute(module, "LigerFusedLinearScaledCrossEntropyFunction")
    if torch.cuda.is_available():
        try:  # what it would do in its first call
            peers.attribute(module, "_resolve_implementation")(torch.device("cuda"))
        except ImportError as error:
            raise Unavailable(f"its kernels do not import: {type(error).__name__}: {error}") from None

    def scaled(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, entropy = function.apply(hidden, weight, target, 1.0, -100, 1, True)
        return -loss, entropy

    return scaled


def _liger_linear(reduction: str) -> Callable[..., Any]:
    function = peers.attribute(
        peers.module_of("liger_kernel.transformers.functional"), "liger_fused_linear_cross_entropy"
    )
    return lambda hidden, weight, target: (-function(hidden, weight, target, reduction=reduction),)


def _liger_grpo() -> Callable[..., Any]:
    """A policy loss of tokens that are sequences of length one, so that each has an advantage of its own."""
    loss_of = peers.attribute(peers.module_of("liger_kernel.chunked_loss"), "LigerFusedLinearGRPOLoss")

    def policy(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        old_logprob: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
    ) -> Tensor:
        old = None if old_logprob is None else old_logprob[:, None]
        # all in one of its chunks of sequences: those of its products are of tokens and vocabulary
        loss = loss_of(beta=0.0, use_ref_model=False, chunk_size=len(hidden))
        return loss(hidden[:, None], weight, target[:, None], mask[:, None], advantages, old_per_token_logps=old)[0]

    return policy


def _make_liger_grpo(load: linear.Load, case: Case, inputs: Inputs) -> Prepared:
    """With the old policy the new one, a token's gradient is -A / N times that of its log-prob."""
    upstream = inputs["grad_logprob"]
    mask = torch.ones_like(upstream, dtype=torch.bool)
    fields = {"old_logprob": None, "advantages": -len(upstream) * upstream, "mask": mask}
    prepared = linear.policy(load, case, {**inputs, **fields})  # type: ignore[dict-item]
    return Prepared(lambda: prepared.call()[1:])


# --- cross-entropies --------------------------------------------------------------------------------------------------


def _cut(implementation: str) -> Callable[..., Any]:
    function = peers.attribute(peers.module_of("cut_cross_entropy"), "linear_cross_entropy")
    return lambda hidden, weight, target: (-function(hidden, weight, target, reduction="none", impl=implementation),)


def _quack() -> Callable[..., Any]:
    function = peers.attribute(peers.module_of("quack.linear_cross_entropy"), "chunked_linear_cross_entropy")
    return lambda hidden, weight, target: (-function(hidden, weight, target, reduction="mean"),)


# --- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A function ``(hidden, weight, target) -> outputs``.

    ``copies``: its fp32 temporaries at the peak in sizes of the logits. ``needs``: a reason why it cannot take a case.
    """

    name: str
    loader: Loader
    computes: str = EVERYTHING
    copies: float = 0.5
    needs: Callable[[Case], str | None] = always


def _multiple_of_128(case: Case) -> str | None:
    assert isinstance(case.shape, HiddenShape)
    return f"needs H in multiples of 128, not {case.shape.features}" if case.shape.features % 128 else None


PEERS = (
    Peer("trl", Loader(_trl)),
    Peer("verl", Loader(_verl)),
    Peer("verl-triton", Loader(_verl_triton, device="cuda"), needs=_multiple_of_128),
    Peer("liger-scaled", Loader(_liger_scaled)),
    Peer("liger-linear-ce", Loader(functools.partial(_liger_linear, "none"), device="cuda"), LOGPROB),
    Peer("liger-linear-ce-mean", Loader(functools.partial(_liger_linear, "mean"), device="cuda"), MEAN_LOGPROB),
    Peer("cut-ce", Loader(functools.partial(_cut, "cce"), device="cuda"), LOGPROB),
    Peer("cut-ce-compile", Loader(functools.partial(_cut, "torch_compile")), LOGPROB, copies=3.0),
    Peer("quack-linear-ce-mean", Loader(_quack, device="cuda"), MEAN_LOGPROB),
)
_GRPO = Loader(_liger_grpo)
LOSSES: dict[tuple[str, str], Loader] = {
    ("linear_policy_loss", "verl"): Loader(functools.partial(_verl_loss, "vanilla")),
    ("linear_policy_loss", "liger-grpo"): _GRPO,
    ("linear_clip_cov_loss", "verl"): Loader(
        functools.partial(
            _verl_loss, "clip_cov",
            clip_cov_ratio=CLIP_COV_RATIO, clip_cov_lb=BAND[0], clip_cov_ub=BAND[1],
        )
    ),
}  # fmt: skip


def _load(loader: Loader, case: Case) -> Callable[..., Any]:
    return loader.load()


def register_all() -> None:
    """Add the packages to the ops on hidden states."""
    for op, one in linear.PASSES.items():
        for peer in PEERS:
            supports = linear.room(peer.copies, peer.needs, peer.loader.reason)
            make = functools.partial(one, functools.partial(_load, peer.loader))
            register(Implementation(op, peer.name, "peer", make, supports, peer.computes))
    make = functools.partial(_make_liger_grpo, functools.partial(_load, _GRPO))
    register(Implementation(linear.BOTH, "liger-grpo", "peer", make, linear.room(0.5, _GRPO.reason), GRADIENT))
    for (op, name), loader in LOSSES.items():
        make = functools.partial(linear.policy, functools.partial(_load, loader))
        register(Implementation(op, name, "peer", make, linear.room(0.5, loader.reason)))
