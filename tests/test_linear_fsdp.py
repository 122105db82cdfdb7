"""FSDP2 over real gloo ranks: a model whose head's weight is sharded against one process, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import entropy_kernels as ek
from gloo import run_ranks

VOCAB, FEATURES, TOKENS = 803, 12, 24
BUDGETS = {"keep": 1 << 30, "recompute": 40_000}


class Head(nn.Linear):
    """With a method that FSDP can be told of."""

    def logprob_entropy(self, hidden: Tensor, target: Tensor, budget: int) -> ek.LogprobEntropy:
        return ek.linear_logprob_entropy(hidden, self.weight, target, self.bias, memory_budget=budget)


class Model(nn.Module):
    def __init__(self, through_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.head = Head(FEATURES, VOCAB)
        self.through_head = through_head

    def forward(self, ids: Tensor, target: Tensor, budget: int) -> ek.LogprobEntropy:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        if self.through_head:
            return self.head.logprob_entropy(hidden, target, budget)
        return ek.linear_logprob_entropy(hidden, self.head.weight, target, self.head.bias, memory_budget=budget)


def batch() -> tuple[Tensor, Tensor]:
    target = torch.arange(TOKENS) * 33
    target[3::7] = -100
    return torch.arange(TOKENS) * 7 % VOCAB, target


def gradients(model: Model, ids: Tensor, target: Tensor, budget: int) -> dict[str, Tensor]:
    logprob, entropy = model(ids, target, budget)
    (logprob.sum() - 0.3 * entropy.sum()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logprob": logprob.detach(), "entropy": entropy.detach()} | found  # type: ignore[operator]


def on_ranks(rank: int, world: int, how: str) -> dict[str, dict[str, Tensor]]:
    """Every rank has tokens of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for mode, budget in BUDGETS.items():
        model = Model(through_head=how == "the head's method")
        if how != "the root":
            fully_shard(model.head, mesh=mesh)
        if how == "the head's method":
            register_fsdp_forward_method(model.head, "logprob_entropy")
        fully_shard(model, mesh=mesh)
        own = slice(TOKENS // world * rank, TOKENS // world * (rank + 1))
        ids, target = batch()
        found: dict[str, Any] = gradients(model, ids[own], target[own], budget)
        results[mode] = {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in found.items()}
    return results


@pytest.mark.parametrize("how", ("the root", "the head", "the head's method"))
def test_equals_one_process(how: str) -> None:
    """FSDP gathers the head itself (with the root, or for a method it knows), or leaves that to us.

    It averages gradients over the ranks; so do we (docs/linear.md).
    """
    world = 2
    ranks = run_ranks(world, on_ranks, how)
    for mode, budget in BUDGETS.items():
        want = gradients(Model(), *batch(), budget)
        for name, right in want.items():
            if name in ("logprob", "entropy"):
                got = torch.cat([found[mode][name] for found in ranks])
            else:
                got = ranks[0][mode][name]
                assert torch.equal(got, ranks[1][mode][name])
                right = right / world
            where = f"{mode}, {name}: "
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6, msg=lambda text, w=where: w + text)
