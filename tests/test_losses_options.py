"""What trainers ask of a loss beside its surrogate: weights, packed rows, per-token losses, seeds, schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from loss_cases import MODES, assert_same, differentiated, ek, leaf, ragged

pytestmark = pytest.mark.usefixtures("loss_on")

NAN, INF = float("nan"), float("inf")
LENGTHS = (3, 7, 0, 2)  # of the packed sequences
CU_SEQLENS = torch.tensor((0, 3, 10, 10, 12), dtype=torch.int32)
LOSSES: dict[str, Callable[..., Any]] = {
    "policy": ek.policy_loss,
    "clip_cov": lambda *a, **k: ek.clip_cov_loss(*a, seed=3, ratio=0.3, low=-9.0, high=9.0, **k),
    "kl_cov": lambda *a, **k: ek.kl_cov_loss(*a, ratio=0.3, **k),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded rows of the lengths, and NaN behind them."""
    return ragged(LENGTHS, dtype=torch.float64, padding=NAN)


def packed(*tensors: Tensor) -> list[Tensor]:
    """Without the padding, in one row."""
    mask = batch()[3]
    return [x[mask][None] for x in tensors]


# ---- packed rows, aggregation ---------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_are_the_padded_ones(loss: Callable[..., Any], mode: str) -> None:
    *tensors, mask = batch()
    options: dict[str, Any] = {"loss_agg_mode": mode, "loss_scale_factor": 5}
    index = torch.arange(mask.numel()).view(mask.shape)

    def indexed(index: Tensor) -> dict[str, Tensor]:
        return {} if loss is ek.policy_loss else {"token_index": index}

    padded, gradient = differentiated(loss, *tensors, mask, **options, **indexed(index))
    for shape in ((1, -1), (-1,)):
        *row, packed_index = (x.view(shape) for x in packed(*tensors, index))
        out, own = differentiated(loss, *row, None, cu_seqlens=CU_SEQLENS, **options, **indexed(packed_index))
        assert_same((out, own.view(-1)), (padded, gradient[mask]))


def test_a_packed_row_counts_its_sequences() -> None:
    """Case of a user: 12 tokens of 3 sequences; the mean of their means is not the mean of the tokens."""
    losses = torch.arange(12.0)[None]
    zeros, cu_seqlens = torch.zeros(1, 12), torch.tensor([0, 3, 10, 12])
    options: dict[str, Any] = {"loss_agg_mode": "seq-mean-token-mean"}
    out, gradient = differentiated(ek.policy_loss, zeros, zeros, -losses, None, cu_seqlens=cu_seqlens, **options)
    assert float(out.loss.detach()) == pytest.approx((1 + 6 + 10.5) / 3)
    share = torch.repeat_interleave(torch.tensor([1 / 9, 1 / 21, 1 / 6]), torch.tensor([3, 7, 2]))
    torch.testing.assert_close(gradient, losses * share)
    assert float(ek.policy_loss(zeros, zeros, -losses, None, **options).loss) == pytest.approx(5.5)  # one sequence


SEQUENCE_RATIOS = ("ppo", *(name for name, known in ek.surrogates().items() if known.level == "sequence"))


@pytest.mark.parametrize("surrogate", SEQUENCE_RATIOS)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_mask_leaves_of_packed_sequences(surrogate: str, mode: str) -> None:
    """Single tokens, a whole sequence, and padding behind the last one, which is a sequence of its own."""
    lp, old, adv, mask = batch()
    mask[1, 2] = mask[1, 6] = mask[3, :2] = False
    options: dict[str, Any] = {"loss_agg_mode": mode, "loss_scale_factor": 5, "surrogate": surrogate}
    padded, gradient = differentiated(ek.policy_loss, lp, old, adv, mask, **options)
    tokens = [torch.cat([row, torch.full((1, 4), NAN, dtype=row.dtype)], 1) for row in packed(lp, old, adv)]
    (valid,) = packed(mask)
    valid = torch.cat([valid, torch.zeros(1, 4, dtype=torch.bool)], 1)
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor([*CU_SEQLENS.tolist(), 16], dtype=dtype)
        out, own = differentiated(ek.policy_loss, *tokens, valid, cu_seqlens=cu_seqlens, **options)
        assert_same((out, own[:, :12][packed(mask)[0]]), (padded, gradient[mask]))
        assert not own[~valid].any()


def test_advantages_per_packed_sequence() -> None:
    lp, old, _, mask = batch()
    per_sequence = torch.tensor([1.0, -2.0, 5.0, 0.5], dtype=torch.float64)
    weight = per_sequence.abs()
    padded, gradient = differentiated(ek.policy_loss, lp, old, per_sequence, mask, token_weight=weight)
    for given in (per_sequence, per_sequence[:, None]):
        out, own = differentiated(
            ek.policy_loss, *packed(lp, old), given, None, cu_seqlens=CU_SEQLENS, token_weight=weight
        )
        torch.testing.assert_close((out.loss, own.view(-1)), (padded.loss, gradient[mask]))


@every_loss
def test_losses_per_token(loss: Callable[..., Any]) -> None:
    """What their aggregate is made of, and their gradient for any factors."""
    lp, old, adv, mask = batch()
    terms: dict[str, Any] = {"ref_logprob": old - 0.1, "ref_kl_coef": 0.3}
    for mode in MODES:
        out, gradient = differentiated(loss, lp, old, adv, mask, loss_agg_mode=mode, **terms)
        x = leaf(lp)
        per_token = loss(x, old, adv, mask, loss_agg_mode="none", **terms).loss
        assert per_token.shape == mask.shape and (per_token[~mask] == 0).all()
        total = ek.aggregate(per_token, mask, loss_agg_mode=mode)
        total.backward()
        torch.testing.assert_close((total, x.grad), (out.loss, gradient))
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
    expected = {**everything.metrics, "pg_loss": ((factor * plain.loss).sum() / mask.sum())}
    torch.testing.assert_close(out.metrics, expected)


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
    torch.testing.assert_close((out.loss, own), (expected.loss, gradient))
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
        expected = differentiated(loss, *tensors[:3], without, loss_agg_mode=mode)
        assert out.loss.isfinite() and float(out.metrics["nonfinite_tokens"]) == 1
        expected[0].metrics["nonfinite_tokens"].fill_(1)
        assert_same((out, gradient), expected)
    everything = [torch.full_like(tensors[0], NAN), *tensors[1:3], None]
    out, gradient = differentiated(loss, *everything, nonfinite="drop")
    assert float(out.loss.detach()) == 0 and not gradient.any()
    assert float(out.metrics["nonfinite_tokens"]) == mask.numel()


@pytest.mark.parametrize(("surrogate", "importance"), [("ppo", False), ("ppo", True), ("gspo", True)])
def test_coefficients_have_the_gradients_of_what_they_multiply(surrogate: str, importance: bool) -> None:
    """As of a temperature that is learned: the entropy bonus and the KL are linear in theirs."""
    lp, old, adv, mask = batch()
    options: dict[str, Any] = {"surrogate": surrogate, "ref_logprob": old - 0.3, "ref_kl_importance": importance}
    entropy_coef, ref_kl_coef = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.2))
    out, _ = differentiated(
        ek.policy_loss, lp, old, adv, mask, entropy=leaf(lp), entropy_coef=entropy_coef, ref_kl_coef=ref_kl_coef,
        **options,
    )  # fmt: skip
    low, high = (ek.policy_loss(lp, old, adv, mask, ref_kl_coef=x, **options).loss for x in (0.0, 1.0))
    torch.testing.assert_close(entropy_coef.grad, -out.metrics["entropy"])
    torch.testing.assert_close(ref_kl_coef.grad, high - low)
    if not importance:
        torch.testing.assert_close(ref_kl_coef.grad, out.metrics["ref_kl"])


def test_a_coefficient_changed_before_the_backward_pass_is_told() -> None:
    lp, old, adv, mask = batch()
    coefficient = torch.tensor(0.1, device=ek.device)  # else the loss would have a copy of it
    loss = ek.policy_loss(leaf(lp), old, adv, mask, entropy=leaf(lp), entropy_coef=coefficient).loss
    coefficient.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
        torch.testing.assert_close((wide.loss, gradient[mask]), (row.loss, packed_gradient.view(-1)))
        assert not gradient[~mask].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.int64])
def test_numbers_of_every_dtype_are_their_values(dtype: torch.dtype) -> None:
    """1 - clip is not computed in a dtype that wraps or rounds."""
    lp, old, adv, mask = batch()
    value = torch.tensor(0.2 if dtype.is_floating_point else 1, dtype=dtype)
    for options in ({"clip_low": value}, {"clip_low": value, "clip_high": value}, {"ref_kl_coef": value}):
        losses = [
            ek.policy_loss(lp, old, adv, mask, ref_logprob=old, **given).loss
            for given in (options, {name: float(x) for name, x in options.items()})
        ]
        torch.testing.assert_close(*losses)


def test_boundaries_that_nobody_checks_write_nowhere() -> None:
    """Compiled code reads no values: what is wrong is asserted where it runs, and no memory is touched before."""
    lp, old, adv = packed(*batch()[:3])
    torch._dynamo.reset()
    compiled = torch.compile(ek.policy_loss, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"surrogate": "gspo", "loss_agg_mode": "seq-mean-token-mean"}
    right = compiled(lp, old, adv, None, cu_seqlens=CU_SEQLENS, **options).loss
    torch.testing.assert_close(right, ek.policy_loss(lp, old, adv, None, cu_seqlens=CU_SEQLENS, **options).loss)
    if ek.device != "cpu":
        return  # a failed assertion on a GPU ends the process's use of it: test_hardware.py asks it in one of its own
    for wrong in ([0, 30, 10, 10, 12], [0, 3, 10, 10, 50], [5, 3, 10, 10, 12], [0, -7, 10, 10, 12]):
        with pytest.raises(RuntimeError, match="cu_seqlens: expected numbers that rise"):
            compiled(lp, old, adv, None, cu_seqlens=torch.tensor(wrong, dtype=torch.int32), **options)


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
    assert all(torch.equal(ek.moved(criterion)(lp, old, adv, mask).loss, x) for x in first)
    saved = criterion.state_dict(), counter.state_dict()
    resumed, again = ek.ClipCovLoss(seed=5, loss_agg_mode="none", **options), ek.SeedCounter(5)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert torch.equal(ek.moved(resumed)(lp, old, adv, mask).loss, drawn(8)) and torch.equal(drawn(again), drawn(8))
    ek.moved(criterion)(lp, old, adv, mask, seed=1)
    assert int(criterion.state_dict()["seeds.calls"]) == 3
    with pytest.raises(ValueError, match="mask: expected"):
        ek.clip_cov_loss(lp, old, adv, mask[:1], seed=counter)
    assert int(counter.state_dict()["calls"]) == 3  # a refused call does not count
    plain = ek.ClipCovLoss()
    ek.moved(plain)(lp, old, adv, mask, dropped=torch.zeros_like(mask))
    assert int(plain.state_dict()["seeds.calls"]) == 0


SCHEDULED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "policy": (ek.policy_loss, {},
               ("clip_low", "clip_high", "dual_clip", "entropy_coef", "ref_kl_coef", "batch_num_tokens")),
    "sapo": (ek.policy_loss, {"surrogate": "sapo", "loss_agg_mode": "seq-mean-token-sum-norm"},
             ("tau_pos", "tau_neg", "global_batch_size", "loss_scale_factor")),
    "vespo": (ek.policy_loss, {"surrogate": "vespo"}, ("k_pos", "k_neg", "lambda_pos", "lambda_neg")),
    "clip_cov": (ek.clip_cov_loss, {}, ("clip_low", "clip_high", "ratio", "low", "high", "seed")),
    "clip_cov, k of shares": (ek.clip_cov_loss, {"band": "quantile", "high": 1.0, "seed": 1}, ("k", "low")),
    "kl_cov": (ek.kl_cov_loss, {}, ("kl_coef", "k")),
}  # fmt: skip
_INTEGERS = ("k", "seed", "batch_num_tokens", "global_batch_size")


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_numbers_that_schedules_change_do_not_compile_anew(name: str, tensors: bool) -> None:
    function, fixed, changing = SCHEDULED[name]
    data = batch()
    torch._dynamo.reset()
    # dynamo decides what compiles anew; whether its graph can be differentiated ahead of time is asked of each function
    ahead = name == "clip_cov" or (tensors and name in ("policy", "kl_cov"))
    counter = CompileCounterWithBackend("aot_eager" if ahead else "eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(4):  # a number becomes a dynamic one in the second
        options: dict[str, Any] = dict(fixed)
        for option in changing:
            value = {"dual_clip": 2.0, "high": 9.0, "loss_scale_factor": 1.0}.get(option, 0.0) + 0.05 * (step + 1)
            value = step + 2 if option in _INTEGERS else value
            options[option] = torch.tensor(value) if tensors else value
        if "entropy_coef" in changing:
            options |= {"entropy": leaf(data[0]), "ref_logprob": data[1]}
        assert_same(differentiated(compiled, *data, **options), differentiated(function, *data, **options))
    assert counter.frame_count <= (1 if tensors else 2)
