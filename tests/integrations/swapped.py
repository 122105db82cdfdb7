"""A pytest plugin (``-p swapped``): all that we have for verl is in place, for verl's own tests.

Importing verl loads our plugin; here the rest is switched on, and verl's functions of losses are those that it has
under ``ek_*`` in its registry. A test that imports one from verl afterwards gets ours. What was called is written to
the file $SWAPPED_CALLS.
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
from entropy_kernels.integrations._patch import patches
from entropy_kernels.integrations.verl import statistics, worker
from entropy_kernels.losses import kl_estimate

CALLS: collections.Counter[str] = collections.Counter()


def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **whole: Any) -> Tensor:
    return ek.aggregate(loss_mat, loss_mask, loss_agg_mode=loss_agg_mode, **whole)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    return kl_estimate(logprob - ref_logprob, kl_penalty)


class _Seen:
    """A config with some attributes replaced: the tests name another ``loss_mode``, or none."""

    def __init__(self, config: Any, **changed: Any) -> None:
        self.__dict__.update(changed)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _registered(mode: str) -> Callable[..., Any]:
    ours = core_algos.get_policy_loss_fn(mode)

    @functools.wraps(ours)
    def loss(*args: Any, config: Any = None, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        if len(args) > 5:  # verl's sixth
            *args, config = args
        policy = _Seen(config.policy_loss, loss_mode=mode)
        return ours(*args, config=_Seen(config, policy_loss=policy), **kwargs)

    return loss


OURS: dict[str, Callable[..., Any]] = {
    "agg_loss": agg_loss,
    "kl_penalty": kl_penalty,
    "compute_policy_loss_vanilla": _registered("ek_ppo"),
    "compute_policy_loss_dro": _registered("ek_dro"),
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
worker.install()
statistics.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    of_patches = {one.target: one.calls for one in patches() if one.package == "verl"}
    with open(os.environ["SWAPPED_CALLS"], "w") as file:
        file.writelines(f"{name} {calls}\n" for name, calls in [*((n, CALLS[n]) for n in OURS), *of_patches.items()])
