"""The cases of tests/cases.py that concern losses, value and gradient, on every loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import BackendDevice
from loss_cases import MASK_DTYPES, MODES, assert_same, differentiated, ek, leaf, ragged

pytestmark = pytest.mark.usefixtures("loss_on")

NAN, INF = float("nan"), float("inf")
# name -> function and options; the selecting ones pick a fifth of the tokens so that something happens
LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "policy": (ek.policy_loss, {}),
    "policy_dual": (ek.policy_loss, {"dual_clip": 3.0}),
    "clip_cov_verl": (ek.clip_cov_loss, {"seed": 1, "ratio": 0.2, "low": -9.0, "high": 9.0}),
    "clip_cov_paper": (ek.clip_cov_loss, {"preset": "paper", "seed": 1, "ratio": 0.2, "low": -9.0, "high": 9.0}),
    "clip_cov_quantile": (ek.clip_cov_loss, {"seed": 1, "ratio": 0.2, "band": "quantile", "low": 0.1, "high": 0.9}),
    "kl_cov_verl": (ek.kl_cov_loss, {"ratio": 0.2}),
    "kl_cov_paper": (ek.kl_cov_loss, {"preset": "paper", "ratio": 0.2}),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def sample(rows: int = 4, length: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first sequence is fully masked."""
    return ragged([min(4 * row, length) for row in range(rows)], length)


def run(name: str, lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor | None, **options: Any) -> tuple[Any, Tensor]:
    function, defaults = LOSSES[name]
    out, gradient = differentiated(function, lp, old, adv, mask, **{**defaults, **options})
    assert out.loss.requires_grad and out.loss.dim() == 0
    return out, gradient


# ---- 1. nothing, one token, all masked ------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
def test_without_a_valid_token_the_loss_is_a_differentiable_zero(name: str, mode: str, shape: tuple[int, int]) -> None:
    lp = torch.full(shape, NAN)
    out, gradient = run(name, lp, lp, lp, torch.zeros(shape), loss_agg_mode=mode)
    assert float(out.loss.detach()) == 0
    assert (gradient == 0).all()
    assert all(float(value) == 0 for value in out.metrics.values()), out.metrics


@every_loss
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_batch_without_tokens_is_zero_too(name: str, mode: str, tensor: bool) -> None:
    lp = torch.zeros(2, 3)
    nothing = torch.tensor(0) if tensor else 0
    out, gradient = run(name, lp, lp, lp, lp, loss_agg_mode=mode, batch_num_tokens=nothing, global_batch_size=nothing)
    assert float(out.loss.detach()) == 0 and (gradient == 0).all()


@every_loss
def test_one_valid_token(name: str) -> None:
    """Its covariance is 0; the strict and the closed wide band hold it, so Clip-Cov may drop it: n is at least 1."""
    lp, old, adv, _ = sample()
    mask = torch.zeros_like(lp)
    mask[2, 3] = 1
    out, gradient = run(name, lp, old, adv, mask)
    assert math.isfinite(float(out.loss.detach()))
    assert (gradient != 0).sum() <= 1
    if name == "clip_cov_verl":
        assert float(out.metrics["selected_frac"]) == 1 and float(out.loss.detach()) == 0
    if name == "clip_cov_paper":
        assert float(out.metrics["selected_frac"]) == 0  # floor(0.2 · 1) = 0


@every_loss
def test_fully_masked_sequences_change_nothing(name: str) -> None:
    tensors = [*sample(), torch.arange(40).view(4, 10)]

    def of_rows(first: int) -> tuple[Any, Tensor]:
        *batch, index = (x[first:] for x in tensors)
        more = {} if name.startswith("policy") else {"token_index": index}
        return run(name, *batch, loss_agg_mode="seq-mean-token-mean", **more)

    out, gradient = of_rows(0)
    assert_same((out, gradient[1:]), of_rows(1))


# ---- 2. no covariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["verl", "paper"])
@pytest.mark.parametrize("case", ["equal_advantages", "one_sequence"])
def test_clip_cov_without_covariance_is_the_policy_loss(case: str, preset: str) -> None:
    lp, old, _, mask = sample()
    adv = torch.full((4, 1), 0.3)
    if case == "one_sequence":
        lp, old, mask, adv = lp[3:], old[3:], mask[3:], torch.tensor([[1.7]])
    clip = {} if preset == "verl" else {"clip_low": None, "clip_high": None}
    plain = differentiated(ek.policy_loss, lp, old, adv, mask, **clip)
    out, gradient = differentiated(ek.clip_cov_loss, lp, old, adv, mask, preset=preset, seed=0, ratio=1.0)
    assert torch.equal(out.loss, plain[0].loss) and torch.equal(gradient, plain[1])
    assert float(out.metrics["selected_frac"]) == 0


# ---- 3. bands and counts --------------------------------------------------------------------------------------------


def test_covariance_on_a_bound() -> None:
    """lp ±1 and A ±1: every covariance is exactly 1, inside [1, 5] and outside (1, 5)."""
    lp = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    closed = ek.clip_cov_loss(lp, lp, lp, None, preset="paper", seed=0, ratio=0.5)
    strict = ek.clip_cov_loss(lp, lp, lp, None, preset="verl", seed=0, ratio=0.5)
    assert float(closed.metrics["selected_frac"]) == 0.5 and float(closed.metrics["band_frac"]) == 1
    assert float(strict.metrics["selected_frac"]) == 0 and float(strict.metrics["band_frac"]) == 0
    assert float(strict.metrics["cov_mean"]) == 1 == float(strict.metrics["cov_max"])


@pytest.mark.parametrize("preset", ["verl", "paper"])
def test_more_asked_for_than_there_is(preset: str) -> None:
    """Fewer candidates than n: all of them. k beyond N: all candidates."""
    lp, old, adv, mask = sample()
    for options in ({"ratio": 1.0}, {"k": 10**6}):
        out = ek.clip_cov_loss(lp, old, adv, mask, preset=preset, seed=0, low=0.1, high=0.5, **options)
        assert torch.equal(out.metrics["selected_frac"], out.metrics["band_frac"])
        assert 0 < float(out.metrics["selected_frac"]) < 1
        out = ek.kl_cov_loss(lp, old, adv, mask, preset=preset, **options)
        assert float(out.metrics["selected_frac"]) == 1


def test_a_quantile_band_selected_here_and_first() -> None:
    """Of the tokens that the PPO clip does not hold, with given indices; candidates are all of them in the band."""
    lp, old, adv, mask = sample(8, 40)
    index = torch.randperm(lp.numel(), generator=torch.Generator().manual_seed(2)).view_as(lp)
    held = (-adv * (lp - old).exp().clamp(0.8, 1.2) > -adv * (lp - old).exp()) & mask
    band: dict[str, Any] = {"band": "quantile", "low": 0.3, "high": 0.9}
    for preset, exclude in (("verl", held), ("paper", None)):
        here = run("clip_cov_verl", lp, old, adv, mask, preset=preset, token_index=index, **band)
        chosen: dict[str, Any] = {"exclude": exclude, "seed": 1, "closed": preset == "paper", **band}
        cov = ek.token_covariance(lp, adv, mask)
        dropped = ek.clip_cov_mask(cov, mask, ratio=0.2, token_index=index, **chosen)
        first, gradient = differentiated(ek.clip_cov_loss, lp, old, adv, mask, preset=preset, dropped=dropped)
        assert torch.equal(here[0].loss, first.loss) and torch.equal(here[1], gradient)
        share = ek.clip_cov_mask(cov, mask, k=10**6, **chosen).sum() / mask.sum()
        assert 0 < float(first.metrics["selected_frac"]) < float(here[0].metrics["band_frac"]) == pytest.approx(share)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("policy")])
def test_the_backend_of_the_selection_changes_nothing(name: str, loss_on: BackendDevice) -> None:
    names = [loss_on.backend] if loss_on.device == "cuda" else ["auto", "cpu", "triton"]
    states = ek.backends()["clip_cov_mask"] | {"auto": "available"}
    batch = sample()
    expected = run(name, *batch, backend="torch")
    for backend in names:
        if states[backend] == "available":
            assert_same(run(name, *batch, backend=backend), expected, rtol=0, atol=0)


# ---- 4. what is not finite ------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e38])
def test_padding_does_not_leak(name: str, garbage: float) -> None:
    lp, old, adv, mask = sample()
    terms = {"entropy_coef": 0.1, "ref_kl_coef": 0.1}
    clean = run(name, lp, old, adv, mask, entropy=leaf(lp), ref_logprob=old + 0.1, **terms)
    *dirty, ref = (torch.where(mask, x, garbage) for x in (lp, old, adv, old + 0.1))
    entropy = leaf(torch.where(mask, lp, garbage))
    out = run(name, *dirty, mask, entropy=entropy, ref_logprob=ref, **terms)
    assert_same(out, clean)
    assert (out[1][~mask] == 0).all() and entropy.grad is not None and (entropy.grad[~mask] == 0).all()


NAMES = ("logprob", "old_logprob", "advantages", "entropy", "ref_logprob", "covariance_advantages")


@every_loss
@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_nonfinite_valid_token_is_never_hidden(name: str, which: str, value: float) -> None:
    """Not by a PPO clip, not by k3's clamps, not by a ratio of 0."""
    lp, old, adv, mask = sample()
    tensors = dict(zip(NAMES, (lp, old, adv, lp.abs(), old + 0.1, adv.clone()), strict=True))
    tensors[which][2, 1] = value
    *positional, entropy, ref, scored = tensors.values()
    out, _ = run(
        name, *positional, mask, entropy=leaf(entropy), entropy_coef=0.1, ref_logprob=ref, ref_kl_coef=0.1,
        covariance_advantages=scored if which == "covariance_advantages" else None,
    )  # fmt: skip
    assert not out.loss.isfinite()
    assert float(out.metrics["nonfinite_tokens"]) == 1


@every_loss
def test_a_nonfinite_token_poisons_only_its_own_gradient(name: str) -> None:
    lp, old, adv, mask = sample()
    lp[2, 1] = -INF
    _, gradient = run(name, lp, old, adv, mask)
    assert gradient[2, 1].isnan() and int(gradient.isnan().sum()) == 1


def test_a_dropped_nonfinite_token_is_not_hidden() -> None:
    lp, old, adv, mask = sample()
    dropped = torch.zeros_like(mask)
    dropped[2, 1] = True
    lp[2, 1] = NAN
    for preset in ("verl", "paper"):
        out = ek.clip_cov_loss(lp, old, adv, mask, preset=preset, dropped=dropped)
        assert out.loss.isnan() and float(out.metrics["nonfinite_tokens"]) == 1


@every_loss
def test_what_is_not_used_is_reported_and_no_more(name: str) -> None:
    """With coefficient 0, entropy and reference stay out of the loss; that they are not finite still shows."""
    lp, old, adv, mask = sample()
    bad = torch.full_like(lp, NAN)
    out, gradient = run(name, lp, old, adv, mask, entropy=bad, ref_logprob=bad)
    assert out.loss.isfinite() and gradient.isfinite().all()
    assert float(out.metrics["nonfinite_tokens"]) == float(mask.sum())
    assert out.metrics["entropy"].isnan() and out.metrics["ref_kl"].isnan()
    out, _ = run(name, lp, old, adv, mask, ref_logprob=torch.full_like(lp, -INF))
    assert out.loss.isfinite() and out.metrics["ref_kl"].isnan()  # which k3's clamps would make 5
    assert float(out.metrics["nonfinite_tokens"]) == float(mask.sum())


# ---- 5. overflow ----------------------------------------------------------------------------------------------------


def overflowing() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios of ±100 under positive and zero advantages, +100 under a negative one left out: it is infinite."""
    old = sample(1, 8)[1]
    delta = torch.tensor([[100.0, -100.0, 100.0, -100.0, -100.0, 0.1, 0.2, -0.3]])
    adv = torch.tensor([[1.0, 1.0, 0.0, 0.0, -1.0, 1.0, -1.0, 0.5]])
    return old + delta, old, adv, torch.ones(1, 8)


@pytest.mark.parametrize("name", ["policy", "policy_dual", "clip_cov_verl"])
def test_log_ratio_of_100_with_a_clip(name: str) -> None:
    """l1 = -inf is clipped to a finite l2, whose gradient is 0, not 0 · inf."""
    out, gradient = run(name, *overflowing(), **({"k": 0, "ratio": None} if name == "clip_cov_verl" else {}))
    assert out.loss.isfinite() and gradient.isfinite().all()
    assert gradient[0, 0] == 0 and gradient[0, 2] == 0 and gradient[0, 3] == 0
    expected = (-1.2 - math.exp(-100) + 0.8 - math.exp(0.1) + math.exp(0.2) - 0.8 * 0.5) / 8
    # -0.3 < log 0.8 under A > 0 is not clipped: l1 = -0.5 e^-0.3 is the larger
    expected += (0.8 * 0.5 - 0.5 * math.exp(-0.3)) / 8
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(out.metrics["nonfinite_tokens"]) == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_ratio_of_100_dropped(advantage: float) -> None:
    """verl's listing multiplies by 0 here and makes NaN of inf · 0; dropped means 0 in value and gradient."""
    lp, old, adv, mask = overflowing()
    adv = torch.full_like(adv, advantage)
    dropped = lp - old > 50
    for clip in (None, 0.2):
        clips = {"clip_low": clip, "clip_high": clip}
        out, gradient = differentiated(ek.clip_cov_loss, lp, old, adv, mask, dropped=dropped, **clips)
        assert gradient.isfinite().all() and (gradient[dropped] == 0).all()
        *rest, none = (x[~dropped] for x in (lp, old, adv, dropped))
        expected = ek.clip_cov_loss(*rest, None, dropped=none, batch_num_tokens=8, **clips)
        torch.testing.assert_close(out.loss, expected.loss)


def test_log_ratio_of_100_dropped_by_the_paper_keeps_its_value() -> None:
    lp, old, adv, mask = overflowing()
    out, gradient = differentiated(ek.clip_cov_loss, lp, old, adv, mask, preset="paper", dropped=lp - old > 50)
    assert float(out.loss.detach()) == -INF and float(out.metrics["nonfinite_tokens"]) == 1
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_overflow_that_no_clip_holds_shows(dual_clip: float | None) -> None:
    """A < 0 and a ratio of e^100: an infinite loss, which is counted; the dual clip bounds it."""
    lp, old, adv, mask = overflowing()
    adv[0, 0] = -2.0
    out, gradient = run("policy", lp, old, adv, mask, dual_clip=dual_clip)
    if dual_clip is None:
        assert float(out.loss.detach()) == INF and float(out.metrics["nonfinite_tokens"]) == 1
        assert gradient[0, 1:].isfinite().all()
    else:
        assert out.loss.isfinite() and gradient.isfinite().all() and gradient[0, 0] == 0
        assert float(out.metrics["clipfrac_lower"]) == 1 / 8


@pytest.mark.parametrize("estimator", ["abs", "k1", "k2", "k3", "k3+"])
def test_kl_terms_at_log_ratio_100(estimator: str) -> None:
    lp, old, adv, mask = overflowing()
    adv = torch.where(lp - old > 50, 0.0, adv)
    out, gradient = differentiated(
        ek.kl_cov_loss, lp, old, adv, mask, penalized=(lp - old).abs() > 50, penalty_estimator=estimator,
        ref_logprob=old, ref_kl_coef=0.1, kl_estimator=estimator,
    )  # fmt: skip
    assert out.loss.isfinite() and gradient.isfinite().all()


def test_kl_cov_is_inert_on_policy() -> None:
    """sign(0) = 0: the first update after a rollout is that of the policy loss without a clip."""
    _, old, adv, mask = sample()
    penalised = differentiated(ek.kl_cov_loss, old, old, adv, mask, ratio=1.0, kl_coef=100.0)
    plain = differentiated(ek.policy_loss, old, old, adv, mask, clip_low=None, clip_high=None)
    assert torch.equal(penalised[0].loss, plain[0].loss) and torch.equal(penalised[1], plain[1])


# ---- 10, 13, 14, 16: layouts, gradients, inputs, masks --------------------------------------------------------------


@every_loss
def test_strides_and_mask_dtypes_do_not_matter(name: str) -> None:
    lp, old, adv, mask = sample()
    plain = run(name, lp, old, adv, mask)
    wide = torch.full((10, 9), NAN)
    view = wide.t()[:4, :].t().t()  # (4 of 9, 10), transposed
    wide.t()[:4].copy_(lp)
    strided = run(name, view, old.t().contiguous().t(), adv.repeat(1, 2)[:, :10], mask.t().contiguous().t())
    assert_same(strided, plain)
    for dtype in MASK_DTYPES:
        assert_same(run(name, lp, old, adv, mask.to(dtype)), plain)


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_dtypes_of_given_selections(dtype: torch.dtype) -> None:
    lp, old, adv, mask = sample()
    chosen = torch.rand(lp.shape, generator=torch.Generator().manual_seed(1)) < 0.5  # some in padding: ignored
    for function, name in ((ek.clip_cov_loss, "dropped"), (ek.kl_cov_loss, "penalized")):
        out = function(lp, old, adv, mask, **{name: chosen.to(dtype)})
        inside = function(lp, old, adv, mask, **{name: chosen & mask})
        assert torch.equal(out.loss, inside.loss)
        assert float(out.metrics["selected_frac"]) == pytest.approx(float((chosen & mask).sum() / mask.sum()))


@every_loss
def test_advantages_per_sequence(name: str) -> None:
    """(B,), (B, 1) and (B, L) say the same, in a square batch too, where (B,) could be read as one per position."""
    lp, old, _, mask = sample(4, 4)
    adv = torch.randn(4, generator=torch.Generator().manual_seed(0))
    full = run(name, lp, old, adv[:, None].repeat(1, 4), mask)
    for same in (adv, adv[:, None], adv.double()):
        assert_same(run(name, lp, old, same, mask), full)


@every_loss
def test_packed_tokens_and_more_dimensions(name: str) -> None:
    lp, old, adv, mask = sample()
    plain = run(name, lp, old, adv, mask)
    flat = run(name, *(x.flatten() for x in (lp, old, adv, mask)))
    torch.testing.assert_close(flat[0].loss, plain[0].loss)
    torch.testing.assert_close(flat[1].view(4, 10), plain[1])
    by_sequence = run(name, lp, old, adv, mask, loss_agg_mode="seq-mean-token-sum")
    grouped = run(name, *(x.view(2, 2, 10) for x in (lp, old, adv, mask)), loss_agg_mode="seq-mean-token-sum")
    torch.testing.assert_close(grouped[0].loss, by_sequence[0].loss)


@every_loss
def test_inputs_are_never_changed_and_without_grad_nothing_is_recorded(name: str) -> None:
    function, options = LOSSES[name]
    tensors = sample()
    before = [x.clone() for x in tensors]
    out, _ = run(name, *tensors)
    with torch.no_grad():
        quiet = function(leaf(tensors[0]), *tensors[1:], **options)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss.detach())


# clip_cov_paper keeps a dropped token's value
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "clip_cov_paper"])
@pytest.mark.parametrize("mode", ["token-mean", "none"])
def test_gradients_in_float64(name: str, mode: str) -> None:
    """Against finite differences, by the log-probs and by the entropy."""
    function, options = LOSSES[name]
    lp, old, adv, mask = (x.double() if x.is_floating_point() else x for x in sample(3, 6))
    terms = {"entropy_coef": 0.1, "ref_logprob": old + 0.1, "ref_kl_coef": 0.2, "loss_agg_mode": mode, **options}

    def loss(logprob: Tensor, entropy: Tensor) -> Tensor:
        return function(logprob, old, adv, mask, entropy=entropy, **terms).loss

    assert torch.autograd.gradcheck(loss, (leaf(lp), leaf(lp.abs())), eps=1e-7, atol=1e-5)


@every_loss
def test_derivatives_that_there_are_not(name: str) -> None:
    """Second ones, forward mode, torch.func: an error, not a silent zero."""
    function, options = LOSSES[name]
    lp, old, adv, mask = sample()
    x = leaf(lp)
    (gradient,) = torch.autograd.grad(function(x, old, adv, mask, **options).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss: double backward"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lp, torch.ones_like(lp))
        with pytest.raises(NotImplementedError, match="policy_loss: forward-mode"):
            function(dual, old, adv, mask, **options)
    words = r"policy_loss: torch\.func's derivatives .* use torch\.autograd\.grad"
    with pytest.raises(NotImplementedError, match=words):
        torch.func.grad(lambda logprob: function(logprob, old, adv, mask, **options).loss)(lp)


@every_loss
def test_metrics_are_detached_tensors_by_their_names(name: str) -> None:
    lp, old, adv, mask = sample()
    out, _ = run(name, lp, old, adv, mask, entropy=leaf(lp), ref_logprob=old)
    expected = set(ek.losses.METRICS)
    if not name.startswith("clip_cov"):
        expected -= {"band_frac"}
    if name.startswith("policy"):
        expected -= {"selected_frac"}
    assert set(out.metrics) == expected
    for value in out.metrics.values():
        assert isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad


@every_loss
@pytest.mark.parametrize("mode", ["token-mean", "token-sum"])
def test_metrics_changed_in_place_change_nothing_else(name: str, mode: str) -> None:
    """As an all_reduce over ranks does, before the backward pass or after it."""
    function, options = LOSSES[name]
    lp, old, adv, mask = sample()
    expected, gradient = run(name, lp, old, adv, mask, loss_agg_mode=mode)
    x = leaf(lp)
    out = function(x, old, adv, mask, loss_agg_mode=mode, **options)
    for value in out.metrics.values():
        value.fill_(7)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss) and torch.equal(x.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_all_terms_are_rounded_once(dtype: torch.dtype) -> None:
    """The reference KL nearly cancels the policy term: each rounded by itself, little of the sum would be left."""
    lp, old, _, _ = sample()
    lp = lp.to(dtype)
    advantages = (1 + 1e-3 * torch.randn(lp.shape)) * torch.exp(old - lp.float())  # A·r is 1, nearly
    options: dict[str, Any] = {"clip_low": None, "clip_high": None, "ref_logprob": old, "kl_estimator": "k1"}
    _, gradient = run("policy", lp, old, advantages, None, ref_kl_coef=1.0, **options)
    _, exact = run("policy", lp.float(), old, advantages, None, ref_kl_coef=1.0, **options)
    assert torch.equal(gradient, exact.to(dtype))
