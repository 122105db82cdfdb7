"""Warm start: supervised learning on demonstrations, so that RL starts from a policy that is sometimes right."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.policy import Policy
from entropy_kernels.trainer.tasks import Task

#: Steps of demonstrations that are generated and tokenised together.
_CHUNK = 25


def warm_start(
    policy: Policy, task: Task, config: TrainerConfig, *, on_step: Callable[[int, float], None] | None = None
) -> float:
    """Train `policy` in place by maximum likelihood; returns the loss of the last step, in nats per token.

    AdamW, linear warm-up, cosine decay to 0, gradient norm 1. `on_step(step, loss)` is called every ten steps.
    """
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.warm_lr, betas=(0.9, 0.99), weight_decay=config.warm_weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    last = math.nan
    for step in range(config.warm_steps):
        if step % _CHUNK == 0:
            pairs = task.demonstrations(
                min(_CHUNK, config.warm_steps - step) * config.warm_batch,
                seed=config.warm_seed * 1_000_003 + step,
                wrong_fraction=config.warm_wrong_fraction,
            )
        first = (step % _CHUNK) * config.warm_batch
        batch = pairs[first : first + config.warm_batch]
        prompts = policy.encode([prompt for prompt, _ in batch])
        ids, mask = policy.encode_completions([completion for _, completion in batch])
        outputs = policy.outputs(prompts, ids, mask)
        logprob = policy.logprob_entropy(outputs, ids, mask, temperature=1.0).logprob
        loss = -logprob.sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None and (step % 10 == 9 or step == config.warm_steps - 1):
            on_step(step + 1, float(loss.detach()))
        if step == config.warm_steps - 1:
            last = float(loss.detach())
    return last


def _rate(step: int, config: TrainerConfig) -> float:
    if step < config.warm_warmup_steps:
        return (step + 1) / config.warm_warmup_steps
    progress = (step - config.warm_warmup_steps) / max(1, config.warm_steps - config.warm_warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
