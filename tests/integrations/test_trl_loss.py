"""Clip-Cov and KL-Cov inside TRL's loss against a computation by hand in float64, over any accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from trl_runs import run

import reference_selection
from entropy_kernels.integrations.trl import GRPOTrainer

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
ALL = (*LOSSES, "luspo", "sapo", "cispo", "vespo")


class Recorded(GRPOTrainer):
    """Keeps what goes into each micro-batch's loss and what comes out of it: value, and gradient at the log-probs."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.record: list[dict[str, Any]] = []
        super().__init__(*args, **named)

    def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **named)
        if found[0].requires_grad:
            found[0].retain_grad()
            self.record[-1]["logp"] = found[0]
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.record.append({})
        loss = super()._compute_loss(model, inputs)
        self.record[-1] |= {"inputs": dict(inputs), "loss": float(loss)}
        return loss


def steps(trainer: Recorded, accumulation: int) -> list[list[dict[str, Any]]]:
    return [trainer.record[i : i + accumulation] for i in range(0, len(trainer.record), accumulation)]


def array(x: Any) -> np.ndarray:
    return x.detach().double().numpy()


def split(flat: torch.Tensor, micro: list[dict[str, Any]]) -> list[np.ndarray]:
    shapes = [x["logp"].shape for x in micro]
    parts = flat.reshape(-1).split([shape.numel() for shape in shapes])
    return [part.view(shape).numpy() for part, shape in zip(parts, shapes, strict=True)]


def selected(micro: list[dict[str, Any]], old: bool, seed: int, method: str, **options: Any) -> list[np.ndarray]:
    """By the reference, over all micro-batches of a step."""
    lp, advantages, mask, index, excluded = [], [], [], [], []
    for x in micro:
        given = x["inputs"]
        now = given["ek_logprob"] if old else x["logp"].detach()
        a = given["ek_advantages"][:, None].expand(now.shape)
        before = now if old else given.get("old_per_token_logps", now)
        ratio = (now.double() - before.double()).exp()
        lp.append(now.flatten())
        advantages.append(a.flatten())
        mask.append(given["completion_mask"].flatten())
        index.append((given["ek_row"][:, None] * 2**32 + torch.arange(now.shape[1])).flatten())
        excluded.append((-a * ratio.clamp(0.8, 1.2) > -a * ratio).flatten())
    flat = [torch.cat(x) for x in (lp, advantages, mask, index, excluded)]
    score = reference_selection.covariance(*flat[:3])
    if method == "clip_cov":
        options |= {"seed": seed, "exclude": flat[4]}
    found = getattr(reference_selection, method)(score, flat[2], token_index=flat[3], **options)
    return split(found, micro)


def weights(loss_type: str, inputs: dict[str, Any], accumulation: int, steps_per_generation: int) -> np.ndarray:
    mask = array(inputs["completion_mask"])
    each, rows = mask.sum(-1, keepdims=True), len(mask)
    below = {
        "grpo": rows * each, "bnpo": mask.sum(), "dr_grpo": rows * 8,
        "dapo": float(inputs["num_items_in_batch"]) / steps_per_generation,
    }[loss_type]  # fmt: skip
    return mask / below / accumulation


def by_hand(x: dict[str, Any], w: np.ndarray, dropped: Any = False, penalized: Any = None) -> tuple[float, np.ndarray]:
    """PPO's term with its clip, without the dropped; KL-Cov's without a clip, with its penalty (coefficient 5)."""
    given, lp = x["inputs"], array(x["logp"])
    old = array(given["old_per_token_logps"]) if "old_per_token_logps" in given else lp
    ratio, a = np.exp(lp - old), np.where(dropped, 0.0, array(given["ek_advantages"])[:, None])
    if penalized is not None:
        gap = lp - old
        return float((w * (-a * ratio + 5 * penalized * abs(gap))).sum()), w * (
            -a * ratio + 5 * penalized * np.sign(gap)
        )
    stopped = -a * np.clip(ratio, 0.8, 1.2) > -a * ratio
    value = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
    return float((w * value).sum()), np.where(stopped, 0.0, -a * ratio * w)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_step(method: str, accumulation: int, loss_type: str) -> None:
    """Value and gradient of every micro-batch, over two updates of each rollout: the second is off-policy."""
    options: dict[str, Any] = {"ratio": 0.1}
    options |= {"low": 0.01, "high": 50.0} if method == "clip_cov" else {}
    trainer = run(
        kind=Recorded, method=method, method_options={**options, **({"kl_coef": 5.0} if method == "kl_cov" else {})},
        loss_type=loss_type, gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation,
        num_iterations=2, learning_rate=2e-2, num_generations=2,
    ).trainer  # fmt: skip
    moved = False
    for number, micro in enumerate(steps(trainer, accumulation)):
        old = accumulation > 1  # planned from the rollout's statistics; else from the training forward
        chosen = selected(micro, old, 42 + number, method, **options)
        assert sum(x.sum() for x in chosen) > 0
        for x, mine in zip(micro, chosen, strict=True):
            given = x["inputs"]
            treated = array(given["ek_penalty"]) != 0 if method == "kl_cov" else array(given["advantages"]) == 0
            real = array(given["completion_mask"]) * (array(given["ek_advantages"])[:, None] != 0) != 0
            assert (treated & real == mine & real).all()
            w = weights(loss_type, given, accumulation, accumulation)
            value, gradient = by_hand(x, w, **{"dropped" if method == "clip_cov" else "penalized": mine})
            assert x["loss"] == pytest.approx(value, rel=1e-5, abs=1e-7)
            error = np.abs(array(x["logp"].grad) - gradient)
            assert error.max() < 1e-6 * max(1.0, np.abs(gradient).max())
            moved |= (
                bool(number % 2)
                and "old_per_token_logps" in given
                and not np.allclose(array(x["logp"]), array(given["old_per_token_logps"]), atol=1e-3)
            )
    assert moved  # the ratios of second updates were none of 1


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("plan_from", ["old", "fresh"])
def test_step_of_a_rollout_with_several(plan_from: str, method: str) -> None:
    """Four micro-batches a rollout, two an optimizer step, twice: the tokens are those of the step's two."""
    options: dict[str, Any] = {"ratio": 0.1} | ({"low": 0.01, "high": 50.0} if method == "clip_cov" else {})
    trainer = run(
        kind=Recorded, method=method, method_options=options, plan_from=plan_from, gradient_accumulation_steps=2,
        steps_per_generation=4, per_device_train_batch_size=4, num_iterations=2, learning_rate=2e-2, max_steps=8,
        num_generations=2,
    ).trainer  # fmt: skip
    assert len(trainer.record) == 16
    for number, micro in enumerate(steps(trainer, 2)):
        chosen = selected(micro, plan_from == "old", 42 + number, method, **options)
        assert sum(x.sum() for x in chosen) > 0
        for x, mine in zip(micro, chosen, strict=True):
            given = x["inputs"]
            found = array(given["ek_penalty"]) != 0 if method == "kl_cov" else array(given["advantages"]) == 0
            real = array(given["completion_mask"]) * (array(given["ek_advantages"])[:, None] != 0) != 0
            assert (found & real == mine & real).all(), number


def treated(trainer: Recorded, accumulation: int) -> list[set[tuple[int, int]]]:
    """(row of the rollout, position) of the dropped tokens of each step."""
    found = []
    for micro in steps(trainer, accumulation):
        tokens: set[tuple[int, int]] = set()
        for x in micro:
            given = x["inputs"]
            gone = (given["advantages"] == 0) & (given["ek_advantages"][:, None] != 0)
            tokens |= {(int(given["ek_row"][i]), int(j)) for i, j in gone.nonzero().tolist()}
        found.append(tokens)
    return found


@pytest.mark.parametrize("method", ["clip_cov", "exact_cov", "top_entropy"])
def test_the_same_tokens_for_any_accumulation(method: str) -> None:
    """dapo's loss is that of the whole step, too."""
    options: dict[str, Any] = {"clip_cov": {"ratio": 0.1, "low": 0.01, "high": 50.0}, "exact_cov": {"share": 0.5}}.get(
        method, {"rho": 0.5}
    )
    found, losses = [], []
    for accumulation in (1, 2, 4):
        trained = run(
            kind=Recorded, method=method, method_options=options, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation, plan_from="old", max_steps=3,
        )  # fmt: skip
        found.append(treated(trained.trainer, accumulation))
        losses.append([entry["loss"] for entry in trained.log])
    assert found[0] == found[1] == found[2] and all(found[0])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[2] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ALL)
def test_loss_is_linear_in_advantages_per_token(loss_type: str, level: str) -> None:
    """What the whole rests on, of each loss type of TRL: per token as per sequence, w·A weighs w, 0 is nothing.

    The weight of a token is the one that we tell the methods (``coefficients``); vespo's term is of sequences.
    """
    trainer = run(
        kind=Recorded, method="clip_cov", method_options={"low": 1e6, "high": 2e6}, max_steps=2, num_iterations=2,
        loss_type=loss_type, epsilon_high=5.0 if loss_type == "cispo" else None,
        learning_rate=2e-2,
    ).trainer  # fmt: skip
    x = trainer.record[1]["inputs"]
    a, mask = x["ek_advantages"], x["completion_mask"]

    trainer.importance_sampling_level = level  # our config refuses it where a token does not have its own gradient
    planner, trainer._planner = trainer._planner, None  # TRL's loss of what it is given
    trainer.model.train()

    def value(advantages: torch.Tensor, **changed: Any) -> tuple[float, torch.Tensor]:
        loss = trainer._compute_loss(trainer.model, {**x, "advantages": advantages, **changed})
        return float(loss), torch.autograd.grad(loss, trainer.record[-1]["logp"])[0]

    torch.manual_seed(0)
    w = torch.rand(mask.shape)
    full = a[:, None].expand(mask.shape)
    plain, spread, half = value(a), value(full), value(0.5 * full)
    assert spread[0] == pytest.approx(plain[0], rel=1e-5, abs=1e-7)
    assert torch.allclose(spread[1], plain[1], atol=1e-6)
    if level == "token":
        assert spread[0] == plain[0] and torch.equal(spread[1], plain[1])
    assert half[0] == pytest.approx(0.5 * plain[0], rel=1e-5, abs=1e-7)
    parts = [value(full * w), value(full * (1 - w)), value(torch.zeros_like(full))]
    assert parts[0][0] + parts[1][0] == pytest.approx(plain[0], rel=1e-4, abs=1e-6) and parts[2][0] == 0
    assert torch.allclose(parts[0][1] + parts[1][1], plain[1], atol=1e-6) and not parts[2][1].any()
    gone = torch.rand(mask.shape) < 0.3
    alone = not value(full.masked_fill(gone, 0.0), old_per_token_logps=None)[1][gone].any()
    assert alone == (level == "token" or loss_type in ("cispo", "vespo"))
    # on-policy the gradient is -c·A
    gradient = value(a, old_per_token_logps=None)[1]
    c = planner.weights(x)
    expected = -c * full
    if level == "sequence":  # a ratio of sequences spreads a row's sum over its tokens
        expected = expected.sum(-1, keepdim=True) * mask / mask.sum(-1, keepdim=True)
    if level == "token" or loss_type not in ("cispo", "vespo"):
        assert torch.allclose(gradient, expected, atol=1e-6, rtol=1e-4)
