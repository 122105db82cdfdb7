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

from collections.abc import Callable
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


_Given = tuple[list[Any], tuple[Any, ...]]  # the tokens, flat, and what else a kernel takes


def _flat(*tensors: Tensor | None) -> list[Any]:
    """(N,) and contiguous: kernels read bare memory."""
    return [x if x is None or (x.dim() == 1 and x.is_contiguous()) else x.reshape(-1).contiguous() for x in tensors]


def _of_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None) -> _Given:
    if not (logprob.is_floating_point() and advantages.is_floating_point()):
        name, tensor = ("advantages", advantages) if logprob.is_floating_point() else ("logprob", logprob)
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    dtype = torch.float64 if torch.float64 in (logprob.dtype, advantages.dtype) else torch.float32
    shape = logprob.shape
    check_tensors(
        logprob.device, ("advantages", advantages, advantages.dtype, shape), ("mask", mask, torch.bool, shape)
    )
    return _flat(logprob.to(dtype), advantages.to(dtype), mask), ()


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


def _selection(
    score: Tensor, mask: Any, exclude: Any, token_index: Any, seed: Any, numbers: Any, ratio: Any, k: Any,
    at_least_one: bool,
) -> tuple[list[Any], Count]:  # fmt: skip
    """The flat tokens, and how many; ``seed`` is None where there is none, and no range."""
    tokens = _flat_tokens("covariance", score, mask, exclude, token_index)
    if seed is not None:
        check_number("seed", seed, torch.int64, (), score.device)
    if numbers is not None:
        check_number("numbers", numbers, torch.float64, (2 if seed is None else 4,), score.device)
    if numbers is None and (ratio is None) == (k is None):
        raise ValueError(f"ratio, k: expected one of them, got ratio={ratio} and k={k}")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a share in [0, 1], got {ratio}")
    if k is not None and k < 0:
        raise ValueError(f"k: expected >= 0, got {k}")
    return tokens, Count(ratio, k, at_least_one, None if numbers is None else numbers.contiguous())


def _of_clip_cov(*given: Any) -> _Given:
    *among, low, high, quantile, closed = given
    tokens, count = _selection(*among)
    return tokens, (among[4], count, Band(low, high, quantile, closed, count.numbers))


def _of_kl_cov(score: Tensor, mask: Any, exclude: Any, token_index: Any, *how_many: Any) -> _Given:
    tokens, count = _selection(score, mask, exclude, token_index, None, *how_many)
    return tokens, (count,)


def _of_budget(score: Tensor, mask: Any, exclude: Any, token_index: Any, numbers: Tensor) -> _Given:
    tokens = _flat_tokens("score", score, mask, exclude, token_index)
    check_number("numbers", numbers, torch.float64, (3,), score.device)
    return tokens, (numbers.contiguous(),)


def _registered(name: str, checked: Callable[..., _Given], dtype: torch.dtype) -> Any:
    """The operator; ``checked``: its arguments, but for group and backend, as a kernel takes them."""

    def run(like: Tensor, *rest: Any) -> Tensor:
        *given, group, backend = rest
        tokens, more = checked(like, *given)
        return registry.kernel(name, name, backend, tokens[0])(*tokens, *more, group).view(like.shape)

    def fake(like: Tensor, *rest: Any) -> Tensor:
        checked(like, *rest[:-2])  # here, too: a tensor on meta among others makes this the kernel
        return like.new_empty(like.shape, dtype=dtype)

    register(_library, name, run, fake)
    return getattr(torch.ops.entropy_kernels, name).default


token_covariance = _registered("token_covariance", _of_covariance, torch.float32)
clip_cov_mask = _registered("clip_cov_mask", _of_clip_cov, torch.bool)
kl_cov_mask = _registered("kl_cov_mask", _of_kl_cov, torch.bool)
budget_mask = _registered("budget_mask", _of_budget, torch.bool)
