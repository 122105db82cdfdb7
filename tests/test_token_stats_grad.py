"""Gradients of the statistics: which outputs are used, how the upstream gradient lies in memory, in place, twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import entropy_kernels as ek
from calls import bound, check, run, same_bits, upstream
from conftest import BackendDevice
from entropy_kernels._rows import bits, wanted
from reference import DIFFERENTIABLE
from sample import Sample, normal, plain

COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(DIFFERENTIABLE, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64), ids=str)
def test_through_every_combination(names: tuple[str, ...], dtype: torch.dtype, on: BackendDevice) -> None:
    if dtype not in on.dtypes:
        pytest.skip(f"{dtype} is not promised on {on}")
    check(plain(dtype, on.device, vocab=1500, temperature=0.6), on, *names)
    if "collision" not in names:
        check(plain(dtype, on.device, temperature=0.6), on, *names, function="logprob_entropy")


def test_gradients_add_up(on: BackendDevice) -> None:
    """Two backward passes accumulate to what one pass through the sum gives."""
    sample = plain(torch.float32, on.device)
    logits = sample.logits.clone().requires_grad_()
    outputs = ek.token_stats(logits, sample.target, backend=on.backend)
    outputs.logprob.sum().backward(retain_graph=True)
    (2 * outputs.entropy).sum().backward()
    ones = torch.ones(5, device=on.device)
    assert logits.grad is not None
    _, together = run(sample, on, grads={"logprob": ones, "entropy": 2 * ones})
    torch.testing.assert_close(logits.grad, together)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_expanded_upstream(name: str, on: BackendDevice) -> None:
    """.sum() hands over a gradient of stride 0; a kernel that assumes stride 1 reads beyond its only element."""
    sample = plain(torch.float32, on.device, rows=6)
    logits = sample.logits.clone().requires_grad_()
    getattr(ek.token_stats(logits, sample.target, backend=on.backend), name).sum().backward()
    assert logits.grad is not None
    bound(sample).check_gradient(logits.grad, **{name: torch.ones(6, device=on.device)})


def test_strided_upstream(on: BackendDevice) -> None:
    """Upstream gradients that are columns of a wider buffer, a transposed matrix, and reversed by flip's copy."""
    sample = Sample(
        normal(3, 4, 97, dtype=torch.float32, device=on.device), torch.arange(12, device=on.device).view(3, 4)
    )
    wide = torch.full((3, 4, 5), torch.nan, device=on.device)
    wide[..., 2] = torch.randn(3, 4, device=on.device)
    grads = {
        "logprob": wide[..., 2],
        "entropy": torch.randn(4, 3, device=on.device).t(),
        "collision": torch.randn(4, device=on.device).expand(3, 4),
    }
    _, dlogits = run(sample, on, grads=grads)
    assert dlogits is not None
    bound(sample).check_gradient(dlogits, **grads)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_upstream_of_another_layout_and_dtype(dtype: torch.dtype, on: BackendDevice) -> None:
    """A loss in bf16 or fp64 sends its gradient through autograd's cast, so the op sees fp32."""
    sample = plain(torch.float32, on.device)
    logits = sample.logits.clone().requires_grad_()
    weight = torch.randn(5, device=on.device).to(dtype)
    (ek.logprob_entropy(logits, sample.target, backend=on.backend).logprob.to(dtype) * weight).sum().backward()
    assert logits.grad is not None
    bound(sample).check_gradient(logits.grad, logprob=weight.float())


def test_zero_and_infinite_upstream(on: BackendDevice) -> None:
    """A token whose weight is 0 gets a gradient of exactly 0; an infinite weight is not hidden."""
    sample = plain(torch.float32, on.device, rows=3)
    grads = {name: torch.tensor([0.0, 1.0, 2.0], device=on.device) for name in DIFFERENTIABLE}
    _, dlogits = run(sample, on, grads=grads)
    assert dlogits is not None and not dlogits[0].any() and dlogits[1:].all()
    sample.logits[0, 3] = torch.nan  # padding may hold anything
    _, dlogits = run(sample, on, grads=grads)
    assert dlogits is not None and not dlogits[0].any() and dlogits[1:].all()
    grads["logprob"][1] = torch.inf
    _, dlogits = run(sample, on, grads=grads)
    assert dlogits is not None and not dlogits[1].isfinite().any() and dlogits[[0, 2]].isfinite().all()


def test_nothing_is_computed_without_a_gradient(on: BackendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """No output used, or only vocab_covariance, or a frozen input: the backward kernel does not run."""
    from entropy_kernels.backends import registry

    calls: list[str] = []
    original = registry.kernel

    def spy(op: str, name: str, *rest: object):
        calls.append(name)
        return original(op, name, *rest)

    monkeypatch.setattr(registry, "kernel", spy)
    sample = plain(torch.float32, on.device)
    frozen = ek.token_stats(sample.logits, sample.target, backend=on.backend)
    assert calls == ["token_stats_forward"]
    assert not any(value.requires_grad for value in frozen)

    logits = sample.logits.clone().requires_grad_()
    other = torch.ones(5, device=on.device, requires_grad=True)
    ek.token_stats(logits, sample.target, backend=on.backend)
    other.sum().backward()
    assert logits.grad is None and calls.count("token_stats_backward") == 0
    with torch.no_grad():
        assert not ek.token_stats(logits, sample.target, backend=on.backend).logprob.requires_grad
    with torch.inference_mode():
        ek.token_stats(sample.logits, sample.target, backend=on.backend)
    assert calls.count("token_stats_backward") == 0
    ek.token_stats(logits, sample.target, backend=on.backend).entropy.sum().backward()
    assert calls.count("token_stats_backward") == 1


def test_only_wanted_statistics_are_computed(on: BackendDevice) -> None:
    """logprob_entropy asks for two statistics and the kernel makes two: no row for the others, the state is small."""
    sample = plain(torch.float32, on.device)
    temperature = torch.ones(1, device=on.device)
    found = {}
    for want in range(1, 16):
        op = torch.ops.entropy_kernels.token_stats
        stats, state = op(
            sample.logits[None], sample.target, temperature, 0.0, -100, 0, 97, want, False, "", on.backend
        )
        assert stats.shape == (want.bit_count(), 5)
        assert state.shape == (6 if want & 12 else 4, 5)
        found[want] = dict(zip([x.name for x in wanted(want)], stats, strict=True))
    for want, values in found.items():
        for name, value in values.items():
            assert value.equal(found[bits(name)][name]), (want, name)


def test_vocab_covariance_carries_no_gradient(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device)
    outputs = ek.token_stats(sample.logits.clone().requires_grad_(), sample.target, backend=on.backend)
    assert outputs.logprob.requires_grad and outputs.entropy.requires_grad and outputs.collision.requires_grad
    assert not outputs.vocab_covariance.requires_grad


def test_double_backward_is_a_clear_error(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device)
    logits = sample.logits.clone().requires_grad_()
    outputs = ek.logprob_entropy(logits, sample.target, backend=on.backend)
    (gradient,) = torch.autograd.grad(outputs.entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kwargs", ({}, {"temperature": 0.5}, {"softcap": 2.0}, {"vocab_size": 5}), ids=str)
def test_gradcheck(kwargs: dict, on: BackendDevice) -> None:
    if torch.float64 not in on.dtypes:
        pytest.skip("gradcheck needs fp64")
    if on.interpreted and kwargs:
        pytest.skip("a hundred forward passes in the interpreter: once")
    logits = torch.randn(2, 3, 7, dtype=torch.float64, device=on.device, requires_grad=True)
    target = torch.tensor([[0, 4, 2], [-100, 3, 1]], device=on.device)
    if on.interpreted:
        logits, target = logits[:, :1].detach().requires_grad_(), target[:, :1]

    def values(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ek.token_stats(z, target, **kwargs, backend=on.backend)[:3]

    assert torch.autograd.gradcheck(values, (logits,), nondet_tol=0.0)


def test_label_at_probability_zero_still_pulls(on: BackendDevice) -> None:
    """At logprob -200 the label's gradient is 1 (docs/math.md §2): in fp32 its p is 0, and a factor p would hide it."""
    logits = torch.zeros(1, 97, device=on.device)
    logits[0, 3] = -200
    sample = Sample(logits, torch.tensor([3], device=on.device))
    for names in (("logprob",), ("logprob", "entropy", "collision")):
        _, dlogits = run(sample, on, grads={name: torch.ones(1, device=on.device) for name in names})
        assert dlogits is not None and dlogits[0, 3].item() == pytest.approx(1.0, abs=1e-6)


# ---- what is handed out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", (False, True))
def test_results_are_no_views_and_may_be_written_to(grad: bool, on: BackendDevice) -> None:
    """Parts of one storage; writing to one leaves the others, and what autograd has saved of them, as they are."""
    sample = plain(torch.float32, on.device, rows=6)
    logits = sample.logits.clone().requires_grad_(grad)
    out = ek.token_stats(logits.view(2, 3, -1), sample.target.view(2, 3), backend=on.backend)
    expected = [x.detach().clone() for x in out]
    assert len({x.untyped_storage()._cdata for x in out}) == 1
    assert all(x._base is None and not x._is_view() and x.is_contiguous() for x in out)
    weight = torch.full((2, 3), 2.0, device=on.device, requires_grad=True)
    saved = (out.entropy * weight).sum()  # keeps the entropy for the weight's gradient
    out.logprob.mul_(weight)
    out.vocab_covariance.zero_()
    out.collision.add_(weight)
    saved.backward(retain_graph=True)
    assert torch.equal(weight.grad, expected[1])
    assert torch.equal(out.logprob, 2 * expected[0]) and torch.equal(out.entropy, expected[1])
    assert torch.equal(out.collision, 2 + expected[2]) and not out.vocab_covariance.any()
    assert out.entropy.requires_grad is grad and not out.vocab_covariance.requires_grad
    if grad:
        logits.grad = None
        out.logprob.sum().backward()
        bound(sample).check_gradient(logits.grad, logprob=torch.full((6,), 2.0, device=on.device))
    out.entropy.unsqueeze_(0).squeeze_(0)
    out.entropy.set_(expected[0])  # type: ignore[call-overload]
    assert torch.equal(out.entropy, expected[0])


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_a_statistic_without_a_gradient_costs_none(names: tuple[str, ...], on: BackendDevice) -> None:
    """The backward pass is asked for those alone that have one, and gives the bits that zeros for the others give.

    On a GPU Triton compiles kernels of their own for other statistics, which may round otherwise.
    """
    sample = plain(torch.float32, on.device, rows=6)
    grads = {name: torch.randn(6, device=on.device) for name in names}
    results = []
    for given in (grads, {**dict.fromkeys(DIFFERENTIABLE, torch.zeros(6, device=on.device)), **grads}):
        logits = sample.logits.clone().requires_grad_()
        out = ek.token_stats(logits, sample.target, backend=on.backend)
        with Recorded() as recorded:
            results += torch.autograd.grad([getattr(out, x) for x in given], logits, [*given.values()])
        (of,) = (args for name, args in recorded.calls if name == "entropy_kernels::token_stats_backward")
        assert len(of[0]) == len(given)
        stacks = [name for name, _ in recorded.calls if name in ("aten::stack", "aten::cat", "aten::zeros")]
        assert len(stacks) == (len(given) > 1)
        bound(sample).check_gradient(results[-1], **grads)
    assert same_bits(*results) or (on.backend, on.device) == ("triton", "cuda")


class Recorded(TorchDispatchMode):
    """Operations, with their arguments."""

    def __enter__(self) -> Recorded:
        self.calls: list[tuple[str, Any]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))


# ---- in place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("function", ("logprob_entropy", "token_stats"))
def test_inplace_gradient_is_the_same_in_the_same_storage(function: str, dtype: torch.dtype, on: BackendDevice) -> None:
    sample = plain(dtype, on.device, rows=6, vocab=1500, temperature=0.7)
    sample.target[2] = -100
    grads = upstream(sample, "logprob", "entropy")
    _, expected = run(sample, on, function, grads)
    assert expected is not None
    leaf = sample.logits.clone().requires_grad_()
    logits = leaf * 1  # as after a matmul: nobody else needs it
    outputs = getattr(ek, function)(logits, sample.target, **sample.kwargs, inplace_backward=True, backend=on.backend)
    kept: list[torch.Tensor] = []
    logits.register_hook(kept.append)
    torch.autograd.backward([getattr(outputs, name) for name in grads], list(grads.values()))
    assert kept[0].data_ptr() == logits.data_ptr()
    assert leaf.grad is not None and same_bits(leaf.grad, expected)
    assert same_bits(logits.detach(), expected)
    assert same_bits(leaf.detach(), sample.logits)


@pytest.mark.parametrize("layout", ("sliced", "transposed", "columns", "four", "vector"))
def test_inplace_in_any_layout(layout: str, on: BackendDevice) -> None:
    buffer = normal(4, 6, 130, dtype=torch.float32, device=on.device)
    views = {
        "sliced": lambda b: b[:, 1:-1, :97],
        "transposed": lambda b: b.transpose(0, 1)[..., 1:98],
        "columns": lambda b: b[..., ::2],
        "four": lambda b: b.view(2, 2, 6, 130).permute(1, 2, 0, 3)[..., :97],
        "vector": lambda b: b[0, 0, 3:100],
    }
    view = views[layout]
    target = torch.randint(0, 65, view(buffer).shape[:-1], device=on.device)
    sample = Sample(view(buffer), target)
    grads = upstream(sample, "logprob", "entropy")
    _, expected = run(sample, on, "logprob_entropy", grads)
    leaf = buffer.clone().requires_grad_()
    work = leaf * 1
    outputs = ek.logprob_entropy(view(work), target, inplace_backward=True, backend=on.backend)
    torch.autograd.backward(list(outputs), list(grads.values()))
    assert leaf.grad is not None and expected is not None and same_bits(view(leaf.grad), expected)
    # what lies between the view's elements is not the op's to touch
    outside = torch.ones_like(buffer, dtype=torch.bool)
    view(outside)[...] = False
    assert same_bits(work.detach()[outside], buffer[outside])
    assert not leaf.grad[outside].any()


def test_inplace_over_an_expanded_view_is_an_error(on: BackendDevice) -> None:
    """Rows or columns that share storage cannot hold their gradients there."""
    target = torch.arange(4, device=on.device)
    for shape in ((1, 97), (4, 1)):
        logits = normal(*shape, dtype=torch.float32, device=on.device).expand(4, 97)
        with pytest.raises(ValueError, match=r"inplace_backward: expected .* got .*\(4, 97\)"):
            ek.logprob_entropy(logits, target, inplace_backward=True, backend=on.backend)


# shape, strides, whether two elements are one
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "rows that overlap": ((3, 200), (50, 1), True),
    "rows that share one element": ((3, 51), (50, 1), True),
    "rows that touch": ((3, 50), (50, 1), False),
    "sliding windows over columns": ((5, 4), (1, 2), True),
    "a batch that overlaps": ((2, 3, 40), (80, 40, 1), True),
    "one row in two batches": ((2, 3, 40), (0, 40, 1), True),
    "a batch of one": ((1, 3, 40), (7, 40, 1), False),
    "interleaved": ((2, 3), (3, 2), False),
    "interleaved until they meet": ((3, 4), (3, 2), True),
    "nothing": ((0, 3), (1, 1), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_inplace_needs_memory_of_its_own(name: str, on: BackendDevice) -> None:
    shape, strides, shared = LAYOUTS[name]
    base = normal(400, dtype=torch.float32, device=on.device).requires_grad_() * 1
    logits = base.as_strided(shape, strides)
    target = torch.zeros(shape[:-1], dtype=torch.int64, device=on.device)
    addresses = torch.arange(400).as_strided(shape, strides).reshape(-1)
    assert shared == (addresses.unique().numel() < addresses.numel())
    if shared:
        with pytest.raises(ValueError, match=r"inplace_backward: expected logits .* got shape .*strides.*clone"):
            ek.logprob_entropy(logits, target, inplace_backward=True, backend=on.backend)
        return
    apart = logits.detach().clone().requires_grad_()
    own = base.detach().clone().requires_grad_()
    work = own * 1
    for z, inplace in ((work.as_strided(shape, strides), True), (apart, False)):
        out = ek.logprob_entropy(z, target, inplace_backward=inplace, backend=on.backend)
        (out.logprob + out.entropy).sum().backward()
    assert own.grad is not None and same_bits(own.grad.as_strided(shape, strides), apart.grad)


def test_inplace_over_what_the_backward_pass_reads(on: BackendDevice) -> None:
    """A temperature, labels or upstream gradients that lie in the logits' memory are read as they were."""
    values = normal(3, 40, dtype=torch.float32, device=on.device).abs() + 0.5
    target = torch.tensor([1, 2, 3], device=on.device)
    temperature, grad = values[0, 0].clone(), values[:, 1].clone()
    apart = values.clone().requires_grad_()
    outputs = ek.logprob_entropy(apart, target, temperature=temperature, backend=on.backend)
    torch.autograd.backward(outputs, [grad, grad])
    leaf = values.clone().requires_grad_()
    work = leaf * 1
    with torch.no_grad():
        inside = work[0, 0], work[:, 1]
    outputs = ek.logprob_entropy(work, target, temperature=inside[0].detach(), inplace_backward=True,
                                 backend=on.backend)  # fmt: skip
    torch.autograd.backward(outputs, [inside[1].detach()] * 2)
    assert same_bits(leaf.grad, apart.grad)


def test_second_backward_after_inplace_is_a_clear_error(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device)
    logits = sample.logits.clone().requires_grad_() * 1
    outputs = ek.logprob_entropy(logits, sample.target, inplace_backward=True, backend=on.backend)
    outputs.logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        outputs.entropy.sum().backward()


def test_two_calls_on_logits_that_the_first_overwrote(on: BackendDevice) -> None:
    """Another op that saved the same logits must not silently read the gradient in their place."""
    sample = plain(torch.float32, on.device)
    logits = sample.logits.clone().requires_grad_() * 1
    inplace = ek.logprob_entropy(logits, sample.target, inplace_backward=True, backend=on.backend)
    others = [
        ek.token_stats(logits, sample.target, inplace_backward=flag, backend=on.backend) for flag in (False, True)
    ]
    inplace.logprob.sum().backward(retain_graph=True)
    for other in others:
        with pytest.raises(RuntimeError, match=r"logits: expected .* overwritten .* another call with inplace_back"):
            other.entropy.sum().backward(retain_graph=True)


def test_inplace_without_a_backward_changes_nothing(on: BackendDevice) -> None:
    sample = plain(torch.float32, on.device)
    before = sample.logits.clone()
    logits = sample.logits.requires_grad_()
    ek.logprob_entropy(logits, sample.target, inplace_backward=True, backend=on.backend)
    with torch.no_grad():
        ek.logprob_entropy(logits, sample.target, inplace_backward=True, backend=on.backend)
    assert same_bits(logits.detach(), before)


def test_gradient_reaches_a_leaf_through_a_linear_layer(on: BackendDevice) -> None:
    """The way it is used: hidden states, a head, in-place gradient; against float64 autograd of the dense formula."""
    import reference

    hidden = torch.randn(6, 16, device=on.device, dtype=torch.double)
    weight = torch.randn(97, 16, device=on.device, dtype=torch.double)
    target = torch.randint(0, 97, (6,), device=on.device)
    expected = []
    for function in ("ours", "dense"):
        dtype = torch.float32 if function == "ours" else torch.float64
        h, w = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        logits = h @ w.t()
        if function == "ours":
            out = ek.logprob_entropy(logits, target, temperature=0.8, inplace_backward=True, backend=on.backend)
        else:
            out = reference.differentiable(logits, target, 0.8, None)  # type: ignore[assignment]
        (out[0] + 0.3 * out[1]).sum().backward()
        expected.append((h.grad, w.grad))
    for ours, dense in zip(*expected, strict=True):
        torch.testing.assert_close(ours.double(), dense, rtol=1e-4, atol=1e-5)
