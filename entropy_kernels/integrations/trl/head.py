"""TRL's fused head replaced by ours: log-prob, entropy and log Σp² from one read, and more for who collects it.

TRL's trainers (GRPO, RLOO, SFT, DPO, KTO) score tokens through ``_ChunkedLogProbFunction.apply``. Nothing here imports
TRL.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations import _reads
from entropy_kernels.integrations._patch import Patch

VERSIONS = ("1.16.0",)
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # their outputs beside "log_probs"
_OURS = {"log_probs": "logprob", "entropy": "entropy", "log_sum_sq_probs": "collision"}


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        """(N, H), (V, H), (V,) and (N,) -> the log-prob and the optional outputs, each (N,) or None."""
        if (reason := _not_ours(outputs, logit_scale)) is not None:
            HEAD.calls -= 1  # it is not ours that serves
            warnings.warn(f"TRL's own head serves this call: {reason}", stacklevel=4)
            return original(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        _refuse_shards(weight)
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        names = dict.fromkeys(["logprob", *(_OURS[name] for name in outputs), *_reads.wanted()])
        # scale the logits, cap them, divide by T: the cap of s·z is s times that of z with a cap of 1/s
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        read = ek.linear_token_stats(
            hidden, weight, targets, bias, statistics=tuple(names), temperature=temperature / logit_scale,
            softcap=softcap,
        )._asdict()  # fmt: skip
        _reads.leave(**read)
        squares = read["collision"].detach().log() if "log_sum_sq_probs" in outputs else None
        return read["logprob"], read["entropy"] if "entropy" in outputs else None, squares, None, None

    return apply


def _not_ours(outputs: tuple[str, ...], logit_scale: float) -> str | None:
    """Why ours cannot serve a call, or None."""
    beyond = [name for name in outputs if name not in _OURS]
    if beyond:
        return f"ours has no {' and no '.join(beyond)}, which this trainer logs"
    return None if logit_scale > 0 else f"ours needs a logit_scale > 0, got {logit_scale}"


def _refuse_shards(weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise NotImplementedError(
            "weight: expected one that stays whole until the backward pass, got a parameter that DeepSpeed's ZeRO-3 "
            "shards; use ZeRO-2 or FSDP2, or TRL's own head (GRPOConfig(fused_head=False), no patch_head())"
        )


HEAD = Patch(
    target="trl.trainer.utils:_ChunkedLogProbFunction.apply",
    make=_make,
    signature="(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
    f"logit_scale=1.0, outputs={_OPTIONAL!r})",
    package="trl",
    versions=VERSIONS,
    what="statistics that survive -inf and large logits, the vocabulary covariance, C++ and CUDA kernels",
    signature_of="trl.trainer.utils:_ChunkedLogProbFunction.forward",
    anyway="patch_head(any_version=True), GRPOConfig(any_trl_version=True)",
)


def patch_head(*, any_version: bool = False) -> Patch:
    """Replace the head of all of TRL's trainers by ours, until ``undo()``.

        patch = patch_head()
        ...                       # GRPO, RLOO: trainer.train()
        assert patch.calls        # that ours ran
        patch.undo()

    Calls that want the mean logit or whether the target is the largest (SFT, DPO, KTO) go to TRL's own head, with a
    warning. Values differ from TRL's by rounding (docs/integrations.md).

    Args:
        any_version: also beside a version of TRL that this was not tested with.

    Returns:
        The :class:`entropy_kernels.integrations._patch.Patch`, applied; it is a context manager, too.

    Raises:
        PatchRefused: another version of TRL, or another signature of its head.
        NotImplementedError: where it is called with a parameter that ZeRO-3 shards.

    Source:
        docs/integrations.md.
    """
    return HEAD.apply(any_version=any_version)


@contextlib.contextmanager
def head(*, any_version: bool = False) -> Iterator[Patch]:
    """Ours in place inside; a patch that was there before stays. Arguments and errors: :func:`patch_head`."""
    was_active, served = HEAD.active, HEAD.calls
    HEAD.apply(any_version=any_version).calls = served  # one count over all forwards
    try:
        yield HEAD
    finally:
        if not was_active:
            HEAD.undo()
