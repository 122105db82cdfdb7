"""The CUDA selection kernels, emulated on the CPU, against the torch backend: equal bits for every number of blocks.

On a GPU test_selection*.py run on the kernels themselves; what those do not ask of them is at the end here.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_selection_emulator as emulator
import entropy_kernels as ek
from calls import same_bits
from conftest import on_gpu
from cuda_emulator import missing
from entropy_kernels.backends import native, radix_select
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.radix_select import Band, Count

REASON = ek.backends()["clip_cov_mask"]["cuda"]
hardware = [
    on_gpu("cuda", "token_covariance", "clip_cov_mask", "kl_cov_mask", "budget_mask"),
    pytest.mark.skipif(REASON != "available", reason=f"backend cuda: {REASON}"),
]
emulated = pytest.mark.skipif(missing() is not None, reason=str(missing()))

INF, NAN = math.inf, math.nan
# Alone, two, as many as leave some without tokens
BLOCKS = [1, 2, 3, 16]
TOKENS = [1, 31, 33, 500, 2000]
COUNTS = [Count(0.05, None, True), Count(None, 7, True), Count(1.0, None, True), Count(1e-4, None, False)]
BANDS = [
    Band(0.5, 3.0, False, False), Band(0.5, 3.0, False, True),
    Band(-INF, INF, False, True), Band(0.0, 5.0, False, False),
    Band(0.4, 0.9, True, False), Band(0.4, 0.9, True, True),
    Band(0.0, 1.0, True, True), Band(50.0, 60.0, False, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def library(folder_of_run: Path) -> Any:
    return emulator.compile_library(folder_of_run)


@pytest.fixture(params=BLOCKS)
def kernels(request: pytest.FixtureRequest, library: Any) -> emulator.Emulated:
    return emulator.Emulated(library, request.param)


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


@emulated
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("levels", [None, 1])
def test_masks(kernels: emulator.Emulated, tokens: int, levels: int | None) -> None:
    data = batch(tokens, levels, seed=tokens)
    everything = (data["covariance"], data["mask"], data["exclude"], data["token_index"])
    selected = 0
    for number, count in enumerate(COUNTS):  # each band meets one of them, another one for other blocks and tokens
        kernels.order = number
        selected += check(kernels, everything, count, number - 2, BANDS[(number + kernels.blocks + tokens) % 4 :: 4])
    selected += check(kernels, (data["covariance"], None, None, None), Count(0.3, None, True), 2**62, BANDS[2:5])
    selected += check(kernels, (data["covariance"], data["mask"], None, None), COUNTS[0], -1, BANDS[::5])
    assert selected > tokens


@emulated
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


@emulated
def test_nothing_to_select(kernels: emulator.Emulated) -> None:
    covariance, nothing = torch.randn(100), torch.zeros(100, dtype=torch.bool)
    masked, excluded, undefined = (nothing, None), (None, ~nothing), (None, None)
    for values, valid in ((covariance, masked), (covariance, excluded), (covariance * NAN, undefined)):
        for number, count in enumerate((Count(None, 5, True), Count(0.5, None, True))):
            assert check(kernels, (values, *valid, None), count, 3, BANDS[number::2]) == 0
    assert check(kernels, (covariance, None, None, None), Count(None, 0, True), 3, BANDS[::2]) == 0


@emulated
@pytest.mark.parametrize("tokens", [33, 1500])
def test_numbers_in_memory(kernels: emulator.Emulated, tokens: int) -> None:
    """Ratio, k, low and high from memory, also what no number may be."""
    data, selected = tuple(batch(tokens, 1, seed=4).values()), 0
    for i, values in enumerate((
        (0.05, NAN, 0.5, 3.0), (NAN, 7.5, 0.25, 0.9), (5.0, NAN, 0.2, 7.0), (-1.0, NAN, 2.0, 1.0), (NAN, INF, NAN, 1.0),
        (NAN, -2.0, -INF, INF), (NAN, NAN, -1e300, 1e300),
    )):  # fmt: skip
        numbers, closed = torch.tensor(values, dtype=torch.float64), (i + kernels.blocks) % 2 == 0
        bands = [Band(NAN, NAN, quantile, closed, numbers) for quantile in (False, True)]
        selected += check(kernels, data, Count(None, None, True, numbers), 3, bands)
    assert selected > tokens


@emulated
def test_a_seed_by_value(library: Any) -> None:
    score, count, band = torch.randn(700), Count(0.1, None, True), Band(-1.0, 1.0, False, False)
    for seed in (0, -1, 2**62 + 5):
        masks = [
            emulator.Emulated(library, 2, seed_by_value=by_value).clip_cov_mask(
                score, None, None, None, torch.tensor(seed), count, band
            )
            for by_value in (False, True)
        ]
        assert masks[0].any() and torch.equal(*masks)


@emulated
@pytest.mark.parametrize(("blocks", "tokens"), [*itertools.product((1, 3), TOKENS), (16, 33), (16, 2000)])
@pytest.mark.parametrize("levels", [None, 1])
def test_budgets(library: Any, tokens: int, levels: int | None, blocks: int) -> None:
    data = batch(tokens, levels, seed=tokens + blocks)
    score, *masks = data.values()
    gain = float(score.double().nan_to_num(0.0, 0.0, 0.0).clamp(min=0).sum())
    amounts = [(0.1, 0), (0.9, 0), (INF, 0), (NAN, 0), (-0.3, 1), (-INF, 1), (0.2, 2), (1.0, 2), (1e-300, 2)]
    selected = 0
    for number, (amount, place) in enumerate(amounts):
        numbers = torch.full((3,), NAN, dtype=torch.float64)
        numbers[place] = amount if place == 2 else amount * gain
        kernels = emulator.Emulated(library, blocks, number)
        for given in ((score, *masks), (score, masks[0], None, None), (score * 1e-42, None, None, None))[
            number % 3 :: 2
        ]:
            expected = eager.budget_mask(*given, numbers, "")
            assert torch.equal(kernels.budget_mask(*given, numbers), expected), (amount, place)
            selected += int(expected.sum())
    assert selected >= tokens or tokens == 1


@emulated
def test_ties_of_a_budget(library: Any) -> None:
    score, numbers = torch.full((3000,), 0.5), torch.full((3,), NAN, dtype=torch.float64)
    for index in (None, torch.randperm(3000) * 2**41 - 2**50):
        for count in (1, 1234, 2999, 3000):
            numbers[0] = 0.5 * count - 0.1
            got = emulator.Emulated(library, 3).budget_mask(score, None, None, index, numbers)
            assert int(got.sum()) == count and torch.equal(
                got, eager.budget_mask(score, None, None, index, numbers, "")
            )


@emulated
def test_the_order_of_threads_does_not_matter(library: Any) -> None:
    data = tuple(batch(700, 2, seed=9).values())
    expected = eager.clip_cov_mask(*data, torch.tensor(4), COUNTS[0], BANDS[4], "")
    for order in range(10):
        for blocks in (2, 3):
            kernels = emulator.Emulated(library, blocks, order)
            assert torch.equal(kernels.clip_cov_mask(*data, torch.tensor(4), COUNTS[0], BANDS[4]), expected)


@emulated
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cluster", [False, True])
def test_covariance(kernels: emulator.Emulated, tokens: int, dtype: torch.dtype, cluster: bool) -> None:
    kernels.cluster = cluster
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


class TestOnHardware:
    """Clusters of every size, cooperative grids, and what a stream must not see."""

    pytestmark = hardware

    @pytest.mark.parametrize("tokens", [1, 4096, 4097, 20_000, 65_536, 300_001, 524_288, 524_289, 4_000_003])
    @pytest.mark.parametrize("levels", [None, 1])
    def test_masks(self, tokens: int, levels: int | None) -> None:
        data = {name: value.cuda() for name, value in batch(tokens, levels, seed=tokens).items()}
        clip = {"seed": 7}
        quantile = {"seed": 7, "low": 0.4, "high": 0.95, "band": "quantile", "closed": True}
        for options in (data, {"covariance": data["covariance"]}, {**data, "token_index": None}):
            for count in ({"ratio": 2e-4}, {"k": 1000}, {"ratio": 0.6}):
                for function, more in ((ek.kl_cov_mask, {}), (ek.clip_cov_mask, clip), (ek.clip_cov_mask, quantile)):
                    arguments: dict[str, Any] = {**options, **count, **more}
                    assert torch.equal(function(**arguments, backend="cuda"), function(**arguments, backend="torch"))

    @pytest.mark.parametrize("tokens", [1, 4096, 4097, 65_536, 524_289, 4_000_003])
    @pytest.mark.parametrize("levels", [None, 1])
    def test_budgets(self, tokens: int, levels: int | None) -> None:
        data = {name: value.cuda() for name, value in batch(tokens, levels, seed=tokens).items()}
        data["score"] = data.pop("covariance")
        for options in (data, {"score": data["score"]}, {**data, "token_index": None}):
            for amount in ({"budget": tokens / 50}, {"limit": -tokens / 9}, {"share": 0.3}, {"share": 1.0}):
                arguments: dict[str, Any] = {**options, **amount}
                expected = ek.budget_tokens(**arguments, backend="torch")
                assert torch.equal(ek.budget_tokens(**arguments, backend="cuda"), expected)

    @pytest.mark.parametrize("tokens", [1, 5000, 65_536, 524_289, 4_000_003])
    def test_covariance(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(1)
        logprob, advantages = (torch.randn(tokens, generator=generator).cuda() for _ in range(2))
        mask = (torch.rand(tokens, generator=generator) < 0.8).cuda()
        for lp in (logprob, logprob.double()):
            expected = ek.token_covariance(lp, advantages, mask, backend="torch")
            assert same_bits(ek.token_covariance(lp, advantages, mask, backend="cuda"), expected)

    @pytest.mark.parametrize("tokens", [1000, 600_000])
    def test_steps(self, tokens: int) -> None:
        """Those for batches over ranks, here of one."""
        data = {name: value.cuda() for name, value in batch(tokens, 1, seed=2).items()}
        everything = tuple(data.values())
        for count in COUNTS:
            expected = eager.kl_cov_mask(*everything, count, "")
            assert torch.equal(radix_select.kl_cov_mask(native._steps, *everything, count, ""), expected)
            for band in BANDS:
                clip = (*everything, torch.tensor(3, device="cuda"), count, band, "")
                assert torch.equal(radix_select.clip_cov_mask(native._steps, *clip), eager.clip_cov_mask(*clip))
        for numbers in ([tokens / 50, NAN, NAN], [NAN, -tokens / 9, NAN], [NAN, NAN, 0.3]):
            given = (*everything, torch.tensor(numbers, dtype=torch.float64, device="cuda"), "")
            assert torch.equal(radix_select.budget_mask(native._steps, *given), eager.budget_mask(*given))
        finite = data["covariance"].nan_to_num(posinf=9.0, neginf=-9.0)
        for values in (finite, finite.double(), data["covariance"]):
            pair = (values, values.flip(0), data["mask"], "")
            assert same_bits(radix_select.token_covariance(native._steps, *pair), eager.token_covariance(*pair))

    @pytest.mark.parametrize("tokens", [60_000, 700_000])
    def test_graph_without_a_sync(self, tokens: int, undisturbed: None) -> None:
        """One captured step serves every seed, share and band, and every batch of its shape."""
        data = {name: value.cuda() for name, value in batch(tokens, None, seed=3).items()}
        seed = torch.tensor(1, device="cuda")
        share, least = torch.tensor(0.01, device="cuda"), torch.tensor(0.5, device="cuda")
        advantages = data["exclude"].float()

        def step() -> tuple[Tensor, ...]:
            covariance = ek.token_covariance(data["covariance"], advantages, data["mask"], backend="cuda")
            clip = ek.clip_cov_mask(data["covariance"], data["mask"], seed=seed, ratio=share, low=least, backend="cuda")
            quantile = ek.random_tokens(
                data["covariance"], seed=seed, k=9, low=least, high=0.99, band="quantile", backend="cuda"
            )
            budget = ek.budget_tokens(data["covariance"], data["mask"], share=share, backend="cuda")
            return covariance, clip, quantile, budget, ek.kl_cov_mask(data["covariance"], data["mask"], backend="cuda")

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for value in (2, 3):
            seed.fill_(value)
            share.fill_(0.01 * value)
            least.fill_(0.3 * value)
            data["covariance"].neg_()
            graph.replay()
            assert all(same_bits(a, b) for a, b in zip(captured, step(), strict=True))
