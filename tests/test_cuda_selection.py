"""The CUDA selection kernels, emulated on the CPU, against the torch backend: equal bits for every team of blocks.

What runs on a GPU itself is in test_selection*.py, whose places include the backend "cuda".
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_selection_emulator as emulator
from calls import same_bits
from cuda_emulator import missing
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.radix_select import Band, Count

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

INF, NAN = math.inf, math.nan
# (cluster or grid, blocks): alone, two, as many as leave some without tokens
TEAMS = [(True, 1), (True, 2), (True, 16), (False, 1), (False, 3)]
TOKENS = [1, 31, 33, 500, 2000]
COUNTS = [Count(0.05, None, True), Count(None, 7, True), Count(1.0, None, True), Count(1e-4, None, False)]
BANDS = [
    Band(0.5, 3.0, False, False), Band(0.5, 3.0, False, True),
    Band(-INF, INF, False, True), Band(0.0, 5.0, False, False),
    Band(0.4, 0.9, True, False), Band(0.4, 0.9, True, True),
    Band(0.0, 1.0, True, True), Band(50.0, 60.0, False, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulator.compile_library(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(params=TEAMS, ids=lambda team: f"{'cluster' if team[0] else 'grid'}-{team[1]}")
def kernels(request: pytest.FixtureRequest, library: Any) -> emulator.Emulated:
    return emulator.Emulated(library, *request.param)


def batch(tokens: int, levels: int | None, seed: int) -> dict[str, Tensor]:
    """Covariances, rounded to multiples of 1/levels where ties are wanted, some of them special; masks; indices."""
    generator = torch.Generator().manual_seed(seed)
    covariance = 2 * torch.randn(tokens, generator=generator)
    if levels:
        covariance = (covariance * levels).round() / levels
    special = torch.tensor([INF, -INF, NAN, -0.0, 0.0, 0.5, 3.0])
    which = torch.randint(0, 100, (tokens,), generator=generator)
    return {
        "covariance": torch.where(which < 7, special[which.clamp(max=6)], covariance),
        "mask": torch.rand(tokens, generator=generator) < 0.8,
        "exclude": torch.rand(tokens, generator=generator) < 0.1,
        "token_index": torch.randperm(tokens, generator=generator) * 2**40 - 2**45,
    }


def check(kernels: emulator.Emulated, tokens: tuple, count: Count, seed: int, bands: list[Band]) -> int:
    expected = eager.kl_cov_mask(*tokens, count, "")
    assert torch.equal(kernels.kl_cov_mask(*tokens, count), expected), count
    selected = int(expected.sum())
    for band in bands:
        random = torch.tensor(seed)
        expected = eager.clip_cov_mask(*tokens, random, count, band, "")
        assert torch.equal(kernels.clip_cov_mask(*tokens, random, count, band), expected), (count, band)
        selected += int(expected.sum())
    return selected


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("levels", [None, 1])
def test_masks(kernels: emulator.Emulated, tokens: int, levels: int | None) -> None:
    data = batch(tokens, levels, seed=tokens)
    everything = (data["covariance"], data["mask"], data["exclude"], data["token_index"])
    selected = 0
    for number, count in enumerate(COUNTS):
        kernels.order = number
        selected += check(kernels, everything, count, number - 2, BANDS[number % 2 :: 2])
    selected += check(kernels, (data["covariance"], None, None, None), Count(0.3, None, True), 2**62, BANDS[2:5])
    selected += check(kernels, (data["covariance"], data["mask"], None, None), COUNTS[0], -1, BANDS[::5])
    assert selected > tokens


@pytest.mark.parametrize("tokens", [5, 3000])
def test_ties(kernels: emulator.Emulated, tokens: int) -> None:
    """All equal, so the digits of the token index decide: two rounds for 3000 positions, six for given indices."""
    covariance = torch.full((tokens,), 2.0)
    covariance[1] = NAN
    index = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)) * 2**50 - 2**61
    for given in (None, index, torch.arange(tokens) + 2**63 - 1 - tokens, torch.arange(tokens).flip(0) - 2**63):
        for k in (1, 3, tokens // 2, tokens):
            expected = eager.kl_cov_mask(covariance, None, None, given, Count(None, k, True), "")
            assert int(expected.sum()) == min(k, tokens - 1)
            assert torch.equal(kernels.kl_cov_mask(covariance, None, None, given, Count(None, k, True)), expected)


def test_nothing_to_select(kernels: emulator.Emulated) -> None:
    covariance, nothing = torch.randn(100), torch.zeros(100, dtype=torch.bool)
    for tokens in (
        (covariance, nothing, None, None),
        (covariance, None, ~nothing, None),
        (covariance * NAN, None, None, None),
    ):
        for count in (Count(None, 5, True), Count(0.5, None, True)):
            assert check(kernels, tokens, count, 3, BANDS) == 0
    assert check(kernels, (covariance, None, None, None), Count(None, 0, True), 3, BANDS) == 0


def test_the_order_of_threads_does_not_matter(library: Any) -> None:
    data = tuple(batch(700, 2, seed=9).values())
    expected = eager.clip_cov_mask(*data, torch.tensor(4), COUNTS[0], BANDS[4], "")
    for order in range(10):
        for cluster in (True, False):
            kernels = emulator.Emulated(library, cluster, 3 - cluster, order)
            assert torch.equal(kernels.clip_cov_mask(*data, torch.tensor(4), COUNTS[0], BANDS[4]), expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariance(kernels: emulator.Emulated, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logprob = -2 * torch.rand(tokens, generator=generator, dtype=dtype)
    advantages = torch.randn(tokens, generator=generator, dtype=dtype)
    mask = torch.rand(tokens, generator=generator) < 0.8
    poisoned = torch.where(mask, logprob, NAN)
    for lp, adv, valid in (
        (logprob, advantages, None),
        (poisoned, advantages, mask),
        (poisoned, advantages, None),
        (logprob * 1e-41, advantages * 1e30, mask),
        (logprob - 1000, torch.full_like(advantages, 0.7), mask),
        (logprob * INF, advantages, mask),
        (logprob, advantages, torch.zeros_like(mask)),
    ):
        expected = eager.token_covariance(lp, adv, valid, "")
        got = kernels.token_covariance(lp, adv, valid)
        assert same_bits(got, expected)
