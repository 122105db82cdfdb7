"""What a DTensor head is on this rank: gathered, or this rank's shard of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local_head(
    weight: Any, bias: Any, vocab_group: Any, vocab_start: int | None, vocab_size: int | None
) -> tuple[Any, Any, int | None, int | None]:
    """(weight, bias, vocab_start, vocab_size) without DTensors; anything else as it came.

    Without a ``vocab_group`` the whole weight is gathered once (:func:`whole`). With one, ``Shard(0)`` weights are this
    rank's shard.
    """
    if not isinstance(weight, Tensor) or not hasattr(weight, "full_tensor"):
        return weight, bias, vocab_start, vocab_size
    if vocab_group is None:
        return whole(weight), whole(bias), vocab_start, vocab_size
    sharded: Any = weight
    placements = sharded.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            "weight: expected a DTensor with the placement Shard(0) over one mesh dimension beside a vocab_group, got "
            f"{placements}"
        )
    total = sharded.shape[0]
    width = -(-total // sharded.device_mesh.size())  # DTensor's shards are torch.chunk's
    start = min(sharded.device_mesh.get_local_rank() * width, total)
    local_bias = bias.to_local() if hasattr(bias, "to_local") else bias
    return (
        sharded.to_local(), local_bias, start if vocab_start is None else vocab_start,
        total if vocab_size is None else vocab_size,
    )  # fmt: skip


def whole(value: Any) -> Any:
    """All of a DTensor. Its gradient is the mean over the ranks of the mesh, as of what FSDP reduces."""
    if not hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import Partial

    mesh = value.device_mesh
    return _Mean.apply(value.full_tensor(grad_placements=[Partial()] * mesh.ndim), mesh.size())


class _Mean(torch.autograd.Function):
    """The value, on each of some ranks; its gradient, which is then summed over them, divided by their number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.ranks, None
