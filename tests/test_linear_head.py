"""Heads that are no plain weight: modules, functions of a slice of the vocabulary, DTensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import entropy_kernels as ek
from gloo import run_ranks
from linear_cases import Linear, judge, make, upstream
from sample import NAN


class Lora(nn.Module):
    """A frozen base and a low-rank update, with dropout, as PEFT wraps a head."""

    def __init__(self, features: int = 12, vocab: int = 803, dropout: float = 0.0, dtype: Any = torch.float32) -> None:
        super().__init__()
        self.out_features = vocab
        self.base = nn.Linear(features, vocab, dtype=dtype).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, features, dtype=dtype))
        self.b = nn.Parameter(0.3 * torch.randn(vocab, 4, dtype=dtype))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.dropout(hidden) @ self.a.t() @ self.b.t()


class Sliced:
    """The same as a function of a slice."""

    def __init__(self, lora: Lora) -> None:
        self.lora, self.parameters = lora, lora.parameters

    def __call__(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        part = self.lora.base(hidden)[:, start:stop]
        return part + hidden @ self.lora.a.t() @ self.lora.b[start:stop].t()


def module_of(case: Linear) -> nn.Linear:
    linear = nn.Linear(case.weight.shape[1], case.weight.shape[0], dtype=case.weight.dtype)
    assert case.bias is not None
    linear.weight.data.copy_(case.weight)
    linear.bias.data.copy_(case.bias)
    return linear


BUDGETS = (1 << 30, 100_000, 12 * 803)  # one tile, a few, one token each
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("budget", BUDGETS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", (False, True), ids=("module", "function"))
def test_equals_the_weight(sliced: bool, dtype: torch.dtype, budget: int) -> None:
    """Values and all gradients within the errors of materialised logits; padding, temperatures and softcap too."""
    for kwargs in ({}, {"softcap": 3.0, "vocab_size": 803, "temperature": torch.rand(2, 10) + 0.5}):
        case = make(2, 10, dtype=dtype, **kwargs)
        case.target[0, 3], case.hidden[0, 3] = -100, NAN
        linear = module_of(case)

        def part(hidden: Tensor, start: int, stop: int, linear: nn.Linear = linear) -> Tensor:
            return nn.functional.linear(hidden, linear.weight[start:stop], linear.bias[start:stop])

        part.parameters = linear.parameters  # type: ignore[attr-defined]
        head: Any = part if sliced else linear
        options = {"vocab_size": 803} | kwargs
        hidden = case.hidden.clone().requires_grad_()
        out = ek.linear_token_stats(hidden, head, case.target, **options, memory_budget=budget)
        up = upstream(case)
        torch.autograd.backward([getattr(out, n) for n in up], list(up.values()))
        results = {name: value.detach() for name, value in out._asdict().items()}
        judge(case, results | {"d_hidden": hidden.grad, "d_weight": linear.weight.grad, "d_bias": linear.bias.grad})


@pytest.mark.parametrize("budget", BUDGETS)
def test_lora(budget: int) -> None:
    """Gradients reach the adapters and the hidden states, none the frozen base; a slice gives the same."""
    lora = Lora()
    hidden, target = torch.randn(20, 12), torch.randint(0, 803, (20,))
    results = []
    for head in (None, lora, Sliced(lora)):
        lora.zero_grad()
        h = hidden.clone().requires_grad_()
        if head is None:
            out = ek.logprob_entropy(lora(h), target)
        else:
            out = ek.linear_logprob_entropy(h, head, target, vocab_size=803, memory_budget=budget)
        (out.logprob.sum() - 0.3 * out.entropy.sum()).backward()
        assert lora.base.weight.grad is None
        results.append((out.logprob.detach(), out.entropy.detach(), h.grad, lora.a.grad, lora.b.grad))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Int8:
    """A head in eight bits with a scale per row, of which a slice is dequantised at a time."""

    def __init__(self, weight: Tensor) -> None:
        self.scale = nn.Parameter(weight.float().abs().amax(1, keepdim=True) / 127)
        self.codes = (weight / self.scale).round().to(torch.int8)
        self.widths: list[int] = []

    def parameters(self) -> list[Tensor]:
        return [self.scale]

    def weight(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return (self.codes[start:stop] * self.scale[start:stop]).to(dtype)

    def __call__(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        self.widths.append(stop - start)
        return hidden @ self.weight(hidden.dtype, start, stop).t()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_quantised_head(dtype: torch.dtype) -> None:
    """Values, and the gradients of the hidden states and of the scales, are those of the dequantised weight."""
    case = make(20, dtype=dtype, bias=False, vocab=3000)
    head = Int8(case.weight.detach())
    found = []
    for ours in (True, False):
        hidden, head.scale.grad = case.hidden.clone().requires_grad_(), None
        weight = head if ours else head.weight(dtype)
        options = {"vocab_size": 3000, "memory_budget": 200_000 if ours else 1 << 30}
        out = ek.linear_token_stats(hidden, weight, case.target, **options)
        up = upstream(case)
        torch.autograd.backward([getattr(out, n) for n in up], list(up.values()))
        found.append([*(x.detach() for x in out), hidden.grad, head.scale.grad])
    assert 0 < max(head.widths) < 3000 // 2
    for got, want in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_dropout_is_drawn_once() -> None:
    """The backward pass runs the head again, and must meet the masks of the forward pass; and draw nothing itself."""
    lora = Lora(dropout=0.5, dtype=torch.float64)
    hidden = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    target = torch.arange(6)

    def value(h: Tensor) -> Tensor:
        torch.manual_seed(3)
        out = ek.linear_logprob_entropy(h, lora, target, memory_budget=24 * 803 * 2)
        return out.logprob + out.entropy

    assert torch.autograd.gradcheck(value, (hidden,))
    out = value(hidden)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_grad_and_frozen() -> None:
    lora = Lora().requires_grad_(False)
    hidden, target = torch.randn(5, 12), torch.arange(5)
    for function in (lora, lambda h, start, stop: lora(h)[:, start:stop]):
        out = ek.linear_logprob_entropy(hidden, function, target, vocab_size=803)
        assert not out.logprob.requires_grad
        h = hidden.clone().requires_grad_()
        ek.linear_logprob_entropy(h, function, target, vocab_size=803).entropy.sum().backward()
        assert h.grad is not None and h.grad.any()
    lora.requires_grad_(True)
    with torch.no_grad():
        assert not ek.linear_logprob_entropy(hidden, lora, target).logprob.requires_grad


def test_autocast_holds_in_the_backward_pass() -> None:
    lora, hidden = Lora(), torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ek.linear_logprob_entropy(hidden, lora, torch.arange(5), memory_budget=12 * 803 * 2)
        expected = ek.logprob_entropy(lora(hidden), torch.arange(5))
    (ours,) = torch.autograd.grad(out.logprob.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.logprob.sum(), hidden)
    torch.testing.assert_close(out.logprob, expected.logprob)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits / self.calls


def test_errors() -> None:
    lora, hidden, target = Lora(), torch.randn(5, 12, requires_grad=True), torch.arange(5)
    hidden_function = lambda h, start, stop: lora(h)[:, start:stop]  # noqa: E731

    def call(head: Any, **kwargs: Any) -> Any:
        return ek.linear_logprob_entropy(kwargs.pop("hidden", hidden), head, target, kwargs.pop("bias", None), **kwargs)

    for h in (hidden, hidden.detach()):  # a gradient is never dropped without a word
        with pytest.raises(ValueError, match=r"weight: expected a head whose parameters\(\) .* got"):
            call(hidden_function, hidden=h, vocab_size=803)
    with pytest.raises(ValueError, match=r"vocab_size: expected .* got None"):
        call(hidden_function)
    with pytest.raises(ValueError, match="vocab_size: expected <= 803"):
        call(lora, vocab_size=804)
    with pytest.raises(ValueError, match="bias: expected None"):
        call(lora, bias=torch.zeros(803))
    with pytest.raises(ValueError, match="weight: expected the head to return"):
        call(nn.Identity(), vocab_size=803)
    with pytest.raises(ValueError, match="memory_budget: expected at least 9636"):
        call(lora, memory_budget=9635)
    message = r"weight: expected a head that takes hidden's dtype, torch.bfloat16, got .* torch.float32, .*autocast"
    with pytest.raises(TypeError, match=message):
        call(lora.base, hidden=hidden.bfloat16())
    with pytest.raises(
        ValueError, match="weight: expected a head whose call writes neither to its argument nor to its"
    ):
        call(nn.Sequential(lora.base, CountsCalls()), vocab_size=803)
    with pytest.raises(IndexError, match="target"):
        ek.linear_logprob_entropy(hidden, lora, target + 800)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(call(lora).entropy.sum(), hidden, create_graph=True)


def test_compiled_code_breaks_its_graph_there() -> None:
    lora, hidden, target = Lora(), torch.randn(5, 12), torch.arange(5)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def loss(h: Tensor) -> Tensor:
        return ek.linear_logprob_entropy(h * 2, lora, target).entropy.sum() * 3

    torch.testing.assert_close(loss(hidden), 3 * ek.logprob_entropy(lora(hidden * 2), target).entropy.sum())


# ---- DTensor --------------------------------------------------------------------------------------------------------


def of_dtensors(rank: int, world: int, vocab: int, over_vocab: bool) -> dict[str, Any]:
    """Every rank has a part of the weight. `over_vocab`: it is the vocabulary's, and all ranks have the same tokens.

    Else every rank has tokens of its own, and the gradients of the weight are the ranks' mean, as FSDP's are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    case = make(24, vocab=vocab)
    assert case.bias is not None
    weight = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(case.bias, mesh, [Shard(0)]).requires_grad_()
    own = slice(None) if over_vocab else slice(24 // world * rank, 24 // world * (rank + 1))
    hidden = case.hidden[own].clone().requires_grad_()
    group = dist.group.WORLD if over_vocab else None
    out = ek.linear_token_stats(hidden, weight, case.target[own], bias, vocab_group=group)
    up = {name: value[own] for name, value in upstream(case).items()}
    torch.autograd.backward([getattr(out, n) for n in up], list(up.values()))
    found = {name: value.detach() for name, value in out._asdict().items()}
    ranks = 1 if over_vocab else world
    whole = {f"d_{n}": ranks * x.grad.full_tensor() for n, x in (("weight", weight), ("bias", bias))}  # type: ignore
    return {"tokens": found | {"d_hidden": hidden.grad}, "whole": whole}


@pytest.mark.parametrize("vocab", (800, 803))
def test_a_dtensor_weight_is_gathered(vocab: int) -> None:
    ranks = run_ranks(2, of_dtensors, vocab, False)
    tokens = {name: torch.cat([rank["tokens"][name] for rank in ranks]) for name in ranks[0]["tokens"]}
    judge(make(24, vocab=vocab), tokens | ranks[0]["whole"])


@pytest.mark.parametrize("vocab", (801, 803))
def test_a_dtensor_weight_over_the_vocabulary(vocab: int) -> None:
    for rank in run_ranks(3, of_dtensors, vocab, True):
        judge(make(24, vocab=vocab), rank["tokens"] | rank["whole"])


def test_parameters_of_a_function_in_a_list() -> None:
    hidden, weight = torch.randn(9, 4), torch.randn(150, 4, requires_grad=True)
    target = torch.arange(9)

    def part(h: Tensor, start: int, stop: int) -> Tensor:
        return h @ weight[start:stop].t()

    part.parameters = [weight]  # type: ignore[attr-defined]
    ek.linear_logprob_entropy(hidden, part, target, vocab_size=150).logprob.sum().backward()
    (expected,) = torch.autograd.grad(ek.linear_logprob_entropy(hidden, weight, target).logprob.sum(), weight)
    torch.testing.assert_close(weight.grad, expected)
