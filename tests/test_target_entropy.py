"""TargetEntropy: against a loop in plain Python; over splits and ranks; on plants of its own; states; every error."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from control_cases import added, micro, one, tokens_of, valid
from reference_target import Loop

NAN = math.nan
pytestmark = pytest.mark.filterwarnings("ignore:target. .* is above the entropy")


def told(decided: ek.Control) -> dict[str, float]:
    return {name: float(x) for name, x in decided.metrics.items()}


def assert_equal(found: dict[str, float], right: dict[str, float], where: Any) -> None:
    for name, x in right.items():
        assert found[name] == pytest.approx(x, rel=1e-9, abs=1e-13, nan_ok=True), (where, name)


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("exact_cov", {}, {}),
    ("exact_cov", {"ratio": 0.1, "kp": 0.5, "max_change": 0.01}, {"ratio": 0.1}),
    ("exact_cov", {"effect": "detached", "clip_low": None, "clip_high": 0.1, "dual_clip": 1.2},
     {"low": None, "high": 0.1, "dual": 1.2}),
    ("weight", {"ki": 0.1}, {}),
    ("bonus", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "options", "known"), OPTIONS)
def test_the_loop_of_the_reference(method: str, options: dict[str, Any], known: dict[str, Any], seed: int) -> None:
    """Over steps with other batches, learning rates and updates, two micro-batches each."""
    loop = {name: x for name, x in options.items() if name in ("kp", "ki", "max_change")}
    ours = ek.TargetEntropy([(2, 0.4), (9, 1.0)], method=method, **options)
    right = Loop(lambda step: 0.4 + 0.6 * min(max((step - 2) / 7, 0.0), 1.0), method, options=known, **loop)
    g = torch.Generator().manual_seed(seed)
    seen = set()
    for step in range(12):
        micros = [micro(3, 9, 100 * seed + 2 * step + i) for i in range(2)]
        for each in micros:
            each["exclude"] = torch.rand(3, 9, generator=g) < 0.1
            each["coefficient"] = torch.rand(3, 9, generator=g)
            each["entropy"] = each["entropy"] + 0.15 * (step % 5 - 2)
        lr, updates = 1e-3 * 2.0 ** (step % 3), 1 + step % 2
        decided = ours.step(added(micros), lr=lr, updates=updates)
        expected = right.step(tokens_of(micros), lr, updates)
        assert_equal(told(decided[0]), expected, step)
        seen.add(expected["saturated"])
        effect = "token_weight" if method == "weight" else "detached" if "effect" in options else "dropped"
        if method == "bonus":
            assert all(float(x.entropy_coef) == pytest.approx(right.treated) for x in decided)
        else:
            treated = valid([getattr(x, effect) for x in decided], micros)
            assert treated == (pytest.approx(right.treated, rel=1e-6) if method == "weight" else right.treated)
        after = [x["entropy"] + 0.02 * torch.randn(3, 9, generator=g) for x in micros]
        ours.observe(after)
        right.observe(valid(after, micros))
        memory = ours.state_dict()["memory"]
        for name, x in (("integral", right.integral), ("gain", right.gain), ("coef", right.coef)):
            assert memory.get(name, x) == pytest.approx(x, rel=1e-9, abs=1e-13)
    assert len(seen) > 1, seen


@pytest.mark.parametrize("method", ("exact_cov", "weight", "bonus"))
def test_a_run_goes_on_from_its_state(method: str) -> None:
    def run(controller: ek.TargetEntropy, first: int, last: int) -> list[dict[str, float]]:
        found = []
        for step in range(first, last):
            given = micro(4, 20, step)
            found.append(told(controller.step(one(given), lr=1e-3)))
            controller.observe(given["entropy"] * 0.98)
        return found

    def new() -> ek.TargetEntropy:
        return ek.TargetEntropy(lambda step: 0.6 + 0.05 * step, method=method)

    whole = new()
    expected = run(whole, 0, 7)
    for stop in range(7):
        first, second = new(), new()
        found = run(first, 0, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert str(second.state_dict()) == str(first.state_dict())
        found += run(second, stop, 7)
        assert str(found) == str(expected)
    assert second.state_dict() == whole.state_dict()
