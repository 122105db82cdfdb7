"""The gate of the ops on hidden states: values and gradients against float64, on some tokens and some of the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import BAND, CLIP_COV_RATIO, EVERYTHING, GRADIENT, MEAN_LOGPROB, Implementation
from benchmarks.shapes import Case, Inputs

CHECKED = 16  # tokens, and rows of the head
_ROWS = 64  # tokens whose float64 logits exist at once
# Relative error of a gradient, in norm: in half precision that of the rounded logits, which is e^(2⁻⁹·|z|) - 1
_STRICT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# The same of the worst row, in which one probability may be everything
_WORST = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.4}
_TINY = 1e-3  # of the largest row: what is smaller is judged with that as its size
_ROUNDED = 1e-2  # and where the logits are fp32: only the gradient is rounded
_LOOSE = 0.5
_CARRIED = 0.02
_EXACT_LOGITS = ("ours-fp32-logits", "ours-tiles")
_SURE = 1e-2  # a token whose 1 - p is smaller may have a gradient that rounds to zero


def _evenly(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(CHECKED, count), dtype=torch.float64, device=device).round().long()


def reference(inputs: Inputs) -> Inputs:
    """Log-prob and entropy of all tokens, and what :func:`gradients` needs of their derivatives, in float64.

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
        logp = hidden[part].double() @ weight.t()
        largest = torch.maximum(largest, logp.abs().max())
        logp = logp.log_softmax(-1)  # (R, V)
        p, label = logp.exp(), target[part, None]
        entropy = -(p * logp).sum(-1)
        values = {"logprob": logp.gather(-1, label)[:, 0], "entropy": entropy}
        # derivatives by the logits, of log-prob and of entropy
        by_logits = {"logprob": (-p).scatter_add_(-1, label, torch.ones_like(p[:, :1]))}
        by_logits["entropy"] = -p * (logp + entropy[:, None])
        chosen = tokens[(tokens >= begin) & (tokens < begin + len(p))] - begin
        for name, value in values.items():
            found.setdefault(f"exact_{name}", []).append(value)
            found.setdefault(f"exact_{name}_by_entries", []).append(by_logits[name][:, entries])  # (R, 16)
            found.setdefault(f"exact_{name}_by_hidden", []).append(by_logits[name][chosen] @ weight)  # (≤ 16, H)
    inputs.update({name: torch.cat(parts) for name, parts in found.items()}, exact_largest=largest)
    return inputs


def gradients(inputs: Inputs, into_logprob: Tensor, into_entropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of hidden, at the chosen tokens, and of the head, at the chosen entries, for what flows into each token."""
    exact, tokens = reference(inputs), _evenly(len(inputs["hidden"]), inputs["hidden"].device)
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
    result: Any, case: Case, implementation: Implementation, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]
) -> None:
    strict = implementation.role == "ours"
    rounded_once = implementation.name in _EXACT_LOGITS and case.dtype.itemsize == 2
    bound = (_ROUNDED if rounded_once else _STRICT[case.dtype]) if strict else _LOOSE
    for name, whole, exact in zip(("d_hidden", "d_weight"), got, want, strict=True):
        difference = (whole[_evenly(len(whole), case.device)].double() - exact).norm(dim=-1)
        sizes = exact.norm(dim=-1)
        result.add(f"{name} (relative)", difference.norm() / sizes.norm(), bound)
        if strict:  # the rows of targets hide the others: an entropy term or a tile that is lost shows in a row
            worst = (difference / (sizes + _TINY * sizes.max())).max()
            result.add(f"{name}, worst row (relative)", worst, _WORST[case.dtype])


def check_linear(result: Any, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """The values that it computes, then the gradients of those; nothing flows into an entropy that is not computed."""
    exact, computes = reference(inputs), implementation.computes
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
        want = gradients(inputs, into_logprob, into_entropy)
        _compare_gradients(result, case, implementation, outputs[-2:], want)


def check_loss(result: Any, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    """A policy loss and its gradients. Clip-Cov draws at random: dropped is who has no gradient, though not clipped."""
    exact = reference(inputs)
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
    _compare_gradients(result, case, implementation, outputs[-2:], gradients(inputs, plain * alive / count))


def check_floor(result: Any, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    tokens = _evenly(len(inputs["hidden"]), case.device)
    want = inputs["hidden"][tokens].double() @ inputs["weight"].double().t()
    relative = (outputs[tokens].double() - want).norm() / want.norm()
    result.add("logits (relative)", relative, 4 * torch.finfo(case.dtype).eps)
