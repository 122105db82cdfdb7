"""The C++ kernels of ``_ops.so`` under the names and signatures that every backend shares."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


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
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    _ops.token_stats_backward(
        grad_logprob, grad_entropy, grad_collision, logits, target, temperature, state,
        softcap, ignore_index, vocab_start, vocab_size, dlogits,
    )  # fmt: skip
    return dlogits
