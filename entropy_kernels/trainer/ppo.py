"""PPO with verifiable rewards under GRPO, Clip-Cov or KL-Cov. One file, top to bottom: :func:`train` is the loop.

Deviations from the paper (Cui et al. 2025, arXiv 2505.22617) and its authors' code:

1. Scale. 113 k parameters, 7-token answers and 3584 tokens per rollout instead of billions, thousands and millions.
   The paper's fractions (2e-4, 2e-3) would select less than one token per update; the defaults are .02 (Clip-Cov) and
   .05 (KL-Cov, beta 2).
2. The start is a supervised warm start on random walks, not a pretrained model.
3. Selection sees the whole minibatch, whatever the number of micro-batches; the authors' code selects within each
   micro-batch. The draw of Clip-Cov is keyed by a seed and the token's position in the rollout, not by a global
   generator.
4. Clip-Cov is the authors' code, not the paper's formula: PPO clip inside the surrogate, PPO-clipped tokens are no
   candidates, open band, at least one token, value and gradient of dropped tokens zeroed while the denominator counts
   them. KL-Cov likewise: no PPO clip, penalty beta |log p - log p_old|.
5. The PPO clip is .2 / .2; the authors' scripts for Clip-Cov set it to 1.
6. No KL to a reference model, no length penalty, no dynamic sampling; groups of equal rewards stay in the batch with
   advantage 0.
7. Advantages are divided by the group's standard deviation (the paper's GRPO does this; some of its successors do not).
8. Sampling and scoring both use temperature 1 with no truncation. Validation samples the same way.
9. Old log-probs come from a full forward of the sampling weights in the shapes of training, not from the sampling pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer import checkpoint
from entropy_kernels.trainer.config import TrainerConfig, check_resumable
from entropy_kernels.trainer.entropy_change import FirstOrder
from entropy_kernels.trainer.files import check_path, locked, write_json
from entropy_kernels.trainer.heads import compare_heads, loss_of_stats
from entropy_kernels.trainer.methods import METHODS, Part, select
from entropy_kernels.trainer.metrics_log import COVARIANCE_COLUMNS, MetricsLog
from entropy_kernels.trainer.policy import Encoded, Policy, build_policy, load_policy
from entropy_kernels.trainer.rollout import Rollout, collect, evaluate, mean_over, score
from entropy_kernels.trainer.run_folder import note_unscored, prepare_directory, remove_run
from entropy_kernels.trainer.tasks import Task, make_task
from entropy_kernels.trainer.warm_start import warm_start

#: Fraction of an update at which the network's first order must hold: the rest is the step's curvature.
SMALL = 0.1

Report = Callable[[str, int, int, dict[str, Any]], None]

#: The mask (B, L) of the tokens that a micro-batch's loss drops or penalises, None under GRPO; or a function that gives
#: it from their log-probs, where the forward of the update has to be run first.
Selection = Tensor | Callable[[Tensor], Tensor | None] | None


def train(config: TrainerConfig, *, report: Report | None = None) -> Path:
    """Run one training; returns the run's directory.

    Parameters
    ----------
    config : TrainerConfig
    report : callable, optional
        ``report(phase, done, total, row)`` after each piece of work; phase is ``"warm start"`` or ``"train"``.

    Raises
    ------
    ValueError
        A setting cannot work, or a checkpoint was made under another configuration.
    FileNotFoundError
        ``resume`` without a checkpoint.
    FileExistsError
        The directory holds another run, and neither ``resume`` nor ``overwrite`` is set; or files of the names of ours
        that we did not write.
    BlockingIOError
        Another process trains in the directory.
    """
    config.validate()
    task = make_task(config.task, max_new_tokens=config.max_new_tokens)
    task.partial_credit = config.partial_credit
    check_path(config.out)
    if config.resume:
        checkpoint.expect_checkpoint(config.out / "checkpoint.pt")
    with locked(config.out):
        return _train(config, task, report or (lambda phase, done, total, row: None))


def _train(config: TrainerConfig, task: Task, tell: Report) -> Path:
    """:func:`train`, in a directory that no other process writes into."""
    saved = checkpoint.load_checkpoint(config.out / "checkpoint.pt") if config.resume else None
    if saved is not None:
        check_resumable(saved["config"], config, finished=saved["step"])
    files = prepare_directory(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    # --- the policy: loaded, or built and warm-started --------------------------------------------------------------
    if config.warm_start_from is not None:
        policy = load_policy(config.warm_start_from, config, task)
    else:
        policy = build_policy(config, task)
        if config.warm_steps > 0 and saved is None:
            total = config.warm_steps
            warm_start(policy, task, config, on_step=lambda step, loss: tell("warm start", step, total, {"loss": loss}))
    optimizer = torch.optim.AdamW(
        policy.model.parameters(),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    sampler = torch.Generator(policy.device).manual_seed(config.seed)
    shuffler = torch.Generator().manual_seed(config.seed)
    generators = {"sampler": sampler, "shuffler": shuffler}
    first = 0
    if saved is not None:
        first = checkpoint.restore(
            saved, config.out / "checkpoint.pt", model=policy.model, optimizer=optimizer, generators=generators
        )
    elif config.overwrite:
        remove_run(files)
    # before anything is changed: another run's log is refused
    last = None if saved is None else saved.get("row")
    log = MetricsLog(config.out, tensorboard=config.tensorboard, keep_before=first, last=last)
    # how the run was started is not part of what it is: from-config starts another one
    again = {**config.to_dict(), "resume": False, "overwrite": False}
    write_json(config.out / "config.json", {**again, "command": sys.argv, "versions": versions()})

    def save(step: int) -> None:
        checkpoint.save_checkpoint(
            config.out / "checkpoint.pt",
            step=step,
            config=config.to_dict(),
            model=policy.model,
            optimizer=optimizer,
            generators=generators,
            row=log.last,
        )

    # --- the loop ---------------------------------------------------------------------------------------------------
    for step in range(first, config.steps):
        row: dict[str, Any] = {"step": step}
        if config.eval_every and step % config.eval_every == 0:
            row |= validate(policy, task, config, step)
        started, ops_before = time.perf_counter(), policy.clock.seconds
        on_gpu = policy.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(policy.device)

        # 1. sample, verify, score: the policy that the row describes
        rollout = collect(policy, task, config, step=step, generator=sampler)
        row |= describe(rollout, config)
        note_unscored(config.out / "unscored.jsonl", step, rollout.unscored)
        collected = time.perf_counter()
        if config.measure_memory and step == 0:
            row |= compare_on_first_micro_batch(policy, rollout, config)
        first_order = None
        if config.first_order_every and step % config.first_order_every == 0:
            # one small step changes less than products in half precision show
            with policy.full_precision():
                first_order = FirstOrder(policy, rollout, config)
                entropy_before = entropy_now(policy, rollout, config)
        measuring = time.perf_counter() - collected

        # 2. several updates per rollout: from the second on, log-probs differ from the old ones
        dropped = torch.zeros_like(rollout.mask)
        updates: list[dict[str, float]] = []
        for _epoch in range(config.epochs):
            order = torch.randperm(rollout.ids.shape[0], generator=shuffler).to(policy.device)
            for rows in order.chunk(config.minibatches):
                seed = (config.seed * 1_000_003 + step) * 10_007 + 2 * len(updates)
                updates.append(update(policy, optimizer, rollout, rows, config, seed=seed, dropped=dropped))
                if first_order is not None and len(updates) == 1:
                    probed = time.perf_counter()
                    row["first_order_dh"] = first_order.change()
                    with policy.full_precision():
                        row["first_update_dh"] = entropy_now(policy, rollout, config) - entropy_before
                        with first_order.fraction(SMALL):
                            row["small_update_dh"] = (entropy_now(policy, rollout, config) - entropy_before) / SMALL
                    measuring += time.perf_counter() - probed
        row |= average(updates)
        updated = time.perf_counter()

        # 3. what the updates did to the entropy, and what theory says they do
        row["predicted_dh"] = predicted_change(rollout, dropped, config)
        if config.measure_entropy_change:
            row["measured_dh"] = entropy_now(policy, rollout, config) - row["entropy"]
        if first_order is not None:
            row["first_order_step_dh"] = first_order.change()
            first_order = None  # as large as the model three times
        ended = time.perf_counter()
        measuring += ended - updated

        if on_gpu and not (config.measure_memory and step == 0):
            row["memory/peak"] = float(torch.cuda.max_memory_allocated(policy.device))
        row["time/rollout"] = collected - started
        row |= {f"time/{name}": seconds for name, seconds in rollout.seconds.items()}
        row["time/measure"] = measuring
        row["time/update"] = ended - collected - measuring
        row["time/step"] = ended - started
        row["time/ops"] = policy.clock.seconds - ops_before
        row["time/ops_share"] = row["time/ops"] / row["time/step"]
        row["time/tokens_per_s"] = row["tokens"] / row["time/step"]
        log.write(row)
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            save(step + 1)
        tell("train", step + 1, config.steps, row)

    # --- the end: a checkpoint, then the last policy's rollout and its larger validation ----------------------------
    # saved before the last rollout draws from the sampler, so that a run can be extended bit-identically
    save(config.steps)
    policy.save(config.out / "model")
    rollout = collect(policy, task, config, step=config.steps, generator=sampler)
    row = {"step": config.steps, **describe(rollout, config)}
    row |= validate(policy, task, config, config.steps)
    row |= validate(policy, task, config, config.steps, final=True)
    log.write(row)
    log.close()
    tell("train", config.steps, config.steps, row)
    return config.out


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rows: Tensor,
    config: TrainerConfig,
    *,
    seed: int,
    dropped: Tensor,
) -> dict[str, float]:
    """One optimizer step on the rollout's `rows` (a minibatch), in micro-batches; returns its metrics.

    Selection and normalisation are those of the whole minibatch. Dropped tokens are marked in `dropped` (B, L).
    """
    micro_rows = rows.chunk(config.micro_batches)

    def choose(logprobs: list[Tensor]) -> list[Tensor]:
        parts = [part_of(rollout, r, logprob) for r, logprob in zip(micro_rows, logprobs, strict=True)]
        with policy.clock:
            return select(config, parts, seed=seed, backend=policy.backend)

    # The masks of all micro-batches before the first loss, from the rollout's log-probs ("old") or those of one more
    # forward without gradient. Only where there is one micro-batch does the forward of the update itself give them.
    selections: list[Selection]
    if METHODS[config.method].select is None:
        selections = [None] * len(micro_rows)
    elif config.selects_late:
        selections = [lambda logprob: choose([logprob])[0]]
    elif config.selection_logprob == "old":
        selections = [*choose([rollout.old_logprob[r] for r in micro_rows])]
    else:
        selections = [*choose([fresh_logprob(policy, rollout, r, config) for r in micro_rows])]

    optimizer.zero_grad(set_to_none=True)
    tokens = int(rollout.mask[rows].sum())
    parts: list[tuple[int, dict[str, Tensor]]] = []
    loss_total, selected = 0.0, 0
    for r, selection in zip(micro_rows, selections, strict=True):
        result, chosen = backward(policy, rollout, r, config, selection, tokens=tokens, sequences=len(rows))
        loss_total += float(result.loss.detach())
        parts.append((int(rollout.mask[r].sum()), result.metrics))
        if chosen is not None:
            selected += int(chosen.sum())
            if METHODS[config.method].treats == "dropped":
                dropped[r] |= chosen
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.grad_clip or float("inf"))
    optimizer.step()
    drops = METHODS[config.method].treats == "dropped"
    counts = {"tokens_dropped": selected if drops else 0, "tokens_penalized": 0 if drops else selected}
    return {**merge_parts(parts), "loss": loss_total, "grad_norm": float(norm), **counts}


def backward(
    policy: Policy,
    rollout: Rollout,
    rows: Tensor,
    config: TrainerConfig,
    selection: Selection,
    *,
    tokens: int,
    sequences: int,
) -> tuple[ek.PolicyLoss, Tensor | None]:
    """Forward, loss and backward of a micro-batch; its gradient is added to the weights'.

    `tokens` and `sequences` are those of the minibatch, which the loss is normalised by: micro-batch losses add up to
    one. Returns the loss and the mask of the selected tokens.
    """
    ids, mask = rollout.ids[rows], rollout.mask[rows]
    outputs = policy.outputs(Encoded(rollout.prompts.ids[rows], rollout.prompts.mask[rows]), ids, mask)
    # The graph is cut at the model's outputs: our backward and the network's run one after the other, so that the time
    # spent in our ops is measured.
    leaf = outputs.detach().requires_grad_()
    options = partial(loss_options, config, rollout, rows, tokens=tokens, sequences=sequences, backend=policy.backend)
    selected: Tensor | None
    if callable(selection):
        stats = policy.logprob_entropy(leaf, ids, mask, temperature=config.temperature)
        selected = selection(stats.logprob.detach())
        with policy.clock:
            result = loss_of_stats(stats, mask=mask, **options(selected))
    else:
        selected = selection
        result = policy.policy_loss(leaf, ids, mask, temperature=config.temperature, **options(selected))
    with policy.clock:
        result.loss.backward()
    outputs.backward(leaf.grad)
    return result, selected


def loss_options(
    config: TrainerConfig,
    rollout: Rollout,
    rows: Tensor,
    selected: Tensor | None,
    *,
    tokens: int,
    sequences: int,
    backend: str,
) -> dict[str, Any]:
    """Arguments of a micro-batch's loss, but for its statistics and its mask."""
    options: dict[str, Any] = {
        "method": METHODS[config.method].loss,
        "old_logprob": rollout.old_logprob[rows],
        "advantages": rollout.advantages[rows],
        "entropy_coef": config.entropy_coef,
        "loss_agg_mode": config.loss_agg_mode,
        "batch_num_tokens": tokens,
        "global_batch_size": sequences,
    }
    return options | METHODS[config.method].options(config, selected, backend)


def compare_on_first_micro_batch(policy: Policy, rollout: Rollout, config: TrainerConfig) -> dict[str, float]:
    """:func:`compare_heads` on the rollout's first rows, as many as a micro-batch has; nothing is selected."""
    rows = torch.arange(rollout.ids.shape[0] // (config.minibatches * config.micro_batches), device=rollout.ids.device)
    mask = rollout.mask[rows]
    none = None if METHODS[config.method].select is None else torch.zeros_like(mask)
    selection = (lambda logprob: none) if config.selects_late else none

    def step(policy: Policy) -> None:
        backward(policy, rollout, rows, config, selection, tokens=int(mask.sum()), sequences=len(rows))

    return compare_heads(policy, step, lambda policy: fresh_logprob(policy, rollout, rows, config)[mask])


def part_of(rollout: Rollout, rows: Tensor, logprob: Tensor) -> Part:
    """What selection needs of a micro-batch."""
    length = rollout.ids.shape[1]
    index = rows[:, None] * length + torch.arange(length, device=rows.device)
    return Part(logprob, rollout.old_logprob[rows], rollout.advantages[rows], rollout.mask[rows], index)


@torch.no_grad()
def fresh_logprob(policy: Policy, rollout: Rollout, rows: Tensor, config: TrainerConfig) -> Tensor:
    """(B, L) log-probs of a micro-batch under the current weights: the collect phase of selection."""
    ids, mask = rollout.ids[rows], rollout.mask[rows]
    outputs = policy.outputs(Encoded(rollout.prompts.ids[rows], rollout.prompts.mask[rows]), ids, mask)
    return policy.logprob_entropy(outputs, ids, mask, temperature=config.temperature).logprob


def describe(rollout: Rollout, config: TrainerConfig) -> dict[str, float]:
    """What a rollout says about the policy that made it: entropy, reward, and the covariance of its tokens."""
    covariance = ek.token_covariance(rollout.old_logprob, rollout.advantages, rollout.mask)[rollout.mask].double()
    ordered = covariance.sort(descending=True).values
    n = len(ordered)
    low, high = (config.cov_low, config.cov_high) if config.cov_band == "absolute" else (1.0, 5.0)
    row = {
        "entropy": mean_over(rollout.entropy, rollout.mask),
        "reward": float(rollout.rewards.mean()),
        "unscored": len(rollout.unscored),
        "groups_mixed": float((rollout.rewards != rollout.rewards[:, :1]).any(dim=1).float().mean()),
        "tokens": n,
        "sampling_gap": rollout.sampling_gap,
        "cov_mean": float(covariance.mean()),
        "cov_max": float(ordered[0]),
        "tokens_in_band": int(((covariance > low) & (covariance < high)).sum()),
    }
    for fraction, name in COVARIANCE_COLUMNS.items():
        row[name] = float(ordered[: max(1, int(fraction * n))].mean())
    return row


def entropy_now(policy: Policy, rollout: Rollout, config: TrainerConfig) -> float:
    """Mean entropy of the current policy over the rollout's tokens, nats."""
    _, entropy, _ = score(policy, config, rollout.prompts, rollout.ids, rollout.mask)
    return mean_over(entropy, rollout.mask)


def predicted_change(rollout: Rollout, dropped: Tensor, config: TrainerConfig) -> float:
    """Entropy change of a unit policy-gradient step, if every row of logits were free: the mean over tokens, nats.

    Its size means nothing here (AdamW's step in the weights is no step in the logits); its sign and its course over the
    steps can be compared with the measured change.
    """
    advantages = rollout.advantages.masked_fill(dropped, 0.0)
    change = ek.predicted_entropy_change(
        rollout.vocab_covariance, advantages, step_size=1.0, temperature=config.temperature
    )
    return mean_over(change, rollout.mask)


def validate(policy: Policy, task: Task, config: TrainerConfig, step: int, *, final: bool = False) -> dict[str, float]:
    """Validation metrics of the current policy, drawn with a generator of their own: training never sees it.

    The larger one at the end has names of its own: its prompts differ, so it is no point of the course over the steps.
    """
    started = time.perf_counter()
    generator = torch.Generator(policy.device).manual_seed(config.seed * 1_000_003 + step)
    prefix, prompts, samples = "val", config.eval_prompts, config.eval_samples
    if final:
        prefix, prompts, samples = "final", config.final_eval_prompts, config.final_eval_samples
    metrics = evaluate(policy, task, config, prompts=prompts, samples=samples, generator=generator)
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()  # more completions at once than a step has: other runs on the GPU may need it
    seconds = time.perf_counter() - started
    return {**{f"{prefix}_{name}": value for name, value in metrics.items()}, f"time/{prefix}": seconds}


#: Metrics of the losses that the log keeps.
_LOSS_METRICS = ("pg_loss", "clipfrac", "ppo_kl", "ppo_kl_abs", "ratio_mean", "ratio_max", "nonfinite_tokens")


def merge_parts(parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Metrics of a minibatch from those of its micro-batches (tokens, metrics): maxima, sums, else token means."""
    merged = {}
    total = sum(tokens for tokens, _ in parts)
    for name in _LOSS_METRICS:
        values = [(tokens, float(metrics[name])) for tokens, metrics in parts if name in metrics]
        if not values:
            continue
        if name.endswith("_max"):
            merged[name] = max(value for _, value in values)
        elif name == "nonfinite_tokens" or name == "pg_loss":
            merged[name] = sum(value for _, value in values)
        else:
            merged[name] = sum(tokens * value for tokens, value in values) / max(total, 1)
    return merged


def average(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of all its updates: maxima and counts over them, else their mean."""
    row = {}
    for name in updates[0]:
        values = [metrics[name] for metrics in updates]
        if name.endswith("_max"):
            row[name] = max(values)
        elif name in ("nonfinite_tokens", "tokens_dropped", "tokens_penalized"):
            row[name] = sum(values)
        else:
            row[name] = sum(values) / len(values)
    return row


def versions() -> dict[str, str]:
    """What a result depends on besides the configuration."""
    import platform

    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "entropy_kernels": ek.__version__,
        "machine": platform.machine(),
    }
