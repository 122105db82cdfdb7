"""The methods of control, in one table: a score per token, a rule that turns scores into tokens or values, an effect.

Read in this order: :class:`Method` (what a row is), the scores, the rules, ``METHODS``. To add a method, write its row
(or hand an ``ek.Method`` of your own to ``ek.control``); docs/control.md prints the table and shows how. Scores and
rules get the whole batch (:class:`entropy_kernels.batch.WholeBatch`: all micro-batches, means over all ranks) and the
row's options; they compute in float64 with torch's operations, branch on no value of a tensor, and read none back.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import Options, of_type
from entropy_kernels.backends.radix_select import ALL_TOKENS
from entropy_kernels.batch import WholeBatch
from entropy_kernels.selection import TokenMoments

#: What a method may do to a token, and what its rule returns for that.
EFFECTS = {
    "dropped": "bool (N,): value and gradient of the token are removed; the count that the loss divides by stays",
    "detached": "bool (N,): the gradient is removed, the value stays",
    "penalized": "bool (N,): kl_coef · KL to the old policy is added",
    "token_weight": "(N,): the token's policy term is multiplied by it; bool (N,): by the option `weight` where True",
    "advantages": "(N,): goes in the place of the advantage",
    "entropy_coef": "0-d: the coefficient of the loss's entropy bonus",
}
#: Options of every method: PPO's clip as the loss has it, for the tokens whose gradient it stops.
CLIPS = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
CLIP_BOUNDS = {"clip_low": (0.0, math.inf), "clip_high": (0.0, math.inf), "dual_clip": (1.0, math.inf)}
ALIKE = 1e-12  # a standard deviation below it is none, as in Trinity-RFT


@dataclass(frozen=True, eq=False)
class Method:
    """A row of the table.

    Attributes:
        score: ``(batch, options) -> (N,)``, float64, of the :class:`entropy_kernels.batch.WholeBatch`.
        rule: ``(batch, score, options) ->`` what the effect takes: (N,) bool for the first three below, (N,) bool or
            floating point for "token_weight", (N,) floating point for "advantages", 0-d for "entropy_coef".
        effects: of "dropped", "detached", "penalized", "token_weight", "advantages", "entropy_coef" (docs/control.md);
            the first is the default of the option ``effect``, the others its choices.
        needs: the optional fields of ``TokenBatch`` that score and rule read.
        needs_with: option -> fields that are read, too, where it is set to something.
        defaults: the options and their defaults, those of the source unless its docs say otherwise. They may be given
            as 0-d tensors, which nothing reads back, and are then not checked.
        bounds: option -> (least, most) of a number.
        words: option -> the words that it may be.
        presets: name -> defaults that the option ``preset`` puts in the place of others; the first is the default.
        draws: whether the rule draws with a seed (``options.seed``).
        remember: ``(batch, options) -> {name: 0-d tensor}``: what the next step has in the place of the options of
            these names. None: the method has no memory.
        formula, source, users, when: for the documentation: what it computes, the paper or code it is from, who has it,
            and when to choose it.

    Raises:
        TypeError: a score or rule that is no function, another field that is not of its type.
        ValueError: effects that are none, options that are arguments of :func:`entropy_kernels.control`, a penalty
            without ``kl_coef``.

    Source:
        docs/control.md.
    """

    score: Callable[[WholeBatch, Options], Tensor]
    rule: Callable[[WholeBatch, Tensor, Options], Tensor]
    effects: tuple[str, ...] = ("dropped",)
    needs: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    draws: bool = False
    remember: Callable[[WholeBatch, Options], dict[str, Tensor]] | None = None
    needs_with: dict[str, tuple[str, ...]] = field(default_factory=dict)
    formula: str = ""
    source: str = ""
    users: str = ""
    when: str = ""

    def __post_init__(self) -> None:
        for name in ("score", "rule"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a function, got {type(getattr(self, name)).__name__}")
        of_type("needs", self.needs, tuple)
        of_type("draws", self.draws, bool)
        for name in ("defaults", "bounds", "words", "presets", "needs_with"):
            of_type(name, getattr(self, name), dict)
        for name, preset in self.presets.items():
            of_type(f"presets[{name!r}]", preset, dict)
        if not isinstance(self.effects, tuple) or not self.effects or any(name not in EFFECTS for name in self.effects):
            raise ValueError(f"effects: expected a tuple of some of {', '.join(EFFECTS)}, got {self.effects!r}")
        for name in self.options:
            if name in ("method", "batch", "seed", "batch_group", "backend"):
                raise ValueError(f"defaults: expected options that are no arguments of ek.control, got {name}")
        if "penalized" in self.effects and "kl_coef" not in self.options:
            raise ValueError("defaults: expected kl_coef beside the effect 'penalized', got none")

    @property
    def options(self) -> dict[str, Any]:
        """All options with their defaults."""
        first = next(iter(self.presets.items()), None)
        named = {} if first is None else {"preset": first[0], **first[1]}
        own = {"effect": self.effects[0]} if len(self.effects) > 1 else {}
        return {**CLIPS, **self.defaults, **own, **named}

    def reads(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The optional fields of ``TokenBatch`` that a decision with these options reads.

        Args:
            options: those that are given, or all.

        Returns:
            Names of fields. Raises nothing.
        """
        found = {**self.options, **options}
        read = [self.needs, *(names for option, names in self.needs_with.items() if _is_set(found[option]))]
        return tuple(dict.fromkeys(name for names in read for name in names))


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def methods() -> dict[str, Method]:
    """The methods of control by name, as ``method=`` takes them; each says its source, formula, options and defaults.

    A method of your own is handed to :func:`entropy_kernels.control` as a :class:`Method`. Raises nothing.

    Returns:
        name -> :class:`Method`, a copy of the table.

    Source:
        docs/control.md.
    """
    return dict(METHODS)


def find(method: str | Method) -> Method:
    """The row of a name."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, or an ek.Method, got {method!r}{hint}")
    return METHODS[method]


# ---- scores ----------------------------------------------------------------------------------------------------------


def covariance(batch: WholeBatch, options: Options) -> Tensor:
    """The paper's proxy, (lp - mean lp)·(A - mean A)."""
    return batch["covariance"]


def entropy_decrease(batch: WholeBatch, options: Options) -> Tensor:
    """c·F, F = A·r·C/T²: to first order what the token's own gradient takes from its entropy, per unit learning rate.

    0 where PPO's clip leaves the token no gradient.
    """
    if batch.decrease is None or batch.decrease[0] is not options:  # score and metrics of a control ask for it
        batch.decrease = options, decrease_of(batch, batch["advantages"], options)
    return batch.decrease[1]


def decrease_of(batch: WholeBatch, advantages: Tensor, options: Options) -> Tensor:
    """:func:`entropy_decrease` with other advantages."""
    change = advantages * batch["ratio"] * batch["vocab_covariance"] / batch["temperature"].square()
    clipped = batch.clipped(options.clip_low, options.clip_high, options.dual_clip, advantages)
    return torch.where(batch.mask & ~clipped & (advantages != 0), change * batch["coefficient"], 0.0)


def decline(batch: WholeBatch, options: Options) -> Tensor:
    """S = p·(log p + H), the entropy decrease without the part that all tokens of a position share."""
    return batch["self_information"]


def exact_decline(batch: WholeBatch, options: Options) -> Tensor:
    """D = E_π[S] - S = -C: of a token with A < 0, what its gradient takes from the entropy."""
    return -batch["vocab_covariance"]


def steer_change(batch: WholeBatch, options: Options) -> Tensor:
    """Ω = |A/p_old · p(1-p)(log p + H)|; "theorem": one factor p more, and 0 where PPO's clip stops the gradient.

    As in the authors' code 0 where that is not finite.
    """
    logprob = batch["logprob"]
    p = logprob.exp()
    change = batch["advantages"] * batch["ratio"] * (1 - p) * torch.where(p > 0, logprob + batch["entropy"], 0.0)
    if options.form == "theorem":
        change = torch.where(batch.clipped(options.clip_low, options.clip_high), 0.0, change * p)
    return torch.where(change.isfinite(), change.abs(), 0.0)


def entropy(batch: WholeBatch, options: Options) -> Tensor:
    return batch["entropy"]


def entropy_ratio(batch: WholeBatch, options: Options) -> Tensor:
    """(H + ε)/(H_old + ε), ε = 1e-8."""
    return (batch["entropy"] + 1e-8) / (batch["old_entropy"] + 1e-8)


def shaped_by_entropy(batch: WholeBatch, options: Options) -> Tensor:
    """A + min(α·H, |A|/κ)."""
    advantages = batch["advantages"]
    return advantages + torch.minimum(options.alpha * batch["entropy"], advantages.abs() / options.kappa)


def shaped_by_logprob(batch: WholeBatch, options: Options) -> Tensor:
    """A(1 - ζL) for A > 0, A(1 + ζL) for A < 0, of A's sign or 0; L = log p, or log p + H where it is centred."""
    advantages, level = batch["advantages"], batch["logprob"].clamp(min=options.floor)
    level = level + batch["entropy"] if options.center else level
    up, down = advantages * (1 - options.zeta * level), advantages * (1 + options.zeta * level)
    return torch.where(advantages > 0, up.clamp(min=0), torch.where(advantages < 0, down.clamp(max=0), advantages))


def of_one_sign(batch: WholeBatch, options: Options) -> Tensor:
    """A where the batch's entropy lies in its range; above it only A >= 0, below it only A <= 0, else 0."""
    mean, advantages = batch.moments(batch["entropy"]).mean, batch["advantages"]
    low, high = _range_of_step(options)
    kept = torch.where(mean > high, advantages.clamp(min=0), advantages)
    return torch.where((mean < low) & ~(mean > high), advantages.clamp(max=0), kept)


def _range_of_step(options: Options) -> tuple[Any, Any]:
    if options.total_steps is None or options.schedule == "constant":
        return options.low, options.high
    x = options.step / options.total_steps
    x = x.clamp(0, 1) if isinstance(x, Tensor) else min(max(x, 0.0), 1.0)
    if options.schedule == "cosine":
        x = (1 - (torch.cos(math.pi * x) if isinstance(x, Tensor) else math.cos(math.pi * x))) / 2
    return options.low + (options.low_end - options.low) * x, options.high + (options.high_end - options.high) * x


def bonus(batch: WholeBatch, options: Options) -> Tensor:
    """The coefficient while H <= target, else 0; 0-d."""
    mean = batch.moments(batch["entropy"]).mean
    return torch.where(mean <= options.target, torch.ones_like(mean) * options.coef, 0.0)


def alike(batch: WholeBatch, options: Options) -> Tensor:
    """0: nothing tells one token from another."""
    return torch.zeros_like(batch["logprob"])


# ---- rules -----------------------------------------------------------------------------------------------------------


def _count(options: Options) -> dict[str, Any]:
    return {name: options[name] for name in ("ratio", "k", "at_least_one")}


def _excluded(batch: WholeBatch, options: Options) -> Tensor | None:
    return batch.clipped(options.clip_low, options.clip_high, None) if options.exclude_clipped else None


def drawn(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """As many as ratio or k say, uniformly among those whose score lies in the range."""
    range_ = {name: options[name] for name in ("low", "high", "band", "closed")}
    exclude = _excluded(batch, options)
    return batch.random(score.float(), exclude=exclude, seed=options.seed, **_count(options), **range_)


def largest(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """As many as ratio or k say, of any sign."""
    return batch.top(score.float(), **_count(options))


def largest_positive(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """Of those above 0 the largest: as many as ratio or k say, or as make up a budget; else 2 %, or all to weigh."""
    bounds = {name: options[name] for name in ("budget", "limit", "share") if options[name] is not None}
    count, score = _count(options), score.float()
    chosen = score > 0
    if bounds:
        chosen = batch.budget(score, **bounds)
    elif count["ratio"] is count["k"] is None and options.effect != "token_weight":
        count["ratio"] = 0.02
    if count["ratio"] is not None or count["k"] is not None:
        chosen = chosen & batch.top(score, exclude=~(score > 0), **count)
    return chosen


def far_below(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """A < 0, and the score more than mu standard deviations below its mean; none of scores that are all alike."""
    moments = batch.moments(score, std=True)
    return (batch["advantages"] < 0) & (score - moments.mean < -options.mu * moments.std) & (moments.std >= ALIKE)


def far_above(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """A < 0, and the score above mu standard deviations; of these the largest, none of scores that are all alike."""
    std = batch.moments(score, std=True).std
    beyond = (batch["advantages"] < 0) & (score > options.mu * std) & (std >= ALIKE)
    return batch.top(score.float(), exclude=~beyond, **_count(options))


def below_quantile(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """Below the batch's 1 - rho quantile (between two order statistics: the upper one), or NaN."""
    # the largest scores down to number floor(rho · (N - 1)), which are all drawn
    everything: dict[str, Any] = {"seed": 0, "k": ALL_TOKENS, "band": "quantile", "closed": True}
    return batch.mask & ~batch.random(-score.float(), low=0.0, high=options.rho, **everything)


def outside(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """Not strictly between the bounds."""
    return batch.mask & ~((score > options.low) & (score < options.high))


def as_it_is(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """The score is the effect's value."""
    return score


def weighted_down(batch: WholeBatch, score: Tensor, options: Options) -> Tensor:
    """w_min at the largest score: e^{-k·score}; or linear, from w_max at the smallest."""
    most = batch.moments(score).largest
    if options.map == "exponential":
        rate = (torch.ones_like(most) * options.w_min).log() / most.clamp(min=0.02)
        return torch.exp(rate * score)
    least = -batch.moments(-score).largest
    place = torch.where(most > least, (score - least) / (most - least), 0.5)
    return options.w_max + (options.w_min - options.w_max) * place


# ---- memory ----------------------------------------------------------------------------------------------------------


def next_coefficient(batch: WholeBatch, options: Options) -> dict[str, Tensor]:
    """One delta up while H <= target, else down, within its bounds; a batch without a finite H changes nothing."""
    found = batch.moments(batch["entropy"])
    step = torch.where(found.mean <= options.target, torch.ones_like(found.mean), -1.0) * options.delta
    after = torch.minimum(
        torch.maximum(options.coef + step, _like(options.coef_min, step)), _like(options.coef_max, step)
    )
    return {"coef": torch.where(_known(found), after, options.coef)}


def next_zeta(batch: WholeBatch, options: Options) -> dict[str, Tensor]:
    """ζ doubles towards the target and halves away from it, in zeta_min..zeta_max by size; then its sign turns."""
    zeta = _like(options.zeta, batch["logprob"].new_zeros(()))
    if options.target is None:
        return {"zeta": zeta}
    found, kept, target = batch.moments(batch["entropy"]), {}, options.target
    if isinstance(target, str):  # "initial"; NaN until there is one
        target = _like(math.nan if options.initial_entropy is None else options.initial_entropy, zeta)
        target = kept["initial_entropy"] = torch.where(target.isnan() & _known(found), found.mean, target)
    least, most = _like(options.zeta_min, zeta), _like(options.zeta_max, zeta)
    raised = torch.where(zeta > 0, torch.minimum(2 * zeta, most), torch.where(zeta / 2 > -least, least, zeta / 2))
    raised = torch.where(zeta == 0, least, raised)
    lowered = torch.where(zeta < 0, torch.maximum(2 * zeta, -most), torch.where(zeta / 2 < least, -least, zeta / 2))
    after = torch.where(found.mean < target, raised, torch.where(found.mean > target, lowered, zeta))
    return {"zeta": torch.where(_known(found), after, zeta), **kept}


def next_step(batch: WholeBatch, options: Options) -> dict[str, Tensor]:
    return {"step": _like(options.step, batch["logprob"].new_zeros(())) + 1}


def _known(found: TokenMoments) -> Tensor:
    """Whether there is a mean to go by."""
    return (found.tokens > 0) & found.mean.isfinite()


def _like(value: Any, like: Tensor) -> Tensor:
    return torch.ones_like(like) * value


# ---- the table -------------------------------------------------------------------------------------------------------

_COUNT = {"ratio": None, "k": None, "at_least_one": True}
_RANGE = {"low": -math.inf, "high": math.inf, "band": "absolute", "closed": False, "exclude_clipped": False}
_BANDS: dict[str, tuple[str, ...]] = {"band": ("absolute", "quantile")}
_SHARES = {"ratio": (0.0, 1.0), "share": (0.0, 1.0), "weight": (0.0, 1.0), "rho": (0.0, 1.0)}
_TREATED = ("dropped", "detached")

METHODS: dict[str, Method] = {
    "clip_cov": Method(
        covariance, drawn, _TREATED, draws=True, words=_BANDS, bounds=_SHARES,
        defaults={"k": None},
        presets={
            "verl": {
                "clip_low": 0.2, "clip_high": 0.2, "ratio": 2e-4, "low": 1.0, "high": 5.0, "band": "absolute",
                "closed": False, "at_least_one": True, "exclude_clipped": True, "effect": "dropped",
            },
            "paper": {
                "clip_low": None, "clip_high": None, "ratio": 2e-4, "low": 1.0, "high": 5.0, "band": "absolute",
                "closed": True, "at_least_one": False, "exclude_clipped": False, "effect": "detached",
            },
        },
        formula="(lp - mean lp)·(A - mean A) in [low, high]: ratio·N drawn",
        source="2505.22617, Eq. 10-12; verl `clip_cov`",
        users="verl",
        when="to compare with the paper; at low entropy its range can be empty",
    ),
    "kl_cov": Method(
        covariance, largest, ("penalized",), bounds=_SHARES,
        defaults={"k": None, "kl_coef": 1.0},
        presets={
            "verl": {"clip_low": None, "clip_high": None, "ratio": 2e-4, "at_least_one": True},
            "paper": {"clip_low": None, "clip_high": None, "ratio": 2e-3, "at_least_one": False},
        },
        formula="the ratio·N largest (lp - mean lp)·(A - mean A): + kl_coef·|lp - lp_old|",
        source="2505.22617, Eq. 13; verl `kl_cov`",
        users="verl",
        when="several updates per rollout; it does nothing in the first",
    ),
    "exact_cov": Method(
        entropy_decrease, largest_positive, (*_TREATED, "token_weight"), ("vocab_covariance",), bounds=_SHARES,
        defaults={**_COUNT, "budget": None, "limit": None, "share": None, "weight": 0.5},
        formula="c·F, F = A·r·C/T² > 0: the largest, by ratio, k, or a budget of Σ c·F; or all of them weighted",
        source="exact form of 2505.22617, Lemma 1 (docs/math.md)",
        users="here",
        when="the strongest brake per token; a budget says how much of the entropy decrease is taken away",
    ),
    "random": Method(
        alike, drawn, (*_TREATED, "penalized"), draws=True, words=_BANDS, bounds=_SHARES,
        defaults={**_COUNT, **_RANGE, "ratio": 2e-4, "kl_coef": 1.0},
        formula="ratio·N of all tokens, drawn",
        source="the control of 2505.22617's claim",
        users="here",
        when="to see what the number of tokens alone does",
    ),
    "clip_b": Method(
        decline, far_below, _TREATED, ("entropy",), {"mu": 2.5}, {"mu": (0.0, math.inf)},
        formula="S = p(log p + H); A < 0 and S - mean S < -mu·std S",
        source="2602.03392, Clip_B",
        users="Trinity-RFT",
        when="as clip_v, without Σp²·log p",
    ),
    "clip_v": Method(
        exact_decline, far_above, _TREATED, ("vocab_covariance",),
        {**_COUNT, "ratio": 1e-4, "mu": 8.5}, {"mu": (0.0, math.inf), **_SHARES},
        formula="D = E_π[S] - S = -C; A < 0 and D > mu·std D, of these the ratio·N largest",
        source="2602.03392, Clip_V",
        users="Trinity-RFT",
        when="against collapse by negative samples; below 20 000 tokens it is one token a batch",
    ),
    "steer": Method(
        steer_change, weighted_down, ("token_weight",), ("entropy",),
        {"w_min": 0.8, "w_max": 1.2, "map": "exponential", "form": "released"},
        {"w_min": (1e-6, 1.0), "w_max": (0.0, math.inf)},
        {"map": ("exponential", "linear"), "form": ("released", "theorem")},
        formula="Ω = |A/p_old·p(1-p)(log p + H)|; w = exp(Ω·ln(w_min)/max(max Ω, 0.02)), or linear in [w_min, w_max]",
        source="2510.10150 and its code (paper v4: w_min 0.7)",
        users="STEER",
        when="to weigh all tokens a little in place of few a lot, beside clip-higher",
    ),
    "top_entropy": Method(
        entropy, below_quantile, _TREATED, ("entropy",), {"rho": 0.2}, {"rho": (1e-9, 1.0)},
        formula="keep H >= the batch's 1 - rho quantile",
        source="2506.01939; TRL `top_entropy_quantile` (its default, 1, is off)",
        users="TRL, ms-swift",
        when="large models (the paper: from 14 B); divides by all tokens, as TRL",
    ),
    "erc": Method(
        entropy_ratio, outside, _TREATED, ("entropy", "old_entropy"), {"low": 0.95, "high": 1.05},
        formula="keep low < (H + 1e-8)/(H_old + 1e-8) < high",
        source="2512.05591 (its code detaches: effect='detached')",
        users="Klear",
        when="several updates per rollout; it does nothing in the first",
    ),
    "entropy_advantage": Method(
        shaped_by_entropy, as_it_is, ("advantages",), ("entropy",), {"alpha": 0.4, "kappa": 2.0},
        {"alpha": (0.0, math.inf), "kappa": (1e-6, math.inf)},
        formula="A + min(alpha·H, |A|/kappa)",
        source="2506.14758, Eq. 5 and 6 (PPO: alpha 0.1)",
        users="its authors",
        when="longer reasoning; it is no brake: the paper ends at lower entropy with it than without",
    ),
    "repo": Method(
        shaped_by_logprob, as_it_is, ("advantages",),
        defaults={
            "zeta": 1e-3, "target": None, "initial_entropy": None, "center": False, "floor": -20.0, "zeta_min": 1e-4,
            "zeta_max": 0.05,
        },
        bounds={"floor": (-math.inf, 0.0), "zeta_min": (1e-12, math.inf), "zeta_max": (1e-12, math.inf)},
        words={"target": ("initial",)}, remember=next_zeta,
        needs_with={"center": ("entropy",), "target": ("entropy",)},
        formula="A > 0: max(A(1 - zeta·lp), 0); A < 0: min(A(1 + zeta·lp), 0); center: lp + H for lp; "
        "with a target zeta doubles or halves each step",
        source="2603.11682, REPO-R; numbers of SkyRL#1896 (target 'initial': the paper's)",
        users="SkyRL",
        when="on-policy, to raise entropy, not only to hold it",
    ),
    "adaptive_entropy": Method(
        bonus, as_it_is, ("entropy_coef",), ("entropy",),
        {"target": 0.2, "delta": 0.005, "coef": 0.0, "coef_min": 0.0, "coef_max": 1.0},
        {"delta": (0.0, math.inf)}, remember=next_coefficient,
        formula="coef while H <= target, else 0; then coef ± delta within [coef_min, coef_max]",
        source="2505.22312, Eq. 3.2; TRL `use_adaptive_entropy` (authors' scripts: delta 1e-4, coef_max 0.005)",
        users="Skywork-OR1, TRL",
        when="one or two updates per rollout; a bonus acts on the whole vocabulary and can explode",
    ),
    "entrocraft": Method(
        of_one_sign, as_it_is, ("advantages",), ("entropy",),
        {
            "low": 0.6, "high": 0.7, "low_end": 0.1, "high_end": 0.2, "total_steps": None, "step": 0.0,
            "schedule": "linear",
        },
        {"total_steps": (1e-9, math.inf), "step": (0.0, 2.0**53)},
        {"schedule": ("linear", "cosine", "constant")}, remember=next_step,
        formula="mean H > high: A >= 0 only, < low: A <= 0 only; moves to [low_end, high_end] in total_steps",
        source="2604.26326, Alg. 1",
        users="its authors",
        when="to hold a course of entropy with any estimator, at the price of samples",
    ),
}  # fmt: skip


def method_table() -> str:
    """The table as Markdown, for docs/control.md."""
    lines = ["| name | what | effect | options | source | who has it | when |", "|---|---|---|---|---|---|---|"]
    for name, row in METHODS.items():
        shown = {option: value for option, value in row.options.items() if option not in CLIPS}
        options = ", ".join(f"{option} {value}" for option, value in shown.items())
        cells = (f"`{name}`", row.formula, " / ".join(row.effects), options, row.source, row.users, row.when)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
