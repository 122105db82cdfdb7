"""Statistics from hidden states: values and gradients in every mode, against float64 and the same-dtype computation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import entropy_kernels as ek
import linear_cases
from calls import same_bits
from conftest import BackendDevice, backend_devices
from linear_cases import ALL, Linear, budgets, dense, judge, make, references, run
from sample import INF, NAN


def masked(dtype: torch.dtype) -> Linear:
    """A vocabulary masked through the bias, the label of one token among it."""
    case = make(dtype=dtype)
    assert case.bias is not None
    case.bias[::3] = -INF
    case.target.copy_(torch.tensor([1, 2, 3, 4, 5]).repeat(4))
    return case


def ignored(dtype: torch.dtype) -> Linear:
    """Padding that holds anything: it must not reach the head's gradient, where 0 · NaN is NaN."""
    case = make(2, 16, dtype=dtype)
    case.target[0, 1:3], case.target[1] = -100, -100
    case.hidden[0, 1], case.hidden[0, 2], case.hidden[1] = NAN, INF, -INF
    return case


def all_ignored(dtype: torch.dtype) -> Linear:
    case = make(3, dtype=dtype)
    case.target.fill_(-100)
    case.hidden.fill_(NAN)
    return case


def padding(dtype: torch.dtype) -> Linear:
    """Rows of the weight beyond vocab_size hold NaN: 0 · NaN must not reach the hidden states' gradient."""
    case = make(dtype=dtype, vocab_size=750)
    assert case.bias is not None
    case.weight[750:], case.bias[750:] = NAN, INF
    return case


def strided(dtype: torch.dtype) -> Linear:
    """Shifted hidden states of a batch, a weight that is transposed (GPT-2's Conv1D), a bias with a stride."""
    case = make(2, 20, dtype=dtype)
    case.hidden = case.hidden[:, 1:-1]
    case.target = case.target[:, 2:].int()
    case.weight = case.weight.t().contiguous().t()
    assert case.bias is not None
    case.bias = torch.stack([case.bias, case.bias + 1], 1)[:, 0]
    return case


CASES: dict[str, Callable[[torch.dtype], Linear]] = {
    "plain": lambda d: make(dtype=d),
    "no bias": lambda d: make(dtype=d, bias=False),
    "batched": lambda d: make(2, 10, dtype=d, temperature=torch.tensor([[0.7], [1.3]])),
    "one token": lambda d: Linear(torch.ones(12, dtype=d), make(dtype=d).weight, torch.tensor(7)),
    "no tokens": lambda d: make(0, dtype=d),
    "more tokens": lambda d: make(70, dtype=d, vocab=97),
    "V = 1": lambda d: make(dtype=d, vocab=1),
    "V = 97": lambda d: make(dtype=d, vocab=97),
    "V = 1500": lambda d: make(dtype=d, vocab=1500),
    "H = 1": lambda d: make(dtype=d, features=1),
    "temperature": lambda d: make(dtype=d, temperature=0.5),
    "temperatures": lambda d: make(dtype=d, temperature=torch.tensor([0.5, 1.0, 2.0, 0.8, 3.0]).repeat(4)),
    "softcap": lambda d: make(dtype=d, softcap=2.0, temperature=0.7),
    "masked": masked,
    "ignored": ignored,
    "all ignored": all_ignored,
    "padding": padding,
    "strided": strided,
}


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("on", backend_devices("linear_token_stats"))
def test_every_mode(name: str, dtype: torch.dtype, on: BackendDevice) -> None:
    """Logits kept, and made again in one tile and in many: each within the errors of materialised logits."""
    if dtype not in on.dtypes:
        pytest.skip("fp64 is for the CPU")
    if on.interpreted and (dtype != torch.float32 or name not in ("plain", "masked", "ignored")):
        pytest.skip("the tiles are the same code; the kernels have their own tests")
    case = CASES[name](dtype).to(on.device)
    modes = list(budgets(case))
    assert modes[0][0].startswith("keep") and (case.target.numel() < 20 or len(case.weight) < 800 or len(modes) > 1)
    by = references(case)
    for _, budget in modes[:2] if on.interpreted else modes:
        judge(case, run(case, memory_budget=budget, backend=on.backend), by=by)
    judge(case, run(case, grad=(), backend=on.backend), by=by)


def test_modes_are_equal() -> None:
    """To rounding, and bit for bit where the tiles are the same."""
    case = make(40, vocab=1500, dtype=torch.float64)
    results = [run(case, memory_budget=budget) for _, budget in budgets(case)]
    assert len(results) >= 4
    for other in results[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("logits_dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_logits_dtype(dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    case = make(20, dtype=dtype, logits_dtype=logits_dtype)
    for _, budget in budgets(case):
        judge(case, run(case, memory_budget=budget))


def test_fp32_logits_of_bf16_states_keep_the_entropy() -> None:
    """The products of bf16 numbers are exact in fp32: the entropy is, too, where bf16 logits are off by 0.01."""
    case = make(20, dtype=torch.bfloat16, vocab=1500, logits_dtype=torch.float32)
    exact = dense(case, torch.float64)
    for _, budget in budgets(case):
        results = run(case, memory_budget=budget)
        torch.testing.assert_close(results["entropy"].double(), exact["entropy"], rtol=0, atol=1e-5)
        torch.testing.assert_close(results["logprob"].double(), exact["logprob"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_weight_gradient_rounds_once(dtype: torch.dtype) -> None:
    """Over many tiles the head's gradient is as exact as one product of the whole, and so is the hidden states'."""
    case = make(300, features=32, vocab=1500, dtype=dtype)
    exact, single = dense(case, torch.float64), dense(case, dtype)
    modes = list(budgets(case))
    assert "recompute" in modes[-1][0]
    for _, budget in modes:
        results = run(case, memory_budget=budget)
        for name in ("d_weight", "d_hidden", "d_bias"):
            error, allowed = ((x[name].double() - exact[name]).norm() for x in (results, single))
            assert error <= 1.5 * allowed + 1e-6 * exact[name].norm(), f"{name}: {error:.3g} > 1.5 · {allowed:.3g}"


SUBSETS = [c for n in (1, 2, 3) for c in itertools.combinations(("hidden", "weight", "bias"), n)]


@pytest.mark.parametrize("grad", SUBSETS, ids="+".join)
def test_gradient_subsets(grad: tuple[str, ...]) -> None:
    """Each gradient alone and with others; a plan for just them; nothing for the rest."""
    case = make(40, dtype=torch.float32)
    leaves = case.copy(*grad)
    everything = run(case)
    for budget in (1 << 30, 40_000):
        plan = ek.linear_plan(leaves.hidden, leaves.weight, leaves.bias, memory_budget=budget)
        assert plan.mode == ("keep" if budget == 1 << 30 else "recompute")
        products = 1 + ("hidden" in grad) + ("weight" in grad)
        assert plan.products == products + (plan.mode == "recompute")
        results = run(case, grad=grad, memory_budget=budget)
        assert {f"d_{name}" for name in grad} == {name for name in results if name.startswith("d_")}
        judge(case, results)
        for name in grad:
            torch.testing.assert_close(results[f"d_{name}"], everything[f"d_{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("names", [c for n in (1, 2) for c in itertools.combinations(linear_cases.DIFFERENTIABLE, n)])
def test_through_every_output(names: tuple[str, ...]) -> None:
    case = make(24)
    for _, budget in budgets(case):
        judge(case, run(case, names=names, memory_budget=budget), names)


def test_zero_upstream_rows_contribute_nothing() -> None:
    """Padding that a loss mask removes, with labels that are not ignore_index, may hold NaN."""
    case = make(24)
    case.hidden[2::6], case.hidden[4::6] = NAN, INF
    clean = make(24)
    for tensor in (case, clean):
        tensor.target[0] = -100
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 1.0]).repeat(4)
    for _, budget in budgets(case):
        gradients = []
        for each in (case, clean):
            leaves = each.copy("hidden", "weight", "bias")
            out = ek.linear_logprob_entropy(
                leaves.hidden, leaves.weight, leaves.target, leaves.bias, memory_budget=budget
            )
            torch.autograd.backward([out.logprob, out.entropy], [weights, weights])
            gradients.append((leaves.hidden.grad, leaves.weight.grad, leaves.bias.grad))
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected)


def test_expanded_upstream() -> None:
    case = make(24)
    for _, budget in budgets(case):
        leaves = case.copy("hidden", "weight", "bias")
        out = ek.linear_logprob_entropy(leaves.hidden, leaves.weight, leaves.target, leaves.bias, memory_budget=budget)
        (out.logprob.sum() + out.entropy.mean()).backward()
        again = case.copy("hidden", "weight", "bias")
        logits = torch.nn.functional.linear(again.hidden, again.weight, again.bias)
        other = ek.logprob_entropy(logits, case.target)
        (other.logprob.sum() + other.entropy.mean()).backward()
        for name in ("hidden", "weight", "bias"):
            torch.testing.assert_close(getattr(leaves, name).grad, getattr(again, name).grad, rtol=1e-4, atol=1e-5)


def test_second_backward() -> None:
    """The kept logits are overwritten by the first pass; the second makes them again."""
    case = make(24)
    for _, budget in budgets(case):
        leaves = case.copy("hidden", "weight", "bias")
        out = ek.linear_logprob_entropy(leaves.hidden, leaves.weight, leaves.target, leaves.bias, memory_budget=budget)
        inputs = (leaves.hidden, leaves.weight, leaves.bias)
        first = torch.autograd.grad(out.entropy.sum(), inputs, retain_graph=True)
        second = torch.autograd.grad(out.entropy.sum(), inputs)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)


def test_inputs_are_never_changed() -> None:
    case = make(24, dtype=torch.float32)
    before = [x.clone() for x in (case.hidden, case.weight, case.bias, case.target)]
    for _, budget in budgets(case):
        run(case, memory_budget=budget)
    for now, then in zip((case.hidden, case.weight, case.bias, case.target), before, strict=True):
        assert same_bits(now, then)


def test_two_runs_are_bitwise_equal() -> None:
    case = make(33, vocab=1500)
    for _, budget in budgets(case):
        a, b = run(case, memory_budget=budget), run(case, memory_budget=budget)
        assert all(same_bits(a[name], b[name]) for name in a)


def test_only_two_statistics() -> None:
    case = make(24)
    two = ek.linear_logprob_entropy(case.hidden, case.weight, case.target, case.bias)
    four = ek.linear_token_stats(case.hidden, case.weight, case.target, case.bias)
    assert type(two).__name__ == "LogprobEntropy" and type(four).__name__ == "TokenStats"
    torch.testing.assert_close(two.entropy, four.entropy)
    assert not any(x.requires_grad for x in (*two, *four))


def test_tied_embeddings() -> None:
    """The head is the embedding: both gradients meet in one tensor."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(203, 12)
    ids, target = torch.arange(5), torch.arange(5) + 7
    results = []
    for function in ("ours", "dense"):
        embedding.zero_grad()
        hidden = torch.tanh(embedding(ids))
        if function == "ours":
            out = ek.linear_logprob_entropy(hidden, embedding.weight, target)
        else:
            out = ek.logprob_entropy(hidden @ embedding.weight.t(), target)
        (out.logprob.sum() - out.entropy.sum()).backward()
        assert embedding.weight.grad is not None
        results.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Products in autocast's dtype; the gradients of fp32 parameters are not rounded to it."""
    case = make(20)
    half = Linear(*(x.to(dtype) for x in (case.hidden, case.weight)), case.target, case.bias.to(dtype))  # type: ignore[union-attr]
    expected = run(half)
    with torch.autocast("cpu", dtype=dtype):
        modes = list(budgets(case))
    for _, budget in modes:
        with torch.autocast("cpu", dtype=dtype):
            results = run(case, memory_budget=budget)
        for name in results:
            assert results[name].dtype == torch.float32
            torch.testing.assert_close(results[name], expected[name].float(), rtol=0.05, atol=0.05)
    assert not same_bits(results["d_weight"], results["d_weight"].to(dtype).float())


def test_autocast_against_materialised_logits() -> None:
    """Under bf16 autocast with fp32 parameters: the same values, and gradients that are no worse, in fp32."""
    case = make(60, features=32, vocab=1500)
    exact = dense(case, torch.float64)
    leaves = case.copy("hidden", "weight", "bias")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(leaves.hidden, leaves.weight, leaves.bias)
        out = ek.token_stats(logits, case.target)
        modes = list(budgets(case))
    assert logits.dtype == torch.bfloat16 and len(modes) > 2
    up = linear_cases.upstream(case)
    inputs = [leaves.hidden, leaves.weight, leaves.bias]
    gradients = torch.autograd.grad([getattr(out, name) for name in up], inputs, list(up.values()))
    theirs = dict(zip(("d_hidden", "d_weight", "d_bias"), gradients, strict=True))
    for _, budget in modes:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = run(case, memory_budget=budget)
        for name, value in out._asdict().items():
            error, allowed = ((x.double() - exact[name]).norm() for x in (ours[name], value))
            assert error <= 1.1 * allowed, f"{name}: {error:.3g} > {allowed:.3g}"
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype == torch.float32
            error, allowed = ((x.double() - exact[name]).norm() for x in (ours[name], value))
            assert error <= 1.1 * allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("chunks", ("keep", "recompute"))
def test_gradcheck(chunks: str) -> None:
    case = make(4, features=3, vocab=130, dtype=torch.float64, temperature=0.7, softcap=5.0)
    case.target[1] = -100
    budget = {mode.split()[0]: b for mode, b in budgets(case)}[chunks]
    leaves = case.copy("hidden", "weight", "bias")

    def values(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ek.linear_token_stats(h, w, case.target, b, **case.kwargs, memory_budget=budget)[:3]

    # MKL's sums depend on where in memory their factors lie
    assert torch.autograd.gradcheck(values, (leaves.hidden, leaves.weight, leaves.bias), nondet_tol=1e-12)


# ---- teeth: what must fail does -------------------------------------------------------------------------------------


def test_a_dropped_gradient_fails() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        case = make(20, dtype=dtype, vocab=97)
        good = run(case)
        judge(case, good)
        for name in ("d_bias", "d_weight", "d_hidden"):
            with pytest.raises(AssertionError, match=name):
                judge(case, good | {name: torch.zeros_like(good[name])})
            with pytest.raises(AssertionError, match=name):
                judge(case, good | {name: good[name] * 1.1})


def test_a_missing_merge_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the last tile in place of the merged one; the sum of all but one tile's gradients."""
    from entropy_kernels.ops import linear_tiles

    case = make(20, vocab=1500)
    budget = next(b for mode, b in budgets(case) if mode.startswith("recompute"))
    judge(case, run(case, memory_budget=budget))
    with monkeypatch.context() as patch:
        patch.setattr(linear_tiles, "merge", lambda states, temperature: states[-1])
        with pytest.raises(AssertionError):
            judge(case, run(case, memory_budget=budget))
    with monkeypatch.context() as patch:
        patch.setattr(linear_tiles, "multiply_add", lambda total, a, b: linear_tiles.multiply(total, a, b))
        with pytest.raises(AssertionError, match="d_hidden"):
            judge(case, run(case, memory_budget=budget))
