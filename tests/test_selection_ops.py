"""The selection operators as torch sees them (opcheck, compile), argument errors, and random shapes and strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_kernels as ek
import reference_selection as reference
from calls import moved
from conftest import BackendDevice

OPS = torch.ops.entropy_kernels


def tensors(on: BackendDevice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    covariance = 2 * torch.randn(3, 40, generator=generator)
    mask = torch.rand(3, 40, generator=generator) < 0.8
    values = (covariance, mask, torch.randperm(120, generator=generator).view(3, 40), torch.tensor(4))
    return tuple(value.to(on.device) for value in values)  # type: ignore[return-value]


def test_opcheck(selection_on: BackendDevice) -> None:
    covariance, mask, index, seed = tensors(selection_on)
    backend = selection_on.backend
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not selection_on.interpreted:
        tests = (*tests, "test_aot_dispatch_dynamic")
    check: Any = torch.library.opcheck
    check(OPS.token_covariance, (covariance, covariance.t().contiguous().t(), mask, "", backend), test_utils=tests)
    check(OPS.token_covariance, (covariance.double(), covariance, None, "", backend), test_utils=tests)
    band = (0.5, 3.0, False, True)
    clip = (covariance, mask, ~mask, index, seed, None, 0.1, None, True, *band, "", backend)
    check(OPS.clip_cov_mask, clip, test_utils=tests)
    clip = (covariance.t(), None, None, None, seed, None, None, 5, False, 0.1, 0.9, True, False, "", backend)
    check(OPS.clip_cov_mask, clip, test_utils=tests)
    check(OPS.kl_cov_mask, (covariance, mask, None, index, None, 0.1, None, True, "", backend), test_utils=tests)


def test_compile_fullgraph(selection_on: BackendDevice) -> None:
    """One graph for statistics → selection, for int and tensor seeds; a new seed does not compile again."""
    torch._dynamo.reset()
    logprob, mask, index, _ = tensors(selection_on)
    graphs = []

    def count_graphs(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def step(logprob: Tensor, advantages: Tensor, mask: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        covariance = ek.token_covariance(logprob, advantages, mask, backend=selection_on.backend)
        options: dict[str, Any] = {"token_index": index, "backend": selection_on.backend}
        clip = ek.clip_cov_mask(covariance, mask, seed=seed, ratio=0.05, low=0.1, **options)
        clip_fixed = ek.clip_cov_mask(covariance, mask, seed=7, k=3, low=0.1, high=0.9, band="quantile", **options)
        return covariance, clip, clip_fixed, ek.kl_cov_mask(covariance, mask, **options)

    advantages = torch.linspace(-2, 2, 3, device=logprob.device)[:, None]
    compiled = torch.compile(step, fullgraph=True, backend=count_graphs)
    for value in (1, 2):
        seed = torch.tensor(value, device=logprob.device)
        for got, expected in zip(
            compiled(logprob, advantages, mask, seed), step(logprob, advantages, mask, seed), strict=True
        ):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


def test_compile_int_seed() -> None:
    """A seed that counts steps must not compile again for each: fullgraph raises at the limit of recompilations."""
    torch._dynamo.reset()
    covariance = torch.linspace(0, 6, 50)
    graphs = []

    def count_graphs(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(lambda c, s: ek.clip_cov_mask(c, seed=s, k=5), fullgraph=True, backend=count_graphs)
    for seed in (3, 4, 5, 6, -5, 2**62):
        assert torch.equal(compiled(covariance, seed), ek.clip_cov_mask(covariance, seed=seed, k=5))
    assert len(graphs) <= 2, len(graphs)  # the first seed as a constant, then any


def test_compile_with_a_group(tmp_path: Any) -> None:
    """The group is a constant of the graph, by its name."""
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        covariance = torch.linspace(0, 6, 50)

        def both(covariance: Tensor) -> tuple[Tensor, ...]:
            own = ek.token_covariance(covariance, covariance, batch_group=group)
            return own, ek.clip_cov_mask(own, seed=1, k=5, batch_group=group), ek.kl_cov_mask(own, batch_group=group)

        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(covariance), both(covariance), strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_compile_inductor(inductor: Callable) -> None:
    covariance = torch.linspace(0, 6, 50)
    compiled = inductor(lambda c: ek.clip_cov_mask(c * 2, seed=1, k=5) & ek.kl_cov_mask(c * 2, k=30))
    expected = ek.clip_cov_mask(covariance * 2, seed=1, k=5) & ek.kl_cov_mask(covariance * 2, k=30)
    assert torch.equal(compiled(covariance), expected)


def test_no_gradient() -> None:
    logprob = torch.randn(3, 5, requires_grad=True)
    advantages = torch.randn(3, 1, requires_grad=True)
    covariance = ek.token_covariance(logprob, advantages)
    assert not covariance.requires_grad
    assert not ek.kl_cov_mask(logprob).requires_grad and not ek.clip_cov_mask(logprob, seed=0).requires_grad


@st.composite
def strided(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariance with ties, infinities and NaN, masks and indices: transposed, sliced, flipped or expanded views."""
    shape = draw(st.lists(st.integers(0, 7), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    big = [2 * size + 1 for size in shape]
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, 5.0])

    def view(value: Tensor) -> Tensor:
        if draw(st.booleans()):
            value = value.permute(*reversed(range(value.dim()))).contiguous().permute(*reversed(range(value.dim())))
        for dim in range(len(shape)):
            step, start = draw(st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1)]))
            value = value[(slice(None),) * dim + (slice(start, None, step),)].narrow(dim, 0, shape[dim])
        return value

    values = (torch.randn(big, generator=generator) * 4).round() / 2
    which = torch.randint(0, 40, big, generator=generator)
    values = torch.where(which < 7, special[which.clamp(max=6)], values)
    index = torch.randperm(values.numel(), generator=generator).view(big) - 20
    masks = [torch.rand(big, generator=generator) < share for share in (0.8, 0.2)]
    return view(values), view(masks[0]), view(masks[1]), view(index)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sample=strided(), data=st.data())
def test_any_values_shapes_and_strides(
    selection_on: BackendDevice, sample: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    if selection_on.interpreted:
        pytest.skip("the interpreter takes a third of a second for each call")
    covariance, mask, exclude, index = sample
    options: dict[str, Any] = {}
    if data.draw(st.booleans()):
        options["k"] = data.draw(st.integers(0, 30))
    else:
        options["ratio"] = data.draw(st.sampled_from([1e-4, 0.05, 1 / 3, 1.0]))
        options["at_least_one"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        options["exclude"] = exclude
    if data.draw(st.booleans()):
        options["token_index"] = index
    given_mask = mask if data.draw(st.booleans()) else None
    closed = data.draw(st.booleans())
    bands: list[dict[str, Any]] = [
        {"low": 1.0, "high": 5.0},
        {"low": 0.0, "high": math.inf},
        {"low": 0.25, "high": 1.0, "band": "quantile"},
    ]

    def there(value: Any) -> Any:
        return moved(value, selection_on.device) if isinstance(value, Tensor) else value

    backend = selection_on.backend
    placed = [there(covariance), there(given_mask)], {name: there(value) for name, value in options.items()}
    got = ek.kl_cov_mask(*placed[0], **placed[1], backend=backend)
    assert torch.equal(got.cpu(), reference.kl_cov(covariance, given_mask, **options))
    for band in bands:
        clip: dict[str, Any] = {"seed": 11, "closed": closed, **band}
        got = ek.clip_cov_mask(*placed[0], **clip, **placed[1], backend=backend)
        assert torch.equal(got.cpu(), reference.clip_cov(covariance, given_mask, **clip, **options))


COV = torch.zeros(2, 3)
ERRORS: list[tuple[str, type[Exception], str, tuple, dict[str, Any]]] = [
    ("kl_cov_mask", TypeError, "covariance: expected a torch.Tensor, got list", ([1.0],), {}),
    ("kl_cov_mask", TypeError, "covariance: expected a floating-point dtype, got torch.int64", (COV.long(),), {}),
    ("kl_cov_mask", ValueError, r"mask: expected covariance's shape \(2, 3\).*got \(3, 2\)", (COV, COV.t()), {}),
    ("kl_cov_mask", ValueError, r"mask: expected covariance's shape \(2, 3\).*got \(3,\)", (COV, torch.ones(3)), {}),
    ("kl_cov_mask", TypeError, "mask: .* got torch.complex64", (COV, COV.to(torch.complex64)), {}),
    ("kl_cov_mask", ValueError, r"exclude: .*got \(1, 1, 1\)", (COV,), {"exclude": torch.ones(1, 1, 1)}),
    ("kl_cov_mask", ValueError, "mask: expected on the device of covariance, cpu, got meta", (COV, COV.to("meta")), {}),
    ("kl_cov_mask", ValueError, r"ratio: expected a fraction in \(0, 1\], got 0", (COV,), {"ratio": 0}),
    ("kl_cov_mask", ValueError, r"ratio: .* got -0.1", (COV,), {"ratio": -0.1}),
    ("kl_cov_mask", ValueError, r"ratio: .* got 1.0001", (COV,), {"ratio": 1.0001}),
    ("kl_cov_mask", ValueError, r"ratio: .* got nan", (COV,), {"ratio": math.nan}),
    ("kl_cov_mask", TypeError, "ratio: expected a number, got str", (COV,), {"ratio": "0.1"}),
    ("kl_cov_mask", ValueError, "k: expected >= 0, got -1", (COV,), {"k": -1}),
    ("kl_cov_mask", TypeError, "k: expected an int, got float", (COV,), {"k": 2.0}),
    ("kl_cov_mask", ValueError, "ratio, k: expected one of them", (COV,), {"k": 2, "ratio": 0.1}),
    ("kl_cov_mask", TypeError, "token_index: expected dtype torch.int64", (COV,), {"token_index": COV.int()}),
    ("kl_cov_mask", ValueError, r"token_index: .*\(2, 3\), got \(3,\)", (COV,), {"token_index": torch.arange(3)}),
    ("kl_cov_mask", ValueError, "backend: expected one of", (COV,), {"backend": "gpu"}),
    ("kl_cov_mask", TypeError, "batch_group: expected a torch.distributed", (COV,), {"batch_group": 3}),
    ("clip_cov_mask", TypeError, "seed", (COV,), {}),
    ("clip_cov_mask", ValueError, "seed: expected an int or a 0-d int64 tensor, got None", (COV,), {"seed": None}),
    (
        "random_tokens",
        ValueError,
        "seed: expected an int or a 0-d int64 tensor, got None",
        (COV,),
        {"seed": None, "k": 1},
    ),
    ("clip_cov_mask", TypeError, "seed: .* got float", (COV,), {"seed": 1.0}),
    ("clip_cov_mask", TypeError, "seed: .* got bool", (COV,), {"seed": True}),
    ("clip_cov_mask", TypeError, "seed: .* got torch.int32", (COV,), {"seed": torch.tensor(1, dtype=torch.int32)}),
    ("clip_cov_mask", TypeError, r"seed: .* of shape \(1,\)", (COV,), {"seed": torch.tensor([1])}),
    ("clip_cov_mask", ValueError, "seed: expected at most 64 bits", (COV,), {"seed": 2**64}),
    ("clip_cov_mask", ValueError, "low: expected < high, got low=2, high=1", (COV,), {"seed": 1, "low": 2, "high": 1}),
    ("clip_cov_mask", ValueError, "low: expected < high", (COV,), {"seed": 1, "low": 1.0, "high": 1.0}),
    ("clip_cov_mask", ValueError, "low: expected < high", (COV,), {"seed": 1, "low": math.nan}),
    (
        "clip_cov_mask",
        ValueError,
        r"high: .* a 0-d tensor, got shape \(1,\)",
        (COV,),
        {"seed": 1, "high": torch.ones(1)},
    ),
    ("clip_cov_mask", TypeError, "low: .* got torch.bool", (COV,), {"seed": 1, "low": torch.tensor(True)}),
    ("kl_cov_mask", TypeError, "ratio: .* got torch.complex64", (COV,), {"ratio": torch.tensor(1j)}),
    (
        "kl_cov_mask",
        ValueError,
        "ratio, k: expected one of them, got both",
        (COV,),
        {"k": torch.tensor(2), "ratio": 0.1},
    ),
    ("top_tokens", ValueError, "ratio, k: expected one of them, got neither", (COV,), {}),
    ("top_tokens", TypeError, "score: expected a torch.Tensor, got list", ([1.0],), {"k": 1}),
    ("random_tokens", ValueError, "ratio, k: expected one of them, got neither", (COV,), {"seed": 1}),
    ("random_tokens", ValueError, "mask: expected score's shape", (COV, COV.t()), {"seed": 1, "k": 1}),
    ("clip_cov_mask", ValueError, r"high: expected a share in \[0, 1\]", (COV,), {"seed": 1, "band": "quantile"}),
    (
        "clip_cov_mask",
        ValueError,
        "band: expected one of 'absolute', 'quantile'",
        (COV,),
        {"seed": 1, "band": "percent"},
    ),
    ("token_covariance", TypeError, "advantages: expected a torch.Tensor, got float", (COV, 1.0), {}),
    ("token_covariance", ValueError, r"advantages: expected logprob's shape.*got \(3,\)", (COV, torch.ones(3)), {}),
    ("token_covariance", TypeError, "logprob: expected a floating-point dtype", (COV.long(), COV), {}),
]


@pytest.mark.parametrize(("function", "error", "message", "arguments", "options"), ERRORS)
def test_errors(function: str, error: type[Exception], message: str, arguments: tuple, options: dict) -> None:
    with pytest.raises(error, match=message):
        getattr(ek, function)(*arguments, **options)


def test_one_value_per_sequence() -> None:
    logprob, advantages = torch.randn(4, 6), torch.randn(4, 1)
    expected = ek.token_covariance(logprob, advantages.expand(4, 6))
    assert torch.equal(ek.token_covariance(logprob, advantages), expected)
    assert torch.equal(ek.token_covariance(logprob, torch.tensor(2.0)), torch.zeros(4, 6))
