"""TargetEntropy in plain Python floats, one token after the other; shares no code with the library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from reference_control import Token, largest, mean
from reference_selection import budget

NAN = math.nan


def clamp(x: float, least: float, most: float) -> float:
    return min(max(x, least), most)


def between(points: list[tuple[float, float]], step: float) -> float:
    """Linear between points, constant outside; of two at one step the second counts from there on."""
    for (x, y), (next_x, next_y) in reversed([*itertools.pairwise(points)]):
        if step >= next_x:
            return next_y
        if step >= x:
            return y + (next_y - y) * (step - x) / (next_x - x)
    return points[0][1]


@dataclass
class Loop:
    """``target`` of a step; after each ``step`` what it wanted, planned, chose."""

    target: Callable[[int], float]
    method: str = "exact_cov"
    kp: float = 0.2
    ki: float = 0.02
    max_change: float = 0.03
    options: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    integral: float = 0.0
    unit: float = NAN
    squares: float = 0.0
    products: float = 0.0
    coef: float = 0.0
    measured: float = NAN

    def step(self, tokens: list[Token], lr: float, updates: int = 1) -> dict[str, float]:
        """Metrics; ``treated`` has True of the dropped tokens, or each token's weight, or the coefficient."""
        target, entropy, n = self.target(self.calls), mean([t.H for t in tokens]), len(tokens)
        self.calls += 1
        self.entropy = entropy
        error = target - entropy if n and math.isfinite(entropy) else 0.0
        told = {"target_entropy": target, "entropy": entropy, "measured_change": self.measured}
        if self.method == "bonus":
            wanted = clamp(self.kp * error, -self.max_change, self.max_change)
            self.coef = clamp(self.coef + 0.005 * ((error > 0) - (error < 0)), 0.0, 1.0)
            self.treated = self.coef
            saturated = float(self.coef == 1 and error > 0) - float(self.coef == 0 and error < 0)
            self.predicted = NAN
            return {**told, "wanted_change": wanted, "planned_change": NAN, "gain": NAN, "saturated": saturated}
        raw = self.kp * error + self.ki * self.integral
        wanted = clamp(raw, -self.max_change, self.max_change)
        clips = {k: x for k, x in self.options.items() if k in ("low", "high", "dual")}
        scores = [t.decrease(**clips) for t in tokens]
        known = [x if math.isfinite(x) else 0.0 for x in scores]
        positive, free = math.fsum(max(x, 0) for x in known), math.fsum(known)
        size = positive * lr * updates / max(n, 1)
        if size > 0:
            self.unit = 0.02 / size if self.unit != self.unit else clamp(0.02 / size, self.unit / 2, 1.02 * self.unit)
        unit = 0.0 if self.unit != self.unit else self.unit
        self.gain = clamp((unit * self.products + 1e-4) / (unit**2 * self.squares + 1e-4), 0.05, 20.0)
        limit = -wanted * n / max(self.gain * unit * lr * updates, 1e-200)
        if self.method == "weight":
            mine = math.fsum(max(x, 0) for x, t in zip(known, tokens, strict=True) if not t.excluded)
            w = clamp((limit - (free - mine)) / mine, 0.0, 1.0) if mine > 0 else 1.0
            self.treated = [w if x > 0 and not t.excluded else 1.0 for x, t in zip(scores, tokens, strict=True)]
            left = math.fsum(x * w for x, w in zip(scores, self.treated, strict=True))
            touched = sum(w != 1 for w in self.treated)
        else:
            exclude, index = torch.tensor([t.excluded for t in tokens]), torch.tensor([t.index for t in tokens])
            score = torch.tensor(scores, dtype=torch.float64)
            dropped = budget(score, limit=limit, exclude=exclude, token_index=index).tolist()
            if "ratio" in self.options:
                cap = max(1, math.floor(self.options["ratio"] * n))
                capped = largest(tokens, scores, cap, [x > 0 for x in scores])
                dropped = [a and b for a, b in zip(dropped, capped, strict=True)]
            self.treated = dropped
            left = math.fsum(x for x, gone in zip(scores, dropped, strict=True) if not gone)
            touched = sum(dropped)
        self.predicted = -left / max(n, 1) * lr * updates
        close = 1e-6 * math.fsum(map(abs, known))
        saturated = 0.0
        if raw > self.max_change or left > limit + close:
            saturated = 1.0
        elif raw < -self.max_change or free < limit - close:
            saturated = -1.0
        told |= {"planned_change": self.gain * unit * self.predicted, "gain": self.gain, "saturated": saturated}
        if saturated * error <= 0:
            self.integral += error
        return {**told, "wanted_change": wanted, "touched": float(touched)}

    def observe(self, entropies: list[float]) -> None:
        self.measured = mean(entropies) - self.entropy
        odd = self.method == "bonus" or abs(self.predicted) * self.unit > 16 * 0.02
        if odd or not (math.isfinite(self.measured) and math.isfinite(self.predicted)):
            return
        self.squares = 0.98 * self.squares + self.predicted**2
        self.products = 0.98 * self.products + self.predicted * self.measured
