"""The trainer's two heads: the same losses, metrics and gradients; memory with and without; what is told of it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from safetensors.torch import load_file

import entropy_kernels as ek
from entropy_kernels.trainer import model, ppo, probes
from entropy_kernels.trainer.config import HEADS, METHODS, TrainerConfig
from entropy_kernels.trainer.log import describe_memory
from entropy_kernels.trainer.methods import controller_of, surrogate_of
from entropy_kernels.trainer.model import Encoded, Policy
from entropy_kernels.trainer.rollout import Rollout, score
from entropy_kernels.trainer.start import word_tokenizer
from hf_models import FAMILIES, make
from trainer_setup import TINY, assert_near, assert_same_gradients, config, easy, rows_without_times, whole_rollout  # noqa: F401

OTHERS = [head for head in HEADS if head != "linear"]
SETTINGS = dataclasses.replace(TINY, temperature=0.7, entropy_coef=0.05, minibatches=1)


def policy_of(family: str = "llama", head: str = "linear", memory_budget: int | None = None) -> Policy:
    return Policy(make(family), word_tokenizer(["a"]), end_ids=[2], head=head, memory_budget=memory_budget)


def rollout_of(policy: Policy, rows: int = 6, padded: bool = True) -> Rollout:
    """Right-padded completions of 2 to 5 tokens, old log-probs near the policy's; prompts of 4 tokens, or left-padded
    ones of 1 to 4."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(3, 97, (rows, length), generator=generator)

    prompt = torch.arange(4) >= (3 - torch.arange(rows)[:, None] % 4 if padded else 0)
    prompt = prompt.expand(rows, 4)
    mask = torch.arange(5) < 2 + torch.arange(rows)[:, None] % 4
    prompts, completions = Encoded(ids(4).masked_fill(~prompt, 0), prompt.long()), ids(5).masked_fill(~mask, 0)
    stats = score(policy, SETTINGS, prompts, completions, mask)
    noise = 0.2 * torch.randn(mask.shape, generator=generator)
    advantages = torch.randn((rows, 1), generator=generator).expand(mask.shape)
    given = {"prompts": prompts, "ids": completions, "rewards": torch.zeros(rows, 1), "advantages": advantages}
    return whole_rollout(mask, ((stats.logprob + noise) * mask, *stats[1:]), **given)


def step(
    policy: Policy, rollout: Rollout, settings: TrainerConfig
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, metrics and gradients of one micro-batch, with every fifth token selected."""
    policy.model.zero_grad()
    method, control = METHODS[settings.method], None
    if method.effect is not None:
        selected = rollout.mask & (torch.arange(rollout.mask.numel()).view(rollout.mask.shape) % 5 == 0)
        control = ek.Control(**{method.effect: selected}, penalty_coef=settings.kl_coef)
    clips = surrogate_of(settings, controller_of(settings))
    rows = torch.arange(len(rollout.ids))
    tokens = int(rollout.mask.sum())
    result, _ = ppo.backward(policy, rollout, rows, settings, control, clips, tokens=tokens, sequences=len(rows))
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(policy.model.parameters()))
    return result.loss.detach(), result.metrics, gradients


def assert_same(policy: Policy, rollout: Rollout, settings: TrainerConfig) -> None:
    loss, metrics, gradients = step(policy, rollout, settings)
    for head in OTHERS:
        other_loss, other_metrics, other_gradients = step(policy.with_head(head), rollout, settings)
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
        assert metrics.keys() == other_metrics.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(value, other_metrics[name], rtol=1e-4, atol=1e-5)
        assert_same_gradients(gradients, other_gradients, 1e-4, 2e-5, head)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_heads_give_one_loss_and_gradient(family: str) -> None:
    policy = policy_of(family)
    assert_same(policy, rollout_of(policy), dataclasses.replace(SETTINGS, method="clip_cov"))


@pytest.mark.parametrize("method", ["grpo", "kl_cov", "random_dropped", "random_penalized"])
def test_both_heads_under_every_method(method: str) -> None:
    policy = policy_of()
    assert_same(policy, rollout_of(policy), dataclasses.replace(SETTINGS, method=method))  # type: ignore[arg-type]


def test_a_head_without_its_bias_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("phi, with bias")
    rollout = rollout_of(policy)
    parts = model.ek.hf.causal_lm_parts
    monkeypatch.setattr(model.ek.hf, "causal_lm_parts", lambda model: parts(model)._replace(bias=None))
    with pytest.raises(AssertionError):
        step(policy, rollout, SETTINGS)  # the bias gets no gradient


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi, with bias"])
def test_scores_are_those_of_the_logits(family: str) -> None:
    policy = policy_of(family)
    rollout = rollout_of(policy)
    args = (SETTINGS, rollout.prompts, rollout.ids, rollout.mask)
    for head in OTHERS:
        for ours, others in zip(score(policy, *args), score(policy.with_head(head), *args), strict=True):
            torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-5)
            assert (ours[~rollout.mask] == 0).all() and (others[~rollout.mask] == 0).all()


def test_only_completion_rows_reach_the_head() -> None:
    policy = policy_of()
    rollout = rollout_of(policy)
    assert policy.outputs(rollout.prompts, rollout.ids, rollout.mask).shape == (6, 5, 32)
    assert policy.with_head("logits").outputs(rollout.prompts, rollout.ids, rollout.mask).shape == (6, 5, 97)


@pytest.mark.parametrize("method", ["grpo", "clip_cov"])
def test_a_whole_step_is_the_same_from_one_seed(tmp_path: Path, method: str) -> None:
    weights = {}
    for head in HEADS:
        ppo.train(
            config(tmp_path / head, head=head, method=method, steps=1, cov_low=-9.0, cov_high=9.0, cov_ratio=0.1,
                   warm_steps=3, warm_batch=8, entropy_coef=0.01, measure_memory=True)
        )  # fmt: skip
        weights[head] = load_file(tmp_path / head / "model" / "model.safetensors")
    for head in ("logits", "torch"):
        assert_near(tmp_path / "linear", tmp_path / head, "head_gap")
        for name, value in weights["linear"].items():
            # not the largest difference: where a gradient vanishes, AdamW makes a whole step of its rounding
            assert (value - weights[head][name]).abs().mean() < 1e-3 * TINY.lr, (head, name)
    assert rows_without_times(tmp_path / "linear")[0]["head_gap"] < 1e-5  # type: ignore[operator]


# --- a whole update: which of our ops it takes, and that the other head's is the same ---------------------------------

#: Several parts for either op, by micro-batches, of which one has 84 or 28 tokens; float64.
FEW_BYTES = {1: 84_000, 3: 42_000}


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls that build a gradient, by op."""
    calls = {"linear_policy_loss": 0, "linear_logprob_entropy": 0, "linear_token_stats": 0}

    def count(name: str) -> None:
        original = getattr(model.ek, name)

        def call(*args: object, **options: object) -> object:
            calls[name] += torch.is_grad_enabled()
            return original(*args, **options)

        monkeypatch.setattr(model.ek, name, call)

    for name in calls:
        count(name)
    return calls


def updated(
    policy: Policy, rollout: Rollout, settings: TrainerConfig, head: str
) -> tuple[dict[str, float], Tensor, dict[str, Tensor]]:
    """Metrics, selected tokens and gradients of one update that leaves the weights where they are."""
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    rows = torch.arange(len(rollout.ids)).flip(0)
    settings = dataclasses.replace(settings, head=head)  # type: ignore[arg-type]
    made = ppo.update(policy.with_head(head), optimizer, rollout, rows, settings, controller_of(settings), seed=5)
    selected = torch.zeros_like(rollout.mask)
    for part, control in zip(made.rows, made.controls, strict=True):
        for mask in () if control is None else (control.dropped, control.penalized):
            selected[part] |= False if mask is None else mask
    return (
        probes.update_metrics(made, rollout, settings, settings.lr),
        selected,
        {name: p.grad.clone() for name, p in policy.model.named_parameters()},
    )


def in_float64(family: str, micro_batches: int) -> tuple[Policy, Rollout]:
    policy = policy_of(family, memory_budget=FEW_BYTES[micro_batches])
    policy.model.double()
    rollout = rollout_of(policy, rows=24, padded=False)  # left padding in float64 makes transformers' masks give NaN
    rollout.advantages = rollout.advantages.double()
    return policy, rollout


def assert_same_update(policy: Policy, rollout: Rollout, settings: TrainerConfig) -> dict[str, float]:
    """That of every head; returns its metrics."""
    metrics, selected, gradients = updated(policy, rollout, settings, "linear")
    for head in OTHERS:
        other_metrics, other_selected, other_gradients = updated(policy, rollout, settings, head)
        assert metrics == pytest.approx(other_metrics, rel=1e-9, abs=1e-12)
        assert torch.equal(selected, other_selected)
        assert_same_gradients(gradients, other_gradients, 1e-8, 1e-9, head)
    return metrics


UPDATE = dataclasses.replace(SETTINGS, cov_ratio=0.2, cov_low=-9.0, cov_high=9.0, grad_clip=0.0)


#: Method, statistics that it decides by, micro-batches: each effect in one micro-batch and in several.
UPDATES = [
    (method, *how)
    for method in ("grpo", "clip_cov", "kl_cov", "exact_cov", "steer", "repo", "adaptive_entropy")
    for how in (("new", 1), ("old", 3), *((("old", 1), ("new", 3)) if method in ("grpo", "clip_cov", "kl_cov") else ()))
]


@pytest.mark.parametrize(("method", "selection_logprob", "micro_batches"), UPDATES)
def test_an_update_is_the_same_and_takes_three_products_where_it_can(
    method: str, selection_logprob: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rollout = in_float64("gemma2", micro_batches)
    settings = dataclasses.replace(
        UPDATE, method=method, selection_logprob=selection_logprob, micro_batches=micro_batches,
        entropy_coef=0.0 if METHODS[method].effect == "entropy_coef" else UPDATE.entropy_coef,
        method_options={"target": 9.0, "coef": 0.1} if METHODS[method].effect == "entropy_coef" else {},
    )  # type: ignore[arg-type]  # fmt: skip
    tokens = policy.outputs(rollout.prompts, rollout.ids, rollout.mask)[rollout.mask][: 84 // micro_batches]
    for policy_loss in (True, False):
        head, budget = policy.model.lm_head.weight, FEW_BYTES[micro_batches]
        plan = ek.linear_plan(tokens, head, memory_budget=budget, policy_loss=policy_loss)
        assert plan.row_chunks * plan.vocab_chunks > 1, plan
    calls = counted(monkeypatch)
    metrics = assert_same_update(policy, rollout, settings)
    late = method != "grpo" and selection_logprob == "new" and micro_batches == 1
    assert calls["linear_policy_loss"] == (0 if late else micro_batches)
    exact = METHODS[method].needs("vocab_covariance")
    assert calls["linear_logprob_entropy"] == (1 if late and not exact else 0)
    assert calls["linear_token_stats"] == (1 if late and exact else 0)
    if METHODS[method].paper_ratio:
        assert metrics["tokens_touched"] == metrics["tokens_dropped"] + metrics["tokens_penalized"] > 0


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
@pytest.mark.parametrize("family", ["phi, with bias", "granite"])
def test_an_update_in_other_sums_and_families(family: str, mode: str) -> None:
    policy, rollout = in_float64(family, 3)
    settings = dataclasses.replace(UPDATE, method="clip_cov", micro_batches=3, loss_agg_mode=mode)  # type: ignore
    assert_same_update(policy, rollout, settings)


@pytest.mark.parametrize(
    "change", [{"entropy_coef": 0.0}, {"control": None}, {"batch_num_tokens": 1}, {"clip_low": 0.5}]
)
def test_an_update_with_another_loss_would_show(change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rollout = in_float64("llama", 3)
    original = model.ek.linear_policy_loss

    def other(*args: object, **options: object) -> object:
        return original(*args, **{**options, **change})  # type: ignore[arg-type]

    monkeypatch.setattr(model.ek, "linear_policy_loss", other)
    with pytest.raises(AssertionError):
        assert_same_update(policy, rollout, dataclasses.replace(UPDATE, method="clip_cov", micro_batches=3))


# --- memory ----------------------------------------------------------------------------------------------------------


def compared(policy: Policy, rollout: Rollout, settings: TrainerConfig) -> dict[str, float]:
    return probes.compare_heads(policy, rollout, settings, ppo.backward)


def test_within_a_budget_no_logits_exist(undisturbed: None) -> None:
    policy = policy_of(memory_budget=2 << 20)
    policy.model.resize_token_embeddings(20_000, mean_resizing=False)
    rollout = rollout_of(policy, rows=64)
    logits = 4 * rollout.ids.numel() * 20_000  # 25.6 MB
    row = compared(policy, rollout, SETTINGS)
    gradients = sum(4 * p.numel() for p in policy.model.parameters())
    assert row["memory/logits"] > logits + gradients
    assert row["memory/linear"] < gradients + (2 << 20) + 3_000_000  # 64 rows of activations
    assert row["head_gap"] < 1e-5
    assert all(p.grad is None for p in policy.model.parameters())
    roomy = Policy(policy.model, policy.tokenizer, end_ids=[2])  # 1 GiB: all tokens at once
    row = compared(roomy, rollout, SETTINGS)
    assert logits < row["memory/linear"] - gradients < 2 * logits


@pytest.mark.parametrize(("selection_logprob", "late"), [("old", 0), ("new", 1)])
def test_what_is_measured_is_the_step_as_it_runs(
    selection_logprob: str, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of()
    rollout = rollout_of(policy)
    calls = counted(monkeypatch)
    settings = dataclasses.replace(SETTINGS, method="kl_cov", selection_logprob=selection_logprob)  # type: ignore
    compared(policy, rollout, settings)
    assert calls == {"linear_policy_loss": 1 - late, "linear_logprob_entropy": late, "linear_token_stats": 0}


def test_logits_that_ek_hf_does_not_know_are_refused() -> None:
    policy = policy_of()
    policy.model.config.final_logit_softcapping = 0.5  # which its code does not look at
    rollout = rollout_of(policy)
    with pytest.raises(ValueError, match=r"head: expected, for linear.*nats off on average; take --head logits"):
        compared(policy, rollout, SETTINGS)
    row = compared(policy.with_head("logits"), rollout, SETTINGS)
    assert row["head_gap"] > 0.1  # told, and not refused


def test_a_head_that_is_more_than_its_weight() -> None:
    """Also one that does not tell how many logits it gives."""
    policy = policy_of()
    policy.model.lm_head = torch.nn.Sequential(policy.model.lm_head)
    policy.model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    row = compared(policy, rollout_of(policy), SETTINGS)
    assert row["head_gap"] < 1e-5


def test_a_model_without_a_linear_head(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(head="logits")
    rollout = rollout_of(policy)
    monkeypatch.setattr(policy.model, "get_output_embeddings", lambda: None)
    assert compared(policy, rollout, SETTINGS).keys() == {"memory/logits", "memory/torch"}
    with pytest.raises(TypeError, match="model: expected a transformers causal language model"):
        compared(policy.with_head("linear"), rollout, SETTINGS)


def test_logits_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    measured = probes.peak_allocated
    calls = []

    def full(call: object, device: torch.device) -> int:
        calls.append(call)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(call, device)  # type: ignore[arg-type]

    monkeypatch.setattr(probes, "peak_allocated", full)
    row = compared(policy, rollout_of(policy), SETTINGS)
    assert row["memory/logits"] == math.inf and row["memory/linear"] > 0
    assert describe_memory(row).find("MB, logits does not fit, torch") > 0  # type: ignore[union-attr]


def test_memory_as_a_sentence() -> None:
    assert describe_memory({"entropy": 1.0}) is None
    assert describe_memory({"memory/logits": 2.34e6, "memory/linear": 1e6}) == (
        "Peak memory of a micro-batch's forward, loss and backward, by head: linear 1.0 MB, logits 2.3 MB."
    )


def test_sampling_names_the_cache_as_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 calls it cache, and warns of the name that it had before."""
    policy = policy_of()
    forward = policy.model.forward
    prompts = Encoded(torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.long))

    def drawn() -> Tensor:
        seeded = torch.Generator().manual_seed(0)
        return policy.sample(prompts, max_new_tokens=5, temperature=1.0, generator=seeded).ids

    before = drawn()
    old = "past_key_values" in inspect.signature(forward).parameters

    def renamed(cache: object = None, **rest: object) -> object:
        assert cache is not None
        return forward(**{"past_key_values" if old else "cache": cache}, **rest)

    monkeypatch.setattr(policy.model, "forward", renamed)
    assert torch.equal(drawn(), before)


def test_mixed_precision() -> None:
    policy = policy_of()
    rollout = rollout_of(policy)
    exact = policy.outputs(rollout.prompts, rollout.ids, rollout.mask)
    policy.mixed = True
    rounded = policy.outputs(rollout.prompts, rollout.ids, rollout.mask)
    assert 1e-6 < (rounded - exact).abs().max() < 0.1
    with policy.full_precision():
        assert torch.equal(policy.outputs(rollout.prompts, rollout.ids, rollout.mask), exact)
    assert policy.mixed and policy.with_head("torch").mixed
    row = compared(policy, rollout, SETTINGS)
    assert row["head_gap"] < 0.02
    ours = step(policy, rollout, dataclasses.replace(SETTINGS, method="clip_cov"))
    other = step(policy.with_head("torch"), rollout, dataclasses.replace(SETTINGS, method="clip_cov"))
    torch.testing.assert_close(ours[0], other[0], rtol=0.02, atol=0.02)
    assert_same_gradients(ours[2], other[2], 0.05, 0.05)
    assert {gradient.dtype for gradient in ours[2].values()} == {torch.float32}
