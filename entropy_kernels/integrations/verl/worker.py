"""Where verl is changed: its config when it is imported, its workers once a ``loss_mode`` ``ek_*`` is configured.

PolicyLossConfig.__init__            takes the keys under policy_loss.ek
ActorConfig.__post_init__            checks them; where the loss_mode is ours, the rest is put in place
TrainingWorker.infer_batch           old log-probs: the statistics that the method reads come with them
RayPPOTrainer._compute_old_log_prob  the driver of trainer.use_v1=false hands them on (v1 does so by itself)
TrainingWorker.train_mini_batch      target_entropy: plans the rollout, and observes what came of it
BaseEngine.train_batch               plans the mini-batch, and gives each micro-batch's loss its part
TrainingWorker.save_checkpoint, load_checkpoint    the memory of a method
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entropy_kernels as ek
from entropy_kernels import _json_file
from entropy_kernels.integrations._controllers import warn_of_percent
from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.verl import plan, statistics
from entropy_kernels.integrations.verl.config import Settings, settings_of
from entropy_kernels.integrations.verl.losses import controller_of, keep_controller
from entropy_kernels.integrations.verl.versions import patch

__all__ = ["AT_IMPORT", "PATCHES", "install"]

FILE = "entropy_kernels.json"  # beside verl's shards
_log = logging.getLogger(__name__)
_log.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))  # as verl's own


class OwnKeys(dict[str, Any]):
    """The keys under ``policy_loss.ek`` of a loss_mode that reads them: where they arrive in a pickle, as in a worker
    that built no config of its own, the patches are put in place, too."""

    def __reduce__(self) -> Any:
        return _arrived, (dict(self),)

    def __copy__(self) -> OwnKeys:  # copies of this process put nothing in place
        return OwnKeys(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnKeys:
        return OwnKeys(copy.deepcopy(dict(self), memo))


def _arrived(keys: dict[str, Any]) -> OwnKeys:
    install()
    if keys.get("statistics"):
        statistics.enable()
    return OwnKeys(keys)


def install() -> None:
    """Put all patches in place in this process; where they are already, nothing happens."""
    for each in PATCHES:
        each.apply()


# ---- configuration ---------------------------------------------------------------------------------------------------


def _takes_own_keys(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, ek: Any = None, **kwargs: Any) -> None:
        from omegaconf import OmegaConf

        original(self, *args, **kwargs)
        keys = OmegaConf.to_container(ek, resolve=True) if OmegaConf.is_config(ek) else ek
        if not isinstance(keys, (dict, type(None))):
            raise TypeError(f"policy_loss.ek: expected keys of its own, as policy_loss.ek.ratio=0.002, got {keys!r}")
        self.ek = keys or {}

    return init


def _checks(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        settings = settings_of(self)
        on = bool((getattr(self.policy_loss, "ek", None) or {}).get("statistics"))
        if settings is not None:
            self.ek_settings, on = settings, settings.statistics
            object.__setattr__(self.policy_loss, "ek", OwnKeys({**self.policy_loss.ek, "statistics": on}))
            install()
            if os.environ.get("RANK", "0") == "0":  # the driver, and one worker
                _tell(settings.described)
                warn_of_percent(settings.method, settings.options)
        if on:
            statistics.enable()

    return post_init


@functools.cache
def _tell(line: str) -> None:
    """Once: a config is built several times."""
    _log.info(line)


# ---- workers ---------------------------------------------------------------------------------------------------------


def _config_of(loss_function: Any) -> tuple[Settings, Any] | None:
    """What a loss function of verl's workers, ``partial(ppo_loss, config=...)``, was configured with, if it is ours."""
    config = getattr(loss_function, "keywords", {}).get("config")
    settings = None if config is None else settings_of(config)
    return None if settings is None else (settings, config)


def _asks_for_statistics(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def infer_batch(self: Any, data: Any) -> Any:
        found = _config_of(self.loss_fn)
        if found is None or not found[0].needs or plan.active() is not None or not _old_logprobs(data):
            return original(self, data)
        from verl.utils import tensordict_utils as tu

        names = tuple(name for name in found[0].needs if name != "entropy")
        if names:
            tu.assign_non_tensor(data, ek_statistics=names)
        output = original(self, data)
        if output is not None and "entropy" in found[0].needs:
            output[plan.STATISTIC.format("entropy")] = output["entropy"]
        return output

    return infer_batch


def _old_logprobs(data: Any) -> bool:
    """Whether these are the old log-probs: those of a reference come without entropy."""
    from verl.utils import tensordict_utils as tu

    return not tu.get(data, "compute_loss", True) and tu.get(data, "calculate_entropy", False)


def _carries_statistics(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_old_log_prob(self: Any, batch: Any) -> Any:
        from verl.workers.utils.padding import no_padding_2_padding

        group, extra = self.actor_rollout_wg, {}
        call = group.compute_log_prob

        def seen(data: Any) -> Any:
            output = call(data)
            for name in [key for key in output.keys() if key.startswith(plan.STATISTIC.format(""))]:  # noqa: SIM118
                extra[name] = no_padding_2_padding(output[name], data).float()
            return output

        group.compute_log_prob = seen
        try:
            found, rest = original(self, batch)
        finally:
            group.compute_log_prob = call
        for name, value in extra.items():
            found.batch[name] = value
        return found, rest

    return compute_old_log_prob


def _plans_rollout(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_mini_batch(self: Any, data: Any) -> Any:
        found = _config_of(self.loss_fn)
        if found is None or found[0].target is None or _distills_only(data):
            return original(self, data)
        settings, config = found
        with plan.within(plan.plan_rollout(settings, config, self.engine, data)):
            output = original(self, data)
            if settings.observes:
                _observe(self, controller_of(settings, config), data)
        return output

    return train_mini_batch


def _observe(worker: Any, controller: Any, data: Any) -> None:
    """The entropy of the same tokens after the updates: one forward without gradient."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    again = data.copy()
    tu.assign_non_tensor(
        again, compute_loss=False, calculate_entropy=True, distillation_use_topk=False, distillation_only=False
    )
    output = worker.infer_batch(again)
    controller.observe([no_padding_2_padding(output["entropy"], data).to(plan.collective_device())])


def _plans_minibatch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_batch(self: Any, data: Any, loss_function: Any) -> Any:
        found = _config_of(loss_function)
        if found is None or _distills_only(data):
            return original(self, data, loss_function)
        made = plan.active() or plan.plan_minibatch(*found, self, data)
        return original(self, data, made.around(loss_function))

    return train_batch


def _distills_only(data: Any) -> bool:
    """Whether no policy loss is called, as verl's distillation says."""
    from verl.utils import tensordict_utils as tu

    return bool(tu.get(data, "distillation_only", False))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _saves_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(self: Any, local_path: str, *args: Any, **kwargs: Any) -> Any:
        result = original(self, local_path, *args, **kwargs)
        found = _config_of(self.loss_fn)
        if found is not None and found[0].decides:
            state = {**_whose(found[0]), "state": controller_of(*found).state_dict()}
            # equal on all ranks; every one writes, as a node may not see the others' disks
            _json_file.write(Path(local_path) / FILE, {"entropy_kernels": ek.__version__, **state})
        return result

    return save_checkpoint


def _loads_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(self: Any, local_path: str, *args: Any, **kwargs: Any) -> Any:
        found = _config_of(self.loss_fn)
        controller = None
        if found is not None and found[0].decides and local_path:  # read before: verl may delete the files
            controller = _restored(found[0], Path(local_path) / FILE)
        result = original(self, local_path, *args, **kwargs)
        if found is not None and controller is not None:
            keep_controller(found[1], controller)
        return result

    return load_checkpoint


def _whose(settings: Settings) -> dict[str, str | None]:
    """What a state is of."""
    by = None if settings.target is None else settings.target_method
    return {"loss_mode": settings.mode, "method": settings.method, "target_method": by}


def _restored(settings: Settings, file: Path) -> ek.Controller:
    """A controller with the state of the file; a new one, which is told, where that is not to be had."""
    mine, controller = _whose(settings), settings.controller()
    try:
        saved = json.loads(file.read_text())
        its = {name: saved[name] for name in mine}
        if its == mine:
            controller.load_state_dict(saved["state"])
            return controller
        got = _shown(its)
    except FileNotFoundError:
        got = "none"
    except (OSError, KeyError, TypeError, ValueError) as error:
        got = f"one that cannot be read ({type(error).__name__}: {error})"
    _log.warning(
        "%s: expected beside the checkpoint, of %s, got %s: seeds and memory of the method begin anew",
        file, _shown(mine), got,
    )  # fmt: skip
    return settings.controller()


def _shown(whose: dict[str, str | None]) -> str:
    return ", ".join(f"{name}={value}" for name, value in whose.items() if value is not None)


# ---- the table -------------------------------------------------------------------------------------------------------


_CONFIG = "verl.workers.config.actor:"
_WORKER = "verl.workers.engine_workers:TrainingWorker."
_SAVE = "(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None)"
_LOAD = "(self, local_path, hdfs_path=None, del_local_after_load=False)"


def _of_worker(name: str, make: Callable[[Any], Any], signature: str, what: str) -> Patch:
    """A method below the two decorators of register()."""
    below = f"{_WORKER}{name}.__wrapped__.__wrapped__"
    return patch(_WORKER + name, make, signature, what=what, signature_of=below)


#: What is in place once verl is imported: it only reads a config.
AT_IMPORT: tuple[Patch, ...] = (
    patch(
        _CONFIG + "PolicyLossConfig.__init__", _takes_own_keys,
        "(self, _target_='', loss_mode='vanilla', clip_cov_ratio=0.0002, clip_cov_lb=1.0, clip_cov_ub=5.0, "
        "kl_cov_ratio=0.0002, ppo_kl_coef=0.1, dro_beta=None, rollout_correction=<factory>)",
        what="keys of a loss_mode ek_* under policy_loss.ek",
    ),
    patch(_CONFIG + "ActorConfig.__post_init__", _checks, "(self)", what="a loss_mode ek_* is checked before training"),
)  # fmt: skip
PATCHES: tuple[Patch, ...] = (
    *AT_IMPORT,
    patch(
        "verl.workers.engine.base:BaseEngine.train_batch", _plans_minibatch, "(self, data, loss_function)",
        what="decisions over the whole mini-batch, not each micro-batch",
    ),
    _of_worker("train_mini_batch", _plans_rollout, "(self, data)", "entropy as a set point: one plan per rollout"),
    _of_worker("infer_batch", _asks_for_statistics, "(self, data)", "statistics of the old policy that a method reads"),
    _of_worker("save_checkpoint", _saves_memory, _SAVE, "the memory of a method is saved"),
    _of_worker("load_checkpoint", _loads_memory, _LOAD, "the memory of a method is restored"),
    patch(
        "verl.trainer.ppo.ray_trainer:RayPPOTrainer._compute_old_log_prob", _carries_statistics, "(self, batch)",
        what="statistics travel with the batch (trainer.use_v1=false)",
    ),
)  # fmt: skip
