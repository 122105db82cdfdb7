"""verl's and TRL's own losses as functions of log-probs: value, gradient by autograd, metrics.

Their code runs as it is installed. verl's losses are plain functions. TRL's is a method of its trainer: it is called
with a stand-in for the trainer that holds the settings it reads and gives out the log-probs in place of a model.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

Array = np.ndarray


class Result(NamedTuple):
    loss: float
    gradient: Array
    metrics: dict[str, float]


def verl_config(name: str, *, global_batch_info: dict[str, Any] | None = None, **settings: Any) -> ActorConfig:
    """``settings``: fields of verl's ActorConfig, or of its PolicyLossConfig."""
    of_policy = {key: settings.pop(key) for key in list(settings) if key in PolicyLossConfig.__dataclass_fields__}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=name, **of_policy),
        global_batch_info=global_batch_info or {},
        **settings,
    )


def verl_loss(
    name: str,
    lp: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    *,
    mode: str = "token-mean",
    whole: dict[str, Any] | None = None,
    token_weight: Array | None = None,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Result:
    """A registered loss; ``whole``: the counts of the whole batch, by the names of ``agg_loss``."""
    leaf = torch.tensor(lp, dtype=dtype, requires_grad=True)
    constants = [torch.tensor(x, dtype=dtype) for x in (advantages, mask.astype(float))]
    weight = None if token_weight is None else torch.tensor(token_weight, dtype=dtype)
    config = verl_config(name, global_batch_info=whole, **settings)
    function = core_algos.get_policy_loss_fn(name)
    # autograd's NaN in padding is no concern here: padding is finite
    loss, metrics = function(
        torch.tensor(old, dtype=dtype), leaf, *constants, loss_agg_mode=mode, config=config, rollout_is_weights=weight
    )
    loss.backward()
    assert leaf.grad is not None
    return Result(float(loss.detach()), leaf.grad.double().numpy(), metrics)


_TRL_ARGS = {
    "use_bias_correction_kl": False,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "steps_per_generation": 1,
}


def trl_loss(
    loss_type: str,
    lp: Array,
    old: Array,
    advantages: Array,
    mask: Array,
    *,
    level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    ref: Array | None = None,
    token_weight: Array | None = None,
    num_items: float | None = None,
    max_completion_length: int = 1,
    dtype: torch.dtype = torch.float64,
    **args: Any,
) -> Result:
    """``GRPOTrainer._compute_loss`` in training mode, one process, one micro-batch; ``args``: of its GRPOConfig."""
    assert args.keys() <= _TRL_ARGS.keys()
    leaf = torch.tensor(lp, dtype=dtype, requires_grad=True)
    ids = torch.zeros(lp.shape, dtype=torch.long)
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        use_vllm=token_weight is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=_same, reduce=_same),
        args=SimpleNamespace(**{**_TRL_ARGS, **args}),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
    )
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": torch.tensor(mask, dtype=torch.long),
        "advantages": torch.tensor(advantages, dtype=dtype),
        "old_per_token_logps": torch.tensor(old, dtype=dtype),
        "num_items_in_batch": torch.tensor(float(mask.sum()) if num_items is None else num_items),
    }
    if ref is not None:
        inputs["ref_per_token_logps"] = torch.tensor(ref, dtype=dtype)
    if token_weight is not None:
        inputs["importance_sampling_ratio"] = torch.tensor(token_weight, dtype=dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a `where` of two numbers, such as sapo's temperatures, is of the default dtype
    try:
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    finally:
        torch.set_default_dtype(default)
    loss.backward()
    assert leaf.grad is not None
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Result(float(loss.detach()), leaf.grad.double().numpy(), metrics)


def _same(tensor: Tensor, **_: Any) -> Tensor:
    return tensor
