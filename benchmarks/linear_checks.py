"""The gate of the ops on hidden states: values and gradients against float64, on some tokens and some of the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Implementation
from benchmarks.shapes import Case, Inputs

CHECKED = 16  # tokens, and rows of the head
_ROWS = 64  # tokens whose float64 logits exist at once
# Relative error of a gradient, in norm: in half precision that of the rounded logits, which is e^(2⁻⁹·|z|) - 1
_STRICT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_LOOSE = 0.5


def _evenly(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(CHECKED, count), dtype=torch.float64, device=device).round().long()


def reference(inputs: Inputs) -> Inputs:
    """Log-prob and entropy of all tokens, gradients of :func:`_evenly` chosen tokens and rows of the head; float64.

    Kept among the inputs, for the next implementation.
    """
    if "exact_logprob" in inputs:
        return inputs
    hidden, weight, target = inputs["hidden"], inputs["weight"].double(), inputs["target"]
    tokens, entries = _evenly(len(hidden), hidden.device), _evenly(len(weight), hidden.device)
    logprobs, entropies, d_hidden = [], [], []
    d_weight = weight.new_zeros(len(entries), weight.shape[1])
    largest = weight.new_zeros(())
    for begin in range(0, len(hidden), _ROWS):
        part = slice(begin, begin + _ROWS)
        h = hidden[part].double()
        logp = h @ weight.t()
        largest = torch.maximum(largest, logp.abs().max())
        logp = logp.log_softmax(-1)  # (R, V)
        p = logp.exp()
        label = target[part, None]
        logprobs.append(logp.gather(-1, label)[:, 0])
        entropy = -(p * logp).sum(-1)
        entropies.append(entropy)
        g_lp, g_h = (inputs[name][part].double()[:, None] for name in ("grad_logprob", "grad_entropy"))
        dz = -g_lp * p - g_h * p * (logp + entropy[:, None])
        dz.scatter_add_(-1, label, g_lp)
        d_weight += dz[:, entries].t() @ h
        chosen = tokens[(tokens >= begin) & (tokens < begin + len(h))] - begin
        d_hidden.append(dz[chosen] @ weight)
    inputs["exact_logprob"], inputs["exact_entropy"] = torch.cat(logprobs), torch.cat(entropies)
    inputs["exact_d_hidden"], inputs["exact_d_weight"] = torch.cat(d_hidden), d_weight
    inputs["exact_largest"] = largest
    return inputs


def check_linear(result: Any, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    exact = reference(inputs)
    strict = implementation.role == "ours"
    bound = 2e-5 + 2 * torch.finfo(case.dtype).eps * float(exact["exact_largest"]) if strict else _LOOSE
    for name, value in zip(("logprob", "entropy"), outputs, strict=False):
        error = (value.double() - exact[f"exact_{name}"]).abs()
        result.add(f"{name} (nats)", error.max(), bound)
        # where every error has the same sign, a mean over tokens shows it: the drift that training sees
        result.add(f"{name}, mean (nats)", (value.double() - exact[f"exact_{name}"]).mean().abs(), bound)
    if len(outputs) == 2:
        return
    tokens, entries = (_evenly(len(inputs[name]), case.device) for name in ("hidden", "weight"))
    for name, got in (("d_hidden", outputs[2][tokens]), ("d_weight", outputs[3][entries])):
        want = exact[f"exact_{name}"]
        relative = (got.double() - want).norm() / want.norm()
        result.add(f"{name} (relative)", relative, _STRICT[case.dtype] if strict else _LOOSE)


def check_floor(result: Any, case: Case, inputs: Inputs, implementation: Implementation, outputs: Any) -> None:
    tokens = _evenly(len(inputs["hidden"]), case.device)
    want = inputs["hidden"][tokens].double() @ inputs["weight"].double().t()
    relative = (outputs[tokens].double() - want).norm() / want.norm()
    result.add("logits (relative)", relative, 4 * torch.finfo(case.dtype).eps)
