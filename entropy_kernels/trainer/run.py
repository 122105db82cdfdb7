"""A run: what it carries from step to step, where that comes from, and how it is saved."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import entropy_kernels as ek
from entropy_kernels.trainer import checkpoint
from entropy_kernels.trainer.config import TrainerConfig, check_resumable
from entropy_kernels.trainer.critic import Critic, critic_of
from entropy_kernels.trainer.data import inputs_of
from entropy_kernels.trainer.faults import check_weights
from entropy_kernels.trainer.files import OwnFiles, fields_of, write_json
from entropy_kernels.trainer.log import MetricsLog
from entropy_kernels.trainer.methods import controller_of, target_of
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.reference import Reference, keep_reference, reference_of
from entropy_kernels.trainer.samples import SAMPLES, keep_before
from entropy_kernels.trainer.start import first_policy, versions, warm_start
from entropy_kernels.trainer.tasks import Task
from entropy_kernels.trainer.trackers import Trackers

Report = Callable[[str, int, int, dict[str, Any]], None]


@dataclass
class Run:
    """What a run carries from step to step; all but the log stands in its checkpoints."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]  # sampler and shuffler
    controller: ek.Controller | None  # of the method, with what it remembers
    target: ek.TargetEntropy | None  # in its place
    reference: Reference | None  # the policy where RL starts; in a file of its own
    critic: Critic | None = None  # with an optimizer of its own
    log: MetricsLog = field(init=False)
    first: int = 0  # step
    changes: list[dict[str, Any]] = field(default_factory=list)  # of the configuration, with the steps of them

    @property
    def modules(self) -> dict[str, checkpoint.Weights]:
        """What is trained, by name."""
        return {"policy": self.policy, **({"critic": self.critic} if self.critic else {})}

    def set_lr(self, step: int, config: TrainerConfig) -> float:
        """Give the optimizers the learning rates of a step; returns the policy's."""
        rates = [(self.optimizer, config.lr_at(step))]
        if self.critic is not None:
            rates.append((self.critic.optimizer, config.critic_lr_at(step)))
        for optimizer, lr in rates:
            for group in optimizer.param_groups:
                group["lr"] = lr
        return rates[0][1]

    def save(self, step: int, config: TrainerConfig) -> None:
        """Write the checkpoint after `step` steps."""
        check_weights(self.modules, step)
        path = config.out / checkpoint.CHECKPOINT
        OwnFiles(config.out, "run").claim(path.name, *([checkpoint.previous_of(path).name] if path.exists() else []))
        self.log.keep()
        checkpoint.save_checkpoint(
            path,
            step=step,
            config=config.to_dict(),
            modules=self.modules,
            optimizers={"policy": self.optimizer, **({"critic": self.critic.optimizer} if self.critic else {})},
            generators=self.generators,
            controller=self.target or self.controller,
            row=self.log.last,
            changes=self.changes,
        )


def open_run(config: TrainerConfig, task: Task, tell: Report, trackers: Trackers) -> Run:
    """The policy where RL starts, optimizer and generators, all from a checkpoint if the run goes on; and the log."""
    saved = checkpoint.load_checkpoint(config.out / checkpoint.CHECKPOINT) if config.resume else None
    different = {} if saved is None else check_resumable(saved["config"], config, finished=saved["step"])
    files = checkpoint.prepare_directory(config)
    trackers.begin(goes_on=saved is not None and not different)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    run = _begun(config, task, tell, resumed=saved is not None)
    if saved is not None:
        _take_up(run, saved, different, config)
    else:
        if config.overwrite:
            checkpoint.remove_run(files)
        keep_reference(run.reference, config.out)
        run.critic = critic_of(config, run.policy)
    if 0 < config.steps <= config.critic_first:
        warnings.warn(
            f"critic_warmup = {config.critic_warmup}: in all {config.steps} steps the critic learns alone, and the "
            "policy stays as it is",
            stacklevel=1,
        )
    begins = max(run.first, config.critic_first)
    if run.target is not None and begins:  # its course is over the run's steps, wherever it begins
        run.target.load_state_dict({**run.target.state_dict(), "calls": begins})
    files.claim("config.json", "metrics.jsonl")
    # before anything is changed: another run's log is refused
    last = None if saved is None else saved["row"]
    run.log = MetricsLog(config.out, keep_before=run.first, last=last, trackers=trackers)
    for name in (SAMPLES, checkpoint.UNSCORED):
        keep_before(config.out / name, run.first)
    _write_config(run, config, task, trackers)
    return run


def _begun(config: TrainerConfig, task: Task, tell: Report, *, resumed: bool) -> Run:
    """A run where RL starts, without a critic: the policy after the supervised start, if that is to be made here."""
    policy = first_policy(config, task)
    if kinds := task._kinds():
        policy.encode(kinds)  # an error now, and not at the step that gets such a prompt
    target = target_of(config, vocab_size=policy.vocab_size, backend=policy.backend)
    steps = config.warm_steps or 0
    if config.warm_start_from is None and not resumed and steps:
        tell("supervised start", 0, steps, {})
        warm_start(
            policy, task, config,
            on_step=lambda done, loss: tell("supervised start", done, steps, {"loss": loss}),
        )  # fmt: skip
    reference = reference_of(config, policy, resumed=resumed)
    optimizer = torch.optim.AdamW(policy.parameters(), **_adam(config))
    generators = {"sampler": torch.Generator(policy.device), "shuffler": torch.Generator()}
    for generator in generators.values():
        generator.manual_seed(config.seed)
    return Run(policy, optimizer, generators, controller_of(config), target, reference)


def _adam(config: TrainerConfig) -> dict[str, Any]:
    """The options of the policy's optimizer."""
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.lr, "betas": betas, "weight_decay": config.weight_decay}


def _take_up(run: Run, saved: dict[str, Any], different: dict[str, Any], config: TrainerConfig) -> None:
    """Let the run go on from a checkpoint, of which `different` fields were others."""
    path = config.out / checkpoint.CHECKPOINT
    run.changes = saved["changes"] + ([{"step": saved["step"], **different}] if different else [])
    if {"method", "method_options", "target_method"} & different.keys():
        saved["controller"] = None  # what another method remembers
    run.first = checkpoint.restore(
        saved, path, modules={"policy": run.policy}, optimizers={"policy": run.optimizer}, generators=run.generators,
        controller=run.target or run.controller,
    )  # fmt: skip
    for group in run.optimizer.param_groups:
        group.update(_adam(config))  # which may have changed
    run.critic = critic = critic_of(config, run.policy)
    if critic is not None and not {"advantage", "critic"} & different.keys():
        checkpoint.restore(
            saved, path, modules={"critic": critic}, optimizers={"critic": critic.optimizer}, generators={}
        )
        critic.set_options()


def _write_config(run: Run, config: TrainerConfig, task: Task, trackers: Trackers) -> None:
    """config.json: from it the run is started again, and it says what it was made of."""
    path = config.out / "config.json"
    # how the run was started is not part of what it is: from-config starts another one
    again = {**config.to_dict(), "resume": False, "resume_changes": [], "overwrite": False}
    before = fields_of(path).get("inputs") if config.resume else None
    about = {
        "command": sys.argv, "versions": versions(), "changes": run.changes, "run_id": trackers.run_id,
        "inputs": inputs_of(config, task, before),
    }  # fmt: skip
    write_json(path, {**again, **{name: value for name, value in about.items() if value}})
