"""What the configs of several trainers try, and warn of, when they are built: before a model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

import entropy_kernels as ek

_LARGE = 0.1  # the paper's ratios are 2e-4 and 2e-3


def try_out(controller: ek.Controller) -> None:
    """Let a fresh controller decide about two tokens, so that every value that it will read is read, and refused by its
    name. It is not to be used after.
    """
    one = torch.zeros(1, 2)
    known = dict.fromkeys(("entropy", "old_entropy"), one + 1e6) | {"vocab_covariance": one, "collision": one}
    batch = ek.TokenBatch(one, None, one, None, **known)
    if isinstance(controller, ek.TargetEntropy):
        controller.step(batch, lr=0.0)
    else:
        controller.step(batch)


def statistics_of(controller: ek.Controller) -> tuple[str, ...]:
    """The statistics beside the log-prob that a trainer has to read for a controller, of one policy or of two."""
    return tuple(dict.fromkeys("entropy" if name == "old_entropy" else name for name in controller.needs))


def warn_of_percent(method: str | None, options: Mapping[str, Any]) -> None:
    """Warn of a ratio that is probably a percentage; the paper's own code has it as one."""
    ratio = options.get("ratio")
    if method in ("clip_cov", "kl_cov") and ratio is not None and ratio > _LARGE:
        warnings.warn(
            f"ratio={ratio:g} is {100 * ratio:g} % of the tokens; the paper's 0.2 % is 0.002 (docs/migration.md)",
            stacklevel=2,
        )
