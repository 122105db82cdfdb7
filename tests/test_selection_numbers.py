"""Ratio, k, low and high as tensors: the masks of plain numbers, nothing read back, nothing compiled again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import entropy_kernels as ek
from conftest import BackendDevice
from entropy_kernels.backends.eager import selection as eager
from entropy_kernels.backends.radix_select import Band, Count
from gloo import run_ranks

NAN, INF = math.nan, math.inf
OPS = torch.ops.entropy_kernels
NUMBERS = ("ratio", "k", "low", "high")
ABSOLUTE: dict[str, Any] = {"low": 0.1, "high": 2.5}
QUANTILE: dict[str, Any] = {"low": 0.3, "high": 0.9, "band": "quantile", "closed": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("kl_cov_mask", {"ratio": 0.07}),
    ("kl_cov_mask", {"ratio": 1e-4, "at_least_one": False}),
    ("kl_cov_mask", {"ratio": 1e-4}),
    ("kl_cov_mask", {"k": 0}),
    ("top_tokens", {"k": 9}),
    ("top_tokens", {"ratio": 1.0}),
    ("clip_cov_mask", {"seed": 3, "ratio": 0.05}),
    ("clip_cov_mask", {"seed": 3, "k": 11, **ABSOLUTE}),
    ("clip_cov_mask", {"seed": 4, "ratio": 0.2, **ABSOLUTE, "closed": True}),
    ("random_tokens", {"seed": 4, "ratio": 0.2, **QUANTILE}),
    ("random_tokens", {"seed": 5, "k": 500, "low": -1.0}),
]


def batch() -> dict[str, Tensor]:
    """Covariances with ties, masks and indices."""
    generator = torch.Generator().manual_seed(2)
    covariance = (2 * torch.randn(4, 60, generator=generator) * 8).round() / 8
    covariance[0, :4] = torch.tensor([NAN, INF, -INF, -0.0])
    return {
        "covariance": covariance,
        "mask": torch.rand(4, 60, generator=generator) < 0.8,
        "exclude": torch.rand(4, 60, generator=generator) < 0.1,
        "token_index": torch.randperm(240, generator=generator).view(4, 60),
    }


def as_tensors(options: dict[str, Any], dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Any]:
    make = {name: torch.tensor(options[name], dtype=dtype, device=device) for name in NUMBERS if name in options}
    return {**options, **make}


def call(function: str, data: dict[str, Tensor], backend: str, **options: Any) -> Tensor:
    more = {name: value for name, value in data.items() if name not in ("covariance", "mask")}
    return getattr(ek, function)(data["covariance"], data["mask"], **more, **options, backend=backend)


@pytest.mark.parametrize(("function", "options"), CASES)
def test_equal_to_numbers(selection_on: BackendDevice, function: str, options: dict[str, Any]) -> None:
    data = {name: value.to(selection_on.device) for name, value in batch().items()}
    for dtype in (torch.float64, torch.float32, torch.float16):
        given = as_tensors(options, dtype, selection_on.device)
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in given.items()}
        if "k" in plain:
            given["k"], plain["k"] = given["k"].int(), int(plain["k"])
        expected = call(function, data, "torch", **plain)
        assert torch.equal(call(function, data, selection_on.backend, **given), expected)
        if "low" in given and "high" in given:  # one of each
            given["low"] = plain["low"]
            assert torch.equal(call(function, data, selection_on.backend, **given), expected)
        given = as_tensors(plain)  # on the CPU
        assert torch.equal(call(function, data, selection_on.backend, **given), expected)
        if selection_on.interpreted:
            break


UNCHECKED: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    ("kl_cov_mask", {"ratio": 7.0}, {"ratio": 1.0}),
    ("kl_cov_mask", {"ratio": INF}, {"ratio": 1.0}),
    ("kl_cov_mask", {"ratio": -1.0}, {"k": 1}),
    ("kl_cov_mask", {"ratio": NAN}, {"k": 1}),
    ("kl_cov_mask", {"ratio": -INF, "at_least_one": False}, None),
    ("kl_cov_mask", {"k": -3.0}, None),
    ("kl_cov_mask", {"k": 2.75}, {"k": 2}),
    ("kl_cov_mask", {"k": 1e300}, {"ratio": 1.0}),
    ("kl_cov_mask", {"k": INF}, {"ratio": 1.0}),
    ("random_tokens", {"seed": 1, "k": 5, "low": 2.0, "high": 2.0, "closed": True}, None),
    ("random_tokens", {"seed": 1, "k": 5, "low": 3.0, "high": 2.0}, None),
    ("random_tokens", {"seed": 1, "k": 5, "low": NAN}, None),
    ("random_tokens", {"seed": 1, "k": 5, "high": NAN, "closed": True}, None),
    ("random_tokens", {"seed": 1, "k": 5, "low": -1e300, "high": 1e300}, {"seed": 1, "k": 5}),
    ("random_tokens", {"seed": 1, "k": 9, **QUANTILE, "high": 7.0}, {"seed": 1, "k": 9, **QUANTILE, "high": 1.0}),
    ("random_tokens", {"seed": 1, "k": 9, **QUANTILE, "low": -INF}, {"seed": 1, "k": 9, **QUANTILE, "low": 0.0}),
    ("random_tokens", {"seed": 1, "k": 5, **QUANTILE, "low": 0.9}, None),
    ("random_tokens", {"seed": 1, "k": 5, **QUANTILE, "low": NAN}, None),
]  # fmt: skip


@pytest.mark.parametrize(("function", "options", "same_as"), UNCHECKED)
def test_values_out_of_range(
    selection_on: BackendDevice, function: str, options: dict[str, Any], same_as: dict[str, Any] | None
) -> None:
    """They act as the docstring says, on every backend."""
    data = {name: value.to(selection_on.device) for name, value in batch().items()}
    got = call(function, data, selection_on.backend, **as_tensors(options))
    expected = torch.zeros_like(got) if same_as is None else call(function, data, "torch", **same_as)
    assert torch.equal(got, expected)
    assert same_as is None or bool(expected.any())


def test_nothing_counts(selection_on: BackendDevice) -> None:
    for covariance in (torch.ones(0), torch.ones(3, 4)):
        tokens = [covariance.to(selection_on.device), torch.zeros_like(covariance).to(selection_on.device)]
        share = torch.tensor(0.5)
        assert not ek.top_tokens(*tokens, ratio=share, backend=selection_on.backend).any()
        for band in ({}, {"low": share, "high": 1.0, "band": "quantile"}):
            assert not ek.random_tokens(*tokens, seed=0, ratio=share, backend=selection_on.backend, **band).any()


@pytest.mark.parametrize(("function", "options"), [case for case in CASES if "at_least_one" not in case[1]])
def test_debugging_checks_the_values(function: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_KERNELS_DEBUG", "1")
    data, given = batch(), as_tensors(options)
    assert torch.equal(call(function, data, "auto", **given), call(function, data, "auto", **options))
    wrong = {"ratio": (0.0, 1.5, NAN), "k": (-1.0, NAN), "low": (INF, NAN), "high": (-2.0,)}
    for name, values in wrong.items():
        for value in values if name in options else ():
            with pytest.raises(ValueError, match=f"{name}: expected|low: expected < high"):
                call(function, data, "auto", **{**given, name: torch.tensor(value)})


def test_the_shared_driver_reads_nothing_back() -> None:
    """On meta tensors, where there is no value to read."""
    meta = torch.device("meta")
    covariance, mask = torch.empty(100, device=meta), torch.empty(100, dtype=torch.bool, device=meta)
    numbers, seed = torch.empty(4, dtype=torch.float64, device=meta), torch.empty((), dtype=torch.int64, device=meta)
    count = Count(None, None, True, numbers)
    for quantile in (False, True):
        band = Band(0.0, 0.0, quantile, False, numbers)
        assert eager.clip_cov_mask(covariance, mask, None, None, seed, count, band, "").shape == (100,)
    assert eager.kl_cov_mask(covariance, mask, None, None, count, "").shape == (100,)
    for value in (numbers[0], torch.tensor(0.5)):  # there, or on the CPU
        assert ek.clip_cov_mask(covariance, mask, seed=seed, ratio=value, low=value).shape == (100,)
    with pytest.raises(RuntimeError, match="meta"):
        bool(numbers[0] > 0)


# ---- over ranks


def select_on_rank(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    data = {name: value.view(-1).split([70, 170])[rank] for name, value in batch().items()}
    group: dict[str, Any] = {"batch_group": dist.group.WORLD}
    out = []
    for backend in ("torch", "cpu"):
        if ek.backends()["clip_cov_mask"][backend] == "available":
            for function, options in CASES:
                plain = call(function, data, backend, **options, **group)
                out.append((plain, call(function, data, backend, **as_tensors(options), **group)))
    selection = ek.SelectionBatch(dist.group.WORLD)
    selection.add(data["covariance"].nan_to_num(posinf=2.0, neginf=-2.0), data["mask"].double(), None)
    for options in ({"k": 5}, {"ratio": 0.1}):
        out.append((selection.kl_cov(**options)[0], selection.kl_cov(**as_tensors(options))[0]))
        options = {"seed": 1, "low": 0.01, **options}
        out.append((selection.clip_cov(**options)[0], selection.clip_cov(**as_tensors(options))[0]))
    return out


def test_over_ranks() -> None:
    by_rank = run_ranks(2, select_on_rank)
    assert all(torch.equal(*pair) for pairs in by_rank for pair in pairs)
    got = [torch.cat([pairs[number][1] for pairs in by_rank]) for number in range(len(CASES))]
    for mask, (function, options) in zip(got, CASES, strict=True):
        expected = call(function, batch(), "torch", **options).view(-1)
        assert torch.equal(mask, expected), (function, options)


# ---- compiled

VALUES: dict[str, list[float]] = {
    "ratio": [2e-3, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5],
    "k": [5, 3, 7, 20, 11, 2, 9],
    "low": [0.1, 0.2, -0.5, 0.3, 0.45, -1.25, 0.7],
    "high": [2.5, 1.5, 0.9, 3.5, 2.25, 1.75, 0.8],
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("names", [("ratio",), ("k",), ("ratio", "low", "high"), ("k", "low", "high")], ids="-".join)
def test_a_schedule_compiles_once(names: tuple[str, ...], as_tensor: bool) -> None:
    """A number first as a constant, then any; a tensor is any at once.

    Not of float64 on the CPU: any graph of those torch 2.13 makes twice, before its first run.
    """
    torch._dynamo.reset()
    data = batch()

    def select(covariance: Tensor, values: dict[str, Any]) -> Tensor:
        if "low" in values:
            return ek.clip_cov_mask(covariance, data["mask"], seed=3, **values)
        return ek.kl_cov_mask(covariance, data["mask"], **values)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(select, backend=counter, fullgraph=True)
    for number in range(7):
        values: dict[str, Any] = {name: VALUES[name][number] for name in names}
        if as_tensor:
            values = {name: torch.tensor(value) for name, value in values.items()}
        got = compiled(data["covariance"], values)
        plain = {name: value.item() if as_tensor else value for name, value in values.items()}
        assert torch.equal(got, select(data["covariance"], plain)) and bool(got.any())
    assert counter.frame_count <= (1 if as_tensor else 2)


# ---- names and the operators below


def test_general_names() -> None:
    """The paper's names are the general ones with defaults."""
    data = batch()
    for function, general, defaults in (
        ("kl_cov_mask", "top_tokens", {"ratio": 2e-3}),
        ("clip_cov_mask", "random_tokens", {"ratio": 2e-4, "low": 1.0, "high": 5.0}),
    ):
        seed = {"seed": 8} if "low" in defaults else {}
        assert torch.equal(call(function, data, "auto", **seed), call(general, data, "auto", **seed, **defaults))
    everything = ek.random_tokens(data["covariance"], data["mask"], seed=0, k=1000)
    # without bounds everything but NaN and, open as the band is, the infinities
    assert torch.equal(everything, data["mask"] & data["covariance"].isfinite())


COV = torch.zeros(2, 3)
BITS = torch.ones(2, 3, dtype=torch.bool)
RIGHT: dict[str, dict[str, Any]] = {
    "token_covariance": {"logprob": COV, "advantages": COV, "mask": None},
    "kl_cov_mask": {"covariance": COV, "mask": None, "exclude": None, "token_index": None, "numbers": None,
                    "ratio": 0.1, "k": None, "at_least_one": True},
}  # fmt: skip
RIGHT["clip_cov_mask"] = {
    **RIGHT["kl_cov_mask"], "seed": torch.tensor(1), "low": 1.0, "high": 5.0, "quantile": False, "closed": False
}  # fmt: skip
SEED = RIGHT["clip_cov_mask"]["seed"]
MISUSE: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("token_covariance", ValueError, r"advantages: expected shape \(1000000,\), got \(3,\)",
     {"logprob": torch.randn(10**6), "advantages": torch.randn(3)}),
    ("token_covariance", TypeError, "advantages: expected a floating-point dtype, got torch.int64",
     {"advantages": COV.long()}),
    ("token_covariance", TypeError, "mask: expected torch.bool, got torch.float32", {"mask": COV}),
    ("token_covariance", ValueError, "advantages: expected on cpu, got meta", {"advantages": COV.to("meta")}),
    ("kl_cov_mask", TypeError, "covariance: expected a floating", {"covariance": COV.long()}),
    ("kl_cov_mask", TypeError, "mask: expected torch.bool, got torch.float32", {"mask": COV}),
    ("kl_cov_mask", ValueError, r"exclude: expected shape \(2, 3\), got \(3, 2\)", {"exclude": BITS.t()}),
    ("kl_cov_mask", ValueError, "mask: expected on cpu, got meta", {"mask": BITS.to("meta")}),
    ("kl_cov_mask", TypeError, "token_index: expected torch.int64, got torch.int32", {"token_index": COV.int()}),
    ("kl_cov_mask", TypeError, "numbers: expected torch.float64", {"numbers": COV}),
    ("kl_cov_mask", ValueError, r"numbers: expected shape \(2,\), got \(1,\)", {"numbers": torch.ones(1).double()}),
    ("kl_cov_mask", ValueError, "ratio, k: expected one of them", {"ratio": None}),
    ("clip_cov_mask", TypeError, "seed: expected torch.int64, got torch.int32", {"seed": SEED.int()}),
    ("clip_cov_mask", ValueError, r"seed: expected shape \(\), got \(1,\)", {"seed": SEED[None]}),
    ("clip_cov_mask", ValueError, "seed: expected on cpu, got meta", {"seed": SEED.to("meta")}),
    ("clip_cov_mask", ValueError, r"numbers: expected shape \(4,\), got \(2,\)", {"numbers": torch.ones(2).double()}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "error", "message", "wrong"), MISUSE)
def test_raw_operators_check_their_tensors(op: str, error: type, message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        getattr(OPS, op)(**{**RIGHT[op], **wrong}, group="", backend="cpu")
