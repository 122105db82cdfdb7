"""verl's and TRL's own losses as functions of log-probs, beside ours: value, gradient by autograd, metrics.

Their code runs as it is installed. verl's losses are plain functions. TRL's is a method of its trainer: it is called
with a stub of the trainer that holds the settings it reads and gives out the log-probs in place of a model.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

import entropy_kernels as ek
import reference_surrogates
from surrogate_cases import far_off, surrogate_batch, weights_of

Array = np.ndarray
Arrays = tuple[Array, ...]  # log-probs, old ones, advantages, mask


class Result(NamedTuple):
    loss: float
    gradient: Array
    metrics: dict[str, float]


def _result(loss: Tensor, logprob: Tensor, metrics: dict[str, Any]) -> Result:
    loss.backward()
    values = {name: float(value) for name, value in metrics.items()}
    return Result(float(loss.detach()), logprob.grad.double().numpy(), values)


def verl_loss(
    name: str, arrays: Arrays, *, mode: str = "token-mean", whole: dict[str, Any] | None = None,
    token_weight: Array | None = None, dtype: torch.dtype = torch.float64, **settings: Any,
) -> Result:  # fmt: skip
    """A registered loss; ``whole``: the counts of the whole batch, by the names of ``agg_loss``.

    ``settings``: fields of verl's ActorConfig, or of its PolicyLossConfig.
    """
    of_policy = {key: settings.pop(key) for key in list(settings) if key in PolicyLossConfig.__dataclass_fields__}
    fixed = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "global_batch_info": whole or {}}
    config = ActorConfig(policy_loss=PolicyLossConfig(loss_mode=name, **of_policy), **fixed, **settings)
    lp, old, advantages, mask = (torch.tensor(x, dtype=dtype) for x in arrays)
    weight = None if token_weight is None else torch.tensor(token_weight, dtype=dtype)
    function = core_algos.get_policy_loss_fn(name)
    # autograd's NaN in padding is no concern here: padding is finite
    tensors = old, lp.requires_grad_(), advantages, mask
    loss, metrics = function(*tensors, loss_agg_mode=mode, config=config, rollout_is_weights=weight)
    return _result(loss, lp, metrics)


def _same(tensor: Tensor, **_: Any) -> Tensor:
    return tensor


_TRAINER: dict[str, Any] = {
    "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
    "max_completion_length": 1, "aux_loss_enabled": False, "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None, "vllm_importance_sampling_correction": True,
    "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "model": SimpleNamespace(training=True),
    "accelerator": SimpleNamespace(num_processes=1, gather=_same, reduce=_same),
    "get_gamma_weights": GRPOTrainer.get_gamma_weights,
}  # fmt: skip
_CONFIG: dict[str, Any] = {
    "use_bias_correction_kl": False, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "steps_per_generation": 1,
}  # fmt: skip


def trl_loss(
    loss_type: str, arrays: Arrays, *, ref: Array | None = None, token_weight: Array | None = None,
    num_items: float | None = None, dtype: torch.dtype = torch.float64, **settings: Any,
) -> Result:  # fmt: skip
    """``GRPOTrainer._compute_loss`` in training mode, one process, one micro-batch.

    ``settings``: the trainer's, or of its GRPOConfig.
    """
    assert settings.keys() <= _TRAINER.keys() | _CONFIG.keys()
    lp, old, advantages, mask = (torch.tensor(x, dtype=dtype) for x in arrays)
    lp.requires_grad_()
    ids = torch.zeros(lp.shape, dtype=torch.long)
    trainer = SimpleNamespace(
        **{key: settings.get(key, value) for key, value in _TRAINER.items()},
        args=SimpleNamespace(**{key: settings.get(key, value) for key, value in _CONFIG.items()}),
        loss_type=loss_type,
        use_vllm=token_weight is not None,
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (lp, torch.zeros_like(lp), None),
    )
    inputs = {
        "prompt_ids": ids[:, :0], "prompt_mask": ids[:, :0], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old,
        "num_items_in_batch": mask.float().sum() if num_items is None else torch.tensor(float(num_items)),
    }  # fmt: skip
    for name, value in (("ref_per_token_logps", ref), ("importance_sampling_ratio", token_weight)):
        if value is not None:
            inputs[name] = torch.tensor(value, dtype=dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a `where` of two numbers, such as sapo's temperatures, is of the default dtype
    try:
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    finally:
        torch.set_default_dtype(default)
    return _result(loss, lp, {name: values[-1] for name, values in trainer._metrics["train"].items()})


def ours(function: Any, arrays: Arrays, **options: Any) -> Result:
    """``function``: one of our losses, which gets arrays as tensors."""
    lp, *constants = (torch.tensor(x) for x in arrays)
    options = {key: torch.tensor(x) if isinstance(x, Array) else x for key, x in options.items()}
    out = function(lp.requires_grad_(), *constants, **options)
    return _result(out.loss, lp, out.metrics)


@dataclass(frozen=True)
class Pair:
    """A peer's loss and the surrogate that is the same."""

    peer: str
    surrogate: str
    given: dict[str, Any] = field(default_factory=dict)  # options, by our names
    implied: dict[str, Any] = field(default_factory=dict)  # those that the peer has as its default

    @property
    def options(self) -> dict[str, Any]:
        return self.given | self.implied

    def __str__(self) -> str:
        return "-".join([self.peer, self.surrogate, *(f"{key}={value}" for key, value in self.given.items())])


def clips(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"clip_low": low, "clip_high": high, **more}


class Case:
    """A batch in numpy with finite padding; advantages are per sequence in half of them, as TRL has them."""

    aggregation: dict[str, Any]  # "mode", and the counts of the whole batch

    def __init__(self, seed: int, far: bool = False) -> None:
        batch = surrogate_batch(seed)
        if far:
            batch = far_off(batch, seed)
        self.arrays = self.lp, self.old, self.adv, self.mask = batch.arrays()
        self.n, self.name = int(self.mask.sum()), f"seed {seed} ({batch.name})"
        self.weight = np.nan_to_num(weights_of(seed, batch).numpy(), nan=1.0) if seed % 3 == 0 else None
        self.our_weight = self.weight


def reference(pair: Pair, case: Case, **kl: Any) -> reference_surrogates.Reference:
    weight = {"token_weight": case.our_weight}
    return reference_surrogates.loss(
        pair.surrogate, *case.arrays, options=pair.options, **case.aggregation, **weight, **kl
    )


def by_reference(pair: Pair, case: Case, **kl: Any) -> Result:
    out = reference(pair, case, **kl)
    return Result(out.loss, out.logprob, out.metrics)


def by_ours(pair: Pair, case: Case, ref: Array | None = None, **kl: Any) -> Result:
    whole = {"loss_agg_mode" if key == "mode" else key: value for key, value in case.aggregation.items()}
    more = {"token_weight": case.our_weight, "ref_logprob": ref, **kl}
    return ours(ek.policy_loss, case.arrays, surrogate=pair.surrogate, **whole, **more, **pair.options)


JUDGES = pytest.mark.parametrize("judge", [by_reference, by_ours], ids=["formula", "ours"])


def assert_close(got: Any, peer: Any, name: str, tolerance: float = 1e-10, slack: float = 0.0) -> None:
    scale = float(np.abs(peer).max(initial=0))
    np.testing.assert_allclose(got, peer, rtol=tolerance, atol=1e-13 + 1e-13 * scale + slack, err_msg=name)
