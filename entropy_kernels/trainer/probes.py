"""What a run measures: probes that hang on the loop of :mod:`entropy_kernels.trainer.ppo`.

A :class:`Probe` sees a :class:`Step` as it comes about and adds to its row; log.py says what each name means.
What a probe changes it puts back: without probes a run has the same weights, bit for bit (tested).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._memory import peak_allocated
from entropy_kernels.trainer.checkpoint import UNSCORED, note_unscored
from entropy_kernels.trainer.config import HEADS, TrainerConfig
from entropy_kernels.trainer.log import COVARIANCE_COLUMNS
from entropy_kernels.trainer.methods import controller_of, surrogate_of, without_control
from entropy_kernels.trainer.model import Policy
from entropy_kernels.trainer.rollout import Rollout, evaluate, fresh_stats, known_tokens, mean_over, row_slices, score
from entropy_kernels.trainer.rollout_metrics import rollout_columns
from entropy_kernels.trainer.samples import SAMPLES, Samples
from entropy_kernels.trainer.tasks import SEED_STRIDE, Task

#: Fraction of an update at which the network's first order must hold: the rest is the step's curvature.
SMALL = 0.1
#: Largest mean difference between the two heads' log-probs that is rounding, nats. A model whose logits are made in a
#: way that `ek.hf` does not know is off by far more.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}


# --- what a probe sees -----------------------------------------------------------------------------------------------


@dataclass
class Update:
    """One optimizer step: lists have an entry per micro-batch."""

    rows: list[Tensor]  # of the rollout
    losses: list[ek.PolicyLoss]  # without graph
    controls: list[ek.Control | None]  # what was done to the tokens
    grad_norm: float  # before clipping
    seconds: float
    critic_grad_norm: float | None = None


@dataclass
class Step:
    """A step of the loop, as far as it has come; the last one has a rollout and no updates."""

    number: int
    last: bool
    policy: Policy
    task: Task
    config: TrainerConfig
    controller: ek.Controller | None = None  # of the method, or the target in its place
    rollout: Rollout | None = None
    plan: ek.Control | None = None  # for all tokens of the rollout, in all updates; with a target entropy
    updates: list[Update] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    _after: Tensor | None = None

    @property
    def sampled(self) -> Rollout:
        """The rollout, where there must be one."""
        assert self.rollout is not None
        return self.rollout

    def entropy_after(self) -> Tensor:
        """Entropy at the rollout's tokens after all updates, (B, L), nats: one more forward, made once."""
        if self._after is None:
            self._after = entropy_now(self)
        return self._after


class Probe:
    """Something measured in every step, which goes into `step.row`."""

    def before_step(self, step: Step) -> None:
        """Before the rollout is sampled."""

    def after_rollout(self, step: Step) -> None:
        """The policy is still the one that sampled; in the last step, too."""

    def after_update(self, step: Step) -> None:
        """After each optimizer step, which stands at the end of `step.updates`."""

    def after_step(self, step: Step) -> None:
        """After the last update."""


#: :func:`entropy_kernels.trainer.ppo.backward`.
Backward = Callable[..., Any]


def default_probes(config: TrainerConfig, backward: Backward) -> list[Probe]:
    """What a configuration asks to be measured, in the order in which it is."""
    heads = [HeadMemory(backward)] if config.measure_memory else []
    # the time and the memory of a step begin after the validation
    return [Validation(), PeakMemory(), RolloutMetrics(), *heads, UpdateMetrics(), EntropyChange(), Times()]


# --- the rollout, the updates, what they cost ------------------------------------------------------------------------


class Validation(Probe):
    """Held-out prompts, every `eval_every` steps and at the end, where a larger validation follows.

    They are drawn with a generator of their own, which training never sees. The larger one has names of its own: its
    prompts differ, so it is no point of the course over the steps.
    """

    def before_step(self, step: Step) -> None:
        config = step.config
        if step.last or (config.eval_every and step.number % config.eval_every == 0):
            self._validate(step, "val", config.eval_prompts, config.eval_samples)
        if step.last:
            self._validate(step, "final", config.final_eval_prompts, config.final_eval_samples)

    def _validate(self, step: Step, prefix: str, prompts: int, samples: int) -> None:
        started = time.perf_counter()
        generator = torch.Generator(step.policy.device).manual_seed(step.config.seed * SEED_STRIDE + step.number)
        shown = Samples(step.number, prefix)
        metrics = evaluate(
            step.policy, step.task, step.config, prompts=prompts, samples=samples, generator=generator, each=shown
        )
        shown.append_to(step.config.out / SAMPLES)
        if step.policy.device.type == "cuda":
            torch.cuda.empty_cache()  # more completions at once than a step has: other runs on the GPU may need it
        step.row |= {f"{prefix}_{name}": value for name, value in metrics.items()}
        step.row[f"time/{prefix}"] = time.perf_counter() - started


class RolloutMetrics(Probe):
    """What a rollout says about the policy that made it: entropy, lengths, rewards, the covariance of its tokens."""

    def after_rollout(self, step: Step) -> None:
        rollout, config = step.sampled, step.config
        step.row |= {
            "entropy": mean_over(rollout.entropy, rollout.completed),
            **({} if config.target_entropy is None else {"target_entropy": config.target_at(step.number)}),
            **rollout_columns(rollout),
            **({"groups_sampled": len(rollout.sampled_rewards)} if config.dynamic_sampling else {}),
            "unscored": len(rollout.unscored),
            "unscored_late": sum(answer["late"] for answer in rollout.unscored),
            "tokens": rollout.tokens,
            "sampling_gap": rollout.sampling_gap,
        }
        if rollout.ref_logprob is not None:
            step.row["ref_kl"] = mean_over(
                ek.losses.kl_estimate(rollout.old_logprob - rollout.ref_logprob), rollout.completed
            )
        if bool(rollout.mask.any()):
            step.row |= covariance_columns(rollout, config)
        if not step.last:
            note_unscored(config.out / UNSCORED, step.number, rollout.unscored)


def covariance_columns(rollout: Rollout, config: TrainerConfig) -> dict[str, float]:
    """Of the covariances of the tokens that count, of which there is at least one."""
    covariance = ek.token_covariance(rollout.old_logprob, rollout.advantages, rollout.mask)[rollout.mask].double()
    ordered = covariance.sort(descending=True).values
    low, high = (config.cov_low, config.cov_high) if config.cov_band == "absolute" else (1.0, 5.0)
    found = {
        "cov_mean": float(covariance.mean()),
        "cov_max": float(ordered[0]),
        "tokens_in_band": int(((covariance > low) & (covariance < high)).sum()),
    }
    for fraction, name in COVARIANCE_COLUMNS.items():
        found[name] = float(ordered[: max(1, int(fraction * len(ordered)))].mean())
    return found


class UpdateMetrics(Probe):
    """Loss, gradient norm and the loss's own metrics, over all updates of the step."""

    def after_step(self, step: Step) -> None:
        lr = step.config.lr_at(step.number)
        updates = [update_metrics(update, step.sampled, step.config, lr) for update in step.updates]
        step.row |= {"updates": len(updates), "lr": lr}
        for name in updates[0] if updates else ():
            step.row[name] = combined(name, [metrics[name] for metrics in updates])
        if step.plan is not None:
            step.row |= {name: float(step.plan.metrics[of]) for name, of in _PLAN_METRICS.items()}
        if step.controller is not None:
            step.row |= {f"method/{name}": x for name, x in step.controller.state_dict()["memory"].items()}
        if step.rollout is not None and step.rollout.values is not None:
            step.row["critic_lr"] = step.config.critic_lr_at(step.number)


#: Metrics of the losses that the log keeps.
_LOSS_METRICS = (
    "clipfrac", "clipfrac_low", "clipfrac_high", "clipfrac_lower", "ppo_kl", "ppo_kl_abs", "ratio_mean",
    "ratio_max", "nonfinite_tokens", "value_clipfrac",
)  # fmt: skip
#: Those that are normalised by the whole minibatch: its parts add up.
_SUMMED = ("pg_loss", "value_loss")
#: Column -> the metric of a plan. What it measured is the column measured_dh.
_PLAN_METRICS = {
    "wanted_dh": "wanted_change", "planned_dh": "planned_change", "target_gain": "gain",
    "target_saturated": "saturated",
}  # fmt: skip


def update_metrics(update: Update, rollout: Rollout, config: TrainerConfig, lr: float) -> dict[str, float]:
    """Metrics of a minibatch from those of its micro-batches, whose means are weighted by tokens."""
    tokens = [int(rollout.mask[rows].sum()) for rows in update.rows]
    merged: dict[str, float] = {}
    for name in _LOSS_METRICS:
        if name in update.losses[0].metrics:
            merged[name] = combined(name, [float(loss.metrics[name]) for loss in update.losses], tokens)
    for name in _SUMMED:
        if name in update.losses[0].metrics:
            merged[name] = sum(float(loss.metrics[name]) for loss in update.losses)
    merged["loss"] = sum(float(loss.loss) for loss in update.losses)
    merged["grad_norm"] = update.grad_norm
    if update.critic_grad_norm is not None:
        merged["critic_grad_norm"] = update.critic_grad_norm
    if "pg_loss" not in merged:  # the critic alone
        return merged
    controls = [control for control in update.controls if control is not None]
    for name, effects in (("dropped", ("dropped", "detached")), ("penalized", ("penalized",))):
        masks = [getattr(control, effect) for control in controls for effect in effects]
        merged[f"tokens_{name}"] = sum(int(mask.sum()) for mask in masks if mask is not None)
    # of all micro-batches
    found = (controls or [without_control(known_tokens(rollout, update.rows, config), config)])[0].metrics
    merged["tokens_touched"] = int(found["touched"])
    merged["decrease_share"] = float(found["decrease_share"])
    if "entropy_coef" in found:
        merged["entropy_coef"] = float(found["entropy_coef"])
    for name, of in (("control_dh", "predicted_change"), ("free_dh", "predicted_change_free")):
        merged[name] = lr * config.epochs * float(found[of])  # a token takes part in an update per epoch
    return merged


def combined(name: str, values: list[float], weights: list[int] | None = None) -> float:
    """What several updates, or parts of one, have of a metric together: a maximum, a count, or a mean."""
    if name.endswith("_max"):
        return max(values)
    if name.startswith("tokens_") or name == "nonfinite_tokens":
        return sum(values)
    if weights is None:
        return sum(values) / len(values)
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / max(sum(weights), 1)


class PeakMemory(Probe):
    """Most bytes that torch held on the GPU in a step."""

    def before_step(self, step: Step) -> None:
        if step.policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(step.policy.device)

    def after_step(self, step: Step) -> None:
        # at step 0 it may be that of measuring the heads
        if step.policy.device.type == "cuda" and not (step.config.measure_memory and step.number == 0):
            step.row["memory/peak"] = float(torch.cuda.max_memory_allocated(step.policy.device))


class Times(Probe):
    """Seconds of a step's parts, without validation."""

    def before_step(self, step: Step) -> None:
        self._started, self._ops = time.perf_counter(), step.policy.clock.seconds

    def after_step(self, step: Step) -> None:
        whole = time.perf_counter() - self._started
        rollout, update = sum(step.sampled.seconds.values()), sum(update.seconds for update in step.updates)
        ops = step.policy.clock.seconds - self._ops
        step.row |= {f"time/{name}": seconds for name, seconds in step.sampled.seconds.items()}
        step.row |= {"time/rollout": rollout, "time/update": update, "time/measure": whole - rollout - update}
        step.row |= {"time/step": whole, "time/ops": ops, "time/ops_share": ops / whole}
        step.row["time/tokens_per_s"] = step.sampled.tokens / whole


# --- measured against predicted entropy change -----------------------------------------------------------------------


class EntropyChange(Probe):
    """What the updates do to the entropy, and what theory says they do; see docs/trainer.md."""

    _first_order: FirstOrder | None = None

    def after_rollout(self, step: Step) -> None:
        every = step.config.first_order_every
        if every and step.number % every == 0 and not step.last:
            # one small step changes less than products in half precision show
            with step.policy.full_precision():
                self._first_order = FirstOrder(step.policy, step.sampled, step.config)
                self._before = entropy_now(step)

    def after_update(self, step: Step) -> None:
        if self._first_order is None or len(step.updates) > 1:
            return
        step.row["first_order_dh"] = self._first_order.change()
        with step.policy.full_precision():
            rollout, now = step.sampled, entropy_now(step)
            step.row["first_update_dh"] = mean_over(now, rollout.completed) - mean_over(self._before, rollout.completed)
            own = torch.cat(step.updates[0].rows)
            step.row["own_update_dh"] = mean_over((now.double() - self._before)[own], rollout.completed[own])
            with self._first_order.fraction(SMALL):
                small = mean_over(entropy_now(step), rollout.completed) - mean_over(self._before, rollout.completed)
                step.row["small_update_dh"] = small / SMALL

    def after_step(self, step: Step) -> None:
        step.row["predicted_dh"] = predicted_change(step)
        if step.config.measure_entropy_change or step.plan is not None:
            rollout = step.sampled
            before = mean_over(rollout.entropy, rollout.completed)
            step.row["measured_dh"] = mean_over(step.entropy_after(), rollout.completed) - before
        if self._first_order is not None:
            step.row["first_order_step_dh"] = self._first_order.change()
            self._first_order = None  # as large as the model three times


def entropy_now(step: Step) -> Tensor:
    """Entropy of the current policy at the rollout's tokens, (B, L), nats."""
    rollout = step.sampled
    return score(step.policy, step.config, rollout.prompts, rollout.ids, rollout.completed).entropy


def predicted_change(step: Step) -> float:
    """Entropy change of a unit policy-gradient step, if every row of logits were free: the mean over tokens, nats.

    Its size means nothing here (AdamW's step in the weights is no step in the logits); its sign and its course over the
    steps can be compared with the measured change. Of what is done to a token in several epochs, all counts; what a
    plan does in each of them, once.
    """
    rollout = step.sampled
    advantages, kept = rollout.advantages.clone(), rollout.mask.to(rollout.advantages.dtype)
    done: list[tuple[Any, ek.Control | None]] = [(slice(None), step.plan)]
    if step.plan is None:
        done = [pair for update in step.updates for pair in zip(update.rows, update.controls, strict=True)]
    for rows, control in done:
        if control is None:
            continue
        if control.advantages is not None:
            advantages[rows] = control.advantages.to(advantages.dtype)
        if control.token_weight is not None:
            kept[rows] *= control.token_weight
        for stopped in (control.dropped, control.detached):
            if stopped is not None:
                kept[rows] *= ~stopped
    change = ek.predicted_entropy_change(
        rollout.vocab_covariance, advantages * kept, step_size=1.0, temperature=step.config.temperature
    )
    return mean_over(change, rollout.completed)


class FirstOrder:
    """The network's own first-order entropy change: the gradient of H in the weights, times their change since then.

    Made before the updates of a step; asked after the first of them and after all.
    """

    def __init__(self, policy: Policy, rollout: Rollout, config: TrainerConfig) -> None:
        self._parameters = policy.parameters()
        self._before = [p.detach().clone() for p in self._parameters]
        self._gradient = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        tokens = rollout.tokens
        for rows in row_slices(config, rollout.ids.shape[0]):
            ids, mask = rollout.ids[rows], rollout.completed[rows]
            outputs = policy.outputs(rollout.prompts[rows], ids, mask)
            entropy = policy.logprob_entropy(outputs, ids, mask, temperature=config.temperature).entropy
            # of parts that take no part, as those for images, zeros
            grads = torch.autograd.grad(entropy.sum() / tokens, self._parameters, materialize_grads=True)
            for total, grad in zip(self._gradient, grads, strict=True):
                total += grad

    @contextmanager
    def fraction(self, share: float) -> Iterator[None]:
        """Within: the weights stand at `share` of the way they have gone since then; afterwards where they were."""
        now = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for p, before in zip(self._parameters, self._before, strict=True):
                p.copy_(torch.lerp(before, p, share))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self._parameters, now, strict=True):
                    p.copy_(value)

    @torch.no_grad()
    def change(self) -> float:
        """∇H·Δθ in nats, summed in float64."""
        moved = zip(self._parameters, self._before, strict=True)
        return self.along(p.double() - before.double() for p, before in moved)

    @torch.no_grad()
    def of_gradient(self) -> float:
        """∇H·(-∇L) in nats per unit learning rate, L the loss of the last update: a plain gradient step, with the
        gradient as the update left it in the weights (clipped by its norm)."""
        return -self.along(torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters)

    def along(self, direction: Iterable[Tensor]) -> float:
        """∇H·d in nats, summed in float64, for a `direction` d with a tensor per trained weight."""
        return sum(
            float((gradient.double() * d.double()).sum()) for gradient, d in zip(self._gradient, direction, strict=True)
        )


@torch.no_grad()
def logits_as_parameters(
    policy: Policy, rollout: Rollout, *, temperature: float, step_size: float = 1e-3, rows: int = 128
) -> dict[str, list[float]]:
    """Take the policy-gradient step in the logits themselves and compare the entropy change with its prediction.

    The theory's own setting: the logits of the rollout's first `rows` completions become free parameters in float64;
    each moves by (step_size * A / T)(e_y - p). The entropies before and after come from ``token_stats``, the prediction
    -(step_size * A / T^2) C from its vocabulary covariance (Theorem 1 of arXiv 2505.22617 for the sampled step).

    Returns
    -------
    dict
        ``predicted`` and ``measured``: nats, one number per token with an advantage other than 0.
    """
    ids, mask = rollout.ids[:rows], rollout.mask[:rows]
    used = mask & (rollout.advantages[:rows] != 0)
    logits = policy.with_head("logits").outputs(rollout.prompts[:rows], ids, mask)[used].double().cpu()  # (N, V)
    target, advantage = ids[used].cpu(), rollout.advantages[:rows][used].double().cpu()
    before = ek.token_stats(logits, target, temperature=temperature)
    step = -torch.softmax(logits / temperature, dim=-1)
    step[torch.arange(len(target)), target] += 1.0
    moved = logits + (step_size / temperature) * advantage[:, None] * step
    measured = ek.token_stats(moved, target, temperature=temperature).entropy - before.entropy
    predicted = ek.predicted_entropy_change(
        before.vocab_covariance, advantage, step_size=step_size, temperature=temperature
    )
    return {"predicted": predicted.tolist(), "measured": measured.tolist()}


# --- memory of the heads ---------------------------------------------------------------------------------------------


class HeadMemory(Probe):
    """Before the first update: one micro-batch with each head, its peak memory, and whether the heads agree."""

    def __init__(self, backward: Backward) -> None:
        self._backward = backward

    def after_rollout(self, step: Step) -> None:
        if step.number == 0 and not step.last:
            step.row |= compare_heads(step.policy, step.sampled, step.config, self._backward)


def compare_heads(policy: Policy, rollout: Rollout, config: TrainerConfig, backward: Backward) -> dict[str, float]:
    """Peak memory of forward, loss and backward of the rollout's first rows, as many as a micro-batch has, by head;
    and how far the linear head is from the logits. The method decides by the rollout's statistics, and remembers
    nothing of it; no gradient is left.

    Returns
    -------
    dict
        ``memory/HEAD`` in bytes, infinite for one that does not fit on the GPU, and ``head_gap``. Of a model without a
        linear head, under another, without the linear one.

    Raises
    ------
    ValueError
        The head in use is linear and its log-probs are not those of the model.
    """
    rows = torch.arange(rollout.ids.shape[0] // (config.minibatches * config.micro_batches), device=rollout.ids.device)
    tokens, sequences = rollout.counts(rows)
    controller = controller_of(config)
    surrogate, known = surrogate_of(config, controller), known_tokens(rollout, [rows], config, backend=policy.backend)
    control = None if controller is None else controller.step(known, seed=0)[0]
    decision = (lambda stats: control) if config.decides_late else control

    def peak(head: str) -> float:
        def run() -> None:
            backward(under, rollout, rows, config, decision, surrogate, tokens=tokens, sequences=sequences)

        under = policy.with_head(head)
        if policy.device.type == "cuda":
            run()  # the first call allocates workspaces of cuBLAS that stay
            policy.model.zero_grad(set_to_none=True)
        bytes_held = peak_allocated(run, policy.device)
        policy.model.zero_grad(set_to_none=True)
        return float(bytes_held)

    mine = policy.head_name
    row = {f"memory/{mine}": peak(mine)}
    linear = True
    try:
        ek.hf.causal_lm_parts(policy.model)
    except TypeError:
        linear = False
    for head in HEADS:
        if head == mine or (head == "linear" and not linear):
            continue
        try:
            row[f"memory/{head}"] = peak(head)
        except torch.OutOfMemoryError:
            policy.model.zero_grad(set_to_none=True)
            row[f"memory/{head}"] = math.inf
    if not linear or math.isinf(max(row["memory/linear"], row["memory/logits"])):
        return row
    ours, others = (fresh_stats(policy.with_head(head), rollout, rows, config) for head in ("linear", "logits"))
    gap = float((ours.logprob - others.logprob)[rollout.completed[rows]].abs().mean())
    if mine == "linear" and not gap <= ROUNDING[torch.bfloat16 if policy.mixed else policy.model.dtype]:
        raise ValueError(
            "head: expected, for linear, a model whose logits come from a linear head, with a scale and a softcap that "
            f"ek.hf knows, got one whose log-probs are {gap:.2g} nats off on average; take --head logits"
        )
    return {**row, "head_gap": gap}
