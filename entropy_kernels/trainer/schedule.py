"""A number over the steps of a run, as the command line has it: ``0.4``, or points ``0:0.8,200:0.3``."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
