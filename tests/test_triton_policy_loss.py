"""The policy loss of the Triton backend against float64: csrc/common/policy_term.h in numpy, one rule after the other.

On a machine without a GPU the kernels run in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import reference_selection
from calls import same_bits
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.triton import policy_loss as kernels

# the interpreter is numpy, which warns of the NaN that these tests ask for
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
EPS = 2.0**-24  # half an ulp of fp32
UNCHANGED, DROPPED, DETACHED, PENALISED = range(4)
K1, ABS, K2, K3 = range(4)
TOTALS = (
    "term", "clipped", "clipped_lower", "log_ratio", "absolute_log_ratio", "ratio", "covariance", "in_band",
    "selected", "nonfinite", "tokens", "largest_ratio", "largest_covariance",
)  # fmt: skip
SEED = 5


class Case(NamedTuple):
    """Arguments of the kernel; ``method``: how tokens are selected, "" for not at all, "given" for by the caller."""

    method: str = ""
    selected: int = UNCHANGED
    clips: tuple[float, float, float] = (0.8, 1.2, INF)
    exclude_clipped: bool = False
    penalty: int = ABS
    square_slope: bool = False
    coefficient: bool = True
    ratio: float = 0.1
    k: int = -1
    at_least_one: bool = True
    low: float = 0.05
    high: float = 2.0
    quantile: bool = False
    closed: bool = False
    masked: bool = True
    indexed: bool = True


NO_CLIP = (-INF, INF, INF)
CASES = {
    "ppo": Case(),
    "ppo without a mask": Case(masked=False),
    "dual clip": Case(clips=(-INF, 1.2, 1.5)),
    "no clip": Case(clips=NO_CLIP),
    "given, unchanged": Case("given"),
    "given, dropped": Case("given", DROPPED, clips=(0.8, 1.2, 2.0)),
    "given, detached": Case("given", DETACHED),
    "given, penalised": Case("given", PENALISED),
    "given, penalised without a coefficient": Case("given", PENALISED, coefficient=False),
    "clip-cov": Case("clip", DROPPED, exclude_clipped=True),
    "clip-cov, detached, closed": Case("clip", DETACHED, clips=NO_CLIP, closed=True),
    "clip-cov, quantile": Case("clip", DROPPED, exclude_clipped=True, quantile=True, low=0.3, high=0.9),
    "clip-cov, all quantiles, k": Case("clip", DROPPED, quantile=True, low=0, high=1, closed=True, ratio=-1, k=9),
    "clip-cov, empty band": Case("clip", DROPPED, low=3.0, high=2.0),
    "clip-cov, positions": Case("clip", DROPPED, indexed=False, masked=False),
    "kl-cov": Case("kl", PENALISED, clips=NO_CLIP),
    "kl-cov, excluded": Case("kl", DROPPED, exclude_clipped=True),
    "kl-cov, nothing": Case("kl", PENALISED, ratio=1e-9, at_least_one=False),
    **{
        f"kl-cov, {name}{'+' if square else ''}": Case("kl", PENALISED, penalty=penalty, square_slope=square)
        for name, penalty in (("k1", K1), ("abs", ABS), ("k2", K2), ("k3", K3))
        for square in (False, True)
    },
}  # fmt: skip


def batch(tokens: int, special: str = "", masked: bool = True) -> dict[str, Tensor]:
    """Log-probs near those of the old policy, advantages with zeros; NaN and inf in the padding must not show."""
    generator = torch.Generator().manual_seed(tokens)
    old = -2 * torch.rand(tokens, generator=generator)
    logprob = old + 0.3 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    advantages[::7] = 0
    mask = torch.rand(tokens, generator=generator) < (0.8 if masked else 2.0)
    if special:
        # the ratio overflows at 100, also with an advantage of 0; log-ratios at the ends of k3
        logprob[:8], old[:8] = torch.tensor([100.0, -100.0, 25, -25, 2, 90, 0, 20]), 0.0
        advantages[:8], mask[:8] = torch.tensor([0.5, -0.5, -1, 1, -2, 0, 1, -1]), True
    if special == "nonfinite":
        logprob[1:4], old[4], advantages[5] = torch.tensor([NAN, INF, -INF]), INF, NAN
    return {
        "logprob": torch.where(mask, logprob, NAN),
        "old_logprob": torch.where(mask, old, INF),
        "advantages": torch.where(mask, advantages, NAN),
        "mask": mask,
        "given": torch.rand(tokens, generator=generator) < 0.2,
        "token_index": torch.randperm(tokens, generator=generator),
    }


def run(case: Case, data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    data = {name: value.to(DEVICE) for name, value in data.items()}
    got = kernels.policy_loss(
        data["logprob"],
        data["old_logprob"],
        data["advantages"],
        data["mask"] if case.masked else None,
        data["given"] if case.method == "given" else None,
        data["token_index"] if case.indexed else None,
        torch.tensor(SEED, device=DEVICE) if case.method == "clip" else None,
        torch.tensor(0.7, device=DEVICE) if case.coefficient else None,
        *case.clips,
        case.selected,
        case.method in ("clip", "kl"),
        case.exclude_clipped,
        case.penalty,
        case.square_slope,
        case.ratio,
        case.k,
        case.at_least_one,
        case.low,
        case.high,
        case.quantile,
        case.closed,
    )
    return tuple(value.cpu() for value in got)


class Expected(NamedTuple):
    """Results in float64, and the sizes of the terms that were added, of which roundings are a fraction."""

    term: np.ndarray
    slope: np.ndarray
    size: np.ndarray
    chosen: Tensor
    totals: dict[str, float]
    total_sizes: dict[str, float]


def penalty_of(log_ratio: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, slope, size of what is added."""
    value, slope, size = log_ratio, np.ones_like(log_ratio), np.abs(log_ratio)
    if case.penalty == ABS:
        value, slope = np.abs(log_ratio), np.sign(log_ratio)
    elif case.penalty == K2:
        value, slope = log_ratio**2 / 2, log_ratio
        size = value
    elif case.penalty == K3:
        reverse = np.clip(-log_ratio, -20, 20)
        value = np.exp(reverse) - reverse - 1
        slope = np.where((np.abs(log_ratio) <= 20) & (value <= 10), 1 - np.exp(reverse), 0)
        size = np.minimum(np.exp(reverse) + np.abs(reverse) + 1, 24)
        value = np.minimum(value, 10)
    return value, log_ratio if case.square_slope else slope, size + np.abs(slope) + 1


def expect(case: Case, data: dict[str, Tensor], covariance: Tensor) -> Expected:
    """From the fp32 log-ratio, which is what the definition starts from, and the fp32 covariance, checked elsewhere."""
    valid = data["mask"].numpy()
    inside = {name: torch.where(data["mask"], data[name], 0) for name in ("logprob", "old_logprob", "advantages")}
    log_ratio = (inside["logprob"] - inside["old_logprob"]).double().numpy()
    advantage = inside["advantages"].double().numpy()
    nonfinite = ~(np.isfinite(log_ratio) & np.isfinite(advantage))
    ratio = np.where(valid, np.exp(log_ratio), 0)
    ratio[ratio > np.finfo(np.float32).max] = INF
    low, high, dual = np.array(case.clips, dtype=np.float32).astype(np.float64)
    value = np.where(advantage == 0, 0, -advantage * ratio)
    held = -advantage * np.where(ratio < low, low, np.where(ratio > high, high, ratio))
    clipped = valid & (held > value)
    value = np.where(clipped, held, value)
    lower = (advantage < 0) & (value > -advantage * dual)
    value = np.where(lower, -advantage * dual, value)

    chosen = torch.zeros_like(data["mask"])
    in_band = chosen
    options: dict[str, Any] = {
        "mask": data["mask"], "token_index": data["token_index"] if case.indexed else None,
        "exclude": torch.from_numpy(clipped) if case.exclude_clipped else None, "at_least_one": case.at_least_one,
    }  # fmt: skip
    number: dict[str, Any] = {"ratio": case.ratio if case.k < 0 else None, "k": case.k if case.k >= 0 else None}
    if case.method == "given":
        chosen = data["given"]
    elif case.method == "kl":
        chosen = reference_selection.kl_cov(covariance, **options, **number)
    elif case.method == "clip":
        options |= {"low": case.low, "high": case.high, "closed": case.closed, "seed": SEED}
        options["band"] = "quantile" if case.quantile else "absolute"
        chosen = reference_selection.clip_cov(covariance, **options, **number)
        in_band = reference_selection.clip_cov(covariance, **options, k=chosen.numel())
    acted_on = chosen.numpy() & valid

    stays = clipped | lower | (advantage == 0) | ~valid
    if case.selected in (DROPPED, DETACHED):
        stays |= acted_on
    if case.selected == DROPPED:
        value = np.where(acted_on, 0, value)
    term = np.where(stays, value, -advantage * ratio)
    slope = np.where(stays, 0, -advantage * ratio)
    size = np.abs(advantage) * np.where(np.isfinite(ratio), ratio, 0) + np.where(stays, np.abs(value), 0)
    if case.selected == PENALISED:
        coefficient = float(np.float32(0.7)) if case.coefficient else 0.0
        penalty, penalty_slope, penalty_size = penalty_of(log_ratio, case)
        term = np.where(acted_on, term + coefficient * penalty, term)
        slope = np.where(acted_on, slope + coefficient * penalty_slope, slope)
        size = size + np.where(acted_on, coefficient * penalty_size, 0)
    term, slope = np.where(nonfinite, NAN, term), np.where(nonfinite, NAN, slope)

    cov = covariance.double().numpy()
    per_token = (
        term, clipped, lower, log_ratio, np.abs(log_ratio), ratio, cov, in_band.numpy(), acted_on,
        valid & ~np.isfinite(term), valid,
    )  # fmt: skip
    totals = [float(x.astype(float).sum()) for x in per_token]
    sizes = [float(size.sum()), *(float(np.abs(x.astype(float)).sum()) for x in per_token[1:])]
    maxima = [float(x[valid].max()) if valid.any() else 0.0 for x in (ratio, cov)]
    return Expected(
        term, slope, size, chosen, dict(zip(TOTALS, totals + maxima, strict=True)),
        dict(zip(TOTALS, sizes + [abs(x) for x in maxima], strict=True)),
    )  # fmt: skip


def assert_close(name: str, got: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
    """NaN and inf where expected; elsewhere within a few roundings of the terms that were added."""
    special = ~np.isfinite(expected)
    np.testing.assert_array_equal(got[special], expected[special], err_msg=name)
    error = np.abs(got[~special] - expected[~special])
    allowed = 4 * EPS * size[~special] + np.finfo(np.float32).tiny
    assert (error <= allowed).all(), f"{name}: error {error.max():.3g}, {(error / allowed).max():.3g} of the bound"


def check(case: Case, data: dict[str, Tensor], got: tuple[Tensor, ...]) -> None:
    term, slope, covariance, chosen, totals = got
    mask = data["mask"] if case.masked else None
    assert same_bits(covariance, eager.token_covariance(data["logprob"], data["advantages"], mask, ""))
    with np.errstate(all="ignore"):
        expected = expect(case, data, covariance)
    assert chosen.dtype == torch.bool
    if case.method in ("clip", "kl"):
        assert torch.equal(chosen, expected.chosen)
    else:
        assert chosen.numel() == 0
    assert_close("term", term.double().numpy(), expected.term, expected.size)
    assert_close("slope", slope.double().numpy(), expected.slope, expected.size)
    assert totals.shape == (len(TOTALS),) and totals.dtype == torch.float64
    for name, total in zip(TOTALS, totals.tolist(), strict=True):
        assert_close(name, np.array([total]), np.array([expected.totals[name]]), np.array([expected.total_sizes[name]]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("special", ["", "overflow", "nonfinite"])
def test_policy_loss(case: Case, special: str) -> None:
    data = batch(1023, special, case.masked)
    check(case, data, run(case, data))


@pytest.mark.parametrize("name", ["ppo", "clip-cov, quantile", "kl-cov, k3"])
@pytest.mark.parametrize("tokens", [1, 5000])
def test_sizes(name: str, tokens: int) -> None:
    data = batch(tokens)
    if tokens == 1:
        data["mask"][:] = True
        data["logprob"], data["old_logprob"] = torch.tensor([-1.5]), torch.tensor([-2.0])
        data["advantages"] = torch.tensor([-3.0])
    check(CASES[name], data, run(CASES[name], data))


def test_more_blocks_than_a_program_adds_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TOTALS_BLOCK", 2)
    data = batch(5000, "overflow")
    check(CASES["clip-cov"], data, run(CASES["clip-cov"], data))


@pytest.mark.parametrize("method", ["", "given", "clip", "kl"])
def test_all_masked(method: str) -> None:
    case = Case(method, DROPPED)
    data = batch(100)
    data["mask"] = torch.zeros(100, dtype=torch.bool)
    for value in run(case, data):
        assert not value.any()


@pytest.mark.parametrize("method", ["", "clip", "kl"])
def test_no_tokens(method: str) -> None:
    term, slope, covariance, chosen, totals = run(Case(method, DROPPED), batch(0))
    for value in (term, slope, covariance):
        assert value.shape == (0,) and value.dtype == torch.float32
    assert chosen.shape == (0,) and chosen.dtype == torch.bool
    assert torch.equal(totals, torch.zeros(13, dtype=torch.float64))


def test_inputs_stay_and_runs_are_equal() -> None:
    data = batch(3000, "overflow")
    before = {name: value.clone() for name, value in data.items()}
    first, second = (run(CASES["clip-cov"], data) for _ in range(2))
    assert all(same_bits(data[name], before[name]) for name in data)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_the_comparison_has_teeth() -> None:
    """A wrong slope, a lost penalty, a flag too many and a total off by a token all fail."""
    case = CASES["kl-cov, abs"]
    data = batch(1023)
    got = run(case, data)
    check(case, data, got)
    term, slope, covariance, chosen, totals = got
    chosen_at = int(chosen.nonzero()[0])
    for wrong in (
        (term, torch.zeros_like(slope), covariance, chosen, totals),
        (term * (1 + 1e-5), slope, covariance, chosen, totals),
        (term, slope, covariance, chosen.index_fill(0, torch.tensor([chosen_at]), False), totals),
        *((term, slope, covariance, chosen, totals + torch.eye(13)[i].double()) for i in range(13)),
    ):
        with pytest.raises(AssertionError):
            check(case, data, wrong)
    other = run(case._replace(square_slope=True), data)
    with pytest.raises(AssertionError):
        check(case, data, (term, other[1], covariance, chosen, totals))
