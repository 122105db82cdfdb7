"""The losses that verl calls by name: ours behind its signature, its metric names beside ours.

What was decided about the tokens of a micro-batch before its forward (plan.py) comes around verl's own ``ppo_loss``, in
a :class:`Given`; without one a loss decides among the tokens of its call. Nothing here imports verl.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations.verl.config import Settings, settings_of

__all__ = ["Given", "controller_of", "given", "keep_controller", "numbers", "registered"]

# verl's metric -> ours of the same meaning; of its clip_cov and kl_cov where they mean something else by it
_METRICS = {"pg_clipfrac": "clipfrac", "ppo_kl": "ppo_kl", "pg_clipfrac_lower": "clipfrac_lower"}
_OTHERS = {"clip_cov": {"pg_clipfrac": "selected_frac"}, "kl_cov": {"ppo_kl": "ppo_kl_abs"}}


@dataclass(frozen=True)
class Given:
    """What is known of a micro-batch beside what verl hands a registered loss.

    Attributes:
        control: decided for its tokens, (B, L) as verl pads them; None: not decided yet.
        entropy: of the policy that is trained, (B, L), nats, with its gradient; None: not computed.
        old_entropy: of the policy before the update, (B, L), nats.
        metrics: of the whole batch, to be told with those of the loss.
    """

    control: ek.Control | None = None
    entropy: Tensor | None = None
    old_entropy: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


_GIVEN: ContextVar[Given | None] = ContextVar("entropy_kernels_verl_given", default=None)


@contextlib.contextmanager
def given(known: Given) -> Iterator[None]:
    """What the registered loss that is called inside is given."""
    token = _GIVEN.set(known)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def registered(mode: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The function of verl's signature that its registry has under ``mode``, a ``loss_mode`` of :data:`MODES`."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        settings = settings_of(config)
        if settings is None:
            raise ValueError(f"config: expected an ActorConfig with policy_loss.loss_mode={mode}, got {config!r}")
        known = _GIVEN.get() or Given()
        entropy = known.entropy if settings.entropy_now else None
        control, told = known.control, known.metrics
        if settings.decides and control is None:
            batch = ek.TokenBatch(
                log_prob, old_log_prob, advantages, response_mask, entropy=known.entropy, old_entropy=known.old_entropy
            )
            control = _decided(settings, config, batch)
            told = {**told, **numbers(control.metrics)}
        out = ek.policy_loss(
            log_prob, old_log_prob, advantages, response_mask, surrogate=settings.surrogate, entropy=entropy,
            loss_agg_mode=loss_agg_mode, token_weight=rollout_is_weights, control=control, **settings.loss,
            **config.global_batch_info,
        )  # fmt: skip
        return out.loss, _named(settings, numbers(out.metrics), told)

    loss.__name__ = loss.__qualname__ = mode
    return loss


def _decided(settings: Settings, config: Any, batch: ek.TokenBatch) -> ek.Control:
    """Among the tokens of this call."""
    if settings.target is not None:
        raise RuntimeError(
            f"loss_mode={settings.mode} with target_entropy: expected a plan of the whole rollout, which is made in "
            "TrainingWorker.train_mini_batch, got a call of the loss without one"
        )
    missing = [name for name in ek.methods()[settings.method or ""].needs if getattr(batch, name) is None]
    if missing:
        raise RuntimeError(
            f"{settings.method}: expected {' and '.join(missing)} of the tokens, got a call of the loss without; it "
            "comes with the batches that verl's workers train on"
        )
    return controller_of(settings, config).step(batch)


def controller_of(settings: Settings, config: Any) -> ek.Controller:
    """The one of this actor: it lives as long as its config."""
    found = getattr(config, "ek_controller", None)
    if found is None:
        found = settings.controller()
        keep_controller(config, found)
    return found


def keep_controller(config: Any, controller: ek.Controller) -> None:
    """Beside the fields: verl's config lets nothing be set twice, and OmegaConf's holds no objects."""
    object.__setattr__(config, "ek_controller", controller)


def numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """On the host, by one transfer: verl reads each by itself."""
    if not metrics:
        return {}
    values = torch.stack([x.detach().double() for x in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def _named(settings: Settings, own: dict[str, float], told: dict[str, float]) -> dict[str, float]:
    theirs = {**_METRICS, **_OTHERS.get(settings.method or "", {})}
    found = {f"actor/{name}": own[ours] for name, ours in theirs.items()}
    return {**found, **{f"actor/ek_{name}": value for name, value in {**own, **told}.items()}}
