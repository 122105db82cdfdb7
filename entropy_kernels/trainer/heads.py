"""How completion tokens get their statistics: from hidden states (``linear``), from the model's logits (``logits``), or
from these without this library's kernels (``torch``).

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
from entropy_kernels.trainer.config import HEADS

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
            outputs, parts.weight, target, bias=parts.bias, vocab_size=parts.vocab_size, temperature=temperature,
            softcap=parts.softcap, memory_budget=self._memory_budget, **options,
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


class TorchHead(LogitsHead):
    """The model's logits, and torch's own operations on them: what a trainer without this library does."""

    def logprob_entropy(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.LogprobEntropy:
        return ek.LogprobEntropy(*self._first(self._logp(outputs, temperature), target))

    def token_stats(self, outputs: Tensor, target: Tensor, temperature: float) -> ek.TokenStats:
        logp = self._logp(outputs, temperature)
        logprob, entropy = self._first(logp, target)
        p, ignored = logp.exp(), target < 0
        collision = (p * p).sum(-1)
        covariance = logprob.exp() * (logprob + entropy) - ((p * p * logp).sum(-1) + entropy * collision)
        return ek.TokenStats(logprob, entropy, collision.masked_fill(ignored, 0), covariance.masked_fill(ignored, 0))

    @staticmethod
    def _logp(outputs: Tensor, temperature: float) -> Tensor:
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return torch.log_softmax(wide / temperature, dim=-1)  # (B, L, V)

    @staticmethod
    def _first(logp: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ignored = target < 0
        logprob = logp.gather(-1, target.clamp_min(0)[..., None])[..., 0]
        return logprob.masked_fill(ignored, 0), (-(logp.exp() * logp).sum(-1)).masked_fill(ignored, 0)


def make_head(name: str, model: Any, memory_budget: int | None) -> Head:
    """The head of a configuration's name."""
    if name == "linear":
        return LinearHead(model, memory_budget)
    return LogitsHead(model) if name == "logits" else TorchHead(model)


def compare_heads(
    policy: Policy, backward: Callable[[Policy], None], logprob: Callable[[Policy], Tensor]
) -> dict[str, float]:
    """Peak memory of a micro-batch with each head, and how far the linear one is from the logits.

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
        ``memory/HEAD`` in bytes, infinite for one that does not fit on the GPU, and ``head_gap``. Of a model without a
        linear head, under another, without the linear one.

    Raises
    ------
    ValueError
        The head in use is linear and its log-probs are not those of the model.
    """
    mine = policy.head_name
    row = {f"memory/{mine}": _peak(policy.with_head(mine), backward)}
    linear = True
    try:
        ek.hf.causal_lm_parts(policy.model)
    except TypeError:
        linear = False
    for head in HEADS:
        if head == mine or (head == "linear" and not linear):
            continue
        try:
            row[f"memory/{head}"] = _peak(policy.with_head(head), backward)
        except torch.OutOfMemoryError:
            policy.model.zero_grad(set_to_none=True)
            row[f"memory/{head}"] = math.inf
    if not linear or math.isinf(max(row["memory/linear"], row["memory/logits"])):
        return row
    gap = float((logprob(policy.with_head("linear")) - logprob(policy.with_head("logits"))).abs().mean())
    if mine == "linear" and not gap <= ROUNDING[torch.bfloat16 if policy.mixed else policy.model.dtype]:
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
