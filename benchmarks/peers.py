"""What ours is measured against: torch as it is written by hand, torch's own, and packages.

Each becomes a row of the registry with the reason why it cannot run where that is so, and with what it computes of its
op where that is not everything. Functions of packages come from :mod:`benchmarks.packages`.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import packages
from benchmarks.cases import BAND, CLIP_COV_RATIO, KL_COV_RATIO, LINEAR_LOSSES, Case, HiddenShape, Inputs
from benchmarks.ours import (
    BOTH,
    EVERYTHING,
    GRADIENT,
    LINEAR_PASSES,
    LOGPROB,
    MEAN_LOGPROB,
    ONLY_HALF,
    PASSES,
    SELECTION,
    Function,
    Load,
    Prepared,
    Supports,
    add,
    always,
    forward,
    loss,
    on_a_copy,
    plain,
    room,
    tokens,
)
from benchmarks.packages import Loader, Unavailable

# --- plain torch, as it is written by hand ----------------------------------------------------------------------------


def eager_logprob_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax, gather, -Σ p log p, in the dtype of the logits."""
    logp = torch.log_softmax(logits, -1)  # (N, V)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def eager_upcast(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same after ``logits.float()``, as trainers that mind precision write it."""
    return eager_logprob_entropy(logits.float(), target)


def eager_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor]:
    """torch's own cross-entropy, which is log-prob without entropy."""
    return (-torch.nn.functional.cross_entropy(logits, target, reduction="none"),)


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
    candidates = ((covariance > BAND[0]) & (covariance < BAND[1])).nonzero().squeeze(-1)
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


def eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager_logprob_entropy(hidden @ weight.t(), target)


def eager_linear_upcast(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager_upcast(hidden @ weight.t(), target)


def eager_loss(
    op: str, hidden: Tensor, weight: Tensor, target: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """PPO's clipped loss of eager log-probs; for Clip-Cov without a random n of the tokens in its range."""
    logprob = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, target[:, None])[:, 0].float()
    ratio = (logprob - old_logprob).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    tokens, count = torch.maximum(plain, clipped), mask.sum()
    if op == "linear_clip_cov_loss":
        centred = logprob.detach() - logprob.detach()[mask].mean()
        covariance = centred * (advantages - advantages[mask].mean())
        band = mask & (clipped <= plain) & (covariance > BAND[0]) & (covariance < BAND[1])
        candidates = band.nonzero().squeeze(-1)
        drawn = torch.randperm(candidates.numel(), device=mask.device)[: max(1, int(CLIP_COV_RATIO * count))]
        tokens = tokens.index_fill(0, candidates[drawn], 0.0)
    return (tokens * mask).sum() / count


def _compiled(function: Any) -> Load:
    """torch.compile of a copy of a plain function: with a code object of its own, a case shares no recompilation."""

    def load(case: Case) -> Function:
        copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        return torch.compile(copy, dynamic=False)

    return load


# --- torch's own product and cross-entropy in one ---------------------------------------------------------------------


def _torch_linear(reduction: str, chunked: bool) -> Function:
    """F.linear_cross_entropy, of torch 2.13 and newer: with the logits kept, or tokens in chunks.

    In chunks a mean makes its gradients in the forward pass; a loss per token makes the logits again in the backward.
    """
    function: Any = packages.attribute(torch.nn.functional, "linear_cross_entropy")
    options = {"options": packages.attribute(torch.nn, "LinearCrossEntropyOptions")()} if chunked else {}
    return lambda hidden, weight, target: (-function(hidden, weight, target, reduction=reduction, **options),)


# --- cross-entropies --------------------------------------------------------------------------------------------------


def _cross_entropy(module: str, name: str, **options: Any) -> Function:
    """Log-prob, which is minus the loss; flash-attn's and fla-core's functions return (losses, z-losses)."""
    function = packages.function_of(module, name)

    def logprob(*tensors: Tensor) -> tuple[Tensor]:
        loss = function(*tensors, **options)
        return (-(loss[0] if isinstance(loss, tuple) else loss),)

    return logprob


_FLASH_ATTN, _FLA = "flash_attn.ops.triton.cross_entropy", "fla.modules.fused_cross_entropy"

# --- verl -------------------------------------------------------------------------------------------------------------

LOOP_ROWS = 1024  # up to which verl's loop over rows is timed on a GPU, but for one larger case: launches for every row
_VERL_AROUND = ("ray", "tensordict", "omegaconf", "transformers", "verl.trainer.config", "verl.workers")
VERL_FUSED = ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel")


def _verl_module(name: str) -> ModuleType:
    """verl's files: without ray and configuration where these are not installed."""
    return packages.alone(name, ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo"), _VERL_AROUND)


def _verl() -> Function:
    module = _verl_module("verl.utils.torch_functional")
    logprob = packages.attribute(module, "logprobs_from_logits")
    entropy = packages.attribute(module, "entropy_from_logits")
    # with flash-attn on a GPU the default is to write the gradient over the logits
    return lambda logits, target: (logprob(logits, target, inplace_backward=False), entropy(logits))


def _verl_fused_ce() -> Function:
    """verl's path on a machine with flash-attn, whose Triton cross-entropy it then takes for the log-prob."""
    try:
        cross_entropy = _cross_entropy(_FLASH_ATTN, "cross_entropy_loss")
    except Unavailable:
        cross_entropy = _cross_entropy(_FLA, "cross_entropy_loss")
    entropy = packages.attribute(_verl_module("verl.utils.torch_functional"), "entropy_from_logits")
    return lambda logits, target: (*cross_entropy(logits, target), entropy(logits))


def _verl_linear() -> Function:
    fused = packages.alone("verl.utils.experimental.torch_functional", VERL_FUSED, ())
    return packages.attribute(fused, "FusedLinearForPPO")()


@packages.cached
def verl_kernel(name: str) -> ModuleType:
    try:
        return packages.module_of(name)
    except Unavailable:  # it imports its kernels when it is called
        keep: dict[str, dict[str, Any]] = {"verl.utils.kernel.kernels": {}, "verl.utils.kernel": {}}
        return packages.load(name, bare=VERL_FUSED, stubbed=("ray",), keep=keep)


def _verl_triton() -> Function:
    function = packages.attribute(verl_kernel("verl.utils.kernel.linear_cross_entropy"), "linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target, 1.0, "none")


class _Settings(SimpleNamespace):
    """What verl's losses read of a configuration, where verl's own cannot be imported."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


def _verl_config(mode: str, **settings: Any) -> Any:
    try:
        module = packages.module_of("verl.workers.config")
    except Unavailable:
        policy = _Settings(loss_mode=mode, **settings)
        ratios = dict.fromkeys(("clip_ratio", "clip_ratio_low", "clip_ratio_high"), 0.2)
        return _Settings(**ratios, clip_ratio_c=3.0, policy_loss=policy, global_batch_info={})
    policy_loss = packages.attribute(module, "PolicyLossConfig")(loss_mode=mode, **settings)
    actor = packages.attribute(module, "ActorConfig")
    return actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss)


def verl_loss(mode: str, **settings: Any) -> Function:
    """verl's registered loss as ``(logprob, old_logprob, advantages, mask) -> (loss, metrics)``."""
    function = packages.attribute(_verl_module("verl.trainer.ppo.core_algos"), "get_policy_loss_fn")(mode)
    config = _verl_config(mode, **settings)

    def loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        return function(old_logprob, logprob, advantages, mask, loss_agg_mode="token-mean", config=config)

    return loss


def _verl_linear_loss(mode: str, **settings: Any) -> Function:
    """verl's fused log-prob, then verl's loss of one sequence."""
    fused, loss = _verl_linear(), verl_loss(mode, **settings)

    def policy(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        return loss(fused(hidden, weight, target)[0][None], *(tensor[None] for tensor in rest))[0]

    return policy


# --- TRL --------------------------------------------------------------------------------------------------------------

_TRL_CHUNK = 32768  # vocabulary entries per tile, as TRL's trainers have it


def _trl() -> Function:
    if torch.cuda.is_available():  # the kernel that TRL's functions take on a GPU; needs torch and triton only
        kernels = packages.alone("trl.kernels.logprob_entropy", ("trl", "trl.kernels"), ())
        return packages.attribute(kernels, "selective_log_softmax_and_entropy")
    module = packages.module_of("trl.trainer.utils")
    logprob = packages.attribute(module, "selective_log_softmax")
    entropy = packages.attribute(module, "entropy_from_logits")
    return lambda logits, target: (logprob(logits, target), entropy(logits))


def _trl_linear() -> Function:
    try:
        function = packages.function_of("trl.trainer.utils", "_ChunkedLogProbFunction")
    except Unavailable:
        function = packages.attribute(_trl_alone("trl.kernels.chunked_logprob"), "ChunkedLogProbFunction")

    def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return function.apply(hidden, weight, None, target, 1.0, _TRL_CHUNK, None, 1.0, ("entropy",))[:2]

    return chunked


@packages.cached
def _trl_alone(name: str) -> ModuleType:
    """Without the trainers' dependencies; the one function of theirs that it calls gathers DeepSpeed's shards."""
    keep = {"trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *parameters: contextlib.nullcontext()}}
    return packages.load(name, bare=("trl", "trl.kernels"), stubbed=("transformers", "trl.trainer"), keep=keep)


# --- Liger ------------------------------------------------------------------------------------------------------------


def _liger_scaled() -> Function:
    """CuTe kernels on an H100 or H200; elsewhere the package itself falls back to chunks in torch."""
    module = packages.module_of("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = packages.attribute(module, "LigerFusedLinearScaledCrossEntropyFunction")
    if torch.cuda.is_available():
        try:  # what it would do in its first call
            packages.attribute(module, "_resolve_implementation")(torch.device("cuda"))
        except ImportError as error:
            raise Unavailable(f"its kernels do not import: {type(error).__name__}: {error}") from None

    def scaled(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, entropy = function.apply(hidden, weight, target, 1.0, -100, 1, True)
        return -loss, entropy

    return scaled


def _with_a_row_more(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(1, N + 1, V) logits, the last row unread, and (1, N) targets, as Liger's GRPO takes them."""
    return torch.nn.functional.pad(inputs["logits"], (0, 0, 0, 1))[None], inputs["target"][None]


def _liger_logprob(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """The log-probs of the old and the reference policy."""
    function, (logits, target) = load(case), _with_a_row_more(inputs)
    return Prepared(lambda: (function(logits, target, temperature=1.0)[0],))


def _liger_grpo(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """With A = -1 and the old policy the new one, the gradient is that of log-prob times what comes from above."""
    function, (logits, target) = load(case), _with_a_row_more(inputs)
    upstream, advantages = inputs["grad_logprob"][None], -torch.ones(1, device=case.device)

    def call() -> tuple[Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = function(leaf, None, None, target, advantages, temperature=1.0, beta=0.0, eps_high=0.2, inplace=False)
        (gradient,) = torch.autograd.grad(loss[0], leaf, upstream)
        return (gradient[0, :-1],)

    return Prepared(call)


def _liger_linear_grpo() -> Function:
    """A policy loss of tokens that are sequences of length one, so that each has an advantage of its own."""
    loss_of = packages.function_of("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def policy(
        hidden: Tensor, weight: Tensor, target: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        old = None if old_logprob is None else old_logprob[:, None]
        # all in one of its chunks of sequences: those of its products are of tokens and vocabulary
        loss = loss_of(beta=0.0, use_ref_model=False, chunk_size=len(hidden))
        return loss(hidden[:, None], weight, target[:, None], mask[:, None], advantages, old_per_token_logps=old)[0]

    return policy


def _gradient_of_grpo(load: Load, case: Case, inputs: Inputs) -> Prepared:
    """With the old policy the new one, a token's gradient is -A / N times that of its log-prob."""
    upstream = inputs["grad_logprob"]
    mask = torch.ones_like(upstream, dtype=torch.bool)
    fields = {"old_logprob": None, "advantages": -len(upstream) * upstream, "mask": mask}
    prepared = loss(load, case, {**inputs, **fields})  # type: ignore[dict-item]
    return Prepared(lambda: prepared.call()[1:])


# --- the rows ---------------------------------------------------------------------------------------------------------


def _on(device: str | None, build: Callable[..., Function], *arguments: Any, rows: int | None = None) -> Loader:
    return Loader(functools.partial(build, *arguments), device, rows)


def _loss_of(module: str, name: str, *, device: str | None = "cuda", **options: Any) -> Loader:
    return Loader(functools.partial(_cross_entropy, module, name, **options), device)


def _reasons(load: Load, *more: Supports) -> tuple[Supports, ...]:
    """A package may be missing; torch is there."""
    return (*more, load.reason) if isinstance(load, Loader) else more


_EAGER, _COMPILE = plain(eager_logprob_entropy), _compiled(eager_logprob_entropy)
# name, function of logits and target, its fp32 temporaries in sizes of the logits (forward: log-probs, p and p log p;
# with backward also the saved ones and gradients), what it computes, what it needs
_OF_LOGITS: tuple[tuple[str, Load, tuple[float, float], str, Supports], ...] = (
    ("eager", _EAGER, (3.0, 6.0), EVERYTHING, always),
    ("compile", _COMPILE, (3.0, 6.0), EVERYTHING, always),
    ("eager-fp32", plain(eager_upcast), (4.0, 7.0), EVERYTHING, ONLY_HALF),
    ("torch-ce", plain(eager_cross_entropy), (1.0, 2.0), LOGPROB, always),
    ("verl", _on(None, _verl, rows=LOOP_ROWS), (3.0, 6.0), EVERYTHING, always),
    ("verl-fused-ce", _on("cuda", _verl_fused_ce), (3.0, 6.0), EVERYTHING, always),
    ("trl", _on(None, _trl), (3.0, 6.0), EVERYTHING, always),
    ("flash-attn-ce", _loss_of(_FLASH_ATTN, "cross_entropy_loss"), (0.1, 1.0), LOGPROB, always),
    ("fla-ce", _loss_of(_FLA, "cross_entropy_loss"), (0.1, 1.0), LOGPROB, always),
    ("quack-ce", _loss_of("quack.cross_entropy", "cross_entropy", reduction="none"), (0.1, 1.0), LOGPROB, always),
)  # fmt: skip


_LIGER_MODULE = "liger_kernel.transformers.functional"
_LIGER, _LIGER_MEAN = (_loss_of(_LIGER_MODULE, "liger_cross_entropy", reduction=how) for how in ("none", "mean"))
_LIGER_LOGPROB = _on("cuda", packages.function_of, "liger_kernel.ops.grpo_loss", "fused_selective_log_softmax")
_LIGER_GRPO = _on("cuda", packages.function_of, "liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
# Those with a form of their own. Liger's cross-entropy makes the gradient in its forward pass, over the logits: its
# backward pass alone is no rival.
_SPECIAL: tuple[tuple[str, str, Callable[[Load, Case, Inputs], Prepared], Loader, str], ...] = (
    ("logprob_entropy", "liger-logprob", _liger_logprob, _LIGER_LOGPROB, LOGPROB),
    ("logprob_entropy_fwdbwd", "liger-grpo", _liger_grpo, _LIGER_GRPO, GRADIENT),
    ("logprob_entropy", "liger-ce", forward, _LIGER, LOGPROB),
    ("logprob_entropy_fwdbwd", "liger-ce", on_a_copy, _LIGER, LOGPROB),
    ("logprob_entropy_fwdbwd", "liger-ce-mean", on_a_copy, _LIGER_MEAN, MEAN_LOGPROB),
)


def _multiple_of_128(case: Case) -> str | None:
    assert isinstance(case.shape, HiddenShape)
    return f"needs H in multiples of 128, not {case.shape.features}" if case.shape.features % 128 else None


_LIGER_LINEAR = (_LIGER_MODULE, "liger_fused_linear_cross_entropy")
_CUT = ("cut_cross_entropy", "linear_cross_entropy")
_QUACK_LINEAR = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
# name, function of hidden, weight and target, its fp32 temporaries in sizes of the logits (with backward twice as
# many, where they are kept), what it computes, what it needs
OF_HIDDEN: tuple[tuple[str, Load, tuple[float, float], str, Supports], ...] = (
    ("eager", plain(eager_linear), (3.0, 6.0), EVERYTHING, always),
    ("eager-fp32", plain(eager_linear_upcast), (4.0, 7.0), EVERYTHING, ONLY_HALF),
    ("compile", _compiled(eager_linear), (3.0, 6.0), EVERYTHING, always),
    ("torch-linear-ce", _on(None, _torch_linear, "none", False), (2.0, 3.0), LOGPROB, always),
    ("torch-linear-ce-chunked", _on(None, _torch_linear, "none", True), (1.0, 1.0), LOGPROB, always),
    ("torch-linear-ce-chunked-mean", _on(None, _torch_linear, "mean", True), (1.0, 1.0), MEAN_LOGPROB, always),
    ("trl", _on(None, _trl_linear), (0.5, 0.5), EVERYTHING, always),
    ("verl", _on(None, _verl_linear), (0.5, 0.5), EVERYTHING, always),
    ("verl-triton", _on("cuda", _verl_triton), (0.5, 0.5), EVERYTHING, _multiple_of_128),
    ("liger-scaled", _on(None, _liger_scaled), (0.5, 0.5), EVERYTHING, always),
    ("liger-linear-ce", _loss_of(*_LIGER_LINEAR, reduction="none"), (0.5, 0.5), LOGPROB, always),
    ("liger-linear-ce-mean", _loss_of(*_LIGER_LINEAR, reduction="mean"), (0.5, 0.5), MEAN_LOGPROB, always),
    ("cut-ce", _loss_of(*_CUT, reduction="none", impl="cce"), (0.5, 0.5), LOGPROB, always),
    ("cut-ce-compile", _loss_of(*_CUT, device=None, reduction="none", impl="torch_compile"), (3.0, 3.0), LOGPROB,
     always),
    ("quack-linear-ce-mean", _loss_of(*_QUACK_LINEAR, reduction="mean"), (0.5, 0.5), MEAN_LOGPROB, always),
    # tuning its products takes minutes for each shape
    ("quack-linear-ce-mean-default", _loss_of(*_QUACK_LINEAR, reduction="mean", tuned=False), (0.5, 0.5), MEAN_LOGPROB,
     always),
)  # fmt: skip
_CLIP_COV = {"clip_cov_ratio": CLIP_COV_RATIO, "clip_cov_lb": BAND[0], "clip_cov_ub": BAND[1]}
_KL_COV = {"kl_cov_ratio": KL_COV_RATIO, "ppo_kl_coef": 1.0}
_LINEAR_GRPO = _on(None, _liger_linear_grpo)
_OF_LOSSES: dict[tuple[str, str], Loader] = {
    ("policy_loss", "verl"): Loader(lambda: verl_loss("vanilla")),
    ("clip_cov_loss", "verl"): Loader(lambda: verl_loss("clip_cov", **_CLIP_COV)),
    ("kl_cov_loss", "verl"): Loader(lambda: verl_loss("kl_cov", **_KL_COV)),
    ("linear_policy_loss", "verl"): Loader(lambda: _verl_linear_loss("vanilla")),
    ("linear_policy_loss", "liger-grpo"): _LINEAR_GRPO,
    ("linear_clip_cov_loss", "verl"): Loader(lambda: _verl_linear_loss("clip_cov", **_CLIP_COV)),
}


def _add_peers() -> None:
    for rows, passes in ((_OF_LOGITS, PASSES), (OF_HIDDEN, LINEAR_PASSES)):
        for name, load, copies, computes, needs in rows:
            for op, make in passes.items():
                limit = room(copies[make is not forward], needs, *_reasons(load))
                add(op, name, "peer", make, load, limit, computes)
    for op, name, make, loader, computes in _SPECIAL:
        add(op, name, "peer", make, loader, room(2.0, loader.reason), computes)
    add(BOTH, "liger-grpo", "peer", _gradient_of_grpo, _LINEAR_GRPO, room(0.5, _LINEAR_GRPO.reason), GRADIENT)
    for (op, name), loader in _OF_LOSSES.items():
        add(op, name, "peer", loss, loader, room(0.5, loader.reason))
    for op in LINEAR_LOSSES:
        add(op, "eager", "peer", loss, plain(functools.partial(eager_loss, op)), room(4.0))
    for name, how in (("eager", plain), ("compile", _compiled)):
        add("token_stats", name, "peer", forward, how(eager_token_stats), room(4.0))
    for op, name, load in (
        ("token_covariance", "eager", plain(eager_token_covariance)),
        ("token_covariance", "compile", _compiled(eager_token_covariance)),
        ("clip_cov_mask", "eager-randperm", plain(eager_clip_cov_mask)),
        ("kl_cov_mask", "eager-topk", plain(eager_kl_cov_mask)),
    ):
        add(op, name, "peer", lambda load, *case, op=op: tokens(load, SELECTION[op][0], *case), load)


_add_peers()
