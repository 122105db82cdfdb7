"""What trainers ask of a loss beside its surrogate: weights, packed rows, per-token losses, seeds, schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from entropy_kernels.losses import kl_estimate
from loss_cases import MODES, ek, leaf

pytestmark = pytest.mark.usefixtures("loss_place")

NAN, INF = float("nan"), float("inf")
LENGTHS = (3, 7, 0, 2)  # of the packed sequences
LOSSES: dict[str, Callable[..., Any]] = {
    "policy": ek.policy_loss,
    "clip_cov": lambda *a, **k: ek.clip_cov_loss(*a, seed=3, ratio=0.3, low=-9.0, high=9.0, **k),
    "kl_cov": lambda *a, **k: ek.kl_cov_loss(*a, ratio=0.3, **k),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded rows of the lengths, and NaN behind them."""
    g = torch.Generator().manual_seed(11)
    shape = (len(LENGTHS), max(LENGTHS))
    old = -3 * torch.rand(shape, generator=g, dtype=dtype)
    lp = old + 0.3 * torch.randn(shape, generator=g, dtype=dtype)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    return *(torch.where(mask, x, NAN) for x in (lp, old, torch.randn(shape, generator=g, dtype=dtype))), mask


def packed(*tensors: Tensor) -> list[Tensor]:
    """Without the padding, in one row."""
    mask = batch()[3]
    return [x[mask][None] for x in tensors]


CU_SEQLENS = torch.tensor((0, 3, 10, 10, 12), dtype=torch.int32)


def differentiated(loss: Callable[..., Any], lp: Tensor, *rest: Any, **options: Any) -> tuple[Any, Tensor]:
    x = leaf(lp)
    out = loss(x, *rest, **options)
    out.loss.sum().backward()
    assert x.grad is not None
    return out, x.grad


# ---- packed rows, aggregation ---------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_are_the_padded_ones(loss: Callable[..., Any], mode: str) -> None:
    lp, old, adv, mask = batch()
    options: dict[str, Any] = {"loss_agg_mode": mode, "loss_scale_factor": 5}
    index = torch.arange(mask.numel()).view(mask.shape)
    if loss is not ek.policy_loss:
        options["token_index"] = index
    padded, gradient = differentiated(loss, lp, old, adv, mask, **options)
    row = packed(lp, old, adv)
    if loss is not ek.policy_loss:
        (options["token_index"],) = packed(index)
    for shape in ((1, -1), (-1,)):
        tensors = [x.view(shape) for x in row]
        if "token_index" in options:
            options["token_index"] = options["token_index"].view(shape)
        out, own = differentiated(loss, *tensors, None, cu_seqlens=CU_SEQLENS, **options)
        torch.testing.assert_close(out.loss, padded.loss)
        torch.testing.assert_close(own.view(-1), gradient[mask])
        torch.testing.assert_close(out.metrics, padded.metrics)


def test_a_packed_row_counts_its_sequences() -> None:
    """Case of a user: 12 tokens of 3 sequences; the mean of their means is not the mean of the tokens."""
    losses = torch.arange(12.0)[None]
    zeros, cu_seqlens = torch.zeros(1, 12), torch.tensor([0, 3, 10, 12])
    options: dict[str, Any] = {"loss_agg_mode": "seq-mean-token-mean"}
    out = ek.policy_loss(zeros, zeros, -losses, None, cu_seqlens=cu_seqlens, **options)
    assert float(out.loss) == pytest.approx((1 + 6 + 10.5) / 3)
    assert float(ek.policy_loss(zeros, zeros, -losses, None, **options).loss) == pytest.approx(5.5)  # one sequence


def test_advantages_per_packed_sequence() -> None:
    lp, old, _, mask = batch()
    per_sequence = torch.tensor([1.0, -2.0, 5.0, 0.5], dtype=torch.float64)
    padded, gradient = differentiated(ek.policy_loss, lp, old, per_sequence, mask, token_weight=per_sequence.abs())
    row = packed(lp, old)
    for given in (per_sequence, per_sequence[:, None]):
        out, own = differentiated(
            ek.policy_loss, *row, given, None, cu_seqlens=CU_SEQLENS, token_weight=per_sequence.abs()
        )
        torch.testing.assert_close(out.loss, padded.loss)
        torch.testing.assert_close(own.view(-1), gradient[mask])


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        (torch.tensor([0, 3]), r"cu_seqlens: expected numbers that rise from 0 to the number of .*, 12, got \[0, 3\]"),
        (torch.tensor([0, 7, 3, 12]), "cu_seqlens: expected numbers that rise"),
        (torch.tensor([1, 12]), "cu_seqlens: expected numbers that rise"),
        (torch.tensor([0.0, 12.0]), "cu_seqlens: expected dtype"),
        (torch.zeros(2, 2, dtype=torch.int64), r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(2, 2\)"),
        ([0, 12], "cu_seqlens: expected a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_wrong_boundaries(cu_seqlens: Any, words: str) -> None:
    zeros = torch.zeros(1, 12)
    with pytest.raises((TypeError, ValueError), match=words):
        ek.policy_loss(zeros, zeros, zeros, None, cu_seqlens=cu_seqlens)


@every_loss
def test_losses_per_token(loss: Callable[..., Any]) -> None:
    """What their aggregate is made of, and their gradient for any factors."""
    lp, old, adv, mask = batch()
    terms: dict[str, Any] = {"ref_logprob": old - 0.1, "ref_kl_coef": 0.3}
    none = loss(leaf(lp), old, adv, mask, loss_agg_mode="none", **terms)
    assert none.loss.shape == mask.shape and (none.loss[~mask] == 0).all()
    for mode in MODES:
        out, gradient = differentiated(loss, lp, old, adv, mask, loss_agg_mode=mode, **terms)
        x = leaf(lp)
        per_token = loss(x, old, adv, mask, loss_agg_mode="none", **terms).loss
        total = ek.aggregate(per_token, mask, loss_agg_mode=mode)
        total.backward()
        torch.testing.assert_close(total, out.loss)
        torch.testing.assert_close(x.grad, gradient)
    # as a trainer packs: losses of a row, reduced by its own rule
    (row,) = packed(per_token.detach())
    total = ek.aggregate(row, None, loss_agg_mode="seq-mean-token-sum", cu_seqlens=CU_SEQLENS)
    torch.testing.assert_close(total, loss(lp, old, adv, mask, loss_agg_mode="seq-mean-token-sum", **terms).loss)


def test_aggregate_of_a_term_of_ones_own() -> None:
    term = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, INF]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    total = ek.aggregate(term, mask, loss_agg_mode="seq-mean-token-mean", dp_size=2, global_batch_size=4)
    total.backward()
    assert float(total.detach()) == 2 * (1.5 + 4) / 4
    torch.testing.assert_close(term.grad, torch.tensor([[0.25, 0.25, 0], [0.5, 0, 0]]))
    for error, words, options in (
        (ValueError, "loss_agg_mode: expected one of", {"loss_agg_mode": "mean"}),
        (ValueError, "batch_num_tokens: expected the number", {"dp_size": 2}),
    ):
        with pytest.raises(error, match=words):
            ek.aggregate(term, mask, **options)
    with pytest.raises(ValueError, match="mask: expected term's shape"):
        ek.aggregate(term, mask[:1])
    with pytest.raises(ValueError, match=r"term: expected \(\.\.\., sequences, tokens\)"):
        ek.aggregate(term[0], None, loss_agg_mode="seq-mean-token-sum")


# ---- weights, covariance, what is not finite ------------------------------------------------------------------------


@every_loss
def test_a_weight_multiplies_the_surrogate_and_nothing_else(loss: Callable[..., Any]) -> None:
    """Penalty included; not the selection, the entropy bonus, the reference KL or a metric."""
    lp, old, adv, mask = batch()
    weight = torch.where(mask, torch.rand(mask.shape, dtype=torch.float64) * 3, NAN)
    weight[0, 0] = 0
    terms: dict[str, Any] = {"ref_logprob": old - 0.1, "ref_kl_coef": 0.3, "entropy_coef": 0.1}

    def per_token(**options: Any) -> tuple[Any, Tensor]:
        return differentiated(loss, lp, old, adv, mask, loss_agg_mode="none", **options)

    plain, gradient = per_token()
    everything, of_all = per_token(entropy=leaf(lp), **terms)
    out, own = per_token(entropy=leaf(lp), token_weight=weight, **terms)
    factor = torch.where(mask, weight, 0)
    torch.testing.assert_close(out.loss, everything.loss + (factor - 1) * plain.loss)
    torch.testing.assert_close(own, of_all + (factor - 1) * gradient)
    for name, value in everything.metrics.items():
        if name != "pg_loss":
            torch.testing.assert_close(out.metrics[name], value)
    torch.testing.assert_close(out.metrics["pg_loss"], (factor * plain.loss).sum() / mask.sum())


def test_a_weight_of_0_stops_an_overflow() -> None:
    old, adv = torch.zeros(1, 3), torch.tensor([[-1.0, -1.0, -1.0]])
    lp, weight = torch.tensor([[500.0, 0.1, 0.2]]), torch.tensor([[0.0, 1.0, 1.0]])
    out, gradient = differentiated(ek.policy_loss, lp, old, adv, None, token_weight=weight, clip_high=None)
    assert out.loss.isfinite() and gradient.isfinite().all() and gradient[0, 0] == 0
    lp[0, 0] = NAN  # but not an input that is none
    assert differentiated(ek.policy_loss, lp, old, adv, None, token_weight=weight)[0].loss.isnan()


@pytest.mark.parametrize("loss", [LOSSES["clip_cov"], LOSSES["kl_cov"]])
def test_scaled_advantages_keep_their_covariance(loss: Callable[..., Any]) -> None:
    """A trainer that divides by N beforehand, and sums: the same tokens are selected, the loss is the mean."""
    lp, old, adv, mask = batch()
    count = int(mask.sum())
    expected, gradient = differentiated(loss, lp, old, adv, mask)
    penalty = {"kl_coef": 1 / count} if loss is LOSSES["kl_cov"] else {}
    out, own = differentiated(
        loss, lp, old, adv / count, mask, covariance_advantages=adv, loss_agg_mode="token-sum", **penalty
    )
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(own, gradient)
    for name in ("cov_mean", "cov_max", "selected_frac"):
        torch.testing.assert_close(out.metrics[name], expected.metrics[name])


@every_loss
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_can_be_dropped(loss: Callable[..., Any], which: int, value: float) -> None:
    """As if it were masked, but for the count; selection and metrics included."""
    tensors = list(batch())
    mask = tensors[3]
    tensors[which] = tensors[which].clone()
    tensors[which][1, 2] = value
    without = mask.clone()
    without[1, 2] = False
    for mode in MODES:
        out, gradient = differentiated(loss, *tensors, nonfinite="drop", loss_agg_mode=mode)
        expected, right = differentiated(loss, *tensors[:3], without, loss_agg_mode=mode)
        assert out.loss.isfinite()
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(gradient, right)
        assert float(out.metrics["nonfinite_tokens"]) == 1
        rest = {name: x for name, x in expected.metrics.items() if name != "nonfinite_tokens"}
        torch.testing.assert_close({name: out.metrics[name] for name in rest}, rest)
    everything = [torch.full_like(tensors[0], NAN), *tensors[1:3], None]
    out, gradient = differentiated(loss, *everything, nonfinite="drop")
    assert float(out.loss.detach()) == 0 and not gradient.any()
    assert float(out.metrics["nonfinite_tokens"]) == mask.numel()


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "gspo_token"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_reference_kl_times_the_ratio(surrogate: str, estimator: str) -> None:
    """Against autograd of KL · ratio, the ratio being the one that the surrogate uses."""
    lp, old, adv, mask = (torch.where(torch.isnan(x), 0, x) if x.dtype != torch.bool else x for x in batch())
    ref = old - 0.2
    options: dict[str, Any] = {"surrogate": surrogate, "loss_agg_mode": "seq-mean-token-mean"}
    plain, own = differentiated(ek.policy_loss, lp, old, adv, mask, **options)
    out, gradient = differentiated(
        ek.policy_loss, lp, old, adv, mask, ref_logprob=ref, ref_kl_coef=0.7, kl_estimator=estimator,
        ref_kl_importance=True, **options,
    )  # fmt: skip
    x = leaf(lp)
    log_ratio = x - old
    if surrogate != "ppo":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean if surrogate == "gspo" else mean.detach() + x - x.detach()
    term = kl_estimate(x - ref, estimator) * log_ratio.exp()
    added = 0.7 * ek.aggregate(term, mask, loss_agg_mode="seq-mean-token-mean")
    added.backward()
    torch.testing.assert_close(out.loss, plain.loss + added.detach())
    torch.testing.assert_close(gradient, own + x.grad)  # type: ignore[operator]


@pytest.mark.parametrize("surrogate", ["ppo", "gspo"])
def test_the_kl_coefficient_has_the_gradient_of_what_it_multiplies(surrogate: str) -> None:
    lp, old, adv, mask = batch()
    options: dict[str, Any] = {"surrogate": surrogate, "ref_logprob": old - 0.3, "ref_kl_importance": True}
    coefficient = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    ek.policy_loss(lp, old, adv, mask, ref_kl_coef=coefficient, **options).loss.backward()
    low, high = (ek.policy_loss(lp, old, adv, mask, ref_kl_coef=x, **options).loss for x in (0.0, 1.0))
    torch.testing.assert_close(coefficient.grad, high - low)


def test_a_coefficient_changed_before_the_backward_pass_is_told() -> None:
    lp, old, adv, mask = batch()
    coefficient = torch.tensor(0.1)
    loss = ek.policy_loss(leaf(lp), old, adv, mask, entropy=leaf(lp), entropy_coef=coefficient).loss
    coefficient.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "gmpo"])
def test_what_comes_in_at_padding_goes_nowhere(surrogate: str) -> None:
    """0 · NaN from a caller's own mask is NaN before it gets here."""
    lp, old, adv, mask = batch()
    options: dict[str, Any] = {"surrogate": surrogate, "loss_agg_mode": "none"}
    x, y = leaf(lp), leaf(lp)
    upstream = torch.rand(mask.shape, dtype=torch.float64)
    (ek.policy_loss(x, old, adv, mask, **options).loss * upstream).sum().backward()
    (ek.policy_loss(y, old, adv, mask, **options).loss * torch.where(mask, upstream, NAN))[mask].sum().backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_a_contribution_of_ones_own_is_masked() -> None:
    """Of a token in padding: it counts neither in the sequence's mean nor in the gradient."""
    own = ek.Surrogate(
        lambda d, lp, a, o: (-a * d, -a, None), level="sequence",
        contribution=lambda d, a, o: (d.exp(), d.exp(), None),
    )  # fmt: skip
    lp, old, adv, mask = batch()
    for mode in ("token-mean", "seq-mean-token-mean"):
        wide, gradient = differentiated(ek.policy_loss, lp, old, adv, mask, surrogate=own, loss_agg_mode=mode)
        row, packed_gradient = differentiated(
            ek.policy_loss, *packed(lp, old, adv), None, surrogate=own, loss_agg_mode=mode, cu_seqlens=CU_SEQLENS
        )
        torch.testing.assert_close(wide.loss, row.loss)
        torch.testing.assert_close(gradient[mask], packed_gradient.view(-1))
        assert not gradient[~mask].any()


def test_covariance_advantages_that_are_not_finite_are_not_hidden() -> None:
    lp, old, adv, mask = batch()
    scored = adv.clone()
    scored[1, 2] = NAN
    out = ek.policy_loss(lp, old, adv, mask, covariance_advantages=scored)
    assert out.loss.isnan() and float(out.metrics["nonfinite_tokens"]) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.int64])
def test_numbers_of_every_dtype_are_their_values(dtype: torch.dtype) -> None:
    """1 - clip is not computed in a dtype that wraps or rounds."""
    lp, old, adv, mask = batch()
    value = torch.tensor(1, dtype=dtype) if not dtype.is_floating_point else torch.tensor(0.2, dtype=dtype)
    for options in ({"clip_low": value}, {"clip_low": value, "clip_high": value}, {"ref_kl_coef": value}):
        plain = {name: float(x) for name, x in options.items()}
        more = {"ref_logprob": old}
        torch.testing.assert_close(
            ek.policy_loss(lp, old, adv, mask, **options, **more).loss,
            ek.policy_loss(lp, old, adv, mask, **plain, **more).loss,
        )
    with pytest.raises(TypeError, match=r"clip_low: expected a number, got torch.bool"):
        ek.policy_loss(lp, old, adv, mask, clip_low=torch.tensor(True))


def test_boundaries_that_nobody_checks_write_nowhere() -> None:
    """Compiled code reads no values: what is wrong is asserted where it runs, and no memory is touched before."""
    lp, old, adv = packed(*batch()[:3])
    torch._dynamo.reset()
    compiled = torch.compile(ek.policy_loss, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"surrogate": "gspo", "loss_agg_mode": "seq-mean-token-mean"}
    right = compiled(lp, old, adv, None, cu_seqlens=CU_SEQLENS, **options).loss
    torch.testing.assert_close(right, ek.policy_loss(lp, old, adv, None, cu_seqlens=CU_SEQLENS, **options).loss)
    for wrong in ([0, 30, 10, 10, 12], [0, 3, 10, 10, 50], [5, 3, 10, 10, 12], [0, -7, 10, 10, 12]):
        with pytest.raises(RuntimeError, match="cu_seqlens: expected numbers that rise"):
            compiled(lp, old, adv, None, cu_seqlens=torch.tensor(wrong, dtype=torch.int32), **options)


def test_coefficients_have_gradients() -> None:
    """A temperature that is learned: the entropy bonus and the KL are linear in theirs."""
    lp, old, adv, mask = batch()
    entropy_coef, ref_kl_coef = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.2))
    out = ek.policy_loss(
        leaf(lp), old, adv, mask, entropy=leaf(lp), entropy_coef=entropy_coef, ref_logprob=old - 0.1,
        ref_kl_coef=ref_kl_coef,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(entropy_coef.grad, -out.metrics["entropy"])
    torch.testing.assert_close(ref_kl_coef.grad, out.metrics["ref_kl"])


# ---- seeds and schedules --------------------------------------------------------------------------------------------


def test_seeds_that_nobody_counts() -> None:
    """Call after call another draw, the same again from a saved state, with the module and without it."""
    lp, old, adv, mask = batch()
    options: dict[str, Any] = {"ratio": 0.2, "low": -9.0, "high": 9.0}

    def drawn(seed: Any) -> Tensor:
        return ek.clip_cov_loss(lp, old, adv, mask, seed=seed, loss_agg_mode="none", **options).loss

    counter, criterion = ek.SeedCounter(5), ek.ClipCovLoss(seed=5, loss_agg_mode="none", **options)
    first = [drawn(counter) for _ in range(3)]
    assert len({tuple(x.view(-1).tolist()) for x in first}) > 1
    assert all(torch.equal(drawn(5 + i), x) for i, x in enumerate(first))
    assert all(torch.equal(criterion(lp, old, adv, mask).loss, x) for x in first)
    saved = criterion.state_dict(), counter.state_dict()
    resumed, again = ek.ClipCovLoss(seed=5, loss_agg_mode="none", **options), ek.SeedCounter(5)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert torch.equal(resumed(lp, old, adv, mask).loss, drawn(8)) and torch.equal(drawn(again), drawn(8))
    criterion(lp, old, adv, mask, seed=1)
    assert int(criterion.state_dict()["seeds.calls"]) == 3
    with pytest.raises(ValueError, match="mask: expected"):
        ek.clip_cov_loss(lp, old, adv, mask[:1], seed=counter)
    assert int(counter.state_dict()["calls"]) == 3  # a refused call does not count
    plain = ek.ClipCovLoss()
    plain(lp, old, adv, mask, dropped=torch.zeros_like(mask))
    assert int(plain.state_dict()["seeds.calls"]) == 0


SCHEDULED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "policy": (ek.policy_loss, {}, ("clip_low", "clip_high", "entropy_coef", "ref_kl_coef")),
    "policy, dual": (ek.policy_loss, {}, ("dual_clip",)),
    "sapo": (ek.policy_loss, {"surrogate": "sapo"}, ("tau_pos", "tau_neg")),
    "clip_cov": (ek.clip_cov_loss, {"seed": torch.tensor(1)}, ("clip_low", "ratio", "low", "high")),
    "kl_cov": (ek.kl_cov_loss, {}, ("kl_coef", "k")),
}


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_numbers_that_schedules_change_do_not_compile_anew(name: str, tensors: bool) -> None:
    function, fixed, changing = SCHEDULED[name]
    data = batch()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(7):
        options: dict[str, Any] = dict(fixed)
        for i, option in enumerate(changing):
            value = (2 if option == "dual_clip" else 9 * i if option == "high" else 0) + 0.05 * (step + 1)
            value = step + 1 if option == "k" else value
            options[option] = torch.tensor(value) if tensors else value
        if "entropy_coef" in changing:
            options |= {"entropy": leaf(data[0]), "ref_logprob": data[1]}
        expected, gradient = differentiated(function, *data, **options)
        out, own = differentiated(compiled, *data, **options)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(own, gradient)
        torch.testing.assert_close(dict(out.metrics), expected.metrics)
    assert counter.frame_count <= (1 if tensors else 2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected 'propagate' or 'drop', got 'ignore'"),
        ({"surrogate": "grpo2"}, ValueError, "surrogate: expected an ek.Surrogate or one of ppo, gspo.*got 'grpo2'"),
        (
            {"surrogate": "sapo", "tau": 1.0},
            TypeError,
            "tau: expected one of the loss's keywords.*tau_pos, tau_neg; got tau",
        ),
        ({"epsilon": 0.2}, TypeError, "epsilon: expected one of the loss's keywords.*docs/migration.md"),
        ({"clip_hihg": 0.2}, TypeError, r"clip_hihg: .*did you mean clip_high\?"),
        ({"tau_pos": 1.0}, TypeError, "tau_pos is an option of surrogate='sapo'"),
        ({"surrogate": "dapo"}, ValueError, "surrogate: .*did you mean 'ppo'"),
        ({"surrogate": max}, TypeError, "surrogate: .*wrap it"),
        (
            {"surrogate": ek.Surrogate(lambda d, lp, a, o: (a, a))},
            TypeError,
            r"surrogate: expected fn to return \(value",
        ),
        (
            {"surrogate": ek.Surrogate(lambda d, lp, a, o: (a.bfloat16(), a, None))},
            TypeError,
            "surrogate: .*got .*bfloat16",
        ),
        ({"surrogate": ek.Surrogate(lambda d, lp, a, o: (a, a[0], None))}, TypeError, r"surrogate: .*of shape \(7,\)"),
        (
            {"surrogate": ek.Surrogate(lambda d, lp, a, o: (a, a, None), defaults={"clip_low": 0.1})},
            ValueError,
            "surrogate: expected defaults that are no keywords of the loss, got clip_low",
        ),
        ({"token_weight": torch.zeros(5)}, ValueError, "token_weight: expected logprob's shape"),
        ({"covariance_advantages": 3.0}, TypeError, "covariance_advantages: expected a torch.Tensor, got float"),
        ({"clip_low": torch.zeros(2)}, ValueError, "clip_low: expected a number or a 0-d tensor"),
        ({"clip_low": torch.tensor(0.1, requires_grad=True)}, ValueError, "clip_low: expected a constant"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        ek.policy_loss(*batch(), **options)
    flat = [x.view(-1) for x in batch()]
    with pytest.raises(ValueError, match=r"logprob: expected .* with surrogate='gspo', or cu_seqlens"):
        ek.policy_loss(*flat, surrogate="gspo")
