"""Covariance and selection masks against the reference: every backend, every case of the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
import reference_selection as reference
from calls import checked_mask, same_bits
from conftest import BackendDevice
from entropy_kernels.backends import native
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.radix_select import Band, Count

INF, NAN = math.inf, math.nan


def batch(shape: tuple[int, ...], seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, one advantage per sequence, a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    logprob = -spread * torch.rand(shape, generator=generator)
    advantages = torch.randn((*shape[:-1], 1), generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    return logprob, advantages, mask


def covariances(shape: tuple[int, ...], seed: int = 0, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Normal covariances, rounded to multiples of 1/levels where ties are wanted, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    covariance = 2 * torch.randn(shape, generator=generator)
    if levels:
        covariance = (covariance * levels).round() / levels
    return covariance, torch.rand(shape, generator=generator) < 0.8


def check(on: BackendDevice, function: str, covariance: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The public mask on a backend equals the reference."""
    expected = getattr(reference, function)(covariance, mask, **options)
    return checked_mask(on, f"{function}_mask", expected, covariance=covariance, mask=mask, **options)


def both(on: BackendDevice, covariance: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    check(on, "kl_cov", covariance, mask, **options)
    check(on, "clip_cov", covariance, mask, seed=5, **options)


# ---- covariance


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 5), (2, 3, 4), (8, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_covariance(selection_on: BackendDevice, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype == torch.float64 and selection_on.device != "cpu":
        pytest.skip("fp64 is a CPU dtype")
    logprob, advantages, mask = (x.to(selection_on.device) for x in batch(shape))
    logprob, advantages = logprob.to(dtype), advantages.to(dtype)
    for m in (mask, None):
        expected = reference.covariance(logprob.cpu(), advantages.cpu(), None if m is None else m.cpu())
        got = ek.token_covariance(logprob, advantages, m, backend=selection_on.backend)
        assert got.dtype == torch.float32 and got.shape == shape and not got.requires_grad
        # half an ulp of fp32, and what the means' rounding (2⁻⁴⁰ of the largest value) leaves
        scale = logprob.abs().max().item() * advantages.abs().max().item()
        bound = expected.abs() * 2.0**-24 + 2.0**-38 * scale
        assert bool(((got.cpu().double() - expected).abs() <= bound).all())


def test_covariance_offset(selection_on: BackendDevice) -> None:
    """Log-probs far from 0 with a small spread: nothing is lost to the mean's rounding."""
    logprob, advantages, mask = batch((4, 300), spread=1e-2)
    logprob = logprob - 1000
    expected = reference.covariance(logprob, advantages, mask)
    arguments = (x.to(selection_on.device) for x in (logprob, advantages, mask))
    got = ek.token_covariance(*arguments, backend=selection_on.backend).cpu().double()
    assert bool(((got - expected).abs() <= expected.abs() * 1e-6 + 1e-8).all())


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e30])
def test_covariance_extreme_magnitudes(selection_on: BackendDevice, magnitude: float) -> None:
    logprob, advantages, mask = batch((3, 50))
    logprob = logprob * magnitude
    expected = reference.covariance(logprob, advantages, mask).float()
    arguments = (x.to(selection_on.device) for x in (logprob, advantages, mask))
    got = ek.token_covariance(*arguments, backend=selection_on.backend).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-45)


def test_covariance_same_bits_everywhere(selection_on: BackendDevice) -> None:
    """Equal to torch on the CPU bit for bit, and independent of the order of the tokens."""
    logprob, advantages, mask = batch((4, 500))
    advantages = advantages.expand(logprob.shape)
    base = ek.token_covariance(logprob, advantages, mask, backend="torch")
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    shuffled = [x.reshape(-1)[order].to(selection_on.device) for x in (logprob, advantages, mask)]
    got = ek.token_covariance(*shuffled, backend=selection_on.backend).cpu()
    assert same_bits(got, base.view(-1)[order])


def test_covariance_of_equal_advantages_is_zero(selection_on: BackendDevice) -> None:
    """Also of a single sequence: its one advantage is the mean. Clip-Cov then selects nothing."""
    for logprob, advantage in ((torch.randn(4, 33), 0.7), (torch.randn(1, 90), 1 / 3)):
        logprob = logprob.to(selection_on.device)
        advantages = torch.full_like(logprob, advantage)
        covariance = ek.token_covariance(logprob, advantages, backend=selection_on.backend)
        assert bool((covariance == 0).all())  # the sum of equal fp32 values fits a double
        assert not ek.clip_cov_mask(covariance, seed=0, backend=selection_on.backend).any()


def test_covariance_padding_does_not_leak(selection_on: BackendDevice) -> None:
    logprob, advantages, mask = batch((4, 60))
    advantages = advantages.expand(logprob.shape).clone()
    clean = reference.covariance(logprob, advantages, mask).float()
    for poison in (NAN, INF, -INF):
        dirty = [torch.where(mask, x, poison).to(selection_on.device) for x in (logprob, advantages)]
        got = ek.token_covariance(*dirty, mask.to(selection_on.device), backend=selection_on.backend).cpu()
        torch.testing.assert_close(got, clean, rtol=1e-6, atol=1e-9)
        assert bool((got[~mask] == 0).all())


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nonfinite_valid_token_shows(selection_on: BackendDevice, poison: float) -> None:
    logprob, advantages, mask = (x.to(selection_on.device) for x in batch((4, 60)))
    logprob[mask.nonzero()[7].tolist()[0], mask.nonzero()[7].tolist()[1]] = poison
    covariance = ek.token_covariance(logprob, advantages, mask, backend=selection_on.backend)
    assert bool(covariance[mask].isnan().all()) and bool((covariance[~mask] == 0).all())
    for selected in (
        ek.kl_cov_mask(covariance, mask, ratio=0.5, backend=selection_on.backend),
        ek.clip_cov_mask(covariance, mask, seed=0, low=-INF, high=INF, backend=selection_on.backend),
        ek.clip_cov_mask(covariance, mask, seed=0, low=0, high=1, band="quantile", backend=selection_on.backend),
    ):
        assert not selected.any()


def test_covariance_without_tokens(selection_on: BackendDevice) -> None:
    device = selection_on.device
    for shape in ((0,), (0, 5), (3, 0)):
        empty = torch.zeros(shape, device=device)
        got = ek.token_covariance(empty, empty, backend=selection_on.backend)
        assert got.shape == shape
    logprob, advantages, _ = (x.to(device) for x in batch((2, 9)))
    got = ek.token_covariance(logprob * NAN, advantages, torch.zeros_like(logprob), backend=selection_on.backend)
    assert bool((got == 0).all())


# ---- masks


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 40), (9, 500)])
@pytest.mark.parametrize("levels", [None, 2])
def test_masks(selection_on: BackendDevice, shape: tuple[int, ...], levels: int | None) -> None:
    if selection_on.interpreted and shape not in ((3, 5), (9, 500)):
        pytest.skip("the interpreter takes a third of a second for each call")
    covariance, mask = covariances(shape, levels=levels)
    both(selection_on, covariance)
    both(selection_on, covariance, mask, ratio=0.2)
    both(selection_on, covariance, mask, k=3)
    if not selection_on.interpreted:
        both(selection_on, covariance, mask)
        both(selection_on, covariance, ratio=0.2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_mask_dtypes(selection_on: BackendDevice, dtype: torch.dtype) -> None:
    covariance, mask = covariances((5, 40))
    exclude = torch.rand(5, 40, generator=torch.Generator().manual_seed(3)) < 0.3
    both(selection_on, covariance, mask.to(dtype), ratio=0.1, exclude=exclude.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_covariance_dtypes(selection_on: BackendDevice, dtype: torch.dtype) -> None:
    covariance, mask = covariances((4, 64))
    both(selection_on, covariance.to(dtype), mask, ratio=0.1)


def test_exclude_counts_but_is_no_candidate(selection_on: BackendDevice) -> None:
    covariance, mask = covariances((4, 250))
    exclude = covariance > 2.5
    selected = check(selection_on, "kl_cov", covariance, mask, exclude=exclude, ratio=0.05)
    assert int(selected.sum()) == int(0.05 * int(mask.sum())) and not (selected & exclude).any()
    check(selection_on, "clip_cov", covariance, mask, exclude=exclude, ratio=0.05, seed=1)
    both(selection_on, covariance, mask, exclude=torch.ones_like(mask), ratio=0.05)


def test_broadcast_masks_and_strides(selection_on: BackendDevice) -> None:
    covariance, mask = covariances((40, 6))
    both(selection_on, covariance.t(), mask.t(), ratio=0.1)
    both(selection_on, covariance[::3, 1::2], mask[::3, 1::2], ratio=0.1)
    both(selection_on, covariance[:1].expand(40, 6), mask[:, :1], ratio=0.1)
    both(selection_on, covariance, mask[:, :1], exclude=mask[:1], ratio=0.1)


def test_ties_go_to_the_lower_token_index(selection_on: BackendDevice) -> None:
    covariance = torch.full((6, 20), 3.0)
    mask = torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    selected = check(selection_on, "kl_cov", covariance, mask, k=10)
    assert selected.view(-1).nonzero().view(-1).tolist() == mask.view(-1).nonzero().view(-1)[:10].tolist()
    index = torch.randperm(120, generator=torch.Generator().manual_seed(2)).view(6, 20) * 2**40 - 2**45
    both(selection_on, covariance, mask, k=10, token_index=index)
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1e-45, 1e-45])
    assert check(selection_on, "kl_cov", zeros, k=3).tolist() == [True, True, False, False, False, True]


def test_token_index(selection_on: BackendDevice) -> None:
    """The selection follows the index, not the place: shuffled and padded, the same tokens are selected."""
    covariance, mask = covariances((4, 90), levels=4)
    index = torch.arange(360).view(4, 90) + 2**33
    for function, options in (("kl_cov", {}), ("clip_cov", {"seed": -3})):
        base = check(selection_on, function, covariance, mask, ratio=0.05, token_index=index, **options)
        order = torch.randperm(360, generator=torch.Generator().manual_seed(1))
        shuffled = [torch.cat([x.view(-1)[order], x.new_zeros(40)]) for x in (covariance, mask, index)]
        again = check(selection_on, function, shuffled[0], shuffled[1], ratio=0.05, token_index=shuffled[2], **options)
        assert torch.equal(again[:360], base.view(-1)[order]) and not again[360:].any()


@pytest.mark.parametrize("closed", [False, True])
def test_band_edges(selection_on: BackendDevice, closed: bool) -> None:
    """Values on a bound, next to it, at 0, and infinite."""
    edges = [0.1, 1.0, 5.0, 0.0, -0.0, INF, -INF, NAN, 3.4e38]
    near = [float(torch.nextafter(torch.tensor(x), torch.tensor(y))) for x in (0.1, 1.0, 5.0, 0.0) for y in (INF, -INF)]
    covariance = torch.tensor(edges + near)
    for low, high in ((1, 5), (0.1, 1), (0, 5), (-1, 0), (-INF, INF), (-INF, 0), (5, INF), (-1e39, 1e39), (-0.0, 1)):
        check(selection_on, "clip_cov", covariance, seed=0, k=50, low=low, high=high, closed=closed)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.9, 0.98), (0.5, 0.500001), (0.0, 0.3), (0.98, 1.0)])
def test_quantile_band(selection_on: BackendDevice, low: float, high: float, closed: bool) -> None:
    for levels in (None, 1):
        covariance, mask = covariances((5, 200), levels=levels)
        exclude = covariance < -2
        options = {"seed": 9, "band": "quantile", "low": low, "high": high, "closed": closed}
        check(selection_on, "clip_cov", covariance, mask, exclude=exclude, ratio=0.5, **options)
    check(selection_on, "clip_cov", covariance[:1, :1], k=1, **options)


def test_empty_band_and_few_candidates(selection_on: BackendDevice) -> None:
    covariance, mask = covariances((3, 100))
    assert not check(selection_on, "clip_cov", covariance, mask, seed=0, low=50, high=60).any()
    few = check(selection_on, "clip_cov", covariance, mask, seed=0, low=4, high=60, ratio=1.0)
    assert torch.equal(few, mask & (covariance > 4))
    everything = check(selection_on, "kl_cov", covariance, mask, k=10_000)
    assert torch.equal(everything, mask)
    assert torch.equal(check(selection_on, "kl_cov", covariance, mask, ratio=1.0), mask)


def test_nothing_to_select(selection_on: BackendDevice) -> None:
    for shape in ((0,), (0, 4), (5, 0)):
        both(selection_on, torch.zeros(shape), ratio=0.5)
        both(selection_on, torch.zeros(shape), torch.zeros(shape), k=2)
    covariance, mask = covariances((3, 30))
    both(selection_on, covariance * NAN, torch.zeros(3, 30), k=2)
    check(selection_on, "clip_cov", covariance, mask * 0, seed=1, low=0, high=1, band="quantile")
    assert not check(selection_on, "kl_cov", covariance, mask, k=0).any()
    assert not check(selection_on, "kl_cov", covariance, mask, ratio=1e-3, at_least_one=False).any()
    assert int(check(selection_on, "kl_cov", covariance, mask, ratio=1e-3).sum()) == 1
    one = torch.zeros(3, 30)
    one[1, 7] = 1
    assert int(check(selection_on, "kl_cov", covariance, one).sum()) == 1


def test_padding_does_not_leak(selection_on: BackendDevice) -> None:
    covariance, mask = covariances((4, 80))
    for poison in (NAN, INF, -INF, 2.0):
        dirty = torch.where(mask, covariance, poison)
        for function, options in (("kl_cov", {}), ("clip_cov", {"seed": 1})):
            selected = check(selection_on, function, dirty, mask, ratio=0.1, **options)
            assert torch.equal(selected, getattr(reference, function)(covariance, mask, ratio=0.1, **options))


def test_infinite_covariance(selection_on: BackendDevice) -> None:
    covariance, mask = covariances((4, 80))
    covariance[1, 3:9], covariance[2, 5:60] = INF, -INF
    both(selection_on, covariance, mask, k=20)
    both(selection_on, covariance, mask, ratio=1.0)


@pytest.mark.parametrize("ratio", [2e-4, 2e-3, 1e-3, 0.02, 0.1, 0.29, 1 / 3, 0.7, 1.0])
def test_count_is_that_of_python(ratio: float) -> None:
    """floor(float64(ratio) · N), where fp32 would floor differently; on the fast backends, with N up to 50 000."""
    assert math.floor(torch.tensor(0.29) * 100) != math.floor(0.29 * 100)  # the grid has such places
    for backend in ("torch", "cpu"):
        if ek.backends()["kl_cov_mask"][backend] != "available":
            continue
        for tokens in (1, 3, 7, 100, 999, 1000, 5000, 10_000, 15_000, 35_000, 50_000):
            selected = ek.kl_cov_mask(torch.arange(float(tokens)), ratio=ratio, backend=backend)
            assert int(selected.sum()) == max(1, int(ratio * tokens)), (backend, tokens)
            assert bool(selected[-int(selected.sum()) :].all())


def capabilities() -> list[str]:
    """The instruction sets that this CPU can run."""
    return native.cpu_capability().available


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("levels", [None, 1, 1000])
def test_large_batches(levels: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16 K tokens on, the C++ backend samples a threshold: the same masks as torch's plain rounds."""
    if native.load_error is not None:
        pytest.skip(native.load_error)
    covariance, mask = covariances((50, 1001), levels=levels)
    exclude = covariances((50, 1001), seed=1)[0] > 3
    index = torch.randperm(50 * 1001, generator=torch.Generator().manual_seed(4)).view(50, 1001) - 5000
    order = covariance.reshape(-1).sort().values.view_as(covariance)  # sorted: the sample has to be spread out
    for cov in (covariance, order):
        for options in (
            {},
            {"mask": mask},
            {"mask": mask, "exclude": exclude, "token_index": index},
            {"ratio": 0.4, "mask": mask},
            {"k": 1},
            {"ratio": 1.0, "token_index": index},
        ):
            calls: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
                (ek.kl_cov_mask, {}),
                (ek.clip_cov_mask, {"seed": 1}),
                (ek.clip_cov_mask, {"seed": 1, "low": -INF, "high": INF}),
                (ek.clip_cov_mask, {"seed": 1, "low": 0.95, "high": 0.99, "band": "quantile", "closed": True}),
                (ek.clip_cov_mask, {"seed": 1, "low": 0.0, "high": 0.2, "band": "quantile"}),
            ]
            for function, more in calls:
                expected = function(cov, **options, **more, backend="torch")
                for capability, threads in product(capabilities(), (1, 3)):
                    monkeypatch.setenv("ENTROPY_KERNELS_CPU_CAPABILITY", capability)
                    torch.set_num_threads(threads)
                    got = function(cov, **options, **more, backend="cpu")
                    assert torch.equal(got, expected), (capability, threads, function, more)


def test_misleading_sample() -> None:
    """The threshold's sample sees none of the large values, or only the few tokens that count: a second pass."""
    if ek.backends()["kl_cov_mask"]["cpu"] != "available":
        pytest.skip("the C++ extension was not built")
    tokens = 100_000
    fractions = [(0.6180339887498949 * (i + 1)) % 1.0 for i in range(4096)]
    sampled = torch.tensor([int(fraction * tokens) for fraction in fractions])
    covariance = torch.full((tokens,), 3.0) + torch.arange(tokens) * 1e-6
    covariance[sampled] = 4.0  # looks as if everything were 4
    mask = torch.ones(tokens, dtype=torch.bool)
    for k in (10, 5000, 60_000):
        for m in (mask, mask.scatter(0, sampled, False)):
            for function, options in ((ek.kl_cov_mask, {}), (ek.clip_cov_mask, {"seed": 1, "low": 2, "high": 3.5})):
                expected = function(covariance, m, k=k, **options, backend="torch")
                assert torch.equal(function(covariance, m, k=k, **options, backend="cpu"), expected)


def test_uniform_draw() -> None:
    """Over seeds every candidate is drawn equally often, and neighbours are drawn together no more than by chance."""
    covariance = torch.tensor([0.0, 2.0] * 40)
    draws, k = 4000, 8
    counts, pairs = torch.zeros(40), 0
    for seed in range(draws):
        drawn = ek.clip_cov_mask(covariance, seed=seed, k=k)[1::2]
        counts += drawn
        pairs += int((drawn[1:] & drawn[:-1]).sum())
    share = k / 40
    chi2 = float(((counts - draws * share) ** 2 / (draws * share * (1 - share))).sum()) * 39 / 40
    assert 16 < chi2 < 73, chi2  # 39 degrees of freedom: each tail beyond has probability below 1e-3
    expected = draws * 39 * share * (k - 1) / 39
    assert abs(pairs - expected) < 6 * math.sqrt(expected)


def test_seed(selection_on: BackendDevice) -> None:
    covariance, mask = (x.to(selection_on.device) for x in covariances((3, 300)))
    seeds = [0, 1, -1, 2**32, 2**63 - 1, -(2**63)]
    masks = [
        ek.clip_cov_mask(covariance, mask, seed=s, k=5, backend=selection_on.backend).cpu().numpy().tobytes()
        for s in seeds
    ]
    assert len(set(masks)) == len(seeds)
    for s, expected in zip(seeds[:3], masks[:3], strict=True):
        tensor = torch.tensor(s, device=selection_on.device)
        got = ek.clip_cov_mask(covariance, mask, seed=tensor, k=5, backend=selection_on.backend)
        assert got.cpu().numpy().tobytes() == expected
    unsigned = ek.clip_cov_mask(covariance, mask, seed=2**64 - 1, k=5, backend=selection_on.backend)
    assert unsigned.cpu().numpy().tobytes() == masks[2]


def test_numbers_of_numpy_are_numbers() -> None:
    covariance, mask = covariances((3, 300))
    plain = ek.clip_cov_mask(covariance, mask, seed=3, k=5, low=0.5, high=4.0)
    assert torch.equal(
        plain,
        ek.clip_cov_mask(covariance, mask, seed=np.int64(3), k=np.int32(5), low=np.float32(0.5), high=np.float64(4)),
    )
    plain = ek.kl_cov_mask(covariance, mask, ratio=0.25)
    assert torch.equal(plain, ek.kl_cov_mask(covariance, mask, ratio=np.float32(0.25)))
    for options in ({"k": 2.0}, {"k": True}, {"ratio": "0.1"}, {"ratio": True}):
        with pytest.raises(TypeError, match=r"expected an? (int|number), got"):
            ek.kl_cov_mask(covariance, mask, **options)


def test_covariance_does_not_depend_on_the_threads(threads_restored: None) -> None:
    logprob, advantages, mask = batch((300, 1001))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(ek.token_covariance(logprob, advantages, mask))
    assert same_bits(*results)


def test_unknown_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load_error is not None:
        pytest.skip(native.load_error)
    monkeypatch.setenv("ENTROPY_KERNELS_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match=r"ENTROPY_KERNELS_CPU_CAPABILITY: expected one of .* got sse9"):
        ek.kl_cov_mask(torch.zeros(3), backend="cpu")


@pytest.mark.parametrize("with_tensors", [False, True])
def test_no_value_is_read_by_the_host(with_tensors: bool) -> None:
    """On meta tensors there is no value to read: whatever asks for one raises."""
    values = torch.zeros(50, device="meta")
    flags = torch.zeros(50, dtype=torch.bool, device="meta") if with_tensors else None
    index = torch.zeros(50, dtype=torch.int64, device="meta") if with_tensors else None
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):
        bool(seed)
    for count in (Count(0.1, None, True), Count(None, 4, True)):
        for band in (Band(1.0, 5.0, False, True), Band(0.1, 0.9, True, False)):
            mask = eager.clip_cov_mask(values, flags, flags, index, seed, count, band, "")
            assert mask.shape == values.shape and mask.dtype == torch.bool
        assert eager.kl_cov_mask(values, flags, flags, index, count, "").dtype == torch.bool
    assert eager.token_covariance(values, values, flags, "").dtype == torch.float32


def test_advantages_per_sequence(selection_on):
    """(B,) is one per sequence, also where B = L would let it run along the positions; integers are advantages too."""
    logprob = torch.randn(4, 4, device=selection_on.device)
    per_sequence = torch.tensor([1, -2, 3, 0], device=selection_on.device)
    expected = ek.token_covariance(logprob, per_sequence.float()[:, None].expand(4, 4), backend=selection_on.backend)
    for advantages in (per_sequence, per_sequence[:, None], per_sequence.double()):
        got = ek.token_covariance(logprob, advantages, backend=selection_on.backend)
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="advantages: expected"):
        ek.token_covariance(logprob, torch.ones(3, device=selection_on.device))


SELECTIONS: dict[str, Callable[..., Any]] = {
    "covariance": lambda x, mask, exclude: ek.token_covariance(x, x, mask),
    "kl_cov": lambda x, mask, exclude: ek.kl_cov_mask(x, mask, exclude=exclude, k=3),
    "clip_cov": lambda x, mask, exclude: ek.clip_cov_mask(x, mask, exclude=exclude, seed=0, k=3, low=-9, high=9),
    "batch": lambda x, mask, exclude: added(x, mask, exclude).kl_cov(k=3)[0],
}


def added(x: Tensor, mask: Any, exclude: Any) -> ek.SelectionBatch:
    batch = ek.SelectionBatch()
    batch.add(x, x, mask, exclude=exclude)
    return batch


@pytest.mark.parametrize("argument", ["mask", "exclude"])
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("value", [0.5, NAN, -1.0, 2.0])
def test_masks_are_of_0_and_1(name: str, argument: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else is an error, and where nobody looks nothing is selected, and a covariance is NaN."""
    if (name, argument) == ("covariance", "exclude"):
        return
    x = torch.linspace(-2, 3, 10)
    flags = {"mask": None, "exclude": None, argument: torch.tensor([0, 1, 0, 1, 0, 0, value, 1, 0, 0.0])}
    with pytest.raises(ValueError, match=rf"{argument}: expected a mask of 0 and 1, got {value} \(1 such of 10\); "):
        SELECTIONS[name](x, **flags)
    monkeypatch.setattr("entropy_kernels._arguments.values_are_checked", lambda tensor: False)
    got = SELECTIONS[name](x, **flags)
    assert not got.nan_to_num(0.0).any() and (name != "covariance" or got.isnan().any())
    right = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1, 0, 0])
    for dtype in (torch.int8, torch.uint8, torch.float16, torch.float64, torch.bool):
        flags[argument] = right.to(dtype)
        assert SELECTIONS[name](x, **flags).any() or argument == "exclude"
