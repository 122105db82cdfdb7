"""verl's registered losses in float64 against the float64 reference of the normal suite, and against ours.

Where ours differs on purpose, a ``test_difference_`` says how: by definition (both are right for what they define), or
because ours is exact (what the formula says).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import peer_calls
import pytest
import torch
from peer_calls import JUDGES, Pair, Result, assert_close, clips, verl_loss

import entropy_kernels as ek
import reference_losses
import reference_surrogates
from loss_cases import random_options

BATCHES = 240
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PAIRS = [
    *(Pair("vanilla", "ppo", clips(0.2, high), {"dual_clip": 3.0}) for high in (0.2, 0.28)),
    Pair("vanilla", "ppo", clips(0.05, 0.1, dual_clip=1.2)),
    *(Pair(name, name, clips(0.2, 0.2), {"ratio_cap": 3.0}) for name in ("dppo_tv", "dppo_kl")),
    *(Pair(name, name, clips(0.02, 0.05), {"ratio_cap": 3.0}) for name in ("dppo_tv", "dppo_kl")),
    Pair("dppo_tv", "dppo_tv", clips(0.2, 0.3, ratio_cap=20.0)),
    Pair("gspo", "gspo_token", clips(0.2, 0.2)),
    Pair("gspo", "gspo_token", clips(3e-4, 4e-4)),
    Pair("sapo", "sapo"),
    Pair("sapo", "sapo", {"tau_pos": 0.5, "tau_neg": 2.0}),
    Pair("gpg", "gpg"),
    Pair("geo_mean", "gmpo", clips(0.2, 0.2)),
    Pair("geo_mean", "gmpo", clips(0.4, 0.3)),
    Pair("dro", "dro", {"dro_beta": 0.05}),
    Pair("dro", "dro", {"dro_beta": 1.0}),
    Pair("cispo", "cispo", clips(0.2, 0.2)),
    Pair("cispo", "cispo", clips(1.0, 4.0)),
]
MODE = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}  # the only one that verl's knows
CLAMPING = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "cispo")  # the log-ratio
METRICS = {"gpg": (), "dro": ("ppo_kl",), "clip_cov": ("ppo_kl",), "kl_cov": ()}  # the others have all
OURS = {"pg_clipfrac": "clipfrac", "pg_clipfrac_lower": "clipfrac_lower", "ppo_kl": "ppo_kl"}
THEIRS = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high"}
THEIRS |= {"dual_clip": "clip_ratio_c", "ratio_cap": "clip_ratio_c"}


class Case(peer_calls.Case):
    def __init__(self, seed: int, verl: str = "", far: bool = False) -> None:
        super().__init__(seed, far)
        _, options = random_options(seed, torch.tensor(self.mask))
        self.mode = options["mode"] = MODE.get(verl, MODES[seed // 2 % len(MODES)])
        self.whole = {key: value for key, value in options.items() if key != "mode"}
        self.aggregation, length = options, self.mask.sum(-1, keepdims=True)
        if verl == "geo_mean":
            self.whole, self.aggregation = {}, {"mode": self.mode, "global_batch_size": len(self.lp)}
            if self.weight is not None:
                logs = np.where(self.mask, np.log(self.weight + 1e-10), 0).sum(-1, keepdims=True) / (length + 1e-8)
                self.our_weight = np.exp(logs) * np.ones_like(self.lp)
        if self.mode == "seq-mean-token-mean":  # verl's epsilon is a weight of the sequence
            one = np.ones_like(self.lp) if self.our_weight is None else self.our_weight
            self.our_weight = one * length / (length + 1e-8)
        self.name = f"{self.name}, {self.mode}"


def their_options(given: dict[str, Any]) -> dict[str, Any]:
    renamed = {THEIRS.get(key, key): value for key, value in given.items()}
    return renamed | ({"clip_ratio": given["clip_low"]} if "clip_low" in given else {})


def by_verl(verl: str, case: Case, **settings: Any) -> Result:
    return verl_loss(verl, case.arrays, mode=case.mode, whole=case.whole, token_weight=case.weight, **settings)


def compare(mine: Result, peer: Result, pair: Pair, case: Case) -> None:
    """Value, gradient and metrics: equal in float64, verl's 1e-8 accounted for."""
    if case.n == 0:
        assert mine.loss == 0 and not mine.gradient.any(), case.name
        return
    assert np.isfinite(peer.loss), case.name
    slack = absolute = 0.0
    if pair.peer == "geo_mean":  # 1e-8 in a mean that e is raised to
        slack = 1.1e-8 * (1 + float(np.abs(case.lp - case.old).max(initial=0)))
        absolute = peer_calls.reference(pair, case).absolute
    assert_close(mine.loss, peer.loss, f"{case.name}: loss", slack=slack * absolute)
    assert_close(mine.gradient, np.where(case.mask, peer.gradient, 0), f"{case.name}: gradient", 1e-10 + slack)
    for name in METRICS.get(pair.peer, OURS):
        exact = peer.metrics[f"actor/{name}"] * (case.n + 1e-8) / case.n
        # verl's shares come from fp32 zeros and ones
        assert mine.metrics[OURS[name]] == pytest.approx(exact, rel=3e-7, abs=1e-12), f"{case.name}: {name}"


@JUDGES
@pytest.mark.parametrize(
    ("pair", "far"), [*((p, False) for p in PAIRS), *((p, True) for p in PAIRS if p.peer not in CLAMPING)], ids=str
)
def test_registered_loss(pair: Pair, far: bool, judge: Any) -> None:
    """Those that clamp no log-ratio agree near ±100, too."""
    for seed in range(60 if far else BATCHES):
        case = Case(seed, pair.peer, far)
        compare(judge(pair, case), by_verl(pair.peer, case, **their_options(pair.given)), pair, case)


def test_every_registered_loss_is_here() -> None:
    compared = {pair.peer for pair in PAIRS} | {"clip_cov", "kl_cov"}
    theirs = {name for name in peer_calls.core_algos.POLICY_LOSS_REGISTRY if not name.startswith("ek_")}
    # bypass_mode puts vanilla or reinforce together with a rollout correction; it is no loss of its own
    assert theirs - compared == {"bypass_mode"}


# --- Clip-Cov and KL-Cov ----------------------------------------------------------------------------------------------


@pytest.fixture
def record(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the function of torch that the test names returns."""
    results: list[Any] = []
    function = getattr(torch, request.param)

    def call(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(torch, request.param, call)
    return results


@pytest.mark.parametrize("record", ["randperm"], indirect=True)
@pytest.mark.parametrize("judge", ["formula", "ours"])
@pytest.mark.parametrize("far", [False, True])
def test_clip_cov(judge: str, far: bool, record: list[Any]) -> None:
    """With the tokens that verl's permutation drops."""
    dropped_somewhere = 0
    for seed in range(BATCHES):
        case = Case(seed, far=far)
        ratio, band = (2e-4, 0.05, 0.5)[seed % 3], ((1.0, 5.0), (-0.5, 0.5))[seed // 3 % 2]
        bounds = clips(*((0.2, 0.2), (0.2, 0.28))[seed % 2])
        record.clear()
        settings = {"clip_cov_ratio": ratio, "clip_cov_lb": band[0], "clip_cov_ub": band[1]}
        peer = by_verl("clip_cov", case, **their_options(bounds), **settings)
        clipped = reference_losses.clipped_by_ppo(*case.arrays, *bounds.values())
        cov = reference_losses.covariance(case.lp, case.adv, case.mask)
        found = reference_losses.candidates(cov, case.mask, clipped, *band, "verl")
        permutation = record[0].numpy() if record else np.zeros(0, dtype=int)
        dropped = reference_losses.select_clip_cov(found, permutation, case.mask, ratio, "verl")
        dropped_somewhere += dropped.any()
        mine = judge_selected(judge, case, dropped=dropped, **bounds)
        if mine is None:
            continue
        compare(mine, peer, Pair("clip_cov", ""), case)
        if case.n:
            share = peer.metrics["actor/pg_clipfrac"] * (case.n + 1e-8) / case.n
            assert mine.metrics["selected_frac"] == pytest.approx(share, rel=3e-7), case.name
    assert dropped_somewhere > BATCHES / 4


@pytest.mark.parametrize("record", ["topk"], indirect=True)
@pytest.mark.parametrize("judge", ["formula", "ours"])
@pytest.mark.parametrize("far", [False, True])
def test_kl_cov(judge: str, far: bool, record: list[Any]) -> None:
    """With the tokens that verl's topk penalises, which are those of the reference but for ties."""
    for seed in range(BATCHES):
        case = Case(seed, far=far)
        ratio, coef = (2e-4, 0.05, 0.5)[seed % 3], (1.0, 0.1)[seed % 2]
        record.clear()
        peer = by_verl("kl_cov", case, kl_cov_ratio=ratio, ppo_kl_coef=coef)
        penalized = np.zeros_like(case.mask)
        if record:
            penalized.reshape(-1)[np.flatnonzero(case.mask)[record[0].indices.numpy()]] = True
        cov = reference_losses.covariance(case.lp, case.adv, case.mask)
        expected = reference_losses.select_kl_cov(cov, case.mask, ratio, "verl")
        assert penalized.sum() == expected.sum(), case.name
        if case.n > 1 and np.ptp(case.adv[case.mask]) > 0:
            np.testing.assert_array_equal(penalized, expected, err_msg=case.name)
        mine = judge_selected(judge, case, penalized=penalized, kl_coef=coef, clip_low=None, clip_high=None)
        if mine is None:
            continue
        # at D = 0 the grad of |D| is 0 on both sides
        compare(mine, peer, Pair("kl_cov", ""), case)
        if case.n:
            exact = peer.metrics["actor/ppo_kl"] * (case.n + 1e-8) / case.n
            assert mine.metrics["ppo_kl_abs"] == pytest.approx(exact, rel=1e-9), case.name


def judge_selected(judge: str, case: Case, **options: Any) -> Result | None:
    if judge == "ours":
        function = ek.clip_cov_loss if "dropped" in options else ek.kl_cov_loss
        options |= {"token_weight": case.our_weight, "loss_agg_mode": case.mode, **case.whole}
        return peer_calls.ours(function, case.arrays, **options)
    if case.our_weight is not None:
        return None  # the reference of these losses has no weights
    out = reference_losses.loss(*case.arrays, **case.aggregation, **options)
    return Result(out.loss, out.logprob, out.metrics)


# --- aggregation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_aggregate(mode: str) -> None:
    """Any per-token term, its gradient included."""
    for seed in range(BATCHES):
        case = Case(seed)
        term = np.where(case.mask, np.random.default_rng(seed).standard_normal(case.lp.shape), 0)
        mask, leaf, peer_leaf = torch.tensor(case.mask), torch.tensor(term), torch.tensor(term)
        ours = ek.aggregate(leaf.requires_grad_(), mask, loss_agg_mode=mode, **case.whole)
        peer = peer_calls.core_algos.agg_loss(peer_leaf.requires_grad_(), mask.double(), mode, **case.whole)
        ours.backward()
        if case.n == 0:
            assert ours == 0 and not leaf.grad.any(), case.name
            continue
        peer.backward()
        # the epsilon of a sequence's mean, which its gradient has too
        length = case.mask.sum(-1, keepdims=True)
        shrunk = length / (length + 1e-8) if mode == "seq-mean-token-mean" else np.ones_like(length)
        weight = leaf.grad.numpy() * shrunk
        np.testing.assert_allclose(weight, peer_leaf.grad.numpy(), rtol=1e-12, err_msg=case.name)
        np.testing.assert_allclose((weight * term).sum(), float(peer), rtol=1e-10, atol=1e-13, err_msg=case.name)
        np.testing.assert_allclose((leaf.grad.numpy() * term).sum(), float(ours), rtol=1e-10, atol=1e-13)


# --- what differs -----------------------------------------------------------------------------------------------------


def ours(arrays: peer_calls.Arrays, surrogate: str = "ppo", **options: Any) -> Result:
    return peer_calls.ours(ek.policy_loss, arrays, surrogate=surrogate, **options)


def one_token(pair: Pair, d: float, advantage: float, **rest: Any) -> tuple[Result, Result]:
    """Ours and verl's of one token of log-ratio ``d``."""
    lp = np.array([[-1.0 if d > 0 else -1.0 + d]])
    arrays = lp, lp - d, np.array([[advantage]]), np.ones((1, 1), dtype=bool)
    peer = verl_loss(pair.peer, arrays, **their_options(pair.given), **rest)
    exact = reference_surrogates.loss(pair.surrogate, *arrays, options=pair.options)
    mine = ours(arrays, pair.surrogate, **pair.options)
    assert mine.loss == pytest.approx(exact.loss, rel=1e-12)
    assert mine.gradient == pytest.approx(exact.logprob, rel=1e-12)
    return mine, peer


@pytest.mark.parametrize(
    ("pair", "bound", "moves"),
    [
        (Pair("vanilla", "ppo", {"dual_clip": 1e30}), 20.0, False),
        (Pair("gspo", "gspo_token"), 10.0, False),
        (Pair("cispo", "cispo", clips(0.2, 1e30)), 20.0, True),
        (Pair("dppo_tv", "dppo_tv", {"ratio_cap": 1e30}), 20.0, True),
        (Pair("dppo_kl", "dppo_kl", {"ratio_cap": 1e30}), 20.0, True),
    ],
    ids=str,
)
def test_difference_log_ratio_clamp(pair: Pair, bound: float, moves: bool) -> None:
    """Exact: vanilla, dppo, sapo and cispo clamp D to ±20, gspo its mean to at most 10; ours clamps nothing. Beyond,
    verl's value is that of the bound and, but for dppo and cispo, its gradient is 0.

    A = -1, no clip on that side: the value is e^D, and -1 · e^D · lp where the ratio is a constant (lp is -1).
    """
    mine, peer = one_token(pair, 30.0, -1.0)
    sign = -1 if moves else 1
    assert mine.loss == pytest.approx(sign * np.exp(30), rel=1e-12)
    assert peer.loss == pytest.approx(sign * np.exp(bound), rel=1e-12)
    assert mine.gradient == pytest.approx(np.exp(30), rel=1e-12)
    assert peer.gradient == pytest.approx(np.exp(bound) if moves else 0.0, rel=1e-12)


def test_difference_log_ratio_clamp_of_sapo() -> None:
    """Exact: far below, sapo's gate is flat: e^-30 instead of 0, which is the sum of all that differs."""
    mine, peer = one_token(Pair("sapo", "sapo"), -30.0, 1.0)
    assert mine.loss == pytest.approx(peer.loss, rel=1e-8)
    assert peer.gradient == 0 and 0 > mine.gradient > -np.exp(-30)


def test_difference_epsilon_in_means() -> None:
    """Exact: verl's means divide by N + 1e-8, those over a sequence by m + 1e-8: up to 1e-8 of relative difference, in
    geo_mean's exponent up to 1e-8 · |mean D|."""
    _, peer = one_token(Pair("gpg", "gpg"), 0.5, 1.0, mode="seq-mean-token-mean")
    assert peer.loss * (1 + 1e-8) == pytest.approx(1.0, rel=1e-14)
    mine, peer = one_token(Pair("dro", "dro", {"dro_beta": 1.0}), 0.5, 1.0)
    assert peer.metrics["actor/ppo_kl"] * (1 + 1e-8) == pytest.approx(mine.metrics["ppo_kl"], rel=1e-14)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "token-sum"])
def test_difference_nothing_valid(mode: str) -> None:
    """Exact: without a valid token verl's loss is 0 / 0 = NaN; ours is a differentiable 0."""
    arrays = *np.full((3, 2, 4), -1.0), np.zeros((2, 4), dtype=bool)
    assert np.isnan(verl_loss("vanilla", arrays, mode=mode).loss)
    mine = ours(arrays, loss_agg_mode=mode)
    assert mine.loss == 0 and not mine.gradient.any()


@pytest.mark.parametrize("verl", ["clip_cov", "kl_cov"])
def test_difference_zero_advantage(verl: str) -> None:
    """Exact: where r overflows, -A·r is 0 · inf = NaN at A = 0 in clip_cov and kl_cov (which do not clamp D).

    fp32, as it is trained: e^100 is infinite there.
    """
    values = (np.array([x], dtype=np.float32) for x in ([-1, -1], [-101, -1], [0, 1]))
    arrays = *values, np.ones((1, 2), dtype=bool)
    assert np.isnan(verl_loss(verl, arrays, dtype=torch.float32).loss)
    selected = {"dropped" if verl == "clip_cov" else "penalized": np.zeros((1, 2), dtype=bool)}
    mine = peer_calls.ours(getattr(ek, f"{verl}_loss"), arrays, **selected)
    assert mine.loss == -0.5 and mine.gradient.tolist() == [[0.0, -0.5]]


def test_difference_gmpo_empty_sequences() -> None:
    """Definition: geo_mean averages over all rows, fully masked ones included (as 0); ours over those with a token.
    Ours with global_batch_size = the number of rows is verl's."""
    mask = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    arrays = -np.ones((4, 3)), -np.ones((4, 3)), np.ones((4, 3)), mask
    mine, peer = ours(arrays, "gmpo", loss_agg_mode="seq-mean-token-mean"), verl_loss("geo_mean", arrays)
    assert mine.loss == -1 and peer.loss == pytest.approx(-0.5, rel=2e-8)


def test_difference_gmpo_token_weight() -> None:
    """Definition: geo_mean weights a sequence by the geometric mean of its token weights, + 1e-10; ours every token by
    its own. Weights 1 and 4: their geometric mean is 2, and the mean of what each token adds is 2.5."""
    ones, weight = np.ones((1, 2)), np.array([[1.0, 4.0]])
    arrays = -ones, -ones, ones, ones > 0
    peer = verl_loss("geo_mean", arrays, token_weight=weight)
    mine = ours(arrays, "gmpo", loss_agg_mode="seq-mean-token-mean", token_weight=weight)
    assert mine.loss == pytest.approx(-2.5, rel=1e-12) and peer.loss == pytest.approx(-2.0, rel=3e-8)


def test_difference_sapo_aggregation() -> None:
    """Definition: verl's sapo is always seq-mean-token-mean; ours takes loss_agg_mode."""
    arrays = Case(5).arrays
    losses = {verl_loss("sapo", arrays, mode=mode).loss for mode in MODES}
    assert len(losses) == 1 and len({ours(arrays, "sapo", loss_agg_mode=mode).loss for mode in MODES}) == len(MODES)


def test_difference_clip_cov_clipfrac() -> None:
    """Definition: clip_cov's pg_clipfrac is the share of dropped tokens: ours is selected_frac (clipfrac: held by PPO's
    clip). One token that PPO's clip holds, one that is dropped."""
    lp, old = np.array([[-1.0, -2.0, -3.0]]), np.array([[-2.0, -2.0, -3.0]])
    arrays = lp, old, np.array([[1.0, 0.5, -2.0]]), np.ones((1, 3), dtype=bool)
    peer = verl_loss("clip_cov", arrays, clip_cov_lb=1.0, clip_cov_ub=5.0)
    mine = peer_calls.ours(ek.clip_cov_loss, arrays, dropped=np.array([[False, False, True]]))
    assert peer.metrics["actor/pg_clipfrac"] == pytest.approx(1 / 3, rel=1e-6)
    assert mine.metrics["selected_frac"] == pytest.approx(1 / 3) and mine.metrics["clipfrac"] == pytest.approx(1 / 3)
    assert mine.loss == pytest.approx(peer.loss, rel=1e-12)


def test_difference_kl_cov_ppo_kl() -> None:
    """Definition: kl_cov's ppo_kl is the mean of |D|: ours is ppo_kl_abs (ppo_kl: signed)."""
    lp, old = np.array([[-1.0, -2.0]]), np.array([[-2.0, -1.5]])
    arrays = lp, old, np.array([[1.0, -1.0]]), np.ones((1, 2), dtype=bool)
    peer, mine = verl_loss("kl_cov", arrays), peer_calls.ours(ek.kl_cov_loss, arrays)
    assert peer.metrics["actor/ppo_kl"] == pytest.approx(mine.metrics["ppo_kl_abs"], rel=1e-7)
    assert mine.metrics["ppo_kl_abs"] == pytest.approx(0.75) and mine.metrics["ppo_kl"] == pytest.approx(-0.25)
