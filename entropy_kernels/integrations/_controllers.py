"""What the configs of several trainers try, and warn of, when they are built: before a model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

import entropy_kernels as ek

_LARGE = 0.1  # the paper's ratios are 2e-4 and 2e-3


def try_out(controller: ek.Controller) -> None:
    """Let a controller decide about two tokens: every value that it will read is read. It is not to be used after.

    Args:
        controller: a fresh one.

    Returns:
        Nothing.

    Raises:
        TypeError, ValueError: an option out of range, by its name.
    """
    one = torch.zeros(1, 2)
    known = dict.fromkeys(("entropy", "old_entropy"), one + 1e6) | {"vocab_covariance": one, "collision": one}
    batch = ek.TokenBatch(one, None, one, None, **known)
    if isinstance(controller, ek.TargetEntropy):
        controller.step(batch, lr=0.0)
    else:
        controller.step(batch)


def statistics_of(controller: ek.Controller) -> tuple[str, ...]:
    """What a trainer has to read for a controller, of one policy or of two.

    Args:
        controller: any.

    Returns:
        Names of statistics beside the log-prob: "entropy", "vocab_covariance", "collision". Raises nothing.
    """
    return tuple(dict.fromkeys("entropy" if name == "old_entropy" else name for name in controller.needs))


def warn_of_percent(method: str | None, options: Mapping[str, Any]) -> None:
    """Warn of a ratio that is probably a percentage; the paper's own code has it as one.

    Args:
        method: a name of :func:`entropy_kernels.methods`, or None.
        options: of the method.

    Returns:
        Nothing. Raises nothing.
    """
    ratio = options.get("ratio")
    if method in ("clip_cov", "kl_cov") and ratio is not None and ratio > _LARGE:
        warnings.warn(
            f"ratio={ratio:g} is {100 * ratio:g} % of the tokens; the paper's 0.2 % is 0.002 (docs/migration.md)",
            stacklevel=2,
        )
