"""The critic: values of a rollout's tokens, which GAE makes advantages of, and what it learns from the returns.

``shared`` is a linear value head on the policy's last hidden states; the policy's weights get its gradient in the same
backward pass. ``separate`` is a model of its own that starts as the policy does, without the policy's head. Either has
its value head in float32 and its own AdamW. The head starts at 0: the first advantages are then the rewards alone, and
no random head sends a gradient into the network.
A critic is in the checkpoint and nowhere else: what a run exports is the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import entropy_kernels as ek
from entropy_kernels._console import one_line
from entropy_kernels.trainer.advantages import ESTIMATORS
from entropy_kernels.trainer.causal_lm import base_of, call, in_training_mode
from entropy_kernels.trainer.lora import load_trained_state, trained_state
from entropy_kernels.trainer.model import Encoded, Policy, model_inputs

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig
    from entropy_kernels.trainer.rollout import Rollout


def critic_of(config: TrainerConfig, policy: Policy) -> Critic | None:
    """The critic of a configuration, beside the policy as it is now; None under an estimator that has none."""
    return CRITICS[config.critic](config, policy) if ESTIMATORS[config.advantage].critic else None


def check_critic(config: TrainerConfig) -> None:
    """Raise ValueError for a critic that cannot be had under this configuration."""
    if ESTIMATORS[config.advantage].critic and config.critic == "shared" and config.head != "linear":
        raise ValueError(
            f"critic: expected separate under head = {config.head}, whose passes give logits and not the hidden states "
            "that a shared critic reads, got shared; take --critic separate or --head linear"
        )


def check_resumed_warmup(config: TrainerConfig, changed: Iterable[str], *, finished: int) -> None:
    """Raise ValueError for steps of the critic alone that are over before a critic that begins anew has learned."""
    if {"advantage", "critic", "critic_warmup"} & {*changed} and 0 < config.critic_first <= finished:
        raise ValueError(
            f"critic_warmup: expected 0, or more than the {finished} finished steps, since steps are counted from the "
            f"run's first, got {config.critic_warmup} (--resume-changes critic_warmup)"
        )


class Critic:
    """A value head on hidden states that subclasses give, and its optimizer."""

    def __init__(self, config: TrainerConfig, policy: Policy) -> None:
        self.config = config
        self.head = nn.utils.skip_init(nn.Linear, _width(policy), 1, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        #: All that is the critic's own, by name.
        self.module = nn.ModuleDict({"head": self.head, **self._beside(policy)})
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad])
        self.set_options()

    def _beside(self, policy: Policy) -> dict[str, nn.Module]:
        """What there is beside the head."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return trained_state(self.module)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`. Raises RuntimeError for the state of another critic."""
        load_trained_state(self.module, state)

    def set_options(self) -> None:
        """Give the optimizer the configuration's options."""
        betas = (self.config.adam_beta1, self.config.adam_beta2)
        for group in self.optimizer.param_groups:
            group |= {"lr": self.config.critic_lr, "betas": betas, "weight_decay": self.config.weight_decay}

    def hidden(self, policy: Policy, prompts: Encoded, ids: Tensor, mask: Tensor, outputs: Tensor) -> Tensor:
        """Hidden states (b, L, H) at the positions that predict the completion's tokens."""
        raise NotImplementedError

    def values(self, policy: Policy, prompts: Encoded, ids: Tensor, mask: Tensor, outputs: Tensor) -> Tensor:
        """Values of completion tokens, before each is drawn: (b, L) float32, 0 where masked.

        `outputs` are the policy's for them, see :meth:`Policy.outputs`.
        """
        hidden = self.hidden(policy, prompts, ids, mask, outputs)
        return self.head(hidden.to(self.head.weight.dtype))[..., 0].masked_fill(~mask, 0)

    def backward(
        self, policy: Policy, rollout: Rollout, rows: Tensor, outputs: Tensor, *, tokens: int, sequences: int
    ) -> dict[str, Tensor]:
        """Value loss and backward of a micro-batch; its gradient is added to the critic's, and to that of `outputs`.

        `tokens` and `sequences` are those of the minibatch, as for the policy's loss. Returns the loss's metrics.
        """
        assert rollout.values is not None and rollout.returns is not None
        mask = rollout.mask[rows]
        values = self.values(policy, rollout.prompts[rows], rollout.ids[rows], rollout.completed[rows], outputs)
        loss, clipped = value_loss(
            values,
            rollout.values[rows],
            rollout.returns[rows],
            mask,
            clip=self.config.value_clip,
            loss_agg_mode=self.config.loss_agg_mode,
            batch_num_tokens=tokens,
            global_batch_size=sequences,
            loss_scale_factor=rollout.longest,
        )
        loss.backward()
        return {"value_loss": loss.detach(), "value_clipfrac": clipped}


class SharedCritic(Critic):
    """On the policy's own hidden states."""

    def hidden(self, policy: Policy, prompts: Encoded, ids: Tensor, mask: Tensor, outputs: Tensor) -> Tensor:
        own = outputs.view_as(outputs)
        if own.requires_grad:  # the coefficient is of what reaches the policy; the head learns by its own rate
            own.register_hook(lambda grad: self.config.value_coef * grad)
        return own


class SeparateCritic(Critic):
    """On those of a copy of the policy's network; weights that are not trained, those below an adapter, are shared."""

    def _beside(self, policy: Policy) -> dict[str, nn.Module]:
        backbone = _network(policy)
        shared = {id(p): p for p in backbone.parameters() if not p.requires_grad}
        return {"backbone": copy.deepcopy(backbone, shared)}

    def hidden(self, policy: Policy, prompts: Encoded, ids: Tensor, mask: Tensor, outputs: Tensor) -> Tensor:
        backbone = self.module["backbone"]
        with policy.precision(), in_training_mode(backbone):
            found: Tensor = call(backbone, **model_inputs(prompts, ids, mask), use_cache=False)[0]
        return found[:, -ids.shape[1] - 1 : -1]


def _network(policy: Policy) -> nn.Module:
    """The policy's, without its head; ValueError for a model of which it cannot be told."""
    base = base_of(policy.model)
    try:
        network: nn.Module = ek.hf.causal_lm_parts(base).backbone
    except TypeError as error:
        raise ValueError(
            f"advantage: expected, for gae, a model whose network can be told from its head, got {type(base).__name__} "
            f"({one_line(error, 200)}); take an estimator without a critic"
        ) from error
    return network


@torch.no_grad()
def _width(policy: Policy) -> int:
    """Of the network's hidden states, which some project before the head."""
    token = torch.zeros((1, 1), dtype=torch.long, device=policy.device)
    inputs = model_inputs(Encoded(token, token + 1), token[:, :0], token[:, :0].bool())
    return int(call(_network(policy), **inputs, use_cache=False)[0].shape[-1])


#: By the configuration's names.
CRITICS: dict[str, type[Critic]] = {"shared": SharedCritic, "separate": SeparateCritic}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, **aggregation: Any
) -> tuple[Tensor, Tensor]:
    """Half the squared error of values, or of those within `clip` of the old ones if that is larger.

    Parameters
    ----------
    values, old_values, returns : Tensor
        (b, L); values under the weights of now, and those of the rollout.
    mask : Tensor
        (b, L) bool.
    clip : float
        Largest change of a value that is rewarded; 0: any.
    aggregation
        ``loss_agg_mode`` and what else :func:`entropy_kernels.aggregate` takes.

    Returns
    -------
    tuple of Tensor
        The loss, 0-d, and the share of valid tokens where the clipped error is the larger one.

    Source
    ------
    Schulman et al. 2017's code (openai/baselines, ppo2); verl's compute_value_loss.
    """
    error = (values - returns) ** 2
    limited = error if clip == 0 else (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    loss = 0.5 * ek.aggregate(torch.maximum(error, limited), mask, **aggregation)
    return loss, (limited > error)[mask].float().sum() / mask.sum().clamp_min(1)
