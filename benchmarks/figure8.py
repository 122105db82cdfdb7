"""Figure 8 of arXiv 2505.22617 on the embedded task: what the entropy loses in a step beside what covariances say of it.

    python -m benchmarks.figure8            # five seeds, a start each; one that is done is not run again
    python -m benchmarks.figure8 --quick    # two short runs into runs/figure8-quick, to see that all of it works
    python -m benchmarks.figure8 --report   # figure8.md and figure8.png from the runs that are there

GRPO with one update per rollout (on-policy, every ratio 1), as the paper has it. Per step, with no change of the run:

measured    -ΔH, mean over tokens: on the rollout's own tokens before and after the update ("same"), and between this
            rollout and the next one ("next"), which is what a log of entropies shows and the paper plots.
group       the paper's covariance (its section 3.3): a prompt's completions y, Cov(log p(y)/|y|, A), mean over prompts.
literal     its Eq. 8 word by word, with Eq. 9's log-prob in it: Cov(lp, exp(lp)·A), lp = log p(y)/|y|.
batch       Cov(log p, A) over all tokens of the batch: the mean of what Clip-Cov and KL-Cov select by.
exact       A·C/T², mean over tokens: -ΔH of a step in logits that are free parameters (docs/math.md).
gradient    ∇H·(-∇L): -ΔH of a plain gradient step in the weights, to first order, by unit learning rate.
first order -∇H·Δθ, Δθ being what AdamW did: the most that any first order can say.

Covariances divide by the number of completions; prompts whose completions all got the same reward count with 0.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plots import save
from benchmarks.results import RESULTS, ROOT, describe
from entropy_kernels.analysis import plot_style as style
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.files import write_text
from entropy_kernels.trainer.ppo import train
from entropy_kernels.trainer.probes import FirstOrder, Probe, Step, entropy_now
from entropy_kernels.trainer.rollout import Rollout, mean_over

OUT = RESULTS / "figure8"
SEEDS = (0, 1, 2, 3, 4)
#: Tried on seeds from 100 on; everything else is the trainer's default.
SETTINGS: dict[str, Any] = {"method": "grpo", "minibatches": 1, "epochs": 1, "steps": 240}
#: The optimizer is AdamW, as usual (with a momentum of 0.9); then the same without momentum.
VARIANTS: dict[str, dict[str, Any]] = {"adamw": SETTINGS, "no-momentum": {**SETTINGS, "adam_beta1": 0.0}}
QUICK: dict[str, Any] = {"steps": 40, "warm_steps": 200, "prompts_per_step": 16}
#: What a prompt has of each, by its accuracy.
BY_ACCURACY = ("group", "exact", "measured", "entropy")
BLOCK = 10  # steps


# --- what is measured -------------------------------------------------------------------------------------------------


def covariance(x: Tensor, y: Tensor) -> Tensor:
    """Of each row, in float64, divided by its length: (G, n), (G, n) -> (G,)."""
    x, y = x.double(), y.double()
    return ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1)


def of_prompts(rollout: Rollout, after: Tensor, temperature: float) -> dict[str, Tensor]:
    """What each prompt of a rollout has, (G,) float64 each; `after` is the entropy after the update, (B, L).

    ``group`` and ``literal`` of its completions; ``exact``, ``measured`` and ``entropy`` as means over its tokens;
    ``accuracy``, the share of its completions with the full reward, and ``tokens``.
    """
    mask, (prompts, samples) = rollout.mask.double(), rollout.rewards.shape
    lengths = mask.sum(1)

    def of_tokens(values: Tensor) -> Tensor:
        sums = torch.where(rollout.mask, values.double(), 0.0).view(prompts, -1).sum(1)
        return sums / lengths.view(prompts, samples).sum(1)

    logprob = torch.where(rollout.mask, rollout.old_logprob.double(), 0.0).sum(1) / lengths
    logprob, advantage = logprob.view(prompts, samples), rollout.advantages[:, 0].double().view(prompts, samples)
    return {
        "accuracy": (rollout.rewards >= 1).double().mean(1),
        "tokens": lengths.view(prompts, samples).sum(1),
        "group": covariance(logprob, advantage),
        "literal": covariance(logprob, logprob.exp() * advantage),
        "exact": of_tokens(rollout.advantages.double() * rollout.vocab_covariance) / temperature**2,
        "measured": of_tokens(rollout.entropy.double() - after),
        "entropy": of_tokens(rollout.entropy),
    }


def of_batch(rollout: Rollout, prompts: Mapping[str, Tensor]) -> dict[str, float]:
    """The step's numbers: means over prompts of the paper's covariances, over tokens of everything else."""
    weights = prompts["tokens"] / prompts["tokens"].sum()
    tokens = (rollout.old_logprob[rollout.mask][None], rollout.advantages[rollout.mask][None])
    return {
        "entropy": mean_over(rollout.entropy, rollout.mask),
        "reward": float(rollout.rewards.mean()),
        "same": float((weights * prompts["measured"]).sum()),
        "group": float(prompts["group"].mean()),
        "literal": float(prompts["literal"].mean()),
        "batch": float(covariance(*tokens)),
        "exact": float((weights * prompts["exact"]).sum()),
    }


class Courses(Probe):
    """A row per step, and what the prompts have by their right answers: a (number of completions + 1,) tensor each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.by_accuracy: list[dict[str, Tensor]] = []

    def after_rollout(self, step: Step) -> None:
        if step.last:
            self.rows.append({"entropy": mean_over(step.sampled.entropy, step.sampled.mask)})
        else:
            self._first = FirstOrder(step.policy, step.sampled, step.config)

    def after_step(self, step: Step) -> None:
        rollout, (update,) = step.sampled, step.updates
        prompts = of_prompts(rollout, entropy_now(step), step.config.temperature)
        kept = min(1.0, step.config.grad_clip / (update.grad_norm + 1e-6)) if step.config.grad_clip else 1.0
        row = of_batch(rollout, prompts)
        row |= {"gradient": -self._first.of_gradient() / kept, "first order": -self._first.change()}
        self.rows.append(row | {"grad_norm": update.grad_norm})
        self.by_accuracy.append(accuracy_sums(prompts, rollout.rewards.shape[1]))


def accuracy_sums(prompts: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """``prompts`` (how many) and the sum of each quantity over the prompts with 0, 1, ... `samples` right answers."""
    right = (prompts["accuracy"] * samples).round().long()
    sums = {"prompts": torch.ones_like(prompts["accuracy"]), **{name: prompts[name] for name in BY_ACCURACY}}
    zero = torch.zeros(samples + 1, dtype=torch.float64)
    return {name: zero.index_add(0, right.cpu(), values.cpu()) for name, values in sums.items()}


def in_blocks(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, list[list[float | None]]]:
    """The means over blocks of so many steps, blocks x accuracies; None where there was no such prompt."""
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    sums = {name: torch.stack([sum(row[name] for row in block) for block in blocks]) for name in rows[0]}
    count = sums.pop("prompts")
    means = {name: (values / count).tolist() for name, values in sums.items()}
    short = {name: [[None if v != v else _short(v) for v in row] for row in table] for name, table in means.items()}
    return {"prompts": count.long().tolist(), **short}


def measure(variant: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run from a supervised start of its own: columns over the steps, and blocks of steps by accuracy."""
    probe, started = Courses(), time.perf_counter()

    def tell(phase: str, done: int, total: int, row: Mapping[str, Any]) -> None:
        if done % 80 == 0 or done == total:
            print(f"{variant}, seed {seed}: {phase}, {done} of {total}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(
            out=Path(folder) / "run", seed=seed, warm_seed=seed, tensorboard=False, save_every=0, **changes
        )
        train(config, probes=[probe], report=tell)
    entropy, rows = [row["entropy"] for row in probe.rows], probe.rows[:-1]
    columns = {name: [_short(row[name]) for row in rows] for name in rows[0]}
    columns["next"] = [_short(before - after) for before, after in zip(entropy, entropy[1:], strict=False)]
    return {
        "variant": variant,
        "seed": seed,
        "settings": dict(changes),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": describe(torch.device("cpu")),
        "columns": columns,
        "by_accuracy": in_blocks(probe.by_accuracy),
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def run(out: Path, variants: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """What of the runs is not there yet, a file each.

    Raises
    ------
    ValueError
        A file is of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    for variant, changes in variants.items():
        for seed in seeds:
            path = out / f"{variant}-{seed}.json"
            if not path.exists():
                write_text(path, as_text(measure(variant, seed, changes)))
            elif (found := json.loads(path.read_text())["settings"]) != changes:
                raise ValueError(
                    f"{path}: expected a run of {changes}, got one of {found}; move it away, or take --out"
                )


def as_text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each list of numbers."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text) + "\n"
