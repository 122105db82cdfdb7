"""A pytest plugin (``-p swapped``): verl's functions of losses are ours, for verl's own tests.

A test that imports one from verl afterwards gets ours. What was called is written to the file $SWAPPED_CALLS.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from verl.trainer.ppo import core_algos

import entropy_kernels as ek
from entropy_kernels.losses import kl_estimate

CALLS: collections.Counter[str] = collections.Counter()


def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **whole: Any) -> Tensor:
    return ek.aggregate(loss_mat, loss_mask, loss_agg_mode=loss_agg_mode, **whole)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    return kl_estimate(logprob - ref_logprob, kl_penalty)


def _registered(surrogate: str, options: Callable[[Any], dict[str, Any]]) -> Callable[..., Any]:
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        out = ek.policy_loss(
            log_prob, old_log_prob, advantages, response_mask, surrogate=surrogate, loss_agg_mode=loss_agg_mode,
            token_weight=rollout_is_weights, **config.global_batch_info, **options(config),
        )  # fmt: skip
        names = {"pg_clipfrac": "clipfrac", "ppo_kl": "ppo_kl", "pg_clipfrac_lower": "clipfrac_lower"}
        return out.loss, {f"actor/{theirs}": out.metrics[ours].item() for theirs, ours in names.items()}

    return loss


def _vanilla(config: Any) -> dict[str, Any]:
    dual_clip = config.get("clip_ratio_c", 3.0)
    return {"clip_low": config.clip_ratio_low, "clip_high": config.clip_ratio_high, "dual_clip": dual_clip}


def _dro(config: Any) -> dict[str, Any]:
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:  # verl has no default
        raise ValueError("dro_beta: expected a positive number")
    return {"dro_beta": beta}


OURS: dict[str, Callable[..., Any]] = {
    "agg_loss": agg_loss,
    "kl_penalty": kl_penalty,
    "compute_policy_loss_vanilla": _registered("ppo", _vanilla),
    "compute_policy_loss_dro": _registered("dro", _dro),
}


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return function(*args, **kwargs)

    return call


for _name, _function in OURS.items():
    assert callable(getattr(core_algos, _name))
    setattr(core_algos, _name, _counted(_name, _function))


def pytest_sessionfinish(session: pytest.Session) -> None:
    with open(os.environ["SWAPPED_CALLS"], "w") as file:
        file.writelines(f"{name} {CALLS[name]}\n" for name in OURS)
