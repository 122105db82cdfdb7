"""Rollouts: completions from the policy and their statistics; the validation on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.advantages import pass_at_k
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.critic import Critic
from entropy_kernels.trainer.methods import METHODS
from entropy_kernels.trainer.model import Completions, Encoded, Policy
from entropy_kernels.trainer.samples import Answers
from entropy_kernels.trainer.scoring import Unscored
from entropy_kernels.trainer.tasks import Prompt, Task, prompts_of
from entropy_kernels.trainer.workers import RIGHT, reward_of, scores_of

#: Validation uses the same held-out prompts at every step, so that its curve shows the policy and not the prompts.
VALIDATION_SEED = 0

#: Statistics of tokens, a field each.
Stats = ek.LogprobEntropy | ek.TokenStats


@dataclass
class Rollout:
    """One batch of experience. B = prompts * samples rows, L completion positions.

    What is trained on stands in `mask`; what was sampled, in `completed` and `lengths`, which are told of in the log.
    The two differ under mask_truncated alone.
    """

    prompts: Encoded  # (B, P)
    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool: tokens that count in losses, control and their denominators
    rewards: Tensor  # (prompts, samples) float32
    advantages: Tensor  # (B, L) float32, 0 where masked
    old_logprob: Tensor  # (B, L) float32, of the policy that sampled
    entropy: Tensor  # (B, L) float32, nats
    collision: Tensor  # (B, L) float32
    vocab_covariance: Tensor  # (B, L) float32
    sampling_gap: float  # largest |log-prob while sampling - log-prob of the full forward|
    sampled_rewards: Tensor  # (groups, samples) of all that were sampled
    completed: Tensor  # (B, L) bool: all tokens of the completions
    truncated: Tensor  # (B,) bool: ran into max_new_tokens
    longest: int  # tokens that a completion may have, whatever these have
    seconds: dict[str, float] = field(default_factory=dict)  # of sample, verify, score
    unscored: list[dict[str, Any]] = field(default_factory=list)  # prompt, completion, reason, late
    ref_logprob: Tensor | None = None  # (B, L) float32, of the reference, where there is one
    values: Tensor | None = None  # (B, L) float32, the critic's, of the weights that sampled; None without a critic
    returns: Tensor | None = None  # (B, L) float32, what it learns

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, (B,) int64."""
        return self.completed.sum(dim=1)

    def counts(self, rows: Tensor) -> tuple[int, int]:
        """Tokens that count among some rows, and sequences with one: what losses are divided by."""
        mask = self.mask[rows]
        return int(mask.sum()), int(mask.any(dim=1).sum())

    @property
    def tokens(self) -> int:
        """Completion tokens that were sampled."""
        return int(self.completed.sum())


def mean_over(values: Tensor, mask: Tensor) -> float:
    """Mean over valid tokens, summed in float64."""
    return float(values.double()[mask].mean())


def sample_groups(
    policy: Policy, task: Task, config: TrainerConfig, prompts: list[Prompt], samples: int, generator: torch.Generator
) -> tuple[Encoded, Completions]:
    """`samples` completions for each prompt; rows of one prompt are adjacent."""
    encoded = policy.encode([prompt.text for prompt in prompts])
    encoded = encoded[torch.arange(len(prompts), device=policy.device).repeat_interleave(samples)]
    completions = policy.sample(
        encoded,
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        temperature=config.temperature,
        generator=generator,
    )
    return encoded, completions


def row_slices(config: TrainerConfig, rows: int) -> list[slice]:
    """Slices of the size of a micro-batch: what the model is known to hold at once."""
    size = max(1, config.prompts_per_step * config.samples_per_prompt // (config.minibatches * config.micro_batches))
    return [slice(start, start + size) for start in range(0, rows, size)]


@torch.no_grad()
def score(policy: Policy, config: TrainerConfig, prompts: Encoded, ids: Tensor, mask: Tensor) -> ek.TokenStats:
    """All statistics, each (B, L) float32, of completions under the current policy."""
    return score_and_value(policy, None, config, prompts, ids, mask)[0]


@torch.no_grad()
def score_and_value(
    policy: Policy, critic: Critic | None, config: TrainerConfig, prompts: Encoded, ids: Tensor, mask: Tensor
) -> tuple[ek.TokenStats, Tensor | None]:
    """:func:`score`, and the critic's values (B, L) float32 where there is one."""
    parts, values = [], []
    for rows in row_slices(config, ids.shape[0]):
        inputs = prompts[rows], ids[rows], mask[rows]
        outputs = policy.outputs(*inputs)
        parts.append(policy.token_stats(outputs, *inputs[1:], temperature=config.temperature))
        if critic is not None:
            values.append(critic.values(policy, *inputs, outputs))
    stats = ek.TokenStats(*(torch.cat(found) for found in zip(*parts, strict=True)))
    return stats, torch.cat(values) if values else None


@torch.no_grad()
def fresh_stats(policy: Policy, rollout: Rollout, rows: Tensor, config: TrainerConfig) -> Stats:
    """Statistics of the rollout's `rows` under the current weights, each (b, L): those that the method decides by."""
    ids, mask = rollout.ids[rows], rollout.completed[rows]
    return stats_for(config)(
        policy, policy.outputs(rollout.prompts[rows], ids, mask), ids, mask, temperature=config.temperature
    )


def stats_for(config: TrainerConfig) -> Callable[..., Stats]:
    """The op of a policy that gives what the configuration's method decides by."""
    more = METHODS[config.method].needs("collision", "vocab_covariance")
    return Policy.token_stats if more else Policy.logprob_entropy


def known_tokens(
    rollout: Rollout,
    parts: Sequence[Tensor],
    config: TrainerConfig,
    *,
    fresh: Sequence[Stats] | None = None,
    backend: str = "auto",
) -> ek.SelectionBatch:
    """A minibatch as a method sees it, one entry of `parts` (rows of the rollout) for each of its micro-batches.

    Statistics are those of the policy of now as far as they are in `fresh`, an entry per micro-batch, and of the one
    that sampled otherwise. A token's index is its place in the rollout, which makes draws independent of the split.
    """
    batch, length = ek.SelectionBatch(backend=backend), rollout.ids.shape[1]
    masks = [rollout.mask[rows] for rows in parts]
    tokens, sequences = rollout.counts(torch.cat(list(parts)))
    for i, (rows, mask) in enumerate(zip(parts, masks, strict=True)):
        known = {"logprob": rollout.old_logprob[rows]}
        known |= {name: getattr(rollout, name)[rows] for name in ("entropy", "collision", "vocab_covariance")}
        if fresh is not None:
            known |= {name: value.detach() for name, value in fresh[i]._asdict().items()}
        batch.add(
            known.pop("logprob"),
            rollout.advantages[rows],
            mask,
            rows[:, None] * length + torch.arange(length, device=rows.device),
            old_logprob=rollout.old_logprob[rows],
            old_entropy=rollout.entropy[rows],
            coefficient=_coefficient(mask, config, tokens, sequences, rollout.longest),
            temperature=config.temperature,
            **known,
        )
    return batch


def all_tokens(rollout: Rollout, order: Sequence[Tensor], config: TrainerConfig) -> ek.TokenBatch:
    """The whole rollout as the policy that sampled it sees it, for a plan of all updates: `order` has their rows.

    A token's coefficient is its weight in the loss of its minibatch, the mean over the epochs.
    """
    coefficient = torch.zeros(rollout.mask.shape, dtype=torch.float64, device=rollout.mask.device)
    for rows in order:
        weight = _coefficient(rollout.mask[rows], config, *rollout.counts(rows), rollout.longest)
        coefficient[rows] += weight.view(len(rows), -1) / config.epochs
    return ek.TokenBatch(
        rollout.old_logprob,
        None,
        rollout.advantages,
        rollout.mask,
        entropy=rollout.entropy,
        collision=rollout.collision,
        vocab_covariance=rollout.vocab_covariance,
        coefficient=coefficient,
        temperature=config.temperature,
    )


def _coefficient(mask: Tensor, config: TrainerConfig, tokens: int, sequences: int, longest: int) -> Tensor:
    """The weight of each token in the loss, (b, L), or (b,) where it is that of all tokens of a sequence."""
    if config.loss_agg_mode == "token-mean":
        return torch.full((len(mask),), 1 / max(tokens, 1), dtype=torch.float64, device=mask.device)
    with torch.enable_grad():
        ones = torch.ones(mask.shape, device=mask.device, requires_grad=True)
        total = ek.aggregate(
            ones, mask, loss_agg_mode=config.loss_agg_mode, global_batch_size=sequences, loss_scale_factor=longest
        )
        return torch.autograd.grad(total, ones)[0]


@torch.no_grad()
def evaluate(
    policy: Policy,
    task: Task,
    config: TrainerConfig,
    *,
    prompts: int,
    samples: int,
    generator: torch.Generator,
    each: Callable[[Answers], None] | None = None,
) -> dict[str, float]:
    """Validation on held-out prompts; `each` is called with the completions of every one, in their order.

    Returns
    -------
    dict
        ``pass1``, and ``passK`` (unbiased) for K in 8, 32 and `samples` as far as K <= samples; ``distinct``: mean
        number of different right completions per prompt; ``entropy``: mean token entropy, nats; ``reward``, ``length``
        and ``truncated``: means over completions; ``unscored``: completions that could not be judged.
    """
    problems = prompts_of(task, prompts, seed=VALIDATION_SEED, split="validation")
    at_once = max(1, config.eval_batch // samples)
    right, distinct, entropy, tokens, total, truncated, unscored = [], [], 0.0, 0, 0.0, 0, 0
    for start in range(0, len(problems), at_once):
        part = problems[start : start + at_once]
        _, completions = sample_groups(policy, task, config, part, samples, generator)
        texts = policy.decode(completions)
        scores = scores_of(task, part, texts)
        rewards = [reward_of(score, config.partial_credit) for score in scores]
        unscored += sum(isinstance(reward, Unscored) for reward in rewards)
        lengths, cut = completions.mask.sum(dim=1).tolist(), (~completions.ended).tolist()
        for i in range(len(part)):
            group = slice(i * samples, (i + 1) * samples)
            answers = Answers(part[i], texts[group], scores[group], rewards[group], lengths[group], cut[group])
            good = [text for text, reward in zip(answers.texts, answers.rewards, strict=True) if reward >= RIGHT]
            right.append(len(good))
            distinct.append(len(set(good)))
            if each is not None:
                each(answers)
        entropy += float(completions.entropy.double().sum())
        tokens, total, truncated = tokens + sum(lengths), total + sum(rewards), truncated + sum(cut)
    correct = torch.tensor(right)
    metrics = {f"pass{k}": pass_at_k(correct, samples, k) for k in sorted({1, 8, 32, samples}) if k <= samples}
    metrics["distinct"] = sum(distinct) / len(distinct)
    metrics["entropy"] = entropy / max(tokens, 1)
    means = {"reward": total, "length": tokens, "truncated": truncated}
    metrics |= {name: value / (len(problems) * samples) for name, value in means.items()}
    return {**metrics, "unscored": unscored}
