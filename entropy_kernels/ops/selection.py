"""``entropy_kernels::token_covariance`` and the masks of selections: schema, fake, dispatch to a backend.

No gradient flows through a selection: there is no autograd formula, and the public functions in
:mod:`entropy_kernels.selection` detach. A process group travels as its name ("" for none), so that a compiled graph
can hold the op.

``numbers`` are ratio, k, low and high in memory, float64: (4,), or (2,) where there is no range; NaN for the one of
ratio and k that is not given. Kernels read them in the place of the plain numbers, so that a schedule neither waits
for the device nor compiles again. Shares are clamped to [0, 1] and k to >= 0 (NaN is 0), and a range whose low is not
below its high is empty. Those of ``budget_mask`` are budget, limit and share, (3,); a share is at most 1, and nothing
is selected for one that is not above 0. On a GPU they, and the seed, may also be on the CPU: no launch has to write
them there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entropy_kernels.backends import registry
from entropy_kernels.backends.radix_select import Band, Count
from entropy_kernels.ops.checks import check_number, check_tensors, register

_library = torch.library.Library("entropy_kernels", "FRAGMENT")
_TOKENS = "Tensor covariance, Tensor? mask, Tensor? exclude, Tensor? token_index"
_COUNT = "Tensor? numbers, float? ratio, SymInt? k, bool at_least_one"
for _schema in (
    "token_covariance(Tensor logprob, Tensor advantages, Tensor? mask, str group, str backend) -> Tensor",
    f"clip_cov_mask({_TOKENS}, Tensor seed, {_COUNT}, float low, float high, bool quantile, bool closed, "
    "str group, str backend) -> Tensor",
    f"kl_cov_mask({_TOKENS}, {_COUNT}, str group, str backend) -> Tensor",
    "budget_mask(Tensor score, Tensor? mask, Tensor? exclude, Tensor? token_index, Tensor numbers, str group, "
    "str backend) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _flat(*tensors: Tensor | None) -> list[Any]:
    """(N,) and contiguous: kernels read bare memory."""
    return [x if x is None or (x.dim() == 1 and x.is_contiguous()) else x.reshape(-1).contiguous() for x in tensors]


def _flat_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> list[Any]:
    if not (logprob.is_floating_point() and advantages.is_floating_point()):
        name, tensor = ("advantages", advantages) if logprob.is_floating_point() else ("logprob", logprob)
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    dtype = torch.float64 if torch.float64 in (logprob.dtype, advantages.dtype) else torch.float32
    shape = logprob.shape
    check_tensors(
        logprob.device, ("advantages", advantages, advantages.dtype, shape), ("mask", mask, torch.bool, shape)
    )
    return _flat(logprob.to(dtype), advantages.to(dtype), mask)


def _flat_tokens(
    name: str, score: Tensor, mask: Tensor | None, exclude: Tensor | None, token_index: Tensor | None
) -> list[Any]:
    if not score.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {score.dtype}")
    shape = score.shape
    check_tensors(
        score.device, ("mask", mask, torch.bool, shape), ("exclude", exclude, torch.bool, shape),
        ("token_index", token_index, torch.int64, shape),
    )  # fmt: skip
    return _flat(score.float(), mask, exclude, token_index)


def _flat_selection(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor | None,
    numbers: Tensor | None,
    ratio: float | None,
    k: int | None,
) -> list[Any]:
    """The first four; ``seed`` is None where there is none, and no range."""
    tokens = _flat_tokens("covariance", covariance, mask, exclude, token_index)
    if seed is not None:
        check_number("seed", seed, torch.int64, (), covariance.device)
    if numbers is not None:
        check_number("numbers", numbers, torch.float64, (2 if seed is None else 4,), covariance.device)
    if numbers is None and (ratio is None) == (k is None):
        raise ValueError(f"ratio, k: expected one of them, got ratio={ratio} and k={k}")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a share in [0, 1], got {ratio}")
    if k is not None and k < 0:
        raise ValueError(f"k: expected >= 0, got {k}")
    return tokens


def _flat_budget(score: Tensor, mask: Any, exclude: Any, token_index: Any, numbers: Tensor) -> list[Any]:
    tokens = _flat_tokens("score", score, mask, exclude, token_index)
    check_number("numbers", numbers, torch.float64, (3,), score.device)
    return tokens


def _token_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None, group: str, backend: str) -> Tensor:
    tokens = _flat_covariance(logprob, advantages, mask)
    kernel = registry.kernel("token_covariance", "token_covariance", backend, tokens[0])
    return kernel(*tokens, group).view(logprob.shape)


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
    tokens = _flat_selection(covariance, mask, exclude, token_index, seed, numbers, ratio, k)
    kernel = registry.kernel("clip_cov_mask", "clip_cov_mask", backend, tokens[0])
    numbers = None if numbers is None else numbers.contiguous()
    count, band = Count(ratio, k, at_least_one, numbers), Band(low, high, quantile, closed, numbers)
    return kernel(*tokens, seed, count, band, group).view(covariance.shape)


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
    tokens = _flat_selection(covariance, mask, exclude, token_index, None, numbers, ratio, k)
    kernel = registry.kernel("kl_cov_mask", "kl_cov_mask", backend, tokens[0])
    count = Count(ratio, k, at_least_one, None if numbers is None else numbers.contiguous())
    return kernel(*tokens, count, group).view(covariance.shape)


def _budget_mask(
    score: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    numbers: Tensor,
    group: str,
    backend: str,
) -> Tensor:
    tokens = _flat_budget(score, mask, exclude, token_index, numbers)
    kernel = registry.kernel("budget_mask", "budget_mask", backend, tokens[0])
    return kernel(*tokens, numbers.contiguous(), group).view(score.shape)


def _fake_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    _flat_covariance(logprob, advantages, mask)  # here, too: a tensor on meta among others makes this the kernel
    return logprob.new_empty(logprob.shape, dtype=torch.float32)


def _fake_clip(covariance: Tensor, *rest: Any) -> Tensor:
    _flat_selection(covariance, *rest[:7])
    return covariance.new_empty(covariance.shape, dtype=torch.bool)


def _fake_kl(covariance: Tensor, *rest: Any) -> Tensor:
    _flat_selection(covariance, *(*rest[:3], None, *rest[3:6]))
    return covariance.new_empty(covariance.shape, dtype=torch.bool)


def _fake_budget(score: Tensor, *rest: Any) -> Tensor:
    _flat_budget(score, *rest[:4])
    return score.new_empty(score.shape, dtype=torch.bool)


register(_library, "token_covariance", _token_covariance, _fake_covariance)
register(_library, "clip_cov_mask", _clip_cov_mask, _fake_clip)
register(_library, "kl_cov_mask", _kl_cov_mask, _fake_kl)
register(_library, "budget_mask", _budget_mask, _fake_budget)

token_covariance = torch.ops.entropy_kernels.token_covariance.default
clip_cov_mask = torch.ops.entropy_kernels.clip_cov_mask.default
kl_cov_mask = torch.ops.entropy_kernels.kl_cov_mask.default
budget_mask = torch.ops.entropy_kernels.budget_mask.default
