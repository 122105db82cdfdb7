"""TRL's loss types in float64 (``GRPOTrainer._compute_loss`` itself) against the float64 reference, and against ours.

Where ours differs on purpose, a ``test_difference_`` says how: by definition (both are right for what they define), or
because ours is exact (what the formula says).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import peer_calls
import pytest
import torch
from peer_calls import JUDGES, Pair, Result, assert_close, clips, trl_loss

import entropy_kernels as ek

BATCHES, MAX_LENGTH = 240, 64
PAIRS = [
    *(
        Pair(loss_type, surrogate, options)
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # PPO's or GSPO's term in other sums
        for surrogate, options in (
            ("ppo", {}),
            ("ppo", clips(0.2, 0.28)),
            ("ppo", clips(0.05, 0.05, delta=1.5)),
            ("gspo", {}),
            ("gspo", clips(3e-4, 4e-4)),
            ("gspo", {"delta": 1.3}),
        )
    ),
    Pair("cispo", "cispo_trl", {"clip_high": 5.0}),
    Pair("cispo", "cispo_trl", {"clip_high": 1.0}),
    Pair("sapo", "sapo"),
    Pair("sapo", "sapo", {"tau_pos": 0.5, "tau_neg": 2.0}),
    Pair("vespo", "vespo"),
    Pair("vespo", "vespo", {"k_pos": 1.0, "lambda_pos": 0.1, "k_neg": 0.5, "lambda_neg": 0.2}),
]
THEIRS = {"clip_low": "epsilon_low", "clip_high": "epsilon_high", "delta": "delta"}
THEIRS |= {"tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg"}
THEIRS |= {name: f"vespo_{name}" for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
CLIPFRAC = {"ppo": "clip_ratio/region_mean", "cispo_trl": "cispo_clip_ratio"}


class Case(peer_calls.Case):
    def __init__(self, seed: int, pair: Pair, far: bool = False) -> None:
        super().__init__(seed, far)
        if pair.peer == "vespo":  # which takes them into w
            self.weight = self.our_weight = None
        self.num_items = max(self.n + 5 if seed % 2 else self.n, 1)
        rows = {"global_batch_size": len(self.lp)}
        self.aggregation = {
            "grpo": {"mode": "seq-mean-token-mean", **rows},
            "sapo": {"mode": "seq-mean-token-mean", **rows},
            "bnpo": {"mode": "token-mean"},
            "dr_grpo": {"mode": "seq-mean-token-sum-norm", "loss_scale_factor": MAX_LENGTH, **rows},
            "luspo": {"mode": "seq-mean-token-sum", **rows},
        }.get(pair.peer, {"mode": "token-mean", "batch_num_tokens": self.num_items})


def by_trl(pair: Pair, case: Case, **kl: Any) -> Result:
    settings = {THEIRS[key]: value for key, value in pair.given.items()}
    settings |= {"importance_sampling_level": "sequence"} if pair.surrogate == "gspo" else {}
    settings |= {"token_weight": case.weight, "num_items": case.num_items, "max_completion_length": MAX_LENGTH, **kl}
    return trl_loss(pair.peer, case.arrays, **settings)


def compare(mine: Result, peer: Result, name: str) -> None:
    assert np.isfinite(peer.loss), name
    assert_close(mine.loss, peer.loss, f"{name}: loss", slack=1e-13 * float(np.abs(peer.gradient).max(initial=0)))
    assert_close(mine.gradient, peer.gradient, f"{name}: gradient")


@JUDGES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("far", [False, True])
def test_loss_type(far: bool, pair: Pair, judge: Any) -> None:
    """Log-ratios near ±100, too: TRL clamps nothing but in vespo, whose definition it is."""
    for seed in range(60 if far else BATCHES):
        case = Case(seed, pair, far)
        mine, peer = judge(pair, case), by_trl(pair, case)
        compare(mine, peer, case.name)
        if not far and pair.surrogate in CLIPFRAC and case.lp.shape[1] > 1:  # TRL takes the share in fp32
            theirs = peer.metrics[CLIPFRAC[pair.surrogate]]
            assert mine.metrics["clipfrac"] == pytest.approx(theirs, rel=3e-7), case.name


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


def ours(surrogate: str, arrays: peer_calls.Arrays, **options: Any) -> Result:
    return peer_calls.ours(ek.policy_loss, arrays, surrogate=surrogate, **options)


def test_difference_sequences() -> None:
    """Definition: TRL's means over sequences count fully masked ones (as 0); ours with global_batch_size = all rows."""
    lp, mask = -np.ones((2, 3)), np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    arrays = lp, lp, np.ones((2, 3)), mask
    assert trl_loss("grpo", arrays).loss == -0.5
    assert ours("ppo", arrays, loss_agg_mode="seq-mean-token-mean").loss == -1
    assert ours("ppo", arrays, loss_agg_mode="seq-mean-token-mean", global_batch_size=2).loss == -0.5


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_difference_zero_advantage(advantage: float) -> None:
    """Exact: r·A is inf · 0 = NaN in TRL at A = 0 where r overflows, and its clamp's gradient at r = inf is 0 · inf.

    fp32, as it is trained: e^100 is infinite there. At A = 1 the value is that of the clip in both.
    """
    lp, old = np.array([[-1.0, -1.0]], dtype=np.float32), np.array([[-101.0, -1.0]], dtype=np.float32)
    arrays = lp, old, np.array([[advantage, 1.0]], dtype=np.float32), np.ones((1, 2), dtype=bool)
    peer = trl_loss("bnpo", arrays, dtype=torch.float32)
    mine = ours("ppo", arrays)
    assert mine.loss == pytest.approx(-(1.2 * advantage + 1) / 2, rel=1e-6) and mine.gradient.tolist() == [[0, -0.5]]
    assert np.isnan(peer.gradient[0, 0])
    assert np.isnan(peer.loss) if advantage == 0 else peer.loss == pytest.approx(mine.loss)


def test_difference_clip_ratio_of_sequences() -> None:
    """Definition: with the ratio of the sequence TRL's clip_ratio/region_mean is over sequences, our clipfrac over
    tokens. One sequence of three tokens is clipped, one of one is not."""
    old = -np.ones((2, 3))
    arrays = old + np.array([[0.5], [0.0]]), old, np.ones((2, 1)), np.array([[1, 1, 1], [1, 0, 0]], dtype=bool)
    peer = trl_loss("bnpo", arrays, importance_sampling_level="sequence")
    assert peer.metrics["clip_ratio/region_mean"] == 0.5 and ours("gspo", arrays).metrics["clipfrac"] == 0.75


def test_difference_one_column() -> None:
    """Definition: where all completions have one token, TRL takes its metrics for ones of sequences and counts masked
    rows too."""
    lp, mask = np.array([[-0.1], [-0.1]]), np.array([[True], [False]])
    for masked, share in ((0.5, 1), (0.0, 0.5)):
        arrays = lp, lp - np.array([[0.5], [masked]]), np.ones((2, 1)), mask
        assert trl_loss("bnpo", arrays).metrics["clip_ratio/region_mean"] == share
        assert ours("ppo", arrays).metrics["clipfrac"] == 1


def test_difference_k3_clamp() -> None:
    """Definition: our k3, like verl's, clamps D to ±20 and the estimate to ±10. At D = -5 e^5 - 6 is beyond 10."""
    lp, ref = np.array([[-6.0, -1.0]]), np.array([[-1.0, -1.0]])
    arrays = lp, lp, np.zeros((1, 2)), np.ones((1, 2), dtype=bool)
    peer = trl_loss("bnpo", arrays, beta=1.0, ref=ref)
    mine = ours("ppo", arrays, ref_logprob=ref, ref_kl_coef=1.0)
    assert peer.loss == pytest.approx((np.exp(5) - 6) / 2) and mine.loss == pytest.approx(5.0)


def test_difference_kl_metric() -> None:
    """Definition: with use_bias_correction_kl TRL's kl metric is r·k3; our ref_kl is k3, the estimate itself."""
    lp = np.array([[-1.0, -1.0]])
    arrays, ref = (lp, lp - np.log(2), np.zeros((1, 2)), np.ones((1, 2), dtype=bool)), lp + 1
    peer = trl_loss("bnpo", arrays, beta=1.0, ref=ref, use_bias_correction_kl=True)
    mine = ours("ppo", arrays, ref_logprob=ref, ref_kl_coef=1.0, ref_kl_importance=True)
    assert peer.metrics["kl"] == pytest.approx(2 * (np.e - 2)) and mine.metrics["ref_kl"] == pytest.approx(np.e - 2)
    assert mine.loss == pytest.approx(peer.loss)
