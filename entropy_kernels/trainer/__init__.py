"""See docs/trainer.md: ``from entropy_kernels.trainer import Prompt, Task, TrainerConfig, train``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig
    from entropy_kernels.trainer.ppo import train
    from entropy_kernels.trainer.tasks import Prompt, Task

#: Name -> the module that has it. They are imported when they are asked for: a module here may be wanted alone.
_HOME = {"Prompt": "tasks", "Task": "tasks", "TrainerConfig": "config", "train": "ppo"}
__all__ = ["Prompt", "Task", "TrainerConfig", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
