"""What "Clip-Cov" and "KL-Cov" mean: the paper's equations and verl's functions, which differ. The only place of both.

`paper` is arXiv 2505.22617, Eq. 12 (Clip-Cov) and Eq. 13 (KL-Cov); `verl` is what the functions of that trainer
compute. docs/losses.md sets them side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# clip_low and clip_high: "preset" stands for the preset's value, because None already means "no PPO clip".
Clip = float | Tensor | None | Literal["preset"]


@dataclass(frozen=True)
class ClipCovPreset:
    """What Clip-Cov selects and what happens to a selected token."""

    clip_low: float | None  # PPO clip of the ratio, 1 - clip_low .. 1 + clip_high; None: no clip
    clip_high: float | None
    ratio: float  # share of the valid tokens that is selected
    low: float  # band of the covariance
    high: float
    band: Literal["absolute", "quantile"]
    closed: bool  # whether the bounds belong to the band
    at_least_one: bool  # select one token even where ratio · N < 1
    exclude_clipped: bool  # tokens that the PPO clip holds are no candidates
    dropped_value: Literal["zero", "keep"]  # a dropped token's share of the loss value; its gradient is always removed


@dataclass(frozen=True)
class KlCovPreset:
    """What KL-Cov selects and how a selected token is penalised."""

    clip_low: float | None
    clip_high: float | None
    ratio: float
    at_least_one: bool
    penalty: str  # estimator of kl_estimate


CLIP_COV: dict[str, ClipCovPreset] = {
    "verl": ClipCovPreset(
        clip_low=0.2,
        clip_high=0.2,
        ratio=2e-4,
        low=1.0,
        high=5.0,
        band="absolute",
        closed=False,
        at_least_one=True,
        exclude_clipped=True,
        dropped_value="zero",
    ),
    "paper": ClipCovPreset(
        clip_low=None,
        clip_high=None,
        ratio=2e-4,
        low=1.0,
        high=5.0,
        band="absolute",
        closed=True,
        at_least_one=False,
        exclude_clipped=False,
        dropped_value="keep",
    ),
}

KL_COV: dict[str, KlCovPreset] = {
    "verl": KlCovPreset(clip_low=None, clip_high=None, ratio=2e-4, at_least_one=True, penalty="abs"),
    "paper": KlCovPreset(clip_low=None, clip_high=None, ratio=2e-3, at_least_one=False, penalty="abs"),
}
