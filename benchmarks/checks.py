"""The gate before every timing: outputs against float64, on a slice of the rows.

An error is reported for every implementation, since precision is part of the comparison. Ours are held to a strict
bound (float32 accumulation, rounded once); peers and rooflines to a loose one that only a different function exceeds: a
bf16 chain that is off by a tenth of a nat is timed, with its error beside it. NaN never passes. An implementation that
computes a part of its op is checked on that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BAND, CLIP_COV_RATIO, KL_COV_RATIO, TOPK, Case, Inputs
from benchmarks.ours import EVERYTHING, GRADIENT, MEAN_LOGPROB, POLICY, Implementation
from entropy_kernels import reference

CHECKED = 16  # rows; from hidden states tokens, and rows of the head


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


def _evenly(count: int, device: torch.device) -> Tensor:
    """Evenly spaced row numbers, the last one included."""
    return torch.linspace(0, count - 1, min(CHECKED, count), dtype=torch.float64, device=device).round().long()


def _reference(inputs: Inputs, rows: Tensor, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Statistics of the chosen rows, and the gradient of what flows into log-prob and entropy, (N,) each."""
    logits, target = inputs["logits"][rows], inputs["target"][rows]
    values = reference.statistics(logits, target, names=("logprob", "entropy", "collision", "vocab_covariance"))
    into = {"logprob": upstream[0][rows], "entropy": upstream[1][rows]}
    return {**values, "gradient": reference.gradient(logits, target, into), "target": target}


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
    parts = zip(inputs["logits"].split(64), inputs["target"].split(64), strict=True)
    return torch.cat([reference.statistics(*part, names=("logprob",))["logprob"] for part in parts]).mean()


def _statistics(
    result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    computes, strict = implementation.computes, implementation.role == "ours"
    rows = _evenly(inputs["target"].numel(), case.device)
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


def _logits_roofline(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    logits, name = inputs["logits"], implementation.name
    if name == "amax":
        rows = _evenly(logits.shape[0], case.device)
        result.add("amax", (outputs[rows].double() - logits[rows].double().amax(-1)).abs().max(), 0.0)
    elif name == "copy":
        result.add("copy (elements)", (outputs != logits).sum(), 0)
    else:
        result.add("read (finite)", float(not torch.is_tensor(outputs)), 0)


# --- selection --------------------------------------------------------------------------------------------------------


def _token_covariance(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    want = reference.token_covariance(inputs["logprob"], inputs["advantages"], inputs["mask"])
    error = (outputs.double() - want).abs().max() / want.abs().max()
    result.add("covariance (of the largest)", error, 1e-6 if implementation.role == "ours" else 1e-3)


def _clip_cov_mask(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """How many, and from where; which of them is drawn is the matter of the tests (shared Philox vectors)."""
    covariance = inputs["covariance"]
    band = reference.in_range(covariance, torch.ones_like(outputs), low=BAND[0], high=BAND[1])
    count = min(max(1, int(CLIP_COV_RATIO * covariance.numel())), int(band.sum()))
    result.add("count (tokens)", (outputs.sum() - count).abs(), 0)
    result.add("outside the band (tokens)", (outputs & ~band).sum(), 0)


def _kl_cov_mask(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    covariance = inputs["covariance"]
    want = reference.kl_cov_mask(covariance, ratio=KL_COV_RATIO)
    if implementation.role == "ours":  # ties go to the lower index: the mask itself is determined
        result.add("wrong tokens", (want != outputs).sum(), 0)
    else:  # a peer may break ties as it likes: only the selected values are determined
        got, exact = (covariance[mask].sort().values for mask in (outputs, want))
        result.add("wrong values", float(not torch.equal(got, exact)), 0)


def _tokens_roofline(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    want = inputs["covariance"].sort(descending=True).values[: min(TOPK, outputs.values.numel())]
    result.add("values", (outputs.values - want).abs().max(), 0.0)


# --- losses -----------------------------------------------------------------------------------------------------------


def _loss(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """The loss and its gradient. Clip-Cov draws at random: which tokens it dropped is taken from the gradient."""
    logprob, old, advantages, mask = (inputs[name] for name in ("logprob", *POLICY))
    covariance = reference.token_covariance(logprob, advantages, mask)
    options: dict[str, Any] = {"dual_clip": 3.0}
    if implementation.op == "clip_cov_loss":
        alive = mask & ~reference.clipped(logprob, old, advantages)
        dropped, (low, high) = alive & (outputs[1] == 0), BAND
        band = alive & (covariance > low - 1e-5) & (covariance < high + 1e-5)
        count = min(max(1, int(CLIP_COV_RATIO * int(mask.sum()))), int(band.sum()))
        result.add("count (tokens)", (dropped.sum() - count).abs(), 0)
        result.add("outside the band (tokens)", (dropped & ~band).sum(), 0)
        options = {"dropped": dropped}
    elif implementation.op == "kl_cov_loss":
        chosen = reference.kl_cov_mask(covariance, mask, ratio=KL_COV_RATIO)
        options = {"clip_low": None, "clip_high": None, "penalized": chosen}
    leaf = logprob.double().requires_grad_()
    loss = reference.policy_loss(leaf, old, advantages, mask, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    bound = 1e-5 if implementation.role == "ours" else 1e-3
    result.add("loss (relative)", ((outputs[0].double() - loss.detach()) / loss.detach()).abs(), bound)
    result.add("gradient (of the largest)", (outputs[1].double() - gradient).abs().max() / gradient.abs().max(), bound)


# --- from hidden states: some tokens, and some rows of the head -------------------------------------------------------

_ROWS = 64  # tokens whose float64 logits exist at once
# Relative error of a gradient, in norm: in half precision that of the rounded logits, which is e^(2⁻⁹·|z|) - 1
_RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# The same of the worst row, in which one probability may be everything
_WORST = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.4}
_TINY = 1e-3  # of the largest row: what is smaller is judged with that as its size
_ROUNDED = 1e-2  # and where the logits are fp32: only the gradient is rounded
_LOOSE = 0.5
_CARRIED = 0.02
_EXACT_LOGITS = ("ours-fp32-logits", "ours-tiles")
_SURE = 1e-2  # a token whose 1 - p is smaller may have a gradient that rounds to zero


def _derivatives(inputs: Inputs) -> Inputs:
    """Log-prob and entropy of all tokens, and what :func:`_linear_gradients` needs of their derivatives, in float64.

    Kept among the inputs, for the next implementation.
    """
    if "exact_logprob" in inputs:
        return inputs
    hidden, weight, target = inputs["hidden"], inputs["weight"].double(), inputs["target"]
    tokens, entries = _evenly(len(hidden), hidden.device), _evenly(len(weight), hidden.device)
    found: dict[str, list[Tensor]] = {}
    largest = weight.new_zeros(())
    for begin in range(0, len(hidden), _ROWS):
        part = slice(begin, begin + _ROWS)
        logits, label = hidden[part].double() @ weight.t(), target[part]
        largest = torch.maximum(largest, logits.abs().max())
        values = reference.statistics(logits, label, names=("logprob", "entropy"))
        ones = torch.ones_like(values["logprob"])
        by_logits = {name: reference.gradient(logits, label, {name: ones}) for name in values}  # (R, V) each
        chosen = tokens[(tokens >= begin) & (tokens < begin + len(label))] - begin
        for name, value in values.items():
            found.setdefault(f"exact_{name}", []).append(value)
            found.setdefault(f"exact_{name}_by_entries", []).append(by_logits[name][:, entries])  # (R, 16)
            found.setdefault(f"exact_{name}_by_hidden", []).append(by_logits[name][chosen] @ weight)  # (≤ 16, H)
    inputs.update({name: torch.cat(parts) for name, parts in found.items()}, exact_largest=largest)
    return inputs


def _linear_gradients(
    inputs: Inputs, into_logprob: Tensor, into_entropy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of hidden, at the chosen tokens, and of the head, at the chosen entries, for what flows into each token."""
    exact, tokens = _derivatives(inputs), _evenly(len(inputs["hidden"]), inputs["hidden"].device)
    d_hidden = into_logprob.double()[tokens, None] * exact["exact_logprob_by_hidden"]
    by_entries = into_logprob.double()[:, None] * exact["exact_logprob_by_entries"]
    if into_entropy is not None:
        d_hidden = d_hidden + into_entropy.double()[tokens, None] * exact["exact_entropy_by_hidden"]
        by_entries = by_entries + into_entropy.double()[:, None] * exact["exact_entropy_by_entries"]
    return d_hidden, by_entries.t() @ inputs["hidden"].double()


def _accuracy(case: Case, exact: Inputs, implementation: Implementation) -> float:
    """Nats by which a value may be off: the rounding of the largest logit."""
    if implementation.role != "ours":
        return _LOOSE
    dtype = case.dtype
    if implementation.name in _EXACT_LOGITS and dtype.itemsize == 2:
        dtype = torch.float32
    return 2e-5 + 2 * torch.finfo(dtype).eps * float(exact["exact_largest"])


def _compare_gradients(
    result: Check, case: Case, implementation: Implementation, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]
) -> None:
    strict = implementation.role == "ours"
    rounded_once = implementation.name in _EXACT_LOGITS and case.dtype.itemsize == 2
    bound = (_ROUNDED if rounded_once else _RELATIVE[case.dtype]) if strict else _LOOSE
    for name, whole, exact in zip(("d_hidden", "d_weight"), got, want, strict=True):
        difference = (whole[_evenly(len(whole), case.device)].double() - exact).norm(dim=-1)
        sizes = exact.norm(dim=-1)
        result.add(f"{name} (relative)", difference.norm() / sizes.norm(), bound)
        if strict:  # the rows of targets hide the others: an entropy term or a tile that is lost shows in a row
            worst = (difference / (sizes + _TINY * sizes.max())).max()
            result.add(f"{name}, worst row (relative)", worst, _WORST[case.dtype])


def _linear(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """The values that it computes, then the gradients of those; nothing flows into an entropy that is not computed."""
    exact, computes = _derivatives(inputs), implementation.computes
    bound = _accuracy(case, exact, implementation)
    backward = implementation.op.endswith("_fwdbwd")
    values = list(outputs[:-2] if backward else outputs)
    into_logprob, into_entropy = inputs["grad_logprob"], inputs["grad_entropy"] if computes == EVERYTHING else None
    if computes == MEAN_LOGPROB:
        result.add("mean logprob (nats)", (values[0].double() - exact["exact_logprob"].mean()).abs(), bound)
        into_logprob = torch.full_like(into_logprob, -1.0 / len(into_logprob))  # the loss is minus the mean
    elif computes != GRADIENT:
        for name, value in zip(("logprob", "entropy") if computes == EVERYTHING else ("logprob",), values, strict=True):
            error = value.double() - exact[f"exact_{name}"]
            result.add(f"{name} (nats)", error.abs().max(), bound)
            # where every error has the same sign, a mean over tokens shows it: the drift that training sees
            result.add(f"{name}, mean (nats)", error.mean().abs(), bound)
    if backward:
        want = _linear_gradients(inputs, into_logprob, into_entropy)
        _compare_gradients(result, case, implementation, outputs[-2:], want)


def _linear_loss(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """A policy loss and its gradients. Clip-Cov draws at random: dropped is who has no gradient, though not clipped."""
    exact = _derivatives(inputs)
    logprob, advantages, mask = exact["exact_logprob"], inputs["advantages"].double(), inputs["mask"]
    bound, strict = _accuracy(case, exact, implementation), implementation.role == "ours"
    ratio = (logprob - inputs["old_logprob"].double()).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    alive, count = mask & (clipped <= plain), mask.sum()
    tokens = torch.maximum(plain, clipped)
    if implementation.op == "linear_clip_cov_loss":
        centred = advantages - advantages[mask].mean()
        covariance = (logprob - logprob[mask].mean()) * centred
        slack = 2 * bound * centred.abs() + 1e-5
        band = alive & (covariance > BAND[0] - slack) & (covariance < BAND[1] + slack)
        dropped = alive & (outputs[1] == 0).all(-1)
        sure = dropped & (logprob.exp() < 1 - _SURE)
        wanted = min(max(1, int(CLIP_COV_RATIO * int(count))), int(band.sum()))
        # a log-prob that is itself rounded to half precision carries some across the clip
        few = 0 if strict else _CARRIED * len(mask)
        result.add("count (tokens)", (wanted - dropped.sum()).clamp_min(0) + (sure.sum() - wanted).clamp_min(0), few)
        result.add("outside the band (tokens)", (sure & ~band).sum(), few)
        alive, tokens = alive & ~dropped, tokens * ~dropped
    scale = (tokens.abs() * mask).sum() / count  # a loss of advantages of both signs is next to nothing itself
    error = (outputs[0].double() - (tokens * mask).sum() / count).abs() / scale
    result.add("loss (of the mean size)", error, bound)
    _compare_gradients(result, case, implementation, outputs[-2:], _linear_gradients(inputs, plain * alive / count))


def _linear_roofline(result: Check, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    tokens = _evenly(len(inputs["hidden"]), case.device)
    want = inputs["hidden"][tokens].double() @ inputs["weight"].double().t()
    relative = (outputs[tokens].double() - want).norm() / want.norm()
    result.add("logits (relative)", relative, 4 * torch.finfo(case.dtype).eps)


_CHECKS: dict[str, Callable[..., Any]] = {
    "logprob_entropy": _statistics,
    "logprob_entropy_bwd": _gradient,
    "logprob_entropy_fwdbwd": _gradient,
    "token_stats": _token_stats,
    "logits_roofline": _logits_roofline,
    "token_covariance": _token_covariance,
    "clip_cov_mask": _clip_cov_mask,
    "kl_cov_mask": _kl_cov_mask,
    "tokens_roofline": _tokens_roofline,
    "policy_loss": _loss,
    "clip_cov_loss": _loss,
    "kl_cov_loss": _loss,
    "linear_logprob_entropy": _linear,
    "linear_logprob_entropy_fwdbwd": _linear,
    "linear_policy_loss": _linear_loss,
    "linear_clip_cov_loss": _linear_loss,
    "linear_roofline": _linear_roofline,
}
