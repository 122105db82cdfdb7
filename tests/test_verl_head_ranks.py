"""verl's fused head over ranks that share a vocabulary, as Megatron's callers have it: what each gives adds up."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import gloo
from entropy_kernels.integrations.verl import statistics

gloo.preload("entropy_kernels.integrations.verl.statistics")
V, H, N = 38, 24, 7  # a width that verl's kernel refuses


def _data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 1, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64) / 4
    return hidden, weight, torch.randint(0, V, (1, N), generator=generator)


def _loss(logprob: Tensor, entropy: Tensor) -> Tensor:
    return (logprob * torch.arange(N)).sum() + (entropy * torch.arange(N).cos()).sum()


def _on_rank(rank: int, world: int) -> tuple[Tensor, ...]:
    hidden, weight, labels = _data()
    hidden.requires_grad_()
    shard = weight.chunk(world)[rank].clone().requires_grad_()
    function = statistics._linear_cross_entropy
    logprob, entropy = function(hidden, shard, labels, 0.75, "none", dist.group.WORLD)
    _loss(logprob, entropy).backward()
    summed = hidden.grad.clone()
    dist.all_reduce(summed)  # as the backward of gather_from_sequence_parallel_region does
    return logprob.detach(), entropy.detach(), summed, shard.grad


def test_gradients_add_up_over_ranks() -> None:
    hidden, weight, labels = _data()
    hidden.requires_grad_()
    weight.requires_grad_()
    logp = (hidden.view(N, H) @ weight.T / 0.75).log_softmax(-1)
    logprob = logp.gather(-1, labels.view(N, 1))[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    _loss(logprob, entropy).backward()
    found = gloo.run_ranks(2, _on_rank)
    for rank, shard in enumerate(weight.grad.chunk(2)):
        for mine, expected in zip(found[rank], (logprob, entropy, hidden.grad, shard), strict=True):
            torch.testing.assert_close(mine, expected.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", [None, "mean", 0])
def test_a_reduction_is_refused(reduction: object) -> None:
    hidden, weight, labels = _data()
    function = statistics._linear_cross_entropy
    with pytest.raises(ValueError, match=f"reduction: expected 'none', .* got {reduction!r}"):
        function(hidden, weight, labels, 1.0, reduction)
    assert all(
        x.equal(y) for x, y in zip(*(function(hidden, weight, labels, 1.0, x) for x in ("NONE", "none")), strict=True)
    )
