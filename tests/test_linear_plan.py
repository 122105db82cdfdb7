"""linear_plan: its memory against what torch allocates, its modes, its tiles."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels._memory import peak_allocated
from entropy_kernels.ops import linear_plan as planning
from linear_cases import Linear, budgets, make

GRADS = (("hidden", "weight", "bias"), ("hidden",), ("weight",), ())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """oneDNN's workspace, which is not counted, grows with the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peak_of(case: Linear, grad: tuple[str, ...], budget: int) -> int:
    """Bytes that torch's allocator hands out at once in forward and backward, without results and gradients."""
    leaves = case.copy(*grad)
    ours = 0

    def forward_and_backward() -> None:
        nonlocal ours
        out = ek.linear_logprob_entropy(
            leaves.hidden, leaves.weight, leaves.target, leaves.bias, **case.kwargs, memory_budget=budget
        )
        results = [*out]
        if grad:
            results += torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [getattr(leaves, n) for n in grad])
        ours = sum(value.numel() * value.element_size() for value in results)

    peak = peak_allocated(forward_and_backward, torch.device("cpu"))
    assert peak > 0
    return peak - ours


@functools.cache
def workspace_of_products(rows: int, features: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes that torch's own products take beside their results: oneDNN packs its operands for some CPUs."""
    shapes = ((rows, features), (vocab, features), (rows, planning.padded(vocab)))
    hidden, weight, logits = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    logits = logits[:, :vocab]  # as a tile has them
    products = ((hidden, weight.t()), (logits, weight), (logits.t(), hidden))
    results = [logits, torch.mm(logits, weight), torch.mm(logits.t(), hidden)]
    device = torch.device("cpu")
    return max(
        peak_allocated(functools.partial(torch.mm, *factors, out=out), device)
        for factors, out in zip(products, results, strict=True)
    )


@pytest.mark.parametrize("grad", GRADS, ids=lambda g: "+".join(g) or "none")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_predicted_memory(dtype: torch.dtype, grad: tuple[str, ...], undisturbed: None) -> None:
    """What is used stays within the plan, the plan within the budget; and the plan is not far above what is used."""
    case = make(300, features=64, vocab=6000, dtype=dtype)
    for options in ({}, {"logits_dtype": torch.float32}):
        each = dataclasses.replace(case, kwargs=options)
        leaves = each.copy(*grad)
        for _, budget in budgets(each):
            plan = ek.linear_plan(leaves.hidden, leaves.weight, leaves.bias, **options, memory_budget=budget)
            used = peak_of(each, grad, budget)
            small = 100_000 + 40 * 300 + 4 * 300 * 64  # vectors of tokens
            own = workspace_of_products(300, 64, 6000, dtype)
            assert used <= plan.peak_bytes + own + small, f"{plan}: {used}"
            assert plan.peak_bytes <= budget
            assert plan.peak_bytes <= 2.5 * used + small, f"{plan}: {used}"
            if plan.mode == "keep":
                assert plan.kept_bytes >= 300 * 6000 * (options.get("logits_dtype") or dtype).itemsize


def large(rows: int, features: int, vocab: int, *grad: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shapes = {"hidden": (rows, features), "weight": (vocab, features)}
    return [torch.empty(s, dtype=dtype, device="meta", requires_grad=n in grad) for n, s in shapes.items()]


@pytest.mark.parametrize("vocab", (32_000, 128_256, 151_936, 262_144))
def test_plans_of_real_sizes(vocab: int) -> None:
    """At 8192 tokens: within a gigabyte, wide tiles, all rows in each, so that the head's gradient is never summed."""
    plan = ek.linear_plan(*large(8192, 4096, vocab, "hidden", "weight"))
    assert plan.mode == ("keep" if vocab == 32_000 else "recompute")
    assert plan.products == (3 if plan.mode == "keep" else 4)
    assert plan.peak_bytes <= 1 << 30 and plan.row_chunks == 1 and plan.vocab_chunk >= 8192
    frozen = ek.linear_plan(*large(8192, 4096, vocab, "hidden"))
    assert frozen.products == plan.products - 1
    rollout = ek.linear_plan(*large(8192, 4096, vocab))
    assert rollout.mode == "no_grad" and rollout.products == 1 and rollout.peak_bytes <= 1 << 30
    roomy = ek.linear_plan(*large(8192, 4096, vocab, "hidden", "weight"), memory_budget=8 << 30)
    assert roomy.mode == "keep" and roomy.kept_bytes >= 8192 * vocab * 2


def test_a_million_tokens_without_gradients_take_little() -> None:
    plan = ek.linear_plan(*large(1 << 20, 4096, 151_936), memory_budget=2 << 30)
    assert plan.peak_bytes <= 2 << 30 and plan.row_chunk >= 4096 and plan.vocab_chunk >= 1024


def test_grad_mode_counts() -> None:
    hidden, weight = large(64, 8, 1000, "hidden", "weight")
    assert ek.linear_plan(hidden, weight).mode == "keep"
    with torch.no_grad():
        assert ek.linear_plan(hidden, weight).mode == "no_grad"


def test_tiles_cover_everything_once() -> None:
    case = make(300, features=64, vocab=6001)
    for grad in GRADS:
        leaves = case.copy(*grad)
        for _, budget in budgets(case):
            plan = ek.linear_plan(leaves.hidden, leaves.weight, leaves.bias, memory_budget=budget)
            assert (plan.row_chunks - 1) * plan.row_chunk < 300 <= plan.row_chunks * plan.row_chunk
            assert (plan.vocab_chunks - 1) * plan.vocab_chunk < 6001 <= plan.vocab_chunks * plan.vocab_chunk


def test_padded() -> None:
    assert [planning.padded(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


@pytest.mark.parametrize("grad", GRADS[:3], ids="+".join)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_predicted_memory_of_a_policy_loss(dtype: torch.dtype, grad: tuple[str, ...], undisturbed: None) -> None:
    """What is used stays within the plan, and the plan is not far above it; the budget bounds what is no gradient."""
    rows, features, vocab = 600, 64, 6000
    case = make(rows, features=features, vocab=vocab, dtype=dtype)
    old, advantages = torch.zeros(rows), torch.linspace(-1, 1, rows)
    for logits_dtype in (None, torch.float32):
        seen = set()
        for budget in (1 << 30, 9_000_000, 2_000_000):
            leaves = case.copy(*grad)
            plan = ek.linear_plan(
                leaves.hidden, leaves.weight, leaves.bias, memory_budget=budget, logits_dtype=logits_dtype,
                policy_loss=True,
            )  # fmt: skip
            assert plan.mode == "in_forward" and plan.products == 1 + ("hidden" in grad) + ("weight" in grad)
            assert (plan.row_chunks - 1) * plan.row_chunk < rows <= plan.row_chunks * plan.row_chunk
            seen.add(plan.row_chunks)
            given = 0

            def forward_and_backward(leaves: Linear = leaves, budget: int = budget, logits: Any = logits_dtype) -> None:
                nonlocal given
                loss = ek.linear_policy_loss(
                    leaves.hidden, leaves.weight, case.target, old, advantages, None, leaves.bias, method="clip_cov",
                    seed=1, low=-1e9, high=1e9, ratio=2e-3, memory_budget=budget, logits_dtype=logits,
                ).loss  # fmt: skip
                gradients = torch.autograd.grad(loss, [getattr(leaves, n) for n in grad])
                given = sum(value.numel() * value.element_size() for value in gradients)

            used = peak_allocated(forward_and_backward, torch.device("cpu")) - given
            small = 300_000 + 100 * rows + 4 * rows * features
            own = workspace_of_products(rows, features, vocab, dtype)
            assert used <= plan.peak_bytes + own + small, f"{plan}: {used}"
            assert plan.peak_bytes <= 2.5 * used + small, f"{plan}: {used}"
            fixed = vocab * features * 8 + rows * features * 24
            assert plan.peak_bytes <= budget + fixed
        assert 1 in seen and max(seen) > 3


@pytest.mark.parametrize("changes", [0, 3, 16, None])
def test_the_least_budget_of_a_policy_loss_is_the_one_it_names(changes: int | None) -> None:
    def rows(budget: int) -> int:
        dtypes = [torch.float32] * 4
        return planning.loss_rows(
            planning.Problem(50, 32, 300, *dtypes, "cpu", True, True, False, False, budget), changes
        )

    with pytest.raises(ValueError, match="memory_budget: expected at least") as refused:
        rows(1)
    named = re.search(r"at least (\d+) bytes", str(refused.value))
    assert named is not None
    least = int(named[1])
    assert rows(least) >= 16
    with pytest.raises(ValueError, match=f"expected at least {least} bytes"):
        rows(least - 1)


# --- what the default budget is, and what sums in fp32 take -----------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU whose free memory a test sets; "calls" counts how often it is asked."""
    state: dict[str, Any] = {"free": 78 << 30, "reserved": 0, "allocated": 0, "capturing": False, "calls": 0}

    def free(device: torch.device) -> tuple[int, int]:
        state["calls"] += 1
        return state["free"], 80 << 30

    monkeypatch.setattr(planning, "_budgets", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


@pytest.mark.parametrize(
    ("free", "held", "budget"),
    [(78 << 30, 0, 4 << 30), (40 << 30, 8 << 30, 3 << 30), (24 << 30, 0, 3 << 29), (1 << 20, 0, 1 << 30)],
)
def test_the_default_budget_follows_free_memory(asked: dict[str, Any], free: int, held: int, budget: int) -> None:
    asked.update(free=free, reserved=held + (5 << 30), allocated=5 << 30)
    assert planning.default_budget(GPU) == budget
    for device in ("cpu", "meta"):
        assert planning.default_budget(torch.device(device)) == 1 << 30
    assert asked["calls"] == 1


def test_a_gpu_is_asked_once(asked: dict[str, Any]) -> None:
    """The plan of an equal call stays the same, and a call does not pay for the driver."""
    first = planning.default_budget(GPU)
    asked["free"] = 0
    assert planning.default_budget(GPU) == first and asked["calls"] == 1
    assert planning.default_budget(torch.device("cuda", 1)) == 1 << 30  # another GPU has memory of its own


def test_a_capture_does_not_ask(asked: dict[str, Any]) -> None:
    asked["capturing"] = True
    assert planning.default_budget(GPU) == 1 << 30 and asked["calls"] == 0
    asked["capturing"] = False
    assert planning.default_budget(GPU) == 4 << 30
    asked["capturing"] = True
    assert planning.default_budget(GPU) == 4 << 30 and asked["calls"] == 1  # as before the capture


def test_an_allocator_that_keeps_no_statistics(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> int:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    monkeypatch.setattr(torch.cuda, "memory_reserved", refuse)
    assert planning.default_budget(GPU) == 4 << 30


def test_compiled_code_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_budgets", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("asked"))

    @torch.compile(backend="eager", fullgraph=True)
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + planning.default_budget(GPU)

    zero = torch.zeros((), dtype=torch.int64)
    assert add(zero) == 1 << 30
    planning._budgets[0] = 3 << 30  # found by an eager call since
    assert add(zero) == 3 << 30


def test_a_budget_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "default_budget", lambda device: 1 << 32)
    arguments = large(8192, 4096, 128_256, "hidden", "weight")
    assert ek.linear_plan(*arguments).mode == "keep"
    assert ek.linear_plan(*arguments, memory_budget=1 << 30).mode == "recompute"
    assert ek.linear_plan(*arguments, policy_loss=True).row_chunks == 1
    assert ek.linear_plan(*arguments, policy_loss=True, memory_budget=1 << 30).row_chunks == 3


def test_a_product_that_cannot_be_added_where_it_lies_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part but the first makes a second fp32 matrix of the head's size; one part adds to nothing."""
    matrix = 128_256 * 4096 * 4
    for budget, parts in ((1 << 30, 3), (4 << 30, 1)):
        peaks = []
        for adds in (True, False):
            monkeypatch.setattr("entropy_kernels.linear.adds_to_fp32", lambda dtype, device, adds=adds: adds)
            plan = ek.linear_plan(
                *large(8192, 4096, 128_256, "hidden", "weight"), memory_budget=budget, policy_loss=True
            )
            assert plan.row_chunks == parts
            peaks.append(plan.peak_bytes)
        assert peaks[1] - peaks[0] == (matrix if parts > 1 else 0)
    halves, single = ([dtype] * 4 for dtype in (torch.bfloat16, torch.float32))
    for dtypes, extra in ((halves, 4 + 4), (single, 0)):
        p = planning.Problem(8192, 64, 6000, *dtypes, "cuda", True, True, False, False, 1 << 30)
        whole, cut = (planning._bytes_per_element(p, row_tiles, True)[1] for row_tiles in (False, True))
        assert cut - whole == extra


def test_what_a_product_of_its_own_takes_is_within_the_plan(undisturbed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that cannot add to an fp32 sum, acted on a CPU: the second matrix is there, and is stated."""
    from entropy_kernels.ops import linear_policy_loss as op

    def make_and_add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        total.add_(torch.mm(a, b))

    monkeypatch.setattr(op, "multiply_add", make_and_add)
    rows, features, vocab, budget = 600, 64, 6000, 2_000_000
    case = make(rows, features=features, vocab=vocab, dtype=torch.float32)
    leaves = case.copy("hidden", "weight")
    old, advantages = torch.zeros(rows), torch.linspace(-1, 1, rows)
    tensors = (leaves.hidden, leaves.weight, case.target, old, advantages, None)

    def forward() -> None:
        loss = ek.linear_policy_loss(*tensors, memory_budget=budget).loss
        torch.autograd.grad(loss, (leaves.hidden, leaves.weight))

    used = peak_allocated(forward, torch.device("cpu")) - 4 * features * (rows + vocab)
    p = planning.Problem(rows, features, vocab, *[torch.float32] * 4, "cpu", True, True, False, False, budget)
    without, stated = (planning.loss_plan(p, 0, adds).peak_bytes for adds in (True, False))
    small = 300_000 + 100 * rows
    assert without + small < used <= stated + small
