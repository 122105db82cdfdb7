"""Which columns of a trainer's log hold the policy entropy and the performance, and which say what holds the entropy.

A table: a row per name, with the trainer that writes it, what is averaged, and the file of its source in which it was
seen (as of August 2026; AReaL May, verl January). transformers' TensorBoard and W&B callbacks put ``train/`` before a
name and ``eval/`` in place of ``eval_``; MLflow turns ``@`` into ``_at_``, hence ``mean*``. :func:`names_table` prints
the table for docs/entropy-law.md.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame, Series


@dataclass(frozen=True)
class Name:
    """A name, or a pattern with ``*``, that trainers give to a metric."""

    pattern: str
    trainer: str
    what: str
    """What it is a mean of."""
    seen: str
    """The file of the trainer's source that writes it."""
    note: str = ""
    """What a reader of the fit must know about it; printed."""
    but: str = ""
    """A regular expression of what ``*`` does not stand for."""

    def matches(self, column: str) -> bool:
        return fnmatch.fnmatchcase(column, self.pattern) and not (self.but and re.search(self.but, column))


# What is no score among the metrics directly below eval/: those of transformers, OpenRLHF and slime.
_NO_SCORE = (
    r"^eval/.*/|-(truncated_ratio|pass@\d+)$|_(length|rate|std|ratio|accuracy|second|mean|max|min)$|"
    r"^eval/(step|epoch|global_step|loss|runtime|entropy|kl|num_tokens|eval_num_samples)$"
)
_HF = "transformers' callbacks"
_BY_SEQUENCE = "sequences, of each sequence's mean over tokens"
_ESTIMATE = (
    "it is an estimate from the sampled tokens' log-probs, not the entropy of their distributions: noisier, and off "
    "where training and sampling differ"
)

# In order of preference; the first that matches any column decides.
ENTROPY = (
    Name("entropy", "this package, TRL", "tokens of the rollout", "trl/trainer/grpo_trainer.py"),
    Name("actor/entropy", "verl", "tokens, by `loss_agg_mode`", "verl/trainer/ppo/ray_trainer.py"),
    Name("actor/entropy_loss", "verl (older, and its engine workers)", "tokens, by `loss_agg_mode`; the entropy itself",
         "verl/workers/utils/losses.py"),
    Name("train/entropy", "this package, TRL in TensorBoard and W&B", "tokens", _HF),
    Name("policy/policy_entropy", "SkyRL", "tokens", "skyrl/backends/skyrl_train/workers/worker.py"),
    Name("policy_entropy", "SkyRL's workers", "tokens", "skyrl/backends/skyrl_train/workers/worker.py"),
    Name("policy/entropy", "others", "tokens", "-"),
    Name("policy/entropy_avg", "TRL's PPO", "tokens", "trl/experimental/ppo/ppo_trainer.py"),
    Name("entropy/all/mean", "prime-rl", "tokens of all environments", "src/prime_rl/trainer/rl/train.py"),
    Name("entropy/mean", "ms-swift; older prime-rl", _BY_SEQUENCE,
         "swift/rlhf_trainers/grpo_trainer.py"),
    Name("train/entropy/mean", "ms-swift in TensorBoard and W&B", _BY_SEQUENCE, _HF),
    Name("entropy/entropy_mean", "ms-swift with Megatron", _BY_SEQUENCE,
         "swift/megatron/trainers/grpo_trainer.py"),
    Name("train/entropy/entropy_mean", "ms-swift with Megatron", _BY_SEQUENCE,
         "swift/megatron/trainers/grpo_trainer.py"),
    Name("ppo_actor/update/entropy/avg", "AReaL", "tokens", "areal/trainer/ppo/actor.py"),
    Name("*actor/update/entropy/avg", "AReaL (other names of the engine)", "tokens", "areal/trainer/ppo/actor.py"),
    Name("trainer/entropy/mean", "torchtitan", "tokens that the loss uses",
         "torchtitan/experiments/rl/losses/dapo.py"),
    Name("rollout/entropy", "slime with `--use-rollout-entropy`", _BY_SEQUENCE,
         "slime/observability/train_metric_utils.py"),
    Name("train/entropy_loss", "slime, OpenRLHF", "slime: sequences, or tokens with `--calculate-per-token-loss`; "
         "OpenRLHF: tokens, only with `--actor.entropy_coef`; the entropy itself",
         "slime/backends/megatron_utils/loss.py, openrlhf/trainer/ray/ppo_actor.py"),
    Name("entropy_loss", "others", "tokens", "-"),
    Name("Entropy", "prime-rl's console", "tokens of all environments", "src/prime_rl/trainer/rl/train.py"),
    Name("train/approx_entropy", "NeMo-RL", "sampled tokens, of -ratio x log-prob",
         "nemo_rl/algorithms/loss/loss_functions.py", _ESTIMATE),
    Name("approx_entropy", "NeMo-RL", "sampled tokens, of -ratio x log-prob",
         "nemo_rl/algorithms/loss/loss_functions.py", _ESTIMATE),
    Name("objective/entropy", "TRL's PPO, online DPO", "sequences, of the sum of -log-prob over a sequence's tokens",
         "trl/experimental/ppo/ppo_trainer.py",
         "it is a sum over a response's tokens, estimated from those that were sampled: not nats per token, and it "
         "changes with the length; take policy/entropy_avg with --entropy where the log has it"),
)  # fmt: skip

VALIDATION = (
    Name("val_pass1", "this package", "held-out prompts", "entropy_kernels/trainer/log.py"),
    Name("train/val_pass1", "this package in TensorBoard", "held-out prompts", "entropy_kernels/trainer/log.py"),
    Name("val-core/*/acc/mean*", "verl", "validation prompts", "verl/trainer/ppo/ray_trainer.py"),
    Name("val-core/*/reward/mean*", "verl", "validation prompts", "verl/trainer/ppo/ray_trainer.py"),
    Name("val-core/*/mean*", "verl", "validation prompts", "verl/trainer/ppo/ray_trainer.py"),
    Name("val/test_score/*", "verl before April 2025", "validation prompts", "verl/trainer/ppo/ray_trainer.py"),
    Name("eval/all/avg_score", "SkyRL", "validation prompts", "skyrl/train/evaluate.py"),
    Name("eval/eval_*_pass1", "OpenRLHF in TensorBoard and W&B", "validation prompts",
         "openrlhf/trainer/ppo_trainer.py"),
    Name("eval_*_pass1", "OpenRLHF", "validation prompts", "openrlhf/trainer/ppo_trainer.py"),
    Name("validation/accuracy", "NeMo-RL", "validation prompts; the mean reward", "nemo_rl/algorithms/grpo.py"),
    Name("eval/*/effective/*/avg@*", "prime-rl", "evaluation prompts without errors",
         "src/prime_rl/orchestrator/metrics.py"),
    Name("eval/*/all/*/avg@*", "prime-rl", "evaluation prompts", "src/prime_rl/orchestrator/metrics.py"),
    Name("eval/*/avg@*", "older prime-rl", "evaluation prompts", "its guide to training"),
    Name("eval-rollout/reward", "AReaL", "validation prompts", "docs/en/best_practices/algo_perf.md"),
    Name("validation_reward/_mean", "torchtitan", "validation prompts",
         "torchtitan/experiments/rl/examples/dapo_math/config_registry.py"),
    Name("validation/reward/_mean", "torchtitan", "validation prompts",
         "torchtitan/experiments/rl/observability/metrics/processor.py"),
    Name("eval_reward", "TRL, ms-swift", "evaluation prompts", _HF),
    Name("eval/reward", "TRL, ms-swift in TensorBoard and W&B", "evaluation prompts", _HF),
    Name("eval_rewards/*/mean", "TRL, ms-swift", "evaluation prompts, one function's reward", _HF),
    Name("eval/rewards/*/mean", "TRL, ms-swift in TensorBoard and W&B", "evaluation prompts, one function's reward",
         _HF),
    Name("eval_accuracy", "others", "evaluation prompts", "-"),
    Name("eval/accuracy", "others", "evaluation prompts", "-"),
    Name("val_accuracy", "others", "evaluation prompts", "-"),
    Name("val/accuracy", "others", "evaluation prompts", "-"),
    Name("eval/*", "slime", "evaluation prompts of a data set", "slime/observability/rollout_metrics.py",
         but=_NO_SCORE),
)  # fmt: skip
# Performance on the training prompts: noisier and biased by the prompts of the step, so only where nothing else is.
TRAINING = (
    Name("critic/score/mean", "verl", "rollout, without the KL penalty", "verl/trainer/ppo/metric_utils.py"),
    Name("critic/rewards/mean", "verl", "rollout", "verl/trainer/ppo/metric_utils.py"),
    Name("reward/avg_raw_reward", "SkyRL", "rollout", "skyrl/train/trainer.py"),
    Name("rollout/raw_reward", "slime", "rollout", "slime/observability/train_metric_utils.py"),
    Name("rollout/reward_mean", "OpenRLHF", "rollout", "openrlhf/trainer/ppo_trainer.py"),
    Name("train/rollout/reward_mean", "OpenRLHF in TensorBoard and W&B", "rollout", "openrlhf/trainer/ppo_trainer.py"),
    Name("rollout/reward", "AReaL", "rollout", "docs/en/best_practices/algo_perf.md"),
    Name("*actor/task_reward/avg", "AReaL", "rollouts that are trained on", "areal/trainer/ppo/actor.py"),
    Name("rollout_reward/_mean", "torchtitan", "rollout",
         "torchtitan/experiments/rl/observability/metrics/processor.py"),
    Name("reward", "this package, TRL, ms-swift", "rollout", "trl/trainer/grpo_trainer.py"),
    Name("train/reward", "TRL, ms-swift in TensorBoard and W&B; OpenRLHF, NeMo-RL", "rollout",
         "trl/trainer/grpo_trainer.py"),
    Name("train/agg/effective/*/reward/mean", "prime-rl", "rollouts without errors",
         "src/prime_rl/orchestrator/metrics.py"),
    Name("train/agg/all/*/reward/mean", "prime-rl", "rollouts", "src/prime_rl/orchestrator/metrics.py"),
    Name("reward/all/mean", "older prime-rl", "rollouts", "-"),
    Name("reward/mean", "older prime-rl", "rollouts", "-"),
    Name("rewards/*/mean", "TRL, ms-swift", "rollout, one function's reward", "trl/trainer/grpo_trainer.py"),
    Name("train/rewards/*/mean", "TRL, ms-swift in TensorBoard and W&B", "rollout, one function's reward", _HF),
    Name("objective/scores", "TRL's PPO", "rollout", "trl/experimental/ppo/ppo_trainer.py"),
)  # fmt: skip


@dataclass(frozen=True)
class Treatment:
    """A metric or a setting that is not 0 only in runs in which something holds the entropy."""

    pattern: str
    by: str
    """What holds it, in words."""
    where: str
    """Who writes it."""


# Metrics: any value but 0 counts. verl and SkyRL log no name of their own under Clip-Cov and KL-Cov.
TREATMENTS = (
    Treatment("tokens_dropped", "tokens whose gradient is dropped (Clip-Cov or a control)", "this package"),
    Treatment("tokens_penalized", "a KL penalty on some tokens (KL-Cov or a control)", "this package"),
    Treatment("tokens_touched", "a treatment of some tokens", "this package"),
    Treatment("ek/touched", "a treatment of some tokens", "this package in TRL"),
    Treatment("actor/ek_touched", "a treatment of some tokens", "this package in verl"),
    Treatment("target_entropy", "a target entropy", "this package"),
    Treatment("ek/target_entropy", "a target entropy", "this package in TRL"),
    Treatment("actor/ek_target_entropy", "a target entropy", "this package in verl"),
    Treatment("entropy_coef", "an entropy bonus", "this package, TRL (also adaptive)"),
    Treatment("entropy/threshold", "a loss on high-entropy tokens only", "ms-swift"),
    Treatment("entropy/entropy_threshold", "a loss on high-entropy tokens only", "ms-swift with Megatron"),
)
# Terms that weaken the law: it was found without them.
KL_TERMS = (
    Treatment("actor/kl_loss", "a KL term", "verl"),
    Treatment("actor/reward_kl_penalty_coeff", "a KL penalty in the reward", "verl"),
    Treatment("policy/policy_kl", "a KL term", "SkyRL"),
    Treatment("kl_loss", "a KL term", "slime"),
    Treatment("kl", "a KL term", "TRL, ms-swift; OpenRLHF"),
)
# Settings that stand beside a log: config.json of this package's trainer, the params of an MLflow run (verl's).
SETTINGS = (
    (r"(^|/)(method|loss_mode|policy_loss_type)$", r"(ek_)?clip_?cov", "Clip-Cov"),
    (r"(^|/)(method|loss_mode|policy_loss_type)$", r"(ek_)?kl_?cov", "KL-Cov"),
    (r"(^|/)target_entropy$", r"(?!none|null|false).+", "a target entropy"),
    (r"(^|/)entropy_coe(f|ff)$", r"(?!0+(\.0*)?$)[\d.].*", "an entropy bonus"),
    (r"(^|/)use_entropy_loss$", r"true", "an entropy bonus"),
)
# A run's name, as people give it; not "no-clip-cov", "kl-covariance", "entropy-coef-0", "entropy-regression".
_NOT_BEFORE = r"(?<!no)(?<!no[_\- ])(?<!without[_\- ])"
_NOT_AFTER = r"(?![a-z])"
NAMED = (
    (r"clip[_\- ]?cov", "Clip-Cov"),
    (r"kl[_\- ]?cov", "KL-Cov"),
    (r"clip[_\- ]?higher", "Clip-higher"),
    (r"entropy[_\- ]?(bonus|coef|coeff|reg)(?![_\- =]*0(\.0*)?(?![\d.]))", "an entropy bonus"),
    (r"(target|adaptive)[_\- ]?(ent|entropy)", "a target entropy"),
)


class LogError(ValueError):
    """A log that cannot be read, or does not hold what was asked for; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names of columns may go over lines


@dataclass(frozen=True)
class Quantity:
    """Columns that stand for one quantity; several are averaged row by row (rows in which all are there)."""

    columns: tuple[str, ...]
    training: bool = False
    """Measured on the training prompts, for want of a validation metric."""
    note: str = ""
    """What the name says about its meaning, if that is not what the law asks for."""

    @property
    def name(self) -> str:
        return self.columns[0] if len(self.columns) == 1 else f"mean of {', '.join(self.columns)}"

    def values(self, log: DataFrame) -> Series:
        """The quantity per row of ``log``; NaN where a column is."""
        return log[list(self.columns)].mean(axis=1, skipna=False)


def find_entropy(columns: Sequence[str], asked: str | None = None) -> Quantity:
    """The entropy column: ``asked`` (a name, or a pattern with * of columns to average), else the first known name."""
    if asked is not None:
        found = _asked(columns, asked, "--entropy")
        return Quantity(found, note=next((n.note for n in ENTROPY if n.note and n.pattern in found), ""))
    known = _first(columns, ENTROPY, "--entropy")
    if known is None:
        raise LogError(f"no known entropy metric in the log; name one with --entropy: {_listing(columns, 'entropy')}")
    return Quantity(known[1], note=known[0].note)


def find_performance(columns: Sequence[str], asked: str | None = None) -> Quantity:
    """The performance column: ``asked``, else a known validation metric, else a training reward (marked as such)."""
    if asked is not None:
        found = _asked(columns, asked, "--performance")
        return Quantity(found, training=all(any(n.matches(column) for n in TRAINING) for column in found))
    for names, training in ((VALIDATION, False), (TRAINING, True)):
        known = _first(columns, names, "--performance")
        if known is not None:
            return Quantity(known[1], training=training)
    raise LogError(
        f"no known performance metric in the log; name one with --performance: {_listing(columns, 'reward')}"
    )


def known(columns: Sequence[str], names: Sequence[Name] = (*ENTROPY, *VALIDATION, *TRAINING)) -> bool:
    """Whether any column is an entropy or a performance that a trainer is known to write."""
    return any(n.matches(column) for n in names for column in columns)


def held_by(log: DataFrame, name: str = "", settings: Mapping[str, Any] | None = None) -> list[str]:
    """What holds a run's entropy, each with where that was seen: metrics of the log that are not 0, settings, its name.

    Empty where nothing says so, which is no proof: verl and SkyRL log nothing of their own under Clip-Cov and KL-Cov.
    """
    found = _in_metrics(log, TREATMENTS)
    for key, value in (settings or {}).items():
        for pattern, values, by in SETTINGS:
            if re.search(pattern, key) and re.fullmatch(values, str(value).strip().lower()):
                found.setdefault(by, f"{by} (setting {key} = {value})")
    for pattern, by in NAMED if not found else ():
        if re.search(_NOT_BEFORE + pattern + _NOT_AFTER, name.lower()):
            found.setdefault(by, f"{by} (by the name of the run, {name})")
    return list(found.values())


def kl_terms(log: DataFrame) -> list[str]:
    """The KL terms of a run, each with the metric that says so."""
    return list(_in_metrics(log, KL_TERMS).values())


def _in_metrics(log: DataFrame, treatments: Sequence[Treatment]) -> dict[str, str]:
    found: dict[str, str] = {}
    for treatment in treatments:
        for column in log.columns:
            if column.removeprefix("train/") == treatment.pattern and bool((log[column].fillna(0) != 0).any()):
                found.setdefault(treatment.by, f"{treatment.by} (metric {column})")
    return found


def names_table(names: Sequence[Name]) -> str:
    """The table of docs/entropy-law.md, Markdown."""
    lines = ["| name | written by | mean over | seen in |", "|---|---|---|---|"]
    for n in names:
        seen = "" if n.seen == "-" else ", ".join(f"`{part}`" if "/" in part else part for part in n.seen.split(", "))
        lines.append(f"| `{n.pattern}` | {n.trainer} | {n.what} | {seen} |")
    return "\n".join(lines)


def _first(columns: Sequence[str], names: Sequence[Name], option: str) -> tuple[Name, tuple[str, ...]] | None:
    for name in names:
        found = tuple(column for column in columns if name.matches(column))
        if len(found) > 1:
            raise LogError(
                f"several metrics match {name.pattern!r}: {', '.join(found)}; choose one with {option} NAME, "
                f"or average them with {option} {name.pattern!r}"
            )
        if found:
            return name, found
    return None


def _asked(columns: Sequence[str], asked: str, option: str) -> tuple[str, ...]:
    if asked in columns:
        return (asked,)
    found = tuple(column for column in columns if fnmatch.fnmatchcase(column, asked))
    if not found:
        raise LogError(f"{option}: no column {asked!r} in the log; {_listing(columns, asked)}")
    return found


def _listing(columns: Sequence[str], near: str, limit: int = 40) -> str:
    """The columns that exist, those most like ``near`` first."""
    if not columns:
        return "it has no numeric columns"
    close = [c for c in columns if near.lower() in c.lower()]
    close += [c for c in difflib.get_close_matches(near, columns, n=5, cutoff=0.5) if c not in close]
    ordered = close + sorted(c for c in columns if c not in close)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"it has {', '.join(ordered[:limit])}{more}"
