"""linear_policy_loss: gradients made in the forward pass, against the composed path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import entropy_kernels as ek
from conftest import BackendDevice, backend_devices
from entropy_kernels.losses import AGG_MODES
from entropy_kernels.ops import linear_policy_loss as op
from entropy_kernels.ops.linear_plan import HELD_OUT
from linear_policy_cases import (
    BUDGETS,
    LOSSES,
    MANY,
    ONE,
    SCENARIOS,
    SELECT,
    VALID,
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

products = pytest.fixture(counted_products)


@pytest.mark.parametrize("part", (0, 1, 2), ids=("one part", "few parts", "many parts"))
@pytest.mark.parametrize("name", SCENARIOS)
def test_equal_to_the_composed_path_in_float64(name: str, part: int) -> None:
    case = SCENARIOS[name]()
    budget = BUDGETS[torch.float64][part]
    assert (1, 2, 5)[part] <= parts(case, budget) <= (1, 4, 20)[part]
    # where all are dropped, and exactly nothing is left, errors are those of what was taken away
    scale = 1.0 if name == "clip_cov, all" else None
    selected = assert_same(case, budget, scale=scale).metrics.get("selected_frac")
    if selected is not None:
        share = {"none": 0.0, "all": 1.0}.get(name.partition(", ")[2])
        assert (0 < selected < 1) if share is None else selected == share


@pytest.mark.parametrize("name", SCENARIOS)
def test_without_reading_anything_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: always as many tokens are made again as the selection could take."""
    monkeypatch.setattr(op, "_reading_back_costs", lambda device: True)
    scale = 1.0 if name == "clip_cov, all" else None
    assert_same(SCENARIOS[name](), MANY, scale=scale)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("method", LOSSES)
def test_every_aggregation(method: str, mode: str) -> None:
    scale: dict[str, Any] = {"batch_num_tokens": 500, "global_batch_size": torch.tensor(9), "dp_size": 4}
    for more in ({}, scale):
        case = make(method, loss_agg_mode=mode, entropy_coef=0.01, **SELECT[method], **more)
        case.options |= {"ref_logprob": case.old_logprob + 0.1, "ref_kl_coef": 0.3, "kl_estimator": "k2"}
        assert_same(case, MANY)


PRECISE = ("ppo, all terms", "clip_cov, entropy bonus", "kl_cov, first and last", "kl_cov, all")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", (*PRECISE, "ppo, advantages of 1e5"))
def test_no_worse_than_the_composed_path(name: str, dtype: torch.dtype) -> None:
    """Errors against float64 beside those of the composed path, which rounds in other places.

    Raw rewards: what the composed path holds as a share of a mean does not overflow in fp16 here.
    """
    low = SCENARIOS[name]().to(dtype, torch.float32)
    _, exact = composed(low.to(torch.float64))
    _, base = composed(low)
    for budget in BUDGETS[dtype]:
        _, found = fused(low, budget)
        for right, theirs, ours in zip(exact, base, found, strict=True):
            assert ours.dtype == dtype
            theirs, ours = ((x.double() - right).norm() / right.norm() for x in (theirs, ours))
            assert ours <= 1.5 * theirs + 1e-6, f"{ours:.2g}, composed {theirs:.2g}, {parts(low, budget)} parts"


@pytest.mark.parametrize(
    ("size", "count"), [(50, 1), (50, 5), (50, HELD_OUT), (50, HELD_OUT + 20), (100, 1), (100, HELD_OUT + 20)]
)
def test_tokens_of_huge_coefficient_are_held_out(size: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, exp(50) · u - exp(50) · u would leave 5e14, exp(100) NaN; dropped tokens leave nothing."""
    case = make("clip_cov", preset="paper", seed=1, k=count, high=1e12)
    logprob = case.logprob
    covariance = torch.where(case.mask, ek.token_covariance(logprob, case.advantages, case.mask), -1e9)
    largest = covariance.view(-1).topk(count + 1)
    case.options["low"] = largest.values[-2:].mean().item()  # the band begins below the ``count`` largest
    far = largest.indices[:-1]
    case.old_logprob.view(-1)[far] = logprob.view(-1)[far] - size
    case = case.to(torch.float32)
    expected, right = composed(case)
    assert expected.metrics["selected_frac"] * len(VALID) == pytest.approx(count)
    assert all(x.isfinite().all() for x in right)
    for costs in (False, True) if size == 100 or count <= HELD_OUT else (False,):
        monkeypatch.setattr(op, "_reading_back_costs", lambda device, costs=costs: costs)
        assert_same(case, BUDGETS[torch.float32][2], rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("overflowing", (False, True))
def test_more_huge_coefficients_than_are_held_out(overflowing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading back there is room for so many; the others stay in, and one that is not finite shows."""
    monkeypatch.setattr(op, "_reading_back_costs", lambda device: True)
    case = make("kl_cov", k=1)
    flat, huge = case.old_logprob.view(-1), VALID[: HELD_OUT + 12]
    flat[huge] -= 6  # a ratio of 400
    if overflowing:
        flat[VALID[1]] -= 1000
        assert not any(x.isfinite().all() for x in fused(case, MANY)[1])
    else:
        assert_same(case, MANY)


@pytest.mark.parametrize("unread", (False, True))
@pytest.mark.parametrize("overflowing", (1, 3, 90))
def test_what_is_not_finite_shows(overflowing: int, unread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflowing ratios that nothing holds or drops: NaN in the composed path, and here; no other token hides them.

    Without reading back also if there are more than there is room for.
    """
    monkeypatch.setattr(op, "_reading_back_costs", lambda device: unread)
    case = far_off("kl_cov", 1, 1000, k=0, preset="paper") if overflowing == 1 else make("kl_cov", k=1)
    case = case.to(torch.float32)
    case.advantages = -case.advantages.abs()
    if overflowing > 1:
        case.old_logprob.view(-1)[VALID[:overflowing]] = -1000
    result, found = fused(case, BUDGETS[torch.float32][2])
    expected, right = composed(case)
    assert result.metrics["nonfinite_tokens"] == expected.metrics["nonfinite_tokens"] == overflowing
    for ours, theirs in zip(found, right, strict=True):
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
        _, right = composed(case)
        case.hidden[~case.mask], case.target[~case.mask] = float("nan"), 10**6
        case.old_logprob[~case.mask], case.advantages[~case.mask] = float("inf"), float("nan")
        for budget in BUDGETS[torch.float64]:
            torch.testing.assert_close(fused(case, budget)[1], right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("names", ("h", "w", "b", "hb", "wb", "hwb"))
def test_only_what_needs_a_gradient(names: str, products: list[int]) -> None:
    """At most three products, and for the selected tokens their share."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    _, right = composed(case)
    for budget in BUDGETS[torch.float64]:
        products.clear()
        _, found = fused(case, budget, names)
        count = 1 + ("h" in names) + ("w" in names)
        again = 0 if budget == ONE else int(0.1 * len(VALID))
        assert count * len(VALID) <= sum(products) / (H * V) <= count * (len(VALID) + again)
        needed = [x if name in names else None for name, x in zip("hwb", right, strict=True)]
        torch.testing.assert_close(found, needed, rtol=1e-11, atol=1e-14)
        with FlopCounterMode(display=False):  # under a dispatch mode, too
            products.clear()
            fused(case, budget, names)
        assert count * len(VALID) <= sum(products) / (H * V) <= count * (len(VALID) + again)


@pytest.mark.parametrize("method", LOSSES)
def test_nothing_that_counts(method: str) -> None:
    """No token, none that is valid, no sequence."""
    options: dict[str, Any] = {"seed": 1} if method == "clip_cov" else {}
    packed = {"surrogate": "gspo", "cu_seqlens": torch.tensor([0])}
    for shape, mask, more in (
        ((1, 0), None, {}),
        ((1, 5), torch.zeros(1, 5, dtype=torch.bool), {}),
        ((0,), None, packed),
    ):
        hidden = torch.randn(*shape, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        zeros = torch.zeros(shape)
        options |= {"method": method, "entropy_coef": 0.1, **more}
        loss = ek.linear_policy_loss(hidden, weight, zeros.long(), zeros, zeros, mask, **options).loss
        loss.backward()
        assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_autocast() -> None:
    """Products in bf16, gradients of fp32 parameters not rounded to it."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01).to(torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, right = composed(case)
        result, found = fused(case, 180_000)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-2, atol=1e-3)
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
        assert not torch.equal(ours, ours.bfloat16().float())


@pytest.mark.parametrize("on", backend_devices("token_covariance"))
@pytest.mark.parametrize("method", LOSSES)
def test_on_every_backend(on: BackendDevice, method: str) -> None:
    """Statistics, selection and loss of one backend; on a GPU without a value read back."""
    case = make(method, entropy_coef=0.01, **SELECT[method]).to(torch.float32, torch.float32)
    _, right = composed(case)
    there = case.on(on.device)
    for budget in BUDGETS[torch.float32]:
        if on.device == "cuda":
            fused(there, budget, backend=on.backend)  # compiles, fills caches
            torch.cuda.set_sync_debug_mode("error")
        try:
            _, found = fused(there, budget, backend=on.backend)
        finally:
            if on.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        for ours, theirs in zip(found, right, strict=True):
            assert (ours.cpu() - theirs).norm() <= 2e-5 * theirs.norm()


def test_without_a_mask_the_tokens_with_a_label_count() -> None:
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    expected, right = composed(case)
    case.target[~case.mask], case.mask = -100, None
    for budget in BUDGETS[torch.float64]:
        result, found = fused(case, budget)
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-14)
