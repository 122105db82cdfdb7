"""A user's file: every public name, called as in a training step, with typed variables and typed returns.

tests/test_typed.py checks it under ``mypy --strict`` against the package as it is installed, and that no public name is
left out; tests/test_wheel.py runs it beside other versions of Python and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import entropy_kernels as ek

B, L, V, H = 4, 8, 50, 16


class Batch:
    """Random, as a rollout gives it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(B, L, V, generator=generator).requires_grad_()
        self.hidden = torch.randn(B, L, H, generator=generator).requires_grad_()
        self.weight = torch.randn(V, H, generator=generator).requires_grad_()
        self.actions = torch.randint(V, (B, L), generator=generator)
        self.old_logprob = -4 - torch.rand(B, L, generator=generator)
        self.advantages = torch.randn(B, 1, generator=generator)
        self.mask = torch.rand(B, L, generator=generator) > 0.2


def statistics(batch: Batch) -> Tensor:
    found: ek.LogprobEntropy = ek.logprob_entropy(batch.logits, batch.actions, temperature=0.8)
    logprob, entropy = found
    stats: ek.TokenStats = ek.token_stats(batch.logits, batch.actions, temperature=torch.tensor(0.8))
    chosen: Sequence[str] = ek.STATISTICS[:2]
    some = ek.token_stats(batch.logits, batch.actions, statistics=chosen)
    entropy_too: Tensor = some.entropy
    alone: Tensor = ek.entropy(batch.logits, softcap=30.0)
    change: Tensor = ek.predicted_entropy_change(stats.vocab_covariance, batch.advantages, step_size=0.1)
    return (logprob + entropy + entropy_too + alone + stats.collision + change).sum()


def from_hidden_states(batch: Batch) -> Tensor:
    plan: ek.LinearPlan = ek.linear_plan(batch.hidden, batch.weight, memory_budget=1 << 24)
    fits: bool = plan.peak_bytes <= 1 << 24
    logprob, entropy = ek.linear_logprob_entropy(batch.hidden, batch.weight, batch.actions, logits_dtype=torch.float32)
    stats: ek.TokenStats = ek.linear_token_stats(batch.hidden, batch.weight, batch.actions)
    result: ek.PolicyLoss = ek.linear_policy_loss(
        batch.hidden, batch.weight, batch.actions, batch.old_logprob, batch.advantages, batch.mask, method="ppo"
    )
    assert fits
    return (logprob + entropy + stats.entropy).mean() + result.loss


def selection(batch: Batch) -> int:
    covariance: Tensor = ek.token_covariance(batch.old_logprob, batch.advantages, batch.mask)
    dropped: Tensor = ek.clip_cov_mask(covariance, batch.mask, seed=0, ratio=0.1, low=-1.0, band="absolute")
    penalized: Tensor = ek.kl_cov_mask(covariance, batch.mask, ratio=torch.tensor(0.1))
    top: Tensor = ek.top_tokens(covariance, batch.mask, k=3)
    drawn: Tensor = ek.random_tokens(covariance, batch.mask, seed=torch.tensor(1), ratio=0.2)
    prefix: Tensor = ek.budget_tokens(covariance, batch.mask, share=0.3)
    moments: ek.TokenMoments = ek.token_moments(covariance, batch.mask, std=True)
    spread: float = moments.std.item()
    assert spread >= 0

    whole = ek.SelectionBatch()
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        whole.add(batch.old_logprob[rows], batch.advantages[rows], batch.mask[rows])
    seeds = ek.SeedCounter(seed=1)
    seed: Tensor = seeds()
    masks: list[Tensor] = whole.clip_cov(seed=seed, ratio=0.1, low=-1.0)
    masks += whole.kl_cov(ratio=0.1)
    counts = [int(mask.sum()) for mask in (dropped, penalized, top, drawn, prefix, *masks)]
    return sum(counts)


def losses(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logprob, entropy = ek.logprob_entropy(batch.logits, batch.actions)
    arguments = logprob, batch.old_logprob, batch.advantages, batch.mask
    loss, metrics = ek.policy_loss(*arguments, entropy=entropy, entropy_coef=0.01, surrogate="gspo")
    loss = loss + ek.clip_cov_loss(*arguments, preset="verl", seed=0, ratio=0.1).loss
    loss = loss + ek.kl_cov_loss(*arguments, preset="paper", ratio=0.1).loss
    modules: list[ek.PolicyLossModule | ek.ClipCovLoss | ek.KlCovLoss] = [
        ek.PolicyLossModule(clip_high=0.28), ek.ClipCovLoss(seed=1, ratio=0.1), ek.KlCovLoss(ratio=0.1)
    ]  # fmt: skip
    for module in modules:
        loss = loss + module(*arguments).loss
    loss = loss + ek.aggregate(logprob, batch.mask, loss_agg_mode="seq-mean-token-mean", batch_num_tokens=B * L)
    return loss, metrics


def surrogates() -> list[str]:
    table: dict[str, ek.Surrogate] = ek.surrogates()
    return [name for name, row in table.items() if row.level == "token"]


def control(batch: Batch) -> Tensor:
    table: dict[str, ek.Method] = ek.methods()
    needs: tuple[str, ...] = table["exact_cov"].needs
    assert needs
    logprob, entropy, _, vocab_covariance = ek.token_stats(batch.logits, batch.actions)
    tokens = ek.TokenBatch(
        logprob.detach(),
        batch.old_logprob,
        batch.advantages,
        batch.mask,
        entropy=entropy.detach(),
        vocab_covariance=vocab_covariance.detach(),
    )
    decided: ek.Control = ek.control("exact_cov", tokens, share=0.4)
    controller = ek.Controller("clip_cov", seed=1, ratio=0.1)
    again: ek.Control = controller.step(tokens)
    state: dict[str, Any] = controller.state_dict()
    controller.load_state_dict(state)
    reads: tuple[str, ...] = controller.needs
    does: str = controller.effect
    taken: dict[str, tuple[str, ...]] = ek.TargetEntropy.methods()
    assert not reads and does == "dropped" and "ratio" in taken["exact_cov"]

    target = ek.TargetEntropy(0.4, vocab_size=V)
    held: ek.Control = target.step(tokens, lr=1e-3, updates=2)
    target.observe(entropy.detach())
    whole = ek.SelectionBatch()
    detached = {"entropy": entropy.detach(), "vocab_covariance": vocab_covariance.detach()}
    whole.add(logprob.detach(), batch.advantages, batch.mask, **detached)
    parts: list[ek.Control] = target.step(whole, lr=1e-3)
    total = torch.zeros(())
    for each in (decided, again, held, *parts):
        total = total + ek.policy_loss(logprob, batch.old_logprob, batch.advantages, batch.mask, control=each).loss
    return total


def available() -> dict[str, str]:
    return ek.backends()["token_stats"]


def next_tokens(input_ids: Tensor) -> Tensor:
    return ek.hf.next_tokens(input_ids, attention_mask=torch.ones_like(input_ids))


def hugging_face(model: nn.Module, input_ids: Tensor) -> Tensor:
    parts: ek.hf.CausalLMParts = ek.hf.causal_lm_parts(model)
    weight: Tensor | Callable[..., Tensor] = parts.weight
    scored: ek.LogprobEntropy = ek.hf.causal_lm_logprob_entropy(model, input_ids, temperature=0.8)
    assert callable(weight) or weight.shape[0] > 0
    return scored.logprob


def law(entropy: list[float], performance: list[float]) -> float:
    """Needs the extra ``analysis``."""
    fitted: ek.EntropyLaw = ek.fit_entropy_law(entropy, performance, fit_fraction=0.5, standard_errors="hac")
    low, high = fitted.ceiling_interval
    predicted: float = fitted.predict(0.5)
    return fitted.a + fitted.b + predicted + low + high


def main() -> None:
    """What torch and numpy are enough for."""
    batch = Batch()
    total = statistics(batch) + from_hidden_states(batch) + losses(batch)[0] + control(batch)
    total.backward()  # type: ignore[no-untyped-call]
    for leaf in (batch.logits, batch.hidden, batch.weight):
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert selection(batch) > 0 and surrogates() and available()
    assert next_tokens(torch.arange(6).view(2, 3)).tolist() == [[1, 2, -100], [4, 5, -100]]
    print("every public function runs")


if __name__ == "__main__":
    main()
