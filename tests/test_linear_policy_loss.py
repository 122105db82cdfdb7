"""linear_policy_loss: gradients made in the forward pass, against the composed path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import entropy_kernels as ek
from conftest import Place, places
from entropy_kernels.losses import AGG_MODES
from entropy_kernels.ops import linear_policy_loss as op
from entropy_kernels.ops.linear_plan import HELD_OUT
from linear_policy_cases import (
    BUDGETS,
    LOSSES,
    SCENARIOS,
    VALID,
    Case,
    H,
    V,
    assert_same,
    composed,
    counted_products,
    far_off,
    fused,
    make,
    parts,
)  # fmt: skip


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted_products(monkeypatch)


@pytest.mark.parametrize("part", (0, 1, 2), ids=("one part", "few parts", "many parts"))
@pytest.mark.parametrize("name", SCENARIOS)
def test_equal_to_the_composed_path_in_float64(name: str, part: int) -> None:
    case = SCENARIOS[name]()
    budget = BUDGETS[torch.float64][part]
    assert (1, 2, 5)[part] <= parts(case, budget) <= (1, 4, 20)[part]
    # where all are dropped, and exactly nothing is left, errors are those of what was taken away
    scale = [1.0, 1.0, 1.0] if name == "clip_cov, all" else None
    result = assert_same(case, budget, 1e-12, scale)
    selected = result.metrics.get("selected_frac")
    if selected is not None:
        share = {"none": 0.0, "all": 1.0}.get(name.partition(", ")[2])
        assert (0 < selected < 1) if share is None else selected == share


@pytest.mark.parametrize("name", SCENARIOS)
def test_without_reading_anything_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: always as many tokens are made again as the selection could take."""
    monkeypatch.setattr(op, "_reading_back_costs", lambda device: True)
    scale = [1.0, 1.0, 1.0] if name == "clip_cov, all" else None
    assert_same(SCENARIOS[name](), BUDGETS[torch.float64][2], 1e-12, scale)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("method", LOSSES)
def test_every_aggregation(method: str, mode: str) -> None:
    options: dict[str, Any] = {"ppo": {}, "clip_cov": {"seed": 3, "ratio": 0.1, "low": 0.01, "high": 50.0}}.get(
        method, {"ratio": 0.1}
    )
    scale: dict[str, Any] = {"batch_num_tokens": 500, "global_batch_size": torch.tensor(9), "dp_size": 4}
    for more in ({}, scale):
        case = make(method, loss_agg_mode=mode, entropy_coef=0.01, **options, **more)
        case.options["ref_logprob"] = case.old_logprob + 0.1
        case.options |= {"ref_kl_coef": 0.3, "kl_estimator": "k2"}
        assert_same(case, BUDGETS[torch.float64][2], 1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("ppo, all terms", "clip_cov, entropy bonus", "kl_cov, first and last", "kl_cov, all"))
def test_no_worse_than_the_composed_path(name: str, dtype: torch.dtype) -> None:
    """Errors against float64 beside those of the composed path, which rounds in other places."""
    case = SCENARIOS[name]()
    case.advantages, case.old_logprob = case.advantages.float(), case.old_logprob.float()
    low = case.to(dtype)
    _, exact = composed(low.to(torch.float64))
    _, base = composed(low)
    for budget in BUDGETS[dtype]:
        _, found = fused(low, budget)
        for right, theirs, ours in zip(exact, base, found, strict=True):
            assert right is not None and theirs is not None and ours is not None and ours.dtype == dtype
            theirs, ours = ((x.double() - right).norm() / right.norm() for x in (theirs, ours))
            assert ours <= 1.5 * theirs + 1e-6, f"{ours:.2g}, composed {theirs:.2g}, {parts(low, budget)} parts"


@pytest.mark.parametrize(
    ("size", "count"), [(50, 1), (50, 5), (50, HELD_OUT), (50, HELD_OUT + 20), (100, 1), (100, HELD_OUT + 20)]
)
def test_tokens_of_huge_coefficient_are_held_out(size: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, exp(50) · u - exp(50) · u would leave 5e14, exp(100) NaN; dropped tokens leave nothing."""
    case = make("clip_cov", preset="paper", seed=1, k=count, high=1e12)
    assert case.mask is not None
    logprob = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias).logprob
    covariance = torch.where(case.mask, ek.token_covariance(logprob, case.advantages, case.mask), -1e9)
    largest = covariance.view(-1).topk(count + 1)
    case.options["low"] = largest.values[-2:].mean().item()  # the band begins below the ``count`` largest
    far = largest.indices[:-1]
    case.old_logprob.view(-1)[far] = logprob.view(-1)[far] - size
    case = case.to(torch.float32)
    expected, right = composed(case)
    assert expected.metrics["selected_frac"] * len(VALID) == pytest.approx(count)
    assert all(x is not None and x.isfinite().all() for x in right)
    for costs in (False, True) if size == 100 or count <= HELD_OUT else (False,):
        monkeypatch.setattr(op, "_reading_back_costs", lambda device, costs=costs: costs)
        assert_same(case, BUDGETS[torch.float32][2], 1e-5)


@pytest.mark.parametrize("overflowing", (False, True))
def test_more_huge_coefficients_than_are_held_out(overflowing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading back there is room for so many; the others stay in, and one that is not finite shows."""
    monkeypatch.setattr(op, "_reading_back_costs", lambda device: True)
    case = make("kl_cov", k=1)
    flat, huge = case.old_logprob.view(-1), VALID[: HELD_OUT + 12]
    flat[huge] -= 6  # a ratio of 400
    if overflowing:
        flat[VALID[1]] -= 1000
    if not overflowing:
        assert_same(case, BUDGETS[torch.float64][2], 1e-12)
        return
    _, found = fused(case, BUDGETS[torch.float64][2])
    assert all(x is not None and not x.isfinite().all() for x in found)


def test_what_is_not_finite_shows() -> None:
    """An overflowing ratio that nothing holds or drops: NaN in the composed path, and here; no other token hides it."""
    case = far_off("kl_cov", 1, 1000, k=0, preset="paper").to(torch.float32)
    case.advantages = -case.advantages.abs()
    result, found = fused(case, BUDGETS[torch.float32][2])
    expected, right = composed(case)
    assert result.metrics["nonfinite_tokens"] == expected.metrics["nonfinite_tokens"] == 1
    for ours, theirs in zip(found, right, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours.isfinite(), theirs.isfinite()) and not ours.isfinite().all()


@pytest.mark.parametrize("overflowing", (3, 90))
def test_what_is_not_finite_shows_without_reading_back(overflowing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if more tokens overflow than there is room for."""
    monkeypatch.setattr(op, "_reading_back_costs", lambda device: True)
    case = make("kl_cov", k=1).to(torch.float32)
    case.advantages = -case.advantages.abs()
    case.old_logprob.view(-1)[VALID[:overflowing]] = -1000
    _, found = fused(case, BUDGETS[torch.float32][2])
    _, right = composed(case)
    for ours, theirs in zip(found, right, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours.isfinite(), theirs.isfinite()) and not ours.isfinite().all()


@pytest.mark.parametrize("drops", (True, False))
def test_padding_reaches_nothing(drops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN hidden states, labels out of range, NaN log-probs and advantages where the mask is 0; ignored labels.

    ``drops``: padding is left out of the products; else it is in them, as on a GPU.
    """
    if not drops:
        monkeypatch.setattr(op, "kept_rows", lambda dropped: None)
        monkeypatch.setattr(op, "_reading_back_costs", lambda device: True)
    for method, options in (("ppo", {}), ("kl_cov", {"ratio": 0.1}), ("clip_cov", {"seed": 1, "ratio": 0.2})):
        case = make(method, entropy_coef=0.01, **options)
        assert case.mask is not None
        clean = make(method, entropy_coef=0.01, **options)
        _, right = composed(clean)
        case.hidden[~case.mask], case.target[~case.mask] = float("nan"), 10**6
        case.old_logprob[~case.mask], case.advantages[~case.mask] = float("inf"), float("nan")
        for budget in BUDGETS[torch.float64]:
            _, found = fused(case, budget)
            for ours, theirs in zip(found, right, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("names", ("h", "w", "b", "hb", "wb"))
def test_only_what_needs_a_gradient(names: str, products: list[int]) -> None:
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    _, right = composed(case)
    for budget in BUDGETS[torch.float64]:
        products.clear()
        _, found = fused(case, budget, names)
        one = len(VALID) * H * V
        count = 1 + ("h" in names) + ("w" in names)
        again = 0 if budget == BUDGETS[torch.float64][0] else int(0.1 * len(VALID)) * H * V * count
        assert count * one <= sum(products) <= count * one + again
        for name, ours, theirs in zip("hwb", found, right, strict=True):
            if name not in names:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("budget", BUDGETS[torch.float64])
def test_three_products(budget: int, products: list[int]) -> None:
    """What the selected tokens add is their share."""
    case = make("kl_cov", ratio=0.02)
    products.clear()
    with FlopCounterMode(display=False):  # under a dispatch mode, too
        fused(case, budget)
    again = 0 if budget == BUDGETS[torch.float64][0] else int(0.02 * len(VALID))
    assert 3 * len(VALID) <= sum(products) / (H * V) <= 3 * (len(VALID) + again)


@pytest.mark.parametrize("method", LOSSES)
def test_nothing_that_counts(method: str) -> None:
    options: dict[str, Any] = {"clip_cov": {"seed": 1}}.get(method, {})
    for tokens, mask in ((0, None), (5, torch.zeros(1, 5, dtype=torch.bool))):
        hidden = torch.randn(1, tokens, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        zeros = torch.zeros(1, tokens)
        result = ek.linear_policy_loss(
            hidden, weight, zeros.long(), zeros, zeros, mask, method=method, entropy_coef=0.1, **options
        )
        result.loss.backward()
        assert result.loss == 0
        for leaf in (hidden, weight):
            assert leaf.grad is not None and not leaf.grad.any()


def test_autocast() -> None:
    """Products in bf16, gradients of fp32 parameters not rounded to it."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    case.advantages, case.old_logprob = case.advantages.float(), case.old_logprob.float()
    case = case.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, right = composed(case)
        result, found = fused(case, 180_000)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-2, atol=1e-3)
    for ours, theirs in zip(found, right, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
        assert not torch.equal(ours, ours.bfloat16().float())


def test_metrics_carry_no_gradient() -> None:
    result, _ = fused(make("clip_cov", seed=1), 240_000)
    assert not any(value.requires_grad for value in result.metrics.values())


@pytest.mark.parametrize("place", places("token_covariance"))
@pytest.mark.parametrize("method", LOSSES)
def test_on_every_backend(place: Place, method: str) -> None:
    """Statistics, selection and loss of one backend; on a GPU without a value read back."""
    options: dict[str, Any] = {"clip_cov": {"seed": 3, "ratio": 0.1, "low": 0.01, "high": 50.0}}.get(
        method, {} if method == "ppo" else {"ratio": 0.1}
    )
    case = make(method, entropy_coef=0.01, **options)
    case.advantages, case.old_logprob = case.advantages.float(), case.old_logprob.float()
    case = case.to(torch.float32)
    _, right = composed(case)

    def moved(x: Any) -> Any:
        return x.to(place.device) if isinstance(x, Tensor) else x

    there = Case(**{name: moved(value) for name, value in vars(case).items()})
    for budget in BUDGETS[torch.float32]:
        if place.device == "cuda":
            fused(there, budget, backend=place.backend)  # compiles, fills caches
            torch.cuda.set_sync_debug_mode("error")
        try:
            _, found = fused(there, budget, backend=place.backend)
        finally:
            if place.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        for ours, theirs in zip(found, right, strict=True):
            assert ours is not None and theirs is not None
            assert (ours.cpu() - theirs).norm() <= 2e-5 * theirs.norm()


def test_without_a_mask_the_tokens_with_a_label_count() -> None:
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    assert case.mask is not None
    expected, right = composed(case)
    case.target[~case.mask], case.mask = -100, None
    for budget in BUDGETS[torch.float64]:
        result, found = fused(case, budget)
        torch.testing.assert_close(result.loss, expected.loss)
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)
