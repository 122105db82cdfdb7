"""Peer packages: their functions in our form, or the reason why they cannot be had here.

Nothing of a peer is copied: each is imported from the package that is installed, and skipped with the reason otherwise.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import calls, standins
from benchmarks.registry import EVERYTHING, GRADIENT, LOGPROB, MEAN_LOGPROB, Prepared
from benchmarks.shapes import HEADLINE, Case, Inputs, LogitsShape

#: Rows up to which verl's loop over rows is timed on a GPU, but for one larger case: a few launches per row.
LOOP_ROWS = 1024


class Unavailable(Exception):
    """A peer cannot be used here; the message says why."""


@dataclass(frozen=True)
class Loader:
    """``build`` returns the peer's function in our form or raises :class:`Unavailable`.

    ``device``: "cuda" for kernels that run nowhere else. ``rows``: most rows that are timed on a GPU.
    """

    build: Callable[[], Callable[..., Any]]
    device: str | None = None
    rows: int | None = None

    def load(self) -> Callable[..., Any]:
        return self.build()

    def reason(self, case: Case) -> str | None:
        """None, or why the peer cannot be used for a case."""
        try:
            self.build()
        except Unavailable as error:
            return str(error)
        if self.device is not None and case.device.type != self.device:
            return f"runs on {self.device} tensors only"
        rows = case.shape.rows if isinstance(case.shape, LogitsShape) else 0
        if self.rows is not None and case.device.type == "cuda" and rows > self.rows and case.shape != HEADLINE:
            return f"loops over rows in Python: timed up to {self.rows} rows, and at {HEADLINE}"
        return None


def cached(load: Callable[..., ModuleType]) -> Callable[..., ModuleType]:
    """Remember also that a module cannot be had: a failing import of a large package takes seconds every time."""

    @functools.cache
    def attempt(*arguments: Any) -> ModuleType | Unavailable:
        try:
            return load(*arguments)
        except Exception as error:  # a foreign package may fail to import in any way; the reason is reported
            return _unavailable(arguments[0], error)

    @functools.wraps(load)
    def loaded(*arguments: Any) -> ModuleType:
        found = attempt(*arguments)
        if isinstance(found, Unavailable):
            raise Unavailable(str(found))
        return found

    return loaded


@cached
def module_of(name: str) -> ModuleType:
    return importlib.import_module(name)


def _unavailable(name: str, error: Exception) -> Unavailable:
    package = name.partition(".")[0]
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing == package:
        return Unavailable(f"{package} is not installed")
    return Unavailable(f"{name} does not import: {type(error).__name__}: {error}")


@cached
def alone(name: str, bare: tuple[str, ...], stand_ins: tuple[str, ...]) -> ModuleType:
    """The module whole, or else by itself, with stand-ins around it."""
    try:
        return module_of(name)
    except Unavailable:
        return standins.load(name, bare=bare, stand_ins=stand_ins)


def attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise Unavailable(f"{module.__name__} has no {name} in the installed version") from None


# --- statistics -------------------------------------------------------------------------------------------------------

_VERL_PACKAGES = ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo")
_VERL_AROUND = ("ray", "tensordict", "omegaconf", "transformers", "verl.trainer.config", "verl.workers")


def _verl_module(name: str) -> ModuleType:
    """verl's files: without ray and configuration where these are not installed."""
    return alone(name, _VERL_PACKAGES, _VERL_AROUND)


def _verl() -> Callable[..., Any]:
    module = _verl_module("verl.utils.torch_functional")
    logprob, entropy = attribute(module, "logprobs_from_logits"), attribute(module, "entropy_from_logits")
    # with flash-attn on a GPU the default is to write the gradient over the logits
    return lambda logits, target: (logprob(logits, target, inplace_backward=False), entropy(logits))


def _verl_fused() -> Callable[..., Any]:
    """verl's path on a machine with flash-attn, whose Triton cross-entropy it then takes for the log-prob."""
    cross_entropy = _fused_cross_entropy()
    entropy = attribute(_verl_module("verl.utils.torch_functional"), "entropy_from_logits")
    return lambda logits, target: (-cross_entropy(logits, target), entropy(logits))


def _fused_cross_entropy() -> Callable[..., Any]:
    try:
        return _flash_attn()
    except Unavailable:
        return _fla()


def _flash_attn() -> Callable[..., Any]:
    function = attribute(module_of("flash_attn.ops.triton.cross_entropy"), "cross_entropy_loss")
    return lambda logits, target: function(logits, target)[0]


def _fla() -> Callable[..., Any]:
    """flash-linear-attention's, which descends from flash-attn's."""
    function = attribute(module_of("fla.modules.fused_cross_entropy"), "cross_entropy_loss")
    return lambda logits, target: function(logits, target)[0]


def _quack() -> Callable[..., Any]:
    function = attribute(module_of("quack.cross_entropy"), "cross_entropy")
    return lambda logits, target: function(logits, target, reduction="none")


def _trl() -> Callable[..., Any]:
    if torch.cuda.is_available():  # the kernel that TRL's functions take on a GPU; needs torch and triton only
        kernels = alone("trl.kernels.logprob_entropy", ("trl", "trl.kernels"), ())
        return attribute(kernels, "selective_log_softmax_and_entropy")
    module = module_of("trl.trainer.utils")
    logprob, entropy = attribute(module, "selective_log_softmax"), attribute(module, "entropy_from_logits")
    return lambda logits, target: (logprob(logits, target), entropy(logits))


def _negated(build: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
    """A cross-entropy per token as ``(logits, target) -> (logprob,)``."""

    def built() -> Callable[..., Any]:
        function = build()
        return lambda logits, target: (-function(logits, target),)

    return built


# --- Liger ------------------------------------------------------------------------------------------------------------


def _liger() -> Callable[..., Any]:
    function = attribute(module_of("liger_kernel.transformers.functional"), "liger_cross_entropy")
    return lambda logits, target, reduction="none": function(logits, target, reduction=reduction)


def _liger_logprob() -> Callable[..., Any]:
    """The log-probs of the old and the reference policy, as Liger's GRPO takes them: (B, L + 1, V), last row unread."""
    return attribute(module_of("liger_kernel.ops.grpo_loss"), "fused_selective_log_softmax")


def _liger_grpo() -> Callable[..., Any]:
    return attribute(module_of("liger_kernel.transformers.grpo_loss"), "triton_grpo_loss")


def _with_a_row_more(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(1, N + 1, V) logits and (1, N) targets."""
    logits = torch.nn.functional.pad(inputs["logits"], (0, 0, 0, 1))
    return logits[None], inputs["target"][None]


def _make_liger_logprob(function: Callable[..., Any], case: Case, inputs: Inputs) -> Prepared:
    logits, target = _with_a_row_more(inputs)
    return Prepared(lambda: (function(logits, target, temperature=1.0)[0],))


def _make_liger_grpo(function: Callable[..., Any], case: Case, inputs: Inputs) -> Prepared:
    """With A = -1 and the old policy the new one, the gradient is that of log-prob times what comes from above."""
    logits, target = _with_a_row_more(inputs)
    upstream, advantages = inputs["grad_logprob"][None], -torch.ones(1, device=case.device)

    def call() -> tuple[Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = function(leaf, None, None, target, advantages, temperature=1.0, beta=0.0, eps_high=0.2, inplace=False)
        (gradient,) = torch.autograd.grad(loss[0], leaf, upstream)
        return (gradient[0, :-1],)

    return Prepared(call)


def _make_mean(function: Callable[..., Any], case: Case, inputs: Inputs) -> Prepared:
    """Mean loss and its gradient, as a supervised trainer calls it: no gradient per token, no upstream factor."""

    def call() -> tuple[Tensor, Tensor]:
        leaf = inputs["logits"].detach().requires_grad_()
        loss = function(leaf, inputs["target"], reduction="mean")
        (gradient,) = torch.autograd.grad(loss, leaf)
        return -loss.detach(), gradient

    return Prepared(call)


# --- losses -----------------------------------------------------------------------------------------------------------


class _Settings(SimpleNamespace):
    """What verl's losses read of a configuration, where verl's own cannot be imported."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


def _verl_config(mode: str, **settings: Any) -> Any:
    try:
        module = module_of("verl.workers.config")
    except Unavailable:
        policy = _Settings(loss_mode=mode, **settings)
        ratios = dict.fromkeys(("clip_ratio", "clip_ratio_low", "clip_ratio_high"), 0.2)
        return _Settings(**ratios, clip_ratio_c=3.0, policy_loss=policy, global_batch_info={})
    policy_loss = attribute(module, "PolicyLossConfig")(loss_mode=mode, **settings)
    actor = attribute(module, "ActorConfig")
    return actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss)


def verl_loss(mode: str, **settings: Any) -> Callable[..., Any]:
    """verl's registered loss as ``(logprob, old_logprob, advantages, mask) -> (loss, metrics)``."""
    function = attribute(_verl_module("verl.trainer.ppo.core_algos"), "get_policy_loss_fn")(mode)
    config = _verl_config(mode, **settings)

    def loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        return function(old_logprob, logprob, advantages, mask, loss_agg_mode="token-mean", config=config)

    return loss


# --- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitsPeer:
    """A function of logits and target. ``computes``: see :mod:`benchmarks.registry`."""

    name: str
    loader: Loader
    computes: str = EVERYTHING


#: Registered for forward, backward and both; functions ``(logits, target) -> outputs``.
LOGITS = (
    LogitsPeer("verl", Loader(_verl, rows=LOOP_ROWS)),
    LogitsPeer("verl-fused-ce", Loader(_verl_fused, device="cuda")),
    LogitsPeer("trl", Loader(_trl)),
    LogitsPeer("flash-attn-ce", Loader(_negated(_flash_attn), device="cuda"), LOGPROB),
    LogitsPeer("fla-ce", Loader(_negated(_fla), device="cuda"), LOGPROB),
    LogitsPeer("quack-ce", Loader(_negated(_quack), device="cuda"), LOGPROB),
)

_LIGER = Loader(_liger, device="cuda")
#: Those with a form of their own: (op, name, loader, what it computes, factory of the call from the function).
#: Liger's cross-entropy makes the gradient in its forward pass, over the logits: its backward pass alone is no rival.
SPECIAL: tuple[tuple[str, str, Loader, str, Callable[[Callable[..., Any], Case, Inputs], Prepared]], ...] = (
    (
        "logprob_entropy", "liger-logprob", Loader(_liger_logprob, device="cuda"), LOGPROB, _make_liger_logprob
    ),
    (
        "logprob_entropy_fwdbwd", "liger-grpo", Loader(_liger_grpo, device="cuda"), GRADIENT, _make_liger_grpo
    ),
    (
        "logprob_entropy", "liger-ce", _LIGER, LOGPROB,
        lambda function, case, inputs: calls.forward(lambda _: lambda *a: (-function(*a),), case, inputs),
    ),
    (
        "logprob_entropy_fwdbwd", "liger-ce", _LIGER, LOGPROB,
        lambda function, case, inputs: calls.on_a_copy(
            functools.partial(calls.forward_backward, lambda _: lambda *a: (-function(*a),)), case, inputs
        ),
    ),
    (
        "logprob_entropy_fwdbwd", "liger-ce-mean", _LIGER, MEAN_LOGPROB,
        lambda function, case, inputs: calls.on_a_copy(functools.partial(_make_mean, function), case, inputs),
    ),
)  # fmt: skip

LOSSES: dict[tuple[str, str], Loader] = {
    ("policy_loss", "verl"): Loader(lambda: verl_loss("vanilla")),
    ("clip_cov_loss", "verl"): Loader(
        lambda: verl_loss("clip_cov", clip_cov_ratio=2e-4, clip_cov_lb=1.0, clip_cov_ub=5.0)
    ),
    ("kl_cov_loss", "verl"): Loader(lambda: verl_loss("kl_cov", kl_cov_ratio=2e-3, ppo_kl_coef=1.0)),
}
