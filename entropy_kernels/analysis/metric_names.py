"""Which columns of a trainer's log hold the policy entropy and the performance.

The names are those that the trainers write. verl: ``actor/entropy`` (``actor/entropy_loss`` in older versions and in
its loss) and ``val-core/<data source>/<acc|reward>/mean@<n>``, before April 2025 ``val/test_score/<data source>``;
TRL: ``entropy``, ``eval_reward`` and ``rewards/<function>/mean``, which transformers' TensorBoard and W&B callbacks
rewrite to ``train/…`` and ``eval/…``; SkyRL: ``policy/policy_entropy`` and ``eval/all/avg_score``. MLflow turns ``@``
into ``_at_``, hence ``mean*``.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# One pattern per line of preference; the first that matches any column decides.
ENTROPY = (
    "entropy",
    "actor/entropy",
    "actor/entropy_loss",
    "train/entropy",
    "policy/policy_entropy",
    "policy_entropy",
    "policy/entropy",
    "train/entropy_loss",
    "entropy_loss",
)
VALIDATION = (
    "val_pass1",
    "train/val_pass1",
    "val-core/*/acc/mean*",
    "val-core/*/reward/mean*",
    "val-core/*/mean*",
    "val/test_score/*",
    "eval/all/avg_score",
    "eval_reward",
    "eval/reward",
    "eval_rewards/*/mean",
    "eval/rewards/*/mean",
    "eval_accuracy",
    "eval/accuracy",
    "val_accuracy",
    "val/accuracy",
)
# Performance on the training prompts: noisier and biased by the prompts of the step, so only where nothing else is.
TRAINING = (
    "critic/score/mean",
    "critic/rewards/mean",
    "reward/avg_raw_reward",
    "reward",
    "train/reward",
    "rewards/*/mean",
    "train/rewards/*/mean",
)


class LogError(ValueError):
    """A log that cannot be read, or does not hold what was asked for; the message is one line for the user."""


@dataclass(frozen=True)
class Quantity:
    """Columns that stand for one quantity; several are averaged row by row (rows in which all are there)."""

    columns: tuple[str, ...]
    training: bool = False
    """Measured on the training prompts, for want of a validation metric."""

    @property
    def name(self) -> str:
        return self.columns[0] if len(self.columns) == 1 else f"mean of {', '.join(self.columns)}"

    def values(self, log: DataFrame) -> Series:
        """The quantity per row of ``log``; NaN where a column is."""
        return log[list(self.columns)].mean(axis=1, skipna=False)


def find_entropy(columns: Sequence[str], asked: str | None = None) -> Quantity:
    """The entropy column: ``asked`` (a name, or a pattern with * of columns to average), else the first known name."""
    if asked is not None:
        return Quantity(_asked(columns, asked, "--entropy"))
    found = _first(columns, ENTROPY, "--entropy")
    if found is None:
        raise LogError(f"no known entropy metric in the log; name one with --entropy: {_listing(columns, 'entropy')}")
    return Quantity(found)


def find_performance(columns: Sequence[str], asked: str | None = None) -> Quantity:
    """The performance column: ``asked``, else a known validation metric, else a training reward (marked as such)."""
    if asked is not None:
        return Quantity(_asked(columns, asked, "--performance"))
    found = _first(columns, VALIDATION, "--performance")
    if found is not None:
        return Quantity(found)
    found = _first(columns, TRAINING, "--performance")
    if found is None:
        raise LogError(
            f"no known performance metric in the log; name one with --performance: {_listing(columns, 'reward')}"
        )
    return Quantity(found, training=True)


def _first(columns: Sequence[str], patterns: Sequence[str], option: str) -> tuple[str, ...] | None:
    for pattern in patterns:
        found = tuple(column for column in columns if fnmatch.fnmatchcase(column, pattern))
        if len(found) > 1:
            raise LogError(
                f"several metrics match {pattern!r}: {', '.join(found)}; choose one with {option} NAME, "
                f"or average them with {option} {pattern!r}"
            )
        if found:
            return found
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
