"""Controllers: memory over steps against a hand calculation, seeds that count, states; methods from outside; errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from control_cases import added, micro, one
from entropy_kernels.methods import EFFECTS

NAN = math.nan


def batch_of(entropy: float, advantages: list[float] | None = None, **known: Any) -> ek.TokenBatch:
    """Two sequences whose mean entropy is this; NaN in padding."""
    spread = torch.tensor([[0.5, 1.5, NAN], [1.0, NAN, NAN]])
    mask = ~spread.isnan()
    given = torch.tensor([1.0, -1.0] if advantages is None else advantages)
    return ek.TokenBatch(spread - 2, None, given, mask, entropy=entropy * spread.double(), **known)


def nothing() -> ek.TokenBatch:
    x = torch.full((2, 3), NAN)
    return ek.TokenBatch(x, None, torch.ones(2), torch.zeros(2, 3), entropy=x)


ENTROPIES = [0.5, 0.1, 0.1, 0.25, 0.4, 0.1, 0.1]


def test_adaptive_entropy_over_steps() -> None:
    """2505.22312, Eq. 3.2: the coefficient of before acts, where the present H <= target; then it moves by delta."""
    controller = ek.Controller("adaptive_entropy", target=0.25, delta=0.1, coef=0.05, coef_max=0.3)
    coef, acted = 0.05, []
    for entropy in ENTROPIES:
        expected = coef if entropy <= 0.25 else 0.0
        decided = controller.step(batch_of(entropy))
        assert float(decided.entropy_coef) == pytest.approx(expected)
        assert torch.equal(decided.metrics["entropy_coef"], decided.entropy_coef)
        coef = min(max(coef + (0.1 if entropy <= 0.25 else -0.1), 0.0), 0.3)
        assert float(controller.memory["coef"]) == pytest.approx(coef)
        acted.append(expected)
    assert acted == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.0, 0.2, 0.3])
    defaults = ek.Controller("adaptive_entropy")  # 0, up by 0.005
    assert [round(float(defaults.step(batch_of(0.1)).entropy_coef), 6) for _ in range(3)] == [0, 0.005, 0.01]


def zeta_after(zeta: float, entropy: float, target: float, least: float, most: float) -> float:
    """SkyRL's controller of REPO's zeta, in its own words: towards the target double, away from it halve, then turn."""
    if entropy > target:
        if zeta >= 0:
            return -least if zeta / 2 < least else zeta / 2
        return max(-most, 2 * zeta)
    if entropy < target:
        if zeta > 0:
            return min(most, 2 * zeta)
        return least if zeta == 0 or zeta / 2 > -least else zeta / 2
    return zeta


def test_repo_with_a_target() -> None:
    course = [0.1] * 4 + [0.9] * 9 + [0.25] * 2 + [0.1] * 9
    controller = ek.Controller("repo", target=0.25, zeta=0.02, zeta_min=0.005, zeta_max=0.08)
    zeta, signs = 0.02, set()
    for entropy in course:
        batch = batch_of(entropy)
        decided = controller.step(batch)
        right = [[1 - zeta * lp for lp in (-1.5, -0.5)], [-1 * (1 + zeta * -1.0)]]
        assert decided.advantages[0, :2].tolist() == pytest.approx(right[0], abs=1e-6)
        assert decided.advantages[1, :1].tolist() == pytest.approx(right[1], abs=1e-6)
        zeta = zeta_after(zeta, entropy, 0.25, 0.005, 0.08)
        signs.add(math.copysign(1, zeta))
        assert {*controller.memory} == {"zeta"} and float(controller.memory["zeta"]) == pytest.approx(zeta, rel=1e-12)
    assert signs == {1, -1} and zeta == 0.08
    for start in (0.0, 0.005, -0.005, 0.0099, -0.0099, 0.01, 0.08, -0.08):
        for entropy in (0.1, 0.25, 0.9):
            controller = ek.Controller("repo", target=0.25, zeta=start, zeta_min=0.005, zeta_max=0.08)
            controller.step(batch_of(entropy))
            assert float(controller.memory["zeta"]) == zeta_after(start, entropy, 0.25, 0.005, 0.08)


def test_repo_with_its_initial_entropy_and_without_a_target() -> None:
    controller = ek.Controller("repo", target="initial", zeta=0.01)
    controller.step(nothing())  # which has none
    assert controller.state_dict()["memory"]["zeta"] == 0.01
    zetas = []
    for entropy in (0.4, 0.2, 0.2, 0.9, 0.4):
        controller.step(batch_of(entropy))
        zetas.append(float(controller.memory["zeta"]))
        assert float(controller.memory["initial_entropy"]) == pytest.approx(0.4)
    assert zetas == [0.01, 0.02, 0.04, 0.02, 0.02]
    fixed = ek.Controller("repo", zeta=0.3)
    first = fixed.step(batch_of(0.4)).advantages
    assert torch.equal(first, fixed.step(batch_of(0.1)).advantages) and float(fixed.memory["zeta"]) == 0.3
    # a target that the caller moves
    target = torch.tensor(0.3)
    moving = ek.Controller("repo", target=target, zeta=0.01)
    moving.step(batch_of(0.2))
    target.fill_(0.1)
    moving.step(batch_of(0.2))
    assert float(moving.memory["zeta"]) == 0.01


def entrocraft_range(step: int, total: int | None, schedule: str) -> tuple[float, float]:
    if total is None or schedule == "constant":
        return 0.6, 0.7
    x = min(step / total, 1)
    x = (1 - math.cos(math.pi * x)) / 2 if schedule == "cosine" else x
    return 0.6 + (0.1 - 0.6) * x, 0.7 + (0.2 - 0.7) * x


@pytest.mark.parametrize("total", (None, 3, 5))
@pytest.mark.parametrize("schedule", ("linear", "cosine", "constant"))
def test_entrocraft_over_steps(schedule: str, total: int | None) -> None:
    controller = ek.Controller("entrocraft", schedule=schedule, total_steps=total)
    for step in range(6):
        low, high = entrocraft_range(step, total, schedule)
        assert float(controller.memory.get("step", torch.tensor(0.0))) == step
        kept = []
        for entropy in (low - 1e-6, low + 1e-6, high - 1e-6, high + 1e-6):
            probe = ek.Controller("entrocraft", schedule=schedule, total_steps=total)
            probe.load_state_dict(controller.state_dict())
            advantages = probe.step(batch_of(entropy, [2.0, -3.0])).advantages
            kept.append((float(advantages[0, 1]), float(advantages[1, 0])))
        assert kept == [(0, -3), (2, -3), (2, -3), (2, 0)]
        controller.step(batch_of(0.3, [0.0, 0.0]))


@pytest.mark.parametrize("entropy", (NAN, math.inf, None))
@pytest.mark.parametrize(
    ("method", "options"),
    [("adaptive_entropy", {"coef": 0.05}), ("repo", {"target": 0.3}), ("repo", {"target": "initial"})],
)
def test_a_batch_without_a_finite_entropy_changes_no_memory(
    method: str, options: dict[str, Any], entropy: float | None
) -> None:
    controller = ek.Controller(method, **options)
    controller.step(batch_of(0.1))
    before = controller.state_dict()["memory"]
    controller.step(nothing() if entropy is None else batch_of(entropy))
    assert controller.state_dict()["memory"] == before
    controller.step(batch_of(0.05))
    assert controller.state_dict()["memory"] != before


def test_a_metric_added_to_one_control_is_not_in_the_next() -> None:
    first, second = added([micro(2, 5)] * 2).control("clip_b")
    first.metrics["loss"] = torch.zeros(())
    assert "loss" not in second.metrics


def test_a_step_that_fails_counts_no_seed() -> None:
    controller = ek.Controller("clip_cov")
    unknown = ek.Controller(own(needs=("entropy",), draws=True))
    given = micro(2, 5)
    lacking = {name: x for name, x in given.items() if name != "entropy"}
    fails(ValueError, "entropy: expected a tensor in the TokenBatch", unknown.step, one(lacking))
    assert unknown.state_dict()["calls"] == 0
    unknown.step(one(given))
    controller.step(one(given))
    assert unknown.state_dict()["calls"] == controller.state_dict()["calls"] == 1


@pytest.mark.parametrize(
    ("controller", "needs", "effect"),
    [
        (ek.Controller("clip_cov"), (), "dropped"),
        (ek.Controller("clip_cov", preset="paper"), (), "detached"),
        (ek.Controller("exact_cov", effect="token_weight"), ("vocab_covariance",), "token_weight"),
        (ek.Controller("erc"), ("entropy", "old_entropy"), "dropped"),
        (ek.Controller("repo"), (), "advantages"),
        (ek.Controller("repo", center=True), ("entropy",), "advantages"),
        (ek.Controller("repo", target=torch.tensor(0.3)), ("entropy",), "advantages"),
        (ek.TargetEntropy(0.4), ("entropy", "vocab_covariance"), "dropped"),
        (ek.TargetEntropy(0.4, method="weight"), ("entropy", "vocab_covariance"), "token_weight"),
        (ek.TargetEntropy(0.4, method="bonus"), ("entropy",), "entropy_coef"),
    ],
)
def test_a_controller_says_what_it_reads_and_does(
    controller: ek.Controller, needs: tuple[str, ...], effect: str
) -> None:
    """A trainer asks before it computes statistics. Without one of them a step is an error, with them alone it is none,
    and the control has the effect and no other."""
    assert {*controller.needs} == {*needs} and controller.effect == effect
    lr = {"lr": 0.1} if isinstance(controller, ek.TargetEntropy) else {}
    given = {name: x for name, x in micro(2, 5).items() if name in ("logprob", "advantages", "mask", *needs)}
    for name in needs:
        lacking = {key: x for key, x in given.items() if key != name}
        fails(ValueError, f"{name}: expected a tensor in the TokenBatch", controller.step, one(lacking), **lr)
    decided = controller.step(one(given), **lr)
    found = {name for name in EFFECTS if getattr(decided, name) is not None}
    assert found == {effect}


def test_seeds_are_counted() -> None:
    """Each step draws with the next seed; the same as ek.control with it."""
    given = micro(4, 30, 1)
    controller = ek.Controller("random", seed=40, ratio=0.2)
    masks = [controller.step(one(given)).dropped for _ in range(3)]
    for seed, mask in enumerate(masks, 40):
        assert torch.equal(mask, ek.control("random", one(given), seed=seed, ratio=0.2).dropped)
    assert not torch.equal(masks[0], masks[1]) and controller.state_dict()["calls"] == 3
    still = ek.Controller("kl_cov")
    still.step(one(given))
    assert still.state_dict() == {"calls": 0, "memory": {}}
    counter = ek.SeedCounter(40)
    again = [ek.control("random", one(given), seed=counter, ratio=0.2).dropped for _ in range(3)]
    assert all(map(torch.equal, masks, again))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adaptive_entropy", {"delta": 0.03}), ("repo", {"target": 0.3, "zeta": 0.02}),
        ("repo", {"target": "initial", "zeta": 0.02}), ("entrocraft", {"total_steps": 6}),
        ("random", {"k": 1, "seed": 7}), ("clip_b", {}),
    ],
)  # fmt: skip
def test_a_run_goes_on_from_its_state(method: str, options: dict[str, Any]) -> None:
    def told(decided: ek.Control) -> list[float]:
        return [x.double().sum().item() for x in decided[:-1] if isinstance(x, Tensor)]

    whole = ek.Controller(method, **options)
    course = [0.35, 0.1, 0.1, 0.9, 0.9, 0.5, 0.15, 0.15]
    expected = [told(whole.step(batch_of(entropy))) for entropy in course]
    for stop in range(len(course)):
        first = ek.Controller(method, **options)
        found = [told(first.step(batch_of(entropy))) for entropy in course[:stop]]
        state = json.loads(json.dumps(first.state_dict()))
        second = ek.Controller(method, **options)
        second.load_state_dict(state)
        assert second.state_dict() == first.state_dict()
        assert found + [told(second.step(batch_of(entropy))) for entropy in course[stop:]] == expected
    assert second.state_dict() == whole.state_dict()


STATES: list[tuple[str, Any, str]] = [
    ("repo", None, "state: expected a dict of calls .* and memory .*, got NoneType"),
    ("repo", {}, r"state: .* got \[\]"),
    ("repo", {"calls": 1}, r"state: .* got \['calls'\]"),
    ("repo", {"calls": 1, "memory": {}, "more": 2}, r"state: .* got \['calls', 'memory', 'more'\]"),
    ("repo", {"calls": 1, "memory": [1]}, "state: "),
    ("repo", {"calls": 1.5, "memory": {}}, "calls: expected an int, got float"),
    ("clip_cov", {"calls": -1, "memory": {}}, "calls: expected >= 0, got -1"),
    ("repo", {"calls": 1, "memory": {"zeta": "a"}}, "zeta: expected a number, got str"),
    ("repo", {"calls": 1, "memory": {"coef": 0.1}}, "memory: expected names of options .*zeta.*, got coef"),
    ("clip_b", {"calls": 1, "memory": {"mu": 0.1}}, "memory: expected none of a method without memory, got mu"),
]


@pytest.mark.parametrize(("method", "state", "message"), STATES)
def test_a_wrong_state_is_named_and_changes_nothing(method: str, state: Any, message: str) -> None:
    controller = ek.Controller(method)
    before = controller.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        controller.load_state_dict(state)
    assert controller.state_dict() == before


def test_a_controller_of_a_selection_batch() -> None:
    given = micro(6, 20, 2)
    batch = added([{name: x[i : i + 3] for name, x in given.items()} for i in (0, 3)])
    for method, options in (("repo", {"target": 0.3}), ("random", {"ratio": 0.3}), ("adaptive_entropy", {"coef": 0.1})):
        of_parts, of_whole = ek.Controller(method, **options), ek.Controller(method, **options)
        for _ in range(3):
            many, alone = of_parts.step(batch), of_whole.step(one(given))
            for name in ("dropped", "advantages"):
                if getattr(alone, name) is not None:
                    assert torch.equal(torch.cat([getattr(x, name) for x in many]), getattr(alone, name))
            assert of_parts.state_dict() == of_whole.state_dict()
    assert ek.Controller("kl_cov").step(ek.SelectionBatch()) == []
    with pytest.raises(TypeError, match=r"batch: expected an ek.TokenBatch or ek.SelectionBatch, got list"):
        ek.Controller("kl_cov").step([given])


# ---- a method from outside -----------------------------------------------------------------------------------------


def surprise(batch: Any, options: Any) -> Tensor:
    return -batch["logprob"] - batch["entropy"]


def above(batch: Any, score: Tensor, options: Any) -> Tensor:
    return score > batch.moments(score).mean + options.margin


def wider(batch: Any, options: Any) -> dict[str, Tensor]:
    return {"margin": options.margin + torch.ones_like(batch["logprob"].sum()) * options.step}


def own(**changes: Any) -> ek.Method:
    given: dict[str, Any] = {
        "score": surprise, "rule": above, "effects": ("dropped", "detached", "token_weight"), "needs": ("entropy",),
        "defaults": {"margin": 0.0, "step": 0.25, "weight": 0.5}, "remember": wider,
    }  # fmt: skip
    return ek.Method(**{**given, **changes})


def test_a_method_from_outside() -> None:
    given = micro(5, 20, 3)
    method = own()
    score = torch.where(given["mask"], -given["logprob"] - given["entropy"], 0).double()
    mean = score.sum() / given["mask"].sum()

    def right(margin: float) -> Tensor:
        return (score > mean + margin) & given["mask"]

    assert torch.equal(ek.control(method, one(given)).dropped, right(0.0))
    assert torch.equal(ek.control(method, one(given), effect="detached", margin=0.3).detached, right(0.3))
    weight = ek.control(method, one(given), effect="token_weight", margin=torch.tensor(0.3)).token_weight
    assert torch.equal(weight, torch.where(right(0.3), 0.5, 1.0))
    batch = added([{name: x[rows] for name, x in given.items()} for rows in (slice(0, 2), slice(2, 5))])
    assert torch.equal(torch.cat([x.dropped for x in batch.control(method)]), right(0.0))
    controller = ek.Controller(method, margin=0.1)
    for step in range(3):
        assert torch.equal(torch.cat([x.dropped for x in controller.step(batch)]), right(0.1 + 0.25 * step))
    assert controller.state_dict() == {"calls": 0, "memory": {"margin": pytest.approx(0.85)}}
    assert not torch.equal(right(0.0), right(0.85)) and "surprise" not in ek.methods()


def fails(error: type[Exception], message: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=message):
        function(*args, **options)


def test_bad_rows() -> None:
    fails(TypeError, "score: expected a function, got NoneType", own, score=None)
    fails(TypeError, "rule: expected a function, got str", own, rule="top")
    for effects in ((), ("drop",), ("dropped", "weight"), "dropped", ["dropped"]):
        fails(ValueError, "effects: expected a tuple of some of dropped, detached, penalized", own, effects=effects)
    fails(ValueError, "defaults: expected options that are no arguments of ek.control, got seed", own,
          defaults={"seed": 1})  # fmt: skip
    fails(TypeError, "needs: expected a tuple, got str", own, needs="entropy")
    fails(TypeError, "bounds: expected a dict, got list", own, bounds=[])
    fails(TypeError, r"presets\['paper'\]: expected a dict, got float", own, presets={"paper": 0.1})
    fails(ValueError, "defaults: expected kl_coef beside the effect 'penalized'", own, effects=("penalized",))
    batch = one(micro(2, 5))
    for value, got in (
        (lambda b, s, o: s, r"bool of \(10,\) for the effect 'dropped', got torch.float64 of \(10,\)"),
        (lambda b, s, o: s.sum() > 0, r"got torch.bool of \(\)"),
        (lambda b, s, o: True, "got bool"),
        (lambda b, s, o: None, "got NoneType"),
    ):
        fails(TypeError, f"rule: expected to return {got}" if "for" in got else got, ek.control, own(rule=value), batch)
    shift = own(effects=("advantages",), rule=lambda b, s, o: s > 0)
    fails(TypeError, r"rule: .* floating point of \(10,\) for the effect 'advantages', got torch.bool", ek.control,
          shift, batch)  # fmt: skip
    coef = own(effects=("entropy_coef",), rule=lambda b, s, o: s)
    fails(TypeError, r"rule: .* floating point of \(\) for the effect 'entropy_coef'", ek.control, coef, batch)
    fails(TypeError, "rule: expected numbers, or a bool beside an option weight", ek.control,
          own(effects=("token_weight",), rule=lambda b, s, o: s > 0, defaults={}), batch)  # fmt: skip
    for row in (own(needs=("entrop",)), own(score=lambda b, o: b["entrop"])):
        fails(KeyError, "entrop: expected one of logprob, .*entropy, .*ratio, .*, got entrop", ek.control, row, batch)
    forgets = ek.Controller(own(remember=lambda b, o: {"colour": torch.zeros(())}))
    fails(ValueError, "remember: expected names of options .*, got colour", forgets.step, batch)


NUMBERS: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("clip_covv", ValueError, "method: expected one of clip_cov, .*got 'clip_covv'; did you mean 'clip_cov'", {}),
    ("entropy_adv", ValueError, "did you mean 'entropy_advantage'", {}),
    ("zzz", ValueError, "or an ek.Method, got 'zzz'$", {}),
    (3, ValueError, "method: .* got 3", {}),  # type: ignore[list-item]
    ("clip_b", TypeError, r"nu: expected an option of clip_b \(clip_low, .*mu.*\), got nu", {"nu": 2}),
    ("clip_b", ValueError, r"mu: expected a number within \[0.0, inf\], got -1", {"mu": -1}),
    ("clip_b", ValueError, "mu: .* got nan", {"mu": NAN}),
    ("clip_b", TypeError, "mu: expected a number, got None", {"mu": None}),
    ("clip_b", TypeError, "mu: expected a number, got str", {"mu": "2"}),
    ("clip_b", TypeError, "mu: expected a number, got bool", {"mu": True}),
    ("clip_b", ValueError, r"mu: expected a number or a 0-d tensor, got torch.float32 of \(1,\)",
     {"mu": torch.ones(1)}),
    ("clip_b", ValueError, "mu: .* got torch.bool", {"mu": torch.tensor(True)}),
    ("clip_b", ValueError, "mu: expected on cpu or the CPU, got meta", {"mu": torch.ones((), device="meta")}),
    ("clip_b", ValueError, "effect: expected one of 'dropped', 'detached', got 'penalized'", {"effect": "penalized"}),
    ("clip_b", ValueError, "effect: .* got None", {"effect": None}),
    ("clip_v", ValueError, r"ratio: expected a fraction in \(0, 1\], got 2", {"ratio": 2}),
    ("clip_v", ValueError, "ratio, k: expected one of them, got both", {"ratio": 0.1, "k": 2}),
    ("clip_v", ValueError, "ratio, k: expected one of them, got neither", {"ratio": None}),
    ("clip_v", ValueError, "k: expected >= 0, got -1", {"k": -1}),
    ("clip_v", TypeError, "k: expected an int, got float", {"k": 1.5}),
    ("clip_v", TypeError, "at_least_one: expected a bool, got int", {"at_least_one": 1}),
    ("clip_v", TypeError, "at_least_one: expected a bool, got Tensor", {"at_least_one": torch.tensor(1.0)}),
    ("clip_cov", ValueError, "preset: expected one of 'verl', 'paper', got 'trl'", {"preset": "trl", "seed": 1}),
    ("clip_cov", ValueError, "preset: .* got Tensor", {"preset": torch.ones(()), "seed": 1}),
    ("clip_cov", ValueError, "seed: expected an int or a 0-d int64 tensor for clip_cov, which draws tokens", {}),
    ("clip_cov", TypeError, "seed: .* got float", {"seed": 1.5}),
    ("clip_cov", ValueError, "low: expected (<=|<) high, got low=5.*high=2", {"low": 5.0, "high": 2.0, "seed": 1}),
    ("clip_cov", ValueError, "band: expected one of 'absolute', 'quantile', got 'shares'", {"band": "shares",
     "seed": 1}),
    ("clip_cov", ValueError, r"high: expected a share in \[0, 1\]", {"band": "quantile", "low": 0.5, "seed": 1}),
    ("random", ValueError, "seed: ", {}),
    ("exact_cov", ValueError, "budget, limit, share: expected one of them", {"budget": 0.1, "share": 0.5}),
    ("exact_cov", ValueError, "share: ", {"share": 1.5}),
    ("exact_cov", TypeError, "limit: expected a number, got str", {"limit": "0"}),
    ("erc", TypeError, "low: expected a number, got str", {"low": "a"}),
    ("erc", TypeError, "low: expected a number, got list", {"low": [1]}),
    ("erc", ValueError, "low: .* got nan", {"low": NAN}),
    ("erc", ValueError, "low: expected <= high, got low=2.0, high=1.05", {"low": 2.0}),
    ("steer", ValueError, r"w_min: expected a number within \[1e-06, 1.0\], got 1.5", {"w_min": 1.5}),
    ("steer", ValueError, "map: expected one of 'exponential', 'linear', got 'cubic'", {"map": "cubic"}),
    ("top_entropy", ValueError, "rho: .* got 0", {"rho": 0}),
    ("top_entropy", ValueError, "rho: .* got 1.1", {"rho": 1.1}),
    ("repo", ValueError, "target: expected one of 'initial', got 'first'", {"target": "first"}),
    ("repo", ValueError, "zeta_min: .* got 0", {"zeta_min": 0.0}),
    ("repo", ValueError, "zeta_min: expected <= zeta_max, got zeta_min=0.1, zeta_max=0.05", {"zeta_min": 0.1}),
    ("repo", ValueError, "zeta_max: expected a number within .* the range of torch.float64, got an int of 1329 bits",
     {"zeta_max": 10**400}),
    ("adaptive_entropy", ValueError, "coef_min: expected <= coef_max", {"coef_min": 2.0}),
    ("adaptive_entropy", ValueError, "delta: .* got -0.1", {"delta": -0.1}),
    ("entrocraft", ValueError, "low: expected <= high, got low=0.8, high=0.7", {"low": 0.8}),
    ("entrocraft", ValueError, "schedule: expected one of 'linear', 'cosine', 'constant'", {"schedule": "step"}),
    ("entropy_advantage", ValueError, "kappa: .* got 0", {"kappa": 0}),
    ("entrocraft", ValueError, "total_steps: expected a number within .* got 0", {"total_steps": 0}),
    ("entrocraft", ValueError, "total_steps: .* got -5", {"total_steps": -5}),
    ("entrocraft", ValueError, "step: .* got inf", {"step": math.inf, "total_steps": 9}),
    ("steer", ValueError, "w_min: expected <= w_max, got w_min=0.8, w_max=0.5", {"w_max": 0.5, "map": "linear"}),
    ("repo", ValueError, "floor: .* got 1.0", {"floor": 1.0}),
    ("exact_cov", ValueError, "clip_low: .* got -1", {"clip_low": -1}),
    ("clip_b", ValueError, "clip_high: .* got -0.1", {"clip_high": -0.1}),
    ("steer", ValueError, "dual_clip: .* got 0.5", {"dual_clip": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "error", "message", "options"), NUMBERS)
def test_option_errors(method: str, error: type[Exception], message: str, options: dict[str, Any]) -> None:
    """From ek.control, SelectionBatch.control and, but for what needs the tokens, Controller as it is made."""
    given = micro(2, 5)
    fails(error, message, ek.control, method, one(given), **options)
    fails(error, message, added([given]).control, method, **options)
    if not message.startswith(("ratio", "k:", "seed", "high", "mu: expected on", "budget", "share", "limit")):
        options = {name: x for name, x in options.items() if name != "seed"}
        fails(error, message, ek.Controller, method, **options)


def test_missing_statistics_are_named() -> None:
    given = micro(2, 5)
    for method, row in ek.methods().items():
        for field in row.needs:
            lacking = {name: x for name, x in given.items() if name != field}
            message = f"{field}: expected a tensor in the TokenBatch, which this method needs, got None"
            fails(ValueError, message, ek.control, method, one(lacking))
    lacking = {name: x for name, x in given.items() if name != "entropy"}
    for options in ({"center": True}, {"target": 0.3}, {"target": "initial"}):
        fails(ValueError, "entropy: expected a tensor in the TokenBatch", ek.control, "repo", one(lacking), **options)
    fails(TypeError, "batch: expected an ek.TokenBatch, got dict", ek.control, "clip_b", given)
    fails(TypeError, "batch_group: expected a torch.distributed", ek.control, "clip_b", one(given), batch_group=1)
    fails(TypeError, "batch_group: expected a torch.distributed", ek.Controller, "clip_b", batch_group="world")
    fails(TypeError, "seed: expected an int", ek.Controller, "random", seed=1.5)
    fails(ValueError, "backend: expected one of", ek.control, "kl_cov", one(given), backend="gpu")


X = torch.zeros(2, 3)
BATCHES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "logprob: expected a torch.Tensor, got list", {"logprob": [1.0]}),
    (TypeError, "logprob: expected a floating-point dtype, got torch.int64", {"logprob": X.long()}),
    (ValueError, r"old_logprob: expected logprob's shape \(2, 3\), got \(3, 2\)", {"old_logprob": X.t()}),
    (ValueError, r"advantages: expected logprob's shape .* got \(3,\)", {"advantages": X[0]}),
    (TypeError, "advantages: expected a torch.Tensor, got NoneType", {"advantages": None}),
    (ValueError, "mask: expected a mask of 0 and 1, got 2.0", {"mask": X + 2}),
    (ValueError, r"mask: .* got \(3, 2\)", {"mask": X.t()}),
    (ValueError, r"entropy: expected logprob's shape \(2, 3\), got \(2, 1\)", {"entropy": X[:, :1]}),
    (TypeError, "vocab_covariance: expected a floating-point dtype", {"vocab_covariance": X.int()}),
    (TypeError, "collision: expected a torch.Tensor, got float", {"collision": 1.0}),
    (ValueError, "old_entropy: expected on the device of logprob, cpu, got meta", {"old_entropy": X.to("meta")}),
    (ValueError, r"coefficient: expected logprob's shape .* got \(3,\)", {"coefficient": X[0]}),
    (ValueError, "temperature: expected > 0, got 0", {"temperature": 0.0}),
    (ValueError, "temperature: expected > 0, got nan", {"temperature": NAN}),
    (TypeError, "temperature: expected a number, got str", {"temperature": "1"}),
    (ValueError, r"temperature: .* got \(3,\)", {"temperature": X[0] + 1}),
    (ValueError, "cu_seqlens: expected numbers that rise from 0", {"cu_seqlens": torch.tensor([0, 5])}),
    (TypeError, "token_index: expected dtype torch.int64", {"token_index": X}),
    (ValueError, "exclude: expected a mask of 0 and 1", {"exclude": X + 0.5}),
]


@pytest.mark.parametrize(("error", "message", "change"), BATCHES)
def test_batch_errors(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    given = {"logprob": X, "old_logprob": X, "advantages": X, "mask": None, **change}
    fails(error, message, one, given)
    positional = [given.pop(name) for name in ("logprob", "advantages", "mask")]
    batch = ek.SelectionBatch()
    fails(error, message, batch.add, *positional, **given)
    assert len(batch) == 0


def test_fields_and_figures_of_the_whole_batch() -> None:
    """What a row from outside may read."""
    given = micro(3, 8, 2)
    seen: dict[str, Any] = {}

    def look(batch: Any, options: Any) -> Tensor:
        for name in ("ratio", "covariance", "self_information", "coefficient", "entropy", "temperature"):
            seen[name] = batch[name]
        seen["mask"], seen["clipped"] = batch.mask, batch.clipped(0.2, 0.2)
        return batch["logprob"]

    ek.control(own(score=look), one(given))
    mask = given["mask"].reshape(-1)
    assert all(x.shape == mask.shape and not x[~mask].any() for x in seen.values())
    p = given["logprob"].double().exp()
    right = {
        "ratio": (given["logprob"].double() - given["old_logprob"].double()).exp(),
        "self_information": p * (given["logprob"].double() + given["entropy"].double()),
        "coefficient": torch.full((3, 8), 1 / int(mask.sum()), dtype=torch.float64),
        "entropy": given["entropy"].double(),
    }  # fmt: skip
    for name, x in right.items():
        torch.testing.assert_close(seen[name][mask], x.reshape(-1)[mask], rtol=1e-13, atol=0)
