"""From the statistics of a rollout to what a token's gradient may do, in the words of TRL's loss.

Read in this order: :func:`check` (what a configuration may ask for), :func:`coefficients` (what a token weighs in TRL's
loss), :class:`Planner` (the control of a step, put into TRL's micro-batches). Nothing here imports TRL.

TRL's loss takes advantages per token, and is linear in them where their sign stays: a token without gradient has the
advantage 0, one of weight w the advantage w·A. So its loss, and all that TRL computes beside it, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._console import did_you_mean
from entropy_kernels.integrations._controllers import statistics_of, try_out, warn_of_percent

#: Loss types whose policy term is PPO's (or GSPO's), with its clip.
PPO = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_BY_TOKEN = ("cispo", "vespo")  # a token's gradient is its own advantage's, however ratios are formed
_CLIPS = {"clip_low": "epsilon", "clip_high": "epsilon_high", "dual_clip": "delta"}
_POSITIONS = 2**32  # more than a completion has


class Statistics(NamedTuple):
    """Of a micro-batch's completion tokens, each (B, T) or None; nats."""

    logprob: Tensor
    entropy: Tensor | None = None
    vocab_covariance: Tensor | None = None


# ---- what a configuration may ask for --------------------------------------------------------------------------------


def check(config: Any) -> None:
    """Refuse what would be ignored, or what TRL's loss cannot express; ``config``: as our ``GRPOConfig``."""
    if config.plan_from not in ("auto", "old", "fresh"):
        raise ValueError(f"plan_from: expected 'auto', 'old' or 'fresh', got {config.plan_from!r}")
    if config.target_method not in (held_by := ek.TargetEntropy.methods()):
        names = ", ".join(map(repr, held_by))
        raise ValueError(f"target_method: expected one of {names}, got {config.target_method!r}")
    _check_alone(config)
    if config.method is None and config.target_entropy is None:
        return
    if config.method is not None and config.target_entropy is not None:
        raise ValueError(
            f"target_entropy: expected None beside method={config.method!r}, got {config.target_entropy!r}: a target "
            "decides about the tokens itself (target_method), and could not foresee what the method does beside it"
        )
    if config.steps_per_generation % config.gradient_accumulation_steps:
        raise ValueError(
            "steps_per_generation: expected a multiple of gradient_accumulation_steps, so that the tokens of an "
            f"optimizer step are of one rollout, got {config.steps_per_generation} and "
            f"{config.gradient_accumulation_steps}"
        )
    controller = _tried(config)
    _check_beside(config, controller)
    _check_loss(config, controller.effect)
    if not _has_clip(config):
        _check_no_clip(config)
    warn_of_percent(config.method, config.method_options or {})


def _check_alone(config: Any) -> None:
    """What means nothing without what it is of."""
    alone: dict[str, tuple[Any, str]] = {
        "target_method": ("exact_cov", "target_entropy"), "target_observe": (True, "target_entropy"),
    }  # fmt: skip
    if config.method is None:
        of = "method and target_entropy"
        alone |= {"method_options": (None, of), "preset": (None, of), "plan_from": ("auto", of)}
    for name, (default, whose) in alone.items() if config.target_entropy is None else ():
        if (value := getattr(config, name)) not in (default, {}):
            raise ValueError(f"{name}: expected {default!r} without {whose}, got {value!r}")


def _tried(config: Any) -> ek.Controller:
    """Every value has been read; the names of what is wrong are those of this config."""
    try:
        controller = controller_of(config)
        try_out(controller)
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(":")
        if name not in _CLIPS:
            raise
        raise type(error)(f"{_CLIPS[name]}:{rest}") from error
    return controller


def _check_beside(config: Any, controller: ek.Controller) -> None:
    """What its method cannot stand beside."""
    needs = statistics_of(controller)
    if config.fused_head is False and needs:
        raise ValueError(
            f"fused_head: expected None or True, got False: {config.method or 'target_entropy'} needs "
            f"{', '.join(needs)}, which is read by this package's head"
        )
    if controller.effect == "entropy_coef" and (config.entropy_coef or config.use_adaptive_entropy):
        raise ValueError(
            f"entropy_coef: expected 0 and use_adaptive_entropy=False beside {config.method or 'a bonus'}, which sets "
            f"it, got {config.entropy_coef} and {config.use_adaptive_entropy}"
        )


def _check_loss(config: Any, effect: str) -> None:
    """Where TRL's loss would not do to a token what was decided about it."""
    what = config.method or "target_entropy"
    by_sequence = config.importance_sampling_level == "sequence" and config.loss_type not in _BY_TOKEN
    if by_sequence and effect != "entropy_coef":
        raise ValueError(
            f"importance_sampling_level: expected 'token' with {what}, got 'sequence': with one ratio per sequence a "
            f"token whose advantage is 0 keeps its part of the gradient; 'token', or loss_type {' or '.join(_BY_TOKEN)}"
        )
    if config.top_entropy_quantile != 1:
        raise ValueError(
            f"top_entropy_quantile: expected 1 with {what}, got {config.top_entropy_quantile}: what is decided does "
            "not know which tokens TRL masks; method='top_entropy' with method_options={'rho': ...} does it here"
        )
    if effect == "penalized":
        _check_penalty(config, what)


def _check_penalty(config: Any, what: str) -> None:
    if config.off_policy_mask_threshold is not None:
        raise ValueError(
            f"off_policy_mask_threshold: expected None with {what}, whose penalty TRL's mask does not reach, got "
            f"{config.off_policy_mask_threshold}"
        )
    a_rollout = config.steps_per_generation * config.num_iterations
    if config.gradient_accumulation_steps % a_rollout == 0:
        raise ValueError(
            "num_iterations: expected more than 1, or steps_per_generation > gradient_accumulation_steps, with "
            f"{what}, whose penalty |log p - log p_old| is 0 in the first update of a rollout, got "
            f"{config.num_iterations}, {config.steps_per_generation} and {config.gradient_accumulation_steps}"
        )


def _check_no_clip(config: Any) -> None:
    what = f"{config.method} (preset {_preset(config)[0]})"
    if config.loss_type not in PPO:
        raise ValueError(f"loss_type: expected one of {', '.join(PPO)} for {what}, got {config.loss_type!r}")
    given = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high, "delta": config.delta}
    if given != {"epsilon": 0.2, "epsilon_high": None, "delta": None}:
        raise ValueError(
            f"epsilon, epsilon_high, delta: expected none beside {what}, which has no PPO clip, got {given}"
        )


def _preset(config: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and numbers of the method's preset; of a method without presets, and of another name, no numbers."""
    options, row = _options(config), ek.methods().get(config.method)
    known = {} if row is None else row.presets
    name = options.get("preset", next(iter(known), ""))
    return name, known.get(str(name), {})


def _has_clip(config: Any) -> bool:
    """Whether TRL's own clip stays."""
    return _preset(config)[1].get("clip_low", 0.0) is not None


def controller_of(config: Any, *, batch_group: Any = None, vocab_size: int | None = None) -> ek.Controller:
    """The controller that a configuration names, its options checked.

    ``batch_group``: over all ranks, or None; ``vocab_size``: of the model, makes a target above its logarithm an error.
    """
    options = _options(config)
    clips: dict[str, Any] = dict.fromkeys(_CLIPS)
    if config.loss_type in PPO and _has_clip(config):
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        clips = {"clip_low": config.epsilon, "clip_high": high, "dual_clip": config.delta}
    if config.target_entropy is None:
        return ek.Controller(config.method, seed=config.seed, batch_group=batch_group, **clips, **options)
    return ek.TargetEntropy(
        config.target_entropy, method=config.target_method, vocab_size=vocab_size, batch_group=batch_group,
        **clips, **options,
    )  # fmt: skip


def _options(config: Any) -> dict[str, Any]:
    options = {} if config.method_options is None else config.method_options
    if not isinstance(options, Mapping):
        raise TypeError(f"method_options: expected a dict, got {type(options).__name__}")
    known, whose = _known_options(config)
    for name in options:
        if name in _CLIPS:
            raise ValueError(f"method_options: expected {name} as the field {_CLIPS[name]}, got it as an option")
        if name not in known:
            shown = ", ".join(x for x in known if x not in _CLIPS)
            near = did_you_mean(name, known)
            raise ValueError(f"method_options: expected options of {whose} ({shown}), got {name!r}{near}")
    if config.preset is None:
        return dict(options)
    if "preset" not in known or "preset" in options:
        of = "once" if "preset" in options else "None: only clip_cov and kl_cov have presets"
        raise ValueError(f"preset: expected {of}, got {config.preset!r}")
    return {**options, "preset": config.preset}


def _known_options(config: Any) -> tuple[tuple[str, ...], str]:
    """Names of options, and whose they are."""
    if config.target_entropy is not None:
        held_by = ek.TargetEntropy.methods()
        return held_by[config.target_method], f"target_method {config.target_method!r}"
    rows = ek.methods()
    if config.method not in rows:
        near = did_you_mean(str(config.method), rows)
        raise ValueError(f"method: expected one of {', '.join(rows)}, or None, got {config.method!r}{near}")
    return tuple(rows[config.method].options), config.method


# ---- what a token weighs in TRL's loss -------------------------------------------------------------------------------


def mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T): which tokens count, as in TRL's loss."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def coefficients(
    inputs: Mapping[str, Any], loss_type: str, *, accumulation: int, steps_per_generation: int, ranks: int, longest: int
) -> Tensor:
    """What the loss of this micro-batch, as it goes backward, multiplies each token's policy term by.

    Args:
        inputs: a micro-batch as TRL's loss gets it.
        loss_type: TRL's.
        accumulation: micro-batches of an optimizer step.
        steps_per_generation: micro-batches of a rollout.
        ranks: number of processes; their gradients are averaged.
        longest: TRL's ``max_completion_length``.

    Returns:
        (B, T) fp32, 0 where masked.
    """
    mask = mask_of(inputs).float()
    rows, tokens = len(mask), mask.sum()
    each = mask.sum(-1, keepdim=True).clamp(min=1)
    per_rollout = (
        inputs["num_items_in_batch"].clamp(min=1) / ranks / steps_per_generation
    )  # tokens of a micro-batch, on average
    denominator = {
        "grpo": each * rows, "sapo": each * rows, "bnpo": tokens.clamp(min=1), "dr_grpo": rows * longest, "luspo": rows,
        "dapo": per_rollout, "cispo": per_rollout, "vespo": per_rollout,
    }[loss_type]  # fmt: skip
    found = mask / (denominator * accumulation)
    ratio = inputs.get("importance_sampling_ratio")
    return found if ratio is None or loss_type == "vespo" else found * ratio


def placed(read: Tensor, attention_mask: Tensor, tokens: int) -> Tensor:
    """What the head has left, (N,) in the order of positions, at the completion tokens, (B, ``tokens``); else 0.

    TRL reads all positions of ``attention_mask``, (B, P + T), or those that count.
    """
    counts = attention_mask.bool().clone()
    counts[:, :-tokens] = False
    counts = counts[:, 1:]
    if read.numel() == counts.numel():
        return read.view(counts.shape)[:, -tokens:] * counts[:, -tokens:]
    return read.new_zeros(counts.shape).masked_scatter(counts, read)[:, -tokens:]


# ---- the control of a step -------------------------------------------------------------------------------------------


class Planner:
    """Asks the controller, and puts its control into TRL's micro-batches: advantages per token, and a penalty.

    Attributes:
        controller: what decides, an :class:`entropy_kernels.Controller`.
        names: statistics that are needed beside the log-prob.
        old: whether the rollout's own statistics are needed.
        plans: how many were made.
    """

    def __init__(self, config: Any, *, batch_group: Any, ranks: int, vocab_size: int | None) -> None:
        self.controller = controller_of(config, batch_group=batch_group, vocab_size=vocab_size)
        self.names = statistics_of(self.controller)
        self.has_target = config.target_entropy is not None
        self.observes = self.has_target and config.target_observe and config.target_method != "bonus"
        self.clips = _has_clip(config)
        self.sets_bonus = self.controller.effect == "entropy_coef"
        alone = config.gradient_accumulation_steps == 1
        if self.has_target:
            alone = alone and config.steps_per_generation * config.num_iterations == 1
        needs_both = "old_entropy" in self.controller.needs
        #: "forward": in the training forward; "old", "fresh": before the step
        self.source = {"auto": "fresh" if needs_both else "old"}.get(config.plan_from, config.plan_from)
        if alone and config.plan_from != "old":
            self.source = "forward"
        if self.has_target and self.source == "fresh":
            self.source = "old"  # a plan is for a whole rollout, at its start
        self.old = self.source != "forward" or needs_both
        self.plans = 0
        self._config, self._group, self._ranks = config, batch_group, ranks

    def plan(
        self, micro: Sequence[dict[str, Any]], now: Sequence[Statistics], *, lr: float, temperature: float
    ) -> dict[str, float]:
        """Decide about micro-batches together, and put the control into them; the metrics by name.

        Args:
            micro: TRL's dicts; ``advantages`` becomes (B, T), ``ek_penalty`` may be added.
            now: their statistics.
            lr: of the coming updates.
            temperature: of the softmax.
        """
        whole = ek.SelectionBatch(self._group)
        for inputs, read in zip(micro, now, strict=True):
            self._add(whole, inputs, read, temperature)
        if isinstance(self.controller, ek.TargetEntropy):
            controls = self.controller.step(whole, lr=lr, updates=self._config.num_iterations)
        else:
            controls = self.controller.step(whole)
        for inputs, decided in zip(micro, controls, strict=True):
            self._put(inputs, decided)
        self.plans += 1
        seen = whole.whole
        metrics = {**controls[0].metrics, "cov_mean": seen.moments(seen["covariance"]).mean}
        return dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist(), strict=True))

    def _add(self, whole: ek.SelectionBatch, inputs: dict[str, Any], read: Statistics, temperature: float) -> None:
        advantages = inputs.setdefault("ek_advantages", inputs["advantages"])
        old = inputs.get("old_per_token_logps")
        positions = torch.arange(read.logprob.shape[1], device=read.logprob.device)
        whole.add(
            read.logprob.detach(), advantages, mask_of(inputs), inputs["ek_row"][:, None] * _POSITIONS + positions,
            old_logprob=None if self.source == "old" else old, entropy=read.entropy,
            old_entropy=inputs.get("ek_entropy"), vocab_covariance=read.vocab_covariance,
            coefficient=self.weights(inputs) / self._ranks, temperature=temperature,
        )  # fmt: skip

    def weights(self, inputs: Mapping[str, Any]) -> Tensor:
        """:func:`coefficients` of this configuration."""
        config = self._config
        return coefficients(
            inputs, config.loss_type, accumulation=config.gradient_accumulation_steps, ranks=self._ranks,
            steps_per_generation=config.steps_per_generation, longest=config.max_completion_length,
        )  # fmt: skip

    def _put(self, inputs: dict[str, Any], decided: ek.Control) -> None:
        before = inputs["ek_advantages"]
        shape = inputs["completion_mask"].shape
        advantages = before if before.dim() == 2 else before[:, None].expand(shape)
        if decided.advantages is not None:
            advantages = decided.advantages.to(before.dtype)
        for gone in (decided.dropped, decided.detached):
            advantages = advantages if gone is None else advantages.masked_fill(gone, 0.0)
        if decided.token_weight is not None:
            advantages = advantages * decided.token_weight
        inputs["advantages"] = advantages
        if decided.penalized is not None and decided.penalty_coef is not None:
            inputs["ek_penalty"] = self.weights(inputs) * decided.penalized * decided.penalty_coef


def penalty(inputs: Mapping[str, Any], logprob: Tensor) -> Tensor:
    """KL-Cov's |log p - log p_old| of the penalised tokens, as TRL's loss sums it up; 0-d.

    ``inputs``: a micro-batch with ``ek_penalty``; ``logprob``: (B, T) of the policy that is trained, with its gradient.
    """
    old = inputs.get("old_per_token_logps")
    return (inputs["ek_penalty"] * (logprob - (logprob.detach() if old is None else old)).abs()).sum()
