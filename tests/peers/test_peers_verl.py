"""verl's registered losses in float64 against the float64 reference of the normal suite, and against ours.

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
import reference_losses
import reference_surrogates
from loss_cases import random_options
from surrogate_cases import far_off, surrogate_batch, weights_of

BATCHES = 240
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
#: What differs, and why. "definition": both are right for what they define. "exact": ours is what the formula says.
DIFFERENCES: dict[str, tuple[str, str]] = {
    "log_ratio_clamp": (
        "exact",
        "vanilla, dppo, sapo and cispo clamp D to ±20, gspo its mean to at most 10; ours clamps nothing. Beyond, "
        "verl's value is that of the bound and, but for dppo and cispo, its gradient is 0.",
    ),
    "epsilon_in_means": (
        "exact",
        "verl's means divide by N + 1e-8, those over a sequence by m + 1e-8: up to 1e-8 of relative difference, in "
        "geo_mean's exponent up to 1e-8 · |mean D|.",
    ),
    "nothing_valid": ("exact", "Without a valid token verl's loss is 0 / 0 = NaN; ours is a differentiable 0."),
    "zero_advantage": (
        "exact",
        "Where r overflows, -A·r is 0 · inf = NaN at A = 0 in clip_cov and kl_cov (which do not clamp D); ours is 0.",
    ),
    "gmpo_empty_sequences": (
        "definition",
        "geo_mean averages over all rows, fully masked ones included (as 0); ours over those with a token. Ours with "
        "global_batch_size = the number of rows is verl's.",
    ),
    "gmpo_token_weight": (
        "definition",
        "geo_mean weights a sequence by the geometric mean of its token weights, + 1e-10; ours every token by its own.",
    ),
    "sapo_aggregation": ("definition", "verl's sapo is always seq-mean-token-mean; ours takes loss_agg_mode."),
    "clip_cov_clipfrac": (
        "definition",
        "clip_cov's pg_clipfrac is the share of dropped tokens: ours is selected_frac (clipfrac: held by PPO's clip).",
    ),
    "kl_cov_ppo_kl": ("definition", "kl_cov's ppo_kl is the mean of |D|: ours is ppo_kl_abs (ppo_kl: signed)."),
}


@dataclass(frozen=True)
class Pair:
    """A loss of verl and the surrogate that is the same."""

    verl: str
    surrogate: str
    settings: dict[str, Any] = field(default_factory=dict)  # verl's
    options: dict[str, Any] = field(default_factory=dict)  # ours
    mode: str | None = None  # the only one that verl's knows
    clamps: bool = False  # the log-ratio
    exponent_epsilon: bool = False  # 1e-8 in a mean that e is raised to
    metrics: tuple[str, ...] = ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")

    def __str__(self) -> str:
        return f"{self.verl}-{'-'.join(f'{k}={v}' for k, v in self.settings.items())}".rstrip("-")


def _clips(low: float, high: float) -> dict[str, Any]:
    return {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high}


def _pairs(verl: str, surrogate: str, clips: tuple[tuple[float, float], ...], **rest: Any) -> list[Pair]:
    settings, options = rest.pop("settings", {}), rest.pop("options", {})
    return [
        Pair(
            verl,
            surrogate,
            {**_clips(*clip), **settings},
            {"clip_low": clip[0], "clip_high": clip[1], **options},
            **rest,
        )
        for clip in clips
    ]


_SAPO = {"mode": "seq-mean-token-mean", "clamps": True}
_DRO = {"metrics": ("ppo_kl",)}
PAIRS = [
    *_pairs("vanilla", "ppo", ((0.2, 0.2), (0.2, 0.28)), clamps=True, options={"dual_clip": 3.0}),
    *_pairs("vanilla", "ppo", ((0.05, 0.1),), clamps=True, settings={"clip_ratio_c": 1.2}, options={"dual_clip": 1.2}),
    *_pairs("dppo_tv", "dppo_tv", ((0.2, 0.2), (0.02, 0.05)), clamps=True, options={"ratio_cap": 3.0}),
    *_pairs(
        "dppo_tv", "dppo_tv", ((0.2, 0.3),), clamps=True, settings={"clip_ratio_c": 20.0}, options={"ratio_cap": 20.0}
    ),
    *_pairs("dppo_kl", "dppo_kl", ((0.2, 0.2), (0.02, 0.05)), clamps=True, options={"ratio_cap": 3.0}),
    *_pairs("gspo", "gspo_token", ((0.2, 0.2), (3e-4, 4e-4)), clamps=True),
    Pair("sapo", "sapo", **_SAPO),
    Pair("sapo", "sapo", {"tau_pos": 0.5, "tau_neg": 2.0}, {"tau_pos": 0.5, "tau_neg": 2.0}, **_SAPO),
    Pair("gpg", "gpg", metrics=()),
    *_pairs("geo_mean", "gmpo", ((0.2, 0.2), (0.4, 0.3)), mode="seq-mean-token-mean", exponent_epsilon=True),
    Pair("dro", "dro", {"dro_beta": 0.05}, {"dro_beta": 0.05}, **_DRO),
    Pair("dro", "dro", {"dro_beta": 1.0}, {"dro_beta": 1.0}, **_DRO),
    *_pairs("cispo", "cispo", ((0.2, 0.2), (1.0, 4.0)), clamps=True),
]
OURS = {"pg_clipfrac": "clipfrac", "pg_clipfrac_lower": "clipfrac_lower", "ppo_kl": "ppo_kl"}


class Case:
    """A batch in numpy with finite padding, and the options of its aggregation by either side's names."""

    def __init__(self, seed: int, pair: Pair | None = None, far: bool = False) -> None:
        batch = surrogate_batch(seed)
        if far:
            batch = far_off(batch, seed)
        self.lp, self.old, self.adv, self.mask = batch.arrays()
        self.whole, _ = random_options(seed, batch.mask)
        self.whole.pop("loss_agg_mode")
        self.mode = MODES[seed // 2 % len(MODES)]
        if pair is not None and pair.mode is not None:
            self.mode = pair.mode
        if pair is not None and pair.verl == "geo_mean":
            self.whole = {"global_batch_size": self.lp.shape[0]}
        self.n = int(self.mask.sum())
        self.weight = np.nan_to_num(weights_of(seed, batch).numpy(), nan=1.0) if seed % 3 == 0 else None
        self.our_weight, length = self.weight, self.mask.sum(-1, keepdims=True)
        if self.weight is not None and pair is not None and pair.verl == "geo_mean":
            logs = np.where(self.mask, np.log(self.weight + 1e-10), 0).sum(-1, keepdims=True) / (length + 1e-8)
            self.our_weight = np.exp(logs) * np.ones_like(self.lp)
        if self.mode == "seq-mean-token-mean":  # verl's epsilon is a weight of the sequence
            one = np.ones_like(self.lp) if self.our_weight is None else self.our_weight
            self.our_weight = one * length / (length + 1e-8)
        self.name = f"seed {seed} ({batch.name}), {self.mode}"

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.lp, self.old, self.adv, self.mask


def reference(pair: Pair, case: Case) -> reference_losses.Reference:
    return reference_surrogates.loss(
        pair.surrogate, *case.arrays, options=pair.options, mode=case.mode, token_weight=case.our_weight, **case.whole
    )


def by_reference(pair: Pair, case: Case) -> peer_calls.Result:
    out = reference(pair, case)
    return peer_calls.Result(out.loss, out.logprob, out.metrics)


def by_ours(pair: Pair, case: Case) -> peer_calls.Result:
    return call_ours(
        ek.policy_loss, case.arrays, surrogate=pair.surrogate, loss_agg_mode=case.mode, **case.whole,
        token_weight=None if case.our_weight is None else torch.tensor(case.our_weight), **pair.options,
    )  # fmt: skip


def call_ours(function: Any, arrays: tuple[np.ndarray, ...], **options: Any) -> peer_calls.Result:
    lp, *constants = (torch.tensor(x) for x in arrays)
    lp.requires_grad_()
    out = function(lp, *constants, **options)
    out.loss.backward()
    assert lp.grad is not None
    return peer_calls.Result(
        float(out.loss.detach()), lp.grad.numpy(), {key: float(value) for key, value in out.metrics.items()}
    )


def assert_close(got: Any, peer: Any, tolerance: float, name: str, slack: float = 0.0) -> None:
    scale = float(np.abs(peer).max(initial=0))
    np.testing.assert_allclose(got, peer, rtol=tolerance, atol=1e-13 + 1e-13 * scale + slack, err_msg=name)


def compare(mine: peer_calls.Result, peer: peer_calls.Result, pair: Pair, case: Case) -> None:
    """Value, gradient and metrics: equal in float64, verl's 1e-8 accounted for."""
    if case.n == 0:
        assert mine.loss == 0 and not mine.gradient.any(), case.name
        return
    assert np.isfinite(peer.loss), case.name
    slack = absolute = 0.0
    if pair.exponent_epsilon:
        slack = 1.1e-8 * (1 + float(np.abs(case.lp - case.old).max(initial=0)))
        absolute = reference(pair, case).absolute
    assert_close(mine.loss, peer.loss, 1e-10, f"{case.name}: loss", slack * absolute)
    assert_close(mine.gradient, np.where(case.mask, peer.gradient, 0), 1e-10 + slack, f"{case.name}: gradient")
    for name in pair.metrics:
        exact = peer.metrics[f"actor/{name}"] * (case.n + 1e-8) / case.n
        # verl's shares come from fp32 zeros and ones
        assert mine.metrics[OURS[name]] == pytest.approx(exact, rel=3e-7, abs=1e-12), f"{case.name}: {name}"


JUDGES = pytest.mark.parametrize("judge", [by_reference, by_ours], ids=["formula", "ours"])


@JUDGES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_registered_loss(pair: Pair, judge: Any) -> None:
    for seed in range(BATCHES):
        case = Case(seed, pair)
        peer = peer_calls.verl_loss(
            pair.verl, *case.arrays, mode=case.mode, whole=None if pair.verl == "geo_mean" else case.whole,
            token_weight=case.weight, **pair.settings,
        )  # fmt: skip
        compare(judge(pair, case), peer, pair, case)


@JUDGES
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.clamps], ids=str)
def test_log_ratios_of_100(pair: Pair, judge: Any) -> None:
    """Those that clamp nothing agree there too."""
    for seed in range(60):
        case = Case(seed, pair, far=True)
        peer = peer_calls.verl_loss(
            pair.verl, *case.arrays, mode=case.mode, whole=None if pair.verl == "geo_mean" else case.whole,
            token_weight=case.weight, **pair.settings,
        )  # fmt: skip
        compare(judge(pair, case), peer, pair, case)


def test_every_registered_loss_is_here() -> None:
    compared = {pair.verl for pair in PAIRS} | {"clip_cov", "kl_cov"}
    # bypass_mode puts vanilla or reinforce together with a rollout correction; it is no loss of its own
    assert set(peer_calls.core_algos.POLICY_LOSS_REGISTRY) - compared == {"bypass_mode"}


# --- Clip-Cov and KL-Cov ----------------------------------------------------------------------------------------------


class Recorded:
    """What a function of torch returned while it was patched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.results: list[Any] = []
        function = getattr(torch, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.results.append(function(*args, **kwargs))
            return self.results[-1]

        monkeypatch.setattr(torch, name, call)


@pytest.mark.parametrize("judge", ["formula", "ours"])
@pytest.mark.parametrize("far", [False, True])
def test_clip_cov(judge: str, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokens that verl's permutation drops."""
    record, dropped_somewhere = Recorded(monkeypatch, "randperm"), 0
    for seed in range(BATCHES):
        case = Case(seed, far=far)
        ratio, band = (2e-4, 0.05, 0.5)[seed % 3], ((1.0, 5.0), (-0.5, 0.5))[seed // 3 % 2]
        low, high = ((0.2, 0.2), (0.2, 0.28))[seed % 2]
        record.results.clear()
        peer = peer_calls.verl_loss(
            "clip_cov", *case.arrays, mode=case.mode, whole=case.whole, token_weight=case.weight, **_clips(low, high),
            clip_cov_ratio=ratio, clip_cov_lb=band[0], clip_cov_ub=band[1],
        )  # fmt: skip
        clipped = reference_losses.clipped_by_ppo(*case.arrays, low, high)
        cov = reference_losses.covariance(case.lp, case.adv, case.mask)
        found = reference_losses.candidates(cov, case.mask, clipped, *band, "verl")
        permutation = record.results[0].numpy() if record.results else np.zeros(0, dtype=int)
        dropped = reference_losses.select_clip_cov(found, permutation, case.mask, ratio, "verl")
        dropped_somewhere += dropped.any()
        mine = judge_selected(judge, case, low, high, dropped=dropped)
        if mine is None:
            continue
        compare(mine, peer, Pair("clip_cov", "", metrics=("ppo_kl",)), case)
        if case.n:
            share = peer.metrics["actor/pg_clipfrac"] * (case.n + 1e-8) / case.n
            assert mine.metrics["selected_frac"] == pytest.approx(share, rel=3e-7), case.name
    assert dropped_somewhere > BATCHES / 4


@pytest.mark.parametrize("judge", ["formula", "ours"])
@pytest.mark.parametrize("far", [False, True])
def test_kl_cov(judge: str, far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokens that verl's topk penalises, which are those of the reference but for ties."""
    record = Recorded(monkeypatch, "topk")
    for seed in range(BATCHES):
        case = Case(seed, far=far)
        ratio, coef = (2e-4, 0.05, 0.5)[seed % 3], (1.0, 0.1)[seed % 2]
        record.results.clear()
        peer = peer_calls.verl_loss(
            "kl_cov", *case.arrays, mode=case.mode, whole=case.whole, token_weight=case.weight, kl_cov_ratio=ratio,
            ppo_kl_coef=coef,
        )  # fmt: skip
        penalized = np.zeros_like(case.mask)
        if record.results:
            penalized.reshape(-1)[np.flatnonzero(case.mask)[record.results[0].indices.numpy()]] = True
        expected = reference_losses.select_kl_cov(
            reference_losses.covariance(case.lp, case.adv, case.mask), case.mask, ratio, "verl"
        )
        assert penalized.sum() == expected.sum(), case.name
        if case.n > 1 and np.ptp(case.adv[case.mask]) > 0:
            np.testing.assert_array_equal(penalized, expected, err_msg=case.name)
        mine = judge_selected(judge, case, None, None, penalized=penalized, kl_coef=coef)
        if mine is None:
            continue
        # at D = 0 the slope of |D| is 0 on both sides
        compare(mine, peer, Pair("kl_cov", "", metrics=()), case)
        if case.n:
            exact = peer.metrics["actor/ppo_kl"] * (case.n + 1e-8) / case.n
            assert mine.metrics["ppo_kl_abs"] == pytest.approx(exact, rel=1e-9), case.name


def judge_selected(judge: str, case: Case, low: Any, high: Any, **selected: Any) -> peer_calls.Result | None:
    if judge == "ours":
        function = ek.clip_cov_loss if "dropped" in selected else ek.kl_cov_loss
        selected = {key: torch.tensor(x) if isinstance(x, np.ndarray) else x for key, x in selected.items()}
        weight = {} if case.our_weight is None else {"token_weight": torch.tensor(case.our_weight)}
        return call_ours(
            function, case.arrays, clip_low=low, clip_high=high, loss_agg_mode=case.mode, **case.whole, **weight,
            **selected,
        )  # fmt: skip
    if case.our_weight is not None:
        return None  # the reference of these losses has no weights
    out = reference_losses.loss(
        *case.arrays, clip_low=low, clip_high=high, mode=case.mode, **case.whole, **selected
    )  # fmt: skip
    return peer_calls.Result(out.loss, out.logprob, out.metrics)


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


def one_token(pair: Pair, d: float, advantage: float, **rest: Any) -> tuple[peer_calls.Result, peer_calls.Result]:
    """Ours and verl's of one token of log-ratio ``d``."""
    lp = np.array([[-1.0 if d > 0 else -1.0 + d]])
    arrays = lp, lp - d, np.array([[advantage]]), np.ones((1, 1), dtype=bool)
    peer = peer_calls.verl_loss(pair.verl, *arrays, **pair.settings, **rest)
    exact = reference_surrogates.loss(pair.surrogate, *arrays, options=pair.options)
    mine = call_ours(ek.policy_loss, arrays, surrogate=pair.surrogate, **pair.options)
    assert mine.loss == pytest.approx(exact.loss, rel=1e-12) and mine.gradient == pytest.approx(
        exact.logprob, rel=1e-12
    )
    return mine, peer


_WIDE = {"clip_ratio_low": 0.2, "clip_ratio_high": 1e30}, {"clip_low": 0.2, "clip_high": 1e30}


@pytest.mark.parametrize(
    ("pair", "d", "bound", "moves"),
    [
        (Pair("vanilla", "ppo", {"clip_ratio_c": 1e30}, {"dual_clip": 1e30}), 30.0, 20.0, False),
        (Pair("gspo", "gspo_token"), 30.0, 10.0, False),
        (Pair("cispo", "cispo", *_WIDE), 30.0, 20.0, True),
        (Pair("dppo_tv", "dppo_tv", {"clip_ratio_c": 1e30}, {"ratio_cap": 1e30}), 30.0, 20.0, True),
        (Pair("dppo_kl", "dppo_kl", {"clip_ratio_c": 1e30}, {"ratio_cap": 1e30}), 30.0, 20.0, True),
    ],
    ids=str,
)
def test_difference_log_ratio_clamp(pair: Pair, d: float, bound: float, moves: bool) -> None:
    """A = -1, no clip on that side: the value is e^D, and -1 · e^D · lp where the ratio is a constant (lp is -1)."""
    mine, peer = one_token(pair, d, -1.0)
    sign = -1 if moves else 1
    assert mine.loss == pytest.approx(sign * np.exp(d), rel=1e-12)
    assert peer.loss == pytest.approx(sign * np.exp(bound), rel=1e-12)
    assert mine.gradient == pytest.approx(np.exp(d), rel=1e-12)
    assert peer.gradient == pytest.approx(np.exp(bound) if moves else 0.0, rel=1e-12)


def test_difference_log_ratio_clamp_of_sapo() -> None:
    """Far below, sapo's gate is flat: e^-30 instead of 0, which is the sum of all that differs."""
    mine, peer = one_token(Pair("sapo", "sapo"), -30.0, 1.0)
    assert mine.loss == pytest.approx(peer.loss, rel=1e-8)
    assert peer.gradient == 0 and 0 > mine.gradient > -np.exp(-30)


def test_difference_epsilon_in_means() -> None:
    _, peer = one_token(Pair("gpg", "gpg"), 0.5, 1.0, mode="seq-mean-token-mean")
    assert peer.loss * (1 + 1e-8) == pytest.approx(1.0, rel=1e-14)
    mine, peer = one_token(Pair("dro", "dro", {"dro_beta": 1.0}, {"dro_beta": 1.0}), 0.5, 1.0)
    assert peer.metrics["actor/ppo_kl"] * (1 + 1e-8) == pytest.approx(mine.metrics["ppo_kl"], rel=1e-14)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "token-sum"])
def test_difference_nothing_valid(mode: str) -> None:
    arrays = *np.full((3, 2, 4), -1.0), np.zeros((2, 4), dtype=bool)
    assert np.isnan(peer_calls.verl_loss("vanilla", *arrays, mode=mode).loss)
    mine = call_ours(ek.policy_loss, arrays, loss_agg_mode=mode)
    assert mine.loss == 0 and not mine.gradient.any()


@pytest.mark.parametrize("verl", ["clip_cov", "kl_cov"])
def test_difference_zero_advantage(verl: str) -> None:
    """fp32, as it is trained: e^100 is infinite there."""
    lp, old = np.array([[-1.0, -1.0]]), np.array([[-101.0, -1.0]])
    adv, mask = np.array([[0.0, 1.0]]), np.ones((1, 2), dtype=bool)
    peer = peer_calls.verl_loss(verl, lp, old, adv, mask, dtype=torch.float32)
    assert np.isnan(peer.loss)
    selected = {"dropped" if verl == "clip_cov" else "penalized": torch.zeros(1, 2, dtype=torch.bool)}
    function = ek.clip_cov_loss if verl == "clip_cov" else ek.kl_cov_loss
    mine = call_ours(function, (*(x.astype(np.float32) for x in (lp, old, adv)), mask), **selected)
    assert mine.loss == -0.5 and mine.gradient.tolist() == [[0.0, -0.5]]


def test_difference_gmpo_empty_sequences() -> None:
    lp = -np.ones((4, 3))
    mask = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    peer = peer_calls.verl_loss("geo_mean", lp, lp, np.ones((4, 3)), mask)
    mine = call_ours(
        ek.policy_loss, (lp, lp, np.ones((4, 3)), mask), surrogate="gmpo", loss_agg_mode="seq-mean-token-mean"
    )
    assert mine.loss == -1 and peer.loss == pytest.approx(-0.5, rel=2e-8)


def test_difference_gmpo_token_weight() -> None:
    """Weights 1 and 4: their geometric mean is 2, and the mean of what each token adds is 2.5."""
    lp, mask, weight = -np.ones((1, 2)), np.ones((1, 2), dtype=bool), np.array([[1.0, 4.0]])
    peer = peer_calls.verl_loss("geo_mean", lp, lp, np.ones((1, 2)), mask, token_weight=weight)
    mine = call_ours(
        ek.policy_loss, (lp, lp, np.ones((1, 2)), mask), surrogate="gmpo", loss_agg_mode="seq-mean-token-mean",
        token_weight=torch.tensor(weight),
    )  # fmt: skip
    assert mine.loss == pytest.approx(-2.5, rel=1e-12) and peer.loss == pytest.approx(-2.0, rel=3e-8)


def test_difference_sapo_aggregation() -> None:
    case = Case(5)
    losses = {peer_calls.verl_loss("sapo", *case.arrays, mode=mode).loss for mode in MODES}
    ours = {call_ours(ek.policy_loss, case.arrays, surrogate="sapo", loss_agg_mode=mode).loss for mode in MODES}
    assert len(losses) == 1 and len(ours) == len(MODES)


def test_difference_clip_cov_clipfrac() -> None:
    """A token that PPO's clip holds, one that is dropped: verl counts the latter, ours each by its name."""
    lp, old = np.array([[-1.0, -2.0, -3.0]]), np.array([[-2.0, -2.0, -3.0]])
    arrays = lp, old, np.array([[1.0, 0.5, -2.0]]), np.ones((1, 3), dtype=bool)
    peer = peer_calls.verl_loss("clip_cov", *arrays, clip_cov_lb=1.0, clip_cov_ub=5.0)
    mine = call_ours(ek.clip_cov_loss, arrays, dropped=torch.tensor([[False, False, True]]))
    assert peer.metrics["actor/pg_clipfrac"] == pytest.approx(1 / 3, rel=1e-6)
    assert mine.metrics["selected_frac"] == pytest.approx(1 / 3) and mine.metrics["clipfrac"] == pytest.approx(1 / 3)
    assert mine.loss == pytest.approx(peer.loss, rel=1e-12)


def test_difference_kl_cov_ppo_kl() -> None:
    lp, old = np.array([[-1.0, -2.0]]), np.array([[-2.0, -1.5]])
    arrays = lp, old, np.array([[1.0, -1.0]]), np.ones((1, 2), dtype=bool)
    peer = peer_calls.verl_loss("kl_cov", *arrays)
    mine = call_ours(ek.kl_cov_loss, arrays)
    assert peer.metrics["actor/ppo_kl"] == pytest.approx(mine.metrics["ppo_kl_abs"], rel=1e-7)
    assert mine.metrics["ppo_kl_abs"] == pytest.approx(0.75) and mine.metrics["ppo_kl"] == pytest.approx(-0.25)


def test_every_difference_has_a_test() -> None:
    assert {f"test_difference_{name}" for name in DIFFERENCES} <= set(globals())
