"""The package's public reference and the tests' own, written apart, agree: hostile rows, gradients, masks, losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import reference as own
import reference_losses
import reference_selection
from entropy_kernels import _rows, reference

INF, NAN = torch.inf, torch.nan


def _rows_of(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 6, 97): plain, peaked, masked entries, a target at -inf, nothing but -inf, NaN in an ignored row."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 6, 97, generator=generator, dtype=torch.float64)
    target = torch.randint(80, (2, 6), generator=generator)
    logits[0, 1, 5] = 400.0
    if "softcap" not in options:  # under which infinite logits are finite
        logits[0, 2, 80:] = -INF
        logits[0, 3, target[0, 3]] = -INF
        logits[0, 4] = -INF
        logits[0, 4, target[0, 4]] = 0.0
        logits[0, 5] = -INF
    logits[1, 0], target[1, 0] = NAN, -100
    logits[..., options.get("vocab_size", 97) :] = NAN
    return logits, target


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 20.0, "temperature": 1.3},
        {"vocab_size": 90},
        {"softcap": 5.0, "vocab_size": 90},
    ],
    ids=str,
)
def test_statistics_and_gradients(options: dict[str, Any]) -> None:
    logits, target = _rows_of(**options)
    dense = own.dense(logits, target, **options)
    values = reference.statistics(logits, target, **options)
    for name in own.NAMES:
        torch.testing.assert_close(values[name].reshape(-1), getattr(dense, name), equal_nan=True, msg=name)
        assert not (values[name] == 0).logical_and(values[name].signbit()).any(), f"{name}: -0"

    generator = torch.Generator().manual_seed(2)
    upstream = {name: torch.randn(2, 6, generator=generator, dtype=torch.float64) for name in own.DIFFERENTIABLE}
    for chosen in (upstream, *({name: upstream[name]} for name in upstream)):
        found = reference.gradient(logits, target, chosen, **options)
        expected = own.gradient(dense, **{name: value.reshape(-1) for name, value in chosen.items()})
        torch.testing.assert_close(found.view(12, 97), expected, equal_nan=True)


def test_what_needs_no_target() -> None:
    logits, target = _rows_of()
    logits[1, 0] = 0
    without, beside = reference.statistics(logits), reference.statistics(logits, target)
    assert set(beside) - set(without) == set(reference.NEED_TARGET)
    for name, value in without.items():
        torch.testing.assert_close(value[target >= 0], beside[name][target >= 0], equal_nan=True)


def test_names_of_the_table() -> None:
    assert set(_rows.NAMES) <= set(reference.FORMULAS)
    assert {s.name for s in _rows.STATISTICS if s.needs_target} == set(reference.NEED_TARGET)


def _batch(tokens: int = 400) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    covariance = (8 * torch.randn(tokens, generator=generator)).round() / 4  # of which many tie
    covariance[7] = NAN
    covariance[8] = -0.0
    return {
        "covariance": covariance.view(8, -1),
        "mask": (torch.rand(tokens, generator=generator) < 0.8).view(8, -1),
        "exclude": (torch.rand(tokens, generator=generator) < 0.2).view(8, -1),
        "token_index": (torch.randperm(tokens, generator=generator) - 5).view(8, -1),
    }


@pytest.mark.parametrize("amount", [{"ratio": 0.1}, {"ratio": 1e-4}, {"ratio": 1e-4, "at_least_one": False}, {"k": 9}])
@pytest.mark.parametrize("masks", [(), ("mask",), ("mask", "exclude"), ("mask", "exclude", "token_index")])
def test_masks(amount: dict[str, Any], masks: tuple[str, ...]) -> None:
    data = _batch()
    options = amount | {name: data[name] for name in masks}
    covariance = data["covariance"]
    assert torch.equal(reference.kl_cov_mask(covariance, **options), reference_selection.kl_cov(covariance, **options))
    for band in (
        {},
        {"closed": True, "low": -0.5, "high": 0.25},
        {"band": "quantile", "low": 0.2, "high": 0.9, "closed": True},
    ):
        found = reference.clip_cov_mask(covariance, seed=-7, **band, **options)
        assert torch.equal(found, reference_selection.clip_cov(covariance, seed=-7, **band, **options))


def test_random_keys() -> None:
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        index = torch.tensor([0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
        expected = [reference_selection.random_key(i, seed) for i in index.tolist()]
        assert reference.random_keys(index, seed).tolist() == expected


def test_nothing_that_counts() -> None:
    covariance, nothing = torch.ones(5), torch.zeros(5, dtype=torch.bool)
    assert not reference.kl_cov_mask(covariance, nothing, k=2).any()
    assert not reference.clip_cov_mask(covariance, nothing, seed=1, ratio=0.5, band="quantile", low=0.1, high=1).any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_low": None, "clip_high": None},
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
        {"dropped": True},
        {"dropped": True, "keep_value": True},
        {"penalized": True, "kl_coef": 0.5, "clip_low": None, "clip_high": None},
        {"entropy": True, "entropy_coef": 0.01},
    ],
    ids=str,
)
def test_losses(options: dict[str, Any]) -> None:
    generator = np.random.default_rng(4)
    lp, advantages = -2 * generator.random((6, 20)), generator.standard_normal((6, 20))
    old, mask = lp + 0.4 * generator.standard_normal((6, 20)), generator.random((6, 20)) < 0.8
    arrays = {"dropped": generator.random((6, 20)) < 0.1, "penalized": generator.random((6, 20)) < 0.1}
    arrays["entropy"] = generator.random((6, 20))
    given = {name: arrays[name] if value is True and name in arrays else value for name, value in options.items()}
    clips = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None} | {
        name: value for name, value in given.items() if "clip" in name
    }
    expected = reference_losses.loss(lp, old, advantages, mask, **{**given, **clips})

    tensors = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    logprob = torch.tensor(lp, requires_grad=True)
    batch = (torch.tensor(old), torch.tensor(advantages), torch.tensor(mask))
    loss = reference.policy_loss(logprob, *batch, **tensors)
    torch.testing.assert_close(loss.item(), float(expected.loss))
    (gradient,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close(gradient, torch.tensor(expected.logprob))
    stopped = reference.clipped(logprob, *batch[:2], clip_low=clips["clip_low"], clip_high=clips["clip_high"])
    right = reference_losses.clipped_by_ppo(lp, old, advantages, mask, clips["clip_low"], clips["clip_high"])
    assert torch.equal(stopped & batch[2], torch.as_tensor(right) & batch[2])
    covariance = reference.token_covariance(logprob.detach(), batch[1], batch[2])
    torch.testing.assert_close(covariance, torch.tensor(reference_losses.covariance(lp, advantages, mask)))
