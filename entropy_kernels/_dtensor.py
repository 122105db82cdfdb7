"""What DTensors are on this rank: a head is gathered, or this rank's shard of the vocabulary; logits are a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from entropy_kernels._arguments import is_dtensor
from entropy_kernels._rows import RowArguments

CURE = (
    "call this in the forward of the module that fully_shard was applied to, or in a method of it that is named to "
    "torch.distributed.fsdp.register_fsdp_forward_method(module, name)"
)


def local_head(weight: Any, bias: Any, given: RowArguments) -> tuple[Any, Any, RowArguments]:
    """The same without DTensors; anything else as it came.

    Without a ``vocab_group`` the whole weight is gathered once (:func:`whole`). With one, ``Shard(0)`` weights are this
    rank's shard.
    """
    if not is_dtensor(weight):
        return weight, bias, given
    if given.vocab_group is None:
        return whole(weight), whole(bias), given
    sharded: Any = weight
    placements = sharded.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            "weight: expected a DTensor with the placement Shard(0) over one mesh dimension beside a vocab_group, got "
            f"{placements}"
        )
    total = sharded.shape[0]
    start, _ = _chunk(total, sharded.device_mesh.size(), sharded.device_mesh.get_local_rank())
    local_bias = bias.to_local() if hasattr(bias, "to_local") else bias
    return sharded.to_local(), local_bias, _with_shard(given, start, total)


def _with_shard(given: RowArguments, start: int, total: int) -> RowArguments:
    """A DTensor's shard, where nothing else was given."""
    start = start if given.vocab_start is None else given.vocab_start
    return given._replace(vocab_start=start, vocab_size=total if given.vocab_size is None else given.vocab_size)


def whole(value: Any) -> Any:
    """All of a DTensor. Its gradient is the mean over the ranks of the mesh, as of what FSDP reduces."""
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placements = value.device_mesh, value.placements
    # FSDP wants names for a mesh of two dimensions, and gives none to its own
    if isinstance(value, Parameter) and mesh.mesh_dim_names is None and placements == (Replicate(), Shard(0)):
        raise ValueError(
            "weight: expected a parameter, got what FSDP2 has in its place between forward and backward "
            f"(reshard_after_forward=2 and the like), whose gradient nobody reads; model.reshard() first, or {CURE}"
        )
    return MeanOfGradients.apply(value.full_tensor(grad_placements=[Partial()] * mesh.ndim), mesh.size())


class MeanOfGradients(torch.autograd.Function):
    """The value, on each of some ranks; its gradient, which is then summed over them, divided by their number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.ranks, None


def as_whole(value: Any) -> Any:
    """What :func:`whole` would give, for those who ask for its shape and the like: nothing is gathered."""
    if not is_dtensor(value):
        return value
    return value.to_local().detach().new_empty(()).expand(value.shape).requires_grad_(value.requires_grad)


def local_logits(logits: Any, target: Any, given: RowArguments) -> tuple[Tensor, Any, RowArguments]:
    """The same arguments without DTensors: ``logits`` (..., V), sharded over V or not at all, as this rank's part.

    Its gradient is a DTensor again, of the same placements.
    """
    mesh, placements, total, last = logits.device_mesh, logits.placements, logits.shape[-1], logits.dim() - 1
    sharded = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    # not a strided shard, a class of its own, whose columns are not in one piece
    plain = all(type(placements[dim]).__name__ == "Shard" and placements[dim].is_shard(last) for dim in sharded)
    if not plain or len(sharded) > 1:
        raise ValueError(
            f"logits: expected a DTensor sharded over the vocabulary, Shard({last}), over at most one mesh dimension "
            f"and replicated over the others, got {placements}; .redistribute(...) it, or pass .to_local() with what "
            "belongs to it"
        )
    local, target = logits.to_local(), _replica("target", target)
    given = given._replace(temperature=_replica("temperature", given.temperature))
    if not sharded:
        return local, target, given
    group, width = mesh.get_group(sharded[0]), local.shape[-1]
    start, stop = _chunk(total, mesh.size(sharded[0]), mesh.get_local_rank(sharded[0]))
    if width != stop - start:
        raise ValueError(
            f"logits: expected a DTensor whose shards are torch.chunk's, so columns {start} to {stop} of {total} here, "
            f"got {width} columns; pass .to_local() with vocab_group and vocab_start"
        )
    if given.vocab_group is not None and getattr(given.vocab_group, "group_name", "") != group.group_name:
        raise ValueError("vocab_group: expected None or the group of the mesh beside a DTensor, got another one")
    if given.vocab_start not in (None, start):
        raise ValueError(f"vocab_start: expected None or {start}, that of the DTensor's shard, got {given.vocab_start}")
    if given.vocab_size is not None and given.vocab_size > total:
        raise ValueError(f"vocab_size: expected <= {total}, the width of logits, got {given.vocab_size}")
    return local, target, _with_shard(given._replace(vocab_group=group), start, total)


def _chunk(total: int, parts: int, part: int) -> tuple[int, int]:
    """Where a DTensor's shard begins and ends: torch.chunk's."""
    width = -(-total // parts)
    return min(part * width, total), min((part + 1) * width, total)


def _replica(name: str, value: Any) -> Any:
    """A DTensor that is the same on all ranks as a plain tensor; anything else as it came."""
    if not is_dtensor(value):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(
            f"{name}: expected a plain tensor or a DTensor that is replicated, as the vocabulary's shards are of the "
            f"same tokens, got {value.placements}; .redistribute(...) it"
        )
    return value.to_local()
