"""Losses against the float64 reference: value, gradient and metrics over hundreds of random batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference_losses as ref
from entropy_kernels.losses import kl_estimate
from loss_cases import Batch, assert_matches, differentiated, ek, leaf, random_batch, random_options

pytestmark = pytest.mark.usefixtures("loss_on")

CLIPS = ((0.2, 0.2), (0.2, 0.28), (1.0, 1.0), (0.05, 0.05))
RATIOS = (2e-4, 0.02, 0.1, 0.9)
BANDS = ((1.0, 5.0), (0.1, 0.5), (-1.0, 1.0), (5.0, 5.001))
# The 300 batches in parts, so that a failure names a seed near it and workers share the load
PARTS = [range(start, start + 50) for start in range(0, 300, 50)]
every_part = pytest.mark.parametrize("seeds", PARTS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
every_preset = pytest.mark.parametrize("preset", ["verl", "paper"])


def compare(
    function: Any, seed: int, ours: dict[str, Any], theirs: dict[str, Any], entropy: Tensor | None = None, **both: Any
) -> None:
    """The loss of the batch against the reference, each with options of its own, with both's and an aggregation."""
    batch = random_batch(seed)
    options, ref_options = random_options(seed, batch.mask)
    out, gradient = differentiated(function, *batch.args, **ours, **both, **options)
    band_frac = theirs.pop("band_frac", None)
    expected = ref.loss(*batch.arrays(), **theirs, **both, **ref_options)
    if band_frac is not None:
        expected.metrics["band_frac"] = band_frac
    assert_matches(out, gradient, expected, entropy, name=f"seed {seed} ({batch.name})")


@every_part
def test_clip_cov_verl_equals_the_reference_given_the_same_permutation(seeds: range) -> None:
    """The reference drops by a permutation as verl does; ours is given that mask."""
    dropped_anything = 0
    for seed in seeds:
        lp, old, adv, mask = random_batch(seed).arrays()
        low, high = CLIPS[seed % 4]
        clipped = ref.clipped_by_ppo(lp, old, adv, mask, low, high)
        found = ref.candidates(ref.covariance(lp, adv, mask), mask, clipped, *BANDS[seed // 7 % 4], "verl")
        permutation = np.random.default_rng(seed).permutation(len(found))
        dropped = ref.select_clip_cov(found, permutation, mask, RATIOS[seed // 4 % 4], "verl")
        dropped_anything += dropped.any()
        ours = {"preset": "verl", "dropped": torch.from_numpy(dropped)}
        compare(ek.clip_cov_loss, seed, ours, {"dropped": dropped}, clip_low=low, clip_high=high)
    assert dropped_anything >= 10


@every_preset
@every_part
def test_clip_cov_selects_what_the_reference_allows(seeds: range, preset: str) -> None:
    """Ours selects by seed: the same number as the reference, of the same candidates, and then the same loss."""
    for seed in seeds:
        batch = random_batch(seed)
        lp, old, adv, mask = batch.arrays()
        low, high = (0.2, 0.2) if preset == "verl" else (None, None)
        ratio, band = RATIOS[seed // 4 % 4], BANDS[seed // 7 % 4]
        ours: dict[str, Any] = {"seed": seed, "ratio": ratio, "low": band[0], "high": band[1]}
        cov = ek.token_covariance(batch.logprob, batch.advantages, batch.mask)
        clipped = ref.clipped_by_ppo(lp, old, adv, mask, low, high)
        selected = ek.clip_cov_mask(
            cov, batch.mask, **ours, closed=preset == "paper", at_least_one=preset == "verl",
            exclude=torch.from_numpy(clipped) if preset == "verl" else None,
        ).numpy()  # fmt: skip
        # those that ours selects first: a permutation of the candidates with which the reference selects the same
        found = ref.candidates(cov.double().numpy(), mask, clipped, *band, preset)
        permutation = np.argsort(~selected.reshape(-1)[found], kind="stable")
        np.testing.assert_array_equal(ref.select_clip_cov(found, permutation, mask, ratio, preset), selected)
        theirs = {
            "clip_low": low, "clip_high": high, "dropped": selected, "keep_value": preset == "paper",
            "band_frac": len(found) / max(mask.sum(), 1),
        }  # fmt: skip
        compare(ek.clip_cov_loss, seed, {"preset": preset, **ours}, theirs)


@every_preset
@every_part
def test_kl_cov_equals_the_reference(seeds: range, preset: str) -> None:
    for seed in seeds:
        batch = random_batch(seed)
        ratio, kl_coef = (2e-4, 0.05, 0.3)[seed % 3], (1.0, 0.1, 2.0)[seed // 2 % 3]
        cov = ek.token_covariance(batch.logprob, batch.advantages, batch.mask).double().numpy()
        penalized = ref.select_kl_cov(cov, batch.arrays()[3], ratio, preset)
        theirs = {"clip_low": None, "clip_high": None, "penalized": penalized}
        compare(ek.kl_cov_loss, seed, {"preset": preset, "ratio": ratio}, theirs, kl_coef=kl_coef)


@every_part
def test_policy_loss_with_everything_equals_the_reference(seeds: range) -> None:
    """Clips of every kind, entropy bonus and reference KL at once."""
    for seed in seeds:
        batch = random_batch(seed)
        g = torch.Generator().manual_seed(seed)
        entropy = leaf(3 * torch.rand(batch.logprob.shape, generator=g))
        reference = batch.old_logprob + 0.5 * torch.randn(batch.logprob.shape, generator=g)
        low, high = (*CLIPS, (None, 0.2), (0.2, None), (None, None))[seed % 7]
        terms = {
            "clip_low": low,
            "clip_high": high,
            "dual_clip": (None, 3.0, 1.1)[seed % 3],
            "entropy_coef": (0.01, -0.2, 0.0)[seed // 3 % 3],
            "ref_kl_coef": (0.05, 0.0)[seed % 2],
            "kl_estimator": ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")[seed % 8],
        }
        theirs = {
            "entropy": entropy.detach().double().numpy(),
            "ref": np.where(batch.arrays()[3], reference.double().numpy(), 0),
        }
        used = entropy if terms["entropy_coef"] else None
        compare(ek.policy_loss, seed, {"entropy": entropy, "ref_logprob": reference}, theirs, used, **terms)
        assert used is entropy or entropy.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_dtypes(dtype: torch.dtype, seed: int) -> None:
    """fp32 inside for half precision, fp64 for fp64; the gradient comes back in the dtype of logprob."""
    batch = random_batch(seed, dtype)
    out, gradient = differentiated(ek.policy_loss, *batch.args)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(value.dtype == out.loss.dtype for value in out.metrics.values())
    expected = ref.loss(*batch.arrays())
    del expected.metrics["cov_mean"], expected.metrics["cov_max"]  # the covariance is fp32 throughout
    assert_matches(out, gradient, expected)


@pytest.mark.parametrize(
    ("mode", "alone", "of_the_whole"),
    [
        ("token-mean", 15 / 3, 15 / 30 * 4),
        ("token-sum", 15, 15 * 4),
        ("seq-mean-token-sum", (6 + 9) / 2, 15 / 10 * 4),
        ("seq-mean-token-mean", (3 + 9) / 2, (3 + 9) / 10 * 4),
        ("seq-mean-token-sum-norm", (6 + 9) / 2 / 3, 15 / 10 * 4 / 5),
    ],
)
def test_aggregation_by_hand(mode: str, alone: float, of_the_whole: float) -> None:
    """Three sequences with 2, 0 and 1 valid tokens, losses 2, 4, · and 9 (old = new, A = -loss)."""
    losses = torch.tensor([[2.0, 4.0, 7.0], [7.0, 7.0, 7.0], [9.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    lp = torch.zeros(3, 3)
    whole = {"dp_size": 4, "batch_num_tokens": 30, "global_batch_size": 10, "loss_scale_factor": 5}
    on_device = {name: torch.tensor(value) if name != "dp_size" else value for name, value in whole.items()}
    for options, expected in (({}, alone), (whole, of_the_whole), (on_device, of_the_whole)):
        out = ek.policy_loss(lp, lp, -losses, mask, loss_agg_mode=mode, **options)
        assert float(out.loss) == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl"])
@pytest.mark.parametrize("suffix", ["", "+"])
def test_kl_estimators(estimator: str, suffix: str) -> None:
    """Value and gradient, at 0, beyond both clamps of k3, and at ±100."""
    points = [0.0, 1e-4, -1e-4, 0.5, -0.5, -2.3, 2.5, -2.6, 15.0, -19.0, 25.0, -25.0, 100.0, -100.0]
    delta = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    value = kl_estimate(delta, estimator + suffix)
    value.sum().backward()
    exact, grad = ref.kl(delta.detach().numpy(), estimator + suffix)
    np.testing.assert_allclose(value.detach().numpy(), exact, rtol=1e-12, atol=1e-15)
    assert delta.grad is not None
    np.testing.assert_allclose(delta.grad.numpy(), grad, rtol=1e-12, atol=1e-15)


def test_kl_gradient_is_unbiased_with_the_suffix() -> None:
    """Σ_a π(a) · gradient(k3+) is the gradient of KL(π‖π_ref), of k3 it is not: why the suffix exists."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    other = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - other)).sum(), logits, retain_graph=True)

    def expected_gradient(estimator: str) -> Tensor:
        weighted = (logp.exp().detach() * kl_estimate(logp - other, estimator)).sum()
        return torch.autograd.grad(weighted, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient("k3+"), true)
    assert not torch.allclose(expected_gradient("k3"), true, rtol=1e-2)


def test_entropy_bonus_has_its_true_gradient_through_the_logits() -> None:
    """From logits: autograd of the loss equals -c/N · dH/dz written out by hand, with dH/dz = -p(log p + H)."""
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    stats = ek.logprob_entropy(logits, target, backend="torch")
    advantages = torch.zeros(2, 3)  # nothing but the bonus
    out = ek.policy_loss(stats.logprob, stats.logprob, advantages, mask, entropy=stats.entropy, entropy_coef=0.3)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    logp = logits.detach().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    by_hand = 0.3 / 3 * logp.exp() * (logp + entropy) * mask[..., None]
    torch.testing.assert_close(gradient, by_hand)
    step = 1e-6 * by_hand
    after = -((logits.detach() - step).log_softmax(-1).exp() * (logits.detach() - step).log_softmax(-1)).sum(-1)
    assert ((after - entropy[..., 0])[mask == 1] > 0).all()  # the step raises entropy


def test_entropy_without_gradient_warns_and_a_coefficient_may_be_a_tensor() -> None:
    lp = leaf(torch.zeros(2, 3))
    entropy = torch.ones(2, 3)
    with pytest.warns(UserWarning, match="entropy: expected a tensor that requires grad"):
        fixed = ek.policy_loss(lp, lp, entropy, entropy, entropy=entropy, entropy_coef=0.5)
    ent = leaf(entropy)
    out = ek.policy_loss(lp, lp, entropy, entropy, entropy=ent, entropy_coef=torch.tensor(0.5))
    out.loss.backward()
    assert float(out.loss.detach()) == float(fixed.loss.detach()) == -1.5
    torch.testing.assert_close(ent.grad, torch.full((2, 3), -0.5 / 6))


def test_constants_get_no_gradient() -> None:
    """old_logprob = logprob is the first update after a rollout: its gradient is that of r, not 0."""
    lp = leaf(torch.randn(2, 3))
    advantages = leaf(torch.randn(2, 3))
    out = ek.policy_loss(lp, lp, advantages, None, ref_logprob=lp, ref_kl_coef=0.1, kl_estimator="k1")
    out.loss.backward()
    torch.testing.assert_close(lp.grad, (0.1 - advantages.detach()) / 6)
    assert advantages.grad is None


# ---- the comparison itself ------------------------------------------------------------------------------------------


def test_the_comparison_has_teeth() -> None:
    """Each mistake fails, and so do a zero, a shifted and a slightly scaled gradient."""
    g = torch.Generator().manual_seed(3)
    old, noise, advantages = -torch.rand(4, 50, generator=g), *torch.randn(2, 4, 50, generator=g)
    batch = Batch(old + 0.3 * noise, old, advantages, torch.ones(4, 50), "")
    batch.mask[1, 20:] = 0
    _, gradient = differentiated(ek.policy_loss, *batch.args, clip_low=None, clip_high=None)
    moving = (gradient.abs() > 1e-3).nonzero()[::10]
    dropped = np.zeros((4, 50), dtype=bool)
    dropped[moving[:, 0], moving[:, 1]] = True
    out, gradient = differentiated(ek.clip_cov_loss, *batch.args, dropped=torch.from_numpy(dropped))
    right = ref.loss(*batch.arrays(), dropped=dropped)
    assert_matches(out, gradient, right)
    mistakes: dict[str, dict[str, Any]] = {
        "penalty instead of drop": {"dropped": None, "penalized": dropped},
        "nothing dropped": {"dropped": np.zeros_like(dropped)},
        "value kept": {"keep_value": True},
        "no clip": {"clip_low": None, "clip_high": None},
        "other clip": {"clip_high": 0.21},
        "other mode": {"mode": "seq-mean-token-mean"},
        "denominator without the dropped": {"batch_num_tokens": float(batch.mask.sum() - dropped.sum())},
    }
    for name, wrong in mistakes.items():
        with pytest.raises(AssertionError, match=r"loss|gradient"):
            assert_matches(out, gradient, ref.loss(*batch.arrays(), **{"dropped": dropped, **wrong}), name=name)
    for name, changed in {
        "zero": torch.zeros_like(gradient),
        "shifted": gradient.roll(1, -1),
        "scaled": gradient * (1 + 1e-4),
        "one token's lost": torch.where(torch.arange(50) == 7, 0, gradient),
        "NaN": torch.full_like(gradient, float("nan")),
    }.items():
        with pytest.raises(AssertionError, match="gradient of logprob"):
            assert_matches(out, changed, right, name=name)
