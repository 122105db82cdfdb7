"""``entropy_kernels::token_covariance``, ``clip_cov_mask``, ``kl_cov_mask``: schema, fake, dispatch to a backend.

No gradient flows through a selection: there is no autograd formula, and the public functions in
:mod:`entropy_kernels.selection` detach. A process group travels as its name ("" for none), so that a compiled graph
can hold the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels.backends import registry
from entropy_kernels.backends.radix_select import Band, Count

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_TOKENS = "Tensor covariance, Tensor? mask, Tensor? exclude, Tensor? token_index"
_COUNT = "float? ratio, SymInt? k, bool at_least_one"
for _schema in (
    "token_covariance(Tensor logprob, Tensor advantages, Tensor? mask, str group, str backend) -> Tensor",
    f"clip_cov_mask({_TOKENS}, Tensor seed, {_COUNT}, float low, float high, bool quantile, bool closed, "
    "str group, str backend) -> Tensor",
    f"kl_cov_mask({_TOKENS}, {_COUNT}, str group, str backend) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def flat(tensor: Tensor | None) -> Tensor | None:
    """(N,), contiguous."""
    if tensor is None or (tensor.dim() == 1 and tensor.is_contiguous()):
        return tensor
    return tensor.reshape(-1).contiguous()


def _token_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None, group: str, backend: str) -> Tensor:
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
    covariance = covariance.float()
    kernel = registry.kernel("clip_cov_mask", "clip_cov_mask", backend, covariance)
    selected = kernel(
        flat(covariance),
        flat(mask),
        flat(exclude),
        flat(token_index),
        seed,
        Count(ratio, k, at_least_one),
        Band(low, high, quantile, closed),
        group,
    )
    return selected.view(covariance.shape)


def _kl_cov_mask(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    ratio: float | None,
    k: int | None,
    at_least_one: bool,
    group: str,
    backend: str,
) -> Tensor:
    covariance = covariance.float()
    kernel = registry.kernel("kl_cov_mask", "kl_cov_mask", backend, covariance)
    tokens = (flat(covariance), flat(mask), flat(exclude), flat(token_index))
    return kernel(*tokens, Count(ratio, k, at_least_one), group).view(covariance.shape)


_library.impl("token_covariance", _token_covariance, "CompositeExplicitAutograd")
_library.impl("clip_cov_mask", _clip_cov_mask, "CompositeExplicitAutograd")
_library.impl("kl_cov_mask", _kl_cov_mask, "CompositeExplicitAutograd")


@torch.library.register_fake("entropy_kernels::token_covariance", lib=_library)
def _fake_covariance(logprob: Tensor, *rest: Any) -> Tensor:
    return logprob.new_empty(logprob.shape, dtype=torch.float32)


@torch.library.register_fake("entropy_kernels::clip_cov_mask", lib=_library)
@torch.library.register_fake("entropy_kernels::kl_cov_mask", lib=_library)
def _fake_mask(covariance: Tensor, *rest: Any) -> Tensor:
    return covariance.new_empty(covariance.shape, dtype=torch.bool)


token_covariance = torch.ops.entropy_kernels.token_covariance.default
clip_cov_mask = torch.ops.entropy_kernels.clip_cov_mask.default
kl_cov_mask = torch.ops.entropy_kernels.kl_cov_mask.default
