"""Drop-in for verl: losses and control by ``actor_rollout_ref.actor.policy_loss.loss_mode=ek_*``.

Read in this order: plugin.py (what verl loads), config.py (what a user may write), losses.py (what verl calls),
plan.py (decisions over the whole batch), worker.py (where verl is changed). docs/integrations.md is for users.
"""

from __future__ import annotations

from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.verl import statistics, worker

PATCHES: tuple[Patch, ...] = (*worker.PATCHES, *statistics.PATCHES)
