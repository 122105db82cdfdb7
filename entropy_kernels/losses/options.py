"""The record of a loss: everything but tensors of tokens, made once from the keywords of a call and checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import integer, number, scalar_tensor
from entropy_kernels.losses import presets, surrogates
from entropy_kernels.losses.aggregation import AGG_MODES, Aggregation
from entropy_kernels.losses.kl import check_estimator
from entropy_kernels.losses.surrogates import Surrogate, SurrogateOptions
from entropy_kernels.selection import _bounds as check_band
from entropy_kernels.selection import _count as check_count
from entropy_kernels.selection import clip_cov_mask, kl_cov_mask, seed_tensor

Number = float | Tensor  # a tensor is 0-d and never read back
Effect = Literal["none", "dropped", "detached", "penalized"]  # on a token that is selected

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
_COUNTS = ("batch_num_tokens", "global_batch_size")
_AGGREGATING = (*_COUNTS, "loss_scale_factor")
_GIVEN = {"clip_cov": "dropped", "kl_cov": "penalized"}  # the mask that goes instead of a selection
_SELECTING = ("seed", "ratio", "k", "low", "high", "band")


class Selection(NamedTuple):
    """A selection made in the call."""

    function: Callable[..., Tensor]  # clip_cov_mask or kl_cov_mask
    options: dict[str, Any]
    exclude_clipped: bool

    @property
    def random(self) -> bool:
        """Whether tokens are drawn from a range of covariance, not the largest taken."""
        return "seed" in self.options


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
    selection: Selection | None  # finds them, where they are not given
    penalty: str  # estimator of the penalty
    kl_coef: Number  # of the penalty
    backend: str

    @property
    def needs_lengths(self) -> bool:
        """Whether it matters which tokens are a sequence."""
        return self.surrogate.pools or self.aggregation.by_sequence

    def changes(self, tokens: int) -> int | None:
        """Most tokens that the selection takes; None where that is not known (a group's tokens are not counted)."""
        if self.selection is None:
            return 0
        ratio, k = self.selection.options["ratio"], self.selection.options["k"]
        if self.aggregation.group is not None or isinstance(ratio, Tensor) or isinstance(k, Tensor):
            return None
        return min(tokens, k if k is not None else max(1, math.floor((ratio or 0.0) * tokens)))


def used(coefficient: Number) -> bool:
    """Whether the term enters the loss; a tensor is not read back, so it always does."""
    return isinstance(coefficient, Tensor) or coefficient != 0


def make(method: str, given: dict[str, Any], device: torch.device) -> LossOptions:
    """The record of the keywords ``given`` of the loss ``method`` ("ppo", "clip_cov", "kl_cov").

    Compiled code keeps numbers symbolic only as tensors, and so they are made tensors there.

    Raises:
        TypeError, ValueError: a keyword of the wrong type or out of range, or one that another one rules out.
    """
    surrogate = surrogates.find(given["surrogate"])
    preset: Any = None
    if method != "ppo":
        preset = presets.find(presets.CLIP_COV if method == "clip_cov" else presets.KL_COV, given["preset"])
        for name in ("clip_low", "clip_high"):
            given[name] = presets.clip_or(name, given[name], getattr(preset, name))
    numbers = {name: _number(name, given.get(name, 0.0), device) for name in _NUMBERS if name not in _AGGREGATING}
    clips = SurrogateOptions({name: numbers[name] for name in ("clip_low", "clip_high", "dual_clip")})
    clips.update(surrogate.defaults)
    for name, value in given["surrogate_options"].items():
        if name not in surrogate.defaults:
            known = ", ".join(surrogate.defaults) or "none"
            raise TypeError(
                f"{name}: expected keyword arguments of the loss, or options of surrogate={given['surrogate']!r}: "
                f"{known}; got {name}"
            )
        clips[name] = value
    for name in surrogate.defaults:
        if isinstance(clips[name], (float, Tensor)):
            clips[name] = _number(name, clips[name], device)
    if given["nonfinite"] not in ("propagate", "drop"):
        raise ValueError(f"nonfinite: expected 'propagate' or 'drop', got {given['nonfinite']!r}")
    effect, selection, penalty = _effect(method, given, preset, device)
    return LossOptions(
        surrogate, clips, aggregation(given, device), numbers["entropy_coef"], numbers["ref_kl_coef"],
        check_estimator("kl_estimator", given["kl_estimator"]), bool(given["ref_kl_importance"]),
        given["nonfinite"] == "drop", effect, _GIVEN.get(method, ""), selection, penalty, numbers["kl_coef"],
        given.get("backend", "auto"),
    )  # fmt: skip


def aggregation(given: dict[str, Any], device: torch.device) -> Aggregation:
    """The record of the keywords of the aggregation; raises as :func:`make`."""
    mode, group, dp_size = given["loss_agg_mode"], given["batch_group"], given["dp_size"]
    if mode not in AGG_MODES and mode != "none":
        raise ValueError(f"loss_agg_mode: expected one of {', '.join(map(repr, AGG_MODES))}, 'none', got {mode!r}")
    if group is not None and getattr(group, "group_name", None) is None:
        raise TypeError(f"batch_group: expected a torch.distributed process group or None, got {type(group).__name__}")
    dp_size = dp_size if type(dp_size) is int else integer("dp_size", dp_size)
    if dp_size < 1:
        raise ValueError(f"dp_size: expected >= 1, got {dp_size}")
    made = Aggregation(mode, dp_size, *(_number(name, given[name], device) for name in _AGGREGATING), group)
    counted = _COUNTS[made.by_sequence]
    if dp_size > 1 and group is None and mode not in ("token-sum", "none") and given[counted] is None:
        raise ValueError(
            f"{counted}: expected the number of the whole batch (or a batch_group that counts it) with "
            f"dp_size={dp_size}, got None"
        )
    return made


def _number(name: str, value: Any, device: torch.device) -> Any:
    """``value`` checked by its row of _NUMBERS (one that has none may be any number)."""
    least, inclusive, optional, differentiable = _NUMBERS.get(name, (-math.inf, True, True, False))
    if value is None and optional:
        return None
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"{name}: expected a number or a 0-d tensor, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.requires_grad and not differentiable:
            raise ValueError(f"{name}: expected a constant, got a tensor that requires grad")
        return value
    if type(value) is not float:
        value = number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if value < least or (value == least and not inclusive):
        none = "" if name in _AGGREGATING or not optional else " or None"
        raise ValueError(f"{name}: expected {'>=' if inclusive else '>'} {least}{none}, got {value}")
    if torch.compiler.is_compiling() and value != 0:
        return scalar_tensor(value, torch.int64 if name in _COUNTS else torch.float64, device)
    return value


def _effect(
    method: str, given: dict[str, Any], preset: Any, device: torch.device
) -> tuple[Effect, Selection | None, str]:
    """What happens to selected tokens, what selects them, and the estimator of the penalty."""
    if method == "ppo":
        return "none", None, "abs"
    mask = _GIVEN[method]
    options = [name for name in _SELECTING if name in given]
    beside = [name for name in options if given[name] is not None]
    if given[mask] is not None and beside:
        raise ValueError(
            f"{mask}: expected no {', '.join(options)} beside it, because a given mask means that nothing is selected "
            f"here; got {', '.join(beside)}"
        )
    ratio, k = given["ratio"], given["k"]
    ratio, k = check_count(preset.ratio if ratio is None and k is None else ratio, k, None)
    chosen: dict[str, Any] = {"ratio": ratio, "k": k, "at_least_one": preset.at_least_one, "backend": given["backend"]}
    chosen["batch_group"] = given["batch_group"]
    if method == "kl_cov":
        estimator = given["penalty_estimator"]
        penalty = check_estimator("penalty_estimator", preset.penalty if estimator is None else estimator)
        selection = None if given[mask] is not None else Selection(kl_cov_mask, chosen, False)
        return "penalized", selection, penalty
    effect: Effect = "dropped" if preset.dropped_value == "zero" else "detached"
    if given[mask] is not None:
        return effect, None, "abs"
    seed, low, high, band = (given[name] for name in ("seed", "low", "high", "band"))
    if seed is None:
        raise ValueError("seed: expected an int or a 0-d int64 tensor (or a mask as `dropped`), got None")
    if band == "quantile" and (low is None or high is None):
        raise ValueError(f"low, high: expected shares in [0, 1] with band='quantile', got low={low}, high={high}")
    low, high, band = (getattr(preset, n) if x is None else x for n, x in (("low", low), ("high", high), ("band", band)))
    low, high = check_band(low, high, band)
    seed = seed() if callable(seed) and not isinstance(seed, Tensor) else seed
    chosen |= {"seed": seed_tensor(seed, device), "low": low, "high": high, "band": band, "closed": preset.closed}
    return effect, Selection(clip_cov_mask, chosen, preset.exclude_clipped), "abs"
