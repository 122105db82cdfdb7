"""What the values of a configuration must be, each by itself and beside the others, and which of them do nothing.

What a module can say of its own fields stands there: check_critic, check_lr_schedule, check_reference, check_options,
check_names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import torch

from entropy_kernels._console import did_you_mean
from entropy_kernels.trainer.advantages import ESTIMATORS
from entropy_kernels.trainer.critic import check_critic
from entropy_kernels.trainer.data import check_names
from entropy_kernels.trainer.methods import (
    CLIPS,
    METHODS,
    PPO,
    check_options,
    controller_of,
    counted_clips,
    options_of,
    surrogate_of,
)
from entropy_kernels.trainer.reference import check_reference
from entropy_kernels.trainer.schedule import LARGEST, check_lr_schedule
from entropy_kernels.trainer.start import WARM_START_FIELDS, WARM_STEPS, check_model
from entropy_kernels.trainer.trackers import SERVICES

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig


def check(config: TrainerConfig) -> None:
    """Raise ValueError, or what the check of a model's folder raises, for a value that cannot work."""
    for names, expected, holds in _RULES:
        for name in names.split():
            expect(holds(getattr(config, name)), name, expected, getattr(config, name))
    _check_choices(config)
    _check_precision(config)
    if config.model not in ("tiny", "smollm2"):
        check_model(config.model)
    _check_range(config)
    _check_sizes(config)
    _check_start_and_resume(config)
    check_lr_schedule(config.lr_schedule)
    for own in (check_critic, check_reference, check_options, check_names):
        own(config)


def _check_choices(config: TrainerConfig) -> None:
    choices = {**_choices(), "method": tuple(METHODS)}  # some may come from outside
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            near = did_you_mean(value, allowed)
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{near}")


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    from entropy_kernels.trainer.config import TrainerConfig

    hints = get_type_hints(TrainerConfig).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def _check_precision(config: TrainerConfig) -> None:
    half = config.dtype in ("bfloat16", "bf16", "float16", "fp16", "half")
    why = (
        " (which keeps float32 weights and makes its products in bfloat16: weights in half precision are rounded "
        "to 3 digits, and an update of 5e-6 is lost for nearly all of them)"
    )
    expect(config.dtype in ("float32", "mixed"), "dtype", "float32 or mixed" + why * half, config.dtype)


def _check_range(config: TrainerConfig) -> None:
    low, high = config.cov_low, config.cov_high
    expect(low < high, "cov_low", f"less than cov_high = {high}", low)
    quantiles = config.cov_band != "quantile" or (low >= 0 and high <= 1)
    expect(quantiles, "cov_low, cov_high", "quantiles in [0, 1] under cov_band = quantile", (low, high))


def _check_sizes(config: TrainerConfig) -> None:
    groups, samples, heads = ESTIMATORS[config.advantage].groups, config.samples_per_prompt, config.num_heads
    expect(
        groups or not config.dynamic_sampling,
        "dynamic_sampling",
        f"0 under advantage = {config.advantage}, which learns from groups of equal rewards, too",
        config.dynamic_sampling,
    )
    expect(samples >= 1 + groups, "samples_per_prompt", f"at least {1 + groups}, a group to compare within", samples)
    expect(config.hidden_size % heads == 0, "hidden_size", f"a multiple of num_heads = {heads}", config.hidden_size)
    sequences, parts = config.prompts_per_step * samples, config.minibatches * config.micro_batches
    expect(
        sequences % parts == 0,
        "minibatches, micro_batches",
        f"a product that divides prompts_per_step * samples_per_prompt = {sequences}",
        f"{config.minibatches} * {config.micro_batches} = {parts}",
    )


def _check_start_and_resume(config: TrainerConfig) -> None:
    expect(not (config.resume and config.overwrite), "resume, overwrite", "at most one of them", "both")
    fixed = {*WARM_START_FIELDS, "warm_start_from"} - {"task", "chat_template", "system_prompt"}
    known = {f.name for f in dataclasses.fields(config)} - fixed
    strange = [name for name in config.resume_changes if name not in known]
    expect(not strange, "resume_changes", "fields that are not those of model and start", ", ".join(strange))


def idle(config: TrainerConfig) -> dict[str, str]:
    """The fields that are not at their defaults and do nothing under this configuration, each with the reason.

    Not those that agree with the others by doing nothing, as normalize_std = False does under rloo.
    """
    tiny, targeted = config.model == "tiny", config.target_entropy is not None
    walk = config.task.partition("?")[0] == "walk" and config.data is None
    started = bool(config.warm_steps) or (config.warm_steps is None and tiny and config.data is None)
    method = "a target entropy" if targeted else config.method
    decides = METHODS[config.method].decides is not None and not targeted
    sizes = "hidden_size intermediate_size num_layers num_heads"
    others = " ".join({*sum((row.reads for row in ESTIMATORS.values()), ())} - {*ESTIMATORS[config.advantage].reads})
    start = "warm_batch warm_lr warm_weight_decay warm_warmup_steps warm_wrong_fraction"
    reasons = (
        ("resume_changes", not config.resume, "without --resume"),
        ("chat_template", tiny, "with the tiny model, whose tokenizer has none"),
        (sizes, not tiny, f"with the model {config.model}: it is of the tiny one"),
        (f"warm_seed {sizes} {start}", config.warm_start_from is not None, "beside warm_start_from"),
        ("warm_steps", config.warm_start_from is not None and bool(config.warm_steps), "beside warm_start_from"),
        (start, not started, "with warm_steps = 0"),
        ("lora_alpha lora_targets", not config.lora_rank, "with lora_rank = 0"),
        ("memory_budget", config.head != "linear", f"under head = {config.head}"),
        ("partial_credit", walk, "on walk, whose rewards are 0 and 1"),
        ("scoring_seconds scoring_workers", walk, "on walk, which the trainer's own process scores"),
        ("target_method", not targeted, "without target_entropy"),
        ("ref_kl_in ref_kl_estimator", config.ref_kl_coef == 0, "with ref_kl_coef = 0"),
        (others, True, f"under advantage = {config.advantage}"),
        ("value_coef", config.critic == "separate", "with a separate critic"),
        ("cov_ratio kl_coef selection_logprob", not decides, f"under {method}"),
    )
    usual = type(config)()
    usual.warm_steps = WARM_STEPS if config.warm_steps == WARM_STEPS else None
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(usual, f.name)}
    found: dict[str, str] = {}
    for names, holds, reason in reasons:
        for name in changed & {*names.split()} if holds else ():
            found.setdefault(name, reason)
    for name in changed & ({"cov_ratio", "kl_coef", *CLIPS} if decides else {*CLIPS}):
        if _acts(config) == _acts(dataclasses.replace(config, **{name: getattr(usual, name)})):
            beside = " with these method_options" if config.method_options else ""
            surrogate = "" if config.surrogate == PPO else f" and surrogate = {config.surrogate}"
            found[name] = f"under {method}{beside}{surrogate}"
    return found


def _acts(config: TrainerConfig) -> tuple[dict[str, Any], ...]:
    """What decides about tokens, and what the loss makes of them."""
    if config.target_entropy is not None:
        return counted_clips(config), surrogate_of(config, None)
    return options_of(config), surrogate_of(config, controller_of(config))


def expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _usable(device: str) -> bool:
    if device == "auto":
        return True
    try:
        return torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        return False


#: Fields, what their values must be, and whether one is.
_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "threads warm_batch prompts_per_step samples_per_prompt minibatches epochs micro_batches eval_prompts "
        "eval_samples final_eval_prompts final_eval_samples eval_batch hidden_size intermediate_size num_layers "
        "num_heads",
        "an integer >= 1",
        lambda value: _integer(value) and value >= 1,
    ),
    (
        "lora_rank steps save_every scoring_workers warm_warmup_steps lr_warmup_steps eval_every first_order_every "
        "critic_warmup dynamic_sampling",
        "an integer >= 0",
        lambda value: _integer(value) and value >= 0,
    ),
    (
        "seed warm_seed",
        "an integer within ±2^40",  # of which those of steps and draws are multiples
        lambda value: _integer(value) and abs(value) <= 1 << 40,
    ),
    ("warm_steps", "an integer >= 0, or none", lambda value: value is None or (_integer(value) and value >= 0)),
    (
        "temperature lr warm_lr critic_lr scoring_seconds",
        "a finite number > 0",
        lambda value: _finite(value) and value > 0,
    ),
    (
        "grad_clip weight_decay warm_weight_decay kl_coef ref_kl_coef clip_low clip_high value_clip value_coef",
        "a finite number >= 0",
        lambda value: _finite(value) and value >= 0,
    ),
    ("lr warm_lr critic_lr weight_decay warm_weight_decay", f"at most {LARGEST:g}", lambda value: value <= LARGEST),
    (
        "kl_coef ref_kl_coef value_coef lora_alpha",
        "at most 1e+38, which float32 holds",
        lambda value: value is None or value <= 1e38,
    ),
    ("adam_beta1 adam_beta2", "a number in [0, 1)", lambda value: _finite(value) and 0 <= value < 1),
    ("warm_wrong_fraction gamma gae_lambda", "a number in [0, 1]", lambda value: _finite(value) and 0 <= value <= 1),
    (
        "lora_alpha",
        "a finite number > 0",
        lambda value: value is None or (_finite(value) and value > 0),
    ),
    (
        "trackers",
        f"some of {', '.join(SERVICES)}, each once",
        lambda value: {*value} <= {*SERVICES} and len({*value}) == len(value),
    ),
    ("cov_ratio", "a fraction in (0, 1]", lambda value: value is None or (_finite(value) and 0 < value <= 1)),
    ("memory_budget", "a number of bytes > 0", lambda value: value is None or (_integer(value) and value > 0)),
    (
        "device",
        "auto or a torch device that is there" + " (this torch is a CPU build)" * (not torch.backends.cuda.is_built()),
        _usable,
    ),
)
