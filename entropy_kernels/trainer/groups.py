"""A step's groups: prompts, the completions of each and their rewards; and dynamic sampling, which puts others in the
place of those whose completions all have one reward, and which teach nothing where they are compared with each other.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch

from entropy_kernels.trainer.advantages import differ
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.faults import check_sampled
from entropy_kernels.trainer.model import Completions, Encoded, Policy
from entropy_kernels.trainer.rollout import sample_groups
from entropy_kernels.trainer.scoring import Unscored
from entropy_kernels.trainer.tasks import SEED_STRIDE, Prompt, Task, prompts_of
from entropy_kernels.trainer.workers import verify_all

#: Between the seeds of the prompts of a step's rounds; those of steps are neighbours.
ROUND_STRIDE = 10_000_019


@dataclass
class Groups:
    """G prompts with n completions of each: rows of a prompt are adjacent, B = G * n of them."""

    prompts: list[Prompt]
    encoded: Encoded  # (B, P)
    completions: Completions  # (B, L)
    texts: list[str]
    given: list[float]  # rewards
    seconds: tuple[float, float]  # of sampling, and of verifying

    @property
    def samples(self) -> int:
        """Completions of a prompt."""
        return len(self.texts) // len(self.prompts)

    def rewards(self) -> torch.Tensor:
        """(G, n) float32, on the CPU."""
        return torch.tensor(self.given, dtype=torch.float32).view(-1, self.samples)

    def with_signal(self) -> list[bool]:
        """Of each group, whether its completions have different rewards."""
        found: list[bool] = differ(self.rewards()).tolist()
        return found

    def unscored(self) -> list[dict[str, Any]]:
        """The answers that could not be judged, with the reason, and whether that was the time."""
        return [
            {
                "prompt": self.prompts[i // self.samples].text,
                "completion": self.texts[i],
                "reason": reward.reason,
                "late": reward.late,
            }
            for i, reward in enumerate(self.given)
            if isinstance(reward, Unscored)
        ]


@dataclass
class Sampled:
    """What a step has sampled: the groups that it learns from, and what was sampled beside them."""

    groups: Groups
    rounds: list[Groups]


def sample_round(policy: Policy, task: Task, config: TrainerConfig, *, seed: int, generator: torch.Generator) -> Groups:
    """One group for each of a step's prompts, which `seed` gives."""
    # each part ends with a value that the host waits for, so that a GPU's time is its own
    started = time.perf_counter()
    prompts = prompts_of(task, config.prompts_per_step, seed=seed, split="train")
    encoded, completions = sample_groups(policy, task, config, prompts, config.samples_per_prompt, generator)
    check_sampled(encoded, completions, completions.logprob, "while sampling")
    sampled = time.perf_counter()
    texts = policy.decode(completions)
    given = verify_all(task, prompts, texts, partial_credit=config.partial_credit)
    return Groups(prompts, encoded, completions, texts, given, (sampled - started, time.perf_counter() - sampled))


def sample_step(policy: Policy, task: Task, config: TrainerConfig, *, step: int, generator: torch.Generator) -> Sampled:
    """The groups of a step, from up to 1 + ``dynamic_sampling`` rounds.

    Those of the first round keep their places; into the places of those without signal come, in the order in which
    they were sampled, the others that have one (DAPO, arXiv 2503.14476, which leaves them out). Places that are left
    keep what they had.
    """

    def sampled(number: int) -> Groups:
        seed = config.seed * SEED_STRIDE + step + number * ROUND_STRIDE
        return sample_round(policy, task, config, seed=seed, generator=generator)

    rounds = [sampled(0)]
    signal = rounds[0].with_signal()
    chosen = list(range(len(signal)))  # by their number among all groups
    while len(rounds) <= config.dynamic_sampling and not all(signal[group] for group in chosen):
        rounds.append(sampled(len(rounds)))
        first, signal = len(signal), signal + rounds[-1].with_signal()
        fresh = (group for group in range(first, len(signal)) if signal[group])
        chosen = [group if signal[group] else next(fresh, group) for group in chosen]
    return Sampled(rounds[0] if len(rounds) == 1 else _chosen(policy, rounds, chosen), rounds)


def _chosen(policy: Policy, rounds: list[Groups], groups: list[int]) -> Groups:
    """Some groups, by their number among those of all rounds, in one batch."""
    samples = rounds[0].samples
    prompts = [prompt for each in rounds for prompt in each.prompts]
    rows = [group * samples + i for group in groups for i in range(samples)]
    texts, given = ([x for each in rounds for x in getattr(each, name)] for name in ("texts", "given"))
    encoded = policy.encode([prompts[group].text for group in groups])
    return Groups(
        [prompts[group] for group in groups],
        encoded[torch.arange(len(groups), device=policy.device).repeat_interleave(samples)],
        _joined([each.completions for each in rounds], torch.tensor(rows, device=policy.device), policy.encoder.pad_id),
        [texts[row] for row in rows],
        [given[row] for row in rows],
        (sum(each.seconds[0] for each in rounds), sum(each.seconds[1] for each in rounds)),
    )


def _joined(parts: list[Completions], rows: torch.Tensor, pad_id: int) -> Completions:
    """Rows of several batches of completions, as long as the longest of them."""
    length = max(part.ids.shape[1] for part in parts)

    def padded(value: torch.Tensor, fill: int) -> torch.Tensor:
        if value.dim() == 1:
            return value
        return torch.nn.functional.pad(value, (0, length - value.shape[1]), value=fill)

    found = {
        field.name: torch.cat(
            [padded(getattr(part, field.name), pad_id if field.name == "ids" else 0) for part in parts]
        )[rows]
        for field in dataclasses.fields(Completions)
    }
    used = int(found["mask"].any(dim=0).sum())
    return Completions(**{name: value[:, :used] if value.dim() > 1 else value for name, value in found.items()})
