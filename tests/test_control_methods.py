"""Every method of control against its paper (reference_control.py): masks exactly, values to 1e-6."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
import reference_control as reference
from control_cases import Micro, added, micro, one, tokens_of, valid
from loss_cases import assert_same, differentiated

NAN, INF = math.nan, math.inf
Case = tuple[str, dict[str, Any], Callable[[list[reference.Token]], Any]]


def case(method: str, options: dict[str, Any] | None = None, **told: Any) -> Any:
    """``told``: what the reference is told where it is not the options."""
    options = options or {}
    function = reference.METHODS[method]
    return pytest.param(method, options, lambda tokens: function(tokens, **(told or options)), id=f"{method} {options}")


def weights(options: dict[str, Any]) -> Any:
    return pytest.param(
        "exact_cov", {"effect": "token_weight", **options}, reference.weighed(**options), id=f"weight {options}"
    )


ROWS = [
    case("clip_cov", {"seed": 3}),
    case("clip_cov", {"seed": 3, "ratio": 0.1, "low": 0.1, "high": 3.0}),
    case("clip_cov", {"seed": 2**63 + 5, "k": 5, "low": 0.3, "high": 0.9, "band": "quantile"}),
    case("clip_cov", {"seed": 3, "preset": "paper"}, seed=3, paper=True),
    case("clip_cov", {"seed": 3, "preset": "paper", "k": 7, "low": 0.0}, seed=3, paper=True, k=7, low=0.0),
    case("kl_cov"),
    case("kl_cov", {"ratio": 0.1}),
    case("kl_cov", {"preset": "paper"}, paper=True),
    case("kl_cov", {"k": 4}),
    case("exact_cov"),
    case("exact_cov", {"ratio": 0.3}),
    case("exact_cov", {"k": 6}),
    case("exact_cov", {"ratio": 1e-5, "at_least_one": False}),
    case("exact_cov", {"ratio": 1.0, "clip_low": None, "clip_high": None, "dual_clip": 1.1}),
    case("exact_cov", {"ratio": 1.0, "clip_low": 0.01, "clip_high": 0.02}),
    case("exact_cov", {"budget": 0.02}),
    case("exact_cov", {"limit": 0.0}),
    case("exact_cov", {"limit": -0.01, "clip_high": None}),
    case("exact_cov", {"share": 0.3}),
    case("exact_cov", {"share": 1.0, "k": 4}),
    case("exact_cov", {"budget": 0.01, "ratio": 0.1}),
    weights({"share": 0.5}),
    weights({}),
    weights({"weight": 0.0}),
    weights({"weight": 0.7, "ratio": 0.1}),
    case("random", {"seed": 1}),
    case("random", {"seed": 1, "ratio": 0.3, "exclude_clipped": True}),
    case("random", {"seed": 1, "k": 9}),
    case("clip_b"),
    case("clip_b", {"mu": 0.5}),
    case("clip_v"),
    case("clip_v", {"mu": 0.5, "ratio": 0.05}),
    case("clip_v", {"mu": 1.0, "k": 3}),
    case("steer"),
    case("steer", {"w_min": 0.7}),
    case("steer", {"map": "linear"}, linear=True),
    case("steer", {"map": "linear", "w_min": 0.5, "w_max": 1.0}, linear=True, w_min=0.5, w_max=1.0),
    case("steer", {"form": "theorem"}, theorem=True),
    case("top_entropy"),
    case("top_entropy", {"rho": 0.37}),
    case("top_entropy", {"rho": 1.0}),
    case("top_entropy", {"rho": 1e-9}),
    case("erc"),
    case("erc", {"low": 0.8, "high": 1.2}),
    case("entropy_advantage"),
    case("entropy_advantage", {"alpha": 0.1, "kappa": 5.0}),
    case("repo"),
    case("repo", {"zeta": 0.4}),
    case("repo", {"zeta": -0.4, "floor": -1.0}),
    case("repo", {"zeta": 0.3, "center": True}),
    case("adaptive_entropy", {"coef": 0.3}),
    case("adaptive_entropy", {"coef": 0.3, "target": 5.0}),
    case("entrocraft"),
    case("entrocraft", {"low": 3.0, "high": 4.0}),
    case("entrocraft", {"low": 0.0, "high": 0.1}),
    case("entrocraft", {"low": 0.0, "high": 5.0}),
]
every_row = pytest.mark.parametrize(("method", "options", "expected"), ROWS)


def check(micros: list[Micro], method: str, options: dict[str, Any], expected: Any, **batch: Any) -> list[ek.Control]:
    """The control of the whole is the reference's, and so are its metrics; of one micro-batch also ek.control's."""
    tokens = tokens_of(micros)
    right = expected(tokens)
    found = added(micros, **batch).control(method, **options)
    assert len(found) == len(micros)
    effect = options.get("effect", ek.methods()[method].effects[0])
    effect = "detached" if options.get("preset") == "paper" and method == "clip_cov" else effect
    told = [{name: x for name, x in decided._asdict().items() if x is not None} for decided in found]
    also = {"penalty_coef"} if effect == "penalized" else set()
    assert all({*each} == {effect, "metrics"} | also for each in told)
    left, advantages = [1.0] * len(tokens), [t.adv for t in tokens]
    if effect == "entropy_coef":
        touched = [False] * len(tokens)
        for each in told:
            assert each[effect].dim() == 0 and float(each[effect]) == pytest.approx(right, abs=1e-12)
    else:
        got = valid([each[effect] for each in told], micros)
        if effect in ("token_weight", "advantages"):
            for each, given in zip(told, micros, strict=True):
                double = effect == "advantages" and given["advantages"].dtype == torch.float64
                assert each[effect].dtype == (torch.float64 if double else torch.float32)
            torch.testing.assert_close(torch.tensor(got), torch.tensor(right), rtol=1e-6, atol=1e-7)
            left = right if effect == "token_weight" else left
            advantages = right if effect == "advantages" else advantages
            touched = [x != 1 for x in right] if effect == "token_weight" else [
                t.adv != x for t, x in zip(tokens, right, strict=True)
            ]  # fmt: skip
            padding = 1 if effect == "token_weight" else 0
        else:
            right = [x and not t.excluded for x, t in zip(right, tokens, strict=True)]
            assert got == right
            touched, padding = right, 0
            left = [float(not x) for x in right] if effect != "penalized" else left
        for each, given in zip(told, micros, strict=True):
            if given["mask"] is not None:
                assert (each[effect][given["mask"] == 0] == padding).all()
    row = ek.methods()[method]
    known = {**row.options, **row.presets.get(options.get("preset", ""), {}), **options}
    clips = known["clip_low"], known["clip_high"], known["dual_clip"]
    figures = reference.metrics(tokens, touched, left, advantages, clips)
    if any(given.get("vocab_covariance") is None for given in micros):
        figures = {name: figures[name] for name in ("touched", "touched_frac")}
    if effect == "entropy_coef":
        figures["entropy_coef"] = right
    for each in told:
        assert {*each["metrics"]} == {*figures}
        for name, x in each["metrics"].items():
            assert x.dim() == 0 and x.dtype == torch.float64 and not x.requires_grad
            right = figures[name] if math.isfinite(figures[name]) else NAN  # a sum of what is not finite
            assert float(x) == pytest.approx(right, rel=1e-6, abs=1e-12, nan_ok=True), name
    return found


@every_row
@pytest.mark.parametrize("ties", (False, True), ids=("", "ties"))
def test_random_batches(method: str, options: dict[str, Any], expected: Any, ties: bool) -> None:
    for seed in range(1 if ties else 2):
        single = [micro(4, 30, seed, ties=ties)]
        (alone,) = check(single, method, options, expected)
        seedless = {name: x for name, x in options.items() if name != "seed"}
        seeds = {"seed": options["seed"]} if "seed" in options else {}
        again = ek.control(method, one(single[0]), **seeds, **seedless)
        for a, b in zip(alone[:-1], again[:-1], strict=True):
            assert a is b is None or (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
        # several micro-batches of other shapes, one of them without a valid token
        several = [micro(3, 17, seed + 10, ties=ties), micro(1, 5, 7, ties=ties), micro(2, 40, seed + 20, ties=ties)]
        several[1]["mask"] = torch.zeros(1, 5, dtype=torch.bool)
        check(several, method, options, expected)


@every_row
def test_two_thousand_tokens(method: str, options: dict[str, Any], expected: Any) -> None:
    check([micro(8, 224, 5), micro(4, 64, 6)], method, options, expected)


@every_row
def test_degenerate_batches(method: str, options: dict[str, Any], expected: Any) -> None:
    nothing, single, equal, flat, on_policy = (micro(3, 7, seed) for seed in range(5))
    nothing["mask"] = torch.zeros(3, 7)
    single["mask"] = torch.zeros(3, 7, dtype=torch.int64)
    single["mask"][1, 2] = 1
    for name, x in micro(3, 7, 9).items():  # no NaN where it counts
        if name != "mask":
            single[name] = torch.where(single["mask"] == 1, x.nan_to_num(-0.25), single[name])
    equal["advantages"] = torch.zeros(3, 7)
    for name in ("entropy", "old_entropy", "vocab_covariance", "logprob", "old_logprob"):
        flat[name] = torch.zeros(3, 7)
    on_policy["old_logprob"] = None
    empty: Micro = {name: x[:0] for name, x in micro(1, 5).items()}
    for given in (nothing, single, equal, flat, on_policy, empty):
        check([given], method, options, expected)
    assert added([]).control(method, **options) == []


@every_row
def test_everything_that_a_batch_may_have(method: str, options: dict[str, Any], expected: Any) -> None:
    """fp64 and bf16, temperature per token, coefficients, excluded tokens, token indices, packed sequences."""
    g = torch.Generator().manual_seed(3)
    for seed, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
        given = micro(4, 20, seed, dtype=dtype)
        given["temperature"] = 0.5 + torch.rand(4, 1, generator=g)
        given["coefficient"] = torch.rand(4, generator=g)
        if not (method in ("steer", "entropy_advantage", "repo", "entrocraft") or options.get("effect")):
            given["exclude"] = torch.rand(4, 20, generator=g) < 0.3
        given["token_index"] = torch.randperm(80, generator=g).view(4, 20) * 2**30 - 2**33
        check([given], method, options, expected)
    parts = [micro(1, 24, 8), micro(1, 10, 9), micro(2, 5, 10)]
    for part, ends in zip(parts, ([0, 7, 7, 24], [0, 1, 10], [0, 10]), strict=True):
        count = len(ends) - 1
        part["cu_seqlens"], part["advantages"] = torch.tensor(ends), torch.randn(count, generator=g)
        part["temperature"] = 0.7
    parts[1]["coefficient"] = torch.tensor([0.5, 0.1])  # the others': 1/N
    parts[2]["old_logprob"] = None
    check(parts, method, options, expected)


@every_row
def test_impossible_tokens_and_overflowing_ratios(method: str, options: dict[str, Any], expected: Any) -> None:
    """lp = -inf beside an old log-prob; ratios of e^±100 and e^±800: A > 0 is clipped, A = 0."""
    given = micro(4, 10, 2)
    given["mask"] = torch.ones(4, 10, dtype=torch.bool)
    given = {**given, **{n: micro(4, 10, 5)[n].nan_to_num(-0.3).abs() for n in ("entropy", "old_entropy")}}
    given |= {n: micro(4, 10, 6)[n].nan_to_num(-0.3) for n in ("logprob", "advantages", "vocab_covariance")}
    given["old_logprob"] = given["logprob"] + 0.1
    if method not in ("clip_cov", "kl_cov"):  # whose mean has no such token
        given["logprob"][0, 0] = -INF
    for column, (size, sign) in enumerate([(100, 1), (800, 1), (800, 0), (100, -1), (800, -1)], 1):
        given["old_logprob"][0, column] = given["logprob"][0, column] - size * (1 if sign >= 0 else -1)
        given["advantages"][0, column] = sign
    if options.get("clip_high", 0.2) is None:
        given["old_logprob"][0, 2] = given["logprob"][0, 2]
    check([given], method, options, expected)


FIELDS = ("logprob", "old_logprob", "advantages", "entropy", "old_entropy", "vocab_covariance")


@every_row
def test_a_valid_token_that_is_not_finite(method: str, options: dict[str, Any], expected: Any) -> None:
    """Metrics that it enters are NaN; it is treated only where H or H_old decides, as NaN is in no range."""
    row = ek.methods()[method]
    given = micro(4, 10, 2)
    given["mask"][1, 3] = True
    for name in FIELDS:
        given[name][1, 3] = -0.5
    plain = ek.control(method, one(given), **options)
    for field in FIELDS:
        for value in (NAN, INF, -INF):
            if value != value or field not in ("logprob", "old_logprob") or value < 0:
                changed = {**given, field: given[field].clone()}
                changed[field][1, 3] = value
                check_nonfinite(method, row, options, field, value, changed, plain)


def check_nonfinite(
    method: str, row: ek.Method, options: dict[str, Any], field: str, value: float, given: Micro, plain: ek.Control
) -> None:
    found = ek.control(method, one(given), **options)
    others = given["mask"].clone()
    others[1, 3] = False
    read = field in {*row.needs, "advantages"} | ({"logprob"} if method != "clip_v" else set())
    for name in ("dropped", "detached", "penalized"):
        mask = getattr(found, name)
        if mask is not None:
            assert not mask[~given["mask"]].any()
            if value != value and method not in ("top_entropy", "erc", "random"):
                assert not mask[1, 3] or not read, (field, name)
            if method in ("top_entropy", "erc") and field in row.needs and value != value:
                assert mask[1, 3]
                assert method != "erc" or torch.equal(mask[others], getattr(plain, name)[others])
    if found.token_weight is not None:
        assert found.token_weight.isfinite().all() and (found.token_weight <= 1.2 + 1e-6).all()
    if found.advantages is not None:
        if method != "entrocraft":
            assert torch.equal(found.advantages[others], plain.advantages[others])
        if field == "advantages" and value != value:
            assert not found.advantages[1, 3].isfinite()
    if found.entropy_coef is not None and field == "entropy" and value != -INF:
        assert found.entropy_coef == 0
    if field in ("logprob", "old_logprob", "advantages", "vocab_covariance") and value != value:
        assert found.metrics["predicted_change_free"].isnan() and found.metrics["decrease_share"].isnan()


def test_ties_of_entropy_are_all_kept() -> None:
    """TRL's >=; where more than 1 - rho of the tokens share the largest entropy, all of them stay."""
    entropy = torch.tensor([[0.0] * 7 + [1.0, 1.0, 1.0]])
    batch = ek.TokenBatch(entropy - 1, None, torch.ones(1), None, entropy=entropy)
    assert ek.control("top_entropy", batch, rho=0.2).dropped.tolist() == [[True] * 7 + [False] * 3]
    assert not ek.control("top_entropy", batch, rho=0.4).dropped.any()
    # TRL: torch.quantile
    for count in (1, 2, 5, 31, 100):
        for rho in (0.05, 0.1, 0.2, 0.3, 0.37, 0.9, 1.0):
            entropy = torch.rand(1, count)
            batch = ek.TokenBatch(entropy - 2, None, torch.ones(1), None, entropy=entropy)
            kept = entropy >= torch.quantile(entropy, 1 - rho)
            assert torch.equal(~ek.control("top_entropy", batch, rho=rho).dropped, kept), (count, rho)


# ---- the losses' own selection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ("verl", "paper"))
@pytest.mark.parametrize("seed", range(4))
def test_clip_cov_and_kl_cov_are_the_losses_own(preset: str, seed: int) -> None:
    """The same tokens, and the same bits of loss and gradient, as the selection made in the call."""
    given = micro(6, 40, seed)
    tokens = [given[name] for name in ("old_logprob", "advantages", "mask")]
    batch = one(given)
    clips: dict[str, Any] = {} if preset == "verl" else {"clip_low": None, "clip_high": None}
    band = {"seed": seed, "ratio": 0.1, "low": 0.05, "high": 3.0}
    expected = differentiated(ek.clip_cov_loss, given["logprob"], *tokens, preset=preset, **band)
    decided = ek.control("clip_cov", batch, preset=preset, **band)
    found = differentiated(ek.policy_loss, given["logprob"], *tokens, control=decided, **clips)
    expected[0].metrics.pop("band_frac")
    assert found[0].metrics["selected_frac"] > 0
    assert_same(found, expected, rtol=0.0, atol=0.0)
    expected = differentiated(ek.kl_cov_loss, given["logprob"], *tokens, preset=preset, ratio=0.07, kl_coef=0.6)
    decided = ek.control("kl_cov", batch, preset=preset, ratio=0.07, kl_coef=0.6)
    plain = {"clip_low": None, "clip_high": None}
    found = differentiated(ek.policy_loss, given["logprob"], *tokens, control=decided, **plain)
    assert found[0].metrics["selected_frac"] > 0
    assert_same(found, expected, rtol=0.0, atol=0.0)


def test_the_clip_is_that_of_the_loss() -> None:
    """On ratios at and around the bounds, in every dtype; a token that PPO's clip stops decreases no entropy."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        around = torch.tensor([0.8, 1.2, 1.0, 3.0]).log()[:, None] + torch.linspace(-3e-7, 3e-7, 41)
        logprob, advantages = around.to(dtype), torch.tensor([1.3, -0.7, 0.0, -1.0])[torch.arange(41) % 4].expand(4, 41)
        logprob, old = logprob - 3.5, torch.full_like(logprob, -3.5)
        x = logprob.detach().requires_grad_()
        ek.policy_loss(x, old, advantages, None, dual_clip=3.0).loss.backward()
        batch = ek.TokenBatch(x, old, advantages, None, vocab_covariance=-torch.ones(4, 41))
        weights = [ek.control("exact_cov", batch, effect="token_weight", weight=0.0, dual_clip=3.0).token_weight]
        batch = ek.TokenBatch(x, old, advantages, None, vocab_covariance=torch.ones(4, 41))
        weights.append(ek.control("exact_cov", batch, effect="token_weight", weight=0.0, dual_clip=3.0).token_weight)
        decreasing = (weights[0] == 0) | (weights[1] == 0)
        assert torch.equal(decreasing, x.grad != 0), dtype


def test_nothing_is_changed_and_nothing_requires_grad() -> None:
    given = micro(3, 8, 1)
    for name in ("logprob", "entropy", "vocab_covariance", "advantages"):
        given[name] = given[name].requires_grad_()
    before = {name: x.detach().clone() for name, x in given.items()}
    for name, row in ek.methods().items():
        found = ek.control(name, one(given), **({"seed": 1} if row.draws else {}))
        tensors = [x for x in (*found[:-1], *found.metrics.values()) if isinstance(x, Tensor)]
        assert tensors and not any(x.requires_grad for x in tensors)
    for name, x in before.items():
        assert torch.equal(given[name].detach().nan_to_num(7), x.nan_to_num(7))


def test_every_method_has_a_reference() -> None:
    assert {*reference.METHODS} == {*ek.methods()} == {row.values[0] for row in ROWS}
