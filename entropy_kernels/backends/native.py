"""The C++ kernels of ``_ops.so`` under the names and signatures that every backend shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from entropy_kernels.backends import radix_select, reused_memory
from entropy_kernels.backends.radix_select import Band, Count


def _load() -> str | None:
    """Load the extension; None, or the reason why it is not there."""
    library = Path(__file__).parent.parent / "_ops.so"
    if not library.exists():
        return "the C++ extension was not built (no compiler, or ENTROPY_KERNELS_SKIP_CPP was set at install)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None


load_error = _load()
_ops = torch.ops.entropy_kernels_native


def token_stats_forward(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    want: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _ops.token_stats_forward(logits, target, temperature, softcap, ignore_index, vocab_start, vocab_size, want)


def token_stats_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_collision: Tensor | None,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    softcap: float,
    ignore_index: int,
    vocab_start: int,
    vocab_size: int,
    inplace: bool,
) -> Tensor:
    dlogits = logits if inplace else reused_memory.empty(logits.shape, logits.dtype)
    _ops.token_stats_backward(
        grad_logprob, grad_entropy, grad_collision, logits, target, temperature, state,
        softcap, ignore_index, vocab_start, vocab_size, dlogits,
    )  # fmt: skip
    return dlogits


class _SelectionSteps:
    """The C++ steps of :mod:`..radix_select`; finding a digit in 2048 bins is left to torch."""

    find_digit = staticmethod(radix_select.find_digit)

    def __getattr__(self, name: str) -> Any:
        return getattr(_ops, name)


_steps = cast(radix_select.Steps, _SelectionSteps())


def token_covariance(logprob: Tensor, advantages: Tensor, mask: Tensor | None, group: str) -> Tensor:
    if group:
        return radix_select.token_covariance(_steps, logprob, advantages, mask, group)
    return _ops.token_covariance(logprob, advantages, mask)


def clip_cov_mask(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    seed: Tensor,
    count: Count,
    band: Band,
    group: str,
) -> Tensor:
    if group:
        return radix_select.clip_cov_mask(_steps, covariance, mask, exclude, token_index, seed, count, band, group)
    return _ops.clip_cov_mask(covariance, mask, exclude, token_index, seed, *_count(count), *band)


def kl_cov_mask(
    covariance: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    token_index: Tensor | None,
    count: Count,
    group: str,
) -> Tensor:
    if group:
        return radix_select.kl_cov_mask(_steps, covariance, mask, exclude, token_index, count, group)
    return _ops.kl_cov_mask(covariance, mask, exclude, token_index, *_count(count))


def _count(count: Count) -> tuple[float, int, bool]:
    """-1 for the one of ratio and k that is not given."""
    return -1.0 if count.ratio is None else count.ratio, -1 if count.k is None else count.k, count.at_least_one
