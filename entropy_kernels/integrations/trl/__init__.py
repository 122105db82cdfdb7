"""Drop-in for TRL: ``from entropy_kernels.integrations.trl import GRPOConfig, GRPOTrainer``.

Read in this order: head.py (TRL's head, replaced), config.py (what a user sets), plan.py (from a rollout's statistics
to what a token's gradient may do), trainer.py (where that goes into TRL's own loss). TRL is imported when one of the
two names is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from entropy_kernels._require import require
from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.trl.head import HEAD, patch_head

if TYPE_CHECKING:
    from entropy_kernels.integrations.trl.config import GRPOConfig
    from entropy_kernels.integrations.trl.trainer import GRPOTrainer

__all__ = ["PATCHES", "GRPOConfig", "GRPOTrainer", "patch_head"]

PATCHES: tuple[Patch, ...] = (HEAD,)


def __getattr__(name: str) -> Any:
    if name not in ("GRPOConfig", "GRPOTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("trl", f"{__name__}.{name}", "trl")
    return getattr(importlib.import_module(f"{__name__}.{name.removeprefix('GRPO').lower()}"), name)
