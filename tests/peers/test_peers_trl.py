"""TRL's loss types in float64 (``GRPOTrainer._compute_loss`` itself) against the float64 reference, and against ours.

Where ours differs on purpose stands in ``DIFFERENCES``; each of them has a test below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peer_calls
import pytest
import torch

import entropy_kernels as ek
import reference_surrogates
from surrogate_cases import far_off, surrogate_batch, weights_of

BATCHES = 240
#: What differs, and why. "definition": both are right for what they define. "exact": ours is what the formula says.
DIFFERENCES: dict[str, tuple[str, str]] = {
    "sequences": (
        "definition",
        "TRL's means over sequences count fully masked ones (as 0); ours with global_batch_size = the number of rows.",
    ),
    "zero_advantage": (
        "exact",
        "TRL's r·A is inf · 0 = NaN at A = 0 where r overflows, and its clamp's gradient at r = inf is 0 · inf; ours "
        "is 0.",
    ),
    "clip_ratio_of_sequences": (
        "definition",
        "With the ratio of the sequence TRL's clip_ratio/region_mean is over sequences; our clipfrac is over tokens.",
    ),
    "one_column": (
        "definition",
        "Where all completions have one token, TRL takes its metrics for ones of sequences and counts masked rows too.",
    ),
    "k3_clamp": (
        "definition",
        "our k3, like verl's, clamps D to ±20 and the estimate to ±10; TRL's is not clamped.",
    ),
    "kl_metric": (
        "definition",
        "With use_bias_correction_kl TRL's kl metric is r·k3; our ref_kl is k3, the estimate itself.",
    ),
}


@dataclass(frozen=True)
class Pair:
    """A loss type with TRL's arguments, and the surrogate and aggregation that are the same."""

    loss_type: str
    surrogate: str
    args: dict[str, Any] = field(default_factory=dict)  # TRL's
    options: dict[str, Any] = field(default_factory=dict)  # ours
    metric: str | None = "clip_ratio/region_mean"

    def __str__(self) -> str:
        return "-".join([self.loss_type, *(f"{key}={value}" for key, value in self.args.items())])


def _clipped(loss_type: str) -> list[Pair]:
    """The five that are PPO's or GSPO's term in other sums."""
    wide = {"epsilon_low": 0.2, "epsilon_high": 0.28}, {"clip_low": 0.2, "clip_high": 0.28}
    two_sided = {"epsilon_low": 0.05, "epsilon_high": 0.05, "delta": 1.5}
    narrow = {"level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
    return [
        Pair(loss_type, "ppo"),
        Pair(loss_type, "ppo", *wide),
        Pair(loss_type, "ppo", two_sided, {"clip_low": 0.05, "clip_high": 0.05, "delta": 1.5}),
        Pair(loss_type, "gspo", {"level": "sequence"}, metric=None),
        Pair(loss_type, "gspo", narrow, {"clip_low": 3e-4, "clip_high": 4e-4}, metric=None),
        Pair(loss_type, "gspo", {"level": "sequence", "delta": 1.3}, {"delta": 1.3}, metric=None),
    ]


_TAUS = {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0}, {"tau_pos": 0.5, "tau_neg": 2.0}
_GAMMA = {"k_pos": 1.0, "lambda_pos": 0.1, "k_neg": 0.5, "lambda_neg": 0.2}
PAIRS = [
    *(pair for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo") for pair in _clipped(loss_type)),
    Pair("cispo", "cispo_trl", {"epsilon_high": 5.0}, {"clip_high": 5.0}, metric="cispo_clip_ratio"),
    Pair("cispo", "cispo_trl", {"epsilon_high": 1.0}, {"clip_high": 1.0}, metric="cispo_clip_ratio"),
    Pair("sapo", "sapo", metric=None),
    Pair("sapo", "sapo", *_TAUS, metric=None),
    Pair("vespo", "vespo", metric=None),
    Pair("vespo", "vespo", {f"vespo_{key}": value for key, value in _GAMMA.items()}, _GAMMA, metric=None),
]
MAX_LENGTH = 64


class Case:
    """A batch in numpy with finite padding; advantages are per sequence in half of them, as TRL has them."""

    def __init__(self, seed: int, pair: Pair, far: bool = False) -> None:
        batch = surrogate_batch(seed)
        if far:
            batch = far_off(batch, seed)
        self.lp, self.old, self.adv, self.mask = batch.arrays()
        rows, self.n = self.lp.shape[0], int(self.mask.sum())
        self.weight = None
        if seed % 3 == 0 and pair.loss_type != "vespo":  # which takes them into w
            self.weight = np.nan_to_num(weights_of(seed, batch).numpy(), nan=1.0)
        self.num_items = max(self.n + 5 if seed % 2 else self.n, 1)
        self.aggregation: dict[str, Any] = {
            "grpo": {"mode": "seq-mean-token-mean", "global_batch_size": rows},
            "sapo": {"mode": "seq-mean-token-mean", "global_batch_size": rows},
            "bnpo": {"mode": "token-mean"},
            "dr_grpo": {
                "mode": "seq-mean-token-sum-norm", "global_batch_size": rows, "loss_scale_factor": MAX_LENGTH
            },
            "luspo": {"mode": "seq-mean-token-sum", "global_batch_size": rows},
        }.get(pair.loss_type, {"mode": "token-mean", "batch_num_tokens": self.num_items})  # fmt: skip
        self.name = f"seed {seed} ({batch.name})"

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.lp, self.old, self.adv, self.mask


def by_reference(pair: Pair, case: Case, **kl: Any) -> peer_calls.Result:
    out = reference_surrogates.loss(
        pair.surrogate, *case.arrays, options=pair.options, token_weight=case.weight, **case.aggregation, **kl
    )
    return peer_calls.Result(out.loss, out.logprob, out.metrics)


def by_ours(pair: Pair, case: Case, ref: np.ndarray | None = None, **kl: Any) -> peer_calls.Result:
    lp, *constants = (torch.tensor(x) for x in case.arrays)
    aggregation = dict(case.aggregation)
    out = ek.policy_loss(
        lp.requires_grad_(), *constants, surrogate=pair.surrogate, loss_agg_mode=aggregation.pop("mode"), **aggregation,
        token_weight=None if case.weight is None else torch.tensor(case.weight),
        ref_logprob=None if ref is None else torch.tensor(ref), **kl, **pair.options,
    )  # fmt: skip
    out.loss.backward()
    assert lp.grad is not None
    metrics = {key: float(value) for key, value in out.metrics.items()}
    return peer_calls.Result(float(out.loss.detach()), lp.grad.numpy(), metrics)


def by_trl(pair: Pair, case: Case, **kl: Any) -> peer_calls.Result:
    return peer_calls.trl_loss(
        pair.loss_type, *case.arrays, token_weight=case.weight, num_items=case.num_items,
        max_completion_length=MAX_LENGTH, **pair.args, **kl,
    )  # fmt: skip


def compare(mine: peer_calls.Result, peer: peer_calls.Result, name: str) -> None:
    scale = float(np.abs(peer.gradient).max(initial=0))
    assert np.isfinite(peer.loss), name
    np.testing.assert_allclose(mine.loss, peer.loss, rtol=1e-10, atol=1e-13 * (1 + scale), err_msg=f"{name}: loss")
    np.testing.assert_allclose(
        mine.gradient, peer.gradient, rtol=1e-10, atol=1e-13 * (1 + scale), err_msg=f"{name}: gradient"
    )


JUDGES = pytest.mark.parametrize("judge", [by_reference, by_ours], ids=["formula", "ours"])


@JUDGES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_loss_type(pair: Pair, judge: Any) -> None:
    for seed in range(BATCHES):
        case = Case(seed, pair)
        mine, peer = judge(pair, case), by_trl(pair, case)
        compare(mine, peer, case.name)
        if pair.metric is not None and case.lp.shape[1] > 1:  # TRL takes the share in fp32
            assert mine.metrics["clipfrac"] == pytest.approx(peer.metrics[pair.metric], rel=3e-7), case.name


@JUDGES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_log_ratios_of_100(pair: Pair, judge: Any) -> None:
    """TRL clamps nothing but in vespo, whose definition it is."""
    for seed in range(60):
        case = Case(seed, pair, far=True)
        compare(judge(pair, case), by_trl(pair, case), case.name)


@JUDGES
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_reference_kl(pair: Pair, corrected: bool, judge: Any) -> None:
    for seed in range(BATCHES):
        case, beta = Case(seed, pair), (0.04, 0.5)[seed % 2]
        rng = np.random.default_rng(seed)
        # within the clamps of our k3
        ref = case.lp + np.clip(0.5 * rng.standard_normal(case.lp.shape), -2, 2)
        mine = judge(pair, case, ref=ref, ref_kl_coef=beta, ref_kl_importance=corrected)
        peer = by_trl(pair, case, ref=ref, beta=beta, use_bias_correction_kl=corrected)
        compare(mine, peer, case.name)
        if not corrected and case.lp.shape[1] > 1:
            assert mine.metrics["ref_kl"] == pytest.approx(peer.metrics["kl"], rel=1e-6, abs=1e-12), case.name


# --- what differs -----------------------------------------------------------------------------------------------------


def call(surrogate: str, arrays: tuple[np.ndarray, ...], **options: Any) -> peer_calls.Result:
    lp, *constants = (torch.tensor(x) for x in arrays)
    out = ek.policy_loss(lp.requires_grad_(), *constants, surrogate=surrogate, **options)
    out.loss.backward()
    assert lp.grad is not None
    metrics = {key: float(value) for key, value in out.metrics.items()}
    return peer_calls.Result(float(out.loss.detach()), lp.grad.double().numpy(), metrics)


def test_difference_sequences() -> None:
    lp, mask = -np.ones((2, 3)), np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    arrays = lp, lp, np.ones((2, 3)), mask
    assert peer_calls.trl_loss("grpo", *arrays).loss == -0.5
    assert call("ppo", arrays, loss_agg_mode="seq-mean-token-mean").loss == -1
    assert call("ppo", arrays, loss_agg_mode="seq-mean-token-mean", global_batch_size=2).loss == -0.5


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_difference_zero_advantage(advantage: float) -> None:
    """fp32, as it is trained: e^100 is infinite there. At A = 1 the value is that of the clip in both."""
    lp, old = np.array([[-1.0, -1.0]], dtype=np.float32), np.array([[-101.0, -1.0]], dtype=np.float32)
    arrays = lp, old, np.array([[advantage, 1.0]], dtype=np.float32), np.ones((1, 2), dtype=bool)
    peer = peer_calls.trl_loss("bnpo", *arrays, dtype=torch.float32)
    mine = call("ppo", arrays)
    assert mine.loss == pytest.approx(-(1.2 * advantage + 1) / 2, rel=1e-6) and mine.gradient.tolist() == [[0, -0.5]]
    assert np.isnan(peer.gradient[0, 0])
    assert np.isnan(peer.loss) if advantage == 0 else peer.loss == pytest.approx(mine.loss)


def test_difference_clip_ratio_of_sequences() -> None:
    """One sequence of three tokens is clipped, one of one is not."""
    old = -np.ones((2, 3))
    mask = np.array([[1, 1, 1], [1, 0, 0]], dtype=bool)
    arrays = old + np.array([[0.5], [0.0]]), old, np.ones((2, 1)), mask
    peer = peer_calls.trl_loss("bnpo", *arrays, level="sequence")
    assert peer.metrics["clip_ratio/region_mean"] == 0.5 and call("gspo", arrays).metrics["clipfrac"] == 0.75


def test_difference_one_column() -> None:
    lp, mask = np.array([[-0.1], [-0.1]]), np.array([[True], [False]])
    arrays = lp, lp - 0.5, np.ones((2, 1)), mask
    assert peer_calls.trl_loss("bnpo", *arrays).metrics["clip_ratio/region_mean"] == 1
    arrays = lp, lp - np.array([[0.5], [0.0]]), np.ones((2, 1)), mask
    assert peer_calls.trl_loss("bnpo", *arrays).metrics["clip_ratio/region_mean"] == 0.5
    assert call("ppo", arrays).metrics["clipfrac"] == 1


def test_difference_k3_clamp() -> None:
    """D = -5: e^5 - 6 is beyond 10."""
    lp = np.array([[-6.0, -1.0]])
    arrays, ref = (lp, lp, np.zeros((1, 2)), np.ones((1, 2), dtype=bool)), np.array([[-1.0, -1.0]])
    peer = peer_calls.trl_loss("bnpo", *arrays, beta=1.0, ref=ref)
    mine = call("ppo", arrays, ref_logprob=torch.tensor(ref), ref_kl_coef=1.0)
    assert peer.loss == pytest.approx((np.exp(5) - 6) / 2) and mine.loss == pytest.approx(5.0)


def test_difference_kl_metric() -> None:
    lp = np.array([[-1.0, -1.0]])
    arrays, ref = (lp, lp - np.log(2), np.zeros((1, 2)), np.ones((1, 2), dtype=bool)), lp + 1
    peer = peer_calls.trl_loss("bnpo", *arrays, beta=1.0, ref=ref, use_bias_correction_kl=True)
    mine = call("ppo", arrays, ref_logprob=torch.tensor(ref), ref_kl_coef=1.0, ref_kl_importance=True)
    assert peer.metrics["kl"] == pytest.approx(2 * (np.e - 2)) and mine.metrics["ref_kl"] == pytest.approx(np.e - 2)
    assert mine.loss == pytest.approx(peer.loss)


def test_every_difference_has_a_test() -> None:
    assert {f"test_difference_{name}" for name in DIFFERENCES} <= set(globals())
