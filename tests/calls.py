"""Call a statistics function on a sample, with upstream gradients, and check that nothing else changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from compare import Bound
from conftest import BackendDevice
from sample import Sample


def upstream(sample: Sample, *names: str, seed: int = 3) -> dict[str, Tensor]:
    """Normal upstream gradients of the outputs ``names``, of target's shape, in the dtype of the outputs."""
    dtype = torch.float64 if sample.logits.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    shape = sample.target.shape
    return {n: torch.randn(shape, generator=generator).to(sample.logits.device, dtype) for n in names}


def moved(tensor: Tensor, device: str) -> Tensor:
    """``tensor`` as a view of a copy of its whole buffer: unlike ``.to()``, strides and misalignment travel along."""
    base = tensor if tensor._base is None else tensor._base
    return base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and bool(((a == b) | a.isnan()).all())
    )


def checked_mask(on: BackendDevice, function: str, expected: Tensor, **given: Any) -> Tensor:
    """A public mask on a backend is the expected one; its inputs are unchanged. Returned on the CPU."""
    there = {name: moved(x, on.device) if isinstance(x, Tensor) else x for name, x in given.items()}
    before = {name: x.clone() for name, x in there.items() if isinstance(x, Tensor)}
    mask = getattr(ek, function)(**there, backend=on.backend)
    assert mask.dtype == torch.bool and mask.shape == expected.shape
    assert mask.device.type == on.device and mask.is_contiguous()
    for name, value in before.items():
        assert same_bits(there[name], value), f"{name} was changed"
    assert torch.equal(mask.cpu(), expected), (
        f"{int(mask.sum())} selected, {int(expected.sum())} expected, {int((mask.cpu() ^ expected).sum())} differ"
    )
    return mask.cpu()


def run(
    sample: Sample, on: BackendDevice, function: str = "token_stats", grads: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Outputs by name and, with ``grads`` = upstream gradients by name, the gradient of the logits."""
    logits = sample.logits.detach()
    before = [x.clone() for x in (logits, sample.target)]
    if grads is not None:
        logits.requires_grad_()
    outputs = getattr(ek, function)(logits, sample.target, **sample.kwargs, backend=on.backend)._asdict()
    dlogits = None
    if grads is not None:
        (dlogits,) = torch.autograd.grad([outputs[name] for name in grads], logits, list(grads.values()))
    for name, now, then in zip(("logits", "target"), (logits, sample.target), before, strict=True):
        assert same_bits(now.detach(), then), f"{name} was changed"
    return outputs, dlogits


def bound(sample: Sample) -> Bound:
    return Bound(sample.logits, sample.target, **sample.kwargs)


def check(sample: Sample, on: BackendDevice, *names: str, function: str = "token_stats") -> None:
    """Values of ``function`` and its gradient through ``names`` against the references."""
    grads = upstream(sample, *names) if names else None
    outputs, dlogits = run(sample, on, function, grads)
    for name, value in outputs.items():
        assert value.shape == sample.target.shape, f"{name}: shape {tuple(value.shape)}"
    references = bound(sample)
    references.check_values(**outputs)
    if grads is not None:
        assert dlogits is not None and dlogits.shape == sample.logits.shape
        references.check_gradient(dlogits, **grads)
