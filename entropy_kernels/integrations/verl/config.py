"""What a user may write under ``actor_rollout_ref.actor`` for a ``loss_mode`` ``ek_*``, read and checked once.

Nothing here imports verl: what is read has the attributes of its ``ActorConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

import entropy_kernels as ek
from entropy_kernels._console import did_you_mean
from entropy_kernels.integrations._controllers import statistics_of, try_out

__all__ = ["MODES", "PREFIX", "Settings", "settings_of"]

PREFIX = "ek_"
#: loss_mode -> (surrogate, method of control), None: named by a key of ``policy_loss.ek``
MODES: dict[str, tuple[str | None, str | None]] = {
    **{PREFIX + name: (name, None) for name in ek.surrogates()},
    **{PREFIX + name: (None, name) for name in ek.methods()},
}
_NAMES = ("surrogate", "method", "target_method", "preset")
_KINDS = {bool: "true or false", int: "an integer", str: "a name"}
_CLIPS = ("clip_low", "clip_high", "dual_clip")
# surrogate's option -> where verl has it
_THEIRS = {"ratio_cap": "clip_ratio_c", "tau_pos": "tau_pos", "tau_neg": "tau_neg", "dro_beta": "dro_beta"}
# method -> option -> verl's name in policy_loss, and its default there
_SELECTION: dict[str, dict[str, tuple[str, float]]] = {
    "clip_cov": {"ratio": ("clip_cov_ratio", 2e-4), "low": ("clip_cov_lb", 1.0), "high": ("clip_cov_ub", 5.0)},
    "kl_cov": {"ratio": ("kl_cov_ratio", 2e-4), "kl_coef": ("ppo_kl_coef", 0.1)},
}


@dataclass(frozen=True)
class Settings:
    """A ``loss_mode`` ``ek_*`` with all that was set for it.

    Attributes:
        mode: the ``loss_mode``.
        surrogate: a name of :func:`entropy_kernels.surrogates`.
        loss: keywords of :func:`entropy_kernels.policy_loss`: clips, and options of the surrogate.
        method: a name of :func:`entropy_kernels.methods`, or None: no control.
        target: entropy in nats, or points (step, nats), for :class:`entropy_kernels.TargetEntropy`; None: no target.
        target_method: of the target: "exact_cov", "weight", "bonus".
        options: of the method, or of the target.
        seed: of the first step of a method that draws.
        observe: whether a target's plan is held against what came of it, by one more forward per rollout.
        statistics: whether verl's statistics are ours.
        needs: statistics of the old policy that a decision reads: "entropy", "vocab_covariance".
        effect: what a decision does to tokens, as :class:`entropy_kernels.Controller` names it; None: there is none.
        by_token: whether the decision compares two policies, token by token: it falls within the loss.

    Source:
        docs/integrations.md.
    """

    mode: str
    surrogate: str
    loss: dict[str, Any]
    method: str | None = None
    target: Any = None
    target_method: str = "exact_cov"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 42
    observe: bool = True
    statistics: bool = True
    needs: tuple[str, ...] = ()
    effect: str | None = None
    by_token: bool = False

    @property
    def decides(self) -> bool:
        """Whether there is a decision about tokens."""
        return self.method is not None or self.target is not None

    @property
    def observes(self) -> bool:
        """Whether what came of a plan is measured; a target by bonus has nothing to learn from it."""
        return self.target is not None and self.observe and self.target_method != "bonus"

    @property
    def described(self) -> str:
        """One line, for who wants to see what is on."""
        parts = [f"surrogate {self.surrogate}"]
        if self.target is not None:
            parts += [f"target_entropy {self.target} by {self.target_method}", f"observe {self.observes}"]
        elif self.method is not None:
            parts.append(f"method {self.method}")
        parts += [f"{name}={value}" for name, value in {**self.loss, **self.options}.items()]
        parts += [f"seed {self.seed}"] if self._draws else []
        parts.append(f"statistics {'ours' if self.statistics else 'of verl'}")
        return f"entropy_kernels: loss_mode={self.mode}: {', '.join(parts)}"

    @property
    def _draws(self) -> bool:
        return self.method is not None and ek.methods()[self.method].draws

    @property
    def sets_bonus(self) -> bool:
        """Whether the decision is the coefficient of an entropy bonus."""
        return self.effect == "entropy_coef"

    @property
    def entropy_now(self) -> bool:
        """Whether the loss needs the entropy of the policy that is trained."""
        return self.by_token or self.sets_bonus

    def controller(self) -> ek.Controller:
        """A new one; its state is the run's."""
        if self.target is not None:
            return ek.TargetEntropy(self.target, method=self.target_method, **self.options)
        assert self.method is not None
        return ek.Controller(self.method, seed=self.seed, **self.options)

    def checked(self) -> Settings:
        """The same, with what its controller reads and does; every value is tried by a call of what will be called."""
        one = torch.zeros(1, 2)
        ek.policy_loss(one, one, one, None, surrogate=self.surrogate, **self.loss)
        if not self.decides:
            return self
        controller = self.controller()
        try_out(controller)
        needs, by_token = statistics_of(controller), "old_entropy" in controller.needs
        return replace(self, needs=needs, effect=controller.effect, by_token=by_token)


def settings_of(config: Any) -> Settings | None:
    """What verl's ``ActorConfig`` says; None where the ``loss_mode`` is none of ours."""
    known = getattr(config, "ek_settings", None)
    if known is not None:
        return known
    policy = getattr(config, "policy_loss", None)
    mode = getattr(policy, "loss_mode", None)
    if not isinstance(mode, str) or not mode.startswith(PREFIX):
        given = getattr(policy, "ek", None) or {}
        _typed("statistics", given.get("statistics"), bool)
        for key in given:
            if key != "statistics":
                raise ValueError(
                    f"policy_loss.ek.{key}: expected beside a loss_mode ek_*, got loss_mode={mode!r}, which does not "
                    "read it"
                )
        return None
    return _read(mode, config, policy)


def _read(mode: str, config: Any, policy: Any) -> Settings:
    if mode not in MODES:
        raise ValueError(
            f"policy_loss.loss_mode: expected one of {', '.join(MODES)}, got {mode!r}{did_you_mean(mode, MODES)}"
        )
    given = dict(getattr(policy, "ek", None) or {})
    for key in _NAMES:
        if _typed(key, given.get(key), str) is None:
            given.pop(key, None)
    surrogate, method = _named(mode, given)
    target, target_method = _aimed(surrogate, method, given)
    seed = _typed("seed", given.pop("seed", None), int)
    if seed is not None and not (method is not None and ek.methods()[method].draws):
        raise ValueError(
            f"policy_loss.ek.seed: expected with a method that draws "
            f"({', '.join(name for name, row in ek.methods().items() if row.draws)}), got {seed} with loss_mode={mode}"
        )
    observe, statistics = (_typed(key, given.pop(key, None), bool) for key in ("observe", "statistics"))
    settings = Settings(
        mode, surrogate, {}, method, target, target_method,
        seed=(getattr(config, "data_loader_seed", None) or 0) if seed is None else seed, observe=observe is not False,
        statistics=statistics is not False,
    )  # fmt: skip
    settings = _with_numbers(settings, given, config, policy)
    try:
        settings = settings.checked()
    except (TypeError, ValueError) as error:
        of_target = settings.target is not None and str(error).startswith("target")
        where = f".ek.target_entropy={settings.target!r}" if of_target else f" of loss_mode={mode}"
        raise type(error)(f"policy_loss{where}: {error}") from error
    _refuse(settings, config)
    return settings


def _typed(key: str, value: Any, kind: type) -> Any:
    if value is not None and type(value) is not kind:
        raise TypeError(f"policy_loss.ek.{key}: expected {_KINDS[kind]}, got {value!r}")
    return value


def _aimed(surrogate: str, method: str | None, given: dict[str, Any]) -> tuple[Any, str]:
    """The target, and by what it is reached."""
    target, by = given.pop("target_entropy", None), given.pop("target_method", None)
    for key, value in (("target_method", by), ("observe", given.get("observe"))):
        if target is None and value is not None:
            raise ValueError(f"policy_loss.ek.{key}: expected beside target_entropy, got {value!r} alone")
    if target is not None and method is not None:
        raise ValueError(
            f"policy_loss.ek.target_entropy: expected with a loss_mode that names a surrogate and without "
            f"ek.method, as a target finds tokens and strength itself (loss_mode=ek_{surrogate}), got {method!r}"
        )
    known = ek.TargetEntropy.methods()
    if by is not None and by not in known:
        raise ValueError(f"policy_loss.ek.target_method: expected one of {', '.join(known)}, got {by!r}")
    return target, by or "exact_cov"


def _named(mode: str, given: dict[str, Any]) -> tuple[str, str | None]:
    """Surrogate and method: the mode names one, a key may name the other."""
    surrogate, method = MODES[mode]
    for key, own in (("surrogate", surrogate), ("method", method)):
        if own is not None and key in given:
            raise ValueError(f"policy_loss.ek.{key}: expected none, as loss_mode={mode} names it, got {given[key]!r}")
    known: dict[str, Any] = {"surrogate": ek.surrogates(), "method": ek.methods()}
    for key, names in known.items():
        name = given.get(key)
        if name is not None and name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"policy_loss.ek.{key}: expected one of {', '.join(names)}, got {name!r}{hint}")
    return surrogate or given.pop("surrogate", None) or "ppo", method or given.pop("method", None)


def _with_numbers(settings: Settings, given: dict[str, Any], config: Any, policy: Any) -> Settings:
    """verl's own numbers, and over them those under ``ek``: each goes to whoever has an option of its name."""
    row = None if settings.method is None else ek.methods()[settings.method]
    of_surrogate = ek.surrogates()[settings.surrogate].defaults
    of_method: tuple[str, ...] = () if row is None else tuple(row.options)
    if settings.target is not None:
        of_method = (*ek.TargetEntropy.methods()[settings.target_method], "vocab_size")
    own = ["seed", "statistics"] if row is not None and row.draws else ["statistics"]
    own += ["surrogate"] if row is not None else ["method", "target_entropy", "target_method", "observe"]
    for key in given:
        if key not in (*_CLIPS, *of_surrogate, *of_method):
            known = dict.fromkeys((*of_method, *of_surrogate, *_CLIPS, *own))
            raise ValueError(
                f"policy_loss.ek.{key}: expected one of {', '.join(known)} with loss_mode={settings.mode}, got "
                f"{key}{did_you_mean(key, known)}"
            )
    clips = _clips(settings, row, given, config)
    loss = {key: value for key, value in given.items() if key in of_surrogate and key not in of_method}
    loss |= {
        name: _theirs(_THEIRS[name], config, policy) for name in of_surrogate if name in _THEIRS and name not in loss
    }
    options = _selection(settings.method or "", given, config, policy)
    options |= {key: value for key, value in given.items() if key in of_method}
    return replace(settings, loss={**loss, **clips}, options={**options, **clips} if settings.decides else {})


def _selection(method: str, given: dict[str, Any], config: Any, policy: Any) -> dict[str, Any]:
    """verl's own numbers of a selection, but for those that a key of ours takes the place of; those of another preset
    stand for themselves."""
    taken = {*given, *(["ratio"] if given.get("k") is not None else [])}
    asked = {option: row for option, row in _SELECTION.get(method, {}).items() if option not in taken}
    numbers = {option: _theirs(name, config, policy) for option, (name, _) in asked.items()}
    preset = given.get("preset", "verl")
    if preset == "verl":
        return numbers
    for option, (name, default) in asked.items():
        if numbers[option] != default:
            raise ValueError(
                f"policy_loss.{name}: expected verl's default, {default}, beside ek.preset={preset}, which has a "
                f"number of its own, got {numbers[option]}; ek.{option} goes before both"
            )
    return {}


def _theirs(name: str, config: Any, policy: Any) -> Any:
    holder = policy if hasattr(policy, name) else config
    value = getattr(holder, name)
    if value is None:
        raise ValueError(f"{name}: expected a number in the config, got None")
    return value


def _clips(settings: Settings, row: ek.Method | None, given: dict[str, Any], config: Any) -> dict[str, Any]:
    """As verl's function of the same name reads them; those under ``ek`` take their place."""
    clips: dict[str, Any] = {"clip_low": config.clip_ratio_low, "clip_high": config.clip_ratio_high}
    clips = {name: config.clip_ratio if value is None else value for name, value in clips.items()}
    clips["dual_clip"] = config.clip_ratio_c if settings.surrogate == "ppo" else None
    if row is not None and row.presets:
        preset = given.get("preset", next(iter(row.presets)))
        clips["dual_clip"] = None
        if preset in row.presets:
            clips |= {name: None for name in ("clip_low", "clip_high") if row.presets[preset][name] is None}
    return clips | {name: given[name] for name in _CLIPS if name in given}


def _refuse(settings: Settings, config: Any) -> None:
    """What this trainer's hook cannot do, or would do without being seen."""
    if settings.surrogate == "cispo_trl" and "clip_high" not in (getattr(config.policy_loss, "ek", None) or {}):
        raise ValueError(
            "policy_loss.ek.clip_high: expected with surrogate cispo_trl, where it is the bound of the ratio itself "
            "(often 5), got none; verl's clip_ratio_high is the distance from 1"
        )
    more = [name for name in settings.needs if name != "entropy"]
    if more and not settings.statistics:
        raise ValueError(
            f"policy_loss.ek.statistics: expected true (or nothing) where the method reads {more[0]}, which verl does "
            "not compute, got false"
        )
    if settings.sets_bonus and config.entropy_coeff != 0:
        raise ValueError(
            f"actor.entropy_coeff: expected 0 beside {settings.method or 'a target by bonus'}, which sets the "
            f"coefficient of the entropy bonus, got {config.entropy_coeff}"
        )
