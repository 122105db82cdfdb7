"""Every public function that takes tensors, as a table: its arguments, from one small batch, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import entropy_kernels as ek
from entropy_kernels._rows import STATISTICS

B, L, H, V = 3, 5, 8, 400


def tensors() -> dict[str, Tensor]:
    """One batch; an argument has the same name in every function. The same numbers at every call."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    logprob = -torch.rand(B, L, generator=g) - 0.5
    mask = torch.rand(B, L, generator=g) < 0.8
    mask[:, 0] = True
    return {
        "logits": normal(B, L, V), "hidden": normal(B, L, H), "weight": normal(V, H), "bias": normal(V),
        "target": torch.randint(0, V, (B, L), generator=g), "temperature": 0.5 + torch.rand(B, 1, generator=g),
        "logprob": logprob, "old_logprob": logprob + 0.2 * normal(B, L), "ref_logprob": logprob + 0.2 * normal(B, L),
        "entropy": torch.rand(B, L, generator=g), "advantages": normal(B, L), "mask": mask,
        "covariance_advantages": normal(B, 1), "token_weight": torch.rand(B, L, generator=g),
        "entropy_coef": torch.tensor(0.1), "ref_kl_coef": torch.tensor(0.2), "kl_coef": torch.tensor(0.7),
        "clip_low": torch.tensor(0.1), "clip_high": torch.tensor(0.3), "dual_clip": torch.tensor(3.0),
        "batch_num_tokens": torch.tensor(21), "global_batch_size": torch.tensor(4),
        "loss_scale_factor": torch.tensor(6.0), "cu_seqlens": torch.tensor([0, 4, 9, 15]),
        "seed": torch.tensor(5), "ratio": torch.tensor(0.3), "low": torch.tensor(-9.0), "high": torch.tensor(9.0),
        "k": torch.tensor(4), "share": torch.tensor(0.4), "token_index": torch.randperm(B * L, generator=g).view(B, L),
        "exclude": torch.rand(B, L, generator=g) < 0.2, "dropped": torch.rand(B, L, generator=g) < 0.3,
        "penalized": torch.rand(B, L, generator=g) < 0.3, "score": normal(B, L), "covariance": normal(B, L),
        "term": normal(B, L), "vocab_covariance": normal(B, L), "step_size": torch.tensor(0.01),
        "input_ids": torch.randint(0, V, (B, L), generator=g), "attention_mask": torch.ones(B, L, dtype=torch.int64),
        "lr": torch.tensor(0.02), "position_ids": torch.arange(L).expand(B, L).contiguous(),
        "old_entropy": torch.rand(B, L, generator=g), "collision": torch.rand(B, L, generator=g),
        "coefficient": torch.rand(B, L, generator=g), "values": normal(B, L),
    }  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """``call(**tensors)`` gives (outputs that a gradient may flow to, the others)."""

    call: Callable[..., tuple[list[Tensor], list[Tensor]]]
    arguments: tuple[str, ...]
    differentiable: tuple[str, ...] = ()  # of the arguments


def statistics(function: Callable, **options: Any) -> Callable:
    def call(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        out = function(**given, **options)._asdict()
        rest = [out.pop(x.name) for x in STATISTICS if x.name in out and not x.differentiable]
        return [*out.values()], rest

    return call


class Tiny(nn.Module):
    """A causal language model in the shape that ``ek.hf`` looks for."""

    class Config:
        model_type, vocab_size, is_encoder_decoder = "tiny", V, False

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, H)

        def forward(self, input_ids: Tensor, attention_mask: Any, position_ids: Any, use_cache: bool) -> tuple[Tensor]:
            hidden = self.embed(input_ids)
            if position_ids is not None:
                hidden = hidden * (1 + position_ids[..., None])
            return (hidden if attention_mask is None else hidden * attention_mask[..., None],)

    def __init__(self, embedding: Tensor, head: Tensor) -> None:
        super().__init__()
        self.config, self.base_model, self.lm_head = self.Config(), self.Backbone(), nn.Linear(H, V, bias=False)
        del self.base_model.embed.weight, self.lm_head.weight  # the caller's tensors, parameters or not
        self.base_model.embed.weight, self.lm_head.weight = embedding, head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def of_a_model(hidden: Tensor, weight: Tensor, **given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    model = Tiny(torch.cat([hidden.reshape(-1, H)] * 27)[:V], weight)
    return [*ek.hf.causal_lm_logprob_entropy(model, **given)], []


class Module(nn.Module):
    out_features = V

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.given = [weight, bias]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.given)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, *self.given)


def through(function: Callable, kind: str) -> Callable:
    """``function`` with a head that is a module or a function in the place of its weight and bias."""

    def call(weight: Tensor, bias: Tensor, **given: Any) -> Any:
        if kind == "module":
            return function(weight=Module(weight, bias), **given)

        def part(hidden: Tensor, start: int, stop: int) -> Tensor:
            return nn.functional.linear(hidden, weight[start:stop], bias[start:stop])

        part.parameters = [weight, bias]  # type: ignore[attr-defined]
        return function(weight=part, vocab_size=V, **given)

    return call


def loss(function: Callable, **options: Any) -> Callable:
    def call(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        out = function(**given, **options)
        return [out.loss], [*out.metrics.values()]

    return call


def plain(function: Callable, **options: Any) -> Callable:
    def call(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [], [function(**given, **options)]

    return call


def batched(exclude: Tensor, **rest: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    batch = ek.SelectionBatch()
    batch.add(*(rest.pop(name) for name in ("logprob", "advantages", "mask", "token_index")), exclude=exclude)
    kl = {name: value for name, value in rest.items() if name == "ratio"}
    return [], [*batch.covariance(), *batch.clip_cov(**rest), *batch.kl_cov(**kl)]


def controlled(ratio: Tensor, **given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    decided = ek.control("exact_cov", ek.TokenBatch(**given), ratio=ratio, effect="token_weight")
    return [], [decided.token_weight, *decided.metrics.values()]


def drawn(seed: Tensor, **given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    decided = ek.control("clip_cov", ek.TokenBatch(**given), seed=seed, low=-9.0, high=9.0, ratio=0.5)
    return [], [decided.dropped, *decided.metrics.values()]


def under_control(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    batch = ek.TokenBatch(**{name: given[name] for name in ("logprob", "old_logprob", "advantages", "mask", "entropy")})
    out = ek.policy_loss(**given, control=ek.control("top_entropy", batch, rho=0.5))
    return [out.loss], [*out.metrics.values()]


def stepped(**given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    controller = ek.Controller("adaptive_entropy", target=2.0, coef=0.1)
    decided = [controller.step(ek.TokenBatch(**given)) for _ in range(2)]
    return [], [x.entropy_coef for x in decided]


def held(lr: Tensor, **given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    controller, found = ek.TargetEntropy(0.1), []
    for _ in range(2):
        decided = controller.step(ek.TokenBatch(**given), lr=lr)
        controller.observe(given["entropy"] * 0.9)
        found += [decided.dropped, *decided.metrics.values()]
    return [], [*found, *controller.memory.values()]


_HEAD = ("hidden", "weight", "bias")
_ROWS = ("target", "temperature")
_LOSS = ("old_logprob", "advantages", "mask", "ref_logprob", "token_weight", "covariance_advantages", "token_index")
_COEFFICIENTS = ("entropy_coef", "ref_kl_coef")
_TRACKED = ("logprob", "entropy", *_COEFFICIENTS)
_PLAIN_LOSS = tuple(name for name in _LOSS if name != "token_index")
_BAND = ("seed", "ratio", "low", "high")
_TOKENS = ("logprob", "old_logprob", "advantages", "mask")
_KNOWN = ("entropy", "old_entropy", "collision", "token_index", "exclude")
_CLIPS = ("clip_low", "clip_high")

ENTRIES: dict[str, Entry] = {
    "logprob_entropy": Entry(statistics(ek.logprob_entropy), ("logits", *_ROWS), ("logits",)),
    "token_stats": Entry(statistics(ek.token_stats, softcap=3.0), ("logits", *_ROWS), ("logits",)),
    "token_stats, by name": Entry(
        statistics(ek.token_stats, statistics=ek.STATISTICS), ("logits", *_ROWS), ("logits",)
    ),
    "entropy": Entry(lambda **given: ([ek.entropy(**given)], []), ("logits", "temperature"), ("logits",)),
    "linear_logprob_entropy": Entry(statistics(ek.linear_logprob_entropy), (*_HEAD, *_ROWS), _HEAD),
    "linear_token_stats, tiles": Entry(
        statistics(ek.linear_token_stats, memory_budget=20000), (*_HEAD, *_ROWS), _HEAD
    ),
    "linear_token_stats, module": Entry(through(statistics(ek.linear_token_stats), "module"), (*_HEAD, *_ROWS), _HEAD),
    "linear_logprob_entropy, function": Entry(
        through(statistics(ek.linear_logprob_entropy, memory_budget=5000), "function"), (*_HEAD, *_ROWS), _HEAD
    ),
    "linear_policy_loss": Entry(
        loss(ek.linear_policy_loss), (*_HEAD, *_ROWS, *_PLAIN_LOSS, *_COEFFICIENTS, *_CLIPS), _HEAD
    ),
    "linear_policy_loss, clip_cov": Entry(
        loss(ek.linear_policy_loss, method="clip_cov", loss_agg_mode="seq-mean-token-mean"),
        (*_HEAD, *_ROWS, *_LOSS, *_COEFFICIENTS, *_BAND, "cu_seqlens", "global_batch_size"), _HEAD,
    ),
    "linear_policy_loss, module": Entry(
        through(loss(ek.linear_policy_loss, method="kl_cov"), "module"),
        (*_HEAD, *_ROWS, *_LOSS, *_COEFFICIENTS, "ratio", "kl_coef"), _HEAD,
    ),
    "policy_loss": Entry(
        loss(ek.policy_loss),
        (*_TRACKED, *_PLAIN_LOSS, *_CLIPS, "dual_clip", "batch_num_tokens"), _TRACKED,
    ),
    "policy_loss, gspo": Entry(
        loss(ek.policy_loss, surrogate="gspo", loss_agg_mode="seq-mean-token-mean"),
        (*_TRACKED, *_PLAIN_LOSS, *_CLIPS, "cu_seqlens", "global_batch_size"), _TRACKED,
    ),
    "policy_loss, per token": Entry(loss(ek.policy_loss, loss_agg_mode="none"), (*_TRACKED, *_PLAIN_LOSS), _TRACKED),
    "clip_cov_loss": Entry(loss(ek.clip_cov_loss), (*_TRACKED, *_LOSS, *_BAND), _TRACKED),
    "clip_cov_loss, given": Entry(
        loss(ek.clip_cov_loss, preset="paper", nonfinite="drop"), (*_TRACKED, *_LOSS, "dropped"), _TRACKED
    ),
    "kl_cov_loss": Entry(loss(ek.kl_cov_loss), (*_TRACKED, *_LOSS, "ratio", "kl_coef"), _TRACKED),
    "kl_cov_loss, given": Entry(loss(ek.kl_cov_loss), (*_TRACKED, *_LOSS, "penalized", "kl_coef"), _TRACKED),
    "PolicyLossModule": Entry(
        loss(lambda **given: ek.PolicyLossModule(clip_low=0.1)(**given)), (*_TRACKED, *_PLAIN_LOSS), _TRACKED
    ),
    "ClipCovLoss": Entry(
        loss(lambda **given: ek.ClipCovLoss(seed=3)(**given)), (*_TRACKED, *_LOSS, "k", "low", "high"), _TRACKED
    ),
    "KlCovLoss": Entry(loss(lambda **given: ek.KlCovLoss()(**given)), (*_TRACKED, *_LOSS, "k"), _TRACKED),
    "aggregate": Entry(
        lambda **given: ([ek.aggregate(**given)], []), ("term", "mask", "batch_num_tokens"), ("term",)
    ),
    "aggregate, sequences": Entry(
        lambda **given: ([ek.aggregate(**given, loss_agg_mode="seq-mean-token-sum-norm")], []),
        ("term", "mask", "cu_seqlens", "global_batch_size", "loss_scale_factor"), ("term",),
    ),
    "token_covariance": Entry(plain(ek.token_covariance), ("logprob", "advantages", "mask")),
    "clip_cov_mask": Entry(
        plain(ek.clip_cov_mask), ("covariance", "mask", *_BAND, "exclude", "token_index")
    ),
    "kl_cov_mask": Entry(plain(ek.kl_cov_mask), ("covariance", "mask", "ratio", "exclude", "token_index")),
    "top_tokens": Entry(plain(ek.top_tokens), ("score", "mask", "k", "exclude", "token_index")),
    "budget_tokens": Entry(plain(ek.budget_tokens), ("score", "mask", "share", "exclude", "token_index")),
    "random_tokens": Entry(
        plain(ek.random_tokens), ("score", "mask", "seed", "k", "low", "high", "exclude", "token_index")
    ),
    "token_moments": Entry(lambda **given: ([], [*ek.token_moments(**given, std=True)]), ("values", "mask")),
    "control": Entry(controlled, (*_TOKENS, *_KNOWN, "vocab_covariance", "coefficient", "temperature", "ratio")),
    "control, drawn": Entry(drawn, (*_TOKENS, "token_index", "exclude", "seed")),
    "Controller": Entry(stepped, (*_TOKENS, "entropy")),
    "TargetEntropy": Entry(held, (*_TOKENS, "entropy", "vocab_covariance", "coefficient", "lr")),
    "policy_loss, control": Entry(
        under_control, (*_TRACKED[:2], *_PLAIN_LOSS, "clip_low"), _TRACKED[:1]
    ),
    "SelectionBatch": Entry(
        batched, ("logprob", "advantages", "mask", "token_index", "exclude", *_BAND)
    ),
    "predicted_entropy_change": Entry(
        lambda **given: ([ek.predicted_entropy_change(**given)], []),
        ("vocab_covariance", "advantages", "step_size", "temperature", "ratio"), ("advantages", "ratio"),
    ),
    "hf.causal_lm_logprob_entropy": Entry(
        of_a_model,
        ("hidden", "weight", "input_ids", "target", "temperature", "attention_mask", "position_ids"),
        ("hidden", "weight"),
    ),
    "hf.next_tokens": Entry(plain(ek.hf.next_tokens), ("input_ids", "attention_mask", "position_ids")),
}  # fmt: skip
