"""A number over the steps of a run, as the command line has it: ``0.4``, or points ``0:0.8,200:0.3``; and the factor of
the learning rate, which may also be ``cosine`` or ``linear``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropy_kernels._console import did_you_mean

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig

#: What learning rate, its factor and weight decay may be: AdamW's products of the three are to be numbers of float32.
LARGEST = 1e10


@dataclass(frozen=True)
class Schedule:
    """Straight lines between points, constant before the first and after the last.

    Of two points at one step the second counts from there on: ``0:1,120:1,120:2`` doubles at step 120.
    """

    points: tuple[tuple[int, float], ...]  # (step, value), steps not falling

    @classmethod
    def parse(cls, name: str, text: str) -> Schedule:
        """Of the field `name`. ValueError for what is neither a number nor points of steps that do not fall."""
        points = []
        for part in text.split(",") if isinstance(text, str) else [""]:
            step, colon, value = part.rpartition(":")
            try:
                points.append((int(step) if colon else 0, float(value)))
            except ValueError:
                points.append((-1, math.nan))
        steps = [step for step, _ in points]
        right = all(step >= 0 and math.isfinite(value) for step, value in points) and steps == sorted(steps)
        if not right or (len(points) > 1 and ":" not in text) or any(steps.count(step) > 2 for step in steps):
            raise ValueError(
                f"{name}: expected a number, or points STEP:VALUE by their steps, such as 0:0.8,200:0.3, got {text!r}"
            )
        return cls(tuple(points))

    def __call__(self, step: int) -> float:
        """The value at a step."""
        before = [point for point in self.points if point[0] <= step]
        after = [point for point in self.points if point[0] > step]
        if not before or not after:
            return (before or after)[-1 if before else 0][1]
        (left, low), (right, high) = before[-1], after[0]
        return low + (high - low) * (step - left) / (right - left)


#: Courses of the learning rate that fall to 0 over a run: the factor, by the share of the steps that is done.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def check_lr_schedule(text: str | None) -> None:
    """ValueError for what is no course of the learning rate."""
    if text is None or text in DECAYS:
        return
    try:
        points = Schedule.parse("lr_schedule", text).points
    except ValueError as error:
        raise ValueError(f"{error}; or one of {', '.join(DECAYS)}{did_you_mean(text, DECAYS)}") from None
    factors = [factor for _, factor in points]
    if min(factors) < 0 or max(factors) > LARGEST:
        raise ValueError(
            f"lr_schedule: expected factors {'>= 0' if min(factors) < 0 else f'of at most {LARGEST:g}'}, got {text!r}"
        )


def check_resumed_rise(config: TrainerConfig, changed: Iterable[str], *, finished: int) -> None:
    """Raise ValueError for a rise of the learning rate that is over before the run goes on, and so would do nothing."""
    falls = config.lr_schedule in DECAYS  # from the end of the rise on
    if "lr_warmup_steps" in changed and 0 < config.lr_warmup_steps <= finished and not falls:
        raise ValueError(
            f"lr_warmup_steps: expected 0, or more than the {finished} finished steps, since steps are counted from "
            f"the run's first, got {config.lr_warmup_steps} (--resume-changes lr_warmup_steps)"
        )


def lr_factor(text: str | None, step: int, *, steps: int, warmup: int) -> float:
    """What the learning rate of a step of `steps` is multiplied by; the first `warmup` of them rise to it in a line."""
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0  # the first step's is not 0
    if text is None:
        return rising
    if text in DECAYS:
        return rising * DECAYS[text](min(1.0, max(0, step - warmup) / max(1, steps - warmup)))
    return rising * Schedule.parse("lr_schedule", text)(step)
