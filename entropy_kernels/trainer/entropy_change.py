"""Measured against predicted entropy change, in the two ways that need more than the log of a step.

1. :func:`logits_as_parameters`: the theory's own setting. Each row of logits is its own parameter vector.
2. :class:`FirstOrder`: through the network, from the gradient of the entropy in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.trainer.config import TrainerConfig
from entropy_kernels.trainer.policy import Encoded, Policy
from entropy_kernels.trainer.rollout import Rollout, row_slices


@torch.no_grad()
def logits_as_parameters(
    policy: Policy, rollout: Rollout, *, temperature: float, step_size: float = 1e-3, rows: int = 128
) -> dict[str, list[float]]:
    """Take the policy-gradient step in the logits themselves and compare the entropy change with its prediction.

    The logits of the rollout's first `rows` completions become free parameters in float64; each moves by
    (step_size * A / T)(e_y - p). The entropies before and after come from ``token_stats``, the prediction
    -(step_size * A / T^2) C from its vocabulary covariance (Theorem 1 of arXiv 2505.22617 for the sampled step).

    Returns
    -------
    dict
        ``predicted`` and ``measured``: nats, one number per token with an advantage other than 0.
    """
    part = Encoded(rollout.prompts.ids[:rows], rollout.prompts.mask[:rows])
    ids, mask = rollout.ids[:rows], rollout.mask[:rows]
    used = mask & (rollout.advantages[:rows] != 0)
    logits = policy.with_head("logits").outputs(part, ids, mask)[used].double().cpu()  # (N, V)
    target, advantage = ids[used].cpu(), rollout.advantages[:rows][used].double().cpu()
    before = ek.token_stats(logits, target, temperature=temperature)
    step = -torch.softmax(logits / temperature, dim=-1)
    step[torch.arange(len(target)), target] += 1.0
    moved = logits + (step_size / temperature) * advantage[:, None] * step
    measured = ek.token_stats(moved, target, temperature=temperature).entropy - before.entropy
    predicted = ek.predicted_entropy_change(
        before.vocab_covariance, advantage, step_size=step_size, temperature=temperature
    )
    return {"predicted": predicted.tolist(), "measured": measured.tolist()}


class FirstOrder:
    """The network's own first-order entropy change: the gradient of H in the weights, times their change since then.

    Made before the updates of a step; asked after the first of them and after all.
    """

    def __init__(self, policy: Policy, rollout: Rollout, config: TrainerConfig) -> None:
        self._parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self._before = [p.detach().clone() for p in self._parameters]
        tokens = rollout.tokens
        gradient = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        for rows in row_slices(config, rollout.ids.shape[0]):
            part = Encoded(rollout.prompts.ids[rows], rollout.prompts.mask[rows])
            ids, mask = rollout.ids[rows], rollout.mask[rows]
            outputs = policy.outputs(part, ids, mask)
            entropy = policy.logprob_entropy(outputs, ids, mask, temperature=config.temperature).entropy
            for total, term in zip(
                gradient, torch.autograd.grad(entropy.sum() / tokens, self._parameters), strict=True
            ):
                total += term
        self._gradient: list[Tensor] = gradient
        float(gradient[0].sum())  # the host waits: what was measured ends here

    @contextmanager
    def fraction(self, share: float) -> Iterator[None]:
        """Within: the weights stand at `share` of the way they have gone since then; afterwards where they were."""
        now = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for p, before in zip(self._parameters, self._before, strict=True):
                p.copy_(torch.lerp(before, p, share))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self._parameters, now, strict=True):
                    p.copy_(value)

    @torch.no_grad()
    def change(self) -> float:
        """∇H·Δθ in nats, summed in float64."""
        return sum(
            float((gradient.double() * (now.double() - before.double())).sum())
            for gradient, now, before in zip(self._gradient, self._parameters, self._before, strict=True)
        )
