"""Batches for linear_policy_loss, and its comparison with the composed path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.ops import linear_policy_loss as op
from entropy_kernels.ops import linear_tiles

B, L, H, V = 6, 30, 12, 803
LOSSES = {"ppo": ek.policy_loss, "clip_cov": ek.clip_cov_loss, "kl_cov": ek.kl_cov_loss}
BAND: dict[str, Any] = {"seed": 3, "ratio": 0.1, "low": 0.01, "high": 50.0}
SELECT: dict[str, dict[str, Any]] = {"ppo": {}, "clip_cov": BAND, "kl_cov": {"ratio": 0.1}}
# one part, a few, many
BUDGETS = {torch.float64: (1 << 30, 600_000, 240_000), torch.float32: (1 << 30, 300_000, 120_000)}
BUDGETS |= {torch.bfloat16: (1 << 30, 500_000, 180_000), torch.float16: (1 << 30, 500_000, 180_000)}
ONE, FEW, MANY = BUDGETS[torch.float64]
Gradients = list[Tensor | None]  # of hidden, weight and bias


@dataclass
class Case:
    """A batch (B, L), and how its loss is computed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor
    method: str
    options: dict[str, Any]
    head: dict[str, Any] = field(default_factory=dict)

    def changed(self, names: str, change: Callable[[Tensor], Tensor]) -> Case:
        """With ``change`` of the tensors ``names``."""
        tensors = {name: getattr(self, name) for name in names.split()}
        return replace(self, **{name: None if x is None else change(x) for name, x in tensors.items()})

    def to(self, dtype: torch.dtype, rest: torch.dtype | None = None) -> Case:
        """Parameters and hidden states of ``dtype``, old log-probs and advantages of ``rest``."""
        case = self.changed("hidden weight bias", lambda x: x.to(dtype))
        return case if rest is None else case.changed("old_logprob advantages", lambda x: x.to(rest))

    def on(self, device: str) -> Case:
        return self.changed("hidden weight bias target old_logprob advantages mask", lambda x: x.to(device))

    def part(self, rows: slice) -> Case:
        return self.changed("hidden target old_logprob advantages mask", lambda x: x[rows])

    def leaves(self, names: str = "hwb") -> list[Any]:
        tensors = zip("hwb", (self.hidden, self.weight, self.bias), strict=True)
        return [None if x is None else x.detach().clone().requires_grad_(name in names) for name, x in tensors]

    @property
    def logprob(self) -> Tensor:
        return ek.linear_logprob_entropy(self.hidden, self.weight, self.target, self.bias, **self.head).logprob

    def loss(self, hidden: Any, weight: Any, bias: Any = None, **kwargs: Any) -> ek.PolicyLoss:
        """linear_policy_loss, of this batch; ``kwargs`` in the place of its options."""
        options = {"method": self.method, **self.head, **self.options, **kwargs}
        tokens = self.target, self.old_logprob, self.advantages, self.mask
        return ek.linear_policy_loss(hidden, weight, *tokens, bias, **options)


def make(method: str, head: dict[str, Any] | None = None, **options: Any) -> Case:
    """fp64; padding at the end of rows, an empty row; log-ratios of 0.2, so that PPO clips some tokens."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, L, H, generator=g, dtype=torch.float64)
    weight, bias = 0.8 * torch.randn(V, H, generator=g).double(), torch.randn(V, generator=g).double()
    target = torch.randint(V, (B, L), generator=g)
    mask = torch.arange(L) < torch.tensor([30, 7, 0, 29, 1, 30])[:, None]
    noise = 0.2 * torch.randn(B, L, generator=g)
    advantages = torch.randn(B, 1, generator=g, dtype=torch.float64).expand(B, L).clone()
    case = Case(hidden, weight, bias, target, noise, advantages, mask, method, options, head or {})
    case.old_logprob = case.logprob + noise
    return case


def gradients(leaves: list[Any]) -> Gradients:
    return [None if x is None else x.grad for x in leaves]


def composed(case: Case, names: str = "hwb", upstream: Tensor | None = None) -> tuple[ek.PolicyLoss, Gradients]:
    """Logits of all tokens at once, our statistics, our loss; ``upstream``: the factors of a loss for each token."""
    hidden, weight, bias = leaves = case.leaves(names)
    logprob, entropy = ek.linear_logprob_entropy(hidden, weight, case.target, bias, **case.head)
    tokens = case.old_logprob, case.advantages, case.mask
    loss = LOSSES[case.method](logprob, *tokens, entropy=entropy, **case.options)
    loss.loss.backward(upstream)
    return loss, gradients(leaves)


def fused(
    case: Case, budget: int, names: str = "hwb", upstream: Tensor | None = None, **kwargs: Any
) -> tuple[ek.PolicyLoss, Gradients]:
    leaves = case.leaves(names)
    loss = case.loss(*leaves, memory_budget=budget, **kwargs)
    loss.loss.backward(upstream)
    return loss, gradients(leaves)


def parts(case: Case, budget: int) -> int:
    """Of the tokens that count; on a CPU the others are left out."""
    hidden, weight, bias = case.leaves()
    return ek.linear_plan(hidden[case.mask], weight, bias, memory_budget=budget, policy_loss=True).row_chunks


def same(
    found: tuple[ek.PolicyLoss, Gradients], right: tuple[ek.PolicyLoss, Gradients], rtol: float = 1e-12,
    scale: float | None = None, equal_nan: bool = False,
) -> ek.PolicyLoss:  # fmt: skip
    """Loss, metrics and gradients."""
    torch.testing.assert_close(found[0], right[0], rtol=rtol, atol=rtol, equal_nan=equal_nan)
    assert not any(value.requires_grad for value in found[0].metrics.values())
    same_gradients(found[1], right[1], rtol, scale)
    return found[0]


def same_gradients(found: Gradients, right: Gradients, rtol: float = 1e-12, scale: float | None = None) -> None:
    """Of hidden, weight and bias; errors are relative to a gradient's size, or ``scale``."""
    for i, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None and ours.dtype == theirs.dtype
        size = theirs.double().norm().item() if scale is None else scale
        assert (ours.double() - theirs.double()).norm() <= rtol * size + 1e-300, f"gradient {i}"


def assert_same(case: Case, budget: int, **how: Any) -> ek.PolicyLoss:
    """As the composed path."""
    return same(fused(case, budget), composed(case), **how)


def spiked(case: Case, *where: int, size: float = 30.0) -> Case:
    """Tokens at flat positions ``where`` get by far the largest covariances."""
    logprob = case.logprob
    lowest = (logprob - logprob[case.mask].mean()).view(-1)
    for i, n in enumerate(where):
        case.advantages.view(-1)[n] = size * (1 + 0.1 * i) * lowest[n].sign()
    return case


def counted_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on: multiplications of each matrix product."""
    found: list[int] = []

    def counted(real: Callable[..., None], out: Tensor, a: Tensor, b: Tensor, *bias: Any) -> None:
        found.append(a.shape[0] * a.shape[1] * b.shape[1])
        real(out, a, b, *bias)

    for name in ("multiply", "multiply_add"):
        for module in (op, linear_tiles):
            monkeypatch.setattr(module, name, functools.partial(counted, getattr(module, name)))
    return found


VALID = [n for n in range(B * L) if n % L < (30, 7, 0, 29, 1, 30)[n // L]]  # flat positions that count
FIRST, LAST = VALID[0], VALID[-1]


def clipped_and_selected() -> Case:
    """KL-Cov on top of a PPO clip: the penalised token's coefficient was 0."""
    case = spiked(make("kl_cov", k=2, clip_low=0.2, clip_high=0.2, entropy_coef=0.01), FIRST, VALID[40])
    logprob = case.logprob.view(-1)
    for n in (FIRST, VALID[40]):  # beyond the clip on the side where it holds
        case.old_logprob.view(-1)[n] = logprob[n] - 0.5 * case.advantages.view(-1)[n].sign()
    return case


def far_off(method: str, sign: float, size: float, **options: Any) -> Case:
    """A token near the beginning that is the selected one, with a log-ratio of ± ``size``."""
    case = spiked(make(method, **options), VALID[2])
    case.old_logprob.view(-1)[VALID[2]] = case.logprob.view(-1)[VALID[2]] - sign * size
    return case


DROP_ALL: dict[str, Any] = {"seed": 5, "low": -1e9, "high": 1e9}
SCENARIOS: dict[str, Callable[[], Case]] = {
    "ppo": lambda: make("ppo"),
    "ppo, advantages of 1e5": lambda: make("ppo").changed("advantages", lambda x: 1e5 * x),
    "ppo, all terms": lambda: make("ppo", entropy_coef=0.02, dual_clip=3.0, clip_high=0.28),
    "clip_cov, some": lambda: make("clip_cov", **BAND),
    "clip_cov, entropy bonus": lambda: make("clip_cov", **BAND, entropy_coef=0.02),
    "clip_cov, paper": lambda: make("clip_cov", preset="paper", **BAND),
    "clip_cov, none": lambda: make("clip_cov", seed=3, low=1e6, high=1e7),
    "clip_cov, all": lambda: make("clip_cov", preset="paper", ratio=1.0, entropy_coef=0.02, **DROP_ALL),
    "clip_cov, quantile band": lambda: make("clip_cov", seed=3, ratio=0.1, low=0.5, high=1.0, band="quantile"),
    "kl_cov, some": lambda: make("kl_cov", ratio=0.1),
    "kl_cov, first": lambda: spiked(make("kl_cov", k=1), FIRST),
    "kl_cov, last": lambda: spiked(make("kl_cov", k=1), LAST),
    "kl_cov, first and last": lambda: spiked(make("kl_cov", k=2, entropy_coef=0.02), FIRST, LAST),
    "kl_cov, none": lambda: make("kl_cov", k=0, preset="paper"),
    "kl_cov, all": lambda: make("kl_cov", ratio=1.0, entropy_coef=0.02),
    "kl_cov, was 0": clipped_and_selected,
    "kl_cov, coefficient": lambda: make("kl_cov", ratio=0.1, kl_coef=torch.tensor(2.5), penalty_estimator="k3+"),
    "clip_cov, log-ratio +100": lambda: far_off("clip_cov", 1, 100, preset="paper", seed=1, k=1, low=20, high=1e9),
    "clip_cov, log-ratio -100": lambda: far_off("clip_cov", -1, 100, preset="paper", seed=1, k=1, low=20, high=1e9),
    "kl_cov, log-ratio -100": lambda: far_off("kl_cov", -1, 100, k=1, entropy_coef=0.02),
    "softcap, temperature": lambda: make(
        "kl_cov", ratio=0.1, entropy_coef=0.02,
        head={"softcap": 5.0, "temperature": torch.linspace(0.5, 2, B * L, dtype=torch.float64).view(B, L)},
    ),
    "sequences": lambda: make("kl_cov", surrogate="gspo", ratio=0.1, entropy_coef=0.02),
    "padded vocabulary": lambda: make("clip_cov", **BAND, head={"vocab_size": V}),
}  # fmt: skip
