"""linear_policy_loss: gradients made in the forward pass, against the composed path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import entropy_kernels as ek
from conftest import Place, places
from entropy_kernels.losses import AGG_MODES
from entropy_kernels.ops import linear_policy_loss as op
from entropy_kernels.ops.linear_plan import HELD_OUT

B, L, H, V = 6, 30, 12, 803
LOSSES = {"ppo": ek.policy_loss, "clip_cov": ek.clip_cov_loss, "kl_cov": ek.kl_cov_loss}
# one part, a few, many
BUDGETS = {torch.float64: (1 << 30, 600_000, 240_000), torch.float32: (1 << 30, 300_000, 120_000)}
BUDGETS |= {torch.bfloat16: (1 << 30, 500_000, 180_000), torch.float16: (1 << 30, 500_000, 180_000)}


@dataclass
class Case:
    """A batch (B, L), and how its loss is computed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor | None
    method: str
    options: dict[str, Any]
    head: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """Parameters and hidden states of ``dtype``."""
        values = [None if x is None else x.to(dtype) for x in (self.hidden, self.weight, self.bias)]
        return Case(*values, *list(vars(self).values())[3:])

    def leaves(self, names: str = "hwb") -> list[Tensor | None]:
        tensors = zip("hwb", (self.hidden, self.weight, self.bias), strict=True)
        return [None if x is None else x.detach().clone().requires_grad_(name in names) for name, x in tensors]


def make(method: str, head: dict[str, Any] | None = None, **options: Any) -> Case:
    """fp64; padding at the end of rows, an empty row; log-ratios of .2, so that the PPO clip holds some tokens."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, L, H, generator=g, dtype=torch.float64)
    weight, bias = 0.8 * torch.randn(V, H, generator=g).double(), torch.randn(V, generator=g).double()
    target = torch.randint(V, (B, L), generator=g)
    mask = torch.arange(L) < torch.tensor([30, 7, 0, 29, 1, 30])[:, None]
    logprob = ek.linear_logprob_entropy(hidden, weight, target, bias, **(head or {})).logprob
    old = logprob + 0.2 * torch.randn(B, L, generator=g)
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, L).clone()
    return Case(hidden, weight, bias, target, old, advantages, mask, method, options, head or {})


def composed(case: Case, names: str = "hwb") -> tuple[ek.PolicyLoss, list[Tensor | None]]:
    """Logits of all tokens at once, our statistics, our loss."""
    hidden, weight, bias = leaves = case.leaves(names)
    logprob, entropy = ek.linear_logprob_entropy(hidden, weight, case.target, bias, **case.head)
    loss = LOSSES[case.method](
        logprob, case.old_logprob, case.advantages, case.mask, entropy=entropy, **case.options
    )  # fmt: skip
    loss.loss.backward()
    return loss, [None if x is None else x.grad for x in leaves]


def fused(case: Case, budget: int, names: str = "hwb", **kwargs: Any) -> tuple[ek.PolicyLoss, list[Tensor | None]]:
    hidden, weight, bias = leaves = case.leaves(names)
    loss = ek.linear_policy_loss(
        hidden, weight, case.target, case.old_logprob, case.advantages, case.mask, bias, method=case.method,
        memory_budget=budget, **case.head, **case.options, **kwargs,
    )  # fmt: skip
    loss.loss.backward()
    return loss, [None if x is None else x.grad for x in leaves]


def parts(case: Case, budget: int) -> int:
    """Of the tokens that count; on a CPU the others are left out."""
    hidden, weight, bias = case.leaves()
    assert hidden is not None and case.mask is not None
    return ek.linear_plan(hidden[case.mask], weight, bias, memory_budget=budget, policy_loss=True).row_chunks


def assert_same(case: Case, budget: int, rtol: float, scale: list[float] | None = None, **kwargs: Any) -> ek.PolicyLoss:
    """Loss, metrics and gradients of the composed path; a gradient's errors are relative to its size, or ``scale``."""
    expected, right = composed(case)
    result, found = fused(case, budget, **kwargs)
    assert result.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(result.metrics[name], value, rtol=rtol, atol=rtol, equal_nan=True, msg=name)
    torch.testing.assert_close(result.loss, expected.loss, rtol=rtol, atol=rtol, equal_nan=True)
    for i, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None and ours.dtype == theirs.dtype
        size = theirs.double().norm().item() if scale is None else scale[i]
        assert (ours.double() - theirs.double()).norm() <= rtol * size + 1e-300, f"gradient {i}: {budget}"
    return result


def spiked(case: Case, *where: int, size: float = 30.0) -> Case:
    """Tokens at flat positions ``where`` get by far the largest covariances."""
    assert case.mask is not None
    logprob = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias, **case.head).logprob
    lowest = (logprob - logprob[case.mask].mean()).view(-1)
    for i, n in enumerate(where):
        case.advantages.view(-1)[n] = size * (1 + 0.1 * i) * lowest[n].sign()
    return case


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiplications of each matrix product."""
    found: list[int] = []

    def counted(real: Callable[..., None], out: Tensor, a: Tensor, b: Tensor, *bias: Any) -> None:
        found.append(a.shape[0] * a.shape[1] * b.shape[1])
        real(out, a, b, *bias)

    for name in ("multiply", "multiply_add"):
        monkeypatch.setattr(op, name, functools.partial(counted, getattr(op, name)))
    return found


VALID = [n for n in range(B * L) if n % L < (30, 7, 0, 29, 1, 30)[n // L]]  # flat positions that count
FIRST, LAST = VALID[0], VALID[-1]


def clipped_and_selected() -> Case:
    """KL-Cov on top of a PPO clip: the penalised token's coefficient was 0."""
    case = spiked(make("kl_cov", k=2, clip_low=0.2, clip_high=0.2, entropy_coef=0.01), FIRST, VALID[40])
    flat = case.old_logprob.view(-1)
    logprob = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias).logprob.view(-1)
    for n in (FIRST, VALID[40]):  # beyond the clip on the side where it holds
        flat[n] = logprob[n] - 0.5 * case.advantages.view(-1)[n].sign()
    return case


def far_off(method: str, sign: float, size: float, **options: Any) -> Case:
    """A token near the beginning that is the selected one, with a log-ratio of ± ``size``."""
    case = spiked(make(method, **options), VALID[2])
    logprob = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias).logprob.view(-1)
    case.old_logprob.view(-1)[VALID[2]] = logprob[VALID[2]] - sign * size
    return case


DROP_ALL: dict[str, Any] = {"seed": 5, "low": -1e9, "high": 1e9}
SCENARIOS: dict[str, Callable[[], Case]] = {
    "ppo": lambda: make("ppo"),
    "ppo, all terms": lambda: make("ppo", entropy_coef=0.02, dual_clip=3.0, clip_high=0.28),
    "clip_cov, some": lambda: make("clip_cov", seed=3, ratio=0.1, low=0.01, high=50.0),
    "clip_cov, entropy bonus": lambda: make("clip_cov", seed=3, ratio=0.1, low=0.01, high=50.0, entropy_coef=0.02),
    "clip_cov, paper": lambda: make("clip_cov", preset="paper", seed=3, ratio=0.1, low=0.01, high=50.0),
    "clip_cov, none": lambda: make("clip_cov", seed=3, low=1e6, high=1e7),
    "clip_cov, all": lambda: make("clip_cov", preset="paper", ratio=1.0, entropy_coef=0.02, **DROP_ALL),
    "clip_cov, quantile band": lambda: make("clip_cov", seed=3, ratio=0.1, low=0.5, high=1.0, band="quantile"),
    "kl_cov, some": lambda: make("kl_cov", ratio=0.1),
    "kl_cov, first": lambda: spiked(make("kl_cov", k=1), FIRST),
    "kl_cov, last": lambda: spiked(make("kl_cov", k=1), LAST),
    "kl_cov, first and last": lambda: spiked(make("kl_cov", k=2, entropy_coef=0.02), FIRST, LAST),
    "kl_cov, none": lambda: make("kl_cov", k=0, preset="paper"),
    "kl_cov, all": lambda: make("kl_cov", ratio=1.0, entropy_coef=0.02),
    "kl_cov, was 0": clipped_and_selected,
    "kl_cov, coefficient": lambda: make("kl_cov", ratio=0.1, kl_coef=torch.tensor(2.5), penalty_estimator="k3+"),
    "clip_cov, log-ratio +100": lambda: far_off("clip_cov", 1, 100, preset="paper", seed=1, k=1, low=20, high=1e9),
    "clip_cov, log-ratio -100": lambda: far_off("clip_cov", -1, 100, preset="paper", seed=1, k=1, low=20, high=1e9),
    "kl_cov, log-ratio -100": lambda: far_off("kl_cov", -1, 100, k=1, entropy_coef=0.02),
    "softcap, temperature": lambda: make(
        "kl_cov", ratio=0.1, entropy_coef=0.02,
        head={"softcap": 5.0, "temperature": torch.linspace(0.5, 2, B * L, dtype=torch.float64).view(B, L)},
    ),
    "padded vocabulary": lambda: make("clip_cov", seed=3, ratio=0.1, low=0.01, high=50.0, head={"vocab_size": V}),
}  # fmt: skip


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
    with FlopCounterMode(display=False):  # under a dispatch mode, too
        fused(case, budget)
    again = 0 if budget == BUDGETS[torch.float64][0] else int(0.02 * len(VALID))
    assert 3 * len(VALID) <= sum(products) / (H * V) <= 3 * (len(VALID) + again)


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("count", (1, 2, 3, 6))
def test_micro_batches_into_one_buffer(method: str, count: int) -> None:
    """The sum does not depend on the split: selection over the batch, gradient of the head in the buffer alone."""
    select: dict[str, Any] = {"clip_cov": {"seed": 3, "ratio": 0.1, "low": 0.01, "high": 50.0}}.get(
        method, {"ratio": 0.1}
    )
    case = make(method, entropy_coef=0.01, **({} if method == "ppo" else select))
    assert case.mask is not None
    expected, right = composed(case)
    logprob = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias).logprob
    rows = [slice(i, i + B // count) for i in range(0, B, B // count)]
    selection = ek.SelectionBatch()
    for r in rows:
        exclude = None
        if method == "clip_cov":  # as the preset does: tokens that the PPO clip holds
            ratio, a = (logprob[r] - case.old_logprob[r]).exp(), case.advantages[r]
            exclude = -a * ratio.clamp(0.8, 1.2) > -a * ratio
        selection.add(logprob[r], case.advantages[r], case.mask[r], exclude=exclude)
    masks: list[dict[str, Tensor]] = [{}] * count
    if method == "clip_cov":
        masks = [{"dropped": m} for m in selection.clip_cov(**select)]
    if method == "kl_cov":
        masks = [{"penalized": m} for m in selection.kl_cov(**select)]
    buffer = torch.full_like(case.weight, 3.0)
    hidden, weight, bias = case.leaves()
    total = 0.0
    for r, given in zip(rows, masks, strict=True):
        assert hidden is not None
        loss = ek.linear_policy_loss(
            hidden[r], weight, case.target[r], case.old_logprob[r], case.advantages[r], case.mask[r], bias,
            method=method, grad_buffer=buffer, memory_budget=BUDGETS[torch.float64][2], entropy_coef=0.01,
            batch_num_tokens=int(case.mask.sum()), **given,
        ).loss  # fmt: skip
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-12)
    assert weight is not None and weight.grad is None and hidden is not None and bias is not None
    for ours, theirs in zip((hidden.grad, buffer - 3.0, bias.grad), right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_buffer_is_fp32_and_not_rounded(dtype: torch.dtype) -> None:
    """Many small gradients of halves add up in fp32; in bf16 they would stop to."""
    case = make("ppo", entropy_coef=0.01).to(dtype)
    case.advantages, case.old_logprob = case.advantages.float(), case.old_logprob.float()
    buffer = torch.zeros(V, H)
    for _ in range(40):
        fused(case, BUDGETS[dtype][1], grad_buffer=buffer)
    once = torch.zeros(V, H)
    fused(case, BUDGETS[dtype][1], grad_buffer=once)
    assert (buffer / 40 - once).norm() <= 1e-5 * once.norm()
    _, right = composed(case)
    assert right[1] is not None
    assert (once - right[1].float()).norm() <= 3e-2 * once.norm()


def test_a_factor_on_the_loss() -> None:
    """Applied once, before anything is rounded to fp16, whose small gradients a scaler is there to save."""
    case = make("kl_cov", ratio=0.1)
    hidden, weight, bias = case.leaves()
    args = (case.target, case.old_logprob, case.advantages, case.mask, bias)
    loss = ek.linear_policy_loss(hidden, weight, *args, method="kl_cov", ratio=0.1).loss
    (loss * -3).backward()
    _, right = composed(case)
    for leaf, theirs in zip((hidden, weight, bias), right, strict=True):
        assert leaf is not None and theirs is not None
        torch.testing.assert_close(leaf.grad, -3 * theirs, rtol=1e-11, atol=1e-14)
    small = make("ppo", batch_num_tokens=10**7).to(torch.float16)
    small.advantages, small.old_logprob = small.advantages.float(), small.old_logprob.float()
    hidden, weight, bias = small.leaves()
    args = (small.target, small.old_logprob, small.advantages, small.mask, bias)
    loss = ek.linear_policy_loss(hidden, weight, *args, batch_num_tokens=10**7).loss
    (loss * 65536).backward()
    _, exact = composed(small.to(torch.float64))
    for leaf, right64 in zip((hidden, weight, bias), exact, strict=True):
        assert leaf is not None and leaf.grad is not None and right64 is not None
        assert (leaf.grad.double() / 65536 - right64).norm() <= 3e-2 * right64.norm()


def test_large_advantages_in_fp16() -> None:
    """Raw rewards: what the composed path holds as a share of a mean does not overflow here."""
    case = make("ppo")
    case.advantages = (case.advantages * 1e5).float()
    case.old_logprob = case.old_logprob.float()
    low = case.to(torch.float16)
    _, exact = composed(low.to(torch.float64))
    _, base = composed(low)
    for budget in BUDGETS[torch.float16]:
        _, found = fused(low, budget)
        for right, theirs, ours in zip(exact, base, found, strict=True):
            assert right is not None and theirs is not None and ours is not None
            theirs, ours = ((x.double() - right).norm() / right.norm() for x in (theirs, ours))
            assert ours <= 1.5 * theirs


NUMBERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "numpy's ints": ("kl_cov", {"k": np.int64(3), "dp_size": np.int32(2), "batch_num_tokens": np.int64(70)},
                     {"k": 3, "dp_size": 2, "batch_num_tokens": 70}),
    "numpy's others": ("clip_cov", {"ratio": np.float64(0.1), "seed": np.int64(3), "preset": np.str_("paper"),
                                    "clip_low": np.float64(0.5), "low": np.float64(-1)},
                       {"ratio": 0.1, "seed": 3, "preset": "paper", "clip_low": 0.5, "low": -1.0}),
    "an open band": ("clip_cov", {"ratio": 0.1, "seed": 3, "low": 0.01, "high": float("inf")},
                     {"ratio": 0.1, "seed": 3, "low": 0.01, "high": 1e300}),
    "no band": ("clip_cov", {"ratio": 0.1, "seed": 3, "low": -float("inf"), "high": np.inf},
                {"ratio": 0.1, "seed": 3, "low": -1e300, "high": 1e300}),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_library(name: str) -> None:
    method, given, plain = NUMBERS[name]
    result = assert_same(make(method, **given), BUDGETS[torch.float64][2], 1e-12)
    assert result.metrics["selected_frac"] > 0
    assert torch.equal(result.loss, fused(make(method, **plain), BUDGETS[torch.float64][2])[0].loss)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed(reentrant: bool, products: list[int]) -> None:
    """The gradients of the loss inside are not the checkpoint's: it has nothing to make again but what others saved."""
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    assert case.mask is not None
    _, right = composed(case)
    for early in (False, True):
        for buffer in (None, torch.zeros_like(case.weight)):
            hidden, weight, bias = leaves = case.leaves()

            def loss(h: Tensor, w: Tensor, b: Tensor, buffer: Tensor | None = buffer) -> Tensor:
                return ek.linear_policy_loss(
                    h, w, case.target, case.old_logprob, case.advantages, case.mask, b, method="kl_cov",
                    memory_budget=BUDGETS[torch.float64][2], grad_buffer=buffer, **case.options,
                ).loss  # fmt: skip

            products.clear()
            with set_checkpoint_early_stop(early):
                checkpoint(loss, hidden, weight, bias, use_reentrant=reentrant).backward()
            if not reentrant:
                assert sum(products) <= 3 * (len(VALID) + int(0.1 * len(VALID))) * H * V
            found = [None if x is None else x.grad for x in leaves]
            if buffer is not None:
                found[1] = buffer
            for ours, theirs in zip(found, right, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def test_constants() -> None:
    """A gradient is never lost without a word."""
    case = make("kl_cov")
    hidden, weight, bias = case.leaves()
    args = (hidden, weight, case.target, case.old_logprob, case.advantages, case.mask, bias)
    for name in ("entropy_coef", "kl_coef", "loss_scale_factor"):
        with pytest.raises(ValueError, match=f"{name}: expected a constant, got a tensor that requires grad"):
            ek.linear_policy_loss(*args, method="kl_cov", **{name: torch.tensor(0.1, requires_grad=True)})
    frozen = (case.hidden, case.weight, *args[2:-1])
    buffer = torch.zeros_like(case.weight)
    with pytest.raises(ValueError, match="grad_buffer: expected None for a weight that needs no gradient"):
        ek.linear_policy_loss(*frozen, grad_buffer=buffer)
    with torch.no_grad():  # as an evaluation with the arguments of a training step
        ek.linear_policy_loss(*args, method="kl_cov", grad_buffer=buffer)
    assert not buffer.any()


def test_without_gradients_and_through_a_head() -> None:
    case = make("kl_cov", ratio=0.1, entropy_coef=0.01)
    expected, right = composed(case)
    with torch.no_grad():
        result = ek.linear_policy_loss(
            case.hidden, case.weight, case.target, case.old_logprob, case.advantages, case.mask, case.bias,
            method="kl_cov", **case.options,
        )  # fmt: skip
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected.loss.detach())
    head = torch.nn.Linear(H, V, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(case.weight)
        head.bias.copy_(case.bias)
    hidden = case.hidden.clone().requires_grad_()
    result = ek.linear_policy_loss(
        hidden, head, case.target, case.old_logprob, case.advantages, case.mask, method="kl_cov", **case.options
    )
    result.loss.backward()
    for ours, theirs in zip((hidden.grad, head.weight.grad, head.bias.grad), right, strict=True):
        torch.testing.assert_close(ours, theirs)


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


COMPILED: dict[str, dict[str, Any]] = {
    "ppo": {"ref_kl_coef": 0.1, "clip_high": None, "loss_agg_mode": "seq-mean-token-sum-norm"},
    "clip_cov": {"ratio": 0.1, "low": 0.01, "high": 50.0, "batch_num_tokens": 123},
    "kl_cov": {"ratio": 0.1, "kl_coef": 2.0},
}


def step(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    case: Case,
    coefficient: float,
    seed: int,
    buffer: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    options = {"seed": seed} if case.method == "clip_cov" else {}
    ref = {"ref_logprob": case.old_logprob} if case.method == "ppo" else {}
    loss, metrics = ek.linear_policy_loss(
        2.0 * (0.5 * hidden), weight, case.target, case.old_logprob, case.advantages, case.mask, 1.0 * bias,
        method=case.method, memory_budget=240_000, entropy_coef=coefficient, grad_buffer=buffer, **case.options,
        **options, **ref,
    )  # fmt: skip
    return loss * 1.0, metrics


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("buffered", (False, True))
@pytest.mark.parametrize("method", LOSSES)
def test_compiled_without_a_graph_break(method: str, buffered: bool) -> None:
    """A new seed and a new coefficient do not compile anew."""
    torch._dynamo.reset()
    case = make(method, **COMPILED[method])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(4):
        results = []
        for function in (step, compiled):
            leaves = case.leaves()
            buffer = torch.zeros_like(case.weight) if buffered else None
            loss, metrics = function(*leaves, case, 0.01 * (i + 1), i, buffer)
            loss.backward()
            gradients = [x.grad for x in leaves if x is not None]
            results.append((loss, metrics, buffer if buffered else gradients[1], gradients[0], gradients[2]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
        assert results[0][2].any() and (gradients[1] is None) == buffered
    assert counter.frame_count <= 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor() -> None:
    torch._dynamo.reset()  # the recompilations of the tests before count towards its limit
    case = make("clip_cov", **COMPILED["clip_cov"])
    leaves = case.leaves()
    torch.compile(step, fullgraph=True)(*leaves, case, 0.01, 3, None)[0].backward()
    case.options |= {"seed": 3, "entropy_coef": 0.01}
    for leaf, right in zip(leaves, composed(case)[1], strict=True):
        assert leaf is not None
        torch.testing.assert_close(leaf.grad, right, rtol=1e-11, atol=1e-14)


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "method": (ValueError, "method: expected one of 'ppo', 'clip_cov', 'kl_cov', got 'grpo'", {"method": "grpo"}),
    "another method's option": (TypeError, "got seed", {"seed": 1}),
    "entropy": (TypeError, "entropy is computed here", {"entropy": torch.zeros(B, L)}),
    "no seed": (ValueError, "seed: expected an int", {"method": "clip_cov"}),
    "a mask and a ratio": (ValueError, "dropped: expected no", {"method": "clip_cov", "ratio": 0.1,
                                                               "dropped": torch.zeros(B, L)}),
    "aggregation": (ValueError, "loss_agg_mode: expected", {"loss_agg_mode": "mean"}),
    "dp_size": (ValueError, "batch_num_tokens: expected", {"dp_size": 2}),
    "reference": (ValueError, "ref_logprob: expected", {"ref_kl_coef": 0.1}),
    "reference's shape": (ValueError, "ref_logprob: expected", {"ref_logprob": torch.zeros(3)}),
    "clip": (ValueError, "clip_low: expected >= 0", {"clip_low": -1.0}),
    "preset": (ValueError, "preset: expected one of", {"method": "kl_cov", "preset": "mine"}),
    "buffer's dtype": (ValueError, "grad_buffer: expected torch.float32", {"grad_buffer": torch.zeros(V, H).half()}),
    "buffer's shape": (ValueError, "grad_buffer: expected torch.float32", {"grad_buffer": torch.zeros(H, V)}),
    "buffer": (TypeError, "grad_buffer: expected a plain torch.Tensor", {"grad_buffer": 3}),
    "buffer that requires grad": (ValueError, "grad_buffer: expected a tensor that does not",
                                  {"grad_buffer": torch.zeros(V, H, requires_grad=True)}),
    "budget": (ValueError, "memory_budget: expected at least", {"memory_budget": 1000}),
    "temperature": (ValueError, "temperature", {"temperature": 0.0}),
    "ignore_index": (TypeError, "ignore_index: expected an int, got float", {"ignore_index": 1.5}),
    "backend": (ValueError, "backend", {"backend": "mkl"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_come_before_anything_is_added(name: str) -> None:
    kind, message, options = ERRORS[name]
    case = make("ppo").to(torch.float32)
    case.old_logprob = case.old_logprob.float()
    hidden, weight, bias = case.leaves()
    buffer = torch.zeros(V, H)
    with pytest.raises(kind, match=message):
        ek.linear_policy_loss(
            hidden, weight, case.target, case.old_logprob, case.advantages, case.mask, bias,
            **{"grad_buffer": buffer, "memory_budget": 120_000, **options},
        )  # fmt: skip
    assert not buffer.any()


def test_errors_of_tensors() -> None:
    case = make("ppo")
    hidden, weight, bias = case.leaves()
    args = [hidden, weight, case.target, case.old_logprob, case.advantages, case.mask]
    for i, value, message in (
        (0, case.hidden[:2], "target: expected the shape of hidden"),
        (1, case.weight.float(), "weight: expected the dtype of hidden"),
        (2, case.target + V, "target: expected ids in"),
        (3, case.old_logprob[:, :3], "old_logprob: expected target's shape"),
        (3, case.target, "old_logprob|floating"),
        (4, case.advantages[:, :3], "advantages: expected"),
        (0, [1.0], "hidden: expected a torch.Tensor"),
        (5, torch.ones(3), "mask: expected"),
    ):
        wrong = [*args[:i], value, *args[i + 1 :]]
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            ek.linear_policy_loss(*wrong, bias)
    with pytest.raises(ValueError, match="grad_buffer: expected None for a weight that needs no gradient"):
        ek.linear_policy_loss(
            hidden, case.weight, *args[2:], case.bias, grad_buffer=torch.zeros(V, H, dtype=torch.float64)
        )


def test_one_backward_pass() -> None:
    case = make("ppo")
    hidden, weight, bias = case.leaves()
    args = (case.target, case.old_logprob, case.advantages, case.mask, bias)
    loss = ek.linear_policy_loss(hidden, weight, *args).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for a second one"):
        loss.backward()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(ek.linear_policy_loss(hidden, weight, *args).loss, hidden, create_graph=True)
    buffer = torch.zeros_like(case.weight)
    loss = ek.linear_policy_loss(hidden, weight, *args, grad_buffer=buffer).loss
    with pytest.raises(RuntimeError, match=r"grad_buffer: expected a loss .* got a factor of 0.5"):
        (0.5 * loss).backward()
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden))
        ek.linear_policy_loss(dual, weight, *args)


def test_metrics_carry_no_gradient() -> None:
    result, _ = fused(make("clip_cov", seed=1), 240_000)
    assert not any(value.requires_grad for value in result.metrics.values())


@pytest.mark.parametrize("place", places("policy_loss"))
def test_a_factor_is_not_rounded(place: Place) -> None:
    """1/3 has no exact bf16; the gradients are rounded, not the factor. Old log-probs may be of any dtype."""
    case = make("ppo", entropy_coef=0.01).to(torch.bfloat16)
    rest = [x.to(place.device) for x in (case.target, case.old_logprob, case.advantages.float(), case.mask)]  # type: ignore[union-attr]
    results = []
    for factor in (1.0, 1 / 3):
        leaves = [x.detach().to(place.device).requires_grad_() for x in case.leaves()]  # type: ignore[union-attr]
        loss = ek.linear_policy_loss(*leaves[:2], *rest, leaves[2], entropy_coef=0.01, backend=place.backend).loss
        (loss * factor).backward()
        results.append([x.grad for x in leaves])
    hidden, third = results[0][0], results[1][0]  # rounded once before the factor, and once after it
    assert torch.equal((hidden.float() * torch.tensor(1 / 3, device=place.device)).bfloat16(), third)


@pytest.mark.parametrize("place", places("policy_loss"))
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
