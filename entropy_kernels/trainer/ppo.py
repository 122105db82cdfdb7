"""PPO with verifiable rewards, under any method of control. One file, top to bottom: :func:`train` is the loop.

A step: sample completions, score them, take old log-probs, make advantages (:func:`collect`), then for every minibatch
decide about its tokens and update (:func:`update`); with a target entropy all updates of the step are planned before
the first.
What is measured hangs on the loop as probes and changes nothing.
Read on in this order: methods.py (what may be done to tokens, one table), rollout.py (sampling, old log-probs),
advantages.py (estimators, a table too), critic.py and reference.py (what some of them need), groups.py (whose
completions), model.py (the policy and its head; causal_lm.py, encoding.py and lora.py: what is asked of models,
tokenizers and peft), probes.py (what is measured), tasks.py and data.py, workers.py (who scores), start.py (where RL
starts), run.py (what a step leaves to the next), checkpoint.py and files.py (what is written), config.py (every
setting). sweep.py runs methods × seeds for report.py.

Deviations from the paper (Cui et al. 2025, arXiv 2505.22617) and its authors' code, with the configuration's defaults
(a test compares the numbers):

1. Scale. 113 k parameters, 7-token answers and 3584 tokens per rollout instead of billions, thousands and millions.
   The paper's fractions (0.0002, 0.002) would select less than one and less than two tokens per update; the defaults
   are 0.03 (Clip-Cov) and 0.07 (KL-Cov, beta 2 instead of 1).
2. The start is supervised learning on random walks (800 steps, 30 % with a wrong goal), not a pretrained model.
3. Selection sees the whole minibatch, whatever the number of micro-batches; the authors' code selects within each
   micro-batch. The draw of Clip-Cov is keyed by a seed and the token's position in the rollout, not by a global
   generator.
4. Clip-Cov is the authors' code, not the paper's formula: PPO clip inside the surrogate, PPO-clipped tokens are no
   candidates, open covariance range (1 to 5), at least one token, value and gradient of dropped tokens zeroed while the
   denominator counts them. KL-Cov likewise: no PPO clip, penalty beta |log p - log p_old|.
5. The PPO clip is 0.2 / 0.2; the authors' scripts for Clip-Cov set it to 1.
6. No KL to a reference model and no dynamic sampling, which there are (ref_kl_coef, dynamic_sampling); no length
   penalty, which there is not. Groups of equal rewards stay in the batch with advantage 0.
7. Advantages are divided by the group's standard deviation (the paper's GRPO does this; some of its successors do not)
   and not whitened; there is no critic.
8. Sampling and scoring both use temperature 1 with no truncation. Validation samples the same way.
9. Old log-probs come from a full forward of the sampling weights in the shapes of training, not from the sampling pass.
10. AdamW at a constant 0.0003 with betas 0.9 and 0.999, no weight decay, gradient norm 1; 4 updates of a rollout.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer import checkpoint
from entropy_kernels.trainer.advantages import advantages_of, rewards_of_tokens
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.critic import Critic
from entropy_kernels.trainer.data import data_task
from entropy_kernels.trainer.faults import NonFinite, check_sampled, clip_gradients, kept
from entropy_kernels.trainer.files import Unwritable, check_path, locked
from entropy_kernels.trainer.groups import sample_step
from entropy_kernels.trainer.methods import part_of, surrogate_of
from entropy_kernels.trainer.model import Policy, loss_of_stats
from entropy_kernels.trainer.probes import Probe, Step, Update, default_probes
from entropy_kernels.trainer.reference import Reference, loss_penalty, reward_penalty
from entropy_kernels.trainer.rollout import (
    Rollout,
    Stats,
    all_tokens,
    fresh_stats,
    known_tokens,
    row_slices,
    score_and_value,
    stats_for,
)
from entropy_kernels.trainer.run import Report, Run, open_run
from entropy_kernels.trainer.signals import Stop, Terminated, stopped_after_a_step
from entropy_kernels.trainer.start import warm_steps_of
from entropy_kernels.trainer.tasks import SEED_STRIDE, Task, as_task, make_task
from entropy_kernels.trainer.trackers import Trackers
from entropy_kernels.trainer.workers import asked

#: What a micro-batch's loss does to its tokens, None for nothing; or a function that says it from their statistics,
#: where the forward of the update has to be run first.
Decision = ek.Control | Callable[[Stats], ek.Control] | None


def train(
    config: TrainerConfig,
    *,
    task: Any = None,
    report: Report | None = None,
    probes: Sequence[Probe] | None = None,
) -> Path:
    """Run one training.

    Args:
        config: all settings; ``config.out`` is the run's directory.
        task: an object with the methods of :class:`entropy_kernels.trainer.tasks.Task`, of which ``prompts`` and
            ``verify`` are required; it is asked in this process. None: the task that the configuration names.
        report: ``report(phase, done, total, row)``, called after each piece of work; phase is "supervised start" or
            "train", where ``row`` is the log's, of the policy after ``done`` steps. A phase begins with an empty row.
        probes: what is measured; None: what the configuration asks for.

    Returns:
        The run's directory.

    Raises:
        ValueError: a setting or the task cannot work, or a checkpoint was made under another configuration.
        FileNotFoundError: ``resume`` without a checkpoint; a file that the configuration names is not there.
        FileExistsError: the directory holds another run, and neither ``resume`` nor ``overwrite`` is set; or files of
            the names of ours that we did not write.
        BlockingIOError: another process trains in the directory.

    Source:
        docs/trainer.md.
    """
    config, task = prepared(config, task)
    check_path(config.out)
    if config.resume:
        checkpoint.expect_checkpoint(config.out / checkpoint.CHECKPOINT)
    # the task's scorer is there, and no other process writes into the directory
    with asked(task, config), locked(config.out), Trackers(config) as trackers:
        return _train(
            config,
            task,
            report or (lambda phase, done, total, row: None),
            default_probes(config, backward) if probes is None else probes,
            trackers,
        )


def prepared(config: TrainerConfig, task: Any = None) -> tuple[TrainerConfig, Task]:
    """A configuration that can work, with its task; or with an object of the user's, whose name it then has."""
    config.validate()
    task = task_of(config) if task is None else as_task(task)
    if task._called is None:
        if config.data is not None:
            raise ValueError(f"data: expected none beside a task, got {config.data}")
        config = replace(config, task=task.name)
    if config.mask_truncated and task.fixed_length:
        raise ValueError(
            f"mask_truncated: expected a task whose completions end with an end token, got {task.name}, where all have "
            "one length and none is cut off"
        )
    return replace(config, warm_steps=warm_steps_of(config, task)), task


def task_of(config: TrainerConfig) -> Task:
    """The task that a configuration names."""
    if config.data is None:
        task = as_task(make_task(config.task, max_new_tokens=config.max_new_tokens))
    else:
        task = data_task(config)
    task._called = config.task
    return task


def _train(config: TrainerConfig, task: Task, tell: Report, probes: Sequence[Probe], trackers: Trackers) -> Path:
    """Begin the run, or take it up, and let it go on until its end or SIGTERM."""
    run = open_run(config, task, tell, trackers)
    tell("train", run.first, config.steps, {})
    try:
        with closing(run.log), stopped_after_a_step() as stop:
            _loop(run, config, task, tell, probes, stop)
    except (NonFinite, Unwritable) as error:
        if not (config.out / checkpoint.CHECKPOINT).exists():
            raise
        raise type(error)(f"{error}; --resume goes on from the last checkpoint") from error
    return config.out


def _loop(run: Run, config: TrainerConfig, task: Task, tell: Report, probes: Sequence[Probe], stop: Stop) -> None:
    """The loop. Its last round is the last policy's rollout, without updates."""
    policy = run.policy
    for number in range(run.first, config.steps + 1):
        decides = run.target or run.controller
        step = Step(number, number == config.steps, policy, task, config, decides, row={"step": number})
        due = number > run.first and config.save_every and number % config.save_every == 0
        if step.last or stop.asked or due:
            # before the rollout draws from the sampler, so that a run can be extended bit-identically
            run.save(number, config)
        if stop.asked:
            raise Terminated(128 + signal.SIGTERM)
        if step.last:
            policy.save(config.out / "model")
        for probe in probes:
            probe.before_step(step)

        # 1. sample, score, old log-probs, advantages
        with kept(run, step):
            step.rollout = collect(
                policy, task, config, step=number, generator=run.generators["sampler"], reference=run.reference,
                critic=run.critic,
            )  # fmt: skip
        for probe in probes:
            probe.after_rollout(step)

        if not step.last:
            lr, order = run.set_lr(number, config), list(minibatches(config, policy.device, run.generators["shuffler"]))
            # a minibatch without a token that counts (mask_truncated) is no update: weights and optimizer stay
            order = [rows for rows in order if bool(step.rollout.mask[rows].any())]
            alone = number < config.critic_first
            target = None if alone else run.target

            # 2. with a target entropy: what all updates may do, by the statistics of the policy that sampled
            if target is not None:
                with policy.clock:
                    tokens = all_tokens(step.rollout, order, config)
                    step.plan = target.step(tokens, lr=lr, updates=config.epochs)

            # 3. several updates per rollout: from the second on, log-probs differ from the old ones
            for rows in order:
                seed = ((config.seed * SEED_STRIDE + number) * 10_007 + 2 * len(step.updates)) % (1 << 64)
                with kept(run, step, rows=rows, seed=seed):
                    made = update(
                        policy, run.optimizer, step.rollout, rows, config, decides, seed=seed, plan=step.plan,
                        critic=run.critic, critic_alone=alone,
                    )  # fmt: skip
                step.updates.append(made)
                for probe in probes:
                    probe.after_update(step)

            # 4. the target learns what its plan has done to the entropy
            if target is not None:
                target.observe(step.entropy_after())
            for probe in probes:
                probe.after_step(step)

        run.log.write(step.row)
        tell("train", number, config.steps, step.row)


@torch.no_grad()
def collect(
    policy: Policy,
    task: Task,
    config: TrainerConfig,
    *,
    step: int,
    generator: torch.Generator,
    reference: Reference | None = None,
    critic: Critic | None = None,
) -> Rollout:
    """A rollout of the current policy: completions, their rewards, old log-probs and values, and advantages.

    Old log-probs come from a full forward in the same shapes as training, not from the sampling pass: the first update
    then starts at ratio 1 exactly. How far the two passes differ is reported as `sampling_gap`.
    """
    # sample: groups of completions, those of a prompt adjacent, and their rewards by the task's verifier
    sampled = sample_step(policy, task, config, step=step, generator=generator)
    encoded, completions = sampled.groups.encoded, sampled.groups.completions
    started = time.perf_counter()

    # old log-probs, and the other statistics; the critic's values
    stats, values = score_and_value(policy, critic, config, encoded, completions.ids, completions.mask)
    gap = float((stats.logprob - completions.logprob).abs().max())
    if not math.isfinite(gap):
        check_sampled(encoded, completions, stats.logprob, "in the full forward")
    ref_logprob = None
    if reference is not None:
        parts, scored = row_slices(config, len(encoded.ids)), (encoded, completions.ids, completions.mask)
        ref_logprob = reference.logprob(parts, *scored, temperature=config.temperature)
        check_sampled(encoded, completions, ref_logprob, "under the reference")
    seconds = dict(
        zip(("sample", "verify", "score"), (*sampled.groups.seconds, time.perf_counter() - started), strict=True)
    )

    # advantages: a completion's reward stands at its last token, and a penalty for leaving the reference at each
    rewards = sampled.groups.rewards().to(policy.device)
    penalty = reward_penalty(config, stats.logprob, ref_logprob)
    counted = completions.mask & completions.ended[:, None] if config.mask_truncated else completions.mask
    made = advantages_of(
        config.advantage,
        rewards_of_tokens(rewards.flatten(), completions.mask) - penalty,
        completions.mask,
        samples=config.samples_per_prompt,
        values=values,
        whiten=config.whiten_advantages,
        counted=counted,
        normalize_std=config.normalize_std,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    return Rollout(
        prompts=encoded,
        ids=completions.ids,
        mask=counted,
        rewards=rewards,
        advantages=made.advantages,
        old_logprob=stats.logprob,
        entropy=stats.entropy,
        collision=stats.collision,
        vocab_covariance=stats.vocab_covariance,
        sampling_gap=gap,
        seconds=seconds,
        unscored=[answer for each in sampled.rounds for answer in each.unscored()],
        sampled_rewards=torch.cat([each.rewards() for each in sampled.rounds]).to(policy.device),
        ref_logprob=ref_logprob,
        completed=completions.mask,
        truncated=~completions.ended,
        values=values,
        returns=made.returns,
        longest=config.max_new_tokens or task.max_new_tokens,
    )


def minibatches(config: TrainerConfig, device: torch.device, shuffler: torch.Generator) -> Iterator[Tensor]:
    """Rows of the rollout for each update, in a new order every epoch."""
    for _epoch in range(config.epochs):
        order = torch.randperm(config.prompts_per_step * config.samples_per_prompt, generator=shuffler).to(device)
        yield from order.chunk(config.minibatches)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rows: Tensor,
    config: TrainerConfig,
    controller: ek.Controller | None,
    *,
    seed: int,
    plan: ek.Control | None = None,
    critic: Critic | None = None,
    critic_alone: bool = False,
) -> Update:
    """One optimizer step on the rollout's `rows` (a minibatch), in micro-batches; one of the critic's with it.

    Normalisation is that of the whole minibatch, and so is control; or it follows a `plan` of the whole rollout.
    `critic_alone`: the policy gets no gradient, so that its step does nothing.
    """
    started = time.perf_counter()
    parts = list(rows.chunk(config.micro_batches))
    decides = None if critic_alone else controller
    decisions = decide(policy, rollout, parts, config, decides, seed=seed) if plan is None else part_of(plan, parts)
    optimizers = [optimizer] if critic is None else [optimizer, critic.optimizer]
    for each in optimizers:
        each.zero_grad(set_to_none=True)
    tokens, sequences = rollout.counts(rows)
    surrogate = surrogate_of(config, controller)
    losses, controls = [], []
    for part, decision in zip(parts, decisions, strict=True):
        result, control = backward(
            policy, rollout, part, config, decision, surrogate, tokens=tokens, sequences=sequences,
            critic=critic, critic_alone=critic_alone,
        )  # fmt: skip
        losses.append(ek.PolicyLoss(result.loss.detach(), result.metrics))
        controls.append(control)
    learners = {"policy": policy.model, **({} if critic is None else {"critic": critic.module})}
    norms = clip_gradients(learners, losses, config.grad_clip)  # what is not finite ends here
    for each in optimizers:
        each.step()
    return Update(parts, losses, controls, norms[0], time.perf_counter() - started, *norms[1:])


def decide(
    policy: Policy,
    rollout: Rollout,
    parts: list[Tensor],
    config: TrainerConfig,
    controller: ek.Controller | None,
    *,
    seed: int,
) -> Sequence[Decision]:
    """What may be done to the tokens of all micro-batches, before the first loss.

    The method has the rollout's statistics ("old") or those of one more forward without gradient. Only where there is
    one micro-batch does the forward of the update itself give them.
    """
    if controller is None:
        return [None] * len(parts)

    def control(fresh: Sequence[Stats] | None) -> list[ek.Control]:
        with policy.clock:
            batch = known_tokens(rollout, parts, config, fresh=fresh, backend=policy.backend)
            found: list[ek.Control] = controller.step(batch, seed=seed)
        return found

    if config.decides_late:
        return [lambda stats: control([stats])[0]]
    if config.selection_logprob == "old":
        return control(None)
    return control([fresh_stats(policy, rollout, rows, config) for rows in parts])


def backward(
    policy: Policy,
    rollout: Rollout,
    rows: Tensor,
    config: TrainerConfig,
    decision: Decision,
    surrogate: dict[str, Any],
    *,
    tokens: int,
    sequences: int,
    critic: Critic | None = None,
    critic_alone: bool = False,
) -> tuple[ek.PolicyLoss, ek.Control | None]:
    """Forward, loss and backward of a micro-batch; its gradient is added to the weights', and to the critic's.

    `surrogate`: see :func:`surrogate_of`. `tokens` and `sequences` are those of the minibatch, which the loss is
    normalised by: micro-batch losses add up to one. Returns the loss, the critic's if it is alone, and what was done to
    the tokens.
    """
    ids, mask = rollout.ids[rows], rollout.mask[rows]
    with torch.set_grad_enabled(not critic_alone):
        outputs = policy.outputs(rollout.prompts[rows], ids, rollout.completed[rows])
    # The graph is cut at the model's outputs: our backward and the network's run one after the other, so that the time
    # spent in our ops is measured.
    leaf = outputs.detach().requires_grad_()
    valued: dict[str, Any] = {}
    if critic is not None:
        valued = critic.backward(policy, rollout, rows, leaf, tokens=tokens, sequences=sequences)
    if critic_alone:
        return ek.PolicyLoss(valued["value_loss"], valued), None

    def options(control: ek.Control | None) -> dict[str, Any]:  # made anew, so that nothing holds it until the backward
        return {
            "method": "ppo",
            "old_logprob": rollout.old_logprob[rows],
            "advantages": rollout.advantages[rows],
            "entropy_coef": config.entropy_coef,
            "loss_agg_mode": config.loss_agg_mode,
            "batch_num_tokens": tokens,
            "global_batch_size": sequences,
            "loss_scale_factor": rollout.longest,
            "control": control,
            **loss_penalty(config, rollout, rows),
            **surrogate,
        }

    control: ek.Control | None
    if callable(decision):
        stats = stats_for(config)(policy, leaf, ids, mask, temperature=config.temperature)
        control = decision(stats)
        with policy.clock:
            result = loss_of_stats(stats, mask=mask, **options(control))
    else:
        control = decision
        result = policy.policy_loss(leaf, ids, mask, temperature=config.temperature, **options(control))
    with policy.clock:
        result.loss.backward()
    outputs.backward(leaf.grad)
    return ek.PolicyLoss(result.loss, {**result.metrics, **valued}), control
