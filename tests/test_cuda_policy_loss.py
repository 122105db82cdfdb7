"""The fused policy loss of the CUDA half, emulated on the CPU, against the losses in torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cuda_selection_emulator as emulator
import entropy_kernels as ek
from calls import same_bits
from conftest import on_gpu
from cuda_emulator import missing
from entropy_kernels.backends import native
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.radix_select import Band, Count
from entropy_kernels.losses.inputs import prepare
from entropy_kernels.losses.surrogate import branches, penalty, surrogate

REASON = ek.backends()["clip_cov_mask"]["cuda"]

INF, NAN = math.inf, math.nan
UNCHANGED, DROPPED, DETACHED, PENALISED = range(4)
PENALTIES = ("k1", "abs", "k2", "k3")
SUMS = (
    "term", "clipped", "clipped_lower", "log_ratio", "absolute_log_ratio", "ratio", "covariance",
    "in_band", "selected", "nonfinite", "tokens",
)  # fmt: skip


class Case(NamedTuple):
    """One loss: clips (None: none), what becomes of the selected, how they are found."""

    selected: int = UNCHANGED
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    count: Count | None = None
    band: Band | None = None
    exclude_clipped: bool = False
    estimator: str = "abs"

    @property
    def clips(self) -> tuple[float, float, float]:
        low = -INF if self.clip_low is None else 1 - self.clip_low
        high = INF if self.clip_high is None else 1 + self.clip_high
        return low, high, INF if self.dual_clip is None else self.dual_clip

    @property
    def penalty(self) -> tuple[int, bool]:
        return PENALTIES.index(self.estimator.removesuffix("+")), self.estimator.endswith("+")

    def given(self, data: dict[str, Tensor]) -> Tensor | None:
        return data["given"] if self.count is None and self.selected != UNCHANGED else None


CLIP = Case(DROPPED, count=Count(0.1, None, True), band=Band(0.05, 2.0, False, False))
CASES = {
    "ppo": Case(),
    "ppo, dual clip": Case(dual_clip=1.5, clip_low=None),
    "no clip": Case(clip_low=None, clip_high=None),
    "clip-cov, verl": CLIP._replace(exclude_clipped=True),
    "clip-cov, paper": CLIP._replace(selected=DETACHED, clip_low=None, clip_high=None, band=Band(0.05, 2, False, True)),
    "clip-cov, quantile": CLIP._replace(exclude_clipped=True, band=Band(0.3, 0.9, True, False)),
    "clip-cov, given": Case(DROPPED, dual_clip=2.0),
    "kl-cov": Case(PENALISED, clip_low=None, clip_high=None, count=Count(0.1, None, True)),
    "kl-cov, given": Case(PENALISED, estimator="k3"),
    **{f"kl-cov, {name}": Case(PENALISED, count=Count(None, 40, True), estimator=name) for name in ("k1", "k2", "k3+")},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulator.compile_library(tmp_path_factory.mktemp("emulator"))


def batch(tokens: int, seed: int, special: str = "") -> dict[str, Tensor]:
    """Log-probs near those of the old policy, some far off; advantages with zeros; NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(tokens, generator=generator)
    logprob = old + 0.3 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    advantages[::7] = 0
    mask = torch.rand(tokens, generator=generator) < 0.8
    if special:
        logprob[:7] = torch.tensor([200.0, -200.0, 25.0, -25.0, 12.0, 90.0, 0.0])
        old[6], mask[:7] = 0.0, True
    if special == "nonfinite":
        logprob[1:4] = torch.tensor([NAN, INF, -INF])
        old[4], advantages[5] = INF, NAN
    return {
        "logprob": torch.where(mask, logprob, NAN),
        "old_logprob": torch.where(mask, old, INF),
        "advantages": torch.where(mask, advantages, NAN),
        "mask": mask,
        "given": torch.rand(tokens, generator=generator) < 0.2,
        "token_index": torch.randperm(tokens, generator=generator),
    }


def expect(case: Case, data: dict[str, Tensor], coefficient: Tensor, seed: Tensor) -> dict[str, Any]:
    """The same from the losses' own steps."""
    logprob = data["logprob"].clone().requires_grad_()
    tokens = prepare(logprob, data["old_logprob"], data["advantages"], data["mask"], None, 0.0, None, 0.0)
    found = branches(tokens, case.clip_low, case.clip_high, case.dual_clip)
    covariance = eager.token_covariance(data["logprob"], data["advantages"], data["mask"], "")
    exclude = found.clipped if case.exclude_clipped else None
    chosen, in_band = None, torch.zeros_like(tokens.mask)
    if case.count is None:
        chosen = data["given"] if case.selected != UNCHANGED else None
    elif case.band is None:
        chosen = eager.kl_cov_mask(covariance, tokens.mask, None, data["token_index"], case.count, "")
    else:
        clip = (covariance, tokens.mask, exclude, data["token_index"], seed)
        chosen = eager.clip_cov_mask(*clip, case.count, case.band, "")
        in_band = eager.clip_cov_mask(*clip, Count(None, 1 << 53, True), case.band, "")
    dropped = chosen if case.selected in (DROPPED, DETACHED) else None
    term = surrogate(tokens, found, dropped, "keep" if case.selected == DETACHED else "zero")
    if case.selected == PENALISED:
        assert chosen is not None
        term = term + penalty(tokens, chosen, coefficient, case.estimator)
    (slope,) = torch.autograd.grad(term.sum(), logprob)
    acted_on = torch.zeros_like(tokens.mask) if chosen is None else chosen & tokens.mask
    log_ratio = tokens.log_ratio.detach()
    per_token = (
        term.detach(), found.clipped, found.clipped_lower, log_ratio, log_ratio.abs(), found.ratio, covariance,
        in_band, acted_on, tokens.mask & ~term.detach().isfinite(), tokens.mask,
    )  # fmt: skip
    maxima = [torch.where(tokens.mask, x, -INF).amax() for x in (found.ratio, covariance)]
    return {
        "covariance": covariance,
        "selected": chosen,
        "term": term.detach(),
        "slope": torch.where(tokens.mask, slope, 0),
        "sums": dict(zip(SUMS, (x.double().sum() for x in per_token), strict=True)),
        "maxima": torch.stack(maxima).double() if tokens.mask.any() else torch.zeros(2, dtype=torch.float64),
    }


def compare(case: Case, got: Any, expected: dict[str, Any], special: str) -> None:
    covariance, selected, term, slope, totals = got
    assert same_bits(covariance, expected["covariance"])
    if case.count is not None:
        assert torch.equal(selected, expected["selected"])
        assert bool(selected.any()) == (special != "nonfinite")  # every covariance is NaN then
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(term, expected["term"], **close)
    torch.testing.assert_close(slope, expected["slope"], **close)
    for name, total in zip(SUMS, totals, strict=False):
        torch.testing.assert_close(total, expected["sums"][name], **{**close, "rtol": 1e-5}, msg=name)
    torch.testing.assert_close(totals[len(SUMS) :], expected["maxima"], **close)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("team", [(True, 1), (True, 4), (False, 3)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("special", ["", "overflow", "nonfinite"])
def test_policy_loss(library: Any, case: Case, team: tuple[bool, int], special: str) -> None:
    kernels = emulator.Emulated(library, *team)
    coefficient, seed = torch.tensor(0.7), torch.tensor(5)
    for tokens in (40, 777):
        data = batch(tokens, tokens, special)
        got = kernels.policy_loss(
            data["logprob"], data["old_logprob"], data["advantages"], data["mask"], data["token_index"],
            case.given(data), coefficient, seed, case.count, case.band, case.clips, case.selected,
            case.exclude_clipped, *case.penalty,
        )  # fmt: skip
        compare(case, got, expect(case, data, coefficient, seed), special)


@on_gpu("cuda", "policy_loss")
@pytest.mark.skipif(REASON != "available", reason=f"backend cuda: {REASON}")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("special", ["", "overflow", "nonfinite"])
def test_operator_on_hardware(case: Case, special: str) -> None:
    coefficient, seed = torch.tensor(0.7), torch.tensor(5)
    count, band = case.count or Count(None, 0, True), case.band or Band(0.0, 0.0, False, False)
    for tokens in (40, 70_000, 600_000):
        data = batch(tokens, tokens, special)
        there = {name: value.cuda() for name, value in data.items()}
        term, slope, covariance, selected, totals = torch.ops.entropy_kernels_native.policy_loss(
            there["logprob"], there["old_logprob"], there["advantages"], there["mask"], case.given(there),
            there["token_index"], seed.cuda() if case.band else None, coefficient.cuda(), *case.clips, case.selected,
            case.count is not None, case.exclude_clipped, *case.penalty, *native._count(count), *band,
        )  # fmt: skip
        got = (x.cpu() for x in (covariance, selected, term, slope, totals))
        compare(case, got, expect(case, data, coefficient, seed), special)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_without_valid_tokens(library: Any) -> None:
    data = batch(100, 3)
    nothing = torch.zeros(100, dtype=torch.bool)
    got = emulator.Emulated(library, True, 2).policy_loss(
        data["logprob"], data["old_logprob"], data["advantages"], nothing, None, None, None, torch.tensor(1),
        CLIP.count, CLIP.band, (0.8, 1.2, INF), DROPPED, True, 1, False,
    )  # fmt: skip
    for name, value in got._asdict().items():
        assert not value.any(), name
