"""The methods, in one table: the trainer's view of :func:`entropy_kernels.methods`, which decide what a token may do.

No other file of the trainer names a method. A row says what is the trainer's own: what reports call the method, and
which options it has at this scale. A new method of :func:`entropy_kernels.methods` is here by itself; one from outside
is a row of :data:`METHODS` with an ``ek.Method``. In the place of a method there may be a target entropy
(:func:`target_of`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._console import did_you_mean
from entropy_kernels.trainer.schedule import Schedule

if TYPE_CHECKING:
    from entropy_kernels.batch import WholeBatch
    from entropy_kernels.trainer.config import TrainerConfig


@dataclass(frozen=True)
class Method:
    """One row: what decides about the tokens, and how the method is compared with the others."""

    label: str
    """In plots, tables and sentences."""
    control: str | ek.Method | None = None
    """As :class:`entropy_kernels.Controller` takes it; None: every token has its gradient."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """At this scale, where the source's would not do."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Option -> the field of the configuration that gives it."""
    paper_ratio: float = 0.0
    """The paper's fraction of tokens, of the methods that a reproduction compares."""
    control_of: str | None = None
    """The method of which this one treats as many tokens, at random."""
    entropy_factor: float | None = None
    """What a reproduction on the embedded task claims: it ends with this many times the baseline's entropy."""

    @property
    def ratio(self) -> float:
        """Fraction of a minibatch to select, at this scale; 0 for one that has none of its own."""
        return float(self.options.get("ratio", 0.0))

    @property
    def decides(self) -> ek.Method | None:
        """The row of :func:`entropy_kernels.methods`, or the method from outside; None: nothing decides."""
        return ek.methods()[self.control] if isinstance(self.control, str) else self.control

    @property
    def effect(self) -> str | None:
        """What it does to a token, a name of ``entropy_kernels.methods.EFFECTS``; None: nothing."""
        return None if self.decides is None else self.decides.effects[0]

    def needs(self, *statistics: str) -> bool:
        """Whether it decides by one of these statistics."""
        return self.decides is not None and not {*statistics}.isdisjoint(self.decides.needs)


def as_many_at_random(name: str) -> ek.Method:
    """The method `name`, but as many of all tokens, drawn with a key of their own."""
    row = ek.methods()[name]

    def drawn(batch: WholeBatch, score: Tensor, options: Any) -> Tensor:
        (count,) = batch.totals((row.rule(batch, score, options) & batch.mask).double())
        return batch.random(torch.zeros_like(score, dtype=torch.float32), seed=options.seed + 1, k=count)

    return dataclasses.replace(row, rule=drawn, draws=True, formula=f"as many tokens as {name} selects, drawn")


def _control(method: str, label: str) -> Method:
    """The row of a method with its tokens chosen at random."""
    return dataclasses.replace(
        METHODS[method], label=label, control=as_many_at_random(method), control_of=method, entropy_factor=None
    )


METHODS: dict[str, Method] = {
    "grpo": Method("GRPO"),
    "clip_cov": Method(
        "Clip-Cov", "clip_cov", {"ratio": 0.03}, {"low": "cov_low", "high": "cov_high", "band": "cov_band"},
        paper_ratio=2e-4, entropy_factor=2.0,
    ),
    "kl_cov": Method(
        "KL-Cov", "kl_cov", {"ratio": 0.07}, {"kl_coef": "kl_coef"}, paper_ratio=2e-3, entropy_factor=1.6,
    ),
}  # fmt: skip
METHODS["random_dropped"] = _control("clip_cov", "Random tokens dropped")
METHODS["random_penalized"] = _control("kl_cov", "Random tokens penalised")

#: What the others are compared with.
BASELINE = next(iter(METHODS))
#: What a reproduction of the paper runs: the baseline, the paper's methods, and as many tokens at random.
PAPER = tuple(METHODS)

_LABELS = {
    "exact_cov": "Exact covariance", "random": "Random tokens", "clip_b": "Clip-B", "clip_v": "Clip-V",
    "steer": "STEER", "top_entropy": "Top entropy", "erc": "ERC", "entropy_advantage": "Entropy advantage",
    "repo": "REPO", "adaptive_entropy": "Adaptive entropy", "entrocraft": "EntroCraft",
}  # fmt: skip
#: With the papers' numbers Clip-B and Clip-V treat no token of the embedded task.
_SCALE = {
    "random": {"ratio": METHODS["clip_cov"].ratio}, "clip_b": {"mu": 1.0}, "clip_v": {"mu": 2.0, "ratio": 0.03},
}  # fmt: skip
METHODS |= {
    name: Method(_LABELS.get(name, name), name, _SCALE.get(name, {})) for name in ek.methods() if name not in METHODS
}


def options_of(config: TrainerConfig) -> dict[str, Any]:
    """The options that the configuration gives its method: the row's, then the fields', then ``method_options``."""
    method, asked = METHODS[config.method], config.method_options
    row = method.decides
    if row is None:
        return {}
    for option in asked:
        if option not in row.options:  # some are arguments of a Controller
            raise TypeError(f"{option}: expected an option of {config.method} ({', '.join(row.options)}), got {option}")
    usual = {**row.options, **row.presets.get(asked.get("preset", ""), {})}
    given = {name: value for name, value in counted_clips(config).items() if _has_clip(usual)}
    given |= {**method.options, **{option: getattr(config, name) for option, name in method.fields.items()}}
    if config.cov_ratio is not None and "ratio" in usual:
        given["ratio"] = config.cov_ratio
    if asked.get("k") is not None:
        given.pop("ratio", None)  # it takes the ratio's place
    return {**given, **asked}


def controller_of(config: TrainerConfig) -> ek.Controller | None:
    """What decides about the tokens of a run; None where nothing does.

    Raises
    ------
    TypeError, ValueError
        An option that the method does not have, or that cannot be what it is.
    """
    method = METHODS[config.method]
    return None if method.control is None else ek.Controller(method.control, **options_of(config))


def counted_clips(config: TrainerConfig) -> dict[str, Any]:
    """PPO's clip as decisions count it, of a token's own ratio: that of the loss, and none where the loss has not that.

    Under another surrogate the clip is another (of a sequence, of probabilities), or leaves a token its gradient.
    """
    return {name: getattr(config, name) if config.surrogate == PPO else None for name in CLIPS}


def _has_clip(options: Mapping[str, Any]) -> bool:
    """Whether the loss of a method with these options is PPO's with its clip; KL-Cov's has none."""
    return options["clip_low"] is not None or options["clip_high"] is not None


def surrogate_of(config: TrainerConfig, controller: ek.Controller | None) -> dict[str, Any]:
    """What a loss takes for its surrogate: the name, its options, and the clips that it reads; PPO's clip is the one
    that the method counts with."""
    counted = None if controller is None or config.surrogate != PPO else controller.options
    clips = {
        name: getattr(config, name) if counted is None else counted[name]
        for name in ek.surrogates()[config.surrogate].clips
    }
    return {"surrogate": config.surrogate, **clips, **config.surrogate_options}


def without_control(batch: ek.SelectionBatch, config: TrainerConfig) -> ek.Control:
    """Of the baseline, for its metrics: no token is treated."""
    return batch.control("random", k=0, seed=0, **counted_clips(config))[0]


def check_options(config: TrainerConfig) -> None:
    """Try the options of the surrogate, and of the method or the target, on a few tokens.

    Raises
    ------
    ValueError
        Naming the option, what was expected, and what came.
    """
    if config.target_entropy is None and METHODS[config.method].control is None and config.method_options:
        raise ValueError(f"method_options: expected none for {config.method}, got {config.method_options}")
    tokens, known = torch.linspace(-2.0, -0.1, 8).view(2, 4), ("entropy", "old_entropy", "collision")
    batch = ek.TokenBatch(
        tokens, tokens, tokens + 1, None, vocab_covariance=tokens, **{name: tokens.exp() for name in known}
    )
    _check_surrogate(config)
    if config.target_entropy is not None:
        _check_target(config, batch)
        return
    try:
        controller = controller_of(config)
        decided = ek.Control() if controller is None else controller.step(batch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method_options: {error}") from error
    if decided.entropy_coef is not None and config.entropy_coef != 0:
        raise ValueError(f"entropy_coef: expected 0 for {config.method}, which sets it, got {config.entropy_coef}")


# --- the surrogate ---------------------------------------------------------------------------------------------------

#: The surrogate that decisions count the clip of, and the names of the clips.
PPO = "ppo"
CLIPS = ("clip_low", "clip_high", "dual_clip")


def _check_surrogate(config: TrainerConfig) -> None:
    rows = ek.surrogates()
    name, own = config.surrogate, rows[config.surrogate].defaults
    for option in config.surrogate_options:
        if option not in own:
            having = [other for other, row in rows.items() if option in row.defaults]
            hint = f"; {option} is one of {', '.join(having)}" if having else did_you_mean(option, own)
            known = ", ".join(own) or "it has none"
            raise ValueError(f"surrogate_options: expected options of {name} ({known}), got {option}{hint}")
    if name != PPO:
        _check_beside(name, config)
    tokens = torch.linspace(-2.0, -0.1, 8).view(2, 4)
    try:
        ek.policy_loss(tokens, tokens, tokens + 1, None, **surrogate_of(config, None))
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if str(error).startswith(CLIPS) else f"surrogate_options: {error}") from error


def _check_beside(name: str, config: TrainerConfig) -> None:
    """What does not go with a surrogate that is not PPO's."""
    of_method = METHODS[config.method].decides
    if config.target_entropy is None and of_method is not None:
        preset = config.method_options.get("preset", "")
        if not _has_clip({**of_method.options, **of_method.presets.get(preset, {})}):
            raise ValueError(
                f"surrogate: expected {PPO} under {config.method}, whose own loss is -A r without a clip, got {name}; "
                "leave one out"
            )
    beside = sorted({*CLIPS} & config.method_options.keys())
    if beside:
        raise ValueError(
            f"method_options: expected no {beside[0]} beside surrogate = {name}, since a method counts PPO's clip, "
            f"which that loss has not; {beside[0]} is a field, too, and is the surrogate's"
        )
    if name == "cispo_trl" and config.clip_high <= 1:
        raise ValueError(
            f"clip_high: expected above 1 under {name}, where it is the bound of the ratio itself (often 5), got "
            f"{config.clip_high}"
        )


# --- a target entropy ------------------------------------------------------------------------------------------------

#: What may hold the entropy at a target, by the names of :class:`entropy_kernels.TargetEntropy`, with its effect on
#: tokens; the first is the default.
TARGETS = {"exact_cov": "dropped", "weight": "token_weight", "bonus": "entropy_coef"}
TARGET = next(iter(TARGETS))
#: What a run under a target is called beside those of methods, and its row in reports.
TARGET_RUN = "target"
TARGET_ROW = Method("Target entropy")
_INSTEAD = "target_entropy and target_method are fields of their own, and the rest is the policy's"


def target_of(
    config: TrainerConfig, *, vocab_size: int | None = None, backend: str = "auto"
) -> ek.TargetEntropy | None:
    """What plans a step's updates so that the entropy goes to ``target_entropy``; None without one.

    Raises
    ------
    ValueError
        A target below 0, or above the logarithm of `vocab_size`; an option that there is not, or that cannot be.
    """
    if config.target_entropy is None:
        return None
    points = Schedule.parse("target_entropy", config.target_entropy).points
    for option in {"target", "method", "vocab_size", "batch_group", "backend"} & config.method_options.keys():
        raise ValueError(f"method_options: expected options of a target's method, got {option}; {_INSTEAD}")
    options = {**counted_clips(config), **config.method_options}
    options |= {"method": config.target_method, "vocab_size": vocab_size, "backend": backend}
    try:
        return ek.TargetEntropy(points if len(points) > 1 else points[0][1], **options)
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(": ")  # of its own argument
        field = {"target": "target_entropy", "method": "target_method"}.get(name.partition("[")[0])
        raise ValueError(f"{field}: {rest}" if field else f"method_options: {error}") from error


def part_of(plan: ek.Control, parts: Sequence[Tensor]) -> list[ek.Control]:
    """A plan for a whole rollout, for the micro-batches of one of its minibatches, rows each.

    Of the metrics `touched` is the minibatch's; the others are the rollout's, as each of its updates has them.
    """
    treated = [value for value in (plan.dropped, plan.detached) if value is not None]
    treated += [] if plan.token_weight is None else [plan.token_weight != 1]
    touched = sum((value[rows].sum() for value in treated for rows in parts), torch.zeros(()))
    found = []
    for rows in parts:
        own = {name: value[rows] for name, value in plan._asdict().items() if isinstance(value, Tensor) and value.dim()}
        found.append(plan._replace(**own, metrics={**plan.metrics, "touched": touched}))
    return found


def _check_target(config: TrainerConfig, batch: ek.TokenBatch) -> None:
    if config.method != BASELINE:
        raise ValueError(
            f"method: expected {BASELINE} beside target_entropy, which decides about the tokens itself "
            f"(--target-method {', '.join(TARGETS)}), got {config.method}; leave one of the two out"
        )
    target = target_of(config)
    assert target is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these tokens' entropy is not the policy's
            target.step(batch, lr=config.lr)
    except (TypeError, ValueError) as error:  # numbers that the selection checks
        raise ValueError(f"method_options: {error}") from error
    if TARGETS[config.target_method] == "entropy_coef" and config.entropy_coef != 0:
        raise ValueError(
            f"entropy_coef: expected 0 for target_method {config.target_method}, which sets it, got "
            f"{config.entropy_coef}"
        )
