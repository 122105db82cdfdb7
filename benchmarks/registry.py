"""The one registry of implementations: what an op is, what an implementation is, and the list of all of them.

An implementation is a factory that takes a case and its inputs and returns the call to be timed, and a function that
says why it cannot run a case. Outputs of a call have the form that the op's check expects (:mod:`benchmarks.checks`).
:mod:`benchmarks.implementations` fills the registry; import that one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import BatchShape, Case, HiddenShape, Inputs, LogitsShape, TokensShape

# op -> what is timed. "floor" ops are limits of the machine, not rivals.
OPS: dict[str, str] = {
    "logprob_entropy": "log-prob and entropy from logits, no gradient",
    "logprob_entropy_bwd": "the gradient of log-prob and entropy with respect to the logits; forward outside the clock",
    "logprob_entropy_fwdbwd": "log-prob and entropy, and the gradient of both with respect to the logits",
    "token_stats": "log-prob, entropy, collision probability and vocabulary covariance, no gradient",
    "logits_floor": "amax over the vocabulary; reading the logits once (integer sum); copying them",
    "token_covariance": "token-wise covariance of log-prob and advantage, with a mask",
    "clip_cov_mask": "Clip-Cov's tokens: a random n of those in the band",
    "kl_cov_mask": "KL-Cov's tokens: the n of largest covariance",
    "tokens_floor": "torch.topk(covariance, 800)",
    "policy_loss": "PPO's clipped loss and its gradient with respect to log-prob",
    "clip_cov_loss": "Clip-Cov loss (verl's definition), selection included, and its gradient",
    "kl_cov_loss": "KL-Cov loss (verl's definition), selection included, and its gradient",
    "linear_logprob_entropy": "log-prob and entropy from hidden states and a head, no gradient",
    "linear_logprob_entropy_fwdbwd": "the same with the gradients of both",
    "linear_policy_loss": "PPO's clipped loss from hidden states and a head, and its gradients",
    "linear_clip_cov_loss": "Clip-Cov loss (verl's definition) from the same, selection included, and its gradients",
    "linear_floor": "the matrix products alone: the one of the forward pass; all three; with those of a recomputation",
}
# Selected fractions: the library's defaults, the paper's 2e-4 (Clip-Cov) and 2e-3 (KL-Cov).
CLIP_COV_RATIO = 2e-4
KL_COV_RATIO = 2e-3
BAND = (1.0, 5.0)
TOPK = 800
SEED = 1234
STATISTICS = ("logprob_entropy", "logprob_entropy_bwd", "logprob_entropy_fwdbwd", "token_stats")
SELECTION = ("token_covariance", "clip_cov_mask", "kl_cov_mask")
LINEAR = ("linear_floor", "linear_logprob_entropy", "linear_logprob_entropy_fwdbwd")
LINEAR_LOSSES = ("linear_policy_loss", "linear_clip_cov_loss")
LOSSES = ("policy_loss", "clip_cov_loss", "kl_cov_loss")
SHAPE_OF: dict[str, type] = {
    **dict.fromkeys((*STATISTICS, "logits_floor"), LogitsShape),
    **dict.fromkeys((*SELECTION, "tokens_floor"), TokensShape),
    **dict.fromkeys(LOSSES, BatchShape),
    **dict.fromkeys((*LINEAR, *LINEAR_LOSSES), HiddenShape),
}

# What an implementation computes of its op. A cross-entropy has no entropy: it is timed beside those that have one,
# checked on what it does compute, and its rows say so.
EVERYTHING = ""
LOGPROB = "log-prob only, no entropy"
MEAN_LOGPROB = "mean log-prob only, no entropy, no gradient per token"
GRADIENT = "a policy loss on log-prob, no entropy, log-prob not returned"


@dataclass(frozen=True)
class Prepared:
    """``call`` is timed; ``reset``, run before each call and not timed, restores inputs that the call overwrites.

    ``stated_bytes``: the extra memory that the call's own documentation allows it, results included; None: none stated.
    """

    call: Callable[[], Any]
    reset: Callable[[], None] | None = None
    stated_bytes: int | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``role``: "ours" (held to the strict bound of the check), "peer" (held to the loose one) or "limit".
    ``supports``: None, or the reason why this case cannot run here.
    ``computes``: EVERYTHING, or what it computes of its op, in words for the tables.
    """

    op: str
    name: str
    role: str
    make: Callable[[Case, Inputs], Prepared]
    supports: Callable[[Case], str | None]
    computes: str = EVERYTHING


REGISTRY: dict[tuple[str, str], Implementation] = {}


def register(implementation: Implementation) -> None:
    """Add an implementation; the same (op, name) twice is an error."""
    key = (implementation.op, implementation.name)
    if implementation.op not in OPS:
        raise ValueError(f"op: expected one of {sorted(OPS)}, got {implementation.op!r}")
    if key in REGISTRY:
        raise ValueError(f"implementation {implementation.name!r} of {implementation.op} is already registered")
    REGISTRY[key] = implementation


def of_op(op: str) -> list[Implementation]:
    """All implementations of an op, in the order of registration."""
    return [implementation for (name, _), implementation in REGISTRY.items() if name == op]


def names() -> list[str]:
    """Names of all implementations, each once."""
    return list(dict.fromkeys(name for _, name in REGISTRY))


# --- limits of a case ------------------------------------------------------------------------------------------------


def available_bytes(device: torch.device) -> int:
    """Bytes that a call may take: free memory, on a GPU also what torch's allocator holds and nobody uses."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(case: Case, copies: float) -> str | None:
    """Reason if ``copies`` fp32 tensors of the size of the logits do not fit into the memory that is free."""
    if not isinstance(case.shape, (LogitsShape, HiddenShape)):
        return None
    needed = int(copies * case.shape.rows * case.shape.vocab * 4)
    free = available_bytes(case.device)
    if needed > 0.9 * free:
        return f"needs about {needed / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB are free"
    return None


def always(case: Case) -> str | None:
    """No limit."""
    return None
