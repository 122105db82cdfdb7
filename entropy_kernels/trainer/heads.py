"""How completion tokens get their statistics: from hidden states (``linear``), or from the model's logits (``logits``).

A head has ``outputs``, what the model gives at the positions that predict completion tokens, and the statistics of
these. The gradient's graph is cut between the two (:func:`entropy_kernels.trainer.ppo.backward`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._memory import peak_allocated
from entropy_kernels.losses import LOSSES

if TYPE_CHECKING:
    from entropy_kernels.trainer.policy import Policy

#: Largest mean difference between the two heads' log-probs that is rounding, nats. A model whose logits are made in a
#: way that `ek.hf` does not know is off by far more.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}


class Head(Protocol):
    """`target` (B, L) holds token ids, -100 where there is none."""

    def outputs(self, length: int, **inputs: Any) -> Tensor:
        """What the model gives at the positions that predict the last `length` tokens of its inputs: (B, L, ...)."""

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        """Log-prob and entropy, differentiable; the backward pass may overwrite `outputs`."""

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        """All four statistics."""

    def policy_loss(self, outputs: Tensor, target: Tensor, temperature: float, **options: Any) -> ek.PolicyLoss:
        """The loss of `options`, see :func:`loss_of_stats`; the backward pass may overwrite `outputs`."""


def loss_of_stats(stats: ek.LogprobEntropy, method: str, **options: Any) -> ek.PolicyLoss:
    """The loss named as in :func:`entropy_kernels.linear_policy_loss`, of statistics that are there already."""
    return LOSSES[method](stats.logprob, entropy=stats.entropy, **options)


class LinearHead:
    """Hidden states (B, L, H), and this library's ops in place of the model's head: logits exist within a budget."""

    def __init__(self, model: Any, memory_budget: int | None) -> None:
        self._model = model
        self._memory_budget = memory_budget

    def outputs(self, length: int, **inputs: Any) -> Tensor:
        parts = ek.hf.causal_lm_parts(self._model)
        hidden = parts.backbone(**inputs, use_cache=False)[0][:, -length - 1 : -1]
        return hidden if parts.scale == 1 else hidden * parts.scale

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        return self._call(ek.linear_logprob_entropy, outputs, target, temperature)

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        return self._call(ek.linear_token_stats, outputs, target, temperature)

    def policy_loss(self, outputs: Tensor, target: Tensor, temperature: float, **options: Any) -> ek.PolicyLoss:
        return self._call(ek.linear_policy_loss, outputs, target, temperature, **options)

    def _call(
        self, function: Callable[..., Any], outputs: Tensor, target: Tensor, temperature: float, **options: Any
    ) -> Any:
        parts = ek.hf.causal_lm_parts(self._model)
        return function(
            outputs, parts.weight, target, bias=parts.bias, temperature=temperature, softcap=parts.softcap,
            memory_budget=self._memory_budget, **options,
        )  # fmt: skip


class LogitsHead:
    """The model's own logits (B, L, V), raw and in its dtype."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def outputs(self, length: int, **inputs: Any) -> Tensor:
        # the last position predicts nothing: a view that skips it
        return self._model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        return ek.logprob_entropy(outputs, target, temperature=temperature, inplace_backward=True)

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        return ek.token_stats(outputs, target, temperature=temperature)

    def policy_loss(self, outputs: Tensor, target: Tensor, temperature: float, **options: Any) -> ek.PolicyLoss:
        return loss_of_stats(self.logprob_entropy(outputs, target, temperature), **options)


def make_head(name: str, model: Any, memory_budget: int | None) -> Head:
    """The head of a configuration's name."""
    return LinearHead(model, memory_budget) if name == "linear" else LogitsHead(model)


def compare_heads(
    policy: Policy, backward: Callable[[Policy], None], logprob: Callable[[Policy], Tensor]
) -> dict[str, float]:
    """Peak memory of a micro-batch with the head in use and with the other, and how far they are apart.

    Parameters
    ----------
    backward : callable
        Forward, loss and backward of one micro-batch under a policy's head, which is what is measured. The gradients
        that it leaves are removed.
    logprob : callable
        The log-probs of its valid tokens under a policy's head.

    Returns
    -------
    dict
        ``memory/linear`` and ``memory/logits`` in bytes, infinite for one that does not fit on the GPU, and
        ``head_gap``. Of a model without a linear head, under ``logits``, only its own.

    Raises
    ------
    ValueError
        The head in use is linear and its log-probs are not those of the model.
    """
    mine, other = policy.head_name, "logits" if policy.head_name == "linear" else "linear"
    row = {f"memory/{mine}": _peak(policy.with_head(mine), backward)}
    try:
        ek.hf.causal_lm_parts(policy.model)
    except TypeError:
        return row
    try:
        row[f"memory/{other}"] = _peak(policy.with_head(other), backward)
        gap = float((logprob(policy.with_head(mine)) - logprob(policy.with_head(other))).abs().mean())
    except torch.OutOfMemoryError:
        policy.model.zero_grad(set_to_none=True)
        return {**row, f"memory/{other}": math.inf}
    if mine == "linear" and not gap <= ROUNDING[policy.model.dtype]:
        raise ValueError(
            "head: expected, for linear, a model whose logits come from a linear head, with a scale and a softcap that "
            f"ek.hf knows, got one whose log-probs are {gap:.2g} nats off on average; take --head logits"
        )
    return {**row, "head_gap": gap}


def _peak(policy: Policy, backward: Callable[[Policy], None]) -> float:
    if policy.device.type == "cuda":
        backward(policy)  # the first call allocates workspaces of cuBLAS that stay
        policy.model.zero_grad(set_to_none=True)
    peak = peak_allocated(lambda: backward(policy), policy.device)
    policy.model.zero_grad(set_to_none=True)
    return float(peak)
