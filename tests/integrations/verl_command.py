"""verl's own configuration, composed as ``python -m verl.trainer.main_ppo`` does from what a user writes after it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import verl.trainer
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[2]
FOLDER = Path(verl.trainer.__file__).parent / "config"
# what verl asks of every command
REQUIRED = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.name=vllm",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1"]  # fmt: skip
POLICY = "actor_rollout_ref.actor.policy_loss."


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(FOLDER), version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def with_loss(mode: str, *own: str) -> list[str]:
    """As a user writes it: ``ratio=0.01`` for ``+actor_rollout_ref.actor.policy_loss.ek.ratio=0.01``."""
    return [*REQUIRED, f"{POLICY}loss_mode={mode}", *(f"+{POLICY}ek.{key}" for key in own)]


def of_script(path: Path) -> list[str]:
    """The overrides that a shell script hands to verl."""
    text = re.sub(r"`#[^`]*`", "", path.read_text()).replace("\\\n", " ")
    command = next(line for line in text.splitlines() if "verl.trainer.main_ppo" in line)
    words = shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command))
    return [word for word in words[words.index("verl.trainer.main_ppo") + 1 :] if word != "$@"]
