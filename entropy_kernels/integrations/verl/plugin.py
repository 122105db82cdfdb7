"""What verl loads by the entry point group ``verl.plugins``, in the driver and in every worker, while it is imported.

verl swallows what an entry point raises, so that a version of verl that this was not made for is told in a warning, and
every ``loss_mode`` ``ek_*`` then raises the reason. Nothing else is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from entropy_kernels.integrations._patch import PatchRefused
from entropy_kernels.integrations.verl import statistics
from entropy_kernels.integrations.verl.config import MODES
from entropy_kernels.integrations.verl.losses import registered
from entropy_kernels.integrations.verl.worker import AT_IMPORT


def _raising(reason: str) -> Callable[..., Any]:
    def loss(*_: Any, **__: Any) -> Any:
        raise PatchRefused(reason)

    return loss


def load() -> None:
    """Register the losses, and let verl's config take their keys. Raises nothing: what goes wrong is told in a warning,
    what was put in place is undone, and the losses raise the reason."""
    register: Any = None
    placed = [patch for patch in (*AT_IMPORT, *statistics.FUNCTIONS) if not patch.active]
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss

        register = register_policy_loss
        for patch in AT_IMPORT:
            patch.apply()
        statistics.install()
        made = {mode: registered(mode) for mode in MODES}
    except Exception as error:  # of verl's own import, too
        for patch in placed:
            if patch.active:
                patch.undo()
        reason = f"entropy_kernels is not in place, and no loss_mode ek_* works: {type(error).__name__}: {error}"
        logging.getLogger(__name__).warning(reason)
        made = {mode: _raising(reason) for mode in MODES}
    if register is not None:
        for mode, loss in made.items():
            register(mode)(loss)


load()
