"""Loaders of peer packages: the functions under one signature, or the reason why they cannot be had here.

Nothing of a peer is copied: each is imported from the package that is installed, and skipped with the reason otherwise.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor


class Unavailable(Exception):
    """A peer cannot be used here; the message says why."""


@dataclass(frozen=True)
class Loader:
    """``build`` returns the peer's function in our form or raises :class:`Unavailable`."""

    build: Callable[[], Callable[..., Any]]

    def load(self) -> Callable[..., Any]:
        return self.build()

    def reason(self) -> str | None:
        """None, or why the peer cannot be used."""
        try:
            self.build()
        except Unavailable as error:
            return str(error)
        return None


@functools.cache
def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a foreign package may fail to import in any way; the reason is reported
        package = name.partition(".")[0]
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing == package:
            raise Unavailable(f"{package} is not installed") from None
        raise Unavailable(f"{name} does not import: {type(error).__name__}: {error}") from None


def _attribute(module: str, name: str) -> Callable[..., Any]:
    try:
        return getattr(_module(module), name)
    except AttributeError:
        raise Unavailable(f"{module} has no {name} in the installed version") from None


def _verl_logits() -> Callable[..., Any]:
    logprob = _attribute("verl.utils.torch_functional", "logprobs_from_logits")
    entropy = _attribute("verl.utils.torch_functional", "entropy_from_logits")
    # with flash-attn on a GPU the default is to write the gradient over the logits
    return lambda logits, target: (logprob(logits, target, inplace_backward=False), entropy(logits))


def _trl_logits() -> Callable[..., Any]:
    logprob = _attribute("trl.trainer.utils", "selective_log_softmax")
    entropy = _attribute("trl.trainer.utils", "entropy_from_logits")
    return lambda logits, target: (logprob(logits, target), entropy(logits))


def _verl_loss(mode: str, **settings: Any) -> Callable[..., Any]:
    """verl's registered loss as ``(logprob, old_logprob, advantages, mask) -> (loss, metrics)``."""
    function = _attribute("verl.trainer.ppo.core_algos", "get_policy_loss_fn")(mode)
    actor = _attribute("verl.workers.config", "ActorConfig")
    policy = _attribute("verl.workers.config", "PolicyLossConfig")
    config = actor(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy(loss_mode=mode, **settings),
    )

    def loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        return function(old_logprob, logprob, advantages, mask, loss_agg_mode="token-mean", config=config)

    return loss


LOGITS: dict[str, Loader] = {"verl": Loader(_verl_logits), "trl": Loader(_trl_logits)}
LOSSES: dict[tuple[str, str], Loader] = {
    ("policy_loss", "verl"): Loader(lambda: _verl_loss("vanilla")),
    ("clip_cov_loss", "verl"): Loader(
        lambda: _verl_loss("clip_cov", clip_cov_ratio=2e-4, clip_cov_lb=1.0, clip_cov_ub=5.0)
    ),
    ("kl_cov_loss", "verl"): Loader(lambda: _verl_loss("kl_cov", kl_cov_ratio=2e-3, ppo_kl_coef=1.0)),
}
