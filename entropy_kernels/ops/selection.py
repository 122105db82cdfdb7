"""``entropy_kernels::token_covariance``, ``clip_cov_mask``, ``kl_cov_mask``: schema, fake, dispatch to a backend.

No gradient flows through a selection: there is no autograd formula, and the public functions in
:mod:`entropy_kernels.selection` detach. A process group travels as its name ("" for none), so that a compiled graph
can hold the op.

``numbers`` are ratio, k, low and high in memory, float64: (4,), or (2,) where there is no band; NaN for the one of
ratio and k that is not given. Kernels read them in the place of the plain numbers, so that a schedule neither waits
for the device nor compiles again. Out of range, shares are held to [0, 1] and k to >= 0 (NaN is 0), and a band whose
low is not below its high is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels.backends import registry
from entropy_kernels.backends.radix_select import Band, Count

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_TOKENS = "Tensor covariance, Tensor? mask, Tensor? exclude, Tensor? token_index"
_COUNT = "Tensor? numbers, float? ratio, SymInt? k, bool at_least_one"
for _schema in (
    "token_covariance(Tensor logprob, Tensor advantages, Tensor? mask, str group, str backend) -> Tensor",
    f"clip_cov_mask({_TOKENS}, Tensor seed, {_COUNT}, float low, float high, bool quantile, bool closed, "
    "str group, str backend) -> Tensor",
    f"kl_cov_mask({_TOKENS}, {_COUNT}, str group, str backend) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _check_float(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def _check(name: str, value: Tensor | None, dtype: torch.dtype, shape: Any, device: torch.device) -> None:
    """Kernels read bare memory, as if it were this."""
    if value is None or (value.dtype == dtype and value.shape == shape and value.device == device):
        return
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    raise ValueError(f"{name}: expected on {device}, got {value.device}")


def _check_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> None:
    _check_float("logprob", logprob)
    _check_float("advantages", advantages)
    _check("advantages", advantages, advantages.dtype, logprob.shape, logprob.device)
    _check("mask", mask, torch.bool, logprob.shape, logprob.device)


def _check_selection(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor | None,
    numbers: Tensor | None,
    ratio: float | None,
    k: int | None,
) -> None:
    """``seed`` is None where there is none, and no band."""
    shape, device = covariance.shape, covariance.device
    _check_float("covariance", covariance)
    _check("mask", mask, torch.bool, shape, device)
    _check("exclude", exclude, torch.bool, shape, device)
    _check("token_index", token_index, torch.int64, shape, device)
    _check("seed", seed, torch.int64, (), device)
    _check("numbers", numbers, torch.float64, (2 if seed is None else 4,), device)
    if numbers is None and (ratio is None) == (k is None):
        raise ValueError(f"ratio, k: expected one of them, got ratio={ratio} and k={k}")


def flat(tensor: Tensor | None) -> Tensor | None:
    """(N,), contiguous."""
    if tensor is None or (tensor.dim() == 1 and tensor.is_contiguous()):
        return tensor
    return tensor.reshape(-1).contiguous()


def _token_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None, group: str, backend: str) -> Tensor:
    _check_covariance(logprob, advantages, mask)
    dtype = torch.float64 if torch.float64 in (logprob.dtype, advantages.dtype) else torch.float32
    logprob = logprob.to(dtype)
    kernel = registry.kernel("token_covariance", "token_covariance", backend, logprob)
    covariance = kernel(flat(logprob), flat(advantages.to(dtype)), flat(mask), group)
    return covariance.view(logprob.shape)


def _clip_cov_mask(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor,
    numbers: Tensor | None,
    ratio: float | None,
    k: int | None,
    at_least_one: bool,
    low: float,
    high: float,
    quantile: bool,
    closed: bool,
    group: str,
    backend: str,
) -> Tensor:
    _check_selection(covariance, mask, exclude, token_index, seed, numbers, ratio, k)
    covariance = covariance.float()
    kernel = registry.kernel("clip_cov_mask", "clip_cov_mask", backend, covariance)
    selected = kernel(
        flat(covariance),
        flat(mask),
        flat(exclude),
        flat(token_index),
        seed,
        Count(ratio, k, at_least_one, flat(numbers)),
        Band(low, high, quantile, closed, flat(numbers)),
        group,
    )
    return selected.view(covariance.shape)


def _kl_cov_mask(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    numbers: Tensor | None,
    ratio: float | None,
    k: int | None,
    at_least_one: bool,
    group: str,
    backend: str,
) -> Tensor:
    _check_selection(covariance, mask, exclude, token_index, None, numbers, ratio, k)
    covariance = covariance.float()
    kernel = registry.kernel("kl_cov_mask", "kl_cov_mask", backend, covariance)
    tokens = (flat(covariance), flat(mask), flat(exclude), flat(token_index))
    return kernel(*tokens, Count(ratio, k, at_least_one, flat(numbers)), group).view(covariance.shape)


_library.impl("token_covariance", _token_covariance, "CompositeExplicitAutograd")
_library.impl("clip_cov_mask", _clip_cov_mask, "CompositeExplicitAutograd")
_library.impl("kl_cov_mask", _kl_cov_mask, "CompositeExplicitAutograd")


@torch.library.register_fake("entropy_kernels::token_covariance", lib=_library)
def _fake_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    _check_covariance(logprob, advantages, mask)  # here, too: a tensor on meta among others makes this the kernel
    return logprob.new_empty(logprob.shape, dtype=torch.float32)


@torch.library.register_fake("entropy_kernels::clip_cov_mask", lib=_library)
def _fake_clip(covariance: Tensor, *rest: Any) -> Tensor:
    _check_selection(covariance, *rest[:7])
    return covariance.new_empty(covariance.shape, dtype=torch.bool)


@torch.library.register_fake("entropy_kernels::kl_cov_mask", lib=_library)
def _fake_kl(covariance: Tensor, *rest: Any) -> Tensor:
    _check_selection(covariance, *(*rest[:3], None, *rest[3:6]))
    return covariance.new_empty(covariance.shape, dtype=torch.bool)


token_covariance = torch.ops.entropy_kernels.token_covariance.default
clip_cov_mask = torch.ops.entropy_kernels.clip_cov_mask.default
kl_cov_mask = torch.ops.entropy_kernels.kl_cov_mask.default
