"""Exact moments of a batch: against fractions, for any order, split and ranks."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_kernels as ek
from calls import same_bits
from entropy_kernels.ops.token_moments import token_moments as op
from gloo import one_result

INF, NAN = math.inf, math.nan


def defined(values: list[float]) -> tuple[Fraction, Fraction, float, float]:
    """Sum of terms rounded to multiples of a power of two (docstring), this unit, mean and standard deviation."""

    def total(terms: list[float]) -> tuple[Fraction, Fraction]:
        largest = max(map(abs, terms), default=0.0)
        above = math.frexp(largest)[1] if largest >= 2.0**-1022 else -1022
        exponent = min(1000, min(51, 62 - math.frexp(len(terms))[1]) - above)
        unit = Fraction(2) ** -exponent
        return sum((round(Fraction(x) / unit) * unit for x in terms), Fraction(0)), unit

    found, unit = total(values)
    mean = float(found) / max(len(values), 1)
    scale = 2.0 ** min(-math.frexp(max(map(abs, values), default=0.0))[1], 1000)
    squares, _ = total([((x - mean) * scale) ** 2 for x in values])
    return found, unit, mean, math.sqrt(squares / max(len(values), 1)) / scale


def check(values: list[float]) -> ek.TokenMoments:
    found = ek.token_moments(torch.tensor(values, dtype=torch.float64), std=True)
    total, unit, mean, std = defined(values)
    assert all(x.shape == () and x.dtype == torch.float64 for x in found)
    assert int(found.tokens) == len(values)
    assert float(found.total) == float(total) and float(found.mean) == mean
    assert abs(total - sum(map(Fraction, values), Fraction(0))) <= len(values) * unit / 2
    assert float(found.std) == pytest.approx(std, rel=1e-15, abs=1e-307)
    assert float(found.largest) == max(values, default=0.0)
    return found


@pytest.mark.parametrize("count", (0, 1, 2, 3, 100, 2047, 2048, 5000))
@pytest.mark.parametrize("size", (1.0, 1e-8, 1e100, 2.0**-1000))
def test_the_definition(count: int, size: float) -> None:
    generator = torch.Generator().manual_seed(count)
    check((size * torch.randn(count, generator=generator, dtype=torch.float64) ** 3).tolist())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e140, max_value=1e140), max_size=40))
def test_any_values(values: list[float]) -> None:
    check(values)


def test_extremes() -> None:
    assert [float(x) for x in ek.token_moments(torch.zeros(0, 4))] == [0.0] * 5
    assert [float(x) for x in ek.token_moments(torch.ones(3), torch.zeros(3), std=True)] == [0.0] * 5
    for size in (1e300, 1e-300, 5e-324, 2.0**-1074, 2.0**-1022, 1.7e308):
        values = torch.tensor([size, -size, size, 0.0], dtype=torch.float64)
        found = ek.token_moments(values, std=True)
        assert float(found.total) == pytest.approx(size, rel=1e-12, abs=2.0**-1000)
        assert float(found.mean) == pytest.approx(size / 4, rel=1e-12, abs=2.0**-1000)
        assert float(found.largest) == size
        assert float(found.std) == pytest.approx(size * math.sqrt(0.6875), rel=1e-12, abs=2.0**-1000)
    # beyond fp64
    assert float(ek.token_moments(torch.full((4,), 1.7e308, dtype=torch.float64)).total) == INF
    # a term far below the unit is rounded away, whatever its place
    large = 2.0**100
    for terms in ([large, 1.0], [1.0, large], [large, 1.0, -large]):
        assert float(ek.token_moments(torch.tensor(terms, dtype=torch.float64)).total) == (3 - len(terms)) * large


def test_signs_of_zero_and_negative_values() -> None:
    found = ek.token_moments(torch.tensor([-0.0, -0.0]), std=True)
    assert [math.copysign(1, float(x)) for x in (found.total, found.mean, found.std)] == [1, 1, 1]
    assert float(ek.token_moments(torch.tensor([-3.0, -1.0, 7.0]), torch.tensor([1, 1, 0])).largest) == -1
    assert float(ek.token_moments(torch.tensor([-3.0, -1.0])).std) == 0  # not asked for
    assert float(ek.token_moments(torch.full((999,), 0.1), std=True).std) < 1e-15


@pytest.mark.parametrize("value", (NAN, INF, -INF))
def test_what_is_not_finite(value: float) -> None:
    """Where it counts it makes sum, mean and deviation NaN; in padding it reaches nothing."""
    values = torch.tensor([1.0, value, 3.0])
    found = ek.token_moments(values, std=True)
    assert float(found.tokens) == 3 and all(x.isnan() for x in (found.total, found.mean, found.std))
    assert float(found.largest) == max(value, 3.0) if value == value else found.largest.isnan()
    found = ek.token_moments(values, torch.tensor([True, False, True]), std=True)
    assert [float(x) for x in found] == [2.0, 4.0, 2.0, 1.0, 3.0]
    pair = torch.tensor([[INF, -INF], [NAN, 1.0]])
    assert ek.token_moments(pair).mean.isnan()


def test_any_order_dtype_shape_and_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 50, generator=generator, dtype=torch.float64).exp() ** 5
    mask = torch.rand(60, 50, generator=generator) < 0.7
    expected = ek.token_moments(values, mask, std=True)
    order = torch.randperm(3000, generator=generator)
    views = [(values.t(), mask.t()), (values.view(-1)[order], mask.view(-1)[order]), (values.flip(0), mask.flip(0))]
    views += [(values[mask], None), (values, mask.int()), (values, mask.double()), (torch.cat([values, values]), None)]
    views[-1] = (views[-1][0], torch.cat([mask, torch.zeros_like(mask)]))
    for view, there in views:
        assert all(same_bits(a, b) for a, b in zip(ek.token_moments(view, there, std=True), expected, strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = torch.randn(500, generator=generator).to(dtype)
        assert all(map(same_bits, ek.token_moments(low, std=True), ek.token_moments(low.double(), std=True)))
    row = ek.token_moments(values, mask[:, :1])
    assert same_bits(row.total, ek.token_moments(values[mask[:, 0]]).total)


def test_several_at_once_are_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 300, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [1e9], [0], [1e-9]])
    mask = torch.rand(300, generator=generator) < 0.5
    rows = [torch.stack(list(ek.token_moments(row, mask, std=True))) for row in values]
    assert same_bits(op(values, mask, True, ""), torch.stack(rows))


def of_ranks(rank: int, world: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(1000, generator=generator, dtype=torch.float64).exp() ** 4
    mask = torch.rand(1000, generator=generator) < 0.6
    bad = values.clone()
    bad[999] = NAN
    found: dict[str, list[float]] = {}

    def compare(name: str, sizes: list[int], values: Tensor, mask: Tensor | None) -> None:
        own = values.split(sizes)[rank], None if mask is None else mask.split(sizes)[rank]
        ours = ek.token_moments(*own, std=True, batch_group=dist.group.WORLD)
        assert all(map(same_bits, ours, ek.token_moments(values, mask, std=True))), (name, ours)
        found[name] = [float(x) for x in ours if x == x]

    for number, sizes in enumerate(SHARDS[world]):
        compare(f"{number}", sizes, values, mask)
        compare(f"{number}, negative", sizes, -values, None)
        compare(f"{number}, nan", sizes, bad, None)
        compare(f"{number}, nothing", sizes, values, torch.zeros_like(mask))
    return found


SHARDS = {2: [[1, 999], [0, 1000]], 4: [[250] * 4, [0, 1000, 0, 0], [3, 500, 490, 7]]}


@pytest.mark.parametrize("world", SHARDS)
def test_any_ranks(world: int) -> None:
    assert len(one_result(world, of_ranks)) == 4 * len(SHARDS[world])


ERRORS: list[tuple[type[Exception], str, tuple, dict[str, Any]]] = [
    (TypeError, "values: expected a torch.Tensor, got list", ([1.0],), {}),
    (TypeError, "values: expected a floating-point dtype, got torch.int64", (torch.ones(3).long(),), {}),
    (TypeError, "values: expected a floating-point dtype, got torch.complex64", (torch.ones(3) * 1j,), {}),
    (ValueError, r"mask: expected values's shape \(3,\).*got \(2,\)", (torch.ones(3), torch.ones(2)), {}),
    (ValueError, "mask: expected a mask of 0 and 1, got 0.5", (torch.ones(2), torch.tensor([1.0, 0.5])), {}),
    (ValueError, "mask: expected on the device of values", (torch.ones(2), torch.ones(2, device="meta")), {}),
    (TypeError, "std: expected a bool, got str", (torch.ones(2),), {"std": "yes"}),
    (TypeError, "batch_group: expected a torch.distributed process group", (torch.ones(2),), {"batch_group": 1}),
]


@pytest.mark.parametrize(("error", "message", "arguments", "options"), ERRORS)
def test_errors(error: type[Exception], message: str, arguments: tuple, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ek.token_moments(*arguments, **options)


def test_the_operator() -> None:
    values, mask = torch.randn(2, 9, dtype=torch.float64), torch.arange(9) < 6
    check: Any = torch.library.opcheck
    check(op, (values, mask, True, ""))
    check(op, (values.t().contiguous().t(), None, False, ""))
    with pytest.raises(TypeError, match="values: expected float64 of shape"):
        op(values.float(), mask, True, "")
    with pytest.raises((TypeError, ValueError), match="mask: expected"):
        op(values, mask[:3], True, "")
