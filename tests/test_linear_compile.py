"""The op on hidden states under torch's tools: opcheck, fake tensors, export, torch.compile, checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import entropy_kernels as ek
from linear_cases import Linear, budgets, judge, make, run, upstream

compile_eager = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def arguments(case: Linear, keep: bool) -> tuple[Any, ...]:
    dtype, tensors = case.hidden.dtype, (case.hidden, case.weight, case.bias)
    temperature = torch.ones(1, dtype=torch.promote_types(dtype, torch.float32))
    numbers = 0.0, -100, 0, len(case.weight), dtype, dtype, 1 << 30 if keep else 60_000, "", "auto", 15
    needs = [x is not None and x.requires_grad for x in tensors]
    return (*tensors, case.target, temperature, *numbers, keep, *needs)


@pytest.mark.parametrize("keep", (False, True))
def test_opcheck(keep: bool) -> None:
    # V = 128: rows of kept logits are padded to 64, and what stands in the padding, or in an ignored row, is nobody's
    vocab = 128 if keep else 203
    for case in (make(5, vocab=vocab), make(5, bias=False, vocab=vocab), make(6, dtype=torch.bfloat16, vocab=vocab)):
        if not keep:
            case.target[1] = -100
        for grad in ((), ("hidden",), ("hidden", "weight", "bias")):
            # eager's backward pass writes over the kept logits, compiled code's does not: that output may differ
            checks = ALL_CHECKS[:-1] if keep and grad else ALL_CHECKS
            op = torch.ops.entropy_kernels.linear_token_stats.default
            torch.library.opcheck(op, arguments(case.copy(*grad), keep), test_utils=checks)


@pytest.mark.parametrize("kept", (False, True))
def test_opcheck_backward(kept: bool) -> None:
    ops = torch.ops.entropy_kernels
    for case in (make(5), make(6, dtype=torch.bfloat16, bias=False)):
        inputs = arguments(case, kept)
        _, state, logits = ops.linear_token_stats.default(*inputs)
        full = case.bias is not None
        few, many = (1, 7) if full else (7, 1)  # each gradient of one statistic and of all
        for needs, want in (((True, True, full), many), ((True, False, False), few), ((False, True, False), few)):
            grad = torch.randn(want.bit_count(), case.target.numel())
            tail = (*inputs[:5], state, logits if kept else None, *inputs[5:14], want, *needs)
            torch.library.opcheck(ops.linear_token_stats_backward.default, (grad, *tail))
            if kept:
                torch.library.opcheck(ops.linear_token_stats_backward_.default, (grad, *tail))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    for shape in ((5,), (2, 3), (0,), (2, 1, 3)):
        for dtype in (torch.bfloat16, torch.float64):
            case = make(*shape, dtype=dtype)
            real = ek.linear_token_stats(case.hidden, case.weight, case.target, case.bias)
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = [mode.from_tensor(x) for x in (case.hidden, case.weight, case.target, case.bias)]
                fake = ek.linear_token_stats(*fakes)
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def step(budget: int | None, **kwargs: Any) -> Callable:
    def loss(hidden: Any, weight: Any, bias: Any, target: Any, temperature: Any) -> torch.Tensor:
        options = {"temperature": temperature, "memory_budget": budget, **kwargs}
        out = ek.linear_token_stats(hidden, weight, target, bias, **options)
        return (1.5 * out.logprob - 0.25 * out.entropy + out.collision + out.vocab_covariance.detach()).sum()

    return loss


def both(eager: Callable, compiled: Callable, case: Linear, temperature: Any = 0.7) -> None:
    results = []
    for function in (eager, compiled):
        leaves = case.copy("hidden", "weight", "bias")
        value = function(leaves.hidden, leaves.weight, leaves.bias, leaves.target, temperature)
        gradients = torch.autograd.grad(value, (leaves.hidden, leaves.weight, leaves.bias))
        results.append((value.detach(), *gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    ((torch.bfloat16, 0.7), (torch.float32, torch.linspace(0.5, 1.5, 24).view(2, 12))),
    ids=("bf16", "fp32"),
)
def test_fullgraph(dtype: torch.dtype, temperature: Any) -> None:
    case = make(2, 12, dtype=dtype, vocab=1500)
    case.target[0, 3] = -100
    for _, budget in budgets(case):
        torch._dynamo.reset()  # the budgets share a code object, which may be compiled eight times
        eager = step(budget, softcap=30.0)
        both(eager, compile_eager(eager), case, temperature)


def test_inductor(inductor: Callable) -> None:
    eager = step(None)
    both(eager, inductor(eager), make(24))


def test_compiled_under_autocast() -> None:
    def loss(*inputs: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(None)(*inputs)

    both(loss, compile_eager(loss), make(24))


def test_an_equal_budget_is_the_same() -> None:
    """Each time another object, as one that a trainer computes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda budget, *inputs: step(budget)(*inputs), fullgraph=True, backend=counter)
    case = make(24).copy("hidden", "weight", "bias")
    for megabytes in ("1000", "1000", "1000"):
        compiled(int(megabytes) << 20, case.hidden, case.weight, case.bias, case.target, 0.7)
    assert counter.frame_count == 1


def test_a_new_temperature_or_batch_size_recompiles_once() -> None:
    eager = step(None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for i, rows in enumerate((24, 24, 24, 32, 40, 56)):
        both(eager, compiled, make(rows), 0.7 + 0.1 * i)
    assert counter.frame_count <= 3


def test_compiled_under_no_grad() -> None:
    case = make(24, temperature=0.7)

    rollout = compile_eager(lambda *inputs: ek.linear_token_stats(*inputs, temperature=0.7))
    with torch.no_grad():
        judge(case, rollout(case.hidden, case.weight, case.target, case.bias)._asdict())


def test_export() -> None:
    class Head(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
            return tuple(ek.linear_logprob_entropy(hidden, weight, target, temperature=0.7))

    case, other = make(24, bias=False), make(40, bias=False, temperature=0.7)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        Head(),
        (case.hidden, case.weight, case.target),
        dynamic_shapes={"hidden": {0: rows}, "weight": {}, "target": {0: rows}},
    )
    logprob, entropy = program.module()(other.hidden, other.weight, other.target)
    judge(other, {"logprob": logprob, "entropy": entropy})


@pytest.mark.parametrize("budget", (1 << 30, 60_000))
def test_activation_checkpointing(budget: int) -> None:
    """Non-reentrant checkpointing drops what was saved, the kept logits too, and makes it again."""
    case = make(24)
    expected = run(case, memory_budget=budget, names=("logprob", "entropy"))
    leaves = case.copy("hidden", "weight", "bias")

    def head(hidden: torch.Tensor) -> Any:
        return ek.linear_logprob_entropy(hidden, leaves.weight, leaves.target, leaves.bias, memory_budget=budget)

    out = checkpoint(head, leaves.hidden, use_reentrant=False)
    torch.autograd.backward(list(out), list(upstream(case, ("logprob", "entropy")).values()))
    for name in leaves.factors():
        torch.testing.assert_close(getattr(leaves, name).grad, expected[f"d_{name}"])
