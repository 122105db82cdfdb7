"""Matrix products beside memory that holds NaN: nothing of it may reach a row that has none."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.backends import reused_memory
from entropy_kernels.ops import linear_tiles
from entropy_kernels.ops.products import multiply

ROWS = (1, 2, 31, 64, 512)
INNER = (1, 3, 31, 32, 33, 65, 100, 129, 1000)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("layout", ("rows apart", "rows behind one another", "tile of a workspace"))
def test_nothing_beside_a_row_gets_in(dtype: torch.dtype, layout: str) -> None:
    """On CPUs with AMX a product in bf16 reads on behind a row whose length is no multiple of 32."""
    for rows, inner in itertools.product(ROWS, INNER):
        right = torch.randn(inner, 40).to(dtype)
        if layout == "rows apart":
            left = torch.full((rows, inner + 64), torch.nan, dtype=dtype)[:, :inner]
        elif layout == "tile of a workspace":
            left = linear_tiles.workspace(rows, inner, dtype, torch.device("cpu"))[:, :inner]
        else:
            left = torch.full((rows + 2, inner), torch.nan, dtype=dtype)[1:-1]
        values = torch.randn(rows, inner).to(dtype)
        left.copy_(values)
        got = torch.full((rows, 64), torch.nan, dtype=dtype)[:, :40]
        multiply(got, left, right, torch.ones(40, dtype=dtype))
        exact = values.double() @ right.double() + 1
        scale = values.double().abs() @ right.double().abs() + 1
        assert ((got.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * scale).all(), (rows, inner)
        if layout == "rows behind one another" and rows > 1:  # a row that has NaN keeps it for itself
            left[1::2] = torch.nan
            multiply(got, left, right)
            assert torch.equal(got.isnan().any(1), left.isnan().any(1)), (rows, inner)


@pytest.mark.parametrize("vocab", (9000, 9001, 97))
@pytest.mark.parametrize("backend", ("auto", "torch"))
@pytest.mark.parametrize("budget", (None, 3 << 20), ids=("kept", "in tiles"))
def test_gradients_from_hidden_states_in_poisoned_memory(
    monkeypatch: pytest.MonkeyPatch, vocab: int, backend: str, budget: int | None
) -> None:
    """Memory that served an earlier call holds what that left there."""

    def poisoned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(reused_memory, "empty", poisoned)
    hidden, weight = (torch.randn(n, 36).mul(0.3).bfloat16().requires_grad_() for n in (512, vocab))
    target = torch.randint(vocab, (512,))
    out = ek.linear_logprob_entropy(hidden, weight, target, memory_budget=budget, backend=backend)
    gradients = torch.autograd.grad(out.logprob.sum() - out.entropy.sum(), (hidden, weight))
    old, advantages = torch.full((512,), -9.0), torch.linspace(-2, 1, 512)
    loss = ek.linear_policy_loss(
        hidden, weight, target, old, advantages, None, method="kl_cov", memory_budget=budget, backend=backend
    ).loss
    for value in (*out, *gradients, loss, *torch.autograd.grad(loss, (hidden, weight))):
        assert value.isfinite().all()
