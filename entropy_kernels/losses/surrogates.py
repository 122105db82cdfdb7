"""The surrogates: what a token adds to the loss, as a closed form of its log-ratio, log-prob and advantage.

A surrogate returns the value, its derivative, and which tokens a clip stops; docs/losses.md prints the table at the end
of this file. To add one, write its function and its line of the table (or hand an ``ek.Surrogate`` of your own to
``surrogate=``), and its reference to tests/reference_surrogates.py. Functions get tokens of one shape, fp32 or fp64:

    log_ratio   log π - log π_old, of the token, or of its sequence where the level says so; not clamped; 0 in padding
    logprob     log π; 0 in padding
    advantages  A; 0 in padding
    options     clip_low, clip_high, dual_clip (None: none), and those of ``defaults``; numbers or 0-d tensors

Derivatives are written out, so that nothing passes through a branch that a token does not take (0 · inf is NaN).
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_kernels._arguments import Options as SurrogateOptions
from entropy_kernels._arguments import of_type, word

# value, derivative, clipped (bool or None) and, where there is a second clip, which tokens that one stops
Result = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A policy loss per token, before it is weighted and summed up.

    Attributes:
        fn: ``(log_ratio, logprob, advantages, options) -> (value, grad, clipped)``. It gets log π - log π_old (not
            clamped), log π and A of tokens of one shape, fp32 or fp64, all 0 in padding, and the clips and ``defaults``
            by name, numbers or 0-d tensors. ``grad`` is the derivative by the token's log-prob, with which its
            log-ratio moves, where what the formula stops the gradient of stays as it is (level "sequence": by the
            log-ratio); ``clipped`` a bool tensor, or None. A fourth result counts as ``clipfrac_lower``. No autograd
            runs inside: what fn computes is constant. It does not write to what it gets.
        level: "token", or "sequence": the log-ratio is that of the token's sequence, the mean over its valid tokens,
            the same for all of them, and ``grad`` reaches each of them with its share.
        defaults: options of this surrogate beside the clips, which callers may give as keywords of the losses; their
            names are none of the losses' own.
        local: level "sequence" only: ``grad`` stays with the token's own log-prob; the ratio's value is the sequence's.
        contribution: level "sequence" only: ``(log_ratio, advantages, options) -> (part, grad, clipped)``: what a token
            adds to its sequence's sum, where that is not its log-ratio, and its derivative.
        reduce: "mean" or "sum", over the tokens of a sequence.
        divisors: options of ``defaults`` that fn divides by, and which therefore have to be > 0.
        clips: for the documentation: which of the losses' clips fn reads.
        formula, source, users: for the documentation: the loss of a token, the paper it is from, who has it.

    Raises:
        TypeError, ValueError: a fn that is no function, another level or reduce, a field that is not of its type; what
            only a level "sequence" can have.

    Source:
        docs/losses.md.
    """

    fn: Callable[[Tensor, Tensor, Tensor, SurrogateOptions], Result]
    level: Literal["token", "sequence"] = "token"
    defaults: dict[str, Any] = field(default_factory=dict)
    local: bool = False
    contribution: Callable[[Tensor, Tensor, SurrogateOptions], Result] | None = None
    reduce: Literal["mean", "sum"] = "mean"
    divisors: tuple[str, ...] = ()
    clips: tuple[str, ...] = ("clip_low", "clip_high", "dual_clip")
    formula: str = ""
    source: str = ""
    users: str = ""

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn: expected a function, got {type(self.fn).__name__}")
        word("level", self.level, ("token", "sequence"))
        word("reduce", self.reduce, ("mean", "sum"))
        of_type("local", self.local, bool)
        of_type("defaults", self.defaults, dict)
        for name in ("divisors", "clips"):
            of_type(name, getattr(self, name), tuple)
        if self.level == "token" and (self.local or self.contribution is not None or self.reduce != "mean"):
            raise ValueError("local, contribution, reduce: expected with level='sequence', got level='token'")

    @property
    def pools(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence."""
        return self.level == "sequence"


# ---- choosing tokens without branches: what is masked is 0, whatever stands there, and its NaN reaches nothing -------

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def mask_bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bool ``mask`` as :func:`keep` wants it for values of ``dtype`` (fp32 or fp64): all bits set where True.

    On a CPU torch chooses by ``&`` ten times as fast as by ``where``. A compiler does not, so it is given the mask.
    """
    return mask if torch.compiler.is_compiling() else mask * _minus_one(dtype)


def _minus_one(dtype: torch.dtype) -> Tensor:
    """On the CPU, as a number: what it is added to or multiplied with needs no cast before."""
    return torch.full((), -1, dtype=_BITS[dtype], device="cpu")


def keep(mask: Tensor | None, *values: Tensor) -> list[Tensor]:
    """Each of ``values`` where ``mask`` (made by :func:`mask_bits`; None: everywhere), else 0."""
    if mask is None:
        return list(values)
    kept = []
    for x in values:
        kept.append(torch.where(mask, x, 0) if mask.dtype == torch.bool else (x.view(mask.dtype) & mask).view(x.dtype))
    return kept


def unless(condition: Tensor, *values: Tensor) -> list[Tensor]:
    """Each of ``values`` where the bool ``condition`` does not hold, else 0."""
    if torch.compiler.is_compiling():
        return [torch.where(condition, 0, x) for x in values]
    kept, mask = [], condition + _minus_one(values[0].dtype)
    for x in values:
        kept.append((x.view(mask.dtype) & mask).view(x.dtype))
    return kept


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, where 0 · inf is 0: an advantage of 0 gives no loss, also where its ratio overflows.

    NaN becomes 0, too; a loss adds the NaN of its inputs again.
    """
    if torch.compiler.is_compiling():
        return torch.where(a == 0, 0, a * b)
    return (a * b).nan_to_num_(0.0, math.inf, -math.inf)


def masked_max(x: Tensor, mask: Tensor | None) -> Tensor:
    """The maximum of ``x`` (fp32 or fp64) over the tokens of ``mask``, the lowest without any; ``x`` is 0 elsewhere."""
    if x.numel() == 0:
        return x.new_full((), -math.inf)
    if mask is None:
        return x.amax()
    if mask.dtype == torch.bool:
        return torch.where(mask, x, -math.inf).amax()
    # ~mask is 0 for a token that counts, -1 for another, which is lowered beyond all
    return torch.add(x, ~mask, alpha=torch.finfo(x.dtype).max).amax()


# ---- the closed forms ------------------------------------------------------------------------------------------------


def clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    """``x`` between two bounds, each a number, a 0-d tensor or None."""
    if low is not None:
        x = torch.maximum(x, low) if isinstance(low, Tensor) else x.clamp(min=low)
    if high is not None:
        x = torch.minimum(x, high) if isinstance(high, Tensor) else x.clamp(max=high)
    return x


def clip_ratio(ratio: Tensor, options: SurrogateOptions) -> Tensor:
    """The ratio between 1 - clip_low and 1 + clip_high, for a surrogate of your own.

    Args:
        ratio: any shape, fp32 or fp64.
        options: as a surrogate gets them: ``clip_low`` and ``clip_high``, each a number, a 0-d tensor or None (no clip
            on that side).

    Returns:
        ``ratio``'s shape and dtype; without unit.

    Raises:
        KeyError: options without a clip.

    Source:
        arXiv 1707.06347, Eq. 7.
    """
    low, high = options["clip_low"], options["clip_high"]
    return clamp(ratio, None if low is None else 1 - low, None if high is None else 1 + high)


def clipped_gain(gain: Tensor, ratio: Tensor, options: SurrogateOptions) -> Tensor:
    """``gain`` times the clipped ratio, which can be infinite only without an upper clip."""
    low, high = options["clip_low"], options["clip_high"]
    if type(low) is float is type(high):
        return gain * ratio.clamp(1 - low, 1 + high)
    clipped = clip_ratio(ratio, options)
    return product(gain, clipped) if high is None else gain * clipped


def either(condition: Tensor, yes: Any, no: Any, dtype: torch.dtype) -> Tensor:
    """One of two numbers or 0-d tensors; `where` would round numbers to torch's default dtype."""
    return no + (yes - no) * condition.to(dtype)


def _dual_clip(
    value: Tensor, grad: Tensor, advantages: Tensor, options: SurrogateOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and derivative with the dual clip, and which tokens it stops."""
    bound = -advantages.clamp(max=0) * options["dual_clip"]  # 0 for A >= 0, whose value is never above it
    stopped = value > bound
    return torch.minimum(value, bound), unless(stopped, grad)[0], stopped


def _ppo(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    ratio, gain = log_ratio.exp(), -advantages
    free = product(gain, ratio if options["delta"] is None else clamp(ratio, None, options["delta"]))
    if options["clip_low"] is None is options["clip_high"]:
        value, grad, clipped = free, free, None
    else:
        bounded = clipped_gain(gain, ratio, options)
        clipped = bounded > free
        value, grad = torch.maximum(free, bounded), unless(clipped, free)[0]
    stopped = None
    if options["dual_clip"] is not None:
        value, grad, stopped = _dual_clip(value, grad, advantages, options)
    if options["delta"] is not None:
        beyond = ratio > options["delta"]
        grad = unless(beyond, grad)[0]
        beyond = beyond & (advantages < 0)
        stopped = beyond if stopped is None else stopped | beyond
    return value, grad, clipped, stopped


def _ce_gppo(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    ratio, gain = log_ratio.exp(), -advantages
    free, bounded = product(gain, ratio), clipped_gain(gain, ratio, options)
    clipped = bounded > free
    beta = either(advantages < 0, options["beta_low"], options["beta_high"], ratio.dtype)
    value = torch.where(clipped, beta * bounded, free)
    if options["dual_clip"] is None:
        return value, value, clipped
    value, grad, stopped = _dual_clip(value, value, advantages, options)
    return value, grad, clipped, stopped


def _cispo(
    log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions, one_sided: bool = False
) -> Result:
    ratio = log_ratio.exp()
    bounded = clamp(ratio, None, options["clip_high"]) if one_sided else clip_ratio(ratio, options)
    clipped = ratio != bounded
    grad = -product(advantages, bounded)
    return grad * logprob, grad, clipped & (advantages > 0) if one_sided else clipped


def _sapo(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    ratio, gain = log_ratio.exp(), -4 * advantages
    tau = either(advantages > 0, options["tau_pos"], options["tau_neg"], ratio.dtype)
    x = tau * (ratio - 1)
    gate = torch.sigmoid(x)
    return gain * gate / tau, product(gain * gate * torch.sigmoid(-x), ratio), None  # 1 - gate would cancel


def _dppo(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions, binary_kl: bool) -> Result:
    ratio, prob, old_logprob = log_ratio.exp(), logprob.exp(), logprob - log_ratio
    old = old_logprob.exp()
    if binary_kl:
        divergence = (1 - old) * ((1 - old + 1e-8) / (1 - prob + 1e-8)).log() - old * log_ratio
        above, below = divergence, divergence
    else:
        above, below = prob - old, old - prob
    clipped = torch.zeros_like(advantages, dtype=torch.bool)
    if options["clip_high"] is not None:
        clipped = (advantages > 0) & (above > options["clip_high"]) & (prob > old)
    if options["clip_low"] is not None:
        clipped = clipped | ((advantages <= 0) & (below > options["clip_low"]) & (prob < old))
    grad = unless(clipped, -product(advantages, clamp(ratio, None, options["ratio_cap"])))[0]
    lower = None if options["ratio_cap"] is None else (ratio > options["ratio_cap"]) & ~clipped
    return grad * logprob, grad, clipped, lower


def _gmpo(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    value = -product(advantages, log_ratio.exp())
    return value, value, None


def _gmpo_part(log_ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    low, high = options["clip_low"], options["clip_high"]
    bounded = clamp(log_ratio, None if low is None else -low, high)
    sign, beyond = advantages.sign(), bounded != log_ratio
    part = sign * torch.minimum(sign * log_ratio, sign * bounded)
    return part, unless(part != log_ratio, sign.abs())[0], beyond & (advantages > 0), beyond & (advantages < 0)


def _gpg(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    return -advantages * logprob, -advantages, None


def _dro(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    pull = options["dro_beta"] * log_ratio
    return 0.5 * pull * log_ratio - advantages * logprob, pull - advantages, None


def _vespo(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    log_ratio = log_ratio.clamp(math.log(1e-8), 20)
    positive, dtype = advantages >= 0, log_ratio.dtype
    k, decay = (either(positive, options[f"{n}_pos"], options[f"{n}_neg"], dtype) for n in ("k", "lambda"))
    decay = decay.clamp(min=1e-4)
    grad = -advantages * (decay + k * log_ratio - decay * log_ratio.exp()).exp()
    return grad * logprob, grad, None


def _vespo_part(log_ratio: Tensor, advantages: Tensor, options: SurrogateOptions) -> Result:
    return log_ratio.clamp(-20, 20), torch.ones_like(log_ratio), None


# fmt: off
_SURROGATES: dict[str, Surrogate] = {
    "ppo": Surrogate(
        _ppo, defaults={"delta": None}, source="1707.06347, Eq. 7; dual clip 1912.09729, Eq. 5; delta 2505.07291",
        formula="max(-A·r, -A·clamp(r, 1 - clip_low, 1 + clip_high)); A < 0: at most -A·dual_clip; delta bounds the r "
        "of the first term",
        users="verl `vanilla`; TRL `grpo`, `bnpo`, `dr_grpo`, `dapo` (differing in loss_agg_mode)"),
    "gspo": Surrogate(
        _ppo, "sequence", {"delta": None}, source="2507.18071",
        formula="as ppo, of the sequence's ratio s = exp(mean of log r), differentiated",
        users='TRL `importance_sampling_level="sequence"`; with `seq-mean-token-sum` TRL `luspo`'),
    "gspo_token": Surrogate(
        _ppo, "sequence", {"delta": None}, local=True, source="2507.18071",
        formula="as ppo, of sg(s)·exp(log π - sg(log π))", users="verl `gspo`"),
    "cispo": Surrogate(
        _cispo, clips=("clip_low", "clip_high"), source="2506.13585",
        formula="-sg(clamp(r, 1 - clip_low, 1 + clip_high))·A·log π", users="verl `cispo`"),
    "cispo_trl": Surrogate(
        functools.partial(_cispo, one_sided=True), clips=("clip_high",), source="2506.13585; 2510.13786",
        formula="-sg(min(r, clip_high))·A·log π: clip_high is the bound itself, often 5; clipped counts A > 0",
        users="TRL `cispo`"),
    "sapo": Surrogate(
        _sapo, defaults={"tau_pos": 1.0, "tau_neg": 1.05}, divisors=("tau_pos", "tau_neg"), clips=(),
        source="2511.20347",
        formula="-A·sigmoid(τ·(r - 1))·4/τ, τ = tau_pos for A > 0, else tau_neg", users="verl `sapo`, TRL `sapo`"),
    "dppo_tv": Surrogate(
        functools.partial(_dppo, binary_kl=False), defaults={"ratio_cap": 20.0}, clips=("clip_low", "clip_high"),
        source="2602.04879",
        formula="-sg(min(r, ratio_cap))·A·log π; stopped for A > 0 where π - π_old > clip_high, else where π_old - π > "
        "clip_low",
        users="verl `dppo_tv`"),
    "dppo_kl": Surrogate(
        functools.partial(_dppo, binary_kl=True), defaults={"ratio_cap": 20.0}, clips=("clip_low", "clip_high"),
        source="2602.04879",
        formula="as dppo_tv, stopped where the KL divergence of (π_old, 1 - π_old) from (π, 1 - π) is above clip_high "
        "or clip_low",
        users="verl `dppo_kl`"),
    "gmpo": Surrogate(
        _gmpo, "sequence", contribution=_gmpo_part, clips=("clip_low", "clip_high"), source="2507.20673",
        formula="-A·exp(mean of log r, each clamped to -clip_low .. clip_high where that lowers the gain)",
        users="verl `geo_mean` (with `seq-mean-token-mean`)"),
    "gpg": Surrogate(
        _gpg, clips=(), source="2504.02546", formula="-A·log π", users="verl `gpg`; its `reinforce` with weights"),
    "dro": Surrogate(
        _dro, defaults={"dro_beta": 1.0}, clips=(), source="2405.19107",
        formula="-A·log π + dro_beta/2·(log r)²", users="verl `dro`"),
    "vespo": Surrogate(
        _vespo, "sequence", {"k_pos": 2.0, "k_neg": 3.0, "lambda_pos": 3.0, "lambda_neg": 2.0}, local=True,
        contribution=_vespo_part, reduce="sum", clips=(),
        formula="-sg(w^k·exp(λ·(1 - w)))·A·log π, w = exp(sum of log r), k and λ by the sign of A",
        source="2602.10693", users="TRL `vespo`"),
    "ce_gppo": Surrogate(
        _ce_gppo, defaults={"beta_low": 0.75, "beta_high": 1.0}, source="2509.20712",
        formula="as ppo, but a clipped token keeps a gradient: -A·β·bound is its value and its derivative, "
        "β = beta_low below, beta_high above",
        users="Kwai-Klear"),
}
# fmt: on
_ALIASES = {"vanilla": "ppo", "geo_mean": "gmpo"}


def surrogates() -> dict[str, Surrogate]:
    """The surrogates by the names that the losses' ``surrogate=`` takes. Raises nothing.

    Returns:
        name -> :class:`Surrogate`, copies of your own to change.

    Source:
        docs/losses.md.
    """
    return {name: replace(surrogate, defaults=dict(surrogate.defaults)) for name, surrogate in _SURROGATES.items()}


def find(surrogate: Any) -> Surrogate:
    """The surrogate of a name, or itself."""
    if isinstance(surrogate, Surrogate):
        return surrogate
    if isinstance(surrogate, str) and _ALIASES.get(surrogate, surrogate) in _SURROGATES:
        return _SURROGATES[_ALIASES.get(surrogate, surrogate)]
    if callable(surrogate):
        raise TypeError(
            "surrogate: expected a name or an ek.Surrogate, got a function; wrap it: ek.Surrogate(function)"
        )
    name = str(surrogate).lower().replace("-", "_")
    near = ["ppo"] if name in ("grpo", "bnpo", "dr_grpo", "dapo") else difflib.get_close_matches(name, _SURROGATES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"surrogate: expected an ek.Surrogate or one of {', '.join(_SURROGATES)}, got {surrogate!r}"
        f"{hint} (docs/migration.md)"
    )


def surrogate_table() -> str:
    """The surrogates as a Markdown table, for docs/losses.md. Raises nothing.

    Returns:
        name, loss per token, level, clips, options, paper and users, a line each.

    Source:
        docs/losses.md.
    """
    rows = []
    for name, s in _SURROGATES.items():
        level, clips = s.level + ", local" * s.local, ", ".join(f"`{clip}`" for clip in s.clips)
        options = ", ".join(f"`{key}={value}`" for key, value in s.defaults.items())
        rows.append(f"| `{name}` | {s.formula} | {level} | {clips} | {options} | {s.source} | {s.users} |")
    head = "| name | loss per token | ratio of | clips it reads | options | arXiv | who has it |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])
