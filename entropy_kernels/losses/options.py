"""The record of a loss: everything but tensors of tokens, made once from the keywords of a call and checked once.

The presets come first: what "Clip-Cov" and "KL-Cov" mean in the paper's equations and in verl's functions, which
differ. `paper` is arXiv 2505.22617, Eq. 12 (Clip-Cov) and Eq. 13 (KL-Cov); `verl` is what the functions of that trainer
compute. docs/losses.md sets them side by side.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_kernels._arguments import (
    FLOAT32_MAX,
    INT64,
    check_float,
    check_place,
    check_scalar,
    divisor_range,
    group_name,
    integer,
    number,
    of_type,
    scalar_tensor,
    word,
)
from entropy_kernels._selection_request import BANDS, IN_COMMON, Request, SeedCounter, request
from entropy_kernels._sequences import packed_sequences, per_token_or_sequence
from entropy_kernels.control import Control
from entropy_kernels.losses import surrogates
from entropy_kernels.losses.aggregation import AGG_MODES, COUNTS, Aggregation
from entropy_kernels.losses.kl import check_estimator
from entropy_kernels.losses.surrogates import Surrogate, SurrogateOptions
from entropy_kernels.methods import METHODS

Number = float | Tensor  # a tensor is 0-d and never read back
Effect = Literal["none", "dropped", "detached", "penalized"]  # on a token that is selected

# clip_low and clip_high: "preset" stands for the preset's value, because None already means "no PPO clip".
Clip = float | Tensor | None | Literal["preset"]


@dataclass(frozen=True)
class ClipCovPreset:
    """What Clip-Cov selects and what happens to a selected token.

    Attributes:
        clip_low, clip_high: PPO clip of the ratio, 1 - clip_low .. 1 + clip_high; None: no clip.
        ratio: share of the valid tokens that is selected.
        low, high: range of the covariance.
        band: whether its bounds are covariances, "absolute", or shares of the candidates, "quantile".
        closed: whether the bounds belong to the range.
        at_least_one: select one token even where ratio · N < 1.
        exclude_clipped: tokens that the PPO clip stops are no candidates.
        dropped_value: a dropped token's share of the loss value; its gradient is always removed.

    Source:
        arXiv 2505.22617, Eq. 12; docs/losses.md.
    """

    clip_low: float | None
    clip_high: float | None
    ratio: float
    low: float
    high: float
    band: Literal["absolute", "quantile"]
    closed: bool
    at_least_one: bool
    exclude_clipped: bool
    dropped_value: Literal["zero", "keep"]


@dataclass(frozen=True)
class KlCovPreset:
    """What KL-Cov selects and how a selected token is penalised.

    Attributes:
        clip_low, clip_high, ratio, at_least_one: as in :class:`ClipCovPreset`.
        penalty: estimator of :func:`kl_estimate`.

    Source:
        arXiv 2505.22617, Eq. 13; docs/losses.md.
    """

    clip_low: float | None
    clip_high: float | None
    ratio: float
    at_least_one: bool
    penalty: str


def _preset(kind: Any, given: dict[str, Any], **more: Any) -> Any:
    names = [field.name for field in fields(kind)]
    return kind(**{name: value for name, value in {**given, **more}.items() if name in names})


# The numbers are those of the table of methods
CLIP_COV: dict[str, ClipCovPreset] = {
    name: _preset(ClipCovPreset, given, dropped_value="keep" if given["effect"] == "detached" else "zero")
    for name, given in METHODS["clip_cov"].presets.items()
}
"""The presets of :func:`entropy_kernels.clip_cov_loss`: "paper" is arXiv 2505.22617, Eq. 12, "verl" that trainer's."""
KL_COV: dict[str, KlCovPreset] = {
    name: _preset(KlCovPreset, given, penalty="abs") for name, given in METHODS["kl_cov"].presets.items()
}
"""The presets of :func:`entropy_kernels.kl_cov_loss`: "paper" is arXiv 2505.22617, Eq. 13, "verl" that trainer's."""

# name -> (bound, whether the number may equal it, whether None is allowed, whether a gradient may go to a tensor)
_NUMBERS: dict[str, tuple[float, bool, bool, bool]] = {
    "clip_low": (0, True, True, False),
    "clip_high": (0, True, True, False),
    "dual_clip": (1, False, True, False),
    "entropy_coef": (-math.inf, True, False, True),
    "ref_kl_coef": (-math.inf, True, False, True),
    "kl_coef": (-math.inf, True, False, False),
    "batch_num_tokens": (0, True, True, False),
    "global_batch_size": (0, True, True, False),
    "loss_scale_factor": (0, False, True, False),
}
_OPTIONAL = ("clip_low", "clip_high", "dual_clip")  # None: no clip
_AGGREGATING = (*COUNTS, "loss_scale_factor")
_GIVEN = {"clip_cov": "dropped", "kl_cov": "penalized"}  # the mask that goes instead of a selection
_SELECTING = ("seed", "ratio", "k", "low", "high", "band")


@dataclass(frozen=True)
class LossOptions:
    """What a loss does with its tokens."""

    surrogate: Surrogate
    clips: SurrogateOptions  # what the surrogate is told
    aggregation: Aggregation
    entropy_coef: Number
    ref_kl_coef: Number
    kl_estimator: str
    ref_kl_importance: bool
    drop_nonfinite: bool
    effect: Effect
    given: str  # the argument that names the tokens under the effect; "" without effect
    treats: bool  # whether there are tokens under an effect
    selection: Request | None  # finds them, where they are not given
    exclude_clipped: bool  # from the selection
    seeds: SeedCounter | None  # gives the selection its seed, when the call is known to be right
    penalty: str  # estimator of the penalty
    kl_coef: Number  # of the penalty
    backend: str  # of covariance and selection

    def in_common(self, entropy: bool, ref_logprob: bool) -> dict[str, Any]:
        """What the ranks of a batch_group must have alike; the arguments: whether these tensors are given."""
        s = self.surrogate
        fn = getattr(s.fn, "func", s.fn), getattr(s.fn, "keywords", {})
        kind = getattr(fn[0], "__qualname__", type(fn[0]).__name__), fn[1], s.level, s.local, s.reduce
        return {
            **self.aggregation.in_common(),
            "method": self.given, "preset": (self.effect, self.exclude_clipped), "control": str(self.treats),
            "surrogate": (*kind, list(s.defaults)), "nonfinite": str(self.drop_nonfinite),
            "entropy": entropy, "ref_logprob": ref_logprob,
            "kl_estimator": self.kl_estimator, "penalty_estimator": self.penalty,
            "ref_kl_importance": self.ref_kl_importance,
            **{name: getattr(self, name) for name in ("entropy_coef", "ref_kl_coef", "kl_coef")},
            **self.clips,
        }  # fmt: skip

    def selecting(self) -> dict[str, Any]:
        """What the ranks must have alike of the selection; its seed apart, which is a tensor."""
        return dict.fromkeys(IN_COMMON) if self.selection is None else self.selection.in_common()

    def next_seed(self) -> Tensor | None:
        """Of the selection, without counting a call."""
        if self.selection is None or self.seeds is None:
            return None if self.selection is None else self.selection.seed
        return self.seeds.calls + self.seeds.seed


def seeded(options: LossOptions) -> LossOptions:
    """With the seed of this call, where a module counts them."""
    if options.seeds is None or options.selection is None:
        return options
    seed = options.seeds()
    assert options.selection.seed is not None
    if not seed.is_cpu or torch.compiler.is_compiling():
        seed = seed.to(options.selection.seed.device, non_blocking=True)
    return replace(options, selection=options.selection._replace(seed=seed), seeds=None)


def used(coefficient: Number) -> bool:
    """Whether what it multiplies enters the loss; a tensor is not read back, so it always does."""
    return isinstance(coefficient, Tensor) or coefficient != 0


def make(method: str, given: dict[str, Any], device: Any) -> LossOptions:
    """The record of the keywords ``given`` of the loss ``method`` ("ppo", "clip_cov", "kl_cov").

    Compiled code keeps numbers symbolic only as tensors, and so they are made tensors there.

    Raises:
        TypeError, ValueError: a keyword of the wrong type or out of range, or one that another one rules out.
    """
    surrogate = surrogates.find(given["surrogate"])
    preset: Any = None
    if method != "ppo":
        known: Any = CLIP_COV if method == "clip_cov" else KL_COV
        preset = known[word("preset", given["preset"], known)]
        for name in ("clip_low", "clip_high"):
            if isinstance(given[name], str):
                if given[name] != "preset":
                    raise ValueError(f"{name}: expected a number, None (no clip) or 'preset', got {given[name]!r}")
                given[name] = getattr(preset, name)
    told = {"clip_low": given["clip_low"], "clip_high": given["clip_high"], "dual_clip": given["dual_clip"]}
    told |= surrogate.defaults
    for name in surrogate.defaults:
        if name in given:
            raise ValueError(f"surrogate: expected defaults that are no keywords of the loss, got {name}")
    for name, value in given["surrogate_options"].items():
        if name not in surrogate.defaults:
            raise TypeError(_unknown(name, surrogate, given))
        told[name] = value
    coefficients = {"entropy_coef": given["entropy_coef"], "ref_kl_coef": given["ref_kl_coef"]}
    coefficients["kl_coef"] = given.get("kl_coef", 0.0)
    compiling = torch.compiler.is_compiling()
    always = ("dual_clip", *surrogate.divisors)
    for numbers in (told, coefficients):
        for name, value in numbers.items():
            if type(value) is float and not compiling and 0 <= value < 1 and name not in always:
                continue  # the usual case needs no further look
            default = surrogate.defaults.get(name, None if name in _OPTIONAL else 0.0)
            if isinstance(default, bool) or not isinstance(default, (int, float, Tensor, type(None))):
                continue  # an option of a surrogate that is no number
            if value is not None or default is not None:
                numbers[name] = _checked_number(name, value, device, name in surrogate.divisors)
    effect: Effect = "none"
    selection, penalty = None, "abs"
    if method != "ppo":
        effect, selection, penalty = _effect(method, given, preset, device)
    return LossOptions(
        surrogate=surrogate,
        clips=SurrogateOptions(**told),
        aggregation=aggregation(given, device),
        entropy_coef=coefficients["entropy_coef"],
        ref_kl_coef=coefficients["ref_kl_coef"],
        kl_estimator=check_estimator("kl_estimator", given["kl_estimator"]),
        ref_kl_importance=of_type("ref_kl_importance", given["ref_kl_importance"], bool),
        drop_nonfinite=word("nonfinite", given["nonfinite"], ("propagate", "drop")) == "drop",
        effect=effect,
        given=_GIVEN.get(method, ""),
        treats=method != "ppo" or any(given.get(name) is not None for name in ("dropped", "detached", "penalized")),
        selection=selection,
        exclude_clipped=method == "clip_cov" and preset.exclude_clipped,
        seeds=given["seed"] if selection is not None and isinstance(given.get("seed"), SeedCounter) else None,
        penalty=penalty,
        kl_coef=coefficients["kl_coef"],
        backend=given.get("backend", "auto"),
    )


def _unknown(name: str, surrogate: Surrogate, given: dict[str, Any]) -> str:
    """What to say of a keyword that neither the loss nor its surrogate has."""
    known = [key for key in given if key != "surrogate_options"]
    owners = [repr(other) for other, s in surrogates.surrogates().items() if name in s.defaults]
    near = difflib.get_close_matches(name, [*known, *surrogate.defaults], 1)
    hint = f"; {name} is an option of surrogate={' or '.join(owners)}" if owners else ""
    hint = hint or (f"; did you mean {near[0]}?" if near else "; docs/migration.md has other trainers' names")
    own = f" and of its surrogate: {', '.join(surrogate.defaults)}" if surrogate.defaults else ""
    return f"{name}: expected one of the loss's keywords{own}; got {name}{hint}"


def controlled(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a loss with those of its ``control``.

    Raises:
        TypeError, ValueError: what is no control, or one beside what it takes the place of.
    """
    control, found = given["control"], dict(given)
    if control is None:
        return found
    if not isinstance(control, Control):
        hint = "; a SelectionBatch gives one per micro-batch" if isinstance(control, list) else ""
        raise TypeError(f"control: expected an ek.Control, got {type(control).__name__}{hint}")
    if method != "ppo" and given[_GIVEN[method]] is None:
        raise ValueError(
            f"control: expected no selection made in the call beside it, got {method}_loss without {_GIVEN[method]}; "
            f"policy_loss(control=ek.control({method!r}, ...)) treats the tokens of a control"
        )
    for name in ("dropped", "detached", "penalized"):
        own = getattr(control, name)
        if own is not None and given.get(name) is not None:
            raise ValueError(f"{name}: expected None beside a control that has such tokens, got another mask")
        found[name] = given.get(name) if own is None else own
    if control.penalty_coef is not None:
        found["kl_coef"] = control.penalty_coef
    elif control.penalized is not None and "kl_coef" not in given:
        raise ValueError("penalty_coef: expected a number in a control with penalized tokens, got None")
    if control.token_weight is not None:
        weight, logprob = given["token_weight"], given["logprob"]
        if weight is not None:
            check_float("logprob", logprob)
            check_float("token_weight of control", control.token_weight)
            check_place("token_weight of control", control.token_weight, "logprob", logprob)
            sequences = packed_sequences(given["cu_seqlens"], logprob)
            weight = per_token_or_sequence("token_weight", weight, logprob, sequences) * control.token_weight
        found["token_weight"] = control.token_weight if weight is None else weight
    if control.advantages is not None:
        found["advantages"] = control.advantages
        if given["covariance_advantages"] is None:
            found["covariance_advantages"] = given["advantages"]
    if control.entropy_coef is not None:
        if isinstance(given["entropy_coef"], Tensor) or given["entropy_coef"] != 0:
            raise ValueError(f"entropy_coef: expected 0 beside a control that sets it, got {given['entropy_coef']}")
        found["entropy_coef"] = control.entropy_coef
    return found


def aggregation(given: dict[str, Any], device: Any) -> Aggregation:
    """The record of the keywords of the aggregation; raises as :func:`make`."""
    mode, group, dp_size = given["loss_agg_mode"], given["batch_group"], given["dp_size"]
    word("loss_agg_mode", mode, (*AGG_MODES, "none"))
    name = "" if group is None else group_name(group)
    dp_size = dp_size if type(dp_size) is int and dp_size < INT64 else integer("dp_size", dp_size)
    if dp_size < 1:
        raise ValueError(f"dp_size: expected >= 1, got {dp_size}")
    by_sequence = mode.startswith("seq-")
    counted = COUNTS[int(by_sequence)]
    if dp_size > 1 and group is None and mode not in ("token-sum", "none") and given[counted] is None:
        raise ValueError(
            f"{counted}: expected the number of the whole batch (or a batch_group that counts it) with "
            f"dp_size={dp_size}, got None"
        )
    tokens, sequences, scale = given["batch_num_tokens"], given["global_batch_size"], given["loss_scale_factor"]
    if not (tokens is sequences is scale is None):
        tokens, sequences, scale = (
            None if given[name] is None else _checked_number(name, given[name], device) for name in _AGGREGATING
        )
    return Aggregation(mode, by_sequence, dp_size, sequences if by_sequence else tokens, scale, group, name)


def _checked_number(name: str, value: Any, device: Any, divides: bool = False) -> Any:
    """``value`` checked by its row of _NUMBERS (one that has none may be any finite number).

    ``divides``: it also has to be one that fp32 tensors can be divided by.
    """
    least, inclusive, optional, differentiable = _NUMBERS.get(name, (-math.inf, True, True, False))
    if isinstance(value, Tensor):
        check_scalar(name, value, device)
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"{name}: expected a number or a 0-d tensor, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.dtype == torch.bool:
            raise TypeError(f"{name}: expected a number, got torch.bool")
        if value.requires_grad and not differentiable and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a constant, got a tensor that requires grad")
        exact = value.dtype in (torch.float32, torch.float64) or (name in COUNTS and value.dtype == torch.int64)
        return value if exact else value.double()  # 1 - 0.2 in bf16 is another clip, and 1 - 2 in uint8 is 255
    value = integer(name, value) if name in COUNTS and type(value) is int else number(name, value)
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if name in COUNTS and not -INT64 <= value < INT64:
        raise ValueError(f"{name}: expected a number below 2**63, got {value}")
    if value < least or (value == least and not inclusive):
        none = "" if name in _AGGREGATING or not optional else " or None"
        raise ValueError(f"{name}: expected {'>=' if inclusive else '>'} {least}{none}, got {value}")
    if divides or name == "loss_scale_factor":
        smallest, largest = divisor_range(torch.float32)
        if not smallest <= value <= largest:
            raise ValueError(f"{name}: expected > 0 within [{smallest:.2g}, {largest:.2g}], got {value}")
    if torch.compiler.is_compiling() and value != 0:
        return scalar_tensor(value, torch.int64 if name in COUNTS else torch.float64, device)
    return value


def _effect(
    method: str, given: dict[str, Any], preset: Any, device: torch.device
) -> tuple[Effect, Request | None, str]:
    """What happens to selected tokens, what selects them, and the estimator of the penalty."""
    mask = _GIVEN[method]
    if given[mask] is not None:
        options = [name for name in _SELECTING if name in given]
        beside = [name for name in options if given[name] is not None]
        if beside:
            raise ValueError(
                f"{mask}: expected no {', '.join(options)} beside it, because a given mask means that nothing is "
                f"selected here; got {', '.join(beside)}"
            )
    ratio, k, group, backend = given["ratio"], given["k"], given["batch_group"], given["backend"]
    chosen: dict[str, Any] = {
        "ratio": preset.ratio if ratio is None and k is None else ratio, "k": k, "default": None, "group": group,
        "at_least_one": preset.at_least_one, "backend": backend,
    }  # fmt: skip
    if method == "kl_cov":
        estimator = given["penalty_estimator"]
        penalty = preset.penalty if estimator is None else check_estimator("penalty_estimator", estimator)
        return "penalized", None if given[mask] is not None else request(device, **chosen), penalty
    effect: Effect = "dropped" if preset.dropped_value == "zero" else "detached"
    if given[mask] is not None:
        return effect, None, "abs"
    seed, low, high, band = given["seed"], given["low"], given["high"], given["band"]
    if seed is None:
        raise ValueError(
            "seed: expected an int or a 0-d int64 tensor (or a mask as `dropped`), got None; "
            "ek.SeedCounter and ek.ClipCovLoss count calls where nobody counts steps"
        )
    band = preset.band if band is None else word("band", band, BANDS)
    if band == "quantile" and (low is None or high is None):
        raise ValueError(f"low, high: expected shares in [0, 1] with band='quantile', got low={low}, high={high}")
    chosen |= {
        "low": preset.low if low is None else low, "high": preset.high if high is None else high,
        "band": band, "closed": preset.closed,
    }  # fmt: skip
    if isinstance(seed, SeedCounter):
        seed = torch.empty((), dtype=torch.int64, device=device)  # its place, which seeded() gives a seed
    return effect, request(device, **chosen, seed=seed), "abs"
