"""The gate before every timing: outputs against float64, on a slice of the rows.

An error is reported for every implementation, since precision is part of the comparison. Ours are held to a strict
bound (float32 accumulation, rounded once); peers and limits to a loose one that only a different function exceeds: a
bf16 chain that is off by a tenth of a nat is timed, with its error beside it. NaN never passes. An implementation that
computes a part of its op is checked on that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_checks import check_floor, check_linear, check_loss
from benchmarks.registry import (
    BAND,
    CLIP_COV_RATIO,
    EVERYTHING,
    GRADIENT,
    KL_COV_RATIO,
    MEAN_LOGPROB,
    TOPK,
    Implementation,
)
from benchmarks.shapes import Case, Inputs

CHECKED_ROWS = 16


@dataclass
class Check:
    """Largest error per output, in the unit that its name tells, and what failed (empty: passed)."""

    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, error: float | Tensor, bound: float) -> None:
        """Record an error; one above its bound, or NaN, is a failure."""
        value = float(error)
        self.errors[name] = value
        if not value <= bound:
            self.failures.append(f"{name}: error {value:.3g} above {bound:.3g}")

    @property
    def passed(self) -> bool:
        return not self.failures


def check(implementation: Implementation, case: Case, inputs: Inputs, outputs: Any) -> Check:
    """Compare the outputs of one call with float64.

    Args:
        implementation: its op says what is expected, what it ``computes`` of it which part; "ours" is held to the
            strict bounds, everything else to the loose ones.
        outputs: what the call returned.
    """
    result = Check()
    _CHECKS[implementation.op](result, case, inputs, implementation, outputs)
    return result


# --- statistics -------------------------------------------------------------------------------------------------------


def _rows(count: int, device: torch.device) -> Tensor:
    """Evenly spaced row numbers, the last one included."""
    return torch.linspace(0, count - 1, min(CHECKED_ROWS, count), dtype=torch.float64, device=device).round().long()


def _reference(inputs: Inputs, rows: Tensor, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """All statistics of the chosen rows and the gradient, by their definitions, in float64.

    ``upstream``: gradients (N,) that flow into log-prob and entropy.
    """
    logp = inputs["logits"][rows].double().log_softmax(-1)  # (R, V)
    target = inputs["target"][rows]
    p = logp.exp()
    logprob = logp.gather(-1, target[:, None])[:, 0]
    plogp = torch.where(p > 0, p * logp, 0.0)
    entropy = -plogp.sum(-1)
    collision = (p * p).sum(-1)
    second = (p * plogp).sum(-1)
    onehot = torch.zeros_like(p).scatter_(-1, target[:, None], 1.0)
    gradient = upstream[0][rows].double()[:, None] * (onehot - p)
    gradient -= upstream[1][rows].double()[:, None] * (plogp + p * entropy[:, None])
    covariance = logprob.exp() * (logprob + entropy) - (second + entropy * collision)
    return {
        "logprob": logprob,
        "entropy": entropy,
        "collision": collision,
        "vocab_covariance": covariance,
        "gradient": gradient,
        "target": target,
    }


def _upstream(inputs: Inputs, computes: str) -> tuple[Tensor, Tensor]:
    """What flows into log-prob and entropy; nothing into an entropy that is not computed."""
    into_logprob, into_entropy = inputs["grad_logprob"], inputs["grad_entropy"]
    if computes == EVERYTHING:
        return into_logprob, into_entropy
    if computes == MEAN_LOGPROB:  # the loss is minus the mean
        into_logprob = torch.full_like(into_logprob, -1.0 / into_logprob.numel())
    return into_logprob, torch.zeros_like(into_entropy)


def _nats(result: Check, name: str, got: Tensor, want: Tensor, strict: bool, dtype: torch.dtype) -> None:
    accuracy = 1e-11 if dtype == torch.float64 else 2e-5
    bound = accuracy * (1 + 0.1 * float(want.abs().max())) if strict else 0.5
    result.add(f"{name} (nats)", (got.double() - want).abs().max(), bound)


def _mean_logprob(inputs: Inputs) -> Tensor:
    """Over all rows, a few at a time."""
    total = torch.zeros((), dtype=torch.float64, device=inputs["logits"].device)
    for logits, target in zip(inputs["logits"].split(64), inputs["target"].split(64), strict=True):
        total += logits.double().log_softmax(-1).gather(-1, target[:, None]).sum()
    return total / inputs["target"].numel()


def _statistics(
    result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    computes, strict = implementation.computes, implementation.role == "ours"
    rows = _rows(inputs["target"].numel(), case.device)
    want = _reference(inputs, rows, _upstream(inputs, computes))
    if implementation.op == "logprob_entropy_bwd" or computes == GRADIENT:
        return rows, want
    if computes == MEAN_LOGPROB:
        _nats(result, "mean logprob", outputs[0], _mean_logprob(inputs), strict, case.dtype)
        return rows, want
    _nats(result, "logprob", outputs[0][rows], want["logprob"], strict, case.dtype)
    if computes == EVERYTHING:
        _nats(result, "entropy", outputs[1][rows], want["entropy"], strict, case.dtype)
    return rows, want


def _token_stats(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    rows, want = _statistics(result, case, inputs, implementation, outputs)
    strict = implementation.role == "ours"
    collision = (outputs[2][rows].double() / want["collision"] - 1).abs().max()
    result.add("collision (relative)", collision, 1e-4 if strict else 0.5)
    _nats(result, "vocab_covariance", outputs[3][rows], want["vocab_covariance"], strict, case.dtype)


# error that rounding to the dtype alone brings to an element, with room for float32 arithmetic before it
_ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-3}


def _gradient(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """The gradient is the last output; before it what the forward pass returned, if that was in the call."""
    rows, want = _statistics(result, case, inputs, implementation, outputs)
    strict = implementation.role == "ours"
    got, gradient, target = outputs[-1][rows].double(), want["gradient"], want["target"][:, None]
    bound = _ROUNDING[case.dtype] if strict else 0.3
    largest = gradient.abs().amax(-1)
    if not strict:  # where p is close to 1, a bf16 log-prob leaves nothing of 1 - p: coarse, but no other function
        upstream = _upstream(inputs, implementation.computes)
        largest = largest + 0.05 * sum(grad[rows].double().abs() for grad in upstream)
    # apart from the target: its element is up to 1/p times the others and would hide a missing softmax term
    at_target = (got - gradient).gather(-1, target).abs() / largest[:, None]
    result.add("gradient at target (relative)", at_target.max(), bound)
    difference = (got - gradient).scatter(-1, target, 0.0).norm(dim=-1)
    others = gradient.scatter(-1, target, 0.0).norm(dim=-1)
    # a peaked row has next to nothing off its target: float32 cannot resolve 1 - p below 1e-7 of the row's largest
    floor = (1e-6 if strict else 1e-2) * largest
    result.add("gradient elsewhere (relative)", (difference / (others + floor)).max(), bound)


def _logits_floor(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    logits, name = inputs["logits"], implementation.name
    if name == "amax":
        rows = _rows(logits.shape[0], case.device)
        result.add("amax", (outputs[rows].double() - logits[rows].double().amax(-1)).abs().max(), 0.0)
    elif name == "copy":
        result.add("copy (elements)", (outputs != logits).sum(), 0)
    else:
        result.add("read (finite)", float(not torch.is_tensor(outputs)), 0)


# --- selection --------------------------------------------------------------------------------------------------------


def _token_covariance(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    mask = inputs["mask"]
    logprob, advantages = inputs["logprob"].double(), inputs["advantages"].double()
    want = (logprob - logprob[mask].mean()) * (advantages - advantages[mask].mean()) * mask
    error = (outputs.double() - want).abs().max() / want.abs().max()
    result.add("covariance (of the largest)", error, 1e-6 if implementation.role == "ours" else 1e-3)


def _clip_cov_mask(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """How many, and from where; which of them is drawn is the matter of the tests (shared Philox vectors)."""
    covariance, (low, high) = inputs["covariance"], BAND
    band = (covariance > low) & (covariance < high)
    count = min(max(1, int(CLIP_COV_RATIO * covariance.numel())), int(band.sum()))
    result.add("count (tokens)", (outputs.sum() - count).abs(), 0)
    result.add("outside the band (tokens)", (outputs & ~band).sum(), 0)


def _kl_cov_mask(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    covariance = inputs["covariance"]
    count = max(1, int(KL_COV_RATIO * covariance.numel()))
    order = covariance.argsort(descending=True, stable=True)[:count]
    if implementation.role == "ours":  # ties go to the lower index: the mask itself is determined
        want = torch.zeros_like(outputs).index_fill_(0, order, True)
        result.add("wrong tokens", (want != outputs).sum(), 0)
    else:  # a peer may break ties as it likes: only the selected values are determined
        got = covariance[outputs].sort(descending=True).values
        same = got.numel() == count and bool((got == covariance[order]).all())
        result.add("wrong values", float(not same), 0)


def _tokens_floor(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    want = inputs["covariance"].sort(descending=True).values[: min(TOPK, outputs.values.numel())]
    result.add("values", (outputs.values - want).abs().max(), 0.0)


# --- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Surrogate:
    """Per-token quantities of a policy loss in float64; gradients are those of the masked token mean."""

    ratio_loss: Tensor  # -A r
    clipped_loss: Tensor  # -A clamp(r)
    covariance: Tensor
    mask: Tensor
    count: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> _Surrogate:
        logprob, old = inputs["logprob"].double(), inputs["old_logprob"].double()
        advantages, mask = inputs["advantages"].double(), inputs["mask"]
        ratio = (logprob - old).exp()
        covariance = (logprob - logprob[mask].mean()) * (advantages - advantages[mask].mean())
        return cls(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2), covariance, mask, mask.sum())


def _compare_loss(result: Check, implementation: Implementation, outputs: Any, loss: Tensor, gradient: Tensor) -> None:
    bound = 1e-5 if implementation.role == "ours" else 1e-3
    result.add("loss (relative)", ((outputs[0].double() - loss) / loss).abs(), bound)
    result.add("gradient (of the largest)", (outputs[1].double() - gradient).abs().max() / gradient.abs().max(), bound)


def _policy_loss(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    s = _Surrogate.of(inputs)
    largest = torch.maximum(s.ratio_loss, s.clipped_loss)
    bounded = torch.where(
        inputs["advantages"] < 0, torch.minimum(largest, -3.0 * inputs["advantages"].double()), largest
    )
    alive = s.mask & (bounded == s.ratio_loss)
    _compare_loss(result, implementation, outputs, (bounded * s.mask).sum() / s.count, s.ratio_loss * alive / s.count)


def _clip_cov_loss(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """The draw is random: take the dropped tokens from the gradient, then check their number, place and the rest."""
    s, (low, high) = _Surrogate.of(inputs), BAND
    alive = s.mask & (s.clipped_loss <= s.ratio_loss)
    dropped = alive & (outputs[1] == 0)
    band = alive & (s.covariance > low - 1e-5) & (s.covariance < high + 1e-5)
    count = min(max(1, int(CLIP_COV_RATIO * int(s.count))), int(band.sum()))
    result.add("count (tokens)", (dropped.sum() - count).abs(), 0)
    result.add("outside the band (tokens)", (dropped & ~band).sum(), 0)
    largest = torch.maximum(s.ratio_loss, s.clipped_loss) * (s.mask & ~dropped)
    _compare_loss(result, implementation, outputs, largest.sum() / s.count, s.ratio_loss * (alive & ~dropped) / s.count)


def _kl_cov_loss(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    s = _Surrogate.of(inputs)
    count = max(1, int(KL_COV_RATIO * int(s.count)))
    chosen = torch.zeros_like(s.mask)
    chosen.view(-1)[s.covariance.masked_fill(~s.mask, -torch.inf).view(-1).topk(count).indices] = True
    difference = inputs["logprob"].double() - inputs["old_logprob"].double()
    loss = ((s.ratio_loss + chosen * difference.abs()) * s.mask).sum() / s.count
    _compare_loss(result, implementation, outputs, loss, (s.ratio_loss + chosen * difference.sign()) * s.mask / s.count)


_CHECKS: dict[str, Callable[..., Any]] = {
    "logprob_entropy": _statistics,
    "logprob_entropy_bwd": _gradient,
    "logprob_entropy_fwdbwd": _gradient,
    "token_stats": _token_stats,
    "logits_floor": _logits_floor,
    "token_covariance": _token_covariance,
    "clip_cov_mask": _clip_cov_mask,
    "kl_cov_mask": _kl_cov_mask,
    "tokens_floor": _tokens_floor,
    "policy_loss": _policy_loss,
    "clip_cov_loss": _clip_cov_loss,
    "kl_cov_loss": _kl_cov_loss,
    "linear_logprob_entropy": check_linear,
    "linear_logprob_entropy_fwdbwd": check_linear,
    "linear_policy_loss": check_loss,
    "linear_clip_cov_loss": check_loss,
    "linear_floor": check_floor,
}
